"""Convolutions of an ensemble, compiled: convolution.cpp, built and called by `native`.

Samples are the innermost axis, (member, channel, row, column, sample): the inner loop then runs over contiguous columns
and samples, whatever the numbers of channels and samples.  A member's result does not depend on the others or on the
number of threads.  Without a compiler `serves` is False, and torch's grouped convolution is used
(`propagate.propagate`).  The performance page of the docs compares both.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tsdyn.engine import native

SOURCE = native.FOLDER / "convolution.cpp"


class Job(ctypes.Structure):
    """The argument of a call; convolution.cpp declares the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("members", "channels", "below", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("kernel_rows", "kernel_columns", "batch")),
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bias", "output")),
    )


def serves(x: Tensor) -> bool:
    """Whether inputs like `x` can be convolved here: they are on a CPU, and a compiler is installed."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and native.load(SOURCE, Job) is not None


def convolve(
    x: Float[Tensor, "member below row column sample"],
    weight: Float[Tensor, "member channel below kernel_row kernel_column"],
    bias: Float[Tensor, "member channel"] | None,
) -> Float[Tensor, "member channel row_out column_out sample"]:
    """Each member's own convolution, stride 1 and without padding; differentiable once."""
    found: Tensor = _Convolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> Tensor:
    """As `convolve`, written to `into`; not differentiable."""
    return _call("convolve", x, weight, bias, output=into)


def weight_gradient(x: Tensor, g: Tensor, into: Tensor) -> Tensor:
    """The gradient of `convolve` in the weight, written to `into`; `g` is that at its output."""
    return _call("weight_gradient", x, into, None, output=g)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _call("convolve", x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (g,) = gradients
        rows, columns = weight.shape[3:]
        below = None
        if ctx.needs_input_grad[0]:
            # the gradient of the input is the zero-padded gradient of the output, convolved with the flipped weight
            framed = F.pad(g, (0, 0, columns - 1, columns - 1, rows - 1, rows - 1))
            below = _call("convolve", framed, weight.flip(3, 4).transpose(1, 2), None)
        down = (
            _call("weight_gradient", x, torch.empty_like(weight), None, output=g) if ctx.needs_input_grad[1] else None
        )
        return below, down, g.sum((2, 3, 4)) if ctx.needs_input_grad[2] else None


def _call(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, output: Tensor | None = None) -> Tensor:
    library = native.load(SOURCE, Job)
    assert library is not None
    x, weight = native.written(x), native.written(weight)
    members, channels, below, *size = weight.shape
    rows, columns = (n - k + 1 for n, k in zip(x.shape[2:4], size, strict=True))
    output = x.new_empty(members, channels, rows, columns, x.shape[4]) if output is None else native.written(output)
    held = None if bias is None else native.written(bias)
    function = native.function(library, name, x.dtype)
    shape = (channels, below, rows, columns, *size, x.shape[4])

    def some(first: int, last: int) -> int:
        own = (t if t is None else native.address(t[first:last]) for t in (x, weight, held, output))
        return int(function(ctypes.byref(Job(last - first, *shape, *own))))

    if native.each(some, list(native.shares(members))):
        raise MemoryError(f"convolution: no memory for a second copy of a weight of shape {tuple(weight.shape[1:])}")
    return output if name == "convolve" else weight
