"""A network's forward pass that is kept in compiled code, and its derivative along directions of the parameters.

compiled_curvature.cpp is built and called by `native`.  `Passed` takes the forward pass, then the slope of a loss at
the outputs, and then any number of directions: of each first what the outputs move by, then, from what the slope moves
by, the product of the loss's Hessian with it.  `tsdyn.derivatives.layered.Walk` is the same in torch: the tests compare
with it, and it is used where `serves` is False.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tsdyn.engine import compiled_activations, native
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_curvature.cpp"
#: Samples that are taken together, compiled_curvature.cpp's kColumns.
PIECE = 64
#: Pieces whose sums are formed together, and blocks of them, at most.
BLOCK, BLOCKS = 16, 64


class Job(ctypes.Structure):
    """The argument of a call; compiled_curvature.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("samples", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("along", native.Pointers),
        ("bias_along", native.Pointers),
        ("inputs", ctypes.c_void_p),
        ("f", native.Pointers),
        ("gates", native.Pointers),
        ("bends", native.Pointers),
        ("moved", native.Pointers),
        ("gamma", native.Pointers),
        ("outputs", ctypes.c_void_p),
        ("moved_outputs", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("moved_slope", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("numbers", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("factor", ctypes.c_double),
    )


def serves(network: Network, x: Tensor) -> bool:
    """Whether compiled code can take this network and these inputs, (sample, input)."""
    tensors = [x, *network.weights, *(b for b in network.biases if b is not None)]
    known = compiled_activations.kind(network.activation) is not None and network.gate_at_zero == "torch"
    return network.plain and known and x.ndim == 2 and len(x) > 0 and native.serves(tensors, SOURCE, Job)


class Passed:
    """A network's forward pass on some samples; made where `serves` is true.

    Attributes:
        output: (sample, output).
    """

    def __init__(self, network: Network, x: Tensor) -> None:
        library = native.load(SOURCE, Job)
        assert library is not None
        self._network, self._x = network, x
        self._call: Callable[[str], Any] = lambda name: native.function(library, name, x.dtype)
        self._pieces, block, self._blocks = _shared_out(len(x))
        hidden, smooth = network.widths[1:-1], not network.activation.piecewise_linear
        self._bends = [self._kept(n) for n in hidden] if smooth else []
        f = [self._kept(native.padded(n + 1, x.dtype)) for n in hidden]
        gates, moved = [self._kept(n) for n in hidden] if smooth else [], [self._kept(n) for n in hidden]
        gamma = [self._kept(n) for n in network.widths[1:]]
        self.output = x.new_empty(len(x), network.widths[-1])
        self._held: tuple[object, ...] = (f, gates, moved, gamma)
        self._job = job = _job(network, x, block, {})
        job.f, job.gates, job.bends = (native.pointers(kept) for kept in (f, gates, self._bends))
        job.moved, job.gamma = native.pointers(moved), native.pointers(gamma)
        job.outputs = native.address(self.output)
        self._run("forward", self._pieces)

    def _kept(self, rows: int) -> Tensor:
        return self._x.new_empty(self._pieces, rows, PIECE)

    def _run(self, name: str, count: int) -> None:
        _run(self._call(name), self._job, count, self._network)

    def descend(self, slope: Tensor, second: Callable[[Tensor], Tensor]) -> None:
        """Take the slope of the loss at the outputs, (sample, output); once, before any direction.

        Args:
            slope: ∂J/∂f_L.
            second: The activation's second derivative, elementwise.
        """
        for bend in self._bends:
            bend.copy_(second(bend))
        self._held = (*self._held, slope := native.written(slope))
        self._job.slope = native.address(slope)
        self._run("descend", self._pieces)

    def moved(self, along: Mapping[tuple[int, bool], Tensor]) -> Tensor:
        """What the outputs move by along a direction, (sample, output).

        Args:
            along: By (layer from 0, whether it is the bias); what is left out does not move.
        """
        layers = range(self._network.depth)
        along = {place: native.written(piece) for place, piece in along.items()}
        self._along = along  # alive as long as the job points to it
        job = self._job
        job.along, job.bias_along = (
            native.pointers([along.get((layer, bias)) for layer in layers]) for bias in (False, True)
        )
        found = torch.empty_like(self.output)
        job.moved_outputs = native.address(found)
        self._run("moved_up", self._pieces)
        return found

    def back(self, moved_slope: Tensor, order: Sequence[tuple[int, bool]]) -> list[Tensor]:
        """The Hessian's product with the direction of the last `moved`, by layer and kind in the order asked for.

        Args:
            moved_slope: What the slope at the outputs moves by, (sample, output).
            order: (layer from 0, whether it is the bias).
        """
        job = self._job
        moved_slope = native.written(moved_slope)
        sums = self._x.new_empty(self._blocks, job.numbers)
        job.moved_slope, job.found = native.address(moved_slope), native.address(sums)
        self._run("moved_down", self._blocks)
        return _by_layer(self._network, sums, order)


def product_of_squares(
    network: Network,
    x: Tensor,
    target: Tensor,
    factor: float,
    along: Mapping[tuple[int, bool], Tensor],
    order: Sequence[tuple[int, bool]],
) -> list[Tensor]:
    """The product of a direction with the Hessian of c Σ (f_L − target)², by layer and kind in the order asked for.

    One call takes each piece of samples all the way, and keeps nothing of it.

    Args:
        network: One that `serves` takes, of a piecewise linear activation.
        x: (sample, input).
        target: (sample, output), of the type of `x`.
        factor: c.
        along: The direction, by (layer from 0, whether it is the bias); what is left out does not move.
        order: (layer from 0, whether it is the bias).

    Raises:
        MemoryError: if there is no memory for a second copy of the parameters.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    _, block, blocks = _shared_out(len(x))
    target, along = native.written(target), {place: native.written(piece) for place, piece in along.items()}
    job = _job(network, x, block, along)
    sums = x.new_empty(blocks, job.numbers)
    job.found = native.address(sums)
    job.targets, job.factor = native.address(target), 2 * factor
    _run(native.function(library, "of_squares", x.dtype), job, blocks, network)
    return _by_layer(network, sums, order)


def _job(network: Network, x: Tensor, block: int, along: Mapping[tuple[int, bool], Tensor]) -> Job:
    """A call's argument as far as every call needs it."""
    layers = range(network.depth)
    job = Job(
        network.depth,
        native.array(ctypes.c_int64, network.widths),
        len(x),
        block,
        compiled_activations.kind(network.activation),
        network.activation.leak or 0.0,
        native.pointers(network.weights),
        native.pointers(network.biases),
        *(native.pointers([along.get((layer, bias)) for layer in layers]) for bias in (False, True)),
        native.address(x),
    )
    job.numbers = sum(_sizes(network))
    return job


def _shared_out(samples: int) -> tuple[int, int, int]:
    """Pieces of some samples, pieces per block, and blocks."""
    pieces = -(-samples // PIECE)
    block = max(BLOCK, -(-pieces // BLOCKS))
    return pieces, block, -(-pieces // block)


def _strides(network: Network) -> list[int]:
    """Numbers in a row of what is found of each layer: its input nodes, the bias, and padding."""
    dtype = network.weights[0].dtype
    return [native.padded(n + 1, dtype) for n in network.widths[:-1]]


def _sizes(network: Network) -> list[int]:
    return [n * s for n, s in zip(network.widths[1:], _strides(network), strict=True)]


def _run(call: Any, job: Job, count: int, network: Network) -> None:
    """Call compiled code with items 0..count-1, shared out over torch's threads."""

    def part(first: int, last: int) -> int:
        return int(call(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(part, list(native.shares(count))):
        raise MemoryError(f"curvature: no memory for a second copy of the parameters of widths {network.widths}")


def _by_layer(network: Network, sums: Tensor, order: Sequence[tuple[int, bool]]) -> list[Tensor]:
    """What blocks found, added, by layer and kind in the order asked for."""
    widths, strides = network.widths, _strides(network)
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    layers = [each.view(-1, s) for each, s in zip(total.split(_sizes(network)), strides, strict=True)]
    return [layers[at][:, widths[at]] if bias else layers[at][:, : widths[at]] for at, bias in order]
