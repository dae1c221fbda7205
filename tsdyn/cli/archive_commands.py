"""Commands that read archives: show, plot, report, cite, audit, validate, repair; and doctor."""

from __future__ import annotations

import gc
import sys
import textwrap
from typing import Annotated, Any

import typer

from tsdyn.archive.whole_files import DirectoryError, local_path
from tsdyn.cli.application import FAILED, AsJson, Directory, StyleName, app, assignment, print_json, save
from tsdyn.cli.importing import uncollected
from tsdyn.experiment.errors import ExperimentError
from tsdyn.registers import PartError
from tsdyn.running import terminal
from tsdyn.schema import printable

#: Points of a sweep whose last numbers `show` prints; with ``--json`` it prints `JSON_POINTS`.
POINTS, JSON_POINTS = 8, 200


@app.command()
def show(directory: Directory, as_json: AsJson = False) -> None:
    """Show what an archive holds: what ran, final losses, mean correlations, dead members, cost, variables."""
    with uncollected():
        import dask
        import dask.threaded

        from tsdyn.analysis import overview  # noqa: F401
        from tsdyn.archive import machines, reading  # noqa: F401
        from tsdyn.growing import history  # noqa: F401

    try:
        # else dask looks for a client of `distributed`, whose import takes half as long as all that is needed
        with dask.config.set(scheduler=dask.config.get("scheduler", None) or dask.threaded.get):
            _show(directory, as_json)
    finally:
        gc.unfreeze()


def _show(directory: str, as_json: bool) -> None:
    from tsdyn.analysis import overview
    from tsdyn.archive import machines, reading
    from tsdyn.growing import history as growth

    ds = reading.open(directory)
    if as_json:
        print_json({**overview.as_json(ds, JSON_POINTS), "history": machines.history(ds.attrs)})
        return
    width = terminal.width()
    facts = overview.facts(ds)
    for position, line in enumerate(machines.lines(ds.attrs)):
        facts["history" if not position else f"history {position + 1}"] = line
    if reasons := machines.fallbacks(ds.attrs):
        facts["not compiled"] = "; ".join(reasons)
    if line := growth.states_kept(local_path(directory)):
        facts["states"] = line
    for position, line in enumerate(growth.lines(local_path(directory))):
        facts["added" if not position else f"added {position + 1}"] = line
    column = max(map(len, facts)) + 2
    for key, value in facts.items():
        _print_wrapped(printable(value.replace("\n", " ")), width, f"{printable(key):{column}}", " " * column)
    _show_numbers(ds)
    _show_variables(ds, width)


def _print_wrapped(text: str, width: int, first: str, later: str) -> None:
    lines = textwrap.wrap(text, max(20, width - 1), initial_indent=first, subsequent_indent=later)
    print("\n".join(lines) if lines else first)


def _show_numbers(ds: Any) -> None:
    """Print the last numbers of a run, with their spread over seeds, or those of a sweep's points, one line each."""
    from tsdyn.analysis import overview

    named = overview.points(ds)
    rows = overview.rows(ds, POINTS)
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    if not names:
        return
    if len(named) == 1:
        print("\nat the end: median over seeds (middle 80 %)")
        for name in names:
            print(f"  {name:12} {rows[0].numbers[name]}")
        return
    print("\nat the end of each point: median over seeds")
    header, labels = _without_keys([row.point for row in rows])
    first = max(map(len, (header, *labels)))
    print(f"  {header:{first}}" + "".join(f"  {name:>10}" for name in names) + "  dead")
    for label, row in zip(labels, rows, strict=True):
        medians = [row.numbers.get(name) for name in names]
        shown = "".join(f"  {'-' if n is None or not n.members else format(n.median, '.3g'):>10}" for n in medians)
        print(printable(f"  {label:{first}}{shown}  {row.dead:4}"))
    if len(named) > len(rows):
        print(f"  ... and {len(named) - len(rows)} more points: --json prints {JSON_POINTS}, tsdyn report a table")


def _without_keys(points: list[str]) -> tuple[str, list[str]]:
    """The keys that all names of points share, ``a = 1, b = 2``, and the names without them."""
    split = [[part.partition(" = ") for part in point.split(", ")] for point in points]
    keys = [[key for key, _, _ in parts] for parts in split]
    if any(found != keys[0] for found in keys):
        return "", points
    return ", ".join(keys[0]), [", ".join(value for _, _, value in parts) for parts in split]


def _show_variables(ds: Any, width: int) -> None:
    """Print the variables by their dimensions, one line each."""
    from tsdyn.archive import selecting

    swept = selecting.swept_dimensions(ds)
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, array in ds.data_vars.items():
        dims = ", ".join(str(dim) for dim in array.dims if dim not in swept)
        groups.setdefault(dims, []).append((str(name), str(array.attrs.get("long_name", ""))))
    after = f" of each {', '.join(swept)}" if swept else ""
    print(f"\nvariables{printable(after)}")
    longest = max((len(name) for found in groups.values() for name, _ in found), default=0)
    for dims, found in groups.items():
        print(printable(f"  ({dims})"))
        for name, meaning in found:
            _print_wrapped(printable(meaning.replace("\n", " ")), width, f"    {name:{longest}}  ", " " * (longest + 6))


@app.command()
def plot(
    directory: Directory,
    figure: Annotated[str | None, typer.Argument(help="Which; without it, what there is.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="FILE.png (.svg, .pdf; .gif moves); FIGURE.png if not given.")
    ] = None,
    style: StyleName = "paper",
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="KEY=VALUE", help="A part: a swept key, seed, epoch or layer; repeat it."),
    ] = None,
) -> None:
    """Draw a figure from an archive, with a caption; in a paper's column widths unless --style says otherwise."""
    from tsdyn.analysis import captions
    from tsdyn.analysis import style as look
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
        with look.using(look.as_name(style)):
            drawn: Any = planes.animate_boundaries(ds) if moves else recipes.FIGURES[figure](ds)
        if not moves:
            drawn.provenance = captions.provenance(ds, f"tsdyn plot DIR {figure} --style {style}")
    except (ValueError, KeyError) as error:
        raise DirectoryError(f"plot {figure}: {error.args[0] if error.args else error}") from error
    save(drawn, path, quiet=False)


def _selected(ds: Any, words: list[str]) -> Any:
    """The part of an archive that ``--select`` asks for, by labels of dimensions and values of swept keys."""
    from tsdyn.archive import selecting

    for word in words:
        key, value = assignment(word, "--select")
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
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the page anew until the run is finished; it refreshes itself.")
    ] = False,
    every: Annotated[float, typer.Option(min=1.0, help="With --watch: seconds between two pages.")] = 5.0,
) -> None:
    """Write one self-contained HTML page: what ran, numbers, figures, audit, coverage, failures."""
    from tsdyn.analysis import report

    if not watch:
        print(report.write(directory, output, audit=audit))
        return
    print(output, flush=True)
    for share in report.watch(directory, output, every=every, audit=audit):
        print(f"{share:.0%} of the recorded steps are committed", file=sys.stderr, flush=True)


@app.command()
def cite(directory: Directory) -> None:
    """Print BibTeX of the papers, data and software that an archive rests on."""
    from tsdyn.analysis.citations import citations
    from tsdyn.archive import reading

    print("\n\n".join(map(printable, citations(reading.open(directory)))))


@app.command()
def audit(directory: Directory, as_json: AsJson = False) -> None:
    """Test each theorem on an archive, a line each: holds, fails, hypothesis unmet because ..., or what to record."""
    from tsdyn.analysis.audit import audit as measure
    from tsdyn.analysis.report import audit_rows
    from tsdyn.analysis.verdicts import lines
    from tsdyn.archive import reading, selecting
    from tsdyn.running import packages

    ds = reading.open(directory)
    try:
        found = measure(ds)
        shown = lines(found)
    except (ValueError, KeyError) as error:
        gone = isinstance(error, PartError)
        way = packages.way_back(selecting.experiment_of(ds), local_path(directory)) if gone else ""
        raise DirectoryError(f"{directory}: {error.args[0] if error.args else error}{way}") from error
    if as_json:
        words = ("claim", "verdicts", "largest_margin", "used")
        print_json([dict(zip(words, row, strict=True)) for row in audit_rows(found)])
        return
    for line in shown:
        print(printable(line))


@app.command()
def validate(directory: Directory, as_json: AsJson = False) -> None:
    """Check schema, checksums, every number, and agreement with experiment.toml; exit 1 with the reasons if damaged."""
    from tsdyn.archive import integrity

    found = integrity.check(directory)
    if as_json:
        print_json({"directory": directory, "whole": not found, "problems": found})
    else:
        for problem in found:
            print(printable(problem))
    if found:
        raise typer.Exit(FAILED)
    if as_json:
        return
    print(f"{directory}: whole")


@app.command()
def repair(directory: Directory) -> None:
    """Keep what is whole and list what was dropped, which is moved to DIR/damaged."""
    from tsdyn.archive import integrity

    done = integrity.repair(directory)
    for line in done:
        print(printable(line))
    if not done:
        print(f"{directory}: nothing to repair")


@app.command()
def doctor(
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="Where runs are to be written.")] = ".",
) -> None:
    """Say what this machine and a directory mean for numbers, speed and files; exit 1 if something is bad."""
    from tsdyn.running import diagnosis

    bad = False
    for finding in diagnosis.diagnose(local_path(directory), seconds=diagnosis.SECONDS):
        bad |= finding.verdict == "bad"
        print(printable(f"{finding.verdict:4}  {finding.subject}: {finding.found}".replace("\n", " ")))
        print(printable(f"      {finding.meaning}".replace("\n", " ")), flush=True)
    if bad:
        raise typer.Exit(FAILED)
