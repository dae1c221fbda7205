"""The functions of the array API, and some more of NumPy's, for differentiable arrays: torch under NumPy's names.

xarray asks an array for its namespace (``__array_namespace__``) and calls these; NumPy's own functions and ufuncs are
sent here by their names (``__array_function__``, ``__array_ufunc__``).  What is not in `FUNCTIONS` raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Axis: TypeAlias = int | tuple[int, ...] | None

#: Dtypes that torch and NumPy share.  Differentiable arrays show NumPy's, which xarray knows.
DTYPES: dict[np.dtype, torch.dtype] = {
    np.dtype(name): getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64", "complex64", "complex128")
}
NUMPY: dict[torch.dtype, np.dtype] = {ours: theirs for theirs, ours in DTYPES.items()}

#: Functions of tensors by NumPy's or the array API's name; arguments as there.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """`value` as a tensor: of an array by sharing or copying its numbers, of a Python number in the dtype of `like`.

    Raises:
        TypeError: for a dtype that torch does not have.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float, complex)) and like is not None:
        kind = torch.result_type(like, value)
        return torch.as_tensor(value, dtype=kind, device=like.device)
    array = np.asarray(value)
    if array.dtype not in DTYPES:
        raise TypeError(f"differentiable arrays hold real and complex numbers, integers and bool, not {array.dtype}")
    return torch.as_tensor(np.array(array, order="C"), device=None if like is None else like.device)


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    return DTYPES[np.dtype(dtype)]


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """All axes that `axis` means, as numbers from 0."""
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in ((axis,) if isinstance(axis, int) else axis)) if ndim else ()


def named(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that enters a function into `FUNCTIONS` under these names."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            FUNCTIONS[name] = function
        return function

    return enter


def tracked(tensor: Tensor) -> bool:
    """Whether a derivative is being recorded of this tensor: by autograd, forward mode or torch.func."""
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return torch.autograd.forward_ad._current_level >= 0 and (
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
    )


def _may_hold_nan(value: Tensor) -> bool:
    if not value.is_floating_point():
        return False
    # inside torch.func no number is known; careful then costs time only
    return torch._C._functorch.is_functorch_wrapped_tensor(value) or bool(torch.isnan(value).any())


def careful(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of tensors with the same values, whose NaN entries spoil no derivative but their own.

    Archives are padded with NaN, and what is NaN is left out later: its derivative arrives as 0, and 0 · NaN would
    spread to the real numbers that met the padding.  So the derivative is taken with 1 in the place of NaN, and what is
    NaN without that stays NaN.
    """

    def calculated(*args: Any, **more: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not any(tracked(t) for t in tensors) or not any(_may_hold_nan(t) for t in tensors):
            return function(*args, **more)
        filled = [torch.where(torch.isnan(a), 1.0, a) if isinstance(a, Tensor) else a for a in args]
        plain = function(*(a.detach() if isinstance(a, Tensor) else a for a in args), **more)
        return torch.where(torch.isnan(plain), plain, function(*filled, **more))

    return calculated


# --- elementwise -----------------------------------------------------------------------------------

_UNARY: dict[str, Callable[..., Any]] = {
    "abs": torch.abs, "absolute": torch.abs, "negative": torch.neg, "positive": torch.positive, "exp": torch.exp,
    "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2, "log10": torch.log10,
    "sqrt": torch.sqrt, "square": torch.square, "reciprocal": torch.reciprocal, "sin": torch.sin, "cos": torch.cos,
    "tan": torch.tan, "arcsin": torch.asin, "asin": torch.asin, "arccos": torch.acos, "acos": torch.acos,
    "arctan": torch.atan, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh,
    "arctanh": torch.atanh, "atanh": torch.atanh, "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil,
    "trunc": torch.trunc, "rint": torch.round, "isnan": torch.isnan, "isfinite": torch.isfinite, "isinf": torch.isinf,
    "logical_not": torch.logical_not, "invert": torch.bitwise_not, "bitwise_invert": torch.bitwise_not,
    "signbit": torch.signbit,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "add": torch.add, "subtract": torch.subtract, "multiply": torch.multiply, "divide": torch.true_divide,
    "true_divide": torch.true_divide, "power": torch.pow, "pow": torch.pow, "float_power": torch.pow,
    "remainder": torch.remainder, "mod": torch.remainder, "floor_divide": torch.floor_divide,
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "arctan2": torch.atan2, "atan2": torch.atan2, "hypot": torch.hypot, "logaddexp": torch.logaddexp,
    "copysign": torch.copysign, "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt,
    "less_equal": torch.le, "equal": torch.eq, "not_equal": torch.ne, "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "logical_xor": torch.logical_xor, "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or, "bitwise_xor": torch.bitwise_xor, "matmul": torch.matmul,
}  # fmt: skip


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors of the dtype that NumPy gives to their combination."""
    first = a if isinstance(a, Tensor) else None
    second = b if isinstance(b, Tensor) else None
    x, y = tensor(a, second), tensor(b, first)
    shared = DTYPES[np.result_type(NUMPY[x.dtype], NUMPY[y.dtype])]
    return x.to(shared), y.to(shared)


#: Functions whose derivative is 0 or constant, or that give no real numbers: NaN cannot spread through it.
_CONSTANT_SLOPE = (
    "negative", "positive", "sign", "floor", "ceil", "trunc", "rint", "isnan", "isfinite", "isinf", "logical_not",
    "invert", "bitwise_invert", "signbit", "add", "subtract", "floor_divide", "maximum", "minimum", "fmax", "fmin",
    "greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "logical_and", "logical_or", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_xor",
)  # fmt: skip
for _name, _function in _UNARY.items():
    _own = _function if _name in _CONSTANT_SLOPE else careful(_function)
    FUNCTIONS[_name] = lambda x, f=_own: f(tensor(x))
for _name, _function in _BINARY.items():
    _own = _function if _name in _CONSTANT_SLOPE else careful(_function)
    FUNCTIONS[_name] = lambda a, b, f=_own: f(*_pair(a, b))


@named("where")
def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(tensor(condition), *_pair(a, b))


@named("clip")
def _clip(x: Any, a_min: Any = None, a_max: Any = None, min: Any = None, max: Any = None) -> Any:
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    x = tensor(x)
    x = x if low is None else torch.maximum(*_pair(x, low))
    return x if high is None else torch.minimum(*_pair(x, high))


@named("round", "around", "round_")
def _round(x: Any, decimals: int = 0) -> Any:
    return torch.round(tensor(x), decimals=decimals)


@named("nan_to_num")
def _nan_to_num(x: Any, copy: bool = True, nan: float = 0.0) -> Any:
    x = tensor(x)
    return torch.where(torch.isnan(x), torch.full_like(x, nan), x)


# --- reductions -----------------------------------------------------------------------------------


@named("sum")
def _sum(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    axes = _axes(axis, x.ndim)
    return torch.sum(x, axes, keepdim=keepdims, dtype=_dtype(dtype)) if axes else x.to(_dtype(dtype) or x.dtype)


@named("mean")
def _mean(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    x = x.to(_dtype(dtype) or (x.dtype if x.is_floating_point() or x.is_complex() else torch.float64))
    axes = _axes(axis, x.ndim)
    return torch.mean(x, axes, keepdim=keepdims) if axes else x


@named("prod")
def _prod(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    for each in sorted(_axes(axis, x.ndim), reverse=True):
        x = careful(torch.prod)(x, each, keepdim=keepdims, dtype=_dtype(dtype))
    return x


@named("var")
def _var(
    x: Any, axis: Axis = None, dtype: Any = None, ddof: Any = 0, keepdims: bool = False, correction: Any = 0
) -> Any:
    x = tensor(x)
    return careful(torch.var)(x, _axes(axis, x.ndim), correction=int(ddof or correction), keepdim=keepdims)


@named("std")
def _std(x: Any, **more: Any) -> Any:
    return FUNCTIONS["sqrt"](_var(x, **more))


@named("max", "amax")
def _max(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    return careful(torch.amax)(x, _axes(axis, x.ndim), keepdim=keepdims)


@named("min", "amin")
def _min(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    return careful(torch.amin)(x, _axes(axis, x.ndim), keepdim=keepdims)


@named("all")
def _all(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    return torch.logical_not(_any(torch.logical_not(tensor(x)), axis, keepdims))


@named("any")
def _any(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    axes = _axes(axis, x.ndim)
    return torch.sum(x != 0, axes, keepdim=keepdims) > 0 if axes else x != 0


@named("count_nonzero")
def _count_nonzero(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    return _sum(tensor(x) != 0, axis, keepdims=keepdims)


@named("argmax")
def _argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    return torch.argmax(tensor(x), axis, keepdim=keepdims)


@named("argmin")
def _argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    return torch.argmin(tensor(x), axis, keepdim=keepdims)


@named("cumsum", "cumulative_sum")
def _cumsum(x: Any, axis: int | None = None, dtype: Any = None) -> Any:
    x = tensor(x)
    return torch.cumsum(x.flatten() if axis is None else x, 0 if axis is None else axis, dtype=_dtype(dtype))


@named("norm")
def _norm(x: Any, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> Any:
    return careful(torch.linalg.norm)(tensor(x), ord, axis, keepdim=keepdims)


# --- reductions that leave NaN out -----------------------------------------------------------------------------------


@named("nansum")
def _nansum(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    return _sum(_nan_to_num(x), axis, dtype, keepdims)


@named("nanprod")
def _nanprod(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    return _prod(_nan_to_num(x, nan=1.0), axis, dtype, keepdims)


@named("nanmean")
def _nanmean(x: Any, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
    x = tensor(x)
    count = _sum(~torch.isnan(x), axis, keepdims=keepdims)
    return _nansum(x, axis, dtype, keepdims) / count  # 0/0 is NaN, as in NumPy


@named("nanvar")
def _nanvar(x: Any, axis: Axis = None, dtype: Any = None, ddof: Any = 0, keepdims: bool = False) -> Any:
    x = tensor(x)
    there = ~torch.isnan(x)
    centred = torch.where(there, x - _nanmean(x, axis, dtype, keepdims=True), 0.0)
    count = _sum(there, axis, keepdims=keepdims) - ddof
    squares = _sum(centred.square(), axis, keepdims=keepdims)
    return torch.where(count > 0, squares, math.nan) / torch.clamp(count, min=1)


@named("nanstd")
def _nanstd(x: Any, **more: Any) -> Any:
    return FUNCTIONS["sqrt"](_nanvar(x, **more))


def _extreme(x: Tensor, axis: Axis, keepdims: bool, sign: float) -> Any:
    axes = _axes(axis, x.ndim)
    missing = torch.isnan(x)
    found = sign * torch.amax(torch.where(missing, -math.inf, sign * x), axes, keepdim=keepdims)
    return torch.where(_all(missing, axes, keepdims), math.nan, found)


@named("nanmax", "nanamax")
def _nanmax(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    return _extreme(tensor(x), axis, keepdims, 1.0)


@named("nanmin", "nanamin")
def _nanmin(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    return _extreme(tensor(x), axis, keepdims, -1.0)


@named("nanargmax")
def _nanargmax(x: Any, axis: int | None = None) -> Any:
    x = tensor(x)
    return torch.argmax(torch.where(torch.isnan(x), -math.inf, x), axis)


@named("nanargmin")
def _nanargmin(x: Any, axis: int | None = None) -> Any:
    x = tensor(x)
    return torch.argmin(torch.where(torch.isnan(x), math.inf, x), axis)


@named("nancumsum")
def _nancumsum(x: Any, axis: int | None = None, dtype: Any = None) -> Any:
    return _cumsum(_nan_to_num(x), axis, dtype)


def _last(x: Tensor, axis: Axis) -> Any:
    """`x` with the axes that are meant joined into a last one."""
    axes = _axes(axis, x.ndim)
    kept = [a for a in range(x.ndim) if a not in axes]
    return x.permute(*kept, *axes).reshape(*(x.shape[a] for a in kept), -1)


@named("nanquantile")
def _nanquantile(x: Any, q: Any, axis: Axis = None, keepdims: bool = False, method: str = "linear") -> Any:
    if keepdims or method != "linear":
        raise TypeError(f"differentiable arrays: quantile with method={method!r}, keepdims={keepdims}; only 'linear'")
    x = tensor(x)
    return torch.nanquantile(_last(x, axis), tensor(q, x).to(x.dtype), -1)


@named("quantile")
def _quantile(x: Any, q: Any, axis: Axis = None, keepdims: bool = False, method: str = "linear") -> Any:
    found = _nanquantile(x, q, axis, keepdims, method)
    return torch.where(_any(torch.isnan(_last(tensor(x), axis)), -1), math.nan, found)


@named("nanmedian")
def _nanmedian(x: Any, axis: Axis = None) -> Any:
    return _nanquantile(x, 0.5, axis)


@named("median")
def _median(x: Any, axis: Axis = None) -> Any:
    return _quantile(x, 0.5, axis)


#: Ufunc whose ``reduce`` is asked for → the reduction.
REDUCTIONS = {
    "add": _sum, "multiply": _prod, "maximum": _max, "minimum": _min, "fmax": _nanmax, "fmin": _nanmin,
    "logical_and": _all, "logical_or": _any,
}  # fmt: skip


# --- shapes and places -----------------------------------------------------------------------------------


@named("reshape")
def _reshape(x: Any, shape: int | Sequence[int]) -> Any:
    return torch.reshape(tensor(x), (shape,) if isinstance(shape, int) else tuple(shape))


@named("ravel")
def _ravel(x: Any) -> Any:
    return torch.flatten(tensor(x))


@named("transpose", "permute_dims")
def _transpose(x: Any, axes: Sequence[int] | None = None) -> Any:
    x = tensor(x)
    return x.permute(tuple(range(x.ndim))[::-1] if axes is None else tuple(axes))


@named("matrix_transpose")
def _matrix_transpose(x: Any) -> Any:
    return torch.swapaxes(tensor(x), -1, -2)


@named("swapaxes")
def _swapaxes(x: Any, first: int, second: int) -> Any:
    return torch.swapaxes(tensor(x), first, second)


@named("moveaxis")
def _moveaxis(x: Any, source: Any, destination: Any) -> Any:
    return torch.moveaxis(tensor(x), source, destination)


@named("expand_dims")
def _expand_dims(x: Any, axis: int | tuple[int, ...] = 0) -> Any:
    x = tensor(x)
    for each in sorted((axis,) if isinstance(axis, int) else axis):
        x = torch.unsqueeze(x, each)
    return x


@named("squeeze")
def _squeeze(x: Any, axis: Axis = None) -> Any:
    x = tensor(x)
    return torch.squeeze(x) if axis is None else torch.squeeze(x, _axes(axis, x.ndim))


@named("broadcast_to")
def _broadcast_to(x: Any, shape: int | Sequence[int]) -> Any:
    return torch.broadcast_to(tensor(x), (shape,) if isinstance(shape, int) else tuple(shape))


@named("broadcast_arrays")
def _broadcast_arrays(*arrays: Any) -> list[Tensor]:
    return list(torch.broadcast_tensors(*(tensor(x) for x in arrays)))


def _alike(arrays: Sequence[Any]) -> list[Tensor]:
    tensors = [tensor(x) for x in arrays]
    shared = DTYPES[np.result_type(*(NUMPY[t.dtype] for t in tensors))]
    return [t.to(shared) for t in tensors]


@named("concat", "concatenate")
def _concat(arrays: Sequence[Any], axis: int | None = 0) -> Any:
    parts = _alike(arrays)
    return torch.cat([p.flatten() for p in parts]) if axis is None else torch.cat(parts, axis)


@named("stack")
def _stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    return torch.stack(_alike(arrays), axis)


@named("flip")
def _flip(x: Any, axis: Axis = None) -> Any:
    x = tensor(x)
    return torch.flip(x, _axes(axis, x.ndim))


@named("roll")
def _roll(x: Any, shift: Any, axis: Any = None) -> Any:
    return torch.roll(tensor(x), shift, axis)


@named("take")
def _take(x: Any, indices: Any, axis: int | None = None) -> Any:
    x, at = tensor(x), tensor(indices).long()
    if axis is None:
        return x.flatten()[at]
    return x[(slice(None),) * (axis % x.ndim) + (at,)]


@named("take_along_axis")
def _take_along_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    x, at = tensor(x), tensor(indices).long()
    shape = [max(a, b) for a, b in zip(x.shape, at.shape, strict=True)]
    shape[axis] = x.shape[axis]
    wide = torch.broadcast_to(x, shape)
    shape[axis] = at.shape[axis]
    return torch.gather(wide, axis, torch.broadcast_to(at, shape))


@named("pad")
def _pad(x: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0.0) -> Any:
    x = tensor(x)
    if mode != "constant" or not isinstance(constant_values, (int, float)):
        raise TypeError(f"differentiable arrays: pad with mode={mode!r}; only 'constant' with one number")
    widths = [pad_width] * x.ndim if isinstance(pad_width, int) else [tuple(w) for w in pad_width]
    flat = [int(end) for width in reversed(widths) for end in ((width,) * 2 if isinstance(width, int) else width)]
    return torch.nn.functional.pad(x, flat, value=constant_values)


@named("sort")
def _sort(x: Any, axis: int = -1, descending: bool = False) -> Any:
    return torch.sort(tensor(x), axis, descending=descending).values


@named("diagonal")
def _diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    return torch.diagonal(tensor(x), offset, axis1, axis2)


@named("diff")
def _diff(x: Any, n: int = 1, axis: int = -1) -> Any:
    return torch.diff(tensor(x), n, axis)


# --- products -----------------------------------------------------------------------------------


@named("einsum")
def _einsum(subscripts: str, *operands: Any) -> Any:
    return careful(torch.einsum)(subscripts, *_alike(operands))


@named("tensordot")
def _tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    return careful(torch.tensordot)(*_pair(a, b), dims=axes)


@named("vecdot")
def _vecdot(a: Any, b: Any, axis: int = -1) -> Any:
    return careful(torch.linalg.vecdot)(*_pair(a, b), dim=axis)


@named("dot")
def _dot(a: Any, b: Any) -> Any:
    x, y = _pair(a, b)
    if not (x.ndim and y.ndim):
        return careful(torch.mul)(x, y)
    return careful(torch.tensordot)(x, y, dims=([-1], [max(y.ndim - 2, 0)]))


# --- making arrays -----------------------------------------------------------------------------------


@named("asarray", "array")
def _asarray(x: Any, dtype: Any = None, copy: bool | None = None, device: Any = None) -> Any:
    found = tensor(x)
    return found.to(_dtype(dtype) or found.dtype)


@named("astype")
def _astype(x: Any, dtype: Any, copy: bool = True) -> Any:
    kind = _dtype(dtype)
    x = tensor(x)
    if x.requires_grad and kind is not None and not (kind.is_floating_point or kind.is_complex):
        if kind is torch.bool:
            return x != 0
        raise TypeError(f"differentiable arrays cannot be cast to {dtype}: a whole number has no gradient")
    return x.to(kind or x.dtype)


@named("zeros_like", "empty_like")
def _zeros_like(x: Any, dtype: Any = None) -> Any:
    return torch.zeros_like(tensor(x), dtype=_dtype(dtype))


@named("ones_like")
def _ones_like(x: Any, dtype: Any = None) -> Any:
    return torch.ones_like(tensor(x), dtype=_dtype(dtype))


@named("full_like")
def _full_like(x: Any, fill_value: Any, dtype: Any = None) -> Any:
    x = tensor(x)
    return torch.zeros_like(x, dtype=_dtype(dtype)) + tensor(fill_value, x).to(_dtype(dtype) or x.dtype)


@named("copy")
def _copy(x: Any, order: str = "K") -> Any:
    return tensor(x).clone()


@named("zeros")
def _zeros(shape: Any, dtype: Any = None) -> Any:
    return torch.zeros(shape, dtype=_dtype(dtype) or torch.float64)


@named("ones")
def _ones(shape: Any, dtype: Any = None) -> Any:
    return torch.ones(shape, dtype=_dtype(dtype) or torch.float64)


@named("full")
def _full(shape: Any, fill_value: Any, dtype: Any = None) -> Any:
    return torch.full((shape,) if isinstance(shape, int) else tuple(shape), fill_value, dtype=_dtype(dtype))


@named("arange")
def _arange(*ends: Any, dtype: Any = None) -> Any:
    return torch.arange(*ends, dtype=_dtype(dtype))


#: What the namespace has beside functions of arrays: dtypes and constants.
CONSTANTS: dict[str, Any] = {
    **{dtype.name: dtype for dtype in DTYPES},
    "bool_": np.dtype(bool), "pi": math.pi, "e": math.e, "inf": math.inf, "nan": math.nan, "newaxis": None,
    "result_type": lambda *parts: np.result_type(*(getattr(p, "dtype", p) for p in parts)),
    "isdtype": np.isdtype, "finfo": np.finfo, "iinfo": np.iinfo,
    "can_cast": lambda a, b: np.can_cast(np.dtype(getattr(a, "dtype", a)), b),
}  # fmt: skip
