"""Per-sample gradients by one backward pass over a batch, where the graph of that pass proves that they factor.

Three things must hold.  Samples keep apart from the inputs to the outputs (`graph.rows_of`).  Each parameter is used
once, by the one call of the layer that holds it, so that its gradient is that layer's product of what it was given and
of the gradient at its output.  And the loss sees the parameters through the outputs alone.  Of modules that are not
built of torch's own parts a few samples are compared with plain autograd as well, since what is detached leaves no
trace in a graph.  Whatever is not proved is left to `per_sample`'s other ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tsdyn.derivatives import graph
from tsdyn.derivatives.agreement import agree, agree_by_name, comparable
from tsdyn.derivatives.assumptions import Asked, Loss, Tree, mapped
from tsdyn.derivatives.factors import Convolved, Factors, Held, Scaled
from tsdyn.derivatives.straight import straight
from tsdyn.engine import convolution

#: Layers whose gradients are formed of their input and the gradient at their output.
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
#: Samples that are compared with plain autograd if the module is not known.
_ALONE = 2

Calls: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]


def joined(layer: str, kind: str) -> str:
    """Name of a layer's parameter."""
    return f"{layer}.{kind}".lstrip(".")


def called(
    one: Asked, inputs: Tree, names: Iterable[str], *, clone: bool = False, compiled: bool = False
) -> tuple[Tree, Calls]:
    """Forward pass that keeps input and output of the named layers at each call, before the user's own hooks run.

    With `clone`, layers hand on a copy of their output, for modules that change it in place afterwards.  With
    `compiled`, convolutions are the engine's where that is faster; those layers' parameters have no gradients then.
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

    handles, replaced = [], []
    try:
        for name in calls:
            part = one.module.get_submodule(name)
            handles.append(part.register_forward_hook(keep(name), prepend=True, with_kwargs=True))
            if compiled and isinstance(part, nn.Conv2d):
                part.forward = functools.partial(_convolved, part)  # type: ignore[method-assign]
                replaced.append(part)
        output = one.call(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for part in replaced:
            vars(part).pop("forward", None)
    moved = [(name, of_output) for name, tensor, version, of_output in versions if tensor._version != version]
    if not clone and any(of_output for _, of_output in moved):
        return called(one, inputs, list(calls), clone=True, compiled=compiled)
    for name, _ in moved:
        calls[name] = []
    return output, calls


def walked(one: Asked, inputs: Tree, names: Container[str]) -> tuple[Tensor, Calls]:
    """As `called`, of a module that is known: its parts are called one after another, without hooks."""
    args, keywords = one.arguments(inputs)
    (value,) = (*args, *keywords.values())
    calls: Calls = {}
    for name, part in graph.steps(one.module):
        given = value.clone() if getattr(part, "inplace", False) else value
        value = _convolved(part, given) if isinstance(part, nn.Conv2d) else part.forward(given)
        if name in names:
            calls.setdefault(name, []).append((given.detach(), value))
    return value, calls


def _convolved(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What a layer of torch's own class gives, by compiled code where that is faster."""
    if graph.unwatched() and convolution.pays(layer, inputs):
        return convolution.of_samples(layer, inputs)
    return type(layer).forward(layer, inputs)


class Proven:
    """A batch's gradients by layer, in parts of `chunk` samples; made by `proven`."""

    def __init__(self, one: Asked, loss: Loss, layers: dict[str, nn.Module]) -> None:
        self._one, self._loss, self._layers = one, loss, layers
        self._known = one.known
        self._first: tuple[slice, dict[str, Held]] | None = None
        self._alone: Tree = None
        self._steady = False
        self.chunk = 1

    def begin(self, memory: int) -> bool:
        """Try the first part; False if it is not proved, and then nothing of it is used."""
        one = self._one
        right = {}
        if self._connected():
            linear = [layer for layer in self._layers.values() if isinstance(layer, nn.Linear)]
            numbers = sum(sum(layer.weight.shape) for layer in linear)
        else:
            first, target = one.some(slice(0, 1))
            try:
                if self._known:
                    with torch.no_grad():
                        self._alone, calls = walked(one, first, self._layers)
                else:
                    self._alone, calls = called(one, first, self._layers)
            except RuntimeError:
                return False  # another way tells whether it takes several samples only
            if any(len(each) != 1 for each in calls.values()):
                return False
            if not self._known:
                right = {0: one.slopes(one.value(self._loss, self._alone, target))}
                one.refuse_moved(lambda: one.call(first))
            numbers = sum(f.numel() + z.numel() for ((f, z),) in calls.values())
        most = max(1, memory // max(1, 2 * numbers * one.dtype.itemsize))
        self.chunk = -(-one.count // -(-one.count // most))  # parts of nearly equal size
        part = slice(0, self.chunk)
        found = self._tried(part)
        if found is None:
            return False
        self._first = part, found
        return self._known or self._agrees(found, right)

    def _connected(self) -> bool:
        """Whether the module is known, and of vectors only: one sample alone then tells nothing more of its shapes."""
        vectors = isinstance(self._one.inputs, Tensor) and self._one.inputs.ndim == 2
        kinds = {type(part) for _, part in graph.steps(self._one.module)} if self._known and vectors else {nn.Flatten}
        return kinds.isdisjoint((nn.Flatten, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d))

    def of(self, part: slice) -> dict[str, Held] | None:
        """Gradients by layer of some samples; None if they are not proved."""
        first, self._first = self._first, None
        return first[1] if first is not None and first[0] == part else self._tried(part)

    def _tried(self, part: slice) -> dict[str, Held] | None:
        try:
            return self._passed(part)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return None  # another way works, or raises its own error

    def _passed(self, part: slice) -> dict[str, Held] | None:
        one, count = self._one, part.stop - part.start
        given, targets = one.some(part)
        output: Tree
        if self._known:
            inputs = given
            output, calls = walked(one, inputs, self._layers)
        else:
            inputs = mapped(lambda t: t.detach().requires_grad_(True), given)
            output, calls = called(one, inputs, self._layers, compiled=True)
        proof = None if self._known else graph.rows_of(tree_leaves(output), tree_leaves(inputs), count)
        if proof is None and not self._known:
            return None
        outputs = []
        for name, layer in self._layers.items():
            if len(calls[name]) != 1 or (proof is not None and not proof.of(layer, calls[name][0][1])):
                return None
            outputs.append(calls[name][0][1])
        gradients = self._descended(output, outputs, targets, count)
        if gradients is None:
            return None
        held = {}
        for (name, layer), g in zip(self._layers.items(), gradients, strict=True):
            found = _held(layer, calls[name][0][0], g, count)
            if found is None:
                return None
            held[name] = found
        return held

    def _descended(self, output: Tree, at: list[Tensor], targets: Tree, count: int) -> tuple[Tensor, ...] | None:
        """Gradients of the losses of `count` samples in some tensors that their output is made of."""
        one = self._one
        if self._known and isinstance(output, Tensor) and len(output) == count:
            told = straight(self._loss, output, targets)
            if told is not None and told.sums:  # it sees no parameter, and no two samples together
                if told.squares is None:
                    return torch.autograd.grad(self._loss(output, targets), at)
                return torch.autograd.grad(output, at, (output.detach() - targets).mul_(2 * told.squares))
        alone = output[:1].detach() if self._alone is None else self._alone
        rows = one.rows(output, alone, count)
        free = mapped(lambda t: t.detach().requires_grad_(True), rows)
        losses = one.losses_of(self._loss, free, targets)
        ends, starts = tree_leaves(rows), tree_leaves(free)
        if losses.shape != (count,) or not losses.requires_grad or one.note()[1].moved():
            return None
        if not self._steady:  # a loss that remembers its calls is refused by another way
            again = one.losses_of(self._loss, mapped(lambda t: t.detach(), rows), targets)
            if not agree(again, losses.detach()):
                return None
            self._steady = True
        if not graph.leaves_of([losses]) <= {id(t) for t in starts}:
            return None
        slopes = [
            torch.zeros_like(t) if s is None else s
            for t, s in zip(starts, torch.autograd.grad(losses.sum(), starts, allow_unused=True), strict=True)
        ]
        return torch.autograd.grad(ends, at, slopes)

    def _agrees(self, held: dict[str, Held], right: dict[int, dict[str, Tensor]]) -> bool:
        """Whether some samples of the first part are what plain autograd gives for each alone."""
        draw = torch.Generator(device="cpu").manual_seed(self.chunk)
        for i in torch.randint(self.chunk, (_ALONE,), generator=draw, device="cpu").tolist():
            if len(right) < _ALONE and i not in right:
                right[i] = self._one.plain(self._loss, i)
        for i, slopes in right.items():
            own = {}
            for name, each in held.items():
                row = each.row(i)
                for kind, value in (("weight", row.weight), ("bias", row.bias_gradient)):
                    if joined(name, kind) in slopes:
                        own[joined(name, kind)] = value()[0]
            if not agree_by_name(own, slopes):
                return False
        return True


def proven(one: Asked, loss: Loss, memory: int) -> Proven | None:
    """Gradients of all requested parameters by layer; None if it is not proved that they are."""
    module, inputs = one.module, tree_leaves(one.inputs)
    layers = {
        name: part
        for name, part in module.named_modules()
        if type(part) in _LAYERS and any(joined(name, k) in one.parameters for k in ("weight", "bias"))
    }
    # what else a layer holds, weight_norm's length and direction, say, its formulas do not know
    own = [part._parameters.get(kind) for part in layers.values() for kind in ("weight", "bias")]
    held = [p for p in own if p is not None]
    shared = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    if (
        one.count < 2
        or {id(p) for p in one.parameters.values()} - {id(p) for p in held}
        or any(shared.count(id(p)) != 1 or p._backward_hooks for p in held)
        or not all(isinstance(t, Tensor) and t.is_floating_point() for t in inputs)
        or any(p.is_complex() for p in held)
        or not comparable(held)
        or any(graph.KNOWN[type(part)] is not type(part).forward or "forward" in vars(part) for part in layers.values())
        or any(isinstance(part, nn.Conv2d) and not _plain(part) for part in layers.values())
    ):
        return None
    found = Proven(one, loss, layers)
    return found if found.begin(memory) else None


def _plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _held(layer: nn.Module, f: Tensor, g: Tensor, count: int) -> Held | None:
    """A layer's gradients from its input and the gradient at its output; None if rows are not those of samples."""
    if len(f) % count or len(g) % count:
        return None
    match layer:
        case nn.Linear():
            of_inputs, of_gradients = (t.reshape(count, -1, t.shape[-1]) for t in (f, g))
            return Factors(of_inputs, of_gradients, layer.weight.shape, 1, layer.bias is not None)
        case nn.Conv2d():
            return Convolved(f, g, layer) if len(f) == len(g) == count else None
        case nn.LayerNorm() | nn.GroupNorm():
            return None if layer.bias is None else Scaled.of(layer, f, g, count)
        case other:
            raise TypeError(f"{type(other).__name__} is none of {_LAYERS}")
