"""Checks each lemma, theorem and corollary of Tian (2020) and Tian et al. (2019) on an archive.

A claim has a hypothesis and a conclusion.  A verdict is one of

- ``holds``, ``fails``: the hypothesis is met, and the conclusion does or does not hold;
- ``unmet``: the hypothesis is not met, so nothing is tested; also for other losses, if a claim is about the squared
  error, and for a single teacher node, if a claim distinguishes several;
- ``unrecorded``: the archive lacks what is needed; `used` names it;
- ``reported``: an approximation, whose error is the margin and which no bound judges.

The margin is conclusion over bound: at most 1 where it holds.  Measured at the last epoch unless a claim says so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from tsdyn.analysis.claims import Claim, Finding
from tsdyn.analysis.identity import begun, per_point, points, refuse_odd
from tsdyn.analysis.members import PARAMETERS, Member, each
from tsdyn.analysis.theorems import CLAIMS

from tsdyn.archive.selecting import experiment_of
from tsdyn.schema import path_of

VERDICTS = ("holds", "fails", "unmet", "unrecorded", "reported")


def _needed(claim: Claim) -> list[str]:
    """Variables that are read for a claim."""
    return list({*claim.needs, "teacher_weight", "teacher_bias"}) if claim.needs else []


def _of_members(archive: xr.Dataset, squared: xr.DataArray) -> dict[str, Finding]:
    """What is found of the claims that need the networks themselves, all in one visit of each member.

    The theory is about fully connected networks, so points with convolutions, BatchNorm or modules of the user's own do
    not meet its hypotheses.
    """
    measures = {
        claim.name: claim.of_member
        for claim in CLAIMS
        if claim.of_member is not None
        and not set(_needed(claim)) - set(archive)
        and bool(squared.any() or not claim.squared)
    }
    if not measures:
        return {}

    def measured(member: Member) -> list[float]:
        return [number for measure in measures.values() for number in measure(member)]

    # loaded first: a dask graph for each member and variable costs more than the checks
    now = archive[list(PARAMETERS)].isel({path_of(archive): -1}).load()
    pairs = {name: (f"{name}: met", f"{name}: margin") for name in measures}
    plain = lambda point: not point.deep and not point.of_own_modules  # noqa: E731
    found = each(now, measured, [name for pair in pairs.values() for name in pair], of=plain)
    return {name: Finding(found[met] == 1, found[margin]) for name, (met, margin) in pairs.items()}


class _Result(NamedTuple):
    """What `audit` says of one claim: over members, and in words."""

    verdict: xr.DataArray
    margin: xr.DataArray
    reason: xr.DataArray
    used: str


class _Audited:
    """An archive, and what every claim needs to know of it."""

    def __init__(self, archive: xr.Dataset) -> None:
        self._archive, self._shape = archive, archive["death_epoch"]
        self._alive = (self._shape < 0) & begun(archive)
        self._experiment = None if "recording" in archive.attrs else experiment_of(archive)
        losses: set[str] = set()
        self._squared = xr.DataArray(True)
        if self._experiment is not None:
            losses = {point.training.loss for _, point in points(archive).values()}
            self._squared = per_point(archive, lambda point: point.training.loss == "mse")
        self._others = ", ".join(map(repr, sorted(losses - {"mse"})))
        trained = self._experiment is not None and self._experiment.kind == "training"
        self._of_members = _of_members(archive, self._squared) if trained else {}

    def result(self, claim: Claim) -> _Result:
        """Verdict, margin and reason of one claim."""
        needed = _needed(claim)
        missing = sorted(name for name in needed if name not in self._archive)
        margin, verdict = xr.full_like(self._shape, np.nan, dtype=float), xr.full_like(self._shape, "", dtype="U10")
        fits = self._squared if claim.squared else xr.ones_like(self._squared)
        other = "" if bool(fits.all()) else f"of the squared error, not of training.loss = {self._others}; "
        used, kind = f"{other}{claim.says}", None if self._experiment is None else self._experiment.kind
        if kind is None and not claim.recorded:
            verdict[...] = "unmet"
            used = f"of networks and samples that can be made again, and this is a recording; {claim.says}"
        elif kind not in (None, "training"):
            verdict[...] = "unmet"
            used = f"of students trained on samples, and this is kind = {kind!r}; {claim.says}"
        elif (claim.check is None and claim.of_member is None) or not bool(fits.any()):
            verdict[...] = "unmet"
        elif missing:  # recording them would not help members that cannot meet the hypothesis
            barred = self._barred(claim).broadcast_like(self._shape).transpose(*self._shape.dims) != ""
            verdict[...] = np.where(barred, "unmet", "unrecorded")
            used = used if bool(barred.all()) else f"record.observables lacks {', '.join(missing)}; {used}"
        else:
            if claim.check is None:
                found = self._of_members[claim.name]
            else:
                found = claim.check(self._archive[needed], self._experiment)
            dims = self._shape.dims
            met = (found.met & self._alive & fits).transpose(*dims).load()
            margin = found.margin.broadcast_like(met).transpose(*dims).load().where(met)
            word = np.where(margin <= 1, "holds", "fails") if claim.judged else "reported"
            verdict = met.copy(data=np.where(met & margin.notnull(), word, "unmet"))
        return _Result(verdict, margin, self._reason(claim).where(verdict == "unmet", ""), used)

    def _reason(self, claim: Claim) -> xr.DataArray:
        """Why no member can meet the hypothesis, as far as the experiment's keys say."""
        dead = self._barred(claim).where(self._alive, "the student died, or was not trained")
        return dead.broadcast_like(self._shape).transpose(*self._shape.dims)

    def _barred(self, claim: Claim) -> xr.DataArray:
        """Why no member of a point can meet the hypothesis, whatever is recorded; empty if one can."""
        if self._experiment is None:
            return xr.DataArray("" if claim.recorded else "it is a recording")
        return per_point(self._archive, claim.barred)


def audit(archive: xr.Dataset) -> xr.Dataset:
    """Every claim's verdict and margin on a run or a sweep.

    Of a recording (`tsdyn.Recorder`), from which networks and samples cannot be made again, claims about recorded
    numbers alone are judged, and the others are unmet.

    Args:
        archive: As `tsdyn.open` gives it.

    Returns:
        Dataset of ``verdict`` (a word of `VERDICTS`), ``margin`` and ``reason`` over (claim, swept..., seed), and of
        ``source`` and ``used`` over claim.  A reason is what the experiment's keys or the student's death say against
        the hypothesis; it is empty where numbers decided.  Loaded into memory: one epoch of a few variables.

    Raises:
        ValueError: if labels repeat, the slice lacks ``epoch`` or ``layer``, or it cannot be known whose the numbers
            are (`tsdyn.analysis.identity.points`).

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis.audit import audit
        >>> found = audit(tsdyn.open("runs/quickstart").isel(overrealization=0, seed=[0]))
        >>> sorted(found)
        ['margin', 'reason', 'source', 'used', 'verdict']
    """
    refuse_odd(archive, "audit")
    lost = [dim for dim in (path_of(archive), "layer") if dim not in archive.dims]
    if lost:
        raise ValueError(f"audit: the slice has no dimension {', '.join(lost)}; select with a list or slice")
    if "death_epoch" not in archive.coords:
        raise ValueError("audit: the Dataset has no death_epoch, so that the dead cannot be left out; is it tsdyn's?")
    audited = _Audited(archive)
    results = [audited.result(claim) for claim in CLAIMS]
    names = xr.DataArray([claim.name for claim in CLAIMS], dims="claim", name="claim")

    def stacked(arrays: list[xr.DataArray]) -> xr.DataArray:
        plain = [array.drop_vars(set(array.coords) - set(array.dims)) for array in arrays]
        joined = xr.concat(plain, dim=names, coords="minimal", compat="override", join="exact", combine_attrs="drop")
        return joined.transpose("claim", ...)

    margins = stacked([one.margin for one in results])
    reasons = stacked([one.reason for one in results])
    return xr.Dataset(
        {
            "verdict": stacked([one.verdict for one in results]),
            "margin": margins.assign_attrs(units="1", long_name="conclusion over bound"),
            "reason": reasons.assign_attrs(long_name="why a hypothesis is unmet, as far as the keys say"),
            "source": ("claim", [claim.source for claim in CLAIMS]),
            "used": ("claim", [one.used for one in results]),
        }
    )
