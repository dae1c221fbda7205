"""The ``tsdyn`` command: argument parsing and printing only."""

from __future__ import annotations

import errno
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from tsdyn._version import __version__
from tsdyn.archive.whole_files import ArchiveError, DirectoryError, local_path, refuse_link
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.registers import PartError
from tsdyn.running.terminal import make_lenient
from tsdyn.schema import path_of
from tsdyn.schema import printable as _printable
from tsdyn.vocabulary import COORDINATES

if TYPE_CHECKING:
    from tsdyn.running.estimates import Cost
    from tsdyn.running.runner import Progress as Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
study = typer.Typer(no_args_is_help=True, help="Figures of the papers, from the experiment to the picture.")
app.add_typer(study, name="study")

FAILED, WRONG = 1, 2
#: Plurals of the names of the dimension along which a run is recorded.
PLURAL = {"epoch": "epochs", "time": "times", "alpha": "alphas"}

# str and not Path, which would turn http://host into the local http:/host before it can be refused.
OutDirectory = Annotated[str | None, typer.Option("-o", "--output", help="Directory; runs/NAME if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Share the runs of a sweep among N processes here.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Share them among the workers of a dask scheduler, tcp://HOST:PORT."),
]
Together = Annotated[
    bool | None,
    typer.Option(
        "--together/--apart", help="Train points whose students have one shape as one ensemble; on a GPU the default."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. training.epochs=5."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="A run, a sweep or an archive file.")]


def main() -> None:
    """Run the command; errors print one message without traceback; exit 0, 1 (the run failed) or 2 (a wrong request).

    What cannot be printed is dropped.  A run does not need its reports; other commands then exit with an error, unless
    the reader closed the pipe.
    """
    _reported.clear()
    before = sys.stdout, sys.stderr
    out, complaints = make_lenient()
    try:
        with _errors():
            app()
    except SystemExit as end:
        out.flush()
        if not end.code and out.lost is not None and out.lost.errno not in (errno.EPIPE, None) and not _reported:
            _fail(f"standard output: {out.lost.strerror}; what was to be printed is incomplete", FAILED)
        raise
    finally:
        out.abandon()
        complaints.abandon()
        sys.stdout, sys.stderr = before


#: Whether the output is only the report of work that is done in any case.
_reported: list[bool] = []


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (ExperimentError, DirectoryError, PartError, _Unavailable) as error:
        _fail(error, WRONG)
    except (ArchiveError, MemoryError) as error:
        _fail(error, FAILED)
    except OSError as error:
        _fail(f"{error}; what was committed is intact", FAILED)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        _fail(f"no memory is left ({str(error).splitlines()[0]}); what was committed is intact", FAILED)


class _Unavailable(Exception):
    """A device or workers are not available."""


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
        chosen = chosen.replace(dict(_assignment(text) for text in changes))
    _run(chosen, local_path(output or Path("runs") / chosen.name), device, quiet, workers, scheduler, together)


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
def list_studies() -> None:
    """List the studies, with what each shows."""
    from tsdyn import studies

    for name in studies.names():
        try:
            shown = studies.load(name).TITLE
        except PartError as error:  # of one package; the others are there
            shown = f"({error})"
        print(_printable(f"{name:28} {shown}"))


@study.command("show")
def show_study(name: Annotated[str, typer.Argument()]) -> None:
    """Show the experiment that a study runs at each scale."""
    module = _study(name)
    print(f"{module.TITLE}\n{module.SOURCE}")
    for scale, experiment in module.EXPERIMENTS.items():
        print(f"\n# --scale {scale}\n{experiment.to_toml()}", end="")


@study.command("run")
def run_study(
    name: Annotated[str, typer.Argument()],
    scale: Annotated[str, typer.Option(help="smoke (seconds), desk (minutes) or paper.")] = "desk",
    output: OutDirectory = None,
    changes: Changes = None,
    device: Device = "cpu",
    workers: Workers = None,
    scheduler: Scheduler = None,
    together: Together = None,
    quiet: Quiet = False,
) -> None:
    """Run, measure and draw a study: leaves the archive, measured.nc and figure.png."""
    from tsdyn.archive import netcdf, reading, whole_files

    module = _study(name)
    if scale not in module.EXPERIMENTS:
        raise ExperimentError(f"--scale {scale}: there are {', '.join(module.EXPERIMENTS)}")
    path = whole_files.local_path(output or Path("runs") / f"{name}-{scale}")
    work = module.EXPERIMENTS[scale]
    asked = [("--set", changes), ("--workers", workers), ("--scheduler", scheduler), ("--together", together)]
    given = [option for option, value in asked if value]
    if isinstance(work, Experiment):
        work = work.replace(dict(_assignment(text) for text in changes or ()))
        _run(work, path, device, quiet, workers, scheduler, together)
        found = reading.open(path)
    elif given:
        raise ExperimentError(
            f"study run {name} --scale {scale}: reads a file and runs nothing, so {', '.join(given)} has no effect; "
            "leave it out"
        )
    else:
        found = work.read()
    made_by = {key: found.attrs[key] for key in ("name", "digest", "experiment", "tsdyn_version") if key in found.attrs}
    measured = module.measure(found).load()
    measured = measured.assign_attrs(made_by | measured.attrs)
    netcdf.write_dataset(path / "measured.nc", measured)
    _save(module.draw(measured), path / "figure.png", quiet)


@app.command()
def show(directory: Directory) -> None:
    """Show what an archive holds, on one screen."""
    from tsdyn.archive import reading, selecting
    from tsdyn.running import provenance

    ds = reading.open(directory)
    console = Console()
    sizes = ", ".join(f"{dim} {size}" for dim, size in ds.sizes.items())
    facts = Table.grid(padding=(0, 2))
    rows = {
        "recording"
        if "recording" in ds.attrs
        else "experiment": f"{ds.attrs.get('name', '?')}  ({str(ds.attrs.get('digest', '?'))[:12]})",
        "made": f"{ds.attrs.get('created', '?')}, tsdyn {ds.attrs.get('tsdyn_version', '?')}, "
        f"torch {ds.attrs.get('torch_version', '?')}, {ds.attrs.get('device', '?')}, {ds.attrs.get('dtype', '?')}",
        "dimensions": sizes,
        "size": f"{ds.nbytes / 1e6:.1f} MB as arrays",
    }
    along = path_of(ds)
    if ds.sizes.get(along):
        first, last = (ds[along].values[end] for end in (0, -1))
        rows[PLURAL[along]] = f"{first:g}..{last:g}, {ds.sizes[along]} recorded"
    for key, column in ds.coords.items():
        varies = column.ndim == 1 and column.dims[0] in selecting.swept_dimensions(ds)
        if varies and key != "point" and key not in COORDINATES:
            values = list(dict.fromkeys(column.values.tolist()))
            shown = ", ".join(map(str, values[:8])) + (f", ... {values[-1]}" if len(values) > 8 else "")
            rows[f"swept: {key}"] = shown
    if "coverage" in ds.coords:
        rows["coverage"] = f"{int((ds.coverage >= 1).sum())} of {ds.coverage.size} points finished"
    if "death_epoch" in ds.coords:
        dead = int((ds["death_epoch"] >= 0).sum())
        rows["died"] = f"{dead} members became NaN or infinite" if dead else "no member became NaN or infinite"
    for position, line in enumerate(provenance.lines(ds.attrs)):
        rows["history" if not position else f"history {position + 1}"] = line
    for key, value in rows.items():
        facts.add_row(_plain(key), _plain(value))
    console.print(facts)
    swept = selecting.swept_dimensions(ds)
    after = f"dimensions, after {', '.join(swept)}" if swept else "dimensions"
    lines = [("variable", after, "meaning")] + [
        (str(name), ", ".join(str(d) for d in array.dims if d not in swept), str(array.attrs.get("long_name", "")))
        for name, array in ds.data_vars.items()
    ]
    first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
    for name, dims, meaning in lines:  # one line per variable, cut at the terminal's width
        line = _printable(f"{name:{first}}  {dims:{second}}  {meaning}".replace("\n", " "))
        print(line[: console.width] if console.is_terminal else line)


@app.command()
def plot(
    directory: Directory,
    figure: Annotated[str | None, typer.Argument(help="Which; without it, what there is.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="FILE.png (.svg, .pdf; .gif moves); FIGURE.png if not given.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="KEY=VALUE", help="A part: a swept key, seed, epoch or layer; repeat it."),
    ] = None,
) -> None:
    """Draw a figure from an archive."""
    from tsdyn.analysis.figures import planes, recipes
    from tsdyn.archive import reading, whole_files

    ds = reading.open(directory)
    if figure is None:
        for name, recipe in recipes.FIGURES.items():
            missing = recipe.missing(ds)
            print(f"{name:16} {recipe.shows}" + (f"  (needs {', '.join(missing)})" if missing else ""))
        return
    if figure not in recipes.FIGURES:
        raise ExperimentError(f"plot: no figure {figure!r}; there are {', '.join(recipes.FIGURES)}")
    path = whole_files.local_path(output or f"{figure}.png")
    moves = path.suffix.lower() == ".gif"
    if moves and figure != "boundaries":
        raise ExperimentError(f"plot: {path.name}: only boundaries move; give a .png, .svg or .pdf")
    try:
        ds = _selected(ds, select or [])
        drawn = planes.animate_boundaries(ds) if moves else recipes.FIGURES[figure](ds)
    except (ValueError, KeyError) as error:
        raise DirectoryError(f"plot {figure}: {error.args[0] if error.args else error}") from error
    _save(drawn, path, quiet=False)


def _selected(ds: Any, words: list[str]) -> Any:
    """The part of an archive that ``--select`` asks for, by labels of dimensions and values of swept keys."""
    from tsdyn.archive import selecting

    for word in words:
        key, value = _assignment(word, "--select")
        if key not in ds.coords:
            raise KeyError(f"--select {word}: no {key!r}; there are {', '.join(map(str, ds.dims))}")
        if key in selecting.swept_dimensions(ds) or key not in ds.dims:
            ds = selecting.select(ds, **{key: value})
        elif value not in ds.indexes[key]:
            raise KeyError(f"--select {word}: there is {key} {ds.indexes[key][0]} to {ds.indexes[key][-1]}")
        else:
            ds = ds.sel({key: value})
    return ds


@app.command()
def report(
    directory: Directory,
    output: Annotated[str, typer.Option("-o", "--output", help="The page.")] = "report.html",
    audit: Annotated[bool, typer.Option(help="With the audit of the theorems.")] = True,
) -> None:
    """Write one self-contained HTML page: what ran, figures, audit, coverage, failures."""
    from tsdyn.analysis import report

    print(report.write(directory, output, audit=audit))


@app.command()
def cite(directory: Directory) -> None:
    """Print BibTeX of the papers, data and software that an archive rests on."""
    from tsdyn.analysis.citations import citations
    from tsdyn.archive import reading

    print("\n\n".join(map(_printable, citations(reading.open(directory)))))


@app.command()
def audit(directory: Directory) -> None:
    """Test each theorem on an archive: hypothesis met? conclusion holds? by what margin?"""
    from tsdyn.analysis.audit import audit as measure
    from tsdyn.analysis.report import audit_rows
    from tsdyn.archive import reading, selecting
    from tsdyn.running import packages

    table = Table("claim", "members", "largest margin", "what is checked, or what it needs")
    ds = reading.open(directory)
    try:
        rows = audit_rows(measure(ds))
    except (ValueError, KeyError) as error:
        gone = isinstance(error, PartError)
        way = packages.way_back(selecting.experiment_of(ds), local_path(directory)) if gone else ""
        raise DirectoryError(f"{directory}: {error.args[0] if error.args else error}{way}") from error
    for row in rows:
        table.add_row(*map(_plain, row))
    Console().print(table)
    print("margin: conclusion over bound, at most 1 where it holds; unmet: the hypothesis fails, so nothing is tested")


@app.command()
def validate(directory: Directory) -> None:
    """Check schema, checksums, every number, and agreement with experiment.toml; exit 1 with the reasons if damaged."""
    from tsdyn.archive import integrity

    found = integrity.check(directory)
    for problem in found:
        print(_printable(problem))
    if found:
        raise typer.Exit(FAILED)
    print(f"{directory}: whole")


@app.command()
def repair(directory: Directory) -> None:
    """Keep what is whole and list what was dropped, which is moved to DIR/damaged."""
    from tsdyn.archive import integrity

    done = integrity.repair(directory)
    for line in done:
        print(_printable(line))
    if not done:
        print(f"{directory}: nothing to repair")


@app.command()
def doctor(
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="Where runs are to be written.")] = ".",
) -> None:
    """Say what this machine and a directory mean for numbers, speed and files; exit 1 if something is bad."""
    from tsdyn.running import diagnosis

    bad = False
    for finding in diagnosis.diagnose(local_path(directory)):
        bad |= finding.verdict == "bad"
        print(_printable(f"{finding.verdict:4}  {finding.subject}: {finding.found}".replace("\n", " ")))
        print(_printable(f"      {finding.meaning}".replace("\n", " ")), flush=True)
    if bad:
        raise typer.Exit(FAILED)


def _study(name: str) -> Any:
    from tsdyn import studies

    try:
        return studies.load(name)
    except (KeyError, ValueError) as error:
        raise ExperimentError(str(error.args[0])) from error


def _assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """``key=value`` with a TOML value; a bare word is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        example = {"--set": "training.epochs=5", "--select": "seed=0"}[option]
        raise ExperimentError(f"{option} {text}: write KEY=VALUE, e.g. {option} {example}")
    value = value.strip()
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if value and value.isprintable() and value[0] not in "[{\"'#=" and len(value) < 4096:
            return key.strip(), value  # a word or a path; the experiment's rules say whether the key takes a string
        raise ExperimentError(f"{option} {text[:80]}: {value[:80]!r} is not a TOML value") from None


def _run(
    experiment: Experiment,
    path: Path,
    device: str,
    quiet: bool,
    workers: int | None = None,
    scheduler: str | None = None,
    together: bool | None = None,
) -> None:
    from tsdyn.running import runner, sweep
    from tsdyn.running.workers import WorkersError

    _reported.append(True)
    shared: dict[str, Any] = {"device": device, "workers": workers, "scheduler": scheduler, "together": together}
    try:
        if scheduler is None:
            runner.check_device(device)
        experiment = sweep.completed(experiment)
        if quiet:
            sweep.run(experiment, path, **shared)
            return
        sweep.preflight(experiment, path, workers=workers, scheduler=scheduler)
        left = sweep.unfinished(experiment, path)
        costs = sweep.estimate(left, device=device if scheduler is None else "cpu")
        print(f"{experiment.name} -> {path}: {_announced(experiment, len(left), costs, workers or 1)}", flush=True)
        with _reporting(costs, experiment.layout.path) as (report, point):
            sweep.run(experiment, path, **shared, progress=report, point=point)
    except (runner.DeviceError, WorkersError) as error:
        raise _Unavailable(str(error)) from error
    except KeyboardInterrupt as error:  # caught here: typer would exit 130 for every signal, without a message
        signal = getattr(error, "signal", 2)
        _fail("interrupted; what was committed is intact, the same command goes on from there", 128 + signal)
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
        self._from: dict[str, float] = {}  # work committed by an earlier call does not count
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
        from tsdyn.running.estimates import duration

        done = sum(self._work[name] * (share - self._from[name]) for name, share in self._share.items())
        rest = sum(self._work.values()) * (1 - self.share)
        return f"{self.share:.0%}, {duration((time.monotonic() - self._began) * rest / done)} left"


@contextmanager
def _reporting(costs: Mapping[str, Cost], step: str) -> Iterator[tuple[Report, Callable[..., Report]]]:
    """Reports of progress: a bar on a terminal, else one line per step; with the time left, and members that died.

    Args:
        costs: Costs of the runs that are left.
        step: Name of a step: epoch, time or alpha.
    """
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


def _save(figure: Any, path: Path, quiet: bool) -> None:
    """Write a figure or an animation to a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path)
        if path.suffix.lower() == ".gif":
            figure.save(path, writer="pillow", dpi=100)
        else:
            figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise DirectoryError(f"{path}: the figure cannot be written: {error}") from error
    if not quiet:
        print(path)


def _plain(text: object) -> str:
    """The text on one line, without control characters or console markup."""
    return _printable(str(text).replace("\n", " ")).replace("[", r"\[")
