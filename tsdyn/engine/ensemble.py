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
        architecture: A network or module like each member; its own tensors are not used.
        values: Trained parameters: name → (member, ...).
        buffers: Tensors of each member that are not trained: running statistics, and a module's frozen parameters.
        moments: Optimiser moments: name of the moment → name of the parameter → (member, ...).
        steps: Steps taken, the same for all members (Adam's bias correction).
        death_epoch: (member,), the epoch at whose end a parameter was NaN or infinite; −1 while alive.
        stop_epoch: (member,), the epoch after which the member is no longer trained; −1 while it is.
        kept: Objects that engines keep from epoch to epoch, by a key of all they depend on; shared with blocks.
    """

    architecture: Architecture
    values: Named
    buffers: Named = field(default_factory=dict)
    moments: dict[str, Named] = field(default_factory=dict)
    steps: int = 0
    death_epoch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    stop_epoch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    kept: dict[object, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.stop_epoch):
            self.stop_epoch = torch.full((self.members,), -1, dtype=torch.int64, device="cpu")
        if not len(self.death_epoch):
            self.death_epoch = torch.full((self.members,), -1, dtype=torch.int64, device="cpu")

    @classmethod
    def of(cls, members: Sequence[Architecture], *, device: str = "cpu") -> Ensemble:
        """An ensemble of these members; their tensors are copied.

        Raises:
            ValueError: if members differ in anything but the numbers in their parameters and buffers.
        """
        parts = [_tensors(member) for member in members]
        names: list[list[str]] = [[*values, *buffers] for values, buffers in parts]
        if any(other != names[0] for other in names):
            odd = sorted({name for each in names for name in each} - set(names[0]).intersection(*names))
            raise ValueError(
                f"Ensemble: members must have the same tensors; some have {', '.join(odd) or 'another order'}, others "
                "do not"
            )
        kinds = dict.fromkeys(_kind(member) for member in members)
        if len(kinds) > 1:
            first, second, *_ = kinds
            raise ValueError(f"Ensemble: an ensemble has one architecture; its members have {first} and {second}")

        def beside(each: Sequence[Named]) -> Named:
            return {n: torch.stack([named[n].detach() for named in each]).to(device) for n in each[0]}

        return cls(members[0], beside([v for v, _ in parts]), beside([b for _, b in parts]))

    @classmethod
    def joined(cls, parts: Sequence[Ensemble]) -> Ensemble:
        """One ensemble of the members of several, which have one architecture; tensors are copied.

        Raises:
            ValueError: if ensembles with a living member took different numbers of steps.
        """
        first = parts[0]
        taken = {part.steps for part in parts if bool((part.idle < 0).any())}
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
            torch.cat([part.stop_epoch for part in parts]),
        )

    # --- views -----------------------------------------------------------------------------------------------

    @property
    def members(self) -> int:
        """Number of members, S."""
        return next(iter(self.values.values())).shape[0]  # len() of a tensor is slow

    @property
    def idle(self) -> Tensor:
        """The epoch in which each member died or stopped, (member,); −1 while it is trained."""
        return torch.maximum(self.death_epoch, self.stop_epoch)

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return next(iter(self.values.values())).device

    @property
    def connected(self) -> Network | None:
        """The architecture if it is a network of fully connected layers without BatchNorm, else None."""
        architecture = self.architecture
        return architecture if type(architecture) is Network and architecture.plain else None

    @property
    def depth(self) -> int:
        """Number of layers L of the network."""
        return self._network.depth

    @property
    def weights(self) -> list[Tensor]:
        """Weights of a network's layers, W_l at index l−1, each (member, node, input_node, ...)."""
        return [self.values[f"weight_{layer}"] for layer in range(1, self.depth + 1)]

    @property
    def biases(self) -> list[Tensor | None]:
        """Biases of a network's layers, each (member, node) or None."""
        return self.layers(self.values)[1]

    def layers(self, named: Named) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases layer by layer, from a mapping by name of parameters, moments or gradients."""
        layers = range(1, self.depth + 1)
        return [named[f"weight_{layer}"] for layer in layers], [named.get(f"bias_{layer}") for layer in layers]

    @property
    def _network(self) -> Network:
        if isinstance(self.architecture, nn.Module):
            raise TypeError(f"Ensemble: {type(self.architecture).__name__} is a module of its own and has no layers")
        return self.architecture

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the ensemble but `death_epoch`."""
        for named in (self.values, self.buffers, *self.moments.values()):
            yield from named.values()

    def member(self, i: int) -> Architecture:
        """One member: a network shares the ensemble's tensors, a module is a copy."""
        return self.module(i) if isinstance(self.architecture, nn.Module) else self.network(i)

    def network(self, i: int) -> Network:
        """One member of an ensemble of networks; shares the ensemble's memory."""
        own = self._network  # whose kind all members were compared with
        return own.sharing(*parts_of(own, _mapped(self.values, lambda t: t[i]), _mapped(self.buffers, lambda t: t[i])))

    def module(self, i: int) -> nn.Module:
        """One member of an ensemble of modules; a copy, in the module's own mode."""
        assert isinstance(self.architecture, nn.Module)
        return loaded(copy.deepcopy(self.architecture), self.values, self.buffers, i)

    def block(self, members: slice) -> Ensemble:
        """The ensemble of some of the members; a view that shares memory."""
        return self._changed(lambda t: t[members], self.death_epoch[members], self.stop_epoch[members])

    def to(self, target: torch.dtype | str) -> Ensemble:
        """The same members in another floating-point type or on another device; copies."""

        def moved(t: Tensor) -> Tensor:
            return t.to(target, copy=True) if t.is_floating_point() or isinstance(target, str) else t.clone()

        own = self.architecture
        architecture = copy.deepcopy(own).to(target) if isinstance(own, nn.Module) else own
        return self._changed(
            moved, self.death_epoch.clone(), self.stop_epoch.clone(), kept={}, architecture=architecture
        )

    def _changed(self, change: Callable[[Tensor], Tensor], death: Tensor, stop: Tensor, **more: Any) -> Ensemble:
        return replace(
            self,
            values=_mapped(self.values, change),
            buffers=_mapped(self.buffers, change),
            moments={name: _mapped(named, change) for name, named in self.moments.items()},
            death_epoch=death,
            stop_epoch=stop,
            **more,
        )

    # --- training --------------------------------------------------------------------------------------------

    def prepare(self, moments: Sequence[str]) -> None:
        """Give the members the optimiser moments of these names; those that are new start at zero."""
        for name in moments:
            if name not in self.moments:
                self.moments[name] = {n: torch.zeros_like(t) for n, t in self.values.items()}

    def take(self, gradients: Named, rule: Rule, count: int) -> None:
        """Take step number `count` of every parameter that has a gradient, in place.

        With ``rule.normalize`` hidden rows of a network are scaled back to norm 1.
        """
        for name, gradient in rule.clipped(gradients).items():
            parameter = self.values[name]
            moments = [self.moments[moment][name] for moment in rule.optimizer.moments]
            layer = layer_of(name) if rule.factors else None
            rule.update(parameter, gradient, moments, rule.rates(parameter, layer), count)
            if rule.normalize and name.startswith("weight_") and layer_of(name) < self.depth:
                norm = parameter.flatten(2).norm(dim=2)
                parameter.div_(norm.view(*norm.shape, *([1] * (parameter.ndim - 2))))

    def state(self) -> dict[str, np.ndarray]:
        """All arrays that training depends on, by name; `restore` takes them."""
        # the prefix keeps a module's own names from clashing with other entries
        own = "module." if isinstance(self.architecture, nn.Module) else ""
        # netCDF has no booleans
        held = {n: t.byte() if t.dtype == torch.bool else t for n, t in (self.values | self.buffers).items()}
        found = {f"{own}{n}": t.cpu().numpy() for n, t in held.items()}
        for moment, named in self.moments.items():
            found |= {f"{moment}_{own}{n}": t.cpu().numpy() for n, t in named.items()}
        return found | {"death_epoch": self.death_epoch.numpy(), "steps": np.array(self.steps)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Set all arrays from a stored state; the moments must have been prepared."""
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
    """`module` itself, after copying the tensors of one member into it."""
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
    """Weights, biases and BatchNorm of a network from tensors by name, for one member or stacked over members."""
    layers = range(1, architecture.depth + 1)
    norms: list[BatchNorm | None] = []
    for layer, norm in enumerate(architecture.norms, start=1):
        held = {f: values[f"{n}_{layer}"] for n, f in _NORM_PARAMETERS.items() if f"{n}_{layer}" in values}
        held |= {f: buffers[f"{n}_{layer}"] for n, f in _NORM_BUFFERS.items() if f"{n}_{layer}" in buffers}
        norms.append(None if norm is None else replace(norm, **held))  # type: ignore[arg-type]
    weights = [values[f"weight_{layer}"] for layer in layers]
    return weights, [values.get(f"bias_{layer}") for layer in layers], norms


def _kind(member: Architecture) -> str:
    """A text that is the same for members of one ensemble: all they share beside names and shapes of tensors."""
    if isinstance(member, nn.Module):
        return " ".join(f"{type(member).__qualname__} {member}".split())
    frame, sigma = member.frame, member.activation
    norms = [None if norm is None else (norm.eps, norm.momentum) for norm in member.norms]
    shared = frame.image, frame.strides, frame.paddings, frame.places, norms, member.gate_at_zero
    return f"{sigma.name}, leak {sigma.leak}, {shared}"


def _tensors(member: Architecture) -> tuple[Named, Named]:
    """The tensors of one member that are trained, and those that are not."""
    values: Named = {}
    buffers: Named = {}
    if isinstance(member, nn.Module):
        for name, parameter in member.named_parameters():  # a shared parameter comes once, under its first name
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
    """Mark members that got a NaN or infinite parameter in `epoch` as dead, and set all their parameters to NaN.

    Returns the positions of those that died now.
    """
    parameters = list(ensemble.values.values())
    # by the largest number of each member, which is NaN where there is one
    largest = [torch.linalg.vector_norm(p.reshape(len(p), -1), torch.inf, 1) for p in parameters if p.numel()]
    whole = torch.stack([torch.isfinite(each) for each in largest]).all(0)
    dead = ~whole.cpu() & (ensemble.death_epoch < 0)
    if not dead.any():
        return []
    for parameter in parameters:
        parameter[dead.to(parameter.device)] = torch.nan
    ensemble.death_epoch[dead] = epoch
    return [int(i) for i in dead.nonzero()]


def living_blocks(death_epoch: Tensor, size: int) -> list[slice]:
    """Slices of consecutive living members, each of at most `size`."""
    blocks: list[slice] = []
    for i in (int(i) for i in (death_epoch < 0).nonzero()):
        if blocks and blocks[-1].stop == i and i - blocks[-1].start < size:
            blocks[-1] = slice(blocks[-1].start, i + 1)
        else:
            blocks.append(slice(i, i + 1))
    return blocks
