"""Where students start."""

from __future__ import annotations

import itertools
import math

import torch

from tsdyn.data import generator
from tsdyn.experiment import Experiment
from tsdyn.networks import Network


def draw_student(experiment: Experiment, seed: int) -> Network:
    """The student of one member before training.

    ``gaussian``: every weight N(0, scale²), biases 0 (Tian 2020, released code).  ``torch``: weights and biases
    uniform on ±1/√(inputs), as ``nn.Linear`` starts.  With ``training.normalize`` the hidden rows start, as
    they stay, at unit norm.
    """
    student, rng = experiment.student, generator(seed, "student")
    dtype = getattr(torch, experiment.dtype)
    widths = experiment.student_widths
    weights, biases = [], []
    for layer, (below, nodes) in enumerate(itertools.pairwise(widths), start=1):
        if student.init == "gaussian":
            weight, bias = rng.standard_normal((nodes, below)) * student.scale, [0.0] * nodes
        else:
            edge = 1 / math.sqrt(below)
            weight, bias = rng.uniform(-edge, edge, (nodes, below)), rng.uniform(-edge, edge, nodes).tolist()
        w = torch.tensor(weight, dtype=dtype)
        if experiment.training.normalize and layer < len(widths) - 1:
            w = w / w.norm(dim=1, keepdim=True)
        weights.append(w)
        biases.append(torch.tensor(bias, dtype=dtype) if student.bias else None)
    return Network(weights, biases, student.activation, leak=student.leak)
