"""Forks: runs that branch off a recorded one, are changed there, and go on; and how far they end from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from tsdyn.analysis import connectivity, similarity
from tsdyn.analysis.lift import lift
from tsdyn.analysis.members import PARAMETERS, Member, each, networks, rebuilt, refuse_parts
from tsdyn.archive import reading, whole_files
from tsdyn.archive.selecting import experiment_of, swept_dimensions
from tsdyn.arguments import PATH, takes
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.networks.node_pairs import best_node
from tsdyn.observables import similarities
from tsdyn.observables.registry import Observed
from tsdyn.running import sweep
from tsdyn.running.own_modules import Maker
from tsdyn.running.runner import Progress

#: Distance, relative to the parent's parameters, above which a child has diverged.
DIVERGED = 1e-3
#: Positions α at which the loss between two students is compared with its ends.
POSITIONS = 21
SOURCE = "Frankle et al. 2020 (arXiv:1912.05671)"
#: Prefix of the parent's variables beside those of its children.
_PARENT = "parent_"
#: Dimensions of one member's parameters.
_SUMMED = ("layer", "node", "input_node", "entry")


@takes(path=PATH)
def fork(
    path: str | Path,
    at: int | Sequence[int] = (0,),
    perturb: Mapping[str, Any] | None = None,
    branches: int | Sequence[int] = 1,
    out: str | Path | None = None,
    *,
    draws: Literal["same", "other"] = "same",
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
    observables: Sequence[Observed] = (),
) -> xr.Dataset:
    """Train counterfactual branches of a run: its state at an epoch, changed, then trained to the end.

    The children are one archive, a sweep with the dimensions ``fork_epoch`` and ``branch`` beside the parent's own, and
    like any other: resumed when the call is repeated, validated, reported.

    Args:
        path: Directory of the parent, a run or a sweep.
        at: Epochs at which children branch off; where weights were not recorded, or are not all of the state, the
            parent is trained again up to there.
        perturb: What is changed: one of {"gaussian": s}, {"weight": {layer, node, input_node, by}}, {"silence": {layer,
            node}}, {"reinitialise": {layer, node}}, {"transplant": {seed, layer, node, to}}, {"swap": {layer, nodes}},
            {"set": {key: value}}; see `tsdyn.experiment.branching.Fork`.  Nothing unless given.
        branches: How many, or their numbers; each has random draws of its own.
        out: Directory of the children; beside the parent, ``<parent>-fork``, unless given.
        draws: ``"same"``: the batches and fresh samples of the parent; ``"other"``: new ones for each branch.
        device, workers, scheduler, progress, student, teacher, observables: As in `tsdyn.run`; the children record what
            the parent recorded, and so need the observables that were passed to it.  Of modules of the user's own only
            ``gaussian`` (on every parameter), ``weight`` (of a labelled layer) and ``set`` can be changed.

    Returns:
        The lazy archive of the children, with the measures of `compared`.

    Raises:
        ExperimentError: for a change, an epoch or a parent that cannot be; says what can.
        ArchiveError: as `tsdyn.run`.

    Examples:
        >>> import tsdyn
        >>> children = tsdyn.fork("runs/quickstart", at=5, perturb={"gaussian": 1e-3}, branches=2, out="runs/nudged")
        >>> children.distance.dims
        ('overrealization', 'fork_epoch', 'branch', 'seed', 'epoch')
    """
    parent = whole_files.local_path(path).absolute()
    child = forked(parent, at=at, perturb=perturb, branches=branches, draws=draws)
    target = whole_files.local_path(out) if out is not None else parent.with_name(f"{parent.name}-fork")
    sweep.run(
        child, target, device=device, workers=workers, scheduler=scheduler, progress=progress, student=student,
        teacher=teacher, observables=observables,
    )  # fmt: skip
    return compared(target)


def forked(
    parent: str | Path,
    *,
    at: int | Sequence[int] = (0,),
    perturb: Mapping[str, Any] | None = None,
    branches: int | Sequence[int] = 1,
    draws: Literal["same", "other"] = "same",
) -> Experiment:
    """The experiment of the children that `fork` runs.

    Raises:
        ExperimentError: as `fork`.
    """
    parent = whole_files.local_path(parent).absolute()
    experiment = experiment_of(reading.open(parent, verify=True))
    if experiment.kind != "training":
        raise ExperimentError(f"fork: {parent} is a run of kind = {experiment.kind!r}; only training runs are forked")
    if experiment.fork.parent is not None:
        raise ExperimentError(f"fork: {parent} holds children itself; fork their parent, {experiment.fork.parent}")
    epochs = [at] if isinstance(at, int) else list(at)
    numbers = list(range(branches)) if isinstance(branches, int) else list(branches)
    if not epochs or not numbers or any(epoch < 0 for epoch in epochs):
        raise ExperimentError(f"fork: at={epochs}, branches={branches}: at least one epoch from 0 on, and one branch")
    section = {"parent": str(parent), "perturb": dict(perturb or {}), "draws": draws}
    taken = {"fork_epoch", "branch"} & {key.rpartition(".")[2] for key in experiment.sweep}
    if taken:
        raise ExperimentError(f"fork: {parent} sweeps {', '.join(taken)}, which children need as dimensions")
    swept = {**experiment.sweep, "fork.fork_epoch": epochs, "fork.branch": numbers}
    return experiment.replace({"fork": section, "sweep": swept})


def compared(children: str | Path | xr.Dataset, parent: str | Path | xr.Dataset | None = None) -> xr.Dataset:
    """The children's archive with measures of how far they are from their parent; lazy.

    ``distance`` ‖θ' − θ‖ over all weights and biases at each epoch, ``divergence_epoch`` the first recorded epoch at
    which it exceeds `DIVERGED` ‖θ‖, ``student_kept`` whether each teacher node has the same best student node as in
    the parent (1 or 0; needs correlation), and of the last epoch ``barrier`` and ``barrier_matched``, the largest
    excess of the evaluation loss on the straight line between the two, sup_α ℓ(αθ + (1−α)θ') − αℓ(θ) − (1−α)ℓ(θ'),
    with the nodes as they are and after one-to-one matching, and ``cka_angle``, the angle arccos of linear CKA between
    their activations in degrees.  Beside an epoch, a seed or a point that the parent does not hold yet all are NaN.  Of
    modules of the user's own the distance is over ``parameter``, buffers included, and the last three, which need the
    modules, are left out.

    Args:
        children: What `fork` wrote, or its path.
        parent: The run that they branched off, if it is no longer where ``fork.parent`` says.

    Raises:
        ValueError: if weights were not recorded, or the Dataset is not of a fork.
    """
    ds = children if isinstance(children, xr.Dataset) else reading.open(children)
    experiment = experiment_of(ds)
    if experiment.fork.parent is None:
        raise ValueError("compared: the archive is of no fork; give what tsdyn.fork wrote")
    own = parent if isinstance(parent, xr.Dataset) else reading.open(parent or experiment.fork.parent)
    held = ("weight", "bias") if experiment.student.module is None else ("parameter",)
    missing = [name for name in held if name not in own or name not in ds]
    if missing:
        raise ValueError(
            f"compared: {', '.join(missing)} is not recorded; fork a run with {held[0]} in record.observables"
        )
    own = _beside(ds, own)
    shared = own.reindex(epoch=ds["epoch"].values)  # NaN where only the children are recorded
    distance, size = _distance(ds, shared, held), _length({name: shared[name] for name in held})
    found = {"distance": distance, "divergence_epoch": _first(distance > DIVERGED * size, distance)}
    if "correlation" in ds and "correlation" in own:
        found["student_kept"] = _student_kept(ds["correlation"], own["correlation"])
    return ds.assign(found | ({} if experiment.of_own_modules else dict(_at_the_end(ds, own).data_vars)))


def _beside(ds: xr.Dataset, own: xr.Dataset) -> xr.Dataset:
    """What is compared of the parent, at the seeds and points of its children; NaN where it has not begun them."""
    names = [name for name in ("weight", "bias", "parameter", "correlation") if name in own]
    return own[names].reindex({dim: ds.indexes[dim] for dim in ("seed", *swept_dimensions(own)) if dim in ds.indexes})


def _distance(ds: xr.Dataset, shared: xr.Dataset, held: Sequence[str]) -> xr.DataArray:
    found = _length({name: ds[name] - shared[name] for name in held})
    for weight in (ds[held[0]], shared[held[0]]):  # a sum of nothing but NaN would be 0
        found = found.where(weight.notnull().any([dim for dim in _SUMMED if dim in weight.dims]))
    return _named(found, "distance", "distance from the parent ‖θ' − θ‖", "definition")


def _length(parts: Mapping[str, xr.DataArray]) -> xr.DataArray:
    squares = [(part**2).sum([d for d in _SUMMED if d in part.dims]) for part in parts.values()]
    total: xr.DataArray = sum(squares[1:], squares[0])
    return total**0.5


def _first(where: xr.DataArray, distance: xr.DataArray) -> xr.DataArray:
    found = where["epoch"].where(where).min("epoch")
    name = f"first recorded epoch at which the distance exceeds {DIVERGED:g} of the parent's parameters"
    return _named(found, "divergence_epoch", name, "definition").assign_attrs(units="epoch")


def _student_kept(mine: xr.DataArray, theirs: xr.DataArray) -> xr.DataArray:
    last = mine["epoch"].values[-1:]  # which a parent that is not finished has not reached: NaN
    best = [
        lift(
            best_node,
            of.reindex(epoch=last).isel(epoch=0, drop=True),
            reads=("teacher_node", "node"),
            gives=("teacher_node",),
        )
        for of in (mine, theirs)
    ]
    known = best[0].notnull() & best[1].notnull()
    found = (best[0] == best[1]).where(known)
    return _named(found, "student_kept", "whether the teacher node has the parent's student node", "definition")


def _at_the_end(ds: xr.Dataset, own: xr.Dataset) -> xr.Dataset:
    """``barrier``, ``barrier_matched`` and ``cka_angle`` of the last epoch, of every pair of living members.

    Args:
        ds: The children.
        own: Their parent at their seeds and points, as `_beside` gives it.
    """
    last, layers = ds.isel(epoch=[-1]), [int(layer) for layer in ds["layer"].values[:-1]]
    before = own[["weight", "bias"]].reindex(epoch=last["epoch"].values).isel(epoch=0, drop=True)
    before = before.where(own["death_epoch"] < 0).transpose(..., "layer", "node", "input_node")
    dims = ("layer", "node", "teacher_node", "input_node")
    pairs = last[list(PARAMETERS)].transpose(..., *dims, missing_dims="ignore")
    pairs = pairs.assign({_PARENT + name: before[name].reset_coords(drop=True) for name in ("weight", "bias")})
    labels = xr.Dataset(coords={dim: last.indexes[dim] for dim in (*dims, "seed") if dim in last.indexes})
    found = each(
        pairs, partial(_pair, layers), ["barrier", "barrier_matched", "cka_angle"],
        gives={"cka_angle": {"layer": layers}}, of=lambda experiment: not experiment.deep,
        rebuild=partial(_beside_its_parent, labels),
        needs=[*PARAMETERS, *(_PARENT + name for name in ("weight", "bias"))],
    ).isel(epoch=0).reset_coords(drop=True)  # fmt: skip
    named = {
        "barrier": _named(found["barrier"], "barrier", "loss barrier between child and parent", SOURCE),
        "barrier_matched": _named(
            found["barrier_matched"], "barrier_matched", "loss barrier after matching nodes", SOURCE
        ),
    }
    if layers:
        whole = found["cka_angle"].reindex(layer=ds["layer"].values).transpose(..., "layer")
        angle = _named(whole, "cka_angle", "angle of linear CKA of child and parent", similarities.KORNBLITH)
        named["cka_angle"] = angle.assign_attrs(units="degree")
    return xr.Dataset(named)


def _beside_its_parent(
    labels: xr.Dataset, experiment: Experiment, seed: int, numbers: Mapping[str, NDArray]
) -> tuple[Member, Network | None]:
    """A child, and its parent's student; None where that has died, or has not come so far.

    Raises:
        ValueError: if `labels`, those of the children's archive, are of a part of their networks.
    """
    refuse_parts(labels, experiment)
    layers = labels["layer"].values.tolist()
    child = rebuilt(experiment, seed, {name: numbers[name] for name in PARAMETERS}, layers)
    theirs = {name: numbers[_PARENT + name] for name in ("weight", "bias")}
    if np.isnan(theirs["weight"]).all():
        return child, None
    return child, networks(experiment, dict(numbers) | theirs, layers)[0]


def _pair(layers: Sequence[int], pair: tuple[Member, Network | None]) -> list[Any]:
    """Barriers and angles of one child and its parent; NaN if there is none to compare with."""
    child, parent = pair
    if parent is None:
        return [np.nan, np.nan, np.full(len(layers), np.nan)]
    x = child.evaluation_inputs
    wanted = child.loss.target(child.teacher(x), None) if not child.experiment.training.of_data else _labelled(child)
    reference, other = connectivity.matched(parent, child.student, x)

    def loss(network: Network) -> float:
        return float(child.loss.value(network(x), wanted))

    barriers = [barrier(loss, *pair) for pair in ((parent, child.student), (reference, other))]
    traces = [net.trace(x).activations for net in (parent, child.student)]
    angles = [_angle(f, g) for f, g in zip(*(trace[:-1] for trace in traces), strict=True)]
    return [*barriers, np.array([*angles, *[np.nan] * (len(layers) - len(angles))])]


def _labelled(child: Member) -> Tensor:
    from tsdyn.problem.inputs import labels

    classes = torch.from_numpy(labels(child.experiment, child.seed, "eval"))
    return child.loss.target(child.teacher(child.evaluation_inputs), classes)


def barrier(loss: Callable[[Network], float], first: Network, second: Network, positions: int = POSITIONS) -> float:
    """sup_α ℓ(α θ + (1−α) θ') − α ℓ(θ) − (1−α) ℓ(θ') over equidistant α, at least 0, which the ends give."""
    ends = loss(first), loss(second)
    excess = [0.0]
    for share in np.linspace(0, 1, positions)[1:-1]:
        here = loss(connectivity.between(first, second, float(share)))
        excess.append(here - (1 - share) * ends[0] - share * ends[1])
    return max(excess)


def _angle(f: Tensor, g: Tensor) -> float:
    """arccos of linear CKA in degrees; NaN with fewer samples than nodes, where it says nothing."""
    if len(f) <= f.shape[1] + g.shape[1]:
        return float("nan")
    return float(np.degrees(np.arccos(np.clip(similarity.linear_cka(f.numpy(), g.numpy()), -1.0, 1.0))))


def _named(array: xr.DataArray, name: str, long_name: str, source: str) -> xr.DataArray:
    return array.rename(name).assign_attrs(units="1", long_name=long_name, source=source)


__all__ = ["barrier", "compared", "fork", "forked"]
