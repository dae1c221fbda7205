"""What is proved of a loss from its own code: that it is straight arithmetic of torch's, and a sum over samples.

A function is straight if its bytecode has neither jumps nor names from outside: it sees its arguments, numbers that are
written in it, and methods of tensors.  What torch computes for it then depends on the arguments' shapes alone, so that
one trace on these shapes says what every later call does.  A loss is a sum over samples if its trace is entrywise in
the samples up to one total, which only numbers scale or shift, and a batch of one has the same trace with the same
numbers: then the slope of a batch's loss in one sample's output is that of this sample's loss.

A trace is remembered by the code, the shapes, the types and the devices, and used only while every method of tensors
that may occur is the one that was traced.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Instructions that neither jump nor read or write anything but the function's own variables and attributes of these.
_STRAIGHT = {
    "RESUME", "NOP", "CACHE", "PRECALL", "PUSH_NULL", "POP_TOP", "COPY", "SWAP", "EXTENDED_ARG", "KW_NAMES",
    "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW",
    "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "LOAD_CONST", "LOAD_SMALL_INT",
    "LOAD_ATTR", "LOAD_METHOD", "CALL", "CALL_KW", "BINARY_OP", "UNARY_NEGATIVE", "RETURN_VALUE", "RETURN_CONST",
}  # fmt: skip
#: Methods of tensors that may be called: all are torch's own, of tensors and numbers.
_METHODS = {
    "abs", "add", "clamp", "div", "exp", "log", "log1p", "mean", "mul", "neg", "pow", "relu", "sigmoid", "sqrt",
    "square", "sub", "sum", "tanh",
}  # fmt: skip
#: What Python's operators call.
_OPERATORS = (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow") for side in ("", "r")),
    *("__neg__", "__getattribute__", "__torch_function__"),
)

_aten = torch.ops.aten
#: Operations that compute each entry from the same entry of their operands.
_ENTRYWISE = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar,
    _aten.neg.default, _aten.abs.default, _aten.exp.default, _aten.log.default, _aten.log1p.default,
    _aten.relu.default, _aten.sigmoid.default, _aten.sqrt.default, _aten.tanh.default, _aten.clamp.default,
    _aten.reciprocal.default,
}  # fmt: skip
#: Those that are linear in one operand where the others are numbers, up to a number that is added.
_AFFINE = {_aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default}
_OTHERS = {_aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim}


@dataclass(frozen=True)
class Straight:
    """What is proved of a loss of tensors of certain shapes.

    Attributes:
        sums: Whether it is a sum over samples, the slices of its arguments along the first axis.
        squares: c, if its arithmetic is that of c Σ (output − target)², over all entries of tensors of one shape.
    """

    sums: bool
    squares: float | None = None


#: (code, shapes, types, devices) → the methods that were there, and what is proved.
_known: dict[tuple[object, ...], tuple[tuple[object, ...], Straight | None]] = {}
#: Losses that are remembered, at most.
_MANY = 256


def straight(loss: Callable[..., Any], output: object, target: object) -> Straight | None:
    """What is proved of ``loss(output, target)``; None if it is not straight, or not one real number.

    Args:
        output, target: Tensors of one row per sample; the target may be None.
    """
    given = [output] if target is None else [output, target]
    if type(loss) is not FunctionType or loss.__defaults__ or loss.__kwdefaults__:
        return None
    if not all(type(t) is Tensor and t.ndim and t.is_floating_point() for t in given):
        return None
    tensors: list[Any] = given
    key = (loss.__code__, target is None, *((t.shape, t.dtype, t.device) for t in tensors))
    methods = _methods(loss.__code__)
    found = _known.get(key)
    if found is None or found[0] != methods:
        if len(_known) >= _MANY:
            _known.clear()
        found = _known[key] = methods, _examined(loss, tensors, methods)
    return found[1]


def _methods(code: CodeType) -> tuple[object, ...]:
    """The methods that a function may call, as they are now."""
    return tuple([getattr(Tensor, name, None) for name in (*code.co_names, *_OPERATORS)])


def _closed(code: CodeType) -> bool:
    """Whether a function has no jumps, no names from outside, and no methods but some of tensors."""
    if code.co_freevars or code.co_cellvars or code.co_argcount != 2 or code.co_flags & _VARIABLE:
        return False
    if code.co_kwonlyargcount or not {*code.co_names} <= _METHODS:
        return False
    return all(each.opname in _STRAIGHT for each in dis.get_instructions(code))


#: Flags of a function that takes more arguments, or is a generator or a coroutine.
_VARIABLE = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
#: The methods as torch made them, by name.
_TORCHS = {name: getattr(Tensor, name, None) for name in (*_METHODS, *_OPERATORS)}


def _examined(loss: FunctionType, given: Sequence[Tensor], methods: tuple[object, ...]) -> Straight | None:
    code = loss.__code__
    names = (*code.co_names, *_OPERATORS)
    if not _closed(code) or any(_TORCHS[name] != method for name, method in zip(names, methods, strict=True)):
        return None
    count = len(given[0])
    try:
        whole, single = (_traced(loss, [t.detach()[:n].clone() for t in given], n) for n in (count, 1))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # the call itself raises it, where it can be told
    if whole is None:
        return None
    sums = whole.total and single is not None and whole.told == single.told and single.total
    return Straight(sums, whole.squares)


@dataclass(frozen=True)
class _Trace:
    """Operations with their numbers and operands; whether the result is a total over samples; `Straight.squares`."""

    told: list[tuple[object, ...]]
    total: bool
    squares: float | None


def _traced(loss: FunctionType, given: Sequence[Tensor], count: int) -> _Trace | None:
    """What torch does for a loss; None if anything but `_ENTRYWISE` and `_OTHERS`, or no real number results."""
    arguments = [*given, None][:2]
    with torch.no_grad(), _Recorder(given, count) as recorder:
        value = loss(*arguments)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point() or not recorder.known:
        return None
    place = recorder.place_of(value)
    if place is None:
        return None
    form = recorder.forms[place]
    squares = form.factor if isinstance(form, _Squares) else None
    return _Trace(recorder.told, recorder.kinds[place] == "total", squares)


@dataclass(frozen=True)
class _Linear:
    """Entries a·output + b·target."""

    of_output: float
    of_target: float

    def plus(self, other: _Linear, times: float) -> _Linear:
        return _Linear(self.of_output + times * other.of_output, self.of_target + times * other.of_target)

    def times(self, number: float) -> _Linear:
        return _Linear(self.of_output * number, self.of_target * number)

    def squared(self) -> _Squares | None:
        """Its square, if it is a multiple of output − target."""
        return _Squares(self.of_output**2) if self.of_output == -self.of_target else None


@dataclass(frozen=True)
class _Squares:
    """Entries whose total is ``factor`` Σ (output − target)²."""

    factor: float

    def times(self, number: float) -> _Squares:
        return _Squares(self.factor * number)


_Form: TypeAlias = _Linear | _Squares | None


def _form(func: Any, args: Any, kwargs: Any, forms: Sequence[_Form], result: Tensor) -> _Form:
    """The form of a result, from those of its operands; None for any that is not told here, broadcast ones among them.

    Args:
        func, args, kwargs: The operation.
        forms: Of its tensors, in their order.
        result: What it gave.
    """
    tensors, numbers = [a for a in args if isinstance(a, Tensor)], [a for a in args if isinstance(a, (int, float))]
    first = forms[0] if forms else None
    if first is None or any(t.shape != tensors[0].shape for t in tensors) or set(kwargs) - {"alpha"}:
        return None
    times = float(kwargs.get("alpha", 1))
    if len(tensors) == 2:
        second = forms[1]
        if not (isinstance(first, _Linear) and isinstance(second, _Linear)):
            return None
        if func is _aten.mul.Tensor and first == second:
            return first.squared()
        signs = {_aten.add.Tensor: times, _aten.sub.Tensor: -times}
        return first.plus(second, signs[func]) if func in signs else None
    if func in (_aten.sum.default, _aten.sum.dim_IntList):
        return first if isinstance(first, _Squares) else None
    if func in (_aten.mean.default, _aten.mean.dim):
        return first.times(result.numel() / tensors[0].numel()) if isinstance(first, _Squares) else None
    if func is _aten.neg.default:
        return first.times(-1.0)
    if len(numbers) != 1 or len(args) != 2:
        return None
    if func is _aten.mul.Tensor:
        return first.times(float(numbers[0]))
    if func is _aten.div.Tensor and args[0] is tensors[0] and numbers[0]:
        return first.times(1 / numbers[0])
    if func is _aten.pow.Tensor_Scalar and numbers[0] == 2:
        return first.squared() if isinstance(first, _Linear) else None
    return None


class _Recorder(TorchDispatchMode):
    """Writes down operations; a result is "rows" of samples, a "total" over them, or "other"."""

    def __init__(self, given: Sequence[Tensor], count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held, self._count = list(given), count
        self.kinds = ["rows"] * len(self._held)
        alike = len({(t.shape, t.dtype, t.device) for t in self._held}) == 1 and len(self._held) == 2
        self.forms: list[_Form] = [_Linear(1.0, 0.0), _Linear(0.0, 1.0)] if alike else [None] * len(self._held)
        self.told: list[tuple[object, ...]] = []
        self.known = True

    def place_of(self, value: Tensor) -> int | None:
        return next((i for i, t in enumerate(self._held) if t is value), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [t for t in args if isinstance(t, Tensor)]
        places = [self.place_of(t) for t in operands]
        if func not in _ENTRYWISE | _OTHERS or None in places or not isinstance(result, Tensor):
            self.known = False
            return result
        plain = [("tensor", self.place_of(a)) if isinstance(a, Tensor) else (type(a), repr(a)) for a in args]
        self.told.append((func, *plain, repr(kwargs)))
        self._held.append(result)
        self.kinds.append(self._kind(func, args, operands, result))
        forms = [self.forms[place] for place in places if place is not None]
        self.forms.append(_form(func, args, kwargs or {}, forms, result))
        return result

    def _kind(self, func: Any, args: Any, operands: Sequence[Tensor], result: Tensor) -> str:
        kinds = [self.kinds[place] for t in operands if (place := self.place_of(t)) is not None]
        rows = set(kinds) == {"rows"}
        shaped = all(t.ndim == result.ndim and len(t) == self._count for t in operands if t.ndim)
        if func in _ENTRYWISE and rows and shaped and result.ndim:
            return "rows"
        if func in _AFFINE and kinds == ["total"] and (func is not _aten.div.Tensor or args[0] is operands[0]):
            return "total"
        if func is _aten.sum.default and rows and operands[0].ndim and len(operands[0]) == self._count:
            return "total"
        if func is _aten.sum.dim_IntList and rows and result.ndim and args[1]:
            ndim = operands[0].ndim
            return "rows" if all(axis % ndim for axis in args[1]) else "other"
        return "other"
