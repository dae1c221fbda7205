"""What ``[sweep]`` says: its axes, the points on them, and the dimensions they become.  Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tsdyn import vocabulary

#: Words in ``[sweep]`` that are not keys of an experiment but list several keys each.
TOGETHER = ("zip", "points")
#: Name of the dimension of points whose keys vary together.
POINT = "point"
#: Attribute of the Dataset of a sweep: swept key → dimension, as JSON.
DIMENSIONS = "sweep_dimensions"


class Axis(NamedTuple):
    """One dimension of a sweep.

    Attributes:
        dimension: Its name: that of its key, or ``point`` where several keys vary together.
        keys: What varies along it.
        values: One tuple per position along it, with one value per key.
    """

    dimension: str
    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]


def axes(sweep: Mapping[str, Any], names: Mapping[str, str] | None = None) -> tuple[Axis, ...]:
    """The dimensions of a sweep in order: one per key, then ``point`` for what ``zip`` or ``points`` lists.

    Args:
        sweep: The experiment's.
        names: Swept key → dimension, where these were fixed when the sweep began; `sweep_dimensions` unless given.
    """
    names = sweep_dimensions(swept_keys(sweep)) if names is None else names
    found = [
        Axis(names[key], (key,), tuple((v,) for v in values)) for key, values in sweep.items() if key not in TOGETHER
    ]
    if "zip" in sweep:
        found.append(Axis(POINT, tuple(sweep["zip"]), tuple(zip(*sweep["zip"].values(), strict=True))))
    if "points" in sweep:
        keys = tuple(sweep["points"][0])
        found.append(Axis(POINT, keys, tuple(tuple(point[key] for key in keys) for point in sweep["points"])))
    return tuple(found)


def swept_keys(sweep: Mapping[str, Any]) -> tuple[str, ...]:
    """Every key that a sweep varies, in order."""
    listed = (*sweep.get("zip", {}), *(sweep["points"][0] if "points" in sweep else ()))
    return (*(key for key in sweep if key not in TOGETHER), *listed)


def places(sweep: Mapping[str, Any]) -> dict[tuple[int, ...], dict[str, Any]]:
    """Swept keys and values of every point of a sweep, by its position along each of `axes`."""
    found = axes(sweep)
    return {
        place: {
            key: value
            for axis, position in zip(found, place, strict=True)
            for key, value in zip(axis.keys, axis.values[position], strict=True)
        }
        for place in itertools.product(*(range(len(axis.values)) for axis in found))
    }


def checked_sweep(sweep: Any) -> dict[str, Any]:
    """The sweep with its lists made tuples, once it is checked.

    Raises:
        ValueError: if it is not a table of keys with lists, ``zip`` and ``points``.
    """
    if not isinstance(sweep, Mapping):
        raise ValueError(f"sweep = {sweep!r}: a table of keys and lists")
    found: dict[str, Any] = {}
    for key, values in sweep.items():
        if key == "zip":
            if not isinstance(values, Mapping) or not values:
                raise ValueError('sweep.zip: a table of keys and lists, such as { "teacher.polarity" = [0.0, 1.0] }')
            found[key] = {name: _values(f"zip.{name}", of) for name, of in values.items()}
            lengths = {name: len(of) for name, of in found[key].items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"sweep.zip: values go together, so there must be equally many: {lengths}")
        elif key == "points":
            found[key] = _values(key, values)
            if not all(isinstance(point, Mapping) and set(point) == set(found[key][0]) for point in found[key]):
                raise ValueError("sweep.points: a list of tables, all with the same keys")
        else:
            found[key] = _values(key, values)
    if set(TOGETHER) <= set(found):
        raise ValueError("sweep: zip and points both list points; write one of them")
    keys = swept_keys(found)
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"sweep: {sorted({k for k in keys if keys.count(k) > 1})} are listed twice; give each key once"
        )
    return found


def _values(key: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"sweep: {key!r} = {values!r}: must be a list of at least one value")
    return tuple(values)


def sweep_dimensions(keys: Mapping[str, Any] | Iterable[str], others: Iterable[str] = ()) -> dict[str, str]:
    """Swept key → dimension: the key's last word, or the whole key where the schema or another key has that word.

    Args:
        keys: All keys of the sweep.
        others: Further names that are taken: variables of packages that the sweep's runs record.
    """
    taken = {*vocabulary.VARIABLES, *vocabulary.COORDINATES, *vocabulary.DIMENSIONS, POINT, *others}
    names = {key: key.rsplit(".", 1)[-1] for key in keys}
    names = {key: key if word in taken else word for key, word in names.items()}
    shared = {w for w in names.values() if list(names.values()).count(w) > 1}
    return {key: key if word in shared else word for key, word in names.items()}


def named(found: Any, keys: Iterable[str]) -> dict[str, str] | None:
    """Swept key → dimension, as `sweep_dimensions` gave them when a sweep began; None if `found` is no such mapping.

    Names stay what they are though the schema has got a variable of that name since.
    """
    keys = tuple(keys)
    if not isinstance(found, Mapping) or set(found) != set(keys) or len({*map(str, found.values())}) < len(keys):
        return None
    if any(found[key] not in (key, key.rsplit(".", 1)[-1]) for key in keys):
        return None
    if {*vocabulary.DIMENSIONS, *vocabulary.COORDINATES, POINT} & set(found.values()):
        return None
    return {key: found[key] for key in keys}
