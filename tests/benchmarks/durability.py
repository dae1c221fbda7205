"""Cost of the archive's guarantees, one thread: ``python -m tests.benchmarks.durability``.

Commits and joining of a whole run beside plain appending to one netCDF file, and what going on with a run of a
gigabyte takes.  The figures of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import netCDF4
import torch

import tsdyn
from tsdyn import schema, vocabulary
from tsdyn.archive import joining, netcdf, run_directory
from tsdyn.running.members import Members


def experiment(epochs: int, steps: int) -> tsdyn.Experiment:
    """The released two-layer experiment at five times the teacher's width: 2.2 MB of records per epoch."""
    return tsdyn.Experiment(
        name="durability",
        seeds=32,
        teacher={"widths": [100, 10, 50], "polarity": 1.0},
        student={"overrealization": 5.0, "scale": 0.005},
        data={"train": 10_000, "eval": 1000},
        training={"epochs": epochs, "steps_per_epoch": steps, "batch": 16, "learning_rate": 0.01},
        record={"observables": ["loss", "correlation", "fanout_norm", "weight"]},
    )


def append(nc: netCDF4.Dataset, layout: schema.Layout, row: int, records: Mapping[str, Any], epochs: int) -> None:
    """Append records to an open file, neither flushed nor read back."""
    for name, value in records.items():
        for layer, block in enumerate(value, start=1) if isinstance(value, list) else ((None, value),):
            at = netcdf.index(vocabulary.VARIABLES[name], layout, slice(row, row + epochs), layer)
            nc[name][at] = block


def costs(folder: Path, epochs: int, steps: int) -> None:
    """Seconds of a run that its commits, reading them back among these, its joining and plain appending take."""
    of = experiment(epochs, steps)
    spent = dict.fromkeys(("commit", "read back", "consolidate", "append"), 0.0)
    commits = 0
    plain = netCDF4.Dataset(folder / "plain.nc", "w", format="NETCDF4")
    plain.set_auto_maskandscale(False)
    names = of.recorded()
    netcdf.create(plain, of.layout, of.schedule, names, of.dtype, {})
    commit, consolidate = run_directory.RunDirectory.commit, run_directory.RunDirectory.consolidate
    differing = joining.differing_records

    def timed(name: str, work: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        found = work(*given)
        spent[name] += time.perf_counter() - start
        return found

    def committing(run: run_directory.RunDirectory, first: int, last: int, held: Any, records: Any, *rest: Any) -> None:
        nonlocal commits
        commits += 1
        timed("commit", commit, run, first, last, held, records, *rest)
        timed("append", append, plain, of.layout, first, records, len(held))

    def joining_all(run: run_directory.RunDirectory, attrs: Any) -> None:
        timed("append", plain.close)
        timed("consolidate", consolidate, run, attrs)

    with (
        patch.object(joining, "differing_records", lambda *given: timed("read back", differing, *given)),
        patch.object(run_directory.RunDirectory, "commit", committing),
        patch.object(run_directory.RunDirectory, "consolidate", joining_all),
    ):
        start = time.perf_counter()
        tsdyn.run(of, folder / "run")
        whole = time.perf_counter() - start - spent["append"]
    print(f"{epochs + 1} epochs of {steps} steps, {whole:.1f} s, {commits} commits; ms per epoch, share of the run:")
    for name, seconds in spent.items():
        print(f"  {name:12s} {seconds / (epochs + 1) * 1e3:6.1f} {seconds / whole:6.1%}", flush=True)


class Reached(Exception):
    """Raised before the first step of training."""


def until_training(of: tsdyn.Experiment, path: Path) -> float:
    def stop(*_: object) -> None:
        raise Reached

    start = time.perf_counter()
    with patch.object(Members, "advance", stop):
        try:
            tsdyn.run(of, path)
        except Reached:
            return time.perf_counter() - start
    raise AssertionError("nothing was left to train")


def resuming(folder: Path, megabytes: int) -> None:
    """Seconds until a run of this size resumes training, before and after joining, and until a new one begins."""
    of = experiment(1, 5)
    epochs = int(megabytes * 1e6 / netcdf.bytes_per_epoch(of.layout, schema.expand(of.record.observables), of.dtype))
    of, longer, path = experiment(epochs, 5), experiment(epochs + 1, 5), folder / "run"
    with patch.object(run_directory.RunDirectory, "consolidate", lambda *_: None):
        tsdyn.run(of, path)
    files = list((path / "segments").glob("*.nc"))
    size = sum(file.stat().st_size for file in files) / 1e6
    beginning = until_training(longer, folder / "other")
    killed = until_training(longer, path)
    start = time.perf_counter()
    tsdyn.run(longer, path).close()
    finishing = time.perf_counter() - start
    extended = until_training(experiment(epochs + 2, 5), path)
    print(
        f"a run of {size:.0f} MB, {len(files)} segments; seconds until it trains: begun {beginning:.2f}, gone on with "
        f"{killed:.2f}, extended after it was finished {extended:.2f}; its last epoch and joining {finishing:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, nargs="*", default=[60, 300])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=1000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for epochs in asked.epochs:
        with tempfile.TemporaryDirectory() as folder:
            costs(Path(folder), epochs, asked.steps)
    with tempfile.TemporaryDirectory() as folder:
        resuming(Path(folder), asked.megabytes)


if __name__ == "__main__":
    main()
