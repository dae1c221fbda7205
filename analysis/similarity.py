"""Similarity of representations: linear CKA and SVCCA, between any two arrays of activations and within archives.

Both are blind to rotations and permutations of nodes and compare layers of different width, where a node-to-node
correlation cannot.  With N samples of n and m nodes, N ≤ n + m centred samples always share directions, so that the
measures are large whatever was learned: refused.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from tsdyn.analysis.members import Member, each

KORNBLITH = "Kornblith et al. 2019 (arXiv:1905.00414), Eq. 4"
RAGHU = "Raghu et al. 2017 (arXiv:1706.05806)"


def _centred(x: NDArray, y: NDArray, caller: str) -> tuple[NDArray, NDArray]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"{caller}: shapes {x.shape} and {y.shape}; both are (sample, node) of the same samples")
    if len(x) <= x.shape[1] + y.shape[1]:
        raise ValueError(
            f"{caller}: {len(x)} samples of {x.shape[1]} and {y.shape[1]} nodes share directions whatever they hold; "
            f"give more than {x.shape[1] + y.shape[1]} samples"
        )
    return x - x.mean(0), y - y.mean(0)


def linear_cka(x: NDArray, y: NDArray) -> float:
    """‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred X (sample, node) and Y (sample, node_2), in [0, 1]; NaN if one is constant.

    1 for equal representations up to rotation and a common scale.

    Raises:
        ValueError: if samples differ in number or are no more than both widths together.
        Source: Kornblith et al. 2019 (arXiv:1905.00414), Eq. 4.
    """
    x, y = _centred(x, y, "linear_cka")
    size = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / size) if size > 0 else float("nan")


def svcca(x: NDArray, y: NDArray, *, variance: float = 0.99) -> float:
    """Mean canonical correlation of the principal directions that hold `variance` of each; in [0, 1], NaN if constant.

    1 if one's kept subspace contains the other's.

    Raises:
        ValueError: as `linear_cka`, or if `variance` is outside (0, 1].
        Source: Raghu et al. 2017 (arXiv:1706.05806).
    """
    if not 0 < variance <= 1:
        raise ValueError(f"svcca: variance={variance!r}; it lies in (0, 1]")
    bases = [_principal(a, variance) for a in _centred(x, y, "svcca")]
    if any(basis.shape[1] == 0 for basis in bases):
        return float("nan")
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(np.clip(correlations, 0, 1).mean())


def _principal(x: NDArray, variance: float) -> NDArray:
    """Orthonormal columns (sample, k): the fewest principal directions of centred x that hold `variance` of it."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    real = s > s[0] * max(x.shape) * np.finfo(x.dtype).eps
    held = np.cumsum(s[real] ** 2)
    # the last kept one is the first at which the share is reached, to rounding
    count = 0 if not len(held) else int(np.searchsorted(held, variance * held[-1] * (1 - 1e-12))) + 1
    basis: NDArray = u[:, :count]
    return basis


def student_teacher(archive: xr.Dataset, *, samples: int | None = None) -> xr.Dataset:
    """``cka`` and ``svcca`` of student and teacher activations at each layer; (..., layer), lazy if `archive` is.

    Over the evaluation set, drawn again.  Of one epoch.

    Args:
        archive: A run, a sweep or a slice, at one epoch, with weights.
        samples: Of the evaluation set, the first so many; all if None.

    Raises:
        ValueError: if epochs are left, layers are not, weights were not recorded, or samples are too few.
    """
    if "epoch" in archive.dims:
        raise ValueError("student_teacher: epochs are left; select one, e.g. ds.isel(epoch=-1)")
    if "layer" not in archive.dims:
        raise ValueError("student_teacher: one layer is left; networks are made of all of them, select it afterwards")
    layers = range(1, archive.sizes["layer"] + 1)

    def measure(member: Member) -> list[float]:
        with torch.no_grad():
            x = member.evaluation_inputs[:samples]
            traces = [net.trace(x).activations for net in (member.student, member.teacher)]
        pairs = [(f.numpy(), f_star.numpy()) for f, f_star in zip(*traces, strict=True)]
        return [linear_cka(*pair) for pair in pairs] + [svcca(*pair) for pair in pairs]

    names = [f"{kind}_{number}" for kind in ("cka", "svcca") for number in layers]
    found = each(archive, measure, names)

    def stacked(kind: str, long_name: str, source: str) -> xr.DataArray:
        parts = [found[f"{kind}_{number}"] for number in layers]
        axis = xr.DataArray(layers, dims="layer", name="layer")
        joined = xr.concat(parts, dim=axis, coords="minimal", compat="override", join="exact", combine_attrs="drop")
        return joined.transpose(..., "layer").assign_attrs(units="1", long_name=long_name, source=source)

    return xr.Dataset(
        {
            "cka": stacked("cka", "linear CKA of student and teacher", KORNBLITH),
            "svcca": stacked("svcca", "SVCCA of student and teacher", RAGHU),
        }
    )
