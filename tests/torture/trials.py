"""The trials: what is done to a writer, how often, and what was counted."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import dask
import xarray as xr

import tsdyn
from tests import processes
from tests.torture import trace
from tests.torture.harness import FAILED, FINISHED, SEGMENTED, Law, arm, fork, fresh, operations, same, shim, training
from tsdyn.archive import whole_files


def kills(scratch: Path, rng: random.Random, number: int) -> str:
    """SIGKILL at a random moment of writing, committing, consolidating, half of them of a run that was extended."""
    law, path = Law(scratch, 6), scratch / "run"
    began = time.monotonic()
    fork(training(fresh(path), 6)).end()
    moment = (time.monotonic() - began) / 6
    kept = []
    for trial in range(number):
        fresh(path)
        extended = trial % 2 == 1
        if extended:
            fork(training(path, 3)).end()
        child = fork(training(path, 6))
        child.wait_for(rng.randint(0, 3 if extended else 7))  # of the seventh on, it consolidates
        time.sleep(rng.uniform(0.0, moment))
        _, told, _ = child.end(kill=True)
        last = max(told, default=3 if extended else -1)
        kept.append(last)
        law.holds(path, last, f"kill {trial}")
    counts = f"{sum(k < 0 for k in kept)} before the first commit, {sum(k == 6 for k in kept)} after the last"
    return _verdict(law, f"{number} SIGKILLs ({counts})")


def _traced(scratch: Path, *runs: int, seconds: float = 0.0) -> tuple[list[trace.Change], Path]:
    """The changes of runs of so many epochs, one after another in one directory."""
    base = fresh(scratch / "traced")
    base.mkdir()
    record = scratch / "trace"
    handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for epochs in runs:
        code, _, words = fork(training(base / "run", epochs, lambda: arm(base, trace=handle), seconds=seconds)).end()
        assert code == FINISHED, words
    os.close(handle)
    return trace.read(record), base


def prefixes(scratch: Path, rng: random.Random, number: int) -> str:
    """Every prefix (or `number` of them) of the changes that a run and its extension make."""
    changes, source = _traced(scratch, 2, 4)
    cuts = list(range(len(changes) + 1))
    cuts = cuts if number >= len(cuts) else sorted(rng.sample(cuts, number))
    law = Law(scratch, 4)
    for cut in cuts:
        target = fresh(scratch / "cut")
        trace.after_power_loss(changes[:cut], source, target, None)
        law.holds(target / "run", trace.committed(changes[:cut]), f"prefix {cut}")
    return _verdict(law, f"{len(cuts)} of {len(changes) + 1} prefixes of the changes of a run and its extension")


def power_cuts(scratch: Path, rng: random.Random, number: int) -> str:
    """Cuts at random points, unsynced writes and names dropped, torn or reordered at random."""
    changes, source = _traced(scratch, 2, 4)
    law = Law(scratch, 4)
    for trial in range(number):
        cut = rng.randint(1, len(changes))
        target = fresh(scratch / "cut")
        trace.after_power_loss(changes[:cut], source, target, rng)
        law.holds(target / "run", trace.committed(changes[:cut]), f"power cut {trial} at {cut}")
    return _verdict(law, f"{number} power cuts in a trace of {len(changes)} changes")


#: What an error says beside the file and the reason: of writing, and of reading what is to be joined.
PROMISES = (whole_files.INTACT, "nothing was changed")
#: In netCDF's own close of an archive: its last write and its close(2), with either error.
CRASHES = 4


#: More than any run takes: it commits once, at its end.
ONCE = 1e9


def at_once(scratch: Path, rng: random.Random, number: int) -> str:
    """A run whose first commit writes the archive: half power cuts, half system calls that fail."""
    changes, source = _traced(scratch, 3, seconds=ONCE)
    law = Law(scratch, 3)
    for trial in range(number - number // 2):
        cut = rng.randint(1, len(changes))
        target = fresh(scratch / "cut")
        trace.after_power_loss(changes[:cut], source, target, rng)
        law.holds(target / "run", trace.committed(changes[:cut]), f"power cut {trial} at {cut}")
    cuts = _verdict(law, f"{number - number // 2} power cuts in a trace of {len(changes)} changes")
    return f"{cuts}; {_failing(scratch, rng, number // 2, seconds=ONCE)}"


def faults(scratch: Path, rng: random.Random, number: int) -> str:
    """The n-th write, fsync, rename or close fails with ENOSPC or EIO, for every n (or `number` of these)."""
    return _failing(scratch, rng, number, seconds=0.0)


def _failing(scratch: Path, rng: random.Random, number: int, *, seconds: float) -> str:
    law, path, base = Law(scratch, 3), scratch / "faulty" / "run", scratch / "faulty"
    fresh(base).mkdir()
    counts: dict[str, int] = {}

    def counted(pipe: int) -> None:
        training(path, 3, lambda: arm(base), seconds=seconds)(pipe)
        os.write(pipe, b"\xff" + ",".join(f"{k}={shim.torture_count(n)}" for k, n in operations().items()).encode())

    words = fork(counted).end()[2]
    counts = {k: int(v) for k, v in (pair.split("=") for pair in words.split(","))}
    kinds = ("WRITE", "FSYNC", "RENAME", "CLOSE")
    points = [
        (kind, at, error) for kind in kinds for at in range(1, counts[kind] + 1) for error in (errno.ENOSPC, errno.EIO)
    ]
    points = points if number >= len(points) else rng.sample(points, number)
    unnamed, temporary, said, unaffected, crashed = 0, 0, 0, 0, 0
    for kind, at, error in points:
        fresh(path)
        origin = f"{kind} {at} {errno.errorcode[error]}"
        arming = _arming(base, kind, at, error)
        code, told, words = fork(training(path, 3, arming, seconds=seconds)).end()
        if code == FINISHED:
            unaffected += 1
        elif code == FAILED and any(promise in words for promise in PROMISES):
            said += 1
        elif code == -signal.SIGSEGV and kind in ("WRITE", "CLOSE") and crashed < CRASHES:
            crashed += 1  # the netCDF library when its last write or close(2) fails; see docs/reliability.md
        else:
            unnamed += 1
            law.said.append(f"{origin}: ended with {code}: {words}")
        left = [p.name for p in path.rglob("*.tmp")]
        if left and code != -signal.SIGSEGV:
            temporary += 1
            law.said.append(f"{origin}: left {left}")
        law.holds(path, max(told, default=-1), origin)
    what = ", ".join(f"{counts[k]} {k.lower()}s" for k in kinds)
    return _verdict(
        law,
        f"{len(points)} failed system calls of a run with {what}: {said} said by name, {unaffected} of no consequence, "
        f"{crashed} crashed the netCDF library in close, {unnamed} unnamed, {temporary} left a temporary file",
        unnamed + temporary,
    )


def _arming(base: Path, kind: str, at: int, error: int) -> Callable[[], None]:
    return lambda: arm(base, operation=kind, at=at, number=error)


def full_disks(scratch: Path, rng: random.Random, number: int) -> str:
    """A file system that fills up at a random point, or a limit on file size; room is made, the run goes on.

    Half of the writers are blinded: they do not see beforehand how much is free.
    """
    law, base = Law(scratch, 8), scratch / "small"
    fresh(base).mkdir()
    whole = sum(f.stat().st_size for f in (scratch / "reference").iterdir())
    mounted = _mount(base, "remount,size=1g") or _mount(base, "size=1g")
    said = finished = unnamed = 0
    for trial in range(number):
        blind = trial % 2 == 1
        limited = not mounted or trial % 4 == 3
        room = rng.randint(60_000, 2 * whole)
        path = fresh(base / "run")
        if mounted:
            _mount(base, f"remount,size={'1g' if limited else room + (0 if blind else whole_files.MARGIN)}")

        def before(blind: bool = blind, limited: bool = limited, room: int = room) -> None:
            if blind:
                usage = shutil.disk_usage(base)._replace(free=1 << 40)
                whole_files.shutil.disk_usage = lambda _: usage
            if limited:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room // 4, room // 4))

        code, told, words = fork(training(path, 8, before)).end()
        finished += code == FINISHED
        if code == FAILED:
            said += 1
        elif code != FINISHED:
            unnamed += 1
            law.said.append(f"full disk {trial}: ended with {code}: {words}")
        if mounted:
            _mount(base, "remount,size=1g")
        law.holds(path, max(told, default=-1), f"full disk {trial}")
    if mounted:
        subprocess.run(["umount", base], check=True)
    where = "tmpfs and RLIMIT_FSIZE" if mounted else "RLIMIT_FSIZE"
    return _verdict(
        law, f"{number} full disks ({where}): {said} said by name, {finished} fitted, {unnamed} unnamed", unnamed
    )


def _mount(base: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", os.fspath(base)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def two_writers(scratch: Path, rng: random.Random, number: int) -> str:
    """Two writers started together on one directory, none of them done before both have tried."""
    wrong: list[str] = []
    path = scratch / "contested"
    for trial in range(number):
        fresh(path)
        start, go = os.pipe()
        done, leave = os.pipe()

        def contend(pipe: int, start: int = start, done: int = done, go: int = go, leave: int = leave) -> None:
            os.close(go)
            os.close(leave)
            os.read(start, 1)  # both leave the line when the parent closes it

            def hold(epoch: int, *_: object) -> None:
                if epoch == 0:
                    os.write(pipe, b"in")
                    os.read(done, 1)

            tsdyn.run(SEGMENTED, path, progress=hold)

        children = [fork(contend) for _ in range(2)]
        os.close(start)
        os.close(done)
        time.sleep(rng.uniform(0, 0.002))
        os.close(go)
        for child in children:  # the one that is in says so, the other ends
            select.select([child.pipe], [], [])
        os.close(leave)
        ends = sorted(child.end()[::2] for child in children)
        if [code for code, _ in ends] != [FINISHED, FAILED] or "another process is writing here" not in ends[1][1]:
            wrong.append(f"two writers {trial}: {ends}")
    text = f"two writers started together {number} times: {len(wrong)} times not exactly one proceeded"
    if wrong:
        raise AssertionError("\n".join([text, *wrong[:10]]))
    return text


def readers(scratch: Path, rng: random.Random, number: int) -> str:
    """An archive of many chunks read so often under each of dask's schedulers, by two datasets at once.

    Processes are forks of a server that holds nothing of this one.
    """
    processes.dask_by_fork()
    from dask.distributed import Client, LocalCluster

    experiment = SEGMENTED.replace({"seeds": 6, "training.epochs": 40, "record.observables": ["mse", "weight", "D"]})
    tsdyn.run(experiment, scratch / "run")
    whole = tsdyn.open(scratch / "run").load()
    wrong: list[str] = []
    with dask.config.set(scheduler="threads", num_workers=8):
        wrong += _read("threads", scratch / "run", whole, number)
    with (
        ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool,
        dask.config.set(scheduler="processes", pool=pool),
    ):
        wrong += _read("processes", scratch / "run", whole, number)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=4, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster),
    ):
        wrong += _read("distributed", scratch / "run", whole, number)
    text = f"{number} readings each under threads (8), processes (2) and distributed (2 x 4): {len(wrong)} went wrong"
    if wrong:
        raise AssertionError("\n".join([text, *wrong[:10]]))
    return text


def _read(scheduler: str, path: Path, whole: xr.Dataset, number: int) -> list[str]:
    wrong = []
    for trial in range(number):
        one, other = tsdyn.open(path).chunk(epoch=7, seed=1), tsdyn.open(path)
        try:
            found = dask.compute(one, other)
        except Exception as error:
            wrong.append(f"{scheduler} {trial}: {type(error).__name__}: {error}")
            continue
        wrong += [f"{scheduler} {trial}: other numbers"] * (not all(same(ds, whole) for ds in found))
    return wrong


def _verdict(law: Law, what: str, more: int = 0) -> str:
    text = f"{what}: {law}"
    if law.broken or more:
        raise AssertionError("\n".join([text, *law.said[:20]]))
    return text
