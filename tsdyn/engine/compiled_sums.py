"""Squared error and correlations of a network on a data set, in one compiled forward pass.

compiled_sums.cpp is built and called by `native`.  Both are recorded of every member at every recorded epoch; they are
summed block by block while the samples are in cache, and activations are never written to memory.
`tsdyn.observables` has the same formulas in torch: the tests compare with these, and they are used where `serves` is
False.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from numpy.typing import NDArray
from torch import Tensor

from tsdyn.engine import compiled_activations, native
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_sums.cpp"
#: Samples per block; blocks are shared out over threads, and their sums are added in order.
BLOCK = 1024
#: Data that are passed so often are held as they are read, too (`Pass.turn`), which takes what some 25 passes save.
OFTEN = 50
#: At most so many bytes are held so by one `JointSums`.
TURNED = 128 << 20
#: Sums of blocks, of all passes of one call, are at most so many numbers.
AT_ONCE = 1 << 20


class Job(ctypes.Structure):
    """The argument of a call; compiled_sums.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("samples", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("turned", ctypes.c_void_p),
        ("teacher_widths", ctypes.POINTER(ctypes.c_int64)),
        ("teachers", native.Pointers),
        ("taught", native.Pointers),
        ("found", ctypes.c_void_p),
        ("numbers", ctypes.c_int64),
        ("correlations", native.Pointers),
        ("squared_error", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Taught:
    """A teacher's activations at one hidden layer, centred and of unit norm over samples, (sample, teacher_node)."""

    activations: Tensor

    @cached_property
    def of_blocks(self) -> Tensor:
        """Their sums over each block, (block, teacher_node)."""
        return torch.stack([t.sum(0) for t in self.activations.split(BLOCK)])


@dataclass(frozen=True)
class Sums:
    """The sums that a forward pass leaves.

    Attributes:
        squared_error: Σ (f* − f)² over samples and outputs.
        correlations: (teacher_node, node) for each hidden layer asked for, as `formulas.correlation` gives it.
    """

    squared_error: Tensor
    correlations: list[Tensor]


def serves(network: Network, inputs: Tensor) -> bool:
    """Whether the compiled pass can take this network and these inputs."""
    tensors = [inputs, *network.weights, *(b for b in network.biases if b is not None)]
    known = compiled_activations.kind(network.activation) is not None
    return network.plain and known and native.serves(tensors, SOURCE, Job)


class Pass:
    """A network's pass over a data set, made as often as asked for (`made`) with the numbers that it has then.

    A pass is prepared once: the network's tensors may be changed in place between two, but not replaced, and the data
    not at all.

    Args:
        network: A network for which `serves` is True.
        inputs: (sample, input).
        targets: (sample, output).
        teachers: The teacher's activations at hidden layers 1, 2, ... as far as correlations are asked for.
    """

    def __init__(self, network: Network, inputs: Tensor, targets: Tensor, teachers: Sequence[Taught] = ()) -> None:
        hidden, of = network.depth - 1, network.widths
        asked = teachers[:hidden]
        x, y, *known = (native.written(t) for t in (inputs, targets, *(t.activations for t in asked)))
        taught = [native.written(t.of_blocks) for t in asked]
        self._shapes = [(t.shape[1], nodes) for t, nodes in zip(known, of[1:], strict=False)]
        #: What the call leaves: the squared error, and the correlations one layer after another.
        self._found = inputs.new_empty(1 + sum(math.prod(shape) for shape in self._shapes))
        self.numbers = 1 + sum(nodes * (5 + native.padded(t, inputs.dtype)) for t, nodes in self._shapes)
        self.blocks = -(-inputs.shape[0] // BLOCK)
        self.dtype, self.widths = inputs.dtype, of
        squared_error, *correlations = self._views(self._found.numpy())
        none = [None] * (hidden - len(asked))
        self.job = Job(
            network.depth,
            native.array(ctypes.c_int64, of),
            inputs.shape[0],
            BLOCK,
            compiled_activations.kind(network.activation),
            network.activation.leak or 0.0,
            native.pointers(network.weights),
            native.pointers(network.biases),
            native.address(x),
            native.address(y),
            None,
            native.array(ctypes.c_int64, [*(t.shape[1] for t in known), *[0] * len(none)]),
            native.pointers([*known, *none]),
            native.pointers([*taught, *none]),
            None,
            self.numbers,
            native.array(ctypes.c_void_p, [*(each.ctypes.data for each in correlations), *none]),
            squared_error.ctypes.data,
        )
        self._held = network, x, y, known, taught  #: the memory that the job points to
        self._turned: Tensor | None = None

    @property
    def turned_numbers(self) -> int:
        """How many numbers `turn` takes memory for."""
        library = native.load(SOURCE, Job)
        assert library is not None
        call = native.function(library, "turned_numbers", self.dtype)
        call.restype = ctypes.c_int64  # type: ignore[attr-defined]
        return int(call(ctypes.byref(self.job)))

    def turn(self) -> None:
        """Hold inputs, targets and teachers as they are read, too: sums keep their bits and take some 15 % less time.

        Raises:
            MemoryError: if there is no memory for it; nothing is changed then.
        """
        library = native.load(SOURCE, Job)
        assert library is not None
        try:
            held = torch.empty(self.turned_numbers, dtype=self.dtype, device="cpu")
        except RuntimeError as error:
            raise MemoryError(f"sums: {error}") from None
        if native.function(library, "turn", self.dtype)(ctypes.byref(self.job), ctypes.c_void_p(native.address(held))):
            raise MemoryError(f"sums: no memory for a second copy of a network of widths {self.widths}")
        self._turned = held
        self.job.turned = native.address(held)

    @property
    def sums(self) -> Sums:
        """A copy of what the latest call left."""
        squared_error, *correlations = map(torch.from_numpy, self._views(self._found.numpy().copy()))
        return Sums(squared_error[0], correlations)

    def _views(self, found: NDArray) -> list[NDArray]:
        """The squared error, (1,), and the correlations of each layer; by numpy, which makes views in less time."""
        views, begin = [found[:1]], 1
        for shape in self._shapes:
            end = begin + math.prod(shape)
            views.append(found[begin:end].reshape(shape))
            begin = end
        return views


def made(passes: Sequence[Pass]) -> list[Sums]:
    """The sums of each of these passes of one dtype, whose blocks torch's threads share out.

    The result has the same bits for any number of threads, and whatever passes are beside each.

    Raises:
        MemoryError: if there is no memory for a second copy of a network's parameters.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    for few in _pieces(passes):
        forward, finish = (native.function(library, name, few[0].dtype) for name in ("forward", "finish"))
        scratch = torch.empty(sum(p.blocks * p.numbers for p in few), dtype=few[0].dtype, device="cpu")
        begin = native.address(scratch)
        for each in few:
            each.job.found = begin
            begin += each.blocks * each.numbers * scratch.itemsize
        jobs = native.array(ctypes.c_void_p, [ctypes.addressof(each.job) for each in few])
        count = ctypes.c_int64(len(few))

        def some(first: int, last: int) -> int:
            return int(forward(jobs, count, ctypes.c_int64(first), ctypes.c_int64(last)))  # noqa: B023 - called in here

        if native.each(some, list(native.shares(sum(each.blocks for each in few)))):
            raise MemoryError(f"sums: no memory for a second copy of a network of widths {few[0].widths}")
        finish(jobs, count)
    return [each.sums for each in passes]


def _pieces(passes: Sequence[Pass]) -> Iterator[Sequence[Pass]]:
    """Consecutive passes whose sums of blocks take at most `AT_ONCE` numbers, but at least one."""
    begin = held = 0
    for end, each in enumerate(passes):
        held += each.blocks * each.numbers
        if held > AT_ONCE and end > begin:
            yield passes[begin:end]
            begin, held = end, each.blocks * each.numbers
    if passes:
        yield passes[begin:]


class JointSums:
    """The sums of several passes, made together when the first of them is asked for.

    Args:
        prepare: Gives the passes when they are first needed; None where a network cannot have one.
        times: How often they will be made, roughly.
    """

    def __init__(self, prepare: Callable[[], Sequence[Pass | None]], times: int = 1) -> None:
        self._prepare, self._times = prepare, times
        self._passes: Sequence[Pass | None] | None = None
        self._asked: tuple[int, ...] = ()
        self._found: dict[int, Sums] = {}

    def renew(self, asked: Iterable[int]) -> None:
        """Forget what was made; the passes at the positions `asked` are made again when one of them is needed."""
        self._asked, self._found = tuple(asked), {}

    def of(self, position: int) -> Sums | None:
        """The sums of the pass at `position`; None if it has none.

        Raises:
            MemoryError: as `made`, for this pass alone.
        """
        if self._passes is None:
            self._passes = self._prepare()
            if self._times >= OFTEN:
                _turn([each for each in self._passes if each is not None])
        own = self._passes[position]
        if own is None:
            return None
        if not self._found:
            passes = {i: each for i in self._asked if (each := self._passes[i]) is not None}
            with suppress(MemoryError):  # alone they may have room
                self._found = dict(zip(passes, made(list(passes.values())), strict=True))
        return self._found[position] if position in self._found else made([own])[0]


def _turn(passes: Iterable[Pass]) -> None:
    """Turn the data of passes, as far as there is room."""
    room = TURNED
    for each in passes:
        room -= each.turned_numbers * each.dtype.itemsize
        if room < 0:
            return
        with suppress(MemoryError):
            each.turn()


def sums(network: Network, inputs: Tensor, targets: Tensor, teachers: Sequence[Taught] = ()) -> Sums:
    """Squared error, and correlations with a teacher's standardised activations, of one `Pass` with these arguments.

    Raises:
        MemoryError: as `made`.
    """
    (found,) = made([Pass(network, inputs, targets, teachers)])
    return found
