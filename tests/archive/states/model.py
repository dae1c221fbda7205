"""What is known of a directory: the runs in it, every number of theirs, what was damaged, and what is open."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn.experiment.experiment import Experiment

DATA = Path(__file__).resolve().parent.parent.parent / "data"
#: Epochs that a run can be extended by in all.
MORE = 4
#: Seeds that a run can gain in all, and an observable that is measured after the run.
MORE_SEEDS, LATER = 2, "correlation"
#: The swept key that can gain a value, and that value.
GAINING, GAINED = "teacher.polarity", 0.5
#: Another engine, or another machine, sums in another order: a few thousand roundings of numbers of order 1, divided by
#: Adam's ε at worst.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}

TINY = small(
    seeds=2,
    teacher__widths=[4, 2, 2],
    student__overrealization=1.0,
    data__train=12,
    data__eval=8,
    training__epochs=3,
    training__steps_per_epoch=2,
    training__batch=4,
    training__momentum=0.9,
    record__observables=["mse", "weight"],
)
#: How a directory may begin: name → experiment of a new one, or a directory that an earlier version wrote.
STARTS: dict[str, Experiment | Path] = {
    "run": TINY,
    "seldom": TINY.replace({"record.every": 2}),
    "plain": TINY.replace({"record.every": 2, "training.momentum": 0.0}),  # forks begin from its recorded weights
    "teacher file": TINY.replace({
        "teacher.init": "file", "teacher.path": "teacher.pt", "teacher.activation": "relu",
    }),
    "sweep": TINY.replace({"training.epochs": 2, "sweep": {"teacher.polarity": [0.0, 1.0]}}),
    **{
        name: DATA / name
        for name in ("archive-v1", "unfinished-v1", "archive-v2", "unfinished-v2", "sweep-v2", "points-v2",
                     "cross-entropy-v2")
    },
}  # fmt: skip

#: Begun with as often again as with all others: more rules apply to a new sweep, and a new run's bits are known.
OFTEN = ("sweep", "run", "sweep", "teacher file", "sweep", "seldom", "run", "teacher file")


@functools.cache
def teacher(which: int) -> bytes:
    """A file of teacher weights."""
    draw = torch.Generator().manual_seed(which)
    shapes = {"0.weight": (2, 4), "0.bias": (2,), "2.weight": (2, 2), "2.bias": (2,)}
    weights = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(weights, file.name)
        return Path(file.name).read_bytes()


@functools.cache
def undisturbed(text: str, which: int) -> xr.Dataset:
    experiment = Experiment.from_toml_text(text, archived=True)
    labels = experiment.seed_labels
    changes: dict[str, Any] = {
        "training.epochs": experiment.training.epochs + MORE, "record.every": 1,
        "seeds": [*labels, *more_seeds(experiment)],
        "record.observables": [*experiment.record.observables, LATER],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tsdyn-model-") as scratch:
        if experiment.teacher.path is not None:
            changes["teacher.path"] = str(Path(scratch) / "teacher.pt")
            Path(changes["teacher.path"]).write_bytes(teacher(which))
        return tsdyn.run(experiment.replace(changes), Path(scratch) / "run").load()


@dataclass
class Point:
    """What is known of one run of the directory."""

    place: tuple[int, ...]
    single: Experiment
    required: set[int] = field(default_factory=set)  #: epochs that were reported as committed, and recorded
    rounded: float = float("inf")  #: the first epoch that another engine, or another machine, may have computed
    born: int = 0  #: the teacher file with which it began
    salvaged: bool = False  #: parts of its archive were lost, and `repair` said so
    seeds: set[int] = field(default_factory=set)  #: seeds that it was reported to have
    inexact: set[int] = field(default_factory=set)  #: seeds, added later, that another engine may have computed
    #: Seed, added later → epochs that the others keep from a shorter run, and that its own schedule leaves out.
    lacking: dict[int, set[int]] = field(default_factory=dict)
    later: dict[int, set[int]] = field(default_factory=dict)  #: seed → epochs at which `LATER` was said to be there

    def members(self, shown: list[int], label: int, variable: str) -> Iterator[tuple[list[int], bool]]:
        """The shown seeds in two groups: those that must be there at an epoch, and those that may be."""
        asked = {seed for seed in self.seeds if label not in self.lacking.get(seed, ())}
        if variable == LATER:
            asked = {seed for seed in asked if label in self.later.get(seed, ())}
        yield from (
            (group, must) for must in (True, False) if (group := [seed for seed in shown if (seed in asked) == must])
        )

    def forget_later(self, first: int = 0) -> None:
        """What was measured may be gone from an epoch on."""
        self.later = {seed: {label for label in labels if label < first} for seed, labels in self.later.items()}

    @property
    def truth(self) -> xr.Dataset:
        named = {} if self.single.teacher.path is None else {"teacher.path": "teacher.pt"}
        return undisturbed(self.single.replace(named).to_toml(), self.born)


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tsdyn-model-")


@functools.cache
def of_other_seeds(text: str) -> Path:
    """A finished run of the seeds that the given one can gain."""
    experiment = Experiment.from_toml_text(text, archived=True)
    path = Path(_kept().name) / hashlib.sha256(text.encode()).hexdigest()
    tsdyn.run(experiment.replace({"seeds": more_seeds(experiment)}), path)
    return path


def more_seeds(experiment: Experiment) -> list[int]:
    """The seeds that a run can gain."""
    return [max(experiment.seed_labels) + 1 + i for i in range(MORE_SEEDS)]


@dataclass
class Damage:
    """Files that a rule changed: path below the directory → content before and after; None where there is no file.

    Attributes:
        kind: ``bytes``, ``checksum`` (a checksum was removed) or ``experiment``.
        first: Epochs of `point` from this one on can be lost with it; None for none.
    """

    kind: str
    files: dict[str, tuple[bytes | None, bytes | None]]
    point: str | None = None
    first: int | None = None
    required: dict[str, set[int]] = field(default_factory=dict)


@dataclass
class Opened:
    """A lazy Dataset, and whether it must still be readable."""

    ds: xr.Dataset
    points: dict[str, Point]
    must: bool = True


def differs(found: np.ndarray, model: np.ndarray, exact: bool) -> str:
    """How numbers differ from the model's; empty if they do not.  Beyond the model's shape is padding."""
    inside = np.full(model.shape, np.nan)  # narrower where a wider point is damaged and left out
    part = found[tuple(slice(n) for n in model.shape)]
    inside[tuple(slice(n) for n in part.shape)] = part
    if np.isfinite(found).sum() > np.isfinite(inside).sum():
        return "numbers beyond the layer's nodes"
    there = ~np.isnan(inside)
    alike = inside == model if exact else np.isclose(inside, model, **ROUNDING)
    if not (alike | ~there | np.isnan(model)).all() or (there & np.isnan(model)).any():
        return f"other numbers: {inside} instead of {model}"
    lost = np.isnan(inside) & ~np.isnan(model)
    return ("partly missing" if there.any() else "missing") if lost.any() else ""


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
