"""Squared error and correlations of a network on a data set, in one compiled forward pass.

compiled_sums.cpp is built and called by `native`.  Both are recorded of every member at every recorded epoch; they are
summed block by block while the samples are in cache, and activations are never written to memory.
`tsdyn.observables` has the same formulas in torch: the tests compare with these, and they are used where `serves` is
False.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tsdyn.engine import compiled_activations, native
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_sums.cpp"
#: Samples per block; blocks are shared out over threads, and their sums are added in order.
BLOCK = 1024


class Job(ctypes.Structure):
    """The argument of a call; compiled_sums.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("samples", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("teacher_widths", ctypes.POINTER(ctypes.c_int64)),
        ("teachers", native.Pointers),
        ("taught", native.Pointers),
        ("found", ctypes.c_void_p),
        ("numbers", ctypes.c_int64),
        ("correlations", native.Pointers),
        ("squared_error", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Taught:
    """A teacher's activations at one hidden layer, centred and of unit norm over samples, (sample, teacher_node)."""

    activations: Tensor

    @cached_property
    def of_blocks(self) -> Tensor:
        """Their sums over each block, (block, teacher_node)."""
        return torch.stack([t.sum(0) for t in self.activations.split(BLOCK)])


@dataclass(frozen=True)
class Sums:
    """The sums that a forward pass leaves.

    Attributes:
        squared_error: Σ (f* − f)² over samples and outputs.
        correlations: (teacher_node, node) for each hidden layer asked for, as `formulas.correlation` gives it.
    """

    squared_error: Tensor
    correlations: list[Tensor]


def serves(network: Network, inputs: Tensor) -> bool:
    """Whether the compiled pass can take this network and these inputs."""
    tensors = [inputs, *network.weights, *(b for b in network.biases if b is not None)]
    known = compiled_activations.kind(network.activation) is not None
    return network.plain and known and native.serves(tensors, SOURCE, Job)


def sums(network: Network, inputs: Tensor, targets: Tensor, teachers: Sequence[Taught] = ()) -> Sums:
    """Squared error, and correlations with a teacher's standardised activations, over any number of samples.

    The result has the same bits for any number of threads.

    Args:
        network: A network for which `serves` is True.
        inputs: (sample, input).
        targets: (sample, output).
        teachers: The teacher's at hidden layers 1, 2, ... as far as correlations are asked for.

    Raises:
        MemoryError: if there is no memory for a second copy of the network's parameters.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    samples, hidden, of = inputs.shape[0], network.depth - 1, network.widths
    asked = teachers[:hidden]
    x, y, *known = (native.written(t) for t in (inputs, targets, *(t.activations for t in asked)))
    taught = [native.written(t.of_blocks) for t in asked]
    correlations = [inputs.new_empty(t.shape[1], nodes) for t, nodes in zip(known, of[1:], strict=False)]
    numbers = 1 + sum(nodes * (5 + native.padded(t.shape[1], t.dtype)) for t, nodes in zip(known, of[1:], strict=False))
    blocks = -(-samples // BLOCK)
    found, squared_error = inputs.new_empty(blocks, numbers), inputs.new_empty(())
    none = [None] * (hidden - len(asked))
    job = Job(
        network.depth,
        native.array(ctypes.c_int64, of),
        samples,
        BLOCK,
        compiled_activations.kind(network.activation),
        network.activation.leak or 0.0,
        native.pointers(network.weights),
        native.pointers(network.biases),
        native.address(x),
        native.address(y),
        native.array(ctypes.c_int64, [*(t.shape[1] for t in known), *[0] * len(none)]),
        native.pointers([*known, *none]),
        native.pointers([*taught, *none]),
        native.address(found),
        numbers,
        native.pointers([*correlations, *none]),
        native.address(squared_error),
    )
    forward = native.function(library, "forward", inputs.dtype)

    def some(first: int, last: int) -> int:
        return int(forward(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(some, list(native.shares(blocks))):
        raise MemoryError(f"sums: no memory for a second copy of a network of widths {of}")
    native.function(library, "finish", inputs.dtype)(ctypes.byref(job))
    return Sums(squared_error, correlations)
