"""Experiments and reference data that several tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsdyn import Experiment, Network
from tsdyn.population.two_layer_loss import PopulationLoss

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference"
#: Changes to `small` for tests in which the numbers do not matter.
FEW = {"training__epochs": 3, "seeds": 2, "record__observables": ["mse", "weight"]}


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


def orthonormal_teacher(k: int, *, activation: str = "erf", inputs: int | None = None) -> Network:
    """Teacher of k unit nodes along the axes, k + 1 inputs unless given, outgoing weights 1."""
    eye = torch.eye(k, k + 1 if inputs is None else inputs, dtype=torch.float64)
    return Network([eye, torch.ones(1, k, dtype=torch.float64)], activation=activation)


def glorot_students(loss: PopulationLoss, members: int, seed: int = 0) -> torch.Tensor:
    """Rows of parameters, every weight N(0, 2/(inputs + outputs of its layer)) as Glorot & Bengio (2010) start."""
    n, d, outputs = loss.nodes, loss.inputs, loss.outputs
    draw = rng(seed)
    w = draw.standard_normal((members, n * d)) * np.sqrt(2 / (n + d))
    a = draw.standard_normal((members, n * outputs)) * np.sqrt(2 / (n + outputs))
    return torch.from_numpy(np.concatenate([w, a], 1))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cifar10(folder: Path, each: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write files of CIFAR-10's binary version with `each` random images; returns (pixels, labels) by file name."""
    made, draw = {}, rng()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        pixels = draw.integers(0, 256, (each, 3, 32, 32), dtype=np.uint8)
        labels = draw.integers(0, 10, each, dtype=np.uint8)
        made[name] = pixels, labels
        records = b"".join(bytes([y]) + p.tobytes() for p, y in zip(pixels, labels, strict=True))
        (folder / name).write_bytes(records)
    return made
