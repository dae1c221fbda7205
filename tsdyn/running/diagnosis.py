"""Diagnosis of this machine (``tsdyn doctor``): what it means for numbers, speed and files, found in a few seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from tsdyn import memory
from tsdyn.archive.lock import HeldError, Lock
from tsdyn.archive.whole_files import sync_directory, write_bytes
from tsdyn.engine import native

#: Time limit of all checks together; those that did not end by then are named as left out.
SECONDS = 5.0
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
    with tempfile.TemporaryDirectory() as folder, ExitStack() as begun:
        trials = {engine: begun.enter_context(_Trial(engine, Path(folder) / engine)) for engine in ("on", "off")}
        for look in (_threads, _blas, _denormals, _tf32, _memory):
            yield from look()
        yield from _disk(Path(directory))
        yield from _locks(Path(directory))
        ended = [trial.ended(until) for trial in trials.values()]
        if all(ended):
            yield from _engine(trials["on"])
            yield from _compared(trials["on"], trials["off"])
        else:
            yield Finding(
                "compiled step", f"no answer within {seconds:.0f} s", "note",
                "it is built at the first run, which takes half a minute once, or this machine is busy: ask again",
            )  # fmt: skip


#: Code that trains 20 steps, writes the weights into the given folder and prints the engine that was used.
_STEPS = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
import tsdyn
from tsdyn.running import provenance
experiment = tsdyn.Experiment(
    name="doctor", seeds=2, teacher={"widths": [20, 8, 4]}, data={"train": 100, "eval": 50},
    training={"epochs": 1, "batch": 10, "steps_per_epoch": 20}, record={"observables": ["weight"]},
)
ds = tsdyn.run(experiment, sys.argv[1] + "/run")
np.save(sys.argv[1] + "/weights.npy", ds["weight"].isel(epoch=-1).values)
print(json.dumps(provenance.engine()))
"""


class _Trial:
    """Twenty training steps in a subprocess, with or without the compiled step."""

    def __init__(self, engine: str, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.said, self.complained = folder, "", ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _STEPS, str(folder)], cwd=folder, text=True,
            env=os.environ | {"TSDYN_KERNEL": os.environ.get("TSDYN_KERNEL", "on") if engine == "on" else "off"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with its children, such as a compiler
        self.process.communicate()

    def ended(self, until: float) -> bool:
        """Whether the subprocess ended by the time `until`."""
        try:
            self.said, self.complained = self.process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    yield Finding(
        "threads", f"{threads} of torch on {cores} cores", "bad" if many else "good",
        f"more threads than cores wait for each other: set OMP_NUM_THREADS={cores}" if many
        else "bits of a run are promised for the same number of threads; OMP_NUM_THREADS sets it",
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


def _engine(trial: _Trial) -> Iterator[Finding]:
    if trial.process.returncode:
        last = trial.complained.strip().rpartition("\n")[2]
        yield Finding("training", last, "bad", "twenty steps do not run here: nothing else will")
        return
    found = json.loads(trial.said.strip().rpartition("\n")[2])
    if found["engine"].startswith("torch"):
        off = "" if native.switched_on("TSDYN_KERNEL", default=True) else " (TSDYN_KERNEL=off)"
        yield Finding(
            "compiled step", f"none{off}", "note",
            "training goes by torch, several times slower and with other roundings; install a C++ compiler (c++, g++, "
            "clang++, or name one as CXX; or pip install tsdyn[compiler]) and let its cache be written "
            "(XDG_CACHE_HOME, or ~/.cache)",
        )  # fmt: skip
        return
    yield Finding(
        "compiled step", found["compiler"], "good",
        f"made for this processor ({found['cpu']}) and kept in {_cache()}; bits are promised for the same processor",
    )  # fmt: skip


def _cache() -> str:
    named = os.environ.get("XDG_CACHE_HOME")
    return f"{named or '~/.cache'}/tsdyn"


def _compared(compiled: _Trial, plain: _Trial) -> Iterator[Finding]:
    if compiled.process.returncode or plain.process.returncode:
        return
    first, second = (np.load(trial.folder / "weights.npy") for trial in (compiled, plain))
    apart = float(np.nanmax(np.abs(first - second)) / np.nanmax(np.abs(second)))
    good = apart <= ALIKE
    yield Finding(
        "compiled against plain", f"{apart:.0e} apart after 20 steps", "good" if good else "bad",
        "the order in which products are added, and no more" if good
        else "more than rounding: the compiler or processor is at fault; set TSDYN_KERNEL=off and report it",
    )  # fmt: skip
