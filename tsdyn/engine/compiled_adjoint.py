"""Training steps gone back through in compiled code: derivatives in all that they started from.

compiled_adjoint.cpp is built and called by `native`.  It takes the steps once more, keeps what they went through, and
goes back without a graph or a Hessian.  It serves fully connected networks with a piecewise linear activation and no
BatchNorm, in float64 on a CPU, trained on batches by SGD with or without momentum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdyn.engine import compiled_activations, native
from tsdyn.engine.ensemble import Named
from tsdyn.engine.loss import CROSS_ENTROPY, LOSSES
from tsdyn.engine.rule import OPTIMIZERS, Rule
from tsdyn.networks.network import Network

SOURCE = native.FOLDER / "compiled_adjoint.cpp"
#: Number of an optimizer in the C++ code's Method.
METHODS = {"sgd": 0, "momentum": 1, "nesterov": 2}
#: `Rule.options` that it serves.
OPTIONS = frozenset({"factors", "decay_biases"})


class Job(ctypes.Structure):
    """The argument of a call; compiled_adjoint.cpp declares and explains the same fields."""

    _fields_ = (
        ("depth", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("leak", ctypes.c_double),
        ("entropy", ctypes.c_int64),
        ("weights", native.Pointers),
        ("biases", native.Pointers),
        ("first_weights", native.Pointers),
        ("first_biases", native.Pointers),
        ("slopes", native.Pointers),
        ("bias_slopes", native.Pointers),
        ("first_slopes", native.Pointers),
        ("first_bias_slopes", native.Pointers),
        ("inputs", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rates", ctypes.POINTER(ctypes.c_double)),
        ("factors", ctypes.POINTER(ctypes.c_double)),
        ("momentum", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("method", ctypes.c_int64),
        ("decay_biases", ctypes.c_int64),
        ("frozen", ctypes.POINTER(ctypes.c_uint8)),
        ("by_rate", ctypes.c_void_p),
        ("by_weight", ctypes.c_void_p),
        ("by_target", ctypes.c_void_p),
        ("by_input", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Stretch:
    """Steps of training: what they take beside the state, and the sums of slopes that going back adds to.

    Attributes:
        inputs, targets: (member, sample, ...).
        rows: The samples of each step, (member, step, batch).
        rates: Learning rate of each step.
        by_weight, by_target, by_input: Slopes in the samples' weights, targets and inputs, (member, sample, ...).
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    rates: Sequence[float]
    by_weight: Tensor | None = None
    by_target: Tensor | None = None
    by_input: Tensor | None = None


def refusal(network: object, rule: Rule, device: torch.device) -> str | None:
    """Why these members and this rule cannot be served; None if they can."""
    reasons = {
        "members are no fully connected networks without BatchNorm": not (type(network) is Network and network.plain),
        "the activation is not piecewise linear": isinstance(network, Network)
        and (network.activation.leak is None or compiled_activations.kind(network.activation) is None),
        f"loss {rule.loss.name!r}": LOSSES.get(rule.loss.name) is not rule.loss,
        f"optimizer {rule.name!r}": rule.name not in METHODS or OPTIMIZERS.get(rule.name) is not rule.optimizer,
        "rows are normalised": rule.normalize,
        "gradients are clipped": not rule.options <= OPTIONS,
        f"device {device.type}": device.type != "cpu",
    }
    found = next((reason for reason, there in reasons.items() if there), None)
    if found is None and native.load(SOURCE, Job) is None:
        return "no compiled code on this machine"
    return found


def back(network: Network, state: Sequence[Named], slopes: Sequence[Named], rule: Rule, given: Stretch) -> Tensor:
    """The slopes in the rate of each step, (member, step); takes the steps of `given` forth and back.

    Args:
        network: The members' architecture, which `refusal` has nothing against, as with `rule`.
        state: Parameters before the first step and, with momentum, moments, name → (member, ...); overwritten by those
            after the last.
        slopes: Of an observable in those after the last step; overwritten by those before the first.
        rule: Of all steps but for the rates.
        given: The steps.

    Raises:
        IndexError: if rows have an index outside the samples.
        MemoryError: if there is no memory for what the steps go through.
    """
    library = native.load(SOURCE, Job)
    assert library is not None
    inputs, targets, rows = given.inputs.contiguous(), given.targets.contiguous(), given.rows.contiguous()
    members, steps, batch = rows.shape
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < inputs.shape[1]:
        raise IndexError(f"back: rows reach from {int(rows.min())} to {int(rows.max())}; samples: {inputs.shape[1]}")
    depth = network.depth
    by_rate = inputs.new_zeros(members, steps)
    held = [[*named, *[{}] * (2 - len(named))] for named in (state, slopes)]
    sums = [given.by_weight, given.by_target, given.by_input]
    tensors = [t for named in [*state, *slopes] for t in named.values()]
    assert all(t.is_contiguous() and t.dtype == torch.float64 for t in [inputs, targets, *tensors])
    assert all(t is None or t.is_contiguous() for t in sums)

    def both(named: Named) -> list[ctypes.Array]:
        names = ("weight", "bias")
        return [native.pointers([named.get(f"{name}_{layer + 1}") for layer in range(depth)]) for name in names]

    job = Job(
        depth,
        native.array(ctypes.c_int64, network.widths),
        batch,
        steps,
        inputs.shape[1],
        network.activation.leak or 0.0,
        rule.loss is CROSS_ENTROPY,
        *(array for named in [*held[0], *held[1]] for array in both(named)),
        inputs.data_ptr(),
        targets.data_ptr(),
        rows.data_ptr(),
        native.array(ctypes.c_double, given.rates),
        native.array(ctypes.c_double, rule.factors or [1.0] * depth),
        rule.momentum,
        rule.weight_decay,
        METHODS[rule.name],
        rule.decay_biases,
        native.array(ctypes.c_uint8, [layer + 1 in rule.frozen for layer in range(depth)]),
        by_rate.data_ptr(),
        *(None if t is None else t.data_ptr() for t in sums),
    )
    function = native.function(library, "back", torch.float64)

    def some(first: int, last: int) -> int:
        return int(function(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last)))

    if native.each(some, list(native.shares(members))):
        raise MemoryError(f"back: no memory for what {steps} steps of widths {network.widths} go through")
    return by_rate


def bytes_of_step(network: Network, batch: int) -> int:
    """What a step goes through beside its parameters, in bytes, about."""
    return 8 * batch * (2 * sum(network.widths[:-1]) + 3 * sum(network.widths[1:]))
