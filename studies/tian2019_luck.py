"""Tian et al. (2019), Figure 7: ρ̄ and r̄ of each layer against epochs, with and without BatchNorm, FC and ConvNet.

What the paper finds: ρ̄ rises from the lowest layer up, and the rank of the node that wins in the end falls from the
start on: winners are among those that were lucky at the start.  At desk scale, too: BatchNorm is ahead in every layer,
ρ̄ ends at 1.00, 0.95, 0.84, 0.81 with and 1.00, 0.94, 0.79, 0.79 without it, of the ConvNet's channels at 0.82, 0.82,
0.80, 0.66 and 0.83, 0.54, 0.50, 0.40 and still rising; winners start at a mean rank of 0.02 to 0.27.
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

TITLE = "mean best correlation and mean rank with and without BatchNorm, fully connected and ConvNet"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 7"


def _points(
    connected: list[int], channels: int, samples: tuple[int, int], rates: tuple[float, float] = (0.004, 0.0004)
) -> dict[str, Any]:
    """Both kinds of network, with and without BatchNorm.  Wide ConvNets sum over many pixels and need a small rate."""
    rest = [{"training.learning_rate": rate, "data.train": train} for rate, train in zip(rates, samples, strict=True)]
    return {
        "student.batch_norm": ["none", "after"],
        "points": [kind | more for kind, more in zip(deep_layers.networks(connected, channels), rest, strict=True)],
    }


_PAPER = MULTILAYER.replace(
    {
        "name": "luck-paper",
        "seeds": 5,
        "student.overrealization": 10.0,
        "data.eval": 1024,
        "training.epochs": 40,
        "sweep": _points([50, 75, 100, 125], 64, (100_000, 100_000)),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "luck-smoke", "seeds": 2, "student.overrealization": 2.0, "data.eval": 200, "training.epochs": 2}
        | {"sweep": _points([4, 5, 6, 7], 2, (400, 200))}
    ),
    # the small fully connected teacher, 6 channels instead of 64, 4x instead of 10x, fewer samples and epochs
    "desk": _PAPER.replace(
        {"name": "luck-desk", "seeds": 2, "student.overrealization": 4.0, "training.epochs": 15}
        | {"sweep": _points([10, 15, 20, 25], 6, (20_000, 6_000), (0.004, 0.004))}
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄, mean and median rank of each layer, and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mean_rank", "median_rank", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per kind of network, without and with BatchNorm; rows ρ̄, both ranks and the loss."""
    says = "Mean best correlation ρ̄, mean and median rank of the final winners of each layer, and evaluation loss"
    return deep_layers.draw(
        deep_layers.by_network(measured), PANELS, says=says, show=tuple(PANELS), across=("point", "batch_norm"),
        paper=EXPERIMENTS,
    )  # fmt: skip
