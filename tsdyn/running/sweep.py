"""Run the points of a sweep, each into a directory of its own, in this process or on dask workers.

A point that fails does not stop the others; if a worker dies, its point is resumed from its last committed epoch.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from tsdyn import memory, registers
from tsdyn.archive import reading, run_directory, sweep_directory, whole_files
from tsdyn.archive.headers import Headers
from tsdyn.archive.made_files import Made
from tsdyn.archive.whole_files import ArchiveError, refuse_link
from tsdyn.experiment import made_modules
from tsdyn.experiment.branching import Fork
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import LeaveOut, Part
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.observables import registry
from tsdyn.observables.registry import Observed, added
from tsdyn.problem import images
from tsdyn.problem.teachers import refuse_unsaid_activation
from tsdyn.running import estimates, joint_training, own_modules, packages, runner
from tsdyn.running.interrupts import stopping
from tsdyn.running.members import Shared
from tsdyn.running.outcome import HELD, AllHeldError, SweepError, is_finished, reason_of, say_replaced_inputs
from tsdyn.running.own_modules import Maker, described
from tsdyn.running.workers import (
    INDEX_SECONDS,
    INDEX_TIMES,
    Passed,
    answer_of,
    check_workers,
    connected_client,
    on_workers,
    refuse_unpicklable,
    say_open,
    workers_that_fit,
)

_log = logging.getLogger("tsdyn")

#: Called before each point, or before the ensemble that it is in, with (position from 1, points, directory name,
#: experiment); returns the Progress to use for the point.
PointProgress = Callable[[int, int, str, Experiment], runner.Progress | None]


def preflight(
    experiment: Experiment, path: str | Path, *, workers: int | None = None, scheduler: str | None = None
) -> None:
    """Check the directory, the workers and shared data files before anything is estimated or drawn.

    Raises:
        ArchiveError, WorkersError, DataError: as in `run`.
    """
    check_workers(workers, scheduler)
    _check_data(experiment, path, scheduler)
    run_directory.claim(whole_files.local_path(path), experiment)


def _check_data(experiment: Experiment, path: str | Path, scheduler: str | None) -> None:
    """Read the data files that all points share, unless other machines read them or no unfinished point needs them."""
    shared = not any(key.startswith("data.") for key in swept_keys(experiment.sweep))
    if scheduler is None and shared and not experiment.data.drawn and unfinished(experiment, path):
        images.load(experiment.data)


def unfinished(experiment: Experiment, path: str | Path) -> dict[str, Experiment]:
    """The points that are not finished in `path`: directory name → experiment; ``.`` for a run without a sweep."""
    directory = whole_files.local_path(path)
    points = _points(experiment, directory)
    there = {"."} | {entry.name for entry in os.scandir(directory)} if directory.is_dir() else set()
    return {
        name: single
        for name, single in points.items()
        if name not in there or not is_finished(directory / name, single)
    }


def _points(experiment: Experiment, path: Path) -> dict[str, Experiment]:
    if not experiment.sweep:
        return {".": experiment}
    return {name: single for name, (_, single) in sweep_directory.named_points(path, experiment).items()}


def estimate(
    points: Mapping[str, Experiment], *, device: str = "cpu", expected: Callable[[float], None] | None = None
) -> dict[str, estimates.Cost]:
    """The estimated cost of each point; of points with the same shapes and settings only one is timed.

    Real numbers, such as rates and scales, and numbers of subsets and branches do not change the time.  Where runs are
    short, what each takes to begin and to write its files is timed, too, once for all.  Points of a sweep that cannot
    begin are left out: they fail when they are run, and the others go on.

    Args:
        points: Directory name → experiment.
        device: As in `run`.
        expected: Called first, with roughly how many seconds the estimate itself takes.

    Raises:
        DeviceError: if this machine has no such device.
        ExperimentError: if an experiment without a sweep cannot begin.
    """
    kinds = _kinds(points)
    if expected is not None:
        first = {kind: name for name, kind in reversed(kinds.items())}
        expected(math.fsum(estimates.trial_seconds(points[name]) for name in first.values()))
    known: dict[Any, estimates.Cost] = {}
    ends: float | None = None
    found, counted = {}, Counter(kinds.values())
    for name, kind in kinds.items():
        single = points[name]
        kin = counted[kind] if _together(single, device) else 1
        try:
            if kind not in known:
                with runner.own_device():
                    cost = estimates.estimate(single, device=runner.check_device(device), together=kin)
                    if cost.seconds < SHORT and _is_tried(single):
                        ends = _seconds_of_ends(single, device, counted[kind]) if ends is None else ends
                        cost = replace(cost, seconds=cost.seconds + ends)
                    known[kind] = cost
        except ExperimentError:
            if name == ".":
                raise
            continue
        found[name] = known[kind]
    return found


#: Of runs that take as many seconds or more, those of their beginning and end, some tenths of one, are left out.
SHORT = 5.0


def _is_tried(experiment: Experiment) -> bool:
    """Whether `_seconds_of_ends` can run it: training, without modules of the user's own, that is no fork."""
    return experiment.kind == "training" and not experiment.of_own_modules and experiment.fork.parent is None


def _seconds_of_ends(experiment: Experiment, device: str, runs: int) -> float:
    """Seconds in which a run begins and writes its files: those of one step, on few samples, in a temporary folder.

    0 where none can be written, or the run fails there: it tells the reason itself when its turn comes.

    Args:
        experiment: The run.
        device: Where it runs.
        runs: How many there are of its cost: small ones begin and end together.
    """
    few: dict[str, Any] = {"training.epochs": 1, "training.steps_per_epoch": 1, "training.warm_up": 0}
    few |= {"data.eval": min(estimates.FEW_SAMPLES, experiment.data.eval)}
    if isinstance(experiment.data.train, int) and not experiment.training.whole:
        most = max(estimates.FEW_SAMPLES, experiment.training.batch)
        few |= {"data.train": min(experiment.data.train, most)}
    if experiment.teacher.init == "trained":
        few |= {"teacher.train_epochs": 1, "teacher.finetune_epochs": 0}
    single, numbers, failed = experiment.replace(few), itertools.count(), dict[Path, Exception]()
    beside = joint_training.beside(experiment, runs) if device == "cpu" else 1
    try:
        with tempfile.TemporaryDirectory() as folder:

            def once() -> None:
                each = {Path(folder) / f"{next(numbers)}": single for _ in range(beside)}
                failed.update(runner.run_together(each, device=device, shared=Shared(), exact=True))

            seconds = estimates.quickest(once, times=2) / beside
    except OSError:
        return 0.0
    return 0.0 if failed else seconds


#: Keys that number runs of one cost.
_NUMBERS: Mapping[type[Part], tuple[str, ...]] = {LeaveOut: ("subset",), Fork: ("branch",)}


def _kinds(points: Mapping[str, Experiment]) -> dict[str, Any]:
    """Each point's shapes and settings, equal where the cost is."""
    shapes: dict[int, Any] = {}  # of the sections that points share
    return {
        name: (single.student_widths, single.teacher_widths, _without_reals(single, shapes))
        for name, single in points.items()
    }


#: Types of most values that are no real numbers, which are asked for first: a sweep may have 100,000 points.
_PLAIN = frozenset((str, int, bool, type(None)))


def _without_reals(values: Any, shapes: dict[int, Any]) -> Any:
    """What is left of an experiment, a section or a value without its real numbers; equal and hashed if it is the same.

    Args:
        values: The experiment, which outlives `shapes`.
        shapes: What was found of sections, by their identity.
    """
    if isinstance(values, float):
        return None
    if values is None or isinstance(values, (str, int)):
        return values
    if isinstance(values, (list, tuple)):
        return tuple(_without_reals(value, shapes) for value in values)
    if isinstance(values, dict):
        return tuple((key, _without_reals(value, shapes)) for key, value in values.items())
    assert isinstance(values, Part), f"{type(values).__name__} in an experiment"
    if id(values) not in shapes:
        numbers = _NUMBERS.get(type(values), ())
        fields = ((name, getattr(values, name)) for name in type(values).model_fields)
        shapes[id(values)] = tuple(
            value is None if name in numbers else value if type(value) in _PLAIN else _without_reals(value, shapes)
            for name, value in fields
        )
    return shapes[id(values)]


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
    together: bool | None = None,
    progress: runner.Progress | None = None,
    point: PointProgress | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
    observables: Sequence[Observed] = (),
) -> xr.Dataset:
    """Run an experiment, or every point of its sweep, into `path`; resumes what was committed.

    Finished points are skipped, so that values added to the sweep cost only the new points.  Points that another
    process is writing are skipped, too: several commands on one sweep, as a job array starts them, share its points.

    Args:
        experiment: With or without a sweep.
        path: Directory; made if absent.  With `scheduler`, every worker must see it under the same name.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        workers: Processes on this machine that share the points, one thread each; None runs them here, in turn.
        scheduler: Address of a dask scheduler, such as ``tcp://10.0.0.1:8786``, whose workers share the points.
        together: Whether points whose students have the same shape train as one ensemble, as many as fit in memory
            (`joint_training.group_points`).  None: on a GPU, which is quicker with many members.  On a CPU the compiled
            step trains member by member, so that only what surrounds it is shared: there small points train together,
            in this process, where each keeps the bits that it has alone.
        progress: Called after every epoch, see `runner.Progress`; with workers at most twice a second.
        point: For a sweep, called before each point; returns that point's progress, or None for `progress`.
        student, teacher: Functions that make an ``nn.Module`` of the user's own as student or teacher (`own_modules`);
            called once per seed.  Workers get them by cloudpickle.  None: tsdyn makes the network, or imports what
            ``student.module`` and ``teacher.module`` name.
        observables: Observables of the user's own (`tsdyn.declare`), recorded beside those that the experiment names;
            workers get them by cloudpickle.

    Returns:
        The lazy archive; the swept keys of a sweep are its leading dimensions.

    Raises:
        ArchiveError: if the directory is another's, held by another process, or cannot be written.
        SweepError: at the end, if points failed; names them with the reasons.
        AllHeldError: if other processes are writing all points of the sweep and none has a committed epoch.
        DeviceError: if this machine has no such device.
        WorkersError: if `workers` is below 1, both `workers` and `scheduler` are given, or no scheduler answers.
        DataError: if all points read the same data files and these are missing or damaged.

    Examples:
        >>> import tsdyn
        >>> experiment = tsdyn.Experiment.from_toml("quickstart.toml")
        >>> ds = tsdyn.run(experiment, "runs/quickstart")  # resumes what was committed; here all is there
        >>> ds.sizes["epoch"]
        13
    """
    if not isinstance(experiment, Experiment):
        raise ExperimentError(
            f"tsdyn.run: experiment is a {type(experiment).__name__}; give a tsdyn.Experiment, of a file "
            'tsdyn.Experiment.from_toml("experiment.toml")'
        )
    for part in observables:
        if not isinstance(part, Observed):
            raise ExperimentError(
                f"tsdyn.run: observables holds a {type(part).__name__}; give tsdyn.Observed(tsdyn.declare(...), f)"
            )
    check_workers(workers, scheduler)
    if not any(experiment.awaits_a_module(who) for who in made_modules.NETWORKS):
        _check_data(experiment, path, scheduler)
    say_open(scheduler)
    means = _Means(
        device, workers, scheduler, _together(experiment, device) if together is None else together, student, teacher,
        small=together is None and device == "cpu",
    )  # fmt: skip
    if means.distributed:
        refuse_unpicklable(student=student, teacher=teacher, **{f"observable {o.name!r}": o for o in observables})
    with added(observables), own_modules.keeping():
        own = _as_begun(completed(_asking(experiment, observables), student=student, teacher=teacher), path)
        if not packages.missing(own):
            registry.load(own)  # a package's observables are declared when they are loaded
        if not whole_files.local_path(path).exists():  # what was begun before goes on as it was
            refuse_unsaid_activation(own)
        lost = packages.missing(own)
        if lost and unfinished(own, path):
            packages.refuse_missing(lost, own, whole_files.local_path(path))
        if means.distributed and not lost:
            means = replace(means, parts=packages.of_this_process(own))
            refuse_unpicklable(**{f"{kind} {name!r}": part for kind, name, part in means.parts})
        return _run(own, path, means, progress, point)


def completed(experiment: Experiment, *, student: Maker | None = None, teacher: Maker | None = None) -> Experiment:
    """The experiment with the names, sizes and source digests of the modules that it names or that are given.

    Raises:
        ExperimentError: if a module cannot be imported, made or trained.
    """
    return described(experiment, student=student, teacher=teacher)


def _as_begun(experiment: Experiment, path: str | Path) -> Experiment:
    """The experiment without names of modules' layers where the directory was begun without.

    They were filled in only where something was recorded of single layers; where nothing is, the run goes on as it was.
    """
    try:
        there = Experiment.from_toml(whole_files.local_path(path) / run_directory.EXPERIMENT, archived=True)
    except (ExperimentError, OSError):  # nothing is there, or what is there is refused with the reason where it is read
        return experiment
    parts = [(who, getattr(there, who)) for who in made_modules.NETWORKS]
    begun = [who for who, part in parts if part.source is not None and part.layers is None]
    lacking = [who for who in begun if not own_modules.needs_layers(experiment, who)]
    changes: dict[str, Any] = {f"{who}.{name}": None for who in lacking for name in ("layers", "shapes")}
    return experiment.replace(changes) if changes else experiment


def _together(experiment: Experiment, device: str) -> bool:
    """Whether points train as one ensemble unless the caller decides: on a GPU, and students that share their data."""
    return device != "cpu" or experiment.data.leave_out.subsets is not None


@dataclass(frozen=True)
class _Means:
    """Arguments of `run` that say where and with what the points are run.

    `together` is not None here; `small`: whether small points train together where none else do.
    """

    device: str
    workers: int | None
    scheduler: str | None
    together: bool
    student: Maker | None
    teacher: Maker | None
    parts: tuple[registers.Sent, ...] = ()
    small: bool = False

    @property
    def passed(self) -> Passed:
        return Passed(self.parts, self.student, self.teacher, own_modules.sent())

    @property
    def distributed(self) -> bool:
        return self.workers is not None or self.scheduler is not None


def _asking(experiment: Experiment, observables: Sequence[Observed]) -> Experiment:
    """The experiment with these observables added to ``record.observables``."""
    asked = list(experiment.record.observables)
    missing = [each.name for each in observables if each.name not in asked]
    return experiment.replace({"record.observables": [*asked, *missing]}) if missing else experiment


#: Called with the names of points that begin; returns the Progress of each.
_Telling = Callable[[Iterable[str]], dict[str, "runner.Progress | None"]]
#: Called with the name of each point that ended, and the reason if it failed.
_Ended = Callable[[str, str | None], None]


def _run(
    experiment: Experiment,
    path: str | Path,
    means: _Means,
    progress: runner.Progress | None,
    point: PointProgress | None,
) -> xr.Dataset:
    """`run` of an experiment whose parts are all registered."""
    if means.scheduler is None:
        runner.check_device(means.device)
    path = whole_files.local_path(path).absolute() if means.distributed else whole_files.local_path(path)
    if not experiment.sweep and not means.distributed:
        return runner.run(
            experiment, path, device=means.device, progress=progress, student=means.student, teacher=means.teacher
        )
    points = sweep_directory.write_sweep(path, experiment) if experiment.sweep else {".": experiment}
    account = _Account(path, points, is_sweep=bool(experiment.sweep))
    left = account.without_links(unfinished(experiment, path))
    for name in points.keys() - left.keys():
        if is_finished(path / name, points[name]):
            say_replaced_inputs(path / name, points[name])
    places = {name: position for position, name in enumerate(points, start=1)}

    def telling(names: Iterable[str]) -> dict[str, runner.Progress | None]:
        return {n: (point(places[n], len(points), n, left[n]) if point else None) or progress for n in names}

    if left and means.distributed:
        _run_on_workers(left, path, means, telling, account.ended)
    elif left:
        _run_here(left, path, means, telling, account)
    account.close()
    try:
        return reading.open(path)
    except ArchiveError as error:
        if account.all_held:
            raise AllHeldError(f"{path}: other processes are writing all its points: {error}") from error
        raise


def _run_on_workers(
    left: Mapping[str, Experiment], path: Path, means: _Means, telling: _Telling, ended: _Ended
) -> None:
    at_once = means.workers and workers_that_fit(means.workers, left)
    with stopping() as asked, connected_client(at_once, means.scheduler) as client:
        groups = _each_alone(left)
        if means.together:
            room = answer_of(client, client.submit(memory.free, means.device, pure=False))  # waits for a first worker
            busy = at_once or len(client.scheduler_info(n_workers=-1)["workers"])
            # local workers share this machine's memory, those of a scheduler have machines of their own
            groups = joint_training.group_points(left, busy, room // 2 // (at_once or 1))
        tell = telling(left)
        told = on_workers(client, groups, path, means.device, tell, at_once or len(left), asked, means.passed)
        for name, reason in told:
            ended(name, reason)


def _run_here(left: Mapping[str, Experiment], path: Path, means: _Means, telling: _Telling, account: _Account) -> None:
    shared, small = None if means.together else Shared(), means.small and not means.together
    if means.together or small:
        groups = joint_training.group_points(left, 1, memory.free(means.device) // 2, small=small)
    else:
        groups = _each_alone(left)
    for group in groups:
        failed = runner.run_together(
            {path / name: single for name, single in group.items()},
            device=means.device,
            progress={path / name: report for name, report in telling(group).items()},
            student=means.student,
            teacher=means.teacher,
            wrote=account.wrote,
            shared=shared,
            exact=small,
        )
        for name in group:
            account.ended(name, reason_of(failed[path / name]) if path / name in failed else None)


def _each_alone(points: Mapping[str, Experiment]) -> list[dict[str, Experiment]]:
    return [{name: single} for name, single in points.items()]


class _Account:
    """Results of the points: finished ones are written to the index, failed and locked ones are reported at the end."""

    def __init__(self, path: Path, points: Mapping[str, Experiment], *, is_sweep: bool) -> None:
        self._path, self._points, self._is_sweep = path, points, is_sweep
        self._index = _IndexKeeper(path, points)
        self._failures: dict[str, str] = {}
        self._held: set[str] = set()

    def without_links(self, left: Mapping[str, Experiment]) -> dict[str, Experiment]:
        """`left` without the points whose directory is a symbolic link; these count as failed."""
        for name in self._points if self._is_sweep else ():
            try:
                refuse_link(self._path / name)
            except ArchiveError as error:
                self._failures[name] = str(error)
        return {name: single for name, single in left.items() if name not in self._failures}

    def ended(self, name: str, reason: str | None) -> None:
        """Note that a point is finished, or the reason why it failed."""
        if reason is not None and reason.startswith(HELD) and self._is_sweep:
            self._held.add(name)
            return
        if reason is not None:
            self._failures[name] = reason.removeprefix(HELD)
        self._index.note(name)

    def wrote(self, folder: Path, made: Made) -> None:
        """Note what the archive of a point declares that was just written."""
        if self._is_sweep and folder.parent == self._path:  # not of seeds that a point gains
            self._index.made(folder.name, made)

    @property
    def all_held(self) -> bool:
        """Whether other processes are writing all points."""
        return len(self._held) == len(self._points)

    def close(self) -> None:
        """Write the index, once all points have ended.

        Raises:
            SweepError: if points failed.
        """
        if self._held:
            held = len(self._held), len(self._points)
            _log.warning("%s: %d of %d points are being written by other processes", self._path, *held)
        if self._is_sweep:
            self._index.write()
        if self._failures:
            raise SweepError(self._path, self._failures, len(self._points))


class _IndexKeeper:
    """Writes the sweep's index while points are finished; the index is a cache, so a failed write does no harm."""

    def __init__(self, path: Path, points: Mapping[str, Experiment]) -> None:
        self._headers, self._points, self._due = Headers(path), points, time.monotonic() + INDEX_SECONDS
        self._known: set[str] = set()  # points that `made` has told of

    def note(self, name: str) -> None:
        if name not in self._known:
            self._read(name)
        begin = time.monotonic()
        if begin >= self._due:
            self._headers.write()
            now = time.monotonic()  # the whole index is written each time, and is long where points are many
            self._due = now + max(INDEX_SECONDS, INDEX_TIMES * (now - begin))

    def made(self, name: str, made: Made) -> None:
        try:
            self._headers.made(name, made)
            self._known.add(name)
        except (ArchiveError, OSError) as error:
            _log.warning("%s", error)

    def write(self) -> None:
        for name in self._points:
            self._read(name)
        self._headers.write()

    def _read(self, name: str) -> None:
        try:
            with suppress(FileNotFoundError):  # another command extends it, and notes it itself
                self._headers.finished(name, lambda: self._points[name])
        except ArchiveError as error:
            _log.warning("%s", error)
