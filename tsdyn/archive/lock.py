"""A lock that lets one process at a time write to a directory."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
import weakref
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsdyn.archive.whole_files import ArchiveError, looked_again, refused

NAME = "LOCK"
#: Without flock: a writer touches its lock file every BEAT seconds, and counts as dead after SILENCE without a touch.
BEAT, SILENCE = 10.0, 60.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger("tsdyn.archive")


class HeldError(ArchiveError):
    """Another process is writing there."""


#: Locks held by this process; a forked child holds none of them.
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forked() -> None:
    _process.cache_clear()
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forked)


class Lock:
    """An exclusive claim on a directory, held from `acquire` to `release`.

    The kernel's flock on the file ``LOCK``, which says who holds it; the kernel frees it however the process ends.
    On file systems without flock the file itself is the lock: made exclusively, touched every `BEAT` seconds, and
    stale once its process is gone from this machine (and container) or it was not touched for `SILENCE` seconds of
    the file system's own clock.  A stale lock is taken over and the log (``tsdyn.archive``) says whose it was.

    Args:
        directory: It must exist.

    Raises:
        ArchiveError: from `acquire` if another process holds it, naming host, pid and when it started; from
            `confirm` if the lock was lost.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._handle: int | None = None
        self._token = secrets.token_hex(8)
        self._beating: threading.Event | None = None

    def acquire(self) -> Lock:
        try:
            self._flock()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise refused(self.path, error) from error
            try:
                looked_again(self._exclusive_file)  # its holder can remove it between two looks
            except OSError as failed:
                raise refused(self.path, failed) from failed
        _held.add(self)
        return self

    def _forget(self) -> None:
        """Drop the lock in a forked child, so that it is freed when the parent ends, though the child lives on."""
        if self._handle is not None:
            with suppress(OSError):  # the descriptor is gone all the same
                os.close(self._handle)
        self._handle, self._beating, self._token = None, None, secrets.token_hex(8)
        _held.discard(self)

    @property
    def of_the_kernel(self) -> bool:
        """Whether the lock is the kernel's flock rather than an exclusively made file."""
        return self._handle is not None

    def wait(self, seconds: float) -> Lock:
        """`acquire`, tried again for this many seconds: for locks that others hold briefly."""
        until = time.monotonic() + seconds
        while True:
            try:
                return self.acquire()
            except HeldError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _flock(self) -> None:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._held(_parsed(os.read(handle, 1000))) from None
                if self._still_there(handle):
                    previous = _parsed(os.read(handle, 1000))
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, self._owner(), 0)
                    self._handle, handle = handle, -1
                    break
            finally:
                if handle >= 0:
                    os.close(handle)
        if previous:
            self._say_taken_over(previous)

    def _still_there(self, handle: int) -> bool:
        """Whether the name still leads to the open file: another process may have removed it in between."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _exclusive_file(self) -> None:
        try:
            self._make()
        except FileExistsError:
            found = self.path.read_bytes()
            holder = _parsed(found)
            if holder and not self._dead(holder):
                raise self._held(holder) from None
            aside = self.path.with_name(f"{NAME}.{self._token}")
            self.path.rename(aside)
            mine = aside.read_bytes() == found
            aside.unlink()
            if not mine:  # another process was quicker and took over the same stale lock
                raise self._held(_parsed(found)) from None
            try:
                self._make()
            except FileExistsError:
                raise self._held(_parsed(self.path.read_bytes())) from None
            if holder:
                self._say_taken_over(holder)
        self._beating = threading.Event()
        threading.Thread(target=self._beat, args=(self._beating,), daemon=True).start()

    def _make(self) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            os.write(handle, self._owner())
        finally:
            os.close(handle)

    def _beat(self, stopped: threading.Event) -> None:
        while not stopped.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:
                return

    def _dead(self, holder: dict[str, Any]) -> bool:
        if holder["world"] is not None and holder["world"] == _world() and holder["started"] is not None:
            return bool(_started(holder["pid"]) != holder["started"])
        probe = self.path.with_name(f"{NAME}.{self._token}")
        probe.touch()  # the file system's clock, which need not be this machine's
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self.path.stat().st_mtime > SILENCE

    def _owner(self) -> bytes:
        owner = {
            "host": os.uname().nodename,
            **_process(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "token": self._token,
        }
        return json.dumps(owner).encode()

    def _held(self, holder: dict[str, Any]) -> HeldError:
        return HeldError(
            f"{self.path.parent}: another process is writing here ({_described(holder)}); wait for it, or give another "
            "directory with -o"
        )

    def _say_taken_over(self, holder: dict[str, Any]) -> None:
        _log.warning(
            "%s: the process that was writing here (%s) ended without finishing; going on from what it committed",
            self.path.parent,
            _described(holder),
        )

    def confirm(self) -> None:
        """Raise if this process no longer holds the lock, before anything is committed."""
        try:
            ours = _parsed(self.path.read_bytes()).get("token") == self._token
        except FileNotFoundError:
            ours = False
        except OSError as error:
            raise refused(self.path, error) from error
        if not ours:
            raise ArchiveError(
                f"{self.path.parent}: the lock was taken away (by another process, or {NAME} was removed); nothing "
                "more is written here"
            )

    def release(self) -> None:
        """Free the directory; ``LOCK`` is left empty, which says that its last holder ended normally."""
        _held.discard(self)
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with suppress(OSError):  # the file system went away; the kernel frees the lock all the same
                os.ftruncate(handle, 0)
            with suppress(OSError):
                os.close(handle)
        elif self._beating is not None:
            self._beating.set()
            self._beating = None
            with suppress(OSError):
                if _parsed(self.path.read_bytes()).get("token") == self._token:
                    self.path.unlink()


def _world() -> str | None:
    """The set of processes within which a pid is unique: this boot of this machine, and this container; or None.

    Containers with the same host name or image see different processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`, None if there is none: with the pid, which is reused, this
    names one process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


@lru_cache(maxsize=1)
def _process(pid: int) -> dict[str, Any]:
    """What names this process, `pid`, which does not change while it lives; a forked child has another pid."""
    return {"world": _world(), "pid": pid, "started": _started(pid)}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        return {
            "host": str(found["host"]),
            "world": found.get("world"),
            "pid": int(found["pid"]),
            "started": found["started"],
            "since": str(found["since"]),
            "token": str(found["token"]),
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _described(holder: dict[str, Any]) -> str:
    return f"{holder['host']} pid {holder['pid']}, since {holder['since']}" if holder else "unknown"
