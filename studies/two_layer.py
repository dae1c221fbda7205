"""The released two-layer experiment of Tian (2020), which its Figures 5, 7 and 8 share."""

from __future__ import annotations

from tsdyn.experiment.experiment import Experiment

#: README of the released code: d=100, C=50, N=10,000, batch 16, rate 0.01, 100 epochs of 1000 steps, 32 seeds;
#: inputs of standard deviation 1.5 as in the code (the text says 10).
PAPER = Experiment(
    name="two-layer",
    seeds=32,
    teacher={"widths": [100, 10, 50], "init": "separated", "polarity": 1.0, "bias": -0.1},
    student={"overrealization": 5.0, "init": "gaussian", "scale": 0.005},
    data={"law": "gaussian", "std": 1.5, "train": 10_000, "eval": 10_000},
    training={"learning_rate": 0.01, "batch": 16, "steps_per_epoch": 1000, "epochs": 100},
    record={"observables": ["mse", "correlation", "fanout_norm"]},
)

#: Smaller inputs and data, so that it takes seconds; too short for specialization to finish.
SMOKE = PAPER.replace(
    {"seeds": 3, "teacher.widths": [20, 5, 10], "data.train": 500, "data.eval": 500}
    | {"training.steps_per_epoch": 100, "training.epochs": 6}
)
