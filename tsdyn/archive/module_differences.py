"""Where archives of own modules differ: in which keys of their experiments, and in their parameters.  No torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tsdyn.archive.lazy_arrays import Cells
from tsdyn.experiment import made_modules
from tsdyn.experiment.experiment import flattened
from tsdyn.experiment.sweep_axes import Axis, swept_keys


def differing_keys(written: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which experiments differ, without swept keys, names and seeds.

    Of other modules, or modules with other arguments, also without what tsdyn fills in.
    """
    flat = [
        dict(flattened({k: v for k, v in values.items() if k not in ("sweep", "name", "seeds")})) for values in written
    ]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    absent = object()
    found = [key for key in keys if any(f.get(key, absent) != flat[0].get(key, absent) for f in flat)]
    swept = [key for values in written for key in swept_keys(values.get("sweep", {}))]
    for who in made_modules.NETWORKS:
        filled = [f"{who}.made."]
        if any(key.startswith((f"{who}.module", f"{who}.arguments")) for key in (*found, *swept)):
            filled += [f"{who}.{name}" for name in made_modules.FILLED]
        found = [key for key in found if not key.startswith(tuple(filled))]
    return found


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
