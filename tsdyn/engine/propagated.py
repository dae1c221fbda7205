"""The batched training step of networks with convolutions and BatchNorm: one forward pass of all members, and autograd.

The sum of the members' losses is differentiated once; a member's parameters enter its own loss only, so the gradient
is each member's own.  BatchNorm is in training mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from tsdyn.engine import compiled_convnet, convolution
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble, layer_of, parts_of
from tsdyn.engine.rule import Rule
from tsdyn.networks.batch_norm import BatchNorm, normalized
from tsdyn.networks.network import Network
from tsdyn.networks.propagate import Frame, Parameters, propagate

#: Optimizers that this step was written and tested with.
RULES = ("sgd", "momentum", "nesterov", "adam", "adamw")
#: `Rule.options` that it serves: those of `Ensemble.take`.
OPTIONS = frozenset({"factors", "clip", "decay_biases"})
#: Activations of a block of members and their gradients should stay within a core's share of the last-level cache.
BLOCK_BYTES = 1 << 22


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether this step can train these members with this rule and loss."""
    architecture = ensemble.architecture
    known = rule.name in RULES and rule.options <= OPTIONS
    return type(architecture) is Network and not architecture.plain and known


def block_size(ensemble: Ensemble, batch: int) -> int:
    """How many members' activations and gradients fit in `BLOCK_BYTES`, on CUDA in an eighth of memory; at least 1.

    The compiled step has one member's activations at a time.
    """
    if compiled_convnet.claims(ensemble):
        return compiled_convnet.block_size(ensemble, BLOCK_BYTES)
    architecture = ensemble.architecture
    assert isinstance(architecture, Network)
    numbers = 0
    for image, weight in zip(architecture.images, ensemble.weights, strict=True):
        numbers += 2 * batch * (weight.shape[1] if image is None else image[0] * image[1] * image[2])
    device = ensemble.device
    room = torch.cuda.mem_get_info(device)[1] // 8 if device.type == "cuda" else BLOCK_BYTES
    return max(1, room // (numbers * ensemble.weights[0].element_size()))


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    if compiled_convnet.claims(block):
        compiled_convnet.advance(block, batches, rule, taken)
        return
    for count, (x, y) in enumerate(batches, start=taken + 1):
        step(block, x, y, rule, count)


def step(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, count: int) -> None:
    """Take one step of every member on its own batch, in place.

    Args:
        block: The members; their parameters and running statistics change.
        x: (member, sample, input).
        y: Targets, (member, sample, output).
        rule: The update; running statistics of frozen layers still follow the batches.
        count: Number of steps taken, this one included.

    Raises:
        ValueError: for BatchNorm with batches of one sample.
    """
    architecture = block.architecture
    assert isinstance(architecture, Network)
    free = {n: t.detach().requires_grad_(True) for n, t in block.values.items() if layer_of(n) not in rule.frozen}
    with torch.enable_grad():
        output = _output(Parameters(*parts_of(architecture, block.values | free, block.buffers)), architecture.frame, x)
        objective = vmap(rule.loss.value)(output, y).sum()
        gradients = torch.autograd.grad(objective, list(free.values()))
    block.take(dict(zip(free, gradients, strict=True)), rule, count)


def _output(values: Parameters, frame: Frame, x: Tensor) -> Tensor:
    """f_L of every member on its own batch in training mode, (member, sample, output).

    It is computed by compiled convolutions where there are any, else by `propagate`.
    """
    if frame.image is None or any(stride != 1 for stride in frame.strides) or not convolution.serves(x):
        return propagate(values, frame, x, training=True)[-1].activation
    f = x.transpose(1, 2).contiguous().unflatten(1, frame.image)  # (member, channel, row, column, sample)
    for i, (weight, bias) in enumerate(zip(values.weights, values.biases, strict=True)):
        if weight.ndim == 5:
            edge = frame.paddings[i]
            z = convolution.convolve(F.pad(f, (0, 0, edge, edge, edge, edge)) if edge else f, weight, bias)
        else:
            f = f.flatten(1, -2)
            z = torch.bmm(weight, f) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, f)
        norm = values.norms[i] if i < len(values.norms) else None
        if i == len(values.weights) - 1:
            f = z
        elif norm is None:
            f = frame.activation(z)
        elif frame.norm_first(i):
            f = frame.activation(_normalized(z, norm))
        else:
            f = _normalized(frame.activation(z), norm)
    output: Tensor = f.transpose(1, 2)
    return output


def _normalized(x: Tensor, norm: BatchNorm) -> Tensor:
    """BatchNorm of a tensor (member, node, ..., sample) with the statistics of the batch."""
    flat = x.reshape(1, x.shape[0] * x.shape[1], -1)
    found: Tensor = normalized(flat, norm, training=True).view_as(x)
    return found
