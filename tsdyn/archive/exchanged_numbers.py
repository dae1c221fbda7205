"""Where the numbers of a file in memory lie in its bytes, and how they are exchanged there.  Imports no torch.

The HDF5 library takes longer to find the variables of a small file than to write them.  Files of one shape that declare
the same hold each number at the same byte, so that one which the library wrote tells where those of the next ones go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Bytes of a chunk's checksum.
CHECKSUM = 4


class Block(NamedTuple):
    """Numbers of one variable.

    Attributes:
        name: Of the variable; of one in a group ``group/variable``.
        place: Their position or positions along each dimension.
        numbers: Of the variable's type; (size of each slice of `place`).
    """

    name: str
    place: Sequence[slice | int]
    numbers: NDArray

    @property
    def starts(self) -> list[int]:
        """First position along each dimension."""
        return [part.start if isinstance(part, slice) else part for part in self.place]

    @property
    def counts(self) -> list[int]:
        """Number of positions along each dimension."""
        return [part.stop - part.start if isinstance(part, slice) else 1 for part in self.place]


class Piece(NamedTuple):
    """Numbers of one variable that lie side by side in a file, as a chunk does.

    Attributes:
        byte: Where the first one begins.
        origin: Its position along each dimension.
        shape: Their number along each dimension, those of a chunk beyond the variable's end among them.
        checked: Whether their checksum, `fletcher32`, comes after them.
    """

    byte: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    checked: bool


class Target(NamedTuple):
    """A piece, and which numbers of which blocks belong there.

    Attributes:
        piece: The piece.
        dtype: Of its numbers.
        cuts: (index of a block, the numbers of it, their places in the piece).
    """

    piece: Piece
    dtype: np.dtype
    cuts: list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]


def targets(blocks: Sequence[Block], pieces: Mapping[str, Sequence[Piece] | None]) -> list[Target] | None:
    """What `exchange` writes to which pieces; None if a number of a block is in none of them.

    Args:
        blocks: The numbers.
        pieces: Variable → its pieces, which do not overlap; None if it has none.
    """
    found: dict[int, Target] = {}
    for index, block in enumerate(blocks):
        covered = 0
        for piece in pieces[block.name] or ():
            source, to = [], []
            for start, count, origin, size in zip(block.starts, block.counts, piece.origin, piece.shape, strict=True):
                low, high = max(start, origin), min(start + count, origin + size)
                source.append(slice(low - start, high - start))
                to.append(slice(low - origin, high - origin))
            if all(part.start < part.stop for part in to):
                target = found.setdefault(piece.byte, Target(piece, block.numbers.dtype, []))
                target.cuts.append((index, tuple(source), tuple(to)))
                covered += math.prod(part.stop - part.start for part in to)
        if covered != block.numbers.size:
            return None
    return list(found.values())


def exchange(image: NDArray, into: Sequence[Target], blocks: Sequence[Block]) -> None:
    """Write numbers to the bytes of a file that holds others of their shapes, with the checksums that they have.

    Args:
        image: The bytes.
        into: What `targets` gave for blocks of the same shapes and places.
        blocks: The numbers.
    """
    whole = [block.numbers.reshape(block.counts) for block in blocks]
    for piece, dtype, cuts in into:
        end = piece.byte + math.prod(piece.shape) * dtype.itemsize
        stored = image[piece.byte : end]
        numbers = stored.view(dtype).reshape(piece.shape)
        for index, source, to in cuts:
            numbers[to] = whole[index][source]
        if piece.checked:
            image[end : end + CHECKSUM] = np.frombuffer(fletcher32(stored).to_bytes(CHECKSUM, "little"), np.uint8)


def fletcher32(stored: NDArray) -> int:
    """HDF5's checksum of a chunk: words of two bytes w_1..w_n, big-endian, summed once and twice, modulo 2^16 - 1.

    Args:
        stored: Its bytes.
    """
    even = stored if len(stored) % 2 == 0 else np.append(stored, np.uint8(0))
    words = even.view(">u2").astype(np.int64)  # n² 2^15 stays below 2^63 for chunks of 30 MB
    sums = int(words @ _weights(len(words))), int(words.sum())
    second, first = (s % 0xFFFF or 0xFFFF * bool(s) for s in sums)  # a sum that is no multiple by being 0 is 2^16 - 1
    return second << 16 | first


@lru_cache(64)
def _weights(words: int) -> NDArray:
    """How often each word counts in the second sum: that of all first sums."""
    return np.arange(words, 0, -1)
