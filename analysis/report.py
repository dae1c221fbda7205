"""Renders an archive as one self-contained HTML page: what ran, the results, and what went wrong.

All text from the archive is escaped, since attributes may come from anybody's file.  The page runs no script and loads
nothing from elsewhere; figures are embedded.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import math
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from tsdyn.analysis import overview
from tsdyn.analysis.figures import selectable
from tsdyn.analysis.identity import refuse_odd

from tsdyn import schema
from tsdyn.archive import reading, selecting, whole_files
from tsdyn.archive.selecting import experiment_of

#: Largest number of rows in a table; the page says how many are left out.
ROWS = 100
#: The audit is left out for more members than this, since it rebuilds every member's networks.
AUDITED = 200
#: Figures drawn for sweeps with more points than panels; all other figures have one panel per point.
SUMMARIES = ("loss", "specialization", "phase")
DPI = 110

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.sub { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.key, th { white-space: nowrap; color: #333; } td { overflow-wrap: break-word; }
.provenance td { overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
.bad { color: #a40000; } summary { cursor: pointer; } section { overflow-x: auto; } img { background: white; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; } p.sub, figcaption { color: #b0b0b0; }
  td.key, th { color: #d6d6d6; } pre { background: #22252b; } th, td { border-color: #444; } .bad { color: #ff8f8f; }
}
"""
#: Content security policy, by which the browser too refuses scripts and anything from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """Text of a value, escaped for an HTML element or a quoted attribute."""
    return html.escape(schema.printable(value), quote=True)


def _table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    listed = list(rows)
    head = "<tr>" + "".join(f"<th>{text(name)}</th>" for name in header) + "</tr>" if header else ""
    body = "".join(
        f'<tr><td class="key">{text(first)}</td>' + "".join(f"<td>{text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in listed[:ROWS]
    )
    more = f"<p>… and {len(listed) - ROWS} more</p>" if len(listed) > ROWS else ""
    return f"<table>{head}{body}</table>{more}"


def _section(title: str, *content: str) -> str:
    return f'<section class="{text(title.lower())}"><h2>{text(title)}</h2>{"".join(content)}</section>'


def audit_rows(found: xr.Dataset) -> list[tuple[str, str, str, str]]:
    """Table rows of an audit: claim, members by verdict, largest margin, what is checked or needed."""
    from tsdyn.analysis.audit import VERDICTS

    rows = []
    for claim in found["claim"].values:
        row = found.sel(claim=claim)
        words, counts = np.unique(row["verdict"].values, return_counts=True)
        tally = dict(zip(words.tolist(), counts.tolist(), strict=True))
        margins = row["margin"].values[np.isfinite(row["margin"].values)]
        verdicts = ", ".join(f"{tally[word]} {word}" for word in VERDICTS if word in tally)
        rows.append((str(claim), verdicts, f"{margins.max():.2g}" if margins.size else "", str(row["used"].item())))
    return rows


# --- sections ------------------------------------------------------------------------------------------------


def _what_ran(ds: xr.Dataset) -> str:
    kind = "recording" if "recording" in ds.attrs else "experiment"
    written = f"<pre>{text(ds.attrs.get(kind, 'not recorded'))}</pre>"
    facts = overview.facts(ds)
    return _section("What ran", _table(facts.items()), f"<details><summary>{kind}.toml</summary>{written}</details>")


def _numbers(ds: xr.Dataset) -> str:
    """Last numbers of each point: losses, mean correlations, dead seeds."""
    rows = overview.rows(ds, ROWS)
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    if not names:
        return ""
    listed = [
        (row.point or "run", *(str(row.numbers[n]) if n in row.numbers else "-" for n in names), row.dead)
        for row in rows
    ]
    left = len(overview.points(ds)) - len(rows)
    more = f"<p>… and {left} more points: <code>tsdyn show DIR --json</code>.</p>" if left > 0 else ""
    note = (
        "<p>At the last recorded step: median over seeds, the middle 80 % of them in brackets. rho_l: mean over "
        "teacher nodes of the best correlation with any student node, layer l.</p>"
    )
    return _section("Numbers", note, _table(listed, ("", *names, "dead seeds")), more)


def _each_seed(ds: xr.Dataset) -> str:
    """Curves of every seed: hover tells seed, step and value; a seed can be selected."""
    along, swept = schema.path_of(ds), set(selecting.swept_dimensions(ds))
    name = next((n for n in overview.LOSSES if n in ds and set(ds[n].dims) - swept == {"seed", along}), None)
    if name is None:
        return ""
    points = overview.points(ds)
    shown = points[: selectable.PANELS]
    series = [(label, (ds[name].sel(at) if at else ds[name]).load()) for label, at in shown]
    seeds = ds["seed"].values.tolist()
    notes = [str(ds[name].attrs.get("long_name", name))]
    notes += [f"the first {len(shown)} of {len(points)} points"] if len(points) > len(shown) else []
    notes += [f"the first {selectable.SEEDS} of {len(seeds)} seeds"] if len(seeds) > selectable.SEEDS else []
    return _section("Each seed", f"<p>{text('; '.join(notes))}</p>", selectable.chart(series, along, seeds, name))


def _provenance(ds: xr.Dataset) -> str:
    rows: list[tuple[object, object]] = []
    for key, value in ds.attrs.items():
        if key == "conventions":
            try:
                rows += [(f"convention: {name}", said) for name, said in json.loads(value).items()]
            except (ValueError, TypeError, AttributeError, RecursionError):
                rows.append((key, value))
        elif key not in ("experiment", "recording"):
            rows.append((key, value))
    return _section("Provenance", _table(rows))


def _expected(ds: xr.Dataset) -> int | None:
    """Number of epochs (or times) that a complete run records."""
    try:
        return len(experiment_of(ds).labels)
    except ValueError:  # no experiment, or one that this version cannot parse
        return None


def _coverage(ds: xr.Dataset) -> str:
    if "coverage" not in ds.coords:
        whole = _expected(ds)
        along = schema.path_of(ds)
        if "recording" in ds.attrs:
            return _section("Coverage", f"<p>{ds.sizes[along]} {along}s of the user's own loop are there.</p>")
        return _section("Coverage", f"<p>{ds.sizes[along]} of {whole or '?'} {along}s to be recorded are there.</p>")
    named = overview.points(ds)
    shares = [float(ds["coverage"].sel(at)) for _, at in named]
    line = f"<p>{sum(s >= 1 for s in shares)} of {len(shares)} points are finished.</p>"
    order = np.argsort(shares, kind="stable")  # incomplete points first
    rows = [(named[i][0], f"{shares[i]:.0%} of its recorded epochs") for i in order]
    return _section("Coverage", line, _table(rows, ("point", "committed")))


def _failures(ds: xr.Dataset, said: Sequence[str]) -> str:
    rows: list[tuple[object, object]] = [("cannot be read", message) for message in said]
    if "death_epoch" in ds.coords:
        death = ds["death_epoch"].load()
        points = overview.points(ds) if selecting.swept_dimensions(death) else [("", {})]
        for name, at in points:
            for seed in np.atleast_1d(ds["seed"].values):
                own = death.sel({**at, "seed": seed}) if "seed" in death.dims else death.sel(at)
                if int(own) >= 0:
                    member = f"{name}, seed {seed}" if name else f"seed {seed}"
                    rows.append((member, f"became NaN or infinite in epoch {int(own)}"))
    if not rows:
        return _section("Failures", "<p>None: no member became NaN or infinite, and everything could be read.</p>")
    return _section("Failures", f'<p class="bad">{len(rows)} found.</p>', _table(rows, ("where", "what")))


def _figures(ds: xr.Dataset, directory: str) -> str:
    from tsdyn.analysis.figures import FIGURES, MAX_PANELS

    points = int(np.prod([ds.sizes[dim] for dim in selecting.swept_dimensions(ds)]))
    parts, left = [], []
    for name, recipe in FIGURES.items():
        if recipe.missing(ds):
            continue
        if points > MAX_PANELS and name not in SUMMARIES:
            left.append(f"{name}: a panel for each of {points} points; tsdyn plot DIR {name} --select KEY=VALUE")
            continue
        try:
            drawn = recipe(ds)
        except ValueError as error:
            left.append(str(error))
            continue
        held = io.BytesIO()
        drawn.savefig(held, format="png", dpi=DPI)
        image = base64.b64encode(held.getvalue()).decode("ascii")
        parts.append(
            f'<figure><img alt="{text(recipe.shows)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{text(recipe.shows)}. "
            f"<code>tsdyn plot {text(directory)} {text(name)}</code></figcaption></figure>"
        )
    rest = f"<p>Not drawn:</p><ul>{''.join(f'<li>{text(line)}</li>' for line in left)}</ul>" if left else ""
    return _section("Figures", *parts, "" if parts else "<p>Nothing recorded that a figure shows.</p>", rest)


def _audit(ds: xr.Dataset) -> str:
    members = int(ds["death_epoch"].size) if "death_epoch" in ds.coords else 0
    if not 0 < members <= AUDITED:
        return _section("Audit", f"<p>Left out, of {members} members: <code>tsdyn audit DIR</code>.</p>")
    from tsdyn.analysis.audit import audit

    try:
        rows = audit_rows(audit(ds))
    except (ValueError, KeyError) as error:
        return _section("Audit", f"<p>Not made: {text(error.args[0] if error.args else error)}</p>")
    note = "<p>Margin: conclusion over bound, at most 1 where it holds. Unmet: the hypothesis is not met; untested.</p>"
    return _section("Audit", _table(rows, ("claim", "members", "largest margin", "what is checked, or needed")), note)


def _variables(ds: xr.Dataset) -> str:
    rows = [
        (name, ", ".join(map(str, array.dims)), array.attrs.get("long_name", ""), array.attrs.get("source", ""))
        for name, array in ds.data_vars.items()
    ]
    return _section("Variables", _table(rows, ("name", "dimensions", "meaning", "source")))


def _opened(path: str | Path) -> xr.Dataset:
    """Open the archive; raise DirectoryError if no page can be made of it."""
    ds = reading.open(path, skip_damaged=True)
    try:
        refuse_odd(ds, "report")
    except ValueError as error:
        raise whole_files.DirectoryError(f"{path}: {error}") from error
    lost = [dim for dim in ("seed", schema.path_of(ds)) if dim not in ds.dims or not ds.sizes[dim]]
    if lost:
        raise whole_files.DirectoryError(
            f"{path}: has no {', '.join(lost)}; a page is made of a run, a sweep or an archive file of tsdyn's"
        )
    return ds


def render(path: str | Path, *, audit: bool = True, again: float | None = None) -> str:
    """HTML page of a run, a sweep or an archive file.

    Args:
        path: As `tsdyn.open` takes it.  Points of a sweep that cannot be read are listed as failures.
        audit: Whether to include the audit of `tsdyn.analysis.audit`, for at most `AUDITED` members.
        again: Seconds after which a browser reads the page again, for a run that goes on.

    Raises:
        ArchiveError: if there is nothing to read, or what there is cannot be an archive's (`refuse_odd`).

    Examples:
        >>> from tsdyn.analysis.report import render
        >>> render("runs/quickstart", audit=False)[:15]
        '<!DOCTYPE html>'
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds = _opened(path)
        middle = [_numbers(ds), _each_seed(ds), _figures(ds, shlex.quote(str(path))), _audit(ds) if audit else ""]
    for warning in caught:
        message = str(warning.message)
        if "left NaN" in message and message not in said:
            said.append(message)
    name = ds.attrs.get("name", Path(path).name)
    sections = [_what_ran(ds), _failures(ds, said), _coverage(ds), *middle, _provenance(ds), _variables(ds)]
    made = [
        f"run {ds.attrs['created']}" if "created" in ds.attrs else None,
        f"{ds.sizes['seed']} seeds",
        f"page of {_now()}",
        f"tsdyn {ds.attrs.get('tsdyn_version', '?')}",
        f"digest {ds.attrs.get('digest', '?')}",
    ]
    style = STYLE + selectable.styles(ds["seed"].values.tolist())
    return _page(name, ", ".join(str(part) for part in made if part), filter(None, sections), style, again)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _page(name: object, line: str, sections: Iterable[str], style: str, again: float | None) -> str:
    refresh = f'<meta http-equiv="refresh" content="{math.ceil(again)}">\n' if again is not None else ""
    live = "<p>The run goes on; this page reads itself anew.</p>\n" if again is not None else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">\n{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(name)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<h1>{text(name)}</h1>\n<p class="sub">{text(line)}</p>\n{live}' + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def write(path: str | Path, output: str | Path, *, audit: bool = True) -> Path:
    """Write the page of `render` to `output`, atomically; returns `output`.

    Raises:
        ArchiveError: if there is nothing to read, or `output` cannot be written.

    Examples:
        >>> from tsdyn.analysis.report import write
        >>> str(write("runs/quickstart", "page.html", audit=False))
        'page.html'
    """
    page, target = render(path, audit=audit), whole_files.local_path(output)
    whole_files.write_text(target, page)
    return target


def watch(path: str | Path, output: str | Path, *, every: float = 5.0, audit: bool = True) -> Iterator[float]:
    """Write the page anew every so many seconds until the run or sweep is finished; yields the share that is committed.

    While the run goes on, the page refreshes itself and has no audit; before the first commit it says so.  The last
    page, of the finished run, has all.

    Raises:
        ArchiveError: as `write`, but for a directory in which nothing is committed yet.

    Examples:
        >>> from tsdyn.analysis.report import watch
        >>> list(watch("runs/quickstart", "page.html", audit=False))  # finished, so one page
        [1.0]
    """
    target = whole_files.local_path(output)
    while True:
        try:
            share = committed(path)
        except whole_files.DirectoryError as error:
            if not (Path(path) / "experiment.toml").exists():
                raise
            waiting = _section("Coverage", f"<p>{text(error)}</p>")
            whole_files.write_text(target, _page(Path(path).name, f"page of {_now()}", [waiting], STYLE, every))
            share = 0.0
        else:
            done = share >= 1
            whole_files.write_text(target, render(path, audit=audit and done, again=None if done else every))
        yield share
        if share >= 1:
            return
        time.sleep(every)


def committed(path: str | Path) -> float:
    """Share of the recorded steps of a run, or of all points of a sweep, that are committed; 1 if it is finished.

    Examples:
        >>> from tsdyn.analysis.report import committed
        >>> committed("runs/quickstart")
        1.0
    """
    ds = _opened(path)
    if "coverage" in ds.coords:
        return float(ds["coverage"].mean())
    whole = _expected(ds)
    return 1.0 if not whole else min(1.0, ds.sizes[schema.path_of(ds)] / whole)
