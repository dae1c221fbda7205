"""Input laws and every random stream of a run.

A draw depends on (experiment, seed, epoch) and the stream's name only: each stream is its own counter-based
generator keyed by these, so no draw depends on which members share a batch, a process or a device, and a run
can be resumed at any epoch without stored generator states.  Streams ignore the values that a sweep changes,
so points of a sweep share their random numbers wherever shapes agree (a paired comparison).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from tsdyn.experiment import Experiment

STREAMS = ("teacher", "student", "train", "eval", "batches", "probe")


def generator(seed: int, stream: str, epoch: int = 0) -> np.random.Generator:
    """The generator of one stream of one member at one epoch (Philox, the same on every platform)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, STREAMS.index(stream), epoch))))


def draw_inputs(experiment: Experiment, rng: np.random.Generator, samples: int) -> Float[np.ndarray, "sample input"]:
    """Inputs from the experiment's law, in its dtype.

    ``gaussian``: N(0, std²) per coordinate.  ``uniform``: on [−√3 std, √3 std], which has the same variance.
    """
    law, shape = experiment.data, (samples, experiment.teacher.widths[0])
    if law.law == "gaussian":
        x = rng.standard_normal(shape) * law.std
    else:
        edge = math.sqrt(3.0) * law.std
        x = rng.uniform(-edge, edge, shape)
    return x.astype(experiment.dtype, copy=False)


def training_inputs(experiment: Experiment, seed: int, epoch: int = 0) -> Float[np.ndarray, "sample input"]:
    """The set on which training quantities are measured.

    Finite data: the training set, before augmentation.  Fresh data has none: as many new samples as the evaluation
    set, at each epoch.
    """
    if experiment.data.train == "fresh":
        return draw_inputs(experiment, generator(seed, "probe", epoch), experiment.data.eval)
    return draw_inputs(experiment, generator(seed, "train"), experiment.data.train)


def evaluation_inputs(experiment: Experiment, seed: int) -> Float[np.ndarray, "sample input"]:
    """The evaluation set, the same at every epoch."""
    return draw_inputs(experiment, generator(seed, "eval"), experiment.data.eval)


def batch_indices(experiment: Experiment, seed: int, epoch: int, samples: int) -> Int[np.ndarray, "step batch"]:
    """Which of this member's training samples make each batch of the epoch that ends at `epoch`; finite data.

    With ``steps_per_epoch`` given, batches are drawn with replacement (the released code's way); without, they
    are one pass over a permutation, and a remainder smaller than a batch is left out.
    """
    shape = experiment.steps, experiment.training.batch
    rng = generator(seed, "batches", epoch)
    if experiment.training.steps_per_epoch is not None:
        return rng.integers(0, samples, shape, dtype=np.int64)
    return rng.permutation(samples)[: math.prod(shape)].reshape(shape).astype(np.int64)


def fresh_batches(
    experiment: Experiment, seed: int, epoch: int, *, steps_at_once: int
) -> Iterator[Float[np.ndarray, "step batch input"]]:
    """New samples for every step of the epoch that ends at `epoch`, some steps at a time.

    The samples do not depend on `steps_at_once`: one generator draws them in order.
    """
    rng = generator(seed, "batches", epoch)
    batch = experiment.training.batch
    for start in range(0, experiment.steps, steps_at_once):
        steps = min(steps_at_once, experiment.steps - start)
        yield draw_inputs(experiment, rng, steps * batch).reshape(steps, batch, -1)
