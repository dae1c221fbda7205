"""Versions, engine, compiler, processor and commit with which this process computes."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

from tsdyn._version import __version__
from tsdyn.engine import compiled_convnet, compiled_moments, compiled_step, compiled_sums, convolution, native
from tsdyn.experiment.experiment import Experiment
from tsdyn.theory.coupling_moments import MOMENTS

#: Observables for which moments over gates are summed; that of the fan-out needs no sum over gates.
_OF_MOMENTS = {*MOMENTS, "lemma1_residual"} - {"fanout_norm"}
#: The processor's flags that name instructions which round.
_ARITHMETIC = re.compile(r"(sse|ssse|avx|fma|f16c|amx|asimd|sve|neon|fphp)\w*")
_COMPILER = re.compile(rb"(?:GCC: \([^)\0]*\) [\w.]+|[\w ]*clang version [\w.\-]+)")


def facts(device: str, experiment: Experiment | None = None) -> dict[str, str | int]:
    """All that decides the bits of a run on this machine; of `experiment`, if one is given."""
    return {
        "tsdyn_version": __version__,
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        **engine(experiment),
        "git_commit": git_commit(),
    }


def engine(experiment: Experiment | None = None) -> dict[str, str]:
    """Which compiled code a run uses, the compiler that built it, and the processor.

    The libraries that the run needs are loaded here, before it begins, so that what is said holds to its end.

    Raises:
        MemoryError: if there is no memory for one that this machine has.
    """
    step, *others = (native.load(source, job) for source, job in _libraries(experiment).values())
    names = list(_libraries(experiment))[1:]
    odd = [name for name, library in zip(names, others, strict=True) if (library is None) != (step is None)]
    base, joined = ("torch", "compiled") if step is None else ("compiled step", "torch for")
    library = next((found for found in (step, *others) if found is not None), None)
    name, flags = processor()
    return {
        "engine": f"{base}; {joined} {', '.join(odd)}" if odd else base,
        "compiler": "none" if library is None else _compiler(Path(library._name)),
        "cpu": name,
        "cpu_flags": flags,
    }


def _libraries(experiment: Experiment | None) -> dict[str, tuple[Path, type[ctypes.Structure]]]:
    """Source and struct of each compiled part that a run may need, the training step first."""
    found: dict[str, tuple[Path, type[ctypes.Structure]]] = {
        "step": (compiled_step.SOURCE, compiled_step.Job), "sums": (compiled_sums.SOURCE, compiled_sums.Job)
    }  # fmt: skip
    if experiment is None:
        return found
    if experiment.teacher.convolution:
        found["convolutions"] = convolution.SOURCE, convolution.Job
        found["steps of ConvNets"] = compiled_convnet.SOURCE, compiled_convnet.Job
    if not experiment.deep and len(experiment.teacher.widths) > 3 and {*experiment.recorded()} & _OF_MOMENTS:
        found["moments"] = compiled_moments.SOURCE, compiled_moments.Job
    return found


@functools.cache
def _compiler(library: Path) -> str:
    """The compiler's name and version, as it wrote them into a library."""
    found = _COMPILER.search(library.read_bytes())
    return found[0].decode("ascii", "replace").strip() if found else "unknown"


@functools.cache
def processor() -> tuple[str, str]:
    """The processor's name, and those of its flags that decide how a sum is rounded."""
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8", errors="replace") if described.exists() else ""
    lines = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    held = {key.strip(): value.strip() for key, value in lines.items()}
    flags = held.get("flags", held.get("Features", "")).split()
    name = held.get("model name", held.get("CPU part", platform.processor() or platform.machine()))
    return name, " ".join(sorted({flag for flag in flags if _ARITHMETIC.fullmatch(flag)})) or "unknown"


@functools.cache
def git_commit() -> str:
    """The git commit of the checkout that this code is in; ``unknown`` for an installed copy.

    The repository must track this source file: an environment inside somebody else's repository is not a checkout.
    """
    here = Path(__file__).resolve().parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=environment)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parents[1]:
            return "unknown"
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
