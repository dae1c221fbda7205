"""Runs again from their start: the state of members at any step, by the engine's own steps, compared with the archive.

Draws are keyed, so a run can be repeated from its experiment alone.  A `Course` steps through a run in float64, one
step or many at a time, and goes to any state that it is given.  Where the archive holds the state after an epoch, as
recorded weights or as a state kept along the way, the epochs after it can be gone through without those before.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from tsdyn.archive import states
from tsdyn.engine import dropout, general, train
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble, Named
from tsdyn.engine.rule import Rule, of_members
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import new_at_every_step, training_generator
from tsdyn.running import own_modules
from tsdyn.running.members import Members
from tsdyn.through_training.steps import Inputs, Kind, OwnModule, State, kind_of

#: Largest difference to the recorded weights that counts as rounding, relative to the largest parameter of the layer:
#: the root of a unit of the last place, since training amplifies rounding wherever a gate flips.  Not of each parameter
#: by itself: a bias that BatchNorm subtracts again consists of rounding alone.
ROUNDING = {"float64": 2e-8, "float32": 1e-3}


#: Bytes of kept states that are read at once.
READ_BYTES = 1 << 26


class ReplayError(ExperimentError):
    """A replayed run is not the recorded one."""


@dataclass
class Data:
    """The samples of one epoch: inputs and targets (member, sample, ...), and rows (member, step, batch) or None."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor | None


@dataclass
class KeptStates:
    """Training states that a run keeps along the way (``record.state_every``).

    Attributes:
        folder: Directory of the run.
        epochs: The epochs after which they are.
        bytes: Of the largest of them.
        places: Where the members that are asked for stand among the run's.
    """

    folder: Path
    epochs: tuple[int, ...]
    bytes: int
    places: tuple[int, ...]
    _read: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def after(self, epoch: int, like: Ensemble) -> State:
        """The members' state after one of `epochs`, as `State.of` gives it of an ensemble like `like`."""
        if epoch not in self._read:  # and those before it, which are asked for next: opening the file takes long
            upto = self.epochs.index(epoch) + 1
            wanted = self.epochs[max(0, upto - max(1, READ_BYTES // max(1, self.bytes))) : upto]
            self._read = states.states_after(self.folder, wanted)
        arrays = self._read.pop(epoch)
        own = "module." if isinstance(like.architecture, nn.Module) else ""

        def named(tensors: Named, prefix: str) -> Named:
            at = {n: np.array(arrays[f"{prefix}{own}{n}"])[list(self.places)] for n in tensors}
            return {n: torch.from_numpy(array).to(tensors[n]) for n, array in at.items()}

        held = State.held(like)
        moments = {moment: named(tensors, f"{moment}_") for moment, tensors in held.moments.items()}
        return State(named(held.values, ""), named(held.buffers, ""), moments)


def marks(experiment: Experiment, epochs: int, anchors: Iterable[int]) -> list[int]:
    """The epochs that divide a replay into blocks: 0, and those below `epochs` after which the archive holds the state.

    These are `anchors`, whose recorded weights are the whole state, and those of ``record.state_every``, be the states
    there or not, so that what is computed does not depend on it.  A float32 run's states are other numbers than its
    replay's in float64, which does not begin from them.
    """
    every = experiment.record.state_every if experiment.dtype == "float64" else None
    kept = range(every, epochs, every) if every is not None else ()
    return sorted({0, *(epoch for epoch in anchors if epoch < epochs), *kept})


@dataclass
class Course:
    """The training of some members of a run, in float64, step by step; steps are numbered from 1.

    Attributes:
        members: The members, as drawn; their ensemble is moved along by `advance`.
        epochs: How many epochs are trained.
        recorded: Epoch → (names of parameters → recorded values (member, ...)), with which the replay is compared ...
        anchored: ... and from which it goes on, if they are all that the next step depends on.
        kept: States that the archive keeps, from which it may begin.
        difference: Largest difference from what is recorded, (member,), of those epochs that were passed.
    """

    members: Members
    epochs: int
    recorded: Mapping[int, Named] = field(default_factory=dict)
    anchored: bool = True
    kept: KeptStates | None = None
    difference: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.members.draw()
        self.members.prepare()
        self.ensemble = self.members.ensemble.to(torch.float64)
        _ = self.kind
        self.difference = np.zeros(self.ensemble.members)
        self.compared = -1  #: the last epoch that was compared
        self.begun = 0  #: the epoch from whose state it goes on
        self.taken = 0
        self._data: dict[int, Data] = {}
        self._noise: dict[int, list[list[Mapping[str, Any]]]] = {}

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

    def kind_at(self, step: int) -> Kind:
        """`kind` with the noise of a step, if it draws any."""
        kind = self.kind
        if not isinstance(kind, OwnModule) or not self._called:
            return kind
        masks = dropout.drawn(self._called, self._noises(step), self.ensemble.device)
        return replace(kind, noise=general.Noise(self._called, tuple(masks)))

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

    @property
    def anchor_epochs(self) -> set[int]:
        """The epochs whose recorded weights are the whole state."""
        whole = set(self.ensemble.values)
        return {epoch for epoch, named in self.recorded.items() if self.anchors and set(named) == whole}

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """Blocks of steps that begin where the archive may hold the state: (steps before it, steps at its end)."""
        epochs = marks(self.experiment, self.epochs, self.anchor_epochs) if self.recorded else [0]
        return list(itertools.pairwise([*(e * self.per_epoch for e in epochs), self.steps])) if self.steps else []

    @property
    def known_epochs(self) -> list[int]:
        """The epochs that begin a block and whose state the archive holds."""
        held = self.anchor_epochs.union(() if self.kept is None else self.kept.epochs)
        return [first // self.per_epoch for first, _ in self.blocks if first and first // self.per_epoch in held]

    def known(self, step: int) -> State:
        """The state after so many steps, at one of `known_epochs`."""
        epoch = step // self.per_epoch
        if epoch in self.anchor_epochs:
            values = {n: self.recorded[epoch][n].to(t, copy=True) for n, t in self.ensemble.values.items()}
            return State.held(self.ensemble)._replace(values=values)
        assert self.kept is not None
        return self.kept.after(epoch, self.ensemble)

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

    @cached_property
    def _called(self) -> tuple[dropout.Call, ...]:
        """The calls of dropout layers in a step."""
        if not isinstance(self.ensemble.architecture, nn.Module) or not dropout.active(self.ensemble.architecture):
            return ()
        return dropout.calls(self.ensemble.module(0), self.given(1).input[0])

    def _noises(self, step: int) -> tuple[np.random.Generator, ...]:
        """Each member's generator of dropout noise, as it is before a step; () without dropout."""
        if not self._called:
            return ()
        epoch, seeds = self.epoch_of(step), self.experiment.seed_labels
        generators = [training_generator(self.experiment, seed, "dropout", epoch) for seed in seeds]
        if epoch not in self._noise:
            self._noise = {epoch: []}
            for _ in range(self.per_epoch):
                self._noise[epoch].append([copy.deepcopy(rng.bit_generator.state) for rng in generators])
                dropout.drawn(self._called, generators, self.ensemble.device)
        for rng, state in zip(generators, self._noise[epoch][(step - 1) % self.per_epoch], strict=True):
            rng.bit_generator.state = state
        return tuple(generators)

    # --- going along -----------------------------------------------------------------------------------------

    def state(self) -> State:
        """A copy of the present state."""
        return State.of(self.ensemble)

    def go_to(self, state: State, taken: int) -> None:
        """Set the members to a state that was reached after `taken` steps."""
        for mine, theirs in zip(State.held(self.ensemble).tensors(), state.tensors(), strict=True):
            mine.copy_(theirs)
        self.taken = self.ensemble.steps = taken

    def begin(self, state: State, taken: int) -> None:
        """Go to a state from which a block begins."""
        self.go_to(state, taken)
        self.begun = taken // self.per_epoch

    def arrive(self, state: State, taken: int) -> None:
        """Go to a state that the course itself would have after `taken` steps, and compare as `advance` does."""
        self.go_to(state, taken)
        if taken % self.per_epoch == 0:
            self._compare(self.epoch_of(taken))

    def meet(self, state: State) -> None:
        """Compare the present state with one that the archive holds of the same epoch.

        Raises:
            ReplayError: as `advance`.
        """
        mine = State.held(self.ensemble)
        for found, wanted in [(mine.values, state.values), *((mine.moments[m], t) for m, t in state.moments.items())]:
            self._refuse_off(found, wanted, self.taken // self.per_epoch)

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
                noises = self._noises(self.taken + 1)
                self._advance(Batches(data.inputs, data.targets, rows, now, noises), self.rule(self.taken + 1))
            self.taken += now
            self.ensemble.steps = self.taken
            self._refuse_moved_buffers()
            if self.taken % self.per_epoch == 0:
                self._compare(epoch)

    def _advance(self, batches: Batches, rule: Rule) -> None:
        backend = train.chosen(self.ensemble, rule)
        if backend is train.GENERAL:

            def seen(members: slice) -> Iterator[Batches]:  # with noise of its own, which is drawn in looking
                yield _part(replace(batches, noises=self._noises(self.taken + 1)), members)

            general.way(self.ensemble, seen, rule)
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
        self._refuse_off(self.ensemble.values, held, epoch)
        if self.anchors:
            for name, wanted in held.items():
                self.ensemble.values[name].copy_(wanted)
            self.begun = epoch
        self.compared = max(self.compared, epoch)

    def _refuse_off(self, found: Named, held: Mapping[str, Tensor], epoch: int) -> None:
        room = ROUNDING[self.experiment.dtype]
        scales: dict[str, Tensor] = {}
        numbered = {name: wanted for name, wanted in held.items() if wanted.numel()}
        for name, wanted in numbered.items():
            largest = of_members(wanted).abs().amax(1)
            scales[_layer(name)] = torch.maximum(largest, scales.get(_layer(name), largest))
        for name, wanted in numbered.items():
            off = of_members(found[name] - wanted).abs().amax(1)
            scale = scales[_layer(name)]
            worst = int((off - room * scale).nan_to_num(torch.inf).argmax())
            if not float(off[worst]) <= room * float(scale[worst]):
                since = f" from the archive's epoch {self.begun}" if self.begun else ""
                raise ReplayError(
                    f"sensitivity: {self.experiment.name}, seed {self.experiment.seed_labels[worst]}, epoch {epoch}: "
                    f"{name} trained again{since} differs from the archive's by {float(off[worst]):.2g}, with "
                    f"numbers up to {float(scale[worst]):.2g} in its layer: more than rounding, so that a derivative "
                    "would be another run's; train the run again with this version on this machine"
                    + (", in float64" if self.experiment.dtype == "float32" else "")
                )
            self.difference = np.maximum(self.difference, off.cpu().numpy())


def _layer(name: str) -> str:
    """What the parameters of one layer have in common: ``1`` of weight_1 and bias_1, ``top`` of top.weight."""
    above, dot, _ = name.rpartition(".")
    return above if dot else name.rpartition("_")[2]


def _part(batches: Batches, members: slice) -> Batches:
    rows = None if batches.rows is None else batches.rows[members]
    return replace(
        batches, inputs=batches.inputs[members], targets=batches.targets[members], rows=rows,
        noises=batches.noises[members],
    )  # fmt: skip


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
