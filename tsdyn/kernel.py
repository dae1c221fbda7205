"""The engine's compiled step: kernel.cpp, built by the system's C++ compiler at first use.

Without a compiler, or with the environment variable ``TSDYN_KERNEL=off``, `load` gives None and the engine goes on
in torch.  A build is kept in the user's cache directory under a name made of the source, the compiler and the
processor, so that a home directory shared by different machines holds one for each.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
BUILD_SECONDS = 120
#: Bytes of a cache line, product.hpp's kLineBytes.
LINE = 64

Pointers = ctypes.POINTER(ctypes.c_void_p)


class Job(ctypes.Structure):
    """What a call is about; the fields are kernel.cpp's, which says what they are."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("weights", Pointers),
        ("biases", Pointers),
        ("first_weights", Pointers),
        ("first_biases", Pointers),
        ("second_weights", Pointers),
        ("second_biases", Pointers),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rates", ctypes.POINTER(ctypes.c_double)),
        ("momentum", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("beta_1", ctypes.c_double),
        ("beta_2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("adam", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("frozen", ctypes.POINTER(ctypes.c_uint8)),
        ("taken", ctypes.c_int64),
    )


def array(kind: Any, values: Sequence[object]) -> ctypes.Array:
    """Values in C."""
    return (kind * len(values))(*values)  # type: ignore[no-any-return]


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Addresses; null for None."""
    return array(ctypes.c_void_p, [None if t is None else t.data_ptr() for t in tensors])


@dataclass(frozen=True)
class Layers:
    """One kind of number of every layer, lowest first: parameters, or an optimiser's moments.

    Attributes:
        weights: Each (member, node, input_node).
        biases: Each (member, node), or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]


def padded(numbers: int, dtype: torch.dtype) -> int:
    """Numbers in the whole cache lines that hold these, as product.hpp pads its rows."""
    line = LINE // dtype.itemsize
    return -(-numbers // line) * line


def serves(tensors: Sequence[Tensor], source: Path = SOURCE) -> bool:
    """Whether these tensors can be handed to a kernel, and there is one."""
    return (
        all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and tensors[0].dtype in (torch.float32, torch.float64)
        and load(source) is not None
    )


def train(
    layers: Sequence[Layers],
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    rates: Tensor,
    *,
    leak: float,
    momentum: float,
    weight_decay: float,
    adam: tuple[float, float, float] | None,
    frozen: Sequence[int],
    normalize: bool,
    taken: int,
) -> None:
    """Steps of SGD or Adam on ½ E‖f* − f‖², in place, one member after another or on as many threads as torch has.

    A member's result does not depend on the others, nor on the number of threads.

    Args:
        layers: Parameters of all members, then the first and the second moments where the rule has any.
        inputs: (member, sample, input).
        targets: (member, sample, output).
        rows: Which samples make each batch, (member, step, batch), int64.
        rates: Learning rates, (member,), float64.
        leak: Slope of the hidden activation below 0.
        momentum, weight_decay, normalize: As `training.Rule`.
        adam: Its β₁, β₂ and ε; None for SGD.
        frozen: Layers 1..L that are not updated.
        taken: Steps before these.

    Raises:
        IndexError: if `rows` names a sample that is not there.
        MemoryError: if a member's parameters do not fit twice.
    """
    library = load()
    assert library is not None
    members, samples, width = inputs.shape
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < samples:
        raise IndexError(f"train: rows reach from {int(rows.min())} to {int(rows.max())}; samples are 0..{samples - 1}")
    widths = [width, *(w.shape[1] for w in layers[0].weights)]
    depth = len(widths) - 1
    tensors: list[Sequence[Tensor | None]] = [part for each in layers for part in (each.weights, each.biases)]
    tensors += [[None] * depth] * (6 - len(tensors))
    beta_1, beta_2, epsilon = adam or (0.0, 0.0, 0.0)
    job = Job(
        depth,
        array(ctypes.c_int64, widths),
        rows.shape[2],
        rows.shape[1],
        samples,
        leak,
        *map(pointers, tensors),
        inputs.data_ptr(),
        targets.data_ptr(),
        rows.data_ptr(),
        array(ctypes.c_double, rates.tolist()),
        momentum,
        weight_decay,
        beta_1,
        beta_2,
        epsilon,
        adam is not None,
        normalize,
        array(ctypes.c_uint8, [layer + 1 in frozen for layer in range(depth)]),
        taken,
    )
    function = library.train_float64 if inputs.dtype == torch.float64 else library.train_float32

    def one(member: int) -> int:
        # a call a member: ctypes lets other threads run meanwhile, and signals are seen between calls
        return int(function(ctypes.byref(job), ctypes.c_int64(member)))

    threads = min(members, torch.get_num_threads())
    if threads == 1:
        failed = any(map(one, range(members)))
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = any(pool.map(one, range(members)))
    if failed:
        raise MemoryError(f"train: no memory for a second copy of a member of widths {widths}")


@functools.cache
def load(source: Path = SOURCE) -> ctypes.CDLL | None:
    """The compiled kernel of a source file, built if this machine has none yet; None where that cannot be."""
    if os.environ.get("TSDYN_KERNEL", "on") == "off":
        return None
    compiler = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, source)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str, source: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=True).stdout
    sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.hpp")))]
    key = hashlib.sha256(b"\0".join([*sources, version, _processor(), " ".join(FLAGS).encode()]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsdyn"
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # several processes may build at once: each its own file, renamed when whole
        with tempfile.TemporaryDirectory(dir=folder) as private:
            unfinished = Path(private) / library.name
            subprocess.run(
                [compiler, *FLAGS, str(source), "-o", str(unfinished)],
                capture_output=True,
                timeout=BUILD_SECONDS,
                check=True,
            )
            unfinished.replace(library)
    return library


def _processor() -> bytes:
    """What -march=native depends on."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        first, _, _ = described.read_bytes().partition(b"\n\n")
        kept = (b"model name", b"flags", b"Features", b"CPU part")
        return b"\n".join(line for line in first.splitlines() if line.startswith(kept))
    return f"{platform.machine()} {platform.processor()} {platform.platform()}".encode()
