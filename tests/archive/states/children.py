"""Work in forked children that report their commits, die at a moment, or end in one of a few ways."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import processes
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.running import runner
from tsdyn.running.interrupts import Stopped

#: What the library raises on purpose, in a sentence.
SENTENCES = (ArchiveError, ExperimentError)


@dataclass(frozen=True)
class End:
    """How a child ended: ``done``, ``refused`` (in a sentence), ``stopped``, ``killed``, or else badly."""

    how: str
    words: str
    told: list[tuple[str, int]]


@dataclass(frozen=True)
class Begun:
    """A forked child, and the pipe in which it reports."""

    pid: int
    pipe: int

    def end(self) -> End:
        """How it ended, once it has."""
        with os.fdopen(self.pipe, "rb") as pipe:
            lines = [json.loads(line) for line in pipe.read().splitlines()]
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        told = [(line["point"], line["last"]) for line in lines if "point" in line]
        if code:
            names = {-signal.SIGKILL: "killed", -signal.SIGALRM: "hung"}
            return End(names.get(code, "crashed"), f"exit {code}", told)
        return End(lines[-1]["end"], lines[-1]["words"], told)


def child(work: Callable[[], None], path: Path) -> End:
    """How `work` ends in a forked child, which reports each commit below `path`."""
    return begun(work, path).end()


def begun(work: Callable[[], None], path: Path) -> Begun:
    """`child` that has begun, and goes on beside what is done here."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        how, words = "traceback", ""
        try:
            os.close(reading)
            signal.alarm(processes.HUNG)
            logging.getLogger("tsdyn").setLevel(logging.CRITICAL)
            _tell_commits(path, writing)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
            how = "done"
        except SENTENCES as error:
            how, words = "refused", str(error)
        except Stopped:
            how = "stopped"
        except BaseException:
            words = traceback.format_exc()
        finally:
            with contextlib.suppress(OSError):  # nobody waits for the answer any more
                os.write(writing, json.dumps({"end": how, "words": words}).encode() + b"\n")
            os._exit(0)
    os.close(writing)
    return Begun(pid, reading)


def _tell_commits(path: Path, pipe: int) -> None:
    commit = RunDirectory.commit

    def telling(self: RunDirectory, first: int, last: int, *rest: Any) -> None:
        commit(self, first, last, *rest)
        if self.path.name == "added":  # of seeds that are not there yet
            return
        name = "." if self.path == path else self.path.name
        os.write(pipe, json.dumps({"point": name, "last": last}).encode() + b"\n")
        if name in dying and dying[name] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.commit = telling  # type: ignore[method-assign]
    runner.COMMIT_SECONDS = 0.0


#: In a child: point → the epoch after whose commit it dies.
dying: dict[str, int] = {}


def die_at(moment: int, path: Path) -> None:
    """From here on this process is killed at the `moment`-th time that it looks at a file below `path`."""
    seen, process = [0], os.getpid()

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir") and str(
            given[0]
        ).startswith(str(path)):
            seen[0] += 1
            if seen[0] == moment:
                os.kill(process, signal.SIGKILL)  # joining has a process of its own, which ends with this one

    sys.addaudithook(hear)
