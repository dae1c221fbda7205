"""Signals that ask a run to stop: heard at the next epoch, so that what was computed is committed first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger("tsdyn")


class Stopped(KeyboardInterrupt):
    """A run that a signal stopped, after it committed what it had.

    Attributes:
        signal: The signal's number; the command exits with 128 more.
        failed: What could not be committed in this moment, and why.
    """

    def __init__(self, number: int, failed: Mapping[Path, Exception] | None = None) -> None:
        self.signal, self.failed = number, dict(failed or {})
        but = "".join(f"; but for {path}: {error}" for path, error in self.failed.items())
        super().__init__(f"stopped by {signal.Signals(number).name}; what was computed is committed{but}")


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """Inside, the first SIGINT or SIGTERM only asks; the function given says which came.  A second acts as ever.

    Outside the main thread signals are left alone: they are the main thread's to hear.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(number: int, _: FrameType | None) -> None:
        asked.append(number)
        restore()
        name = signal.Signals(number).name
        _log.warning("%s: finishing this epoch and committing; send it again to stop at once", name)

    for number in _SIGNALS:
        signal.signal(number, hear)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        restore()
