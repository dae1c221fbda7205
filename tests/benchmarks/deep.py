"""ConvNets of an ensemble beside separate modules and vmap, one thread: ``python -m tests.benchmarks.deep``.

Students of four 3x3 convolutions of 16 channels on 16 x 16 images and a linear layer of 100 outputs, as Luck Matters
trains them, with and without BatchNorm.  Prints microseconds per seed and step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from tsdyn.engine import compiled_convnet, convolution, propagated
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.networks.network import Network

IMAGE, CHANNELS, OUTPUTS, SAMPLES, RATE = (1, 16, 16), (16, 16, 16, 16), 100, 512, 1e-3


def module(norm: bool, dtype: torch.dtype) -> nn.Sequential:
    parts: list[nn.Module] = []
    below, rows = IMAGE[0], IMAGE[1]
    for n in CHANNELS:
        parts += [nn.Conv2d(below, n, 3), nn.ReLU(), *([nn.BatchNorm2d(n)] if norm else [])]
        below, rows = n, rows - 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(below * rows * rows, OUTPUTS)).to(dtype)


def microseconds(ways: dict[str, Callable[[], object]], count: int, seconds: float) -> dict[str, float]:
    """Least processor time of each method per seed and step; rounds alternate.  One thread, so that it is also the wall
    time of an idle machine, and what other processes take is not counted.
    """
    best = dict.fromkeys(ways, float("inf"))
    for work in ways.values():
        work()
    end = time.process_time() + seconds * len(ways)
    while time.process_time() < end:
        for name, work in ways.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], (time.process_time() - start) / count * 1e6)
    return best


class Problem:
    """Students, their data and rows of batches; every way takes the same steps."""

    def __init__(self, members: int, batch: int, norm: bool, dtype: torch.dtype, steps: int) -> None:
        torch.manual_seed(0)
        self.modules = [module(norm, dtype) for _ in range(members)]
        self.x = torch.randn(members, SAMPLES, IMAGE[1] * IMAGE[2], dtype=dtype)
        self.y = torch.randn(members, SAMPLES, OUTPUTS, dtype=dtype)
        self.rows = torch.randint(0, SAMPLES, (members, steps, batch))
        self.batch, self.count = batch, members * steps

    def engine(self) -> Callable[[], object]:
        ensemble = Ensemble.of([Network.from_torch(m, image=IMAGE) for m in self.modules])
        stream, rule = finite_stream(self.x, self.y, self.rows), Rule(RATE)
        return lambda: train_epoch(ensemble, stream, rule, batch=self.batch)

    def grouped(self) -> Callable[[], object]:
        """The engine as it is without a compiler."""
        work = self.engine()

        def without() -> None:
            with (
                patch.object(compiled_convnet, "claims", lambda ensemble: False),
                patch.object(convolution, "serves", lambda x: False),
                patch.object(propagated, "BLOCK_BYTES", 1 << 24),
            ):
                work()

        return without

    def separate(self) -> Callable[[], object]:
        optimizers = [torch.optim.SGD(m.parameters(), RATE) for m in self.modules]

        def work() -> None:
            for m, optimizer, x, y, rows in zip(self.modules, optimizers, self.x, self.y, self.rows, strict=True):
                for chosen in rows:
                    optimizer.zero_grad()
                    output = m(x[chosen].unflatten(1, IMAGE))
                    (0.5 * (output - y[chosen]).square().sum(1).mean()).backward()
                    optimizer.step()

        return work

    def vmapped(self) -> Callable[[], object]:
        parameters, buffers = stack_module_state(self.modules)
        parameters = {name: p.detach() for name, p in parameters.items()}
        base = self.modules[0]

        def loss(p: dict[str, Tensor], held: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (functional_call(base, (p, held), (x,)) - y).square().sum(1).mean()

        gradient = vmap(grad(loss))
        owner = torch.arange(len(self.modules)).view(-1, 1)

        def work() -> None:
            for step in range(self.rows.shape[1]):
                chosen = self.rows[:, step]
                found = gradient(parameters, buffers, self.x[owner, chosen].unflatten(2, IMAGE), self.y[owner, chosen])
                for name, p in parameters.items():
                    p.add_(found[name], alpha=-RATE)

        return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, nargs="*", default=[8])
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64"])
    parser.add_argument("--seconds", type=float, default=1.5, help="a cell")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| dtype | BatchNorm | members | batch | ours | grouped | separate modules | vmap(grad) |")
    print("|---|---|---|---|---|---|---|---|")
    for name in asked.dtypes:
        for norm in (False, True):
            for members in asked.members:
                for batch in asked.batches:
                    problem = Problem(members, batch, norm, getattr(torch, name), steps=4)
                    ways = {"ours": problem.engine(), "grouped": problem.grouped(), "separate": problem.separate()}
                    # vmap does not move running statistics in place
                    ways |= {} if norm else {"vmap": problem.vmapped()}
                    found = microseconds(ways, problem.count, asked.seconds)
                    ours = found.pop("ours")
                    cells = [f"{t:.4g} ({t / ours:.2f}x)" for t in found.values()] + ["-"] * norm
                    print(f"| {name} | {norm} | {members} | {batch} | {ours:.4g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
