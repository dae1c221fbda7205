"""The contract test on a part of your own: what tsdyn asks of its own activations, losses, laws and so on.

`check` raises at the first promise that a part breaks, naming the promise, the input and both numbers.  It compares
with torch.autograd, quadrature and samples, never with the part's own code.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from tsdyn import registers, schema
from tsdyn.engine.general import refuse_unfit
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Optimizer, Rule
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Student, Teacher
from tsdyn.gaussian import interaction
from tsdyn.networks.activations import Activation
from tsdyn.observables.registry import Observed

Kind: TypeAlias = Literal["activation", "loss", "optimizer", "law", "teacher", "start", "observable", "module", "study"]
#: A check of a mean over samples fails a right part about once in a million.
_SIGMAS = 5.0


class ContractError(AssertionError):
    """A part that breaks a promise; the message says which, where and by how much."""


def check(part: Any, kind: Kind | None = None) -> None:
    """Run the contract test on a part, and raise where it breaks.

    Args:
        part: An `Activation`, `Loss`, `Optimizer` or `Observed`; a function that makes an ``nn.Module``; the function
            of a law, teacher or start; or a study's module.
        kind: What it is; needed for functions, told by its type otherwise.

    Raises:
        ContractError: naming the promise, the input and both numbers.
        TypeError: if it cannot be told what the part is.

    Example:
        >>> import torch, tsdyn
        >>> from tsdyn.testing import check
        >>> check(tsdyn.networks.activations.activation("tanh"))
    """
    what = _kind(part) if kind is None else kind
    match what:
        case "activation":
            _activation(part)
        case "loss":
            _loss(part)
        case "optimizer":
            _optimizer(part)
        case "law":
            _law(part)
        case "teacher":
            _teacher(part)
        case "start":
            _start(part)
        case "observable":
            _observable(part)
        case "module":
            _module(part)
        case "study":
            _study(part)
        case other:
            assert_never(other)


def _kind(part: Any) -> Kind:
    if isinstance(part, Activation):
        return "activation"
    if isinstance(part, Loss):
        return "loss"
    if isinstance(part, Optimizer):
        return "optimizer"
    if isinstance(part, Observed):
        return "observable"
    if inspect.ismodule(part):
        return "study"
    if isinstance(part, type) and issubclass(part, nn.Module):
        return "module"
    raise TypeError(f"check: what is {part!r}? Give kind=, one of {', '.join(registers.ALL)} or module")


def _demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise ContractError(sentence)


def _close(what: str, mine: Tensor, right: Tensor, bound: float) -> None:
    _demand(mine.shape == right.shape, f"{what}: shape {tuple(mine.shape)}, it must be {tuple(right.shape)}")
    _demand(mine.dtype == right.dtype, f"{what}: {mine.dtype}, it must be {right.dtype}")
    off = (mine - right).abs().flatten()
    _demand(bool(torch.isfinite(mine).all()), f"{what}: not finite")
    worst = int(off.argmax())
    scale = 1 + float(right.abs().max())
    _demand(
        float(off[worst]) <= bound * scale,
        f"{what}: {float(mine.flatten()[worst]):.17g}, by torch.autograd {float(right.flatten()[worst]):.17g}, off by "
        f"more than {bound * scale:.2g} (entry {worst})",
    )


def _activation(part: Activation) -> None:
    """Elementwise; its derivative is autograd's, at 0 too; its module is itself; `leak` says the truth."""
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        z = torch.cat([torch.linspace(-8, 8, 257, dtype=dtype), torch.zeros(1, dtype=dtype)]).requires_grad_(True)
        value = part(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
        where = f"activation {part.name} in {dtype}"
        _close(f"{where}: derivative", part.derivative(z.detach()), slope, 64 * eps)
        _close(f"{where}: module()", part.module()(z.detach()), value.detach(), 16 * eps)
        grid = z.detach()[:8].view(2, 4)
        _close(f"{where}: elementwise", part(grid).flatten(), part(z.detach()[:8]), 0.0)
        obeys = bool(((value - part.derivative(z) * z).abs() <= 64 * eps * (1 + value.abs())).all())
        _demand(
            obeys == part.piecewise_linear,
            f"activation {part.name}: leak = {part.leak}, but σ(z) = σ'(z) z {'holds' if obeys else 'does not hold'}",
        )
    r1, r2, rho = 0.8, 1.3, 0.4
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    product = part(r1 * u) * part(r2 * (rho * u + (1 - rho * rho) ** 0.5 * w))
    error = float(product.std()) / len(u) ** 0.5
    mine = float(
        interaction.interaction_of(part)(*(torch.tensor(v, dtype=torch.float64) for v in (r1**2, r2**2, r1 * r2 * rho)))
    )
    _demand(
        abs(mine - float(product.mean())) <= _SIGMAS * error,
        f"activation {part.name}: E[σ(u)σ(v)] is {mine:.6g}, samples say {float(product.mean()):.6g} ± {error:.2g}",
    )


def _loss(part: Loss) -> None:
    """A mean over samples, whose residual and Hessian are autograd's."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        output = torch.randn(6, 3, generator=generator, dtype=dtype).requires_grad_(True)
        target = part.target(torch.randn(6, 3, generator=generator, dtype=dtype))
        where = f"loss {part.name} in {dtype}"
        value = part.value(output, target)
        _demand(value.ndim == 0, f"{where}: value has shape {tuple(value.shape)}; it must be one number")
        (gradient,) = torch.autograd.grad(value, output, create_graph=True)
        _close(
            f"{where}: residual", part.residual(output.detach(), target), -len(output) * gradient.detach(), 256 * eps
        )
        rows = [
            torch.autograd.grad(gradient[:, c].sum(), output, retain_graph=True, allow_unused=True)[0] for c in range(3)
        ]
        second = torch.stack([torch.zeros_like(output) if r is None else r for r in rows], 1) * len(output)
        _close(f"{where}: hessian", part.hessian(output.detach(), target), second.detach(), 1024 * eps)
        each = torch.stack([part.value(output[i : i + 1], target[i : i + 1]) for i in range(6)]).mean()
        _close(f"{where}: mean over samples", value.detach(), each.detach(), 64 * eps)


def _optimizer(part: Optimizer) -> None:
    """Finite, keeps members apart, uses its rate, forgets nothing between steps but in its moments."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64):
        start = torch.randn(2, 3, 4, generator=generator, dtype=dtype)
        gradients = torch.randn(5, 2, 3, 4, generator=generator, dtype=dtype)

        def after(members: slice, rates: list[float], start: Tensor = start, gradients: Tensor = gradients) -> Tensor:
            p = start[members].clone()
            moments = [torch.zeros_like(p) for _ in part.moments]
            rule, given = Rule(0.01), torch.tensor(rates, dtype=p.dtype)[members].view(-1, 1, 1)
            for step, gradient in enumerate(gradients, start=1):
                part.update(rule, p, gradient[members].clone(), moments, given, step)
            return p

        where = f"optimizer {part.name} in {dtype}"
        both = after(slice(0, 2), [0.01, 0.02])
        _demand(bool(torch.isfinite(both).all()), f"{where}: parameters are not finite after five steps")
        _demand(not torch.equal(both, start), f"{where}: five steps leave the parameters as they were")
        for member in (0, 1):
            alone = after(slice(member, member + 1), [0.01, 0.02])
            _close(f"{where}: a member alone", alone[0], both[member], 4 * torch.finfo(dtype).eps)
        _demand(torch.equal(after(slice(0, 2), [0.0, 0.0]), start), f"{where}: moves at a learning rate of 0")


def _draws(part: Callable[..., Any], *given: Any, **named: Any) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.asarray(part(np.random.default_rng(3), *given, **named)) for _ in range(2))  # type: ignore[return-value]


def _law(part: Callable[..., Any]) -> None:
    """(rng, samples, inputs, *, std): finite inputs of that shape, drawn from `rng` alone, independent samples."""
    name = getattr(part, "__name__", repr(part))
    x, again = _draws(part, 4000, 5, std=1.5)
    _demand(
        x.shape == (4000, 5) and x.dtype.kind == "f", f"law {name}: drew {x.dtype} {x.shape}, not (4000, 5) numbers"
    )
    _demand(bool(np.isfinite(x).all()), f"law {name}: drew numbers that are not finite")
    _demand(np.array_equal(x, again), f"law {name}: the same rng draws other inputs; draw from the rng given alone")
    half = np.asarray(part(np.random.default_rng(4), 4000, 5, std=1.5))
    _demand(not np.array_equal(x, half), f"law {name}: another rng draws the same inputs")
    ranks = stats.rankdata(x[:, 0])
    lag = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    _demand(abs(lag) <= _SIGMAS / len(x) ** 0.5, f"law {name}: neighbouring samples correlate by {lag:.3f}")


def _teacher(part: Callable[..., Any]) -> None:
    """(rng, nodes, inputs, *, teacher, lowest): finite rows of that shape, drawn from `rng` alone."""
    name, section = getattr(part, "__name__", repr(part)), Teacher(widths=(6, 4, 3))
    for nodes, inputs, lowest in ((4, 6, True), (3, 4, False)):
        rows, again = _draws(part, nodes, inputs, teacher=section, lowest=lowest)
        good = rows.shape == (nodes, inputs) and rows.dtype.kind == "f" and bool(np.isfinite(rows).all())
        _demand(good, f"teacher {name}: drew {rows.dtype} {rows.shape}; finite numbers {(nodes, inputs)} are asked for")
        _demand(np.array_equal(rows, again), f"teacher {name}: the same rng draws other rows; use the rng given alone")
        _demand(bool(rows.any(1).all()), f"teacher {name}: a row is zero, a node that never answers")


def _start(part: Callable[..., Any]) -> None:
    """(rng, shape, *, student, taught): a weight of that shape and its bias, drawn from `rng` alone."""
    name, section = getattr(part, "__name__", repr(part)), Student(overrealization=1.0)
    for shape in ((4, 6), (3, 2, 3, 3)):
        taught = torch.ones(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
        found = [
            tuple(torch.as_tensor(p) for p in part(np.random.default_rng(3), shape, student=section, taught=taught))
            for _ in range(2)
        ]
        weight, bias = found[0]
        good = (
            weight.shape == shape and bias.shape == shape[:1] and bool(weight.isfinite().all() & bias.isfinite().all())
        )
        _demand(
            good, f"start {name}: gave {tuple(weight.shape)} and {tuple(bias.shape)}, {shape} and {shape[:1]} asked"
        )
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        _demand(same, f"start {name}: the same rng starts elsewhere; draw from the rng given alone")


def _observable(part: Observed) -> None:
    """Has the dimensions that it declares, of networks in both dtypes, and disturbs nothing."""
    from tsdyn.running import sweep

    for dtype in ("float64", "float32"):
        experiment = Experiment(
            name="check", seeds=2, dtype=dtype,
            teacher={"widths": [5, 3, 4, 2]}, student={"overrealization": 2.0, "scale": 0.3},
            data={"train": 30, "eval": 20}, training={"epochs": 2, "batch": 10},
            record={"observables": ["loss", "weight"]},
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            try:
                ds = sweep.run(experiment, Path(folder) / "run", observables=[part]).load()
            except Exception as error:
                raise ContractError(f"observable {part.name} in {dtype}: {error}") from error
            plain = sweep.run(experiment, Path(folder) / "plain").load()
            found = schema.problems(ds)
            _demand(not found, f"observable {part.name}: {'; '.join(found)}")
            disturbed = [v for v in plain.data_vars if not plain[v].equals(ds[v])]
            _demand(not disturbed, f"observable {part.name}: measuring it changes {', '.join(map(str, disturbed))}")
            _demand(bool(ds[part.name].notnull().any()), f"observable {part.name}: nothing but NaN")


def _module(part: Callable[..., Any]) -> None:
    """A function or class that makes an ``nn.Module`` which can be a member: no shared state, no randomness."""
    module = part(seed=0) if "seed" in inspect.signature(part).parameters else part()
    _demand(isinstance(module, nn.Module), f"module: {part!r} made {type(module).__name__}, not an nn.Module")
    try:
        refuse_unfit(module)
    except ValueError as error:
        raise ContractError(f"module: {error}") from None
    other = part(seed=1) if "seed" in inspect.signature(part).parameters else part()
    shared = {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}
    _demand(not shared, "module: two calls give modules that share parameters; make new ones")


def _study(part: Any) -> None:
    """A module with TITLE, SOURCE, EXPERIMENTS for every scale, measure and draw, whose smoke scale runs and draws."""
    from tsdyn.running import sweep

    missing = [word for word in ("TITLE", "SOURCE", "EXPERIMENTS", "measure", "draw") if not hasattr(part, word)]
    _demand(not missing, f"study: has no {', '.join(missing)}")
    scales = [scale for scale in ("smoke", "desk", "paper") if scale not in part.EXPERIMENTS]
    _demand(not scales, f"study: EXPERIMENTS lacks {', '.join(scales)}")
    with tempfile.TemporaryDirectory() as folder:
        archive = sweep.run(part.EXPERIMENTS["smoke"], Path(folder) / "run")
        figure = part.draw(part.measure(archive).load())
    _demand(hasattr(figure, "savefig"), f"study: draw gave {type(figure).__name__}, not a matplotlib Figure")
