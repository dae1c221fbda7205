"""Write files whole or not at all, each with its checksum beside it.  Imports neither torch nor netCDF."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

Found = TypeVar("Found")

#: Bytes of the disk that must stay free after a write.
MARGIN = 1 << 20
#: A file up to this size is compared with its checksum whenever it is opened: 10 ms.
ALWAYS_VERIFIED = float(1 << 24)
#: How often files that another command is moving are looked at.
LOOKS = 5
#: What errors of the file system say of everything that was committed before.
INTACT = "what was committed is intact"
#: Suffix of the file that holds the SHA-256 of the file beside it, in the format of ``sha256sum -c``.
SUFFIX = ".sha256"
#: A file changed less than this many seconds ago could change again and keep its times, since file times are coarse.
TICK_SECONDS = 2.0
_SEAL = re.compile(r"([0-9a-f]{64})  [^/\n]+\n")
_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
    errno.ENOENT: "the directory is gone",
    errno.ELOOP: "it is a symbolic link",
    errno.ESTALE: "the network file system went away",
    errno.ENOTCONN: "the network file system went away",
    errno.ENODEV: "the file system went away",
}


class ArchiveError(RuntimeError):
    """A directory cannot be read or written as asked; the message says which, why, and the way out."""


class DirectoryError(ArchiveError):
    """A path does not fit the request: it holds another experiment, is not a run's directory, or does not exist."""


def local_path(path: str | Path) -> Path:
    """`path` as a Path, ``~`` expanded, refused if netCDF would take it for a network address or another path.

    Raises:
        ArchiveError: if it holds ``://`` or ``#``, or a control character; a backslash, or a drive's letter.
    """
    text = os.fspath(path)
    if "://" in text or "#" in text or not text.isprintable():
        raise DirectoryError(
            f"{text!r}: not a local path; a name with '://', '#' or control characters would not be opened as a file"
        )
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as error:
        raise DirectoryError(f"{text!r}: {error}") from error
    if "\\" in os.path.abspath(expanded) or re.match(r"[A-Za-z]:/", os.fspath(expanded)):
        raise DirectoryError(
            f"{text!r}: the netCDF library takes a backslash for a slash and C:/ for a drive, and would open another "
            "path; use a directory whose path has neither"
        )
    return expanded


def refused(path: Path, error: BaseException, needed: int = 0) -> ArchiveError:
    """The ArchiveError for a failed write to `path`, with its reason.

    HDF5 hides the reason ("HDF error"); if the disk has no room for `needed` bytes, the message says so.
    """
    number = error.errno if isinstance(error, OSError) else None
    reason, free = _REASONS.get(number or 0), None
    with suppress(OSError):
        free = shutil.disk_usage(path.parent).free
    if reason is None and free is not None and free < needed + MARGIN:
        reason = _REASONS[errno.ENOSPC]
    if reason == _REASONS[errno.ENOSPC] and free is not None and free >= needed + MARGIN:
        reason = f"no space left for {_what_is_used_up(path.parent)}, though {free / 1e6:.1f} MB are free"
    elif reason == _REASONS[errno.ENOSPC] and free is not None:
        reason += f": {(needed + MARGIN) / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
    return ArchiveError(
        f"{path}: cannot be written: {reason or error}; {INTACT}: put this right and run the same command again to go "
        "on"
    )


def _what_is_used_up(folder: Path) -> str:
    with suppress(OSError):
        found = os.statvfs(folder)
        if found.f_files and not found.f_favail:
            return f"another file: all {found.f_files} inodes are used"
    return "it: a quota or what is kept for the administrator"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of the system inside the context into an ArchiveError that names `path`, unless it is not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise ArchiveError(f"{path}: cannot be read: {reason}; nothing was changed") from error


def looked_again(look: Callable[[], Found]) -> Found:
    """What `look` gives; asked again where another command has just moved or joined the files that it looks at.

    Raises:
        FileNotFoundError: if one that it looks at is not there, at none of several looks.
    """
    for _ in range(LOOKS - 1):
        with suppress(FileNotFoundError):
            return look()
    return look()


def sync_directory(path: Path) -> None:
    """Sync a directory, so that renames in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, synced to disk.

    Raises:
        DirectoryError: if it cannot be made there.
        ArchiveError: if the device fails.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        with suppress(FileExistsError):
            path.mkdir()
        sync_directory(path.parent)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE):
            raise refused(path, error) from error
        reason = _REASONS.get(error.errno or 0, str(error))
        raise DirectoryError(
            f"{path}: cannot be made: {reason}; nothing was written: put this right, or write to another directory"
        ) from error


@contextmanager
def replacing(path: Path, needed: int, *, seal: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to `path` once it is written and synced; removed if that fails.

    Args:
        path: The file to write.
        needed: Bytes it will take.
        seal: Whether to write its checksum beside it; the checksum is synced to disk before `path` appears.

    Raises:
        ArchiveError: if it cannot be written; `path` is then unchanged.
    """
    temporary, renamed = path.with_name(f".{path.name}.{os.getpid()}.tmp"), False
    try:
        if shutil.disk_usage(path.parent).free < needed + MARGIN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.unlink(missing_ok=True)  # were it a link, writing would follow it
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if seal:
            write_text(seal_of(path), f"{sha256(temporary)}  {path.name}\n")
        temporary.replace(path)
        renamed = True
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise refused(path, error, needed) from error
    finally:
        if not renamed:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview, *, seal: bool = False) -> None:
    """Write a file, whole or not at all; `seal` as in `replacing`."""
    with replacing(path, len(content), seal=seal) as temporary:
        write_new(temporary, content)


def write_new(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is not there yet; the system's own errors pass through."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    write_bytes(path, text.encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version(path: Path) -> tuple[object, ...] | None:
    """A value that changes whenever the content of a file does; None if there is no file.

    It holds device, inode, size and times; for a file that changed just now the SHA-256 too (`TICK_SECONDS`).
    """
    try:
        status = path.stat()
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return stamp if abs(time.time_ns() - changed) > TICK_SECONDS * 1e9 else (*stamp, sha256(path))
    except OSError:
        return None


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file, cached until its `version` changes; None if it cannot be read."""
    found = version(path)
    return None if found is None else _digest_of(path.absolute(), found)


@lru_cache(maxsize=1 << 10)
def _digest_of(path: Path, _: tuple[object, ...]) -> str | None:
    try:
        return sha256(path)
    except OSError:
        return None


def seal_of(path: Path) -> Path:
    """Path of the file that holds the checksum of `path`."""
    return path.with_name(path.name + SUFFIX)


def sealed(path: Path) -> bool | None:
    """Whether `path` agrees with its checksum; None if it has none.  Reads the whole file.

    Raises:
        ArchiveError: if one of the two cannot be read.
    """
    try:
        with readable(seal_of(path)):
            kept = seal_of(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    match = _SEAL.fullmatch(kept)
    with readable(path):
        return match is not None and match[1] == sha256(path)


class Identity(NamedTuple):
    """Inode, size, time and checksum of a file, by which another file of the same name is noticed."""

    inode: int
    size: int
    modified: int
    seal: str | None


def identity(path: Path) -> Identity:
    """The identity of the file now at `path`, with the checksum that the file beside it holds, or None.

    Raises:
        OSError: if there is no such file.
        ArchiveError: if its checksum cannot be read.
    """
    status, seal = os.lstat(path), None
    with suppress(FileNotFoundError), readable(seal_of(path)):
        match = _SEAL.fullmatch(seal_of(path).read_text(encoding="ascii", errors="replace"))
        seal = match[1] if match else ""
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, seal)


class Stamp(NamedTuple):
    """Inode, size and time of a file, and the time of its checksum if it has one."""

    inode: int
    size: int
    modified: int
    sealed: int | None


def refuse_changed(path: Path, *, upto: float = math.inf) -> None:
    """Refuse a file of at most `upto` bytes that differs from its checksum; the result is cached while it is unchanged.

    What may have no checksum is for `netcdf.refuse_unproven`, which calls this.

    Raises:
        ArchiveError: naming the file and the way out.
        FileNotFoundError: if there is none, or its writer replaced it, or its checksum, while they were compared.
    """
    with readable(path):
        before = stamp(path)
    if before.sealed is not None and before.size <= upto and not _as_sealed(path.absolute(), before):
        if stamp(path) != before:
            raise FileNotFoundError(errno.ENOENT, "was replaced while it was compared with its checksum", str(path))
        raise ArchiveError(
            f"{path}: was changed or is damaged: its checksum differs from the one in {seal_of(path).name}; "
            "`tsdyn validate` says where, `tsdyn repair` keeps what is whole"
        )


def stamp(path: Path) -> Stamp:
    """The stamp of the file that is there now; raises the system's own errors."""
    status, sealed_at = path.stat(), None
    with suppress(FileNotFoundError):
        sealed_at = seal_of(path).stat().st_mtime_ns
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns, sealed_at)


@lru_cache(maxsize=1 << 14)
def _as_sealed(path: Path, _: Stamp) -> bool:
    return sealed(path) is not False


def refuse_link(path: Path) -> None:
    """Refuse a symbolic link: through a link inside a run or a sweep, files elsewhere would be read or changed.

    Raises:
        DirectoryError: naming it.
    """
    if path.is_symlink():
        raise DirectoryError(
            f"{path}: is a symbolic link; runs and sweeps hold their own files, so that nothing elsewhere is read, "
            "written or removed through them; put what it points at in its place"
        )


def remove_sealed(path: Path) -> None:
    """Remove a file, then its checksum."""
    path.unlink(missing_ok=True)
    seal_of(path).unlink(missing_ok=True)
