"""Tian et al. (2019), Figure 8 and the right halves of Figures 17-21: ρ̄ and r̄ of each layer on CIFAR-10.

As `tian2019_luck`, with teachers trained on labels: fully connected 50-75-100-125 and a ConvNet of 4 x 64 channels,
students of ten times their width with and without BatchNorm.  Needs CIFAR-10's binary version, which is not downloaded:
the folder ``cifar-10-batches-bin`` is looked for in the current one; another place is named by

    tsdyn study run tian2019-cifar10 --set 'data.path="/where/cifar-10-batches-bin"'

No results are given here, since they need these files; desk scale was timed, and its rates chosen, on
other photographs in the same format (3 minutes of one core); the rate of the ConvNet at paper scale is smaller for its
wider layers and untried.  `tian2019_digits` is the same study on data that are always there.

The paper's teachers (55 % and 86 % accuracy) are not public.  Here each seed trains its own, without augmentation or
BatchNorm, and at every point of the sweep anew: at paper scale for hours of a core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "PAPER", "SOURCE", "TITLE", "draw", "measure", "points"]

TITLE = "mean best correlation and ranks on CIFAR-10, teachers trained on labels, with and without BatchNorm"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 8 and 17-21"


def points(inputs: int, connected: list[int], channels: list[int], rates: tuple[float, float]) -> dict[str, Any]:
    """The sweep: fully connected and ConvNet, each with a rate of its own, with and without BatchNorm."""
    kinds = [(False, connected, rates[0]), (True, channels, rates[1])]
    return {
        "student.batch_norm": ["none", "after"],
        "points": [
            {"teacher.convolution": c, "teacher.widths": [inputs, *hidden, 10], "training.learning_rate": rate}
            for c, hidden, rate in kinds
        ],
    }


PAPER = Experiment(
    name="luck-cifar10-paper",
    seeds=5,
    dtype="float32",
    teacher={
        "widths": [3072, 50, 75, 100, 125, 10],
        "init": "trained",
        "train_epochs": 30,
        "train_rate": 0.01,
    },
    student={"overrealization": 10.0, "init": "torch"},
    data={"law": "cifar10", "path": "cifar-10-batches-bin", "train": 50_000, "eval": 1024},
    training={"batch": 64, "epochs": 40},
    record={"observables": ["mse", "correlation", "label_accuracy"]},
    sweep=points(3072, [50, 75, 100, 125], [64] * 4, (0.0005, 0.0001)),
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": PAPER.replace(
        {"name": "luck-cifar10-smoke", "seeds": 2, "student.overrealization": 2.0, "training.epochs": 2}
        | {"teacher.train_epochs": 1, "data.train": 64, "data.eval": 32, "training.batch": 16}
        | {"sweep": points(3072, [4, 5, 6, 7], [2] * 4, (0.0005, 0.0003))}
    ),
    # a fifth of the nodes, a tenth of the channels, a twenty-fifth of the samples, 4x instead of 10x
    "desk": PAPER.replace(
        {"name": "luck-cifar10-desk", "seeds": 2, "student.overrealization": 4.0, "training.epochs": 12}
        | {"teacher.train_epochs": 10, "data.train": 2_000, "data.eval": 500, "record.every": 2}
        | {"sweep": points(3072, [10, 15, 20, 25], [6] * 4, (0.0005, 0.0003))}
    ),
    "paper": PAPER,
}


#: Panels by name: ρ̄, mean and median rank of each layer, loss and accuracy, over epochs.
PANELS = {
    name: deep_layers.panel(name)
    for name in ("mean_specialization", "mean_rank", "median_rank", "mse_eval", "label_accuracy")
}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per kind of network, without and with BatchNorm; rows ρ̄, both ranks, loss and accuracy."""
    says = f"ρ̄ and ranks of the final winners on {deep_layers.data_name(measured)}, teachers trained on labels"
    return deep_layers.draw(
        deep_layers.by_network(measured), PANELS, says=says, show=tuple(PANELS), across=("point", "batch_norm"),
        paper=EXPERIMENTS if measured.attrs["data"] == "cifar10" else None,
    )  # fmt: skip
