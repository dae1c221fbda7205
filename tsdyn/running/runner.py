"""Run one experiment into its directory: draw, train, measure, commit, resume, consolidate."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import xarray as xr

from tsdyn import memory, vocabulary
from tsdyn.archive import changes, machines, reading, whole_files
from tsdyn.archive.made_files import Made
from tsdyn.archive.run_directory import ADDED, RunDirectory
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.engine import native
from tsdyn.experiment.experiment import Experiment
from tsdyn.observables import registry
from tsdyn.problem import input_files
from tsdyn.problem.inputs import new_at_every_step
from tsdyn.running import added_seeds, packages
from tsdyn.running.conventions import attributes
from tsdyn.running.estimates import COMMIT_BYTES, Footprint, footprint
from tsdyn.running.interrupts import Stopped, stopping
from tsdyn.running.joint_training import JointTraining, keeps_bits
from tsdyn.running.kinds import members_of
from tsdyn.running.members import Members, Shared
from tsdyn.running.outcome import say_replaced_inputs
from tsdyn.running.own_modules import Maker, attribute
from tsdyn.running.protocol import Runnable, StateError

#: A segment is committed after this much work (0: after every epoch), ...
COMMIT_SECONDS = 2.0


#: ... or after this share of the time so far if that is longer, so that a run of days has hundreds of segments instead
#: of 100,000; and only while all commits together take at most this share, so that a slow disk does not slow it down.
#: But a segment is committed once its records hold COMMIT_BYTES, ...
COMMIT_SHARE = 0.01


#: ... or after this many seconds, which is what a power cut can cost; if a commit takes longer than a fraction of that,
#: after LONGEST_TIMES its duration.
LONGEST_SECONDS, LONGEST_TIMES = 60.0, 30


_SMALLER = "train fewer seeds per directory (seeds = [0, 1, ...]) or on less data (data.train, data.eval)"


_log = logging.getLogger("tsdyn")

#: What `added_seeds.parts_of` gives.
_Parts: TypeAlias = tuple[dict[Path, Experiment], dict[Path, Experiment]]


class DeviceError(ValueError):
    """A device that this machine does not have."""


def check_device(device: str) -> str:
    """`device` itself, if this machine has it.

    Raises:
        DeviceError: if not; names the devices there are.
    """
    available = ["cpu", *([f"cuda:{i}" for i in range(torch.cuda.device_count())])]
    if device == "cpu" or (device == "cuda" and len(available) > 1) or device in available:
        return device
    raise DeviceError(f"device {device!r} is not there; this machine has {', '.join(available)}")


def _exact_products(device: str) -> None:
    """Turn TF32 off on a GPU unless the environment says ``TSDYN_TF32=on``: it keeps 10 of a float32's 23 bits, and
    torch's default differs between matrix products (off) and convolutions (on).
    """
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = native.switched_on(
            "TSDYN_TF32", default=False
        )


def own_device() -> AbstractContextManager[Any]:
    """A context in which new tensors are on the CPU unless a device is given, whatever the user's default device."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


#: Called after each step with (step, last step, seeds that died, evaluation error or None); in training a step is an
#: epoch.
Progress = Callable[[int, int, list[int], float | None], None]


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
) -> xr.Dataset:
    """Run and measure one experiment into `path`; resumes from the last committed step if there is one.

    Args:
        experiment: Without a sweep.
        path: Directory; made if absent.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        progress: Called after every epoch.
        student, teacher: Functions that make modules of the user's own, if the experiment names them
            (`own_modules.described`).

    Returns:
        The lazy archive, as `tsdyn.open` gives it.

    Raises:
        ArchiveError: if the directory is another's, held by another process, or cannot be written.
        DeviceError: if this machine has no such device.
        ExperimentError: if the teacher cannot be drawn as asked.
        MemoryError: if the members would not fit, before any is drawn.
        Stopped: after SIGINT, SIGTERM, SIGHUP, SIGXCPU or SIGUSR1, once the present epoch is committed.
    """
    path = whole_files.local_path(path)
    try:
        failed = run_together(
            {path: experiment}, device=device, progress={path: progress}, student=student, teacher=teacher
        )
    except Stopped as stopped:
        failed = stopped.failed
        if not failed:
            raise
    for error in failed.values():
        raise error
    return reading.open(path)


def run_together(
    experiments: Mapping[Path, Experiment],
    *,
    device: str = "cpu",
    progress: Mapping[Path, Progress | None] | None = None,
    asked: Callable[[], int | None] | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
    wrote: Callable[[Path, Made], None] | None = None,
    shared: Shared | None = None,
    exact: bool = False,
) -> dict[Path, Exception]:
    """Run experiments of one `ensemble_key` as one ensemble, each into its own directory, as `run` would.

    Experiments that were committed up to different epochs train in separate ensembles.  If an ensemble cannot be
    trained, its experiments are run one by one.

    Args:
        experiments: Directory → experiment.
        device: As in `run`.
        progress: Directory → the function that is called after every epoch.
        asked: Returns the signal that asked to stop, or None; `stopping` unless given.
        student, teacher: As in `run`.
        wrote: Called with the directory of each archive that was written at once, and what it declares.
        shared: Hands on what the members of earlier calls drew.
        exact: Whether experiments train together only where each has the bits that it has alone
            (`joint_training.keeps_bits`), and one after another elsewhere.

    Returns:
        Directory → error of the experiments that failed; the others are done.

    Raises:
        DeviceError, Stopped: as in `run`.
    """
    failed: dict[Path, Exception] = {}
    parts: dict[Path, Experiment] = {}
    gaining: dict[Path, Experiment] = {}
    roots: dict[Path, Path] = {}
    looked: dict[Path, _Parts] = {}
    for path, experiment in experiments.items():
        try:
            own, joined = looked[path] = added_seeds.parts_of(path, experiment)
        except Exception as error:  # of any type: the other experiments must go on
            failed[path] = error
            continue
        parts |= own
        gaining |= joined
        roots |= dict.fromkeys([*own, *joined], path)
    each = {part: (progress or {}).get(root) for part, root in roots.items()}
    means = _Means(device, each, asked, student, teacher, wrote, shared, exact)
    lost = _run_parts(parts, means)
    failed |= {roots[part]: error for part, error in lost.items()}
    for path, experiment in gaining.items():
        if roots[path] not in failed:
            try:
                added_seeds.join(path, experiment, device)
            except Exception as error:
                failed[roots[path]] = error
    moved_on = {p: experiments[p] for p, e in failed.items() if _moved_on(p, experiments[p], looked.get(p), e)}
    if moved_on:
        failed = {path: error for path, error in failed.items() if path not in moved_on}
        failed |= run_together(
            moved_on, device=device, progress=progress, asked=asked, student=student, teacher=teacher, wrote=wrote,
            exact=exact,
        )  # fmt: skip
    return failed


def _moved_on(path: Path, experiment: Experiment, looked: _Parts | None, error: Exception) -> bool:
    """Whether a directory was refused since another command has joined seeds there after it was looked at."""
    if looked is None or not isinstance(error, DirectoryError):
        return False
    try:
        return added_seeds.parts_of(path, experiment) != looked
    except ArchiveError:
        return False


class _Means(NamedTuple):
    """Arguments of `run_together` but the experiments, with a Progress for each directory."""

    device: str
    progress: Mapping[Path, Progress | None]
    asked: Callable[[], int | None] | None
    student: Maker | None
    teacher: Maker | None
    wrote: Callable[[Path, Made], None] | None
    shared: Shared | None
    exact: bool


def _run_parts(experiments: Mapping[Path, Experiment], means: _Means) -> dict[Path, Exception]:
    """`run_together` of directories that gain no seeds."""
    device = check_device(means.device)
    _exact_products(device)
    failed: dict[Path, Exception] = {}
    apart: list[Path] = []
    with ExitStack() as held:
        held.enter_context(own_device())
        asked = means.asked or held.enter_context(stopping())
        begun: dict[int, list[_Point]] = {}
        for experiment in experiments.values():
            registry.load(experiment)
        needed = sum((footprint(single) for single in experiments.values()), Footprint()).bytes
        for path, experiment in experiments.items():
            if path.name == ADDED and path.parent in failed:
                # two commands, each with one of the two, would both leave the join to the other; and seeds that cannot
                # be joined need no training
                failed[path] = failed[path.parent]
                continue
            try:
                memory.refuse_beyond("run", needed, torch.device(device), _SMALLER)
                target = held.enter_context(RunDirectory(path, experiment))
                if not target.finished:
                    members = members_of(experiment, device, means.student, means.teacher)
                    if means.shared is not None:
                        means.shared.hand_on(members)
                    point = _Point(path, target, members, means.progress.get(path))
                    begun.setdefault(point.begin(), []).append(point)
                else:
                    say_replaced_inputs(path, experiment)
            except Exception as error:  # of any type: the other experiments must go on
                failed[path] = error
        companies = [(start, few) for start, points in begun.items() for few in _companies(points, exact=means.exact)]
        for start, points in companies:
            try:
                _train(points, start, asked, failed)
                for point in points:
                    if means.wrote is not None and point.made is not None:
                        means.wrote(point.path, point.made)
            except Exception as error:
                if len(points) == 1:
                    failed[points[0].path] = error
                    continue
                _log.warning("%s and others cannot train together, so one by one: %s", points[0].path, error)
                apart += [point.path for point in points if point.path not in failed]
    for path in apart:
        failed |= _run_parts({path: experiments[path]}, means)
    return failed


def _companies(points: list[_Point], *, exact: bool) -> list[list[_Point]]:
    """The points that train as one ensemble: all of them, or each by itself where its bits would be others."""
    if exact and len(points) > 1 and not keeps_bits(_training(points[0].members)):
        return [[point] for point in points]
    return [points]


class _Point:
    """One experiment that is being run: its members, its directory, and the records since the last commit."""

    def __init__(self, path: Path, target: RunDirectory, members: Runnable, progress: Progress | None) -> None:
        self.path, self.members, self.experiment = path, members, members.experiment
        self._target, self._progress = target, progress
        self._variables = self.experiment.recorded("along")
        self._inputs = input_files.digests(self.experiment)
        self._attrs = attributes(self.experiment, members.device) | {input_files.ATTRIBUTE: json.dumps(self._inputs)}
        if isinstance(members, Members) and members.student is not None:
            self._attrs["parameters"] = attribute(members.ensemble.module(0))
        self._labels = dict(zip(self.experiment.schedule, self.experiment.labels, strict=True))
        self._pending: list[dict[str, Any]] = []
        self._recorded: list[vocabulary.Label] = []
        self._kept: dict[int, dict[str, Any]] = {}  #: states since the last commit that are kept along the way
        self._first = 0
        self._worked, self._since = 0.0, time.monotonic()
        self._read = False
        self.died: list[int] = []  #: seeds that died in the last step

    def begin(self) -> int:
        """Draw or restore the members; returns the first step to compute."""
        committed = self._target.committed()
        before: Mapping[str, Any] = {}
        if committed is not None:
            state, before = self._target.state()
            _say_what_changed(self._target.path, before, self._attrs)
            self._refuse_other_inputs(before)
            try:
                self.members.restore(state)
            except StateError as error:
                where = "the segments are of another tsdyn or not whole: see `tsdyn validate`"
                raise ArchiveError(f"{self._target.path}: {error}; {where}") from error
            self._first = committed + 1
            self._worked = float(before.get(vocabulary.WALL, 0.0))
        if self._first <= self.experiment.last:
            self._attrs |= {machines.HISTORY: machines.extended(before, self._attrs, self._first)}
        elif machines.HISTORY in before:
            self._attrs |= {machines.HISTORY: before[machines.HISTORY]}
        self._attrs |= self._changes(before)
        self.members.draw()  # what cannot be drawn fails by itself
        reasons = self.members.fallbacks() if isinstance(self.members, Members) else []
        if reasons:
            _log.info("%s: %s", self._target.path, "; ".join(reasons))
        self._attrs |= machines.all_fallbacks(before, {machines.FALLBACKS: json.dumps(reasons)})
        return self._first

    def _changes(self, before: Mapping[str, Any]) -> dict[str, str]:
        """What was added to the run so far, with what it is to gain now."""
        if "experiment" not in before:
            return {}
        theirs = Experiment.from_toml_text(str(before["experiment"]), archived=True)
        return changes.extended(before, changes.described(self.experiment, theirs))

    def _refuse_other_inputs(self, before: Mapping[str, Any]) -> None:
        kept = input_files.kept(before)
        if kept is None and self._inputs:
            _log.warning(
                "%s: its committed epochs keep no checksums of %s; whether these are what they were is not known",
                self._target.path,
                ", ".join(self._inputs),
            )
        input_files.refuse_other(self._target.path, self.experiment, kept or {}, self._inputs)

    def _refuse_changed_inputs(self) -> None:
        """Refuse input files that changed since the run began, before each commit that depends on them.

        The first commit has read all of them; images that are cropped anew, and the covariance of fresh samples, are
        read again at every epoch.
        """
        again = new_at_every_step(self.experiment)
        used = self._inputs if not self._read else {k: v for k, v in self._inputs.items() if again and "data" in k}
        if used:
            input_files.refuse_other(self._target.path, self.experiment, used, input_files.digests(self.experiment))
        self._read = True

    def measure(self, step: int) -> None:
        """Measure the step if it is on the schedule, and report progress."""
        recorded = step in self._labels
        if recorded:
            self._pending.append(self.members.measure(step, self._variables))
            self._recorded.append(self._labels[step])
        every = self.experiment.record.state_every
        if self.experiment.kind == "training" and every is not None and step % every == 0:
            self._kept[step] = {name: np.array(array) for name, array in self.members.state().items()}
        if self._progress is not None:
            error = _mean_error(self._pending[-1]) if recorded else None
            try:
                self._progress(step, self.experiment.last, self.died, error)
            except (OSError, UnicodeError) as lost:  # printing failed: a closed pipe, a full disk, a narrow encoding
                self._progress = None
                _log.warning("%s: goes on, without telling of its epochs: %s", self.path, lost)

    @property
    def pending_bytes(self) -> int:
        kept: int = sum(array.nbytes for state in self._kept.values() for array in state.values())
        return len(self._pending) * self._target.bytes_per_epoch + kept

    def commit(self, step: int) -> None:
        self._refuse_changed_inputs()
        records = along_steps(self._pending) if self._pending else {}
        constants = self.members.constants() if self._first == 0 else {}
        outcome = self.members.outcome() if step == self.experiment.last else {}
        held = {**records, **constants, **outcome}
        self._attrs[vocabulary.WALL] = round(self._worked + time.monotonic() - self._since, 3)
        self._target.commit(self._first, step, self._recorded, held, self.members.state(), self._attrs, self._kept)
        self._pending, self._recorded, self._kept, self._first = [], [], {}, step + 1

    @property
    def made(self) -> Made | None:
        """What its archive declares, if the first commit wrote it."""
        return self._target.made

    def finish(self) -> None:
        """Join the segments, unless the first commit held the whole run."""
        if not self._target.finished:
            self._target.consolidate(self._attrs)


def _train(points: list[_Point], start: int, asked: Callable[[], int | None], failed: dict[Path, Exception]) -> None:
    """Compute the steps from `start` on, of all points side by side.

    An error in measuring or writing one point is noted in `failed`, and the others go on; an error in training is
    raised.
    """
    going = list(points)

    def attempt(point: _Point, work: Callable[..., None], *given: int) -> None:
        try:
            work(point, *given)
        except Exception as error:
            # its frames hold the members of all
            failed[point.path] = error if len(points) == 1 else error.with_traceback(None)
            going.remove(point)

    def each(work: Callable[..., None], *given: int) -> None:
        for point in list(going):
            attempt(point, work, *given)

    def stop_if_asked() -> None:
        number = asked()
        if number is not None:
            raise Stopped(number, {point.path: failed[point.path] for point in points if point.path in failed})

    last = points[0].experiment.last
    began = clock = time.monotonic()
    took = spent = 0.0
    slow = False
    together = (
        JointTraining([_training(point.members) for point in points]) if len(points) > 1 and start <= last else None
    )
    for step in range(start, last + 1):
        if step:
            died = together.train(step) if together else [points[0].members.advance(step)]
            for point, seeds in zip(points, died, strict=True):
                point.died = seeds
        each(_Point.measure, step)
        full = sum(point.pending_bytes for point in going) >= COMMIT_BYTES
        now = time.monotonic()
        if step == last or full or commit_is_due(now - began, now - clock, took, spent) or asked() is not None:
            each(_Point.commit, step)
            clock = time.monotonic()
            took = clock - now
            spent += took
            if not slow and took > LONGEST_SECONDS / LONGEST_TIMES:
                slow = True
                _say_slow(points[0].path, took)
            stop_if_asked()
        if not going:
            return
    for point in list(going):
        attempt(point, _Point.finish)
        stop_if_asked()


def commit_is_due(elapsed: float, since: float, took: float, spent: float) -> bool:
    """Whether to commit now, by the time since the last commit and by what commits cost.

    Once enough work is done since the last commit, one is due if it and the run's last one, which must come in any
    case, keep all commits within `COMMIT_SHARE` of the run's time.  After `_longest` seconds one is due in any case.

    Args:
        elapsed: Seconds since the run began.
        since: Seconds since the last commit.
        took: Seconds that the last commit took.
        spent: Seconds that all commits took.
    """
    waited = since >= max(COMMIT_SECONDS, COMMIT_SHARE * elapsed)
    affordable = spent + 2 * took <= COMMIT_SHARE * elapsed
    return COMMIT_SECONDS == 0 or (waited and affordable) or since >= _longest(took)


def _longest(took: float) -> float:
    """Seconds after which a commit is due whatever it costs, if the last one took `took` seconds."""
    return max(LONGEST_SECONDS, LONGEST_TIMES * took)


def _say_slow(path: Path, took: float) -> None:
    _log.warning(
        "%s: a commit takes %.0f s here, so up to %.0f s of work are between two, instead of %.0f; a quicker disk, or "
        "recording less often (record.every), makes it less",
        path, took, _longest(took), LONGEST_SECONDS,
    )  # fmt: skip


def _training(members: Runnable) -> Members:
    assert isinstance(members, Members)  # `ensemble_key` is None for other kinds
    return members


def _say_what_changed(path: Path, before: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
    """Log a warning if device, threads, versions, engine or processor changed: only with the same ones are bits the
    same.
    """
    changed = machines.changed(before, attrs) + packages.changed(before, attrs)
    if changed:
        _log.warning("%s: goes on elsewhere than it began (%s): bits may differ", path, "; ".join(changed))


def along_steps(pending: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of several steps, stacked along a new second axis; they are taken out of `pending` one by one."""
    found: dict[str, Any] = {}
    for name, value in list(pending[0].items()):
        if isinstance(value, list):
            depth = max(len(p[name]) for p in pending)
            whole = [p[name] for p in pending if len(p[name]) == depth]
            found[name] = [
                np.stack(
                    [p[name][i] if i < len(p[name]) else np.full_like(whole[0][i], np.nan) for p in pending],
                    1,
                )
                for i in range(depth)
            ]
        else:
            found[name] = np.stack([p[name] for p in pending], 1)
        for step in pending:
            del step[name]
    return found


def _mean_error(record: Mapping[str, Any]) -> float | None:
    for name in ("mse_eval", "loss_eval", "population_loss", "eg"):
        if name in record:
            alive = record[name][~np.isnan(record[name])]
            return float(alive.mean()) if len(alive) else float("nan")
    return None
