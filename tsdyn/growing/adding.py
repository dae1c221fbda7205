"""Measure observables of a finished or unfinished run or sweep, and add them to it: whole files, with checksums.

What was added stays, whatever happens afterwards; given again, the same call measures only what is missing.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tsdyn import schema
from tsdyn.archive import additions, netcdf, reading
from tsdyn.archive.headers import Source
from tsdyn.archive.lock import Lock
from tsdyn.archive.run_directory import RUN
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.sweep_directory import is_sweep, sweep_points
from tsdyn.archive.whole_files import DirectoryError, local_path, make_directory, refuse_link, refused
from tsdyn.experiment.experiment import Experiment
from tsdyn.growing.measuring import lost_parameters, measure
from tsdyn.observables.registry import Observed
from tsdyn.problem import input_files
from tsdyn.running import packages, provenance
from tsdyn.running.own_modules import Maker

#: What is measured is committed once it holds this many bytes.
COMMIT_BYTES = 1 << 27
#: Attributes of the archive that a file of additions repeats.
_KEPT = ("experiment", "name", "digest", "dtype", "conventions", RUN, input_files.ATTRIBUTE)


def add(
    path: str | Path,
    observables: Sequence[str | Observed],
    epochs: int | Iterable[int] | None = None,
    *,
    student: Maker | None = None,
    teacher: Maker | None = None,
    told: Callable[[str], object] = lambda line: None,
) -> list[Path]:
    """Measure observables from recorded parameters and add them to a run, or to every point of a sweep.

    Recorded numbers stay as they are; only members and epochs at which a variable is missing are measured, and none
    whose parameters were lost (`lost_parameters`), so that they can be once these are there again.  Each file is
    committed whole as soon as it is measured, so that a call that was stopped is gone on with by the same call.

    Args:
        path: Directory of a training run or sweep, finished or not.
        observables, epochs, student, teacher: As `measure` takes them.
        told: Called with a line about each point.

    Returns:
        The files that were added.

    Raises:
        ArchiveError: if the directory is none of a run, or cannot be written; what was added before is intact.
        ExperimentError, ValueError: as `measure`.
    """
    path = local_path(path)
    if path.is_file():
        raise DirectoryError(f"{path}: is a file; give the directory of its run, where what is measured is added")
    wanted = None if epochs is None else [epochs] if isinstance(epochs, (int, np.integer)) else list(epochs)
    added: list[Path] = []
    folders = _folders(path)
    for position, folder in enumerate(folders, start=1):
        ds = reading.opened(folder, upto=math.inf)
        say = _titled(f"[{position}/{len(folders)}] {folder.name}: " if len(folders) > 1 else "", told)
        done = list(_added(folder, ds, observables, wanted, student, teacher, say))
        added += done
        say(f"{len(done)} file{'s' * (len(done) != 1)} added" if done else "nothing is left to measure")
    return added


def _titled(title: str, told: Callable[[str], object]) -> Callable[[str], object]:
    return lambda line: told(title + line)


def _folders(path: Path) -> list[Path]:
    """The directories of the runs that have a committed epoch."""
    if not is_sweep(path):
        return [path]
    folders = [path / name for name in sweep_points(path)]
    for folder in folders:
        refuse_link(folder)
    begun = [folder for folder in folders if any(folder.rglob("*.nc"))]
    if not begun:
        raise DirectoryError(reading.nothing_read_of([path]))
    return begun


def _added(
    folder: Path,
    ds: xr.Dataset,
    observables: Sequence[str | Observed],
    epochs: list[int] | None,
    student: Maker | None,
    teacher: Maker | None,
    told: Callable[[str], object],
) -> Iterator[Path]:
    lazy = measure(ds, observables, epochs, student, teacher)
    names = tuple(str(name) for name in lazy.data_vars)
    # what is asked for decides which dimensions there are, not what the run recorded
    asked = experiment_of(ds).replace({"record.observables": list(names)})
    if not _missing(folder, ds, lazy, names):
        return
    lost = lost_parameters(ds.sel(epoch=lazy.indexes["epoch"]))
    if lost.any():
        members, labels = ds["seed"].values[lost.any(1)].tolist(), lazy["epoch"].values[lost.any(0)].tolist()
        told(f"parameters of seeds {members} at epochs {labels} are not stored; nothing is measured there")
    try:
        make_directory(folder / additions.MEASURED)
        with Lock(folder / additions.MEASURED):
            for leftover in (folder / additions.MEASURED).glob(".*.tmp"):
                leftover.unlink()
            # looked at again under the lock: another command may have measured meanwhile
            for (seeds, labels), left in _missing(folder, ds, lazy, names, lost).items():
                each = netcdf.bytes_per_epoch(asked.layout, left, asked.dtype)
                step = max(1, COMMIT_BYTES // max(1, each))
                for low in range(0, len(labels), step):
                    part = lazy[list(left)].sel(seed=list(seeds), epoch=list(labels[low : low + step])).compute()
                    for name in left:
                        attrs = _attributes(ds, asked, name)
                        values = part[name].values
                        yield additions.write(folder, asked, name, seeds, labels[low : low + step], values, attrs)
    except OSError as error:
        raise refused(folder / additions.MEASURED, error) from error


#: Seeds and epochs → variables that are missing there.
_Missing = dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[str, ...]]


def _missing(
    folder: Path, ds: xr.Dataset, lazy: xr.Dataset, names: Sequence[str], lost: NDArray | None = None
) -> _Missing:
    """What is neither recorded nor measured yet; without what cannot be measured, since its parameters are `lost`."""
    seeds, epochs = lazy.indexes["seed"].tolist(), lazy.indexes["epoch"].tolist()
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in names:
        covered = _covered(folder, ds, name, seeds, epochs) | (False if lost is None else lost)
        alike: dict[tuple[int, ...], list[int]] = {}
        for seed, row in zip(seeds, covered, strict=True):
            alike.setdefault(tuple(e for e, done in zip(epochs, row, strict=True) if not done), []).append(seed)
        for labels, members in alike.items():
            if labels:
                found.setdefault((tuple(members), labels), []).append(name)
    return {at: tuple(left) for at, left in found.items()}


def _covered(folder: Path, ds: xr.Dataset, name: str, seeds: list[int], epochs: list[int]) -> NDArray:
    """Whether a variable is recorded or was added, (seed, epoch); of the dead it counts once it was looked at.

    NaN of an earlier version, which can be those of parameters that were lost then, are measured again.
    """
    there = np.zeros((len(seeds), len(epochs)), bool)
    if name in ds:
        array = ds[name].sel(seed=seeds, epoch=epochs)
        inner = [dim for dim in array.dims if dim not in ("seed", "epoch")]
        there |= array.notnull().any(inner).transpose("seed", "epoch").values
    for file in additions.files(folder):
        header = Source.of(file).header
        if name in header.variables and additions.trusted(header.attrs):
            held = np.isin(seeds, header.labels["seed"]), np.isin(epochs, header.labels["epoch"])
            there |= np.logical_and.outer(*held)
    return there


def _attributes(ds: xr.Dataset, asked: Experiment, name: str) -> dict[str, str | int]:
    """Global attributes of an addition: those of the run, and what measured it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = provenance.facts("cpu", asked)
    return {
        **{key: ds.attrs[key] for key in _KEPT if key in ds.attrs},
        **facts,
        **packages.attribute(asked),
        **schema.declarations((name,)),
        "schema_version": schema.VERSION,
        "created": now,
        additions.ADDED: json.dumps({"at": now, "tsdyn_version": facts["tsdyn_version"], **additions.COMPLETE}),
    }
