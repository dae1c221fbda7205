"""Derivatives and moments beside torch.func, torch's ExpandedWeights, BackPACK, Opacus, curvlinops and jax."""

from __future__ import annotations

import copy
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from tests.benchmarks.cells import Cell, Way
from tsdyn import derivatives, theory
from tsdyn.networks.network import Network


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1).mean()


# --- modules -------------------------------------------------------------------------------------------------


def connected(widths: tuple[int, ...], activation: str = "relu", seed: int = 0) -> Network:
    """A fully connected network whose preactivations keep their size, in float64."""
    draw = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(n, m, generator=draw, dtype=torch.float64) * (2 / m) ** 0.5 for m, n in pairs]
    biases = [0.1 * torch.randn(n, generator=draw, dtype=torch.float64) for _, n in pairs]
    return Network(weights, biases, activation)


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(4, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))))


class Attention(nn.Module):
    """One block of a transformer, written out of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def module_of(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A module and samples for it, in float64."""
    torch.manual_seed(0)
    match kind:
        case "MLP":
            return connected((100, 50, 50)).to_torch(), torch.randn(200, 100), torch.randn(200, 50)
        case "ConvNet":
            parts = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
            parts += [nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)]
            return nn.Sequential(*parts).double(), torch.randn(64, 3, 16, 16), torch.randn(64, 10)
        case "ResNet":
            parts = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Block(32), Block(32), nn.AvgPool2d(4), nn.Flatten()]
            parts.append(nn.Linear(32 * 16, 10))
            return nn.Sequential(*parts).double(), torch.randn(32, 3, 16, 16), torch.randn(32, 10)
        case "transformer":
            parts = [nn.Linear(16, 64), Attention(64), Attention(64), Mean(), nn.Linear(64, 10)]
            return nn.Sequential(*parts).double(), torch.randn(64, 32, 16), torch.randn(64, 10)
        case other:
            raise ValueError(other)


def problem(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    module, x, y = module_of(kind)
    return module.double(), x.double(), y.double()


# --- per-sample gradients ------------------------------------------------------------------------------------


def collect(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The attribute that a peer left on every parameter."""
    found = {n.removeprefix("_module."): getattr(p, name).detach() for n, p in module.named_parameters()}
    for p in module.parameters():
        setattr(p, name, None)
        p.grad = None
    return found


def by_vmap(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def one(free: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return half_square(functional_call(module, free, (sample[None],)), target[None])

    return lambda: vmap(grad(one), (None, 0, 0))(parameters, x, y)


def by_backpack(module: nn.Module, x: Tensor, y: Tensor, extension: str) -> Callable[[], dict[str, Tensor]]:
    backpack, extensions = importlib.import_module("backpack"), importlib.import_module("backpack.extensions")
    module = backpack.extend(copy.deepcopy(module))
    loss = backpack.extend(nn.MSELoss(reduction="sum"))
    field = {"BatchGrad": "grad_batch", "BatchL2Grad": "batch_l2"}[extension]

    def work() -> dict[str, Tensor]:
        value = 0.5 * loss(module(x), y)
        with backpack.backpack(getattr(extensions, extension)()):
            value.backward()
        return collect(module, field)

    return work


def by_opacus(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    made = importlib.import_module("opacus.grad_sample").GradSampleModule
    wrapped = made(copy.deepcopy(module), loss_reduction="sum")

    def work() -> dict[str, Tensor]:
        half_square(wrapped(x), y).backward()
        return collect(wrapped, "grad_sample")

    return work


def ghost_norms(module: nn.Module, x: Tensor, y: Tensor) -> Way:
    made = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping
    wrapped = made(copy.deepcopy(module), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True)

    def work() -> Tensor:
        half_square(wrapped(x), y).backward()
        found: Tensor = wrapped.get_norm_sample()
        for p in wrapped.parameters():
            p.grad = None
        return found

    return work


def by_expanded_weights(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    per_sample = importlib.import_module("torch.nn.utils._per_sample_grad").call_for_per_sample_grads
    module = copy.deepcopy(module)

    def work() -> dict[str, Tensor]:
        half_square(per_sample(module, loss_reduction="sum")(x), y).backward()
        return collect(module, "grad_sample")

    return work


def gradients(kind: str) -> Cell:
    module, x, y = problem(kind)
    ways: dict[str, Callable[[], Way]] = {
        "ours": lambda: lambda: derivatives.per_sample_gradients(module, half_square, x, y),
        "vmap": lambda: by_vmap(module, x, y),
        "ExpandedWeights": lambda: by_expanded_weights(module, x, y),
        "BackPACK": lambda: by_backpack(module, x, y, "BatchGrad"),
        "Opacus": lambda: by_opacus(module, x, y),
    }
    written = len(x) * sum(p.nbytes for p in module.parameters())
    return Cell(f"per-sample gradients, {kind}", "ms", ways, bytes=written)


def _norm(squares: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(squares.values())).sum(0).sqrt()


def norms(kind: str) -> Cell:
    module, x, y = problem(kind)

    def from_gradients(found: Callable[[], dict[str, Tensor]]) -> Way:
        return lambda: _norm({n: g.flatten(1).square().sum(1) for n, g in found().items()})

    def backpack() -> Way:
        squares = by_backpack(module, x, y, "BatchL2Grad")
        return lambda: _norm(squares())

    ways: dict[str, Callable[[], Way]] = {
        "ours": lambda: lambda: derivatives.per_sample_gradient_norms(module, half_square, x, y),
        "vmap": lambda: from_gradients(by_vmap(module, x, y)),
        "ExpandedWeights": lambda: from_gradients(by_expanded_weights(module, x, y)),
        "BackPACK": backpack,
        "Opacus": lambda: ghost_norms(module, x, y),
    }
    return Cell(f"per-sample norms, {kind}", "ms", ways)


# --- Jacobians -----------------------------------------------------------------------------------------------


def jacobian(name: str, widths: tuple[int, ...], samples: int) -> Cell:
    module = connected(widths).to_torch()
    x = torch.randn(samples, widths[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def output(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, p, (sample[None],))[0]

    ways: dict[str, Callable[[], Way]] = {
        "ours": lambda: lambda: derivatives.jacobian(module, x),
        "vmap(jacrev)": lambda: lambda: vmap(jacrev(output), (None, 0))(parameters, x),
        "jax": lambda: jax_jacobian(module, x),
    }
    written = samples * widths[-1] * sum(p.nbytes for p in module.parameters())
    return Cell(f"Jacobian, {name}, N = {samples}", "ms", ways, bytes=written)


def jax_network(module: nn.Module) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Parameters and function of a fully connected relu network in jax."""
    import jax
    import jax.numpy as jnp

    layers = [name for name, part in module.named_children() if isinstance(part, nn.Linear)]
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in module.named_parameters()}

    def forward(p: Any, x: Any) -> Any:
        for i, name in enumerate(layers):
            x = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
            x = x if i == len(layers) - 1 else jax.nn.relu(x)
        return x

    return params, forward


def jax_jacobian(module: nn.Module, x: Tensor) -> Way:
    import jax
    import jax.numpy as jnp

    params, forward = jax_network(module)
    work = jax.jit(jax.vmap(jax.jacrev(forward), (None, 0)))
    given = jnp.asarray(x.numpy())
    return lambda: jax.block_until_ready(work(params, given))


# --- second derivatives --------------------------------------------------------------------------------------


def curved(widths: tuple[int, ...], samples: int, activation: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    module = connected(widths, activation).to_torch()
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(samples, n, generator=draw, dtype=torch.float64) for n in (widths[0], widths[-1]))
    size = sum(p.numel() for p in module.parameters())
    return module, x, y, torch.randn(size, generator=draw, dtype=torch.float64)


def jax_product(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[Any, Any], Any], Any]:
    """The Hessian's product with a flat vector in jax: (parameters, vector) → vector."""
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    params, forward = jax_network(module)
    names = list(params)
    ordered = [params[n] for n in names]
    flat, unravel = ravel_pytree(ordered)
    given, aims = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def value(p: Any) -> Any:
        return 0.5 * ((forward(dict(zip(names, unravel(p), strict=True)), given) - aims) ** 2).sum(1).mean()

    return lambda p, v: jax.jvp(jax.grad(value), (p,), (v,))[1], flat


def product() -> Cell:
    module, x, y, v = curved((100, 50, 50), 1000, "relu")
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def pieces() -> dict[str, Tensor]:
        return {n: t.view_as(p) for (n, p), t in zip(parameters.items(), v.split(sizes), strict=True)}

    def double() -> Way:
        def work() -> Tensor:
            leaves = list(module.parameters())
            slopes = torch.autograd.grad(mean_square(module(x), y), leaves, create_graph=True)
            found = torch.autograd.grad(slopes, leaves, list(pieces().values()))
            return torch.cat([f.flatten() for f in found])

        return work

    def forward_over_reverse() -> Way:
        def work() -> Tensor:
            slope = grad(lambda p: mean_square(functional_call(module, p, (x,)), y))
            return torch.cat([t.flatten() for t in jvp(slope, (parameters,), (pieces(),))[1].values()])

        return work

    def peer() -> Way:
        import jax
        import jax.numpy as jnp

        apply, at = jax_product(module, x, y)
        compiled, along = jax.jit(apply), jnp.asarray(v.numpy())
        return lambda: jax.block_until_ready(compiled(at, along))

    def curvlinops() -> Way:
        made = importlib.import_module("curvlinops").HessianLinearOperator
        loss = nn.MSELoss(reduction="sum")
        leaves = [p for p in module.parameters() if p.requires_grad]

        def work() -> Tensor:
            operator = made(module, loss, leaves, [(x, y)], check_deterministic=False, num_data=len(x))
            return torch.as_tensor(operator @ v) / (2 * len(x))

        return work

    ways = {
        "ours": lambda: lambda: derivatives.hessian_vector_product(module, mean_square, x, y, v),
        "double backward": double, "jvp(grad)": forward_over_reverse, "jax": peer, "curvlinops": curvlinops,
    }  # fmt: skip
    # Products with a layer's matrix: z and slope, 1 each; what moves z, what moves the slope, the sum over samples, 2
    # each.  Of the lowest layer, whose inputs neither move nor have a slope: z, what moves it and the sum, 1 each.
    lowest, top = 100 * 50, 50 * 50
    return Cell("Hessian-vector product, P = 7,600", "ms", ways, flops=2 * 1000 * (3 * lowest + 8 * top))


def dense() -> Cell:
    module, x, y, _ = curved((20, 20, 25), 1000, "tanh")

    def peer() -> Way:
        import jax
        import jax.numpy as jnp
        from jax.flatten_util import ravel_pytree

        params, _ = jax_network(module)
        names = list(params)
        flat, unravel = ravel_pytree([params[n] for n in names])
        given, aims = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

        def value(p: Any) -> Any:
            of = dict(zip(names, unravel(p), strict=True))
            hidden = jnp.tanh(given @ of["0.weight"].T + of["0.bias"])
            f = hidden @ of["2.weight"].T + of["2.bias"]
            return 0.5 * ((f - aims) ** 2).sum(1).mean()

        work = jax.jit(jax.hessian(value))
        return lambda: jax.block_until_ready(work(flat))

    ways = {"ours": lambda: lambda: derivatives.hessian(module, mean_square, x, y), "jax": peer}
    return Cell("full Hessian, P = 945, N = 1,000", "ms", ways)


def density() -> Cell:
    module, x, y, _ = curved((100, 50, 50), 1000, "relu")
    probes, steps = 10, 80

    def peer() -> Way:
        import jax
        import jax.numpy as jnp
        from jax import lax

        apply, at = jax_product(module, x, y)

        @jax.jit
        def lanczos(start: Any) -> Any:
            basis = jnp.zeros((steps, len(start))).at[0].set(start / jnp.linalg.norm(start))

            def one(basis: Any, step: Any) -> Any:
                image = apply(at, basis[step])
                diagonal = image @ basis[step]
                for _ in range(2):
                    image = image - basis.T @ (basis @ image)
                beside = jnp.linalg.norm(image)
                return basis.at[step + 1].set(image / beside, mode="drop"), (diagonal, beside)

            return lax.scan(one, basis, jnp.arange(steps))[1]

        starts = [jnp.asarray(torch.randn(len(at), dtype=torch.float64).numpy()) for _ in range(probes)]

        def work() -> None:
            for start in starts:
                jax.block_until_ready(lanczos(start))

        return work

    def ours() -> Way:
        def work() -> None:
            derivatives.hessian_density(module, mean_square, x, y, probes=probes, steps=steps)

        return work

    return Cell("Hessian density 80 x 10, P = 7,600", "ms", {"ours": ours, "jax": peer})


# --- moments -------------------------------------------------------------------------------------------------

PAIRS = {
    "five layers": ((20, 50, 75, 100, 125, 100), (20, 100, 150, 200, 250, 100)),
    "10-20-30-40-50-10": ((10, 10, 15, 20, 25, 10), (10, 20, 30, 40, 50, 10)),
}


def moments(name: str, dtype: torch.dtype) -> Cell:
    teacher, student = (connected(w, seed=i).to(dtype) for i, w in enumerate(PAIRS[name]))
    samples = 64
    x = torch.randn(samples, teacher.widths[0], generator=torch.Generator().manual_seed(0), dtype=dtype)

    def ours() -> Way:
        def work() -> object:
            found = theory.expectations(student, teacher, x)
            return [*found.A, *found.B]

        return work

    def peer() -> Way:
        import jax
        import jax.numpy as jnp

        w, s = ([jnp.asarray(t.numpy()) for t in net.weights] for net in (student, teacher))
        b, c = ([jnp.asarray(t.numpy()) for t in net.biases] for net in (student, teacher))

        def gates(weights: Any, biases: Any, x: Any) -> list[Any]:
            found = []
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                z = weight @ x + bias
                found.append((z > 0).astype(x.dtype))
                x = jax.nn.relu(z)
            return found

        def one(x: Any) -> Any:
            d, e = gates(w, b, x), gates(s, c, x)
            a, bb = w[-1].T @ s[-1], w[-1].T @ w[-1]
            found = [(a, bb)]
            for layer in range(len(w) - 2, 0, -1):
                a = w[layer].T @ (d[layer][:, None] * a * e[layer]) @ s[layer]
                bb = w[layer].T @ (d[layer][:, None] * bb * d[layer]) @ w[layer]
                found.append((a, bb))
            return found[::-1]

        @jax.jit
        def mean(x: Any) -> Any:
            def add(total: Any, sample: Any) -> Any:
                return [(p + q, r + t) for (p, r), (q, t) in zip(total, one(sample), strict=True)], None

            zero = [
                tuple(jnp.zeros((n.shape[1], m.shape[1]), x.dtype) for m in (taught, n))
                for n, taught in zip(w[1:], s[1:], strict=True)
            ]
            return [(p / len(x), r / len(x)) for p, r in jax.lax.scan(add, zero, x)[0]]

        given = jnp.asarray(x.numpy())

        def work() -> object:
            found = jax.block_until_ready(mean(given))
            return [*(p for p, _ in found), *(r for _, r in found)]

        return work

    pairs = list(itertools.pairwise(student.widths))
    told = f"E[A], E[B], {name}, {str(dtype).removeprefix('torch.')}"
    own = [n for _, n in pairs][:-1]
    known = list(teacher.widths[1:-1])
    out = student.widths[-1]
    flops = 0
    for layer in range(len(own) - 1):
        flops += 2 * out * own[layer] * own[layer + 1] + 2 * out * known[layer] * known[layer + 1]
        flops += 2 * out * own[layer] * (own[layer] + known[layer]) if layer else 0
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    return Cell(told, "us", {"ours": ours, "jax": peer}, samples, flops=flops * samples, dtype=dtype, rtol=rtol)


def cells() -> Iterator[Callable[[], Cell]]:
    """The cells of derivatives and moments, each made when it is called."""
    warnings.filterwarnings("ignore")  # of the peers
    for name in PAIRS:
        for dtype in (torch.float64, torch.float32):
            yield lambda name=name, dtype=dtype: moments(name, dtype)
    for kind in ("MLP", "ConvNet", "ResNet", "transformer"):
        yield lambda kind=kind: gradients(kind)
    for kind in ("MLP", "ConvNet", "ResNet", "transformer"):
        yield lambda kind=kind: norms(kind)
    yield lambda: jacobian("two layers", (100, 50, 50), 128)
    yield lambda: jacobian("five layers", (20, 100, 150, 200, 250, 100), 8)
    yield product
    yield dense
    yield density
