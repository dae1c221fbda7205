"""Exact derivatives of any ``torch.nn.Module`` and any loss: per sample, per parameter, second order.

A per-sample gradient exists only where a sample's output depends on that sample alone, and is defined only where the
module is deterministic: BatchNorm and Dropout in training mode are refused.  A `loss` is called with a batch of one,
``loss(module(x[i:i+1]), y[i:i+1])``, so its reduction does not matter; every gradient here is that of one sample's
loss, not divided by the number of samples.

Parameters of Linear and Conv2d layers that are used once go a short way: with f the layer's input and g the gradient
at its output, the gradient of the weight is Σ_t g_t f_tᵀ over positions t, so that its norm needs no gradient.
All others go through ``vmap(grad(functional_call))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.func import hessian as torch_hessian
from torch.utils.hooks import RemovableHandle

from tsdyn.curvature import hessian as hessian
from tsdyn.curvature import hessian_density as hessian_density
from tsdyn.curvature import hessian_spectrum as hessian_spectrum
from tsdyn.curvature import hessian_vector_product as hessian_vector_product
from tsdyn.memory import refuse_beyond
from tsdyn.networks import Network

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: Bytes that one chunk of samples may take.
MEMORY = 64 << 20


# --- gradients of each sample --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """The gradient of one layer's parameters, per sample, as the pair it is the product of.

    Attributes:
        inputs: f, (sample, position, input); a convolution's are its patches, groups counted as samples.
        gradients: g, (sample, position, output): the gradient of each sample's loss at the layer's output.
        weight_shape: Of the weight.
        groups: Of a convolution.
        bias: Whether the layer has one.
    """

    inputs: Tensor
    gradients: Tensor
    weight_shape: torch.Size
    groups: int
    bias: bool

    def weight(self) -> Tensor:
        """Σ_t g_t f_tᵀ, (sample, *weight_shape)."""
        if self.inputs.shape[1] == 1:
            product = self.gradients.mT * self.inputs
        else:
            product = torch.bmm(self.gradients.mT, self.inputs)
        return product.view(-1, *self.weight_shape)

    def bias_gradient(self) -> Tensor:
        """Σ_t g_t, (sample, output)."""
        return self.gradients.sum(1).view(-1, self.weight_shape[0])

    def squared_norms(self, *, weight: bool = True, bias: bool = True) -> Tensor:
        """Squared norm of each sample's gradient, (sample,).

        One position: ‖f‖² ‖g‖².  More: Σ_tt' (f_t · f_t')(g_t · g_t') where that is cheaper than the gradient.
        """
        total = self.gradients.new_zeros(len(self.inputs) // self.groups)
        if weight:
            _, positions, inputs = self.inputs.shape
            outputs = self.gradients.shape[2]
            if positions == 1:
                squares = self.inputs.square().sum((1, 2)) * self.gradients.square().sum((1, 2))
            elif positions * (inputs + outputs) <= inputs * outputs:
                gram = torch.bmm(self.inputs, self.inputs.mT) * torch.bmm(self.gradients, self.gradients.mT)
                squares = gram.sum((1, 2))
            else:
                squares = torch.bmm(self.gradients.mT, self.inputs).square().sum((1, 2))
            total = total + squares.view(-1, self.groups).sum(1)
        if bias and self.bias:
            total = total + self.bias_gradient().square().sum(1)
        return total


def per_sample_gradients(
    module: nn.Module | Network,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """Gradient of every sample's loss in every parameter: name → (sample, *parameter).

    Args:
        module: Deterministic, its samples independent; a Network counts as its ``to_torch()``.
        loss: ``loss(output, target)`` of a batch of one → scalar.
        x: (sample, ...).
        y: (sample, ...).
        names: Of the parameters asked for; all that require a gradient if not given.
        memory: Bytes a chunk of samples may take, beside the result.

    Raises:
        ValueError: for a module without per-sample gradients (the way out is named), unknown names, an empty batch.
        MemoryError: before it starts, if the result does not fit.
    """
    caller = "per_sample_gradients"
    module = _module(caller, module)
    wanted = _wanted(caller, module, names)
    parameters = dict(module.named_parameters())
    size = len(x) * sum(parameters[n].numel() * parameters[n].element_size() for n in wanted)
    refuse_beyond(caller, size, x.device, "ask for fewer samples or names, or for per_sample_gradient_norms")
    layers, chunk = _plan(caller, module, loss, x, y, wanted, memory)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for part, target in _chunks(x, y, chunk):
        for layer, factors in _factors(module, loss, part, target, layers).items():
            for kind, value in (("weight", factors.weight), ("bias", factors.bias_gradient)):
                if f"{layer}.{kind}".lstrip(".") in found:
                    found[f"{layer}.{kind}".lstrip(".")].append(value())
    rest = [name for name in wanted if not found[name]]
    if rest:
        for gradients in _by_vmap(caller, module, loss, x, y, rest, memory):
            for name in rest:
                found[name].append(gradients[name])
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def factored_gradients(module: nn.Module | Network, loss: Loss, x: Tensor, y: Tensor) -> dict[str, Factors]:
    """Per-sample gradients of Linear and Conv2d layers as `Factors`, by layer name; nothing is multiplied out.

    Layers that are used more than once, or share a parameter, are left out.

    Raises:
        ValueError: as `per_sample_gradients`.
    """
    caller = "factored_gradients"
    module = _module(caller, module)
    layers, _ = _plan(caller, module, loss, x, y, _wanted(caller, module, None), MEMORY)
    return _factors(module, loss, x, y, layers)


def per_sample_gradient_norms(
    module: nn.Module | Network,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    names: Iterable[str] | None = None,
    memory: int = MEMORY,
) -> Tensor:
    """Euclidean norm of every sample's gradient over the named parameters, (sample,).

    Linear and Conv2d layers materialize no gradient; other parameters go through chunks of `memory` bytes.

    Raises:
        ValueError: as `per_sample_gradients`.
    """
    caller = "per_sample_gradient_norms"
    module = _module(caller, module)
    wanted = set(_wanted(caller, module, names))
    layers, chunk = _plan(caller, module, loss, x, y, wanted, memory)
    done: set[str] = set()
    squares = []
    for part, target in _chunks(x, y, chunk):
        total = x.new_zeros(len(part)) if x.is_floating_point() else torch.zeros(len(part), device=x.device)
        for layer, factors in _factors(module, loss, part, target, layers).items():
            kinds = {kind: f"{layer}.{kind}".lstrip(".") in wanted for kind in ("weight", "bias")}
            done |= {f"{layer}.{kind}".lstrip(".") for kind in kinds} & wanted
            total = total + factors.squared_norms(**kinds)
        squares.append(total)
    result = torch.cat(squares)
    rest = sorted(wanted - done)
    if rest:
        parts = [
            sum((g.reshape(len(g), -1).square().sum(1) for g in part.values()), start=torch.zeros((), device=x.device))
            for part in _by_vmap(caller, module, loss, x, y, rest, memory)
        ]
        result = result + torch.cat(parts)
    return result.sqrt()


def _by_vmap(
    caller: str, module: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Sequence[str], memory: int
) -> Iterator[dict[str, Tensor]]:
    """The general way, in chunks of samples."""
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fixed = {n: p.detach() for n, p in everything.items() if n not in names}
    chosen = {n: everything[n].detach() for n in names}

    def one(free: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss(functional_call(module, {**fixed, **free}, (sample[None],)), target[None])

    bytes_a_sample = 4 * sum(p.numel() * p.element_size() for p in chosen.values())
    for part, target in _chunks(x, y, max(1, memory // max(1, bytes_a_sample))):
        with _explained(caller):
            found: dict[str, Tensor] = vmap(grad(one), (None, 0, 0))(chosen, part, target)
        yield found


# --- what the module computes in one pass --------------------------------------------------------------------


def _plan(
    caller: str, module: nn.Module, loss: Loss, x: Tensor, y: Tensor, wanted: Iterable[str], memory: int
) -> tuple[list[str], int]:
    """Layers whose gradient factors, and how many samples a chunk may hold; from one sample's pass."""
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"{caller}: {len(x)} samples and {len(y)} targets; give as many of each, at least one")
    shared = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    asked = set(wanted)
    names = [
        name
        for name, part in module.named_modules()
        if _factors_as(part)
        and any(f"{name}.{n}".lstrip(".") in asked for n, _ in part.named_parameters(recurse=False))
        and all(shared.count(id(p)) == 1 for p in part.parameters())
    ]
    before = _random_state(x)
    output, calls = _pass(module, x[:1], names, clone=False)
    if not torch.equal(before, _random_state(x)):
        raise ValueError(
            f"{caller}: {type(module).__name__} draws random numbers in its forward pass, so a sample has no one "
            "gradient; make it deterministic (module.eval())"
        )
    value = loss(output, y[:1])
    if value.ndim:
        raise ValueError(
            f"{caller}: the loss of one sample has shape {tuple(value.shape)}; loss(output, target) must give a scalar"
        )
    once = [name for name in names if len(calls[name]) == 1]
    numbers = sum(calls[n][0][0].numel() * _patch(module.get_submodule(n)) + calls[n][0][1].numel() for n in once)
    return once, max(1, memory // max(1, 4 * numbers * x.element_size()))


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


Calls: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]


def _pass(module: nn.Module, x: Tensor, names: Iterable[str], *, clone: bool) -> tuple[Tensor, Calls]:
    """Forward with the input and output of the named layers kept at each call."""
    calls: Calls = {name: [] for name in names}
    versions: list[tuple[Tensor, int]] = []
    handles = []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            versions.extend([(given[0], given[0]._version), (output, output._version)])
            calls[name].append((given[0].detach(), output))
            return output.clone() if clone else output

        return hook

    try:
        handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in calls]
        with torch.enable_grad():
            output = module(x)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise ValueError(f"{type(module).__name__} returns {type(output).__name__}; a tensor (sample, ...) is needed")
    if any(tensor._version != version for tensor, version in versions):
        if clone:
            raise ValueError(
                f"{type(module).__name__} overwrites the input of a layer in place, which its gradient needs; "
                "write the operation out of place (inplace=False)"
            )
        return _pass(module, x, names, clone=True)
    return output, calls


def _factors(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Factors]:
    if not names:
        return {}
    output, calls = _pass(module, x, names, clone=False)
    with torch.enable_grad():
        losses = vmap(lambda o, t: loss(o[None], t[None]))(output, y)
    outputs = [calls[name][0][1] for name in names]
    gradients = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
    found = {}
    for name, g in zip(names, gradients, strict=True):
        f, out = calls[name][0]
        layer = module.get_submodule(name)
        found[name] = _factor(layer, f, torch.zeros_like(out) if g is None else g)
    return found


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
        patches = patches.view(samples * groups, -1, patches.shape[-1]).mT
        g = g.flatten(2).view(samples * groups, -1, patches.shape[1]).mT
        return Factors(patches, g, weight.shape, groups, layer.bias is not None)
    samples = len(f)
    return Factors(
        f.reshape(samples, -1, f.shape[-1]), g.reshape(samples, -1, g.shape[-1]), weight.shape, 1,
        layer.bias is not None,
    )  # fmt: skip


# --- Jacobians and the neural tangent kernel -----------------------------------------------------------------


def jacobian(
    module: nn.Module | Network, x: Tensor, *, wrt: str = "parameters", memory: int = MEMORY
) -> dict[str, Tensor] | Tensor:
    """Jacobian of every sample's output.

    Args:
        module: Deterministic, its samples independent.
        x: (sample, ...).
        wrt: ``"parameters"`` → name → (sample, output, *parameter); ``"inputs"`` → (sample, output, *input); the name
            of a submodule → (sample, output, *activation) at that submodule's output (V_l, for a layer's activation).
        memory: Bytes a chunk of samples may take, beside the result.

    Raises:
        ValueError: for a module without per-sample derivatives, or an unknown submodule.
        MemoryError: before it starts, if the result does not fit.
    """
    caller = "jacobian"
    module = _module(caller, module)
    if len(x) == 0:
        raise ValueError(f"{caller}: x has no samples")
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    buffers = dict(module.named_buffers())
    run = _one_output(module, buffers)
    submodules = dict(module.named_modules())
    if wrt not in ("parameters", "inputs") and wrt not in submodules:
        raise ValueError(
            f"{caller}: wrt={wrt!r}; it is 'parameters', 'inputs' or a submodule: {', '.join(filter(None, submodules))}"
        )
    with torch.no_grad(), _Tap(submodules.get(wrt)) as tap:
        outputs = module(x[:1]).numel()
        size = {"parameters": sum(p.numel() for p in parameters.values()), "inputs": x[0].numel()}.get(
            wrt, 0 if tap.seen is None else tap.seen.numel()
        )
    bytes_a_sample = outputs * size * x.element_size()
    refuse_beyond(caller, len(x) * bytes_a_sample, x.device, "ask for fewer samples")
    chunk = max(1, memory // max(1, 3 * bytes_a_sample))
    function: Callable[..., Any]
    if wrt == "parameters":
        function = vmap(jacrev(run), (None, 0), chunk_size=chunk)
    elif wrt == "inputs":
        function = vmap(jacrev(run, argnums=1), (None, 0), chunk_size=chunk)
    else:
        offset = torch.zeros_like(tap.seen[0]) if tap.seen is not None else x.new_zeros(())

        def moved(moving: Tensor, sample: Tensor) -> Tensor:
            with _Tap(submodules[wrt], moving):
                return run(parameters, sample)

        def at_rest(_: object, sample: Tensor) -> Any:
            return jacrev(moved)(offset, sample)

        function = vmap(at_rest, (None, 0), chunk_size=chunk)
    with _explained(caller):
        found: dict[str, Tensor] | Tensor = function(parameters, x)
    return found


class _Tap:
    """Reads, or moves by an offset, what a submodule gives."""

    def __init__(self, part: nn.Module | None, offset: Tensor | None = None) -> None:
        self.seen: Tensor | None = None
        self._part, self._offset = part, offset
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> _Tap:
        if self._part is not None:
            self._handle = self._part.register_forward_hook(self._hook)
        return self

    def _hook(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        self.seen = output
        return output if self._offset is None else output + self._offset

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def _one_output(module: nn.Module, buffers: Mapping[str, Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def run(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = functional_call(module, {**parameters, **buffers}, (sample[None],))[0]
        return output

    return run


def neural_tangent_kernel(
    module: nn.Module | Network, x: Tensor, x2: Tensor | None = None, *, memory: int = MEMORY
) -> Tensor:
    """Empirical NTK Θ(x, x') = J(x) J(x')ᵀ over all parameters, (sample, sample2, output, output2).

    By contraction in blocks of samples: no more than two blocks of Jacobians exist at a time.

    Raises:
        ValueError: as `jacobian`, or for outputs that are not vectors.
        MemoryError: before it starts, if the kernel does not fit.
    """
    caller = "neural_tangent_kernel"
    module = _module(caller, module)
    other = x if x2 is None else x2
    with torch.no_grad():
        output = module(x[:1])
    if output.ndim != 2:
        raise ValueError(f"{caller}: outputs have shape {tuple(output.shape)}; (sample, output) is needed")
    outputs = output.shape[1]
    parameters = sum(p.numel() for p in module.parameters())
    refuse_beyond(caller, len(x) * len(other) * outputs**2 * x.element_size(), x.device, "give x and x2 in blocks")
    block = max(1, memory // (4 * outputs * parameters * x.element_size()))

    def rows(part: Tensor) -> Tensor:
        found = jacobian(module, part, memory=memory)
        assert isinstance(found, dict)
        return torch.cat([j.reshape(*j.shape[:2], -1) for j in found.values()], 2).flatten(0, 1)

    kernel = x.new_empty(len(x), outputs, len(other), outputs)
    for start in range(0, len(x), block):
        left = rows(x[start : start + block])
        for first in range(0, len(other), block):
            if x2 is None and first < start:  # symmetric
                kernel[start : start + block, :, first : first + block] = kernel[
                    first : first + block, :, start : start + block
                ].permute(2, 3, 0, 1)
                continue
            right = left if x2 is None and first == start else rows(other[first : first + block])
            kernel[start : start + block, :, first : first + block] = (left @ right.T).view(
                -1, outputs, len(right) // outputs, outputs
            )
    return kernel.transpose(1, 2)


# --- curvature --------------------------------------------------------------------------------------------


def gauss_newton(module: nn.Module | Network, loss: Loss, x: Tensor, y: Tensor, *, memory: int = MEMORY) -> Tensor:
    """Generalized Gauss–Newton matrix E[Jᵀ (∂²ℓ/∂f²) J] over all parameters, (parameter, parameter).

    Equals the Fisher matrix where the loss is a negative log-likelihood of exponential family (squared error, cross
    entropy); the Hessian differs by the term of second derivatives of the module, which vanishes at zero residual.

    Raises:
        ValueError, MemoryError: as `jacobian`.
    """
    caller = "gauss_newton"
    module = _module(caller, module)
    count = sum(p.numel() for p in module.parameters())
    refuse_beyond(caller, 2 * count**2 * x.element_size(), x.device, "take a smaller module")
    total = x.new_zeros(count, count)
    with torch.no_grad():
        outputs = module(x[:1]).numel()
    for part, target in _chunks(x, y, max(1, memory // (4 * outputs * count * x.element_size()))):
        found = jacobian(module, part, memory=memory)
        assert isinstance(found, dict)
        rows = torch.cat([j.reshape(*j.shape[:2], -1) for j in found.values()], 2)
        with torch.no_grad():
            output = module(part)
        curvature = vmap(torch_hessian(lambda o, t: loss(o[None], t[None])))(output, target)
        total += torch.einsum("sop,soq->pq", rows, curvature @ rows)
    return total / len(x)


# --- what may be asked ---------------------------------------------------------------------------------------


def _module(caller: str, module: nn.Module | Network) -> nn.Module:
    if isinstance(module, Network):
        return module.to_torch()
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise ValueError(
                f"{caller}: {name or type(part).__name__} is BatchNorm in training mode, which mixes samples: no "
                "per-sample derivative exists; call module.eval() to use its running statistics, or use GroupNorm"
            )
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(
                f"{caller}: {name or type(part).__name__} is Dropout in training mode, which is random; "
                "call module.eval()"
            )
    return module


def _wanted(caller: str, module: nn.Module, names: Iterable[str] | None) -> list[str]:
    known = dict(module.named_parameters())
    if names is None:
        chosen = [n for n, p in known.items() if p.requires_grad]
        if not chosen:
            raise ValueError(f"{caller}: {type(module).__name__} has no parameter that requires a gradient")
        return chosen
    chosen = list(dict.fromkeys(names))
    unknown = [n for n in chosen if n not in known]
    if unknown or not chosen:
        raise ValueError(f"{caller}: no parameters {unknown}; there are {', '.join(known)}")
    return chosen


def _chunks(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


@contextmanager
def _explained(caller: str) -> Iterator[None]:
    """torch.func's refusals in the caller's words."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if "randomness" in reason:
            raise ValueError(f"{caller}: the module draws random numbers; make it deterministic (eval())") from error
        if "inplace" in reason or "in-place" in reason:
            raise ValueError(
                f"{caller}: the module works in place where torch.func cannot; use inplace=False"
            ) from error
        raise
