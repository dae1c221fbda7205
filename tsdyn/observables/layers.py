"""The labelled layers of any module: its Linear layers and convolutions, and what they compute on a batch.

The activation of a layer is the result of the first activation function (relu, tanh, ...) that is applied to its
output, perhaps through a normalization; if there is none, its output itself.  A layer applied at several positions
(convolutions, tokens) gives one row per sample and position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tsdyn.networks.activations import Erf
from tsdyn.observables import formulas

#: Functions that make an activation out of a layer's output.
_ACTIVATIONS = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "prelu",
        "rrelu",
        "tanh",
        "sigmoid",
        "gelu",
        "silu",
        "mish",
        "elu",
        "selu",
        "celu",
        "softplus",
        "softsign",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "logsigmoid",
        "tanhshrink",
        "softshrink",
        "hardshrink",
        "erf",
        "clamp",
        "clamp_min",
        "sin",
        "cos",
        "exp",
        "square",
        "pow",
        "abs",
        "threshold",
    ]
)
#: Functions through which a layer's output stays the layer's output.
_THROUGH = frozenset(
    ["batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "dropout1d", "dropout2d"]
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_layer(part: nn.Module) -> bool:
    """Whether a module is a Linear layer or a convolution."""
    return isinstance(part, (nn.Linear, *_CONVOLUTIONS))


@dataclass
class Pass:
    """One call of a module, as its layers saw it.

    Attributes:
        output: What the module returned.
        calls: Names of the layers in the order of their calls, each as often as it was called.
        preactivations: Name → the layer's output.
        activations: Name → its activation.
        functions: Names of the functions of torch that the module called, in order, each once.
        slopes: Name → derivative of the activation function at what it is applied to, if it was asked for.
    """

    output: Any
    calls: list[str]
    preactivations: dict[str, Tensor]
    activations: dict[str, Tensor]
    functions: tuple[str, ...] = ()
    slopes: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, module: nn.Module, name: str) -> Tensor:
        """Activation of a layer, (sample·position, node)."""
        return rows_of(module.get_submodule(name), self.activations[name]).flatten(0, 1)


def rows_of(part: nn.Module, values: Tensor) -> Tensor:
    """A layer's output or activation as (sample, position, node)."""
    if isinstance(part, _CONVOLUTIONS):
        return values.flatten(2).mT
    return values.reshape(len(values), -1, values.shape[-1])


@dataclass
class _Kept:
    """What hooks and the mode find in one call: see `Pass`."""

    calls: list[str] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    functions: dict[str, None] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)


class _Following(TorchFunctionMode):
    """Mode that finds the activation of each layer: it follows the layers' outputs to the first activation function.

    With `apart` the module goes on with a copy of each activation, so that gradients at the activation itself can be
    asked for though the module changes it in place; that of the layer `leaf` is then cut from what is below it.
    With `sloped` it keeps σ' of each.
    """

    def __init__(self, kept: _Kept, *, apart: bool = False, leaf: str | None = None, sloped: bool = False) -> None:
        super().__init__()
        self.kept, self._apart, self._leaf, self._sloped = kept, apart, leaf, sloped
        self._at: dict[int, tuple[str, Tensor]] = {}  # the tensor is held so that its id stays its own

    def follow(self, name: str, output: Tensor) -> None:
        self._at[id(output)] = (name, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = getattr(func, "__name__", "").removesuffix("_")
        first = args[0] if args else (kwargs or {}).get("input")
        name, _ = self._at.get(id(first), ("", None)) if isinstance(first, Tensor) else ("", None)
        unseen = self._sloped and name not in self.kept.slopes
        if isinstance(first, Tensor) and name and kind in _ACTIVATIONS and unseen:
            rest = {key: value for key, value in (kwargs or {}).items() if key != "input"}
            # before it is changed in place
            self.kept.slopes[name] = _slope(lambda z: func(z, *args[1:], **rest), first)
        result = func(*args, **(kwargs or {}))
        self.kept.functions[kind] = None
        if not name or not isinstance(result, Tensor):
            return result
        if kind in _ACTIVATIONS:
            return self.keep(name, result)
        if kind in _THROUGH:
            self.follow(name, result)
        return result

    def keep(self, name: str, activation: Tensor) -> Tensor:
        """Keep the activation of a layer if it is its first; returns what the module goes on with."""
        if name in self.kept.activations:
            return activation
        if not self._apart:
            self.kept.activations[name] = activation.detach().clone()  # the module may change it in place afterwards
            return activation
        if name == self._leaf:
            activation = activation.detach().requires_grad_(True)
        self.kept.activations[name] = activation
        return activation.clone()

    def hook(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a module that is an activation function, of several functions of torch."""
        name, _tensor = self._at.get(id(inputs[0]), ("", None)) if inputs else ("", None)
        if name and self._sloped and name not in self.kept.slopes:
            self.kept.slopes[name] = _slope(part.forward, inputs[0])
        return self.keep(name, output) if name else output


def _slope(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Derivative of a function of each entry alone, at each entry of `z`."""
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_(True)
        found: Tensor = torch.autograd.grad(function(leaf.clone()).sum(), leaf)[0]
    return found


def traced(
    module: nn.Module,
    x: Tensor,
    names: Sequence[str] | None = None,
    *,
    apart: bool = False,
    leaf: str | None = None,
    bare: bool = False,
    sloped: bool = False,
) -> Pass:
    """Call a module and keep what its layers compute.

    Args:
        module: The module; its mode is as it is.
        x: The batch.
        names: Names of the layers to keep; every Linear layer and convolution if not given.
        apart: Whether each layer hands on copies of its output and activation, so that gradients at these can be asked
            for though the module changes them in place; outputs without a gradient then get one.
        leaf: With `apart`, the layer whose activation is cut from what is below it.
        bare: Whether the leaf has no activation function, so that its output is cut.
        sloped: Whether to keep the derivatives of the layers' activation functions; 1 where a layer has none.
    """
    known = [n for n, part in module.named_modules() if is_layer(part)] if names is None else list(names)
    kept = _Kept()
    mode = _Following(kept, apart=apart, leaf=leaf, sloped=sloped)

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if apart and (not output.requires_grad or (bare and name == leaf)):
                output = output.detach().requires_grad_(True)
            handed = output.clone() if apart else output
            kept.calls.append(name)
            if name not in kept.outputs:
                kept.outputs[name] = output if apart else output.detach().clone()
                mode.follow(name, handed)
            return handed

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in known]
    handles += [part.register_forward_hook(mode.hook) for part in module.modules() if isinstance(part, Erf)]
    try:
        with mode:
            output = module(x)
    finally:
        for handle in handles:
            handle.remove()
    activations = {name: kept.activations.get(name, kept.outputs[name]) for name in kept.outputs}
    slopes = {name: kept.slopes.get(name, torch.ones_like(z)) for name, z in kept.outputs.items() if sloped}
    return Pass(output, kept.calls, kept.outputs, activations, tuple(kept.functions), slopes)


def labelled(
    module: nn.Module, x: Tensor, names: Sequence[str] | None = None, *, caller: str, whose: str = "model"
) -> tuple[str, ...]:
    """Names of the layers of a module to label 1..L, the lowest first: those given, or all as they are first called.

    Args:
        module: The module, called in evaluation mode.
        x: The batch.
        names: Names of Linear layers and convolutions; None for all that are called.
        caller, whose: Who asks and whose module it is, for error messages.

    Raises:
        ValueError: if a named one is no layer, a layer is called twice, layers share a parameter, or the module gives
            no outputs (sample, output).
    """
    known = [name for name, part in module.named_modules() if is_layer(part)]
    if names is not None and (
        wrong := [n for n in names if n not in known] or [n for n in names if list(names).count(n) > 1]
    ):
        raise ValueError(
            f"{caller}: layers: {wrong} is no Linear layer or convolution of the {whose}, or is named twice; there are "
            f"{known}"
        )
    with evaluated(module), torch.no_grad():
        passed = traced(module, x, names)
    refuse_other_outputs(passed.output, len(x), caller=caller, whose=whose)
    called = Counter(passed.calls)
    found = tuple(called) if names is None else tuple(names)
    missing = [name for name in found if name not in called]
    if missing or not found:
        raise ValueError(
            f"{caller}: {missing or 'no Linear layer or convolution'} of the {whose} is called on the probe"
        )
    if twice := [name for name in found if called[name] > 1]:
        raise ValueError(
            f"{caller}: {twice[0]} of the {whose} is called {called[twice[0]]} times in a pass; name the other layers: "
            "layers="
        )
    owner: dict[int, str] = {}
    for name in found:
        for p in module.get_submodule(name).parameters(recurse=False):
            other = owner.setdefault(id(p), name)
            if other != name:
                raise ValueError(
                    f"{caller}: {other} and {name} of the {whose} share a parameter; label one of them: layers=[...]"
                )
    return found


def refuse_other_outputs(output: Any, samples: int, *, caller: str, whose: str = "model") -> None:
    """Raise ValueError unless a module's output is (sample, output)."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != samples:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{caller}: the {whose}'s output is {shape}; (sample, output) is needed, so wrap it in a module"
        )


def weights_of(module: nn.Module, names: Sequence[str]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight, (node, input_node), and bias of each named layer, in evaluation mode.

    A weight that is computed when it is read may change the module in training mode: spectral norm's buffers move.
    """
    parts: list[Any] = [module.get_submodule(name) for name in names]
    with evaluated(module):
        return [(p.weight.detach().flatten(1), None if p.bias is None else p.bias.detach()) for p in parts]


def pulled_back(
    module: nn.Module, names: Sequence[str], x: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Σ_c u_c(x) ∂f_c(x)/∂z_l(x) at the output z_l of each named layer, (sample, position, node).

    With u = −∂J_x/∂f that is the backpropagated gradient g_l; zero for a layer that the output does not depend on.

    Args:
        module: The module; its mode is as it is.
        names: Names of the layers.
        x: The batch.
        cotangent: u, (sample, output), of the module's output.
    """
    with torch.enable_grad():
        passed = traced(module, x, names, apart=True)
        outputs = [passed.preactivations[name] for name in names]
        u = cotangent(passed.output).detach()
        found = torch.autograd.grad(passed.output, outputs, u, allow_unused=True)
    whole = [torch.zeros_like(z) if g is None else g for g, z in zip(found, outputs, strict=True)]
    return [rows_of(module.get_submodule(n), g.detach()) for n, g in zip(names, whole, strict=True)]


class UnsteadyError(ValueError):
    """A module that, called again in evaluation mode, gives other outputs or has other buffers."""


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; training flags, buffers and torch's random state are restored on leaving.

    Raises:
        UnsteadyError: if the module changed its buffers, so that what is measured depends on how often.
    """
    flags = [(part, part.training) for part in module.modules()]
    state = torch.random.get_rng_state()
    before = {name: (buffer, buffer.detach().clone()) for name, buffer in module.named_buffers()}
    moved = []
    try:
        module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training
        torch.random.set_rng_state(state)
        for name, (buffer, kept) in before.items():
            if module.get_buffer(name) is not buffer or not equal(buffer, kept):
                moved.append(name)
                with torch.no_grad():
                    buffer.copy_(kept)
                setattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer)
    if moved:
        raise UnsteadyError(
            f"{type(module).__name__} changes {', '.join(moved[:5])} when it is called in evaluation mode, so that "
            "measuring it would change what is measured (it was put back); let it do so in training mode only "
            "(self.training)"
        )


def refuse_unsteady(module: nn.Module, x: Tensor, *, caller: str, whose: str) -> None:
    """Refuse a module that gives other outputs when it is called again in evaluation mode, or changes its buffers.

    Raises:
        UnsteadyError: naming the way out.
    """
    with evaluated(module), torch.no_grad():
        one, again = module(x), module(x)
    if isinstance(one, Tensor) and not equal(one, again):
        raise UnsteadyError(
            f"{caller}: the {whose}, {type(module).__name__}, gives other outputs for the same inputs in evaluation "
            "mode, so that nothing measured of it could be repeated; let it draw random numbers, or count its calls, "
            "in training mode only (self.training)"
        )


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def correlation(
    a: nn.Module | Tensor, b: nn.Module | Tensor, x: Tensor | None = None, *, layers: tuple[str, str] | None = None
) -> Tensor:
    """Correlation over samples and positions of the nodes of a layer of `a` with those of a layer of `b`.

    The signed Pearson correlation of activations in evaluation mode, (node of a, node of b); a node of a convolution is
    a channel.  NaN for a node whose activation is constant.

    Args:
        a, b: Any modules; or activations themselves, (sample, node), and then neither `x` nor `layers`.
        x: The batch both are called on, (sample, ...).
        layers: Names of the Linear layer or convolution of `a` and of `b`, such as ``("fc1", "body.0")``.

    Raises:
        ValueError: if there is no such layer, it is not called on `x`, or the layers have other numbers of positions.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return formulas.correlation(a, b)
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module) or x is None or layers is None:
        raise ValueError(
            f"correlation: {type(a).__name__} and {type(b).__name__}; give two modules with x= and layers=(of a, of "
            "b), or two tensors of activations, (sample, node)"
        )
    found = [_activation(module, x, name) for module, name in zip((a, b), layers, strict=True)]
    if len(found[0]) != len(found[1]):
        raise ValueError(
            f"correlation: {layers[0]!r} has {len(found[0]) // len(x)} positions, {layers[1]!r} "
            f"{len(found[1]) // len(x)}; nodes are compared position by position, so give layers with equally many"
        )
    return formulas.correlation(found[0], found[1])


def _activation(module: nn.Module, x: Tensor, name: str) -> Tensor:
    known = [n for n, part in module.named_modules() if is_layer(part)]
    if name not in known:
        raise ValueError(f"correlation: no Linear layer or convolution {name!r}; there are {', '.join(known)}")
    with evaluated(module), torch.no_grad():
        passed = traced(module, x, [name])
    if name not in passed.activations:
        raise ValueError(f"correlation: {name!r} is not called on this x")
    return passed.rows(module, name)
