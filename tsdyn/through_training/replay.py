"""Runs again from their start: the state of members at any step, by the engine's own steps, compared with the archive.

Draws are keyed, so a run can be repeated from its experiment alone.  `members_at` gives the members of a run at an
epoch, bit for bit those of the run on the same machine; a `Course` steps through a run in float64, one step or many at
a time, and goes to any state that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from tsdyn.engine import general, train
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble, Named
from tsdyn.engine.rule import Rule
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import new_at_every_step
from tsdyn.running import own_modules
from tsdyn.running.members import Members
from tsdyn.running.own_modules import Maker
from tsdyn.through_training.steps import Inputs, Kind, OwnModule, State, kind_of

#: Largest difference to the recorded weights that counts as rounding, relative to the largest weight of the layer: the
#: root of a unit of the last place, since training amplifies rounding wherever a gate flips.
ROUNDING = {"float64": 2e-8, "float32": 1e-3}


class ReplayError(ExperimentError):
    """A replayed run is not the recorded one."""


def members_at(
    experiment: Experiment,
    epoch: int,
    *,
    device: str = "cpu",
    student: Maker | None = None,
    teacher: Maker | None = None,
) -> Members:
    """The members of a run after `epoch` epochs, trained again from their start: the run's own bits on its machine."""
    members = Members(experiment, device, student, teacher)
    members.draw()
    members.prepare()
    for step in range(1, epoch + 1):
        members.advance(step)
    return members


@dataclass
class Data:
    """The samples of one epoch: inputs and targets (member, sample, ...), and rows (member, step, batch) or None."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor | None


@dataclass
class Course:
    """The training of some members of a run, in float64, step by step; steps are numbered from 1.

    Attributes:
        members: The members, as drawn; their ensemble is moved along by `advance`.
        epochs: How many epochs are trained.
        recorded: Epoch → (names of parameters → recorded values (member, ...)), with which the replay is compared ...
        anchored: ... and from which it goes on, if they are all that the next step depends on.
        difference: Largest difference from what is recorded, (member,), of those epochs that were passed.
    """

    members: Members
    epochs: int
    recorded: Mapping[int, Named] = field(default_factory=dict)
    anchored: bool = True
    difference: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.members.draw()
        self.members.prepare()
        self.ensemble = self.members.ensemble.to(torch.float64)
        _ = self.kind
        self.difference = np.zeros(self.ensemble.members)
        self.compared = -1  #: the last epoch that was compared
        self.taken = 0
        self._data: dict[int, Data] = {}

    @property
    def experiment(self) -> Experiment:
        return self.members.experiment

    @cached_property
    def kind(self) -> Kind:
        """What the members are, for `steps.step`."""
        kind = kind_of(self.ensemble)
        return (
            OwnModule(kind.module, {n: t.clone() for n, t in kind.fixed.items()})
            if isinstance(kind, OwnModule)
            else kind
        )

    @property
    def per_epoch(self) -> int:
        """Steps per epoch."""
        return self.experiment.steps

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.per_epoch * self.epochs

    @cached_property
    def fresh(self) -> bool:
        """Whether no sample is seen twice."""
        return new_at_every_step(self.experiment)

    @property
    def anchors(self) -> bool:
        """Whether recorded weights are the whole state, so that the replay goes on from them."""
        return self.anchored and not self.ensemble.moments and not self.ensemble.buffers

    def epoch_of(self, step: int) -> int:
        """The epoch 1, 2, ... that step number `step` belongs to."""
        return (step - 1) // self.per_epoch + 1

    def rule(self, step: int) -> Rule:
        """The rule of a step."""
        return Rule.of(self.experiment.training, self.epoch_of(step))

    @cached_property
    def finite(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the training sets, (member, sample, ...); NaN beyond a member's own."""
        x, y = self.members.finite
        return x.double(), y.double()

    def data(self, epoch: int) -> Data:
        """The samples of the epoch that ends at `epoch`; the last two that were asked for are kept."""
        if epoch not in self._data:
            if len(self._data) > 1:
                del self._data[next(iter(self._data))]
            if self.fresh:
                every = list(self.members.stream(epoch)(slice(0, self.ensemble.members)))
                inputs, targets = torch.cat([b.inputs for b in every], 1), torch.cat([b.targets for b in every], 1)
                rows = torch.arange(inputs.shape[1]).view(1, self.per_epoch, -1).expand(len(inputs), -1, -1)
                self._data[epoch] = Data(inputs.double(), targets.double(), rows)
            else:
                self._data[epoch] = Data(*self.finite, self.members.rows(epoch))
        return self._data[epoch]

    def rows(self, step: int) -> Tensor | None:
        """The samples of a step in the data of its epoch, (member, batch); None for all of them."""
        rows = self.data(self.epoch_of(step)).rows
        return None if rows is None else rows[:, (step - 1) % self.per_epoch].to(self.ensemble.device)

    def given(self, step: int) -> Inputs:
        """What a step takes beside the state."""
        epoch = self.epoch_of(step)
        data, rows = self.data(epoch), self.rows(step)
        x, y = taken(data.inputs, rows), taken(data.targets, rows)
        rate = x.new_full((len(x),), self.experiment.training.rate(epoch))
        return Inputs(rate, x.new_ones(x.shape[:2]), y, x)

    # --- going along -----------------------------------------------------------------------------------------

    def state(self) -> State:
        """A copy of the present state."""
        return State.of(self.ensemble)

    def go_to(self, state: State, taken: int) -> None:
        """Set the members to a state that was reached after `taken` steps."""
        for mine, theirs in zip(State.held(self.ensemble).tensors(), state.tensors(), strict=True):
            mine.copy_(theirs)
        self.taken = self.ensemble.steps = taken

    def arrive(self, state: State, taken: int) -> None:
        """Go to a state that the course itself would have after `taken` steps, and compare as `advance` does."""
        self.go_to(state, taken)
        if taken % self.per_epoch == 0:
            self._compare(self.epoch_of(taken))

    def advance(self, steps: int) -> None:
        """Take the next `steps` steps by the engine, and compare with the archive at each recorded epoch."""
        if not self.taken:
            self._compare(0)
        end = self.taken + steps
        while self.taken < end:
            epoch = self.epoch_of(self.taken + 1)
            done = self.taken % self.per_epoch
            now = min(end - self.taken, self.per_epoch - done)
            data = self.data(epoch)
            rows = None if data.rows is None else data.rows[:, done : done + now]
            with torch.no_grad():
                self._advance(Batches(data.inputs, data.targets, rows, now), self.rule(self.taken + 1))
            self.taken += now
            self.ensemble.steps = self.taken
            self._refuse_moved_buffers()
            if self.taken % self.per_epoch == 0:
                self._compare(epoch)

    def _advance(self, batches: Batches, rule: Rule) -> None:
        backend = train.chosen(self.ensemble, rule)
        if backend is train.GENERAL:
            general.way(self.ensemble, lambda members: iter([_part(batches, members)]), rule)
        backend.advance(self.ensemble, batches, rule, self.taken)

    def _refuse_moved_buffers(self) -> None:
        """Refuse a module whose buffers change in training: torch changes them behind autograd's back."""
        kind = self.kind
        if isinstance(kind, OwnModule):
            moved = [n for n, t in kind.fixed.items() if not torch.equal(t, self.ensemble.buffers[n])]
            if moved:
                raise ExperimentError(
                    f"sensitivity: {type(kind.module).__name__} changes its buffers {', '.join(moved)} in training "
                    "(running statistics), through which no derivative can be taken; use student.batch_norm of tsdyn's "
                    "networks, or a module without"
                )

    def _compare(self, epoch: int) -> None:
        """Note the difference to the weights recorded at `epoch`, refuse a large one, and go on from the recorded.

        Raises:
            ReplayError: if it is beyond rounding; names seed, epoch and difference.
        """
        held = self.recorded.get(epoch)
        if held is None:
            return
        room = ROUNDING[self.experiment.dtype]
        for name, wanted in held.items():
            mine = self.ensemble.values[name]
            off = (mine - wanted).flatten(1).abs().amax(1)
            scale = wanted.flatten(1).abs().amax(1)
            worst = int((off - room * scale).nan_to_num(torch.inf).argmax())
            if not float(off[worst]) <= room * float(scale[worst]):
                raise ReplayError(
                    f"sensitivity: {self.experiment.name}, seed {self.experiment.seed_labels[worst]}, epoch {epoch}: "
                    f"{name} trained again differs from the archive's by {float(off[worst]):.2g}, with weights up to "
                    f"{float(scale[worst]):.2g}: more than rounding, so that a derivative would be another run's; "
                    "train the run again with this version on this machine"
                    + (", in float64" if self.experiment.dtype == "float32" else "")
                )
            self.difference = np.maximum(self.difference, off.cpu().numpy())
            if self.anchors:
                mine.copy_(wanted)
        self.compared = max(self.compared, epoch)


def _part(batches: Batches, members: slice) -> Batches:
    rows = None if batches.rows is None else batches.rows[members]
    return replace(batches, inputs=batches.inputs[members], targets=batches.targets[members], rows=rows)


def taken(samples: Tensor, rows: Tensor | None) -> Tensor:
    """The samples (member, batch, ...) that `rows`, (member, batch), names of (member, sample, ...); all for None."""
    if rows is None:
        return samples
    return torch.gather(
        samples, 1, rows.view(*rows.shape, *[1] * (samples.ndim - 2)).expand(-1, -1, *samples.shape[2:])
    )


def recorded_weights(ds: xr.Dataset, ensemble: Ensemble, seeds: Sequence[int], last: int) -> dict[int, Named]:
    """The weights and biases in an archive of one run at its epochs up to `last`, as the ensemble names them."""
    if isinstance(ensemble.architecture, nn.Module):
        return _recorded_entries(ds, ensemble, seeds, last)
    held = ds[["weight", *(["bias"] if "bias" in ds else [])]].sel(seed=list(seeds))
    held = held.sel(epoch=ds["epoch"] <= last).transpose("epoch", "seed", "layer", "node", ..., missing_dims="ignore")
    found: dict[int, Named] = {}
    for epoch in held["epoch"].values:
        at = held.sel(epoch=epoch).load()
        named: Named = {}
        for name, tensor in ensemble.values.items():
            kind, _, layer = name.rpartition("_")
            if kind not in at or int(layer) not in at["layer"].values:
                continue
            numbers = torch.from_numpy(np.array(at[kind].sel(layer=int(layer)).values, dtype=np.float64))
            flat = tensor.flatten(2) if kind == "weight" else tensor
            cut = numbers[(slice(None), *(slice(n) for n in flat.shape[1:]))]
            named[name] = cut.reshape(len(seeds), *tensor.shape[1:])
        found[int(epoch)] = named
    return found


def _recorded_entries(ds: xr.Dataset, ensemble: Ensemble, seeds: Sequence[int], last: int) -> dict[int, Named]:
    """The parameters of modules of the user's own in an archive."""
    by_name = own_modules.named(ds.sel(seed=list(seeds)).sel(epoch=ds["epoch"] <= last))
    found: dict[int, Named] = {}
    for epoch in next(iter(by_name.values()))["epoch"].values:
        held = {n: by_name[n].sel(epoch=epoch).transpose("seed", ...).values for n in ensemble.values}
        found[int(epoch)] = {n: torch.from_numpy(np.array(v, dtype=np.float64)) for n, v in held.items()}
    return found
