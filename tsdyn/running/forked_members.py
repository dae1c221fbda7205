"""The members of a run that branches off another: they have its state at one epoch, are changed there, and go on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from tsdyn.archive import reading, states
from tsdyn.archive.run_directory import EXPERIMENT
from tsdyn.archive.sweep_directory import sweep_points
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.engine.rule import Rule
from tsdyn.experiment.branching import Fork
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.problem import input_files
from tsdyn.problem.inputs import generator
from tsdyn.problem.students import draw_student
from tsdyn.running.members import Members
from tsdyn.running.own_modules import Maker

#: Seeds of new starts: those of no member, since labels end below 2^32.
_ELSEWHERE = 1 << 32

State = dict[str, np.ndarray]


class ForkedMembers:
    """All members of a forked run; a `tsdyn.running.protocol.Runnable`.

    The steps up to the fork do nothing: its beginning is the state of the run that it branches off, changed as
    ``fork.perturb`` says.
    """

    def __init__(
        self,
        experiment: Experiment,
        device: str = "cpu",
        student: Maker | None = None,
        teacher: Maker | None = None,
    ) -> None:
        self.experiment, self.device, self._fork = experiment, device, experiment.fork
        self._student, self._teacher = student, teacher
        self._after = Members(experiment.as_trained, device, student, teacher)
        self._begun = False

    def draw(self) -> None:
        """Set the members to the changed state, unless one was restored; and draw the training data."""
        if not self._begun:
            origin = self.experiment.replace({"fork": {}})
            _refuse_other_inputs(origin, Path(str(self._fork.parent)))
            before = _state(origin, self._fork, self.device, self._student, self._teacher)
            if self._after.student is None:
                state = perturbed(self.experiment, before, self.device)
            else:
                start = Members(origin, self.device, self._student, self._teacher).ensemble.values
                state = perturbed_module(self.experiment, before, start)
            own = self._after.state()
            self._after.restore(own | {name: array for name, array in state.items() if name in own})
            self._begun = True
        self._after.draw()

    def advance(self, step: int) -> list[int]:
        """Train the epoch that ends at `step` if it comes after the fork."""
        return self._after.advance(step) if step > self._fork.fork_epoch else []

    def measure(self, step: int, variables: tuple[str, ...]) -> dict[str, Any]:
        return self._after.measure(step, variables)

    def constants(self) -> dict[str, Any]:
        return self._after.constants()

    def outcome(self) -> dict[str, Any]:
        return self._after.outcome()

    def state(self) -> State:
        return self._after.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._after.restore(state)
        self._begun = True


def _refuse_other_inputs(origin: Experiment, parent: Path) -> None:
    """Refuse to branch off a run whose input files are others now: its children would be those of another run.

    Raises:
        DirectoryError: naming the files.
    """
    runs = _runs(parent) if input_files.files(origin) else {}
    # its directory may have been asked for more epochs and seeds since
    alike = {_whatever_it_gains(run): parent / name for name, run in runs.items()}
    folder = alike.get(_whatever_it_gains(origin))
    if folder is not None and any(folder.rglob("*.nc")):
        before = input_files.kept(reading.opened(folder).attrs)
        input_files.refuse_other(folder, origin, before or {}, input_files.digests(origin))


def _state(origin: Experiment, fork: Fork, device: str, student: Maker | None, teacher: Maker | None) -> State:
    """The state of the run at the epoch of the fork."""
    kept = _kept(origin.to_toml(), str(fork.parent), fork.fork_epoch, device, student, teacher)
    return {name: array.copy() for name, array in kept.items()}


@lru_cache(maxsize=4)  # branches at one epoch share it
def _kept(text: str, parent: str, epoch: int, device: str, student: Maker | None, teacher: Maker | None) -> State:
    """The state after `epoch`: from the latest that the run keeps, or recorded weights that are all of it, and from
    there on by training again.
    """
    members = Members(Experiment.from_toml_text(text), device, student, teacher)
    members.draw()
    first, moments = 0, Rule.of(members.experiment.training, 1).optimizer.moments
    if epoch and not moments and not members.experiment.deep and members.student is None:
        first = _restored(members, Path(parent), epoch)
    first = _resumed(members, Path(parent), first, epoch)
    for step in range(first + 1, epoch + 1):
        members.advance(step)
    return {name: np.array(array) for name, array in members.state().items()}


def _resumed(members: Members, parent: Path, after: int, epoch: int) -> int:
    """Set members to the latest state that the run keeps from `after` to `epoch`; returns its epoch, or `after`."""
    folder = folders(parent).get(identity(members.experiment))
    held = [e for e in states_kept(folder) if after < e <= epoch]
    if folder is None or not held:
        return after
    members.restore(states.state_after(folder, held[-1]))
    return held[-1]


def folders(path: Path) -> dict[str, Path]:
    """The directories of a run, or of a sweep's runs, by `identity`; none where there is no such archive.

    A point that has not gained the newest seeds of its sweep yet is left out: what it holds is of fewer members.
    """
    runs = _runs(path)
    return {identity(run): path / name for name, run in runs.items() if _holds(path / name, run.seed_labels)}


def _runs(path: Path) -> dict[str, Experiment]:
    """The runs of a directory, by the name of their own in it; none where there is no such archive."""
    try:
        whole = Experiment.from_toml(path / EXPERIMENT, archived=True)
        return {".": whole} if not whole.sweep else {name: run for name, (_, run) in sweep_points(path).items()}
    except (ArchiveError, ExperimentError, OSError):
        return {}


def _whatever_it_gains(experiment: Experiment) -> str:
    """A text that a run keeps when it gains epochs, seeds or observables."""
    parts = {key: part for key, part in experiment.as_dict().items() if key not in ("record", "name", "seeds")}
    return repr(sorted((parts | {"training": {**parts["training"], "epochs": 0}}).items()))


def _holds(folder: Path, seeds: tuple[int, ...]) -> bool:
    """Whether the run in a directory is of these seeds."""
    try:
        return Experiment.from_toml(folder / EXPERIMENT, archived=True).seed_labels == seeds
    except (ArchiveError, ExperimentError, OSError):
        return False


def states_kept(folder: Path | None) -> dict[int, int]:
    """Epoch → bytes of the states that the run in a directory keeps; none if that cannot be read."""
    try:
        return {} if folder is None else states.kept(folder)
    except (ArchiveError, OSError):  # it is trained again
        return {}


def identity(experiment: Experiment) -> str:
    """A text that is the same for runs of the same members, whatever they record and are called."""
    return repr(sorted((key, part) for key, part in experiment.as_dict().items() if key not in ("record", "name")))


def _restored(members: Members, parent: Path, epoch: int) -> int:
    """Set members without moments to the latest weights up to `epoch` that are recorded of all; their epoch, or 0."""
    experiment = members.experiment
    watched = experiment.training.stop is not None  # what a watch has seen is not in the weights
    if watched or identity(experiment) not in folders(parent):
        return 0
    try:
        ds = _point(reading.open(parent, verify=True), experiment)
    except (ArchiveError, KeyError, ValueError):
        return 0
    if ds is None or not {"weight", "bias"} <= set(ds) or ds["weight"].dtype != experiment.dtype:
        return 0
    recorded = [int(e) for e in ds["epoch"].values if 0 < e <= epoch]
    ds = ds[["weight", "bias"]].sel(seed=list(experiment.seed_labels)).transpose("seed", "epoch", "layer", ...)
    for last in reversed(recorded):
        state = _as_recorded(members, ds.sel(epoch=last).load(), last)
        if state is not None:
            members.restore(state)
            return last
    return 0


def _as_recorded(members: Members, at: xr.Dataset, epoch: int) -> State | None:
    """The state of members without moments after an epoch, from the weights recorded there.

    None if not all are there of a member that lives: `repair` could not keep them, or the epoch is one that a shorter
    run of other seeds recorded.
    """
    experiment = members.experiment
    state = {name: np.array(array) for name, array in members.state().items()}
    death = at["death_epoch"].values
    dead = (death >= 0) & (death <= epoch)
    for layer in range(1, len(experiment.student_widths)):
        for name in ("weight", "bias"):
            held = state.get(f"{name}_{layer}")
            if held is not None:
                block = at[name].sel(layer=layer).values
                held[...] = block[tuple(slice(size) for size in held.shape)]
                if np.isnan(held[~dead]).any():
                    return None
    state["death_epoch"][...] = np.where(dead, death, -1)
    state["steps"] = np.array(epoch * experiment.steps)
    return state


def _point(ds: xr.Dataset, experiment: Experiment) -> xr.Dataset | None:
    """The point of an archive that is a run of `experiment`, whatever either records; None if there is none."""
    whole = Experiment.from_toml_text(str(ds.attrs["experiment"]), archived=True)
    if not whole.sweep:
        return ds if identity(whole) == identity(experiment) else None
    from tsdyn.analysis.identity import points

    wanted = identity(experiment)
    return next((ds.sel(chosen) for chosen, single in points(ds).values() if identity(single) == wanted), None)


# --- what is changed -------------------------------------------------------------------------------------------------


def perturbed(experiment: Experiment, state: State, device: str = "cpu") -> State:
    """The state after the change that ``fork.perturb`` names, of every member that lives."""
    for kind, given in experiment.fork.perturb.items():
        if kind == "set":
            continue
        before = {name: array.copy() for name, array in state.items()}
        fresh = _starts(experiment, device) if kind in ("gaussian", "reinitialise") else []
        for member, seed in enumerate(experiment.seed_labels):
            _change(kind, given, experiment, state, before, member, seed, fresh)
    return state


def perturbed_module(experiment: Experiment, state: State, start: Mapping[str, Tensor]) -> State:
    """`perturbed` for members that are a user's own modules; `start`: their parameters at epoch 0, by name.

    ``gaussian`` is relative to the rms of the parameter at epoch 0, for a ``bias`` to that of the ``weight`` beside it.
    """
    fork = experiment.fork
    for kind, given in fork.perturb.items():
        for member, seed in enumerate(experiment.seed_labels):
            match kind:
                case "gaussian":
                    rng = generator(seed, "fork", fork.fork_epoch, fork.branch)
                    for name in start:
                        beside = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
                        size = given * float(start.get(beside, start[name])[member].square().mean().sqrt())
                        array = state[f"module.{name}"]
                        array[member] += (size * rng.standard_normal(array.shape[1:])).astype(array.dtype)
                case "weight":
                    _one_number(experiment, state, given)[member] += given["by"]
                case "set":
                    pass
                case _:
                    raise AssertionError(f"fork.perturb: {kind}")  # the experiment's rules refuse others
    return state


def _one_number(experiment: Experiment, state: State, given: Mapping[str, Any]) -> np.ndarray:
    """A view (member,) of the weight, or the bias, that ``fork.perturb.weight`` names in a user's own module."""
    layer = (experiment.student.layers or ())[given["layer"] - 1]
    name = f"module.{layer}.{'weight' if 'input_node' in given else 'bias'}"
    if name not in state:
        raise ExperimentError(
            f"fork.perturb.weight: layer {given['layer']} of the student, {layer!r}, has no parameter "
            f"{name.removeprefix('module.')!r} of its own; take another layer, or gaussian"
        )
    if "input_node" not in given:
        return state[name][:, given["node"]]
    row = state[name][:, given["node"]].reshape(len(state[name]), -1)  # a view: of a convolution its kernel
    if given["input_node"] >= row.shape[1]:
        raise ExperimentError(f"fork.perturb.weight.input_node = {given['input_node']}: of {row.shape[1]}")
    return row[:, given["input_node"]]


def _starts(experiment: Experiment, device: str) -> list[tuple[Network, Network]]:
    """Each member's start, and another start of the same law that the branch keys."""
    fork = experiment.fork
    origin = experiment.replace({"fork": {}})
    members = Members(origin, device)
    found = []
    for member, (seed, teacher) in enumerate(zip(origin.seed_labels, members.teachers, strict=True)):
        taught = teacher if isinstance(teacher, Network) else None
        other = draw_student(origin, seed + _ELSEWHERE * (1 + fork.branch), taught)
        found.append((members.ensemble.network(member), other))
    return found


def _change(
    kind: str, given: Any, experiment: Experiment, state: State, before: State, member: int, seed: int, fresh: Any
) -> None:
    fork, depth = experiment.fork, len(experiment.student_widths) - 1
    match kind:
        case "gaussian":
            rng = generator(seed, "fork", fork.fork_epoch, fork.branch)
            for layer in range(1, depth + 1):
                size = given * float(fresh[member][0].weights[layer - 1].square().mean().sqrt())
                for name in _named(state, layer):
                    array = state[name]
                    array[member] += (size * rng.standard_normal(array.shape[1:])).astype(array.dtype)
        case "weight":
            layer, node = given["layer"], given["node"]
            if "input_node" in given:
                row = state[f"weight_{layer}"][member][node].reshape(-1)  # a view: of a convolution its kernel
                if given["input_node"] >= len(row):
                    raise ExperimentError(f"fork.perturb.weight.input_node = {given['input_node']}: of {len(row)}")
                row[given["input_node"]] += given["by"]
            elif f"bias_{layer}" not in state:
                raise ExperimentError("fork.perturb.weight: the student has no biases; give input_node")
            else:
                state[f"bias_{layer}"][member, node] += given["by"]
        case "silence":
            for place in _places(state, given["layer"], given["node"], moments=True):
                place.of(state)[member] = 0
        case "reinitialise":
            layer, width = given["layer"], experiment.student_widths[given["layer"]]
            for node in [given["node"]] if "node" in given else range(width):
                _drawn_again(state, layer, node, member, fresh[member][1])
        case "transplant":
            source, to = experiment.seed_labels.index(given["seed"]), given.get("to", given["node"])
            mine = _places(state, given["layer"], to, moments=True)
            for place, other in zip(mine, _places(state, given["layer"], given["node"], moments=True), strict=True):
                place.of(state)[member] = other.of(before)[source]
        case "swap":
            first, second = given["nodes"]
            one, two = (_places(state, given["layer"], node, moments=True) for node in (first, second))
            for a, b in zip(one, two, strict=True):
                a.of(state)[member], b.of(state)[member] = b.of(before)[member], a.of(before)[member]
        case _:
            raise AssertionError(f"fork.perturb: {kind}")  # `Fork` refuses others


def _drawn_again(state: State, layer: int, node: int, member: int, new: Network) -> None:
    state[f"weight_{layer}"][member, node] = new.weights[layer - 1][node].cpu().numpy()
    bias = new.biases[layer - 1]
    if bias is not None:
        state[f"bias_{layer}"][member, node] = bias[node].cpu().numpy()
    state[f"weight_{layer + 1}"][member][:, node] = new.weights[layer][:, node].cpu().numpy()
    for place in _places(state, layer, node, moments=True):
        if place.name.split("_")[0] not in ("weight", "bias"):
            place.of(state)[member] = 0


class _Place:
    """Where a state holds the numbers of one node: an array, and the axis and position in it."""

    def __init__(self, name: str, axis: int, node: int) -> None:
        self.name, self._axis, self._node = name, axis, node

    def of(self, state: State) -> np.ndarray:
        """A view (member, ...) of the numbers."""
        return state[self.name][(slice(None),) * self._axis + (self._node,)]


def _named(state: State, layer: int) -> list[str]:
    return [name for name in (f"weight_{layer}", f"bias_{layer}") if name in state]


def _places(state: State, layer: int, node: int, *, moments: bool) -> list[_Place]:
    """All numbers of a hidden node: incoming weights, bias, outgoing weights, and their moments."""
    own = [(name, 1) for name in _named(state, layer)] + [(f"weight_{layer + 1}", 2)]
    prefixes = {name.removesuffix(f"_weight_{layer}") for name in state if name.endswith(f"_weight_{layer}")}
    every = [(f"{prefix}_{name}", axis) for prefix in sorted(prefixes) for name, axis in own] if moments else []
    flattened = [name for name, axis in own if axis == 2 and state[name].shape[2] != state[f"weight_{layer}"].shape[1]]
    if flattened:
        raise ExperimentError(f"fork.perturb: layer {layer} is a convolution under a flattened layer; take gaussian")
    return [_Place(name, axis, node) for name, axis in [*own, *every]]
