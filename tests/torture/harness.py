"""Runs in forked children, so that they can be killed, and what must hold of the directory they leave.

The process is started with the shim loaded (see `__main__`); its children arm it for themselves.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn.archive import integrity
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.running import provenance, runner

SEGMENTED = small(
    teacher__widths=[5, 3, 2],
    teacher__init="gaussian",
    data__train=50,
    data__eval=40,
    training__steps_per_epoch=5,
    seeds=2,
    record__observables=["mse", "weight"],
)
FINISHED, FAILED, TRACEBACK = 0, 3, 4

provenance.git_commit()  # asked of git by three processes, which no child need start again
shim = ctypes.CDLL(None)


def say_progress(trial: int, number: int, counts: Mapping[str, int]) -> None:
    """Say on stderr, after every hundred trials, what was counted so far: a long trial may be stopped."""
    if trial % 100 == 0 and trial:
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"  after {trial} of {number}: {told}", file=sys.stderr, flush=True)


def operations() -> dict[str, int]:
    names = ["CREATE", "WRITE", "TRUNCATE", "FSYNC", "RENAME", "UNLINK", "MKDIR", "RMDIR", "CLOSE", "MARK", "OPEN"]
    return {name: number for number, name in enumerate(names, start=1)}


def arm(directory: Path, *, trace: int = -1, operation: str | None = None, at: int = 0, number: int = 0) -> None:
    """From here on changes below `directory` are traced into a descriptor, and the `at`-th of a kind fails."""
    kind = operations()[operation] if operation else 0
    shim.torture_arm(os.fsencode(directory), trace, kind, ctypes.c_long(at), number)


@dataclass
class Child:
    """A forked process; `told` are the epochs it said are committed."""

    pid: int
    pipe: int
    said: bytes = b""

    def wait_for(self, commits: int) -> None:
        """Wait until it has reported so many commits, or has ended."""
        while len(self.said) < 4 * commits and (chunk := os.read(self.pipe, 1 << 16)):
            self.said += chunk

    def end(self, *, kill: bool = False) -> tuple[int, list[int], str]:
        """(exit code, committed epochs, last words); a signal is a negative code."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        said = self.said
        while chunk := os.read(self.pipe, 1 << 16):
            said += chunk
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        told, _, words = said.partition(b"\xff")
        whole = len(told) // 4 * 4
        return code, [n for (n,) in struct.iter_unpack("<i", told[:whole])], words.decode(errors="replace")


def fork(work: Callable[[int], None]) -> Child:
    """Run `work(pipe)` in a child that exits with FINISHED, FAILED (an error of tsdyn's) or TRACEBACK."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    code = TRACEBACK
    try:
        os.close(reading)
        work(writing)
        code = FINISHED
    except (ArchiveError, ExperimentError, MemoryError) as error:
        code = FAILED
        os.write(writing, b"\xff" + str(error).encode())
    except BaseException:
        os.write(writing, b"\xff" + traceback.format_exc().encode())
    finally:
        shim.torture_disarm()
        os._exit(code)


def training(
    path: Path, epochs: int, before: Callable[[], None] = lambda: None, *, seconds: float = 0.0
) -> Callable[[int], None]:
    """A run of `SEGMENTED` for so many epochs that reports each commit, one per epoch unless `seconds` are between."""

    def work(pipe: int) -> None:
        commit = RunDirectory.commit

        def telling(self: RunDirectory, first: int, last: int, *rest: object) -> None:
            commit(self, first, last, *rest)  # type: ignore[arg-type]
            os.write(pipe, struct.pack("<i", last))
            shim.torture_mark(ctypes.c_long(last))

        RunDirectory.commit = telling  # type: ignore[method-assign]
        runner.COMMIT_SECONDS = seconds
        before()
        tsdyn.run(SEGMENTED.replace({"training.epochs": epochs}), path)

    return work


class Law:
    """What must hold of a directory, whatever happened to its writer; keeps count."""

    def __init__(self, scratch: Path, epochs: int) -> None:
        self.epochs = epochs
        code, _, words = fork(training(scratch / "reference", epochs)).end()
        assert code == FINISHED, words
        with tsdyn.open(scratch / "reference") as ds:
            self.reference = ds.load()
        self.unreadable = self.lost = self.different = self.resumed = self.leftovers = self.unsound = 0
        self.said: list[str] = []

    def holds(self, path: Path, committed: int, origin: str) -> None:
        """Readable, nothing committed lost, sound; and gone on with, it ends with the reference's bits."""
        try:
            with tsdyn.open(path) as ds:
                shown = ds.load()
        except ArchiveError as error:
            if committed >= 0:
                self.unreadable += 1
                self.said.append(f"{origin}: unreadable after epoch {committed}: {error}")
        else:
            last = int(shown.epoch[-1])
            if last < committed or not same(shown, self.reference.sel(epoch=slice(0, last))):
                self.lost += 1
                self.said.append(f"{origin}: epochs up to {committed} committed, {last} found, or other numbers")
        if committed >= 0:
            problems = [p for p in integrity.check(path) if "commit was cut short" not in p]
            if problems:
                self.unsound += 1
                self.said.append(f"{origin}: {problems}")
        code, _, words = fork(training(path, self.epochs)).end()
        self.resumed += 1
        if code != FINISHED:
            self.different += 1
            self.said.append(f"{origin}: going on ended with {code}: {words}")
            return
        with tsdyn.open(path) as ds:
            if not same(ds.load(), self.reference) or integrity.check(path):
                self.different += 1
                self.said.append(f"{origin}: ended with other bits: {integrity.check(path)}")
        left = [p for p in path.rglob("*") if p.name.endswith(".tmp") or p.parent.name == "segments"]
        if left:
            self.leftovers += 1
            self.said.append(f"{origin}: left {left}")

    @property
    def broken(self) -> int:
        return self.unreadable + self.lost + self.different + self.leftovers + self.unsound

    def __str__(self) -> str:
        return (
            f"{self.unreadable} unreadable, {self.lost} lost committed epochs, {self.unsound} not sound, "
            f"{self.resumed} resumed, {self.different} not bit-identical, {self.leftovers} left files behind"
        )


def same(left: xr.Dataset, right: xr.Dataset) -> bool:
    names = set(right.variables)
    return set(left.variables) == names and all(
        np.array_equal(left[n].values, right[n].values, equal_nan=right[n].dtype.kind == "f") for n in names
    )


def fresh(path: Path) -> Path:
    """`path`, after removing what is there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def limit_memory(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
