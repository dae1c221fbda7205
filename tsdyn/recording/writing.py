"""What a recording has committed and has not on disk yet."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tsdyn.archive.recording_directory import RecordingDirectory
from tsdyn.archive.recordings import WRITERS
from tsdyn.running.runner import along_steps, commit_is_due


class Writer:
    """What was committed and is not on disk yet, and the directory that it goes to.

    It outlives the Recorder until it has written, and knows nothing of it.
    """

    def __init__(self, directory: RecordingDirectory) -> None:
        self.path, self.directory = directory.path.absolute(), directory
        self.pending: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.state: dict[str, np.ndarray] = {}
        self.constants: dict[str, Any] = {}
        self.attrs: dict[str, Any] = {}
        committed = directory.committed()
        self.durable = committed
        self.first = 0 if committed is None else committed + 1
        self.began = self.clock = time.monotonic()
        self.took = self.spent = 0.0
        self.closed = False
        WRITERS.add(self)

    def add(self, epoch: int, record: dict[str, Any], state: dict[str, np.ndarray]) -> None:
        """Take an epoch's record and the state to go on from; written at once if a commit is due."""
        self.pending.append(record)
        self.epochs.append(epoch)
        self.state = state
        now = time.monotonic()
        if self.durable is None or commit_is_due(now - self.began, now - self.clock, self.took, self.spent):
            self.flush()

    def flush(self) -> None:
        """Write all that was committed as one segment."""
        if not self.pending:
            return
        now = time.monotonic()
        records = {**along_steps(self.pending), **(self.constants if self.first == 0 else {})}
        self.directory.commit(self.first, self.epochs[-1], self.epochs, records, self.state, self.attrs)
        self.durable, self.first = self.epochs[-1], self.epochs[-1] + 1
        self.pending, self.epochs = [], []
        self.clock = time.monotonic()
        self.took = self.clock - now
        self.spent += self.took

    def close(self) -> None:
        """Write what is pending and free the directory."""
        if not self.closed:
            self.closed = True
            try:
                self.flush()
            finally:
                WRITERS.discard(self)
                self.directory.__exit__()
