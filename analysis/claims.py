"""What the audit checks: claims with a hypothesis and a conclusion, and what is found of one on an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr
from tsdyn.analysis.members import Member

from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.activations import activation

#: Why an experiment cannot meet a hypothesis, whatever its members do; empty if it can.
Bar = Callable[[Experiment], str]


def no_samples(experiment: Experiment) -> str:
    """Of claims about students that are trained on samples."""
    return "" if experiment.kind == "training" else f"kind = {experiment.kind!r} trains on no samples"


def another_loss(experiment: Experiment) -> str:
    """Of claims about the squared error."""
    loss = experiment.training.loss
    return "" if loss == "mse" else f"the loss is {loss.replace('_', ' ')}"


def one_teacher_node(experiment: Experiment) -> str:
    """Of claims that distinguish several teacher nodes."""
    return "the teacher has a single node" if experiment.teacher_widths[1] == 1 else ""


def not_plain(experiment: Experiment) -> str:
    """Of claims that are checked on fully connected networks."""
    if experiment.of_own_modules:
        return "a network is a module of your own"
    return "there are convolutions or BatchNorm" if experiment.deep else ""


def not_two_layers(experiment: Experiment) -> str:
    """Of claims about two-layer students."""
    depth = experiment.layout.depth
    return "" if depth == 2 else f"the student has {depth} layers, not two"


def two_layers(experiment: Experiment) -> str:
    """Of claims about deeper students."""
    return "the student has two layers" if experiment.layout.depth == 2 else ""


def not_aware(experiment: Experiment) -> str:
    """Of claims about the teacher-aware augmentation."""
    augment = experiment.data.augment
    return "" if augment == "aware" else f"data.augment is {augment!r}"


def no_batch_norm(experiment: Experiment) -> str:
    """Of claims about BatchNorm."""
    return "the student has no BatchNorm" if experiment.student.batch_norm == "none" else ""


def smooth(experiment: Experiment) -> str:
    """Of claims about σ(z) = σ'(z) z."""
    name = experiment.student.activation
    return "" if activation(name).piecewise_linear else f"σ = {name} is not piecewise linear"


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
        recorded: Whether recorded numbers alone judge it, without the experiment that made them.
        squared: Whether it is about the squared error, so that no run with another loss meets its hypothesis.
        bars: What in an experiment rules its hypothesis out.
    """

    name: str
    source: str
    says: str
    needs: tuple[str, ...] = ()
    check: Callable[[xr.Dataset, Any], Finding] | None = None
    judged: bool = True
    squared: bool = False
    of_member: Callable[[Member], tuple[float, float]] | None = None
    bars: tuple[Bar, ...] = ()

    def barred(self, experiment: Experiment) -> str:
        """Why no member of `experiment` meets the hypothesis, as its keys say; empty if they do not say it."""
        found = (bar(experiment) for bar in (no_samples, *((another_loss,) if self.squared else ()), *self.bars))
        return next((why for why in found if why), "")

    recorded: bool = False
