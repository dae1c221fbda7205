"""What tsdyn fills in of own modules where a sweep varies which they are: one entry per module.  Imports no torch.

``student.made`` and ``teacher.made`` of a sweep are tables: `key` of a module → what else a point says of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from tsdyn.experiment.sweep_axes import swept_keys

#: Keys of a module that tsdyn fills in; ``layers`` may be given, too.
FILLED = ("source", "numbers", "layers", "shapes")
NETWORKS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")


def varied(sweep: Mapping[str, Any], who: str) -> tuple[str, ...]:
    """The swept keys that decide which module the student or teacher is."""
    deciding = [[who, name] for name in ("module", "arguments", "layers")]
    return tuple(key for key in swept_keys(sweep) if key.split(".")[:2] in deciding)


def key(part: Mapping[str, Any]) -> str:
    """What decides which module it is, as JSON: its import path, its arguments and the layers asked for.

    Args:
        part: The table ``[student]`` or ``[teacher]``, without what tsdyn fills in.
    """
    given = {name: part[name] for name in ("arguments", "layers", "module") if part.get(name)}
    return json.dumps(given, sort_keys=True, default=str)


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The experiment of a point with its modules' entries of ``made`` in the place of the table; `values` changes.

    A module without an entry is left as a file that was never run names it.
    """
    for who in NETWORKS:
        part = values.get(who)
        if not isinstance(part, dict) or not part.get("made"):
            continue
        entry = part.pop("made").get(key(part))
        for name in FILLED:
            if name != "layers":
                part.pop(name, None)
        part.update(entry or {})
    return values
