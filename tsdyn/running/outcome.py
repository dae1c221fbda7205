"""Which points of a sweep finished, and why others did not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdyn.archive import run_directory
from tsdyn.archive.lock import HeldError
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.experiment import Experiment


class SweepError(ArchiveError):
    """Points of a sweep failed; the others are done.

    Attributes:
        failures: Directory name of each point that failed → the reason.
    """

    def __init__(self, path: Path, failures: Mapping[str, str], points: int) -> None:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{path}: {len(failures)} of {points} points failed, the others are done:\n  {listed}")
        self.failures = dict(failures)

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeError, (str(self),)


#: The beginning of the reason for a point that was left out because another process is writing it.
_HELD = "held: "


def _reason(error: BaseException) -> str:
    if isinstance(error, HeldError):
        return f"{_HELD}{error}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, (ArchiveError, ValueError)) else str(error)


def _finished(path: Path, experiment: Experiment) -> bool:
    try:
        there = (path / run_directory.EXPERIMENT).read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: the file is not text; running the point then raises the proper error
        return False
    done = (path / run_directory.ARCHIVE).is_file() and there == experiment.to_toml()
    return done and not (path / run_directory.ADDED).exists()  # else seeds were joined, and this was cut short
