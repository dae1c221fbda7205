"""Experiments and reference data that several tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tsdyn import Experiment

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference"


def small(**changes: Any) -> Experiment:
    """A two-layer run of a second; keyword ``training__epochs=5`` sets ``training.epochs``."""
    base = Experiment(
        name="small",
        seeds=3,
        teacher={"widths": [10, 4, 6], "polarity": 1.0},
        student={"overrealization": 2.0, "scale": 0.1},
        data={"train": 200, "eval": 150},
        training={"epochs": 4, "steps_per_epoch": 30, "learning_rate": 0.02},
        record={"observables": ["loss", "mse", "correlation", "fanout_norm", "weight"]},
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)
