"""Training of ensembles beside jax: ``jax.jit(lax.scan(vmap(step)))``, and for ConvNets torch's own ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import deep
from tests.benchmarks.cells import Cell, Way
from tests.benchmarks.engine import flops
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.loss import loss
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.running.members import Members

WIDTHS, BATCH, SAMPLES, RATE, BETAS = (100, 50, 50), 16, 1000, 1e-3, (0.9, 0.999, 1e-8)


class Students:
    """Two-layer students of Tian (2020) with their data; every way takes the same steps from the same start."""

    def __init__(self, members: int, steps: int, *, batch: int | None = BATCH, samples: int = SAMPLES, **how: str):
        self.how = {"activation": "relu", "loss": "mse", "method": "sgd", "norm": ""} | how
        self.members, self.steps, self.batch = members, steps, batch
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        layers = list(itertools.pairwise(WIDTHS))
        self.weights = [normal(members, n, m) / m**0.5 for m, n in layers]
        self.biases = [0.1 * normal(members, n) for n in WIDTHS[1:]]
        self.x = normal(min(members, 8), samples, WIDTHS[0])
        raw = normal(min(members, 8), samples, WIDTHS[-1])
        self.y = loss(self.how["loss"]).target(raw.flatten(0, 1), None).view_as(raw)
        self.rows = None
        if batch is not None:
            self.rows = torch.randint(0, samples, (members, steps, batch), generator=draw)

    def ours(self) -> Way:
        norms = [BatchNorm.fresh(WIDTHS[1], like=self.weights[0][0])] if self.how["norm"] else None
        place = {"norm": self.how["norm"]} if self.how["norm"] else {}
        networks = [
            Network(
                [w[i].clone() for w in self.weights],
                [b[i].clone() for b in self.biases],
                self.how["activation"],
                **({"norms": norms} if norms else {}),
                **place,
            )
            for i in range(self.members)
        ]
        momentum = 0.9 if self.how["method"] == "momentum" else 0.0
        rule = Rule(RATE, self.how["method"], momentum=momentum, loss=loss(self.how["loss"]))
        pool = len(self.x)  # members share this much data
        parts = [Ensemble.of(networks[start : start + pool]) for start in range(0, self.members, pool)]

        def work() -> object:
            for i, part in enumerate(parts):
                rows = None if self.rows is None else self.rows[i * pool : (i + 1) * pool]
                stream = finite_stream(self.x[: part.members], self.y[: part.members], rows, steps=self.steps)
                train_epoch(part, stream, rule, batch=self.batch or self.x.shape[1])
            return [torch.cat([part.values[name] for part in parts]) for name in ("weight_1", "weight_2")]

        return work

    def jax(self) -> Way:
        import jax
        import jax.numpy as jnp
        from jax import lax

        forward, objective = jax_forward(jax, **self.how), jax_loss(jax, self.how["loss"])
        update = jax_update(jnp, self.how["method"])
        slope = jax.grad(lambda p, x, y: objective(forward(p, x), y))

        def one(params: Any, state: Any, count: Any, x: Any, y: Any) -> Any:
            return update(params, slope(params, x, y), state, count)

        pool = len(self.x)
        x_all, y_all = (jnp.asarray(t.numpy()) for t in (self.x, self.y))

        def of_member(params: Any, state: Any, count: Any, member: Any, rows: Any) -> Any:
            x, y = (x_all[member], y_all[member]) if rows is None else (x_all[member, rows], y_all[member, rows])
            return one(params, state, count, x, y)

        @jax.jit
        def train(params: Any, state: Any, rows: Any) -> Any:
            owner = jnp.arange(self.members) % pool

            def step(carry: Any, at: Any) -> Any:
                count, chosen = at
                return jax.vmap(of_member, (0, 0, None, 0, None if chosen is None else 0))(
                    *carry, count, owner, chosen
                ), None

            counts = jnp.arange(1, self.steps + 1)
            return lax.scan(step, (params, state), (counts, rows))[0]

        params: dict[str, Any] = {}
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            params |= {f"w{layer}": jnp.asarray(w.numpy()), f"b{layer}": jnp.asarray(b.numpy())}
        if self.how["norm"]:
            params |= {"scale": jnp.ones((self.members, WIDTHS[1])), "shift": jnp.zeros((self.members, WIDTHS[1]))}
        rows = None if self.rows is None else jnp.asarray(self.rows.numpy()).transpose(1, 0, 2)
        zeros = {name: jnp.zeros_like(p) for name, p in params.items()}
        held = [params, (zeros, zeros)]

        def work() -> object:
            held[:] = jax.block_until_ready(train(*held, rows))
            return [held[0]["w0"], held[0]["w1"]]

        return work


def jax_forward(jax: Any, **how: str) -> Callable[[Any, Any], Any]:
    jnp = jax.numpy
    sigma = {
        "relu": jax.nn.relu,
        "tanh": jnp.tanh,
        "erf": lambda z: jax.scipy.special.erf(z / 2**0.5),
        "gelu": lambda z: jax.nn.gelu(z, approximate=False),
        "sigmoid": jax.nn.sigmoid,
        "softplus": jax.nn.softplus,
    }[how["activation"]]

    def normalized(p: Any, z: Any) -> Any:
        return (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5) * p["scale"] + p["shift"]

    def forward(p: Any, x: Any) -> Any:
        z = x @ p["w0"].T + p["b0"]
        match how["norm"]:
            case "before":
                f = sigma(normalized(p, z))
            case "after":
                f = normalized(p, sigma(z))
            case _:
                f = sigma(z)
        return f @ p["w1"].T + p["b1"]

    return forward


def jax_loss(jax: Any, name: str) -> Callable[[Any, Any], Any]:
    if name == "cross_entropy":
        return lambda f, y: -(y * jax.nn.log_softmax(f)).sum(-1).mean()
    return lambda f, y: 0.5 * ((f - y) ** 2).sum(-1).mean()


def jax_update(jnp: Any, method: str) -> Callable[..., Any]:
    first, second, epsilon = BETAS

    def sgd(p: Any, g: Any, state: Any, count: Any) -> Any:
        return {n: v - RATE * g[n] for n, v in p.items()}, state

    def momentum(p: Any, g: Any, state: Any, count: Any) -> Any:
        m = {n: 0.9 * state[0][n] + g[n] for n in p}
        return {n: v - RATE * m[n] for n, v in p.items()}, (m, state[1])

    def adam(p: Any, g: Any, state: Any, count: Any) -> Any:
        m = {n: first * state[0][n] + (1 - first) * g[n] for n in p}
        v = {n: second * state[1][n] + (1 - second) * g[n] ** 2 for n in p}
        rate = RATE / (1 - first**count)
        scale = {n: jnp.sqrt(v[n] / (1 - second**count)) + epsilon for n in p}
        return {n: w - rate * m[n] / scale[n] for n, w in p.items()}, (m, v)

    return {"sgd": sgd, "momentum": momentum, "adam": adam}[method]


def _cell(work: str, members: int = 32, steps: int = 60, **how: Any) -> Cell:
    students = Students(members, steps, **how)
    batch = students.batch or students.x.shape[1]
    each = flops(WIDTHS, batch) * members * steps
    return Cell(work, "us", {"ours": students.ours, "jax": students.jax}, members * steps, flops=each, rtol=1e-8)


def fresh() -> Cell:
    """Relu students on new samples at every step: drawing, the teacher, and the step."""
    members, steps = 32, 60
    told = Experiment(
        name="fresh",
        seeds=members,
        dtype="float64",
        teacher={"widths": [100, 10, 50], "polarity": 1.0},
        student={"widths": list(WIDTHS)},
        data={"train": "fresh", "eval": 100},
        training={"epochs": 1, "steps_per_epoch": steps, "batch": BATCH, "learning_rate": RATE},
    )

    def ours() -> Way:
        run = Members(told)
        run.draw()

        def work() -> None:
            run.advance(1)

        return work

    def peer() -> Way:
        import jax
        import jax.numpy as jnp
        from jax import lax

        forward, objective = jax_forward(jax, activation="relu", norm=""), jax_loss(jax, "mse")
        students = Students(members, steps)
        params: dict[str, Any] = {}
        for layer, (w, b) in enumerate(zip(students.weights, students.biases, strict=True)):
            params |= {f"w{layer}": jnp.asarray(w.numpy()), f"b{layer}": jnp.asarray(b.numpy())}
        key = jax.random.key(0)
        taught = {"w0": jax.random.normal(key, (10, 100)), "b0": jnp.zeros(10)}
        taught |= {"w1": jax.random.normal(key, (50, 10)), "b1": jnp.zeros(50)}

        def one(p: Any, own: Any) -> Any:
            x = jax.random.normal(own, (BATCH, WIDTHS[0]))
            y = forward(taught, x)
            g = jax.grad(lambda q: objective(forward(q, x), y))(p)
            return {n: v - RATE * g[n] for n, v in p.items()}

        @jax.jit
        def train(p: Any, key: Any) -> Any:
            def step(carry: Any, own: Any) -> Any:
                return jax.vmap(one)(carry, jax.random.split(own, members)), None

            return lax.scan(step, p, jax.random.split(key, steps))[0]

        held = [params]

        def work() -> None:
            held[0] = jax.block_until_ready(train(held[0], key))

        return work

    return Cell(
        "fresh data, relu SGD", "us", {"ours": ours, "jax": peer}, members * steps, flops=flops(WIDTHS, BATCH) * 1920
    )


def conv_net(batch: int, dtype: torch.dtype, *, norm: bool) -> Cell:
    """Eight ConvNets of 4 x 16 channels on 16 x 16 images."""
    problem = deep.Problem(8, batch, norm, dtype, steps=2)

    def peer() -> Way:
        import jax
        import jax.numpy as jnp
        from jax import lax

        params = {
            name: jnp.stack([jnp.asarray(dict(m.named_parameters())[name].detach().numpy()) for m in problem.modules])
            for name, _ in problem.modules[0].named_parameters()
        }
        x, y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())
        stride = 3 if norm else 2
        convolutions = [f"{stride * i}" for i in range(len(deep.CHANNELS))]
        top = f"{stride * len(deep.CHANNELS) + 1}"

        def forward(p: Any, f: Any) -> Any:
            f = f.reshape(-1, *deep.IMAGE)
            for at in convolutions:
                f = lax.conv_general_dilated(f, p[f"{at}.weight"], (1, 1), "VALID") + p[f"{at}.bias"][:, None, None]
                f = jax.nn.relu(f)
                if norm:
                    mean, variance = f.mean((0, 2, 3), keepdims=True), f.var((0, 2, 3), keepdims=True)
                    scale, shift = (p[f"{int(at) + 2}.{n}"][:, None, None] for n in ("weight", "bias"))
                    f = (f - mean) / jnp.sqrt(variance + 1e-5) * scale + shift
            return f.reshape(len(f), -1) @ p[f"{top}.weight"].T + p[f"{top}.bias"]

        slope = jax.grad(lambda p, x, y: 0.5 * ((forward(p, x) - y) ** 2).sum(1).mean())

        @jax.jit
        def train(p: Any, rows: Any) -> Any:
            def step(carry: Any, chosen: Any) -> Any:
                def one(own: Any, x: Any, y: Any, at: Any) -> Any:
                    g = slope(own, x[at], y[at])
                    return {n: v - deep.RATE * g[n] for n, v in own.items()}

                return jax.vmap(one)(carry, x, y, chosen), None

            return lax.scan(step, p, rows)[0]

        rows = jnp.asarray(problem.rows.numpy()).transpose(1, 0, 2)
        held = [params]

        def work() -> None:
            held[0] = jax.block_until_ready(train(held[0], rows))

        return work

    ways: dict[str, Callable[[], Way]] = {"ours": problem.engine, "nn.Module": problem.separate, "jax": peer}
    ways |= {} if norm else {"vmap": problem.vmapped}
    told = f"ConvNets, batch {batch}, {str(dtype).removeprefix('torch.')}" + (", BatchNorm" if norm else "")
    return Cell(told, "us", ways, problem.count, flops=conv_flops(batch) * problem.count, dtype=dtype)


def conv_flops(batch: int) -> int:
    """Of one step of a ConvNet: forward and both gradients, the lowest layer without that of its input."""
    total, below, rows, lowest = 0, deep.IMAGE[0], deep.IMAGE[1], 0
    for i, n in enumerate(deep.CHANNELS):
        rows -= 2
        size = below * n * 9 * rows * rows
        lowest = size if i == 0 else lowest
        total, below = total + size, n
    return 2 * batch * (3 * (total + below * rows * rows * deep.OUTPUTS) - lowest)


def trajectory() -> Cell:
    """Population gradient flow to a minimum as an accurate trajectory, rtol 1e-8, beside SciPy's BDF."""
    import numpy as np

    from tests import oracles
    from tests.cases import glorot_students, orthonormal_teacher
    from tsdyn import flow
    from tsdyn.population.two_layer_loss import PopulationLoss

    members = 4
    population = PopulationLoss(orthonormal_teacher(16), 8)
    initial = glorot_students(population, members)

    def ours() -> Way:
        def work() -> object:
            with torch.no_grad():
                final = torch.from_numpy(flow.gradient_flow(population, initial, rtol=1e-8, atol=1e-10)["final"].values)
                return flow.polish(population, final).loss

        return work

    def peer() -> Way:
        def work() -> object:
            ends = np.stack([oracles.gradient_flow(population, row).y[:, -1] for row in initial])
            with torch.no_grad():
                return flow.polish(population, torch.from_numpy(ends)).loss

        return work

    return Cell("population flow, rtol 1e-8", "ms", {"ours": ours, "SciPy BDF": peer}, members)


def cells() -> Iterator[Callable[[], Cell]]:
    """The cells of training, each made when it is called."""
    yield lambda: _cell("relu SGD")
    smooth: Sequence[str] = ("tanh", "erf", "gelu", "sigmoid", "softplus")
    for name in smooth:
        yield lambda name=name: _cell(f"{name} SGD", activation=name)
    yield lambda: _cell("tanh SGD, S = 1", members=1, steps=500, activation="tanh")
    for method in ("momentum", "adam"):
        yield lambda method=method: _cell(f"tanh, {method}", activation="tanh", method=method)
    yield lambda: _cell("cross entropy SGD", loss="cross_entropy")
    yield lambda: _cell("cross entropy, adam", loss="cross_entropy", method="adam")
    for place in ("before", "after"):
        yield lambda place=place: _cell(f"BatchNorm {place}, SGD", norm=place)
    yield lambda: _cell("BatchNorm before, adam", norm="before", method="adam")
    yield fresh
    yield lambda: _cell("gd on 2,000 samples, relu", members=8, steps=4, batch=None, samples=2000)
    yield lambda: _cell("gd on 2,000 samples, tanh", members=8, steps=4, batch=None, samples=2000, activation="tanh")
    for batch in (16, 64):
        for dtype in (torch.float64, torch.float32):
            for norm in (False, True):
                yield lambda batch=batch, dtype=dtype, norm=norm: conv_net(batch, dtype, norm=norm)
    yield trajectory
