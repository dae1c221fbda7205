"""Rebuilds the members of an archive: every student as a network, with its teacher and its data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias, assert_never

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from tsdyn.analysis.identity import begun, nodes_of, points, refuse_part
from tsdyn.analysis.lift import blockwise

from tsdyn.archive.selecting import experiment_of
from tsdyn.engine.loss import MSE, Loss, loss
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Student, Teacher
from tsdyn.experiment.subsets import left_out
from tsdyn.experiment.sweep_axes import axes
from tsdyn.networks.network import Network
from tsdyn.problem import augmentation, targets
from tsdyn.problem.inputs import evaluation_inputs, labels, training_inputs
from tsdyn.problem.teachers import draw_teacher
from tsdyn.schema import path_of

#: (experiment of a point, seed, name → numbers of one member) → what a measure takes.
Rebuild: TypeAlias = Callable[[Experiment, int, Mapping[str, NDArray]], Any]
#: Variables of the archive from which a student and its teacher are rebuilt.
PARAMETERS = ("weight", "bias", "teacher_weight", "teacher_bias")
#: Recorded errors by which it is noticed that the data are those of another experiment.
CHECKED = ("mse_eval", "loss_eval")
#: Values of ``teacher.init`` whose teachers can be redrawn from (experiment, seed) alone.
DRAWN = ("separated", "orthonormal", "gaussian")


@dataclass(frozen=True)
class Member:
    """One student at one epoch.

    Attributes:
        experiment: The experiment of its point of the sweep.
        seed: Its label.
        student, teacher: The recorded networks.
    """

    experiment: Experiment
    seed: int
    student: Network
    teacher: Network

    @cached_property
    def evaluation_inputs(self) -> Tensor:
        """Inputs of the evaluation set, redrawn: a draw depends only on the experiment and the seed."""
        return torch.from_numpy(evaluation_inputs(self.experiment, self.seed))

    @cached_property
    def training_inputs(self) -> Tensor:
        """Inputs of the training set as it was trained on; for fresh data those last measured on.

        With the points that the experiment's augmentation adds, and without the samples that it leaves out.
        """
        return self._drawn_inputs[self._kept]

    @cached_property
    def _drawn_inputs(self) -> Tensor:
        if self.experiment.data.train == "fresh":
            return torch.from_numpy(training_inputs(self.experiment, self.seed, self.experiment.training.epochs))
        return augmentation.training_set(self.experiment, self.seed, self.teacher)

    @cached_property
    def _kept(self) -> Tensor:
        kept = torch.ones(len(self._drawn_inputs), dtype=torch.bool)
        subset = self.experiment.data.leave_out.subset
        if subset is not None:
            kept[torch.from_numpy(left_out(self.experiment.data, subset))] = False
        return kept

    @property
    def loss(self) -> Loss:
        """The loss with which the student was trained."""
        return loss(self.experiment.training.loss)

    @cached_property
    def training_targets(self) -> Tensor:
        """Targets of the loss on `training_inputs`, (sample, output)."""
        match self.experiment.training.labels:
            case "teacher":
                classes = None
            case "data":
                classes = torch.from_numpy(labels(self.experiment, self.seed, "train"))
            case other:
                assert_never(other)
        clean = self.loss.target(self.teacher(self._drawn_inputs), classes)
        found = targets.of_training_set(self.experiment, self.seed, clean, self.experiment.training.epochs)
        return found[self._kept]


def member(ds: xr.Dataset, experiment: Experiment | None = None) -> Member:
    """The single member that `ds` holds, at one seed, epoch and point.

    Args:
        ds: The archive there.
        experiment: The experiment of its point; None takes the one that `ds` names.

    Raises:
        ValueError: naming the dimension that is left, or the variable that was not recorded; for convolutions and
            BatchNorm, and where the labels or the recorded teacher are not those of the experiment; for modules of the
            user's own, and recordings of a loop of the user's own.

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis.members import member
        >>> ds = tsdyn.open("runs/quickstart").sel(overrealization=1, seed=3).isel(epoch=-1)
        >>> one = member(ds, tsdyn.Experiment.from_toml("quickstart.toml").replace({"sweep": {}}))
        >>> one.student.widths, one.teacher.widths
        ((20, 5, 10), (20, 5, 10))
    """
    experiment = experiment_of(ds) if experiment is None else experiment
    _refuse_unbuildable(ds, experiment)
    left = [dim for dim in ("seed", "epoch", *(axis.dimension for axis in axes(experiment.sweep))) if dim in ds.dims]
    if left:
        raise ValueError(f"member: {', '.join(left)} left; select one")
    numbers = {str(name): array.values for name, array in _parameters(ds).items()}
    found = rebuilt(experiment, int(ds["seed"]), numbers, ds["layer"].values.tolist())
    _refuse_other_data(found, {name: float(ds[name]) for name in CHECKED if name in ds and not ds[name].ndim})
    return found


def rebuilt(experiment: Experiment, seed: int, numbers: Mapping[str, NDArray], layers: Sequence[int]) -> Member:
    """The member whose `PARAMETERS` are `numbers`, name → array as `networks` takes it.

    Raises:
        ValueError: if the teacher is not the one that the experiment draws for this seed.
    """
    student, teacher = networks(experiment, numbers, layers)
    _refuse_another(teacher, experiment, seed)
    return Member(experiment, seed, student, teacher)


def _refuse_other_data(member: Member, recorded: Mapping[str, float]) -> None:
    """Raise ValueError if the recorded error is not that of the recorded networks on the experiment's evaluation set.

    It distinguishes archives whose teachers are the same and whose data or activations are not.
    """
    error, outputs = recorded.get("mse_eval"), member.teacher.weights[-1].shape[0]
    if error is None and "loss_eval" in recorded and member.loss == MSE:
        error = 2 * recorded["loss_eval"] / outputs
    if error is None or not np.isfinite(error):
        return
    with torch.no_grad():
        wanted, given = member.teacher(member.evaluation_inputs), member.student(member.evaluation_inputs)
        found = float((wanted - given).square().mean())
    # ten thousand roundings of outputs this large, in each output
    rounding = 1e4 * float(torch.finfo(wanted.dtype).eps) * float(torch.maximum(wanted.abs(), given.abs()).max())
    if not abs(found - error) <= rounding * (2 * max(found, error) ** 0.5 + rounding):
        raise ValueError(
            f"member: the error recorded for seed {member.seed} is {error:.6g}, and {found:.6g} on the evaluation set "
            f"of {member.experiment.name}: the experiment is another archive's (archives joined by xarray keep the "
            "first one's), or an input file was replaced: open archives together by tsdyn.open([...])"
        )


def _refuse_unbuildable(ds: xr.Dataset, experiment: Experiment) -> None:
    """Raise ValueError if networks cannot be made of `ds`, whatever its numbers are."""
    if experiment.of_own_modules:
        raise ValueError(
            f"member: the student or teacher of {experiment.name} is a module of the user's own, which no Network is; "
            "tsdyn.running.own_modules.named gives its parameters, similarity.student_teacher takes student= and "
            "teacher="
        )
    if experiment.deep:
        raise ValueError(
            f"member: {experiment.name} has convolutions or BatchNorm, which are not rebuilt here; build a "
            "Network from the recorded weight, bias and norm_* variables, and take its folded()"
        )
    missing = [name for name in PARAMETERS if name not in ds]
    if missing:
        raise ValueError(f"member: the archive has no {', '.join(missing)}; record them (record.observables)")
    refuse_parts(ds, experiment)


def refuse_parts(ds: xr.Dataset, experiment: Experiment) -> None:
    """Raise ValueError if `ds` holds other seeds, or a part of the networks; only its labels are looked at."""
    refuse_part(ds, nodes_of(experiment), "member")
    foreign = [seed for seed in np.atleast_1d(ds["seed"].values).tolist() if seed not in experiment.seed_labels]
    if foreign:
        raise ValueError(
            f"member: seed {foreign[0]} is none of {experiment.name}'s; the experiment is another archive's"
        )
    absent = [i for i in range(1, experiment.layout.depth + 1) if i not in np.atleast_1d(ds["layer"].values)]
    if absent or "layer" not in ds.dims:
        raise ValueError(f"member: networks are made of all layers, and {absent or 'the dimension layer'} is left out")


def _parameters(ds: xr.Dataset) -> xr.Dataset:
    """The variables that networks are made of, their last dimensions in the order of a weight's."""
    return ds[list(PARAMETERS)].transpose(..., "layer", "node", "teacher_node", "input_node")


def networks(experiment: Experiment, numbers: Mapping[str, NDArray], layers: Sequence[int]) -> tuple[Network, Network]:
    """Student and teacher from arrays (layer, node[, input_node]) that are padded to the widest layer.

    Args:
        experiment: The experiment of their point.
        numbers: One array for each of `PARAMETERS`, by name.
        layers: Labels along the arrays' first dimension.
    """
    layout, law, taught = experiment.layout, experiment.student, experiment.teacher
    rows = [layers.index(number) for number in range(1, layout.depth + 1)]  # where layers 1..L stand

    def network(prefix: str, widths: Sequence[int], who: Student | Teacher, name: str, leak: float) -> Network:
        sizes = list(zip(rows, itertools.pairwise((layout.input_width, *widths)), strict=True))
        weight, bias = numbers[f"{prefix}weight"], numbers[f"{prefix}bias"]
        weights = [np.array(weight[row, :nodes, :below]) for row, (below, nodes) in sizes]
        # archives hold 0 for a missing bias, which is no parameter and has no gradient
        biases = [None if who.bias is False else np.array(bias[row, :nodes]) for row, (_, nodes) in sizes]
        return Network(weights, biases, name, leak=leak)

    return network("", layout.widths, law, law.activation, law.leak), network(
        "teacher_", layout.teacher_widths, taught, taught.activation or law.activation,
        law.leak if taught.leak is None else taught.leak,
    )  # fmt: skip


def _refuse_another(teacher: Network, experiment: Experiment, seed: int) -> None:
    """Raise ValueError if the recorded teacher is not the one that the experiment draws for this seed.

    The teacher distinguishes the experiment's archive from others of the same shape.
    """
    if experiment.teacher.init not in DRAWN:
        return
    drawn = draw_teacher(experiment, seed)
    # a thousand roundings of float32, since QR and norms round differently on other machines
    if any(
        float((mine - theirs).abs().max()) > 1e-4 * float(theirs.abs().max())
        for mine, theirs in zip(teacher.weights, drawn.weights, strict=True)
    ):
        raise ValueError(
            f"member: the teacher recorded for seed {seed} is not the one that {experiment.name} draws, so that the "
            "experiment is another archive's (archives joined keep the first one's) or the teacher was replaced: ask "
            "each archive by itself, or name the teacher's file, teacher.init = 'file'"
        )


def each(
    ds: xr.Dataset,
    measure: Callable[[Any], Sequence[Any]],
    names: Sequence[str],
    *,
    gives: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    of: Callable[[Experiment], bool] = lambda experiment: True,
    rebuild: Rebuild | None = None,
    needs: Sequence[str] = PARAMETERS,
) -> xr.Dataset:
    """Dataset of `measure` for every living member, over the (swept..., seed[, epoch]) of `ds`; NaN for dead ones.

    Lazy if `ds` is, with one task per block of members that is read at once, or per seed where these are few.

    Args:
        ds: Archive or slice of one, at one epoch or at many.
        measure: Function of a member that gives one value per name.
        names: Names of the variables.
        gives: Name → dimensions with their labels, of values that are arrays; the others are numbers.
        of: Whether to measure the points of an experiment; the others are NaN.
        rebuild: Function of a point's experiment, a seed and the member's numbers, name → array, that gives what
            `measure` takes where that is no `Member`, such as modules of the user's own.
        needs: Variables that `rebuild` takes, whose last dimensions are those of neither points, seeds nor epochs.

    Raises:
        ValueError: as `member` or as `rebuild`, or if a value has not the shape that `gives` says.
    """
    if "death_epoch" not in ds.coords:
        raise ValueError("members: the Dataset has no death_epoch, so that the dead cannot be left out; is it tsdyn's?")
    dead, committed, path = ds["death_epoch"], begun(ds), path_of(ds)
    labels = {name: dict((gives or {}).get(name, {})) for name in names}
    shapes = {name: tuple(len(values) for values in own.values()) for name, own in labels.items()}
    outer = tuple(str(dim) for dim in dead.dims if dim != "seed")
    table: dict[int, Experiment] = {}
    for chosen, experiment in points(ds).values():
        there = committed.sel({dim: value for dim, value in chosen.items() if dim in committed.dims})
        if bool(there) and of(experiment):
            if rebuild is None:
                _refuse_unbuildable(ds, experiment)
            place = [int(dead.get_index(dim).get_loc(chosen[dim])) for dim in outer]
            table[int(np.ravel_multi_index(place, [ds.sizes[dim] for dim in outer])) if outer else 0] = experiment
    lead = (*outer, "seed", path)
    index = _numbered(ds, dead, lead, set(table))
    seeds = np.atleast_1d(ds["seed"].values).tolist()
    if rebuild is None:
        checked = [name for name in CHECKED if name in ds and set(ds[name].dims) <= set(lead)]
        known = _Known(table, seeds, ds["layer"].values.tolist(), index.shape, checked)
        job = partial(_measured, measure, known, dict(shapes))
        numbers = _parameters(ds) if table else xr.Dataset()
    else:
        checked = []
        job = partial(
            _made_and_measured, measure, rebuild, tuple(needs), _Known(table, seeds, (), index.shape, ()), shapes
        )
        numbers = ds[list(needs)]
    arrays = [*_members(numbers, ds, lead), *(_along(ds[name], ds, lead) for name in checked)] if table else []
    found = blockwise(job, index, arrays, lead, sum(map(math.prod, shapes.values())))
    dims = tuple(dim for dim in lead if dim in ds.dims)
    found = found.reshape(*(ds.sizes[dim] for dim in dims), found.shape[-1])
    own = {path: ds[path]} if path in ds.dims and path in ds.coords else {}
    result, start = xr.Dataset(coords={**dead.drop_attrs().coords, **own}), 0
    for name, shape in shapes.items():
        block = found[..., start : start + math.prod(shape)].reshape(*found.shape[:-1], *shape)
        result = result.assign_coords(labels[name]).assign({name: ((*dims, *labels[name]), block)})
        start += math.prod(shape)
    return result


@dataclass(frozen=True)
class _Known:
    """What is known of the members of a Dataset without reading it.

    Attributes:
        table: Number of a point → its experiment.
        seeds, layers: Labels of the dimensions.
        shape: Sizes of the swept dimensions, of seed and of epoch; a member's number is its place in such an array.
        checked: Recorded errors that are compared with those of the networks.
    """

    table: Mapping[int, Experiment]
    seeds: Sequence[int]
    layers: Sequence[int]
    shape: tuple[int, ...]
    checked: Sequence[str]


def _numbered(ds: xr.Dataset, dead: xr.DataArray, lead: Sequence[str], asked: set[int]) -> NDArray:
    """The number of every member and epoch of `ds` that is asked for and alive, −1 for the others; over `lead`."""
    path = lead[-1]
    # without labels of epochs, whether it lives to the end
    alive = (dead < 0) | (ds[path] < dead) if path in ds.coords else dead < 0
    alive = alive.expand_dims([dim for dim in lead if dim not in alive.dims]).transpose(*lead)
    shape = tuple(ds.sizes.get(dim, 1) for dim in lead)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    wanted = np.isin(numbers // (shape[-2] * shape[-1]), list(asked)) & np.broadcast_to(alive.values, shape)
    return np.where(wanted, numbers, -1)


def _members(numbers: xr.Dataset, ds: xr.Dataset, lead: Sequence[str]) -> list[xr.DataArray]:
    """The variables `numbers` of `ds`, over `lead` (a teacher's without its last), then their other dimensions."""
    found = []
    for name, array in numbers.items():
        own = lead[:-1] if str(name).startswith("teacher_") else lead
        found.append(_along(array, ds, own))
    return found


def _along(array: xr.DataArray, ds: xr.Dataset, lead: Sequence[str]) -> xr.DataArray:
    """The array without coordinates, over `lead` and then its other dimensions."""
    bare = array.drop_vars(list(array.coords))
    return bare.expand_dims({dim: ds.sizes.get(dim, 1) for dim in lead if dim not in bare.dims}).transpose(*lead, ...)


def _measured(
    measure: Callable[[Member], Sequence[Any]],
    known: _Known,
    shapes: Mapping[str, tuple[int, ...]],
    index: NDArray,
    *arrays: NDArray,
) -> NDArray:
    """Values of the members with the numbers `index`, (*index.shape, value); NaN for −1."""
    found = np.full((index.size, sum(map(math.prod, shapes.values()))), np.nan)
    outer = (0, 0, 1, 1, *(0 for _ in known.checked))  # a teacher has no epochs
    flat = [a.reshape(-1, *a.shape[index.ndim - less :]) for a, less in zip(arrays, outer, strict=True)]
    before: Member | None = None
    for at, number in enumerate(index.ravel().tolist()):
        if number < 0:
            continue
        point, seed = divmod(number // known.shape[-1], known.shape[-2])
        experiment, label = known.table[point], known.seeds[seed]
        numbers = [flat[0][at], flat[1][at], flat[2][at // index.shape[-1]], flat[3][at // index.shape[-1]]]
        student, teacher = networks(experiment, dict(zip(PARAMETERS, numbers, strict=True)), known.layers)
        if before is None or (before.experiment, before.seed) != (experiment, label):
            _refuse_another(teacher, experiment, label)
            before = None
        one = Member(experiment, label, student, teacher)
        if before is None:
            _refuse_other_data(one, {name: float(of[at]) for name, of in zip(known.checked, flat[4:], strict=True)})
        one.__dict__.update(_data_of(before))
        found[at] = _flat(measure(one), shapes)
        before = one
    return found.reshape(*index.shape, found.shape[-1])


def _made_and_measured(
    measure: Callable[[Any], Sequence[Any]],
    rebuild: Rebuild,
    needs: Sequence[str],
    known: _Known,
    shapes: Mapping[str, tuple[int, ...]],
    index: NDArray,
    *arrays: NDArray,
) -> NDArray:
    """As `_measured`, of what `rebuild` makes of the members' variables `needs`."""
    found = np.full((index.size, sum(map(math.prod, shapes.values()))), np.nan)
    without = [name.startswith("teacher_") for name in needs]  # a teacher has no epochs
    epochs = [index.shape[-1] if less else 1 for less in without]
    flat = [
        a.reshape(index.size // count, *a.shape[index.ndim - less :])
        for a, count, less in zip(arrays, epochs, without, strict=True)
    ]
    for at, number in enumerate(index.ravel().tolist()):
        if number < 0:
            continue
        point, seed = divmod(number // known.shape[-1], known.shape[-2])
        numbers = {name: a[at // count] for name, a, count in zip(needs, flat, epochs, strict=True)}
        found[at] = _flat(measure(rebuild(known.table[point], known.seeds[seed], numbers)), shapes)
    return found.reshape(*index.shape, found.shape[-1])


def _data_of(before: Member | None) -> dict[str, Any]:
    """The data that a member of the same seed has drawn, which are those of every epoch."""
    drawn = ("evaluation_inputs", "training_inputs", "training_targets")
    return {} if before is None else {name: before.__dict__[name] for name in drawn if name in before.__dict__}


def _flat(values: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> NDArray:
    parts = []
    for (name, shape), value in zip(shapes.items(), values, strict=True):
        array = np.asarray(value, float)
        if array.shape != shape:
            raise ValueError(f"members: {name} has the shape {array.shape}, not {shape}: say its dimensions in `gives`")
        parts.append(array.ravel())
    return np.concatenate(parts)
