"""Checks of what derivatives assume about a module, on the given input, once per call.

The definition everywhere is plain autograd: sample i's gradient is ``torch.autograd.grad(loss(module(x[i:i+1]),
y[i:i+1]), parameters)``.  It exists if the module is deterministic, keeps its state when it is called, and computes
each sample's output from that sample alone; `Asked.examine` tests all three and raises where one fails.  Results of a
faster method are compared with the definition: on a few single samples, and on all of them by one random combination, Σ
c_i g_i = ∇ Σ c_i ℓ_i, which holds for a random c only if every g_i is right (Freivalds 1977).
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tsdyn.derivatives import graph
from tsdyn.derivatives.agreement import agree, comparable, tolerance
from tsdyn.derivatives.module_state import Randomness, State
from tsdyn.derivatives.unfit import explained, refuse_by_kind, refuse_odd, strided
from tsdyn.memory import keep_freed
from tsdyn.networks.any_module import called_with
from tsdyn.networks.network import Network

#: Arrays, or tuples, lists and dicts of them.
Tree: TypeAlias = Any
Loss: TypeAlias = Callable[[Any, Any], Tensor]

#: Default limit on the bytes of one chunk of samples.
MEMORY = 128 << 20
#: Number of samples in the batch that tests whether samples mix, and how many of them are also evaluated alone.
TOGETHER, ALONE = 32, 3

log = logging.getLogger("tsdyn")


def _rounding_of_batches(values: Tensor) -> float:
    """Absolute tolerance between a sample's output alone and in a batch, since batch sizes select different kernels.

    Relative to the largest entry: 1000 times `tolerance`, at most 1e-3, but at least 16 roundings (for 16-bit types).
    """
    if not (values.is_floating_point() or values.is_complex()) or not values.numel():
        return 0.0
    share = max(min(1000 * tolerance(values.dtype), 1e-3), 16 * torch.finfo(values.dtype).eps)
    return share * float(values.detach().abs().max().nan_to_num(0, 0, 0))


# --- the module and its input --------------------------------------------------------------------------------


class Asked:
    """A module and the samples at which a public function differentiates it; made by `asked`.

    Attributes:
        caller: Name of the public function, for messages.
        module: As given; a Network as its ``to_torch()``.
        name: Class name of the module, for messages.
        inputs, targets: Tensors, or tuples, lists and dicts of them, of `count` samples.
        parameters: The requested parameters by name; all that require a gradient if none are named.
        arguments: Function from inputs to (arguments, keywords) of the module.
        known: Whether the module is built of torch's own parts (`graph.known`).
    """

    def __init__(self, caller: str, module: nn.Module, x: Tree, y: Tree, names: Iterable[str] | None) -> None:
        self.caller, self.module, self.name = caller, module, type(module).__name__
        self._before: tuple[State, Randomness] | None = None
        self._guards = ExitStack()
        self._reentrant: bool | None = None  # whether it has a reentrant checkpoint; found at the first gradient
        self.known = graph.known(module)
        kept = next((p for p in module.parameters() if p.is_floating_point()), None)
        self.inputs, self.targets = (_tensors(caller, tree, kept) for tree in (x, y))
        self.arguments = _called(caller, module, self.inputs)
        self.parameters = _wanted(caller, module, names)

    @cached_property
    def count(self) -> int:
        """Number of samples; raises ValueError if inputs and targets disagree about it."""
        x, y = ({len(t) for t in tree_leaves(tree) if _sliced(t)} for tree in (self.inputs, self.targets))
        if len(x) != 1 or x == {0} or (y and y != x):
            told = [" and ".join(str(n) for n in sorted(of)) or "no" for of in (x, y)]
            raise ValueError(
                f"{self.caller}: {told[0]} samples and {told[1]} targets; give as many of each, at least one"
            )
        return int(next(iter(x)))

    @property
    def device(self) -> torch.device:
        return next(t.device for t in (*self.module.parameters(), *tree_leaves(self.inputs)) if isinstance(t, Tensor))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the result: the one that all requested parameters promote to."""
        found = None
        for p in self.parameters.values():
            found = p.dtype if found is None else torch.promote_types(found, p.dtype)
        return found or torch.get_default_dtype()

    def note(self) -> tuple[State, Randomness]:
        """The state of the module and of the random generators before anything of the user's own was called.

        Torch's own parts change neither, so of a module that is known they are noted when the loss is first called.
        From then on compiled code runs uncompiled, too.
        """
        if self._before is None:
            self._guards.enter_context(uncompiled())
            self._before = State(self.module), Randomness(self.module)
        return self._before

    def restore(self) -> None:
        """Put back what was noted."""
        with self._guards:
            for held in self._before or ():
                held.restore()

    def some(self, index: slice | Tensor) -> tuple[Tree, Tree]:
        """Inputs and targets of the samples in `index`."""
        cut = [mapped(lambda t: t[index] if _sliced(t) else t, tree) for tree in (self.inputs, self.targets)]
        return cut[0], cut[1]

    def call(self, inputs: Tree) -> Tree:
        """The module's output for `inputs`."""
        args, keywords = self.arguments(inputs)
        return self.module(*args, **keywords)

    def call_with(self, parameters: Mapping[str, Tensor], inputs: Tree) -> Tree:
        """The module's output with `parameters` in place of its own, all others detached; for torch.func."""
        args, keywords = self.arguments(inputs)
        rest = {n: p.detach() for n, p in self.module.named_parameters() if n not in parameters}
        buffers = dict(self.module.named_buffers())
        return called_with(self.module, {**rest, **buffers, **parameters}, args, keywords)

    def value(self, loss: Loss, output: Tree, targets: Tree) -> Tensor:
        """The loss; raises ValueError unless it is a real scalar."""
        self.note()
        found = loss(output, targets)
        if not isinstance(found, Tensor) or found.ndim:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self.caller}: the loss of one sample has shape {shape}; loss(output, target) must give a scalar"
            )
        if not found.is_floating_point():
            raise ValueError(f"{self.caller}: the loss is {found.dtype}; a gradient is that of a real number")
        return found

    def gradients(self, value: Tensor, wrt: Sequence[Tensor], *, again: bool = False) -> list[Tensor]:
        """Gradients of `value` in `wrt` by plain autograd; zeros where it does not depend on a tensor."""
        if not value.requires_grad:
            return [torch.zeros_like(t) for t in wrt]
        if self._reentrant:
            return self._by_backward(value, wrt, again)
        # the first graph is kept, since a reentrant checkpoint is met when a part of it is used up
        keep = again or self._reentrant is None
        try:
            found = torch.autograd.grad(value, wrt, retain_graph=keep, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error) and keep:
                self._reentrant = True
                return self._by_backward(value, wrt, again)
            raise explained(self.caller, self.name, error) from error
        self._reentrant = False
        return [torch.zeros_like(t) if g is None else strided(g.detach()) for t, g in zip(wrt, found, strict=True)]

    def refuse_detached(self, value: Tensor) -> None:
        """Raise ValueError if autograd has no graph for `value`, rather than return zeros."""
        if not value.requires_grad:
            raise ValueError(
                f"{self.caller}: the output or loss of {self.name} does not depend on what it is differentiated in, as "
                "far as autograd sees: it is detached, under no_grad, rounded, or made from something else"
            )

    def _by_backward(self, value: Tensor, wrt: Sequence[Tensor], again: bool) -> list[Tensor]:
        """Gradients through a reentrant checkpoint, which supports only ``backward``; restores ``.grad`` afterwards."""
        if not all(t.is_leaf for t in wrt):
            raise ValueError(
                f"{self.caller}: {self.name} has a reentrant checkpoint, which gives gradients of parameters and "
                "inputs alone; use checkpoint(..., use_reentrant=False)"
            )
        leaves = [*self.module.parameters(), *wrt]
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in leaves):
            raise ValueError(
                f"{self.caller}: {self.name} has a reentrant checkpoint and a parameter with a hook after accumulation,"
                " which would run; use checkpoint(..., use_reentrant=False)"
            )
        before = [p.grad for p in leaves]
        try:
            for p in leaves:
                p.grad = None
            value.backward(retain_graph=again)
            return [torch.zeros_like(t) if t.grad is None else strided(t.grad) for t in wrt]
        finally:
            for p, g in zip(leaves, before, strict=True):
                p.grad = g

    def plain(self, loss: Loss, sample: int) -> dict[str, Tensor]:
        """Gradient of one sample's loss by name, by plain autograd: the definition."""
        inputs, targets = self.some(slice(sample, sample + 1))
        return self.slopes(self.value(loss, self.call(inputs), targets))

    def slopes(self, value: Tensor) -> dict[str, Tensor]:
        """Gradient of a loss by name, by plain autograd."""
        self.refuse_detached(value)
        return dict(zip(self.parameters, self.gradients(value, list(self.parameters.values())), strict=True))

    # --- what must hold --------------------------------------------------------------------------------------

    def refuse_unsteady(self, value: Callable[[], Tree]) -> Tree:
        """Compute `value` twice and return the first; raise if they differ, draw random numbers or change the state."""
        self.note()
        first = value()
        self.refuse_moved(value)
        self._refuse_others(first, value())
        return first

    def refuse_moved(self, value: Callable[[], Tree]) -> None:
        """Raise ValueError if what was called since `note` has changed the state, or if `value` draws numbers."""
        state, randomness = self.note()
        moved = state.moved()
        if moved:
            state.restore()
            raise ValueError(
                f"{self.caller}: {moved} of {self.name} changes when the module is called, so derivatives would depend "
                "on how often it was; it was put back; call module.eval(), or switch running statistics off"
            )
        if randomness.moved() and randomness.drawn_by(value):
            raise ValueError(
                f"{self.caller}: {self.name} draws random numbers in its forward pass, or its loss does, so there is "
                "no one gradient; make it deterministic (module.eval())"
            )

    def _refuse_others(self, first: Tree, again: Tree) -> None:
        for one, other in zip(_numbers(first), _numbers(again), strict=True):
            told = one.is_floating_point() and comparable([one])
            if one.shape != other.shape or (told and not agree(other, one)):
                raise ValueError(
                    f"{self.caller}: {self.name}, or the loss, gives two values for one input, so it draws random "
                    "numbers of its own or remembers earlier calls; make it deterministic"
                )

    def examine(self, loss: Loss | None = None) -> Tree:
        """Raise ValueError if the module has no per-sample derivatives; return the output of sample 0 alone.

        Compares `ALONE` samples alone with the same in a batch, and tests that the gradient of half a batch's outputs
        in the other half's inputs is zero, as it is where samples are independent.
        """
        count = self.count
        inputs, targets = self.some(slice(0, 1))

        def both() -> Tree:
            output = self.call(inputs)
            return output, None if loss is None else self.value(loss, output, targets)

        try:
            alone = self.refuse_unsteady(both)[0]
        except RuntimeError as error:
            self._refuse_only_together(inputs, error)
            raise
        if count == 1:
            return alone
        draw = torch.Generator().manual_seed(count)
        inner = torch.randperm(count - 2, generator=draw, device="cpu")[: TOGETHER - 2] + 1
        chosen = torch.cat([torch.tensor([0, count - 1], device="cpu"), inner]).to(self.device)
        together = tree_map(
            lambda t: (
                t[chosen].detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) if _sliced(t) else t
            ),
            self.inputs,
        )
        try:
            output = self.call(together)
        except RuntimeError as error:
            raise ValueError(
                f"{self.caller}: {self.name} takes one sample alone but not {len(chosen)} together ({error}); it must "
                "take a batch, samples first"
            ) from error
        rows = self.rows(output, alone, len(chosen))
        self._refuse_other_values(rows, chosen)
        self._refuse_other_gradients(rows, [t for t in tree_leaves(together) if _sliced(t) and t.requires_grad], draw)
        return alone

    def _refuse_only_together(self, inputs: Tree, error: RuntimeError) -> None:
        """Raise ValueError if the module raises for one sample, but not for all of them."""
        with suppress(RuntimeError):
            self.call(inputs)
            return
        with suppress(RuntimeError):
            self.call(self.inputs)
            raise ValueError(
                f"{self.caller}: {self.name} takes {self.count} samples together but not one alone ({error}), so no "
                f"derivative of one sample exists{self._layout()}"
            ) from error

    def rows(self, output: Tree, alone: Tree, count: int) -> Tree:
        """A batch's output as (count, *shape), `shape` being that of one sample's output alone."""
        if isinstance(output, Tensor) and isinstance(alone, Tensor):
            return self._rows(output, alone, count)
        leaves, structure = tree_flatten(output)
        singles, structure_alone = tree_flatten(alone)
        if structure != structure_alone:
            raise ValueError(f"{self.caller}: {self.name} returns another structure for {count} samples than for one")
        return tree_unflatten([self._rows(t, one, count) for t, one in zip(leaves, singles, strict=True)], structure)

    def _rows(self, batch: Any, alone: Any, count: int) -> Any:
        if not isinstance(batch, Tensor):
            raise ValueError(
                f"{self.caller}: {self.name} returns {type(batch).__name__}; a tensor (sample, ...) is needed"
            )
        axis = sample_axis(batch, alone, count)
        if axis is not None:
            return batch.movedim(axis, 0).unsqueeze(axis + 1)
        folded = batch.ndim > 0 and len(batch) % count == 0 and batch.numel() == count * alone.numel()
        if folded or (count == 1 and batch.shape == alone.shape):
            return batch.reshape(count, *alone.shape)
        raise ValueError(
            f"{self.caller}: the output of {self.name} for {count} samples has shape {tuple(batch.shape)}, for one "
            f"{tuple(alone.shape)}: it mixes samples or has no axis for them; outputs must be (sample, ...)"
            f"{self._layout()}"
        )

    def _layout(self) -> str:
        late = [
            name or type(part).__name__
            for name, part in self.module.named_modules()
            if getattr(part, "batch_first", None) is False
        ]
        return (
            f"; {late[0]} has batch_first=False, so its first axis is time: build it with batch_first=True"
            if late
            else ""
        )

    def _refuse_other_values(self, rows: Tree, chosen: Tensor) -> None:
        """Raise if outputs of every other sample, or of some samples alone, differ from those in the batch.

        All are tried alone if the inputs have no gradient (integers), for then `_refuse_other_gradients` cannot tell.
        """
        floats = [t for t in tree_leaves(self.inputs) if _sliced(t) and (t.is_floating_point() or t.is_complex())]
        alone = min(ALONE, len(chosen)) if floats else len(chosen)
        places = torch.arange(len(chosen), device=chosen.device)
        for at in [*places[:alone].split(1), places[0::2], places[1::2]]:
            single = self.call(self.some(chosen[at])[0])
            fewer = self.rows(single, tree_map(lambda t: t[0], rows), len(at))
            for row, one in zip(_numbers(rows), _numbers(fewer), strict=True):
                if not torch.allclose(row[at], one, rtol=0, atol=_rounding_of_batches(row), equal_nan=True):
                    index = int(chosen[at[0]])
                    raise self._mixes(
                        f"output {index} is another with {len(at) - 1} others than with {len(chosen) - 1}"
                    )

    def _refuse_other_gradients(self, rows: Tree, inputs: list[Tensor], draw: torch.Generator) -> None:
        floats = [r for r in _numbers(rows) if r.requires_grad]
        if not floats or not inputs:
            return
        count = len(inputs[0])
        half = torch.randperm(count, generator=draw, device="cpu") < (count + 1) // 2
        value = sum(
            (
                (
                    r[half.to(r.device)].real
                    * torch.randn(r[half.to(r.device)].shape, generator=draw, device="cpu").to(r.real)
                ).sum()
                for r in floats
            ),
            start=torch.zeros((), device=floats[0].device, dtype=floats[0].real.dtype),
        )
        for g in self.gradients(value, inputs):
            own, others = g[half.to(g.device)].abs().max(), g[~half.to(g.device)].abs().max()
            if others > min(tolerance(g.dtype), 1e-3) * own:
                raise self._mixes("the gradient of its output for some samples in the inputs of others is not zero")

    def _mixes(self, evidence: str) -> ValueError:
        return ValueError(
            f"{self.caller}: {self.name} mixes samples ({evidence}), so no derivative of one sample exists"
            f"{self._layout()}"
        )

    # --- comparing a shorter way with the definition ---------------------------------------------------------

    def losses(self, loss: Loss, inputs: Tree, targets: Tree, alone: Tree) -> Tensor:
        """Loss of every sample from one forward pass of all; the loss gets each output as a batch of one."""
        count = next(len(t) for t in tree_leaves(inputs) if _sliced(t))
        return self.losses_of(loss, self.rows(self.call(inputs), alone, count), targets)

    def losses_of(self, loss: Loss, rows: Tree, targets: Tree) -> Tensor:
        """Loss of every sample from the outputs of each, (sample, 1, ...); by vmap."""
        self.note()

        def one(output: Tree, target: Tree) -> Tensor:
            return loss(output, mapped(lambda t: t[None] if isinstance(t, Tensor) else t, target))

        sliced = mapped(lambda t: 0 if _sliced(t) else None, targets)
        found: Tensor = vmap(one, (0, sliced))(rows, targets)
        return found

    def combined(
        self, loss: Loss, part: slice, alone: Tree, weights: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """∇ Σ c_i ℓ_i by plain autograd, from two batches: samples at even and at odd positions.

        These differ from the batches of the method under test, so that an error that depends on the batch shows.
        """
        inputs, targets = self.some(part)
        wrt = [self.parameters[n] for n in names]
        total = [torch.zeros_like(p) for p in wrt]
        for half in (slice(0, None, 2), slice(1, None, 2)):
            cut = [tree_map(lambda t, h=half: t[h] if _sliced(t) else t, tree) for tree in (inputs, targets)]
            if not len(weights[half]):
                continue
            losses = self.losses(loss, cut[0], cut[1], alone)
            found = self.gradients((losses * weights[half].to(losses)).sum(), wrt)
            total = [t + g for t, g in zip(total, found, strict=True)]
        return dict(zip(names, total, strict=True))


def sample_axis(batch: Tensor, alone: Tensor, count: int) -> int | None:
    """Axis along which a batch's output has length `count` and one sample's has 1, all other axes being equal."""
    shape = tuple(alone.shape)
    for axis in range(alone.ndim):
        if shape[axis] == 1 and tuple(batch.shape) == (*shape[:axis], count, *shape[axis + 1 :]):
            return axis
    return None


@contextmanager
def asked(
    caller: str,
    module: nn.Module | Network,
    x: Tree,
    y: Tree = None,
    *,
    names: Iterable[str] | None = None,
    per_sample: bool = True,
) -> Iterator[Asked]:
    """Context with the module ready to be differentiated (`Asked`); restores the module on leaving.

    Raises ValueError for kinds of modules without derivatives.  Gradients are enabled inside whatever the caller's
    mode, and compiled modules run uncompiled.
    """
    module = module.to_torch() if isinstance(module, Network) else module
    refuse_by_kind(caller, module, per_sample=per_sample)
    keep_freed()
    with torch.inference_mode(False), torch.enable_grad():
        one = Asked(caller, module, x, y, names)
        frozen = [p for p in one.parameters.values() if not p.requires_grad]
        try:
            if not one.known:
                one.note()
            for p in frozen:
                p.requires_grad_(True)
            yield one
        finally:
            for p in frozen:
                p.requires_grad_(False)
            one.restore()


@contextmanager
def without_advice() -> Iterator[None]:
    """Suppress torch's warnings about speed and about backends of other machines."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        warnings.filterwarnings("ignore", "TF32 acceleration")
        yield


@contextmanager
def gradients_on() -> Iterator[None]:
    """Enable gradients, leave inference mode, and run compiled code uncompiled."""
    with torch.inference_mode(False), torch.enable_grad(), uncompiled():
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code uncompiled, since autograd cannot differentiate it twice, and without torch's advice."""
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, without_advice():
        yield


# --- reading what is given -----------------------------------------------------------------------------------


def mapped(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """As torch's ``tree_map``, which takes its time for a tree that is a single tensor or nothing."""
    return function(tree) if isinstance(tree, Tensor) or tree is None else tree_map(function, tree)


def _sliced(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _numbers(tree: Tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _tensors(caller: str, tree: Tree, like: Tensor | None) -> Tree:
    """Arrays as tensors on the parameters' device (and of their type if real); tensors unchanged."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            given = torch.tensor(np.atleast_1d(leaf), device="cpu")
            if like is not None:
                given = given.to(like.device, like.dtype if given.is_floating_point() else given.dtype)
            return given
        if isinstance(leaf, Tensor):
            refuse_odd(caller, "an input", leaf)
            if not leaf.ndim:
                raise ValueError(
                    f"{caller}: a tensor among the inputs or targets has no axis of samples; (sample, ...)"
                )
            return leaf.clone() if leaf.is_inference() else leaf.detach()
        return leaf

    if isinstance(tree, Tensor) or tree is None:
        return one(tree)
    numbers = [isinstance(leaf, (int, float, complex)) for leaf in tree_leaves(tree)]
    if isinstance(tree, (list, tuple)) and numbers and all(numbers):
        raise ValueError(f"{caller}: a {type(tree).__name__} of numbers; give a numpy array or a torch tensor")
    if isinstance(tree, nn.utils.rnn.PackedSequence):
        raise ValueError(f"{caller}: a PackedSequence has no axis of samples; give a padded tensor, (sample, ...)")
    return tree_map(one, tree)


def _called(caller: str, module: nn.Module, x: Tree) -> Callable[[Tree], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Function from input to (arguments, keywords) of the module's forward, by its signature.

    A tuple becomes the arguments and a dict the keywords if the signature accepts them so, otherwise the single
    argument; a list is the single argument if the signature accepts one.
    """
    if not isinstance(x, tuple | list | Mapping):
        return lambda given: ((given,), {})
    signature = inspect.signature(getattr(module, "_orig_mod", getattr(module, "module", module)).forward)

    def fits(*args: Any, **keywords: Any) -> bool:
        try:
            signature.bind(*args, **keywords)
        except TypeError:
            return False
        return True

    if isinstance(x, Mapping):
        if all(isinstance(key, str) for key in x) and fits(**x):
            return lambda given: ((), dict(given))
    elif fits(*x) and (isinstance(x, tuple) or not fits(x)):
        return lambda given: (tuple(given), {})
    if fits(x):
        return lambda given: ((given,), {})
    raise ValueError(
        f"{caller}: {type(module).__name__}.forward{signature} does not take {type(x).__name__} of {len(x)}"
    )


def _wanted(caller: str, module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    known = dict(module.named_parameters())
    if names is None:
        return {n: p for n, p in known.items() if p.requires_grad}
    chosen = list(dict.fromkeys(names))
    unknown = [n for n in chosen if n not in known]
    if unknown or not chosen:
        raise ValueError(f"{caller}: no parameters {unknown}; there are {', '.join(known)}")
    return {n: known[n] for n in chosen}
