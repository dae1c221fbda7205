"""How processor time grows, one thread: ``python -m tests.benchmarks.growth [-o growth.png]``.

Training over members, nodes, depth and samples per batch; per-sample norms, moments and Hessian products over samples;
whole runs over epochs, recorded variables and points of a sweep.  Prints durations and, for each pair of sizes, the
exponent of growth, log(time ratio)/log(size ratio): 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tsdyn
from tests.benchmarks.engine import Problem
from tests.benchmarks.peer_derivatives import connected, half_square, mean_square
from tsdyn import derivatives, theory

#: What grows → (sizes, size → function that is measured).
Axis = tuple[tuple[int, ...], Callable[[int], Callable[[], object]]]


def training(widths: Callable[[int], tuple[int, ...]], *, members: bool = False, batch: bool = False) -> Axis:
    def of(size: int) -> Callable[[], object]:
        own = widths(size)
        problem = Problem((own[0], 10, own[-1]), own, size if batch else 16, size if members else 4, torch.float64)
        return problem.engine(50)[0]

    return (1, 4, 16, 64) if members else (8, 16, 32, 64, 128), of


def of_samples(work: Callable[[torch.Tensor], object]) -> Axis:
    return (250, 500, 1000, 2000, 4000), lambda count: lambda: work(torch.randn(count, 50, dtype=torch.float64))


def run(size: int, what: str) -> Callable[[], object]:
    observables = ["mse", "loss", "correlation", "fanout_norm", "weight", "bias", "gradient_norm", "gradient_rms"]
    told = tsdyn.Experiment(
        name="growth",
        seeds=2,
        teacher={"widths": [20, 5, 10], "polarity": 1.0},
        student={"overrealization": 2.0, "scale": 0.1},
        data={"train": 500, "eval": 500},
        training={"epochs": size if what == "epochs" else 4, "steps_per_epoch": 50, "learning_rate": 0.02},
        record={"observables": observables[: size if what == "variables" else 2]},
        **({"sweep": {"teacher.polarity": [i / size for i in range(size)]}} if what == "points" else {}),
    )

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tsdyn.run(told, Path(folder) / "run")

    return work


def axes() -> Iterator[tuple[str, Axis]]:
    yield "members", training(lambda _: (100, 50, 50), members=True)
    yield "nodes", training(lambda n: (100, n, 50))
    yield "hidden layers, of 32 nodes", ((1, 2, 4, 8), training(lambda depth: (32, *[32] * depth, 32))[1])
    yield "samples per batch", training(lambda _: (100, 50, 50), batch=True)
    module = connected((50, 40, 20)).to_torch()
    zeros = lambda x: torch.zeros(len(x), 20, dtype=x.dtype)  # noqa: E731
    yield (
        "samples of norms",
        of_samples(lambda x: derivatives.per_sample_gradient_norms(module, half_square, x, zeros(x))),
    )
    v = torch.ones(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    yield (
        "samples of a Hessian product",
        of_samples(lambda x: derivatives.hessian_vector_product(module, mean_square, x, zeros(x), v)),
    )
    nets = connected((50, 20, 20, 20), seed=1), connected((50, 40, 40, 20))
    yield "samples of moments", of_samples(lambda x: theory.expectations(nets[1], nets[0], x))
    for what, sizes in (("epochs", (4, 16, 64, 256)), ("variables", (1, 2, 4, 8)), ("points", (1, 4, 16, 64, 256))):
        yield what, (sizes, lambda size, what=what: run(size, what))


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    work()
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="picture of all curves")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print("| what grows | ms (size: time) | exponents |\n|---|---|---|")
    for name, (sizes, of) in axes():
        times = [milliseconds(of(size), asked.rounds) for size in sizes]
        found[name] = sizes, times
        pairs = itertools.pairwise(zip(sizes, times, strict=True))
        exponents = ", ".join(f"{math.log(t / s) / math.log(b / a):.2f}" for (a, s), (b, t) in pairs)
        shown = ", ".join(f"{size}: {t:.3g}" for size, t in zip(sizes, times, strict=True))
        print(f"| {name} | {shown} | {exponents} |", flush=True)
    if asked.output:
        import matplotlib.pyplot as plt

        figure, panels = plt.subplots(2, 5, figsize=(13, 5), layout="constrained")
        for panel, (name, (sizes, times)) in zip(panels.flat, found.items(), strict=True):
            panel.loglog(sizes, times, "o-", base=2)
            panel.loglog(sizes, [times[0] * s / sizes[0] for s in sizes], ":", color="0.6", base=2)
            panel.set(xlabel=name, ylabel="ms of processor time")
        figure.savefig(asked.output, dpi=110)


if __name__ == "__main__":
    main()
