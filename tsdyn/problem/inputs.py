"""Distributions of inputs, and every random stream of a run.

A draw depends only on (experiment, seed, epoch) and the stream's name: each stream has a counter-based generator
keyed by these, so no draw depends on which members share a batch, a process or a device, and a run can be resumed
at any epoch without stored generator states.  Streams do not depend on the values that a sweep changes, so points of
a sweep share their random numbers wherever shapes agree (a paired comparison).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtr

from tsdyn import registers
from tsdyn.engine.compiled_normals import standard_normal
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.activations import activation
from tsdyn.problem import covariances, images

STREAMS = (
    "teacher", "student", "train", "eval", "batches", "probe", "augment", "law", "noise", "noise-probe", "fork",
    "student-again", "dropout",
)  # fmt: skip


def generator(seed: int, stream: str, epoch: int = 0, branch: int | None = None) -> np.random.Generator:
    """The generator of one stream of one member at one epoch (Philox, the same on every platform).

    With a `branch` it is that of a run that forked off and draws anew.
    """
    # numpy splits an integer into words of 32 bits, so the second word of a seed of 2^32 or more would be taken for the
    # stream; a spawn key comes after four words and cannot be confused with them.  Smaller seeds have one word
    high, low = divmod(seed, 1 << 32)
    spawn = ((high,) if high else ()) if branch is None else (high, branch)
    key = np.random.SeedSequence((low, STREAMS.index(stream), epoch), spawn_key=spawn)
    return np.random.Generator(np.random.Philox(key))


def training_generator(experiment: Experiment, seed: int, stream: str, epoch: int) -> np.random.Generator:
    """The generator of a stream that training draws from in the epoch that ends at `epoch`.

    A fork with ``draws = "other"`` has streams of its own after the epoch at which it branched off.
    """
    fork = experiment.fork
    own = fork.parent is not None and fork.draws == "other" and epoch > fork.fork_epoch
    return generator(seed, stream, epoch, fork.branch if own else None)


def _gaussian(rng: np.random.Generator, samples: int, inputs: int, *, std: float) -> np.ndarray:
    drawn = standard_normal(rng, samples, inputs)
    drawn *= std
    return drawn


def _uniform(rng: np.random.Generator, samples: int, inputs: int, *, std: float) -> np.ndarray:
    edge = math.sqrt(3.0) * std
    return rng.uniform(-edge, edge, (samples, inputs))


def _mixture(
    rng: np.random.Generator, samples: int, inputs: int, *, std: float, latent: int, fixed: np.random.Generator
) -> np.ndarray:
    means = fixed.standard_normal((latent, inputs))
    # one row of normals per sample, so that draws do not depend on how many samples are taken at once
    drawn = rng.standard_normal((samples, 1 + inputs))
    component = np.minimum((latent * ndtr(drawn[:, 0])).astype(np.int64), latent - 1)
    return np.asarray(means[component] + std * drawn[:, 1:])


def _hidden_manifold(
    rng: np.random.Generator,
    samples: int,
    inputs: int,
    *,
    std: float,
    latent: int,
    fixed: np.random.Generator,
    fold: str,
) -> np.ndarray:
    features = fixed.standard_normal((latent, inputs)) / math.sqrt(latent)
    hidden = std * (rng.standard_normal((samples, latent)) @ features)
    return activation(fold)(torch.from_numpy(hidden)).numpy()


#: Laws by name: (rng, samples, inputs, *, std, **more) → (sample, input).  `more` is ``data.arguments`` for the laws of
#: packages; for those in `SEEDED` it is ``data.latent``, ``data.fold`` if given, and the generator `fixed` of what all
#: samples of a seed share.
LAWS: Mapping[str, Callable[..., np.ndarray]] = {
    "gaussian": _gaussian,
    "uniform": _uniform,
    "mixture": _mixture,
    "hidden-manifold": _hidden_manifold,
}
SEEDED = ("mixture", "hidden-manifold")


def draw_inputs(
    experiment: Experiment, rng: np.random.Generator, samples: int, *, seed: int | None = None
) -> Float[np.ndarray, "sample input"]:
    """Inputs drawn from the experiment's distribution, in its dtype.

    ``gaussian``: N(0, std²) per coordinate.  ``uniform``: on [−√3 std, √3 std], which has the same variance.  Either is
    multiplied by the symmetric square root of ``data.covariance``, or coordinate i by √λ_i with λ_i ∝ i^−s, Σ λ = d
    for ``data.spectrum`` = s (no rotation).

    ``mixture``: x = μ_c + std ξ; c is one of ``data.latent`` components, all equally likely, ξ is N(0, I), and the
    means μ_c are drawn N(0, I) once per seed, the same for training and evaluation.  ``hidden-manifold`` (Goldt et
    al. 2020): x = f(std Fᵀc/√D) with c N(0, I) of dimension D = ``data.latent``, F (D, d) drawn N(0, 1) once per seed,
    and f the activation ``data.fold``.  Targets are the teacher's outputs at x.

    Other laws are offered by installed packages (`registers.LAWS`).

    Args:
        experiment: Its ``[data]`` names the law.
        rng: Generator of the samples.
        samples: How many.
        seed: The member's seed, which the laws in `SEEDED` need.

    Raises:
        ValueError: if ``data.law`` names a data set instead of a distribution, or the seed is missing.
        DataError: if ``data.covariance`` is no covariance of these inputs.
        PartError: if a package's law draws anything but that many finite real inputs.
    """
    data, shape = experiment.data, (samples, experiment.teacher.widths[0])
    if not data.drawn:
        raise ValueError(f"draw_inputs: data.law = {data.law!r} is a data set; training_inputs takes from it")
    more = dict(data.arguments or {})
    if data.law in SEEDED:
        if seed is None:
            raise ValueError(f"draw_inputs: data.law = {data.law!r} has parts drawn once per seed; pass seed=")
        more |= {"latent": data.latent, "fixed": generator(seed, "law")}
        more |= {} if data.fold is None else {"fold": data.fold}
    x = np.asarray(registers.LAWS.load(data.law)(rng, *shape, std=data.std, **more))
    if data.covariance is not None:
        x = x @ covariances.root(data.covariance, shape[1])
    if data.spectrum is not None:
        x = x * np.sqrt(covariances.spectrum(shape[1], data.spectrum))
    if registers.LAWS.foreign(data.law) and (x.shape != shape or x.dtype.kind != "f" or not np.isfinite(x).all()):
        raise registers.PartError(
            f"law {data.law!r} of {registers.LAWS.origin(data.law).package} drew {x.dtype} of shape {x.shape}; it must "
            f"draw finite real numbers of shape {shape}, (samples, inputs)"
        )
    return x.astype(experiment.dtype, copy=False)


def training_inputs(experiment: Experiment, seed: int, epoch: int = 0) -> Float[np.ndarray, "sample input"]:
    """The inputs on which training quantities are measured.

    With finite data these are the training set before augmentation.  With fresh data there is no training set: at each
    epoch as many new samples are drawn as the evaluation set has.

    Raises:
        DataError: if a data set cannot be read, is too small, or does not fit the teacher.
    """
    data = experiment.data
    if not data.drawn:
        return _taken(experiment, seed, 0)
    if data.train == "fresh":
        return draw_inputs(experiment, generator(seed, "probe", epoch), data.eval, seed=seed)
    return draw_inputs(experiment, generator(seed, "train"), data.train, seed=seed)


def evaluation_inputs(experiment: Experiment, seed: int) -> Float[np.ndarray, "sample input"]:
    """The inputs of the evaluation set, the same at every epoch.

    Raises:
        DataError: as in `training_inputs`.
    """
    if not experiment.data.drawn:
        return _taken(experiment, seed, 1)
    return draw_inputs(experiment, generator(seed, "eval"), experiment.data.eval, seed=seed)


def labels(experiment: Experiment, seed: int, part: Literal["train", "eval"]) -> Int[np.ndarray, " sample"]:
    """The data set's own labels of `training_inputs` or `evaluation_inputs`.

    Raises:
        DataError: if the data have none, or as in `training_inputs`.
    """
    which, data = ("train", "eval").index(part), experiment.data
    found = None if data.drawn else images.load(data)[which].labels
    if found is None:
        raise images.DataError(f"data.law = {data.law!r}: these data have no labels")
    if (most := int(found.max())) >= experiment.teacher.widths[-1]:
        raise images.DataError(
            f"teacher.widths: {experiment.teacher.widths[-1]} outputs, but there is a label {most}; labels start at 0"
        )
    labels: np.ndarray = found[images.split(data, generator(seed, "train"))[which]]
    return labels


def _taken(experiment: Experiment, seed: int, which: int) -> Float[np.ndarray, "sample input"]:
    images.check_width(experiment.data, experiment.teacher.widths[0])
    chosen = images.split(experiment.data, generator(seed, "train"))[which]
    return images.load(experiment.data)[which].inputs(chosen, experiment.dtype)


def batch_indices(experiment: Experiment, seed: int, epoch: int, samples: int) -> Int[np.ndarray, "step batch"]:
    """Indices of a member's training samples in each batch of the epoch that ends at `epoch`, for finite data.

    If ``steps_per_epoch`` is given, batches are drawn with replacement, as in the released code; otherwise they are one
    pass over a permutation, and a remainder smaller than a batch is left out.
    """
    shape = experiment.steps, experiment.training.batch
    rng = training_generator(experiment, seed, "batches", epoch)
    if experiment.training.steps_per_epoch is not None:
        return rng.integers(0, samples, shape, dtype=np.int64)
    return rng.permutation(samples)[: math.prod(shape)].reshape(shape).astype(np.int64)


def new_at_every_step(experiment: Experiment) -> bool:
    """Whether every step has inputs of its own: fresh samples, or images cropped and mirrored anew."""
    return experiment.data.train == "fresh" or experiment.data.augment == "crop-flip"


def fresh_batches(
    experiment: Experiment, seed: int, epoch: int, *, steps_at_once: int
) -> Iterator[Float[np.ndarray, "step batch input"]]:
    """New samples for every step of the epoch that ends at `epoch`, some steps at a time.

    The samples do not depend on `steps_at_once`: one generator draws them in order.
    """
    batch, steps = experiment.training.batch, experiment.steps
    pieces = (slice(start, min(start + steps_at_once, steps)) for start in range(0, steps, steps_at_once))
    if experiment.data.augment != "crop-flip":
        rng = training_generator(experiment, seed, "batches", epoch)
        # a product of matrices may round otherwise for more rows: one step at a time where there is one
        product = experiment.data.covariance is not None or experiment.data.law == "hidden-manifold"
        for piece in pieces:
            count = piece.stop - piece.start
            if product:
                yield np.stack([draw_inputs(experiment, rng, batch, seed=seed) for _ in range(count)])
            else:
                yield draw_inputs(experiment, rng, count * batch, seed=seed).reshape(count, batch, -1)
        return
    own, _ = images.split(experiment.data, generator(seed, "train"))
    indices = own[batch_indices(experiment, seed, epoch, len(own))]
    held, rng = images.load(experiment.data)[0], training_generator(experiment, seed, "augment", epoch)
    for piece in pieces:
        # one step at a time, so that the draws do not depend on how many are taken together
        yield np.stack([held.cropped(step, rng, experiment.dtype) for step in indices[piece]])
