"""Finished blocks of a computation, kept in files, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from tsdyn._version import __version__
from tsdyn.archive.whole_files import make_directory, replacing
from tsdyn.through_training.blocks import Found, Job

_ARRAYS = ("value", "difference", "radius", "kinks", "growth")


def key(job: Job) -> str | None:
    """A name for the job that is another for anything else that is computed; None for an observable without a name."""
    if callable(job.of):
        return None
    of = job.of if isinstance(job.of, str) else [job.of[0], dict(job.of[1])]
    told = [
        __version__, job.experiment.to_toml(), job.epoch, of, job.wrt, job.certificate, job.smoothed, job.spread,
        job.device,
    ]  # fmt: skip
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for epoch, named in sorted(job.recorded.items()):  # another run of the same experiment may differ in rounding
        for name, array in sorted(named.items()):
            found.update(f"{epoch} {name}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:24]


def read(folder: Path, job: Job) -> Found | None:
    """The result of a job if it is kept there, else None; a file that cannot be read counts as none."""
    name = key(job)
    file = folder / f"{name}.npz"
    if name is None or not file.is_file():
        return None
    try:
        with open(file, "rb") as raw, np.load(raw, allow_pickle=False) as held:
            arrays = dict(held)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    if "begun" not in arrays:  # of an earlier version
        return None
    parts: dict[str, dict[str, np.ndarray | list[np.ndarray | None]]] = {"slopes": {}, "errors": {}}
    for where, array in arrays.items():
        if "/" not in where:
            continue
        group, variable, place = where.split("/")
        if place == "all":
            parts[group][variable] = array
        else:
            layers = parts[group].setdefault(variable, [])
            assert isinstance(layers, list)
            layers.extend([None] * (int(place) + 1 - len(layers)))
            layers[int(place)] = array
    return Found(
        parts["slopes"], arrays["value"], arrays["difference"], int(arrays["compared"]), parts["errors"],
        arrays.get("radius"), arrays.get("kinks"), arrays.get("growth"), bool(arrays["gated"]), str(arrays["way"]),
        arrays["begun"].tolist(),
    )  # fmt: skip


def write(folder: Path, job: Job, found: Found) -> None:
    """Keep the result of a job, whole or not at all."""
    name = key(job)
    if name is None:
        return
    arrays: dict[str, np.ndarray] = {"compared": np.array(found.compared), "gated": np.array(found.gated)}
    arrays |= {"way": np.array(found.way), "begun": np.array(found.begun, dtype=np.int64)}
    for array in _ARRAYS:
        if (held := getattr(found, array)) is not None:
            arrays[array] = held
    for group in ("slopes", "errors"):
        for variable, value in getattr(found, group).items():
            if isinstance(value, list):
                arrays |= {f"{group}/{variable}/{i}": v for i, v in enumerate(value) if v is not None}
                # the last layer says how many there are
                if value and value[-1] is None:
                    arrays[f"{group}/{variable}/{len(value) - 1}"] = np.full((len(found.value), 0), np.nan)
            else:
                arrays[f"{group}/{variable}/all"] = value
    make_directory(folder)
    with (
        replacing(folder / f"{name}.npz", sum(a.nbytes for a in arrays.values())) as temporary,
        open(temporary, "wb") as f,
    ):
        np.savez(f, **arrays)  # type: ignore[arg-type]
