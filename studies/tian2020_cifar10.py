"""Tian (2020), Figure 10: ρ̄ of each layer and accuracy on CIFAR-10 against epochs, by over-realization.

A ConvNet of 4 x 64 channels is trained on the labels, its weakest channels (0.3, 0.5, 0.5 and 0.7 of a layer's) are
pruned, and students of several times what is left learn its outputs.  Needs CIFAR-10's binary version, which is not
downloaded: the folder ``cifar-10-batches-bin`` is looked for in the current one; another place is named by

    tsdyn study run tian2020-cifar10 --set 'data.path="/where/cifar-10-batches-bin"'

No results are given here, since they need these files; desk scale was timed, and its rates chosen, on
other photographs in the same format (4 minutes of one core); the rates of paper scale are smaller for its wider layers
and untried.  `tian2020_digits` is the same study on data that are always there, and says what it was seen to do.

Every point of the sweep trains its seeds' teachers itself, at paper scale for hours of a core each.  A teacher that was
trained elsewhere and is pruned already is used with ``teacher.init=file``, ``teacher.path``, its ``teacher.widths`` and
``teacher.prune=[]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation of each layer and accuracy on CIFAR-10, pruned ConvNet teacher"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 10"

PAPER = Experiment(
    name="cifar10-paper",
    seeds=3,
    dtype="float32",
    teacher={
        "widths": [3072, 64, 64, 64, 64, 10],
        "convolution": True,
        "init": "trained",
        "train_epochs": 30,
        "train_rate": 0.01,
        "prune": [0.3, 0.5, 0.5, 0.7],
        "finetune_epochs": 10,
    },
    student={"overrealization": 1.0, "init": "torch"},
    data={"law": "cifar10", "path": "cifar-10-batches-bin", "train": 50_000, "eval": 10_000},
    training={"learning_rate": {0: 0.0001, 60: 0.00003}, "batch": 32, "epochs": 100},
    record={"every": 5, "observables": ["mse", "correlation", "label_accuracy"]},
    sweep={"student.overrealization": [1.0, 2.0, 5.0, 10.0]},
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": PAPER.replace(
        {"name": "cifar10-smoke", "seeds": 2, "teacher.widths": [3072, 3, 4, 4, 6, 10]}
        | {"teacher.train_epochs": 1, "teacher.finetune_epochs": 1, "data.train": 64, "data.eval": 32}
        | {"student.overrealization": 2.0, "training.epochs": 2, "record.every": 1, "sweep": {}}
    ),
    # an eighth of the channels, a twenty-fifth of the samples, fewer epochs and over-realizations
    "desk": PAPER.replace(
        {"name": "cifar10-desk", "seeds": 2, "teacher.widths": [3072, 8, 8, 8, 8, 10]}
        | {"teacher.train_epochs": 10, "teacher.finetune_epochs": 3, "data.train": 2_000, "data.eval": 500}
        | {"training.learning_rate": {0: 0.0003, 15: 0.0001}, "training.epochs": 20, "record.every": 2}
        | {"sweep": {"student.overrealization": [1.0, 2.0, 4.0]}}
    ),
    "paper": PAPER,
}


#: Panels by name: ρ̄ of each layer, accuracy and loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "label_accuracy", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per over-realization: ρ̄ of each convolution, accuracy and loss."""
    says = f"ρ̄ of each convolution, accuracy and loss on {deep_layers.data_name(measured)}, pruned ConvNet teacher"
    return deep_layers.draw(
        measured, PANELS, says=says, show=tuple(PANELS), height=1.6,
        paper=EXPERIMENTS if measured.attrs["data"] == "cifar10" else None,
    )  # fmt: skip
