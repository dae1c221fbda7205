"""Tian (2020), Figure 6: evaluation loss and ρ̄ of each hidden layer against the number of training samples N.

Students twice as wide as their teacher learn its outputs (squared error) or its classes, its largest outputs (cross
entropy).  All take as many steps, so that they differ in N alone and not in how long they were trained.  At desk scale,
teacher 10-15-20-25, more samples are less loss and more specialization, the lowest layer first: from 300 to 100,000
samples ρ̄ of the layers goes from 0.62, 0.51, 0.51, 0.47 to 1.00, 0.99, 0.95, 0.88 and the mse per output from 0.87 to
0.034 under squared error, and from 0.45, 0.39, 0.36, 0.31 to 1.00, 0.94, 0.68, 0.61 and the loss from 28 to 1.3 under
cross entropy, which teaches less of a teacher at every N.  From 30,000 samples on the squared error no longer falls
(0.031, 0.034), perhaps for want of steps; the rate of the cross entropy was chosen of two (0.1 and 0.3), that of the
squared error was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers, samples
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = (
    "evaluation loss and mean best correlation of each layer against training samples, squared error and cross entropy"
)
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 6"

#: Names of the two losses in the figure.
LOSSES = {"mse": "squared error", "cross_entropy": "cross entropy"}


def _sweep(train: Sequence[int], half: int) -> dict[str, Any]:
    """The sweep over both losses and N; rates, which differ between the losses, halve from epoch `half` on."""
    rates = {"mse": 0.004, "cross_entropy": 0.1}
    points = [
        {"training.loss": loss, "training.learning_rate": {0: rate, half: rate / 2}} for loss, rate in rates.items()
    ]
    return {"data.train": list(train), "points": points}


_PAPER = MULTILAYER.replace(
    {
        "name": "samples-paper",
        "seeds": 5,
        "teacher.widths": [20, 50, 75, 100, 125, 100],
        "student.overrealization": 2.0,
        "training.steps_per_epoch": 1000,
        "training.epochs": 100,
        "record.every": 10,
        "record.observables": ["loss", "correlation", "accuracy"],
        "sweep": _sweep([1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000], 60),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "samples-smoke", "seeds": 2, "teacher.widths": [20, 4, 5, 6, 7, 10], "data.eval": 200}
        | {"training.steps_per_epoch": 20, "training.epochs": 2, "record.every": 1, "sweep": _sweep([100, 1000], 1)}
    ),
    # the small teacher, a fifth of the steps
    "desk": _PAPER.replace(
        {"name": "samples-desk", "seeds": 4, "teacher.widths": [20, 10, 15, 20, 25, 100], "data.eval": 4000}
        | {"training.epochs": 20, "sweep": _sweep([300, 1000, 3000, 10_000, 30_000, 100_000], 13)}
    ),
    "paper": _PAPER,
}


def _of_loss(name: str) -> layout.Panel:
    against_samples = deep_layers.panel(name, along="train")

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        own = measured.isel(point=0) if "point" in measured.dims else measured
        if name == "loss_eval" and str(own["loss"].item()) == "mse":
            # the paper's MSE is per output, the library's loss half of the sum over them
            outputs = int(own.attrs["outputs"])
            per_output = (own["loss_eval"] * 2 / outputs).assign_attrs(own["loss_eval"].attrs)
            against_samples(own.assign(loss_eval=per_output), ax)
            ax.set_ylabel("evaluation mse per output")
        else:
            against_samples(own, ax)
            if name == "loss_eval":
                ax.set_ylabel("evaluation cross entropy")

    return drawn


#: Panels by name: final loss, accuracy and ρ̄ of each layer, against samples, of the first loss unless selected.
PANELS: dict[str, layout.Panel] = {name: _of_loss(name) for name in ("loss_eval", "mean_specialization", "accuracy")}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Loss, top-1 accuracy and the hidden layers' ``mean_specialization`` (swept..., seed, layer) at the last epoch."""
    return samples.measure(archive).assign_attrs(outputs=experiment_of(archive).teacher_widths[-1])


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with one row per loss: final value, ρ̄ of each hidden layer, and top-1 accuracy, against N."""
    kinds = [str(name) for name in measured["loss"].values]
    named = measured.assign_coords(point=kinds)
    titles = {"loss_eval": "loss", "mean_specialization": "correlation", "accuracy": "accuracy"}
    rows = [
        [layout.Cell(name, {"point": kind}, f"{LOSSES[kind]}: {titles[name]}") for name in PANELS] for kind in kinds
    ]
    says = f"Loss, correlation and accuracy after epoch {int(measured['epoch'])} against the number of samples"
    return layout.arrange(named, PANELS, rows, says=says, spread="curves", share_x=True, paper=EXPERIMENTS)
