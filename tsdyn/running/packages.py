"""Parts that other packages offer: which ones an archive was computed with, and which are not installed here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsdyn import registers
from tsdyn.archive import reading
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.schema import PARTS, adopt


def attribute(experiment: Experiment) -> dict[str, str]:
    """The attribute with package, version and place of each part (``activation sine``) that another package offers."""
    found = {
        f"{register.kind} {name}": register.origin(name)._asdict()
        for register, name in experiment.parts.values()
        if register.foreign(name)
    }
    return {PARTS: json.dumps(found)} if found else {}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Parts whose package has another version than before, as ``part version before, version now``."""
    then, today = _told(before), _told(now)
    return [
        f"{part} {then[part]} before, {today[part]} now" for part in then if today.get(part, then[part]) != then[part]
    ]


def every_part(experiment: Experiment) -> Iterator[tuple[str, registers.Register, str]]:
    """(key, register, name) of the parts of an experiment, or of all points of a sweep."""
    singles: Iterable[Experiment] = [experiment]
    if experiment.sweep:
        swept = {key.split("[")[0] for key in experiment.parts} & set(swept_keys(experiment.sweep))
        points = (single for _, single in experiment.points())
        singles = points if swept else itertools.islice(points, 1)  # all name the same
    for single in singles:
        for key, (register, name) in single.parts.items():
            yield key, register, name


def of_this_process(experiment: Experiment) -> tuple[registers.Sent, ...]:
    """The experiment's parts that only this process has, observables included."""
    if not any(register.adds for register in registers.ALL.values()):
        return ()
    found = {
        (register.kind, name): registers.Sent(register.kind, name, register.load(name))
        for _, register, name in every_part(experiment)
        if register.foreign(name) and register.origin(name).package == registers.THIS_PROCESS
    }
    return tuple(found.values())


@contextmanager
def known(parts: Iterable[registers.Sent]) -> Iterator[None]:
    """Context in which this process knows parts `of_this_process` of another, and the observables' variables."""
    for each in parts:
        if each.kind == registers.OBSERVABLES.kind:
            adopt(each.part.variable)
    with registers.present(parts):
        yield


def missing(experiment: Experiment) -> dict[str, registers.PartError]:
    """What is said of each part that is not there, by ``key = name``."""
    lost: dict[str, registers.PartError] = {}
    for key, register, name in every_part(experiment):
        try:
            with registers.accepting(()):
                register.check(name)
        except registers.PartError as error:
            lost[f"{key} = {name!r}"] = error
    return lost


def refuse_missing(lost: Mapping[str, registers.PartError], experiment: Experiment, path: Path) -> None:
    """Refuse to go on without parts that are `missing`, naming the package if `path` says it.

    Raises:
        ExperimentError: naming each key, and the way out.
    """
    said = "\n  ".join(f"{key}: {error}" for key, error in lost.items())
    raise ExperimentError(f"{said}{way_back(experiment, path)}")


def way_back(experiment: Experiment, path: Path) -> str:
    """A line that names the packages with which `path` was computed, if their parts are missing; else an empty text."""
    try:
        told = _told(reading.opened(path).attrs)
    except (ArchiveError, OSError):
        return ""
    gone: dict[str, None] = {}
    for _, register, name in every_part(experiment):
        package = told.get(f"{register.kind} {name}")
        if package is not None and name not in register.names():
            gone[package] = None
    return f"\n  {path} was computed with {', '.join(gone)}: install that to go on" if gone else ""


def _told(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Part → package and version, from an archive's attributes; empty if these cannot be read."""
    try:
        parts = json.loads(str(attrs.get(PARTS, "{}")))
        return {str(part): f"{origin['package']} {origin['version']}".strip() for part, origin in parts.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
