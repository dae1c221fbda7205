"""Damaged files of data, weights and other programs' results, each given to the command in a child."""

from __future__ import annotations

import gzip
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xarray as xr

import tsdyn
from tests.cases import cifar10, small
from tests.torture.fuzz import command, limited, mutated
from tests.torture.harness import fresh, same, say_progress
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.experiment import Experiment

DRAW = np.random.default_rng(0)
#: Keys of an experiment that trains in milliseconds.
TINY = {
    "teacher__widths": [4, 3, 2], "seeds": 1, "data__train": 20, "data__eval": 8, "training__epochs": 1,
    "training__steps_per_epoch": 2, "training__batch": 4, "record__observables": ["mse", "weight"],
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of input file.

    Attributes:
        make: Writes the files into a folder.
        words: The command that reads them, given the folder and the directory to be written.
        checked: Whether the format itself keeps a checksum of its numbers.
    """

    make: Callable[[Path], None]
    words: Callable[[Path, Path], tuple[object, ...]]
    checked: bool = False


def _trains(**changes: Any) -> Callable[[Path, Path], tuple[object, ...]]:
    """The words that run an experiment; ``FOLDER`` in a value is the folder of its files."""

    def words(folder: Path, output: Path) -> tuple[object, ...]:
        named = {k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in changes.items()}
        file = output.with_name("experiment.toml")
        file.write_text(small(**TINY | named).to_toml(), encoding="utf-8")
        return "run", file, "-o", output, "--quiet"

    return words


def _of_arrays(name: str, make: Callable[[Path, np.ndarray, np.ndarray], None], *, checked: bool = False) -> Kind:
    def write(folder: Path) -> None:
        make(folder / name, DRAW.standard_normal((40, 4)), np.arange(40) % 2)

    return Kind(write, _trains(data__law="file", data__path=f"FOLDER/{name}"), checked)


def _weights() -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,)}
    return {name: torch.from_numpy(DRAW.standard_normal(shape)) for name, shape in shapes.items()}


def _teacher(name: str, make: Callable[[Path, dict[str, torch.Tensor]], None], *, checked: bool = False) -> Kind:
    reads = _trains(teacher__init="file", teacher__path=f"FOLDER/{name}", teacher__activation="relu")
    return Kind(lambda folder: make(folder / name, _weights()), reads, checked)


def _imports(kind: str, make: Callable[[Path], None]) -> Kind:
    return Kind(make, lambda folder, output: ("import", kind, folder, "-o", output))


def _mnist(folder: Path) -> None:
    for part, count in (("train", 24), ("t10k", 10)):
        pixels, labels = DRAW.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype("u1")
        for array, name in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            zipped = part == "train"
            file = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(raw) if zipped else raw)


def _checkpoints(folder: Path) -> None:
    torch.save(_weights(), folder / "epoch_0.pt")
    torch.save({"model_state_dict": _weights(), "epoch": 1}, folder / "epoch_1.pt")
    safetensors.torch.save_file(_weights(), folder / "epoch_2.safetensors")


def _log_of_nn2pp(folder: Path) -> None:
    """Two nodes, two teacher nodes: time, five errors, Q of three numbers, R of four, A and v of two each."""
    rows = [",".join(f"{v:.12g}" for v in [t, *DRAW.standard_normal(16)]) for t in range(5)]
    (folder / "log.dat").write_text("# N=10, M=2, K=2, seed=3\n" + "\n".join(rows) + "\n", encoding="ascii")


KINDS = {
    "npy": _of_arrays("a.npy", lambda file, x, _: np.save(file, x)),
    "npz": _of_arrays("a.npz", lambda file, x, y: np.savez(file, inputs=x, labels=y), checked=True),
    "compressed npz": _of_arrays(
        "a.npz", lambda file, x, y: np.savez_compressed(file, inputs=x, labels=y), checked=True
    ),
    "netCDF": _of_arrays("a.nc", lambda file, x, _: xr.Dataset({"inputs": (("sample", "input"), x)}).to_netcdf(file)),
    "MNIST": Kind(_mnist, _trains(data__law="mnist", data__path="FOLDER", teacher__widths=[784, 3, 2])),
    "CIFAR-10": Kind(
        lambda folder: cifar10(folder, each=8) and None,
        _trains(data__law="cifar10", data__path="FOLDER", teacher__widths=[3072, 3, 2]),
    ),
    "torch.save": _teacher("t.pt", lambda file, state: torch.save(state, file)),
    "safetensors": _teacher("t.safetensors", lambda file, state: safetensors.torch.save_file(state, file)),
    "weights in npz": _teacher(
        "t.npz", lambda file, state: np.savez(file, **{k: v.numpy() for k, v in state.items()}), checked=True
    ),
    "checkpoints": _imports("checkpoints", _checkpoints),
    "nn2pp": _imports("nn2pp", _log_of_nn2pp),
}


def _read(words: tuple[object, ...], output: Path, reference: xr.Dataset | None) -> dict[str, Any]:
    """What came of a command: ``refused`` in a sentence, ``right``, or ``other`` numbers."""
    code, said = command(*words)
    if code:
        lines = [line for line in said.splitlines() if line.strip()]
        return {"fate": "refused" if code in (1, 2) and lines else "badly said", "words": said[-300:]}
    try:
        with tsdyn.open(output) as ds:
            alike = reference is None or same(ds.load(), reference)
    except ArchiveError as error:
        return {"fate": "badly said", "words": f"it was written, and then refused: {error}"}
    return {"fate": "right" if alike else "other", "words": ""}


def _given(kind: Kind, folder: Path, output: Path, reference: xr.Dataset | None) -> dict[str, Any]:
    words = kind.words(folder, output)
    return limited(lambda: _read(words, output, reference))


def _wholes(scratch: Path) -> Iterator[tuple[str, Path, xr.Dataset]]:
    """Each kind, a folder of whole files, and what comes of them."""
    for position, (name, kind) in enumerate(KINDS.items()):
        folder = scratch / "whole" / str(position)
        folder.mkdir(parents=True)
        kind.make(folder)
        output = scratch / "whole" / f"{position}-run"
        found = _given(kind, folder, output, None)
        assert found["fate"] == "right", f"{name}: {found}"
        yield name, folder, tsdyn.open(output).load()


def files(scratch: Path, rng: random.Random, number: int) -> str:
    """Files of data, weights and results truncated, flipped, spliced or exchanged: read, or refused in a sentence.

    A file whose format keeps a checksum of its numbers must not be read as other numbers.
    """
    wholes = list(_wholes(scratch))
    contents = [p.read_bytes() for _, folder, _ in wholes for p in sorted(folder.iterdir())]
    fates: Counter[str] = Counter()
    wrong: list[str] = []
    for trial in range(number):
        say_progress(trial, number, fates)
        name, whole, reference = wholes[trial % len(wholes)]
        kind, folder = KINDS[name], fresh(scratch / "damaged")
        shutil.copytree(whole, folder)
        file = rng.choice(sorted(folder.iterdir()))
        before = file.read_bytes()
        way, content = mutated(before, contents, rng)
        file.write_bytes(content)
        output = fresh(scratch / "run")
        found = _given(kind, folder, output, reference)
        fates[found["fate"]] += 1
        badly = found["fate"] in ("hang", "crash", "traceback", "badly said")
        if badly or (found["fate"] == "other" and kind.checked and way != "foreign"):
            wrong.append(f"file {trial}: {name}, {file.name} {way}: {found}")
    Experiment.from_toml(scratch / "experiment.toml")  # the last one was an experiment at all
    text = (
        f"{number} damaged files of {len(wholes)} kinds: {fates['crash']} crashes, {fates['hang']} hangs, "
        f"{fates['traceback']} tracebacks, {fates['badly said']} badly said; {fates['refused']} refused in a sentence, "
        f"{fates['right']} read right, {fates['other']} read as other numbers, none where the format keeps a checksum"
    )
    if wrong:
        raise AssertionError("\n".join([text, *wrong[:40]]))
    return text
