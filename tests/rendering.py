"""What a referee sees first: text that overlaps, is cut off, too small or too pale; a caption that does not say n."""

from __future__ import annotations

import itertools
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.lines import AxLine
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from tsdyn.analysis import style

#: Marks that need no contrast of their own: bands about lines, single seeds, what stands in a coloured field.
EXEMPT = {"band", "seed", "field", "in a field", "minus"}


def _texts(figure):
    """Every text that is drawn, with its extent."""
    renderer = figure.canvas.get_renderer()
    found = []
    parents = {id(ax.title): ax for ax in figure.axes}
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text().strip():
            continue
        found.append(text)
    ticks = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            drawn = {id(label) for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
            every = {id(t) for tick in (*axis.majorTicks, *axis.minorTicks) for t in (tick.label1, tick.label2)}
            ticks |= every - drawn
            if not ax.axison:
                ticks |= every | {id(axis.label), id(axis.get_offset_text())}
    del parents
    return [(t, t.get_window_extent(renderer)) for t in found if id(t) not in ticks]


def _labelled(ax, axis):
    """Whether an axis with tick labels is labelled: itself, once in its row or column, or for a part of the page."""
    own = getattr(ax, f"{axis}axis")
    shown = any(label.get_visible() and label.get_text() for label in own.get_ticklabels())
    if not ax.axison or not shown or own.get_label_text():
        return True
    part = ax.figure
    while part is not None:
        if getattr(part, f"get_sup{axis}label")():
            return True
        part = None if part is part.figure else part.figure
    numbers = any(label.get_visible() and not label.get_text().strip("−.0123456789") for label in own.get_ticklabels())
    spec = ax.get_subplotspec()
    if spec is None or not numbers:
        return not numbers  # categories say themselves what they are
    side = "colspan" if axis == "x" else "rowspan"
    kin = [a for a in ax.figure.axes if a.get_subplotspec() is not None and a.get_gridspec() is ax.get_gridspec()]
    kin = [a for a in kin if getattr(a.get_subplotspec(), side) == getattr(spec, side)]
    row = [a for a in ax.figure.axes if a.get_subplotspec() is not None and a.get_gridspec() is ax.get_gridspec()]
    return any(getattr(a, f"get_{axis}label")() for a in (kin if axis == "x" or len(row) == 1 else row))


def _outside(ax):
    """Names of curves, bands and marks of which a point lies more than a hundredth of the panel beyond its axes."""
    marks = [(m, m.get_offsets()) for m in ax.collections if isinstance(m, PathCollection)]
    bands = [(b, p.vertices) for b in ax.collections if b.get_gid() == "band" for p in b.get_paths()]
    curves = [(c, c.get_xydata()) for c in ax.lines if not isinstance(c, AxLine) and c.get_transform() == ax.transData]
    for artist, points in [*marks, *bands, *curves]:
        places = ax.transAxes.inverted().transform(ax.transData.transform(np.asarray(points, float)))
        places = places[np.isfinite(places).all(1)]
        if places.size and (places.min() < -0.01 or places.max() > 1.01):
            yield artist.get_gid() or artist.get_label()


def faults(figure, smallest=style.SMALLEST, *, laid_out=False):
    """Sentences, one per fault of a drawn page; none if a referee would accept it.

    The page is `laid_out` if it was saved before.
    """
    with style.using(figure._style.name):  # ticks are made, and counted, when they are asked for
        return _faults(figure, smallest, 1 if laid_out else 2)


def _faults(figure, smallest, times):
    FigureCanvasAgg(figure)
    figure.set_dpi(200)
    for _ in range(times):  # the layout may move what a tick's length had moved
        figure.draw_without_rendering()
    found = []
    page = Bbox.from_bounds(0, 0, figure.bbox.width, figure.bbox.height)
    texts = _texts(figure)
    for text, box in texts:
        name = repr(text.get_text())
        if min(box.x0 - page.x0, box.y0 - page.y0, page.x1 - box.x1, page.y1 - box.y1) < -2.0:
            found.append(
                f"{name} is cut off at {[round(v) for v in box.extents]} of {page.width:.0f}x{page.height:.0f}"
            )
        if text.get_fontsize() < smallest - 1e-6:
            found.append(f"{name} has {text.get_fontsize():.1f} points")
        if text.get_gid() not in EXEMPT and style.contrast(style.over_white(text.get_color(), text.get_alpha())) < 4.5:
            found.append(f"{name} is pale")
        if re.search(r"\b(nan|None)\b", text.get_text()):
            found.append(f"{name} is no word")
        if re.search(r"\w_\w", re.sub(r"(?<!\\)\$.*?(?<!\\)\$", "", text.get_text())):
            found.append(f"{name} has a key or a symbol that is not set")
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        over = Bbox.intersection(a, b)
        if over is not None and over.width > 2.0 and over.height > 2.0:
            found.append(f"{one.get_text()!r} and {other.get_text()!r} overlap")
    for ax in figure.axes:
        found += [f"no label of {axis} in {ax.get_title(loc='left')!r}" for axis in "xy" if not _labelled(ax, axis)]
        for line in ax.lines:
            if line.get_gid() in EXEMPT or not line.get_visible():
                continue
            seen = style.contrast(style.over_white(line.get_color(), line.get_alpha()))
            if seen < style.CONTRAST - 0.01:
                found.append(f"a line {line.get_label()!r} of contrast {seen:.1f}")
        for marks in ax.collections:
            if not isinstance(marks, PathCollection) or marks.get_gid() in EXEMPT:
                continue
            colours = ([tuple(c) for c in every.tolist()] for every in (marks.get_facecolor(), marks.get_edgecolor()))
            for face, edge in dict.fromkeys(itertools.zip_longest(*colours)):
                looks = [style.over_white(c[:3], c[3]) for c in (face, edge) if c is not None and c[3] > 0]
                if looks and max(map(style.contrast, looks)) < style.CONTRAST - 0.01:
                    found.append(f"marks of contrast {max(map(style.contrast, looks)):.1f}")
                    break
        found += [f"{name!r} leaves the panel {ax.get_title(loc='left')!r}" for name in _outside(ax)]
        if ax.axison and not ax.has_data():
            found.append(f"empty panel {ax.get_title(loc='left')!r}")
    if not re.search(r"n = \d+ seed", figure.caption):
        found.append(f"the caption does not say n: {figure.caption!r}")
    width = figure.get_figwidth()
    if not any(abs(width - w) < 1e-9 for w in (style.COLUMN, style.PAGE)):
        found.append(f"{width} in wide")
    if figure.get_figheight() > 9.2:
        found.append(f"{figure.get_figheight():.1f} in high")
    return found
