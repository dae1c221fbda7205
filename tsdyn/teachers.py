"""Teacher constructions: fixed networks drawn once a seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsdyn.data import evaluation_inputs, generator
from tsdyn.experiment import Experiment, ExperimentError
from tsdyn.networks import Network

_ENUMERABLE = 1 << 16


def separated_rows(
    rng: np.random.Generator, rows: int, columns: int, choices: Sequence[float]
) -> Float[np.ndarray, "rows columns"]:
    """A matrix with entries drawn from `choices`, all of whose rows are distinct and non-zero.

    Uniform over such matrices: rows are drawn one by one and drawn again when they repeat or vanish.

    Raises:
        ExperimentError: if `choices` cannot give that many distinct non-zero rows.

    Source: Tian (2020), section 6 and released code.
    """
    values = np.unique(np.asarray(choices, dtype=float))
    available = len(values) ** columns - (0.0 in values)
    if rows > available:
        raise ExperimentError(
            f"separated_rows: {rows} rows of {columns} entries from {len(values)} choices: only {available} distinct "
            "non-zero rows exist; use fewer nodes, more inputs or more choices"
        )
    if len(values) ** columns <= _ENUMERABLE:
        every = np.array(list(itertools.product(values, repeat=columns)))
        every = every[every.any(axis=1)]
        return every[rng.choice(len(every), size=rows, replace=False)]
    drawn: dict[bytes, np.ndarray] = {}
    while len(drawn) < rows:
        row = rng.choice(values, size=columns)
        if row.any():
            drawn.setdefault(row.tobytes(), row)
    return np.stack(list(drawn.values()))


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    """Orthonormal rows, uniformly distributed; orthonormal columns where there are more rows than columns."""
    tall = rng.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q = q * np.sign(np.diag(r))  # without the signs the QR of a Gaussian matrix is not Haar distributed
    return q if rows >= columns else q.T


def draw_teacher(experiment: Experiment, seed: int) -> Network:
    """The teacher of one member.

    Layer by layer from the lowest.  Above the first layer the column of node j = 1, 2, ... is divided by j^p
    (``teacher.polarity`` p, Tian (2020) Eq. 10).  With ``unit_norm`` the rows of the first layer are scaled to unit
    norm and biases are not; with ``"every-layer"`` those of every layer are, each bias with its row.  Biases are
    constant, or ``"uniform"``: U[−½, ½].  ``balanced`` then tunes them on the evaluation set (`balance`).

    Raises:
        ExperimentError: if the choices cannot give distinct rows, more rows than inputs should be orthonormal, or a
            balanced teacher's output is constant.
    """
    teacher, rng = experiment.teacher, generator(seed, "teacher")
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for below, nodes in itertools.pairwise(teacher.widths):
        weight = _rows(experiment, rng, nodes, below, lowest=not weights)
        bias = rng.uniform(-0.5, 0.5, nodes) if teacher.bias == "uniform" else np.full(nodes, float(teacher.bias))
        if weights:
            weight = weight / np.arange(1, below + 1) ** teacher.polarity
        if teacher.unit_norm == "every-layer" or (teacher.unit_norm and not weights):
            norm = np.linalg.norm(weight, axis=1)
            weight = weight / norm[:, None]
            bias = bias / norm if teacher.unit_norm == "every-layer" else bias
        weights.append(torch.from_numpy(weight))
        biases.append(None if teacher.bias is False else torch.from_numpy(bias))
    leak = experiment.student.leak if teacher.leak is None else teacher.leak
    network = Network(weights, biases, teacher.activation or experiment.student.activation, leak=leak)
    if teacher.balanced:
        network = balance(network, torch.from_numpy(evaluation_inputs(experiment, seed)).double())
    return network.to(getattr(torch, experiment.dtype))


def _rows(experiment: Experiment, rng: np.random.Generator, nodes: int, below: int, *, lowest: bool) -> np.ndarray:
    teacher = experiment.teacher
    if teacher.init == "separated":
        return separated_rows(rng, nodes, below, teacher.choices)
    if teacher.init == "gaussian":
        return rng.standard_normal((nodes, below)) * teacher.scale
    if lowest and nodes > below:
        raise ExperimentError(f"teacher.init = 'orthonormal': {nodes} orthonormal rows do not fit in {below} inputs")
    return orthonormal(rng, nodes, below)


def balance(network: Network, x: Float[Tensor, "sample input"]) -> Network:
    """A network of the same directions whose hidden nodes are each active on half of `x` and whose outputs have
    mean 0 and variance 1 over it.

    From the lowest layer up the median of each pre-activation is taken off its bias; the rows and biases of the last
    layer are divided by the standard deviations of the outputs.  Needs biases.

    Source: Tian et al. (2019), section 5 and released code.

    Raises:
        ExperimentError: without biases, or if an output is constant over `x`.
    """
    if any(b is None for b in network.biases):
        raise ExperimentError("teacher.balanced: tunes biases, and the teacher has none; set teacher.bias")
    weights, biases = list(network.weights), [b.clone() for b in network.biases if b is not None]
    f = x
    for i in range(network.depth - 1):
        z = nn.functional.linear(f, weights[i], biases[i])
        median = z.median(0).values
        biases[i] = biases[i] - median
        f = network.activation(z - median)
    output = nn.functional.linear(f, weights[-1], biases[-1])
    std, mean = torch.std_mean(output, 0, correction=0)
    constant = [int(j) for j in (output.amax(0) == output.amin(0)).nonzero().flatten()]
    if constant:
        raise ExperimentError(
            f"teacher.balanced: outputs {constant} are constant over the evaluation set, so they cannot be scaled to "
            "unit variance; use more nodes, or a lower teacher.polarity"
        )
    weights[-1], biases[-1] = weights[-1] / std[:, None], (biases[-1] - mean) / std
    return Network(weights, biases, network.activation.name, leak=network.activation.leak or 0.0)
