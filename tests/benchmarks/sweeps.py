"""Sweeps on one core and on two, points apart and together: ``python -m tests.benchmarks.sweeps``.

Wall seconds of whole sweeps.  Workers and threads need the machine to themselves; ``limit`` is what two processes that
share nothing make of the same work, next to one: what the machine gives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

import tsdyn
from tests.benchmarks import durability
from tsdyn.running import sweep


def equal(points: int, epochs: int) -> tsdyn.Experiment:
    """A sweep of `points` points of equal cost, with 16 seeds and 1000 steps per epoch."""
    return durability.experiment(epochs, 1000).replace(
        {"name": "equal", "seeds": 16, "record.every": 5, "record.observables": ["mse_eval", "correlation"]}
        | {"sweep": {"teacher.polarity": [i / points for i in range(points)]}}
    )


def rates(activation: str, seeds: int) -> tsdyn.Experiment:
    """Sixteen learning rates of one small student."""
    return tsdyn.Experiment(
        name="rates",
        seeds=seeds,
        teacher={"widths": [50, 5, 10], "polarity": 1.0, "activation": activation},
        student={"overrealization": 2.0, "scale": 0.1, "activation": activation},
        data={"train": 1000, "eval": 200},
        training={"epochs": 10, "steps_per_epoch": 500, "learning_rate": 0.02},
        record={"every": 10, "observables": ["mse", "correlation"]},
        sweep={"training.learning_rate": [0.001 * (i + 1) for i in range(16)]},
    )


def seconds(of: tsdyn.Experiment, *, workers: int | None = None, together: bool = False, threads: int = 1) -> float:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        sweep.run(of, Path(folder) / "sweep", workers=workers, together=together).close()
        return time.perf_counter() - start


def both(of: tsdyn.Experiment) -> float:
    """Seconds of two independent processes side by side, each doing all of the work."""
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(), context.Queue()]
    for queue in queues:
        context.Process(target=_alone, args=(of, queue)).start()
    return max(queue.get() for queue in queues)


def _alone(of: tsdyn.Experiment, told: multiprocessing.Queue[float]) -> None:
    seconds(of.replace({"training.epochs": 1}))  # what is loaded and built first
    told.put(seconds(of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    asked = parser.parse_args()
    of = equal(4, asked.epochs)
    seconds(of.replace({"training.epochs": 1}))
    one = seconds(of)
    print(f"4 equal points, one process, one thread: {one:.1f} s", flush=True)
    print(f"  two threads: {one / seconds(of, threads=2):.2f} times as quick", flush=True)
    alone, shared = seconds(of, workers=1), seconds(of, workers=2)
    print(
        f"  one worker {alone:.1f} s, two {shared:.1f} s: {alone / shared:.2f}; two over no worker {one / shared:.2f}"
    )
    print(f"  limit: two processes side by side do {2 * one / both(of):.2f} times the work of one", flush=True)
    print("16 learning rates | seeds | apart, s | together, s | ratio")
    for activation, seeds in (("erf", 1), ("erf", 4), ("erf", 32), ("relu", 1), ("relu", 32)):
        apart, together = (
            min(seconds(rates(activation, seeds), together=way) for _ in range(2)) for way in (False, True)
        )
        print(f"{activation} | {seeds} | {apart:.2f} | {together:.2f} | {apart / together:.2f}", flush=True)


if __name__ == "__main__":
    main()
