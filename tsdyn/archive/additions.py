"""What was measured of a run after it: files in its folder ``measured``, each whole, with a checksum.  No torch.

A file holds one variable at some seeds and epochs.  No file is ever changed: what is measured later, of further epochs
or seeds, is a further file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tsdyn.archive import netcdf
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.whole_files import ArchiveError, refuse_link, replacing
from tsdyn.experiment.experiment import Experiment
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import FAMILIES

#: Folder of a run's directory.
MEASURED = "measured"
#: Attribute of such a file: JSON of when it was measured, and by which version.
ADDED = "measured"
#: What that JSON also has, so that NaN means a member that died or stopped, or an observable that is not defined.
#: Development versions of 0.2 before 30 November 2026 measured NaN of parameters that were lost, too.
COMPLETE = {"of": "whole parameters"}
_NAME = re.compile(r"[A-Za-z_]\w*-(\d{4,})\.nc")


def files(folder: Path) -> list[Path]:
    """The files of what was measured of the run in `folder`, oldest first.

    Raises:
        DirectoryError: if one is a symbolic link.
    """
    below = folder / MEASURED
    if not below.is_dir():
        return []
    refuse_link(below)
    found = [(int(match[1]), file) for file in below.glob("*.nc") if (match := _NAME.fullmatch(file.name))]
    for _, file in found:
        refuse_link(file)
    return [file for _, file in sorted(found)]


def is_addition(file: Path) -> bool:
    """Whether a file is one of those in a folder ``measured``."""
    return file.parent.name == MEASURED


def write(
    folder: Path,
    experiment: Experiment,
    name: str,
    seeds: Sequence[int],
    epochs: Sequence[int],
    values: NDArray,
    attrs: Mapping[str, Any],
) -> Path:
    """Commit one variable of a run, measured at some seeds and epochs; it appears in one rename.

    Args:
        folder: Directory of the run; the caller holds the lock of its folder ``measured``, which exists.
        experiment: That of the run, recording `name`.
        name: The variable.
        seeds, epochs: Labels.
        values: (seed, epoch, ...), padded as `tsdyn.open` gives it.
        attrs: Global attributes.

    Raises:
        ArchiveError: if it cannot be written; what was committed is intact.
    """
    layout = replace(experiment.layout, seeds=tuple(seeds))
    taken = files(folder)
    number = 1 + max((int(_NAME.fullmatch(file.name)[1]) for file in taken), default=0)  # type: ignore[index]
    target = folder / MEASURED / f"{name}-{number:04d}.nc"
    variable = variable_of(name)
    layers = range(1, layout.depth + 1) if variable.layered else (None,)
    with replacing(target, values.nbytes + (1 << 16), seal=True) as temporary:
        with netcdf.dataset(temporary, "w") as nc:
            netcdf.create(nc, layout, epochs, (name,), experiment.dtype, attrs)
            for layer in layers:
                at = netcdf.index(variable, layout, slice(0, len(epochs)), layer)
                block = values[at]
                if not np.isnan(block).all():
                    nc[name][at] = block
        with netcdf.dataset(temporary, only=name, upto=None) as nc:
            for layer in layers:
                at = netcdf.index(variable, layout, slice(0, len(epochs)), layer)
                if not np.array_equal(np.asarray(nc[name][at]), values[at], equal_nan=True):
                    raise ArchiveError(f"{target}: reads back differently from what was written; it was not added")
    return target


def told(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """When and by which version a file was measured, from its attributes; empty if they do not say."""
    try:
        found = json.loads(str(attrs[ADDED]))
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def parameters_there(ds: xr.Dataset) -> NDArray:
    """Whether all of a member's parameters are stored at an epoch, (seed, epoch), of one run that records them."""
    single = experiment_of(ds)
    there = np.ones((ds.sizes["seed"], ds.sizes["epoch"]), bool)
    if single.student.module is not None:
        parts = [ds["parameter"].isel(entry=slice(single.layout.entries))]
    else:
        parts = [
            part
            for i, (n, below) in enumerate(zip(single.layout.widths, single.layout.input_widths, strict=True))
            for part in (
                ds["weight"].isel(layer=i, node=slice(n), input_node=slice(below)),
                ds["bias"].isel(layer=i, node=slice(n)),
            )
        ]
        norms = FAMILIES["batch_norm"] if single.student.batch_norm != "none" else ()
        parts += [
            ds[name].isel(layer=i, node=slice(n)) for name in norms for i, n in enumerate(single.layout.widths[:-1])
        ]
    for part in parts:
        inner = [dim for dim in part.dims if dim not in ("seed", "epoch")]
        there &= part.notnull().all(inner).transpose("seed", "epoch").values
    return there


def trusted(attrs: Mapping[str, Any]) -> bool:
    """Whether a file's NaN mean that there was nothing to measure (`COMPLETE`)."""
    return COMPLETE.items() <= told(attrs).items()
