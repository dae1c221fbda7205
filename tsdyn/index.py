"""What the finished points of a sweep hold: its ``index.json``.  Imports no torch.

The index repeats what the headers of the files say, so that a sweep of thousands of runs opens without opening them.
It is a cache: an entry counts only while its file has the size and time it had, and what is missing is read from the
files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsdyn import netcdf, schema
from tsdyn.durable import ALWAYS_VERIFIED, DirectoryError, refuse_changed, refuse_link, write_text
from tsdyn.segments import ARCHIVE, segments

INDEX = "index.json"
_INDEX = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "kept": (.*)\}', re.DOTALL)
#: Of a file's attributes, those that are its run's own.
OWN = ("experiment", "name", "digest", "created", "coordinates")


@dataclass(frozen=True)
class Header:
    """What a file declares, less its numbers; runs of one shape share it.

    Attributes:
        version: Of the schema.
        labels: Dimension → its coordinate.
        columns: Coordinates without a dimension of their own: name → (dimensions, values).
        variables: Name → (dimensions, dtype, chunk on disk, attributes).
        attrs: Global attributes that are not the run's own.
    """

    version: int
    labels: dict[str, list[Any]]
    columns: dict[str, tuple[list[str], Any]]
    variables: dict[str, tuple[list[str], str, list[int], dict[str, Any]]]
    attrs: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> tuple[Header, list[int]]:
        """Of a file, and the ``death_epoch`` of its members.

        Raises:
            DirectoryError: if it is no archive of tsdyn's.
        """
        netcdf.inspect(path)
        try:
            with netcdf.dataset(path) as nc:
                labels = {
                    dim: np.asarray(nc[dim][:]).tolist() if dim in nc.variables else list(range(size.size))
                    for dim, size in nc.dimensions.items()
                }
                columns = {
                    name: (list(nc[name].dimensions), np.asarray(nc[name][...]).tolist())
                    for name in schema.COORDINATES
                    if name in nc.variables and name != "death_epoch"
                }
                variables = {
                    name: (
                        list(array.dimensions),
                        np.dtype(array.dtype).str,
                        _stored_chunk(array),
                        {k: _plain(array.getncattr(k)) for k in array.ncattrs() if not k.startswith("_")},
                    )
                    for name, array in nc.variables.items()
                    if name not in labels and name not in schema.COORDINATES
                }
                attrs = {k: _plain(nc.getncattr(k)) for k in nc.ncattrs() if k not in OWN}
                death = np.asarray(nc["death_epoch"][...]).tolist() if "death_epoch" in nc.variables else []
                return cls(int(attrs.get("schema_version", schema.VERSION)), labels, columns, variables, attrs), death
        except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error

    def as_json(self) -> list[Any]:
        return [self.version, self.labels, self.columns, self.variables, self.attrs]

    @classmethod
    def of_json(cls, kept: Sequence[Any]) -> Header:
        """What `as_json` gave, whose tuples JSON made lists."""
        version, labels, columns, variables, attrs = kept
        if not {"seed", "layer"} <= set(labels) or not set(schema.PATHS) & set(labels):
            raise ValueError("not the header of a run")
        return cls(version, labels, _tuples(columns), _tuples(variables), attrs)


def _stored_chunk(array: Any) -> list[int]:
    stored = array.chunking()
    return list(stored) if isinstance(stored, list) else list(array.shape)


def _tuples(table: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {name: tuple(row) for name, row in table.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


class Source(NamedTuple):
    """One file: where, what it declares, when its members died."""

    path: Path
    header: Header
    death: list[int]


class Index:
    """What the finished points of a sweep hold, read from ``index.json`` where that is not out of date.

    Args:
        path: Directory of the sweep.
        verify: Files of at most this size are compared with their checksums when they are read; with `math.inf` all,
            whatever the index says.
    """

    def __init__(self, path: Path, verify: float = ALWAYS_VERIFIED) -> None:
        self.path, self.verify = path, verify
        self._headers: dict[str, Header] = {}
        self._entries: dict[str, tuple[list[int], str, list[int]]] = {}
        self._changed = False
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = _INDEX.fullmatch((path / INDEX).read_bytes())
            sealed = whole is not None and hashlib.sha256(whole[2]).hexdigest() == whole[1].decode()
            found: dict[str, Any] = json.loads(whole[2]) if whole is not None and sealed else {}
            if found.get("version") == schema.VERSION:
                self._headers = {key: Header.of_json(kept) for key, kept in found["headers"].items()}
                runs = found["runs"].items()
                self._entries = {name: (list(stamp), str(key), list(death)) for name, (stamp, key, death) in runs}

    def finished(self, name: str) -> Source | None:
        """The archive of one point, None if it has none.

        Raises:
            DirectoryError: if it has one that cannot be read.
        """
        refuse_link(self.path / name)
        file = self.path / name / ARCHIVE
        try:
            status = os.lstat(file)
        except OSError:
            return None
        refuse_link(file)
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self._entries.get(name)
        if entry is None or entry[0] != stamp or entry[1] not in self._headers or self.verify == math.inf:
            refuse_changed(file, upto=self.verify)
            header, death = Header.of(file)
            key = hashlib.sha256(json.dumps(header.as_json(), sort_keys=True).encode()).hexdigest()[:16]
            self._headers.setdefault(key, header)
            entry = self._entries[name] = (stamp, key, death if any(d >= 0 for d in death) else [])
            self._changed = True
        header = self._headers[entry[1]]
        return Source(file, header, entry[2] or [-1] * len(header.labels["seed"]))

    def committed(self, name: str) -> list[Source]:
        """The archive of one point, or the segments of one that goes on; nothing if it has neither.

        Raises:
            ArchiveError: if one cannot be read.
        """
        for _ in range(3):
            done = self.finished(name)
            if done is not None:
                return [done]
            with suppress(FileNotFoundError):  # the run was finished in this moment
                found = segments(self.path / name)
                for segment in found:
                    refuse_changed(segment.path, upto=self.verify)
                return [Source(s.path, *Header.of(s.path)) for s in found]
        return []

    def write(self) -> None:
        """Keep what was read, if there is anything new."""
        if not self._changed:
            return
        used = {key for _, key, _ in self._entries.values()}
        kept = {
            "version": schema.VERSION,
            "headers": {key: header.as_json() for key, header in self._headers.items() if key in used},
            "runs": self._entries,
        }
        text = json.dumps(kept, separators=(",", ":"))
        seal = hashlib.sha256(text.encode()).hexdigest()
        write_text(self.path / INDEX, f'{{"sha256": "{seal}", "kept": {text}}}')
        self._changed = False
