"""The contract test on a part of your own: what tsdyn asks of its own activations, losses, laws and so on.

`check` raises at the first requirement that a part breaks, naming the requirement, the input and both numbers.  It
compares with torch.autograd, quadrature and samples, never with the part's own code.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import torch
import xarray as xr
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
#: Standard errors allowed for a mean over samples: a correct part fails about once in a million checks.
_SIGMAS = 5.0


class ContractError(AssertionError):
    """A part breaks a requirement; the message says which, where and by how much."""


def check(part: Any, kind: Kind | None = None, *, arguments: Mapping[str, Any] | None = None) -> None:
    """Run the contract test on a part, and raise where it breaks.

    Args:
        part: An `Activation`, `Loss`, `Optimizer` or `Observed`; a function that makes an ``nn.Module``; the function
            of a law, teacher or start; or a study's module.
        kind: What it is; needed for functions, told by its type otherwise.
        arguments: Of an optimizer, law, teacher or start: what an experiment file would give it as ``arguments``.

    Raises:
        ContractError: naming the requirement, the input and both numbers.
        TypeError: if the kind cannot be found from the part's type, or for a module that was made.

    Example:
        >>> import torch, tsdyn
        >>> from tsdyn.testing import check
        >>> check(tsdyn.networks.activations.activation("tanh"))
    """
    if isinstance(part, nn.Module) and kind in (None, "module"):
        raise TypeError(
            f"check: {type(part).__name__} is a module that was made; give the function or class that makes it, since "
            "a run makes one for each seed"
        )
    what = _kind(part) if kind is None else kind
    takes = ("optimizer", "law", "teacher", "start")
    if arguments is not None and what not in takes:
        raise TypeError(f"check: arguments = {dict(arguments)}: only {', '.join(takes)} take some, not a {what}")
    given = dict(arguments or {})
    from tsdyn.running.runner import own_device

    with own_device():  # also where the user's is another
        match what:
            case "activation":
                _activation(part)
            case "loss":
                _loss(part)
            case "optimizer":
                _optimizer(part, given)
            case "law":
                _law(part, given)
            case "teacher":
                _teacher(part, given)
            case "start":
                _start(part, given)
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


def _close(what: str, mine: Tensor, right: Tensor, bound: float, *, by: str = "torch.autograd") -> None:
    _demand(mine.shape == right.shape, f"{what}: shape {tuple(mine.shape)}, it must be {tuple(right.shape)}")
    _demand(mine.dtype == right.dtype, f"{what}: {mine.dtype}, it must be {right.dtype}")
    off = (mine - right).abs().flatten()
    _demand(bool(torch.isfinite(mine).all()), f"{what}: not finite")
    worst = int(off.argmax())
    scale = 1 + float(right.abs().max())
    _demand(
        float(off[worst]) <= bound * scale,
        f"{what}: {float(mine.flatten()[worst]):.17g}, by {by} {float(right.flatten()[worst]):.17g}, off by "
        f"more than {bound * scale:.2g} (entry {worst})",
    )


def _activation(part: Activation) -> None:
    """Check that it is elementwise, its derivative is autograd's (at 0 too), and its module and `leak` agree."""
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        z = torch.cat([torch.linspace(-8, 8, 257, dtype=dtype), torch.zeros(1, dtype=dtype)]).requires_grad_(True)
        value = part(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
        where = f"activation {part.name} in {dtype}"
        _close(f"{where}: derivative", part.derivative(z.detach()), slope, 64 * eps)
        _close(f"{where}: module()", part.module()(z.detach()), value.detach(), 16 * eps, by="function")
        grid = z.detach()[:8].view(2, 4)
        _close(f"{where}: elementwise", part(grid).flatten(), part(z.detach()[:8]), 0.0, by="function of eight")
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
    """Check that it is a mean over samples, and that residual and Hessian are autograd's for any leading dimensions."""
    generator = torch.Generator().manual_seed(1)
    _demand(bool(part.convention.strip()), f"loss {part.name}: convention is empty; archives keep it")
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        output = torch.randn(6, 3, generator=generator, dtype=dtype).requires_grad_(True)
        taught = torch.randn(6, 3, generator=generator, dtype=dtype)
        target = part.target(taught)
        where = f"loss {part.name} in {dtype}"
        value = part.value(output, target)
        _demand(value.ndim == 0, f"{where}: value has shape {tuple(value.shape)}; it must be one number")
        each = torch.stack([part.value(output[i : i + 1], target[i : i + 1]) for i in range(6)]).mean()
        _close(f"{where}: mean over samples", value.detach(), each.detach(), 64 * eps, by="the samples one by one")
        _close(f"{where}: of_classes", part.over(output.detach(), taught), value.detach(), 64 * eps, by="value")
        (gradient,) = torch.autograd.grad(value, output, create_graph=True)
        residual = part.residual(output.detach(), target)
        _close(f"{where}: residual", residual, -len(output) * gradient.detach(), 256 * eps)
        rows = [
            torch.autograd.grad(gradient[:, c].sum(), output, retain_graph=True, allow_unused=True)[0] for c in range(3)
        ]
        second = torch.stack([torch.zeros_like(output) if r is None else r for r in rows], 1) * len(output)
        hessian = part.hessian(output.detach(), target)
        _close(f"{where}: hessian", hessian, second.detach(), 1024 * eps)
        folded = output.detach().view(2, 3, 3), target.view(2, 3, 3)
        for name, flat, more in (
            ("residual", residual, part.residual(*folded)),
            ("hessian", hessian, part.hessian(*folded)),
        ):
            _close(f"{where}: {name} of (2, 3) samples", more.flatten(0, 1), flat, 16 * eps, by="that of 6")


def _optimizer(part: Optimizer, arguments: Mapping[str, Any]) -> None:
    """Check that its updates are finite, independent between members and use the rate, and its state is its moments."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64):
        start = torch.randn(2, 3, 4, generator=generator, dtype=dtype)
        gradients = torch.randn(5, 2, 3, 4, generator=generator, dtype=dtype)

        def after(
            members: slice,
            rates: list[float],
            start: Tensor = start,
            gradients: Tensor = gradients,
            steps: type = int,
        ) -> Tensor:
            p = start[members].clone()
            moments = [torch.zeros_like(p) for _ in part.moments]
            rule = Rule(0.01, arguments=tuple(sorted(arguments.items())))
            given = torch.tensor(rates, dtype=p.dtype)[members].view(-1, 1, 1)
            for step, gradient in enumerate(gradients, start=1):
                count = torch.tensor(step, dtype=torch.float64) if steps is Tensor else step
                part.update(rule, p, gradient[members].clone(), moments, given, count)
            return p

        where, eps = f"optimizer {part.name} in {dtype}", torch.finfo(dtype).eps
        both = after(slice(0, 2), [0.01, 0.02])
        _demand(bool(torch.isfinite(both).all()), f"{where}: parameters are not finite after five steps")
        _demand(not torch.equal(both, start), f"{where}: five steps leave the parameters as they were")
        again = after(slice(0, 2), [0.01, 0.02])
        _demand(torch.equal(again, both), f"{where}: keeps something between runs that is not one of its moments")
        for member in (0, 1):
            alone = after(slice(member, member + 1), [0.01, 0.02])
            _close(f"{where}: a member alone", alone[0], both[member], 4 * eps, by="beside another")
        _demand(torch.equal(after(slice(0, 2), [0.0, 0.0]), start), f"{where}: moves at a learning rate of 0")
        counted = after(slice(0, 2), [0.01, 0.02], steps=Tensor)
        _close(f"{where}: with the step as a tensor", counted, both, 64 * eps, by="as a number")


def _drawn(part: Callable[..., Any], seed: int, *given: Any, **named: Any) -> np.ndarray:
    return np.asarray(part(np.random.default_rng(seed), *given, **named))


def _named(part: Any) -> str:
    return str(getattr(part, "__name__", repr(part)))


def _law(part: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that (rng, samples, inputs, *, std) gives finite, independent samples, drawn from `rng` alone."""
    where = f"law {_named(part)}"
    x, again, other = (_drawn(part, seed, 4000, 5, std=1.5, **arguments) for seed in (3, 3, 4))
    _demand(x.shape == (4000, 5) and x.dtype.kind == "f", f"{where}: drew {x.dtype} {x.shape}, not (4000, 5) numbers")
    _demand(bool(np.isfinite(x).all()), f"{where}: drew numbers that are not finite")
    _demand(np.array_equal(x, again), f"{where}: the same rng draws other inputs; draw from the rng given alone")
    _demand(not np.array_equal(x, other), f"{where}: another rng draws the same inputs; draw from the rng given")
    wider = _drawn(part, 3, 4000, 5, std=3.0, **arguments)
    _demand(not np.array_equal(x, wider), f"{where}: std = 1.5 and 3 draw the same; data.std would be left unread")
    ranks = stats.rankdata(x[:, 0])
    lag = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    _demand(abs(lag) <= _SIGMAS / len(x) ** 0.5, f"{where}: neighbouring samples correlate by {lag:.3f}")


def _section(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"init": "mine", "arguments": dict(arguments)} if arguments else {}


def _teacher(part: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that (rng, nodes, inputs, *, teacher, lowest) gives finite rows of that shape, drawn from `rng` alone."""
    where = f"teacher {_named(part)}"
    with registers.accepting(None):  # the section of somebody's part, under whatever name
        section = Teacher(widths=(6, 4, 3), **_section(arguments))
    for nodes, inputs, lowest in ((4, 6, True), (3, 4, False)):
        rows, again = (_drawn(part, 3, nodes, inputs, teacher=section, lowest=lowest) for _ in range(2))
        good = rows.shape == (nodes, inputs) and rows.dtype.kind == "f" and bool(np.isfinite(rows).all())
        _demand(good, f"{where}: drew {rows.dtype} {rows.shape}; finite numbers {(nodes, inputs)} are asked for")
        _demand(np.array_equal(rows, again), f"{where}: the same rng draws other rows; use the rng given alone")
        _demand(bool(rows.any(1).all()), f"{where}: a row is zero, so the node ignores its input")


def _start(part: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that (rng, shape, *, student, taught) gives a weight of that shape and a bias, drawn from `rng` alone."""
    where = f"start {_named(part)}"
    with registers.accepting(None):
        section = Student(overrealization=1.0, **_section(arguments))
    for shape in ((4, 6), (3, 2, 3, 3)):
        taught = torch.ones(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
        found = [
            tuple(torch.as_tensor(p) for p in part(np.random.default_rng(3), shape, student=section, taught=taught))
            for _ in range(2)
        ]
        _demand(len(found[0]) == 2, f"{where}: gave {len(found[0])} arrays; a weight and a bias are asked for")
        weight, bias = found[0]
        _demand(
            weight.shape == shape and bias.shape == shape[:1],
            f"{where}: gave {tuple(weight.shape)} and {tuple(bias.shape)}, {shape} and {shape[:1]} asked",
        )
        real = all(p.is_floating_point() and bool(p.isfinite().all()) for p in found[0])
        _demand(real, f"{where}: gave {weight.dtype} and {bias.dtype}; finite real numbers are asked for")
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        _demand(same, f"{where}: the same rng starts elsewhere; draw from the rng given alone")
        kept = bool((taught[0] == 1).all() and (taught[1] == 0).all())
        _demand(kept, f"{where}: changes the teacher's parameters, which it is only shown")


def _observable(part: Observed) -> None:
    """Check that it gives its declared dimensions for networks in both dtypes, and changes nothing it measures."""
    for dtype in ("float64", "float32"):
        experiment = Experiment(
            name="check", seeds=2, dtype=dtype,
            teacher={"widths": [5, 3, 4, 2]}, student={"overrealization": 2.0, "scale": 0.3},
            data={"train": 30, "eval": 20}, training={"epochs": 2, "batch": 10},
            record={"observables": ["loss", "weight"]},
        )  # fmt: skip
        _observed(part, experiment, dtype)
    if part.variable.deep:
        deep = experiment.replace({
            "data.image": [2, 4, 4], "data.law": "gaussian", "teacher.convolution": True, "teacher.padding": 1,
            "teacher.widths": [32, 3, 4, 2],
        })  # fmt: skip
        _observed(part, deep, "convolutions")


def _observed(part: Observed, experiment: Experiment, where: str) -> None:
    from tsdyn.running import sweep

    with tempfile.TemporaryDirectory() as folder:
        try:
            ds = sweep.run(experiment, Path(folder) / "run", observables=[part]).load()
        except Exception as error:
            raise ContractError(f"observable {part.name} in {where}: {error}") from error
        plain = sweep.run(experiment, Path(folder) / "plain").load()
    found = schema.problems(ds)
    _demand(not found, f"observable {part.name}: {'; '.join(found)}")
    disturbed = [v for v in plain.data_vars if not plain[v].equals(ds[v])]
    _demand(not disturbed, f"observable {part.name}: measuring it changes {', '.join(map(str, disturbed))}")
    _demand(bool(ds[part.name].notnull().any()), f"observable {part.name}: nothing but NaN")


def _module(part: Callable[..., Any]) -> None:
    """A function or class that makes an ``nn.Module`` that can be a member: no shared state, random by torch alone."""
    takes_seed = "seed" in inspect.signature(part).parameters

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = part(seed=0) if takes_seed else part()
        _demand(isinstance(found, nn.Module), f"module: {part!r} made {type(found).__name__}, not an nn.Module")
        assert isinstance(found, nn.Module)
        return found

    module, other = made(), made()
    try:
        refuse_unfit(module)
    except ValueError as error:
        raise ContractError(f"module: {error}") from None
    shared = {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}
    _demand(not shared, "module: two calls give modules that share parameters; make new ones")
    both = zip(module.parameters(), other.parameters(), strict=True)
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in both)
    _demand(same, "module: with torch's generator at the same seed two calls start differently; draw from torch alone")


def _study(part: Any) -> None:
    """Check that it has TITLE, SOURCE, EXPERIMENTS, measure and draw, and that its smoke scale runs and draws."""
    from tsdyn.running import sweep

    missing = [word for word in ("TITLE", "SOURCE", "EXPERIMENTS", "measure", "draw") if not hasattr(part, word)]
    _demand(not missing, f"study: has no {', '.join(missing)}")
    scales = [scale for scale in ("smoke", "desk", "paper") if scale not in part.EXPERIMENTS]
    _demand(not scales, f"study: EXPERIMENTS lacks {', '.join(scales)}")
    work = part.EXPERIMENTS["smoke"]
    with tempfile.TemporaryDirectory() as folder:
        archive = sweep.run(work, Path(folder) / "run") if isinstance(work, Experiment) else work.read()
        measured = part.measure(archive)
        _demand(isinstance(measured, xr.Dataset), f"study: measure gave {type(measured).__name__}, not a Dataset")
        figure = part.draw(measured.load())
    _demand(hasattr(figure, "savefig"), f"study: draw gave {type(figure).__name__}, not a matplotlib Figure")
