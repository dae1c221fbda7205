"""What the audit checks: claims with a hypothesis and a conclusion, and what is found of one on an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr


@dataclass(frozen=True)
class Finding:
    """The check of one claim on one archive: arrays over what is left of (swept..., seed).

    Attributes:
        met: Whether the hypothesis is met.
        margin: Conclusion over bound; NaN where not computed.
    """

    met: xr.DataArray
    margin: xr.DataArray


@dataclass(frozen=True)
class Claim:
    """A statement of a paper.

    Attributes:
        name: Short name.
        source: Paper and number.
        says: Hypothesis ⇒ conclusion, in one line, as it is checked.
        needs: Variables of the archive that the check reads.
        check: From those variables of the archive and its experiment; None where no run of tsdyn meets the hypothesis.
        judged: Whether a margin above 1 counts as failure.
        recorded: Whether recorded numbers alone judge it, without the experiment that made them.
        squared: Whether it is about the squared error, so that no run with another loss meets its hypothesis.
    """

    name: str
    source: str
    says: str
    needs: tuple[str, ...] = ()
    check: Callable[[xr.Dataset, Any], Finding] | None = None
    judged: bool = True
    squared: bool = False
    recorded: bool = False
