"""Results of `tsdyn.sensitivity` as a labelled Dataset, and in words."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tsdyn._version import __version__
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.experiment.sweep_axes import POINT
from tsdyn.through_training.blocks import Found, Job
from tsdyn.through_training.observed import observed

SIDES = ("+", "-")
SOURCE = "tsdyn.sensitivity: reverse pass through the training, λ_{t−1} = λ_t ∂θ_t/∂θ_{t−1}"
#: Variable → (dimensions after seed, of what it is the derivative).
_DERIVATIVES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "d_start": (("layer", "node", "input_node"), "the weights before training"),
    "d_start_bias": (("layer", "node"), "the biases before training"),
    "d_start_norm_scale": (("layer", "node"), "BatchNorm's scale before training"),
    "d_start_norm_shift": (("layer", "node"), "BatchNorm's shift before training"),
    "d_sample": (("sample",), "the weight of a training sample in the loss"),
    "d_target": (("sample", "output"), "the targets of a training sample"),
    "d_input": (("sample", "input_node"), "a training input, its target held"),
    "d_learning_rate": (("epoch",), "the learning rate of the epoch that ends at `epoch`"),
    "d_teacher": (("layer", "teacher_node", "input_node"), "the teacher's weights, by the targets that it gives"),
    "d_teacher_bias": (("layer", "teacher_node"), "the teacher's biases, by the targets that it gives"),
    "d_teacher_norm_scale": (("layer", "teacher_node"), "the scale of the teacher's BatchNorm"),
    "d_teacher_norm_shift": (("layer", "teacher_node"), "the shift of the teacher's BatchNorm"),
    "d_scale": ((), "student.scale"),
}
_WIDTHS = ("width", "teacher_width", "input_width", "layer_name")
_COUNTED = {"sample": 0, "output": 0, "node": 0, "input_node": 0, "teacher_node": 0, "entry": 0, "layer": 1, "epoch": 1}


def dataset(
    ds: xr.Dataset, results: Sequence[tuple[Mapping[str, Any], Job, Found]], seeds: Sequence[int]
) -> xr.Dataset:
    """The results of all blocks as one Dataset; NaN for members that died, and for points that are not there yet."""
    blocks: dict[tuple[Any, ...], list[xr.Dataset]] = {}
    where: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for chosen, job, found in results:
        place = tuple(chosen.values())
        where[place] = chosen
        blocks.setdefault(place, []).append(_block(job, found))
    parts = []
    for place, each in blocks.items():
        whole = xr.concat(
            each, "seed", data_vars="all", coords="minimal", compat="equals", join="outer", combine_attrs="override"
        )
        parts.append(whole.reindex(seed=list(seeds)).expand_dims({dim: [value] for dim, value in where[place].items()}))
    if not parts:
        return xr.Dataset(coords={"seed": list(seeds)}, attrs=_attrs(ds, results, xr.Dataset()))
    merged = (
        parts[0] if len(parts) == 1
        else xr.merge(parts, compat="no_conflicts", join="outer", combine_attrs="override")
    )  # fmt: skip
    dims = [dim for dim in swept_dimensions(ds) if dim in where[next(iter(where))]]
    merged = merged.reindex({dim: ds[dim].values for dim in dims}).transpose(*dims, ..., missing_dims="ignore")
    coordinates = {
        str(name): c.variable
        for name, c in ds.coords.items()
        if name not in merged.coords and set(c.dims) <= {*dims, "layer"} and str(name) != "epoch"
        and (str(name) in dims or name in _WIDTHS or set(c.dims) == {POINT})
        and all(merged.sizes.get(d) == ds.sizes[d] for d in c.dims)
    }  # fmt: skip
    merged = merged.assign_coords(coordinates)
    return merged.assign_attrs(_attrs(ds, results, merged))


def _block(job: Job, found: Found) -> xr.Dataset:
    """The result of one block of members of one run."""
    what = observed(job.of, job.experiment).text
    seeds = list(job.experiment.seed_labels)
    made: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    for suffix, group in (("", found.slopes), ("_error", found.errors)):
        for name, value in group.items():
            dims, wherein = _DERIVATIVES[name]
            if isinstance(value, list):
                array = _padded(value)
            else:
                array = value
                dims = ("entry",) if name == "d_start" else dims
            long_name = f"derivative of {what} at epoch {job.epoch} in {wherein}"
            if suffix:
                long_name = f"standard error of the {long_name}"
            made[name + suffix] = (("seed", *dims), array, {"units": "1", "long_name": long_name, "source": SOURCE})
    text = f"{what} at epoch {job.epoch}"
    made["value"] = ("seed",), found.value, {"units": "1", "long_name": text, "source": "the observable as asked for"}
    made["replay_difference"] = (
        ("seed",), found.difference if found.compared >= 0 else np.full(len(seeds), np.nan),
        {"units": "1", "source": "tsdyn.sensitivity",
         "long_name": "largest difference of the weights trained again in float64 from the recorded ones",
         "comment": f"of the recorded epochs up to {found.compared}"},
    )  # fmt: skip
    made |= _certificate(found)
    coords: dict[str, Any] = {"seed": seeds}
    sizes = {dim: size for dims, array, _ in made.values() for dim, size in zip(dims, array.shape, strict=True)}
    for dim, first in _COUNTED.items():
        if dim in sizes:
            most = max(a.shape[d.index(dim)] for d, a, _ in made.values() if dim in d)
            coords[dim] = np.arange(first, most + first)
    if "wrt" in sizes:
        coords |= {"wrt": list(job.wrt), "side": list(SIDES)}
    arrays = {}
    for name, (dims, array, attrs) in made.items():
        lengths = [len(coords[dim]) for dim in dims]
        full = np.full(lengths, np.nan)
        full[tuple(slice(n) for n in array.shape)] = array
        arrays[name] = (dims, full, attrs)
    return xr.Dataset(arrays, coords)


def _certificate(found: Found) -> dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]]:
    """The variables that say how far the derivatives hold; none if that was not computed."""
    made: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    if found.radius is not None and found.growth is not None:
        made["radius"] = (
            ("seed", "wrt", "side"), found.radius,
            {"units": "1",
             "source": "tsdyn.sensitivity: min |z|/|ż| over steps, samples and hidden nodes, ż the tangent of z",
             "long_name": "largest change along the normalised derivative that flips no gate",
             "comment": "side + is along the derivative, - against it; infinite where nothing flips; NaN where nothing "
             "can flip (a smooth model), or the derivative is 0"},
        )  # fmt: skip
        if found.kinks is not None:
            made["observable_radius"] = (
                ("seed", "wrt", "side"), found.kinks,
                {"units": "1",
                 "source": "tsdyn.sensitivity: min |z|/|ż| over hidden nodes and the samples that the observable is "
                 "measured on, at its epoch",
                 "long_name": "largest change along the normalised derivative by which none of the observable's own "
                 "samples crosses a kink",
                 "comment": "beyond it the derivative changes by a sample's share; NaN where nothing has kinks, or the "
                 "observable is measured on no samples or on unknown ones"},
            )  # fmt: skip
        made["tangent_growth"] = (
            ("seed", "wrt", "epoch"), found.growth,
            {"units": "1", "source": "tsdyn.sensitivity: forward pass, τ_t = (∂θ_t/∂θ_{t−1}) τ_{t−1} + (∂θ_t/∂p) u",
             "long_name": "norm of the parameters' change per unit of change along the normalised derivative"},
        )  # fmt: skip
    return made


def _padded(layers: Sequence[np.ndarray | None]) -> np.ndarray:
    """Arrays of the layers, (member, ...) each, as one (member, layer, ...), NaN where a layer is narrower."""
    there = [layer for layer in layers if layer is not None and layer.ndim > 1 and layer.size]
    shape = tuple(
        max(layer.shape[i] for layer in there if layer.ndim == there[0].ndim) for i in range(1, there[0].ndim)
    )
    found = np.full((len(there[0]), len(layers), *shape), np.nan)
    for i, layer in enumerate(layers):
        if layer is not None and layer.size:
            found[:, i][(slice(None), *(slice(n) for n in layer.shape[1:]))] = layer
    return found


# --- words ---------------------------------------------------------------------------------------------------


def _attrs(
    ds: xr.Dataset, results: Sequence[tuple[Mapping[str, Any], Job, Found]], merged: xr.Dataset
) -> dict[str, Any]:
    copied = ("experiment", "name", "digest", "dtype", "conventions", "run")
    found: dict[str, Any] = {key: ds.attrs[key] for key in copied if key in ds.attrs}
    found |= {"tsdyn_version": __version__}
    found["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if not results:
        return found | {"reach": json.dumps(["no member lives at that epoch"])}
    job = results[0][1]
    found |= {
        "observable": observed(job.of, job.experiment).text,
        "observable_epoch": job.epoch,
        "wrt": ",".join(job.wrt),
        "adjoint": ", ".join(sorted({result.way for _, _, result in results})),
        # 0 is the start
        "replayed_from": ",".join(map(str, sorted({0, *(e for _, _, result in results for e in result.begun)}))),
    }
    gated = any(result.gated for _, _, result in results)
    if job.certificate and not gated:
        found["radius_reason"] = (
            "NaN: nothing can flip: a smooth activation (or a module, whose gates are not known), no clipping, no "
            "maximum"
        )
    if job.smoothed:
        found["smoothed"] = f"mean over {job.smoothed} starts, each weight moved by {job.spread:g} of its tensor's rms"
    return found | {"reach": json.dumps(words(merged, gated))}


_CHANGES = {
    "start": "of the start (norm of all changes of weights and biases together)",
    "sample": "of the samples' weights (norm)",
    "target": "of the targets (norm)",
    "input": "of the inputs (norm)",
    "learning_rate": "of the learning rates (norm over epochs)",
    "teacher": "of the teacher (norm)",
    "scale": "of student.scale",
}


def words(ds: xr.Dataset, gated: bool) -> list[str]:
    """How far the derivatives of a result predict, one sentence for each ``wrt``."""
    if "radius" not in ds:
        return ["how far the derivatives predict was not asked for (certificate = false)"]
    lines = []
    for name in ds["wrt"].values.tolist():
        if not gated:
            lines.append(f"{name}: the model is smooth, so that the derivative holds in the limit of small changes")
            continue
        radii = ds["radius"].sel(wrt=name).values
        radii = radii[~np.isnan(radii)]
        if not len(radii):
            lines.append(f"{name}: the derivative is 0 or not known")
        elif np.isinf(radii).all():
            lines.append(f"{name}: no gate flips along the derivative, to first order, whatever the change")
        else:
            low, high = radii.min(), radii[np.isfinite(radii)].max()
            span = f"{low:.2g}" if low == high else f"{low:.2g} (at best {high:.2g})"
            kinks = ds["observable_radius"].sel(wrt=name).values if "observable_radius" in ds else np.array([])
            first = kinks[np.isfinite(kinks)].min(initial=np.inf)
            bends = "" if not first < low else f" (from {first:.2g} on single samples bend it, each by its share)"
            lines.append(
                f"{name}: predicts changes {_CHANGES[name]} up to {span}{bends}; beyond, gates flip, and only training "
                "again tells"
            )
    return lines
