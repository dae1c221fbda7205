"""Signals that ask a run to stop: it stops after the present epoch, so that what was computed is committed first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: Signals whose second arrival has its usual effect: it ends the process at once.
_ENDING = (signal.SIGINT, signal.SIGTERM)
#: A closed terminal, the limit on processor time, a batch system's warning: however often they come, they only ask.
#: If they are ignored, as under nohup, they stay ignored.
_WARNING = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
_log = logging.getLogger("tsdyn")


class Stopped(KeyboardInterrupt):
    """A signal stopped a run, after what was computed had been committed.

    Attributes:
        signal: The signal's number; the command exits with 128 more.
        failed: Directories whose last epochs could not be committed → the error.
    """

    def __init__(self, number: int, failed: Mapping[Path, Exception] | None = None) -> None:
        self.signal, self.failed = number, dict(failed or {})
        but = "".join(f"; but for {path}: {error}" for path, error in self.failed.items())
        super().__init__(f"stopped by {signal.Signals(number).name}; what was computed is committed{but}")


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """A function that returns the number of the signal that asked to stop, or None.

    Inside the context the first SIGINT, SIGTERM, SIGHUP, SIGXCPU or SIGUSR1 is only noted; after it SIGINT and SIGTERM
    act as usual.  In other threads than the main one nothing is changed, since Python delivers signals to that one.
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
