"""The directory of a sweep: one run for each point, listed in ``sweep.json``.  Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tsdyn import schema, vocabulary
from tsdyn.archive import changes
from tsdyn.archive.lock import Lock
from tsdyn.archive.run_directory import CLAIM_SECONDS, EXPERIMENT, claim, experiment_in, extends
from tsdyn.archive.swept_values import SWEEP, dimensions
from tsdyn.archive.whole_files import DirectoryError, write_text
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import axes, places, sweep_dimensions, swept_keys


def label(value: Any) -> str | int | float:
    """The coordinate label of a swept value: numbers and strings as they are, lists joined by ``-``."""
    if isinstance(value, (bool, dict)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "-".join(str(v) for v in value)
    return value  # type: ignore[no-any-return]


def point_name(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """Name of the directory of one point of a sweep, such as ``overrealization=5,polarity=1.0``.

    If characters had to be replaced or the name had to be cut, it ends with a hash, so that no two points share one.

    Args:
        values: Swept keys and values.
        names: Swept key → dimension; `sweep_dimensions` unless given.
    """
    text, name = _spelled(values, names)
    return name if name == text and len(name) <= 200 else f"{name[:180]}-{_hash(text)}"


def possible_names(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> set[str]:
    """Names that the directory of a point may have, from this version and from those before 0.2."""
    text, before = _spelled(values, names)
    return {point_name(values, names), before, f"{before[:180]}-{_hash(text)}"}


def _spelled(values: Mapping[str, Any], names: Mapping[str, str] | None) -> tuple[str, str]:
    """A point's values as text, and the same text with only characters that any file system allows."""
    names = sweep_dimensions(values) if names is None else names
    text = ",".join(f"{names[key]}={label(value)}" for key, value in values.items())
    return text, re.sub(r"[^A-Za-z0-9._+=,-]", "-", text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_sweep(path: Path) -> bool:
    """Whether a directory is that of a sweep: ``sweep.json`` is there, or was lost, and its experiment has one."""
    if (path / SWEEP).is_file():
        return True
    try:
        text = (path / EXPERIMENT).read_text(encoding="utf-8-sig")
        return "sweep" in text and bool(tomllib.loads(text).get("sweep"))
    except (OSError, ValueError, RecursionError):
        return False


def point_directories(
    path: Path,
    points: Iterable[tuple[Mapping[str, Any], Callable[[], Experiment]]],
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Name of the directory of each point of the sweep in `path`: `point_name`, or the name from before 0.2.

    Versions before 0.2 added no hash where characters were replaced, so that two points could share a directory: it
    belongs to the point whose experiment it holds.

    Args:
        path: Directory of the sweep.
        points: Values of each point and a function that returns its experiment, called only in doubt.
        names: Swept key → dimension; those of the sweep in `path` unless given.
    """
    listed = list(points)
    names = dimensions(path, listed[0][0] if listed else ()) if names is None else names
    before = [_spelled(values, names)[1] for values, _ in listed]
    shared = Counter(before)
    found = []
    for (values, expected), old in zip(listed, before, strict=True):
        name = point_name(values, names)
        in_doubt = len(old) <= 200 and (shared[old] > 1 or (name != old and not (path / name).exists()))
        if in_doubt and (path / old / EXPERIMENT).is_file():
            name = old if _holds(path / old, expected) else f"{old[:180]}-{_hash(_spelled(values, names)[0])}"
        found.append(name)
    return found


def _holds(path: Path, expected: Callable[[], Experiment]) -> bool:
    """Whether a directory is of the expected experiment, or of a shorter one that it extends."""
    with suppress(ExperimentError):
        mine, theirs = expected(), Experiment.from_toml(path / EXPERIMENT, archived=True)
        return mine == theirs or extends(mine, theirs)
    return False


def sweep_points(path: Path) -> dict[str, tuple[dict[str, Any], Experiment]]:
    """Directory name → swept values and experiment of each point of the sweep in `path`.

    They come from ``experiment.toml``: ``sweep.json`` is for other readers, and its names are not trusted.

    Raises:
        ExperimentError: if that file is no experiment, or sweeps nothing.
    """
    experiment = Experiment.from_toml(path / EXPERIMENT, archived=True)
    if not experiment.sweep:
        raise ExperimentError(f"{path / EXPERIMENT}: sweeps nothing, although {SWEEP} is there: it is another's")
    return named_points(path, experiment)


def named_points(
    path: Path, experiment: Experiment, names: Mapping[str, str] | None = None
) -> dict[str, tuple[dict[str, Any], Experiment]]:
    """`sweep_points` of a given experiment, which need not be the one in `path` yet; `names` as in it."""
    points = list(experiment.points())
    directories = point_directories(path, [(values, partial(_itself, at)) for values, at in points], names)
    return dict(zip(directories, points, strict=True))


def _itself(experiment: Experiment) -> Experiment:
    return experiment


def refuse_equal_labels(key: str, labels: Iterable[str | int | float]) -> None:
    """Refuse labels of a swept key that would be one as a coordinate, whose numbers and texts are all of one type.

    Raises:
        DirectoryError: naming them.
    """
    distinct = list(dict.fromkeys(labels))
    shown = np.asarray(distinct).tolist()
    if len(set(shown)) < len(shown):
        alike = [own for own, one in zip(distinct, shown, strict=True) if shown.count(one) > 1]
        raise DirectoryError(
            f"sweep: {key} has the values {', '.join(map(repr, alike))}, which beside the others would be one label "
            f"({shown[distinct.index(alike[0])]!r}): numbers with a fraction hold whole ones up to 2**53, texts end "
            "before a zero byte; give other values, or run and open them as two sweeps"
        )


def refuse_equal_names(experiment: Experiment, names: Mapping[str, str] | None = None) -> None:
    """Refuse a sweep in which two points would share a label, or a directory on file systems that ignore case.

    Args:
        experiment: The sweep.
        names: Swept key → dimension; `sweep_dimensions` unless given.

    Raises:
        DirectoryError: naming the values.
    """
    for axis in axes(experiment.sweep):
        for position, key in enumerate(axis.keys):
            refuse_equal_labels(key, (label(values[position]) for values in axis.values))
    seen: dict[str, dict[str, Any]] = {}
    for values in places(experiment.sweep).values():
        other = seen.setdefault(point_name(values, names).casefold(), values)
        if other is not values:
            raise DirectoryError(
                f"sweep: the points {other} and {values} would share {point_name(values, names)} on file systems "
                "that ignore case; give them names that differ otherwise, or run them as two sweeps"
            )


def write_sweep(path: Path, experiment: Experiment) -> dict[str, Experiment]:
    """Make `path` the directory of a sweep; ``sweep.json`` lists every point and its directory for other readers.

    It also fixes the names of the sweep's dimensions, which are those it holds already if it is there.

    A sweep already there is replaced if the new one has all its points and is otherwise the same.

    Returns the experiment of each point by directory name.

    Raises:
        ArchiveError: as `claim`, or if two points would have one directory.
    """
    keys, kept = swept_keys(experiment.sweep), (path / SWEEP).exists()
    own = [name for name in experiment.recorded() if name not in vocabulary.VARIABLES]
    names = dimensions(path, keys) if kept else sweep_dimensions(keys, own)
    refuse_equal_names(experiment, names)
    claim(path, experiment)
    points = named_points(path, experiment, names)
    rows = (json.dumps({"directory": name, "values": values}) for name, (values, _) in points.items())
    # a line per point: json's own indentation takes ten times as long
    listed = '"points": [\n' + ",\n".join(rows) + "\n]}\n"
    lock = Lock(path).wait(CLAIM_SECONDS)
    try:
        if experiment_in(path / EXPERIMENT, experiment) == experiment:  # else another has extended it since
            told = changes.of_sweep(path)
            said = {"schema_version": schema.VERSION, "dimensions": names} | ({"changes": told} if told else {})
            head = "".join(f'"{key}": {json.dumps(value)},\n' for key, value in said.items())
            write_text(path / SWEEP, f"{{{head}{listed}")
    finally:
        lock.release()
    return {name: point for name, (_, point) in points.items()}
