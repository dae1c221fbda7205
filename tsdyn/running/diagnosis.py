"""Diagnosis of this machine (``tsdyn doctor``): what it means for numbers, speed and files, found in a few seconds."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from tsdyn import memory
from tsdyn.archive.lock import HeldError, Lock
from tsdyn.archive.whole_files import sync_directory, write_bytes
from tsdyn.engine import native

#: Time limit of all checks together; those that did not end by then are named as left out.  Importing this module takes
#: the rest of five seconds.
SECONDS = 3.0
#: Largest relative difference between compiled and plain steps, which add the same products in another order.
ALIKE = 1e-10


class Finding(NamedTuple):
    """One finding about the machine.

    Attributes:
        subject: What was checked.
        found: What it is on this machine.
        verdict: ``good``, ``note`` (works, worth knowing) or ``bad`` (numbers, speed or files are at risk).
        meaning: What follows from it, and what to do.
    """

    subject: str
    found: str
    verdict: Literal["good", "note", "bad"]
    meaning: str


def diagnose(directory: str | Path = ".", *, seconds: float = SECONDS) -> Iterator[Finding]:
    """Findings about this machine and `directory`, one after another, within this many seconds in all.

    Nothing is left in the directory or changed in this process.
    """
    until = time.monotonic() + seconds
    with _Trial() as trial:
        for look in (_threads, _blas, _denormals, _tf32, _memory):
            yield from look()
        yield from _disk(Path(directory))
        yield from _locks(Path(directory))
        if not trial.ended(until):
            yield Finding(
                "compiled step", f"no answer within {seconds:.0f} s", "note",
                "it is built at the first run, which takes half a minute once, or this machine is busy: ask again",
            )  # fmt: skip
        elif trial.found is None:
            yield Finding("training", trial.complained, "bad", "twenty steps do not run here: nothing else will")
        else:
            yield _engine(trial.found)
            yield _compared(np.array(trial.found["compiled"]), np.array(trial.found["plain"]))


def _steps() -> dict[str, Any]:
    """What computed 20 steps, and the weights after them: as training goes here, and by torch alone."""
    from tsdyn.experiment.experiment import Experiment
    from tsdyn.running import provenance
    from tsdyn.running.members import Members

    torch.set_num_threads(1)
    experiment = Experiment(
        name="doctor", seeds=2, teacher={"widths": [20, 8, 4]}, data={"train": 100, "eval": 50},
        training={"epochs": 1, "batch": 10, "steps_per_epoch": 20}, record={"observables": ["weight"]},
    )  # fmt: skip
    found: dict[str, Any] = provenance.engine()
    for name in ("compiled", "plain"):
        if name == "plain":
            os.environ["TSDYN_KERNEL"] = "off"
            native.load.cache_clear()
        members = Members(experiment)
        members.draw()
        members.advance(1)
        state = members.state()
        found[name] = np.concatenate([state[key].ravel() for key in ("weight_1", "weight_2")]).tolist()
    return found


class _Trial:
    """Training steps in a fork of this process, which has torch imported and may build the compiled step.

    Attributes:
        found: What `_steps` returned, once `ended`; None if it failed.
        complained: The last line that it wrote, if it failed.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None
        self.complained = "it ended without a word"
        self._said = b""
        self._pipe, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it computes on one thread, and needs no other's lock
            self._pid = os.fork()
        if not self._pid:
            self._be_the_child(writing)
        os.close(writing)

    def _be_the_child(self, writing: int) -> NoReturn:
        try:
            os.setsid()  # so that it can be ended with its children, such as a compiler
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            with os.fdopen(writing, "w", encoding="utf-8") as told:
                try:
                    told.write(json.dumps({"found": _steps()}))
                except BaseException as error:
                    told.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        finally:
            os._exit(0)

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)  # before it has a group of its own
        os.waitpid(self._pid, 0)
        os.close(self._pipe)

    def ended(self, until: float) -> bool:
        """Whether the steps were computed, or failed, by the time `until`."""
        while select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            part = os.read(self._pipe, 1 << 16)
            self._said += part
            if not part:
                with suppress(ValueError):
                    answer = json.loads(self._said)
                    self.found, self.complained = answer.get("found"), answer.get("failed", self.complained)
                return True
        return False


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    yield Finding(
        "threads", f"{threads} of torch on {cores} cores", "bad" if many else "good",
        f"more threads than cores wait for each other: set OMP_NUM_THREADS={cores}" if many
        else "bits of a run are promised for the same number of threads; OMP_NUM_THREADS sets it; where other "
        "processes keep the cores busy, set OMP_WAIT_POLICY=PASSIVE before Python starts, as the command does",
    )  # fmt: skip


def _blas() -> Iterator[Finding]:
    info = torch.__config__.parallel_info()
    name = "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or another"
    line = next((line.strip() for line in info.splitlines() if "OMP_NUM_THREADS" in line or "OpenMP" in line), "")
    yield Finding(
        "BLAS", f"{name}; {line or 'no OpenMP'}", "good",
        "adds in an order of its own: another BLAS, or another processor, rounds otherwise",
    )  # fmt: skip


def _denormals() -> Iterator[Finding]:
    smallest = torch.tensor([2.3e-308], dtype=torch.float64)
    flushed = float((smallest / 4)[0]) == 0.0
    yield Finding(
        "denormals", "flushed to zero" if flushed else "kept", "bad" if flushed else "good",
        "numbers below 1e-308 (1e-38 in float32) become 0 in this process, which another library or "
        "torch.set_flush_denormal asked for: dead nodes may be found that are alive" if flushed
        else "numbers below 1e-308 are what they are, at a tenth of the speed where there are many",
    )  # fmt: skip


def _tf32() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("TF32", "no GPU", "good", "float32 products are of float32")
        return
    on = native.switched_on("TSDYN_TF32", default=False)
    yield Finding(
        "TF32", f"{torch.cuda.get_device_name()}: {'on' if on else 'off'}", "note" if on else "good",
        "float32 products on the GPU keep 10 bits of 23; unset TSDYN_TF32 for all of them" if on
        else "float32 products on the GPU are of float32; TSDYN_TF32=on makes them quicker, and wrong from 1e-3 on",
    )  # fmt: skip


def _memory() -> Iterator[Finding]:
    names = {
        "machine": "of the machine",
        "control groups": "of a container or batch job",
        "ulimit": "of ulimit -v or -d",
    }
    for name, left in memory.limits().items():
        if name == "machine" or left < sys.maxsize // 4:
            yield Finding(
                f"memory, {names[name]}", f"{left / 1e9:.1f} GB left", "good" if left > 1 << 30 else "bad",
                "what would not fit is refused before it is drawn",
            )  # fmt: skip


def _disk(directory: Path) -> Iterator[Finding]:
    try:
        free, nodes = shutil.disk_usage(directory).free, os.statvfs(directory)
    except OSError as error:
        yield Finding("directory", str(error), "bad", "runs cannot be written there: give another one")
        return
    yield Finding(
        "disk", f"{free / 1e9:.1f} GB free on {_file_system(directory)}", "good" if free > 1 << 30 else "bad",
        "a run says what it needs before it begins; quotas are seen only when they are reached",
    )  # fmt: skip
    if nodes.f_files:
        few = nodes.f_favail < 10_000
        yield Finding(
            "files", f"{nodes.f_favail} more", "bad" if few else "good",
            "a point of a sweep takes six files, and two for each segment while it runs",
        )  # fmt: skip
    try:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tsdyn-doctor-") as inside:
            for _ in range(3):
                write_bytes(Path(inside) / "segment", bytes(1 << 16), seal=True)
            sync_directory(Path(inside))
        took = (time.monotonic() - began) / 3
    except (OSError, RuntimeError) as error:
        yield Finding("commit", str(error), "bad", "runs cannot be written there: give another directory")
        return
    slow = took > 2
    yield Finding(
        "commit", f"{took * 1000:.0f} ms", "note" if slow else "good",
        f"segments are up to {30 * took:.0f} s of work apart, which a crash costs; a local disk is quicker" if slow
        else "at most a minute of work lies between two segments, which is what a crash costs",
    )  # fmt: skip


def _file_system(directory: Path) -> str:
    """Name of the file system that holds a directory."""
    target, found = str(directory.resolve()), ("", "an unknown file system")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            inside = len(fields) > 2 and (target + "/").startswith(fields[1].rstrip("/") + "/")
            if inside and len(fields[1]) >= len(found[0]):
                found = fields[1], fields[2]
    return found[1]


def _locks(directory: Path) -> Iterator[Finding]:
    """Whether a second process is kept out, as it would be from a run's directory."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tsdyn-doctor-") as inside, Lock(Path(inside)) as held:
            kernel_s = held.of_the_kernel
            try:
                Lock(Path(inside)).acquire().release()
                excluded = False
            except HeldError:
                excluded = True
    except (OSError, RuntimeError) as error:
        yield Finding("locks", str(error), "bad", "nothing can be written there: give another directory")
        return
    if not excluded:
        yield Finding(
            "locks",
            "two writers at once",
            "bad",
            "the file system keeps nobody out: run only one command per directory",
        )
    else:
        yield Finding(
            "locks", "flock" if kernel_s else "a file that is touched", "good" if kernel_s else "note",
            "one writer per directory, freed by the kernel however it ends" if kernel_s
            else "one writer per directory; that of a killed process is taken over after a minute",
        )  # fmt: skip


def _engine(found: Mapping[str, Any]) -> Finding:
    if found["engine"].startswith("torch"):
        off = "" if native.switched_on("TSDYN_KERNEL", default=True) else " (TSDYN_KERNEL=off)"
        return Finding(
            "compiled step", f"none{off}", "note",
            "training goes by torch, several times slower and with other roundings; install a C++ compiler (c++, g++, "
            "clang++, or name one as CXX; or pip install tsdyn[compiler]) and let its cache be written "
            "(XDG_CACHE_HOME, or ~/.cache)",
        )  # fmt: skip
    return Finding(
        "compiled step", found["compiler"], "good",
        f"made for this processor ({found['cpu']}) and kept in {_cache()}; bits are promised for the same processor",
    )  # fmt: skip


def _cache() -> str:
    named = os.environ.get("XDG_CACHE_HOME")
    return f"{named or '~/.cache'}/tsdyn"


def _compared(compiled: NDArray, plain: NDArray) -> Finding:
    apart = float(np.nanmax(np.abs(compiled - plain)) / np.nanmax(np.abs(plain)))
    good = apart <= ALIKE
    return Finding(
        "compiled against plain", f"{apart:.0e} apart after 20 steps", "good" if good else "bad",
        "the order in which products are added, and no more" if good
        else "more than rounding: the compiler or processor is at fault; set TSDYN_KERNEL=off and report it",
    )  # fmt: skip
