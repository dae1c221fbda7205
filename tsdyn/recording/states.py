"""The state of a model, an optimizer or a scheduler as arrays by name and one JSON text; nothing is pickled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Types that netCDF stores as they are; bytes stand for all others.
_PLAIN = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8"}
TREE = "tree"


def encoded(states: Mapping[str, Any], spare: Mapping[str, np.ndarray] = {}) -> dict[str, np.ndarray]:
    """Arrays by name, and the array `TREE` of JSON text that says where each stands.

    Args:
        states: What to store, by name.
        spare: What an earlier call gave and nobody needs any longer: its memory is used again, since new memory costs
            more than the copy.

    Raises:
        ValueError: for a value that is neither an array nor JSON, naming it.
    """
    arrays = _Arrays(spare)
    tree = {name: _encoded(state, name, arrays) for name, state in states.items()}
    return arrays | {TREE: np.frombuffer(json.dumps(tree).encode(), np.uint8)}


class _Arrays(dict[str, np.ndarray]):
    """Arrays by name, in the memory of former ones where these fit."""

    def __init__(self, spare: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self._spare = spare

    def copied(self, name: str, array: np.ndarray) -> None:
        """Keep a copy of the array."""
        held = self._spare.get(name)
        if held is None or held.shape != array.shape or held.dtype != array.dtype or not held.flags.writeable:
            held = np.empty_like(array)
        np.copyto(held, array)
        self[name] = held


def _encoded(value: Any, at: str, arrays: _Arrays) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _array(value, at, arrays)
    if isinstance(value, Counter) or type(value) is dict or isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        pairs = [[_encoded(k, at, arrays), _encoded(v, f"{at}[{k!r}]", arrays)] for k, v in value.items()]
        return {kind: pairs}
    if isinstance(value, (list, tuple, set)):
        kind = "set" if isinstance(value, set) else "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encoded(v, f"{at}[{i}]", arrays) for i, v in enumerate(value)]}
    raise ValueError(
        f"Recorder: {at} is {type(value).__name__}, neither an array nor JSON, so that it cannot be stored without "
        "pickle; leave that object out of state="
    )


def _array(value: Any, at: str, arrays: _Arrays) -> Any:
    torched = isinstance(value, Tensor)
    if torched and (value.layout != torch.strided or value.is_quantized):
        raise ValueError(f"Recorder: {at} is a {value.layout} tensor of {value.dtype}; dense ones can be stored")
    if torched:
        held = value.detach().cpu().contiguous()
        dtype, shape = str(held.dtype).removeprefix("torch."), list(held.shape)
        array = held.numpy() if dtype in _PLAIN else held.reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.asarray(value)
        dtype, shape = str(array.dtype), list(array.shape)
        if array.dtype.hasobject:
            raise ValueError(f"Recorder: {at} is an array of Python objects, which cannot be stored without pickle")
        array = array if dtype in _PLAIN else np.frombuffer(array.tobytes(), np.uint8)
    told = {"dtype": dtype, "shape": shape, "torch": torched}
    if array.size:
        told["name"] = f"a{len(arrays):05d}"
        arrays.copied(str(told["name"]), array)
    return {"array": told}


def holders(state: Any) -> dict[str, Any]:
    """What is stored beside the model, by name: optimizers, schedulers and others with a state, and generators.

    Raises:
        ValueError: for what has none, or a state that cannot be stored.
    """
    listed = list(state) if isinstance(state, (list, tuple)) else [state]
    found = {}
    for i, holder in enumerate(listed):
        able = callable(getattr(holder, "state_dict", None)) and callable(getattr(holder, "load_state_dict", None))
        if not able and not isinstance(holder, torch.Generator):
            raise ValueError(
                f"Recorder: state[{i}] is {type(holder).__name__}, without state_dict() and load_state_dict(); give an "
                "optimizer, a scheduler, a module or a torch.Generator"
            )
        found[f"state[{i}] ({type(holder).__name__})"] = holder
    encoded({n: h.get_state() if isinstance(h, torch.Generator) else h.state_dict() for n, h in found.items()})
    return found


def decoded(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `encoded` was given."""
    tree = json.loads(np.asarray(arrays[TREE]).tobytes())
    return {name: _decoded(state, arrays) for name, state in tree.items()}


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    match kind:
        case "array":
            return _array_of(held, arrays)
        case "dict" | "counter":
            pairs = [(_decoded(k, arrays), _decoded(v, arrays)) for k, v in held]
            return Counter(dict(pairs)) if kind == "counter" else dict(pairs)
        case "list" | "tuple" | "set":
            values = [_decoded(v, arrays) for v in held]
            return {"list": list, "tuple": tuple, "set": set}[kind](values)
        case _:
            raise ValueError(f"Recorder: the stored state has an unknown kind {kind!r}")


def _array_of(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    raw = np.array(arrays[told["name"]]) if "name" in told else np.empty(0, np.uint8)
    if not told["torch"]:
        return np.frombuffer(raw.tobytes(), np.dtype(told["dtype"])).reshape(told["shape"]).copy()
    dtype = getattr(torch, told["dtype"])
    if "name" not in told:
        return torch.empty(told["shape"], dtype=dtype)
    tensor = torch.from_numpy(raw)
    return tensor.reshape(told["shape"]) if told["dtype"] in _PLAIN else tensor.view(dtype).reshape(told["shape"])
