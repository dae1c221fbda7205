"""Processes that begin in milliseconds: forked from one that has imported everything, which itself runs nothing.

Importing tsdyn with torch, xarray and dask takes seconds of a processor.  Where a test needs another process, but not
the start of Python, it asks for a fork of such a server: workers of dask (`dask_by_fork`), the command, or a script.
What is tested of the installed command's own start, of `ulimit` and of a preloaded library keeps a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import dask
import psutil

#: Imported by the server in this order, silently left out if they fail.
PRELOADED = ["tests.preloaded", "tests.processes"]
#: Seconds after which something is taken to hang, however busy the machine; the same work takes seconds by itself.
HUNG = 600
_FORKING = multiprocessing.get_context("forkserver")


def dask_by_fork() -> None:
    """Make dask's workers and processes forks of the server; to be called before `distributed` is first imported."""
    dask.config.set(
        {"distributed.worker.multiprocessing-method": "forkserver", "multiprocessing.context": "forkserver"}
    )
    import distributed  # noqa: F401  (which chooses what is imported before forking; ours is more)

    # as it leaves them where pytest listens already: handlers of its own would be pytest's, too, and dask silences them
    for name in ("bokeh", "distributed", "distributed.client", "distributed.gc", "tornado", "tornado.application"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    _FORKING.set_forkserver_preload(PRELOADED)
    # dask names its own again with each of its workers; a server that begins with one would import no more than those
    multiprocessing.forkserver.set_forkserver_preload = lambda names: None


def allow_for_coverage() -> None:
    """Under `make coverage` give ten times the processor time to processes that read what may be damaged."""
    if "TSDYN_COVERAGE" in os.environ:
        from tsdyn.archive import own_process

        own_process.SECONDS *= 10


class _Streams:
    """Descriptors of this process by their numbers in the other; None for one that is closed there."""

    def __init__(self, given: Mapping[int, int | None]) -> None:
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({n: None if fd is None else reduction.DupFd(fd) for n, fd in self.given.items()},)


def _work(
    words: Sequence[str], folder: str, environment: Mapping[str, str], streams: Mapping[int, Any], server: str | None
) -> None:
    """Be the process that `words` name: ``tsdyn ...``, ``python -c CODE ...`` or ``python FILE ...``.

    `server` is the address of the server that began it, from which workers that it asks for are forked, too.
    """
    if server is not None:
        own = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
        own._forkserver_address, own.ensure_running = server, lambda: None
    for number, sent in streams.items():
        if sent is None:
            os.close(number)
        else:
            descriptor = sent.detach()
            os.dup2(descriptor, number)
            os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (_stream(n, environment) for n in range(3))  # type: ignore[assignment]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)  # as at the end of Python, too
    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    program, *rest = words
    if Path(program).name == "tsdyn":
        from tsdyn import cli

        sys.argv = [program, *rest]
        cli.main()
    elif rest[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, folder)
        sys.argv = list(rest)
        runpy.run_path(os.path.join(folder, rest[0]), run_name="__main__")  # absolute, as Python has it


def _stream(number: int, environment: Mapping[str, str]) -> io.TextIOWrapper | None:
    """A standard stream as Python makes it when it begins: None where the descriptor is closed."""
    try:
        raw = io.FileIO(number, "w" if number else "r", closefd=False)
    except OSError:
        return None
    buffered = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    errors = "backslashreplace" if number == 2 else "strict"
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors, line_buffering=number == 2)


class Process:
    """A process that has begun; `stderr` is its text if it was asked for by a pipe."""

    def __init__(
        self, words: Sequence[object], folder: Path | str, streams: Mapping[int, int | None],
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        multiprocessing.forkserver.ensure_running()
        # from 3.14 on a server answers only the process that began it
        found = multiprocessing.forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
        server = found if sys.version_info < (3, 14) else None
        given = [[str(word) for word in words], str(folder), dict(environment or os.environ), _Streams(streams), server]
        self._process = _FORKING.Process(target=_work, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def wait(self, timeout: float = HUNG) -> int:
        """Its exit code; a signal is a negative one."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return code


def run(
    words: Sequence[object], folder: Path | str, *, streams: Mapping[int, int | None] | None = None,
    environment: Mapping[str, str] | None = None, timeout: float = HUNG,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """As ``subprocess.run(words, cwd=folder, capture_output=True, text=True)``.

    Args:
        words: See `_work`.
        folder: Where it works.
        streams: Descriptors in place of those that are captured, or None for closed ones.
        environment: Variables; those of this process if left out.
        timeout: Seconds after which it is killed, and TimeoutExpired raised.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = Process(words, folder, {1: out.fileno(), 2: err.fileno(), **(streams or {})}, environment)
        code = process.wait(timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([str(word) for word in words], code, out.read(), err.read())


def variables(site: Path | None = None) -> dict[str, str]:
    """This process's variables, with a folder of packages on the path, or without any."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return found if site is None else {**found, "PYTHONPATH": str(site)}


def workers() -> list[psutil.Process]:
    """Processes that dask began for this one to be workers, by fork or by spawn.

    Not the helpers that begin them, and not what workers fork themselves, such as the process that joins segments.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            parent = process.parent()
            above = None if parent is None else parent.ppid()
            forked = "multiprocessing.forkserver" in words and above == os.getpid()
            if forked or ("spawn_main" in words and process.ppid() == os.getpid()):
                found.append(process)
    return found
