"""Measure observables after a run, from its recorded parameters: lazily, one task per member and block of epochs.

A student is rebuilt from the numbers that were recorded, its data are drawn again (a draw depends on the experiment,
the seed and the epoch only), and the same code measures it that measures during a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import torch
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from tsdyn import registers, schema
from tsdyn.analysis.identity import nodes_of, points, refuse_part
from tsdyn.archive import additions, reading
from tsdyn.archive.selecting import experiment_of
from tsdyn.arguments import ARCHIVE, takes
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.any_module import Own, held_tensors
from tsdyn.networks.network import Network
from tsdyn.observables import registry
from tsdyn.observables.registry import Observed
from tsdyn.problem import input_files
from tsdyn.running import packages
from tsdyn.running.members import Members
from tsdyn.running.own_modules import Maker, refuse_unmeasurable
from tsdyn.running.runner import own_device
from tsdyn.vocabulary import DIMENSIONS, FAMILIES

#: A task holds the recorded parameters of one member at as many epochs as fit in this; its data are drawn once.
TASK_BYTES = 1 << 27
#: A teacher may differ from the recorded one by a thousand roundings, since QR rounds differently on other machines.
SAME_TEACHER = 1e-4


@takes(ds=ARCHIVE)
def measure(
    ds: xr.Dataset | str | Path,
    observables: Sequence[str | Observed],
    epochs: int | Iterable[int] | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
) -> xr.Dataset:
    """Observables of a training run or sweep, measured from its recorded parameters as the run would have done; lazy.

    On the machine and with the engine that trained, the numbers are the bits that recording would have given.  Members
    that died or had stopped are NaN, as in a run.  Computing takes one task per member, on any dask scheduler.

    Args:
        ds: An archive as `tsdyn.open` gives it, a slice of one that keeps all layers, or its directory.
        observables: Names as in ``record.observables``, or observables of the user's own, which are then known to this
            process.
        epochs: Recorded epochs to measure at; None: all of `ds`.
        student, teacher: Functions that make the modules of the user's own with which it was run, if it was; None:
            they are imported from the paths that the experiment names.

    Returns:
        A Dataset over (swept..., seed, epoch, ...) of the asked variables, with the labels of `ds`.

    Raises:
        ExperimentError: for a name that is no observable, or cannot be measured of this experiment's networks.
        ValueError: if parameters were not recorded, an epoch was not, or the Dataset is not one experiment's.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=0)
        >>> tsdyn.measure(ds, ["gradient_rms"]).gradient_rms.dims
        ('seed', 'epoch', 'layer', 'node')
    """
    if not isinstance(ds, xr.Dataset):
        ds = reading.open(ds, verify=True)
    dropped = [dim for dim in ("seed", "epoch") if dim in ds.coords and dim not in ds.dims]
    ds = _at_epochs(ds.expand_dims(dropped) if dropped else ds, epochs)
    passed = _Passed(tuple(o for o in observables if isinstance(o, Observed)), student, teacher)
    passed.make_known()
    names = schema.expand(o.name if isinstance(o, Observed) else o for o in observables)
    found_at = list(points(ds).values())
    if len(found_at) == 1:  # the points of a sweep have each their own; the teacher is compared in any case
        _refuse_other_inputs(ds, found_at[0][1])
    for _, single in found_at:
        if not single.of_own_modules:
            refuse_part(ds, nodes_of(single), "measure")
    asked = [(chosen, _asked(single, names, passed)) for chosen, single in found_at]
    needed = _needed(ds, asked[0][1])
    swept = tuple(str(d) for d in ds[needed[0]].dims if any(d in chosen for chosen, _ in asked))
    outer = (*swept, "seed", "epoch")
    plan = _Plan(ds, names, outer, {n: _stored(ds[n], outer) for n in needed}, passed, _labels(ds, asked))
    found = plan.measured(asked)
    held = {"layer", *(dim for array in found.values() for dim in array.dims)}
    coords = {name: coord for name, coord in ds.coords.items() if set(coord.dims) <= held}
    coords |= {dim: c for dim, c in plan.labels.items() if dim in held}
    attrs = ds.attrs | schema.united([schema.declarations(names), ds.attrs])
    return xr.Dataset(found, coords, attrs).isel(dict.fromkeys(dropped, 0))


@dataclass(frozen=True)
class _Passed:
    """What is passed from Python to the tasks."""

    observables: tuple[Observed, ...]
    student: Maker | None
    teacher: Maker | None
    parts: tuple[registers.Sent, ...] = ()

    def make_known(self) -> None:
        """Register the observables in this process; tasks in another one are sent them (`parts`)."""
        for each in self.observables:
            if not registers.OBSERVABLES.holds(each.name, each):
                schema.adopt(each.variable)
                registers.OBSERVABLES.add(each.name, each)


def _at_epochs(ds: xr.Dataset, epochs: int | Iterable[int] | None) -> xr.Dataset:
    if "epoch" not in ds.dims or "seed" not in ds.dims:
        raise ValueError(
            "measure: the Dataset has no labels seed and epoch; give the archive of a training run; flows and online "
            "runs record all that they have"
        )
    if epochs is None:
        return ds
    wanted = [epochs] if isinstance(epochs, (int, np.integer)) else list(epochs)
    there = ds.indexes["epoch"].tolist()
    missing = [epoch for epoch in wanted if epoch not in there]
    if missing or not wanted:
        few = there if len(there) <= 20 else [*there[:10], "...", *there[-3:]]
        raise ValueError(f"measure: epochs {missing or wanted} are not recorded; there are {', '.join(map(str, few))}")
    return ds.sel(epoch=sorted(set(map(int, wanted))))


def _refuse_other_inputs(ds: xr.Dataset, single: Experiment) -> None:
    before = input_files.kept(ds.attrs)
    if before:
        input_files.refuse_other(Path(single.name), single, before, input_files.digests(single))


def _asked(single: Experiment, names: Sequence[str], passed: _Passed) -> Experiment:
    """The experiment of a point as if it recorded `names`, too; its rules say what cannot be measured."""
    if single.kind != "training":
        raise ExperimentError(
            f"measure: {single.name} is of kind {single.kind!r}, which records all its variables; nothing is left"
        )
    if "parameter" in names and single.student.module is None:
        raise ExperimentError("measure: parameter is of modules of your own (student.module); ask for weight")
    recorded = [*schema.expand(registry.without_foreign(single, names).record.observables), *names]
    asked = single.replace({"record.observables": list(dict.fromkeys(recorded))})
    registry.load(asked)
    refuse_unmeasurable(asked, student=passed.student, teacher=passed.teacher)
    return asked


def _needed(ds: xr.Dataset, asked: Experiment) -> tuple[str, ...]:
    """The variables that hold the parameters of a student.

    Raises:
        ValueError: if one was not recorded, or layers are missing.
    """
    if asked.student.module is not None:
        needed: tuple[str, ...] = ("parameter",)
    else:
        needed = ("weight", "bias", *(FAMILIES["batch_norm"] if asked.student.batch_norm != "none" else ()))
    lost = [name for name in needed if name not in ds]
    if lost:
        raise ValueError(
            f"measure: the archive has no {', '.join(lost)}; only recorded parameters can be measured from: record "
            "weight (batch_norm, or parameter of modules of your own) in record.observables"
        )
    layers = list(range(1, asked.layout.depth + 1))
    if needed[0] == "weight" and ("layer" not in ds["weight"].dims or not set(layers) <= set(ds.indexes["layer"])):
        raise ValueError(f"measure: networks are made of all layers, {layers}; give the archive with all of them")
    return needed


def _labels(ds: xr.Dataset, asked: Sequence[tuple[Mapping[str, Any], Experiment]]) -> dict[str, xr.Variable]:
    """Labels of every dimension that a measured variable can have, for the widest point."""
    layouts = [single.layout for _, single in asked]
    found = {str(dim): ds[dim].variable for dim in ("layer", "node", "teacher_node", "input_node") if dim in ds.coords}
    sizes = {dim: max(layout.padded(dim) for layout in layouts) for dim in ("node", "teacher_node", "input_node")}
    sizes |= {dim: max(layout.padded(dim) for layout in layouts) for dim in ("mode", "entry", "teacher_entry")}
    sizes |= {"node_2": sizes["node"], "teacher_node_2": sizes["teacher_node"]}
    plain: dict[str, Any] = {dim: np.arange(size) for dim, size in sizes.items()}
    for dim, size in {entry for layout in layouts for entry in layout.extra}:
        plain[dim] = np.arange(max(size, plain[dim].size if dim in plain else 0))
    plain |= {
        "teacher_layer": np.arange(1, max(layout.padded("teacher_layer") for layout in layouts) + 1),
        "layer": np.arange(1, max(layout.depth for layout in layouts) + 1),
        "top_k": np.arange(1, max(layout.padded("top_k") for layout in layouts) + 1),
        "quantile": np.array(sorted({q for layout in layouts for q in layout.quantiles})),
    }
    return {d: xr.Variable(d, values, {"long_name": DIMENSIONS[d]}) for d, values in plain.items()} | found


def _stored(array: xr.DataArray, outer: Sequence[str]) -> Any:
    """A variable's numbers with the dimensions of members first; chunks are whole along the others."""
    array = array.transpose(*outer, ...)
    return array.chunk(dict.fromkeys(array.dims[len(outer) :], -1)).data if array.chunks else array.values


@dataclass(frozen=True)
class _Plan:
    """The tasks of one call."""

    ds: xr.Dataset
    names: tuple[str, ...]
    outer: tuple[str, ...]
    stored: Mapping[str, Any]
    passed: _Passed
    labels: Mapping[str, xr.Variable]

    def measured(self, asked: Sequence[tuple[Mapping[str, Any], Experiment]]) -> dict[str, xr.Variable]:
        """The variables, each of blocks (swept..., seed, block of epochs)."""
        seeds, epochs = (self.ds.indexes[dim].tolist() for dim in ("seed", "epoch"))
        at_once = self._epochs_at_once(asked)
        windows = [slice(low, min(low + at_once, len(epochs))) for low in range(0, len(epochs), at_once)]
        sizes = tuple(self.ds.sizes[dim] for dim in self.outer[:-2])
        parts: dict[str, dict[tuple[int, ...], Any]] = {name: {} for name in self.names}
        dtype = np.result_type(*(np.dtype(single.dtype) for _, single in asked))
        for chosen, single in asked:
            place = tuple(self.ds.get_index(dim).get_loc(chosen[dim]) for dim in self.outer[:-2])
            own = set(single.seed_labels)
            for (s, seed), (w, window) in itertools.product(enumerate(seeds), enumerate(windows)):
                if seed in own:
                    task = self._task(single, (*place, s), seed, epochs[window], window)
                    for name in self.names:
                        shape = (*(1 for _ in (*place, s)), window.stop - window.start, *self._inner(name))
                        part = dask.array.from_delayed(task[name], shape, dtype)
                        parts[name][(*place, s, w)] = part
        lengths = [window.stop - window.start for window in windows]
        shape = (*sizes, len(seeds), len(windows))
        return {name: self._joined(name, parts[name], shape, lengths, dtype) for name in self.names}

    def _epochs_at_once(self, asked: Sequence[tuple[Mapping[str, Any], Experiment]]) -> int:
        dims = len(self.outer)
        each: int = sum(math.prod(a.shape[dims:]) * int(a.dtype.itemsize) for a in self.stored.values())
        return max(1, TASK_BYTES // max(1, each))

    def _inner(self, name: str) -> tuple[int, ...]:
        return tuple(self.labels[dim].size for dim in self._inner_dims(name))

    @staticmethod
    def _inner_dims(name: str) -> tuple[str, ...]:
        return tuple(dim for dim in schema.variable(name).dims if dim not in ("seed", "epoch"))

    def _task(self, single: Experiment, place: tuple[int, ...], seed: int, epochs: list[int], window: slice) -> Any:
        parameters = {name: array[(*place, window)] for name, array in self.stored.items()}
        taught = {
            name: _stored(self.ds[name], [d for d in self.outer if d in self.ds[name].dims])
            for name in ("teacher_weight", "teacher_bias", "teacher_parameter")
            if name in self.ds
        }
        taught = {
            name: array[tuple(p for p, d in zip(place, self.outer, strict=False) if d in self.ds[name].dims)]
            for name, array in taught.items()
        }
        inner = {name: self._inner(name) for name in self.names}
        passed = replace(self.passed, parts=packages.of_this_process(single))
        return delayed(_records)(single, seed, epochs, parameters, taught, inner, passed, len(place))

    def _joined(
        self,
        name: str,
        parts: Mapping[tuple[int, ...], Any],
        shape: Sequence[int],
        lengths: Sequence[int],
        dtype: np.dtype,
    ) -> xr.Variable:
        """One variable of all blocks, by (swept..., seed, window of epochs); NaN where there is none."""

        def along(place: tuple[int, ...]) -> Any:
            axis = len(place)
            if axis < len(self.outer):
                return dask.array.concatenate([along((*place, i)) for i in range(shape[axis])], axis)
            sizes = (*(1 for _ in place[:-1]), lengths[place[-1]], *self._inner(name))
            return parts[place] if place in parts else dask.array.full(sizes, np.nan, dtype, chunks=sizes)

        return xr.Variable((*self.outer, *self._inner_dims(name)), along(()), schema.variable(name).attrs)


def _records(
    asked: Experiment,
    seed: int,
    epochs: Sequence[int],
    parameters: Mapping[str, NDArray],
    taught: Mapping[str, NDArray],
    inner: Mapping[str, tuple[int, ...]],
    passed: _Passed,
    lead: int,
) -> dict[str, NDArray]:
    """The observables of one member at some epochs: name → (1, ..., epoch, inner...), NaN where it had none.

    Args:
        asked: Experiment of its point.
        seed: Its label.
        epochs: Labels of the epochs.
        parameters: Recorded variables of the student, (epoch, ...).
        taught: Recorded variables of the teacher, (...).
        inner: Name → padded sizes of the dimensions beside members and epochs.
        passed: What was passed from Python.
        lead: Number of dimensions before the epochs, of size 1.
    """
    members: Members | None = None
    found = {name: np.full((len(epochs), *sizes), np.nan, asked.dtype) for name, sizes in inner.items()}
    with packages.known(passed.parts), own_device():
        # the recorded numbers say which members stopped: NaN
        single = asked.replace({"seeds": [seed], "training.stop": None})
        for position, epoch in enumerate(epochs):
            now = {name: np.asarray(array[position]) for name, array in parameters.items()}
            if np.isnan(_recorded(single, now)).any():
                continue
            if members is None:
                members = Members(single, "cpu", passed.student, passed.teacher)
                members.teachers = [_as_recorded(members.teachers[0], single, seed, taught)]
            _put(members, now)
            for name, value in members.measure(epoch, tuple(inner)).items():
                blocks = (
                    [((layer,), one) for layer, one in enumerate(value)] if isinstance(value, list) else [((), value)]
                )
                for at, block in blocks:
                    found[name][(position, *at, *(slice(n) for n in block.shape[1:]))] = block[0]
    return {name: array.reshape(*([1] * lead), *array.shape) for name, array in found.items()}


def _recorded(single: Experiment, now: Mapping[str, NDArray]) -> NDArray:
    """All recorded numbers of a student at one epoch, without padding."""
    if "parameter" in now:
        return now["parameter"][: single.layout.entries]
    layout = single.layout
    blocks = [now["weight"][i, :n, :below] for i, (n, below) in enumerate(zip(*_shape(layout), strict=True))]
    biases = [now["bias"][i, : len(block)] for i, block in enumerate(blocks)]
    norms = [
        now[name][i, :n] for name in FAMILIES["batch_norm"] if name in now for i, n in enumerate(layout.widths[:-1])
    ]
    return np.concatenate([*(block.ravel() for block in blocks), *biases, *norms])


def lost_parameters(ds: xr.Dataset) -> NDArray:
    """Whether one of a member's parameters is not stored at an epoch at which it lived, (seed, epoch), of one run.

    `tsdyn.archive.integrity.repair` could not keep it, or the epoch was recorded for the other seeds only.
    """
    if "death_epoch" not in ds.coords:
        return np.zeros((ds.sizes["seed"], ds.sizes["epoch"]), bool)
    lost = ~additions.parameters_there(ds)
    if experiment_of(ds).training.stop is not None:  # a member that stopped has nothing from there on, and no death
        lost &= np.maximum.accumulate(~lost[:, ::-1], axis=1)[:, ::-1]
    death, epochs = ds["death_epoch"].values[:, None], ds["epoch"].values
    return lost & ~((death >= 0) & (epochs >= death))


def _shape(layout: schema.Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return layout.widths, layout.input_widths


def _put(members: Members, now: Mapping[str, NDArray]) -> None:
    """Set the only member to recorded numbers."""
    ensemble = members.ensemble
    tensors = ensemble.values | ensemble.buffers
    if "parameter" in now:
        start = 0
        for name, tensor in held_tensors(ensemble.module(0)).items():
            end = start + tensor.numel()
            tensors[name][0].copy_(torch.from_numpy(now["parameter"][start:end]).reshape(tensor.shape))
            start = end
        return
    for name, tensor in tensors.items():
        variable, _, layer = name.rpartition("_")
        held = now[variable][int(layer) - 1]
        rows = tensor.flatten(2) if variable == "weight" else tensor
        block = np.ascontiguousarray(held[tuple(slice(n) for n in rows.shape[1:])])
        tensor[0].copy_(torch.from_numpy(block).reshape(tensor.shape[1:]))


def _as_recorded(drawn: Network | Own, single: Experiment, seed: int, taught: Mapping[str, NDArray]) -> Network | Own:
    """The teacher with the recorded numbers, which another machine may draw with other roundings.

    Raises:
        ValueError: if the recorded teacher is another one: data and teacher would not be those of the run.
    """
    if isinstance(drawn, Own):
        recorded = taught.get("teacher_parameter")
        own = drawn.entries().numpy()
        if recorded is not None:
            _refuse_another(own, np.asarray(recorded)[: len(own)], single, seed)
        return drawn
    if not {"teacher_weight", "teacher_bias"} <= set(taught):
        return drawn
    weights, biases = [], []
    for i, (weight, bias) in enumerate(zip(drawn.weights, drawn.biases, strict=True)):
        rows = weight.flatten(1).numpy()
        block = np.ascontiguousarray(taught["teacher_weight"][i, : rows.shape[0], : rows.shape[1]]).astype(rows.dtype)
        column = np.ascontiguousarray(taught["teacher_bias"][i, : rows.shape[0]]).astype(rows.dtype)
        _refuse_another(rows, block, single, seed)
        weights.append(torch.from_numpy(block).reshape(weight.shape))
        biases.append(None if bias is None else torch.from_numpy(column))
    return drawn.with_parameters(weights, biases)


def _refuse_another(drawn: NDArray, recorded: NDArray, single: Experiment, seed: int) -> None:
    scale = float(np.abs(drawn).max(initial=0.0))
    if drawn.shape != recorded.shape or not float(np.abs(drawn - recorded).max(initial=0.0)) <= SAME_TEACHER * scale:
        raise ValueError(
            f"measure: the teacher recorded for seed {seed} is not the one that {single.name} draws: the Dataset "
            "carries another archive's experiment, or an input file was replaced; put it back, or ask each archive "
            "by itself"
        )
