"""What the audit checks: claims with a hypothesis and a conclusion, and what is found of one on an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from tsdyn.analysis.members import Member

from tsdyn.experiment.experiment import Experiment


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
        check: From those variables of the archive and its experiment.
        of_member: Instead, from the networks of one member at the last epoch: 1 if the hypothesis is met, the margin.
            Neither is given where no run of tsdyn meets the hypothesis.
        judged: Whether a margin above 1 counts as failure.
        squared: Whether it is about the squared error, so that no run with another loss meets its hypothesis.
    """

    name: str
    source: str
    says: str
    needs: tuple[str, ...] = ()
    check: Callable[[xr.Dataset, Experiment], Finding] | None = None
    judged: bool = True
    squared: bool = False
    of_member: Callable[[Member], tuple[float, float]] | None = None
