"""Faults by number: the n-th system call of a kind fails, or memory ends, while a directory is run, joined, read, ...

Each trial has one fate.  ``whole``: the work was done, or refused in a sentence of the library's own, and afterwards
the directory holds what was committed and goes on to the reference's bits.  ``lost``: committed epochs are gone or not
opened.  ``wrong``: other numbers.  ``hung``: no end.  ``traceback``: another error than the library's own.
``crashed``: ended by a signal.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dask
import xarray as xr

import tsdyn
from tests import processes
from tests.torture.harness import FAILED, FINISHED, arm, fork, fresh, operations, same, say_progress, shim, training
from tsdyn.archive import integrity, whole_files
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError

FATES = ("whole", "lost", "wrong", "hung", "traceback", "crashed")
KINDS = ("WRITE", "FSYNC", "RENAME", "OPEN", "CLOSE")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
EPOCHS = 3
#: Ten limits on the address space: shares of what the work takes undisturbed, beyond what the child was forked with.
SHARES = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05)


@dataclass(frozen=True)
class Action:
    """One thing that is done to a directory while something fails.

    Attributes:
        prepare: Makes the directory that it is done to.
        work: Does it; given the directory and the pipe on which commits are told.
        committed: The last epoch that must be there whatever happens; −1 for none.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path, int], None]
    committed: int


def _without_end(path: Path, epochs: int, last: int) -> None:
    """A run of so many epochs whose writer ended after the commit of `last`, before anything was joined."""

    def stop() -> None:
        commit = RunDirectory.commit

        def ending(self: RunDirectory, first: int, now: int, *rest: object) -> None:
            commit(self, first, now, *rest)  # type: ignore[arg-type]
            if now == last:
                os._exit(FINISHED)

        RunDirectory.commit = ending  # type: ignore[method-assign]

    assert fork(training(path, epochs, stop)).end()[0] == FINISHED


def _finished(path: Path, epochs: int) -> None:
    code, _, words = fork(training(path, epochs)).end()
    assert code == FINISHED, words


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def _damaged_segment(path: Path) -> None:
    _without_end(path, EPOCHS, 2)
    _flip(path / "segments" / "epoch-000002-000002.nc")


def _damaged_archive(path: Path) -> None:
    _finished(path, EPOCHS)
    _flip(path / "archive.nc")


def _train(path: Path, pipe: int) -> None:
    training(path, EPOCHS)(pipe)


def _repair(path: Path, _: int) -> None:
    integrity.repair(path)


def _open(path: Path, _: int) -> None:
    tsdyn.open(path).load()
    tsdyn.open(path, verify=True).load()


ACTIONS = {
    "run": Action(lambda path: None, _train, -1),
    "resume": Action(lambda path: _without_end(path, EPOCHS, 1), _train, 1),
    "extend": Action(lambda path: _finished(path, 2), _train, 2),
    "join": Action(lambda path: _without_end(path, EPOCHS, EPOCHS), _train, EPOCHS),
    "repair a segment": Action(_damaged_segment, _repair, 1),
    "repair an archive": Action(_damaged_archive, _repair, -1),
    "open": Action(lambda path: _finished(path, EPOCHS), _open, EPOCHS),
    "open segments": Action(lambda path: _without_end(path, EPOCHS, 2), _open, 2),
}


class _Bench:
    """Templates of the directories, and the reference that every trial is compared with."""

    def __init__(self, scratch: Path, actions: Sequence[str]) -> None:
        dask.config.set(scheduler="synchronous")  # its threads do not survive a fork
        self.scratch = scratch
        self.base = fresh(scratch / "base")
        self.base.mkdir()
        self.path = self.base / "run"
        _finished(scratch / "reference", EPOCHS)
        with tsdyn.open(scratch / "reference") as ds:
            self.reference = ds.load()
        for name in actions:
            ACTIONS[name].prepare(scratch / name)

    def place(self, name: str) -> None:
        """Put the directory that an action is done to in its place."""
        fresh(self.path)
        if (self.scratch / name).exists():
            shutil.copytree(self.scratch / name, self.path)

    def trial(self, name: str, before: Callable[[], None]) -> tuple[str, str]:
        """(fate, what was said) of one action during which `before` makes something fail."""
        action = ACTIONS[name]
        self.place(name)

        def work(pipe: int) -> None:
            signal.alarm(processes.HUNG)
            before()
            action.work(self.path, pipe)

        code, told, words = fork(work).end()
        if code == -signal.SIGALRM:
            return "hung", words
        if code < 0:
            return "crashed", f"{signal.Signals(-code).name} {words}"
        if code not in (FINISHED, FAILED):
            return "traceback", words
        fate, why = self._after(max(told, default=action.committed), repaired=name.startswith("repair"))
        return fate, f"{words} {why}".strip()

    def _after(self, committed: int, *, repaired: bool) -> tuple[str, str]:
        """Fate of what is there afterwards, with everything in order again, and why."""
        try:
            with tsdyn.open(self.path) as ds:
                shown = ds.load()
        except ArchiveError as error:
            if committed >= 0 and not repaired:
                return "lost", f"cannot be opened after epoch {committed}: {error}"
        else:
            last = int(shown.epoch[-1]) if len(shown.epoch) else -1
            if last < committed:
                return "lost", f"epochs up to {committed} were committed, {last} is the last"
            if not _as_far(shown, self.reference):
                return "wrong", "other numbers"
        try:
            if repaired:
                integrity.repair(self.path)
                salvaged = any("dropped" in line or "was repaired" in line for line in integrity.check(self.path))
                if salvaged:
                    whole_files.remove_sealed(self.path / "archive.nc")
        except ArchiveError as error:
            return "lost", f"cannot be repaired afterwards: {error}"
        code, _, words = fork(training(self.path, EPOCHS)).end()
        if code != FINISHED:
            return "lost", f"cannot go on: {words}"
        with tsdyn.open(self.path) as ds:
            if not same(ds.load(), self.reference):
                return "wrong", "went on to other numbers"
        left = [p.name for p in self.path.rglob("*") if p.name.endswith(".tmp") or p.parent.name == "segments"]
        problems = integrity.check(self.path)
        return ("whole", "") if not left and not problems else ("wrong", f"left {left}, {problems}")


def _as_far(shown: xr.Dataset, reference: xr.Dataset) -> bool:
    """Whether all numbers shown are the reference's; what `repair` could not keep is NaN."""
    there = reference.sel(epoch=shown.epoch)
    if "dropped" in shown.attrs:
        shown = shown.fillna(there)
    return same(shown, there)


def _table(rows: dict[str, Counter[str]], first: str) -> str:
    lines = [f"| {first} | trials | {' | '.join(FATES)} | said in a sentence |", "|---|" + "---|" * (len(FATES) + 2)]
    for name, counts in rows.items():
        trials = sum(counts[fate] for fate in FATES)
        cells = " | ".join(str(counts[fate]) for fate in FATES)
        lines.append(f"| {name} | {trials} | {cells} | {counts['said']} |")
    return "\n".join(lines)


def _counted(rows: dict[str, Counter[str]], told: list[str], first: str) -> str:
    text = f"faults by number\n{_table(rows, first)}"
    if any(counts[fate] for counts in rows.values() for fate in FATES[1:]):
        raise AssertionError("\n".join([text, *told[:60]]))
    return text


def calls(scratch: Path, rng: random.Random, number: int) -> str:
    """The n-th write, fsync, rename, open and close below the directory fails, for every n and action.

    With fewer than all trials asked for, each n fails with one of the errors in turn, and `number` of these are tried;
    of so many actions at most.
    """
    actions = _some(rng, number)
    bench = _Bench(scratch, actions)
    rows: dict[str, Counter[str]] = {}
    told: list[str] = []
    points: list[tuple[str, str, int, int]] = []
    for name in actions:
        counts = _calls_of(bench, name)
        for kind in KINDS:
            every = [(name, kind, at, ERRORS) for at in range(1, counts[kind] + 1)]
            for name_, kind_, at, errors in every:
                chosen: Sequence[int] = errors if number > 10_000 else (errors[at % len(errors)],)
                points += [(name_, kind_, at, error) for error in chosen]
    tried = points if number >= len(points) else rng.sample(points, number)
    for trial, (name, kind, at, error) in enumerate(tried):
        say_progress(trial, len(tried), sum(rows.values(), Counter()))
        fate, words = bench.trial(name, lambda k=kind, a=at, e=error: arm(bench.base, operation=k, at=a, number=e))
        row = rows.setdefault(f"{name}: {kind.lower()}", Counter())
        row[fate] += 1
        row["said"] += bool(words) and fate == "whole"
        if fate != "whole":
            told.append(f"{name}: {kind} {at} {errno.errorcode[error]}: {fate}: {words}")
    return _counted(dict(sorted(rows.items())), told, "action: what fails")


def _some(rng: random.Random, number: int) -> list[str]:
    """`number` of the actions, or all."""
    return list(ACTIONS) if number >= len(ACTIONS) else rng.sample(list(ACTIONS), number)


def _calls_of(bench: _Bench, name: str) -> dict[str, int]:
    """How many calls of each kind an action makes when nothing fails."""
    bench.place(name)

    def counted(pipe: int) -> None:
        arm(bench.base)
        ACTIONS[name].work(bench.path, pipe)
        os.write(pipe, b"\xff" + struct.pack(f"<{len(KINDS)}i", *(shim.torture_count(operations()[k]) for k in KINDS)))

    child = fork(counted)
    said = child.said
    while chunk := os.read(child.pipe, 1 << 16):
        said += chunk
    os.close(child.pipe)
    os.waitpid(child.pid, 0)
    return dict(zip(KINDS, struct.unpack(f"<{len(KINDS)}i", said.partition(b"\xff")[2]), strict=True))


def memory(scratch: Path, rng: random.Random, number: int) -> str:
    """A limit on the address space lowered in ten steps, from nearly what the work takes to a twentieth of it.

    With fewer steps asked for, only so many of them, for so many of the actions.
    """
    actions = _some(rng, number)
    bench = _Bench(scratch, actions)
    rows: dict[str, Counter[str]] = {}
    told: list[str] = []
    for name in actions:
        needed = _addresses_of(bench, name)
        for share in SHARES[:: max(1, len(SHARES) // number)]:
            fate, words = bench.trial(name, lambda more=share * needed: _limit(round(more)))
            row = rows.setdefault(f"{name}: {needed / 1e6:.1f} MB", Counter())
            row[fate] += 1
            row["said"] += bool(words) and fate == "whole"
            if fate != "whole":
                told.append(f"{name}: {share:.0%} of {needed} bytes: {fate}: {words}")
    assert number < len(SHARES) or any(row["said"] for row in rows.values()), (
        "no action felt a limit: nothing was tried"
    )
    return _counted(rows, told, f"action: what it takes, of which {', '.join(f'{s:.0%}' for s in SHARES)} are left")


def _size(field: str) -> int:
    """Bytes of addresses of this process, now (``VmSize``) or at most (``VmPeak``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _addresses_of(bench: _Bench, name: str) -> int:
    """Bytes of addresses that an action takes beyond those that its process has before."""
    bench.place(name)

    def measured(pipe: int) -> None:
        _trim()
        before = _size("VmSize")
        aside = os.open(os.devnull, os.O_WRONLY)
        ACTIONS[name].work(bench.path, aside)
        os.write(pipe, b"\xff" + str(max(1 << 20, _size("VmPeak") - before)).encode())

    code, _, words = fork(measured).end()
    assert code == FINISHED, words
    return int(words)


def _trim() -> None:
    """Give back what the C library keeps of memory that was freed, from which an action would be served unlimited."""
    ctypes.CDLL(None).malloc_trim(0)


def _limit(more: int) -> None:
    """Leave this process so many bytes of addresses."""
    _trim()
    size = _size("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
