"""Tian (2020), Figure 5: the L-shape of fan-out norm against best correlation.

Students either specialize (correlation near 1) or fall silent (fan-out norm near 0); 10 teacher nodes,
over-realization 1, 2, 5, 10 and polarity 0, 1, 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.analysis.figures import draw_l_shape as draw
from tsdyn.analysis.figures import measure_l_shape as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "L-shape: fan-out norm against best correlation"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 5"

_GRID = {"student.overrealization": [1, 2, 5, 10], "teacher.polarity": [0.0, 1.0, 2.0]}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        {"name": "l-shape-smoke", "sweep": {"student.overrealization": [1, 5], "teacher.polarity": [1.0]}}
    ),
    # d = 100 as in the paper; 4 seeds and 25 epochs instead of 32 and 100
    "desk": PAPER.replace(
        {"name": "l-shape-desk", "seeds": 4, "training.epochs": 25, "record.every": 5, "sweep": _GRID}
    ),
    "paper": PAPER.replace({"name": "l-shape-paper", "record.every": 5, "sweep": _GRID}),
}
