"""`sensitivity`: the derivative of what a run ends with in what it starts from, labelled, with how far it holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from tsdyn import memory as memory_of
from tsdyn.analysis.identity import points
from tsdyn.archive import reading
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.whole_files import local_path
from tsdyn.arguments import ARCHIVE, NAMES, takes
from tsdyn.engine.ensemble import Ensemble
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.observables import registry
from tsdyn.running import packages
from tsdyn.running.forked_members import folders, identity, states_kept
from tsdyn.running.members import Members
from tsdyn.running.own_modules import Maker
from tsdyn.through_training import kept, labelled
from tsdyn.through_training.adjoint import BESIDE, states_held
from tsdyn.through_training.blocks import Found, Job, compute
from tsdyn.through_training.observed import Of, observed
from tsdyn.through_training.replay import KeptStates, marks, recorded_weights
from tsdyn.through_training.request import bytes_of, checked_epoch, chosen_seeds, living, refuse_unfit, wanted
from tsdyn.through_training.steps import State

#: Without `memory`, a block of members may take this share of what is free, and no more than MOST_BYTES.
SHARE, MOST_BYTES = 4, 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a computation will take, known before it starts.

    Attributes:
        members: How many members are differentiated.
        steps: Steps of training of each.
        passes: How many times all steps are gone through, there or back.
        states: States that are held at once.
        bytes: Memory that they take for one block of members.
        blocks: Number of blocks.
    """

    members: int
    steps: int
    passes: int
    states: int
    bytes: int
    blocks: int

    def __str__(self) -> str:
        return (
            f"{self.members} members in {self.blocks} blocks, {self.steps} steps each, {self.passes} passes; "
            f"{self.states} states at once, {self.bytes / 1e6:.0f} MB"
        )


@takes(path_or_dataset=ARCHIVE, wrt=NAMES)
def sensitivity(
    path_or_dataset: str | Path | xr.Dataset,
    of: Of = "loss_eval",
    *,
    epoch: int | None = None,
    wrt: str | Sequence[str] = ("start",),
    seeds: int | Sequence[int] | None = None,
    memory: int | float | str | None = None,
    certificate: bool = True,
    smoothed: int | None = None,
    spread: float = 0.05,
    student: Maker | None = None,
    teacher: Maker | None = None,
    device: str = "cpu",
    client: Any = None,
    keep: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> xr.Dataset:
    """Derivatives of an observable of one epoch in everything that the run started from.

    The run is trained again from its keyed draws, compared with the recorded weights, and gone through backwards, in
    float64: in blocks, each from recorded weights or a kept state (``record.state_every``) where the archive has them
    and they are all that training depends on, else from the start.  All that is in `wrt` comes from one reverse pass;
    the certificate takes one forward pass for each.

    Args:
        path_or_dataset: A run or a sweep, which records weights; swept keys stay dimensions.
        of: ``"loss_eval"``, ``"loss_train"``, ``"mse_eval"``, ``("correlation", {"layer": 1, "teacher_node": 9, "node":
            3})``, ``("best_correlation", {"layer": 1, "teacher_node": 9})``, ``"mean_specialization"``,
            ``("fanout_norm", {"layer": 1, "node": 3})``, ``("weight", {...})``, ``("bias", {...})``, or a function of
            the student, a `tsdyn.Network`, that gives one number as a torch tensor; one whose parameter is called
            ``ds`` takes a differentiable Dataset of the epoch (`tsdyn.differentiable`), with ``weight``, ``bias``,
            ``correlation``, ``loss_eval`` and ``mse_eval``.
        epoch: Of the observable; the last recorded one if not given.
        wrt: Some of ``start`` (parameters before training), ``sample`` (the weight of each training sample in the
            loss, 1), ``target``, ``input`` (of each training sample, the target held), ``learning_rate`` (of each
            epoch), ``teacher`` (by the targets that it gives), ``scale`` (``student.scale``).
        seeds: Labels of members; all that live if not given.
        memory: Bytes, or a text such as ``"500MB"``, that the states may take.
        certificate: Whether to compute ``radius`` and ``tangent_growth``.
        smoothed: Average the derivatives over this many starts θ_0 + s ξ, with the standard error of the mean ...
        spread: ... where s is this share of the root mean square of each weight and bias, and ξ is N(0, I).
        student, teacher: Functions that make modules of the user's own, as in `tsdyn.run`.
        device: ``cpu`` or ``cuda``.
        client: A dask client, on whose workers the seeds are computed side by side.
        keep: A directory for finished blocks: given again after a kill, the computation goes on where it was.
        progress: Called with (steps done, steps in all).
        announce: Called with the `Plan` before anything is trained.

    Returns:
        Dataset of ``value`` (seed), ``d_start`` (seed, layer, node, input_node), ``d_start_bias`` (seed, layer, node),
        ``d_sample`` (seed, sample), ``d_target`` (seed, sample, output), ``d_input`` (seed, sample, input_node),
        ``d_learning_rate`` (seed, epoch), ``d_teacher`` (seed, layer, teacher_node, input_node), ``d_teacher_bias``,
        ``d_scale`` (seed); ``radius`` (seed, wrt, side): how far along the normalised derivative (side ``+``) and
        against it (``-``) no gate flips, beyond which a piecewise linear network does something else;
        ``observable_radius`` (seed, wrt, side): how far none of the samples that the observable is measured on crosses
        a kink, which changes the derivative by no more than that sample's share;
        ``tangent_growth`` (seed, wrt, epoch); ``replay_difference`` (seed): the largest difference from the recorded
        weights.  The attribute ``replayed_from`` names the epochs from whose archived states it was trained again (0 is
        the start), ``adjoint`` how the backward pass was computed, and ``reach`` says in words how far the derivatives
        predict.

    Raises:
        ExperimentError: for what cannot be differentiated, naming the way out.
        ReplayError: if the replayed run is not the recorded one.
        MemoryError: if the states of one member do not fit in `memory`.

    Source: the adjoint of the training steps (`tsdyn.through_training.adjoint`); no paper.  Units: those of the
    observable per unit of what it is differentiated in; ``radius`` in units of the norm of the change.

    Examples:
        >>> import tsdyn
        >>> run = tsdyn.open("runs/quickstart").isel(overrealization=0)
        >>> found = tsdyn.sensitivity(run, of="loss_eval", epoch=6, wrt=["start", "learning_rate"], seeds=[0])
        >>> found.d_learning_rate.dims
        ('seed', 'epoch')
        >>> bool((found.radius > 0).all())
        True
    """
    ds = path_or_dataset if isinstance(path_or_dataset, xr.Dataset) else reading.open(path_or_dataset)
    names = wanted(wrt)
    if smoothed is not None and (isinstance(smoothed, bool) or not isinstance(smoothed, int) or smoothed < 1):
        raise ExperimentError(
            f"sensitivity: smoothed = {smoothed!r}; a number of starts, 2 or more for standard errors"
        )
    if not (math.isfinite(spread) and spread > 0):
        raise ExperimentError(f"sensitivity: spread = {spread!r}; a positive number, such as 0.05")
    common = Job(
        experiment_of(ds),
        checked_epoch(ds, epoch),
        of,
        names,
        {},
        certificate,
        smoothed or 0,
        spread,
        student,
        teacher,
        device,
    )
    jobs = list(
        _jobs(ds, common, chosen_seeds(ds, seeds), named=seeds is not None, room=bytes_of(memory), client=client)
    )
    plan = _plan([job for _, job in jobs])
    if announce is not None:
        announce(plan)
    found = _computed([job for _, job in jobs], plan, client, None if keep is None else local_path(keep), progress)
    return labelled.dataset(
        ds, [(chosen, job, result) for (chosen, job), result in zip(jobs, found, strict=True)], chosen_seeds(ds, seeds)
    )


def _jobs(
    ds: xr.Dataset, common: Job, seeds: Sequence[int], *, named: bool, room: int | None, client: Any
) -> Iterator[tuple[Mapping[str, Any], Job]]:
    """The blocks of members of every point, each with where its point stands in the Dataset."""
    runs = folders(Path(source)) if (source := ds.encoding.get("source")) is not None else {}
    for chosen, experiment in points(ds).values():
        single = ds.sel(chosen) if chosen else ds
        registry.load(registry.without_foreign(experiment))
        refuse_unfit(experiment, common.wrt)
        observed(common.of, experiment)
        if "coverage" in single.coords and not float(single["coverage"]) > 0:
            continue
        last = int(single["epoch"].max())
        alive = living(single, experiment, [s for s in seeds if s in experiment.seed_labels], common.epoch, named=named)
        if not alive:
            continue
        # one member tells how large a state is, and how its parameters are called
        first = Members(experiment.replace({"seeds": alive[:1]}), common.device, common.student, common.teacher)
        first.prepare()
        every = experiment.record.state_every
        folder = runs.get(identity(experiment)) if every is not None and experiment.dtype == "float64" else None
        kept_bytes = states_kept(folder)
        epochs = tuple(kept_bytes)
        longest, starts = _division(single, experiment, first.ensemble, alive[0], min(last, common.epoch), epochs)
        state_bytes = State.held(first.ensemble).bytes
        size, allowed = _block_size(experiment, state_bytes, longest * experiment.steps, starts, room, len(alive))
        size = 1 if client is not None else size
        for begin in range(0, len(alive), size):
            block = alive[begin : begin + size]
            held = recorded_weights(single, first.ensemble, block, min(last, common.epoch))
            recorded = {e: {n: t.numpy() for n, t in by_name.items()} for e, by_name in held.items()}
            of_block = experiment.replace({"seeds": block})
            places = tuple(experiment.seed_labels.index(seed) for seed in block)
            kept_states = None
            if folder is not None and epochs:
                kept_states = KeptStates(folder, epochs, max(kept_bytes.values()), places)
            yield chosen, replace(
                common, experiment=of_block, recorded=recorded, room=allowed, kept=kept_states,
                states=states_held(longest * experiment.steps) + starts,
            )  # fmt: skip


def _division(
    single: xr.Dataset, experiment: Experiment, one: Ensemble, seed: int, last: int, kept_epochs: Sequence[int]
) -> tuple[int, int]:
    """How a replay is divided into blocks: epochs of the longest block, and number of states to be found for it."""
    whole = () if one.moments or one.buffers else recorded_weights(single, one, [seed], last).items()
    anchors = {epoch for epoch, named in whole if set(named) == set(one.values)}
    begun = marks(experiment, last, anchors)
    longest = max((b - a for a, b in itertools.pairwise([*begun, last])), default=0)
    return longest, len(set(begun) - anchors - set(kept_epochs))


def _block_size(
    experiment: Experiment, bytes_of_state: int, steps: int, starts: int, room: int | None, members: int
) -> tuple[int, int]:
    """How many members' states fit in memory together, and the bytes of that memory; of blocks of so many steps.

    Raises:
        MemoryError: if those of one do not.
    """
    # in float64, a copy with the graph of one step, and the sums over samples and epochs
    wide = bytes_of_state * (2 if experiment.dtype == "float32" else 1)
    one = wide * (states_held(steps) + starts + BESIDE)
    allowed = min(memory_of.free(torch.device("cpu")) // SHARE, MOST_BYTES) if room is None else room
    if room is None and one > allowed:
        allowed = memory_of.free(torch.device("cpu"))
    if one > allowed:
        raise MemoryError(
            f"sensitivity: the states of one member take {one / 1e6:.1f} MB ({states_held(steps) + starts} of "
            f"{wide / 1e6:.2f} MB), and {allowed / 1e6:.1f} MB are given; give more memory=, ask for an earlier epoch, "
            "or let the run keep states along the way (record.state_every)"
        )
    return int(max(1, min(members, allowed // one))), int(allowed)


def _plan(jobs: Sequence[Job]) -> Plan:
    if not jobs:
        return Plan(0, 0, 0, 0, 0, 0)
    steps = max(job.epoch * job.experiment.steps for job in jobs)
    members = sum(len(job.experiment.seed_labels) for job in jobs)
    return Plan(
        members, steps, jobs[0].passes, max(job.states for job in jobs), max(job.bytes for job in jobs), len(jobs)
    )


def _computed(
    jobs: Sequence[Job], plan: Plan, client: Any, keep: Path | None, progress: Callable[[int, int], None] | None
) -> list[Found]:
    """The results of the jobs, here or on a client's workers; those kept are not computed again."""
    total = sum(job.passes * job.epoch * job.experiment.steps for job in jobs)
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(min(done, total), total)

    found: list[Found | None] = [None if keep is None else kept.read(keep, job) for job in jobs]
    if client is not None:
        open_ones = [i for i, result in enumerate(found) if result is None]
        sent = [replace(jobs[i], parts=packages.of_this_process(jobs[i].experiment)) for i in open_ones]
        for i, result in zip(open_ones, client.gather(client.map(compute, sent, pure=False)), strict=True):
            found[i] = result
            if keep is not None:
                kept.write(keep, jobs[i], result)
    complete: list[Found] = []
    for job, result in zip(jobs, found, strict=True):
        if result is None:
            result = compute(job, tick)
            if keep is not None:
                kept.write(keep, job, result)
        complete.append(result)
    return complete


def parsed(text: str) -> str | tuple[str, dict[str, int]]:
    """The observable that the command line writes: ``loss_eval``, or ``correlation[layer=1,teacher_node=9,node=3]``.

    Raises:
        ExperimentError: if it is written otherwise.
    """
    name, bracket, rest = text.partition("[")
    if not bracket:
        return text.strip()
    way = "write NAME or NAME[KEY=NUMBER,...], e.g. 'correlation[layer=1,teacher_node=9,node=3]'"
    if not rest.endswith("]"):
        raise ExperimentError(f"--of {text}: {way}")
    labels = {}
    for word in filter(None, (part.strip() for part in rest[:-1].split(","))):
        key, sign, value = word.partition("=")
        if not sign or not value.strip().lstrip("-").isdigit():
            raise ExperimentError(f"--of {text}: {word!r}; {way}")
        labels[key.strip()] = int(value)
    return name.strip(), labels
