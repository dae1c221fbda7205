"""Training steps gone back through in compiled code: derivatives in all that they started from.

compiled_adjoint.cpp is built and called by `native`.  A `Passage` takes steps of training, keeps what they went
through, and goes back without a graph or a Hessian.  It serves fully connected networks with a piecewise linear
activation and no BatchNorm, in float64 on a CPU, trained on batches by SGD with or without momentum.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
class Steps:
    """Steps of training: what they take beside the state.

    Attributes:
        inputs, targets: (member, sample, ...).
        rows: The samples of each step, (member, step, batch).
        rates: Learning rate of each step.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    rates: Sequence[float]


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


class Passage:
    """Members that have taken some steps, and can go back.  They take `bytes_of_step` for each step while it lives."""

    def __init__(self, network: Network, state: Sequence[Named], rule: Rule, steps: Steps) -> None:
        """Take the steps.

        Args:
            network: The members' architecture, which `refusal` has nothing against, as with `rule`.
            state: Parameters before the first step and, with momentum, moments, name → (member, ...); overwritten by
                those after the last.
            rule: Of all steps but for the rates.
            steps: The steps.

        Raises:
            IndexError: if rows have an index outside the samples.
            MemoryError: if there is no memory for what the steps go through.
        """
        library = native.load(SOURCE, Job)
        assert library is not None
        samples = steps.inputs.shape[1]
        rows = native.written(steps.rows)
        self.members, count, _ = rows.shape
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < samples:
            raise IndexError(
                f"forth: rows reach from {int(rows.min())} to {int(rows.max())}; samples: 0..{samples - 1}"
            )
        self._depth = network.depth
        # all that the struct points to lives as long as it does
        self._by_rate = torch.zeros(self.members, count, dtype=torch.float64)
        self._held: list[object] = [held := (native.written(steps.inputs), native.written(steps.targets)), rows, *state]
        tensors = [*held, *(t for named in state for t in named.values())]
        assert all(t.is_contiguous() and t.dtype == torch.float64 for t in tensors)
        self._job = self._described(network, state, rule, steps, held, rows)
        forth, self._back, drop = (native.function(library, name, torch.float64) for name in ("forth", "back", "drop"))
        forth.restype, drop.restype, self._back.restype = ctypes.c_void_p, None, None  # type: ignore[attr-defined]
        self._passed: list[int | None] = [None] * self.members
        self._drop = weakref.finalize(self, _dropped, drop, self._passed)

        def one(member: int, _next: int) -> int:
            self._passed[member] = forth(ctypes.byref(self._job), ctypes.c_int64(member))
            return self._passed[member] is None

        if native.each(one, self._each):
            self._drop()
            raise MemoryError(f"forth: no memory for what {count} steps of widths {network.widths} go through")

    def _described(
        self,
        network: Network,
        state: Sequence[Named],
        rule: Rule,
        steps: Steps,
        held: tuple[Tensor, Tensor],
        rows: Tensor,
    ) -> Job:
        """The struct of a call, without slopes; `held` are the inputs and targets."""
        nothing = [native.pointers([None] * self._depth)] * 4
        return Job(
            self._depth,
            native.array(ctypes.c_int64, network.widths),
            rows.shape[2],
            rows.shape[1],
            held[0].shape[1],
            network.activation.leak or 0.0,
            rule.loss is CROSS_ENTROPY,
            *self._pointers(state),
            *nothing,
            *(native.address(t) for t in held),
            native.address(rows),
            native.array(ctypes.c_double, steps.rates),
            native.array(ctypes.c_double, rule.factors or [1.0] * self._depth),
            rule.momentum,
            rule.weight_decay,
            METHODS[rule.name],
            rule.decay_biases,
            native.array(ctypes.c_uint8, [layer + 1 in rule.frozen for layer in range(self._depth)]),
            native.address(self._by_rate),
        )

    @property
    def _each(self) -> list[tuple[int, int]]:
        return [(member, member + 1) for member in range(self.members)]

    def _pointers(self, named: Sequence[Named]) -> list[ctypes.Array]:
        """Weights and biases of each layer, of parameters and moments; null where there are none."""
        every = [*named, *[{}] * (2 - len(named))]
        return [
            native.pointers([held.get(f"{name}_{layer + 1}") for layer in range(self._depth)])
            for held in every
            for name in ("weight", "bias")
        ]

    def back(
        self,
        slopes: Sequence[Named],
        by_weight: Tensor | None = None,
        by_target: Tensor | None = None,
        by_input: Tensor | None = None,
    ) -> Tensor:
        """The slopes in the rate of each step, (member, step); goes back once, and gives up what was kept.

        Args:
            slopes: Of an observable in the state after the last step, as `state`; overwritten by those before the
                first.
            by_weight, by_target, by_input: Sums of the slopes in the samples' weights, targets and inputs, (member,
                sample, ...), which are added to.
        """
        sums = (by_weight, by_target, by_input)
        tensors = [*(t for named in slopes for t in named.values()), *(t for t in sums if t is not None)]
        assert all(t.is_contiguous() and t.dtype == torch.float64 for t in tensors)
        job = self._job
        job.slopes, job.bias_slopes, job.first_slopes, job.first_bias_slopes = pointers = self._pointers(slopes)
        job.by_weight, job.by_target, job.by_input = (None if t is None else native.address(t) for t in sums)

        def one(member: int, _next: int) -> int:
            self._back(ctypes.c_void_p(self._passed[member]), ctypes.c_int64(member))
            return 0

        native.each(one, self._each)
        self._drop()
        del pointers
        return self._by_rate


def _dropped(drop: Callable[..., Any], passed: list[int | None]) -> None:
    for place in passed:
        if place is not None:
            drop(ctypes.c_void_p(place))
    passed.clear()


def bytes_of_step(network: Network, batch: int, *, moments: bool) -> int:
    """What a step of one member goes through, in bytes; with `moments` the parameters are kept, too.

    Steps in which weights grow or shrink many times over hold the parameters beside this: a few of a thousand where
    training is not about to diverge.
    """
    each = native.padded(batch, torch.float64)
    hidden = [native.padded(n + 1, torch.float64) for n in network.widths[1:-1]]
    parameters = sum(2 * n * native.padded(below + 1, torch.float64) for below, n in itertools.pairwise(network.widths))
    outputs = native.padded(network.widths[-1], torch.float64)
    return 8 * (each * (sum(hidden) + sum(network.widths[1:]) + outputs + 1) + moments * parameters)
