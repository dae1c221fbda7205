"""Ensembles: members of one architecture side by side, each tensor (member, ...).

An architecture is a `Network` or any ``nn.Module``.  Parameters and buffers are held by name: those of a network are
``weight_1``, ``bias_1``, ``norm_scale_1``, ``norm_shift_1``, ``weight_2``, ... and ``norm_mean_1``,
``norm_variance_1``, ..., lowest layer first; those of a module have the module's own names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn.engine.rule import Rule
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network

Architecture: TypeAlias = Network | nn.Module
Named: TypeAlias = dict[str, Tensor]

#: Tensors of a network's BatchNorm: parameter or buffer → field of `BatchNorm`.
_NORM_PARAMETERS = {"norm_scale": "scale", "norm_shift": "shift"}
_NORM_BUFFERS = {"norm_mean": "mean", "norm_variance": "variance"}


@dataclass
class Ensemble:
    """Parameters, buffers and optimiser state of S members of one architecture.

    Attributes:
        architecture: What all have in common; its own tensors are not used.
        values: What is trained: name → (member, ...).
        buffers: What is not, but belongs to a member: running statistics, and a module's frozen parameters.
        moments: Optimiser moments: name of the moment → name of the parameter → (member, ...).
        steps: Steps taken, the same for all members (Adam's bias correction).
        death_epoch: (member,), the epoch at whose end a parameter was NaN or infinite; −1 while alive.
        kept: What engines keep from epoch to epoch, by what it depends on; shared with blocks.
    """

    architecture: Architecture
    values: Named
    buffers: Named = field(default_factory=dict)
    moments: dict[str, Named] = field(default_factory=dict)
    steps: int = 0
    death_epoch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    kept: dict[object, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.death_epoch):
            self.death_epoch = torch.full((self.members,), -1, dtype=torch.int64, device="cpu")

    @classmethod
    def of(cls, members: Sequence[Architecture], *, device: str = "cpu") -> Ensemble:
        """Members side by side; copies.

        Raises:
            ValueError: if some have parameters or buffers that others lack, or they differ in anything else than their
                numbers.
        """
        kinds = dict.fromkeys(_kind(member) for member in members)
        if len(kinds) > 1:
            first, second, *_ = kinds
            raise ValueError(f"Ensemble: an ensemble is of one architecture; {first} and {second} are two")
        parts = [_tensors(member) for member in members]
        names: list[list[str]] = [[*values, *buffers] for values, buffers in parts]
        if any(other != names[0] for other in names):
            odd = sorted({name for each in names for name in each} - set(names[0]).intersection(*names))
            raise ValueError(
                f"Ensemble: an ensemble is of one shape; some members have {', '.join(odd) or 'another order'}, others "
                "do not"
            )

        def beside(each: Sequence[Named]) -> Named:
            return {n: torch.stack([named[n].detach() for named in each]).to(device) for n in each[0]}

        return cls(members[0], beside([v for v, _ in parts]), beside([b for _, b in parts]))

    @classmethod
    def joined(cls, parts: Sequence[Ensemble]) -> Ensemble:
        """The members of several ensembles of one architecture; copies.

        Raises:
            ValueError: if those with a living member took different numbers of steps.
        """
        first = parts[0]
        taken = {part.steps for part in parts if bool((part.death_epoch < 0).any())}
        if len(taken) > 1:
            raise ValueError(f"Ensemble.joined: took {sorted(taken)} steps; all must have taken as many")

        def together(each: Sequence[Mapping[str, Tensor]]) -> Named:
            return {name: torch.cat([named[name] for named in each]) for name in each[0]}

        return cls(
            first.architecture,
            together([part.values for part in parts]),
            together([part.buffers for part in parts]),
            {name: together([part.moments[name] for part in parts]) for name in first.moments},
            max(part.steps for part in parts),  # a part without a living member has stopped counting
            torch.cat([part.death_epoch for part in parts]),
        )

    # --- views -----------------------------------------------------------------------------------------------

    @property
    def members(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.values.values())).device

    @property
    def connected(self) -> Network | None:
        """The architecture, where it is fully connected layers without BatchNorm and nothing else."""
        architecture = self.architecture
        return architecture if type(architecture) is Network and architecture.plain else None

    @property
    def depth(self) -> int:
        """L of a network."""
        return self._network.depth

    @property
    def weights(self) -> list[Tensor]:
        """Of a network's layers l = 1..L at index l−1, each (member, node, input_node, ...)."""
        return [self.values[f"weight_{layer}"] for layer in range(1, self.depth + 1)]

    @property
    def biases(self) -> list[Tensor | None]:
        """Each (member, node), or None."""
        return self.layers(self.values)[1]

    def layers(self, named: Named) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of a network, or what `named` holds for these (moments, gradients)."""
        layers = range(1, self.depth + 1)
        return [named[f"weight_{layer}"] for layer in layers], [named.get(f"bias_{layer}") for layer in layers]

    @property
    def _network(self) -> Network:
        if isinstance(self.architecture, nn.Module):
            raise TypeError(f"Ensemble: {type(self.architecture).__name__} is a module of its own and has no layers")
        return self.architecture

    def tensors(self) -> Iterator[Tensor]:
        """All of them but `death_epoch`."""
        for named in (self.values, self.buffers, *self.moments.values()):
            yield from named.values()

    def member(self, i: int) -> Architecture:
        """One member; of a network its tensors are shared, of a module copied."""
        return self.module(i) if isinstance(self.architecture, nn.Module) else self.network(i)

    def network(self, i: int) -> Network:
        """One member of an ensemble of networks; shares memory."""
        return network_of(self._network, _mapped(self.values, lambda t: t[i]), _mapped(self.buffers, lambda t: t[i]))

    def module(self, i: int) -> nn.Module:
        """One member of an ensemble of modules; a copy, in the module's own mode."""
        assert isinstance(self.architecture, nn.Module)
        return loaded(copy.deepcopy(self.architecture), self.values, self.buffers, i)

    def block(self, members: slice) -> Ensemble:
        """Some members; a view that shares memory."""
        return self._changed(lambda t: t[members], self.death_epoch[members])

    def to(self, target: torch.dtype | str) -> Ensemble:
        """The same members in another floating-point type or on another device; copies."""

        def moved(t: Tensor) -> Tensor:
            return t.to(target, copy=True) if t.is_floating_point() or isinstance(target, str) else t.clone()

        return self._changed(moved, self.death_epoch.clone(), kept={})

    def _changed(self, change: Callable[[Tensor], Tensor], death: Tensor, **more: Any) -> Ensemble:
        return replace(
            self,
            values=_mapped(self.values, change),
            buffers=_mapped(self.buffers, change),
            moments={name: _mapped(named, change) for name, named in self.moments.items()},
            death_epoch=death,
            **more,
        )

    # --- training --------------------------------------------------------------------------------------------

    def prepare(self, moments: Sequence[str]) -> None:
        """Give members the moments of these names, zero where there are none yet."""
        for name in moments:
            if name not in self.moments:
                self.moments[name] = {n: torch.zeros_like(t) for n, t in self.values.items()}

    def take(self, gradients: Named, rule: Rule, count: int) -> None:
        """Step number `count` of every parameter that has a gradient, in place.

        With ``rule.normalize`` hidden rows of a network are scaled back to norm 1.
        """
        for name, gradient in gradients.items():
            parameter = self.values[name]
            moments = [self.moments[moment][name] for moment in rule.optimizer.moments]
            rule.update(parameter, gradient, moments, rule.rates(parameter), count)
            if rule.normalize and name.startswith("weight_") and layer_of(name) < self.depth:
                norm = parameter.flatten(2).norm(dim=2)
                parameter.div_(norm.view(*norm.shape, *([1] * (parameter.ndim - 2))))

    def state(self) -> dict[str, np.ndarray]:
        """Everything training depends on, by name; what `restore` takes."""
        # a module's own names could be those of other entries
        own = "module." if isinstance(self.architecture, nn.Module) else ""
        # netCDF has no booleans
        held = {n: t.byte() if t.dtype == torch.bool else t for n, t in (self.values | self.buffers).items()}
        found = {f"{own}{n}": t.cpu().numpy() for n, t in held.items()}
        for moment, named in self.moments.items():
            found |= {f"{moment}_{own}{n}": t.cpu().numpy() for n, t in named.items()}
        return found | {"death_epoch": self.death_epoch.numpy(), "steps": np.array(self.steps)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a stored state; the moments must have been prepared."""
        own = "module." if isinstance(self.architecture, nn.Module) else ""
        for n, t in (self.values | self.buffers).items():
            t.copy_(torch.from_numpy(state[f"{own}{n}"]))
        for moment, named in self.moments.items():
            for n, t in named.items():
                t.copy_(torch.from_numpy(state[f"{moment}_{own}{n}"]))
        self.death_epoch = torch.from_numpy(np.array(state["death_epoch"]))
        self.steps = int(state["steps"])


def layer_of(name: str) -> int:
    """The layer 1..L that a network's parameter belongs to."""
    return int(name.rpartition("_")[2])


def loaded(module: nn.Module, values: Named, buffers: Named, member: int) -> nn.Module:
    """`module` itself, with the tensors of one member copied into it."""
    named: Named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in (values | buffers).items():
            named[name].copy_(tensor[member])
    return module


def network_of(architecture: Network, values: Named, buffers: Named) -> Network:
    """A network of this architecture whose tensors are those of one member."""
    return architecture.with_parameters(*parts_of(architecture, values, buffers))


def parts_of(
    architecture: Network, values: Named, buffers: Named
) -> tuple[list[Tensor], list[Tensor | None], list[BatchNorm | None]]:
    """Weights, biases and BatchNorm of a network from tensors by name; of one member or of many."""
    layers = range(1, architecture.depth + 1)
    norms: list[BatchNorm | None] = []
    for layer, norm in enumerate(architecture.norms, start=1):
        held = {f: values[f"{n}_{layer}"] for n, f in _NORM_PARAMETERS.items() if f"{n}_{layer}" in values}
        held |= {f: buffers[f"{n}_{layer}"] for n, f in _NORM_BUFFERS.items() if f"{n}_{layer}" in buffers}
        norms.append(None if norm is None else replace(norm, **held))  # type: ignore[arg-type]
    weights = [values[f"weight_{layer}"] for layer in layers]
    return weights, [values.get(f"bias_{layer}") for layer in layers], norms


def _kind(member: Architecture) -> str:
    """All that members of one ensemble have in common beside names and shapes."""
    if isinstance(member, nn.Module):
        return f"{type(member).__qualname__} {member}"
    frame, sigma = member.frame, member.activation
    norms = [None if norm is None else (norm.eps, norm.momentum) for norm in member.norms]
    shared = frame.image, frame.strides, frame.paddings, frame.places, norms, member.gate_at_zero
    return f"{sigma.name}, leak {sigma.leak}, {shared}"


def _tensors(member: Architecture) -> tuple[Named, Named]:
    """What of one member is trained, and what is not."""
    values: Named = {}
    buffers: Named = {}
    if isinstance(member, nn.Module):
        for name, parameter in member.named_parameters():  # a shared one comes once, by its first name
            (values if parameter.requires_grad else buffers)[name] = parameter
        buffers |= dict(member.named_buffers())
        return values, buffers
    for layer, (weight, bias) in enumerate(zip(member.weights, member.biases, strict=True), start=1):
        norm = member.norms[layer - 1] if layer < member.depth else None
        values |= {f"weight_{layer}": weight} | ({} if bias is None else {f"bias_{layer}": bias})
        if norm is not None:
            held = {n: getattr(norm, f) for n, f in _NORM_PARAMETERS.items()}
            values |= {f"{n}_{layer}": t for n, t in held.items() if t is not None}
            buffers |= {f"{n}_{layer}": getattr(norm, f) for n, f in _NORM_BUFFERS.items()}
    return values, buffers


def _mapped(named: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> Named:
    return {name: change(tensor) for name, tensor in named.items()}


def mark_dead(ensemble: Ensemble, epoch: int) -> list[int]:
    """Members that have a NaN or infinite parameter since `epoch`: all their parameters become NaN.

    Returns their positions, only those that died now.
    """
    parameters = list(ensemble.values.values())
    whole = torch.stack([torch.isfinite(parameter).reshape(len(parameter), -1).all(1) for parameter in parameters]).all(
        0
    )
    dead = ~whole.cpu() & (ensemble.death_epoch < 0)
    for parameter in parameters:
        parameter[dead.to(parameter.device)] = torch.nan
    ensemble.death_epoch[dead] = epoch
    return [int(i) for i in dead.nonzero()]


def living_blocks(death_epoch: Tensor, size: int) -> list[slice]:
    """Runs of neighbouring living members, cut to `size`."""
    blocks: list[slice] = []
    for i in (int(i) for i in (death_epoch < 0).nonzero()):
        if blocks and blocks[-1].stop == i and i - blocks[-1].start < size:
            blocks[-1] = slice(blocks[-1].start, i + 1)
        else:
            blocks.append(slice(i, i + 1))
    return blocks
