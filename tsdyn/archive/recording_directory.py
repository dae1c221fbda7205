"""The directory of one recording, held for writing by the user's own loop.  Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tsdyn.archive import joining, netcdf, swept_values
from tsdyn.archive.lock import NAME as LOCK
from tsdyn.archive.recordings import FILE, Recording, differences
from tsdyn.archive.run_directory import ARCHIVE, SEGMENTS, RunDirectory, segment_path
from tsdyn.archive.swept_values import Swept
from tsdyn.archive.whole_files import DirectoryError, make_directory, refuse_link, write_text
from tsdyn.experiment.sweep_axes import sweep_dimensions


class RecordingDirectory(RunDirectory[Recording]):
    """The directory of one seed of a recording, held for writing; entered and left as `RunDirectory`.

    ``recording.toml`` is written by `sign`, before the first commit.
    """

    file = FILE

    def _claimed(self) -> bool:
        """Check that the directory is free or of this recording; True if it is there already."""
        if (self.path / FILE).is_file():
            return True
        leftovers = re.compile(rf"{LOCK}(\.\w+)?|{SEGMENTS}|\.{re.escape(FILE)}\.\d+\.tmp")
        if self.path.exists() and (
            not self.path.is_dir() or any(not leftovers.fullmatch(entry.name) for entry in self.path.iterdir())
        ):
            what = "is not empty and holds no recording" if self.path.is_dir() else "is a file"
            raise DirectoryError(f"{self.path}: {what}; nothing was overwritten: give Recorder another path")
        return False

    def _sign(self) -> None:
        """Nothing: the first commit signs."""

    def _extend(self) -> None:
        """Make a finished archive the first segment again, so that the recording can go on."""
        if self.finished:
            netcdf.refuse_unproven(self.path / ARCHIVE)
            with netcdf.dataset(self.path / ARCHIVE, only="epoch") as nc:
                last = int(nc["epoch"][-1])
            self._archive_as_segment(segment_path(self.path, 0, last))

    def kept(self) -> Recording | None:
        """The recording that the directory holds; None before its first commit."""
        refuse_link(self.path / FILE)
        return (
            Recording.of_directory(self.path) if (self.path / FILE).is_file() and self.committed() is not None else None
        )

    def sign(self, recording: Recording) -> None:
        """Write ``recording.toml`` for what is committed from now on.

        Raises:
            DirectoryError: if the directory holds another recording, naming what differs.
        """
        kept = self.kept()
        if kept is not None and kept != recording:
            raise DirectoryError(
                f"{self.path}: holds another recording; nothing was overwritten. What differs:\n  "
                + "\n  ".join(differences(recording, kept))
                + "\nGive Recorder another path, seed or config, or remove this directory."
            )
        if kept is None:
            write_text(self.path / FILE, recording.to_toml())
        make_directory(self.path / SEGMENTS)
        self.experiment, self.layout, self.variables = recording, recording.layout, recording.recorded()

    @cached_property
    def _swept(self) -> tuple[Swept, ...]:
        """Values of the recording's config."""
        return swept_values.of_values(self.experiment.config, sweep_dimensions(self.experiment.config))

    def _history(self, parts: list[joining.Part], epochs: list[Any]) -> Mapping[str, Any]:
        return {}


def neighbours(path: Path) -> list[Path]:
    """Directories beside `path`, for names that a file system could take for one."""
    return [p for p in path.parent.iterdir() if p.is_dir() and p != path] if path.parent.is_dir() else []
