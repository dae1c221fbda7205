"""A cell of the table of peers: the same work done by tsdyn and by others, measured in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

#: Seconds for what a way leaves to a thread of its own, which its processor time includes: jax frees its results so.
_SETTLE = 0.03
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
            time.sleep(_SETTLE)
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
