"""Run points of a sweep on dask workers: how many workers fit, the client, and the reports of each."""

from __future__ import annotations

import gc
import logging
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from tsdyn import memory, registers
from tsdyn.archive.run_directory import ADDED, ARCHIVE, segments
from tsdyn.archive.whole_files import INTACT, ArchiveError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import MAX_EPOCHS
from tsdyn.observables.registry import Observed
from tsdyn.running import estimates, own_modules, packages, runner
from tsdyn.running.interrupts import Stopped
from tsdyn.running.outcome import is_finished, reason_of
from tsdyn.running.own_modules import Maker

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

_log = logging.getLogger("tsdyn")

#: A point fails once its workers died this many times in a row without committing an epoch.
FRUITLESS = 3
#: Seconds between a worker's reports of its epochs, and between writes of the index.
TELL_SECONDS, INDEX_SECONDS = 0.5, 5.0
#: ... but at most a twentieth of the time goes into writing the index.
INDEX_TIMES = 20
CONNECT_SECONDS = 10
#: Seconds in which dask's processes must have ended; each is asked for four, and then killed.
CLOSE_SECONDS = 60.0
POLL_SECONDS = 0.05
#: Seconds without a sign of life from any worker after which the log says so, and seconds between checks.
SILENT_SECONDS, ASK_SECONDS = 20.0, 5.0


class WorkersError(ValueError):
    """Workers or a scheduler are not available as asked."""


def check_workers(workers: int | None, scheduler: str | None) -> None:
    if workers is not None and (workers < 1 or scheduler is not None):
        raise WorkersError(f"workers = {workers}: at least 1, and not together with a scheduler's address")


def workers_that_fit(workers: int, points: Mapping[str, Experiment]) -> int:
    """`workers`, or fewer if that many of the largest point do not fit in memory together; at least one."""
    largest = max(estimates.footprint(single).bytes for single in points.values())
    room = max(1, memory.available() // max(1, largest))
    if room < workers:
        logging.getLogger("tsdyn").warning(
            "%d workers instead of %d: the largest run takes %.1f GB of memory", room, workers, largest / 1e9
        )
    return min(workers, room)


@contextmanager
def connected_client(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """A client of the scheduler at that address, or of a new cluster of local processes.

    ``set_as_default=False``: a client whose scheduler never answered would stay dask's default until it is
    garbage-collected, and every ``compute()`` in this process would hang on it.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        said = ""
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, ImportError, TypeError) as error:  # the last: tls:// without a certificate
            said = f"scheduler {scheduler}: does not answer: {error}"
        if said:
            # now, not while another client starts: closing then waits for a lock that its own thread holds
            gc.collect()
            raise WorkersError(said)
        with client:
            yield client
        return
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 10,
        "distributed.comm.timeouts.connect": "60s",
    }
    # each of dask's processes also serves its dashboard, without TLS: it is turned off
    settings |= {f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker")}
    ignored = "signal.SIGINT, signal.SIGHUP, signal.SIGUSR1"
    with dask.config.set(settings), ExitStack() as held:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            security=_own_certificate(),
            dashboard_address=None,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            memory_limit=0,  # a run checks its memory before it begins; dask's limit would kill runs that fit
            # Ctrl-C and a closed terminal signal every process of it; workers ignore that and are stopped by this one
            preload=f"import signal; [signal.signal(number, signal.SIG_IGN) for number in ({ignored})]",
            silence_logs=logging.CRITICAL,
        )
        held.callback(_close, cluster)
        yield held.enter_context(Client(cluster, set_as_default=False))


def _close(cluster: LocalCluster) -> None:
    """Close a cluster, or leave it where that hangs, as it does in some versions of dask after a worker was killed."""
    try:
        cluster.close(timeout=CLOSE_SECONDS)
    except TimeoutError:
        _log.warning(
            "workers: dask has not ended its processes in %.0f seconds, as after one of them was killed; they end with "
            "this process, and what was computed is committed",
            CLOSE_SECONDS,
        )


def _own_certificate() -> Any:
    """A TLS certificate for this sweep alone, kept in memory.

    Anyone who can connect to the scheduler or a worker can run any code there; the certificate is needed to connect.
    """
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise WorkersError(
            "workers: their connections are encrypted, so that nobody else on this machine can run code through them, "
            f"and that needs the package cryptography ({error}): pip install cryptography"
        ) from None


def say_open(scheduler: str | None) -> None:
    if scheduler is not None and not scheduler.startswith(("tls://", "inproc://")):
        _log.warning(
            "scheduler %s: the connection is not encrypted, and anyone who reaches that address can run code as you "
            "there; start dask with tls:// and a certificate where others can",
            scheduler,
        )


_GONE = f"the scheduler is gone; {INTACT}, the same command goes on from there"


class _Listening:
    """Logs a warning, once per silence, when no worker of the scheduler gives a sign of life."""

    def __init__(self, client: Any) -> None:
        self._client, self._asked, self._said = client, time.monotonic(), False
        self._heard = self._asked
        self._newest: float | None = None

    def ask(self) -> None:
        """Check for signs of life, at most every `ASK_SECONDS`.

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
        """None if a worker gave a sign of life since the last check, else what is wrong."""
        from distributed.utils import sync

        if self._client.status in ("closed", "closing"):
            raise WorkersError(_GONE)
        try:
            told = sync(self._client.loop, self._client.scheduler.identity, n_workers=-1, callback_timeout=ASK_SECONDS)
        except (OSError, TimeoutError):
            return "the scheduler has not answered"
        if not told["workers"]:
            return "no worker has been there"
        newest = max(worker["last_seen"] for worker in told["workers"].values())
        self._newest, before = newest, self._newest
        return None if newest != before else "no worker has given a sign of life"


def answer_of(client: Any, future: Any) -> Any:
    """The result of a future; logs a warning while no worker is there to compute it.

    Raises:
        WorkersError: if the scheduler is gone.
    """
    listening = _Listening(client)
    while (answer := _answer(future)) is None:
        listening.ask()
        time.sleep(POLL_SECONDS)
    if answer.error is not None:
        raise answer.error
    return answer.result


@dataclass(frozen=True)
class _Answer:
    """What a future ended with: its result, or the error that was raised instead."""

    result: Any = None
    error: Exception | None = None


def _answer(future: Any) -> _Answer | None:
    """The answer of a future; None if it is still to come.

    That may be so of a future that had ended: a worker that dies takes its answers with it, and the scheduler has them
    computed again.

    Raises:
        WorkersError: if the scheduler is gone.
    """
    try:
        return _Answer(future.result(timeout=ASK_SECONDS)) if future.done() else None
    except Exception as error:
        if future.status == "cancelled":
            raise WorkersError(_GONE) from None
        if future.status == "error":
            return _Answer(error=error)
        if isinstance(error, TimeoutError):
            return None
        raise


@dataclass(frozen=True)
class Passed:
    """Parts of the user's own that only the process of `tsdyn.run` has; workers are sent them by cloudpickle."""

    parts: tuple[registers.Sent, ...] = ()
    student: Maker | None = None
    teacher: Maker | None = None
    modules: bytes = b""  #: that were looked at already (`own_modules.sent`)


def refuse_unpicklable(**passed: Any) -> None:
    """Refuse functions and observables that cannot be sent to workers.

    Raises:
        WorkersError: naming the function and what cannot be pickled.
    """
    import cloudpickle

    for who, part in passed.items():
        try:
            cloudpickle.dumps(part)
        except Exception as error:  # pickling runs the user's code, which raises errors of every type
            shown = part.measure if isinstance(part, Observed) else part
            raise WorkersError(
                f"{who}: {shown!r} cannot be sent to workers ({type(error).__name__}: {error}); make what it holds "
                "inside the function, from what can be pickled, or leave workers out"
            ) from error


def on_workers(
    client: Client,
    groups: Sequence[Mapping[str, Experiment]],
    path: Path,
    device: str,
    tell: Mapping[str, runner.Progress | None],
    at_once: int,
    asked: Callable[[], int | None],
    passed: Passed,
) -> Iterator[tuple[str, str | None]]:
    """Yield each point when its group ends, with the reason if it failed; after a signal raise `Stopped` at the end."""
    from distributed import as_completed

    listening = _Listening(client)
    shared = _Shared(client, groups, path, device, tell, passed)
    stop: int | None = None
    try:
        running = as_completed(shared.begin(at_once), loop=client.loop)
        while not running.is_empty():
            if stop is None and (stop := asked()) is not None:
                shared.stop()
            if not running.has_ready():
                listening.ask()
                time.sleep(POLL_SECONDS)
                continue
            told, following = shared.end(next(running))
            for future in following:
                running.add(future)
            yield from told.items()
        if stop is not None:
            raise Stopped(stop)
    finally:
        shared.close()


class _Shared:
    """Groups of points for the workers of one scheduler: those still waiting, and those that were submitted.

    Only a few groups are submitted at a time: the scheduler assigns all that it has to workers at once, and does not
    take one back from a busy worker when another is idle.  The longest begin first, so that none runs alone at the end.
    """

    def __init__(
        self,
        client: Client,
        groups: Sequence[Mapping[str, Experiment]],
        path: Path,
        device: str,
        tell: Mapping[str, runner.Progress | None],
        passed: Passed,
    ) -> None:
        self._client, self._path, self._device, self._passed = client, path, device, passed
        self._tell, self._topic = tell, f"tsdyn-{uuid.uuid4().hex}"
        self._waiting = sorted(groups, key=lambda group: sum(map(_work_in, group.values())))
        self._out: dict[Future, Mapping[str, Experiment]] = {}
        self._stopped = False
        names = [name for group in groups for name in group]
        self._fruitless = dict.fromkeys(names, 0)
        self._reached = {name: _reached(path / name) for name in names}

    def begin(self, at_once: int) -> list[Future]:
        """Submit the first `at_once` groups; returns their futures."""
        self._client.subscribe_topic(self._topic, self._hear)
        return [self._submit(self._waiting.pop()) for _ in range(min(at_once, len(self._waiting)))]

    def stop(self) -> None:
        """Ask all workers to commit what they have and end; no more groups are submitted."""
        from distributed import Event

        self._stopped = True
        self._waiting.clear()
        Event(self._topic, client=self._client).set()

    def end(self, future: Future) -> tuple[dict[str, str | None], list[Future]]:
        """Points of a finished future, each with the reason if it failed, and the futures to wait for next.

        These are the groups submitted next, or the same future if its answer is still to come.

        Raises:
            WorkersError: if the scheduler is gone.
        """
        from distributed import KilledWorker

        answer = _answer(future)
        if answer is None:
            return {}, [future]
        group = self._out.pop(future)
        if isinstance(answer.error, KilledWorker):
            told, again = self._killed(group, answer.error)
            if again:
                return told, [] if self._stopped else [self._submit(half) for half in again]
        elif answer.error is not None:
            told = dict.fromkeys(group, reason_of(answer.error))
        else:
            told = dict.fromkeys(answer.result["finished"]) | answer.result["failed"]
        return told, [self._submit(self._waiting.pop())] if self._waiting else []

    def close(self) -> None:
        """Remove what the scheduler keeps of these groups."""
        with suppress(OSError, TimeoutError):  # the scheduler is gone
            self._client.cancel(list(self._out))
            self._client.unsubscribe_topic(self._topic)

    def _killed(
        self, group: Mapping[str, Experiment], error: BaseException
    ) -> tuple[dict[str, str | None], list[dict[str, Experiment]]]:
        """Points that failed because their worker died too often, and the others in two halves, to be tried again.

        By halving groups a point that kills its worker is found, and fails alone.
        """
        failed: dict[str, str | None] = {}
        again = {}
        for name, single in group.items():
            now = _reached(self._path / name)
            self._fruitless[name] = 0 if now > self._reached[name] else self._fruitless[name] + 1
            self._reached[name] = now
            if self._fruitless[name] < FRUITLESS:
                again[name] = single
            else:
                failed[name] = reason_of(error)
        halves = list(again)[::2], list(again)[1::2]
        return failed, [{name: again[name] for name in half} for half in halves if half]

    def _submit(self, group: Mapping[str, Experiment]) -> Future:
        key = f"{next(iter(group))}-{uuid.uuid4().hex[:8]}"
        texts = {name: single.to_toml() for name, single in group.items()}
        given = texts, str(self._path), self._device, self._topic, self._passed
        future = self._client.submit(_work, *given, key=key, pure=False)
        self._out[future] = group
        return future

    def _hear(self, event: tuple[Any, dict[str, Any]]) -> None:
        told = event[1]
        report = self._tell.get(told["name"])
        if report is not None:
            report(told["epoch"], told["epochs"], list(told["died"]), told["mse"])  # lists arrive as tuples


def _work_in(single: Experiment) -> int:
    """A number in proportion to a run's time: members times steps times parameters."""
    layout, kind = single.layout, single.kind
    parameters = sum(n * below for n, below in zip(layout.widths, layout.input_widths, strict=True))
    if kind == "training":
        steps = single.training.epochs * single.steps
    elif kind == "population-flow":
        steps = parameters**2  # each step makes a Hessian and its factors
    elif kind == "online":
        steps = round(single.marks[-1] * layout.input_width)
    else:
        assert_never(kind)
    return len(layout.seeds) * steps * parameters


def _reached(path: Path) -> int:
    """A number that grows with what is committed of a point: its last epoch, and that of the seeds it is to gain."""
    try:
        found = segments(path)
    except ArchiveError:
        return -1
    own = MAX_EPOCHS if (path / ARCHIVE).is_file() else found[-1].last if found else -1
    return own + (2 + _reached(path / ADDED) if (path / ADDED).is_dir() else 0)


def _work(texts: Mapping[str, str], path: str, device: str, topic: str, passed: Passed) -> dict[str, Any]:
    """Run (on a worker) a group of points; reports epochs on `topic`, and stops when the event of that name is set.

    Returns the reasons of the points that failed, and the points that are finished.
    """
    import torch
    from distributed import get_worker
    from distributed.utils import sync

    worker = get_worker()
    torch.set_num_threads(worker.state.nthreads)
    heard = [-TELL_SECONDS, False]

    def asked() -> int | None:
        if not heard[1] and time.monotonic() - heard[0] >= TELL_SECONDS:
            # asked over the worker's own connection: an Event would create a client and make it the process's default
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
    with packages.known(passed.parts), own_modules.keeping(passed.modules):
        experiments = {name: Experiment.from_toml_text(text) for name, text in texts.items()}
        if asked() is None:
            try:
                failed = runner.run_together(
                    {paths[name]: single for name, single in experiments.items()},
                    device=device,
                    progress={paths[name]: teller(name) for name in texts},
                    asked=asked,
                    student=passed.student,
                    teacher=passed.teacher,
                )
            except Stopped as stopped:  # raised on, this KeyboardInterrupt would end the worker
                failed = stopped.failed
    return {
        "failed": {name: reason_of(failed[at]) for name, at in paths.items() if at in failed},
        "finished": [name for name, at in paths.items() if at not in failed and is_finished(at, experiments[name])],
    }
