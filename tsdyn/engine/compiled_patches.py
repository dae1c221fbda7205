"""Each sample's gradient of a convolution's weight, and its squared norm, compiled.

compiled_patches.cpp is built and called by `native`.  Patches, which overlap, are never formed: the numbers of several
samples lie side by side in a vector, and every tap reads them where they are.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsdyn.engine import native

SOURCE = native.FOLDER / "compiled_patches.cpp"


class Job(ctypes.Structure):
    """The argument of a call; compiled_patches.cpp declares the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "groups", "channels", "below", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("rows_out", "columns_out", "kernel_rows", "kernel_columns")),
        *((name, ctypes.c_int64) for name in ("row_stride", "column_stride", "row_padding", "column_padding")),
        *((name, ctypes.c_int64) for name in ("row_dilation", "column_dilation")),
        *((name, ctypes.c_void_p) for name in ("input", "gradient", "found")),
    )


def serves(x: Tensor, g: Tensor) -> bool:
    """Whether compiled code can take a convolution's inputs and the gradients at its outputs."""
    # a view that a vmap or a graph owns has no numbers of its own
    plain = all(type(t) is Tensor and not t.requires_grad and t.numel() > 0 for t in (x, g))
    return (
        plain
        and x.ndim == g.ndim == 4
        and x.dtype == g.dtype
        and x.device.type == g.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and native.load(SOURCE, Job) is not None
    )


def gradients(
    layer: nn.Conv2d,
    x: Float[Tensor, "sample input row column"],
    g: Float[Tensor, "sample channel row_out column_out"],
    into: Float[Tensor, "sample channel below kernel_row kernel_column"],
) -> Tensor:
    """Each sample's gradient of the weight of a layer padded with zeros, written to `into`, a contiguous tensor.

    Raises:
        ValueError: for gradients of another shape than the layer's outputs have.
        MemoryError: if there is no memory for the inputs of a few samples.
    """
    _call("gradients", layer, x, g, into)
    return into


def squared_norms(
    layer: nn.Conv2d, x: Float[Tensor, "sample input row column"], g: Float[Tensor, "sample channel row_out column_out"]
) -> Tensor:
    """Squared norm of each sample's gradient of the weight, (sample,).

    Raises:
        ValueError, MemoryError: as `gradients`.
    """
    found = x.new_empty(len(x))
    _call("squares", layer, x, g, found)
    return found


def _call(name: str, layer: nn.Conv2d, x: Tensor, g: Tensor, found: Tensor) -> None:
    library = native.load(SOURCE, Job)
    assert library is not None
    assert not isinstance(layer.padding, str)
    call: Any = native.function(library, name, x.dtype)
    x, g = native.written(x), native.written(g)
    groups, (channels, below, *kernel) = layer.groups, layer.weight.shape
    given = zip(x.shape[2:], layer.padding, layer.dilation, kernel, layer.stride, strict=True)
    right = (len(x), channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in given))
    if x.shape[1] != below * groups or g.shape != right:
        raise ValueError(
            f"{name}: gradients of shape {tuple(g.shape)} at a layer that gives {right} of {tuple(x.shape)}"
        )
    shape = (len(x), groups, channels // groups, below, *x.shape[2:], *g.shape[2:], *kernel)
    steps = (*layer.stride, *layer.padding, *layer.dilation)
    job = Job(*shape, *steps, *(native.address(t) for t in (x, g, found)))

    def part(first: int, last: int) -> int:
        return int(call(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(part, list(native.shares(len(x)))):
        raise MemoryError(f"{name}: no memory for a convolution's inputs, {tuple(x.shape[1:])}, of a few samples")
