"""An audit as lines of text: what holds, what fails, whose hypothesis is unmet and why, and what to record."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
import xarray as xr
from tsdyn.analysis.audit import VERDICTS

from tsdyn.vocabulary import DU, LUCK, TIAN

#: A claim's hypothesis in a few words: what was not met where no key of the experiment rules it out.
NEEDS: Mapping[str, str] = {
    "Equation 1": "a fully connected student",
    "Lemma 1": "a piecewise linear σ",
    "Assumption 1": "several teacher nodes",
    "Assumption 2": "a fully connected student",
    "Assumption 3": "a fully connected student",
    "Theorem 1": "tiny g; an observed teacher node",
    "Theorem 2": "tiny g; observed unmatched nodes",
    "Corollary 1": "tiny g; unmatched nodes all observed",
    "Theorem 3": "g below bound at an observed node",
    "Theorem 4": "g below bound at an observed node",
    "Theorem 5": "g below bound at an observed node",
    "strong teachers first": "recoveries at different epochs",
    "update L*W*H* − LWH": "a piecewise linear σ",
    "E[β f'f'] = E[β] ∘ E[f'f']": "a student with an active node",
    "weak overlaps": "two teacher nodes that are active",
    "BatchNorm keeps ‖w‖": "norms at first and last epoch",
    "balance of each node": "plain SGD between two records",
    "BatchNorm's gradient": "one batch, not a run",
    "projected dynamics": "averaged dynamics, not a run's",
    "two-layer dynamics": "averaged dynamics, not a run's",
}
#: Papers in the list of what is checked, and how it names them.
_SHORT: Mapping[str, str] = {TIAN: "T20", LUCK: "T19", DU: "D18"}


#: How `used` begins where the reason is known, and the reason in a few words.
_KNOWN: Mapping[str, str] = {
    "of the squared error": "it has another loss",
    "of students trained on": "nothing trains on samples",
    "of networks and samples that": "it is a recording",
}


def lines(found: xr.Dataset) -> list[str]:
    """An audit as text of at most 80 columns: a line per claim and result, then what each checks.

    Args:
        found: From `audit`.
    """
    first = 23  # a longer name pushes its own line
    told = [f"{'claim':{first}}members        result"]
    for claim in found["claim"].values.tolist():
        row = found.sel(claim=claim)
        for word in VERDICTS:
            for result, count in _results(claim, word, row).items():
                head = f"{claim:{first - 1}} {f'{count} {word}':14} "
                told += textwrap.wrap(head + result, 80, subsequent_indent=" " * len(head)) or [head]
    told += ["", *textwrap.wrap(_LEGEND, 80), *(f"{short}: {paper}" for paper, short in _SHORT.items())]
    for claim in found["claim"].values.tolist():
        source, used = found["source"].sel(claim=claim).item(), found["used"].sel(claim=claim).item()
        for paper, short in _SHORT.items():
            source = source.replace(paper, short)
        told += textwrap.wrap(
            f"{claim} ({source}): {used}", 80, initial_indent="- ", subsequent_indent="  ", break_long_words=False
        )
    return told


_LEGEND = (
    "because: looked up in the experiment's keys.  needs: the hypothesis, which the numbers of the run do not meet; "
    "which part of it they miss is not looked up.  margin: conclusion over bound, at most 1 where it holds.  g: the "
    "gradient at a node.  What is checked:"
)


def _results(claim: str, word: str, row: xr.Dataset) -> dict[str, int]:
    """What the lines of a claim say of the members with one verdict, and of how many each."""
    chosen = row["verdict"].values == word
    count = int(chosen.sum())
    if not count:
        return {}
    margins = row["margin"].values[chosen & np.isfinite(row["margin"].values)]
    match word:
        case "holds" | "fails" | "reported":
            return {f"largest margin {margins.max():.2g}" if margins.size else "": count}
        case "unmet":
            reasons, counts = np.unique(row["reason"].values[chosen].astype(str), return_counts=True)
            words = [f"because {why}" if why else f"needs {NEEDS[claim]}" for why in reasons.tolist()]
            return dict(zip(words, counts.tolist(), strict=True))
        case "unrecorded":
            return {f"record {str(row['used'].item()).partition(';')[0].partition('lacks ')[2]}": count}
        case _:
            raise ValueError(f"lines: {word!r} is no verdict; there are {', '.join(VERDICTS)}")
