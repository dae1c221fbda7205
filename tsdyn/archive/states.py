"""The training states that a run keeps along the way (``record.state_every``) and at its end.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import netCDF4
import numpy as np

from tsdyn.archive import netcdf
from tsdyn.archive.run_directory import ARCHIVE, segment_epochs, segments
from tsdyn.archive.whole_files import DirectoryError, local_path, looked_again


def kept(path: str | Path) -> dict[int, int]:
    """Epoch → bytes of each training state that the run in `path` keeps, the last one included, in order.

    Raises:
        ArchiveError: if a file cannot be read.
    """
    return looked_again(lambda: _kept(local_path(path)))


def _kept(path: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    for file, last in _files(path):
        with netcdf.dataset(file) as nc:
            for group in netcdf.state_groups(nc):
                epoch = netcdf.epoch_of(group)
                size = sum(array.size * array.dtype.itemsize for array in nc.groups[group].variables.values())
                at = _last(nc, last) if epoch is None else epoch
                if at is not None:
                    found[at] = int(size)
    return dict(sorted(found.items()))


def state_after(path: str | Path, epoch: int) -> dict[str, np.ndarray]:
    """The training state after an epoch: arrays by name, as `Runnable.restore` takes them.

    Raises:
        DirectoryError: if the run keeps none there; names those that it keeps.
        ArchiveError: if the file is damaged.
    """
    return states_after(path, [epoch])[epoch]


def states_after(path: str | Path, epochs: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
    """`state_after` of several epochs, for which each file is opened once."""
    return looked_again(lambda: _states_after(local_path(path), epochs))


def _states_after(path: Path, epochs: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    for file, last in _files(path):
        with netcdf.dataset(file, upto=math.inf) as nc:  # what is gone on from is compared, however large
            named = {epoch: netcdf.state_at(epoch) for epoch in epochs}
            groups = {epoch: group for epoch, group in named.items() if group in netcdf.state_groups(nc)}
            if netcdf.STATE in nc.groups and (end := _last(nc, last)) is not None and end in epochs:
                groups.setdefault(end, netcdf.STATE)
            found |= {epoch: netcdf.read_state(nc, group) for epoch, group in groups.items() if epoch not in found}
    missing = [epoch for epoch in epochs if epoch not in found]
    if missing:
        held = ", ".join(map(str, kept(path))) or "none"
        raise DirectoryError(
            f"{path}: keeps no training state after epoch {missing[0]}; it keeps those after {held}. "
            "record.state_every = k keeps one every k epochs, of what is trained from then on"
        )
    return found


def _files(path: Path) -> list[tuple[Path, int | None]]:
    """The archive of a run, or its segments, each with its last epoch if its name says it."""
    if (path / ARCHIVE).is_file():
        return [(path / ARCHIVE, None)]
    found: list[tuple[Path, int | None]] = []
    for segment in segments(path):
        named = segment_epochs(segment.path)
        found.append((segment.path, None if named is None else named[1]))
    return found


def _last(nc: netCDF4.Dataset, named: int | None) -> int | None:
    """The epoch after which a file's last state is; None for flows and online runs, whose labels are no epochs."""
    if named is not None:
        return named
    return int(nc["epoch"][-1]) if "epoch" in nc.variables else None
