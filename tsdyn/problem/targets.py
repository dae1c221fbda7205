"""What the training targets have that the teacher did not give: Gaussian noise, or wrong classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import generator


def spoils(experiment: Experiment) -> bool:
    """Whether training targets differ from those that the teacher or the data give."""
    return experiment.data.noise > 0 or experiment.data.flip > 0


def of_training_set(experiment: Experiment, seed: int, clean: Tensor, epoch: int = 0) -> Tensor:
    """The targets of `inputs.training_inputs`, given the clean ones, (sample, output).

    With finite data they are drawn once for the run, so that a wrong class stays wrong; with fresh data they belong to
    the samples drawn for measuring at `epoch`.
    """
    if not spoils(experiment):
        return clean
    fresh = experiment.data.train == "fresh"
    rng = generator(seed, "noise-probe", epoch) if fresh else generator(seed, "noise")
    return spoiled(experiment, clean, rng)


def spoiled(experiment: Experiment, clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Targets, (sample, output), with ``data.noise`` added or a share ``data.flip`` of the classes replaced.

    Noise is N(0, noise²) on every output.  A class is replaced with probability `flip`, by one of the others, all
    equally likely.  Draws come sample by sample, so that they do not depend on how many are taken at once.
    """
    samples, outputs = clean.shape
    if experiment.data.noise:
        noise = rng.standard_normal((samples, outputs)) * experiment.data.noise
        return clean + torch.from_numpy(noise).to(clean)
    if experiment.data.flip:
        draws = rng.random((samples, 2))
        further = 1 + np.floor(draws[:, 1] * (outputs - 1)).astype(np.int64)
        moved = np.where(draws[:, 0] < experiment.data.flip, further, 0)
        at = (np.arange(outputs) - moved[:, None]) % outputs  # the entry that output o takes from the clean row
        return clean.gather(1, torch.from_numpy(at).to(clean.device))
    return clean
