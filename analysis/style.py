"""How figures look and how they are written: sizes of columns, type, colours that everyone sees, files with provenance.

A `Page` is a matplotlib Figure as wide as one or two columns of a paper, with its caption below the panels.  What draws
a figure is `styled`; ``with using("talk"):`` draws the same figure larger.  Nothing is set globally.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import colormaps, colors
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.textpath import TextToPath
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from tsdyn._version import __version__
from tsdyn.schema import printable

P = ParamSpec("P")
R = TypeVar("R")

Name = Literal["paper", "talk", "notebook"]
NAMES: tuple[Name, ...] = get_args(Name)
#: Widths of one and of two columns of a paper, in inches.
COLUMN, PAGE = 3.25, 6.75
#: Least size of text on paper, in points.
SMALLEST = 6.0
#: Size of everything relative to paper.
_SCALES: Mapping[Name, float] = {"paper": 1.0, "notebook": 1.45, "talk": 1.9}
#: Size of the caption below the panels, in points on paper.
_CAPTION = 6.5
#: Least contrast on white of lines, marks and text (WCAG 2.1, 1.4.11).
CONTRAST = 3.0
#: Up to seven unordered things: contrast at least 3:1 on white, distinct in grey (7 steps of lightness or more apart)
#: and with protan, deutan and tritan vision (ΔE 22 or more apart).
PALETTE = ("#0072B2", "#D55E00", "#1B1200", "#D6729B", "#073A57", "#644402", "#983E49")
#: Positive and negative, everywhere.
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
#: What belongs to no class; guides.
GREY, GUIDE = "#808080", "#555555"
#: Fewest seeds that are drawn as a median with a band.
FEWEST_OF_A_BAND = 5
#: The quantiles of a band: the middle 80 % about the median.
BAND = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class _Active:
    name: Name = "paper"
    captioned: bool = True


#: None: paper, captioned.
_active: ContextVar[_Active | None] = ContextVar("_active", default=None)


def _in_use() -> _Active:
    return _active.get() or _Active()


def _parameters(name: Name) -> Any:
    """matplotlib's parameters of a style; also whatever a user's own file of parameters says otherwise is replaced."""
    s = _SCALES[name]
    return mpl.rcParamsDefault.copy() | {
        "backend": mpl.rcParams._get("backend"),  # reading it by key would start one
        "font.family": ["DejaVu Sans"],  # which comes with matplotlib
        "font.size": 7.5 * s,
        "axes.titlesize": 7.5 * s,
        "axes.titlepad": 3.5 * s,
        "axes.labelsize": 7.5 * s,
        "axes.labelpad": 2.0 * s,
        "axes.linewidth": 0.6 * s,
        "xtick.labelsize": 6.8 * s,
        "ytick.labelsize": 6.8 * s,
        "xtick.major.size": 2.5 * s,
        "ytick.major.size": 2.5 * s,
        "xtick.minor.size": 1.4 * s,
        "ytick.minor.size": 1.4 * s,
        "xtick.major.width": 0.6 * s,
        "ytick.major.width": 0.6 * s,
        "xtick.minor.width": 0.4 * s,
        "ytick.minor.width": 0.4 * s,
        "xtick.major.pad": 2.0 * s,
        "ytick.major.pad": 2.0 * s,
        "legend.fontsize": 6.8 * s,
        "legend.title_fontsize": 6.8 * s,
        "legend.frameon": False,
        "legend.handlelength": 2.4,
        "legend.columnspacing": 1.2,
        "legend.borderaxespad": 0.3,
        "legend.labelspacing": 0.35,
        "figure.labelsize": 7.5 * s,
        "figure.titlesize": 8.0 * s,
        "figure.constrained_layout.h_pad": 0.025 * s,
        "figure.constrained_layout.w_pad": 0.025 * s,
        "figure.dpi": 100,
        "lines.linewidth": 1.3 * s,
        "lines.markersize": 3.5 * s,
        "patch.linewidth": 0.6 * s,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=list(PALETTE)),
        "image.cmap": "viridis",
    }


#: Vector files with TrueType outlines that checkers accept, text as text, and the same bytes for the same figure.
_FILES: Any = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "tsdyn",
    "savefig.dpi": 300,
}


@contextmanager
def using(name: Name, *, captioned: bool = True) -> Iterator[None]:
    """Draw in the style ``paper``, ``talk`` or ``notebook``; without captions below the panels if not `captioned`.

    Raises:
        ValueError: if there is no such style.
    """
    if name not in NAMES:
        raise ValueError(f"style: no style {name!r}; there are {', '.join(NAMES)}")
    token = _active.set(_Active(name, captioned))
    try:
        with mpl.rc_context(_parameters(name) | _FILES):
            yield
    finally:
        _active.reset(token)


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """`draw`, run in the style in use; on paper if none is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        active = _in_use()
        with using(active.name, captioned=active.captioned):
            return draw(*args, **kwargs)

    return drawn


def points(size: float | int) -> float:
    """A size in points on paper, in the style in use."""
    return size * _SCALES[_in_use().name]


#: Positions on a page are multiples of this share of it, a ten-thousandth of a point or less.
_GRID = 2.0**-24


class _Layout(ConstrainedLayoutEngine):
    """Constrained layout with positions on a grid.

    Its solver orders what it solves for by addresses in memory, so that the last bits of its results change from one
    drawing to the next; a vector file would show them.
    """

    def execute(self, fig: Figure) -> Any:
        found = super().execute(fig)
        _settle(fig)
        return found


def _on_grid(positions: Any) -> NDArray:
    found: NDArray = np.round(np.asarray(positions) / _GRID) * _GRID
    return found


def _settle(fig: Any) -> None:
    """Move to the grid what a layout has placed: axes, parts of the page and their common labels."""
    for part in fig.subfigs:
        part.bbox_relative.set_points(_on_grid(part.bbox_relative.get_points()))
        _settle(part)
    for text in (fig._suptitle, fig._supxlabel, fig._supylabel):
        if text is not None:
            text.set_position(_on_grid(text.get_position()))
    for ax in fig._localaxes:
        if ax.get_in_layout():
            ax._set_position(Bbox(_on_grid(ax.get_position(original=True).get_points())))


class Page(Figure):
    """A figure of the width of one or two columns; panels are laid out in `body`, the caption stands below.

    Attributes:
        caption: What the figure shows.
        provenance: Of what it was drawn, for the metadata of files: digest, version, command.
    """

    caption: str = ""
    provenance: Mapping[str, str] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._style = _in_use()
        self._heights = [self.get_figheight(), 0.0, 0.0]  # of the panels, the legend and the caption
        self._rows = self.add_gridspec(3, 1, height_ratios=(1.0, 1e-6, 1e-6))
        self.body, self._key, self._foot = (self.add_subfigure(self._rows[row]) for row in range(3))

    def _resize(self, row: int, height: float | int) -> None:
        self._heights[row] = height
        self.set_figheight(sum(self._heights))
        self._rows.set_height_ratios([max(h, 1e-6) for h in self._heights])

    def say(self, caption: str) -> None:
        """Set the caption, and draw it unless the style has none."""
        self.caption = " ".join(printable(caption).split())
        self.caption = (self.caption[:1].upper() if self.caption[:1].isascii() else self.caption[:1]) + self.caption[1:]
        for text in list(self._foot.texts):
            text.remove()
        if not (self.caption and self._style.captioned):
            return
        s = _SCALES[self._style.name]
        lines = wrapped(self.caption, _CAPTION * s, self.get_figwidth() - 8 * s / 72)
        self._resize(2, (1.32 * len(lines) + 0.7) * _CAPTION * s / 72)
        self._foot.text(
            4 * s / 72 / self.get_figwidth(), 1.0, "\n".join(lines), size=_CAPTION * s, va="top", ha="left",
            parse_math=False, gid="caption", linespacing=1.25,
        )  # fmt: skip

    @property
    def legends_below(self) -> list[Legend]:
        """The legends between the panels and the caption."""
        return self._key.legends

    def legend_below(self, handles: Sequence[Any], labels: Sequence[str], title: str = "") -> None:
        """Add one legend for all panels, between these and the caption, in as many columns as fit."""
        size = 6.8 * _SCALES[self._style.name]
        widest = max(text_width(label) for label in labels) + 4.2  # with the handle and the gap
        count = min(len(labels), max(1, int(0.96 * self.get_figwidth() * 72 / size / widest)))
        rows = -(-len(labels) // count)
        self._resize(1, (1.5 * (rows + bool(title)) + 0.5) * size / 72)
        self._key.legend(handles, labels, loc="center", ncols=-(-len(labels) // rows), title=title or None)

    def draw(self, renderer: Any) -> None:
        """Draw, with ticks, which are made only now, in the page's style."""
        with using(self._style.name, captioned=self._style.captioned):
            super().draw(renderer)

    def savefig(self, fname: Any, *args: Any, **kwargs: Any) -> None:
        """Write the figure as `matplotlib.figure.Figure.savefig` does, with what it shows and where it comes from.

        PDF files have TrueType fonts, SVG files text; neither has a date, so that the same figure has the same bytes,
        whatever was drawn before and whatever the user's own parameters of matplotlib are.
        """
        kind = str(kwargs.get("format") or Path(str(fname)).suffix.lstrip(".") or "png").lower()
        known = _metadata(kind, self.caption, self.provenance) | dict(kwargs.pop("metadata", None) or {})
        with using(self._style.name, captioned=self._style.captioned):
            if (layout := self.get_layout_engine()) is not None:
                layout.execute(self)  # a first pass, which does not know how wide legends and bars will be
            super().savefig(fname, *args, **(kwargs | ({"metadata": known} if known else {})))


def _metadata(kind: str, caption: str, provenance: Mapping[str, str]) -> dict[str, Any]:
    """Entries of a file's metadata, by the names of its format."""
    told = "; ".join(f"{key} {value}" for key, value in provenance.items())
    title = caption.partition(". ")[0]
    match kind:
        case "pdf":
            named = {"Title": title, "Subject": caption, "Keywords": told, "Creator": f"tsdyn {__version__}"}
            return {**named, "CreationDate": None}
        case "svg":
            named = {"Title": title, "Description": caption, "Source": told, "Creator": f"tsdyn {__version__}"}
            return {**named, "Date": None}
        case "png":
            return {"Title": title, "Description": caption, "Source": told, "Software": f"tsdyn {__version__}"}
        case _:
            return {}


def page(columns: Literal[1, 2], height: float | int) -> Page:
    """An empty page as wide as one or two columns, `height` inches high on paper without its caption."""
    active = _in_use()
    with using(active.name, captioned=active.captioned):
        s = _SCALES[active.name]
        return Page(figsize=((COLUMN if columns == 1 else PAGE) * s, height * s), layout=_Layout())


@functools.lru_cache(maxsize=4096)
def text_width(word: str) -> float:
    """Width of a word in units of the type's size."""
    return float(TextToPath().get_text_width_height_descent(word, FontProperties(size=10), ismath=False)[0]) / 10


def wrapped(text: str, size: float | int, width: float | int) -> list[str]:
    """`text` in lines no wider than `width` inches at `size` points."""
    lines: list[str] = []
    room, used = 72 * width / size / 1.06, 0.0  # hinting widens small type on screens
    for word in re.findall(r"\S+(?: = \S+)*", text):  # a symbol stays with its value
        if lines and used + text_width(" " + word) <= room:
            lines[-1] += " " + word
            used += text_width(" " + word)
        else:
            lines.append(word)
            used = text_width(word)
    return lines


# --- colours -------------------------------------------------------------------------------------------------

#: Linear RGB as seen without one kind of cone (Machado, Oliveira & Fernandes 2009, severity 1).
VISIONS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def _linear(colour: Any) -> NDArray:
    rgb = np.asarray(colors.to_rgb(colour))
    found: NDArray = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return found


def contrast(colour: Any, background: Any = "white") -> float:
    """Contrast of two colours, 1 to 21: (Y₁ + 0.05) / (Y₂ + 0.05) of their luminances Y₁ ≥ Y₂ (WCAG 2.1)."""
    low, high = sorted(float(_linear(one) @ (0.2126, 0.7152, 0.0722)) for one in (colour, background))
    return (high + 0.05) / (low + 0.05)


def over_white(colour: Any, alpha: float | None = None) -> tuple[float, float, float]:
    """The colour as which a transparent one is seen on white."""
    r, g, b, a = colors.to_rgba(colour, alpha)
    return (1 - a + a * r, 1 - a + a * g, 1 - a + a * b)


def lightness(colour: Any, vision: str | None = None) -> NDArray:
    """CIE L*a*b* of a colour, as one of `VISIONS` sees it if given; the first number is its grey."""
    rgb = _linear(colour)
    if vision is not None:
        rgb = np.clip(np.asarray(VISIONS[vision]) @ rgb, 0, 1)
    to_xyz = np.array(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))
    t = to_xyz @ rgb / (0.9505, 1.0, 1.089)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _lightest() -> float:
    """Upper end of viridis up to which its contrast on white is at least `CONTRAST`."""
    shares = np.linspace(0, 1, 257)
    return float(max(v for v in shares if contrast(colormaps["viridis"](v)[:3]) >= CONTRAST))


LIGHTEST = _lightest()
#: viridis as far as it is seen on white, for ordered families of lines.
ORDERED = colors.ListedColormap(colormaps["viridis"](np.linspace(0, LIGHTEST, 256)), name="tsdyn-ordered")


def shade(position: float | int, count: int) -> Any:
    """Colour of an item in an ordered sequence, from dark to light."""
    return ORDERED(position / max(1, count - 1))


def as_name(text: str) -> Name:
    """`text` as the name of a style; ValueError, naming them all, if it is none."""
    if text not in NAMES:
        raise ValueError(f"style: no style {text!r}; there are {', '.join(NAMES)}")
    return text
