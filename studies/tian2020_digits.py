"""After Tian (2020), Figure 10, on scikit-learn's digits in place of CIFAR-10: ρ̄ of each layer and accuracy by epoch.

A ConvNet is trained on the labels of each seed's own digits, its weakest three tenths of channels are pruned, and
students of 1, 2 and 4 times what is left learn its outputs.  At desk scale more over-realization is more
specialization: ρ̄ of the three convolutions ends at 0.67, 0.66, 0.70 at 1x, 0.77, 0.71, 0.76 at 2x and 0.80, 0.76, 0.78
at 4x, evaluation mse at 0.90, 0.58, 0.44, and accuracy at 0.965 to 0.968 whatever the width.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2020_cifar10 import PANELS, PAPER, draw

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation of each layer and accuracy on digits, pruned ConvNet teacher"
SOURCE = "after Tian 2020 (PMLR 119:9470), Figure 10, which is of CIFAR-10"

_DESK = PAPER.replace(
    {"name": "digits-desk", "teacher.widths": [64, 16, 24, 32, 10], "teacher.prune": [0.3, 0.3, 0.3]}
    | {"data": {"law": "digits", "train": 1200, "eval": 597}}
    | {"training.learning_rate": {0: 0.002, 25: 0.0005}, "training.epochs": 40}
    | {"sweep": {"student.overrealization": [1.0, 2.0, 4.0]}}
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _DESK.replace(
        {"name": "digits-smoke", "seeds": 2, "teacher.train_epochs": 2, "teacher.finetune_epochs": 1}
        | {"training.epochs": 2, "record.every": 1, "sweep": {"student.overrealization": [1.0, 2.0]}}
    ),
    "desk": _DESK,
    # digits are 1797 at every scale: more seeds, and twelve times as long
    "paper": _DESK.replace(
        {"name": "digits-paper", "seeds": 16, "training.epochs": 500, "record.every": 10}
        | {"training.learning_rate": {0: 0.002, 300: 0.0005}}
    ),
}
