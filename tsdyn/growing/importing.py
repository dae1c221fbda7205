"""Import what other programs recorded into archives: PyTorch checkpoints, nn2pp's columns, luckmatters' arrays.

What is imported becomes a recording (as of `tsdyn.Recorder`): it has labels, widths and checksums, and no experiment.
"""

from __future__ import annotations

import ast
import datetime
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np

from tsdyn import schema
from tsdyn._version import __version__
from tsdyn.archive.recording_directory import RecordingDirectory
from tsdyn.archive.recordings import Recording
from tsdyn.archive.whole_files import (
    DirectoryError,
    local_path,
    make_directory,
    refuse_link,
    sha256,
    sync_directory,
)
from tsdyn.vocabulary import VARIABLES, Label, Variable
from tsdyn.vocabulary import Path as Dimension

Source = Literal["checkpoints", "nn2pp", "luckmatters"]
#: Variable → one array (label...) or one array per layer, without seeds.
Numbers = Mapping[str, Any]

_CHECKPOINT = re.compile(r"epoch[_-]?(\d+)\.(pt|pth|safetensors)")
_TEACHER = re.compile(r"teacher\.(pt|pth|safetensors)")
_SEED = re.compile(r"seed[=_-]?(\d+)")
_LUCKMATTERS = "luckmatters (Tian 2020, PMLR 119:9470, released code)"
_NN2PP = "nn2pp (Goldt et al. 2019, arXiv:1906.08632)"
#: nn2pp's first columns; those that are no variables of the schema are declared.
_COLUMNS = {
    "eg": "",
    "et": "training error ½ mean (y − φ)²",
    "eg_frac": "share of samples that are classified wrongly",
    "et_frac": "share of training samples that are classified wrongly",
    "diff": "mean absolute change of the weights",
}


@dataclass(frozen=True)
class Imported:
    """One member as another program recorded it.

    Attributes:
        seed: Its label.
        model: What it is, in words.
        input_width, widths, teacher_widths: Sizes; a teacher of widths 0 is none.
        labels: Of the records.
        along: Variables recorded at each label.
        constants: Variables recorded once.
        attrs: Further attributes of the archive.
        dtype: Of the numbers.
        path: The dimension along which it was recorded.
        parameters: Names and shapes of parameters that are in no layer.
    """

    seed: int
    model: str
    input_width: int
    widths: tuple[int, ...]
    teacher_widths: tuple[int, ...]
    labels: Sequence[Label]
    along: Numbers
    constants: Numbers
    attrs: Mapping[str, Any]
    dtype: str = "float64"
    path: Dimension = "epoch"
    parameters: Mapping[str, list[int]] = field(default_factory=dict)


def import_(kind: Source, source: str | Path, output: str | Path) -> Path:
    """Make an archive of what another program recorded; returns its directory.

    Args:
        kind: ``checkpoints``: a folder with ``epoch_N.pt`` or ``epoch_N.safetensors`` (perhaps in folders ``seed_N``),
            each a state dict; nothing in them is executed.  Chains of Linear layers become weight and bias, all other
            parameters become ``parameter``.  ``nn2pp``: a log file of nn2pp, or a folder of them, one per seed.
            ``luckmatters``: a .npz file of the released two-layer experiment.
        source: The file or folder.
        output: The archive's directory; made.

    Raises:
        DirectoryError: if there is something at `output`, or the source is not what `kind` says.
    """
    path, target = local_path(source), local_path(output)
    refuse_link(target)
    if target.exists():
        raise DirectoryError(f"{target}: is there already; nothing was overwritten: give another directory with -o")
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist")
    try:
        members = _read(kind, path)
    except (ValueError, KeyError, IndexError, OSError, SyntaxError, EOFError) as error:
        raise DirectoryError(f"import {kind}: {path}: {error}") from error
    partial = target.with_name(f".{target.name}.partial")
    refuse_link(partial)
    if partial.exists():
        shutil.rmtree(partial)
    for member in members:
        _write(partial, kind, path, member)
    partial.rename(target)
    sync_directory(target.parent)
    return target


def _read(kind: Source, path: Path) -> list[Imported]:
    match kind:
        case "checkpoints":
            return [_checkpoints(seed, folder) for seed, folder in _seeds(path)]
        case "nn2pp":
            return _together(_nn2pp, sorted(path.glob("*.dat")) if path.is_dir() else [path])
        case "luckmatters":
            return _together(_luckmatters, sorted(path.glob("*.npz")) if path.is_dir() else [path])
        case other:
            assert_never(other)


def _together(read: Callable[[Path, int], Imported | None], files: Sequence[Path]) -> list[Imported]:
    found = [one for number, file in enumerate(files) if (one := read(file, number)) is not None]
    seeds = [one.seed for one in found]
    if not found or len(set(seeds)) < len(seeds):
        raise ValueError(f"holds the seeds {seeds}; there must be at least one, and each once")
    return found


# --- checkpoints -------------------------------------------------------------------------------------------------


def _seeds(path: Path) -> list[tuple[int, Path]]:
    """Seeds and their folders: the folder itself as seed 0, or its folders ``seed_N``."""
    if not path.is_dir():
        raise ValueError("is not a folder of checkpoints epoch_N.pt")
    named = ((_SEED.fullmatch(folder.name), folder) for folder in sorted(path.iterdir()) if folder.is_dir())
    found = [(int(match[1]), folder) for match, folder in named if match]
    return sorted(found) or [(0, path)]


def _checkpoints(seed: int, folder: Path) -> Imported:
    from tsdyn.networks.torch_io import load_state

    named = ((_CHECKPOINT.fullmatch(file.name), file) for file in folder.iterdir())
    files = sorted((int(match[1]), file) for match, file in named if match)
    epochs = [epoch for epoch, _ in files]
    if not files or len(set(epochs)) < len(epochs):
        raise ValueError(f"{folder} holds checkpoints epoch_N.pt of the epochs {epochs}; at least one, each once")
    states = [_arrays(load_state(file)) for _, file in files]
    shapes = {name: list(array.shape) for name, array in states[0].items()}
    for (_, file), state in zip(files, states, strict=True):
        if {name: list(array.shape) for name, array in state.items()} != shapes:
            raise ValueError(f"{file} holds parameters of other names or shapes than {files[0][1]}")
    chain = _chain(shapes)
    own = {name for pair in chain for name in pair if name is not None}
    rest = {name: shape for name, shape in shapes.items() if name not in own}
    along: dict[str, Any] = {}
    if chain:
        along["weight"] = [np.stack([state[weight] for state in states]) for weight, _ in chain]
        along["bias"] = [
            np.stack([np.zeros(shapes[weight][0]) if bias is None else state[bias] for state in states])
            for weight, bias in chain
        ]
    if rest:
        along["parameter"] = np.stack([np.concatenate([state[name].ravel() for name in rest]) for state in states])
    widths = tuple(shapes[weight][0] for weight, _ in chain) or (1,)
    taught = [file for file in sorted(folder.iterdir()) if _TEACHER.fullmatch(file.name)]
    teacher = _arrays(load_state(taught[0])) if taught else {}
    pairs = _chain({name: list(array.shape) for name, array in teacher.items()})
    if taught and (len(pairs) != len(chain) or teacher[pairs[0][0]].shape[1] != shapes[chain[0][0]][1]):
        raise ValueError(f"{taught[0]} is not a chain of {len(chain)} Linear layers on the same inputs")
    constants = {
        "teacher_weight": [teacher[weight] for weight, _ in pairs],
        "teacher_bias": [np.zeros(len(teacher[w])) if b is None else teacher[b] for w, b in pairs],
    }
    single = all(array.dtype == np.float32 for array in states[0].values())
    layers = tuple(weight.rpartition(".")[0] or weight for weight, _ in chain)
    return Imported(
        seed, "checkpoints of PyTorch", shapes[chain[0][0]][1] if chain else 1, widths,
        tuple(len(teacher[weight]) for weight, _ in pairs) or (0,) * len(widths), epochs, along,
        constants if taught else {}, {"layers": json.dumps(layers), **_hashes([file for _, file in files])},
        "float32" if single else "float64", parameters=rest,
    )  # fmt: skip


def _arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state dict as arrays of float32 or float64, without counters of batches, and a prefix that all names share."""
    named = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] != "num_batches_tracked"}
    while named and len({name.partition(".")[0] for name in named}) == 1 and all("." in name for name in named):
        shorter = {name.partition(".")[2]: tensor for name, tensor in named.items()}
        if any("." not in name for name in shorter):
            break
        named = shorter
    return {
        name: tensor.cpu().numpy()
        if str(tensor.dtype) in ("torch.float32", "torch.float64")
        else tensor.double().numpy()
        for name, tensor in named.items()
    }


def _chain(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, str | None]]:
    """Names of weight and bias of Linear layers that follow one another, lowest first; empty if they do not."""

    def natural(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    weights = [n for n, shape in shapes.items() if n.rpartition(".")[2] == "weight" and len(shape) == 2]
    for order in (weights, sorted(weights, key=natural)):
        if all(shapes[up][1] == shapes[low][0] for low, up in itertools.pairwise(order)):
            biases = [name.removesuffix("weight") + "bias" for name in order]
            return [
                (name, bias if list(shapes.get(bias, ())) == [shapes[name][0]] else None)
                for name, bias in zip(order, biases, strict=True)
            ]
    return []


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {"input_sha256": json.dumps({file.name: sha256(file) for file in files})}


# --- luckmatters -------------------------------------------------------------------------------------------------


def _luckmatters(file: Path, number: int) -> Imported:
    """The arrays of the released two-layer experiment; a weight there is (input, node) with the bias as last row."""
    with np.load(file, allow_pickle=False) as held:
        data = {name: held[name] for name in held.files}
    matches = (re.fullmatch(r"e(\d+)_W1_s", name) for name in data)
    epochs = sorted(int(match[1]) for match in matches if match)
    if not epochs or "W1_t" not in data:
        raise ValueError("holds no W1_t and no e0_W1_s; it is not of the released two-layer experiment")

    def at(name: str) -> np.ndarray:
        return np.stack([np.asarray(data[f"e{epoch}_{name}"], float) for epoch in epochs])

    first, second = at("W1_s"), at("W2_s")
    outputs = second.shape[-1]
    nothing = np.full((len(epochs), outputs, outputs), np.nan)
    along = {
        "weight": [np.swapaxes(w[:, :-1], 1, 2) for w in (first, second)],
        "bias": [w[:, -1] for w in (first, second)],
        "mse_train": at("train_loss"),
        "mse_eval": at("eval_loss"),
        # J = ½ E‖f* − f‖², where the source has the mean over outputs
        "loss_train": at("train_loss") * outputs / 2,
        "loss_eval": at("eval_loss") * outputs / 2,
        "correlation": [at("corr_eval"), nothing],
        "observation_count": [at("obs_train"), nothing],
        "gradient_rms": [np.sqrt(at("g1_train")[:, :-1]), np.sqrt(at("g2_train"))],
    }
    taught = [np.asarray(data[name], float) for name in ("W1_t", "W2_t")]
    constants = {"teacher_weight": [w[:-1].T for w in taught], "teacher_bias": [w[-1] for w in taught]}
    config = ast.literal_eval(str(data["config"])) if "config" in data else {}
    return Imported(
        number, _LUCKMATTERS, first.shape[1] - 1, (first.shape[2], outputs), tuple(w.shape[1] for w in taught), epochs,
        along, constants, {"config": json.dumps(config), **_hashes([file])},
    )  # fmt: skip


# --- nn2pp -------------------------------------------------------------------------------------------------------


def _nn2pp(file: Path, number: int) -> Imported | None:
    """A log of nn2pp: steps / N, errors, Q for k ≤ l, R, A and v, between commas; None for its other files.

    T is not among its columns; it is read from the file ``..._T0.dat`` that ``--store`` writes beside the log.
    """
    if re.search(r"_(Q0|R0|T0|A0|v0|w|v)\.dat$", file.name):
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    said = dict(re.findall(r"([A-Za-z]\w*)=([^,\s]+)", header))
    if not {"N", "M", "K"} <= set(said):
        raise ValueError("its header names no N, M and K; it is not a log of nn2pp")
    inputs, teachers, nodes = (int(said[name]) for name in ("N", "M", "K"))
    rows = [[float(word) for word in line.split(",")] for line in lines if line.strip() and not line.startswith("#")]
    upper, both = nodes * (nodes + 1) // 2, nodes * teachers
    wanted = [6 + upper + both + extra + nodes for extra in (teachers, 0)]
    if not rows or any(len(row) != len(rows[0]) for row in rows) or len(rows[0]) not in wanted:
        raise ValueError(
            f"its lines have {sorted({len(row) for row in rows})} columns; with K = {nodes} and M = {teachers} nn2pp "
            f"writes {wanted[0]} (without --quiet)"
        )
    table = np.array(rows)
    if not (np.diff(table[:, 0]) > 0).all():
        raise ValueError("its times do not increase")
    ends = np.cumsum([6, upper, both, len(rows[0]) - 6 - upper - both - nodes]).tolist()
    _, q, r, a, v = np.split(table, ends, axis=1)
    square = np.empty((len(table), nodes, nodes))
    at = np.triu_indices(nodes)
    square[:, at[0], at[1]] = square[:, at[1], at[0]] = q
    along = {"Q": square, "R": r.reshape(len(table), nodes, teachers), "outgoing": v}
    along |= {
        name: table[:, i] for i, name in enumerate(_COLUMNS, start=1) if name == "eg" or np.isfinite(table[:, i]).any()
    }
    constants = {"teacher_outgoing": a[0]} if a.shape[1] else {}
    stored = file.with_name(file.name.removesuffix(".dat") + "_T0.dat")
    if stored.is_file():
        constants["T"] = np.loadtxt(stored, delimiter=",", ndmin=2)
    return Imported(
        int(said.get("seed", number)), _NN2PP, inputs, (nodes, 1), (teachers, 1), table[:, 0].tolist(), along,
        constants, {"config": json.dumps(said), **_hashes([file])}, path="alpha",
    )  # fmt: skip


# --- writing -----------------------------------------------------------------------------------------------------


def _write(folder: Path, kind: Source, source: Path, member: Imported) -> None:
    """Write one member as a recording of one commit."""
    make_directory(folder)
    recording = _recording(member)
    attrs = {
        "recording": recording.to_toml(), "name": folder.name.removeprefix(".").removesuffix(".partial"),
        "digest": recording.digest, **schema.declarations(recording.recorded()), "schema_version": schema.VERSION,
        "tsdyn_version": __version__, "dtype": member.dtype, "engine": member.model,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": json.dumps(dict(member.parameters)),
        "imported": json.dumps({"kind": kind, "source": str(source.absolute())}), **member.attrs,
    }  # fmt: skip
    records = {name: _with_seed(value) for name, value in {**member.along, **member.constants}.items()}
    directory = RecordingDirectory(folder / f"seed={member.seed}", recording)
    with directory:
        directory.sign(recording)
        last = int(member.labels[-1]) if member.path == "epoch" else len(member.labels) - 1
        directory.commit(0, last, member.labels, records, {"death_epoch": np.array([-1])}, attrs)
        directory.consolidate(attrs)


def _with_seed(value: Any) -> Any:
    return [block[None] for block in value] if isinstance(value, list) else value[None]


def _recording(member: Imported) -> Recording:
    names = (*member.along, *(name for name in member.constants if name not in ("teacher_weight", "teacher_bias")))
    rows = [Variable(name, ("seed", "epoch"), "1", _COLUMNS[name], _NN2PP) for name in names if name not in VARIABLES]
    entries = member.along["parameter"].shape[-1] if "parameter" in member.along else 0
    layers = tuple(json.loads(member.attrs["layers"])) if "layers" in member.attrs else ()
    below = (member.input_width, *member.widths[:-1])
    taught = (member.input_width, *member.teacher_widths[:-1])
    return Recording(
        seed=member.seed, config={}, every=1, observables=(), dtype=member.dtype, model=member.model,
        parameters=dict(member.parameters), shapes="", probe="",
        teacher="imported" if "teacher_weight" in member.constants else "", loss="", input_width=member.input_width,
        layers=layers, widths=member.widths, fan_ins=below, teacher_widths=member.teacher_widths,
        teacher_fan_ins=taught if any(member.teacher_widths) else (0,) * len(below), quantiles=(), modes=0,
        entries=entries, variables=names, declared=tuple(json.loads(json.dumps(asdict(row))) for row in rows),
        path=member.path,
    )  # fmt: skip
