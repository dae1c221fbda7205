"""The adjoint of training beside training itself and other ways to the same: ``python -m tests.benchmarks.adjoint``.

All derivatives at once (start, rates, samples, targets, inputs) of the released two-layer configuration (d=100, m=10,
n=50, C=50, batch 16), one thread, processor time, rounds of all ways in turn.  Prints microseconds per seed and step
and multiples of the training by the same code.  The certificate is not in it.

- compiled: `compiled_adjoint`, beside the compiled training step;
- general, general with Adam: step by step with torch, beside the general engine, which trains any module;
- unrolled: one autograd graph of all steps;
- jax: `grad` through `lax.scan` on its CPU build, where jax is installed (no dependency), compiled before it is timed,
  and once more with a checkpoint per step, as long runs need.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.engine import microseconds
from tsdyn import Experiment
from tsdyn.engine import general, native
from tsdyn.engine.batches import Batches
from tsdyn.running.members import Members
from tsdyn.through_training import adjoint
from tsdyn.through_training.replay import Course
from tsdyn.through_training.steps import State

#: A way to do it, and how many steps of members it takes.
Way = tuple[Callable[[], object], int]
SEEDS, STEPS, SHORT = 4, 1000, 100
#: Bytes in which all steps may be kept, as `tsdyn.sensitivity` allows by default.
ROOM = 1 << 30
WANTED = adjoint.Wanted(True, True, True, True)


def experiment(steps: int, seeds: int, **training: Any) -> Experiment:
    return Experiment(
        name="adjoint",
        seeds=seeds,
        teacher={"widths": [100, 10, 50], "init": "separated", "bias": -0.1},
        student={"overrealization": 5.0, "init": "gaussian", "scale": 0.005},
        data={"std": 1.5, "train": 10_000, "eval": 100},
        training={"learning_rate": 0.01, "batch": 16, "steps_per_epoch": steps, "epochs": 1, **training},
    )


def part(batches: Batches, members: slice) -> Batches:
    assert batches.rows is not None
    return Batches(batches.inputs[members], batches.targets[members], batches.rows[members], batches.steps)


class Problem:
    """A course, its start, and a slope at its end."""

    def __init__(self, steps: int, seeds: int, **training: Any) -> None:
        self.course = Course(Members(experiment(steps, seeds, **training)), 1)
        self.start = self.course.state()
        self.size = steps * seeds
        draw = torch.Generator().manual_seed(0)
        self.slope = self.start.map(lambda t: torch.randn(t.shape, generator=draw, dtype=t.dtype))

    def trained(self) -> Way:
        def work() -> None:
            self.course.go_to(self.start, 0)
            self.course.advance(self.course.steps)

        return work, self.size

    def trained_generally(self) -> Way:
        """By the engine that trains any module."""
        course = self.course
        inputs, targets = course.finite
        rows = course.data(1).rows
        assert rows is not None

        def work() -> None:
            course.go_to(self.start, 0)
            batches = Batches(inputs, targets, rows, course.steps)
            general.way(course.ensemble, lambda members: iter([part(batches, members)]), course.rule(1))
            with torch.no_grad():
                general.advance(course.ensemble, batches, course.rule(1), 0)

        return work, self.size

    def gone_back(self, compiled: bool) -> Way:
        def work() -> adjoint.Sums:
            found = adjoint.not_compiled
            if not compiled:
                adjoint.not_compiled = lambda _: "for comparison"  # type: ignore[assignment]
            try:
                self.course.go_to(self.start, 0)
                kept = adjoint.forward_pass(self.course, room=ROOM)
                return adjoint.reverse_pass(self.course, kept, self.slope.map(torch.clone), WANTED)
            finally:
                adjoint.not_compiled = found

        return work, self.size

    def one(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
        """Parameters, inputs, targets, rows and slopes of the first member."""
        rows = self.course.data(1).rows
        assert rows is not None
        x, y = self.course.finite
        names = [f"{kind}_{layer}" for layer in (1, 2) for kind in ("weight", "bias")]
        held, slopes = ([state.values[n][0] for n in names] for state in (self.start, self.slope))
        return held, x[0], y[0], rows[0], slopes

    def unrolled(self) -> Way:
        held, x, y, rows, slopes = self.one()

        def work() -> tuple[Tensor, ...]:
            start, inputs, targets = ([t.clone().requires_grad_() for t in held], *(
                t.clone().requires_grad_() for t in (x, y)
            ))  # fmt: skip
            weight = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
            rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
            w, b, v, c = start
            for chosen in rows:
                f = torch.relu(inputs[chosen] @ w.T + b) @ v.T + c
                loss = 0.5 * (weight[chosen] * (targets[chosen] - f).square().sum(1)).mean()
                slopes_of = torch.autograd.grad(loss, (w, b, v, c), create_graph=True)
                w, b, v, c = (p - rate * g for p, g in zip((w, b, v, c), slopes_of, strict=True))
            value = sum((p * s).sum() for p, s in zip((w, b, v, c), slopes, strict=True))
            return torch.autograd.grad(value, [*start, rate, weight, targets, inputs])

        return work, len(rows)

    def jax(self, checkpoints: bool) -> Way:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        held, x, y, rows, slopes = (jax.tree.map(lambda t: jnp.asarray(t.numpy()), part) for part in self.one())

        def loss(p: Any, x: Any, y: Any, weight: Any) -> Any:
            w, b, v, c = p
            f = jax.nn.relu(x @ w.T + b) @ v.T + c
            return 0.5 * (weight * ((y - f) ** 2).sum(1)).mean()

        def value(start: Any, rate: Any, weight: Any, targets: Any, inputs: Any) -> Any:
            def step(p: Any, chosen: Any) -> Any:
                slopes_of = jax.grad(loss)(p, inputs[chosen], targets[chosen], weight[chosen])
                return [q - rate * g for q, g in zip(p, slopes_of, strict=True)], None

            end, _ = jax.lax.scan(jax.checkpoint(step) if checkpoints else step, start, rows)
            return sum((q * s).sum() for q, s in zip(end, slopes, strict=True))

        found = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))
        arguments = held, jnp.asarray(0.01), jnp.ones(len(x)), y, x
        return lambda: jax.block_until_ready(found(*arguments)), len(rows)


def close(found: adjoint.Sums, wanted: Any) -> None:
    """Refuse a way whose result is another."""
    assert found.learning_rate is not None
    assert found.sample is not None
    assert found.target is not None
    assert found.input is not None
    start: State = found.start
    mine = [
        *(start.values[n][0] for n in ("weight_1", "bias_1", "weight_2", "bias_2")),
        found.learning_rate[0, 0], found.sample[0], found.target[0], found.input[0],
    ]  # fmt: skip
    for a, b in zip(mine, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), "a way gives other derivatives"


def ways() -> dict[str, Way]:
    long, short, adam = Problem(STEPS, SEEDS), Problem(SHORT, SEEDS), Problem(SHORT, SEEDS, method="adam")
    single = Problem(SHORT, 1)
    found = {
        "training, compiled": long.trained(),
        "adjoint, compiled": long.gone_back(True),
        "training, general": short.trained_generally(),
        "adjoint, general": short.gone_back(False),
        "training, general, Adam": adam.trained_generally(),
        "adjoint, general, Adam": adam.gone_back(False),
        "unrolled autograd graph": single.unrolled(),
    }
    mine: Any = single.gone_back(True)[0]()
    close(mine, single.unrolled()[0]())
    if importlib.util.find_spec("jax") is not None:
        for name, checkpoints in (("jax grad through scan", False), ("jax, a checkpoint per step", True)):
            found[name] = single.jax(checkpoints)
            result: Any = found[name][0]()
            flat = [*result[0], *result[1:]]
            close(mine, [torch.tensor(t.tolist(), dtype=torch.float64) for t in flat])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    if not native.switched_on("TSDYN_KERNEL", default=True):
        raise SystemExit("TSDYN_KERNEL=off: there is no compiled code to measure")
    took = microseconds(ways(), seconds)
    for name, microseconds_each in took.items():
        base = took.get(name.replace("adjoint", "training"), took["training, compiled"])
        times = microseconds_each / base
        print(f"{name:28} {microseconds_each:9.1f} us  {'' if name in ('training, compiled',) else f'{times:6.2f} x'}")


if __name__ == "__main__":
    main()
