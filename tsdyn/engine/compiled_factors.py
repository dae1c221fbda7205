"""The product of two factors of each sample, Σ_t g_t f_tᵀ, and its squared norm, compiled.

compiled_factors.cpp is built and called by `native`.  torch's batched product reaches half of the rate where a sample
has few positions t.
"""

from __future__ import annotations

import ctypes
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tsdyn.engine import native

SOURCE = native.FOLDER / "compiled_factors.cpp"


class Job(ctypes.Structure):
    """The argument of a call; compiled_factors.cpp declares the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "positions", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("f", "g", "found")),
    )


def serves(f: Tensor, g: Tensor, into: Tensor | None = None) -> bool:
    """Whether compiled code can take these factors: rows of f, and of the result, are whole cache lines."""
    tensors = [f, g] if into is None else [f, g, into]
    # a view that a vmap or a graph owns has no numbers of its own
    plain = all(type(t) is Tensor and not t.requires_grad for t in tensors) and f.numel() > 0 and g.numel() > 0
    lines = f.shape[2] * f.element_size() % native.LINE == 0
    return (
        plain
        and lines
        and native.serves(tensors, SOURCE, Job)
        and all(t.data_ptr() % native.LINE == 0 for t in (f, *tensors[2:]))
    )


def products(
    f: Float[Tensor, "sample position input"],
    g: Float[Tensor, "sample position output"],
    into: Float[Tensor, "sample output input"],
) -> Tensor:
    """Σ_t g_t f_tᵀ of each sample, written to `into`; where `serves` is true of the three."""
    _call("products", f, g, into)
    return into


def squared_norms(f: Float[Tensor, "sample position input"], g: Float[Tensor, "sample position output"]) -> Tensor:
    """Squared norm of each sample's product, (sample,); where `serves` is true of the two."""
    found = f.new_empty(len(f))
    _call("squares", f, g, found)
    return found


def _call(name: str, f: Tensor, g: Tensor, found: Tensor) -> None:
    library = native.load(SOURCE, Job)
    assert library is not None
    call: Any = native.function(library, name, f.dtype)
    job = Job(*f.shape, g.shape[2], *(native.address(t) for t in (f, g, found)))

    def part(first: int, last: int) -> int:
        return int(call(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(part, list(native.shares(len(f)))):
        raise MemoryError(f"{name}: no memory for one product of {g.shape[2]} x {f.shape[2]}")
