"""Definition 2 and Lemma 1 of Tian (2020) for any module, by Jacobians at its named layers.

f is the module's output and f_l the activation of its layer l, as `layers.traced` finds it.  V_l(x) = ∂f/∂f_l, and
A_l = V_lᵀ V*_l, B_l = V_lᵀ V_l.  The constant column of V_l is what f has beside V_l f_l.  If every function on the way
from f_l to f is homogeneous of degree one in its inputs and biases, σ(x) = σ'(x) x, then so is f in (f_l, x, biases),
and by Euler's theorem

    f = V_l f_l + c_l,    c_l = (∂f/∂x) x + Σ_b (∂f/∂b) b    at fixed f_l:

the biases above, and what goes around layer l (skip connections).  `lemma1_residual` computes c_l from that sum, so
that the lemma is tested rather than assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tsdyn.networks.any_module import called_with
from tsdyn.networks.network import Network
from tsdyn.observables.layers import evaluated, is_layer, pulled_back, rows_of, traced
from tsdyn.theory.couplings import Coupling
from tsdyn.theory.couplings import output_jacobian as theory_jacobian

#: Jacobians of a piece of a batch take at most about this many bytes.
PIECE = 1 << 27

#: Expectations between layers of the student and of the teacher, which must have equally many positions.
PAIRED = ("A", "L_star", "D_star", "H_star")

#: Functions f with f(s x) = s f(x) for s > 0, beside those that are linear in inputs and biases.
_HOMOGENEOUS = frozenset(
    ["relu", "leaky_relu", "prelu", "threshold", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
     "adaptive_max_pool2d", "abs", "max", "min", "maximum", "minimum", "amax", "amin", "clamp_min"]
)  # fmt: skip
_LINEAR = frozenset(
    ["linear", "conv1d", "conv2d", "conv3d", "batch_norm", "add", "sub", "neg", "matmul", "bmm", "einsum", "mean",
     "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "flatten",
     "adaptive_avg_pool3d", "unflatten", "view", "reshape", "permute", "transpose", "mT", "T", "cat", "stack", "chunk",
     "split", "squeeze", "unsqueeze", "expand", "contiguous", "clone", "dropout", "pad", "interpolate", "__getitem__",
     "size", "dim", "to", "__get__", "requires_grad", "detach", "mul", "div", "true_divide"]
)  # fmt: skip


def output_jacobian(module: nn.Module, x: Tensor, *, layer: str) -> Tensor:
    """V(x) = ∂f/∂f_l at the activation of the layer of that name, (sample, output, node).

    In evaluation mode.  Of a layer with several positions (a convolution), (sample, output, position, node).

    Args:
        module: Any module from (sample, ...) to (sample, output), samples independent of each other.
        x: The batch.
        layer: Name of a Linear layer or convolution, such as ``"body.0"``.

    Raises:
        ValueError: if there is no such layer, or it is not called on `x`.
    """
    with evaluated(module):
        (found,) = jacobians(module, (layer,), x, caller="output_jacobian")
    return found[:, :, 0] if found.shape[2] == 1 else found


def coupling(student: nn.Module, teacher: nn.Module, x: Tensor, *, layers: tuple[str, str]) -> Coupling:
    """A(x) = VᵀV*, (sample, node, teacher_node), and B(x) = VᵀV, (sample, node, node), at named layers.

    Without the constant node.  Source: Tian (2020), Definition 2.

    Args:
        student, teacher: Any modules of the same outputs.
        x: The batch.
        layers: Name of the student's layer and of the teacher's, each of one position per sample.

    Raises:
        ValueError: as `output_jacobian`, or if a layer has several positions or outputs differ in number.
    """
    v, v_star = output_jacobian(student, x, layer=layers[0]), output_jacobian(teacher, x, layer=layers[1])
    for name, jacobian in zip(layers, (v, v_star), strict=True):
        if jacobian.ndim != 3:
            raise ValueError(
                f"coupling: {name!r} has {jacobian.shape[2]} positions per sample; give a layer of one, or sum "
                "output_jacobian's over positions"
            )
    if v.shape[1] != v_star.shape[1]:
        raise ValueError(f"coupling: the student has {v.shape[1]} outputs, the teacher {v_star.shape[1]}")
    return Coupling(v.mT @ v_star, v.mT @ v)


def lemma1_residual(student: nn.Module, teacher: nn.Module, x: Tensor, *, layers: tuple[str, str]) -> float:
    """Largest relative error of Lemma 1, g_l = D_l (A_l [f*_l; 1] − B_l [f_l; 1]), over samples and nodes.

    g_l is the backpropagated gradient of ½‖f* − f‖², at the output of the student's layer.  The error is relative to
    the largest entry of g_l and of the two products.  Source: Tian (2020), Lemma 1.

    Args:
        student, teacher: Any modules of the same outputs.
        x: The batch.
        layers: Name of the student's layer and of the teacher's.

    Raises:
        ValueError: where σ(x) = σ'(x) x does not hold on the way from a layer to the output, with the functions of
            which it does not; or as `coupling`.
    """
    names = ((layers[0],), (layers[1],))
    for who, module, name in zip(("student", "teacher"), (student, teacher), names, strict=True):
        reason = not_homogeneous(module, name, x)
        if reason:
            raise ValueError(f"lemma1_residual: the {who}: {reason}")
    with evaluated(student), evaluated(teacher):
        return largest_residual(AtLayers(student, names[0]), AtLayers(teacher, names[1]), x)


class Hidden(NamedTuple):
    """One hidden layer on some samples.

    Attributes:
        f: Its activation f_l, (sample, position, node).
        v: V_l, (sample, output, position, node).
        slope: f'_l, the derivative of the activation function at what it is applied to, (sample, position, node).
    """

    f: Tensor
    v: Tensor
    slope: Tensor


@dataclass(frozen=True)
class AtLayers:
    """A network, or a module in its present mode with the names of its layers, the lowest first."""

    module: nn.Module | Network
    names: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return self.module.depth if isinstance(self.module, Network) else len(self.names)

    def hidden(self, x: Tensor) -> list[Hidden]:
        """What is summed of each hidden layer."""
        if isinstance(self.module, Network):
            trace = self.module.trace(x)
            found = zip(trace.activations[:-1], trace.gates[:-1], strict=True)
            return [
                Hidden(f[:, None], theory_jacobian(self.module, x, i)[:, :, None], slope[:, None])
                for i, (f, slope) in enumerate(found, start=1)
            ]
        names = self.names[:-1]
        with torch.no_grad():
            passed = traced(self.module, x, names, sloped=True)
        parts = [self.module.get_submodule(name) for name in names]
        f, slopes = (
            [rows_of(part, held[name]) for part, name in zip(parts, names, strict=True)]
            for held in (passed.activations, passed.slopes)
        )
        views = jacobians(self.module, names, x, caller="measure")
        return [Hidden(*each) for each in zip(f, views, slopes, strict=True)]


@dataclass
class PairSums:
    """Expectations at each hidden layer, where nodes of layers with several positions are channels.

    Attributes:
        A, L_star, D_star: E[Σ V_lᵀ V*_l] over positions, E[f_l f*_lᵀ] and E[f'_l f*'_lᵀ] of the layers that both have,
            (node, teacher_node).
        B, L, D: The same of the student alone, (node, node).
        B_star: The same of the teacher alone.
    """

    A: list[Tensor]
    B: list[Tensor]
    L: list[Tensor]
    L_star: list[Tensor]
    D: list[Tensor]
    D_star: list[Tensor]
    B_star: list[Tensor]

    @property
    def H(self) -> list[Tensor]:
        """B ∘ D."""
        return [b * d for b, d in zip(self.B, self.D, strict=True)]

    @property
    def H_star(self) -> list[Tensor]:
        """A ∘ D*."""
        return [a * d for a, d in zip(self.A, self.D_star, strict=True)]


def pair_sums(student: AtLayers, teacher: AtLayers, x: Tensor) -> PairSums:
    """Expectations over the batch, in pieces of samples; layers are paired in order, from the lowest."""
    sums: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        size = max((v[0].numel() for s in (student, teacher) for pair in s.hidden(x[:1]) for v in pair), default=1)
        step = max(1, PIECE // (size * x.element_size() * 2 * (student.depth + teacher.depth)))
        for piece in x.split(step):
            own, taught = student.hidden(piece), teacher.hidden(piece)
            both = list(zip(own, taught, strict=False))
            parts = {
                "A": [_over_positions(one.v, other.v) for one, other in both],
                "B": [_over_positions(one.v, one.v) for one in own],
                "B_star": [_over_positions(one.v, one.v) for one in taught],
                "L": [_mean_over_positions(one.f, one.f) for one in own],
                "L_star": [_mean_over_positions(one.f, other.f) for one, other in both],
                "D": [_mean_over_positions(one.slope, one.slope) for one in own],
                "D_star": [_mean_over_positions(one.slope, other.slope) for one, other in both],
            }
            for name, found in parts.items():
                sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found
    return PairSums(**{name: [total / len(x) for total in totals] for name, totals in sums.items()})


def _over_positions(v: Tensor, v_star: Tensor) -> Tensor:
    if v.shape[2] != v_star.shape[2]:  # such layers have no A, and are refused where it is asked for
        return v.new_full((v.shape[-1], v_star.shape[-1]), torch.nan)
    return torch.einsum("scpn,scpm->nm", v, v_star)


def _mean_over_positions(f: Tensor, f_star: Tensor) -> Tensor:
    if f.shape[1] != f_star.shape[1]:
        return f.new_full((f.shape[-1], f_star.shape[-1]), torch.nan)
    return torch.einsum("spn,spm->nm", f, f_star) / f.shape[1]


def largest_residual(student: AtLayers, teacher: AtLayers, x: Tensor) -> float:
    """The largest relative error of Lemma 1 over samples and the layers that both have, in pieces of samples."""
    assert isinstance(student.module, nn.Module)
    assert isinstance(teacher.module, nn.Module)
    both = min(student.depth, teacher.depth)
    names, taught = student.names[:both], teacher.names[:both]
    worst, scale = [0.0] * both, [0.0] * both
    numbers = [p.numel() for module in (student.module, teacher.module) for p in module.parameters()]
    for piece in x.split(max(1, PIECE // (8 * max(numbers)))):
        own, aim = (_reached(m, n, piece) for m, n in ((student.module, names), (teacher.module, taught)))
        target = aim[0] - own[0]
        found = pulled_back(student.module, names, piece, lambda _, target=target: target)  # type: ignore[misc]
        views = jacobians(student.module, names, piece, caller="lemma1_residual")
        for i, (name, g, v) in enumerate(zip(names, found, views, strict=True)):
            pull, push = (_at_output(student.module, name, piece, v, side[1][i]) for side in (aim, own))
            worst[i] = max(worst[i], float((g - (pull - push)).abs().max()))
            scale[i] = max(scale[i], *(float(part.abs().max()) for part in (g, pull, push)))
    return max((off / size if size else 0.0 for off, size in zip(worst, scale, strict=True)), default=0.0)


def _reached(module: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """f, and V_l f_l + c_l of each layer, which is f where the module is homogeneous; each (sample, output)."""
    with torch.no_grad():
        passed = traced(module, x, names)
    found = jacobians(module, names, x, caller="lemma1_residual")
    rows = [rows_of(module.get_submodule(name), passed.activations[name]) for name in names]
    reached = [
        torch.einsum("scpn,spn->sc", v, f) + _constant(module, name, x)
        for name, v, f in zip(names, found, rows, strict=True)
    ]
    return passed.output.detach(), reached


def not_homogeneous(module: nn.Module, names: Sequence[str], x: Tensor) -> str:
    """Why σ(x) = σ'(x) x does not hold on the way from these layers to the output; "" where it does.

    Decided by f = V_l f_l + c_l on `x`; the functions named are those the module calls that are not of degree one.
    """
    with evaluated(module):
        output, found = _reached(module, names, x)
        with torch.no_grad():
            called = traced(module, x, names).functions
    rounding = float(torch.finfo(output.dtype).eps) ** 0.5
    for name, reached in zip(names, found, strict=True):
        size = max(float(part.abs().max()) for part in (output, reached))
        off = float((output - reached).abs().max()) / size if size else 0.0
        if not off < rounding:
            odd = [kind for kind in called if kind not in _HOMOGENEOUS | _LINEAR]
            return (
                f"σ(x) = σ'(x) x does not hold on the way from {name!r} to the output: f differs from V f_l + c by "
                f"{off:.1g} of its size; it calls {', '.join(odd) or 'products of what it computes'}"
            )
    return ""


def jacobians(module: nn.Module, names: Sequence[str], x: Tensor, *, caller: str) -> list[Tensor]:
    """V_l of each named layer, (sample, output, position, node), in the module's present mode.

    Raises:
        ValueError: if one is no layer, or is not called on `x`.
    """
    known = [n for n, part in module.named_modules() if is_layer(part)]
    for name in names:
        if name not in known:
            raise ValueError(f"{caller}: no Linear layer or convolution {name!r}; there are {', '.join(known)}")
    with torch.enable_grad():
        passed = traced(module, x, names, apart=True)
        missing = [name for name in names if name not in passed.activations]
        if missing:
            raise ValueError(f"{caller}: {missing[0]!r} is not called on this x")
        at = [passed.activations[name] for name in names]
        columns: list[list[Tensor]] = [[] for _ in names]
        outputs = passed.output.shape[1]
        for c in range(outputs):
            one = torch.zeros_like(passed.output)
            one[:, c] = 1.0
            found = torch.autograd.grad(passed.output, at, one, retain_graph=c + 1 < outputs, allow_unused=True)
            for column, g, f in zip(columns, found, at, strict=True):
                column.append(torch.zeros_like(f) if g is None else g)
    parts = [module.get_submodule(name) for name in names]
    return [
        torch.stack([rows_of(part, g.detach()) for g in column], 1) for part, column in zip(parts, columns, strict=True)
    ]


def _constant(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """c_l = (∂f/∂x) x + Σ_b (∂f/∂b) b at fixed f_l, (sample, output), over biases b.

    A product of the Jacobian with a vector, by differentiating vᵀJ twice: the function is linear in v.
    """
    with torch.enable_grad():
        free = {name: b.clone().requires_grad_(True) for name, b in _biases(module).items()}
        inputs = x.detach().clone().requires_grad_(True)
        called, leaf = _Called(module, free | _centred(module)), f"module.{name}"
        passed = traced(called, inputs, [leaf], apart=True, leaf=leaf)
        if passed.activations[leaf] is passed.preactivations[leaf]:
            passed = traced(called, inputs, [leaf], apart=True, leaf=leaf, bare=True)
        output, at = passed.output, [inputs, *free.values()]
        v = torch.zeros_like(output).requires_grad_(True)
        found = torch.autograd.grad(output, at, v, create_graph=True, allow_unused=True)
        inner = [(g * t.detach()).sum() for g, t in zip(found, at, strict=True) if g is not None]
        if not inner:
            return torch.zeros_like(output)
        constant = torch.autograd.grad(torch.stack(inner).sum(), v, allow_unused=True)[0]
    return torch.zeros_like(output) if constant is None else constant.detach()


class _Called(nn.Module):
    """A module called with some of its tensors replaced."""

    def __init__(self, module: nn.Module, replaced: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self._replaced = module, replaced

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = called_with(self.module, self._replaced, (x,))
        return output


def _biases(module: nn.Module) -> dict[str, Tensor]:
    """Biases by name; that of BatchNorm with its running mean in it, β − γ μ / σ."""
    found = {name: p.detach() for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias"}
    for name, norm in _norms(module).items():
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        found[f"{name}bias"] = (norm.bias - norm.weight * mean / (variance + norm.eps).sqrt()).detach()
    return found


def _centred(module: nn.Module) -> dict[str, Tensor]:
    """Running means of zero, by name, for those that `_biases` holds."""
    means = {name: norm.running_mean for name, norm in _norms(module).items()}
    return {f"{name}running_mean": torch.zeros_like(mean) for name, mean in means.items() if mean is not None}


def _norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers with running statistics and parameters, by the prefix of their parameters' names."""
    kind = nn.modules.batchnorm._BatchNorm
    parts = {f"{name}." if name else "": part for name, part in module.named_modules() if isinstance(part, kind)}
    return {name: part for name, part in parts.items() if part.running_mean is not None and part.affine}


def _at_output(module: nn.Module, name: str, x: Tensor, jacobian: Tensor, error: Tensor) -> Tensor:
    """D_l V_lᵀ e: Vᵀe, at the activation, carried back to the layer's output; (sample, position, node)."""
    part = module.get_submodule(name)
    with torch.enable_grad():
        passed = traced(module, x, [name], apart=True)
        z, f = passed.preactivations[name], passed.activations[name]
        at = torch.einsum("scpn,sc->spn", jacobian, error)
        if f is z:
            return at
        shaped = at.mT.reshape(f.shape) if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else at.reshape(f.shape)
        return rows_of(part, torch.autograd.grad(f, z, shaped)[0].detach())
