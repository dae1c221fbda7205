"""Renders an archive as one self-contained HTML page: what ran, the results, and what went wrong.

All text from the archive is escaped, since attributes may come from anybody's file.  The page runs no script and loads
nothing from elsewhere; figures are embedded.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from tsdyn.analysis.identity import refuse_odd

from tsdyn import schema, vocabulary
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
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.sub { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td { overflow-wrap: anywhere; } td.key, th { white-space: nowrap; color: #333; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
.bad { color: #a40000; } summary { cursor: pointer; }
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
    return f"<section><h2>{text(title)}</h2>{''.join(content)}</section>"


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
    sizes = ", ".join(f"{dim} {size}" for dim, size in ds.sizes.items())
    along = schema.path_of(ds)
    rows = [
        ("dimensions", sizes),
        (f"{along}s", f"{ds[along].values[0]:g} to {ds[along].values[-1]:g}, {ds.sizes[along]} recorded"),
        ("size", f"{ds.nbytes / 1e6:.1f} MB as arrays"),
    ]
    kind = "recording" if "recording" in ds.attrs else "experiment"
    written = f"<pre>{text(ds.attrs.get(kind, 'not recorded'))}</pre>"
    return _section("What ran", _table(rows), f"<details><summary>{kind}.toml</summary>{written}</details>")


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


def _points(ds: xr.Dataset) -> list[tuple[str, dict[str, object]]]:
    """Name and selection of each point of the sweep."""
    swept = selecting.swept_dimensions(ds)
    listed = [c for c in ds.coords if ds[c].ndim == 1 and ds[c].dims[0] in swept and c not in vocabulary.COORDINATES]
    found = []
    for values in itertools.product(*(ds[dim].values for dim in swept)):
        at = dict(zip(swept, values, strict=True))
        own = ds[listed].sel(at)
        keys = [str(c) for c in listed if c != "point" or len(listed) == 1]
        found.append((", ".join(f"{key} = {own[key].item()}" for key in keys), at))
    return found


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
    named = _points(ds)
    shares = [float(ds["coverage"].sel(at)) for _, at in named]
    line = f"<p>{sum(s >= 1 for s in shares)} of {len(shares)} points are finished.</p>"
    order = np.argsort(shares, kind="stable")  # incomplete points first
    rows = [(named[i][0], f"{shares[i]:.0%} of its recorded epochs") for i in order]
    return _section("Coverage", line, _table(rows, ("point", "committed")))


def _failures(ds: xr.Dataset, said: Sequence[str]) -> str:
    rows: list[tuple[object, object]] = [("cannot be read", message) for message in said]
    if "death_epoch" in ds.coords:
        death = ds["death_epoch"].load()
        points = _points(ds) if selecting.swept_dimensions(death) else [("", {})]
        for name, at in points:
            for seed in np.atleast_1d(ds["seed"].values):
                own = death.sel({**at, "seed": seed}) if "seed" in death.dims else death.sel(at)
                if int(own) >= 0:
                    member = f"{name}, seed {seed}" if name else f"seed {seed}"
                    rows.append((member, f"became NaN or infinite in epoch {int(own)}"))
    if not rows:
        return _section("Failures", "<p>None: no member became NaN or infinite, and everything could be read.</p>")
    return _section("Failures", f'<p class="bad">{len(rows)} found.</p>', _table(rows, ("where", "what")))


def _figures(ds: xr.Dataset) -> str:
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
            f"<figcaption>{text(name)}: {text(recipe.shows)}</figcaption></figure>"
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


def render(path: str | Path, *, audit: bool = True) -> str:
    """HTML page of a run, a sweep or an archive file.

    Args:
        path: As `tsdyn.open` takes it.  Points of a sweep that cannot be read are listed as failures.
        audit: Whether to include the audit of `tsdyn.analysis.audit`, for at most `AUDITED` members.

    Raises:
        ArchiveError: if there is nothing to read, or what there is cannot be an archive's (`refuse_odd`).
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds = _opened(path)
        middle = [_figures(ds), _audit(ds) if audit else ""]
    for warning in caught:
        message = str(warning.message)
        if "left NaN" in message and message not in said:
            said.append(message)
    name = ds.attrs.get("name", Path(path).name)
    sections = [_what_ran(ds), _failures(ds, said), _coverage(ds), *middle, _provenance(ds), _variables(ds)]
    made = [
        ds.attrs.get("created"),
        f"tsdyn {ds.attrs.get('tsdyn_version', '?')}",
        f"digest {ds.attrs.get('digest', '?')}",
    ]
    line = ", ".join(str(part) for part in made if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{text(name)}</h1>\n<p class="sub">{text(line)}</p>\n'
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def write(path: str | Path, output: str | Path, *, audit: bool = True) -> Path:
    """Write the page of `render` to `output`, atomically; returns `output`.

    Raises:
        ArchiveError: if there is nothing to read, or `output` cannot be written.
    """
    page, target = render(path, audit=audit), whole_files.local_path(output)
    whole_files.write_text(target, page)
    return target
