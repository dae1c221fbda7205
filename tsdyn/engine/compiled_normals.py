"""Standard normal numbers of numpy's Philox generators, compiled: numpy's numbers, bit by bit, in half of its time.

numpy makes a block of four words when it needs one, and asks for each word through a pointer; compiled_normals.cpp
makes many blocks at a time.  The layers of the ziggurat are asked of the numpy that is installed, through a generator
whose words are chosen.  Where a decision hangs on the last digits of an exponential, numpy itself decides; and whatever
the compiled numbers are, they are compared with numpy's before the first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsdyn.engine import native

SOURCE = native.FOLDER / "compiled_normals.cpp"
#: So many numbers are drawn by numpy: asking for the layers takes 2 ms, once.
FEW = 1 << 15
#: Numbers that are compared with numpy's before the first use; a hundred of them are beyond the edge.
_COMPARED = 1 << 18
#: What exponentials, of numbers up to 1, may be wrong by, many times over.
_MARGIN = 1e-13
_LAYERS, _WORD = 256, 52
_log = logging.getLogger("tsdyn")


class Job(ctypes.Structure):
    """The argument of a call; compiled_normals.cpp declares and explains the same fields."""

    _fields_ = (
        ("counter", ctypes.c_uint64 * 4),
        ("key", ctypes.c_uint64 * 2),
        ("buffer", ctypes.c_uint64 * 4),
        ("position", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("made", ctypes.c_int64),
        ("margin", ctypes.c_double),
        ("widths", ctypes.c_void_p),
        ("heights", ctypes.c_void_p),
        ("sure", ctypes.c_void_p),
        ("edge", ctypes.c_double),
        ("found", ctypes.c_void_p),
    )


class Layers(NamedTuple):
    """numpy's ziggurat.

    Attributes:
        widths: Of each layer over 2^52.
        heights: The density at each layer's edge.
        sure: Sizes below which a layer's number is accepted.
        edge: Where the tail begins.
    """

    widths: NDArray
    heights: NDArray
    sure: NDArray
    edge: float


def standard_normal(rng: np.random.Generator, *shape: int) -> NDArray:
    """``rng.standard_normal(shape)``: the same bits, and `rng` goes on as after it."""
    count = math.prod(shape)
    if count < FEW or type(rng.bit_generator) is not np.random.Philox or (layers := _trusted()) is None:
        return rng.standard_normal(shape)
    return drawn(rng, count, layers).reshape(shape)


def drawn(rng: np.random.Generator, count: int, layers: Layers, margin: float = _MARGIN) -> NDArray:
    """That many numbers, those aside that `margin` leaves to numpy by the compiled code; there must be one."""
    library = native.load(SOURCE, Job)
    assert library is not None
    found, made = np.empty(count), 0
    while made < count:
        held: dict[str, Any] = dict(rng.bit_generator.state)
        job = Job(
            *((ctypes.c_uint64 * len(words))(*words.tolist()) for words in (*held["state"].values(), held["buffer"])),
            held["buffer_pos"],
            count - made,
            0,
            margin,
            *(array.ctypes.data for array in layers[:3]),
            layers.edge,
            found[made:].ctypes.data,
        )
        library.draw(ctypes.byref(job))
        held["state"] = {"counter": np.array(job.counter[:], np.uint64), "key": held["state"]["key"]}
        rng.bit_generator.state = held | {"buffer": np.array(job.buffer[:], np.uint64), "buffer_pos": job.position}
        made += job.made
        if made < count:
            found[made] = rng.standard_normal()
            made += 1
    return found


@functools.cache
def _trusted() -> Layers | None:
    """The layers, if there is compiled code and it gives numpy's numbers."""
    if native.load(SOURCE, Job) is None:
        return None
    layers = asked()
    ours, theirs = (np.random.Generator(np.random.Philox(7)) for _ in range(2))
    alike = drawn(ours, _COMPARED, layers).tobytes() == theirs.standard_normal(_COMPARED).tobytes()
    if alike and repr(ours.bit_generator.state) == repr(theirs.bit_generator.state):
        return layers
    _log.info("normal numbers are drawn by numpy %s itself, since compiled ones differ from them", np.__version__)
    return None


class _Told(ctypes.Structure):
    """numpy's own struct of a generator of bits (``bitgen_t``)."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("next_uint64", ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)),
        ("next_uint32", ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)),
        ("next_double", ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p)),
        ("next_raw", ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)),
    )


class _Chosen:
    """A generator of bits, as numpy takes one, that gives one chosen word and then words that are accepted at once.

    Attributes:
        more: Whether numpy asked for a real number beside the word.
    """

    def __init__(self) -> None:
        self.more, self._word, self.lock = False, 0, threading.Lock()
        kinds: dict[str, Any] = dict(_Told._fields_)
        word = kinds["next_uint64"](self._next)
        self._told = _Told(None, word, kinds["next_uint32"](lambda _: 0), kinds["next_double"](self._real), word)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = make(ctypes.addressof(self._told), b"BitGenerator", None)
        self._rng = np.random.Generator(self)  # type: ignore[arg-type]

    def number(self, layer: int, size: int) -> float:
        """The number of a word with this layer and size."""
        self.more, self._word = False, layer | size << 9
        return float(self._rng.standard_normal())

    def _next(self, _: Any) -> int:
        word, self._word = self._word, 2
        return word

    def _real(self, _: Any) -> float:
        before, self.more = self.more, True
        return 0.5 if before else 0.0


def asked() -> Layers:
    """numpy's layers, found by asking its ziggurat."""
    chosen, scale = _Chosen(), 1 << _WORD
    widths = np.array([chosen.number(layer, 1 << 30) / (1 << 30) for layer in range(_LAYERS)])
    edge = chosen.number(0, scale - 1)  # the tail at its beginning: the first real number is 0
    edges = widths * scale
    inner = np.concatenate([[edge], [0.0], edges[1:-1]])  # a size below what the layer above reaches is accepted
    sure = [_bound(chosen, layer, int(inner[layer] / edges[layer] * scale)) for layer in range(_LAYERS)]
    heights = np.exp(-0.5 * np.square(edges))
    heights[0] = 1.0
    return Layers(widths, heights, np.array(sure, np.uint64), abs(edge))


def _bound(chosen: _Chosen, layer: int, near: int) -> int:
    """The least size of a layer for which numpy asks for more than the word; it is about `near`."""

    def more(size: int) -> bool:
        chosen.number(layer, size)
        return chosen.more

    step, low, high = 1, near, near
    while low > 0 and more(low - 1):
        low, step = max(0, low - step), 2 * step
    step = 1
    while not more(high):
        high, step = min(high + step, (1 << _WORD) - 1), 2 * step
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if more(middle) else (middle + 1, high)
    return low
