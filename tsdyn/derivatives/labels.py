"""The labelled form of derivatives: Datasets whose coordinates are the network's layers and nodes and the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from tsdyn.networks.network import Network

#: A dimension of a parameter that is no layer's weight or bias: its name and the axis.
_OTHER = "{name}_dim_{axis}"
#: What stands in the attribute ``source`` of every variable.
SOURCE = "definition (torch.autograd)"


def unlabelled(x: Any) -> Any:
    """`x` without labels, as the computation takes it; a DataArray becomes its numbers."""
    return torch.from_numpy(np.array(x.values)) if isinstance(x, xr.DataArray) else x


def _numbers(values: Tensor) -> np.ndarray:
    """The numbers of a tensor; those of bfloat16, which NumPy does not have, in float32, which holds each of them."""
    values = values.detach().cpu()
    found: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return found


def of_samples(x: Any, dim: str = "sample") -> dict[str, xr.Variable]:
    """The coordinate of the samples of `x`: its own labels if it is a DataArray with such, else their numbers."""
    if isinstance(x, xr.DataArray):
        first = x.dims[0]
        if first in x.coords:
            return {dim: xr.Variable(dim, x[first].values, x[first].attrs)}
        return {dim: xr.Variable(dim, np.arange(x.sizes[first]))}
    leaf = x
    while not hasattr(leaf, "shape"):
        leaf = next(iter(leaf.values() if isinstance(leaf, Mapping) else leaf))
    return {dim: xr.Variable(dim, np.arange(leaf.shape[0]))}


def layers(module: nn.Module | Network) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear and convolution layers of a module with their names, lowest first in the order they are declared."""
    own = module.to_torch() if isinstance(module, Network) else module
    return [(n, m) for n, m in own.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def in_parameters(
    found: Mapping[str, Tensor],
    module: nn.Module | Network,
    lead: Sequence[str],
    coords: Mapping[str, xr.Variable],
    what: str,
) -> xr.Dataset:
    """Derivatives in parameters, name → (*lead, *parameter), as ``weight`` and ``bias`` over the network's layers.

    ``weight`` is (*lead, layer, node, input_node), a convolution's input nodes its (channel, row, column); layers are
    padded with NaN to the widest, and ``width`` and ``input_width`` say where each ends, as in an archive.  Parameters
    of other modules keep their names and have dimensions of their own.
    """
    named = layers(module)
    ours = {f"{name}.{kind}".lstrip("."): (i, kind) for i, (name, _) in enumerate(named) for kind in ("weight", "bias")}
    shapes = [(m.weight.shape[0], int(np.prod(m.weight.shape[1:]))) for _, m in named]
    widest = max((n for n, _ in shapes), default=0), max((below for _, below in shapes), default=0)
    sizes = next(iter(found.values())).shape[: len(lead)] if found else ()
    dims = {"weight": ("layer", "node", "input_node"), "bias": ("layer", "node")}
    arrays: dict[str, np.ndarray] = {}
    variables: dict[str, xr.Variable] = {}
    for name, values in found.items():
        numbers = _numbers(values)
        if name not in ours:
            own = [_OTHER.format(name=name, axis=axis) for axis in range(numbers.ndim - len(lead))]
            variables[name] = xr.Variable((*lead, *own), numbers, _attrs(f"{what} in {name}"))
            continue
        layer, kind = ours[name]
        if kind not in arrays:
            whole = (*sizes, len(named), *widest[: len(dims[kind]) - 1])
            arrays[kind] = np.full(whole, np.nan, numbers.dtype)
        block = numbers.reshape(*sizes, *shapes[layer][: len(dims[kind]) - 1])
        place: tuple[Any, ...] = (*(slice(None),) * len(sizes), layer, *(slice(n) for n in block.shape[len(sizes) :]))
        arrays[kind][place] = block
    for kind, array in arrays.items():
        variables[kind] = xr.Variable((*lead, *dims[kind]), array, _attrs(f"{what} in {kind}"))
    return xr.Dataset(variables, {**coords, **(_layer_coordinates(named, shapes, widest) if arrays else {})})


def _layer_coordinates(
    named: Sequence[tuple[str, nn.Module]], shapes: Sequence[tuple[int, int]], widest: tuple[int, int]
) -> dict[str, xr.Variable]:
    return {
        "layer": xr.Variable("layer", np.arange(1, len(named) + 1)),
        "node": xr.Variable("node", np.arange(widest[0])),
        "input_node": xr.Variable("input_node", np.arange(widest[1])),
        "width": xr.Variable("layer", np.array([n for n, _ in shapes])),
        "input_width": xr.Variable("layer", np.array([below for _, below in shapes])),
        "layer_name": xr.Variable("layer", np.array([name for name, _ in named], dtype=str)),
    }


def outputs(count: int, dim: str = "output") -> dict[str, xr.Variable]:
    return {dim: xr.Variable(dim, np.arange(count))}


def single(name: str, values: Tensor, dims: Sequence[str], coords: Mapping[str, xr.Variable], what: str) -> xr.Dataset:
    """A Dataset of one variable; dimensions without a coordinate get their numbers."""
    variable = xr.Variable(dims, _numbers(values), _attrs(what))
    numbered = {dim: xr.Variable(dim, np.arange(variable.sizes[dim])) for dim in dims if dim not in coords}
    return xr.Dataset({name: variable}, {**numbered, **coords})


def of_parameters(parameters: Mapping[str, Tensor], module: nn.Module | Network | None) -> dict[str, xr.Variable]:
    """Coordinates of flattened parameters along ``parameter``: its name, and layer, node and input node where it has.

    −1 where it has none: a bias has no input node.  Without a module only the names are known.
    """
    named = [] if module is None else layers(module)
    ours = {f"{name}.{kind}".lstrip("."): i + 1 for i, (name, _) in enumerate(named) for kind in ("weight", "bias")}
    names: list[str] = []
    places: list[np.ndarray] = []
    for name, parameter in parameters.items():
        size = parameter.numel()
        names += [name] * size
        place = np.full((size, 3), -1)
        if name in ours:
            flat = np.arange(size)
            below = size // parameter.shape[0]
            weight = parameter.ndim > 1
            place = np.stack([np.full(size, ours[name]), flat // below, flat % below if weight else place[:, 0]], 1)
        places.append(place)
    held = {"parameter_name": np.array(names, dtype=str)}
    if named:
        held |= dict(zip(("layer", "node", "input_node"), np.concatenate(places).T, strict=True))
    found = {key: xr.Variable("parameter", values) for key, values in held.items()}
    return {"parameter": xr.Variable("parameter", np.arange(len(names))), **found}


def in_pairs(name: str, matrix: Tensor, module: nn.Module | Network, what: str) -> xr.Dataset:
    """A matrix over the trainable parameters of a module, with their labels on both sides."""
    own = module.to_torch() if isinstance(module, Network) else module
    trained = {n: p.detach() for n, p in own.named_parameters() if p.requires_grad}
    return single(name, matrix, ("parameter", "parameter_2"), twice(of_parameters(trained, module)), what)


def twice(coords: Mapping[str, xr.Variable]) -> dict[str, xr.Variable]:
    """Coordinates along ``parameter``, and again along ``parameter_2``."""
    second = {f"{key}_2": xr.Variable("parameter_2", held.values) for key, held in coords.items()}
    return {**coords, **second}


def _attrs(what: str) -> dict[str, str]:
    return {"units": "1", "long_name": what, "source": SOURCE}
