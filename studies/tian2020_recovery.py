"""Tian (2020), Figure 8: best correlation of each teacher node over training, at 5x over-realization.

Strong teacher nodes are learned first, weak ones later or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.analysis.figures import draw_recovery as draw
from tsdyn.analysis.figures import measure_recovery as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "best correlation of each teacher node over training"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 8"

_PAPER = PAPER.replace(
    {
        "name": "recovery-paper",
        "teacher.widths": [100, 20, 50],
        "sweep": {"teacher.polarity": [0.5, 1.0, 1.5, 2.0, 2.5]},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace({"name": "recovery-smoke", "sweep": {"teacher.polarity": [0.5, 1.5]}}),
    # 4 seeds and 30 epochs instead of 32 and 100
    "desk": _PAPER.replace(
        {
            "name": "recovery-desk",
            "seeds": 4,
            "training.epochs": 30,
            "sweep": {"teacher.polarity": [0.5, 1.5, 2.5]},
        }
    ),
    "paper": _PAPER,
}
