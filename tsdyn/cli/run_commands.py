"""Commands that run experiments and studies."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsdyn.archive.whole_files import INTACT, local_path
from tsdyn.cli.application import (
    AsJson,
    OutDirectory,
    Unavailable,
    app,
    assignment,
    fail,
    print_json,
    report_only,
    study,
)
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.schema import printable

if TYPE_CHECKING:
    from tsdyn.running.estimates import Cost
    from tsdyn.running.runner import Progress as Report

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Share the runs of a sweep among N processes here.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Share them among the workers of a dask scheduler, tcp://HOST:PORT."),
]
Together = Annotated[
    bool | None,
    typer.Option(
        "--together/--apart",
        help="Train points whose students have one shape as one ensemble; the default on a GPU, and for small points.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. training.epochs=5."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment file.")],
    output: OutDirectory = None,
    changes: Changes = None,
    device: Device = "cpu",
    workers: Workers = None,
    scheduler: Scheduler = None,
    together: Together = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment, or every point of its sweep; resumes from what was committed."""
    chosen = _experiment(experiment, output)
    if changes:
        chosen = changed(chosen, changes)
    run_announced(chosen, local_path(output or Path("runs") / chosen.name), device, quiet, workers, scheduler, together)


def changed(experiment: Experiment, changes: Iterable[str]) -> Experiment:
    """The experiment with keys set as ``--set KEY=VALUE`` says.

    Raises:
        ExperimentError: also for a swept key, whose value would be replaced by those of the sweep.
    """
    found = experiment.replace(given := dict(assignment(text) for text in changes))
    for key in given:
        if key in swept_keys(found.sweep):
            table = ", ".join(f"{json.dumps(axis)} = {json.dumps(values)}" for axis, values in found.sweep.items())
            values = f" over {json.dumps(found.sweep[key])}" if key in found.sweep else ""
            raise ExperimentError(
                f"--set {key}: is swept{values}, which stands in its place; set the sweep, --set 'sweep={{{table}}}', "
                "or leave the key out"
            )
    return found


def _experiment(file: Path, output: str | None) -> Experiment:
    """The experiment of a file; if its parts are not installed, the error names the packages it was run with."""
    try:
        return Experiment.from_toml(file)
    except ExperimentError as error:
        from tsdyn.running import packages

        found = Experiment.from_toml(file, archived=True)  # raises any other error
        way = packages.way_back(found, local_path(output or Path("runs") / found.name))
        if not way:
            raise
        raise ExperimentError(f"{error}{way}") from None


@study.command("list")
def list_studies(as_json: AsJson = False) -> None:
    """List the studies: the paper's figure, what it shows, and its estimated time at desk scale."""
    from tsdyn.running.words import duration
    from tsdyn.studies import catalogue

    rows = catalogue.rows()
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    for row in rows:
        time_needed = "" if row.desk_seconds is None else f"; {duration(row.desk_seconds)}"
        print(printable(f"{row.name}  ({row.source}{time_needed})"))
        print(printable(f"    {row.title}"))


@study.command("show")
def showstudy_of(name: Annotated[str, typer.Argument()]) -> None:
    """Show the experiment that a study runs at each scale."""
    module = study_of(name)
    print(f"{module.TITLE}\n{module.SOURCE}")
    for scale, experiment in module.EXPERIMENTS.items():
        print(f"\n# --scale {scale}\n{experiment.to_toml()}", end="")


@study.command("run")
def run_study(
    name: Annotated[str, typer.Argument()],
    scale: Annotated[str, typer.Option(help="smoke (seconds), desk (minutes) or paper.")] = "desk",
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Number of seeds.")] = None,
    output: OutDirectory = None,
    changes: Changes = None,
    device: Device = "cpu",
    workers: Workers = None,
    scheduler: Scheduler = None,
    together: Together = None,
    quiet: Quiet = False,
) -> None:
    """Run, measure and draw a study: leaves the archive, measured.nc, figure.pdf, figure.png and figure.txt."""
    from tsdyn.analysis import captions
    from tsdyn.archive import netcdf, reading, whole_files
    from tsdyn.cli.draw_command import draw_study
    from tsdyn.studies import seconds_of_measuring

    module = study_of(name)
    if scale not in module.EXPERIMENTS:
        raise ExperimentError(f"--scale {scale}: there are {', '.join(module.EXPERIMENTS)}")
    path = whole_files.local_path(output or Path("runs") / f"{name}-{scale}")
    work = module.EXPERIMENTS[scale]
    asked = [
        ("--seeds", seeds),
        ("--set", changes),
        ("--workers", workers),
        ("--scheduler", scheduler),
        ("--together", together),
    ]
    given = [option for option, value in asked if value]
    if isinstance(work, Experiment):
        work = changed(work, changes or ())
        work = work if seeds is None else work.replace({"seeds": seeds})
        again = partial(seconds_of_measuring, module, work)
        run_announced(work, path, device, quiet, workers, scheduler, together, again=again)
        found = reading.open(path)
    elif given and not _only_own(work, changes, given):
        raise ExperimentError(
            f"study run {name} --scale {scale}: reads a file and runs nothing, so {', '.join(given)} has no effect; "
            "leave it out"
        )
    else:
        found = (replace(work, **dict(assignment(text) for text in changes)) if changes else work).read()
    made_by = {key: found.attrs[key] for key in ("name", "digest", "experiment", "tsdyn_version") if key in found.attrs}
    made_by |= {"study": name, "scale": scale}
    path.mkdir(parents=True, exist_ok=True)
    measured = module.measure(found).load()
    measured = measured.assign_attrs(captions.told(found) | made_by | measured.attrs)
    netcdf.write_dataset(path / "measured.nc", measured)
    draw_study(measured, path / "figure", quiet)


def _only_own(file: Any, changes: list[str] | None, given: list[str]) -> bool:
    """Whether nothing is asked of a study that reads a file but to set the file's own keys, such as its path."""
    keys = {field.name for field in fields(file)} if is_dataclass(file) else set()
    return given == ["--set"] and all(text.partition("=")[0].strip() in keys for text in changes or ())


def study_of(name: str) -> Any:
    from tsdyn import studies

    try:
        return studies.load(name)
    except (KeyError, ValueError) as error:
        raise ExperimentError(str(error.args[0])) from error


def run_announced(
    experiment: Experiment,
    path: Path,
    device: str,
    quiet: bool,
    workers: int | None = None,
    scheduler: str | None = None,
    together: bool | None = None,
    *,
    again: Callable[[float], float] | None = None,
) -> None:
    """Run an experiment after saying what it will cost; `again`: seconds of the run -> of measuring afterwards."""
    from tsdyn.running import own_modules, runner, sweep
    from tsdyn.running.outcome import AllHeldError
    from tsdyn.running.words import duration
    from tsdyn.running.workers import WorkersError

    report_only.append(True)
    shared: dict[str, Any] = {"device": device, "workers": workers, "scheduler": scheduler, "together": together}
    try:
        if scheduler is None:
            runner.check_device(device)
        with own_modules.keeping():
            experiment = sweep.completed(experiment)
            if quiet:
                sweep.run(experiment, path, **shared)
                return
            sweep.preflight(experiment, path, workers=workers, scheduler=scheduler)
            left = sweep.unfinished(experiment, path)

            def expected(seconds: float) -> None:
                if seconds > 1:
                    print(f"{experiment.name} -> {path}: trying a few steps, to estimate the time", flush=True)

            costs = sweep.estimate(left, device=device if scheduler is None else "cpu", expected=expected)
            told = _announced(experiment, len(left), costs, workers or 1)
            after = again(sum(cost.seconds for cost in costs.values())) if again is not None and costs else 0.0
            later = f", then {duration(after)} of measuring" if after else ""
            print(f"{experiment.name} -> {path}: {told}{later}", flush=True)
            with _reporting(costs, experiment.layout.path) as (report, point):
                sweep.run(experiment, path, **shared, progress=report, point=point)
    except (runner.DeviceError, WorkersError) as error:
        raise Unavailable(str(error)) from error
    except AllHeldError as held:  # nothing is left for this command, as may be for one of a job array
        print(printable(str(held)), flush=True)
        return
    except KeyboardInterrupt as error:  # caught here: typer would exit 130 for every signal, without a message
        signal = getattr(error, "signal", 2)
        fail(f"interrupted; {INTACT}, the same command goes on from there", 128 + signal)
    print(f"done: {path}", flush=True)


def _announced(experiment: Experiment, left: int, costs: Mapping[str, Cost], workers: int) -> str:
    """The runs that are left and their estimated cost, in one line; runs on several workers add up their memory."""
    from tsdyn.running.estimates import Cost

    runs = sum(1 for _ in experiment.points()) if experiment.sweep else 1
    counted = f"{runs} run{'s' * (runs > 1)}"
    if left < runs:
        counted += f", {runs - left} of them finished" if left else ", finished"
    if not costs:
        return counted
    each = list(costs.values())
    total = Cost(
        sum(c.members for c in each),
        max(c.parameters for c in each),
        sum(sorted(c.memory for c in each)[-workers:]),
        sum(c.disk for c in each),
        max(sum(c.seconds for c in each) / workers, *(c.seconds for c in each)),
    )
    return f"{counted}, {total}"


class _Whole:
    """Progress of all runs together, each weighted by its estimated time."""

    def __init__(self, costs: Mapping[str, Cost]) -> None:
        self._work = {name: max(cost.seconds, 1e-9) for name, cost in costs.items()}
        self._all = sum(self._work.values())
        self._share: dict[str, float] = {}
        self._reached = self._done = 0.0  # work that is committed, and that of this call alone
        self._began = time.monotonic()

    def reached(self, name: str, epoch: int, epochs: int) -> None:
        if name in self._work:
            # work committed by an earlier call does not count
            before = self._share.get(name, epoch / (epochs + 1))
            self._reached += self._work[name] * ((epoch + 1) / (epochs + 1) - self._share.get(name, 0.0))
            self._share[name] = (epoch + 1) / (epochs + 1)
            self._done += self._work[name] * (self._share[name] - before)

    @property
    def share(self) -> float:
        return self._reached / self._all

    def __str__(self) -> str:
        from tsdyn.running.words import duration

        rest = max(0.0, self._all - self._reached)
        return f"{self.share:.0%}, {duration((time.monotonic() - self._began) * rest / self._done)} left"


@contextmanager
def _reporting(costs: Mapping[str, Cost], step: str) -> Iterator[tuple[Report, Callable[..., Report]]]:
    """Reports of progress: a bar on a terminal, else one line per step; with the time left, and members that died.

    Args:
        costs: Costs of the runs that are left.
        step: Name of a step: epoch, time or alpha.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console, whole = Console(stderr=True), _Whole(costs)

    def following(name: str, title: str, show: Callable[[str, str, float | None], None]) -> Report:
        def report(epoch: int, epochs: int, seeds: list[int], mse: float | None) -> None:
            if seeds:
                news = f"{title}{step} {epoch}: seeds {seeds} became NaN or infinite and were stopped"
                console.print(news, markup=False)
            whole.reached(name, epoch, epochs)
            show(title, f"{step} {epoch}/{epochs}", mse)

        return report

    def reports(show: Callable[[str, str, float | None], None]) -> tuple[Report, Callable[..., Report]]:
        def point(position: int, count: int, name: str, _: Experiment) -> Report:
            return following(name, f"[{position}/{count}] {name}  " if name != "." else "", show)

        return following(".", "", show), point

    if not console.is_terminal:

        def line(title: str, epoch: str, mse: float | None) -> None:
            shown = "" if mse is None else f"  evaluation {mse:.4g}"
            print(f"{title}{epoch}{shown}  ({whole})", file=sys.stderr, flush=True)

        yield reports(line)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console) as bars:
        work = bars.add_task("", total=1.0, left="")

        def advance(title: str, epoch: str, mse: float | None) -> None:
            bars.update(work, completed=whole.share, description=f"{title}{epoch}", left=str(whole))

        yield reports(advance)
