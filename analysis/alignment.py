"""ε-alignment of student and teacher nodes at the lowest layer: which teacher nodes' boundaries have been found.

From the recorded ``alignment``, or computed from recorded weights.  A node is the pair (w, b) of its weight and
bias, scaled to ‖w‖ = 1.  Source: Tian (2020), Definition 3.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
import xarray as xr
from scipy.special import ndtr
from tsdyn.analysis.identity import per_point, refuse_part
from tsdyn.analysis.lift import lift

from tsdyn import layer as one_layer
from tsdyn.archive.selecting import lowest_layer
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.node_pairs import Array, epsilon, regular, separation
from tsdyn.vocabulary import TIAN, VARIABLES

_WEIGHTS = ("weight", "bias", "teacher_weight", "teacher_bias")


def least(eps: Array) -> Array:
    """ε of the nearest student node: (..., teacher_node, node) -> (..., teacher_node); NaN only where all are.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.alignment import least
        >>> least(np.array([[0.1, 0.5], [np.nan, 0.3]])).tolist()
        [0.1, 0.3]
    """
    found: Array = np.fmin.reduce(eps, axis=-1)
    return found


def without_padding(weight: xr.DataArray, width: xr.DataArray) -> xr.DataArray:
    """Weights with 0 instead of NaN beyond each point's own inputs, so that products ignore the padding; lazy.

    Args:
        weight: (..., input_node), NaN beyond a point's own inputs.
        width: Number of inputs of each point; −1 where nothing is committed yet.
    """
    inputs = xr.DataArray(np.arange(weight.sizes["input_node"]), dims="input_node")
    return weight.where((inputs < width) | (width < 0), 0.0)


def _lowest(archive: xr.Dataset, names: tuple[str, ...]) -> xr.Dataset:
    part = archive[list(names)]
    if "layer" not in part.dims:  # a slice of one layer already
        if "layer" in part.coords and int(part["layer"]) != 1:
            raise ValueError(f"alignment: defined at the lowest layer only, not at layer {int(part['layer'])}")
    else:
        part = one_layer(part, lowest_layer(part))
    if "input_node" in part.dims and "input_width" in part.coords:
        refuse_part(part, {"input_node": int(part["input_width"].max())}, "alignment")
        part = part.isel(input_node=slice(0, int(part["input_width"].max())))
        weights = {n: w for n, w in part.data_vars.items() if "input_node" in w.dims}
        part = part.assign({n: without_padding(w, part["input_width"]) for n, w in weights.items()})
    return part


def alignment(archive: xr.Dataset) -> xr.DataArray:
    """ε between each teacher and student node of the lowest layer; (..., teacher_node, node).

    The recorded variable if there is one, else computed from the weights; 0 where both have the same boundary, in
    either orientation.

    Raises:
        ValueError: if neither is recorded, or the slice is of another layer.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.alignment import alignment
        >>> alignment(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'teacher_node', 'node')
    """
    if "alignment" in archive:
        return archive["alignment"]
    missing = [name for name in _WEIGHTS if name not in archive]
    if missing:
        raise ValueError(
            f"alignment: the archive has neither alignment nor {', '.join(missing)}; "
            'record it: [record] observables = ["alignment", ...]'
        )
    low = _lowest(archive, _WEIGHTS)
    return lift(
        epsilon,
        *(low[name] for name in ("teacher_weight", "teacher_bias", "weight", "bias")),
        reads=(("teacher_node", "input_node"), ("teacher_node",), ("node", "input_node"), ("node",)),
        gives=("teacher_node", "node"),
        name="alignment",
        attrs=VARIABLES["alignment"].attrs,
    )


def teacher_separation(archive: xr.Dataset) -> xr.DataArray:
    """Least ε between two teacher nodes, ε_0; (...).

    A student node within ε_0/2 of a teacher node is aligned with no other.  Infinite for a single teacher node.

    Raises:
        ValueError: if the slice is of another layer than the lowest.  Source: Tian (2020), Assumption 3.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.alignment import teacher_separation
        >>> bool((teacher_separation(ds) > 0).all())
        True
    """
    low = _lowest(archive, ("teacher_weight", "teacher_bias"))
    return lift(
        separation,
        low["teacher_weight"],
        low["teacher_bias"],
        reads=(("teacher_node", "input_node"), ("teacher_node",)),
        name="teacher_separation",
        attrs={"units": "1", "long_name": "least ε of two teacher nodes", "source": f"{TIAN}, Assumption 3"},
    )


def best_alignment(archive: xr.Dataset) -> xr.DataArray:
    """ε between each teacher node and its nearest student node; (..., teacher_node).

    Raises:
        ValueError: as `alignment`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.alignment import best_alignment
        >>> best_alignment(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'teacher_node')
    """
    return lift(
        least,
        alignment(archive),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="best_alignment",
        attrs={"units": "1", "long_name": "ε of the nearest student node", "source": f"{TIAN}, Definition 3"},
    )


def aligned(archive: xr.Dataset) -> xr.DataArray:
    """Number of teacher nodes with a student node within ε_0/2, which is then aligned with no other; (...).

    Raises:
        ValueError: as `alignment`.  Source: Tian (2020), Theorem 1.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.alignment import aligned
        >>> aligned(ds).dims
        ('overrealization', 'seed', 'epoch')
    """
    best = best_alignment(archive)
    near = (best <= teacher_separation(archive) / 2).where(best.notnull())
    count = near.sum("teacher_node").where(near.notnull().any("teacher_node"))
    return count.rename("aligned").assign_attrs(
        units="1", long_name="teacher nodes with a student node within ε_0/2", source=f"{TIAN}, Theorem 1"
    )


def boundary_samples(teacher_weight: Array, teacher_bias: Array, eps: Array, std: Array) -> Array:
    """Expected number of teacher boundaries within ε of a sample, Σ_j P[|w*_j·x + b*_j| ≤ ε].

    (..., teacher_node, input_node), (..., teacher_node), (...), (...) -> (...), for x ~ N(0, std² I) and nodes scaled
    to ‖w*_j‖ = 1, so that w*_j·x is N(0, std²).  Padding and zero weights have no boundary; NaN where no node has one,
    as at a point that is not committed yet.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.alignment import boundary_samples
        >>> weight, bias = np.array([[1.0, 0.0]]), np.array([0.0])  # one boundary through the origin
        >>> round(float(boundary_samples(weight, bias, np.array(0.1), np.array(1.0))), 4)  # P[|z| <= 0.1]
        0.0797
    """
    _, b = regular(teacher_weight, teacher_bias)
    eps, std = eps[..., None], std[..., None]
    share = ndtr((eps - b) / std) - ndtr((-eps - b) / std)
    return np.where(np.isnan(share).all(-1), np.nan, np.nansum(share, axis=-1))


def _added(experiment: Experiment) -> tuple[int, int]:
    """Pairs of points that augmentation adds to each sample: one for each boundary near it or none, and per axis."""
    match experiment.data.augment:
        case "aware":
            return 1, 0
        case "agnostic":
            return 0, experiment.student_widths[0]
        case "none" | "crop-flip":  # images are moved at every step
            return 0, 0
        case other:
            assert_never(other)


def augmented_samples(archive: xr.Dataset) -> xr.DataArray:
    """Number of samples in each training set, with those that ``data.augment`` adds; (swept..., seed).

    N without augmentation, (2d + 1) N teacher-agnostic, and N + 2 Σ_j N[I_j(ε)] teacher-aware.  Archives do not hold
    the counts N[I_j(ε)]; their expectation over Gaussian inputs, N P[x ∈ I_j(ε)], is used instead.

    Raises:
        ValueError: if samples are fresh, or augmented teacher-aware and not Gaussian.

    Source: Tian (2020), Definition 7.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.alignment import augmented_samples
        >>> float(augmented_samples(ds).max())
        1000.0
    """
    train = per_point(archive, lambda point: -1 if point.data.train == "fresh" else point.data.train)
    if (train < 0).any():
        raise ValueError("augmented_samples: data.train = 'fresh' has no training set; select the finite ones")
    if per_point(archive, lambda point: point.data.augment == "aware" and point.data.law != "gaussian").any():
        raise ValueError("augmented_samples: teacher-aware points are counted for Gaussian inputs only")
    low = _lowest(archive, ("teacher_weight", "teacher_bias"))
    near = lift(
        boundary_samples,
        low["teacher_weight"],
        low["teacher_bias"],
        per_point(archive, lambda point: point.data.augment_eps),
        per_point(archive, lambda point: point.data.std),
        reads=(("teacher_node", "input_node"), ("teacher_node",), (), ()),
    )
    # of `near`, and of the axes of the inputs, how many are added for each sample
    of_near = per_point(archive, lambda point: _added(point)[0])
    axes = per_point(archive, lambda point: _added(point)[1])
    added = near * of_near + axes
    total: xr.DataArray = train * (1.0 + 2.0 * added)
    return total.rename("augmented_samples").assign_attrs(
        units="1", long_name="training samples with those of augmentation", source=f"{TIAN}, Definition 7"
    )
