"""Order parameters of two-layer networks from recorded weights: the overlaps that carry all there is to learn.

With x ~ N(0, I) the pre-activations w_i·x and w*_m·x are jointly Gaussian with these as covariance, times N.
Source: Saad & Solla 1995; Goldt et al. 2019 (arXiv:1906.08632).
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tsdyn.analysis.lift import lift

from tsdyn import layer as one_layer
from tsdyn.schema import VARIABLES

SIMSEK = "Simsek et al. 2023 (arXiv:2311.01644), section 4"


def overlap(w: NDArray, w2: NDArray) -> NDArray:
    """(..., node, input), (..., node_2, input) -> (..., node, node_2): w_i · w_k / N; NaN for padding."""
    found: NDArray = np.einsum("...ni,...mi->...nm", w, w2) / w.shape[-1]
    return found


def cosine(w: NDArray, w2: NDArray) -> NDArray:
    """(..., node, input), (..., node_2, input) -> (..., node, node_2): cos ∠(w_i, w_k); NaN for a zero weight."""
    norms = [np.sqrt(np.einsum("...i,...i->...", v, v)) for v in (w, w2)]
    first, second = (v / np.where(norm > 0, norm, np.nan)[..., None] for v, norm in zip((w, w2), norms, strict=True))
    found: NDArray = np.einsum("...ni,...mi->...nm", first, second)
    return found


def _weights(archive: xr.Dataset, caller: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Student's and teacher's weights of the lowest layer without padding of the input."""
    missing = [name for name in ("weight", "teacher_weight") if name not in archive]
    if missing:
        raise ValueError(
            f'{caller}: the archive has no {", ".join(missing)}; record it: [record] observables = ["weight", ...]'
        )
    low = archive[["weight", "teacher_weight"]]
    if "layer" in low.dims:
        low = one_layer(low, 1)
    elif "layer" in low.coords and int(low["layer"]) != 1:
        raise ValueError(f"{caller}: of the lowest layer, not of layer {int(low['layer'])}")
    lost = [d for d, n in (("node", "weight"), ("teacher_node", "teacher_weight")) if d not in low[n].dims]
    if lost:
        raise ValueError(f"{caller}: the slice has no dimension {', '.join(lost)}; select with a list or slice")
    low = low.isel(input_node=slice(0, int(low["input_width"].max())))
    return low["weight"], low["teacher_weight"]


def _pair(array: xr.DataArray) -> xr.DataArray:
    """The same nodes under the second name."""
    dim = "node" if "node" in array.dims else "teacher_node"
    return array.rename({dim: f"{dim}_2"})


def order_parameters(archive: xr.Dataset) -> xr.Dataset:
    """Q = w_i·w_k/N, R = w_i·w*_m/N and T = w*_n·w*_m/N of the lowest layer, N its input width; lazy.

    Q (..., node, node_2), R (..., node, teacher_node), T (..., teacher_node, teacher_node_2).

    Raises:
        ValueError: if weights are not recorded, or the slice is of another layer or lacks a node dimension.
    """
    student, teacher = _weights(archive, "order_parameters")
    below = "input_node"

    def of(first: xr.DataArray, second: xr.DataArray, name: str) -> xr.DataArray:
        dims = [str(next(d for d in a.dims if "node" in str(d) and d != below)) for a in (first, second)]
        return lift(
            overlap,
            first,
            second,
            reads=((dims[0], below), (dims[1], below)),
            gives=dims,
            name=name,
            attrs=VARIABLES[name].attrs,
        )

    return xr.Dataset(
        {
            "Q": of(student, _pair(student), "Q"),
            "R": of(student, teacher, "R"),
            "T": of(teacher, _pair(teacher), "T"),
        }
    )


def cosines(archive: xr.Dataset) -> xr.DataArray:
    """u_im, the cosine between student weight i and teacher weight m of the lowest layer; (..., node, teacher_node).

    Raises:
        ValueError: as `order_parameters`.
    """
    return lift(
        cosine,
        *_weights(archive, "cosines"),
        reads=(("node", "input_node"), ("teacher_node", "input_node")),
        gives=("node", "teacher_node"),
        name="cosine",
        attrs={"units": "1", "long_name": "cosine of student and teacher weight", "source": SIMSEK},
    )
