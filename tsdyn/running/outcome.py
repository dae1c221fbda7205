"""Which points of a sweep finished, and why others did not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdyn.archive import netcdf, run_directory
from tsdyn.archive.lock import HeldError
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem import input_files

_log = logging.getLogger("tsdyn")


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


class AllHeldError(HeldError):
    """Other processes are writing all points of a sweep, and it cannot be opened yet."""


#: The beginning of the reason for a point that was left out because another process is writing it.
HELD = "held: "


def reason_of(error: BaseException) -> str:
    if isinstance(error, HeldError):
        return f"{HELD}{error}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, (ArchiveError, ValueError)) else str(error)


def is_finished(path: Path, experiment: Experiment) -> bool:
    try:
        there = (path / run_directory.EXPERIMENT).read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: the file is not text; running the point then raises the proper error
        return False
    # segments beside an archive: their writer ended while it removed them, and running the point does so
    left = any((path / run_directory.SEGMENTS).glob("epoch-*"))
    done = (path / run_directory.ARCHIVE).is_file() and not left and there == experiment.to_toml()
    return done and not (path / run_directory.ADDED).exists()  # else seeds were joined, and this was cut short


def say_replaced_inputs(path: Path, experiment: Experiment) -> None:
    """Log a warning if an input file of a finished run is another than the one it was computed from.

    Its numbers are right, but not those of the files that are there now, which whoever asks for it again may expect.
    """
    there = {key: digest for key, digest in input_files.digests(experiment).items() if digest != input_files.MISSING}
    if not there:
        return
    try:
        with netcdf.dataset(path / run_directory.ARCHIVE) as nc:
            before = input_files.kept(netcdf.attributes(nc))
    except (ArchiveError, FileNotFoundError):  # it is opened next, which says what is wrong; or another moves it
        return
    try:
        input_files.refuse_other(path, experiment, before or {}, there)
    except DirectoryError as other:
        _log.warning("%s", other)
