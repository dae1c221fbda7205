"""What a sweep says of one of its points: names of its dimensions, and coordinates for the point's own file.

A point's file carries the values of the swept keys, so that xarray alone can put points together.  The names of the
dimensions are those that ``sweep.json`` was given when the sweep began.  Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsdyn.archive.whole_files import version
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import named, sweep_dimensions

SWEEP = "sweep.json"
#: Attribute of a coordinate that holds the value of a swept key: the key, as in the experiment file.
KEY = "key"
#: Where the content of ``sweep.json``, once read, has its points by directory.
_BY_DIRECTORY = "by directory"


class Swept(NamedTuple):
    """The value of one swept key at one point.

    Attributes:
        name: Name of its coordinate: the sweep's dimension.
        key: The key.
        value: A number or a text; anything else as its JSON text.
    """

    name: str
    key: str
    value: int | float | str

    @property
    def attrs(self) -> dict[str, str]:
        """Attributes of the coordinate."""
        return {"units": "1", "long_name": f"swept value of {self.key}", KEY: self.key}


def dimensions(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Swept key → dimension, as ``sweep.json`` in `path` says; for one without or with other keys by the rule."""
    return _dimensions(_listed(path), tuple(keys))


def _dimensions(listed: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, str]:
    return named(listed.get("dimensions") if listed else None, keys) or sweep_dimensions(keys)


def of_point(folder: Path, experiment: Experiment) -> tuple[Swept, ...]:
    """The values of swept keys at the point in `folder`; none if it is no point of the sweep in the folder above."""
    folder = folder.absolute()
    listed = _listed(folder.parent)
    with suppress(KeyError, ExperimentError):
        values = (listed or {})[_BY_DIRECTORY][folder.name]
        if experiment.says(values):  # the file is for other readers, and is not trusted
            return of_values(values, _dimensions(listed, tuple(values)))
    return ()


def of_values(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Swept, ...]:
    """Each swept key's value as its coordinate holds it."""
    return tuple(Swept(names[key], key, storable(value)) for key, value in values.items())


def storable(value: Any) -> int | float | str:
    """The value as a number or a text; lists, tables and truth values as JSON text."""
    small = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if small or isinstance(value, (float, str)):
        return value  # type: ignore[no-any-return]
    return json.dumps(value)


def disagreeing(attrs_and_values: Iterable[tuple[Mapping[str, Any], Any]], experiment: Experiment) -> list[str]:
    """Keys of coordinates with swept values that differ from the experiment's own."""
    found = []
    for attrs, value in attrs_and_values:
        key, plain = str(attrs[KEY]), np.asarray(value).item()
        meant = [plain]
        with suppress(ValueError, RecursionError):
            meant += [json.loads(plain)] if isinstance(plain, str) else []
        if not any(_is_as_it_is(experiment, key, each) for each in meant):
            found.append(key)
    return found


def _is_as_it_is(experiment: Experiment, key: str, value: Any) -> bool:
    with suppress(ExperimentError):
        return experiment.says({key: value})
    return False


def _listed(path: Path) -> dict[str, Any] | None:
    """The content of ``sweep.json`` in `path`; None if there is none that can be read."""
    now = version(path / SWEEP)
    return None if now is None else _read(path.absolute() / SWEEP, now)


def _by_directory(listed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Directory → swept values of each point that ``sweep.json`` lists; empty if it is not what tsdyn writes."""
    with suppress(KeyError, TypeError, AttributeError):
        found = {point["directory"]: point["values"] for point in listed["points"]}
        return found if all(isinstance(values, dict) for values in found.values()) else {}
    return {}


@lru_cache(maxsize=4)
def _read(file: Path, _: tuple[object, ...]) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found | {_BY_DIRECTORY: _by_directory(found)} if isinstance(found, dict) else None
    return None
