"""The general engine: trains an ensemble of any ``nn.Module`` by vmap over members of the gradient of its loss.

It is the plain formula, and other engines are tested against it.  torch.func refuses some functions and computes others
wrongly, so before an ensemble's first epoch the gradients and buffers of one step of two members are compared with
plain autograd, up to rounding; where they differ, or torch.func refuses, members are trained one after another by
plain autograd, and the log says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from tsdyn import memory
from tsdyn.engine import dropout
from tsdyn.engine.batches import Batches, Stream
from tsdyn.engine.ensemble import Ensemble, Named, layer_of, loaded, network_of
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Rule, of_members
from tsdyn.networks.any_module import called_with

#: Difference allowed between two orders of summation, in units of the last place of a member's largest gradient.
ROUNDING = 1e3
#: A block's activations may take 1/SHARE of the free memory, and on a CPU at most MOST_BYTES.
SHARE, MOST_BYTES = 4, 1 << 28
_log = logging.getLogger("tsdyn")

#: (block, inputs, targets, loss, noise) → gradients, and buffers after the step, each (member, ...).
Slope: TypeAlias = Callable[[Ensemble, Tensor, Tensor, Loss, "Noise"], tuple[Named, Named]]


@dataclass(frozen=True)
class Noise:
    """The masks of one step's dropout layers; none without any.

    Attributes:
        called: The calls of dropout layers in a forward pass.
        masks: Their masks, each (member, ...).
    """

    called: tuple[dropout.Call, ...] = ()
    masks: tuple[Tensor, ...] = ()

    @classmethod
    def drawn(cls, called: tuple[dropout.Call, ...], batches: Batches) -> Noise:
        """That of the next step."""
        if not called:
            return cls()
        if len(batches.noises) != len(batches.inputs):
            raise ValueError(
                f"train: the dropout layer {called[0].name} draws noise, and the batches have no generators for it; "
                "give Batches noises, one per member"
            )
        return cls(called, tuple(dropout.drawn(called, batches.noises, batches.inputs.device)))

    def of(self, member: int) -> tuple[Tensor, ...]:
        return tuple(mask[member] for mask in self.masks)


NONE = Noise()


@dataclass(frozen=True)
class Way:
    """How the members of an ensemble are trained, found before their first epoch.

    Attributes:
        slope: Computes the gradients: by vmap (`mapped`), or by a loop of plain autograd (`looped`).
        bytes: Bytes of one member's activations.
        called: The calls of its dropout layers.
    """

    slope: Slope
    bytes: int
    called: tuple[dropout.Call, ...] = ()


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """True: this engine trains any members with any rule, and refuses with an error those that cannot be trained.

    Raises:
        ValueError: for frozen layers or normalised rows of a module, which has no layers; as `refuse_unfit`.
    """
    module = ensemble.architecture
    if isinstance(module, nn.Module):
        if rule.frozen or rule.normalize or rule.factors:
            raise ValueError(
                f"train: training.frozen, normalize and rates need layers, which {_name(ensemble)} does not have; "
                "call requires_grad_(False) on parameters that stay"
            )
        refuse_unfit(module)
    return True


def refuse_unfit(module: nn.Module) -> None:
    """Raise for a module that cannot be trained as a member of an ensemble.

    Raises:
        ValueError: if it has nothing to train, complex or lazy parameters, hooks on gradients, or dropout whose noise
            is not keyed, or if it cannot be copied.
    """
    name = type(module).__name__
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"train: {name} has no parameter that requires grad; there is nothing to train")
    for path, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_complex():
            raise ValueError(f"train: {name}.{path} is lazy or complex; parameters must be real, their shapes known")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"train: {name}.{path} has a hook on its gradient, which members of an ensemble, being copies, would "
                "not call; remove it, and do in the module what it did"
            )
    try:
        copy.deepcopy(module)
    except Exception as error:  # a module's own copying may raise errors of every type
        said, _, _ = str(error).strip().partition("\n")
        raise ValueError(
            f"train: {name} cannot be copied ({type(error).__name__}: {said}), and each "
            "member is a copy; leave out of it what cannot be, such as locks, files and generators, and take "
            "torch.nn.utils.parametrizations.weight_norm for torch.nn.utils.weight_norm"
        ) from error
    for path, buffer in module.named_buffers():
        if buffer.is_complex():
            raise ValueError(f"train: {name}.{path} is a complex buffer, which no archive can hold")
    for path, part in dropout.active(module).items():
        if type(part) not in dropout.KEYED:
            raise ValueError(
                f"train: {name}.{path} is {part}, whose noise is not keyed by seed and epoch, so that no run could be "
                "repeated or resumed; set p = 0, call its eval(), or take "
                + ", ".join(kind.__name__ for kind in dropout.KEYED)
            )


def way(ensemble: Ensemble, stream: Stream, rule: Rule) -> Way:
    """How to train these members; on the first call, one step of two living members is compared with plain autograd.

    Raises:
        ValueError: if outputs are not (sample, output), or a member draws random numbers.
    """
    key = "general", rule.loss
    if key not in ensemble.kept:
        idle = ensemble.idle
        first = int((idle < 0).nonzero()[0])
        two = slice(first, first + 1 + bool((idle[first + 1 : first + 2] < 0).any()))
        batches = next(iter(stream(two)))
        x, y = next(iter(batches))
        ensemble.kept[key] = _examined(ensemble.block(two), batches, x, y, rule.loss)
    found: Way = ensemble.kept[key]
    return found


def _examined(two: Ensemble, batches: Batches, x: Tensor, y: Tensor, loss: Loss) -> Way:
    saved: list[int] = []

    def noted(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.random.fork_rng(devices=[two.device] if two.device.type == "cuda" else []):
        called = dropout.calls(_a_member(two), x[0]) if isinstance(two.architecture, nn.Module) else ()
        noise = Noise.drawn(called, batches)
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
            plain = looped(two, x, y, loss, noise)
        if not _alike(looped(two, x, y, loss, noise), plain, rounding=ROUNDING):
            raise ValueError(
                f"train: {_name(two)} gives other gradients for the same inputs: it draws random numbers "
                "(dropout inside attention, noise) or counts its calls, so that no run could be repeated or resumed; "
                "set its dropout to 0, and keep what changes in buffers"
            )
        size = 2 * sum(saved) // two.members
        try:
            alike = _alike(mapped(two, x, y, loss, noise), plain, rounding=ROUNDING)
            refusal = None if alike else "gives other gradients"
        except Exception as error:  # torch.func refuses with errors of every type
            refusal = (
                f"refuses it ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
            )
    if refusal is None:
        return Way(mapped, size, called)
    _log.warning(
        "%s: torch.func.vmap %s; members are trained one after another by plain autograd, which is slower",
        _name(two), refusal,
    )  # fmt: skip
    return Way(looped, size, called)


def _a_member(block: Ensemble) -> nn.Module:
    """A copy of the architecture that may be called."""
    if "module" not in block.kept:
        assert isinstance(block.architecture, nn.Module)
        block.kept["module"] = copy.deepcopy(block.architecture).to(block.device)
    module: nn.Module = block.kept["module"]
    return loaded(module, block.values, block.buffers, 0)


def _name(ensemble: Ensemble) -> str:
    return type(ensemble.architecture).__name__


def _alike(found: tuple[Named, Named], expected: tuple[Named, Named], *, rounding: float) -> bool:
    """Whether both agree up to rounding relative to the member's largest gradient; NaN equals NaN, inf equals inf."""
    for mine, theirs in zip(found, expected, strict=True):
        floating = [t for t in theirs.values() if t.is_floating_point() and t.numel()]
        scale = torch.stack([of_members(t).abs().amax(1) for t in floating]).amax(0) if floating else None
        for name, expect in theirs.items():
            got = mine[name]
            if got.shape != expect.shape or got.dtype != expect.dtype:
                return False
            if not expect.is_floating_point() or scale is None:
                if not torch.equal(got, expect):
                    return False
                continue
            room = (rounding * torch.finfo(expect.dtype).eps * scale.to(expect.dtype)).view(
                -1, *[1] * (expect.ndim - 1)
            )
            same = ((got - expect).abs() <= room) | (got == expect) | (got.isnan() & expect.isnan())
            if not bool(same.all()):
                return False
    return True


def block_size(ensemble: Ensemble, found: Way) -> int:
    """How many members' activations, gradients and new parameters fit in memory together; at least one."""
    own = 3 * sum(t[0].numel() * t.element_size() for t in ensemble.values.values())
    room = memory.free(ensemble.device) // SHARE
    room = room if ensemble.device.type == "cuda" else min(room, MOST_BYTES)
    return int(max(1, room // (found.bytes + own)))


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    found: Way = block.kept["general", rule.loss]
    for count, (x, y) in enumerate(batches, start=taken + 1):
        gradients, buffers = found.slope(block, x, y, rule.loss, Noise.drawn(found.called, batches))
        block.take(
            {n: g for n, g in gradients.items() if not rule.frozen or layer_of(n) not in rule.frozen}, rule, count
        )
        for name, after in buffers.items():
            block.buffers[name].copy_(after)


def mapped(block: Ensemble, x: Tensor, y: Tensor, loss: Loss, noise: Noise = NONE) -> tuple[Named, Named]:
    """Gradients of J and buffers after the step, by torch.func: vmap over members of the gradient."""
    architecture = block.architecture

    def objective(
        values: Named, buffers: Named, x: Tensor, y: Tensor, masks: tuple[Tensor, ...]
    ) -> tuple[Tensor, Named]:
        moved = dict(buffers)
        if isinstance(architecture, nn.Module):
            with dropout.masked(architecture, noise.called, masks):
                output = called_with(architecture, {**values, **moved}, (x,))
        else:
            output = network_of(architecture, values, moved)(x, **_in_training(block))
        return loss.value(output, y), moved

    before = {name: tensor.clone() for name, tensor in block.buffers.items()}  # a forward pass updates them in place
    found: tuple[Named, Named] = vmap(grad(objective, has_aux=True))(block.values, before, x, y, noise.masks)
    return {n: g.detach() for n, g in found[0].items()}, {n: b.detach() for n, b in found[1].items()}


def looped(block: Ensemble, x: Tensor, y: Tensor, loss: Loss, noise: Noise = NONE) -> tuple[Named, Named]:
    """The same as `mapped`, by plain autograd of one member after another."""
    each = [_one(block, member, x[member], y[member], loss, noise) for member in range(block.members)]

    def beside(parts: list[Named]) -> Named:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    return beside([gradients for gradients, _ in each]), beside([buffers for _, buffers in each])


def _one(block: Ensemble, member: int, x: Tensor, y: Tensor, loss: Loss, noise: Noise) -> tuple[Named, Named]:
    architecture = block.architecture
    with torch.enable_grad():
        if isinstance(architecture, nn.Module):
            module = loaded(_a_member(block), block.values, block.buffers, member)
            with dropout.masked(module, noise.called, noise.of(member)):
                output = module(x)
            named: Named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            values, buffers = {n: named[n] for n in block.values}, {n: named[n] for n in block.buffers}
        else:
            values = {n: t[member].detach().clone().requires_grad_() for n, t in block.values.items()}
            buffers = {n: t[member].clone() for n, t in block.buffers.items()}
            output = network_of(architecture, values, buffers)(x, **_in_training(block))
        if not isinstance(output, Tensor) or output.shape != y.shape:
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"train: {_name(block)} gives {shown} for inputs {tuple(x.shape)}; a student maps (sample, input) to "
                f"(sample, output), here {tuple(y.shape)}: unflatten images inside it, and return one tensor"
            )
        slopes = torch.autograd.grad(loss.value(output, y), list(values.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(values.items(), slopes, strict=True)}
    return {n: g.detach() for n, g in gradients.items()}, {n: b.detach().clone() for n, b in buffers.items()}


def _in_training(block: Ensemble) -> dict[str, bool]:
    """Keyword arguments of a forward pass in training: a network's BatchNorm must be told, a module knows its mode."""
    return {"training": True} if block.buffers else {}
