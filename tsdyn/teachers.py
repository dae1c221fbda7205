"""Teacher constructions: fixed networks drawn once a seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from tsdyn.data import generator
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

    Layer by layer from the lowest: the rows of the first layer are scaled to unit norm (``teacher.unit_norm``);
    above it the column of node j = 1, 2, ... is divided by j^p (``teacher.polarity`` p, Tian (2020) Eq. 10);
    biases are constant and not scaled.

    Raises:
        ExperimentError: if the choices cannot give distinct rows, or more rows than inputs should be orthonormal.
    """
    teacher, rng = experiment.teacher, generator(seed, "teacher")
    weights: list[np.ndarray] = []
    for below, nodes in itertools.pairwise(teacher.widths):
        if teacher.init == "separated":
            weight = separated_rows(rng, nodes, below, teacher.choices)
        elif teacher.init == "orthonormal":
            if not weights and nodes > below:
                raise ExperimentError(
                    f"teacher.init = 'orthonormal': {nodes} orthonormal rows do not fit in {below} inputs"
                )
            weight = orthonormal(rng, nodes, below)
        else:
            weight = rng.standard_normal((nodes, below)) * teacher.scale
        if weights:
            weight = weight / np.arange(1, below + 1) ** teacher.polarity
        elif teacher.unit_norm:
            weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
        weights.append(weight)
    dtype = getattr(torch, experiment.dtype)
    biases = [
        None if teacher.bias is False else torch.full((len(w),), float(teacher.bias), dtype=dtype) for w in weights
    ]
    student = experiment.student
    return Network(
        [torch.tensor(w, dtype=dtype) for w in weights],
        biases,
        teacher.activation or student.activation,
        leak=student.leak if teacher.leak is None else teacher.leak,
    )
