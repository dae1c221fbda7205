"""What `tsdyn.Recorder` refuses before it writes anything, one sentence each."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn import vocabulary
from tsdyn.archive.recording_directory import neighbours
from tsdyn.archive.recordings import Recording, recordings_below
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT
from tsdyn.archive.sweep_directory import label, point_name
from tsdyn.archive.swept_values import SWEEP
from tsdyn.observables.layers import labelled

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with plain values.

    Raises:
        ValueError: for a key or value that cannot name a directory and a coordinate.
    """
    found = {}
    for key, value in config.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"Recorder: config key {key!r} is no name; use letters, digits and _, with dots between")
        if key in {*vocabulary.DIMENSIONS, *vocabulary.VARIABLES, *vocabulary.COORDINATES}:
            raise ValueError(f"Recorder: config key {key!r} is a word of the schema; write it as model.{key}, say")
        plain = value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value
        items = plain if isinstance(plain, list) else [plain]
        if not all(isinstance(i, (bool, int, str)) or (isinstance(i, float) and math.isfinite(i)) for i in items):
            raise ValueError(
                f"Recorder: config[{key!r}] = {value!r}; a finite number, a text or a list of them is needed"
            )
        found[key] = plain
    return found


def directory_of(path: Path, config: Mapping[str, Any], seed: int) -> Path:
    """``path/KEY=VALUE,.../seed=N``.

    Raises:
        ValueError: if another config beside it would share its name where case is ignored, or its labels.
    """
    for file in (EXPERIMENT, SWEEP, ARCHIVE):
        if (path / file).exists():
            raise ValueError(
                f"Recorder: {path} is a run, a sweep or an archive of tsdyn's ({file}); record into a folder of its own"
            )
    if not config:
        return path / f"seed={seed}"
    folder = path / point_name(config)
    mine = {key: label(value) for key, value in config.items()}
    for other in neighbours(folder):
        inside = recordings_below(other)
        theirs = Recording.of_directory(inside[0]).config if inside else None
        same = theirs is not None and {key: label(value) for key, value in theirs.items()} == mine
        if other.name.casefold() == folder.name.casefold() or same:
            raise ValueError(
                f"Recorder: config {dict(config)} cannot be told from that of {other} ({theirs}), by its "
                "directory or labels; give values that differ otherwise"
            )
    inside = recordings_below(folder)
    theirs = Recording.of_directory(inside[0]).config if inside else dict(config)
    if theirs != dict(config):
        raise ValueError(f"Recorder: {folder} holds the config {theirs}, and this is {dict(config)}; give other values")
    return folder / f"seed={seed}"


def checked_probe(model: nn.Module, probe: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors.

    Raises:
        ValueError: if they do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"Recorder: model is {type(model).__name__}; an nn.Module is needed")
    if not isinstance(probe, (tuple, list)) or len(probe) != 2:
        raise ValueError("Recorder: probe is a pair of inputs and targets, probe=(x, y)")
    x, y = (torch.as_tensor(part).detach() for part in probe)
    like = next(model.parameters(), None)
    if like is None:
        raise ValueError(f"Recorder: {type(model).__name__} has no parameters; there is nothing to record")
    if x.ndim < 1 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"Recorder: probe has inputs {tuple(x.shape)} and targets {tuple(y.shape)}; (sample, ...) each"
        )
    for name, tensor in (("inputs", x), ("targets", y)):
        if tensor.device != like.device:
            raise ValueError(
                f"Recorder: the probe's {name} are on {tensor.device}, the model on {like.device}; move them with "
                ".to(...)"
            )
        if tensor.is_floating_point() and tensor.dtype != like.dtype:
            raise ValueError(
                f"Recorder: the probe's {name} are {tensor.dtype}, the model {like.dtype}; convert them with .to(...)"
            )
    return x, y


def unlabelled(model: nn.Module, layers: tuple[str, ...]) -> dict[str, list[int]]:
    """Name → shape of the parameters and buffers that belong to no labelled layer, and hold a number at all."""
    own = {id(p) for name in layers for p in model.get_submodule(name).parameters(recurse=False)}
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: list(t.shape) for name, t in held.items() if id(t) not in own and t.numel()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors."""
    found = hashlib.sha256(shapes(tensors).encode())
    for tensor in tensors.values():
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types and shapes of tensors."""
    told = "; ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
    return hashlib.sha256(told.encode()).hexdigest()


def is_finite(parameter: Tensor) -> bool:
    """Whether all numbers are; the extremes tell, which needs no memory."""
    if not parameter.numel():
        return True
    numbers = parameter.detach()
    return all(
        bool(e.isfinite()) for e in torch.aminmax(torch.view_as_real(numbers) if numbers.is_complex() else numbers)
    )


def layers_of(module: nn.Module, x: Tensor, layers: Sequence[str] | None, whose: str) -> tuple[str, ...]:
    """Names of the layers to label; a module that cannot take the probe is refused with its own words.

    Raises:
        ValueError: naming the shape of the inputs, or as `labelled`.
    """
    try:
        return tuple(labelled(module, x, layers, caller="Recorder", whose=whose))
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # the user's own code raises errors of every type
        raise ValueError(
            f"Recorder: the {whose} raised {type(error).__name__} for inputs {tuple(x.shape)} of the probe: {error}"
        ) from error


def layers_of_teacher(teacher: Any, model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """`layers_of` of a teacher that can be compared with the model.

    Raises:
        ValueError: if it is no module, or of another dtype or on another device than the model; as `layers_of`.
    """
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"Recorder: teacher is {type(teacher).__name__}; an nn.Module is needed")
    like, mine = next(model.parameters()), next(teacher.parameters(), None)
    if mine is not None and (mine.dtype, mine.device) != (like.dtype, like.device):
        raise ValueError(
            f"Recorder: the teacher is {mine.dtype} on {mine.device}, the model {like.dtype} on {like.device}; convert "
            "it with .to(...)"
        )
    return layers_of(teacher, x, None, "teacher")


def name_of(loss: Callable[[Tensor, Tensor], Tensor] | None) -> str:
    """What a recording calls its loss."""
    return "half squared error" if loss is None else str(getattr(loss, "__qualname__", type(loss).__qualname__))


def refuse_below(*given: tuple[str, object, int]) -> None:
    """Refuse what is no integer of at least that size: (name, value, least) each.

    Raises:
        ValueError: naming it.
    """
    for name, number, least in given:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"Recorder: {name} = {number!r}; an integer of at least {least} is needed")
