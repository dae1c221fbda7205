"""10,000 cells of two sweeps, reduced on two dask workers: ``python -m tests.benchmarks.many_cells [CELLS]``.

Prints the task-graph sizes of a series and of a reduction over nodes, seconds, and the workers' largest memory, and
exits 1 if a worker held more than its bound or a number is another one than plain reading gives.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import netCDF4
import numpy as np
from dask.distributed import Client, LocalCluster

import tsdyn
from tests.scale.generate import MANY, sweep

BOUND = 1 << 30


def peak() -> int:
    """The largest memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(cells: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        halves = [Path(folder) / name for name in ("a", "b")]
        rates = np.linspace(1e-3, 2e-3, cells).tolist()
        for path, own in zip(halves, (rates[: cells // 2], rates[cells // 2 :]), strict=True):
            sweep(path, MANY.replace({"sweep": {"training.learning_rate": own}}))
        begin = time.perf_counter()
        ds = tsdyn.open(halves)
        opened = time.perf_counter() - begin
        series = ds["mse_eval"].isel(epoch=-1).mean("seed")
        best = ds["correlation"].sel(layer=1).isel(epoch=-1).max("node").mean(["seed", "teacher_node"])
        sizes = {name: len(array.__dask_graph__()) for name, array in (("mse_eval", series), ("correlation", best))}
        with (
            LocalCluster(2, threads_per_worker=1, dashboard_address=None, memory_limit=BOUND) as cluster,
            Client(cluster) as client,
        ):
            found, seconds = {}, {}
            for name, array in (("mse_eval", series), ("correlation", best)):
                begin = time.perf_counter()
                found[name] = array.compute()
                seconds[name] = time.perf_counter() - begin
            held = max(client.run(peak).values())
        odd = 0
        for position in np.linspace(0, cells - 1, 20).astype(int):  # by netCDF4 alone
            half, own = halves[int(position >= cells // 2)], rates[position]
            with netCDF4.Dataset(half / f"learning_rate={own}" / "archive.nc") as nc:
                rho = nc["correlation"][:, -1, 0].filled(np.nan)
                plain = np.nanmax(np.where(np.isnan(rho), -np.inf, rho), axis=-1)
                plain = plain[np.isfinite(plain)].mean()
            odd += not np.isclose(float(found["correlation"].sel(learning_rate=own)), plain, rtol=1e-12)
    for name, size in sizes.items():
        print(f"{name}: {cells} cells are {size} tasks, reduced in {seconds[name]:.1f} s")
    print(
        f"opened in {opened:.1f} s; a worker held at most {held / 1e6:.0f} MB of {BOUND / 1e6:.0f}; {odd} of 20 differ"
    )
    return int(held > BOUND or odd > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
