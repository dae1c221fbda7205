"""A grid of experiments: one directory a point, one Dataset; in this process or on dask workers.

A point that fails does not stop the others; a worker that dies takes nothing along, because its point goes on from
the epoch it last committed.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import xarray as xr

from tsdyn import archive, costs, images, memory, registers, runner, sweep_directory
from tsdyn.experiment import Experiment, ExperimentError
from tsdyn.headers import Headers
from tsdyn.interrupts import Stopped, stopping
from tsdyn.lock import HeldError
from tsdyn.members import kinship
from tsdyn.observables import Observed, added
from tsdyn.own_modules import Maker, described
from tsdyn.run_directory import segments
from tsdyn.sweep_axes import swept_keys
from tsdyn.whole_files import ArchiveError, refuse_link

if TYPE_CHECKING:
    from distributed import Client

#: Called before each point, or the ensemble it is in, with (position from 1, points, directory name, experiment); its
#: Progress is then used.
PointProgress = Callable[[int, int, str, Experiment], "runner.Progress | None"]

#: A point whose worker died so often without a committed epoch in between has failed.
FRUITLESS = 3
#: A worker tells of its epochs this often; the index is written this often.
TELL_SECONDS, INDEX_SECONDS = 0.5, 5.0
CONNECT_SECONDS = 10
POLL_SECONDS = 0.05
#: Without a sign of life of any worker for so long, the log says so; asked this often.
SILENT_SECONDS, ASK_SECONDS = 20.0, 5.0
_log = logging.getLogger("tsdyn")


class SweepError(ArchiveError):
    """Points of a sweep failed; the others are done.

    Attributes:
        failures: Directory name of each that failed → why.
    """

    def __init__(self, path: Path, failures: Mapping[str, str], points: int) -> None:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{path}: {len(failures)} of {points} points failed, the others are done:\n  {listed}")
        self.failures = dict(failures)

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeError, (str(self),)


class WorkersError(ValueError):
    """Workers that cannot be had."""


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
    archive.claim(archive.local_path(path), experiment)


def _check_workers(workers: int | None, scheduler: str | None) -> None:
    if workers is not None and (workers < 1 or scheduler is not None):
        raise WorkersError(f"workers = {workers}: at least 1, and not together with a scheduler's address")


def _check_data(experiment: Experiment, path: str | Path, scheduler: str | None) -> None:
    """Read the data that all points share, unless other machines do or no point is left that needs them."""
    shared = not any(key.startswith("data.") for key in swept_keys(experiment.sweep))
    if scheduler is None and shared and not experiment.data.drawn and due(experiment, path):
        images.load(experiment.data)


def due(experiment: Experiment, path: str | Path) -> dict[str, Experiment]:
    """Directory name → experiment of each point that is not finished in `path`; ``.`` for one without a sweep."""
    directory = archive.local_path(path)
    points = _points(experiment, directory)
    return {name: single for name, single in points.items() if not _finished(directory / name, single)}


def _points(experiment: Experiment, path: Path) -> dict[str, Experiment]:
    if not experiment.sweep:
        return {".": experiment}
    return {name: single for name, (_, single) in sweep_directory.named_points(path, experiment).items()}


def estimate(points: Mapping[str, Experiment], *, device: str = "cpu") -> dict[str, costs.Cost]:
    """What each point will take; of those with the same shapes and settings one is timed, for all of them.

    Real numbers, such as rates and scales, cost no time.  Points of a sweep that cannot begin are left out: they fail
    when their turn comes, and the others go on.

    Raises:
        DeviceError: if there is no such device.
        ExperimentError: if an experiment without a sweep cannot begin.
    """
    known: dict[Any, costs.Cost] = {}
    found = {}
    for name, single in points.items():
        kind = single.layout, json.dumps(_without_reals(single.as_dict()), sort_keys=True)
        try:
            if kind not in known:
                with runner.own_device():
                    known[kind] = costs.estimate(single, device=runner.check_device(device))
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
            (`companies`); None: on a GPU, which wants many members at once.  On a CPU the compiled kernel trains
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
        if distributed:
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
        for _, single in experiment.points()
        for key, (register, name) in single.parts.items()
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
    path = archive.local_path(path).absolute() if distributed else archive.local_path(path)
    if not experiment.sweep and not distributed:
        return runner.run(experiment, path, device=device, progress=progress, student=student, teacher=teacher)
    points = archive.write_sweep(path, experiment) if experiment.sweep else {".": experiment}
    left = due(experiment, path)
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
        at_once = workers and fitting(workers, left)
        with stopping() as asked, _client(at_once, scheduler) as client:
            groups = _apart(left)
            if together:
                room = _answer(client, client.submit(memory.free, device, pure=False))  # once there is a worker
                busy = at_once or len(client.scheduler_info(n_workers=-1)["workers"])
                groups = companies(left, busy, room // 2 // (at_once or 1))  # those elsewhere have memory of their own
            tell = telling(left)
            told = _on_workers(client, groups, path, device, tell, at_once or len(left), asked, observables)
            for name, reason in told:
                ended(name, reason)
    elif left:
        for group in companies(left, 1, memory.free(device) // 2) if together else _apart(left):
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
    return archive.open(path)


#: How the reason begins why a point was left out that another process is writing.
_HELD = "held: "


def _reason(error: BaseException) -> str:
    if isinstance(error, HeldError):
        return f"{_HELD}{error}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, (ArchiveError, ValueError)) else str(error)


def _finished(path: Path, experiment: Experiment) -> bool:
    try:
        there = (path / archive.EXPERIMENT).read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: bytes that are no text; the run says so when its turn comes
        return False
    return (path / archive.ARCHIVE).is_file() and there == experiment.to_toml()


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


def _apart(points: Mapping[str, Experiment]) -> list[dict[str, Experiment]]:
    return [{name: single} for name, single in points.items()]


def companies(points: Mapping[str, Experiment], workers: int, room: int) -> list[dict[str, Experiment]]:
    """Points divided into ensembles: of one `kinship` each, and each of at most `room` bytes and `_at_most` points.

    Args:
        points: Directory name → experiment.
        workers: Who share them: none is left idle for the sake of a larger ensemble.
        room: What one worker has of memory, in bytes; a point that takes more by itself stays one.
    """
    share = min(_at_most(), -(-len(points) // workers))
    groups: list[dict[str, Experiment]] = []
    open_ones: dict[object, tuple[dict[str, Experiment], costs.Footprint]] = {}
    for name, single in points.items():
        kin, alone = kinship(single), costs.footprint(single)
        group, held = open_ones.get(kin, ({}, costs.Footprint()))
        if kin is None or not group or len(group) >= share or (held + alone).bytes > room:
            group, held = {}, costs.Footprint()
            groups.append(group)
        group[name] = single
        open_ones[kin] = group, held + alone
    return groups


def _at_most() -> int:
    """Points that one process writes side by side: each keeps a file open for its lock, joining opens more."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


# --- on workers ----------------------------------------------------------------------------------------------


def fitting(workers: int, points: Mapping[str, Experiment]) -> int:
    """`workers`, or as many as have room in memory for the largest of the points each; one at least."""
    largest = max(costs.footprint(single).bytes for single in points.values())
    room = max(1, memory.available() // max(1, largest))
    if room < workers:
        logging.getLogger("tsdyn").warning(
            "%d workers instead of %d: the largest run takes %.1f GB of memory", room, workers, largest / 1e9
        )
    return min(workers, room)


@contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """A client of the scheduler at that address, or of a cluster of processes of our own.

    Never the process's default one: one that got no answer would stay that until it is collected, and whatever is
    computed meanwhile wait for it.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (
            OSError,
            ValueError,
            TypeError,
            ImportError,
        ) as error:  # TypeError: tls:// without the user's certificate
            raise WorkersError(f"scheduler {scheduler}: does not answer: {error}") from error
        with client:
            yield client
        return
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 10,
        "distributed.comm.timeouts.connect": "60s",
    }
    # dask has each process listen for a browser as well, and without TLS: nothing is to be had there
    settings |= {f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker")}
    ignored = "signal.SIGINT, signal.SIGHUP, signal.SIGUSR1"
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            security=_own_certificate(),
            dashboard_address=None,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            memory_limit=0,  # a run asks for room before it begins; dask would kill one that has it
            # Ctrl-C and a terminal that goes away reach every process of it; a worker is told to stop by this one
            preload=f"import signal; [signal.signal(number, signal.SIG_IGN) for number in ({ignored})]",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _own_certificate() -> Any:
    """A certificate of this sweep alone, kept in memory.

    Who can talk to the scheduler or its workers can have them run any code; without it nobody can.
    """
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise WorkersError(
            "workers: their connections are encrypted, so that nobody else on this machine can run code through them, "
            f"and that needs the package cryptography ({error}): pip install cryptography"
        ) from None


def _say_open(scheduler: str | None) -> None:
    if scheduler is not None and not scheduler.startswith(("tls://", "inproc://")):
        _log.warning(
            "scheduler %s: the connection is not encrypted, and anyone who reaches that address can run code as you "
            "there; start dask with tls:// and a certificate where others can",
            scheduler,
        )


_GONE = "the scheduler is gone; what was committed is intact, the same command goes on from there"


class _Listening:
    """Says once, of each silence, that no worker of the scheduler gives a sign of life."""

    def __init__(self, client: Any) -> None:
        self._client, self._asked, self._said = client, time.monotonic(), False
        self._heard = self._asked

    def ask(self) -> None:
        """At most every `ASK_SECONDS`.

        Raises:
            WorkersError: if the scheduler itself is gone.
        """
        now = time.monotonic()
        if now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        found = self._alive()
        if found is None:
            self._heard, self._said = now, False
        elif now - self._heard >= SILENT_SECONDS and not self._said:
            self._said = True
            _log.warning(
                "%s for %.0f s, and nothing is computed meanwhile; waiting for one (what was committed is intact, "
                "Ctrl-C ends)",
                found,
                now - self._heard,
            )

    def _alive(self) -> str | None:
        """None if a worker gave a sign of life since it was asked last, else what is wrong."""
        from distributed.utils import sync

        if self._client.status in ("closed", "closing"):
            raise WorkersError(
                "the scheduler is gone; what was committed is intact, the same command goes on from there"
            )
        try:
            told = sync(self._client.loop, self._client.scheduler.identity, n_workers=-1, callback_timeout=ASK_SECONDS)
        except (OSError, TimeoutError):
            return "the scheduler has not answered"
        if not told["workers"]:
            return "no worker has been there"
        newest = max(worker["last_seen"] for worker in told["workers"].values())
        self._newest, before = newest, getattr(self, "_newest", None)
        return None if newest != before else "no worker has given a sign of life"


def _answer(client: Any, future: Any) -> Any:
    """A result, saying meanwhile if nobody is there to compute it."""
    listening = _Listening(client)
    while not future.done():
        listening.ask()
        time.sleep(POLL_SECONDS)
    return future.result()


def _on_workers(
    client: Client,
    groups: Sequence[Mapping[str, Experiment]],
    path: Path,
    device: str,
    tell: Mapping[str, runner.Progress | None],
    at_once: int,
    asked: Callable[[], int | None],
    observables: tuple[Observed, ...],
) -> Iterator[tuple[str, str | None]]:
    """Each point as its group ends, with why it failed; after a signal those that finished, then `Stopped`.

    The scheduler is given no more than `at_once` groups: it hands out all it has at once, and does not take back what a
    busy worker has waiting when another is idle.  The longest begin first, so that none is left to the end.
    """
    from distributed import Event, KilledWorker, as_completed

    topic = f"tsdyn-{uuid.uuid4().hex}"

    def hear(event: tuple[Any, dict[str, Any]]) -> None:
        told = event[1]
        report = tell.get(told["name"])
        if report is not None:
            report(told["epoch"], told["epochs"], list(told["died"]), told["mse"])  # lists arrive as tuples

    def submit(group: Mapping[str, Experiment]) -> Any:
        key = f"{next(iter(group))}-{uuid.uuid4().hex[:8]}"
        texts = {name: single.to_toml() for name, single in group.items()}
        future = client.submit(_work, texts, str(path), device, topic, observables, key=key, pure=False)
        futures[future] = group
        return future

    client.subscribe_topic(topic, hear)
    listening = _Listening(client)
    waiting = sorted(groups, key=lambda group: sum(map(_work_in, group.values())))
    futures: dict[Any, Mapping[str, Experiment]] = {}
    names = [name for group in groups for name in group]
    fruitless, reached = dict.fromkeys(names, 0), {name: _reached(path / name) for name in names}
    stop: int | None = None
    try:
        first = [submit(waiting.pop()) for _ in range(min(at_once, len(waiting)))]
        running = as_completed(first, loop=client.loop)
        while not running.is_empty():
            if stop is None and (stop := asked()) is not None:
                waiting.clear()
                Event(topic, client=client).set()  # all workers hear it, and commit what they have
            if not running.has_ready():
                listening.ask()
                time.sleep(POLL_SECONDS)
                continue
            future = next(running)
            if future.status in ("cancelled", "lost"):  # nobody else cancels
                raise WorkersError(_GONE)
            group = futures.pop(future)
            error = future.exception()
            if isinstance(error, KilledWorker):
                again = {}
                for name, single in group.items():
                    now = _reached(path / name)
                    fruitless[name] = 0 if now > reached[name] else fruitless[name] + 1
                    reached[name] = now
                    if fruitless[name] < FRUITLESS:
                        again[name] = single
                    else:
                        yield name, _reason(error)
                halves = list(again)[::2], list(again)[1::2]  # the one that kills its worker is found, and fails alone
                for half in filter(None, halves if stop is None else ()):
                    running.add(submit({name: again[name] for name in half}))
                if again:
                    continue
            if waiting:
                running.add(submit(waiting.pop()))
            if isinstance(error, KilledWorker):
                continue
            if error is not None:
                yield from dict.fromkeys(group, _reason(error)).items()
            else:
                told = future.result()
                yield from (dict.fromkeys(told["finished"]) | told["failed"]).items()
        if stop is not None:
            raise Stopped(stop)
    finally:
        with suppress(OSError, TimeoutError):  # of a scheduler that is gone
            client.cancel(list(futures))
            client.unsubscribe_topic(topic)


def _work_in(single: Experiment) -> int:
    """What a run's time goes with: members, steps and parameters."""
    layout, kind = single.layout, single.kind
    parameters = sum(n * below for n, below in zip(layout.widths, layout.input_widths, strict=True))
    if kind == "training":
        steps = single.training.epochs * single.steps
    elif kind == "population-flow":
        steps = parameters**2  # a Hessian and its factors a step
    elif kind == "online":
        steps = round(single.marks[-1] * layout.input_width)
    else:
        assert_never(kind)
    return len(layout.seeds) * steps * parameters


def _reached(path: Path) -> int:
    """Last committed epoch of a point, −1 for none."""
    try:
        found = segments(path)
    except ArchiveError:
        return -1
    return found[-1].last if found else -1


def _work(
    texts: Mapping[str, str], path: str, device: str, topic: str, observables: tuple[Observed, ...]
) -> dict[str, Any]:
    """What a worker does: a group of points, resumed; tells of their epochs on `topic`, whose event asks it to stop.

    Returns why which failed, and which are finished.
    """
    import torch
    from distributed import get_worker
    from distributed.utils import sync

    worker = get_worker()
    torch.set_num_threads(worker.state.nthreads)
    heard = [-TELL_SECONDS, False]

    def asked() -> int | None:
        if not heard[1] and time.monotonic() - heard[0] >= TELL_SECONDS:
            # the scheduler by the worker's own line: an Event here would make a client, and it this process's default
            heard[:] = time.monotonic(), sync(worker.loop, worker.scheduler.event_is_set, name=topic)
        return signal.SIGTERM if heard[1] else None

    def teller(name: str) -> runner.Progress:
        told = [-TELL_SECONDS]
        died: list[int] = []

        def tell(epoch: int, epochs: int, dead: list[int], mse: float | None) -> None:
            died.extend(dead)
            if epoch == epochs or time.monotonic() - told[0] >= TELL_SECONDS:
                news = {"name": name, "epoch": epoch, "epochs": epochs, "died": list(died), "mse": mse}
                worker.log_event(topic, news)
                told[0] = time.monotonic()
                died.clear()

        return tell

    paths = {name: Path(path) / name for name in texts}
    failed: Mapping[Path, Exception] = {}
    with added(observables):
        experiments = {name: Experiment.from_toml_text(text) for name, text in texts.items()}
        if asked() is None:
            try:
                failed = runner.run_together(
                    {paths[name]: single for name, single in experiments.items()},
                    device=device,
                    progress={paths[name]: teller(name) for name in texts},
                    asked=asked,
                )
            except Stopped as stopped:  # as what it is, a KeyboardInterrupt, it would end the worker
                failed = stopped.failed
    return {
        "failed": {name: _reason(failed[at]) for name, at in paths.items() if at in failed},
        "finished": [name for name, at in paths.items() if at not in failed and _finished(at, experiments[name])],
    }
