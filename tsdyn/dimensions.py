"""Dimensions of archives and what their labels are.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["training", "population-flow", "online"]
Path = Literal["epoch", "time", "alpha"]
When = Literal["start", "along", "end"]
#: The label of a recorded step: an epoch, a time or an α.
Label = int | float
#: Global attribute: seconds that a run took, over all its processes; of a sweep, the sum over its points.
WALL = "wall_seconds"
#: Dimensions along which runs are recorded, one per kind.  `VARIABLES` writes ``epoch`` for all of them.
PATHS: tuple[Path, ...] = ("epoch", "time", "alpha")
#: Dimensions whose labels are real numbers; those of all others are integers.
REAL_LABELS = ("quantile", "time", "alpha")

DIMENSIONS: Mapping[str, str] = {
    "seed": "member of the ensemble; names every random draw of that member",
    "epoch": "epochs of training done; 0 is before training",
    "time": "of a population flow, in the place of epoch: t of dθ/dt = −∇L; 0 is the start",
    "alpha": "of online learning, in the place of epoch: steps / N; 0 is the start",
    "layer": "1..L; L is the output layer",
    "node": "student node, padded to the widest layer",
    "node_2": "second student node of a pair",
    "teacher_node": "teacher node, padded to the widest layer",
    "teacher_node_2": "second teacher node of a pair",
    "input_node": "node of the layer below (layer 1: the input); of a convolution (channel, row, column) of its kernel",
    "output": "node of the output layer",
    "teacher_layer": "layer of the teacher, 1..L, where it need not be the student's",
    "sample": "sample of a data set",
    "sample_2": "second sample of a pair",
    "mode": "eigenvalue, largest first",
    "quantile": "quantile over samples",
    "top_k": "how many of the largest outputs count",
    "entry": "number in the parameters and buffers of a student that is a module of the user's own, one after another",
    "teacher_entry": "the same of a teacher",
}
