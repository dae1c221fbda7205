"""Headers of files (all that they declare, without their numbers), and a sweep's ``index.json``, which caches them.

The index repeats what the headers of the files say, so that a sweep of thousands of runs opens without opening them.
It is a cache: an entry counts only while its file has the size, time and checksum it had, and what is missing is read
from the files.  Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np
import xarray as xr

from tsdyn import schema, vocabulary
from tsdyn.archive import additions, netcdf
from tsdyn.archive.made_files import Made
from tsdyn.archive.recordings import FILE, Recording
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT, INPUTS, RUN, refuse_another, segments
from tsdyn.archive.swept_values import KEY
from tsdyn.archive.whole_files import (
    ALWAYS_VERIFIED,
    ArchiveError,
    DirectoryError,
    Identity,
    identity,
    refuse_link,
    write_text,
)
from tsdyn.archive.wrong_numbers import WRONG_THROUGH, wrong_variables
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment

INDEX = "index.json"
_INDEX = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "kept": (.*)\}', re.DOTALL)
#: Global attributes that differ from run to run, so that they are kept outside the shared header.
OWN = (
    "experiment", "recording", "name", "digest", "created", vocabulary.WALL, RUN, INPUTS, "history", "changes",
    "fallbacks",
)  # fmt: skip

#: Dimensions, values and attributes of what is loaded when a file is opened.
Loaded = tuple[tuple[str, ...], Any, dict[str, Any]]


class Declared(NamedTuple):
    """A variable as a file declares it.

    Attributes:
        dims: Its dimensions.
        dtype: Type of its numbers once they are read.
        chunk: Shape of its chunks on disk.
        attrs: Its attributes.
        encoding: Attributes that say how its numbers are packed (``scale_factor``, ...); empty if they are not.
    """

    dims: tuple[str, ...]
    dtype: str
    chunk: list[int]
    attrs: dict[str, Any]
    encoding: dict[str, Any]


@dataclass(frozen=True)
class Header:
    """All that a file declares, without its numbers; runs of one shape share it.

    Attributes:
        version: Version of the schema.
        labels: Dimension → its labels; 0, 1, ... where the file has none.
        columns: Coordinates, those of dimensions among them.
        texts: Variables of text.
        variables: Variables of numbers, by name.
        attrs: Global attributes but those in `OWN`.
    """

    version: Any
    labels: dict[str, list[Any]]
    columns: dict[str, Loaded]
    texts: dict[str, Loaded]
    variables: dict[str, Declared]
    attrs: dict[str, Any]

    @cached_property
    def numbers(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Variable → shape and type, of those whose numbers are stored as they are."""
        return {
            name: (tuple(len(self.labels[dim]) for dim in declared.dims), np.dtype(declared.dtype))
            for name, declared in self.variables.items()
            if not declared.encoding
        }

    def as_json(self) -> list[Any]:
        columns = {
            name: (dims, np.asarray(values).tolist(), attrs) for name, (dims, values, attrs) in self.columns.items()
        }
        return [self.version, self.labels, columns, self.variables, self.attrs]

    @classmethod
    def of_json(cls, kept: Sequence[Any]) -> Header:
        """The header that `as_json` was called on, from its result after a round trip through JSON."""
        version, labels, columns, variables, attrs = kept
        if not {"seed", "layer"} <= set(labels) or not set(vocabulary.PATHS) & set(labels):
            raise ValueError("not the header of a run")
        loaded = {name: (tuple(dims), np.asarray(values), own) for name, (dims, values, own) in columns.items()}
        declared = {name: Declared(tuple(dims), *rest) for name, (dims, *rest) in variables.items()}
        return cls(version, labels, loaded, {}, declared, attrs)


class Source(NamedTuple):
    """One file as it was when it was opened.

    Attributes:
        path: Where it is, absolute.
        identity: Size, times and checksum, by which another file of that name is noticed.
        header: All that it declares.
        own: Its attributes that are in `OWN`.
        death: ``death_epoch`` of its members; empty if it has none.
        wrong: Variables whose numbers are not what they are called (`wrong_variables`).
        swept: Coordinates with the values of swept keys; empty where the header comes from the index.
        hidden: Dimension → labels that are not shown: of what was measured of a run, those that the run does not hold.
    """

    path: Path
    identity: Identity
    header: Header
    own: dict[str, Any]
    death: list[int]
    wrong: tuple[str, ...]
    swept: tuple[tuple[str, Loaded], ...] = ()
    hidden: Mapping[str, frozenset[Any]] = {}

    def shown(self, dim: str) -> list[Any]:
        """Its labels along a dimension, without those that are hidden."""
        labels, hidden = self.header.labels[dim], self.hidden.get(dim)
        return [label for label in labels if label not in hidden] if hidden else labels

    @property
    def to_read(self) -> Source:
        """The file with no more than reading its numbers needs: task graphs carry one for each file."""
        return self._replace(own={RUN: self.own[RUN]} if RUN in self.own else {}, swept=())

    @property
    def unchanged(self) -> bool:
        """Whether the file that was opened is still the one at its path."""
        with suppress(OSError):
            status = os.lstat(self.path)
            return (status.st_ino, status.st_size, status.st_mtime_ns) == self.identity[:3]
        return False

    @classmethod
    def of(cls, path: Path, *, upto: float = ALWAYS_VERIFIED) -> Source:
        """The file at `path` with its header; it goes through `netcdf.refuse_unproven` first, with `upto`.

        Raises:
            ArchiveError: if it is not a netCDF-4 file, declares more than its size warrants, or is refused there.
        """
        netcdf.refuse_unproven(path, upto=upto)
        netcdf.refuse_foreign(path)
        now = identity(path)
        with netcdf.dataset(path, upto=None) as nc:
            netcdf.refuse_oversized(path, nc)
            try:
                return cls(path.absolute(), now, *_declared(path, nc))
            except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                if isinstance(error, ArchiveError):
                    raise
                raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error


def _declared(
    path: Path, nc: netCDF4.Dataset
) -> tuple[Header, dict[str, Any], list[int], tuple[str, ...], tuple[tuple[str, Loaded], ...]]:
    columns: dict[str, Loaded] = {}
    texts: dict[str, Loaded] = {}
    for name, coordinate in netcdf.loaded_at_once(nc).items():
        found = netcdf.loaded(path, nc[name])
        (columns if coordinate else texts)[name] = _loaded(found)
    # they differ from run to run, and headers are shared
    of_keys = [name for name, (dims, _, attrs) in columns.items() if not dims and KEY in attrs]
    swept = tuple((name, columns.pop(name)) for name in of_keys)
    death: list[int] = []
    if columns.get("death_epoch", ((),))[0] == ("seed",):
        death = columns.pop("death_epoch")[1].tolist()
    variables = {
        name: _variable(array)
        for name, array in nc.variables.items()
        if name not in columns and name not in texts and name not in of_keys and not (name == "death_epoch" and death)
    }
    used = {dim for held in (columns, texts, variables) for dims, *_ in held.values() for dim in dims}
    labels = {
        dim: columns[dim][1].tolist() if columns.get(dim, ((),))[0] == (dim,) else list(range(size.size))
        for dim, size in nc.dimensions.items()
        if dim in used
    }
    attrs = _plain(netcdf.attributes(nc))
    own = {name: attrs.pop(name) for name in OWN if name in attrs}
    version = attrs.get("schema_version", schema.VERSION)
    wrong = wrong_variables(version, attrs.get(WRONG_THROUGH), str(own.get("experiment", "")))
    held = Header(version, labels, columns, texts, variables, attrs)
    return held, own, death, tuple(name for name in wrong if name in variables), swept


def _loaded(found: xr.Variable) -> Loaded:
    return tuple(map(str, found.dims)), found.values, _plain(found.attrs)


def _variable(array: netCDF4.Variable) -> Declared:
    dims, attrs = tuple(array.dimensions), netcdf.attributes(array)
    packed = netcdf.packing(array.dtype, attrs)
    dtype = array.dtype
    if packed:
        dtype = netcdf.decoded(array.name, xr.Variable(dims, np.empty((0,) * array.ndim, dtype), packed)).dtype
    described = _plain({name: value for name, value in attrs.items() if name not in packed})
    return Declared(dims, dtype.str, netcdf.stored_chunk(array), described, packed)


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON can hold them, without those that say how numbers are stored."""
    shown = {
        str(name): value for name, value in attrs.items() if not str(name).startswith("_") and name != "coordinates"
    }
    return {n: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for n, v in shown.items()}


def refuse_other(source: Source, expected: Callable[[], Experiment | Recording]) -> None:
    """Refuse a file whose attributes name another run: its numbers would get the wrong labels.

    Raises:
        ArchiveError: naming what differs.
    """
    try:
        mine, text = expected(), source.own.get("experiment")
        if isinstance(mine, Recording):
            if source.own.get("recording", Source.of(source.path).own.get("recording")) != mine.to_toml():
                raise ArchiveError(
                    f"{source.path}: holds a file of another recording than {FILE} beside it says; if directories or "
                    "files were exchanged, put each where it was"
                )
            return
        if text == mine.to_toml() or (text is None and source.own.get("digest") == mine.digest):
            return
        if text is None:  # the index remembers the digest alone
            text = Source.of(source.path).own.get("experiment")
        refuse_another(source.path, text, mine)
    except ExperimentError:
        return  # the archive can be read without; `tsdyn validate` names it


def refuse_of_other_inputs(addition: Source, run: Source) -> None:
    """Refuse what was measured of a run whose input files were others than those of the run that is there.

    The run was removed and computed again: its experiment names the same files, and their contents changed.

    Raises:
        ArchiveError: naming the files.
    """
    if run.own.get(RUN) is not None and addition.own.get(RUN) == run.own[RUN]:
        return
    before, now = (_inputs(source) for source in (addition, run))
    differing = [key for key in before if key in now and before[key] != now[key]]
    if differing:
        raise ArchiveError(
            f"{addition.path}: was measured of an earlier run in this directory, which began with another file in "
            f"{', '.join(differing)}; remove it with its checksum, and `tsdyn measure` measures it again"
        )


def _hiding(addition: Source, run: Sequence[Source]) -> Source:
    """What was measured of a run, with those of its seeds and epochs hidden that the run's files do not hold."""
    labels = addition.header.labels
    more = {
        dim: frozenset(labels[dim]).difference(*(file.header.labels.get(dim, ()) for file in run))
        for dim in ("seed", *vocabulary.PATHS)
        if dim in labels
    }
    return addition._replace(hidden={dim: those for dim, those in more.items() if those})


def _inputs(source: Source) -> dict[str, str]:
    """The checksums of a file's input files; empty if an earlier version wrote it without them."""
    text = source.own.get(INPUTS, Source.of(source.path).own.get(INPUTS))  # the index does not remember them
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Entry(NamedTuple):
    """A finished point in the index: a `Source` with its header replaced by the header's key."""

    stamp: list[Any]
    header: str
    death: list[int]
    own: dict[str, Any]
    wrong: list[str]


def _stamp(now: Identity) -> list[Any]:
    """What is compared of a file that the index lists.

    Without a checksum that is its inode, too: two files of one shape, unpacked in one second, have one size and time.
    """
    return [now.size, now.modified, now.inode if now.seal is None else now.seal]


class Headers:
    """Headers of the finished points of a sweep, from ``index.json`` where it is up to date, else from the files.

    Args:
        path: Directory of the sweep, or of a run, which is its own point ``.``.
        verify: Files of at most this size are compared with their checksums when they are read; with `math.inf` all,
            those that the index lists, too.
    """

    def __init__(self, path: Path, verify: float = ALWAYS_VERIFIED) -> None:
        self.path, self.verify = path.absolute(), verify
        self._headers: dict[str, Header] = {}
        self._entries: dict[str, _Entry] = {}
        self._of_theirs: set[str] = set()  # points whose file was compared with this experiment
        self._changed = False
        self._made: dict[Any, str] = {}  # what a file of this process declares → key of its header
        self._experiment = ""
        with suppress(OSError):
            self._experiment = hashlib.sha256((self.path / EXPERIMENT).read_bytes()).hexdigest()
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = _INDEX.fullmatch((self.path / INDEX).read_bytes())
            sealed = whole is not None and hashlib.sha256(whole[2]).hexdigest() == whole[1].decode()
            found: dict[str, Any] = json.loads(whole[2]) if whole is not None and sealed else {}
            if found.get("version") == schema.VERSION:
                self._headers = {key: Header.of_json(kept) for key, kept in found["headers"].items()}
                self._entries = {name: _Entry(*kept) for name, kept in found["runs"].items()}
                self._of_theirs = set(self._entries) if found["experiment"] == self._experiment else set()

    def finished(self, name: str, expected: Callable[[], Experiment | Recording]) -> Source | None:
        """The archive of one point; None if it is not finished.

        Raises:
            ArchiveError: if it has one that cannot be read, or is of another experiment than `expected` gives.
        """
        refuse_link(self.path / name)
        return self._read(name, self.path / name / ARCHIVE, expected)

    def made(self, name: str, made: Made) -> None:
        """Note the archive of a point that this process has just written for the sweep's own experiment.

        Files of one shape declare the same, so that only the first of them is read.
        """
        file = self.path / name / ARCHIVE
        shared = json.dumps({key: value for key, value in made.attrs.items() if key not in OWN}, sort_keys=True)
        if (made.shape, shared) in self._made:
            now, own = identity(file), _plain(made.attrs)
            wrong = wrong_variables(made.attrs["schema_version"], None, str(own.get("experiment", "")))
            self._note(name, _stamp(now), self._made[made.shape, shared], made.death, own, wrong)
            self._of_theirs.add(name)
        else:
            self.finished(name, lambda: Experiment.from_toml_text(str(made.attrs["experiment"]), archived=True))
            self._made[made.shape, shared] = self._entries[name].header

    def _note(
        self, name: str, stamp: list[Any], key: str, death: list[int], own: Mapping[str, Any], wrong: Iterable[str]
    ) -> None:
        kept = {known: own[known] for known in ("digest", RUN, "created", vocabulary.WALL) if known in own}
        self._entries[name] = _Entry(stamp, key, death if any(d >= 0 for d in death) else [], kept, list(wrong))
        self._changed = True

    def measured(
        self, name: str, expected: Callable[[], Experiment | Recording], run: Sequence[Source]
    ) -> list[Source]:
        """The files of what was measured of one point after its run, whose files are `run`.

        Of these, epochs and seeds that the run does not hold are hidden.  A damaged run that was repaired, and is
        computed again, comes to them later; until then all else would be NaN there, as it is of the dead.

        Raises:
            ArchiveError: as `finished`, or if one is of a run with other input files.
        """
        read = [self._read(f"{name}/{f.name}", f, expected) for f in additions.files(self.path / name)]
        found = [source for source in read if source is not None]
        for source in found:
            refuse_of_other_inputs(source, run[-1])
        shown = [_hiding(source, run) for source in found]
        return [source for source in shown if all(source.shown(dim) for dim in source.hidden)]

    def _read(self, name: str, file: Path, expected: Callable[[], Experiment | Recording]) -> Source | None:
        """One file that is written once, under the name by which the index lists it; None if it is not there."""
        try:
            now = identity(file)
        except OSError:
            return None
        refuse_link(file)
        # of a run by itself all attributes are wanted, and the index keeps few
        stamp, entry = _stamp(now), None if name == "." else self._entries.get(name)
        if self.verify == math.inf:
            netcdf.refuse_unproven(file)
            entry = entry if now.seal else None  # what has no checksum can have changed within its time and size
        if entry is None or entry.stamp != stamp or entry.header not in self._headers:
            self._of_theirs.discard(name)
            source = Source.of(file, upto=self.verify)
            key = hashlib.sha256(json.dumps(source.header.as_json(), sort_keys=True).encode()).hexdigest()[:16]
            self._headers.setdefault(key, source.header)
            self._note(name, stamp, key, source.death, source.own, source.wrong)
        else:
            header = self._headers[entry.header]
            source = Source(
                file, now, header, entry.own, entry.death or [-1] * len(header.labels["seed"]), tuple(entry.wrong)
            )
        if name not in self._of_theirs:
            try:
                refuse_other(source, expected)
            except ArchiveError:
                self._entries.pop(name, None)
                raise
            self._of_theirs.add(name)
            self._changed = True
        return source._replace(header=self._headers[self._entries[name].header])

    def committed(self, name: str, expected: Callable[[], Experiment | Recording]) -> list[Source]:
        """The archive of one point, or the segments of an unfinished one, then what was measured of it later.

        It is empty if there is no archive and no segment.

        Raises:
            ArchiveError: if a file cannot be read, or is of another experiment than `expected` gives.
        """
        folder = self.path / name
        for last in (*[False] * 4, True):  # its writer may be joining or extending it: then it is looked at again
            try:
                done = self.finished(name, expected)
                if done is not None:
                    return [done, *self.measured(name, expected, [done])]
                found = [Source.of(segment.path, upto=self.verify) for segment in segments(folder)]
                for source in found:
                    refuse_other(source, expected)
                if found:
                    return [*found, *self.measured(name, expected, found)]
                if not (folder / ARCHIVE).is_file():
                    return []
            except FileNotFoundError:
                continue
            except ArchiveError:
                if last:
                    raise
        raise DirectoryError(f"{folder}: changes while it is read; open it again")

    def write(self) -> None:
        """Write ``index.json`` if anything was read that it lacks; a run by itself needs none."""
        if not self._changed or not self._entries.keys() - {"."}:
            return
        used = {entry.header for entry in self._entries.values()}
        kept = {
            "version": schema.VERSION,
            "experiment": self._experiment,
            "headers": {key: header.as_json() for key, header in self._headers.items() if key in used},
            "runs": {name: entry for name, entry in self._entries.items() if name in self._of_theirs},
        }
        text = json.dumps(kept, separators=(",", ":"))
        seal = hashlib.sha256(text.encode()).hexdigest()
        write_text(self.path / INDEX, f'{{"sha256": "{seal}", "kept": {text}}}')
        self._changed = False


def when(cells: Iterable[Sequence[Source]]) -> dict[str, Any]:
    """When the last of all points was written, and the seconds that all took; empty if a file does not say."""
    last = {source.path.parent: source.own for cell in cells for source in cell}
    if not all("created" in own and vocabulary.WALL in own for own in last.values()):
        return {}
    return {
        "created": max(str(own["created"]) for own in last.values()),
        vocabulary.WALL: round(sum(float(own[vocabulary.WALL]) for own in last.values()), 3),
    }
