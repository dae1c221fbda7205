"""Do work with netCDF files in a process of its own, so that a crash of the library ends that process alone.

The process is a fork of this one: it has all that the work needs (parts that were registered in this process only,
limits on memory), imports nothing, and takes 10 to 30 ms, where a new interpreter takes 0.7 s to import this package.
Forking a process with threads is safe only for work that needs no lock of another thread: the lock on the netCDF
library is held by the thread that forks, and the work neither logs nor computes with torch.  Imports no torch.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import math
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tsdyn.archive import hdf5
from tsdyn.archive.whole_files import ArchiveError

Found = TypeVar("Found")

#: Signals that a terminal or a batch system sends to every process of a command; this process decides what they mean.
_OF_THE_COMMAND = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
#: What the process that reads a file which may be damaged may use: seconds of a processor and bytes of memory beyond
#: those of its parent, each with so much more per byte of the file.
SECONDS, SECONDS_PER_BYTE = 2, 2e-7
BYTES, BYTES_PER_BYTE = 1 << 29, 4
_state = {"within": False}


class Crashed(ArchiveError):
    """The process was ended by a signal, or without an answer.

    Attributes:
        how: How it ended, such as ``SIGSEGV``.
    """

    def __init__(self, how: str) -> None:
        super().__init__(f"the process that did this ended without an answer ({how})")
        self.how = how


def within() -> bool:
    """Whether this is such a process, in which a crash does no harm."""
    return _state["within"]


def reading(file: Path, work: Callable[[], Found]) -> Found:
    """`run` of what reads a file that may be damaged, with limits on time and memory that its size warrants."""
    size = file.stat().st_size
    return run(work, seconds=SECONDS + SECONDS_PER_BYTE * size, memory=BYTES + BYTES_PER_BYTE * size)


def run(work: Callable[[], Found], *, seconds: float | None = None, memory: int | None = None) -> Found:
    """What `work` returns, or the exception that it raises, from a forked process.

    Args:
        work: Called once, in the forked process, under the lock of `hdf5.guarded`; its result must be picklable.
        seconds: Processor time after which it is ended; None for no limit.
        memory: Bytes that it may take beyond what this process takes; None for no other limit than this process has.

    Raises:
        Crashed: if the process was ended by a signal, or without an answer.
        OSError: if the system gives no process.
    """
    hdf5.prepare()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone; looked up here, since the linker has a lock
    parent = os.getpid()
    reading, writing = os.pipe()
    try:
        with hdf5.guarded(), warnings.catch_warnings():
            # Python 3.12 warns of every fork of a process with threads; the reasons why this one is safe are above
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if not pid:
                _child(work, writing, parent, prctl, seconds, memory)
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    os.close(writing)
    try:
        answer = _read(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:  # a second Ctrl-C: nobody waits for the result any more
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        os.close(reading)
    if code or not answer:
        raise Crashed(signal.Signals(-code).name if code < 0 else f"exit code {code}")
    found, error = pickle.loads(answer)
    if error is not None:
        raise error
    return found  # type: ignore[no-any-return]


def _read(pipe: int) -> bytes:
    chunks = []
    while chunk := os.read(pipe, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def _child(
    work: Callable[[], object],
    pipe: int,
    parent: int,
    prctl: Callable[..., int] | None,
    seconds: float | None,
    memory: int | None,
) -> None:
    """Do `work`, write its outcome into `pipe`, and end the process; never returns."""
    code = 1
    try:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # whoever kills the command ends this process, too
        if os.getppid() != parent:
            return
        _state["within"] = True
        faulthandler.disable()
        gc.disable()  # whose look at every object would copy the pages that are shared with the parent
        for number in _OF_THE_COMMAND:
            signal.signal(number, signal.SIG_IGN)
        if seconds is not None:
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            limit = math.ceil(seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))  # SIGXCPU, and SIGKILL if that is not enough
        if memory is not None:
            _limit_memory(memory)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash is said in one line, by the parent
        _write(pipe, _outcome(work))
        code = 0
    finally:
        os._exit(code)


def _limit_memory(more: int) -> None:
    """Lower the limit on addresses to what this process has now and `more`; nothing where that cannot be told."""
    with suppress(OSError, ValueError):  # no /proc on macOS
        with open("/proc/self/statm", encoding="ascii") as statm:
            limit = int(statm.read().split()[0]) * resource.getpagesize() + more
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _outcome(work: Callable[[], object]) -> bytes:
    """What `work` returns and None, or None and the exception that it raised, pickled."""
    try:
        return pickle.dumps((work(), None))
    except Exception as error:
        error.__cause__ = error.__context__ = None
        try:
            content = pickle.dumps((None, error))
            pickle.loads(content)  # some exceptions are written and cannot be read
        except Exception:
            content = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return content


def _write(pipe: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(pipe, view) :]
