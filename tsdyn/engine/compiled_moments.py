"""E[D V'V D] and E[D V'V* D*] of relu networks, in compiled code that leaves inactive nodes out of every product.

compiled_moments.cpp is built and called by `native`.  `tsdyn.theory.coupling_moments` has the same sums in torch: the
tests compare with these, and they are used where `serves` is False.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tsdyn.engine import native
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_moments.cpp"
#: Samples per block; blocks are shared out over threads, and their sums are added in order.
BLOCK = 64


class Job(ctypes.Structure):
    """The argument of a call; compiled_moments.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("lowest", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("teacher_widths", ctypes.POINTER(ctypes.c_int64)),
        ("weights", native.Pointers),
        ("teacher_weights", native.Pointers),
        ("gates", native.Pointers),
        ("teacher_gates", native.Pointers),
        ("found", ctypes.c_void_p),
        ("numbers", ctypes.c_int64),
    )


def serves(student: Network, teacher: Network) -> bool:
    """Whether compiled code sums for this pair: plain relu networks of three layers or more, on a CPU.

    Other gates are seldom zero, so that nothing could be left out; below three layers no sum is needed.  With NaN or
    infinite weights the product with a zero gate is NaN, and must not be left out.
    """
    nets = student, teacher
    if student.depth <= 2 or not all(net.plain and net.activation.leak == 0 for net in nets):
        return False
    weights = [w.detach() for net in nets for w in net.weights]
    return native.serves(weights, SOURCE, Job) and all(bool(torch.isfinite(w).all()) for w in weights)


def sums(
    student: Network, gates: Sequence[Tensor], teacher: Network, teacher_gates: Sequence[Tensor], lowest: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Σ G_lᵀ G*_l and Σ G_lᵀ G_l over samples, G_l = V_l D_l, for hidden layers l = `lowest`..L−2.

    The result has the same bits for any number of threads.

    Args:
        student, teacher: A pair for which `serves` is True.
        gates, teacher_gates: σ' of the hidden layers 1..L−1, each (sample, node).
        lowest: The lowest layer that is asked for.

    Returns:
        (node, teacher_node) and (node, node_2) of each layer.

    Raises:
        MemoryError: if there is no memory for the buffers of one sample.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    held = [[native.written(g) for g in each] for each in (gates, teacher_gates)]
    samples, depth = len(held[0][0]), student.depth
    blocks = -(-samples // BLOCK)
    shapes = [(student.widths[layer], teacher.widths[layer]) for layer in range(lowest, depth - 1)]
    numbers = sum(n * (n + m) for n, m in shapes)
    found = held[0][0].new_empty(blocks, numbers)
    job = Job(
        depth,
        samples,
        BLOCK,
        lowest,
        native.array(ctypes.c_int64, student.widths),
        native.array(ctypes.c_int64, teacher.widths),
        native.pointers(student.weights),
        native.pointers(teacher.weights),
        native.pointers(held[0]),
        native.pointers(held[1]),
        native.address(found),
        numbers,
    )
    function = native.function(library, "moments", found.dtype)

    def some(first: int, last: int) -> int:
        return int(function(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(some, list(native.shares(blocks))):
        raise MemoryError(f"moments: no memory for a sample's matrices of widths {student.widths}, {teacher.widths}")
    total, own, mixed = found.sum(0), [], []
    for n, m in shapes:
        upper, between, total = total[: n * n].view(n, n), total[n * n : n * (n + m)].view(n, m), total[n * (n + m) :]
        own.append(torch.where(torch.ones_like(upper).triu() > 0, upper, upper.mT))
        mixed.append(between.clone())
    return mixed, own
