"""Commands that read archives: show, plot, report, cite, audit, validate, repair; and doctor."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsdyn.archive.whole_files import DirectoryError, local_path
from tsdyn.cli.application import FAILED, Directory, StyleName, app, assignment, plain, save
from tsdyn.experiment.errors import ExperimentError
from tsdyn.registers import PartError
from tsdyn.schema import path_of, printable
from tsdyn.vocabulary import COORDINATES

#: Plurals of the names of the dimension along which a run is recorded.
PLURAL = {"epoch": "epochs", "time": "times", "alpha": "alphas"}


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
        facts.add_row(plain(key), plain(value))
    console.print(facts)
    swept = selecting.swept_dimensions(ds)
    after = f"dimensions, after {', '.join(swept)}" if swept else "dimensions"
    lines = [("variable", after, "meaning")] + [
        (str(name), ", ".join(str(d) for d in array.dims if d not in swept), str(array.attrs.get("long_name", "")))
        for name, array in ds.data_vars.items()
    ]
    first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
    for name, dims, meaning in lines:  # one line per variable, cut at the terminal's width
        line = printable(f"{name:{first}}  {dims:{second}}  {meaning}".replace("\n", " "))
        print(line[: console.width] if console.is_terminal else line)


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
) -> None:
    """Write one self-contained HTML page: what ran, figures, audit, coverage, failures."""
    from tsdyn.analysis import report

    print(report.write(directory, output, audit=audit))


@app.command()
def cite(directory: Directory) -> None:
    """Print BibTeX of the papers, data and software that an archive rests on."""
    from tsdyn.analysis.citations import citations
    from tsdyn.archive import reading

    print("\n\n".join(map(printable, citations(reading.open(directory)))))


@app.command()
def audit(directory: Directory) -> None:
    """Test each theorem on an archive, a line each: holds, fails, hypothesis unmet because ..., or what to record."""
    from tsdyn.analysis.audit import audit as measure
    from tsdyn.analysis.verdicts import lines
    from tsdyn.archive import reading, selecting
    from tsdyn.running import packages

    ds = reading.open(directory)
    try:
        shown = lines(measure(ds))
    except (ValueError, KeyError) as error:
        gone = isinstance(error, PartError)
        way = packages.way_back(selecting.experiment_of(ds), local_path(directory)) if gone else ""
        raise DirectoryError(f"{directory}: {error.args[0] if error.args else error}{way}") from error
    for line in shown:
        print(printable(line))


@app.command()
def validate(directory: Directory) -> None:
    """Check schema, checksums, every number, and agreement with experiment.toml; exit 1 with the reasons if damaged."""
    from tsdyn.archive import integrity

    found = integrity.check(directory)
    for problem in found:
        print(printable(problem))
    if found:
        raise typer.Exit(FAILED)
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
    for finding in diagnosis.diagnose(local_path(directory)):
        bad |= finding.verdict == "bad"
        print(printable(f"{finding.verdict:4}  {finding.subject}: {finding.found}".replace("\n", " ")))
        print(printable(f"      {finding.meaning}".replace("\n", " ")), flush=True)
    if bad:
        raise typer.Exit(FAILED)
