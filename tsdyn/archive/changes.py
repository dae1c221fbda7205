"""What was added to a run or a sweep after it was begun, and when.  Imports no torch.

A run's own files say it in the attribute `ATTRIBUTE`, a sweep's ``sweep.json`` under ``changes``; what was measured
later says it in files of its own (`tsdyn.archive.additions`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tsdyn import schema
from tsdyn._version import __version__
from tsdyn.archive.swept_values import SWEEP
from tsdyn.archive.whole_files import write_text
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import axes

#: Global attribute of an archive: JSON list of its changes, each with ``at``, ``tsdyn_version`` and ``added``.
ATTRIBUTE = "changes"


def described(longer: Experiment, shorter: Experiment) -> str:
    """What `longer` has more than `shorter`, which it extends, in words."""
    words = []
    if longer.training.epochs > shorter.training.epochs:
        words.append(f"epochs {shorter.training.epochs + 1}..{longer.training.epochs}")
    seeds = [seed for seed in longer.seed_labels if seed not in shorter.seed_labels]
    if seeds:
        words.append(f"seed{'s' * (len(seeds) > 1)} {_few(seeds)}")
    before = schema.expand(shorter.record.observables)
    names = [name for name in schema.expand(longer.record.observables) if name not in before]
    if names:
        words.append(f"{', '.join(names)} (recorded from epoch {shorter.training.epochs + 1} on)")
    for mine, theirs in zip(axes(longer.sweep), axes(shorter.sweep), strict=False):
        values = [value for value in mine.values if value not in theirs.values]
        if values:
            shown = [value[0] if len(value) == 1 else value for value in values]
            words.append(f"{', '.join(mine.keys)} = {_few(shown)}")
    return "; ".join(words)


def _few(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"


def listed(attrs: Mapping[str, Any]) -> list[dict[str, str]]:
    """The changes that an archive's attributes name, in order; empty if there are none."""
    with suppress(KeyError, ValueError):
        found = json.loads(str(attrs[ATTRIBUTE]))
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return []


def extended(before: Mapping[str, Any], added: str) -> dict[str, str]:
    """The attribute of an archive with one more change; no attribute for one without any."""
    entries = listed(before) + ([_entry(added)] if added else [])
    return {ATTRIBUTE: json.dumps(entries)} if entries else {}


def _entry(added: str) -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"at": now, "tsdyn_version": __version__, "added": added}


def note_in_sweep(path: Path, shorter: Experiment, longer: Experiment) -> None:
    """Write into ``sweep.json`` what a sweep is asked to gain, before its experiment file says so."""
    held: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError):
        held = json.loads((path / SWEEP).read_text(encoding="utf-8"))
    added = described(longer, shorter)
    if held and added:
        write_text(path / SWEEP, json.dumps({**held, "changes": [*of_sweep(path), _entry(added)]}, indent=1))


def of_sweep(path: Path) -> list[dict[str, str]]:
    """The changes that a sweep's ``sweep.json`` lists; empty if it cannot be read."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        found = json.loads((path / SWEEP).read_text(encoding="utf-8")).get("changes", [])
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return []
