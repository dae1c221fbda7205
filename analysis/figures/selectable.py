"""Curves of every seed as inline SVG for a page: hover shows seed, label and value; one seed can be selected.

Selecting is done by the style sheet alone (`:checked`), so that a page which shows text from anybody's archive runs no
script.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

#: Panels, seeds and labels per curve that are drawn at most.
PANELS, SEEDS, LABELS = 12, 32, 60
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 300, 190, 48, 30, 18


def styles(seeds: Sequence[int]) -> str:
    """Style rules that fade every seed but the selected one."""
    shown = list(seeds)[:SEEDS]
    rules = [f"#seed-{i}:checked ~ .charts .curve:not(.s{i}) {{ opacity: .06; }}" for i in range(len(shown))]
    return "\n".join(
        [
            ".charts { display: flex; flex-wrap: wrap; gap: .5rem; } .charts svg { width: 300px; max-width: 100%; }",
            ".curve { stroke: #1f5fa8; fill: #1f5fa8; } .curve path { fill: none; stroke-width: 1.2; }",
            ".curve circle { fill-opacity: 0; stroke: none; } .curve circle:hover { fill-opacity: 1; }",
            "@media (prefers-color-scheme: dark) { .curve { stroke: #7db4ff; fill: #7db4ff; } }",
            ".axis { stroke: #767676; } .charts text { font: 10px system-ui, sans-serif; fill: currentColor; }",
            ".seeds label { display: inline-block; padding: .3rem .6rem .3rem .2rem; font-size: .85rem; }",
            *rules,
        ]
    )


def chart(series: Sequence[tuple[str, xr.DataArray]], along: str, seeds: Sequence[int], shows: str) -> str:
    """Buttons that select a seed, and one panel per (name, values over (seed, `along`)).

    Args:
        series: At most `PANELS` are drawn.
        along: Name of the dimension along which a run is recorded.
        seeds: Labels of the seeds; the first `SEEDS` are drawn.
        shows: What the values are, for the vertical axis.
    """
    shown = list(seeds)[:SEEDS]
    buttons = '<input type="radio" name="seed" id="seed-all" checked="checked"/><label for="seed-all">all seeds</label>'
    buttons += "".join(
        f'<input type="radio" name="seed" id="seed-{i}"/><label for="seed-{i}">{_text(seed)}</label>'
        for i, seed in enumerate(shown)
    )
    panels = "".join(_panel(name, values, along, shown, shows) for name, values in series[:PANELS])
    return f'<div class="seeds">{buttons}<div class="charts">{panels}</div></div>'


def _panel(name: str, values: xr.DataArray, along: str, seeds: Sequence[int], shows: str) -> str:
    labels = values[along].values.astype(float)
    keep = np.unique(np.linspace(0, len(labels) - 1, min(LABELS, len(labels))).round().astype(int))
    numbers = np.asarray(values.transpose("seed", along).values, float)[: len(seeds)][:, keep]
    labels = labels[keep]
    real = numbers[np.isfinite(numbers)]
    logarithmic = bool(real.size) and real.min() > 0 and real.max() > 20 * real.min()
    scaled = np.log10(np.where(numbers > 0, numbers, np.nan)) if logarithmic else numbers
    finite = scaled[np.isfinite(scaled)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    x = _placed(labels, float(labels.min()), float(labels.max()), _LEFT, _WIDTH - 8)
    y = _placed(scaled, low, high, _HEIGHT - _BOTTOM, _TOP)
    curves = "".join(_curve(i, seed, labels, numbers[i], x, y[i], along, shows) for i, seed in enumerate(seeds))
    ends = [f"{10**v if logarithmic else v:.2g}" for v in (low, high)]
    words = [
        (4, _TOP + 4, ends[1]),
        (4, _HEIGHT - _BOTTOM, ends[0]),
        (_LEFT, _HEIGHT - _BOTTOM + 14, f"{labels.min():g}"),
        (_WIDTH - 30, _HEIGHT - _BOTTOM + 14, f"{labels.max():g}"),
        (_WIDTH // 2 - 20, _HEIGHT - _BOTTOM + 14, along),
        (_LEFT, 10, f"{name or shows}{' (log scale)' if logarithmic else ''}"),
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(f"{shows} of each seed {name}")}">'
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}"/>'
        + "".join(f'<text x="{a}" y="{b}">{_text(word)}</text>' for a, b, word in words)
        + curves
        + "</svg>"
    )


def _curve(
    place: int, seed: int, labels: NDArray, numbers: NDArray, x: NDArray, y: NDArray, along: str, shows: str
) -> str:
    there = np.isfinite(y)
    told = f"seed {seed}, {along}"
    points = [
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4">'
        f"<title>{_text(f'{told} {label:g}: {shows} {number:.4g}')}</title></circle>"
        for a, b, label, number in zip(x[there], y[there], labels[there], numbers[there], strict=True)
    ]
    line = "".join(
        f"{'M' if i == 0 or not there[i - 1] else 'L'}{x[i]:.1f} {y[i]:.1f}" for i in range(len(x)) if there[i]
    )
    return f'<g class="curve s{place}"><path d="{line}"/>{"".join(points)}</g>' if line else ""


def _placed(values: NDArray, low: float, high: float, first: int, last: int) -> NDArray:
    span = high - low
    share = (values - low) / span if span > 0 and math.isfinite(span) else np.where(np.isfinite(values), 0.5, np.nan)
    return np.asarray(first + share * (last - first), float)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
