"""Covariances of inputs that an experiment gives: a matrix in a file, or a power law of eigenvalues."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from tsdyn.problem.images import DataError

#: A computed eigenvalue or an asymmetry this small, relative to the largest entry and per row, is rounding.
ROUNDING = 64 * np.finfo(np.float64).eps


def spectrum(inputs: int, power: float) -> np.ndarray:
    """λ_i proportional to i^−power for i = 1..inputs, of sum `inputs`."""
    found = np.arange(1, inputs + 1, dtype=np.float64) ** -power
    return np.asarray(found * (inputs / found.sum()))


def root(path: str, inputs: int) -> np.ndarray:
    """The symmetric square root of the covariance in an .npy file, (inputs, inputs).

    Raises:
        DataError: if it cannot be read, or is no finite symmetric positive semidefinite matrix of that shape.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise DataError(f"data.covariance = {path!r}: cannot be read: {error}") from None
    return _root(path, inputs, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@functools.lru_cache(maxsize=8)
def _root(path: str, inputs: int, _version: tuple[int, ...]) -> np.ndarray:
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data.covariance = {path!r}: is not an .npy file that can be read: {error}") from None
    wrong = _wrong(matrix, inputs)
    if wrong is not None:
        raise DataError(f"data.covariance = {path!r}: {wrong}")
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    least, rounding = float(values[0]), ROUNDING * inputs * float(np.abs(values).max())
    if least < -rounding:
        raise DataError(
            f"data.covariance = {path!r}: has the eigenvalue {least:.6g}; a covariance is positive semidefinite"
        )
    found = np.asarray((vectors * np.sqrt(np.where(values > rounding, values, 0.0))) @ vectors.T)
    found.flags.writeable = False
    return found


def _wrong(matrix: object, inputs: int) -> str | None:
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu":
        return f"holds {getattr(matrix, 'dtype', type(matrix).__name__)}; it must hold real numbers"
    if matrix.shape != (inputs, inputs):
        return f"has shape {matrix.shape}; teacher.widths has {inputs} inputs, so it must be {(inputs, inputs)}"
    if not np.isfinite(matrix).all():
        return "has entries that are NaN or infinite"
    off = float(np.abs(matrix - matrix.T).max())
    if off > ROUNDING * float(np.abs(matrix).max()):
        return f"differs from its transpose by {off:.6g}; a covariance is symmetric"
    return None
