"""Contents of small files, kept for a while by whoever reads many variables of them.  Imports no torch.

A sweep of small points has as many visits to files as points times variables and layers.  Whoever asks a file for
`FEW` variables gets these alone; whoever asks for one more, as who loads or exports everything, gets it from all of
them, which are read in one visit and kept in bounded memory.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tsdyn.archive import hdf5, whole_files
from tsdyn.archive.whole_files import Identity

#: So many different variables are read one by one, since reading all of a file's takes ten times as long as one.
FEW = 2
#: A file is small if its variables hold at most this much together, padding included ...
SMALL_BYTES = 1 << 22
#: ... all that is kept of all files is at most this, ...
KEPT_BYTES = 1 << 26
#: ... and gives way to others once it was not asked for so many seconds.  What is in use is not evicted: a sweep that
#: does not fit is read as it would be without, for the part that does not fit.
IDLE_SECONDS = 5.0
_MOST_ASKED = 1 << 16

#: Variable → its shape and type, of all that a file holds in numbers.
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclass
class _Kept:
    variables: dict[str, NDArray]
    used: float

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.variables.values())


_kept: dict[tuple[Path, Identity], _Kept] = {}
_asked: dict[tuple[Path, Identity], set[str]] = {}


def read(path: Path, identity: Identity, shapes: Shapes, name: str, spans: Sequence[slice]) -> NDArray | None:
    """Numbers of one variable as they are stored, like `hdf5.read`, from memory if the file was visited before.

    Args:
        path: The file.
        identity: Its identity when its header was read; the caller checks that it is unchanged.
        shapes: All variables of numbers in it.
        name: The one to read.
        spans: A start and a stop along each dimension.

    Raises:
        FileNotFoundError: if another file, or none, was there once it had been read.
    """
    _, dtype = shapes[name]
    key = path, identity
    with hdf5.guarded():
        kept = _kept.get(key)
        asked = _asked.get(key, set()) | {name}
        if kept is None and len(asked) > FEW and _room_for(shapes):
            whole = {n: tuple(slice(0, size) for size in shape) for n, (shape, _) in shapes.items() if shape}
            found = hdf5.read_all(path, whole, {n: dtype for n, (_, dtype) in shapes.items()})
            if whole_files.identity(path)[:3] != identity[:3]:  # not to be kept under that name: the file may come back
                raise FileNotFoundError(errno.ENOENT, "was moved, removed or replaced while it was read", str(path))
            kept = _kept[key] = _Kept(found, 0.0)
            _asked.pop(key, None)
        elif kept is None:
            if len(_asked) >= _MOST_ASKED:
                _asked.clear()
            _asked[key] = asked
            return hdf5.read_all(path, {name: tuple(spans)}, {name: dtype}).get(name)
        kept.used = time.monotonic()
        return kept.variables[name][tuple(spans)].copy() if name in kept.variables else None


def _room_for(shapes: Shapes) -> bool:
    """Whether a file with these variables is small and can be kept, once what is idle has given way."""
    needed = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    if needed > SMALL_BYTES:
        return False
    if needed + sum(kept.nbytes for kept in _kept.values()) > KEPT_BYTES:
        now = time.monotonic()
        for key in [key for key, kept in _kept.items() if now - kept.used > IDLE_SECONDS]:
            del _kept[key]
    return needed + sum(kept.nbytes for kept in _kept.values()) <= KEPT_BYTES
