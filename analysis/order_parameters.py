"""Order parameters of two-layer networks from recorded weights: overlaps that determine the generalization error.

With x ~ N(0, std² I) the fields w_i·x and w*_m·x are jointly Gaussian.  The order parameters are their covariances,
called Q, R and T in `tsdyn.flow.order_parameters` and `tsdyn.flow.overlaps`.  (Where papers write fields as w·x/√N and
overlaps as w·w/N, w is √N times a network's weight.)

Source: Saad & Solla 1995; Goldt et al. 2019 (arXiv:1906.08632).
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from tsdyn.analysis.alignment import without_padding
from tsdyn.analysis.identity import per_point, refuse_part
from tsdyn.analysis.lift import lift

from tsdyn import layer as one_layer
from tsdyn.archive.selecting import lowest_layer
from tsdyn.networks.node_pairs import FIELDS, Array, overlap
from tsdyn.vocabulary import SAAD

SIMSEK = "Simsek et al. 2023 (arXiv:2311.01644), section 4"


def cosine(w: Array, w2: Array) -> Array:
    """Cosines of weights, (..., node, input), (..., node_2, input) -> (..., node, node_2); NaN for zero weights.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.order_parameters import cosine
        >>> cosine(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 0.0]])).tolist()
        [[0.0, 1.0]]
    """
    norms = [np.linalg.norm(v, axis=-1) for v in (w, w2)]
    first, second = (v / np.where(norm > 0, norm, np.nan)[..., None] for v, norm in zip((w, w2), norms, strict=True))
    found: Array = overlap(first, second)
    return found


def scaled_overlap(w: Array, w2: Array, std: Array) -> Array:
    """Overlaps std² w_i·w_k, (..., node, input), (..., node_2, input), (...) -> (..., node, node_2); padding NaN."""
    found: Array = overlap(w, w2) * (std**2)[..., None, None]
    return found


def _weights(archive: xr.Dataset, caller: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Weights of student and teacher at the lowest layer, with 0 in place of padded inputs."""
    missing = [name for name in ("weight", "teacher_weight") if name not in archive]
    if missing:
        raise ValueError(
            f'{caller}: the archive has no {", ".join(missing)}; record it: [record] observables = ["weight", ...]'
        )
    low = archive[["weight", "teacher_weight"]]
    if "layer" in low.dims:
        low = one_layer(low, lowest_layer(low))
    elif "layer" in low.coords and int(low["layer"]) != 1:
        raise ValueError(f"{caller}: defined at the lowest layer only, not at layer {int(low['layer'])}")
    lost = [d for d, n in (("node", "weight"), ("teacher_node", "teacher_weight")) if d not in low[n].dims]
    if lost:
        raise ValueError(f"{caller}: the slice has no dimension {', '.join(lost)}; select with a list or slice")
    refuse_part(low, {"input_node": int(low["input_width"].max())}, caller)
    low = low.isel(input_node=slice(0, int(low["input_width"].max())))
    student, teacher = (without_padding(low[name], low["input_width"]) for name in ("weight", "teacher_weight"))
    return student, teacher


def _pair(array: xr.DataArray) -> xr.DataArray:
    """The array with its node dimension renamed to the second name, for products of nodes with nodes."""
    dim = "node" if "node" in array.dims else "teacher_node"
    return array.rename({dim: f"{dim}_2"})


def _spread(archive: xr.Dataset) -> xr.DataArray:
    """Standard deviation of the inputs of each point; 1 for data sets, and if there is no experiment."""
    if "experiment" not in archive.attrs:
        return xr.DataArray(1.0)
    return per_point(archive, lambda point: point.data.std if point.data.drawn else 1.0)


def _outgoing(archive: xr.Dataset, nodes: dict[str, int]) -> dict[str, xr.DataArray]:
    """Outgoing weights v and A of points with two layers and one output; NaN at others, nothing if there is none."""
    if "layer" not in archive.dims or not {1, 2} <= set(archive["layer"].values.tolist()):
        return {}
    top = archive[["weight", "teacher_weight"]].sel(layer=2)
    if "experiment" in archive.attrs:
        depth = per_point(archive, lambda point: point.layout.depth)
    else:
        depth = (archive["width"] > 0).sum("layer")
    meant = (depth == 2) & (top["width"] == 1)
    if not bool(meant.any()):
        return {}
    chosen = {"v": ("weight", "node"), "A": ("teacher_weight", "teacher_node")}
    words = {"v": "outgoing weight of the student", "A": "outgoing weight of the teacher"}
    return {
        name: top[weight]
        .where(meant)
        .isel({dim: 0, "input_node": slice(0, nodes[dim])}, drop=True)
        .rename(input_node=dim)
        .drop_vars(dim, errors="ignore")
        .assign_attrs(units="1", long_name=words[name], source=SAAD)
        for name, (weight, dim) in chosen.items()
    }


def order_parameters(archive: xr.Dataset) -> xr.Dataset:
    """Covariances of the fields l_i = w_i·x and r_m = w*_m·x of the lowest layer, and the outgoing weights; lazy.

    Q = E[l_i l_k] (..., node, node_2), R = E[l_i r_m] (..., node, teacher_node) and T = E[r_n r_m]
    (..., teacher_node, teacher_node_2) are std² times products of weights, with std of the inputs (1 for data sets).
    With two layers and one output also v (..., node) and A (..., teacher_node).  They are the arguments of
    `tsdyn.flow.order_parameters`, which assumes networks without biases.

    Raises:
        ValueError: if weights are not recorded, or the slice is of another layer or lacks a node dimension.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.order_parameters import order_parameters
        >>> order_parameters(ds)["Q"].dims
        ('overrealization', 'seed', 'epoch', 'node', 'node_2')
    """
    student, teacher = _weights(archive, "order_parameters")
    below = "input_node"
    std = _spread(archive)

    def of(first: xr.DataArray, second: xr.DataArray, name: str, fields: str) -> xr.DataArray:
        dims = [str(next(d for d in a.dims if "node" in str(d) and d != below)) for a in (first, second)]
        attrs = {"units": "1", "long_name": f"order parameter E[{fields}]", "source": SAAD, "normalisation": FIELDS}
        return lift(
            scaled_overlap,
            first,
            second,
            std,
            reads=((dims[0], below), (dims[1], below), ()),
            gives=dims,
            name=name,
            attrs=attrs,
        )

    found = xr.Dataset(
        {
            "Q": of(student, _pair(student), "Q", "l_i l_k"),
            "R": of(student, teacher, "R", "l_i r_m"),
            "T": of(teacher, _pair(teacher), "T", "r_n r_m"),
        },
        attrs={"normalisation": FIELDS},
    )
    sizes = {"node": student.sizes["node"], "teacher_node": teacher.sizes["teacher_node"]}
    return found.assign(_outgoing(archive, sizes))


def cosines(archive: xr.Dataset) -> xr.DataArray:
    """Cosine u_im between student weight i and teacher weight m of the lowest layer; (..., node, teacher_node).

    Raises:
        ValueError: as `order_parameters`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.order_parameters import cosines
        >>> cosines(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'node', 'teacher_node')
    """
    return lift(
        cosine,
        *_weights(archive, "cosines"),
        reads=(("node", "input_node"), ("teacher_node", "input_node")),
        gives=("node", "teacher_node"),
        name="cosine",
        attrs={"units": "1", "long_name": "cosine of student and teacher weight", "source": SIMSEK},
    )
