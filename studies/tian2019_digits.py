"""After Tian et al. (2019), Figure 8, on scikit-learn's digits in place of CIFAR-10: ρ̄ and r̄ of each layer by epoch.

Teachers trained on the labels of each seed's own digits, fully connected and a ConvNet (padded, for four 3 x 3
convolutions do not fit in 8 x 8 pixels), and students of four times their width with and without BatchNorm.

At desk scale winners are lucky as in the paper: they start at a mean rank of 0.02 to 0.43, least in the lowest layer,
and lead soon, with BatchNorm after four epochs.  BatchNorm is ahead at the start only: ρ̄ ends without it at 0.79,
0.83, 0.86, 0.90 against 0.72, 0.78, 0.76, 0.82 fully connected, and at 0.68, 0.64, 0.66, 0.57 against 0.67, 0.58, 0.47,
0.41 of the ConvNet's channels; accuracies are 0.86 against 0.90, and 0.97 both.  At four times the rate and more some
students without BatchNorm stay at chance.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_cifar10 import PANELS, PAPER, draw, points

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation and ranks on digits, teachers trained on labels, with and without BatchNorm"
SOURCE = "after Tian et al. 2019 (arXiv:1905.13405), Figure 8, which is of CIFAR-10"

_DESK = PAPER.replace(
    {"name": "luck-digits-desk", "seeds": 3, "student.overrealization": 4.0}
    | {"teacher.padding": 1, "teacher.train_epochs": 20}
    | {"data": {"law": "digits", "train": 1200, "eval": 597}}
    | {"training.batch": 32, "training.epochs": 40, "record.every": 4}
    | {"sweep": points(64, [10, 15, 20, 25], [6, 8, 8, 8], (0.001, 0.0003))}
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _DESK.replace(
        {"name": "luck-digits-smoke", "seeds": 2, "student.overrealization": 2.0, "teacher.train_epochs": 1}
        | {"data.train": 320, "data.eval": 200, "training.epochs": 2, "record.every": 1}
        | {"sweep": points(64, [4, 5, 6, 7], [2] * 4, (0.001, 0.0003))}
    ),
    "desk": _DESK,
    # digits are 1797 at every scale: more seeds, wider students, twelve times as long
    "paper": _DESK.replace(
        {"name": "luck-digits-paper", "seeds": 5, "student.overrealization": 10.0, "training.epochs": 500}
        | {"record.every": 10}
    ),
}
