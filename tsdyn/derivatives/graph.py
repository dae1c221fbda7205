"""What autograd's graph of a batch's forward pass proves: that samples keep apart, and how often a tensor is used.

A tensor of the graph belongs to samples if it has one block of equal size per sample, in order, along its first axis.
`rows_of` follows this from the inputs to the outputs through operations that keep it (`_KEEPS`); an operation that is
not known proves nothing.  What enters without a gradient (indices, masks, detached numbers) does not show in a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tsdyn.engine import convolution

#: Modules whose forward pass is torch's own, deterministic, keeps its state, and treats samples one by one.
KNOWN: dict[type[nn.Module], object] = {
    kind: kind.forward
    for kind in (
        nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU,
        nn.ELU, nn.Identity, nn.Flatten, nn.LayerNorm, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d,
    )
}  # fmt: skip
#: What these modules' forward passes call, by owner and name, as torch made it.
_CALLED: list[tuple[object, str, object]] = [
    (owner, name, getattr(owner, name))
    for owner, names in (
        (F, "linear conv2d relu leaky_relu softplus gelu silu elu layer_norm group_norm avg_pool2d max_pool2d"),
        (torch, "relu tanh sigmoid layer_norm group_norm conv2d"),
        (Tensor, "flatten"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Module, "__call__ _call_impl _wrapped_call_impl"),
    )
    for name in names.split()
    if hasattr(owner, name)
]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALL = nn.Module.__call__


def known(module: nn.Module) -> bool:
    """Whether a module is built of torch's own parts (`KNOWN`) alone, as torch made them: no hook, nothing replaced.

    Nor may what these parts call be replaced, or torch be in a mode that computes something else.  Its samples then
    keep apart, whatever they are, and each part is called once where its parameters are not shared.
    """
    everywhere = torch.nn.modules.module
    if any(getattr(everywhere, f"_global{name}") for name in _HOOKS):
        return False
    if any(getattr(owner, name, None) is not as_made for owner, name, as_made in _CALLED):
        return False
    for part in module.modules():
        kind, own = type(part), vars(part)
        if kind not in KNOWN or KNOWN[kind] is not kind.forward or kind.__call__ is not _CALL:
            return False
        if "forward" in own or "_conv_forward" in own or any(own[name] for name in _HOOKS):
            return False
        if kind is nn.Conv2d and part.padding_mode != "zeros":
            return False
        if type(part) is nn.Flatten and (part.start_dim, part.end_dim) != (1, -1):
            return False
        if any(type(p) is not nn.Parameter or p._backward_hooks for p in own["_parameters"].values() if p is not None):
            return False
    return unwatched()


def unwatched() -> bool:
    """Whether no mode of torch changes what its functions do, or is told of their calls."""
    if _get_current_dispatch_mode() is not None:
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    # a default device is a mode, too, and changes none of these modules' functions
    return not torch.is_autocast_enabled("cpu") and all(isinstance(mode, DeviceContext) for mode in modes)


def steps(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that a `known` module calls, one after another, by name; one that stands twice comes twice."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for own, part in module._modules.items():
        if part is not None:
            yield from steps(part, f"{name}.{own}" if name else own)


@dataclass(frozen=True)
class Rows:
    """What is proved of a forward pass.

    Attributes:
        uses: How often a leaf of the graph is used, by `id`.
        owned: Nodes of the graph whose (first) result belongs to samples.
    """

    uses: Counter[int]
    owned: frozenset[Any]

    def of(self, layer: nn.Module, output: Tensor) -> bool:
        """Whether the output of a layer's call belongs to samples, and no parameter of the layer is used elsewhere."""
        free = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        return output.grad_fn in self.owned and all(self.uses[id(p)] == 1 for p in free)


_Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Operation:
    """A node: its operands that have a gradient, as (place, shape, whether it belongs to samples), and its result."""

    node: Any
    operands: list[tuple[int, _Shape, bool]]
    result: _Shape
    count: int

    def owned(self) -> list[tuple[int, _Shape]]:
        return [(place, shape) for place, shape, own in self.operands if own]


def _entrywise(of: _Operation) -> bool:
    """Broadcasting puts numbers of several samples together only where an operand lacks the first axis."""
    return all(len(shape) == len(of.result) and shape[0] == of.result[0] for _, shape in of.owned())


def _first_alone(of: _Operation) -> bool:
    """Whether the samples are those of the first operand alone, and its first axis remains."""
    return [place for place, _ in of.owned()] == [0] and of.owned()[0][1][0] == of.result[0]


def _second_alone(of: _Operation) -> bool:
    return [place for place, _ in of.owned()] == [1] and of.owned()[0][1][0] == of.result[0]


def _pooled(of: _Operation) -> bool:
    return _first_alone(of) and len(of.result) == 4


def _reshaped(of: _Operation) -> bool:
    (_, shape), *_ = of.owned()
    return not shape[0] % of.count and bool(of.result) and not of.result[0] % of.count


def _along(*attributes: str) -> Callable[[_Operation], bool]:
    """The rule of an operation along some axes, each of which must not be the first."""

    def kept(of: _Operation) -> bool:
        axes: list[int] = []
        for name in attributes:
            held = getattr(of.node, name)
            axes += list(held) if isinstance(held, tuple) else [held]
        ndims = {len(shape) for _, shape in of.owned()}
        if len(ndims) != 1 or not axes:
            return False
        (ndim,) = ndims
        # autograd holds a negative axis as an unsigned number
        axes = [axis - (1 << 64) if axis >= 1 << 63 else axis for axis in axes]
        return all(axis % ndim for axis in axes) and all(shape[0] == of.result[0] for _, shape in of.owned())

    return kept


def _sliced(of: _Operation) -> bool:
    (_, shape), *_ = of.owned()
    return len(shape) == len(of.result) and shape[0] == of.result[0] and (_along("_saved_dim")(of) or _whole(of))


def _whole(of: _Operation) -> bool:
    return of.node._saved_start in (0, None) and of.node._saved_step == 1


def _permuted(of: _Operation) -> bool:
    first = of.node._saved_dims[0]
    return first in (0, (1 << 64) - len(of.result))


def _normalized(of: _Operation) -> bool:
    return _first_alone(of) and len(of.node._saved_normalized_shape) < len(of.result)


def _batched(of: _Operation) -> bool:
    return len(of.result) == 3 and all(shape[0] == of.result[0] for _, shape in of.owned())


#: Operation by autograd's name → whether its result belongs to samples, in order, if operands do.
_KEEPS: dict[str, Callable[[_Operation], bool]] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Neg", "Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Softplus", "LeakyRelu", "Elu",
         "Exp", "Log", "Sqrt", "Rsqrt", "Pow", "Abs", "Erf", "Clone", "Alias", "Expand"),
        _entrywise,
    ),
    "Addmm": _second_alone,
    **dict.fromkeys(("Mm", "Linear", "Convolution", "NativeGroupNorm"), _first_alone),
    **dict.fromkeys(("AvgPool2D", "MaxPool2DWithIndices"), _pooled),
    "NativeLayerNorm": _normalized,
    "Bmm": _batched,
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias"), _reshaped),
    "Transpose": _along("_saved_dim0", "_saved_dim1"),
    "Permute": _permuted,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Split", "Unbind", "Unsqueeze", "Squeeze", "Select", "Cat"),
                    _along("_saved_dim")),
    "Slice": _sliced,
    "Mean": _along("_saved_dim"),
    "Sum": _along("_saved_dim"),
}  # fmt: skip


def rows_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor], count: int) -> Rows | None:
    """What is proved of the pass from `inputs`, leaves of `count` samples each, to `outputs`; None if nothing is."""
    given = {id(t) for t in inputs}
    uses: Counter[int] = Counter()
    owned: dict[Any, bool] = {}
    for node in _in_order([t.grad_fn for t in outputs]):
        if not node.next_functions and hasattr(node, "variable"):
            owned[node] = id(node.variable) in given
            continue
        operands = []
        for place, (source, index) in enumerate(node.next_functions):
            if source is None:
                continue
            if hasattr(source, "variable"):
                uses[id(source.variable)] += 1
            operands.append((place, tuple(source._input_metadata[index].shape), owned[source]))
        of = _Operation(node, operands, tuple(node._input_metadata[0].shape), count)
        owned[node] = bool(of.owned())
        if owned[node] and not _kept(of):
            return None
    if not all(t.grad_fn is not None and owned[t.grad_fn] and not len(t) % count for t in outputs if t.ndim):
        return None
    return Rows(uses, frozenset(node for node, own in owned.items() if own))


def _kept(of: _Operation) -> bool:
    if isinstance(of.node, convolution.OfSamples._backward_cls):
        return _first_alone(of)
    written = isinstance(of.node, torch.autograd.function.BackwardCFunction)  # by a user, under whatever name
    rule = None if written else _KEEPS.get(of.node.name().split("Backward")[0])
    try:
        return rule is not None and rule(of)
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):  # another form of the operation
        return False


def _in_order(ends: Sequence[Any]) -> list[Any]:
    """The graph's nodes, operands before results."""
    found: dict[Any, None] = {}
    entered: set[Any] = set()
    stack = [node for node in ends if node is not None]
    while stack:
        node = stack[-1]
        if node in found:
            stack.pop()
            continue
        waiting = [] if node in entered else [n for n, _ in node.next_functions if n is not None and n not in found]
        entered.add(node)
        if waiting:
            stack += waiting
        else:
            found[node] = None
            stack.pop()
    return list(found)


def leaves_of(values: Sequence[Tensor]) -> set[int]:
    """`id` of every leaf that some tensors depend on, as far as autograd sees."""
    return {id(node.variable) for node in _in_order([t.grad_fn for t in values]) if hasattr(node, "variable")} | {
        id(t) for t in values if t.is_leaf and t.requires_grad
    }
