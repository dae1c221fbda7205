"""Build the C++ sources of this folder with the system's compiler at first use; load, check and call the libraries.

Where there is no c++, g++ or clang++, nor one named by CXX, the Clang of the ``ziglang`` package is used if it is
installed (``pip install tsdyn[compiler]``).

A build is kept in the user's cache directory, under a name made of the source, the compiler and the processor, so that
a home directory shared by different machines holds one for each.  A library that differs from the checksum beside it is
built again.  If there is no home directory, or the cache cannot be used or belongs to another user, a private temporary
folder is used.  Without a compiler, or with the environment variable ``TSDYN_KERNEL=off``, `load` returns None and its
callers compute in torch; the log says so once.  A library that is there and finds no memory is an error instead: the
same command rounds otherwise a minute later.

The struct that a call takes is declared in C++ and again in ctypes.  Every library describes its own (job.hpp), and a
library whose struct differs from the ctypes one is refused.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsdyn import memory
from tsdyn.experiment.errors import ExperimentError

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
#: Seconds after which a compiler that builds, or prints its version, is taken to hang.
BUILD_SECONDS, VERSION_SECONDS = 120.0, 20.0
#: The same of ziglang, which at its first use builds its own C++ library.
ZIG_SECONDS = 1800.0
#: Bytes of memory that loading a library takes beyond its size, at most.
LOADING = 1 << 20
#: Bytes of a cache line, product.hpp's kLineBytes.
LINE = 64

Pointers = ctypes.POINTER(ctypes.c_void_p)
_log = logging.getLogger("tsdyn")


class LayoutError(RuntimeError):
    """The struct of a compiled library differs from its ctypes declaration."""


class _Unusable(Exception):
    """A compiler or a folder cannot be used; the message says why."""


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64))


# --- loading -------------------------------------------------------------------------------------------------


def switched_on(name: str, *, default: bool) -> bool:
    """Whether the environment variable `name` says ``on``; `default` where it is not set.

    Raises:
        ExperimentError: for any other word than ``on`` and ``off``.
    """
    match os.environ.get(name, "on" if default else "off"):
        case "on":
            return True
        case "off":
            return False
        case other:
            raise ExperimentError(f"{name}={other}: it is 'on' or 'off'; unset it for {'on' if default else 'off'}")


@functools.cache
def load(source: Path, job: type[ctypes.Structure]) -> ctypes.CDLL | None:
    """The library of a source file, built if this machine has none yet; None where it cannot be built.

    Raises:
        LayoutError: if the library's struct is not `job`.
        MemoryError: if there is no memory to build or load it.
    """
    if not switched_on("TSDYN_KERNEL", default=True):
        _missing[source] = "TSDYN_KERNEL=off"
        return None
    try:
        compiler = _compiler()
        library = _loaded(compiler, source)
    except _Unusable as error:
        _missing[source] = str(error)
        _say_once(f"compiled code is not used, which is slower and rounds otherwise: {error}")
        return None
    _check_layout(library, source, job)
    return library


#: Sources that `load` has no library of → why.
_missing: dict[Path, str] = {}


def missing(source: Path, job: type[ctypes.Structure]) -> str | None:
    """Why there is no library of a source file; None if there is one."""
    return None if load(source, job) is not None else _missing.get(source, "it cannot be built")


@functools.cache
def _say_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def _loaded(compiler: _Compiler, source: Path) -> ctypes.CDLL:
    """The library from the cache directory or, if that cannot be used, from a private one removed at exit."""
    reasons = []
    for folder in (_cache_folder, _private_folder):
        try:
            return _opened(_built(compiler, source, folder()))
        except (OSError, _Unusable) as error:
            reasons.append(str(error))
        if folder is _cache_folder:
            _say_once(f"compiled code is not kept, but built by each process anew: {reasons[-1]}")
    raise _Unusable(reasons[-1])


def _opened(library: Path) -> ctypes.CDLL:
    """The library of a file, mapped into this process.

    Raises:
        MemoryError: if there is no memory for it; the system's message does not say so.
        OSError: if it cannot be mapped for another reason.
    """
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        if memory.available() < library.stat().st_size + LOADING:
            raise _no_memory(f"load {library.name}", error) from None
        raise


def _no_memory(what: str, error: OSError) -> MemoryError:
    return MemoryError(
        f"no memory is left to {what} ({error}): give this process more, or set TSDYN_KERNEL=off to compute in torch, "
        "which is slower and rounds otherwise"
    )


def _check_layout(library: ctypes.CDLL, source: Path, job: type[ctypes.Structure]) -> None:
    library.job_size.restype, library.job_fields.restype = ctypes.c_int64, ctypes.POINTER(_Field)
    theirs: list[tuple[str, int, int]] = []
    fields = library.job_fields()
    while (field := fields[len(theirs)]).name:
        theirs.append((field.name.decode(), field.offset, field.size))
    described = ((name, getattr(job, name)) for name, *_ in job._fields_)
    mine = [(name, member.offset, member.size) for name, member in described]
    if mine != theirs or ctypes.sizeof(job) != library.job_size():
        raise LayoutError(
            f"{source.name}: its Job has {library.job_size()} bytes, {[name for name, *_ in theirs]}; "
            f"{job.__module__}.{job.__name__} has {ctypes.sizeof(job)}, {[name for name, *_ in mine]}: a call would "
            "write into other memory. Declare the same fields in both, in one order"
        )


# --- building ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compiler:
    """A compiler: the words that call it, what it prints as its version, its flags, and how long a build may take."""

    command: tuple[str, ...]
    version: bytes
    flags: tuple[str, ...] = FLAGS
    seconds: float = BUILD_SECONDS


@functools.cache
def _compiler() -> _Compiler:
    """The system's compiler or, where there is none, that of the ziglang package."""
    found = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if found is not None:
        return _Compiler((found,), _asked([found, "--version"], VERSION_SECONDS))
    if importlib.util.find_spec("ziglang") is None:
        raise _Unusable(
            "no C++ compiler is installed (CXX, c++, g++ or clang++); pip install tsdyn[compiler] brings one"
        )
    command = (sys.executable, "-m", "ziglang", "c++")
    # without the sanitizer that zig adds of itself
    return _Compiler(command, _asked([*command, "--version"], ZIG_SECONDS), (*FLAGS, "-fno-sanitize=all"), ZIG_SECONDS)


#: Compilers that did not answer in time → the message about it; they are not called again.
_hanging: dict[str, str] = {}


def _asked(command: Sequence[str], seconds: float) -> bytes:
    """The output of a command; it and its children are killed if it takes too long."""
    name = "ziglang" if "ziglang" in command else command[0]
    if name in _hanging:
        raise _Unusable(_hanging[name])
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise _no_memory(f"start {name}", error) from None
            raise _Unusable(f"{name} cannot be started: {error}") from None
        try:
            code = process.wait(seconds)
        except BaseException as error:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            _hanging[name] = f"{name} hangs: given up after {seconds:g} s"
            raise _Unusable(_hanging[name]) from None
        printed.seek(0)
        answer = printed.read()
    if code != 0:
        first = next(iter(answer.decode(errors="replace").strip().splitlines()), "it says nothing")
        raise _Unusable(f"{name} ended with code {code}: {first}")
    return answer


def _built(compiler: _Compiler, source: Path, folder: Path) -> Path:
    """Path of the library of `source` in `folder`; it is built unless it exists and agrees with its checksum."""
    sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.hpp")))]
    key = hashlib.sha256(b"\0".join([*sources, compiler.version, _processor(), " ".join(compiler.flags).encode()]))
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if _whole(library):
        return library
    # several processes may build at once: each writes a file of its own and renames it when it is whole
    with tempfile.TemporaryDirectory(dir=folder) as private:
        unfinished = Path(private) / library.name
        if "ziglang" in compiler.command:
            _say_once("the compiled step is built by ziglang, which takes minutes when it is first used on a machine")
        _asked([*compiler.command, *compiler.flags, str(source), "-o", str(unfinished)], compiler.seconds)
        checksum = unfinished.with_suffix(".sha256")
        checksum.write_text(hashlib.sha256(unfinished.read_bytes()).hexdigest(), encoding="ascii")
        for file in (unfinished, checksum):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        unfinished.replace(library)
        checksum.replace(library.with_suffix(".sha256"))
    return library


def _whole(library: Path) -> bool:
    """Whether a library exists, only this user could write it, and it agrees with the checksum beside it."""
    try:
        if library.is_symlink() or not _own(library):
            return False
        said = library.with_suffix(".sha256").read_text(encoding="ascii")
        return hashlib.sha256(library.read_bytes()).hexdigest() == said
    except (OSError, UnicodeDecodeError):
        return False


def _own(path: Path) -> bool:
    """Whether nobody but this user (or root) could have written it."""
    held = path.stat()
    return held.st_uid in (os.geteuid(), 0) and not held.st_mode & stat.S_IWOTH


def _cache_folder() -> Path:
    """The folder in which libraries are kept.

    Raises:
        _Unusable: if there is no home directory, or the folder cannot be made or belongs to somebody else.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsdyn"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(folder):
            raise _Unusable(f"{folder} belongs to another user or can be written by all; what is in there is not run")
    except RuntimeError:
        raise _Unusable("there is no home directory; set XDG_CACHE_HOME to keep it") from None
    except OSError as error:
        raise _Unusable(str(error)) from None
    return folder


@functools.cache
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tsdyn-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child ends before its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _processor() -> bytes:
    """A text that names the processor, on which ``-march=native`` depends."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        first, _, _ = described.read_bytes().partition(b"\n\n")
        kept = (b"model name", b"flags", b"Features", b"CPU part")
        return b"\n".join(line for line in first.splitlines() if line.startswith(kept))
    return f"{platform.machine()} {platform.processor()} {platform.platform()}".encode()


# --- calling -------------------------------------------------------------------------------------------------


def array(kind: Any, values: Sequence[object]) -> ctypes.Array:
    """A C array of these values."""
    return (kind * len(values))(*values)  # type: ignore[no-any-return]


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """A C array of the tensors' addresses; null for None."""
    return array(ctypes.c_void_p, [None if t is None else address(t) for t in tensors])


def address(tensor: Tensor) -> int:
    """Where the numbers of a contiguous tensor are.

    Raises:
        ValueError: for a tensor whose memory does not hold its numbers; `written` makes one that does.
    """
    if not _in_memory(tensor):
        raise ValueError("native: torch computes this tensor's numbers when it reads them: no compiled code can")
    return tensor.data_ptr()


def written(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in contiguous memory: a copy where torch computes them when it reads them."""
    if tensor._is_zerotensor():  # gradients that are zero by their formula, which have no memory at all
        return tensor.clone()
    return tensor.resolve_neg().contiguous()


def _in_memory(tensor: Tensor) -> bool:
    return not tensor._is_zerotensor() and not tensor.is_neg()


def padded(numbers: int, dtype: torch.dtype) -> int:
    """`numbers` rounded up to whole cache lines, as product.hpp pads its rows."""
    line = LINE // dtype.itemsize
    return -(-numbers // line) * line


def serves(tensors: Sequence[Tensor], source: Path, job: type[ctypes.Structure]) -> bool:
    """Whether these tensors can be passed to a library, and there is one."""
    return (
        all(t.device.type == "cpu" and t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
        and all(_in_memory(t) for t in tensors)
        and tensors[0].dtype in (torch.float32, torch.float64)
        and load(source, job) is not None
    )


def function(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The library's function of that name for numbers of this dtype."""
    found: Callable[..., Any] = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    return found


def shares(count: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the items that each of torch's threads takes out of `count`."""
    threads = min(count, torch.get_num_threads())
    yield from ((count * t // threads, count * (t + 1) // threads) for t in range(threads))


def each(call: Callable[[int, int], int], bounds: Sequence[tuple[int, int]]) -> bool:
    """Call `call` with each of these bounds, on as many threads as torch has; True if any returned other than 0.

    ctypes releases the interpreter lock during a call, and signals are handled between calls.
    """
    threads = min(len(bounds), torch.get_num_threads())
    spread = map if threads <= 1 else _pool(threads).map
    return any(list(spread(call, *zip(*bounds, strict=True))))  # a list, since all calls must run


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
