"""Checksums of an experiment's input files, stored in its archive and compared when the run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tsdyn.archive.run_directory import INPUTS
from tsdyn.archive.whole_files import DirectoryError, digest_of
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem import images

#: Global attribute of an archive: JSON of key of the experiment file → SHA-256 of the file that it names.
ATTRIBUTE = INPUTS
MISSING = "missing"


def files(experiment: Experiment) -> dict[str, list[Path]]:
    """The input files of an experiment, by the key of the experiment file that names them."""
    found = {
        "teacher.path": _named(experiment.teacher.path),
        "student.path": _named(experiment.student.path),
        "data.path": images.files(experiment.data.model_copy(update={"eval_path": None})),
        "data.eval_path": _named(experiment.data.eval_path),
        "data.covariance": _named(experiment.data.covariance),
    }
    return {key: paths for key, paths in found.items() if paths}


def _named(path: str | None) -> list[Path]:
    """The file at `path`, or the archive or segments of an earlier run if it is a run's directory."""
    if path is None:
        return []
    return sorted(Path(path).rglob("*.nc")) if Path(path).is_dir() else [Path(path)]


def digests(experiment: Experiment) -> dict[str, str]:
    """The SHA-256 of the file that each key names; for several files, of the lines that ``sha256sum`` writes of them.

    A file is read again only after its size or times changed.  The value is ``missing`` if a file cannot be read.
    """
    return {key: _together(paths) for key, paths in files(experiment).items()}


def _together(paths: list[Path]) -> str:
    each = [digest_of(path) for path in paths]
    if None in each:
        return MISSING
    if len(paths) == 1:
        return str(each[0])
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(each, paths, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def kept(attrs: Mapping[str, object]) -> dict[str, str] | None:
    """The checksums of input files in an archive's attributes; None if an earlier version wrote it without them."""
    try:
        found = json.loads(str(attrs[ATTRIBUTE]))
    except (KeyError, ValueError):
        return None
    return {str(key): str(digest) for key, digest in found.items()} if isinstance(found, dict) else None


def refuse_other(path: Path, experiment: Experiment, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to resume a run with other input files than its committed epochs were computed from.

    Raises:
        DirectoryError: naming each file with both its checksums.
    """
    named = files(experiment)
    other = [
        f"{key}: {', '.join(map(str, named[key][:4]))}: SHA-256 {before[key]} of the committed epochs, {now[key]} now"
        for key in now
        if key in before and before[key] != now[key]
    ]
    if other:
        raise DirectoryError(
            f"{path}: was computed from other input files than are there now, so nothing is added. What differs:\n  "
            + "\n  ".join(other)
            + "\nPut the former back to go on, or give another directory with -o"
        )
