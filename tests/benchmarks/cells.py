"""A cell of the table of peers: the same work done by tsdyn and by others, measured in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

#: Does the work once, and returns what all ways must agree in; None if there is nothing to compare.
Way = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """One piece of work and the ways to do it.

    Attributes:
        work: What is done, as the table names it.
        unit: Unit of `count` times the duration: "us" or "ms".
        ways: Name → a function that prepares that way; "ours" is tsdyn's.  One that raises is left out of the table.
        count: The duration of one call is divided by this.
        flops: Additions and multiplications of one call, for the share of the rate of products.
        bytes: Bytes that one call must write, for the share of the rate of filling memory.
        rtol: Ways may differ by this, relative to the largest number.
    """

    work: str
    unit: str
    ways: Mapping[str, Callable[[], Way]]
    count: float = 1
    flops: float = 0
    bytes: float = 0
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-9


@dataclass(frozen=True)
class Measured:
    """Durations of a cell: medians in its unit by way, the best peer's ratio to ours, and the share of the limit."""

    cell: Cell
    medians: dict[str, float]
    ratio: float
    best: str
    bound: str
    left_out: dict[str, str] = field(default_factory=dict)

    def row(self) -> str:
        peers = ", ".join(f"{n} {t:.4g}" for n, t in self.medians.items() if n != "ours") or "-"
        ratio = f"{self.ratio:.2f}" if self.best else "-"
        ours = f"{self.medians['ours']:.4g}"
        return f"| {self.cell.work} | {self.cell.unit} | {ours} | {peers} | {self.best} | {ratio} | {self.bound} |"


HEADER = "| work | unit | ours | peers | best peer | its time / ours | share of the limit |\n" + "|---" * 7 + "|"


def numbers(found: object) -> np.ndarray:
    """All numbers of a result, one after another."""
    if isinstance(found, Mapping):
        return np.concatenate([numbers(found[name]) for name in sorted(found)])
    if isinstance(found, list | tuple):
        return np.concatenate([numbers(each) for each in found])
    if isinstance(found, torch.Tensor):
        found = found.detach().numpy()
    return np.asarray(found).ravel()


def measured(cell: Cell, *, rounds: int, seconds: float, rates: Mapping[str, float]) -> Measured:
    """Processor time of every way, in turns: a round takes each way for `seconds`; medians over the rounds.

    The ratio is the median over rounds of the best peer's time to ours in the same round.

    Raises:
        AssertionError: if a way's result is not ours.
    """
    works: dict[str, Way] = {}
    left_out = {}
    ours = None
    for name, prepare in cell.ways.items():
        try:
            works[name] = prepare()
            found = works[name]()
        except Exception as error:  # of others' packages: anything
            if name == "ours":
                raise
            works.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
            continue
        if found is None:
            continue
        own = numbers(found)
        ours = own if ours is None else ours
        apart = np.abs(own - ours).max() / max(np.abs(ours).max(), np.finfo(float).tiny)
        assert apart <= cell.rtol, f"{cell.work}: {name} differs from ours by {apart:.2g}"
    del ours
    times = {name: 1 + int(seconds / max(_once(work), 1e-6)) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            for _ in range(times[name]):
                work()
            taken[name].append((time.process_time() - start) / times[name])
    scale = {"us": 1e6, "ms": 1e3}[cell.unit] / cell.count
    medians = {name: statistics.median(each) * scale for name, each in taken.items()}
    best = min((name for name in medians if name != "ours"), key=medians.__getitem__, default="")
    ratio = statistics.median(p / o for p, o in zip(taken[best], taken["ours"], strict=True)) if best else float("nan")
    once = statistics.median(taken["ours"])
    return Measured(cell, medians, ratio, best, _bound(cell, once, rates), left_out)


def _once(work: Way) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _bound(cell: Cell, seconds: float, rates: Mapping[str, float]) -> str:
    """Shares of the rate of products and of filling memory that our way reaches."""
    name = str(cell.dtype).removeprefix("torch.")
    found = []
    if cell.flops:
        found.append(f"{cell.flops / seconds / rates[name]:.0%} of products")
    if cell.bytes:
        found.append(f"{cell.bytes / seconds / rates['fill']:.0%} of filling")
    return ", ".join(found) or "-"


def machine_rates() -> dict[str, float]:
    """Flops per second of torch's product of 768 x 768 by dtype, and bytes per second of filling new memory."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        square = torch.randn(768, 768, dtype=dtype)
        least = min(_once(partial(torch.matmul, square, square)) for _ in range(9))
        found[str(dtype).removeprefix("torch.")] = 2 * 768**3 / least
    size = 1 << 27
    found["fill"] = size / min(_once(lambda: torch.ones(size // 8, dtype=torch.float64)) for _ in range(5))
    return found
"""10,000 cells of two sweeps, reduced on two dask workers: ``python -m tests.benchmarks.cells [CELLS]``.

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
