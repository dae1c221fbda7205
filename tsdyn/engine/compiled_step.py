"""The engine's compiled step: compiled_step.cpp, built and called by `native`.

It serves SGD, momentum and Adam on the squared error, for fully connected networks of piecewise linear activation on a
CPU; other backends train everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdyn.engine import batched, native
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.loss import MSE
from tsdyn.engine.rule import Rule

SOURCE = native.FOLDER / "compiled_step.cpp"
#: Optimizers and losses that the C++ code implements; it serves no `Rule.options`.
RULES, LOSSES = ("sgd", "momentum", "adam"), (MSE,)


class Job(ctypes.Structure):
    """The argument of a call; compiled_step.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("first_weights", native.Pointers),
        ("first_biases", native.Pointers),
        ("second_weights", native.Pointers),
        ("second_biases", native.Pointers),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rates", ctypes.POINTER(ctypes.c_double)),
        ("momentum", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("beta_1", ctypes.c_double),
        ("beta_2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("adam", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("frozen", ctypes.POINTER(ctypes.c_uint8)),
        ("taken", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Layers:
    """One tensor per weight and bias, lowest layer first: the parameters, or one of an optimiser's moments.

    Attributes:
        weights: Each (member, node, input_node).
        biases: Each (member, node), or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether the compiled step can train these members with this rule and loss."""
    network = ensemble.connected
    return (
        network is not None
        and network.activation.piecewise_linear
        and rule.name in RULES
        and not rule.options
        and rule.loss in LOSSES
        and native.serves(list(ensemble.tensors()), SOURCE, Job)
    )


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    if batches.rows is None:  # products of a whole data set are large, and torch's are as quick for those
        return batched.advance(block, batches, rule, taken)
    layers = [Layers(block.weights, block.biases)]
    layers += [Layers(*block.layers(block.moments[name])) for name in rule.optimizer.moments]
    assert block.connected is not None
    leak = block.connected.activation.leak
    assert leak is not None
    train(
        layers,
        batches.inputs.contiguous(),
        batches.targets.contiguous(),
        batches.rows.contiguous(),
        rule.rates(torch.empty(block.members, dtype=torch.float64, device="cpu")),
        leak=leak,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        adam=(rule.beta_1, rule.beta_2, rule.epsilon) if rule.name == "adam" else None,
        frozen=rule.frozen,
        normalize=rule.normalize,
        taken=taken,
    )
    return None


def train(
    layers: Sequence[Layers],
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    rates: Tensor,
    *,
    leak: float,
    momentum: float,
    weight_decay: float,
    adam: tuple[float, float, float] | None,
    frozen: Sequence[int],
    normalize: bool,
    taken: int,
) -> None:
    """Take steps of SGD or Adam on ½ E‖f* − f‖², in place; members are shared out over torch's threads.

    A member's result does not depend on the others, nor on the number of threads.

    Args:
        layers: Parameters of all members, then the first and the second moments if the rule has any.
        inputs: (member, sample, input).
        targets: (member, sample, output).
        rows: Indices of the samples in each batch, (member, step, batch), int64.
        rates: Learning rates, (member,), float64.
        leak: Slope of the hidden activation below 0.
        momentum, weight_decay, normalize: As in `rule.Rule`.
        adam: Adam's β₁, β₂ and ε; None for SGD.
        frozen: Layers 1..L that are not updated.
        taken: Number of steps taken before.

    Raises:
        IndexError: if `rows` has an index outside the samples.
        MemoryError: if there is no memory for a second copy of a member's parameters.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    members, samples, width = inputs.shape
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < samples:
        raise IndexError(f"train: rows reach from {int(rows.min())} to {int(rows.max())}; samples are 0..{samples - 1}")
    widths = [width, *(w.shape[1] for w in layers[0].weights)]
    depth = len(widths) - 1
    tensors: list[Sequence[Tensor | None]] = [part for each in layers for part in (each.weights, each.biases)]
    tensors += [[None] * depth] * (6 - len(tensors))
    beta_1, beta_2, epsilon = adam or (0.0, 0.0, 0.0)
    job = Job(
        depth,
        native.array(ctypes.c_int64, widths),
        rows.shape[2],
        rows.shape[1],
        samples,
        leak,
        *map(native.pointers, tensors),
        inputs.data_ptr(),
        targets.data_ptr(),
        rows.data_ptr(),
        native.array(ctypes.c_double, rates.tolist()),
        momentum,
        weight_decay,
        beta_1,
        beta_2,
        epsilon,
        adam is not None,
        normalize,
        native.array(ctypes.c_uint8, [layer + 1 in frozen for layer in range(depth)]),
        taken,
    )
    function = native.function(library, "train", inputs.dtype)

    def one(member: int, _next: int) -> int:
        return int(function(ctypes.byref(job), ctypes.c_int64(member)))

    if native.each(one, [(member, member + 1) for member in range(members)]):
        raise MemoryError(f"train: no memory for a second copy of a member of widths {widths}")
