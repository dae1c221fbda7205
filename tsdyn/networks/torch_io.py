"""From torch and back: what an ``nn.Sequential`` holds, state dicts in files, a convolution as its matrix."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tsdyn.memory import refuse_beyond
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation
from tsdyn.networks.batch_norm import BatchNorm, norm_of
from tsdyn.networks.propagate import Image, Place

# --- modules -------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """The parts of a Sequential, layer by layer from the lowest.

    Attributes:
        weights, biases: Of the linear layers and convolutions.
        norms: BatchNorm of each layer, or None.
        gates: σ of each layer but the last.
        geometry: (stride, padding) of each convolution.
        places: Where the BatchNorm of each layer stands; "after" where it has none.
    """

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    norms: list[BatchNorm | None] = field(default_factory=list)
    gates: list[Activation] = field(default_factory=list)
    geometry: list[tuple[int, int]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    @property
    def activation(self) -> Activation:
        """The one σ of all layers; relu where there is no hidden layer."""
        kinds = {(a.name, a.leak): a for a in self.gates}
        if len(kinds) > 1:
            raise ValueError(f"from_torch: activations differ between layers: {sorted(map(str, kinds))}; use one")
        return next(iter(kinds.values()), activations.activation("relu"))


def parts_of(module: nn.Module) -> Parts:
    """The layers of an ``nn.Sequential`` of Conv2d, Linear, BatchNorm and one kind of activation, ending with a Linear.

    Parameters are the module's own tensors; a parametrized weight is computed once, now.  Between linear layers that
    follow each other directly the activation is the identity.

    Raises:
        ValueError: naming the module that cannot be converted, and the way out.
    """
    found = Parts()
    with evaluating(module):
        for name, part in _leaves(module, ""):
            _take(found, name, part)
    if not found.weights or len(found.gates) != len(found.weights) - 1 or found.norms[-1] is not None:
        raise ValueError(f"from_torch: {type(module).__name__} must end with a Linear layer and hold at least one")
    return found


def _take(found: Parts, name: str, part: nn.Module) -> None:
    """Add one more module to what was found."""
    kind = parametrize.type_before_parametrizations(part)
    open_layer = len(found.gates) < len(found.weights)
    if kind in (nn.Conv2d, nn.Linear):
        if open_layer:
            found.gates.append(activations.activation("identity"))
        if isinstance(part, nn.Conv2d):
            found.geometry.append(_geometry(part))
        assert isinstance(part, (nn.Conv2d, nn.Linear))
        if part.weight.device.type == "meta":
            raise ValueError(f"from_torch: {name} {part} is on the meta device, so it has no numbers; load some first")
        found.weights.append(part.weight)
        found.biases.append(part.bias)
        found.norms.append(None)
        found.places.append("after")
        return
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and found.weights and found.norms[-1] is None:
        assert isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))
        found.norms[-1] = norm_of(part)
        found.places[-1] = "before" if open_layer else "after"
        return
    if isinstance(part, nn.Flatten) and kind is nn.Flatten:
        if (part.start_dim, part.end_dim) != (1, -1):
            raise ValueError(f"from_torch: {name} {part} does not flatten one sample each; use nn.Flatten()")
        return
    sigma = activations.from_module(part)
    if sigma is None or not open_layer:
        raise ValueError(
            f"from_torch: {name} {part} has no place here; a network is Conv2d or Linear, BatchNorm and one activation "
            "in either order, ..., Linear, of these classes themselves: a subclass may compute anything else"
        )
    found.gates.append(sigma)


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a Sequential applies, in order, by name; refuses hooks and forwards of one's own."""
    called = f"{name or 'the module'} ({type(module).__name__})"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if hooks:
        kinds = sorted({getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks})
        raise ValueError(
            f"from_torch: {called} has forward hooks ({', '.join(kinds)}), which may change what it computes; remove "
            "them.  Of weight_norm, spectral_norm and pruning, whose weights are those of the last forward pass: "
            "remove_weight_norm, remove_spectral_norm, prune.remove, or torch.nn.utils.parametrizations instead"
        )
    if "forward" in vars(module):
        raise ValueError(f"from_torch: {called} has a forward of its own; take a module that has its class's")
    if type(module) is nn.Sequential:
        for key, part in module.named_children():
            yield from _leaves(part, f"{name}.{key}" if name else key)
    elif isinstance(module, nn.Sequential):
        raise ValueError(
            f"from_torch: {called} is a subclass of nn.Sequential, whose forward may be another (a residual block's "
            "is); if it only applies its modules in order, give nn.Sequential(*module)"
        )
    else:
        yield name, module


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode inside the context; every submodule's mode is restored afterwards."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def compare(network: Callable[[Tensor], Tensor], terms: Tensor, module: nn.Module, x: Tensor, given: Tensor) -> None:
    """Refuse a network whose outputs on `x` are not the module's on `given`, the same inputs in the module's shape.

    The tolerance is √ε of the dtype times the largest of `terms`, the sums of absolute values that make an output: a
    wrong function is off by far more, another order of summation by far less.

    Raises:
        ValueError: naming by how much they differ, or the module's own error on such inputs.
    """
    found = network(x)
    try:
        with evaluating(module):
            wanted = module(given)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"from_torch: the module refuses random inputs of shape {tuple(given.shape)}: {error}"
        ) from None
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise ValueError(f"from_torch: the module gives {shape} on {tuple(given.shape)}, not {tuple(found.shape)}")
    near = (found - wanted).abs() <= torch.finfo(found.dtype).eps ** 0.5 * terms.nan_to_num().max()
    same = near | (found == wanted) | (found.isnan() & wanted.isnan())
    if not bool(same.all()):
        off = float((found - wanted)[~same].abs().max())
        raise ValueError(
            f"from_torch: {type(module).__name__} computes another function than its layers in order: off by {off:.2g} "
            f"on random inputs, of outputs up to {float(wanted.abs().max()):.2g}; take out what changes it (global "
            "hooks, a replaced call), or build an nn.Sequential of plain layers"
        )


def _geometry(part: nn.Conv2d) -> tuple[int, int]:
    """(stride, padding) of a convolution; refuses those that differ between rows and columns, and groups."""
    same = {*part.stride, *part.dilation} == {part.stride[0], 1}
    padding = (0, 0) if part.padding == "valid" else part.padding
    if part.groups != 1 or part.padding_mode != "zeros" or not same or isinstance(padding, str) or len({*padding}) != 1:
        raise ValueError(f"from_torch: {part}: one stride and one zero padding in both directions, no groups")
    return part.stride[0], padding[0]


def unrolled(
    weight: Tensor, bias: Tensor | None, below: Image, above: Image, *, stride: int, padding: int
) -> tuple[Tensor, Tensor | None]:
    """The matrix (channel·row·column, channel·row·column below) and bias that equal a convolution on such images.

    Raises:
        MemoryError: if they do not fit.
    """
    size, size_above = math.prod(below), math.prod(above)
    refuse_beyond(
        "folded",
        2 * size * (size + size_above) * weight.element_size(),
        weight.device,
        "take smaller images: a convolution's matrix grows with the square of their size",
    )
    # column i is the response to the i-th unit image
    units = torch.eye(size, dtype=weight.dtype, device=weight.device).view(size, *below)
    response = F.conv2d(units, weight, None, stride, padding)
    return response.flatten(1).T, None if bias is None else bias.repeat_interleave(size_above // len(bias))


# --- state dicts ---------------------------------------------------------------------------------------------

#: Where checkpoints keep the state dict.
#: The name under which a file of parameters names its activation.
ACTIVATION = "activation"
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: tensors only, so that nothing in the file is executed.

    A file of ``torch.save``; ``*.safetensors``, read by the library of that name; or ``*.npz``, one array per key.
    From a checkpoint the state dict under ``state_dict`` (as Lightning's), ``model_state_dict``, ``model`` or ``net``
    is taken.  Sparse tensors become dense.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but tensors; if a tensor has no plain numbers
            (quantised, complex, on the meta device) or holds NaN or infinity; or safetensors is needed and missing.
    """
    held = _held_in(path)
    for key in _NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if isinstance(held, Mapping):
        held = {key: value for key, value in held.items() if key != ACTIVATION or isinstance(value, Tensor)}
    bad = [k for k, v in held.items() if not isinstance(v, Tensor)] if isinstance(held, Mapping) else ["the whole"]
    if bad:
        raise ValueError(f"load_state: {path}: {', '.join(map(str, bad))} is not a tensor; save module.state_dict()")
    return {str(key): _numbers(f"load_state: {path}: {key}", tensor) for key, tensor in held.items()}


def carried_activation(path: str | Path) -> str | None:
    """The activation that a file of parameters names beside them; None if it names none.

    ``activation`` in the dict that ``torch.save`` wrote, in the metadata of a ``*.safetensors`` file, or among the
    arrays of an ``*.npz`` file.

    Raises:
        ValueError: as `load_state`, if the file cannot be read.
    """
    if Path(path).suffix == ".safetensors":
        load_state(path)  # says what is wrong with it
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            found: Any = (file.metadata() or {}).get(ACTIVATION)
    else:
        held = _held_in(path)
        found = held.get(ACTIVATION) if isinstance(held, Mapping) else None
    return found if isinstance(found, str) else None


def _held_in(path: str | Path) -> Any:
    """What a file of parameters holds: tensors by name, and an activation as text."""
    read: Callable[[str], Any] = functools.partial(torch.load, map_location="cpu", weights_only=True)
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as read
        except ImportError:
            raise ValueError(f"load_state: {path} needs safetensors: pip install 'tsdyn[safetensors]'") from None
    elif Path(path).suffix == ".npz":
        read = _read_npz
    try:
        return read(str(path))
    except Exception as error:  # torch raises a different type for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"load_state: {path} is no state dict that can be read safely ({reason}); save one with "
            "torch.save(module.state_dict(), path)"
        ) from None


def _read_npz(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {
        name: str(array) if name == ACTIVATION and array.dtype.kind == "U" else torch.from_numpy(array)
        for name, array in arrays.items()
    }


def _numbers(name: str, tensor: Tensor) -> Tensor:
    """`tensor` as a dense one of finite real numbers; refuses what cannot be that."""
    out = "save the state dict of a module of plain floating-point parameters"
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, so it has no numbers; load the weights before saving")
    if tensor.is_quantized:
        raise ValueError(f"{name} is quantised ({tensor.dtype}); save the module as it was before, or dequantize()")
    if tensor.is_complex():
        raise ValueError(f"{name} is complex ({tensor.dtype}); {out}")
    dense = tensor.detach()
    if dense.layout is not torch.strided:
        try:
            dense = dense.to_dense()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name} is {tensor.layout} and cannot become dense ({error}); {out}") from None
    if dense.is_floating_point():
        wide = dense if dense.element_size() > 1 else dense.float()  # torch has no isfinite for 8-bit floats
        odd = (~torch.isfinite(wide)).nonzero()
        if len(odd):
            at = odd[0].tolist()
            raise ValueError(
                f"{name} is {float(wide[tuple(at)])} at {at} ({len(odd)} of {wide.numel()} numbers are NaN or "
                "infinite); such a network computes nothing, take a checkpoint of before it diverged"
            )
    return dense


def fit(state: Mapping[str, Tensor], *expected: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a state dict in the order of that one of the `expected` which has its keys.

    A prefix that every key has (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, the attribute's name in
    Lightning's checkpoints) is removed if the keys fit without it.

    Raises:
        ValueError: naming every missing, unexpected and misshapen key.
    """
    given = _without_counts(state)
    wanted = [_without_counts(e) for e in expected]
    bare = given
    while True:
        for each in wanted:
            if set(bare) == set(each):
                return _checked(each, bare, [])
        shared = {key.partition(".")[0] for key in bare}
        if len(shared) != 1 or not all("." in key for key in bare):
            break
        bare = {key.partition(".")[2]: tensor for key, tensor in bare.items()}
    nearest = max(wanted, key=lambda each: len(set(each) & set(given)))
    return _checked(nearest, given, _advice(given, wanted))


def _advice(given: Mapping[str, Tensor], wanted: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """A line of advice if the keys under some prefix would fit by themselves; no line otherwise."""
    for prefix in sorted({key[: at + 1] for key in given for at, c in enumerate(key) if c == "."}):
        inner = {key.removeprefix(prefix) for key in given if key.startswith(prefix)}
        if any(inner == set(each) for each in wanted):
            return [f"the keys with the prefix {prefix!r} would fit by themselves; save those only, without it"]
    return []


def _checked(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], advice: list[str]) -> list[Tensor]:
    problems = advice + [f"{k}: missing, {tuple(v.shape)} expected" for k, v in expected.items() if k not in given]
    problems += [f"{k}: unexpected, {tuple(v.shape)}" for k, v in given.items() if k not in expected]
    for k, v in expected.items():
        if k in given and given[k].shape != v.shape:
            problems.append(f"{k}: {tuple(given[k].shape)}, {tuple(v.shape)} expected")
        elif k in given and not given[k].is_floating_point():
            problems.append(f"{k}: {given[k].dtype}, floating-point numbers expected")
    if problems:
        raise ValueError("with_state: the state dict does not fit:\n  " + "\n  ".join(problems))
    return [given[k].detach() for k in expected]


def _without_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without BatchNorm's ``num_batches_tracked``, which nothing here needs."""
    return {k: v for k, v in state.items() if k.rpartition(".")[2] != "num_batches_tracked"}
