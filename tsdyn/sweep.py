"""A grid of experiments: one run a point, one directory, one Dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xarray as xr

from tsdyn import archive, runner
from tsdyn.experiment import Experiment

#: Called before each point with (position from 1, points, directory name, experiment); its Progress is then used.
PointProgress = Callable[[int, int, str, Experiment], "runner.Progress | None"]


def preflight(experiment: Experiment, path: str | Path) -> None:
    """Refuse a directory that is another's before anything is estimated or drawn.

    Raises:
        ArchiveError: as `run`.
    """
    archive.claim(archive.local_path(path), experiment)


def run(
    experiment: Experiment,
    path: str | Path,
    *,
    device: str = "cpu",
    progress: runner.Progress | None = None,
    point: PointProgress | None = None,
) -> xr.Dataset:
    """Run an experiment, or every point of its sweep, into `path`; resumes what was committed.

    Args:
        experiment: With or without a sweep.
        path: Directory; made if absent.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        progress: Told after every epoch, see `runner.Progress`.
        point: For a sweep, told before each point; returns that point's progress, None for `progress`.

    Returns:
        The lazy archive; the swept keys of a sweep are its leading dimensions.

    Raises:
        ArchiveError: if the directory is another's, held by another process, or cannot be written.
        DeviceError: if there is no such device.
    """
    runner.check_device(device)
    if not experiment.sweep:
        return runner.run(experiment, path, device=device, progress=progress)
    path = archive.local_path(path)
    points = archive.write_sweep(path, experiment)
    for position, (name, single) in enumerate(points.items(), start=1):
        own = point(position, len(points), name, single) if point else None
        runner.run(single, path / name, device=device, progress=own or progress)
    return archive.open(path)
