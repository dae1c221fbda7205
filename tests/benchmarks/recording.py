"""Share of recording and writing in a whole run, one thread: ``python -m tests.benchmarks.recording``.

The two-layer students of Tian (2020), 1000 steps per epoch, losses, correlations, fan-out norms and weights recorded at
every epoch and measured on 10,000 evaluation samples.  Prints seconds of processor time and shares of the run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import tsdyn
from tsdyn.archive import run_directory
from tsdyn.engine import compiled_sums
from tsdyn.running.members import Members

PARTS = {
    "training": (Members, "advance"),
    "recording": (Members, "measure"),
    "committing": (run_directory.RunDirectory, "commit"),
    "joining": (run_directory.RunDirectory, "consolidate"),
}


def experiment(nodes: int, train: int, seeds: int, epochs: int, dtype: str, activation: str) -> tsdyn.Experiment:
    return tsdyn.Experiment(
        name="recording",
        seeds=seeds,
        dtype=dtype,
        teacher={"widths": [100, 10, 50], "polarity": 1.0},
        student={"widths": [100, nodes, 50], "scale": 0.005, "activation": activation},
        data={"train": train, "eval": 10_000},
        training={"epochs": epochs, "steps_per_epoch": 1000, "batch": 16, "learning_rate": 0.01},
        record={"observables": ["loss", "correlation", "fanout_norm", "weight"]},
    )


def seconds(of: tsdyn.Experiment) -> dict[str, float]:
    """Seconds of each part of a run, and of the whole."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start = time.process_time()
            try:
                return work(*given)
            finally:
                spent[name] += time.process_time() - start

        return call

    with tempfile.TemporaryDirectory() as folder:
        patches = [patch.object(kind, word, timed(name, getattr(kind, word))) for name, (kind, word) in PARTS.items()]
        for one in patches:
            one.start()
        start = time.process_time()
        try:
            tsdyn.run(of, Path(folder) / "run")
        finally:
            whole = time.process_time() - start
            for one in patches:
                one.stop()
    return {**spent, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=[10, 50, 100])
    parser.add_argument("--train", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--dtypes", nargs="*", default=["float64"])
    parser.add_argument("--activations", nargs="*", default=["relu", "tanh"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["σ", "dtype", "n", "training samples", "pass", "run, s", *PARTS, "rest"]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    cases = itertools.product(asked.activations, asked.dtypes, asked.nodes, asked.train)
    for activation, dtype, nodes, train in cases:
        of = experiment(nodes, train, asked.seeds, asked.epochs, dtype, activation)
        for way, serves in (("compiled", compiled_sums.serves), ("torch", lambda *_: False)):
            with patch.object(compiled_sums, "serves", serves):
                found = seconds(of)
            whole = found.pop("whole")
            shares = [*found.values(), whole - sum(found.values())]
            cells = " | ".join(f"{s / whole:.1%}" for s in shares)
            print(f"| {activation} | {dtype} | {nodes} | {train} | {way} | {whole:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
