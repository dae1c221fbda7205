"""Tian et al. (2019), Figure 9a, small teacher: ρ̄ of each hidden layer and the loss against epochs.

The released multilayer experiment: lower layers specialize first and most, and the more nodes a student has for each
of its teacher's, the closer the best of them come.  At desk scale, 8 seeds, medians of ρ̄ of layers 1 to 4 end at 1.00,
0.90, 0.79, 0.73 (1x), 1.00, 1.00, 0.98, 0.93 (2x) and 1.00, 0.99, 0.91, 0.94 (10x), and the mse per output at 0.11,
0.021 and 0.014: from 2x to 10x it falls, and ρ̄ rises no more.  docs/reproduction.md has the released code's beside.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation of each layer by over-realization, teacher 10-15-20-25"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 9"

#: The released code minimises the mean over 100 outputs of the squared error with rate 0.2, from epoch 20 on 0.1:
#: 2/100 of the sum that this library minimises half of, so its rate is 0.004.
PAPER = Experiment(
    name="multilayer-paper",
    seeds=8,
    dtype="float32",
    teacher={
        "widths": [20, 10, 15, 20, 25, 100],
        "init": "separated",
        "unit_norm": "every-layer",
        "bias": "uniform",
        "balanced": True,
    },
    student={"overrealization": 1.0, "init": "torch"},
    data={"law": "gaussian", "std": 10.0, "train": 50_000, "eval": 10_240},
    training={"learning_rate": {0: 0.004, 20: 0.002}, "batch": 64, "epochs": 30},
    record={"observables": ["mse", "correlation"]},
    sweep={"student.overrealization": [1.0, 2.0, 10.0]},
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": PAPER.replace(
        {"name": "multilayer-smoke", "seeds": 2, "data.train": 1000, "data.eval": 500, "training.epochs": 3}
        | {"sweep": {"student.overrealization": [1.0, 2.0]}}
    ),
    # the whole experiment takes three minutes of one core, nearly all of it 10x
    "desk": PAPER.replace({"name": "multilayer-desk"}),
    "paper": PAPER.replace({"seeds": 32}),
}


#: Panels by name: ρ̄ of each layer and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with one column per over-realization: ρ̄ of each layer above the loss."""
    return drawn(measured, EXPERIMENTS)


def drawn(measured: xr.Dataset, experiments: Mapping[str, Experiment]) -> look.Page:
    """The figure of `draw`, of a study with these experiments."""
    says = "Mean best correlation ρ̄ of each hidden layer and evaluation loss over training, by over-realization"
    return deep_layers.draw(measured, PANELS, says=says, height=1.7, paper=experiments)
