"""Standard output and error streams that drop what cannot be written, so that printing never ends a run."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

#: Errors after which nothing that is written can ever be read: the reading process or the terminal is gone.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Lenient(io.TextIOBase):
    """A text stream that drops what cannot be written, instead of raising; `lost` is the first error.

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
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
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
        if reason.errno in _GONE:  # the buffer's content would be written again, at the latest at exit
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def abandon(self) -> None:
        """Write what can be written and drop the rest, so that nothing is written at exit."""
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
        """The underlying stream of bytes."""
        return self._stream.buffer  # type: ignore[return-value]


def make_lenient() -> tuple[Lenient, Lenient]:
    """Standard output and error of this process, made `Lenient`.

    A descriptor that the parent process closed is opened on /dev/null: otherwise the next file to be opened would get
    its number, and libraries would print into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if not isinstance(found := getattr(sys, name), Lenient):
            setattr(sys, name, Lenient(open(os.devnull, "w") if found is None else found))  # noqa: SIM115
    assert isinstance(sys.stdout, Lenient)
    assert isinstance(sys.stderr, Lenient)
    return sys.stdout, sys.stderr


def width() -> int:
    """Columns of the terminal that a standard stream is connected to, or what ``COLUMNS`` says; 80 where none is."""
    said = os.environ.get("COLUMNS", "")
    if said.isdigit():
        return int(said)
    for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, ValueError, OSError):  # no stream, a closed one, no terminal
            return os.get_terminal_size(stream.fileno()).columns or 80  # type: ignore[union-attr]
    return 80
