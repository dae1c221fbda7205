"""Derivatives of labelled code: gradients and Jacobians of functions of Datasets, as Datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tsdyn.arguments import DATASET, FUNCTION, NAMES, takes
from tsdyn.labelled.arrays import DifferentiableArray, wrap
from tsdyn.labelled.functions import tensor

#: A function of a Dataset with differentiable arrays.
Labelled = Callable[[xr.Dataset], Any]
X = TypeVar("X", xr.Dataset, xr.DataArray)

_DEPENDS = (
    "through operations that have a derivative. Counts, ranks, classes and comparisons have none: take a smooth one, "
    "such as tsdyn.analysis.specialization.mean_specialization in the place of recovered"
)


@overload
def differentiable(data: X) -> X: ...
@overload
def differentiable(data: Tensor | np.ndarray) -> DifferentiableArray: ...
def differentiable(data: Any) -> Any:
    """The same labels with torch tensors inside, so that xarray code on them can be differentiated.

    Of a Dataset every variable of real numbers becomes a tensor that requires a gradient, a leaf of autograd's graph;
    coordinates stay as they are.  Tensors inside are ``ds[name].data.tensor``.  Lazy arrays are loaded: take the slice
    that is needed first.

    Args:
        data: A Dataset or a DataArray; or a tensor, which is wrapped as it is, for `xarray.DataArray` and
            `Dataset.assign` to take (a bare tensor that requires a gradient they refuse, and others they turn into
            NumPy arrays).

    Raises:
        TypeError: for anything else, and for a DataArray that does not hold real numbers.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.differentiable(tsdyn.open("runs/quickstart").isel(overrealization=0, seed=0, epoch=[0, -1]))
        >>> moved = (ds.weight.diff("epoch").fillna(0) ** 2).sum()
        >>> moved.data.tensor.backward()
        >>> ds.weight.data.tensor.grad.shape == ds.weight.shape
        True
    """
    if isinstance(data, xr.Dataset):
        real = [name for name, array in data.data_vars.items() if array.dtype.kind == "f"]
        return data.assign({name: _leaf(data[name]) for name in real})
    if isinstance(data, xr.DataArray):
        if data.dtype.kind != "f":
            raise TypeError(f"differentiable: {data.name!r} holds {data.dtype}; only real numbers have derivatives")
        return _leaf(data)
    if isinstance(data, DifferentiableArray):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        return wrap(data if isinstance(data, Tensor) else tensor(data).requires_grad_())
    raise TypeError(f"differentiable: {type(data).__name__}; give a Dataset, a DataArray or a tensor")


def _leaf(array: xr.DataArray) -> xr.DataArray:
    if isinstance(array.variable._data, DifferentiableArray):
        return array
    return array.copy(data=wrap(tensor(array.values).requires_grad_()))


@takes(f=FUNCTION, ds=DATASET, wrt=NAMES)
def gradient(f: Labelled, ds: xr.Dataset, wrt: str | Sequence[str] = "weight") -> Any:
    """The derivative of a scalar function of a Dataset in its variables, with their labels.

    Args:
        f: Takes `ds` with torch tensors in the variables `wrt`; gives one number, with xarray's methods, NumPy's
            functions and measures of `tsdyn.analysis` in between.
        ds: Loaded or lazy; loaded here, so take the slice that is needed first.
        wrt: A variable, or several.

    Returns:
        A DataArray ``d_weight`` like the variable for one name, a Dataset of them for several.  NaN where the variable
        is NaN, as in padding, which spoils no other derivative.

    Raises:
        TypeError: if the value is not one number, a gradient would be lost on the way, or the value does not depend
            on a variable.
        KeyError: if `ds` has no such variable.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=0, seed=0, epoch=-1).load()
        >>> slope = tsdyn.gradient(lambda d: (d.weight.fillna(0) ** 2).sum(), ds, wrt="weight")
        >>> bool((abs(slope - 2 * ds.weight) < 1e-12).where(ds.weight.notnull(), True).all())
        True
    """
    leaves, placed = _placed(ds, wrt, "gradient")
    value = _value(f(placed), "gradient")
    if value.numel() != 1:
        raise TypeError(
            f"gradient: f gave {_what(value)}; a gradient is of one number: sum or select, or take tsdyn.jacobian"
        )
    found = _slopes(value.reshape(()), leaves, "gradient")
    results = {
        f"d_{name}": _like(ds[name], slope, dims=ds[name].dims, what=f"derivative in {name}", name=f"d_{name}")
        for name, slope in found.items()
    }
    return results[f"d_{wrt}"] if isinstance(wrt, str) else xr.Dataset(results)


@takes(f=FUNCTION, ds=DATASET, wrt=NAMES)
def jacobian(f: Labelled, ds: xr.Dataset, wrt: str | Sequence[str] = "weight") -> Any:
    """The derivative of every entry of a labelled function of a Dataset in every entry of its variables.

    Its dimensions are those of the output, then those of the input, each renamed to ``<dim>_in``; coordinates likewise.

    Args:
        f: Takes `ds` with torch tensors in the variables `wrt`; gives a DataArray.
        ds, wrt: As in `gradient`.

    Returns:
        A DataArray ``d_weight`` for one name, a Dataset for several.

    Raises:
        TypeError, KeyError: as `gradient`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=0, seed=0, epoch=-1).load()
        >>> norms = lambda d: (tsdyn.layer(d, 1).weight ** 2).sum("input_node")
        >>> tsdyn.jacobian(norms, ds, wrt="weight").dims
        ('node', 'layer_in', 'node_in', 'input_node_in')
    """
    leaves, placed = _placed(ds, wrt, "jacobian")
    output = f(placed)
    if not isinstance(output, xr.DataArray):
        raise TypeError(f"jacobian: f gave {type(output).__name__}; give a DataArray, whose dimensions the result has")
    value = _value(output, "jacobian")
    rows = [_slopes(entry, leaves, "jacobian", again=True, lost=False) for entry in value.reshape(-1)]
    kept = {name: coord.variable for name, coord in output.coords.items()}
    results = {}
    for name in leaves:
        slopes = torch.stack([row[name] for row in rows]).reshape(*value.shape, *leaves[name].shape)
        array = _like(
            ds[name], slopes, dims=(*output.dims, *(f"{dim}_in" for dim in ds[name].dims)), coords=kept,
            what=f"derivative of {output.attrs.get('long_name', output.name or 'f')} in {name}", name=f"d_{name}",
        )  # fmt: skip
        results[f"d_{name}"] = array
    return results[f"d_{wrt}"] if isinstance(wrt, str) else xr.Dataset(results)


def _placed(ds: xr.Dataset, wrt: str | Sequence[str], caller: str) -> tuple[dict[str, Tensor], xr.Dataset]:
    """A leaf tensor for each variable, and the Dataset that holds them."""
    names = [wrt] if isinstance(wrt, str) else list(wrt)
    missing = [name for name in names if name not in ds.data_vars]
    if missing or not names:
        raise KeyError(
            f"{caller}: the Dataset has no variable {', '.join(missing)}; it has {', '.join(map(str, ds.data_vars))}"
        )
    whole = [name for name in names if ds[name].dtype.kind != "f"]
    if whole:
        raise TypeError(f"{caller}: {', '.join(whole)} holds no real numbers, so nothing has a derivative in it")
    ds = ds.compute()
    leaves = {}
    for name in names:
        held = ds[name].variable._data
        start = held.tensor.detach().clone() if isinstance(held, DifferentiableArray) else tensor(ds[name].values)
        leaves[name] = start.requires_grad_()
    return leaves, ds.assign({name: ds[name].copy(data=wrap(leaf)) for name, leaf in leaves.items()})


def _value(output: Any, caller: str) -> Tensor:
    held = output.variable._data if isinstance(output, xr.DataArray) else output
    if isinstance(held, DifferentiableArray):
        held = held.tensor
    if isinstance(output, xr.Dataset) or not isinstance(held, Tensor) or not held.requires_grad:
        what = _what(held) if isinstance(held, Tensor) else f"a {type(output).__name__} without a gradient"
        raise TypeError(f"{caller}: f gave {what}, which does not depend on the variables {_DEPENDS}")
    return held


def _what(value: Tensor) -> str:
    kind = "real numbers" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"{kind} of shape {tuple(value.shape)}"


def _slopes(
    value: Tensor, leaves: dict[str, Tensor], caller: str, *, again: bool = False, lost: bool = True
) -> dict[str, Tensor]:
    slopes = torch.autograd.grad(value, list(leaves.values()), retain_graph=again, allow_unused=True)
    missing = [name for name, slope in zip(leaves, slopes, strict=True) if slope is None]
    if missing and lost:
        raise TypeError(
            f"{caller}: f does not depend on {', '.join(missing)} {_DEPENDS}; leave out of wrt what it does not use"
        )
    found = {}
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        held = torch.zeros_like(leaf) if slope is None else slope
        found[name] = torch.where(torch.isnan(leaf), torch.nan, held).detach()
    return found


def _like(
    array: xr.DataArray,
    values: Tensor,
    *,
    dims: Sequence[Any],
    what: str,
    name: str,
    coords: dict[Any, Any] | None = None,
) -> xr.DataArray:
    """`values` with the labels of `array`; with `coords`, those beside, and the array's renamed to ``_in``."""
    own = {key: coord.variable for key, coord in array.coords.items()}
    if coords is not None:
        renamed: dict[Any, Any] = {
            f"{key}_in": xr.Variable([f"{dim}_in" for dim in held.dims], held.values, held.attrs)
            for key, held in own.items()
            if held.dims
        }
        own = {**renamed, **coords}
    attrs = {"units": "1", "long_name": what, "source": "torch.autograd through tsdyn.differentiable"}
    return xr.DataArray(values.detach().cpu().numpy(), own, dims, name=name, attrs=attrs)


__all__ = ["DifferentiableArray", "differentiable", "gradient", "jacobian"]
