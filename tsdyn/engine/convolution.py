"""Convolutions of an ensemble, and of many samples by one weight, compiled: convolution.cpp, built by `native`.

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
from torch import Tensor, nn

from tsdyn.engine import native

SOURCE = native.FOLDER / "convolution.cpp"
#: Multiply-adds, and samples, below which turning samples takes longer than it gains.
_WORTH, _TOGETHER = 1 << 20, 8


class Job(ctypes.Structure):
    """The argument of a call; convolution.cpp declares the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("members", "channels", "below", "rows", "columns")),
        *(
            (name, ctypes.c_int64)
            for name in ("kernel_rows", "kernel_columns", "batch", "row_padding", "column_padding")
        ),
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


def pays(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether `of_samples` takes a layer that is padded with zeros, and these inputs, and is faster than torch is.

    torch has a fast convolution of its own for float32, and a slow one for float64.
    """
    held = [t for t in (x, layer.weight, layer.bias) if t is not None]
    if type(x) is not Tensor or x.ndim != 4 or any(t.dtype != torch.float64 or t.device.type != "cpu" for t in held):
        return False
    _, below, *kernel = layer.weight.shape
    if x.shape[1] != below:
        return False
    steps = (layer.groups, *layer.stride, *layer.dilation)
    assert not isinstance(layer.padding, str)
    inside = all(p < k <= n + 2 * p for n, p, k in zip(x.shape[2:], layer.padding, kernel, strict=True))
    much = len(x) >= _TOGETHER and layer.weight.numel() * x[:, 0].numel() > _WORTH
    return set(steps) == {1} and inside and much and serves(x)


def of_samples(layer: nn.Conv2d, x: Float[Tensor, "sample below row column"]) -> Tensor:
    """What a layer gives, (sample, channel, row_out, column_out), where `pays`; once differentiable, in the inputs.

    Raises:
        MemoryError: if there is no memory for a few samples and what they give.
    """
    found: Tensor = OfSamples.apply(x, layer.weight, layer.bias, layer.padding)  # type: ignore[no-untyped-call]
    return found


class OfSamples(torch.autograd.Function):
    """As `of_samples`; a graph shows the parameters as operands, but none of their gradients is formed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return _padded(x, weight, bias, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), (g,) = ctx.saved_tensors, gradients
        # the gradient of the input is the zero-padded gradient of the output, convolved with the flipped weight
        rows, columns = (k - 1 - p for k, p in zip(weight.shape[2:], ctx.padding, strict=True))
        return _padded(g, weight.flip(2, 3).transpose(0, 1), None, (rows, columns)), None, None, None


def _padded(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """The convolution of samples, (sample, channel, row, column), padded with so many zeros on each side."""
    library = native.load(SOURCE, Job)
    assert library is not None
    x, weight = native.written(x), native.written(weight)
    held = None if bias is None else native.written(bias)
    channels, below, *kernel = weight.shape
    rows, columns = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel, strict=True))
    output = x.new_empty(len(x), channels, rows, columns)
    function = native.function(library, "samples", x.dtype)
    shape = (channels, below, rows, columns, *kernel, 1, *padding)

    def some(first: int, last: int) -> int:
        own = (x[first:last], weight, held, output[first:last])
        job = Job(last - first, *shape, *(t if t is None else native.address(t) for t in own))
        return int(function(ctypes.byref(job)))

    if native.each(some, list(native.shares(len(x)))):
        raise MemoryError(f"convolution: no memory for a few samples of {tuple(x.shape[1:])} and what they give")
    return output


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
    shape = (channels, below, rows, columns, *size, x.shape[4], 0, 0)

    def some(first: int, last: int) -> int:
        own = (t if t is None else native.address(t[first:last]) for t in (x, weight, held, output))
        return int(function(ctypes.byref(Job(last - first, *shape, *own))))

    if native.each(some, list(native.shares(members))):
        raise MemoryError(f"convolution: no memory for a second copy of a weight of shape {tuple(weight.shape[1:])}")
    return output if name == "convolve" else weight
