"""The compiled step of relu ConvNets with or without BatchNorm: compiled_convnet.cpp, built and called by `native`.

The outputs of all members of a block are computed, then the slope of the loss in them by torch, and then the gradients
of all parameters, which `Ensemble.take` turns into the step.  What a step computes on the way is kept in memory from
step to step and from epoch to epoch.  A member's result does not depend on the others or on the number of threads.

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
from tsdyn.engine.loss import Loss
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
        *((name, ctypes.c_int64) for name in ("depth", "batch", "lowest")),
        *((name, ctypes.c_int64) for name in ("image_channels", "image_rows", "image_columns")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("channels", "kernel_rows", "kernel_columns")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("paddings", "places")),
        *((name, ctypes.POINTER(ctypes.c_double)) for name in ("epsilons", "momenta")),
        *((name, native.Pointers) for name in ("weights", "biases", "scales", "shifts", "means", "variances")),
        *((name, native.Pointers) for name in ("down_weights", "down_biases", "down_scales", "down_shifts")),
        *((name, ctypes.c_void_p) for name in ("inputs", "memory", "outputs", "slopes")),
    )


def claims(ensemble: Ensemble) -> bool:
    """Whether these members' gradients are computed here: relu ConvNets of stride 1 whose last layer is linear."""
    network = ensemble.architecture
    return (
        type(network) is Network
        and network.convolutional
        and network.activation.name == "relu"
        and network.weights[-1].ndim == 2
        and all(stride == 1 for stride in network.frame.strides)
        and all(norm is None or norm.momentum is not None for norm in network.norms)
        and native.serves(list(ensemble.tensors()), SOURCE, Job)
    )


@dataclass
class Step:
    """The gradients of a block's members, over memory that is kept.

    Attributes:
        block: Members for which `claims` is true.
        gradients: Name → (member, ...) of what is trained, overwritten by each call.
        job: The argument of the compiled functions; its arrays keep alive what they point to.
        outputs, slopes: (member, sample, output).
    """

    block: Ensemble
    gradients: Named
    job: Job
    outputs: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, block: Ensemble, batch: int, frozen: Sequence[int]) -> Step:
        """That of batches of `batch` samples.

        Raises:
            ValueError: for BatchNorm with a single value per node.
        """
        weight = block.values["weight_1"]
        network = block.architecture
        assert isinstance(network, Network)
        for norm, image in zip(network.norms, network.images, strict=False):
            if norm is not None:
                require_two(batch * (1 if image is None else image[1] * image[2]))
        free = {name: tensor for name, tensor in block.values.items() if layer_of(name) not in frozen}
        key = "compiled_convnet", block.members, batch, weight.dtype, tuple(free)
        if key not in block.kept:
            shape = block.members, batch, block.weights[-1].shape[1]
            gradients = {name: torch.empty_like(tensor) for name, tensor in free.items()}
            block.kept[key] = gradients, weight.new_empty(shape), _memory(block, batch)
        gradients, outputs, memory = block.kept[key]
        return cls(block, gradients, _job(block, batch, gradients, outputs, memory), outputs, torch.empty_like(outputs))

    def __call__(self, x: Tensor, y: Tensor, loss: Loss) -> Named:
        """Gradients of each member's own loss, on inputs `x` (member, sample, input) and targets `y`."""
        x = native.written(x)
        self.job.inputs = native.address(x)
        self._each("forward")
        slopes = native.written(_slope(self.outputs, y, loss))
        self.job.slopes = native.address(slopes)
        self._each("backward")
        return self.gradients

    def _each(self, name: str) -> None:
        library = native.load(SOURCE, Job)
        assert library is not None
        function = native.function(library, name, self.outputs.dtype)

        def one(member: int, _next: int) -> int:
            function(ctypes.byref(self.job), ctypes.c_int64(member))
            return 0

        native.each(one, [(member, member + 1) for member in range(self.block.members)])


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    step = None
    for count, (x, y) in enumerate(batches, start=taken + 1):
        step = Step.of(block, x.shape[1], rule.frozen) if step is None else step
        block.take(step(x, y, rule.loss), rule, count)


def _slope(outputs: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Slope of each member's loss in its outputs."""
    if loss.negative_gradient is not None:
        return loss.residual(outputs, y).mul_(-1 / outputs.shape[1])
    own = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(vmap(loss.value)(own, y).sum(), own)
    return found


def _memory(block: Ensemble, batch: int) -> Tensor:
    """Zeros for what the members' steps compute."""
    library, weight = native.load(SOURCE, Job), block.values["weight_1"]
    assert library is not None
    measure = native.function(library, "numbers", weight.dtype)
    measure.restype = ctypes.c_int64
    return weight.new_zeros(block.members * measure(ctypes.byref(_job(block, batch, {}, None, None))))


def _job(block: Ensemble, batch: int, gradients: Named, outputs: Tensor | None, memory: Tensor | None) -> Job:
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
        None if memory is None else native.address(memory),
        None if outputs is None else native.address(outputs),
        None,
    )
