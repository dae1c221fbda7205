"""The gradient of every sample's loss in every parameter, and its norm.

Gradients of Linear and Conv2d layers factor: with f the layer's input and g the gradient at its output, the gradient of
the weight is Σ_t g_t f_tᴴ over positions t, and its norm follows from f and g alone.  Where autograd's graph proves
that the gradients of all requested parameters do so, or are those of a normalisation's affine map, one backward pass is
all there is (`proven`).  Otherwise three methods follow, each compared with plain autograd before it is used
(`assumptions`): factors, ``vmap(grad(functional_call))`` for the other parameters, and, where that differs from plain
autograd or torch refuses it, one backward pass per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, assert_never, overload

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from tsdyn.arguments import FUNCTION, MODULE, takes
from tsdyn.derivatives import labels
from tsdyn.derivatives.agreement import agree, agree_by_name, comparable
from tsdyn.derivatives.assumptions import ALONE, MEMORY, Asked, Loss, Tree, asked, log
from tsdyn.derivatives.factors import Convolved, Factors, Held, norms
from tsdyn.derivatives.proven import called, joined, proven
from tsdyn.memory import refuse_beyond
from tsdyn.networks.network import Network


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
@takes(module=MODULE, loss=FUNCTION)
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
        found: dict[str, Tensor] = {}

        def place(name: str) -> Tensor:  # made when it is first written to, of memory that factors have left
            if name not in found:
                p = one.parameters[name]
                found[name] = p.new_empty(one.count, *p.shape, requires_grad=False)
            return found[name]

        for part, factors, rest in ways.chunks():
            while factors:
                layer, factor = factors.popitem()
                if joined(layer, "weight") in one.parameters:
                    factor.weight(into=place(joined(layer, "weight"))[part])
                if joined(layer, "bias") in one.parameters:
                    place(joined(layer, "bias"))[part] = factor.bias_gradient()
                del factor
            start = part.start
            for gradients in rest:
                for name, gradient in gradients.items():
                    place(name)[start : start + len(gradient)] = gradient
                start += len(next(iter(gradients.values())))
        return {name: found[name] for name in one.parameters}


@takes(module=MODULE, loss=FUNCTION)
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
        held = _Ways(one, loss, MEMORY).factors(slice(0, one.count))
        found = {name: f.factors() if isinstance(f, Convolved) else f for name, f in held.items()}
        return {name: f for name, f in found.items() if isinstance(f, Factors)}


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
@takes(module=MODULE, loss=FUNCTION)
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
        plainly = per_sample_gradient_norms(module, loss, *plain, names=names, memory=memory)
        return labels.single(
            "gradient_norm", plainly, ("sample",), labels.of_samples(x), "norm of the sample's gradient"
        )
    with asked(caller, module, x, y, names=names) as one:
        _refuse_nothing(one)
        result = []
        for _, factors, rest in _Ways(one, loss, memory).chunks():
            found = [
                norms(factor, **{kind: joined(layer, kind) in one.parameters for kind in _KINDS})
                for layer, factor in factors.items()
            ]
            others = [_norms(gradients) for gradients in rest]
            found += [torch.cat(others)] if others else []
            dtype = torch.promote_types(one.dtype, torch.float32).to_real()
            result.append(torch.linalg.vector_norm(torch.stack([n.double() for n in found]), dim=0).to(dtype))
        return torch.cat(result)


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Norm of each sample's gradient over all parameters, in float64, scaled by its largest entry against overflow."""
    rows = [g.reshape(len(g), -1).abs() for g in gradients.values() if g.numel()]
    if not rows:  # parameters without numbers
        first = next(iter(gradients.values()))
        return first.new_zeros(len(first), dtype=torch.float64)
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


# --- the three ways ------------------------------------------------------------------------------------------


class _Ways:
    """Per-sample gradients as proved, or by the fastest method that agrees with plain autograd."""

    def __init__(self, one: Asked, loss: Loss, memory: int) -> None:
        self._one, self._loss, self._memory = one, loss, memory
        self._proven = proven(one, loss, memory)
        self._exact = comparable(one.parameters.values())
        self._vmap = self._exact and one.count > 1
        self._chunk = one.count if self._proven is None else self._proven.chunk
        if self._proven is None:
            self._layers, self._chunk = self._planned

    @cached_property
    def _alone(self) -> Tree:
        """The output of sample 0 alone; raises ValueError if the module has no per-sample derivatives."""
        return self._one.examine(self._loss)

    @cached_property
    def _right(self) -> dict[int, dict[str, Tensor]]:
        """Gradients of some samples by plain autograd."""
        _ = self._alone
        count = self._one.count
        middle = int(torch.randint(count, (), generator=torch.Generator().manual_seed(count), device="cpu"))
        return {i: self._one.plain(self._loss, i) for i in list(dict.fromkeys([0, count - 1, middle]))[:ALONE]}

    def _say(self, reason: str, instead: str) -> None:
        log.warning("%s: %s: %s; %s instead", self._one.caller, self._one.name, reason, instead)

    @cached_property
    def _planned(self) -> tuple[list[str], int]:
        """Names of the layers whose gradient may factor, and samples per chunk, from one sample's forward pass."""
        _ = self._right
        if not self._exact:
            self._say("16 bits are too few to compare ways", "one backward pass per sample")
            return [], self._one.count
        shared = [id(p) for _, p in self._one.module.named_parameters(remove_duplicate=False)]
        names = [
            name
            for name, part in self._one.module.named_modules()
            if _factors_as(part)
            and any(joined(name, n) in self._one.parameters for n, _ in part.named_parameters(recurse=False))
            and all(shared.count(id(p)) == 1 for p in part.parameters())
        ]
        _, calls = called(self._one, self._one.some(slice(0, 1))[0], names)
        once = [name for name in names if len(calls[name]) == 1]
        numbers = sum(
            calls[n][0][0].numel() * _patch(self._one.module.get_submodule(n)) + calls[n][0][1].numel() for n in once
        )
        return once, max(1, self._memory // max(1, 4 * numbers * self._one.dtype.itemsize))

    def chunks(self) -> Iterator[tuple[slice, dict[str, Held], Iterator[dict[str, Tensor]]]]:
        """Per chunk of samples: the factors by layer, to be taken out, and the gradients of all other parameters."""
        count = self._one.count
        for start in range(0, count, self._chunk):
            part = slice(start, min(start + self._chunk, count))
            factors = self.factors(part)
            factored = {joined(layer, kind) for layer in factors for kind in _KINDS}
            yield part, factors, self._rest(part, [n for n in self._one.parameters if n not in factored])

    # --- layers that factor ----------------------------------------------------------------------------------

    def factors(self, part: slice) -> dict[str, Held]:
        """Factors by layer, as proved or of those that agree with plain autograd; the others are not tried again."""
        if self._proven is not None:
            held = self._proven.of(part)
            if held is not None:
                return held
            self._proven = None
            self._layers = self._planned[0]
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
        output, calls = called(self._one, inputs, self._layers)
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
        asked_for = {layer: [k for k in _KINDS if joined(layer, k) in self._one.parameters] for layer in found}
        names = [joined(layer, kind) for layer, kinds in asked_for.items() for kind in kinds]
        right = self._one.combined(self._loss, part, self._alone, weights, names)
        wrong = []
        for layer, factor in found.items():
            sums = factor.combined(weights.to(factor.gradients.device))
            good = all(agree(*sums[kind][:1], right[joined(layer, kind)], sums[kind][1]) for kind in asked_for[layer])
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
                    good = good and agree(value, self._right[i][joined(layer, kind)], scale)
            if not good:
                wrong.append(layer)
        return wrong

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
        return Convolved(f, g, layer).factors()
    return Factors(
        f.reshape(len(f), -1, f.shape[-1]), g.reshape(len(g), -1, g.shape[-1]), weight.shape, 1, layer.bias is not None
    )
