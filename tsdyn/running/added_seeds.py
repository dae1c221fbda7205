"""More seeds for a run: they are run in a directory below its own, then joined with it.

A member depends on its own seed only, so that it does not matter that it trains later than the others.  Until both are
finished the run stays what it was; the joined archive appears in one rename.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from tsdyn import vocabulary
from tsdyn.archive import changes, machines, netcdf
from tsdyn.archive.lock import NAME as LOCK
from tsdyn.archive.run_directory import ADDED, ARCHIVE, EXPERIMENT, RunDirectory, extends, segments
from tsdyn.archive.whole_files import ArchiveError, DirectoryError, looked_again, refuse_link, sync_directory
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem import input_files
from tsdyn.running.conventions import attributes


def parts_of(path: Path, experiment: Experiment) -> tuple[dict[Path, Experiment], dict[Path, Experiment]]:
    """The runs by which a directory becomes that of `experiment`, and the joins after them.

    Args:
        path: Directory of a run, or one that does not exist yet.
        experiment: Without a sweep.

    Returns:
        Directory → experiment of each run: of the seeds that are there, and of those to be added.  Directory →
        experiment of each that then gains those in its folder ``added``, in order.

    Raises:
        DirectoryError: if seeds are to be added to a run that keeps no training state.
    """
    return looked_again(lambda: _parts_of(path, experiment))


def _parts_of(path: Path, experiment: Experiment) -> tuple[dict[Path, Experiment], dict[Path, Experiment]]:
    there = _there(path)
    if there is None or not (there == experiment or extends(experiment, there)):
        return {path: experiment}, {}  # a new run, or one that will be refused
    refuse_link(path / ADDED)
    new = [seed for seed in experiment.seed_labels if seed not in there.seed_labels]
    if not new:
        return {path: experiment}, ({path: experiment} if (path / ADDED).exists() else {})
    _refuse_other_inputs(path, experiment, input_files.digests(experiment))
    if (path / ARCHIVE).exists():
        with netcdf.dataset(path / ARCHIVE) as nc:
            if netcdf.STATE not in netcdf.state_groups(nc):
                raise DirectoryError(
                    f"{path}: its archive is of schema {nc.schema_version}, which keeps no state to train on from; it "
                    f"stays as it is: run seeds {new} into another directory with -o, then tsdyn.open([one, other])"
                )
    runs, joins = _parts_of(path / ADDED, experiment.replace({"seeds": new}))
    return {path: experiment.replace({"seeds": there.seeds}), **runs}, {**joins, path: experiment}


def _there(path: Path) -> Experiment | None:
    """The experiment of a directory: of its archive if it is finished, since the experiment file may be behind it."""

    def look() -> Experiment:
        if (path / ARCHIVE).is_file() and not (path / ARCHIVE).is_symlink():
            with netcdf.dataset(path / ARCHIVE) as nc:
                return Experiment.from_toml_text(str(netcdf.attributes(nc).get("experiment")), archived=True)
        return Experiment.from_toml(path / EXPERIMENT, archived=True)

    try:
        return looked_again(look)
    except (ExperimentError, ArchiveError, OSError):  # RunDirectory says what is wrong
        return None


def _refuse_other_inputs(path: Path, experiment: Experiment, now: dict[str, str]) -> None:
    """Refuse to add seeds that would be drawn from other input files than those that are there.

    Raises:
        DirectoryError: naming each file with both its checksums.
    """
    files = [path / ARCHIVE] if (path / ARCHIVE).is_file() else [part.path for part in segments(path)[-1:]]
    for file in files:
        with netcdf.dataset(file, upto=math.inf) as nc:  # what is gone on from is compared, however large
            input_files.refuse_other(path, experiment, input_files.kept(netcdf.attributes(nc)) or {}, now)


def join(path: Path, experiment: Experiment, device: str) -> None:
    """Join a finished run with the finished one of further seeds in its folder ``added``, and remove that folder.

    Args:
        path: Directory of the run.
        experiment: That of all seeds.
        device: Device on which it was computed.

    Raises:
        ArchiveError: if it cannot be written; what was committed is intact.
    """
    there = _there(path)
    if there is not None and set(experiment.seed_labels) <= set(there.seed_labels):
        with RunDirectory(path, experiment):  # joined before: what is left is to say so
            _remove_joined(path, there)
        return
    assert there is not None  # its run has just finished
    new = experiment.replace({"seeds": [s for s in experiment.seed_labels if s not in there.seed_labels]})
    own = experiment.replace({"seeds": there.seeds})
    with RunDirectory(path, own) as target, RunDirectory(path / ADDED, new) as other:
        with netcdf.dataset(path / ARCHIVE) as nc:
            before = netcdf.attributes(nc)
        with netcdf.dataset(path / ADDED / ARCHIVE) as nc:
            theirs = netcdf.attributes(nc)
        _refuse_other_inputs(path, own, input_files.kept(theirs) or {})
        attrs = attributes(experiment, device) | changes.extended(before, changes.described(experiment, own))
        attrs |= {key: before[key] for key in ("parameters", input_files.ATTRIBUTE) if key in before}
        attrs |= {machines.HISTORY: _machines(before, theirs, list(new.seed_labels))}
        attrs |= machines.all_fallbacks(before, theirs)
        if vocabulary.WALL in before and vocabulary.WALL in theirs:
            attrs[vocabulary.WALL] = round(sum(float(one[vocabulary.WALL]) for one in (before, theirs)), 3)
        target.gain(other, experiment, attrs)
    _remove_joined(path, experiment)


def _machines(before: dict[str, Any], theirs: dict[str, Any], seeds: list[int]) -> str:
    """The machines that computed both: those of the further seeds are named with them, where they are others."""
    own = machines.history(before)
    known = [{key: entry.get(key) for key in machines.DECISIVE} for entry in own]
    more = [
        {**entry, "seeds": seeds}
        for entry in machines.history(theirs)
        if {key: entry.get(key) for key in machines.DECISIVE} not in known
    ]
    return json.dumps([*own, *more])


def _remove_joined(path: Path, experiment: Experiment) -> None:
    """Remove the folder of further seeds if the run has all of them, or if nothing was begun in it.

    The experiment file goes last, so that what is left of a removal that was cut short is known for what it is.
    """
    folder = path / ADDED
    refuse_link(folder)
    if not folder.is_dir():
        return
    left = _there(folder)
    begun = any(entry.name != LOCK for entry in folder.iterdir())
    if (left is None and begun) or (left is not None and not set(left.seed_labels) <= set(experiment.seed_labels)):
        return
    for entry in sorted(folder.iterdir()):  # an archive goes before its checksum
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (EXPERIMENT, LOCK):
            entry.unlink()
    for name in (EXPERIMENT, LOCK):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    sync_directory(path)
