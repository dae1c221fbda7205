"""How fast a lazy analysis goes through an archive, beside the same chunks read by netCDF4 alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import netCDF4
import xarray as xr
from tsdyn.analysis import specialization, summary

import tsdyn

VARIABLE, LAYER = "correlation", 1

#: What is measured: name → of one layer of an archive.
REDUCTIONS: dict[str, Callable[[xr.Dataset], xr.DataArray]] = {
    "mean_specialization": specialization.mean_specialization,
    "quantile": lambda ds: summary.summarise(specialization.mean_specialization(ds))["quantiles"],
    "success_rate": specialization.success_rate,
}


def files(sweep: Path) -> list[Path]:
    return sorted(sweep.glob("*/archive.nc"))


def forget(sweep: Path) -> None:
    """Drop the archive from the page cache."""
    for file in files(sweep):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def chunks(file: Path) -> int:
    """Read the layer chunk by chunk, as it lies on disk; returns its bytes."""
    total = 0
    with netCDF4.Dataset(file) as nc:
        array = nc[VARIABLE]
        array.set_auto_maskandscale(False)
        ends = dict(zip(array.dimensions, array.shape, strict=True))
        ends |= {"node": int(nc["width"][LAYER - 1]), "teacher_node": int(nc["teacher_width"][LAYER - 1])}
        spans = [
            [LAYER - 1]
            if dim == "layer"
            else [slice(at, min(at + step, ends[dim])) for at in range(0, ends[dim], step)]
            for dim, step in zip(array.dimensions, array.chunking(), strict=True)
        ]
        for at in itertools.product(*spans):
            total += array[at].nbytes
    return total


def raw(sweep: Path, processes: int) -> float:
    """Bytes per second of netCDF4 alone."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(int, range(processes))
        began = time.perf_counter()
        total = sum(pool.imap_unordered(chunks, files(sweep)))
        return total / (time.perf_counter() - began)


def peak(dask_worker: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lazily(sweep: Path, client: object, reduce: Callable[[xr.Dataset], xr.DataArray]) -> tuple[float, xr.DataArray]:
    """Bytes per second, counted as in `raw`, and the result."""
    ds = tsdyn.layer(tsdyn.open(sweep), LAYER)
    began = time.perf_counter()
    found = reduce(ds).compute(scheduler=client)
    return ds[VARIABLE].nbytes / (time.perf_counter() - began), found
