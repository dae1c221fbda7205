"""The directory of one run: claimed, committed to segment by segment, resumed, consolidated.  Imports no torch."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np

from tsdyn import netcdf, study_directories
from tsdyn.durable import (
    SUFFIX,
    ArchiveError,
    DirectoryError,
    local_path,
    make_directory,
    refuse_changed,
    refuse_link,
    refused,
    remove_sealed,
    replacing,
    seal_of,
    sha256,
    sync_directory,
    write_bytes,
    write_text,
)
from tsdyn.experiment import Experiment, differences
from tsdyn.lock import NAME as LOCK
from tsdyn.lock import Lock
from tsdyn.netcdf import State
from tsdyn.schema import VARIABLES, Label, recorded
from tsdyn.sweep_axes import axes, places

EXPERIMENT = "experiment.toml"
ARCHIVE = "archive.nc"
SEGMENTS = "segments"

#: Consolidation holds about this much of the archive in memory.  Above 32 MB the allocator maps every block anew, and
#: its pages cost as much as what is read into them.
BLOCK_BYTES = 1 << 24
OPEN_FILES = 256
_SEGMENT = re.compile(r"epoch-(\d{6,})-(\d{6,})\.nc")

#: Variable → one array (seed, epoch), or one a layer from the lowest up, (seed, epoch, node...); constants: no epoch.
Records = Mapping[str, "np.ndarray | list[np.ndarray]"]


class Segment(NamedTuple):
    """A committed file and the trained epochs it covers."""

    first: int
    last: int
    path: Path


def segments(path: Path) -> list[Segment]:
    """The committed segments of a run, in order of epochs.

    Raises:
        ArchiveError: if epochs are missing between two of them, or one is a symbolic link.
    """
    refuse_link(path / SEGMENTS)
    named = [(segment_epochs(file), file) for file in (path / SEGMENTS).glob("*.nc")]
    found = sorted(Segment(*epochs, file) for epochs, file in named if epochs)
    for segment in found:
        refuse_link(segment.path)
    for before, after in itertools.pairwise([Segment(-1, -1, path), *found]):
        if after.first != before.last + 1:
            raise ArchiveError(
                f"{path}: segments end at epoch {before.last} and go on at {after.first}; epochs between are missing: "
                f"`tsdyn repair {path}` keeps what can be gone on from"
            )
    return found


def segment_epochs(file: Path) -> tuple[int, int] | None:
    """First and last epoch that a segment's name says; None if it is no segment's name."""
    match = _SEGMENT.fullmatch(file.name)
    return (int(match[1]), int(match[2])) if match else None


def segment_path(path: Path, first: int, last: int) -> Path:
    """The file that holds what was recorded among trained epochs `first`..`last`, and the state after `last`."""
    return path / SEGMENTS / f"epoch-{first:06d}-{last:06d}.nc"


def extends(longer: Experiment, shorter: Experiment) -> bool:
    """Whether `longer` is `shorter` trained on, over more points, or both.

    Only ``training.epochs`` may differ, and be more, and the values in ``sweep``, of which none may be missing.
    """
    epochs = longer.training.epochs
    alike = longer.kind == shorter.kind and bool(longer.sweep) == bool(shorter.sweep)
    if epochs < shorter.training.epochs or longer == shorter or not alike:
        return False
    kept: dict[str, Any] = {"training.epochs": epochs} if longer.kind == "training" else {}
    kept |= {"sweep": longer.sweep} if longer.sweep else {}
    if differences(longer, shorter.replace(kept)):
        return False
    theirs, mine = ([json.dumps(p, sort_keys=True) for p in places(e.sweep).values()] for e in (shorter, longer))
    return [axis.keys for axis in axes(longer.sweep)] == [axis.keys for axis in axes(shorter.sweep)] and (
        set(theirs) <= set(mine)
    )


def claim(path: Path, experiment: Experiment) -> None:
    """Make `path` the directory of `experiment`, or check that it is, or that `experiment` extends what it holds.

    Raises:
        ArchiveError: if it holds another experiment, naming what differs, or files that are not a run's; or another
            process is making it its own in this moment.
    """
    if not _claimed(path, experiment):
        make_directory(path)
        with Lock(path):
            _sign(path, experiment)


def _claimed(path: Path, experiment: Experiment) -> bool:
    """Whether `path` is the directory of `experiment` already; if not, it is free to be, or `claim`'s error."""
    file = path / EXPERIMENT
    if file.exists():
        study_directories.refuse_to_write(path)
        theirs = Experiment.from_toml(file)
        if theirs == experiment:
            return True
        if not extends(experiment, theirs):
            raise DirectoryError(
                f"{path}: holds another experiment; nothing was overwritten. What differs:\n  "
                + "\n  ".join(differences(experiment, theirs))
                + "\nGive another directory with -o, or remove this one. (A run can be gone on with by more epochs "
                "and a sweep over more values, everything else the same.)"
            )
        return not experiment.sweep  # a run is extended by its writer
    # what a writer killed in its first milliseconds leaves is its own
    leftovers = re.compile(rf"{LOCK}(\.\w+)?|\.{re.escape(EXPERIMENT)}\.\d+\.tmp")
    if path.exists() and (not path.is_dir() or any(not leftovers.fullmatch(e.name) for e in path.iterdir())):
        what = "is not empty and holds no experiment" if path.is_dir() else "is a file"
        raise DirectoryError(f"{path}: {what}; nothing was overwritten. Give another directory with -o.")
    return False


def _sign(path: Path, experiment: Experiment) -> None:
    """Write whose directory it is, under its lock; another may have done so just before."""
    if not _claimed(path, experiment):
        write_text(path / EXPERIMENT, experiment.to_toml())


class Run:
    """The directory of one run, held for writing.

    Use as a context manager: entering takes the lock and clears what an interrupted writer left, leaving gives the
    lock back.

    Args:
        path: The directory; made if it does not exist.
        experiment: What the run computes; without a sweep.  With more epochs than the directory holds of the same
            experiment, the run is extended.

    Raises:
        ArchiveError: if another process holds the directory, it holds another experiment (every difference is
            named), files that are not a run's, or symbolic links.  Nothing is overwritten.
    """

    def __init__(self, path: str | Path, experiment: Experiment) -> None:
        if experiment.sweep:
            raise ValueError("Run: the experiment has a sweep; each point of it is a run (tsdyn.run does this)")
        self.path = local_path(path)
        self.experiment = experiment
        self.layout = experiment.layout
        self.variables = recorded(experiment.kind, experiment.record.observables)
        self._lock = Lock(self.path)

    def __enter__(self) -> Run:
        if not _claimed(self.path, self.experiment):
            make_directory(self.path)
        for name in (LOCK, EXPERIMENT, ARCHIVE, SEGMENTS):
            refuse_link(self.path / name)
        self._lock.acquire()
        try:
            self._settle()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise refused(self.path, error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _settle(self) -> None:
        """Finish what an interrupted writer began: leftovers go, a verified archive replaces its segments."""
        _sign(self.path, self.experiment)
        for folder in (self.path, self.path / SEGMENTS):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        for seal in (self.path / SEGMENTS).glob(f"*{SUFFIX}"):
            if not seal.with_name(seal.name.removesuffix(SUFFIX)).exists():
                seal.unlink()
        if self.finished and (self.path / SEGMENTS).is_dir():
            if any((self.path / SEGMENTS).iterdir()):
                refuse_changed(self.path / ARCHIVE)
            self._drop_segments()
        theirs = Experiment.from_toml(self.path / EXPERIMENT)
        if theirs != self.experiment:
            if self.finished:
                self._reopen(theirs)
            write_text(self.path / EXPERIMENT, self.experiment.to_toml())
        if not self.finished and not (self.path / SEGMENTS).is_dir():
            make_directory(self.path / SEGMENTS)

    def _reopen(self, shorter: Experiment) -> None:
        """The archive of a finished run becomes the first segment of the longer one, in one rename."""
        refuse_changed(self.path / ARCHIVE)
        with netcdf.dataset(self.path / ARCHIVE) as nc:
            if "state" not in nc.groups:
                raise DirectoryError(
                    f"{self.path}: its archive is of schema {nc.schema_version}, which keeps no state to train on "
                    f"from; it stays as it is, run {self.experiment.training.epochs} epochs into another directory"
                )
        make_directory(self.path / SEGMENTS)
        target = segment_path(self.path, 0, shorter.training.epochs)
        write_text(seal_of(target), f"{sha256(self.path / ARCHIVE)}  {target.name}\n")
        (self.path / ARCHIVE).rename(target)
        sync_directory(self.path / SEGMENTS)
        sync_directory(self.path)
        seal_of(self.path / ARCHIVE).unlink()

    @property
    def finished(self) -> bool:
        """Whether the archive of all epochs is there."""
        return (self.path / ARCHIVE).exists()

    @property
    def bytes_per_epoch(self) -> int:
        """Size of one recorded epoch, without padding."""
        return netcdf.bytes_per_epoch(self.layout, self.variables, self.experiment.dtype)

    def committed(self) -> int | None:
        """Last committed epoch of training, None before the first commit."""
        found = segments(self.path)
        return found[-1].last if found else None

    def commit(
        self,
        first: int,
        last: int,
        epochs: Sequence[Label],
        records: Records,
        state: State,
        attrs: Mapping[str, Any],
    ) -> None:
        """Write the recorded `epochs` among trained epochs `first`..`last` and the state after `last`, in one rename.

        The file is made in memory and written in one go, so that a failed write is the system's error, not HDF5's.

        Args:
            first: First step of the segment: of training, an epoch.
            last: Last step of the segment.
            epochs: Labels of the recorded ones among them, increasing: epochs, times or α.
            records: Their measurements; in the first segment also what is known at the start, in the last what is
                known at the end.
            state: Everything needed to go on; arrays by name, among them ``death_epoch``.
            attrs: Global attributes.

        Raises:
            ArchiveError: if it cannot be written, or the lock was lost; what was committed before is intact.
        """
        self._lock.confirm()
        expected = self.bytes_per_epoch * len(epochs) + sum(a.nbytes for a in state.values()) + (1 << 16)
        with netcdf.guarded():
            nc = netCDF4.Dataset("segment", "w", format="NETCDF4", memory=expected)
            netcdf.create(nc, self.layout, epochs, tuple(records), self.experiment.dtype, attrs)
            nc["death_epoch"][:] = state["death_epoch"]
            for name, value in records.items():
                blocks = enumerate(value, start=1) if isinstance(value, list) else ((None, value),)
                for layer, block in blocks:
                    nc[name][netcdf.index(VARIABLES[name], self.layout, slice(0, len(epochs)), layer)] = block
            netcdf.write_state(nc, state)
            content = nc.close()
        write_bytes(segment_path(self.path, first, last), content, seal=True)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """State after the last committed epoch, and the global attributes of its segment.

        Raises:
            ArchiveError: if the segment that holds them is damaged.
        """
        newest = segments(self.path)[-1]
        refuse_changed(newest.path)
        try:
            with netcdf.dataset(newest.path) as nc:
                return netcdf.read_state(nc), {name: nc.getncattr(name) for name in nc.ncattrs()}
        except (OSError, RuntimeError, AttributeError) as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError(
                f"{newest.path}: cannot be read: {error}; `tsdyn repair {self.path}` keeps what can be gone on from"
            ) from error

    def consolidate(self, attrs: Mapping[str, Any]) -> None:
        """All epochs in one file, read back and compared with the segments before these go.  Repeatable.

        Raises:
            ArchiveError: if it cannot be written, a segment is damaged, or epochs are missing; segments are kept.
        """
        self._lock.confirm()
        files = [segment.path for segment in segments(self.path)]
        for file in files:
            refuse_changed(file)
        epochs = self.experiment.labels
        size = self.bytes_per_epoch * len(epochs)
        with replacing(self.path / ARCHIVE, size, seal=True) as temporary, _Files(files) as opened:
            with netcdf.dataset(temporary, "w") as nc:
                netcdf.create(nc, self.layout, epochs, self.variables, self.experiment.dtype, attrs)
                self._copy(opened, nc)
            with netcdf.dataset(temporary) as nc:
                self._compare(opened, nc)
        self._drop_segments()

    def _drop_segments(self) -> None:
        """Remove the segments of an archive that is finished and whole."""
        folder = self.path / SEGMENTS
        for file in sorted(folder.glob("*.nc")):
            remove_sealed(file)
        with suppress(OSError):  # somebody's own files in there stay
            folder.rmdir()

    def _copy(self, opened: _Files, nc: netCDF4.Dataset) -> None:
        for name, index, block in self._windows(opened, nc):
            if not np.isnan(block).all():  # what is never written reads as NaN and takes no space
                nc[name][index] = block
        with opened[opened.files[-1]] as last:
            nc["death_epoch"][:] = last["death_epoch"][:]
            netcdf.write_state(nc, netcdf.read_state(last))

    def _compare(self, opened: _Files, nc: netCDF4.Dataset) -> None:
        for name, index, block in self._windows(opened, nc):
            if not _same(np.asarray(nc[name][index]), block):
                raise ArchiveError(
                    f"{self.path}: {name} read back differently from what was written; segments are kept"
                )

    def _windows(
        self, opened: _Files, nc: netCDF4.Dataset
    ) -> Iterator[tuple[str, tuple[slice | int, ...], np.ndarray]]:
        """(variable, index into `nc`, block) over all of `nc`; each block is whole chunks of one layer."""
        held = self._held(opened)
        for name in self.variables:
            for window, layer, members in self._blocks(name, nc):
                index = netcdf.index(VARIABLES[name], self.layout, window, layer, members)
                yield name, index, self._gathered(held, opened, name, window, layer, members)

    def _held(self, opened: _Files) -> list[tuple[Path, dict[int, int]]]:
        """Where each scheduled epoch is: file by file, its position in the archive → its row in the file."""
        labels = self.experiment.labels
        position = {label: i for i, label in enumerate(labels)}
        held = []
        for file in opened.files:
            with opened[file] as segment:
                epochs = segment[self.layout.path][:].tolist()
            held.append((file, {position[epoch]: row for row, epoch in enumerate(epochs) if epoch in position}))
        found = [p for _, rows in held for p in rows]
        if found != list(range(len(position))):
            missing = sorted(set(range(len(position))) - set(found))
            raise ArchiveError(
                f"{self.path}: segments hold {len(found)} of the {len(position)} epochs to record, missing or out of "
                f"order from {self.layout.path} {labels[missing[0]] if missing else found}; segments are kept"
            )
        return held

    def _blocks(self, name: str, nc: netCDF4.Dataset) -> Iterator[tuple[slice, int | None, slice]]:
        """(epochs, layer, seeds) of blocks of about `BLOCK_BYTES`."""
        variable, epochs, seeds = VARIABLES[name], len(self.experiment.schedule), len(self.layout.seeds)
        chunk = {"epoch": epochs} | dict(zip(variable.dims, nc[name].chunking(), strict=True))
        layers = range(1, self.layout.depth + 1) if variable.layered else (None,)
        for start in range(0, epochs, chunk["epoch"]):
            window = slice(start, min(start + chunk["epoch"], epochs))
            for layer in layers:
                rows = window.stop - window.start if "epoch" in variable.dims else 1
                chunk_bytes = (
                    chunk["seed"] * rows * math.prod(self.layout.block(variable, layer)) * nc[name].dtype.itemsize
                )
                members = chunk["seed"] * max(1, BLOCK_BYTES // max(1, chunk_bytes))
                for low in range(0, seeds, members):
                    yield window, layer, slice(low, min(low + members, seeds))

    def _gathered(
        self,
        held: Sequence[tuple[Path, dict[int, int]]],
        opened: _Files,
        name: str,
        window: slice,
        layer: int | None,
        members: slice,
    ) -> np.ndarray:
        """One block, from the segments that hold a part of it."""
        variable, parts = VARIABLES[name], []
        constant = "epoch" not in variable.dims
        holding = {"start": held[:1], "along": held, "end": held[-1:]}[variable.when]
        for file, rows in holding:
            inside = [row for position, row in rows.items() if window.start <= position < window.stop]
            if inside or constant:
                epochs = slice(inside[0], inside[-1] + 1) if inside else slice(None)
                with opened[file] as segment:
                    parts.append(np.asarray(segment[name][netcdf.index(variable, self.layout, epochs, layer, members)]))
        return parts[0] if constant else np.concatenate(parts, axis=1)


def _same(found: np.ndarray, block: np.ndarray) -> bool:
    """Equal numbers; by their bits first, which is six times as quick, and NaN with NaN where these differ."""
    bits = f"u{block.dtype.itemsize}"
    alike = found.dtype == block.dtype and np.array_equal(found.view(bits), block.view(bits))
    return alike or np.array_equal(found, block, equal_nan=True)


class _Files:
    """Segments being read side by side: opening one takes 3 ms, so as many as `OPEN_FILES` stay open."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._stack = ExitStack()
        self._open: dict[Path, netCDF4.Dataset] = {}

    def __enter__(self) -> _Files:
        self._stack.enter_context(netcdf.guarded())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def __getitem__(self, file: Path) -> Iterator[netCDF4.Dataset]:
        if file not in self._open and len(self._open) < OPEN_FILES:
            self._open[file] = self._stack.enter_context(netcdf.dataset(file))
        if file in self._open:
            yield self._open[file]
        else:
            with netcdf.dataset(file) as nc:
                yield nc
