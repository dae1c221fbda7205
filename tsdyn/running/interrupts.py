"""Signals that ask a run to stop: heard at the next epoch, so that what was computed is committed first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: Signals a second one of which acts as ever.
_ENDING = (signal.SIGINT, signal.SIGTERM)
#: A terminal that went away, the limit on processor time, a batch system's warning: sent again and again, they only
#: ask.  Where they are ignored, as nohup has it, they stay ignored.
_WARNING = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
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
    """Inside, the first SIGINT, SIGTERM, SIGHUP, SIGXCPU or SIGUSR1 only asks; the function given says which came.

    After it SIGINT and SIGTERM act as ever.  Outside the main thread signals are left alone: they are the main thread's
    to hear.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (*_ENDING, *_WARNING)}
    heard = [number for number in before if number in _ENDING or before[number] is not signal.SIG_IGN]

    def restore(numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def hear(number: int, _: FrameType | None) -> None:
        if asked:
            return
        asked.append(number)
        restore(_ENDING)
        name = signal.Signals(number).name
        way = "; send it again to stop at once" if number in _ENDING else ""
        _log.warning("%s: finishing this epoch and committing%s", name, way)

    for number in heard:
        signal.signal(number, hear)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        restore(heard)
