"""The ``tsdyn`` command: argument parsing and printing only."""

from __future__ import annotations

import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from tsdyn._version import __version__
from tsdyn.archive import ArchiveError, DirectoryError, local_path
from tsdyn.experiment import Experiment, ExperimentError

if TYPE_CHECKING:
    from tsdyn.runner import Cost
    from tsdyn.runner import Progress as Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
study = typer.Typer(no_args_is_help=True, help="Figures of the papers, from the experiment to the picture.")
app.add_typer(study, name="study")

FAILED, WRONG = 1, 2

# Not Path, which would turn http://host into the local http:/host before it can be refused.
OutDirectory = Annotated[str | None, typer.Option("-o", "--output", help="Directory; runs/NAME if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Share the runs of a sweep among N processes here.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Share them among the workers of a dask scheduler, tcp://HOST:PORT."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="A run, a sweep or an archive file.")]


def main() -> None:
    """Entry point: errors in one reading, no traceback; exit 0, 1 (the run failed) or 2 (the request is wrong)."""
    with _errors():
        app()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (ExperimentError, DirectoryError, _Unavailable) as error:
        _fail(error, WRONG)
    except (ArchiveError, MemoryError) as error:
        _fail(error, FAILED)
    except OSError as error:
        _fail(f"{error}; what was committed is intact", FAILED)
    except KeyboardInterrupt as error:
        signal = getattr(error, "signal", 2)
        _fail("interrupted; what was committed is intact, the same command goes on from there", 128 + signal)


class _Unavailable(Exception):
    """A device or workers that are not there."""


def _fail(error: object, code: int) -> None:
    print(f"tsdyn: {_printable(error)}", file=sys.stderr)
    raise SystemExit(code)


def _version(asked: bool | None) -> None:
    if asked:
        print(f"tsdyn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Exact, labelled analysis of training dynamics in teacher-student networks."""


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment file.")],
    output: OutDirectory = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. training.epochs=5."),
    ] = None,
    device: Device = "cpu",
    workers: Workers = None,
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment, or every point of its sweep; goes on from what was committed."""
    chosen = Experiment.from_toml(experiment)
    if changes:
        chosen = chosen.replace(dict(_assignment(text) for text in changes))
    _run(chosen, local_path(output or Path("runs") / chosen.name), device, quiet, workers, scheduler)


@study.command("list")
def list_studies() -> None:
    """Names and what they show."""
    from tsdyn import studies

    for name in studies.names():
        print(f"{name:24} {studies.load(name).TITLE}")


@study.command("show")
def show_study(name: Annotated[str, typer.Argument()]) -> None:
    """What a study runs at each scale."""
    module = _study(name)
    print(f"{module.TITLE}\n{module.SOURCE}")
    for scale, experiment in module.EXPERIMENTS.items():
        print(f"\n# --scale {scale}\n{experiment.to_toml()}", end="")


@study.command("run")
def run_study(
    name: Annotated[str, typer.Argument()],
    scale: Annotated[str, typer.Option(help="smoke (seconds), desk (minutes) or paper.")] = "desk",
    output: OutDirectory = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Run, measure and draw: leaves the archive, measured.nc and figure.png."""
    from tsdyn import archive

    module = _study(name)
    if scale not in module.EXPERIMENTS:
        raise ExperimentError(f"--scale {scale}: there are {', '.join(module.EXPERIMENTS)}")
    path = archive.local_path(output or Path("runs") / f"{name}-{scale}")
    _run(module.EXPERIMENTS[scale], path, device, quiet)
    measured = module.measure(archive.open(path)).load()
    archive.write_dataset(path / "measured.nc", measured)
    _save(module.draw(measured), path / "figure.png", quiet)


@app.command()
def show(directory: Directory) -> None:
    """What is in there, in one screen."""
    from tsdyn import archive

    ds = archive.open(directory)
    console = Console()
    sizes = ", ".join(f"{dim} {size}" for dim, size in ds.sizes.items())
    facts = Table.grid(padding=(0, 2))
    dead = int((ds["death_epoch"] >= 0).sum())
    rows = {
        "experiment": f"{ds.attrs.get('name', '?')}  ({str(ds.attrs.get('digest', '?'))[:12]})",
        "made": f"{ds.attrs.get('created', '?')}, tsdyn {ds.attrs.get('tsdyn_version', '?')}, "
        f"torch {ds.attrs.get('torch_version', '?')}, {ds.attrs.get('device', '?')}, {ds.attrs.get('dtype', '?')}",
        "dimensions": sizes,
        "epochs": f"{int(ds.epoch[0])}..{int(ds.epoch[-1])}, {ds.sizes['epoch']} recorded",
        "size": f"{ds.nbytes / 1e6:.1f} MB as arrays",
        "died": f"{dead} members became NaN or infinite" if dead else "no member became NaN or infinite",
    }
    for key, value in rows.items():
        facts.add_row(key, _plain(value))
    console.print(facts)
    table = Table("variable", "dimensions", "meaning")
    for name, array in ds.data_vars.items():
        table.add_row(str(name), ", ".join(map(str, array.dims)), _plain(array.attrs.get("long_name", "")))
    console.print(table)


@app.command()
def plot(
    directory: Directory,
    figure: Annotated[str, typer.Argument(help="l-shape, success-rate, recovery, loss, correlation.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="FILE.png; FIGURE.png if not given.")] = None,
) -> None:
    """Draw a figure from an archive."""
    from tsdyn import archive
    from tsdyn.analysis.figures import FIGURES

    if figure not in FIGURES:
        raise ExperimentError(f"plot: no figure {figure!r}; there are {', '.join(FIGURES)}")
    try:
        drawn = FIGURES[figure](archive.open(directory))
    except (ValueError, KeyError) as error:
        raise DirectoryError(f"plot {figure}: {error.args[0] if error.args else error}") from error
    _save(drawn, output or Path(f"{figure}.png"), quiet=False)


@app.command()
def audit(directory: Directory) -> None:
    """Each theorem: hypothesis met? conclusion holds? margin."""
    from tsdyn import archive
    from tsdyn.analysis.audit import VERDICTS
    from tsdyn.analysis.audit import audit as measure

    found = measure(archive.open(directory))
    table = Table("claim", "members", "largest margin", "what is checked, or what it needs")
    for claim in found["claim"].values:
        row = found.sel(claim=claim)
        words, counts = np.unique(row["verdict"].values, return_counts=True)
        tally = dict(zip(words.tolist(), counts.tolist(), strict=True))
        margins = row["margin"].values[np.isfinite(row["margin"].values)]
        table.add_row(
            _plain(claim),
            ", ".join(f"{tally[word]} {word}" for word in VERDICTS if word in tally),
            f"{margins.max():.2g}" if margins.size else "",
            _plain(row["used"].item()),
        )
    Console().print(table)
    print("margin: conclusion over bound, at most 1 where it holds; unmet: the hypothesis is not, so nothing is tested")


@app.command()
def validate(directory: Directory) -> None:
    """Schema, checksums, every number readable, agreement with experiment.toml; exit 1 and the reasons if not whole."""
    from tsdyn import integrity

    found = integrity.check(directory)
    for problem in found:
        print(_printable(problem))
    if found:
        raise typer.Exit(FAILED)
    print(f"{directory}: whole")


@app.command()
def repair(directory: Directory) -> None:
    """Keep what is whole, say what was dropped; what is not kept goes to DIR/damaged."""
    from tsdyn import integrity

    done = integrity.repair(directory)
    for line in done:
        print(_printable(line))
    if not done:
        print(f"{directory}: nothing to repair")


def _study(name: str) -> Any:
    from tsdyn import studies

    try:
        return studies.load(name)
    except (KeyError, ValueError) as error:
        raise ExperimentError(str(error.args[0])) from error


def _assignment(text: str) -> tuple[str, Any]:
    """``key=value`` with a TOML value; a bare word is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ExperimentError(f"--set {text}: write KEY=VALUE, e.g. --set training.epochs=5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[A-Za-z][\w.-]*", value.strip()):
            return key.strip(), value.strip()
        raise ExperimentError(f"--set {text}: {value!r} is not a TOML value") from None


def _run(
    experiment: Experiment,
    path: Path,
    device: str,
    quiet: bool,
    workers: int | None = None,
    scheduler: str | None = None,
) -> None:
    from tsdyn import runner, sweep

    try:
        if scheduler is None:
            runner.check_device(device)
        if quiet:
            sweep.run(experiment, path, device=device, workers=workers, scheduler=scheduler)
            return
        sweep.preflight(experiment, path, workers=workers, scheduler=scheduler)
        due = sweep.due(experiment, path)
        costs = sweep.estimate(due, device=device if scheduler is None else "cpu")
        print(f"{experiment.name} -> {path}: {_announced(experiment, len(due), costs, workers or 1)}", flush=True)
        with _reporting(costs) as (report, point):
            sweep.run(
                experiment, path, device=device, workers=workers, scheduler=scheduler, progress=report, point=point
            )
    except (runner.DeviceError, sweep.WorkersError) as error:
        raise _Unavailable(str(error)) from error
    print(f"done: {path}", flush=True)


def _announced(experiment: Experiment, due: int, costs: Mapping[str, Cost], workers: int) -> str:
    """What is about to be done, in one line; several at once take their memory together."""
    from tsdyn.runner import Cost

    runs = sum(1 for _ in experiment.points()) if experiment.sweep else 1
    counted = f"{runs} run{'s' * (runs > 1)}"
    if due < runs:
        counted += f", {runs - due} of them finished" if due else ", finished"
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
    """How far all runs are together, each counting by the time it was estimated to take."""

    def __init__(self, costs: Mapping[str, Cost]) -> None:
        self._work = {name: max(cost.seconds, 1e-9) for name, cost in costs.items()}
        self._from: dict[str, float] = {}  # what an earlier call committed is no work of this one
        self._share: dict[str, float] = {}
        self._began = time.monotonic()

    def reached(self, name: str, epoch: int, epochs: int) -> None:
        if name in self._work:
            self._from.setdefault(name, epoch / (epochs + 1))
            self._share[name] = (epoch + 1) / (epochs + 1)

    @property
    def share(self) -> float:
        return sum(self._work[name] * share for name, share in self._share.items()) / sum(self._work.values())

    def __str__(self) -> str:
        from tsdyn.runner import duration

        done = sum(self._work[name] * (share - self._from[name]) for name, share in self._share.items())
        rest = sum(self._work.values()) * (1 - self.share)
        return f"{self.share:.0%}, {duration((time.monotonic() - self._began) * rest / done)} left"


@contextmanager
def _reporting(costs: Mapping[str, Cost]) -> Iterator[tuple[Report, Callable[..., Report]]]:
    """One bar on a terminal, one line an epoch otherwise, both with an estimate of the end; deaths are said in both."""
    console, whole = Console(stderr=True), _Whole(costs)

    def following(name: str, title: str, show: Callable[[str, str, float | None], None]) -> Report:
        def report(epoch: int, epochs: int, seeds: list[int], mse: float | None) -> None:
            if seeds:
                news = f"{title}epoch {epoch}: seeds {seeds} became NaN or infinite and were stopped"
                console.print(news, markup=False)
            whole.reached(name, epoch, epochs)
            show(title, f"epoch {epoch}/{epochs}", mse)

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


def _save(figure: Any, path: Path, quiet: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise DirectoryError(f"{path}: the figure cannot be written: {error}") from error
    if not quiet:
        print(path)


def _printable(text: object) -> str:
    """Without control characters: attributes and names may come from anybody's file."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in str(text))


def _plain(text: object) -> str:
    """On one line, without control characters or console markup."""
    return _printable(str(text).replace("\n", " ")).replace("[", r"\[")
