"""The compiled step of relu ConvNets with or without BatchNorm: compiled_convnet.cpp, built and called by `native`.

It computes the gradients of all parameters of one member after another, which `Ensemble.take` turns into a step of
all.  What it computes on the way lies in memory that serves all members of a thread, and is kept from epoch to epoch.
For a loss of a user's own as many members as there are threads are stopped at their outputs, and torch computes the
slope of the loss in them.  A member's result does not depend on the others or on the number of threads.

The step that it must agree with is `propagated.step`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from tsdyn.engine import native
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble, Named, layer_of
from tsdyn.engine.loss import CROSS_ENTROPY, MSE, Loss
from tsdyn.engine.rule import Rule
from tsdyn.networks.batch_norm import require_two
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_convnet.cpp"
#: Places of BatchNorm, as in compiled_convnet.cpp; 0 is none.
PLACES = {"before": 1, "after": 2}
#: Tensors of a layer, in the order of the job's fields: parameters, buffers.
PARAMETERS, BUFFERS = ("weight", "bias", "norm_scale", "norm_shift"), ("norm_mean", "norm_variance")


class Job(ctypes.Structure):
    """The argument of a call; compiled_convnet.cpp declares the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("depth", "batch", "lowest", "loss")),
        *((name, ctypes.c_int64) for name in ("image_channels", "image_rows", "image_columns")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("channels", "kernel_rows", "kernel_columns")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("paddings", "places")),
        *((name, ctypes.POINTER(ctypes.c_double)) for name in ("epsilons", "momenta")),
        *((name, native.Pointers) for name in ("weights", "biases", "scales", "shifts", "means", "variances")),
        *((name, native.Pointers) for name in ("down_weights", "down_biases", "down_scales", "down_shifts")),
        *((name, ctypes.c_void_p) for name in ("inputs", "targets", "memory", "outputs")),
    )


def unserved(network: Network) -> list[str]:
    """Why a convolutional network is not trained here, one phrase per reason."""
    strides = sorted({stride for stride in network.frame.strides if stride != 1})
    reasons = [f"convolutions of stride {stride} are torch's own" for stride in strides]
    if network.activation.name != "relu":
        reasons.append(f"steps of ConvNets are compiled for relu, not for {network.activation.name}")
    return reasons


def claims(ensemble: Ensemble) -> bool:
    """Whether these members' gradients are computed here: relu ConvNets of stride 1."""
    network = ensemble.architecture
    return (
        type(network) is Network
        and network.convolutional
        and not unserved(network)
        and all(norm is None or norm.momentum is not None for norm in network.norms)
        and native.serves(list(ensemble.tensors()), SOURCE, Job)
    )


def block_size(ensemble: Ensemble, room: int) -> int:
    """How many members' gradients fit in `room` bytes; at least one for each of torch's threads."""
    own = sum(value[0].numel() * value.element_size() for value in ensemble.values.values())
    return max(room // own, torch.get_num_threads())


@dataclass
class Step:
    """The gradients of a block's members, over memory that is kept.

    Attributes:
        block: Members for which `claims` is true.
        gradients: Name → (member, ...) of what is trained, overwritten by each call.
        bounds: (first, last + 1) of the members of each thread.
        job: The argument of the compiled functions; its arrays keep alive what they point to.
        outputs: For a loss of a user's own, (member, sample, output).
    """

    block: Ensemble
    gradients: Named
    bounds: list[tuple[int, int]]
    job: Job
    outputs: Tensor

    @classmethod
    def of(cls, block: Ensemble, batch: int, frozen: Sequence[int]) -> Step:
        """That of batches of `batch` samples.

        Raises:
            ValueError: for BatchNorm with a single value per node.
            MemoryError: if there is no memory.
        """
        network = block.architecture
        assert isinstance(network, Network)
        for norm, image in zip(network.norms, network.images, strict=False):
            if norm is not None:
                require_two(batch * (1 if image is None else image[1] * image[2]))
        free = {name: tensor for name, tensor in block.values.items() if layer_of(name) not in frozen}
        bounds, top = list(native.shares(block.members)), block.weights[-1]
        key = "compiled_convnet", len(bounds), batch
        if key not in block.kept:
            block.kept[key] = _memory(block, len(bounds), batch)
        own = "compiled_convnet", block.members, tuple(free)
        if own not in block.kept:
            block.kept[own] = {name: torch.empty_like(tensor) for name, tensor in free.items()}
        job = _job(block, batch, block.kept[own], block.kept[key])
        return cls(block, block.kept[own], bounds, job, top.new_empty(block.members, batch, top.shape[1]))

    def __call__(self, x: Tensor, y: Tensor, loss: Loss) -> Named:
        """Gradients of each member's own loss, on inputs `x` (member, sample, input) and targets `y`.

        Raises:
            ValueError: for inputs or targets of another shape or dtype.
        """
        network = self.block.architecture
        assert isinstance(network, Network)
        shape = (*self.outputs.shape[:2], network.widths[0])
        if x.shape != shape or y.shape != self.outputs.shape or not x.dtype == y.dtype == self.outputs.dtype:
            raise ValueError(
                f"train: batches of {tuple(x.shape)} and {tuple(y.shape)}, {x.dtype} and {y.dtype}; these members take "
                f"{shape} and {tuple(self.outputs.shape)}, {self.outputs.dtype}"
            )
        x, y = native.written(x), native.written(y)
        self.job.inputs, self.job.targets = native.address(x), native.address(y)
        if loss is MSE or loss is CROSS_ENTROPY:
            self.job.loss = 1 if loss is MSE else 2
            self._each("step", self.bounds)
            return self.gradients
        self.job.outputs = native.address(self.outputs)
        for count in range(max(last - first for first, last in self.bounds)):
            now = [(first + count, first + count + 1) for first, last in self.bounds if first + count < last]
            self._each("forward", now)
            at = [first for first, _ in now]
            self.outputs[at] = _slope(self.outputs[at], y[at], loss)
            self._each("backward", now)
        return self.gradients

    def _each(self, name: str, bounds: Sequence[tuple[int, int]]) -> None:
        """Call the compiled function of that name, each thread with its own (first, last + 1) of the members."""
        library = native.load(SOURCE, Job)
        assert library is not None
        function = native.function(library, name, self.outputs.dtype)

        def one(thread: int, _next: int) -> int:
            return int(function(ctypes.byref(self.job), *map(ctypes.c_int64, (thread, *bounds[thread]))))

        if native.each(one, [(thread, thread + 1) for thread in range(len(bounds))]):
            raise MemoryError(f"train: no memory for a step of {self.block.depth} layers")


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    step = None
    for count, (x, y) in enumerate(batches, start=taken + 1):
        step = Step.of(block, x.shape[1], rule.frozen) if step is None else step
        block.take(step(x, y, rule.loss), rule, count)


def _slope(outputs: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Slope of each member's loss in its outputs."""
    own = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(vmap(loss.value)(own, y).sum(), own)
    return found


def _memory(block: Ensemble, threads: int, batch: int) -> Tensor:
    """Zeros for what the steps of one member at a time compute on each thread."""
    library, weight = native.load(SOURCE, Job), block.values["weight_1"]
    assert library is not None
    measure: Any = native.function(library, "numbers", weight.dtype)
    measure.restype = ctypes.c_int64
    numbers = measure(ctypes.byref(_job(block, batch, {}, None)))
    if numbers < 0:
        raise MemoryError(f"train: no memory for a step of {block.depth} layers")
    return weight.new_zeros(threads * numbers)


def _job(block: Ensemble, batch: int, gradients: Named, memory: Tensor | None) -> Job:
    network = block.architecture
    assert isinstance(network, Network)
    assert network.frame.image is not None
    depth, linear = network.depth, [weight.ndim == 2 for weight in network.weights]
    norms = [*network.norms, None]
    least = torch.finfo(block.values["weight_1"].dtype).tiny  # torch's BatchNorm refuses 0

    def integers(numbers: Sequence[int]) -> Any:
        return native.array(ctypes.c_int64, numbers)

    def named(names: Sequence[str], held: Named) -> list[ctypes.Array]:
        layers = range(1, depth + 1)
        return [native.pointers([held.get(f"{name}_{layer}") for layer in layers]) for name in names]

    return Job(
        depth,
        batch,
        min((layer_of(name) for name in gradients), default=depth + 1) - 1,
        0,
        *network.frame.image,
        integers([weight.shape[0] for weight in network.weights]),
        integers([0 if flat else weight.shape[2] for flat, weight in zip(linear, network.weights, strict=True)]),
        integers([0 if flat else weight.shape[3] for flat, weight in zip(linear, network.weights, strict=True)]),
        integers([*network.frame.paddings, *[0] * sum(linear)]),
        integers([0 if n is None else PLACES[network.frame.places[i]] for i, n in enumerate(norms)]),
        native.array(ctypes.c_double, [0.0 if n is None else max(n.eps, least) for n in norms]),
        native.array(ctypes.c_double, [0.0 if n is None else n.momentum for n in norms]),
        *named(PARAMETERS, block.values),
        *named(BUFFERS, block.buffers),
        *named(PARAMETERS, gradients),
        None,
        None,
        None if memory is None else native.address(memory),
        None,
    )
