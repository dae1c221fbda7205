"""Read directories of population flows and online learning that tsdyn 0.1 wrote: one netCDF file each.

Their ``experiment.toml`` has another format than `tsdyn.experiment` reads.  Imports no torch.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import xarray as xr

from tsdyn.archive import netcdf
from tsdyn.archive.whole_files import DirectoryError, refuse_link

EXPERIMENT = "experiment.toml"
#: Name of the results' file → keys that only the experiment file beside it has.
RESULTS = {"flows.nc": {"sizes", "activations"}, "online.nc": {"nodes", "teacher_nodes"}}


def result(path: Path) -> Path | None:
    """The file that holds, or was to hold, the results of such a directory; None for other directories.

    Raises:
        DirectoryError: if its experiment file is a symbolic link.
    """
    try:
        keys = set(tomllib.loads((path / EXPERIMENT).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return next((path / name for name, own in RESULTS.items() if own <= keys and "teacher" not in keys), None)


def read(file: Path) -> xr.Dataset:
    """The results, loaded, under the names that tsdyn 0.1 gave them.

    Raises:
        DirectoryError: if they were not finished, or cannot be read.
    """
    refuse_link(file)
    if not file.is_file():
        raise DirectoryError(
            f"{file.parent}: a study of tsdyn 0.1 that was not finished: it holds parts/ and no {file.name}; run the "
            "study into another directory"
        )
    netcdf.refuse_foreign(file)
    with netcdf.dataset(file) as nc:
        netcdf.refuse_oversized(file, nc)
    try:
        return xr.load_dataset(file, engine="netcdf4")  # under the lock that `hdf5.guarded` holds
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DirectoryError(f"{file}: cannot be read: {error}") from error


def refuse_to_write(path: Path) -> None:
    """Raise DirectoryError if `path` is a study directory of tsdyn 0.1."""
    file = result(path)
    if file is not None:
        raise DirectoryError(
            f"{path}: holds the results of a study of tsdyn 0.1 ({file.name}); it can be opened, but not "
            "resumed. Give another directory with -o."
        )
