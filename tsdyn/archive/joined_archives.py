"""Where archives that are opened together differ: in keys of experiments, variables, modules, labels.

Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tsdyn.archive.headers import Source
from tsdyn.archive.lazy_arrays import Cells
from tsdyn.archive.run_directory import ARCHIVE
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.experiment import made_modules
from tsdyn.experiment.experiment import Experiment, flattened
from tsdyn.experiment.parts import Part
from tsdyn.experiment.sweep_axes import Axis, swept_keys

#: Keys that decide which numbers are kept, and none of them.
RECORDED = ("record.observables", "record.state_every")


#: Archives that are opened together may leave this many places of the product of their keys for each of their points.
EMPTY_FACTOR = 2
#: What `open` says where a product of keys would be mostly empty.
WAY_OUT = (
    "tsdyn.open([...], along='point') gives one dimension with the keys as coordinates, "
    "xr.DataTree.from_dict({name: tsdyn.open(path), ...}) keeps them apart"
)


def differing_keys(written: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which experiments differ, without swept keys, names, seeds, and what is recorded (`RECORDED`).

    A key that one was written without, by an earlier version, is at its default there.  Of other modules, or modules
    with other arguments, also without what tsdyn fills in.
    """
    flat = [
        dict(flattened({k: v for k, v in values.items() if k not in ("sweep", "name", "seeds")})) for values in written
    ]
    keys = dict.fromkeys(key for key in itertools.chain.from_iterable(flat) if key not in RECORDED)
    absent = object()
    found = [key for key in keys if any(f.get(key, absent) != flat[0].get(key, absent) for f in flat)]
    if any(key not in f for key in found for f in flat):
        whole = [{**_defaults(), **f} for f in flat]
        found = [key for key in found if any(f.get(key, absent) != whole[0].get(key, absent) for f in whole)]
    swept = [key for values in written for key in swept_keys(values.get("sweep", {}))]
    for who in made_modules.NETWORKS:
        filled = [f"{who}.made."]
        if any(key.startswith((f"{who}.module", f"{who}.arguments")) for key in (*found, *swept)):
            filled += [f"{who}.{name}" for name in made_modules.FILLED]
        found = [key for key in found if not key.startswith(tuple(filled))]
    return found


def _defaults() -> dict[str, Any]:
    """Key → default of every key of an experiment that has one, as its file writes it."""
    parts = {name: field.annotation for name, field in Experiment.model_fields.items()}
    found: dict[str, Any] = {}
    for section, part in parts.items():
        if isinstance(part, type) and issubclass(part, Part):
            fields = {f"{section}.{name}": field for name, field in part.model_fields.items()}
        else:
            fields = {section: Experiment.model_fields[section]}
        for key, field in fields.items():
            if not field.is_required():
                found[key] = to_jsonable_python(field.get_default(call_default_factory=True))
    return {key: value for key, value in found.items() if value is not None}


class UnrecordedWarning(UserWarning):
    """Some points of what was opened recorded fewer variables than others, and are NaN there."""


def unrecorded(cells: Cells, read: Callable[[str], bool]) -> str | None:
    """One sentence on the variables that some points lack, where they are NaN; None if all have the same.

    Args:
        cells: The files at each position.
        read: Whether a variable is one that all could have.
    """
    held: dict[Path, set[int]] = {}
    headers: dict[int, frozenset[str]] = {}  # points of one shape share theirs
    for source in (source for cell in cells.values() for source in cell):
        folder = source.path.parent if source.path.name == ARCHIVE else source.path.parent.parent
        key = id(source.header)
        held.setdefault(folder, set()).add(key)
        if key not in headers:
            headers[key] = frozenset(filter(read, source.header.variables))
    of_kind: dict[frozenset[int], list[Path]] = {}
    for folder, own in held.items():
        of_kind.setdefault(frozenset(own), []).append(folder)
    whole: frozenset[str] = frozenset().union(*headers.values())
    lacking: dict[str, list[Path]] = {}
    for keys, folders in of_kind.items():
        for name in whole - frozenset().union(*(headers[key] for key in keys)):
            lacking.setdefault(name, []).extend(folders)
    alike: dict[tuple[Path, ...], list[str]] = {}
    for name, folders in sorted(lacking.items()):
        alike.setdefault(tuple(folders), []).append(name)
    told = [
        f"{', '.join(names)} not in {folders[0]}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
        for folders, names in alike.items()
    ]
    return f"open: NaN where not recorded: {'; '.join(told)}; `tsdyn measure` adds what weights tell" if told else None


def refuse_mostly_empty(
    paths: Sequence[Path], along: Sequence[tuple[str, ...]], taken: Sequence[Sequence[Any]], points: int
) -> None:
    """Refuse several archives whose points fill less than half of the product of the values of their keys."""
    places = math.prod(map(len, taken))
    if len(paths) > 1 and places > EMPTY_FACTOR * points:
        sizes = ", ".join(f"{' and '.join(keys)} {len(values)}" for keys, values in zip(along, taken, strict=True))
        raise DirectoryError(
            f"open: the {len(paths)} archives differ in several keys ({sizes}), and their {points} points would fill "
            f"{100 * points / places:.2g} % of {places} places; {WAY_OUT}"
        )


def parameters(cells: Cells, grid: Sequence[Axis]) -> dict[str, str]:
    """The attribute that names the parameters of own modules where points differ in them: a list of modules.

    Each with the labels of the points that have it, ``at``, and the shapes of its parameters, ``shapes``.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for place, (first, *_) in cells.items():
        labels = {
            key: value
            for axis, position in zip(grid, place, strict=True)
            for key, value in zip(axis.keys, axis.values[position], strict=True)
        }
        found.setdefault(first.header.attrs.get("parameters", "{}"), []).append(labels)
    if len(found) < 2:
        return {}
    return {"parameters": json.dumps([{"at": at, "shapes": json.loads(shapes)} for shapes, at in found.items()])}


def union(sources: Sequence[Source], dim: str) -> list[Any]:
    """The labels of all files along a dimension, without repetition.

    Raises:
        ArchiveError: if files differ and labels repeat within one, so that a label does not name one position.
    """
    found = [(s, s.shown(dim)) for s in sources if dim in s.header.labels]
    lists = {id(labels): (s, labels) for s, labels in found}
    longest = max((labels for _, labels in lists.values()), key=len)
    if all(labels == longest for _, labels in lists.values()):
        return longest
    for source, labels in lists.values():
        if len(set(labels)) < len(labels):
            raise ArchiveError(f"{source.path}: labels of {dim} repeat; `tsdyn validate` tells what is whole")
    everything = set().union(*(labels for _, labels in lists.values()))
    return longest if everything == set(longest) else sorted(everything)
