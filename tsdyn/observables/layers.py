"""The labelled layers of any module: its Linear layers and convolutions, and what they compute on a batch.

The activation of a layer is the result of the first activation function (relu, tanh, ...) that is applied to its
output, perhaps through a normalization; if there is none, its output itself.  A layer applied at several positions
(convolutions, tokens) gives one row per sample and position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    """

    output: Any
    calls: list[str]
    preactivations: dict[str, Tensor]
    activations: dict[str, Tensor]

    def rows(self, module: nn.Module, name: str) -> Tensor:
        """Activation of a layer, (sample·position, node)."""
        return rows_of(module.get_submodule(name), self.activations[name]).flatten(0, 1)


def rows_of(part: nn.Module, values: Tensor) -> Tensor:
    """A layer's output or activation as (sample, position, node)."""
    if isinstance(part, _CONVOLUTIONS):
        return values.flatten(2).mT
    return values.reshape(len(values), -1, values.shape[-1])


class _Following(TorchFunctionMode):
    """Mode that finds the activation of each layer: it follows the layers' outputs to the first activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, tuple[str, Tensor]] = {}  # the tensor is held so that its id stays its own
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("input")
        name, _ = self.at.get(id(first), ("", None)) if isinstance(first, Tensor) else ("", None)
        result = func(*args, **(kwargs or {}))
        if name and isinstance(result, Tensor):
            kind = getattr(func, "__name__", "").removesuffix("_")
            if kind in _ACTIVATIONS and name not in self.found:
                self.found[name] = result.detach().clone()  # the module may change it in place afterwards
            elif kind in _THROUGH:
                self.at[id(result)] = (name, result)
        return result


def traced(module: nn.Module, x: Tensor, names: Sequence[str] | None = None, *, apart: bool = False) -> Pass:
    """Call a module and keep what its layers compute.

    Args:
        module: The module; its mode is as it is.
        x: The batch.
        names: Names of the layers to keep; every Linear layer and convolution if not given.
        apart: Whether each layer hands on a copy of its output, so that gradients at the output itself can be asked for
            though the module changes it in place; outputs without a gradient then get one.
    """
    kept = [n for n, part in module.named_modules() if is_layer(part)] if names is None else list(names)
    mode, calls, outputs = _Following(), list[str](), dict[str, Tensor]()

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if apart and not output.requires_grad:
                output = output.detach().requires_grad_(True)
            handed = output.clone() if apart else output
            calls.append(name)
            if name not in outputs:
                outputs[name] = output if apart else output.detach().clone()
                mode.at[id(handed)] = (name, handed)
            return handed

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in kept]
    try:
        with mode:
            output = module(x)
    finally:
        for handle in handles:
            handle.remove()
    return Pass(output, calls, outputs, {name: mode.found.get(name, outputs[name]) for name in outputs})


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context: training flags and torch's random state are restored on leaving."""
    flags = [(part, part.training) for part in module.modules()]
    state = torch.random.get_rng_state()
    try:
        module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training
        torch.random.set_rng_state(state)


def correlation(a: nn.Module, b: nn.Module, x: Tensor, *, layers: tuple[str, str]) -> Tensor:
    """Correlation over samples and positions of the nodes of a layer of `a` with those of a layer of `b`.

    The signed Pearson correlation of activations in evaluation mode, (node of a, node of b); a node of a convolution is
    a channel.  NaN for a node whose activation is constant.

    Args:
        a, b: Any modules.
        x: The batch both are called on, (sample, ...).
        layers: Names of the Linear layer or convolution of `a` and of `b`, such as ``("fc1", "body.0")``.

    Raises:
        ValueError: if there is no such layer, it is not called on `x`, or the layers have other numbers of positions.
    """
    found = []
    for module, name in zip((a, b), layers, strict=True):
        known = [n for n, part in module.named_modules() if is_layer(part)]
        if name not in known:
            raise ValueError(f"correlation: no Linear layer or convolution {name!r}; there are {', '.join(known)}")
        with evaluated(module), torch.no_grad():
            passed = traced(module, x, [name])
        if name not in passed.activations:
            raise ValueError(f"correlation: {name!r} is not called on this x")
        found.append(passed.rows(module, name))
    if len(found[0]) != len(found[1]):
        raise ValueError(
            f"correlation: {layers[0]!r} has {len(found[0]) // len(x)} positions, {layers[1]!r} "
            f"{len(found[1]) // len(x)}; nodes are compared position by position, so give layers with equally many"
        )
    return formulas.correlation(found[0], found[1])
