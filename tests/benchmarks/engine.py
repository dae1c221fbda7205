"""The engine compared with other methods, one thread, every ratio from one run: ``python -m tests.benchmarks.engine``.

Two-layer students of Tian (2020) (d=100, m=10, C=50, batch 16) and a five-layer one (teacher
20-50-75-100-125-100, student twice as wide, batch 64).  Prints microseconds per seed and step.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.networks.network import Network

RATE = 0.01
SAMPLES = 10_000
#: Of a member in one call, at least: an epoch has 1000, and a call packs and unpacks each member once.
STEPS = 200
#: Members share this much data, so that 512 of them fit in memory; rows are drawn from all of it.
POOL = 8
DEEP_TEACHER = (20, 50, 75, 100, 125, 100)
DEEP_STUDENT = (20, 100, 150, 200, 250, 100)


def microseconds(ways: dict[str, tuple[Callable[[], object], int]], seconds: float) -> dict[str, float]:
    """Least processor time of each method per seed and step; rounds alternate, so that all see the same machine.

    One thread that never waits takes as long by the clock; what others run on the machine does not count as ours.
    """
    best = dict.fromkeys(ways, float("inf"))
    for work, _ in ways.values():
        work()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end:
        for name, (work, steps) in ways.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], (time.process_time() - start) / steps * 1e6)
    return best


def peak(dtype: torch.dtype) -> float:
    """This core's matrix product, flops per microsecond."""
    a, b = torch.randn(2, 768, 768, dtype=dtype)
    return 2 * 768**3 / microseconds({"product": (lambda: torch.matmul(a, b), 1)}, 1.0)["product"]


def flops(widths: Sequence[int], batch: int) -> int:
    """Of one seed's step: forward and update of every layer, backward through all but the lowest."""
    sizes = [below * n for below, n in itertools.pairwise(widths)]
    return 2 * batch * (3 * sum(sizes) - sizes[0])


class Problem:
    """A teacher, data and rows of batches."""

    def __init__(self, teacher: Sequence[int], student: Sequence[int], batch: int, members: int, dtype: torch.dtype):
        self.widths, self.batch, self.members, self.dtype = tuple(student), batch, members, dtype
        self.draw = torch.Generator().manual_seed(0)
        self.teacher = self.network(teacher, 1.0)
        pool = min(members, POOL)
        self.inputs = torch.randn(pool, SAMPLES, teacher[0], generator=self.draw, dtype=dtype)
        self.targets = torch.stack([self.teacher(x) for x in self.inputs])

    def network(self, widths: Sequence[int], scale: float) -> Network:
        weights = [
            torch.randn(n, below, generator=self.draw, dtype=self.dtype) * scale / below**0.5
            for below, n in itertools.pairwise(widths)
        ]
        return Network(weights, [torch.zeros(n, dtype=self.dtype) for n in widths[1:]])

    def rows(self, members: int, steps: int) -> Tensor:
        return torch.randint(0, SAMPLES, (members, steps, self.batch), generator=self.draw)

    def engine(self, steps: int) -> tuple[Callable[[], object], int]:
        members = Ensemble.of([self.network(self.widths, 0.5) for _ in range(self.members)])
        rows = self.rows(self.members, steps)
        pools = [
            (slice(start, start + len(self.inputs)), rows[start : start + len(self.inputs)])
            for start in range(0, self.members, len(self.inputs))
        ]

        def work() -> None:
            for members_of_pool, rows_of_pool in pools:
                part = members.block(members_of_pool)
                count = part.members
                stream = finite_stream(self.inputs[:count], self.targets[:count], rows_of_pool)
                train_epoch(part, stream, Rule(RATE), batch=self.batch)

        return work, steps * self.members

    def hand_written(self, steps: int, *, teacher: bool) -> tuple[Callable[[], object], int]:
        """The formulas one seed at a time, as the released code writes them.

        Args:
            steps: Steps per call.
            teacher: Whether every batch is put through the teacher, as released; else its outputs are looked up.
        """
        net = self.network(self.widths, 0.5)
        x_all, y_all, rows = self.inputs[0], self.targets[0], self.rows(1, steps)[0]
        rate = RATE / self.batch
        layers = list(zip(net.weights, [b for b in net.biases if b is not None], strict=True))

        @torch.no_grad()
        def work() -> None:
            for chosen in rows:
                x = x_all[chosen]
                y = self.teacher(x) if teacher else y_all[chosen]
                below = [x]
                for w, b in layers[:-1]:
                    below.append(torch.relu(below[-1] @ w.T + b))
                w, b = layers[-1]
                g = y - (below[-1] @ w.T + b)
                for (w, b), f in zip(reversed(layers), reversed(below), strict=True):
                    passed = (g @ w) * (f > 0) if f is not x else None
                    w.add_(g.T @ f, alpha=rate)
                    b.add_(g.sum(0), alpha=rate)
                    if passed is not None:
                        g = passed

        return work, steps

    def modules(self, steps: int) -> tuple[Callable[[], object], int]:
        module = self.network(self.widths, 0.5).to_torch()
        optimizer = torch.optim.SGD(module.parameters(), RATE)
        x_all, y_all, rows = self.inputs[0], self.targets[0], self.rows(1, steps)[0]

        def work() -> None:
            for chosen in rows:
                optimizer.zero_grad()
                (0.5 * (module(x_all[chosen]) - y_all[chosen]).square().sum(1).mean()).backward()
                optimizer.step()

        return work, steps

    def vmapped(self, steps: int) -> tuple[Callable[[], object], int]:
        module = self.network(self.widths, 0.5).to_torch()
        count = len(self.inputs)
        parameters = {name: torch.stack([p.detach()] * self.members) for name, p in module.named_parameters()}
        rows = self.rows(self.members, steps)
        owner = torch.arange(self.members).view(-1, 1) % count

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (functional_call(module, parameters, (x,)) - y).square().sum(1).mean()

        gradient = vmap(grad(loss))

        def work() -> None:
            for step in range(steps):
                chosen = rows[:, step]
                found = gradient(parameters, self.inputs[owner, chosen], self.targets[owner, chosen])
                for name, p in parameters.items():
                    p.add_(found[name], alpha=-RATE)

        return work, steps * self.members


def row(name: str, problem: Problem, steps: int, limit: float, seconds: float) -> str:
    few = max(1, 8 // problem.members)
    found = microseconds(
        {
            "ours": problem.engine(steps),
            "module": problem.modules(8),
            "hand": problem.hand_written(8, teacher=True),
            "looked up": problem.hand_written(8, teacher=False),
            "vmap": problem.vmapped(few),
        },
        seconds,
    )
    ours = found.pop("ours")
    share = flops(problem.widths, problem.batch) / ours / limit
    cells = [f"{t:.4g} ({t / ours:.1f}x)" for t in found.values()]
    return " | ".join([f"| {name}", f"{problem.members}", f"{ours:.4g}", *cells, f"{share:.0%} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=[10, 20, 50, 100])
    parser.add_argument("--members", type=int, nargs="*", default=[1, 8, 32, 128, 512])
    parser.add_argument("--deep", type=int, nargs="*", default=[1, 5, 20], help="members of the five-layer net")
    parser.add_argument("--dtypes", nargs="*", default=["float64", "float32"])
    parser.add_argument("--seconds", type=float, default=0.4, help="a cell")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.dtypes:
        dtype = getattr(torch, name)
        limit = peak(dtype)
        print(f"\n{name}; matrix product {limit / 1e3:.0f} GFLOP/s; microseconds per seed and step (times ours)\n")
        print("| net | S | ours | nn.Module + SGD | hand-written | teacher looked up | vmap(grad) | share of product |")
        print("|---|---|---|---|---|---|---|---|")
        for nodes in asked.nodes:
            for members in asked.members:
                problem = Problem((100, 10, 50), (100, nodes, 50), 16, members, dtype)
                print(row(f"n={nodes}", problem, max(STEPS, 1600 // members), limit, asked.seconds), flush=True)
        for members in asked.deep:
            problem = Problem(DEEP_TEACHER, DEEP_STUDENT, 64, members, dtype)
            print(row("deep", problem, max(5, 60 // members), limit, asked.seconds), flush=True)


if __name__ == "__main__":
    main()
