"""Tian (2020), Figure 7: which of 20 teacher nodes are recovered, by index.

The stronger a teacher node (small index, since node j's fan-out is divided by j^p) the sooner it is recovered;
over-realization helps the weak ones.  Epoch 5 dotted, the last solid.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.analysis.figures import draw_success_rate as draw
from tsdyn.analysis.figures import measure_success_rate as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "success rate of recovery by teacher node"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 7"

_PAPER = PAPER.replace(
    {
        "name": "success-rate-paper",
        "teacher.widths": [100, 20, 50],
        "record.every": 5,
        "sweep": {"teacher.polarity": [0.5, 1.0, 1.5, 2.0, 2.5], "student.overrealization": [1, 2, 5, 10]},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        {
            "name": "success-rate-smoke",
            "sweep": {"teacher.polarity": [0.5, 1.5], "student.overrealization": [1, 2]},
        }
    ),
    # 8 seeds and 20 epochs instead of 32 and 100, three polarities and over-realizations
    "desk": _PAPER.replace(
        {
            "name": "success-rate-desk",
            "seeds": 8,
            "training.epochs": 20,
            "sweep": {"teacher.polarity": [0.5, 1.5, 2.5], "student.overrealization": [1, 2, 5]},
        }
    ),
    "paper": _PAPER,
}
