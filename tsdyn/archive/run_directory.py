"""The directory of one run: claim it, commit segments, resume, join the segments into one file.  Imports no torch."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from tsdyn import schema
from tsdyn.archive import beside, changes, joining, made_files, netcdf, own_process, study_directories, swept_values
from tsdyn.archive.lock import NAME as LOCK
from tsdyn.archive.lock import Lock
from tsdyn.archive.netcdf import Records, State
from tsdyn.archive.swept_values import Swept
from tsdyn.archive.whole_files import (
    INTACT,
    SUFFIX,
    ArchiveError,
    DirectoryError,
    identity,
    local_path,
    make_directory,
    refuse_link,
    refused,
    remove_sealed,
    replacing,
    seal_of,
    sha256,
    sync_directory,
    write_text,
)
from tsdyn.archive.wrong_numbers import WRONG_THROUGH
from tsdyn.experiment import made_modules
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment, differences
from tsdyn.experiment.sweep_axes import axes, places
from tsdyn.schema import Layout
from tsdyn.vocabulary import Label, When

EXPERIMENT = "experiment.toml"
ARCHIVE = "archive.nc"
SEGMENTS = "segments"
#: Attribute shared by all files of one run, drawn at random when it begins; later files hold all that earlier ones do.
RUN = "run"
#: Attribute of an archive: JSON of key of the experiment file → SHA-256 of the file that it names.
INPUTS = "input_sha256"

#: Attribute of an archive: epochs outside its schedule, which shorter runs that it extends recorded last.
KEPT = "kept_epochs"
#: Attribute of an archive that `repair` wrote anew: what it could not keep.
DROPPED = "dropped"
#: Folder of a run's directory in which seeds that it is to gain are run, until they are joined with its own.
ADDED = "added"
#: How long to wait for another command that is claiming the same sweep's directory.
CLAIM_SECONDS = 30.0
_SEGMENT = re.compile(r"epoch-(\d{6,})-(\d{6,})\.nc")


class Segment(NamedTuple):
    """A committed file and the first and last epoch of training that it covers."""

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
                f"`tsdyn repair {path}` keeps what can be resumed"
            )
    return found


def segment_epochs(file: Path) -> tuple[int, int] | None:
    """First and last epoch in the name of a segment's file; None if the file is not named like a segment."""
    match = _SEGMENT.fullmatch(file.name)
    return (int(match[1]), int(match[2])) if match else None


def segment_path(path: Path, first: int, last: int) -> Path:
    """Path of the segment that covers training epochs `first`..`last` and holds the state after `last`."""
    return path / SEGMENTS / f"epoch-{first:06d}-{last:06d}.nc"


def extends(longer: Experiment, shorter: Experiment) -> bool:
    """Whether `longer` is `shorter` with more epochs, seeds, observables or points, or with several of these.

    Only ``training.epochs`` may differ, being more, ``seeds`` and ``record.observables``, of which none may be missing,
    ``record.state_every``, and the values in ``sweep``, of which none may be missing either.  No run is extended whose
    earlier epochs depend on its length (`depends_on_length`).  Population flows and online learning record all that
    they have at times that are spread over the whole run, so that they gain seeds and points only.
    """
    alike = longer.kind == shorter.kind and bool(longer.sweep) == bool(shorter.sweep)
    if longer.training.epochs < shorter.training.epochs or longer == shorter or not alike:
        return False
    if depends_on_length(longer, shorter):
        return False
    if not set(shorter.seed_labels) <= set(longer.seed_labels):
        return False
    kept: dict[str, Any] = {"seeds": longer.seeds} | ({"sweep": longer.sweep} if longer.sweep else {})
    if longer.kind == "training":
        if not set(schema.expand(shorter.record.observables)) <= set(schema.expand(longer.record.observables)):
            return False
        kept |= {"training.epochs": longer.training.epochs}
        kept |= {"record.observables": longer.record.observables, "record.state_every": longer.record.state_every}
    for who in made_modules.NETWORKS:  # more points may have more modules; those that were there stay what they were
        mine, theirs = (getattr(e, who).made or {} for e in (longer, shorter))
        if mine and all(mine.get(key) == made for key, made in theirs.items()):
            kept[f"{who}.made"] = longer.as_dict()[who]["made"]
    if differences(longer, shorter.replace(kept)):
        return False
    before, after = ([json.dumps(p, sort_keys=True) for p in places(e.sweep).values()] for e in (shorter, longer))
    return [axis.keys for axis in axes(longer.sweep)] == [axis.keys for axis in axes(shorter.sweep)] and (
        set(before) <= set(after)
    )


def depends_on_length(longer: Experiment, shorter: Experiment) -> str | None:
    """Why the longer run would have trained the epochs of the shorter one otherwise; None if it would not have."""
    training, last = longer.training, shorter.training.epochs
    if longer.kind != "training" or training.epochs == last:
        return None
    if training.anneal != "none":
        return f"training.anneal = {training.anneal!r} spreads the learning rate over all epochs"
    if training.stop is not None and last not in longer.schedule:
        return f"training.stop looked at epoch {last}, which the longer run does not record"
    return None


def refuse_another(file: Path, text: object, mine: Experiment) -> Experiment:
    """The experiment that a file's attribute `text` names, if it is `mine`, or one of the two extends the other.

    Raises:
        ArchiveError: naming what differs: its numbers would get the wrong labels.
        ExperimentError: if the attribute is no experiment.
    """
    theirs = Experiment.from_toml_text(str(text), archived=True)
    if mine != theirs and not extends(mine, theirs) and not extends(theirs, mine):
        raise ArchiveError(
            f"{file}: holds a file of another run; what differs from {EXPERIMENT}:\n  "
            + "\n  ".join(differences(theirs, mine))
            + "\nIf directories or files were exchanged, put each where it was; `tsdyn validate` names all of them."
        )
    return theirs


def claim(path: Path, experiment: Experiment) -> None:
    """Make `path` the directory of `experiment`; if it is already one, check that `experiment` is or extends its own.

    Raises:
        ArchiveError: if it holds another experiment, naming what differs, or files that are not a run's; or another
            process is claiming it at the same time.
    """
    if not _claimed(path, experiment):
        make_directory(path)
        lock = Lock(path).wait(CLAIM_SECONDS if experiment.sweep else 0.0)  # several commands may share a sweep
        try:
            _sign(path, experiment)
        finally:
            lock.release()


def _claimed(path: Path, experiment: Experiment) -> bool:
    """True if `path` is the directory of `experiment` already, False if it is free; else raises `claim`'s error."""
    file = path / EXPERIMENT
    if file.exists():
        study_directories.refuse_to_write(path)
        theirs = experiment_in(file, experiment)
        if theirs == experiment:
            return True
        if not extends(experiment, theirs):
            raise DirectoryError(
                f"{path}: holds another experiment; nothing was overwritten. What differs:\n  "
                + "\n  ".join(differences(experiment, theirs))
                + f"\n{_way_out(experiment, theirs)}"
            )
        return not experiment.sweep  # a run is extended by its writer
    # files left by a writer that was killed in its first milliseconds do not count
    leftovers = re.compile(rf"{LOCK}(\.\w+)?|\.{re.escape(EXPERIMENT)}\.\d+\.tmp")
    if path.exists() and (not path.is_dir() or any(not leftovers.fullmatch(e.name) for e in path.iterdir())):
        if file.exists():  # another command has begun here since
            return _claimed(path, experiment)
        what = "is not empty and holds no experiment" if path.is_dir() else "is a file"
        raise DirectoryError(f"{path}: {what}; nothing was overwritten. Give another directory with -o.")
    return False


def experiment_in(file: Path, expected: Experiment) -> Experiment:
    """The experiment in a file, which is read as TOML only if it is not the text of the `expected` one."""
    with suppress(OSError, UnicodeDecodeError):
        if file.read_text(encoding="utf-8") == expected.to_toml():
            return expected
    return Experiment.from_toml(file, archived=True)


def _way_out(asked: Experiment, theirs: Experiment) -> str:
    """What can be done where a directory's experiment is not, and is not extended by, the one that is asked for."""
    if bool(asked.sweep) != bool(theirs.sweep) and asked.kind == theirs.kind:
        what = ("a run", "swept values") if asked.sweep else ("a sweep", "a run without them")
        return (
            f"The directory is {what[0]}'s and does not become one of {what[1]}: run this into a new directory with "
            "-o, then tsdyn.open([one, other]) reads both as one."
        )
    if asked.kind == theirs.kind != "training":
        return (
            "Give another directory with -o, or remove this one. (A run of this kind can be extended by more seeds and "
            "a sweep by more values, everything else the same; it records all that it has, at times that are spread "
            "over the whole run, so that another last one, or another number of them, makes another run.)"
        )
    why = depends_on_length(asked, theirs)
    return (
        "Give another directory with -o, or remove this one. (A run can be extended by more epochs, seeds and "
        "observables and a sweep by more values, too, everything else the same"
        + (f"; not this one: {why}.)" if why else ".)")
    )


def _sign(path: Path, experiment: Experiment) -> None:
    """Write the experiment file, under the directory's lock; another process may have done so just before."""
    if not _claimed(path, experiment):
        if experiment.sweep and (path / EXPERIMENT).exists():
            changes.note_in_sweep(path, Experiment.from_toml(path / EXPERIMENT, archived=True), experiment)
        write_text(path / EXPERIMENT, experiment.to_toml())


@runtime_checkable
class Described(Protocol):
    """What a directory is of, an experiment without a sweep or a recording, as far as writing it needs."""

    @property
    def layout(self) -> Layout:
        """Sizes of the dimensions."""
        ...

    @property
    def dtype(self) -> str:
        """Of the numbers."""
        ...

    @property
    def labels(self) -> tuple[Label, ...]:
        """Labels that a finished directory must have."""
        ...

    def recorded(self, when: When | None = None) -> tuple[str, ...]:
        """Variables that are recorded, or only those of `when`."""
        ...

    def to_toml(self) -> str:
        """Text of its file."""
        ...


D = TypeVar("D", bound=Described)


class RunDirectory(Generic[D]):
    """The directory of one run, held for writing.

    Use as a context manager: entering takes the lock and clears what an interrupted writer left, leaving frees the
    lock.

    Args:
        path: The directory; made if it does not exist.
        experiment: The experiment, without a sweep.  If it has more epochs than the same experiment in the directory,
            the run is extended.

    Raises:
        ArchiveError: if another process holds the directory, it holds another experiment (every difference is
            named), files that are not a run's, or symbolic links.  Nothing is overwritten.
    """

    #: Name of the file that says what the directory is of.
    file = EXPERIMENT

    def __init__(self, path: str | Path, experiment: D) -> None:
        if isinstance(experiment, Experiment) and experiment.sweep:
            raise ValueError(
                "RunDirectory: the experiment has a sweep; each point of it is a run (tsdyn.run does this)"
            )
        self.path = local_path(path)
        self.experiment = experiment
        self.layout = experiment.layout
        self.variables = experiment.recorded()
        self._lock = Lock(self.path)
        self._run: str | None = None
        #: What the archive declares, if the first commit wrote it.
        self.made: made_files.Made | None = None

    def __enter__(self) -> RunDirectory[D]:
        if not self._claimed():
            make_directory(self.path)
        for name in (LOCK, self.file, ARCHIVE, SEGMENTS, ADDED):
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

    def _claimed(self) -> bool:
        return _claimed(self.path, self._own)

    def _sign(self) -> None:
        _sign(self.path, self._own)

    @property
    def _own(self) -> Experiment:
        assert isinstance(self.experiment, Experiment)  # a recording's directory overrides what asks for it
        return self.experiment

    def _settle(self) -> None:
        """Finish what an interrupted writer began: remove leftovers, and segments whose archive is verified."""
        self._sign()
        for folder in (self.path, self.path / SEGMENTS):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        for seal in (self.path / SEGMENTS).glob(f"*{SUFFIX}"):
            if not seal.with_name(seal.name.removesuffix(SUFFIX)).exists():
                seal.unlink()
        if self.finished and (self.path / SEGMENTS).is_dir():
            if any((self.path / SEGMENTS).iterdir()):
                netcdf.refuse_unproven(self.path / ARCHIVE)
            self._drop_segments()
        self._extend()

    def _extend(self) -> None:
        """Make the directory that of this run, if it is of a shorter one."""
        theirs = experiment_in(self.path / EXPERIMENT, self._own)
        if theirs != self.experiment:
            if self.finished and self._archived() != self.experiment:
                self._reopen()
            write_text(self.path / EXPERIMENT, self.experiment.to_toml())

    def _archived(self) -> Experiment:
        """The experiment that the archive itself names: experiment.toml can be behind it, or of another run."""
        netcdf.refuse_unproven(self.path / ARCHIVE)
        with netcdf.dataset(self.path / ARCHIVE, only=self.layout.path) as nc:
            return self._gone_on_from(self.path / ARCHIVE, netcdf.attributes(nc))

    def _reopen(self) -> None:
        """Make the archive of a finished run, verified before, the first segment of the longer one, in one rename."""
        with netcdf.dataset(self.path / ARCHIVE) as nc:
            # experiment.toml can be of another run: what is gone on from is what the archive itself says
            shorter = self._gone_on_from(self.path / ARCHIVE, netcdf.attributes(nc))
            if "state" not in nc.groups:
                raise DirectoryError(
                    f"{self.path}: its archive is of schema {nc.schema_version}, which keeps no state to train on "
                    f"from; it stays as it is, run {self._own.training.epochs} epochs into another directory"
                )
        self._archive_as_segment(segment_path(self.path, 0, shorter.training.epochs))

    def _archive_as_segment(self, target: Path) -> None:
        make_directory(self.path / SEGMENTS)
        # its own checksum, not one taken now: of what has changed since it was compared it would be that of the damage
        kept = identity(self.path / ARCHIVE).seal or sha256(self.path / ARCHIVE)
        write_text(seal_of(target), f"{kept}  {target.name}\n")
        (self.path / ARCHIVE).rename(target)
        sync_directory(self.path / SEGMENTS)
        sync_directory(self.path)
        seal_of(self.path / ARCHIVE).unlink(missing_ok=True)

    def _gone_on_from(self, file: Path, attrs: Mapping[str, Any]) -> Experiment:
        """The experiment of a file that is gone on from, or joined.

        Raises:
            ArchiveError: if it is of another run, or does not say of which.
        """
        try:
            return refuse_another(file, attrs.get("experiment"), self._own)
        except ExperimentError as error:
            raise ArchiveError(f"{file}: does not say of which experiment it is: {error}") from error

    @property
    def finished(self) -> bool:
        """Whether the archive of all epochs has been written."""
        return (self.path / ARCHIVE).exists()

    @cached_property
    def _swept(self) -> tuple[Swept, ...]:
        """Values of swept keys, if the directory is a point of a sweep."""
        return swept_values.of_point(self.path, self._own)

    @cached_property
    def bytes_per_epoch(self) -> int:
        """Size of one recorded epoch, without padding."""
        return netcdf.bytes_per_epoch(self.layout, self.variables, self.experiment.dtype)

    def committed(self) -> int | None:
        """Last committed epoch of training, None before the first commit."""
        found = segments(self.path)
        return found[-1].last if found else None

    def _own_attrs(self) -> dict[str, str]:
        """The attribute `RUN`: that of the last segment, or a new one for a run without segments."""
        if self._run is None:
            found = segments(self.path)
            self._run = secrets.token_hex(8)
            if found:
                with netcdf.dataset(found[-1].path, only=self.layout.path) as nc:
                    self._run = str(netcdf.attributes(nc).get(RUN, ""))
        return {RUN: self._run} if self._run else {}  # versions before 0.2 drew none

    def commit(
        self,
        first: int,
        last: int,
        epochs: Sequence[Label],
        records: Records,
        state: State,
        attrs: Mapping[str, Any],
        along: Mapping[int, State] | None = None,
    ) -> None:
        """Write a segment: what was recorded in training epochs `first`..`last`, and the state after `last`.

        It appears in one rename.  Of a run that its first commit finishes, the file is the archive at once.

        Args:
            first: First step of the segment; in training a step is an epoch.
            last: Last step of the segment.
            epochs: Labels of the recorded steps, increasing: epochs, times or α.
            records: Their measurements; in the first segment also what is known at the start, in the last also what
                is known at the end.
            state: Everything needed to resume; arrays by name, among them ``death_epoch``.
            attrs: Global attributes.
            along: States along the way that are kept (``record.state_every``), by the epoch after which they are.

        Raises:
            ArchiveError: if it cannot be written, or the lock was lost; what was committed before is intact.
        """
        self._lock.confirm()
        states = {netcdf.STATE: state, **{netcdf.state_at(epoch): held for epoch, held in (along or {}).items()}}
        own = self.experiment
        whole = first == 0 and isinstance(own, Experiment) and last == own.last and tuple(epochs) == own.labels
        target = self.path / ARCHIVE if whole else segment_path(self.path, first, last)
        if not whole:
            make_directory(target.parent)
        held = made_files.Content(
            self.layout, epochs, self.variables if whole else tuple(records), self.experiment.dtype, records, states
        )
        made = made_files.write(target, held, {**attrs, **self._own_attrs()}, self._swept)
        self.made = made if whole else None

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The state after the last committed epoch, and the global attributes of its segment.

        Raises:
            ArchiveError: if that segment is damaged.
        """
        newest = segments(self.path)[-1]
        netcdf.refuse_unproven(newest.path)
        try:
            with netcdf.dataset(newest.path) as nc:
                attrs = netcdf.attributes(nc)
                if isinstance(self.experiment, Experiment):  # a recording compares model and layers itself
                    self._gone_on_from(newest.path, attrs)
                return netcdf.read_state(nc), attrs
        except (OSError, RuntimeError, AttributeError) as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError(
                f"{newest.path}: cannot be read: {error}; `tsdyn repair {self.path}` keeps what can be resumed"
            ) from error

    def consolidate(self, attrs: Mapping[str, Any]) -> None:
        """Join all segments into one file, compare it with them, and only then remove them.  May be called again.

        Raises:
            ArchiveError: if it cannot be written, a segment is damaged, or epochs are missing; segments are kept.
        """
        self._lock.confirm()
        files = [segment.path for segment in segments(self.path)]
        for file in files:
            netcdf.refuse_unproven(file)
        parts, epochs = joining.recorded(files, self.experiment.labels, self.layout.path)
        attrs = {**attrs, **self._own_attrs(), **self._history(parts, epochs)}
        with replacing(self.path / ARCHIVE, self.bytes_per_epoch * len(epochs), seal=True) as temporary:
            try:
                differing = own_process.run(lambda: self._join(parts, epochs, attrs, temporary))
            except own_process.Crashed as error:
                raise ArchiveError(
                    f"{self.path / ARCHIVE}: cannot be written: joining the segments crashed the netCDF library "
                    f"({error.how}), as it does where memory or the disk fails; {INTACT} and can "
                    "be opened: run the same command again to join it"
                ) from None
            if differing is not None:
                raise ArchiveError(
                    f"{self.path}: {differing} read back differently from what was written; segments are kept"
                )
        self._drop_segments()

    def _join(
        self, parts: Sequence[joining.Part], epochs: Sequence[Label], attrs: Mapping[str, Any], target: Path
    ) -> str | None:
        """Write the archive of all segments to `target` and read it back; the variable that differs, or None."""
        with joining.little_cached():
            with netcdf.dataset(target, "w") as nc:
                netcdf.create(nc, self.layout, epochs, self.variables, self.experiment.dtype, attrs, self._swept)
                joining.copy(parts, self.layout, self.variables, nc)
            with netcdf.dataset(target) as nc:
                return joining.differing(parts, self.layout, self.variables, nc)

    def _history(self, parts: list[joining.Part], epochs: list[Label]) -> Mapping[str, Any]:
        for part in {str(part.attrs.get("experiment")): part for part in parts}.values():
            self._gone_on_from(part.path, part.attrs)
        return _history(parts, epochs, self._own, self.variables)

    def gain(self, other: RunDirectory[Experiment], whole: Experiment, attrs: Mapping[str, Any]) -> None:
        """Join the finished run in `other`, of further seeds, with this one, which is finished, too.

        The archive of both appears in one rename, once it was compared with the two; then the experiment file is
        written and `other` removed.  Where this is cut short, the run is whole and the same call goes on.

        Args:
            other: Held for writing; its directory is this one's folder `ADDED`.
            whole: The experiment of all seeds.
            attrs: Global attributes of the joined archive.

        Raises:
            ArchiveError: if it cannot be written, or a file is damaged; both runs are kept.
        """
        self._lock.confirm()
        kept = segment_path(self.path, 0, self._own.last)
        netcdf.refuse_unproven(self.path / ARCHIVE)
        netcdf.refuse_unproven(other.path / ARCHIVE)
        self._archive_as_segment(kept)
        sides = [beside.Side.of(file, run.layout) for file, run in ((kept, self), (other.path / ARCHIVE, other))]
        variables, dtype = whole.recorded(), whole.dtype
        epochs = sorted({epoch for side in sides for epoch in side.epochs})
        parts = [joining.Part(side.path, 0, len(epochs), side.attrs) for side in sides]
        attrs = {**attrs, **self._own_attrs(), **_history(parts, epochs, whole, variables)}
        needed = netcdf.bytes_per_epoch(whole.layout, variables, dtype) * len(epochs)
        with replacing(self.path / ARCHIVE, needed, seal=True) as temporary:
            differing = own_process.run(
                lambda: beside.join(sides, whole.layout, epochs, variables, dtype, attrs, temporary)
            )
            if differing is not None:
                raise ArchiveError(f"{self.path}: {differing} read back differently from what was written; both stay")
        self._drop_segments()
        write_text(self.path / EXPERIMENT, whole.to_toml())

    def _drop_segments(self) -> None:
        """Remove the segments once the archive is finished and whole."""
        folder = self.path / SEGMENTS
        for file in sorted(folder.glob("*.nc")):
            remove_sealed(file)
        with suppress(OSError):  # other files that a user put there stay
            folder.rmdir()


def _history(
    parts: Sequence[joining.Part], epochs: Sequence[Label], experiment: Experiment, variables: Sequence[str]
) -> dict[str, Any]:
    """Attributes about what earlier, shorter runs left in an archive.

    These are epochs outside its schedule, wrong numbers, and what `repair` could not keep.
    """
    kept = np.setdiff1d(epochs, experiment.labels)
    wrong = joining.wrong_through(parts, epochs, variables)
    dropped = dict.fromkeys(str(part.attrs[DROPPED]) for part in parts if DROPPED in part.attrs)
    found: dict[str, Any] = {KEPT: kept} if len(kept) else {}
    found |= {} if wrong is None else {WRONG_THROUGH: wrong}
    return found | ({DROPPED: "; ".join(dropped)} if dropped else {})
