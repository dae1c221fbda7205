"""Arrays that xarray takes and torch differentiates: a tensor behind the array API's and NumPy's protocols."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsdyn.labelled import functions
from tsdyn.labelled.functions import tracked

_WAY_OUT = (
    "stay in xarray's methods, NumPy's functions or the array's __array_namespace__(); reductions that leave NaN out "
    "have a derivative with skipna=False; for the numbers alone take .data.detach()"
)


class DifferentiableArray:
    """A torch tensor as a duck array: xarray computes with it, and what torch records of it is kept.

    It is immutable, and never becomes a NumPy array while it carries a gradient: what would need that raises TypeError.
    Its functions are those of `tsdyn.labelled.functions`.

    Attributes:
        tensor: The tensor itself.
    """

    __slots__ = ("tensor",)
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dtype not in functions.NUMPY:
            raise TypeError(f"differentiable: {tensor.dtype} has no NumPy dtype; convert the tensor, e.g. to float64")
        self.tensor = tensor

    # --- what xarray asks ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def size(self) -> int:
        return self.tensor.numel()

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def dtype(self) -> np.dtype:
        return functions.NUMPY[self.tensor.dtype]

    @property
    def T(self) -> DifferentiableArray:
        return wrap(functions.FUNCTIONS["transpose"](self.tensor))

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return NAMESPACE

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **more: Any) -> Any:
        tables = {"__call__": functions.FUNCTIONS, "reduce": functions.REDUCTIONS}
        function = tables.get(method, {}).get(ufunc.__name__)
        if function is None or more.get("out") is not None:
            raise TypeError(f"np.{ufunc.__name__}{'' if method == '__call__' else '.' + method}: {_no(ufunc.__name__)}")
        if not all(_takes(each) for each in inputs):
            return NotImplemented
        if method == "reduce":
            more.setdefault("axis", 0)
        return _through(function, *inputs, **{key: value for key, value in more.items() if key != "out"})

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        function = functions.FUNCTIONS.get(func.__name__)
        if function is None:
            if not any(tracked(each.tensor) for each in _found((args, kwargs))):
                return func(*_plain(args), **_plain(kwargs))
            raise TypeError(f"np.{func.__name__}: {_no(func.__name__)}")
        return _through(function, *args, **kwargs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if tracked(self.tensor):
            raise TypeError(
                f"differentiable array of shape {self.shape}: as a NumPy array it would lose its gradient; {_WAY_OUT}"
            )
        found = self.tensor.detach().cpu().numpy()
        return found if dtype is None else found.astype(dtype)

    # --- indexing -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> DifferentiableArray:
        keys = key if isinstance(key, tuple) else (key,)
        found = self.tensor
        if any(isinstance(each, slice) and (each.step or 1) < 0 for each in keys):
            found, keys = _without_negative_steps(found, keys)
        return wrap(found[tuple(_key(each) for each in keys)])

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("differentiable arrays do not change in place; use where, xr.where or xr.concat")

    def __len__(self) -> int:
        return len(self.tensor)

    # --- values -------------------------------------------------------------------------------------------------------

    def detach(self) -> DifferentiableArray:
        """The same numbers without a gradient; NumPy accepts them."""
        return wrap(self.tensor.detach())

    def item(self) -> Any:
        """The number of an array with one entry, which carries no gradient.

        Raises:
            TypeError: while the array carries one.
        """
        return self.__array__().item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __deepcopy__(self, memo: Any) -> DifferentiableArray:
        return self

    def __copy__(self) -> DifferentiableArray:
        return self

    def __repr__(self) -> str:
        return f"DifferentiableArray({self.tensor!r})"

    def _repr_inline_(self, max_width: int) -> str:
        return f"torch, {self.shape}{', with gradient' if tracked(self.tensor) else ''}"[:max_width]

    # --- methods of arrays --------------------------------------------------------------------------------------------

    def astype(self, dtype: Any, copy: bool = True, **_: Any) -> DifferentiableArray:
        return wrap(functions.FUNCTIONS["astype"](self.tensor, dtype))

    def reshape(self, *shape: Any) -> DifferentiableArray:
        return wrap(functions.FUNCTIONS["reshape"](self.tensor, shape[0] if len(shape) == 1 else shape))

    def transpose(self, *axes: Any) -> DifferentiableArray:
        whole = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else (axes or None)
        return wrap(functions.FUNCTIONS["transpose"](self.tensor, whole))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _METHODS:
            raise AttributeError(name)
        return lambda *args, **kwargs: _through(functions.FUNCTIONS[name], self, *args, **kwargs)


#: Functions that NumPy's arrays have as methods, too.
_METHODS = (
    "sum", "mean", "prod", "var", "std", "max", "min", "all", "any", "argmax", "argmin", "cumsum", "clip", "round",
    "ravel", "swapaxes", "squeeze", "take", "dot", "copy", "diagonal",
)  # fmt: skip
_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "power", "mod": "remainder",
    "floordiv": "floor_divide", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip


def _operator(name: str, *, swapped: bool = False) -> Callable[[DifferentiableArray, Any], Any]:
    function = functions.FUNCTIONS[name]

    def operate(self: DifferentiableArray, other: Any) -> Any:
        if not _takes(other):
            return NotImplemented
        return _through(function, other, self) if swapped else _through(function, self, other)

    return operate


for _sign, _name in (_OPERATORS | _COMPARISONS).items():
    setattr(DifferentiableArray, f"__{_sign}__", _operator(_name))
for _sign, _name in _OPERATORS.items():
    setattr(DifferentiableArray, f"__r{_sign}__", _operator(_name, swapped=True))
for _sign, _name in {"neg": "negative", "pos": "positive", "abs": "abs", "invert": "invert"}.items():
    setattr(DifferentiableArray, f"__{_sign}__", lambda self, f=functions.FUNCTIONS[_name]: wrap(f(self.tensor)))


def wrap(tensor: Tensor) -> DifferentiableArray:
    return DifferentiableArray(tensor)


def _no(name: str) -> str:
    return f"{name} has no form that keeps the gradient; {_WAY_OUT}"


def _takes(value: Any) -> bool:
    kinds = (DifferentiableArray, Tensor, np.ndarray, np.generic, bool, int, float, complex)
    return isinstance(value, kinds)


def _through(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result on the tensors inside the arguments, as differentiable arrays again."""
    return _wrapped(function(*_tensors(args), **_tensors(kwargs)))


def _tensors(value: Any) -> Any:
    return _mapped(value, lambda array: array.tensor)


def _plain(value: Any) -> Any:
    return _mapped(value, np.asarray)


def _mapped(value: Any, of: Callable[[DifferentiableArray], Any]) -> Any:
    if isinstance(value, DifferentiableArray):
        return of(value)
    if isinstance(value, dict):
        return {key: _mapped(each, of) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, of) for each in value)
    return value


def _found(value: Any) -> list[DifferentiableArray]:
    if isinstance(value, DifferentiableArray):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [array for part in parts for array in _found(part)]


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return wrap(value)
    return [_wrapped(each) for each in value] if isinstance(value, (list, tuple)) else value


def _key(key: Any) -> Any:
    if isinstance(key, DifferentiableArray):
        return key.tensor
    if isinstance(key, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(key))
    return int(key) if isinstance(key, np.integer) else key


def _without_negative_steps(tensor: Tensor, keys: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """Slices with negative steps taken one by one, which torch has not; the keys then select whole axes there.

    Raises:
        TypeError: if the keys hold arrays or new axes, too.
    """
    if not all(isinstance(each, (slice, int, np.integer)) or each is Ellipsis for each in keys):
        raise TypeError("differentiable arrays: a slice with a negative step beside arrays; index in two steps")
    before = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    left = []
    for position, each in enumerate(keys):
        axis = position if position < before else position - len(keys) + tensor.ndim
        if isinstance(each, slice) and (each.step or 1) < 0:
            tensor = tensor.index_select(axis, torch.arange(tensor.shape[axis])[torch.from_numpy(
                np.arange(tensor.shape[axis])[each].copy()
            )])  # fmt: skip
            each = slice(None)
        left.append(each)
    return tensor, tuple(left)


class _Namespace(SimpleNamespace):
    """The array namespace: every function takes and gives differentiable arrays."""

    __name__ = "tsdyn.labelled"

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name in functions.CONSTANTS:
            return functions.CONSTANTS[name]
        if name in functions.FUNCTIONS:
            return lambda *args, **kwargs: _through(functions.FUNCTIONS[name], *args, **kwargs)
        raise AttributeError(f"{name}: {_no(name)}")


NAMESPACE = _Namespace(linalg=SimpleNamespace(norm=lambda *a, **k: _through(functions.FUNCTIONS["norm"], *a, **k)))
