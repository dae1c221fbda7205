"""A trace of changes to files, replayed up to a cut: as the system calls came, or as a power cut may leave it."""

from __future__ import annotations

import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.harness import operations

_NAMES = {number: name for name, number in operations().items()}
SECTOR = 512


@dataclass(frozen=True)
class Change:
    kind: str
    inode: int
    offset: int
    path: str
    data: bytes


def read(file: Path) -> list[Change]:
    """The trace that the shim wrote."""
    raw, at, found = file.read_bytes(), 0, []
    while at < len(raw):
        kind, inode, offset, names, size = struct.unpack_from("<iqqii", raw, at)
        at += 28
        path, data = raw[at : at + names], raw[at + names : at + names + size]
        at += names + size
        found.append(Change(_NAMES[kind], inode, offset, os.fsdecode(path), data))
    return found


def committed(changes: list[Change]) -> int:
    """Last epoch that the writer was told is committed."""
    return max((c.inode for c in changes if c.kind == "MARK"), default=-1)


@dataclass
class _File:
    writes: list[Change] = field(default_factory=list)
    synced: int = 0


@dataclass(frozen=True)
class _Event:
    """A change of names: one that goes, one that comes, or both (a rename)."""

    gone: str
    there: str
    file: int | None


def after_power_loss(changes: list[Change], source: Path, target: Path, rng: random.Random | None) -> None:
    """Leave in `target` what a disk may hold of `changes` to `source` when the power goes after the last of them.

    Of a file, what was written since its last fsync is dropped, kept or torn at a sector, write by write; of a
    directory, names changed since its last fsync are dropped, kept up to some point, or kept in any selection.
    Renames are atomic.  Without `rng` all is kept: the prefix of system calls.
    """
    files: list[_File] = []
    number: dict[int, int] = {}  # inode → which of `files`, as inodes are used again
    at: dict[str, int] = {}  # the names as the writer sees them
    names: dict[str, int | None] = {}  # and as the disk has them; None for a directory
    pending: dict[str, list[_Event]] = {}  # directory → its changes since its last fsync

    def apply(event: _Event) -> None:
        names.pop(event.gone, None)
        if event.there:
            names[event.there] = event.file

    for change in changes:
        folder = os.path.dirname(change.path)
        if change.kind in ("WRITE", "TRUNCATE"):
            files[number[change.inode]].writes.append(change)
        elif change.kind == "FSYNC":
            if change.path in at:
                file = files[number[change.inode]]
                file.synced = len(file.writes)
            for event in pending.pop(change.path, []):
                apply(event)
        elif change.kind == "RENAME":
            new = os.fsdecode(change.data)
            at[new] = at.pop(change.path)
            pending.setdefault(os.path.dirname(new), []).append(_Event(change.path, new, at[new]))
        elif change.kind == "CREATE":
            number[change.inode] = at[change.path] = len(files)
            files.append(_File())
            pending.setdefault(folder, []).append(_Event("", change.path, at[change.path]))
        elif change.kind in ("UNLINK", "RMDIR"):
            at.pop(change.path, None)
            pending.setdefault(folder, []).append(_Event(change.path, "", None))
        elif change.kind == "MKDIR":
            pending.setdefault(folder, []).append(_Event("", change.path, None))
    for events in pending.values():
        for event in _survivors(events, rng):
            apply(event)
    target.mkdir(parents=True)
    for path, file_number in sorted(names.items()):
        place = target / os.path.relpath(path, source)
        if not place.parent.is_dir():
            continue  # its directory did not survive
        if file_number is None:
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(_content(files[file_number], rng))


def _survivors(events: list[_Event], rng: random.Random | None) -> list[_Event]:
    if rng is None:
        return events
    way = rng.choice(("none", "prefix", "any"))
    if way == "none":
        return []
    if way == "prefix":
        return events[: rng.randint(0, len(events))]
    return [e for e in events if rng.random() < 0.5]


def _content(file: _File, rng: random.Random | None) -> bytes:
    content = bytearray()
    for position, change in enumerate(file.writes):
        data = change.data
        if rng is not None and position >= file.synced:
            way = rng.choice(("dropped", "kept", "torn"))
            if way == "dropped":
                continue
            if way == "torn":
                data = data[: rng.randint(0, len(data) // SECTOR) * SECTOR]
        if change.kind == "TRUNCATE":
            del content[change.offset :]
            content.extend(bytes(change.offset - len(content)))
            continue
        content.extend(bytes(max(0, change.offset - len(content))))
        content[change.offset : change.offset + len(data)] = data
    return bytes(content)
