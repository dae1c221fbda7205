"""The gradient of every sample's loss in every parameter, and its norm.

Three methods, each compared with plain autograd before it is used (`assumptions`).  Gradients of Linear and Conv2d
layers factor: with f the layer's input and g the gradient at its output, the gradient of the weight is Σ_t g_t f_tᴴ
over positions t, and its norm follows from f and g alone.  Other parameters go through ``vmap(grad(functional_call))``.
Where that differs from plain autograd, or torch refuses it, there is one backward pass per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never, overload

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from tsdyn.derivatives import labels
from tsdyn.derivatives.assumptions import ALONE, MEMORY, Asked, Loss, Tree, agree, agree_by_name, asked, comparable, log
from tsdyn.memory import refuse_beyond
from tsdyn.networks.network import Network


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients of one layer's parameters, stored as the two factors f and g of their product.

    Attributes:
        inputs: f, (sample, position, input); of a convolution its patches, with groups counted as samples.
        gradients: g, (sample, position, output): the gradient of each sample's loss at the layer's output.
        weight_shape: Shape of the weight.
        groups: Number of groups of a convolution; 1 for a linear layer.
        bias: Whether the layer has a bias.
    """

    inputs: Tensor
    gradients: Tensor
    weight_shape: torch.Size
    groups: int
    bias: bool

    def weight(self) -> Tensor:
        """Gradient of the weight, Σ_t g_t f_tᴴ, (sample, *weight_shape)."""
        if self.inputs.shape[1] == 1:
            product = self.gradients.mT * self.inputs.conj()
        else:
            product = torch.bmm(self.gradients.mT, self.inputs.conj())
        return product.view(-1, *self.weight_shape)

    def bias_gradient(self) -> Tensor:
        """Gradient of the bias, Σ_t g_t, (sample, output)."""
        return self.gradients.sum(1).view(-1, self.weight_shape[0])

    def squared_norms(self, *, weight: bool = True, bias: bool = True) -> Tensor:
        """Squared norm of each sample's gradient, (sample,), in at least float32.

        For one position ‖f‖² ‖g‖².  For more, Σ_tt' (f_t · f_t')(g_t · g_t') where that is cheaper than forming the
        gradient, unless the terms cancel to a hundredth of their size, which would cost digits.
        """
        f, g = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.inputs, self.gradients))
        total = torch.zeros(len(f) // self.groups, dtype=g.real.dtype, device=g.device)
        if weight:
            _, positions, inputs = f.shape
            outputs = g.shape[2]
            squares = None
            if positions == 1:
                squares = _square(f).sum((1, 2)) * _square(g).sum((1, 2))
            elif positions * (inputs + outputs) <= inputs * outputs:
                gram = (torch.bmm(f, f.mH) * torch.bmm(g, g.mH).conj()).real
                squares = gram.sum((1, 2))
                if bool((squares < gram.abs().sum((1, 2)) / 100).any()):
                    squares = None
            if squares is None:
                squares = _square(torch.bmm(g.mT, f.conj())).sum((1, 2))
            total = total + squares.view(-1, self.groups).sum(1)
        if bias and self.bias:
            total = total + _square(g.sum(1).view(-1, self.weight_shape[0])).sum(1)
        return total

    def combined(self, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Σ_i c_i g_i by kind ("weight", "bias"), each as (sum, size of its terms), without forming any g_i."""
        inputs, outputs = self.inputs.shape[-1], self.gradients.shape[-1]
        f = (
            self.inputs.reshape(-1, self.groups, self.inputs.shape[1], inputs)
            .transpose(0, 1)
            .reshape(self.groups, -1, inputs)
        )
        g = self.gradients.view(-1, self.groups, self.gradients.shape[1], outputs) * weights.to(
            self.gradients.dtype
        ).view(-1, 1, 1, 1)
        g = g.transpose(0, 1).reshape(self.groups, -1, outputs)
        size = torch.linalg.vector_norm(g, dim=1).max()
        found = {
            "weight": (
                torch.bmm(g.mT, f.conj()).view(self.weight_shape),
                size * torch.linalg.vector_norm(f, dim=1).max(),
            )
        }
        if self.bias:
            found["bias"] = (g.sum(1).flatten(), size * f.shape[1] ** 0.5)
        return found

    def row(self, sample: int) -> Factors:
        """The factors of one sample."""
        of = slice(sample * self.groups, (sample + 1) * self.groups)
        return Factors(self.inputs[of], self.gradients[of], self.weight_shape, self.groups, self.bias)


def _square(values: Tensor) -> Tensor:
    return values.real.square() + values.imag.square() if values.is_complex() else values.square()


@overload
def per_sample_gradients(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: Literal[False] = False,
) -> dict[str, Tensor]: ...
@overload
def per_sample_gradients(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: Literal[True],
) -> xr.Dataset: ...
def per_sample_gradients(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: bool = False,
) -> dict[str, Tensor] | xr.Dataset:
    """Gradient of every sample's loss in every trainable parameter: name → (sample, *parameter).

    Equal to ``torch.autograd.grad(loss(module(x[i:i+1]), y[i:i+1]), ...)`` to rounding, with its convention for complex
    parameters (conjugates).

    Args:
        module: Deterministic, its samples independent; a Network counts as its ``to_torch()``.
        loss: ``loss(output, target)`` of a batch of one → scalar.
        x: (sample, ...): a tensor or array, or a tuple, list or dict of them.  A tuple becomes the module's arguments
            and a dict its keywords if its forward accepts them so, otherwise its single argument.
        y: (sample, ...), or such a structure; None is handed to the loss as it is.
        names: Names of the requested parameters; all that require a gradient if not given.
        memory: Limit on the bytes of one chunk of samples, besides the result.
        labelled: Whether to return a Dataset over the network's own layers and nodes and the samples, whose labels are
            those of `x` if that is a DataArray (`tsdyn.derivatives.labels`).

    Raises:
        ValueError: for a module without per-sample gradients (the way out is named), unknown names, an empty batch.
        MemoryError: before it starts, if the result does not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from tsdyn import derivatives
        >>> module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        >>> x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        >>> loss = lambda output, target: 0.5 * (output - target).square().sum()
        >>> {name: tuple(g.shape) for name, g in derivatives.per_sample_gradients(module, loss, x, y).items()}
        {'0.weight': (6, 4, 3), '0.bias': (6, 4), '2.weight': (6, 2, 4), '2.bias': (6, 2)}
    """
    caller = "per_sample_gradients"
    if labelled:
        names = None if names is None else list(names)
        plain = (labels.unlabelled(each) for each in (x, y))
        slopes = per_sample_gradients(module, loss, *plain, names=names, memory=memory)
        return labels.in_parameters(slopes, module, ("sample",), labels.of_samples(x), "gradient of the sample's loss")
    with asked(caller, module, x, y, names=names) as one:
        _refuse_nothing(one)
        size = one.count * sum(p.nbytes for p in one.parameters.values())
        refuse_beyond(caller, size, one.device, "ask for fewer samples or names, or for per_sample_gradient_norms")
        ways = _Ways(one, loss, memory)
        found: dict[str, list[Tensor]] = {name: [] for name in one.parameters}
        for factors, rest in ways.chunks():
            for layer, factor in factors.items():
                values: dict[_Kind, Callable[[], Tensor]] = {"weight": factor.weight, "bias": factor.bias_gradient}
                for kind, value in values.items():
                    if _joined(layer, kind) in found:
                        found[_joined(layer, kind)].append(value())
            for gradients in rest:
                for name, gradient in gradients.items():
                    found[name].append(gradient)
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def factored_gradients(module: nn.Module | Network, loss: Loss, x: Tree, y: Tree = None) -> dict[str, Factors]:
    """Per-sample gradients of Linear and Conv2d layers as `Factors`, by layer name, without multiplying them out.

    Layers whose gradient is not a product of one input and one output gradient are left out, and the log names them:
    layers that are called more than once, share a parameter, or whose calls do not have one row per sample.

    Raises:
        ValueError: as `per_sample_gradients`.
    """
    caller = "factored_gradients"
    with asked(caller, module, x, y) as one:
        _refuse_nothing(one)
        return _Ways(one, loss, MEMORY).factors(slice(0, one.count))


@overload
def per_sample_gradient_norms(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: Literal[False] = False,
) -> Tensor: ...
@overload
def per_sample_gradient_norms(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: Literal[True],
) -> xr.Dataset: ...
def per_sample_gradient_norms(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
    labelled: bool = False,
) -> Tensor | xr.Dataset:
    """Euclidean norm of every sample's gradient over the named parameters, (sample,), in at least float32.

    Gradients of Linear and Conv2d layers are never formed; those of other parameters are, in chunks of `memory` bytes.

    Args:
        module, loss, x, y, names, memory: As `per_sample_gradients`.
        labelled: Whether to return a Dataset of ``gradient_norm`` (sample,).

    Raises:
        ValueError: as `per_sample_gradients`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from tsdyn import derivatives
        >>> module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        >>> x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        >>> loss = lambda output, target: 0.5 * (output - target).square().sum()
        >>> derivatives.per_sample_gradient_norms(module, loss, x, y).shape
        torch.Size([6])
    """
    caller = "per_sample_gradient_norms"
    if labelled:
        plain = (labels.unlabelled(each) for each in (x, y))
        every = per_sample_gradient_norms(module, loss, *plain, names=names, memory=memory)
        return labels.single("gradient_norm", every, ("sample",), labels.of_samples(x), "norm of the sample's gradient")
    with asked(caller, module, x, y, names=names) as one:
        _refuse_nothing(one)
        result = []
        for factors, rest in _Ways(one, loss, memory).chunks():
            norms = [
                _norms_of_factors(factor, **{kind: _joined(layer, kind) in one.parameters for kind in _KINDS})
                for layer, factor in factors.items()
            ]
            others = [_norms(gradients) for gradients in rest]
            norms += [torch.cat(others)] if others else []
            dtype = torch.promote_types(one.dtype, torch.float32).to_real()
            result.append(torch.linalg.vector_norm(torch.stack([n.double() for n in norms]), dim=0).to(dtype))
        return torch.cat(result)


def _norms_of_factors(factors: Factors, *, weight: bool, bias: bool) -> Tensor:
    """Norm of each sample's gradient; where squares overflow or vanish, again in float64 with entries scaled to one."""
    squares = factors.squared_norms(weight=weight, bias=bias)
    limits = torch.finfo(squares.dtype)
    if bool(((squares > limits.tiny / limits.eps**2) & (squares < limits.max)).all()):
        return squares.sqrt()
    largest = [t.abs().reshape(len(squares), -1).amax(1).double() for t in (factors.inputs, factors.gradients)]
    scales = [torch.where((most > 0) & most.isfinite(), most, torch.ones_like(most)) for most in largest]
    f, g = (
        t.to(torch.promote_types(t.dtype, torch.float64)) / scale.repeat_interleave(factors.groups).view(-1, 1, 1)
        for t, scale in zip((factors.inputs, factors.gradients), scales, strict=True)
    )
    scaled = Factors(f, g, factors.weight_shape, factors.groups, factors.bias)
    of_weight = scaled.squared_norms(weight=weight, bias=False).sqrt() * scales[0] * scales[1]
    return torch.hypot(of_weight, scaled.squared_norms(weight=False, bias=bias).sqrt() * scales[1])


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Norm of each sample's gradient over all parameters, in float64, scaled by its largest entry against overflow."""
    rows = [g.reshape(len(g), -1).abs() for g in gradients.values() if g.numel()]
    most = torch.stack([r.amax(1).double() for r in rows]).amax(0)
    scale = torch.where((most > 0) & most.isfinite(), most, torch.ones_like(most))
    squares = [(r.double() / scale[:, None]).square().sum(1) for r in rows]
    return torch.stack(squares).sum(0).sqrt() * scale


def _refuse_nothing(one: Asked) -> None:
    if not one.parameters:
        raise ValueError(f"{one.caller}: {one.name} has no parameter that requires a gradient")


#: The parameters of a layer that is differentiated by factors.
_Kind: TypeAlias = Literal["weight", "bias"]
_KINDS: tuple[_Kind, ...] = ("weight", "bias")


def _joined(layer: str, kind: _Kind) -> str:
    return f"{layer}.{kind}".lstrip(".")


# --- the three ways ------------------------------------------------------------------------------------------

Calls: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]


class _Ways:
    """Per-sample gradients by the fastest of the three methods that agrees with plain autograd."""

    def __init__(self, one: Asked, loss: Loss, memory: int) -> None:
        self._one, self._loss, self._memory = one, loss, memory
        self._alone = one.examine(loss)
        count = one.count
        middle = int(torch.randint(count, (), generator=torch.Generator().manual_seed(count), device="cpu"))
        self._right = {i: one.plain(loss, i) for i in list(dict.fromkeys([0, count - 1, middle]))[:ALONE]}
        exact = comparable(one.parameters.values())
        self._layers, self._chunk = self._plan() if exact else ([], count)
        self._vmap = exact and count > 1
        if not exact:
            self._say("16 bits are too few to compare ways", "one backward pass per sample")

    def _say(self, reason: str, instead: str) -> None:
        log.warning("%s: %s: %s; %s instead", self._one.caller, self._one.name, reason, instead)

    def _plan(self) -> tuple[list[str], int]:
        """Names of the layers whose gradient may factor, and samples per chunk, from one sample's forward pass."""
        shared = [id(p) for _, p in self._one.module.named_parameters(remove_duplicate=False)]
        names = [
            name
            for name, part in self._one.module.named_modules()
            if _factors_as(part)
            and any(_joined(name, n) in self._one.parameters for n, _ in part.named_parameters(recurse=False))
            and all(shared.count(id(p)) == 1 for p in part.parameters())
        ]
        _, calls = self._pass(self._one.some(slice(0, 1))[0], names)
        once = [name for name in names if len(calls[name]) == 1]
        numbers = sum(
            calls[n][0][0].numel() * _patch(self._one.module.get_submodule(n)) + calls[n][0][1].numel() for n in once
        )
        return once, max(1, self._memory // max(1, 4 * numbers * self._one.dtype.itemsize))

    def chunks(self) -> Iterator[tuple[dict[str, Factors], Iterator[dict[str, Tensor]]]]:
        """Per chunk of samples: the factors by layer, and the gradients of the parameters that do not factor."""
        count = self._one.count
        for start in range(0, count, self._chunk):
            part = slice(start, min(start + self._chunk, count))
            factors = self.factors(part)
            factored = {_joined(layer, kind) for layer in factors for kind in _KINDS}
            yield factors, self._rest(part, [n for n in self._one.parameters if n not in factored])

    # --- layers that factor ----------------------------------------------------------------------------------

    def factors(self, part: slice) -> dict[str, Factors]:
        """Factors by layer of those that agree with plain autograd; the others are not tried again."""
        if not self._layers:
            return {}
        try:
            found = self._factors(part)
            wrong = [name for name in self._layers if name not in found] + self._wrong(part, found)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            self._say(f"factors fail ({_first_line(error)})", "general derivatives")
            self._layers = []
            return {}
        if wrong:
            self._say(f"the gradient of {', '.join(wrong)} does not factor", "general derivatives")
            self._layers = [name for name in self._layers if name not in wrong]
        return {name: found[name] for name in self._layers}

    def _factors(self, part: slice) -> dict[str, Factors]:
        inputs, targets = self._one.some(part)
        output, calls = self._pass(inputs, self._layers)
        count = part.stop - part.start
        losses = self._one.losses_of(self._loss, self._one.rows(output, self._alone, count), targets)
        names = [name for name in self._layers if len(calls[name]) == 1]
        gradients = self._one.gradients(losses.sum(), [calls[name][0][1] for name in names])
        found = {}
        for name, g in zip(names, gradients, strict=True):
            factor = _factor(self._one.module.get_submodule(name), calls[name][0][0], g)
            if len(factor.inputs) == len(factor.gradients) == count * factor.groups:
                found[name] = factor
        return found

    def _wrong(self, part: slice, found: dict[str, Factors]) -> list[str]:
        """Layers whose factors disagree with plain autograd, randomly combined over all samples or for some alone."""
        weights = _random_weights(part)
        asked_for = {layer: [k for k in _KINDS if _joined(layer, k) in self._one.parameters] for layer in found}
        names = [_joined(layer, kind) for layer, kinds in asked_for.items() for kind in kinds]
        right = self._one.combined(self._loss, part, self._alone, weights, names)
        wrong = []
        for layer, factor in found.items():
            sums = factor.combined(weights.to(factor.gradients.device))
            good = all(agree(*sums[kind][:1], right[_joined(layer, kind)], sums[kind][1]) for kind in asked_for[layer])
            for i in self._right.keys() & set(range(part.start, part.stop)):
                own = factor.row(i - part.start)
                size = own.gradients.abs().max() * own.inputs.shape[1] ** 0.5
                for kind in asked_for[layer]:
                    match kind:
                        case "weight":
                            value, scale = own.weight()[0], size * own.inputs.abs().max()
                        case "bias":
                            value, scale = own.bias_gradient()[0], size
                        case other:
                            assert_never(other)
                    good = good and agree(value, self._right[i][_joined(layer, kind)], scale)
            if not good:
                wrong.append(layer)
        return wrong

    def _pass(self, inputs: Tree, names: Iterable[str], *, clone: bool = False) -> tuple[Tree, Calls]:
        """Forward pass that keeps input and output of the named layers at each call, before the user's own hooks run.

        With `clone`, layers hand on a copy of their output, for modules that change it in place afterwards.
        """
        calls: Calls = {name: [] for name in names}
        versions: list[tuple[str, Tensor, int, bool]] = []

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, given: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> Tensor:
                value = given[0] if given else keywords["input"]
                versions.extend([(name, value, value._version, False), (name, output, output._version, True)])
                if output.requires_grad:  # without it the call ran under no_grad and contributes no gradient
                    calls[name].append((value.detach(), output))
                return output.clone() if clone else output

            return hook

        handles = []
        try:
            for name in calls:
                part = self._one.module.get_submodule(name)
                handles.append(part.register_forward_hook(keep(name), prepend=True, with_kwargs=True))
            output = self._one.call(inputs)
        finally:
            for handle in handles:
                handle.remove()
        moved = [(name, of_output) for name, tensor, version, of_output in versions if tensor._version != version]
        if not clone and any(of_output for _, of_output in moved):
            return self._pass(inputs, list(calls), clone=True)
        for name, _ in moved:
            calls[name] = []
        return output, calls

    # --- all others ------------------------------------------------------------------------------------------

    def _rest(self, part: slice, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Gradients of the named parameters in chunks of samples, by vmap or by one backward pass per sample."""
        if not names:
            return
        size = 4 * sum(self._one.parameters[n].nbytes for n in names)
        step = max(1, self._memory // max(1, size))
        for start in range(part.start, part.stop, step):
            yield self._general(slice(start, min(start + step, part.stop)), names)

    def _general(self, part: slice, names: Sequence[str]) -> dict[str, Tensor]:
        if self._vmap:
            try:
                found = self._by_vmap(part, names)
                if self._agrees(part, found):
                    return found
                reason = "vmap(grad) differs from plain autograd"
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                reason = f"vmap(grad) fails ({_first_line(error)})"
            self._say(reason, "one backward pass per sample")
            self._vmap = False
        rows = [self._right.get(i) or self._one.plain(self._loss, i) for i in range(part.start, part.stop)]
        return {name: torch.stack([row[name] for row in rows]) for name in names}

    def _by_vmap(self, part: slice, names: Sequence[str]) -> dict[str, Tensor]:
        chosen = {n: self._one.parameters[n].detach() for n in names}
        inputs, targets = self._one.some(part)

        def one(free: dict[str, Tensor], sample: Tree, target: Tree) -> Tensor:
            sample, target = (tree_map(_batch_of_one, tree) for tree in (sample, target))
            return self._loss(self._one.call_with(free, sample), target)

        dims = [tree_map(lambda t: 0 if isinstance(t, Tensor) else None, tree) for tree in (inputs, targets)]
        found: dict[str, Tensor] = vmap(grad(one), (None, *dims))(chosen, inputs, targets)
        return found

    def _agrees(self, part: slice, found: dict[str, Tensor]) -> bool:
        right = {i: r for i, r in self._right.items() if part.start <= i < part.stop}
        most = part.start + int(_norms(found).nan_to_num(0, 0, 0).argmax())
        right[most] = self._right.get(most) or self._one.plain(self._loss, most)
        for i, gradients in right.items():
            own = {name: g[i - part.start] for name, g in found.items()}
            if not agree_by_name(own, {name: gradients[name] for name in found}):
                return False
        weights = _random_weights(part)
        combined = {n: torch.einsum("s,s...->...", weights.to(g), g) for n, g in found.items()}
        return agree_by_name(combined, self._one.combined(self._loss, part, self._alone, weights, list(found)))


def _batch_of_one(leaf: Any) -> Any:
    return leaf[None] if isinstance(leaf, Tensor) else leaf


def _random_weights(part: slice) -> Tensor:
    draw = torch.Generator().manual_seed(part.start + 1)
    return torch.randn(part.stop - part.start, generator=draw, dtype=torch.float64, device="cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]


def _factors_as(part: nn.Module) -> bool:
    if type(part) is nn.Linear:
        return True
    return type(part) is nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str)


def _patch(layer: nn.Module) -> int:
    return int(np.prod(layer.kernel_size)) if isinstance(layer, nn.Conv2d) else 1


def _factor(layer: nn.Module, f: Tensor, g: Tensor) -> Factors:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Conv2d):
        groups, samples = layer.groups, len(f)
        patches = F.unfold(f, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        patches = patches.reshape(samples * groups, -1, patches.shape[-1]).mT
        g = g.flatten(2).reshape(samples * groups, -1, patches.shape[1]).mT
        return Factors(patches, g, weight.shape, groups, layer.bias is not None)
    return Factors(
        f.reshape(len(f), -1, f.shape[-1]), g.reshape(len(g), -1, g.shape[-1]), weight.shape, 1, layer.bias is not None
    )
