"""Standard output and error that no closed pipe, full disk or narrow encoding turns into a failure of the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

#: Nobody will ever read what is written: the reader went away, or the terminal did.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Lenient(io.TextIOBase):
    """A text stream that drops what cannot be written and goes on; `lost` is the first reason.

    Characters that its encoding lacks are replaced.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: of a stream that was closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        reason = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.lost = self.lost or reason
        if reason.errno in _GONE:  # what the buffer holds would be tried again, at the latest as the process ends
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def abandon(self) -> None:
        """Write what can be written, and leave nothing to be tried as the process ends."""
        self.flush()
        if self.lost is not None:
            self._drop(OSError(errno.EPIPE, os.strerror(errno.EPIPE)))

    def isatty(self) -> bool:
        with suppress(ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "ascii"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "replace"

    @property
    def buffer(self) -> io.BufferedIOBase:
        """For whoever writes bytes."""
        return self._stream.buffer  # type: ignore[return-value]


def make_lenient() -> tuple[Lenient, Lenient]:
    """Standard output and error of this process, made `Lenient`.

    A descriptor that was closed by who started it is given to nothing: the next file to be opened would get it, and
    with it what libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so this one
    for name in ("stdout", "stderr"):
        if not isinstance(found := getattr(sys, name), Lenient):
            setattr(sys, name, Lenient(open(os.devnull, "w") if found is None else found))  # noqa: SIM115
    assert isinstance(sys.stdout, Lenient)
    assert isinstance(sys.stderr, Lenient)
    return sys.stdout, sys.stderr
