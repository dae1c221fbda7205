"""The trials of `python -m tests.scale`; each prints what it measured and asserts what must hold."""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tests.scale import generate, memory
from tests.scale import reading as read
from tsdyn.archive import sweep_directory
from tsdyn.archive.headers import INDEX, Headers
from tsdyn.running import sweep

#: dask's limit for each worker.
MEMORY = "2GiB"
#: As docs/how-to/bigger-than-memory.md says: what a worker gives back to the system it gets back page by page.
KEEPING = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 1 << 30,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 1 << 30,
}


#: The quickest of so many counts: of a few seconds one is as good as the machine's next whim.
PASSES = 3


def reading(scratch: Path, asked: argparse.Namespace) -> None:
    """Three reductions by one and by two workers, beside netCDF4 alone; page cache warm, then cold.

    Raises AssertionError if two workers make other numbers than one.
    """
    path = scratch / "large"
    if not path.exists():
        runs = max(2, round(asked.gigabytes / 0.256))
        print(
            f"made {runs} runs, {generate.sweep(path, generate.swept(generate.LARGE, runs)) / 1e9:.1f} GB", flush=True
        )
    read.raw(path, 2)  # into the page cache, as far as it goes
    speed: dict[tuple[str, int], float] = {}
    by_one: dict[str, xr.DataArray] = {}
    for workers in (1, 2):
        speed["raw", workers] = max(read.raw(path, workers) for _ in range(PASSES))
        print(f"{workers} x netCDF4: {speed['raw', workers] / 1e6:.0f} MB/s", flush=True)
        with cluster(workers) as client:
            for name, reduce in read.REDUCTIONS.items():
                passes = [read.lazily(path, client, reduce) for _ in range(PASSES)]
                speed[name, workers], found = max(quick for quick, _ in passes), passes[0][1]
                assert found.notnull().all(), name
                xr.testing.assert_allclose(found, by_one.setdefault(name, found), rtol=1e-12)
                print(
                    f"{workers} x {name}: {speed[name, workers] / 1e6:.0f} MB/s, "
                    f"{speed[name, workers] / speed['raw', workers]:.0%} of netCDF4, "
                    f"{speed[name, workers] / speed[name, 1]:.2f} x one worker",
                    flush=True,
                )
            print("peak memory of a worker:", max(client.run(read.peak).values()) // 1_000_000, "MB", flush=True)
    read.forget(path)
    cold = read.raw(path, 1)
    read.forget(path)
    with cluster(1) as client:
        lazily, _ = read.lazily(path, client, read.REDUCTIONS["mean_specialization"])
    print(f"cold, 1 x netCDF4: {cold / 1e6:.0f} MB/s, mean_specialization: {lazily / 1e6:.0f} MB/s", flush=True)


@contextmanager
def cluster(workers: int) -> Iterator[object]:
    from distributed import Client, LocalCluster

    with (
        dask.config.set(KEEPING),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=MEMORY,
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as made,
        Client(made) as client,
    ):
        yield client


def opening(scratch: Path, asked: argparse.Namespace) -> None:
    """Many runs from the index, and one (seed, layer) slice of one of them."""
    path = scratch / "many"
    if not path.exists():
        generate.sweep(path, generate.swept(generate.MANY, asked.runs))
    if not (path / INDEX).exists():
        began = time.perf_counter()
        index = Headers(path)
        for name, (_, single) in sweep_directory.sweep_points(path).items():
            index.finished(name, lambda expected=single: expected)
        index.write()
        print(f"index from the files' headers: {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    ds = tsdyn.open(path)
    print(f"opened {ds.sizes['learning_rate']} runs: {time.perf_counter() - began:.2f} s", flush=True)
    took = []
    for position in random.Random(1).sample(range(asked.runs), 20):
        began = time.perf_counter()
        found = ds["correlation"].isel(learning_rate=position).sel(seed=1, layer=1).compute(scheduler="synchronous")
        took.append(time.perf_counter() - began)
        experiment = generate.MANY.replace({"training.learning_rate": float(ds["learning_rate"][position])})
        wanted = generate.correlations(experiment, position, 1)[1]
        inside = found.values[:, : wanted.shape[1], : wanted.shape[2]]
        assert np.array_equal(inside, wanted), f"run {position} reads differently from what was written"
    print(f"one (seed, layer) of one run: median {np.median(took):.3f} s, worst {max(took):.3f} s", flush=True)


def kills(scratch: Path, asked: argparse.Namespace) -> None:
    """Sweeps on two workers, one of which is killed after every commit, until so many were."""
    slow = small(seeds=2, training__epochs=12, training__steps_per_epoch=4000, teacher__widths=[50, 20, 10])
    experiment = slow.replace({"sweep": {"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}})
    wanted = tsdyn.run(experiment, scratch / "undisturbed").load()
    done = sweeps = 0
    while done < asked.kills:
        path = scratch / f"killed-{sweeps}"
        with killing(random.Random(f"kills {sweeps}"), path, asked.kills - done) as killed:
            found = sweep.run(experiment, path, workers=2).load()
        xr.testing.assert_identical(found.drop_attrs(), wanted.drop_attrs())
        done, sweeps = done + len(killed), sweeps + 1
        print(f"{done} kills in {sweeps} sweeps, each complete and bit-identical", flush=True)


@contextmanager
def killing(
    draw: random.Random, path: Path, number: int, *, pause: tuple[float, float] = (0.1, 2.0)
) -> Iterator[list[int]]:
    """While the body runs, a worker process of ours dies some time after each commit; gives who did."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        seen: set[Path] = set()
        while len(killed) < number and not stop.wait(draw.uniform(*pause)):
            there = {*path.glob("*/segments/*.nc"), *path.glob("*/archive.nc")}
            alive = [child.pid for child in processes.workers() if child.pid not in killed]
            if alive and there - seen:  # whoever dies again and again before it has committed anything has failed
                killed.append(draw.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)
                seen |= there

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def segments(scratch: Path, asked: argparse.Namespace) -> None:
    """Peak memory of a run of 1 GB of segments, joining included, beside what was announced."""
    announced, peak, number = memory.peak(scratch, 1.0)
    print(
        f"1 GB in {number} segments: announced {announced / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB, joining included "
        f"({peak / announced - 1:+.0%})",
        flush=True,
    )
    assert abs(peak / announced - 1) <= memory.WITHIN, "peak memory is not what was announced"


TRIALS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "reading": reading,
    "opening": opening,
    "kills": kills,
    "segments": segments,
}
