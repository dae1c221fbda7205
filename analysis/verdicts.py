"""An audit as lines of text: what holds, what fails, whose hypothesis is unmet and why, and what to record."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
import xarray as xr
from tsdyn.analysis.audit import VERDICTS

#: Why a claim's hypothesis is most often not met, in a few words; it is not looked up in the run that is audited.
UNMET: Mapping[str, str] = {
    "Equation 1": "the loss is another, or of BatchNorm",
    "Lemma 1": "σ is not piecewise linear",
    "Assumption 1": "there is a single teacher node",
    "Theorem 1": "gradients are too large",
    "Theorem 2": "gradients are large or all match",
    "Corollary 1": "gradients are large or all match",
    "Theorem 3": "gradients are too large",
    "Theorem 4": "of gradients, or augment not aware",
    "Theorem 5": "of two layers or large gradients",
    "strong teachers first": "none are recovered, or all at once",
    "update L*W*H* − LWH": "σ is not piecewise linear",
    "BatchNorm keeps ‖w‖": "there is no BatchNorm",
    "BatchNorm's gradient": "it is of one batch",
    "projected dynamics": "it is of averaged dynamics",
    "two-layer dynamics": "it is of averaged dynamics",
}


#: How `used` begins where the reason is known, and the reason in a few words.
_KNOWN: Mapping[str, str] = {
    "of the squared error": "it has another loss",
    "of students trained on": "nothing trains on samples",
    "of networks and samples that": "it is a recording",
}


def lines(found: xr.Dataset) -> list[str]:
    """An audit as text of at most 80 columns: a line per claim, then what each says and what margins mean.

    Why a hypothesis is unmet is the usual reason of that claim, and not diagnosed.

    Args:
        found: From `audit`.
    """
    first = 23  # a longer name pushes its own line
    told = [f"{'claim':{first}}members      result"]
    for claim in found["claim"].values.tolist():
        row = found.sel(claim=claim)
        words, counts = np.unique(row["verdict"].values, return_counts=True)
        tally = dict(zip(words.tolist(), counts.tolist(), strict=True))
        for word in (w for w in VERDICTS if w in tally):
            head = f"{claim:{first - 1}} {f'{tally[word]} {word}':13}"
            told += textwrap.wrap(head + _result(claim, word, row), 80, subsequent_indent=" " * len(head)) or [head]
    told += ["", "because: the usual reason of that claim, which is not looked up in the run."]
    told += ["margin: conclusion over bound, at most 1 where it holds.  What is checked:"]
    for claim in found["claim"].values.tolist():
        text = f"{claim} ({found['source'].sel(claim=claim).item()}): {found['used'].sel(claim=claim).item()}"
        told += textwrap.wrap(text, 80, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
    return told


def _result(claim: str, word: str, row: xr.Dataset) -> str:
    """What a line says of the members with one verdict."""
    margins = row["margin"].values[(row["verdict"].values == word) & np.isfinite(row["margin"].values)]
    largest = f"largest margin {margins.max():.2g}" if margins.size else ""
    match word:
        case "holds" | "fails" | "reported":
            return largest
        case "unmet":
            used = str(row["used"].item())
            known = (because for begin, because in _KNOWN.items() if used.startswith(begin))
            return f"because {next(known, UNMET.get(claim, 'of what is said below'))}"
        case "unrecorded":
            return f"record {str(row['used'].item()).partition(';')[0].partition('lacks ')[2]}"
        case _:
            raise ValueError(f"lines: {word!r} is no verdict; there are {', '.join(VERDICTS)}")
