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

import numpy as np
import torch
from numpy.typing import NDArray
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
        ("found", ctypes.c_void_p),
        ("numbers", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Taught:
    """A teacher's activations at one hidden layer, centred and of unit norm over samples, (sample, teacher_node)."""

    activations: Tensor

    @cached_property
    def of_blocks(self) -> Tensor:
        """Their sums over each block, (block, teacher_node)."""
        return torch.stack([t.sum(0) for t in self.activations.split(BLOCK)])

    @cached_property
    def of_one_block(self) -> NDArray:
        """`of_blocks` of data of one block, (teacher_node, 1), of numpy."""
        return self.of_blocks.numpy().T


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
    held = [native.written(t) for t in (inputs, targets, *(t.activations for t in teachers))]
    widths, known = [t.shape[1] for t in held[2:]], []
    numbers = 1
    for width, nodes in zip(widths, of[1:], strict=False):
        known.append(native.padded(width, inputs.dtype))
        numbers += nodes * (5 + known[-1])
    blocks = -(-samples // BLOCK)
    found = inputs.new_empty(blocks, numbers)
    job = Job(
        network.depth,
        native.array(ctypes.c_int64, of),
        samples,
        BLOCK,
        compiled_activations.kind(network.activation),
        network.activation.leak or 0.0,
        native.pointers(network.weights),
        native.pointers(network.biases),
        native.address(held[0]),
        native.address(held[1]),
        native.array(ctypes.c_int64, [*widths, *[0] * (hidden - len(widths))]),
        native.pointers([*held[2:], *[None] * (hidden - len(widths))]),
        native.address(found),
        numbers,
    )
    function = native.function(library, "forward", inputs.dtype)

    def some(first: int, last: int) -> int:
        return int(function(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(some, list(native.shares(blocks))):
        raise MemoryError(f"sums: no memory for a second copy of a network of widths {of}")
    total = found[:, 0].sum() if blocks > 1 else found[0, 0]
    if not teachers:
        return Sums(total, [])
    held_sums, at, correlations = found.numpy(), 1, []  # numpy takes a tenth of torch's time to begin
    for t, width, room, nodes in zip(teachers, widths, known, of[1:], strict=False):
        moments = held_sums[:, at : at + 5 * nodes].reshape(blocks, 5, nodes)
        at += 5 * nodes
        overlap = held_sums[:, at : at + nodes * room].reshape(blocks, nodes, room)[..., :width].swapaxes(1, 2)
        at += nodes * room
        of_samples = _correlation if blocks > 1 else _of_one_block
        correlations.append(of_samples(moments, overlap, samples, t))
    return Sums(total, correlations)


def _correlation(moments: NDArray, overlap: NDArray, samples: int, teacher: Taught) -> Tensor:
    """Correlations from the sums of all blocks: Σ_x t (f − m) = Σ_b [Σ_{x∈b} t (f − c_b) + (c_b − m) Σ_{x∈b} t], and
    Σ_x (f − m)² = Σ_b [Σ_{x∈b} (f − m_b)² + n_b (m_b − m)²], with mean m, means m_b and shifts c_b of blocks of n_b.
    """
    mean, square, least, greatest, shift = torch.from_numpy(moments).unbind(1)
    blocks = len(moments)
    sizes = mean.new_tensor([BLOCK] * (blocks - 1) + [samples - BLOCK * (blocks - 1)]).unsqueeze(1)
    whole = (mean * sizes).sum(0) / samples
    variance = (square + sizes * (mean - whole).square()).sum(0)
    total = torch.from_numpy(overlap).sum(0) + teacher.of_blocks.T @ (shift - whole)
    constant = least.amin(0) == greatest.amax(0)
    return total / torch.where(constant, torch.nan, variance.sqrt())


def _of_one_block(moments: NDArray, overlap: NDArray, samples: int, teacher: Taught) -> Tensor:
    """`_correlation` of one block, rounded alike: nothing is summed.

    Roots are torch's, which may be those of a library that rounds otherwise.
    """
    mean, square, least, greatest, shift = moments[0]
    with np.errstate(all="ignore"):  # of students with NaN and infinite numbers
        whole = mean * samples / samples
        norm = torch.from_numpy(square + samples * np.square(mean - whole)).sqrt().numpy()
        total = overlap[0] + teacher.of_one_block * (shift - whole)
        return torch.from_numpy(total / np.where(least == greatest, np.asarray(np.nan, mean.dtype), norm))
