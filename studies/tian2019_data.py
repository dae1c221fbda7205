"""Tian et al. (2019), Figures 9b and 23: ρ̄ of each layer against epochs, finite against infinite data.

Students see the same samples again and again, or new ones at every step; with and without BatchNorm, fully connected
and ConvNet.  An epoch is as many steps either way.  At desk scale, 2,000 samples, infinite data are ahead in the end
everywhere, most of all in the ConvNet with BatchNorm: there ρ̄ ends at 0.61, 0.43, 0.35, 0.31 on finite and 0.93, 0.91,
0.80, 0.67 on infinite data, while the evaluation error of the former rises from the seventh epoch on.  Fully connected
students end at 1.00, 0.88, 0.71, 0.73 and 1.00, 0.95, 0.81, 0.75, with BatchNorm at 0.99, 0.95, 0.81, 0.78 and 1.00,
0.98, 0.89, 0.85; without BatchNorm the ConvNet is far from done on either, at 0.69, 0.40, 0.35, 0.29 and 0.78, 0.44,
0.38, 0.30.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation with finite and infinite data, with and without BatchNorm, fully connected and ConvNet"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 9b and 23"


def _sweep(
    connected: list[int],
    channels: int,
    samples: int,
    steps: tuple[int, int],
    rates: tuple[float, float] = (0.004, 0.004),
) -> dict[str, Any]:
    """Both kinds of network on `samples` and on fresh samples, with `steps` per epoch and `rates` for each kind."""
    rest = [
        {"training.steps_per_epoch": step, "training.learning_rate": rate}
        for step, rate in zip(steps, rates, strict=True)
    ]
    kinds = deep_layers.networks(connected, channels)
    return {
        "student.batch_norm": ["none", "after"],
        "data.train": [samples, "fresh"],
        "points": [kind | more for kind, more in zip(kinds, rest, strict=True)],
    }


_PAPER = MULTILAYER.replace(
    {
        "name": "data-paper",
        "seeds": 5,
        "student.overrealization": 10.0,
        "data.eval": 1024,
        "training.epochs": 40,
        "sweep": _sweep([50, 75, 100, 125], 64, 50_000, (781, 781), (0.004, 0.0004)),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "data-smoke", "seeds": 2, "student.overrealization": 2.0, "data.eval": 100, "training.epochs": 1}
        | {"sweep": _sweep([4, 5, 6, 7], 2, 100, (4, 2)) | {"student.batch_norm": ["after"]}}
    ),
    # the small fully connected teacher, 6 channels instead of 64, 2x instead of 10x, fewer samples and steps
    "desk": _PAPER.replace(
        {"name": "data-desk", "seeds": 2, "student.overrealization": 2.0, "training.epochs": 20}
        | {"sweep": _sweep([10, 15, 20, 25], 6, 2000, (300, 75))}
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄ of each layer and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: columns finite and infinite data of both kinds of network, rows ρ̄ and the loss, BatchNorm below."""
    says = "Finite against infinite data: ρ̄ of each hidden layer and evaluation loss over training"
    return deep_layers.draw(
        deep_layers.by_network(measured), PANELS, says=says, across=("point", "train"), paper=EXPERIMENTS
    )
