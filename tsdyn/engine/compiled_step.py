"""The engine's compiled step: compiled_step.cpp, built and called by `native`.

It serves every activation, loss, optimizer and option of tsdyn's own, for fully connected networks with or without
BatchNorm on a CPU; other backends train everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tsdyn.engine import compiled_activations, native
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble, Named
from tsdyn.engine.loss import CROSS_ENTROPY, LOSSES
from tsdyn.engine.rule import OPTIMIZERS, Rule
from tsdyn.networks.batch_norm import require_two
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_step.cpp"
#: Number of an optimizer in the C++ code's Method.
METHODS = {"sgd": 0, "momentum": 1, "nesterov": 2, "adam": 3, "adamw": 4}
#: `Rule.options` that it serves.
OPTIONS = frozenset({"factors", "clip", "decay_biases"})


class Job(ctypes.Structure):
    """The argument of a call; compiled_step.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("entropy", ctypes.c_int64),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("first_weights", native.Pointers),
        ("first_biases", native.Pointers),
        ("second_weights", native.Pointers),
        ("second_biases", native.Pointers),
        ("means", native.Pointers),
        ("variances", native.Pointers),
        ("scales", native.Pointers),
        ("shifts", native.Pointers),
        ("first_scales", native.Pointers),
        ("first_shifts", native.Pointers),
        ("second_scales", native.Pointers),
        ("second_shifts", native.Pointers),
        ("norm_first", ctypes.POINTER(ctypes.c_uint8)),
        ("floors", ctypes.POINTER(ctypes.c_double)),
        ("follow", ctypes.POINTER(ctypes.c_double)),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rates", ctypes.POINTER(ctypes.c_double)),
        ("factors", ctypes.POINTER(ctypes.c_double)),
        ("momentum", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("beta_1", ctypes.c_double),
        ("beta_2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("clip", ctypes.c_double),
        ("method", ctypes.c_int64),
        ("decay_biases", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("frozen", ctypes.POINTER(ctypes.c_uint8)),
        ("taken", ctypes.c_int64),
    )


def own_part(ensemble: Ensemble, rule: Rule) -> str | None:
    """The part of a user's own that keeps fully connected members from the compiled step; None if there is none."""
    network = _network(ensemble)
    if network is None:
        return None
    if compiled_activations.kind(network.activation) is None:
        return f"activation {network.activation.name!r}"
    if LOSSES.get(rule.loss.name) is not rule.loss:
        return f"loss {rule.loss.name!r}"
    if OPTIMIZERS.get(rule.name) is not rule.optimizer:
        return f"optimizer {rule.name!r}"
    return None


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether the compiled step can train these members with this rule and loss."""
    network = _network(ensemble)
    return (
        network is not None
        and all(norm is None or norm.momentum is not None for norm in network.norms)
        and own_part(ensemble, rule) is None
        and rule.name in METHODS
        and rule.options <= OPTIONS
        and native.serves(list(ensemble.tensors()), SOURCE, Job)
    )


def _network(ensemble: Ensemble) -> Network | None:
    """The architecture if it is a network without convolutions."""
    network = ensemble.architecture
    return network if type(network) is Network and not network.convolutional else None


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones.

    Members are shared out over torch's threads; a member's result depends neither on the others nor on the threads.

    Raises:
        IndexError: if rows have an index outside the samples.
        ValueError: for BatchNorm with batches of one sample.
        MemoryError: if there is no memory for a second copy of a member's parameters.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    inputs, targets = native.written(batches.inputs), native.written(batches.targets)
    rows = None if batches.rows is None else native.written(batches.rows)
    members, samples, _ = inputs.shape
    if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < samples:
        raise IndexError(f"train: rows reach from {int(rows.min())} to {int(rows.max())}; samples are 0..{samples - 1}")
    job = _job(block, inputs, targets, rows, batches.steps, rule, taken)
    function = native.function(library, "train", inputs.dtype)

    def one(member: int, _next: int) -> int:
        return int(function(ctypes.byref(job), ctypes.c_int64(member)))

    if native.each(one, [(member, member + 1) for member in range(members)]):
        raise MemoryError(f"train: no memory for a second copy of a member of widths {_widths(block)}")


def _widths(block: Ensemble) -> list[int]:
    return [block.weights[0].shape[2], *(w.shape[1] for w in block.weights)]


def _job(
    block: Ensemble, inputs: Tensor, targets: Tensor, rows: Tensor | None, steps: int, rule: Rule, taken: int
) -> Job:
    network = _network(block)
    assert network is not None
    activation, depth = network.activation, block.depth
    norms = network.norms
    batch = inputs.shape[1] if rows is None else rows.shape[2]
    if any(norm is not None for norm in norms):
        require_two(batch)
    moments: list[Named] = [block.moments[name] for name in rule.optimizer.moments]
    moments += [{}] * (2 - len(moments))

    least = torch.finfo(inputs.dtype).tiny  # torch's BatchNorm refuses 0
    rates = rule.rates(torch.empty(block.members, dtype=torch.float64, device="cpu"))

    def named(name: str, *held: Named) -> list[ctypes.Array]:
        """Pointers to the tensors of that name in each layer, from each of the mappings; null for those not there."""
        return [native.pointers([each.get(f"{name}_{layer + 1}") for layer in range(depth)]) for each in held]

    def both(names: Sequence[str], *held: Named) -> list[ctypes.Array]:
        return [found for each in held for name in names for found in named(name, each)]

    return Job(
        depth,
        native.array(ctypes.c_int64, _widths(block)),
        batch,
        steps,
        inputs.shape[1],
        compiled_activations.kind(activation),
        activation.leak or 0.0,
        rule.loss is CROSS_ENTROPY,
        *both(("weight", "bias"), block.values, *moments),
        *both(("norm_mean", "norm_variance"), block.buffers),
        *both(("norm_scale", "norm_shift"), block.values, *moments),
        native.array(ctypes.c_uint8, [network.frame.norm_first(i) for i in range(len(norms))]),
        native.array(ctypes.c_double, [0.0 if n is None else max(n.eps, least) for n in norms]),
        native.array(ctypes.c_double, [0.0 if n is None else n.momentum for n in norms]),
        native.address(inputs),
        native.address(targets),
        None if rows is None else native.address(rows),
        native.array(ctypes.c_double, rates.tolist()),
        native.array(ctypes.c_double, rule.factors or [1.0] * depth),
        rule.momentum,
        rule.weight_decay,
        rule.beta_1,
        rule.beta_2,
        rule.epsilon,
        rule.clip or 0.0,
        METHODS[rule.name],
        rule.decay_biases,
        rule.normalize,
        native.array(ctypes.c_uint8, [layer + 1 in rule.frozen for layer in range(depth)]),
        taken,
    )
