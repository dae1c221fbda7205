"""A grid of experiments: one directory a point, one Dataset; in this process or on dask workers.

A point that fails does not stop the others; a worker that dies takes nothing along, because its point goes on from
the epoch it last committed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from tsdyn import memory, registers
from tsdyn.archive import reading, run_directory, sweep_directory, whole_files
from tsdyn.archive.headers import Headers
from tsdyn.archive.whole_files import ArchiveError, refuse_link
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.observables.registry import Observed, added
from tsdyn.problem import images
from tsdyn.running import estimates, packages, runner
from tsdyn.running.interrupts import stopping
from tsdyn.running.own_modules import Maker, described

if TYPE_CHECKING:
    pass
from tsdyn.running.joint_training import group_points
from tsdyn.running.outcome import _HELD, SweepError, _finished, _reason
from tsdyn.running.workers import (
    INDEX_SECONDS,
    WorkersError,
    _answer,
    _check_workers,
    _client,
    _on_workers,
    _say_open,
    workers_that_fit,
)

#: Called before each point, or the ensemble it is in, with (position from 1, points, directory name, experiment); its
#: Progress is then used.
PointProgress = Callable[[int, int, str, Experiment], "runner.Progress | None"]


_log = logging.getLogger("tsdyn")


def preflight(
    experiment: Experiment, path: str | Path, *, workers: int | None = None, scheduler: str | None = None
) -> None:
    """Refuse a directory that is another's, workers that cannot be had and data files that no point could read, before
    anything is estimated or drawn.

    Raises:
        ArchiveError, WorkersError, DataError: as `run`.
    """
    _check_workers(workers, scheduler)
    _check_data(experiment, path, scheduler)
    run_directory.claim(whole_files.local_path(path), experiment)


def _check_data(experiment: Experiment, path: str | Path, scheduler: str | None) -> None:
    """Read the data that all points share, unless other machines do or no point is left that needs them."""
    shared = not any(key.startswith("data.") for key in swept_keys(experiment.sweep))
    if scheduler is None and shared and not experiment.data.drawn and unfinished(experiment, path):
        images.load(experiment.data)


def unfinished(experiment: Experiment, path: str | Path) -> dict[str, Experiment]:
    """Directory name → experiment of each point that is not finished in `path`; ``.`` for one without a sweep."""
    directory = whole_files.local_path(path)
    points = _points(experiment, directory)
    return {name: single for name, single in points.items() if not _finished(directory / name, single)}


def _points(experiment: Experiment, path: Path) -> dict[str, Experiment]:
    if not experiment.sweep:
        return {".": experiment}
    return {name: single for name, (_, single) in sweep_directory.named_points(path, experiment).items()}


def estimate(points: Mapping[str, Experiment], *, device: str = "cpu") -> dict[str, estimates.Cost]:
    """What each point will take; of those with the same shapes and settings one is timed, for all of them.

    Real numbers, such as rates and scales, cost no time.  Points of a sweep that cannot begin are left out: they fail
    when their turn comes, and the others go on.

    Raises:
        DeviceError: if there is no such device.
        ExperimentError: if an experiment without a sweep cannot begin.
    """
    known: dict[Any, estimates.Cost] = {}
    found = {}
    for name, single in points.items():
        kind = single.layout, json.dumps(_without_reals(single.as_dict()), sort_keys=True)
        try:
            if kind not in known:
                with runner.own_device():
                    known[kind] = estimates.estimate(single, device=runner.check_device(device))
        except ExperimentError:
            if name == ".":
                raise
            continue
        found[name] = known[kind]
    return found


def _without_reals(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_reals(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_reals(value) for value in values]
    return None if isinstance(values, float) else values


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

    Points that are finished are skipped, so values added to the sweep cost what is new only.  So are those that another
    process is writing: several commands on one sweep, as a job array starts them, share its points.

    Args:
        experiment: With or without a sweep.
        path: Directory; made if absent.  With `scheduler`, one that every worker sees under the same name.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        workers: Processes on this machine that share the points, one thread each; None runs them here, in turn.
        scheduler: Address of a dask scheduler, such as ``tcp://10.0.0.1:8786``, whose workers share the points.
        together: Whether points whose students have the same shape train as one ensemble, as many as have room
            (`group_points`); None: on a GPU, which wants many members at once.  On a CPU the compiled kernel trains
            member by member and gains nothing by it.
        progress: Told after every epoch, see `runner.Progress`; by workers twice a second at most.
        point: For a sweep, told before each point; returns that point's progress, None for `progress`.
        student, teacher: Make an ``nn.Module`` of the user's own to be the student or the teacher (`own_modules`);
            called once per seed, here and not by workers.
        observables: Of the user's own (`tsdyn.declare`), recorded beside what the experiment asks for; workers get them
            by cloudpickle.

    Returns:
        The lazy archive; the swept keys of a sweep are its leading dimensions.

    Raises:
        ArchiveError: if the directory is another's, held by another process, or cannot be written.
        SweepError: at the end, if points failed: which, and why.
        DeviceError: if there is no such device.
        WorkersError: if `workers` is below 1, both ways are asked for, or no scheduler answers.
        DataError: if all points read the same data files and these are missing or damaged.
    """
    _check_workers(workers, scheduler)
    _check_data(experiment, path, scheduler)
    _say_open(scheduler)
    distributed = workers is not None or scheduler is not None
    if distributed and (student is not None or teacher is not None):
        raise WorkersError("student, teacher: modules passed from Python train in this process; leave workers out")
    with added(observables):
        own = described(_asking(experiment, observables), student=student, teacher=teacher)
        lost = packages.missing(own)
        if lost and unfinished(own, path):
            packages.refuse_missing(lost, own, whole_files.local_path(path))
        if distributed and not lost:
            _refuse_parts_of_this_process(own, observables)
        return _run(
            own, path, device=device, workers=workers, scheduler=scheduler, together=together, progress=progress,
            point=point, student=student, teacher=teacher, observables=tuple(observables),
        )  # fmt: skip


def _asking(experiment: Experiment, observables: Sequence[Observed]) -> Experiment:
    """The experiment that asks for these observables, too."""
    asked = list(experiment.record.observables)
    missing = [each.name for each in observables if each.name not in asked]
    return experiment.replace({"record.observables": [*asked, *missing]}) if missing else experiment


def _refuse_parts_of_this_process(experiment: Experiment, passed: Sequence[Observed]) -> None:
    """Parts that were added to this process and that workers, which are other processes, would not find."""
    names = {each.name for each in passed}
    lost = [
        f"{key} = {register.kind} {name!r}"
        for key, register, name in packages.every_part(experiment)
        if name not in names and register.origin(name).package == registers.THIS_PROCESS
    ]
    if lost:
        raise WorkersError(
            f"{', '.join(dict.fromkeys(lost))}: added to this process only, so that workers do not have it; offer it "
            "by an entry point of an installed package (docs: Growing tsdyn), pass observables to tsdyn.run, or leave "
            "workers out"
        )


def _run(
    experiment: Experiment,
    path: str | Path,
    *,
    device: str,
    workers: int | None,
    scheduler: str | None,
    together: bool | None,
    progress: runner.Progress | None,
    point: PointProgress | None,
    student: Maker | None,
    teacher: Maker | None,
    observables: tuple[Observed, ...],
) -> xr.Dataset:
    """As `run`, of an experiment all of whose parts are known."""
    distributed = workers is not None or scheduler is not None
    if scheduler is None:
        runner.check_device(device)
    path = whole_files.local_path(path).absolute() if distributed else whole_files.local_path(path)
    if not experiment.sweep and not distributed:
        return runner.run(experiment, path, device=device, progress=progress, student=student, teacher=teacher)
    points = sweep_directory.write_sweep(path, experiment) if experiment.sweep else {".": experiment}
    left = unfinished(experiment, path)
    keeper = _IndexKeeper(path, points)
    places = {name: position for position, name in enumerate(points, start=1)}
    failures: dict[str, str] = {}
    held: set[str] = set()
    for name in points if experiment.sweep else ():
        try:
            refuse_link(path / name)
        except ArchiveError as error:
            failures[name] = str(error)
            left.pop(name, None)

    def telling(names: Iterable[str]) -> dict[str, runner.Progress | None]:
        return {n: (point(places[n], len(points), n, left[n]) if point else None) or progress for n in names}

    def ended(name: str, reason: str | None) -> None:
        if reason is not None and reason.startswith(_HELD) and experiment.sweep:
            held.add(name)
            return
        if reason is not None:
            failures[name] = reason.removeprefix(_HELD)
        keeper.note(name)

    if together is None:
        together = device != "cpu"
    if distributed and left:
        at_once = workers and workers_that_fit(workers, left)
        with stopping() as asked, _client(at_once, scheduler) as client:
            groups = _in_subprocess(left)
            if together:
                room = _answer(client, client.submit(memory.free, device, pure=False))  # once there is a worker
                busy = at_once or len(client.scheduler_info(n_workers=-1)["workers"])
                groups = group_points(
                    left, busy, room // 2 // (at_once or 1)
                )  # those elsewhere have memory of their own
            tell = telling(left)
            told = _on_workers(client, groups, path, device, tell, at_once or len(left), asked, observables)
            for name, reason in told:
                ended(name, reason)
    elif left:
        for group in group_points(left, 1, memory.free(device) // 2) if together else _in_subprocess(left):
            reports = {path / name: report for name, report in telling(group).items()}
            paths = {path / name: single for name, single in group.items()}
            failed = runner.run_together(paths, device=device, progress=reports, student=student, teacher=teacher)
            for name in group:
                ended(name, _reason(failed[path / name]) if path / name in failed else None)
    if held:
        _log.warning("%s: %d of %d points are being written by other processes", path, len(held), len(points))
    if experiment.sweep:
        keeper.write()
    if failures:
        raise SweepError(path, failures, len(points))
    return reading.open(path)


class _IndexKeeper:
    """Writes the sweep's index as its points are finished; a cache, so what is lost is read again."""

    def __init__(self, path: Path, points: Mapping[str, Experiment]) -> None:
        self._headers, self._points, self._clock = Headers(path), points, time.monotonic()

    def note(self, name: str) -> None:
        self._read(name)
        if time.monotonic() - self._clock >= INDEX_SECONDS:
            self._headers.write()
            self._clock = time.monotonic()

    def write(self) -> None:
        for name in self._points:
            self._read(name)
        self._headers.write()

    def _read(self, name: str) -> None:
        try:
            self._headers.finished(name, lambda: self._points[name])
        except ArchiveError as error:
            logging.getLogger("tsdyn").warning("%s", error)


def _in_subprocess(points: Mapping[str, Experiment]) -> list[dict[str, Experiment]]:
    return [{name: single} for name, single in points.items()]
