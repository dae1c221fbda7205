"""Attributes that name the machines that computed an archive, and why not by compiled code.  Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Global attribute of an archive: JSON list of the machines that computed it, each with the first epoch it computed.
HISTORY = "history"
#: Global attribute of an archive: JSON list of why its members were not trained by compiled code; absent if they were.
FALLBACKS = "fallbacks"
#: A run gives the same bits as long as none of these changes.
DECISIVE = (
    "device", "threads", "torch_version", "numpy_version", "tsdyn_version", "engine", "compiler", "cpu", "cpu_flags",
)  # fmt: skip


def history(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The machines that computed an archive, in order of their first epochs; empty if the archive names none."""
    try:
        found = json.loads(str(attrs[HISTORY]))
    except (KeyError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def fallbacks(attrs: Mapping[str, Any]) -> list[str]:
    """Why an archive's members were not trained by compiled code; empty if they were."""
    try:
        found = json.loads(str(attrs[FALLBACKS]))
    except (KeyError, ValueError):
        return []
    return [str(reason) for reason in found] if isinstance(found, list) else []


def all_fallbacks(*parts: Mapping[str, Any]) -> dict[str, str]:
    """The attribute `FALLBACKS` of an archive that parts with these attributes make; no attribute where none has it."""
    reasons = list(dict.fromkeys(reason for attrs in parts for reason in fallbacks(attrs)))
    return {FALLBACKS: json.dumps(reasons)} if reasons else {}


def extended(before: Mapping[str, Any], now: Mapping[str, Any], epoch: int) -> str:
    """The history of an archive, with this machine added as the one that computes epochs from `epoch` on."""
    entries, entry = history(before), {key: now[key] for key in DECISIVE}
    if not entries or {key: entries[-1].get(key) for key in DECISIVE} != entry:
        entries.append({"from_epoch": epoch, **entry})
    return json.dumps(entries)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each changed fact that decides the bits, as ``key value before, value now``."""
    return [
        f"{key} {before[key]} before, {now[key]} now" for key in DECISIVE if key in before and before[key] != now[key]
    ]


def lines(attrs: Mapping[str, Any]) -> list[str]:
    """The history in words, one line per machine: all facts of the first, then only what changed."""
    found, previous = [], dict[str, Any]()
    for entry in history(attrs):
        shown = [f"{key} {entry.get(key)}" for key in DECISIVE if entry.get(key) != previous.get(key)]
        if not previous:
            shown = [word for word in shown if not word.startswith("cpu_flags ")]
        whose = f"seeds {', '.join(map(str, entry['seeds']))} " if isinstance(entry.get("seeds"), list) else ""
        found.append(f"{whose}from epoch {entry.get('from_epoch')}: {', '.join(shown)}")
        previous = entry
    return found
