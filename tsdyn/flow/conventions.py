"""Converts rates, noise and time of other codes to the units of `flow.order_parameters` (Goldt et al. 2019)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Online:
    """An online learning problem in Goldt's units: fields w·x/√N, w += η/√N v σ'(l) Δ x, α = steps/N.

    Attributes:
        learning_rate: η.
        second_learning_rate: η₂.
        weight_decay: λ.
        noise: Standard deviation of the noise on the teacher's output.
        outgoing: `v` and `A`; None if that code draws or learns them, so that only its archive holds them.
        time_per_alpha: The other code's time while α grows by 1.
    """

    learning_rate: float
    second_learning_rate: float
    weight_decay: float
    noise: float
    outgoing: tuple[np.ndarray, np.ndarray] | None
    time_per_alpha: float

    @property
    def v(self) -> np.ndarray:
        """Outgoing weights of the student, (node,), at the start.

        Raises:
            ValueError: where the convention does not fix them.
        """
        return self._known()[0]

    @property
    def A(self) -> np.ndarray:
        """Outgoing weights of the teacher, (teacher_node,); raises as `v`."""
        return self._known()[1]

    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        if self.outgoing is None:
            raise ValueError(
                "convention: the second layer is the networks' own here, drawn or learned; take v and A from "
                "tsdyn.analysis.order_parameters.order_parameters(ds) or flow.overlaps(student, teacher), or give "
                "them, convention(..., v=..., A=...)"
            )
        return self.outgoing

    @property
    def rates(self) -> dict[str, float]:
        """The rates as keyword arguments of `flow.order_parameters` and `flow.online`."""
        names = ("learning_rate", "second_learning_rate", "weight_decay", "noise")
        return {name: getattr(self, name) for name in names}

    def alpha(self, time: Any) -> Any:
        """α at the other code's time."""
        return np.asarray(time) / self.time_per_alpha

    def time(self, alpha: Any) -> Any:
        """The other code's time at α."""
        return np.asarray(alpha) * self.time_per_alpha


class _Given(NamedTuple):
    learning_rate: float
    noise: float
    weight_decay: float
    nodes: int
    teacher_nodes: int
    inputs: int
    both: bool
    std: float


def _goldt(given: _Given, student: float = 1.0, teacher: float = 1.0) -> Online:
    return Online(
        given.learning_rate,
        given.learning_rate if given.both else 0.0,
        given.weight_decay,
        given.noise,
        (np.full(given.nodes, student), np.full(given.teacher_nodes, teacher)),
        1.0,
    )


def _means(given: _Given) -> Online:
    """Convention where outputs are means over nodes, the noise is given as a variance, and time is γα/p."""
    plain = _goldt(given._replace(noise=math.sqrt(given.noise)), 1 / given.nodes, 1 / given.teacher_nodes)
    return replace(plain, time_per_alpha=given.learning_rate / given.nodes)


def _steps(factor: float) -> Callable[[_Given], Online]:
    """Convention of SGD on weights w/√N, where a step of rate r is `factor`·r times Goldt's −∇eg; time counts steps.

    With inputs std·z the fields are those of weights std·w on z, whose steps are std² times as large.
    """

    def converted(given: _Given) -> Online:
        rate = factor * given.inputs * given.learning_rate
        plain = _goldt(given._replace(learning_rate=rate))
        return replace(
            plain,
            learning_rate=rate * given.std**2,
            weight_decay=given.inputs * given.learning_rate * given.weight_decay,
            time_per_alpha=float(given.inputs),
            outgoing=None,
        )

    return converted


def _flow_without_half(given: _Given) -> Online:
    """Convention of gradient flow dθ/dt = −∇L with L = 2eg: t = ηα/2 for any η; requires batch = ∞."""
    return replace(_goldt(given), time_per_alpha=given.learning_rate / 2)


_CONVENTIONS: Mapping[str, Callable[[_Given], Online]] = {
    "goldt": _goldt,
    "goldt-normalise": lambda given: _goldt(given, 1 / given.nodes, 1 / given.teacher_nodes),
    "goldt-meanfield": lambda given: _goldt(given, given.nodes**-0.5, given.teacher_nodes**-0.5),
    "saad-solla": _goldt,
    "statphys-ml": lambda given: _goldt(given, given.nodes**-0.5, given.teacher_nodes**-0.5),
    "committee_learning": _means,
    "tsdyn": _steps(1.0),
    "torch": _steps(2.0),
    "gradient_flow": _flow_without_half,
    "MLPGradientFlow.jl": _flow_without_half,
}
#: Names of the known conventions.
NAMES = tuple(_CONVENTIONS)


def convention(
    name: str,
    *,
    learning_rate: float,
    nodes: int,
    teacher_nodes: int,
    inputs: int | None = None,
    noise: float = 0.0,
    weight_decay: float = 0.0,
    both: bool = False,
    std: float = 1.0,
    v: ArrayLike | None = None,
    A: ArrayLike | None = None,
) -> Online:
    """An online learning problem given in the convention of another code, converted to Goldt's units (`Online`).

    Rates that diverge there diverge here.

    ==================  =================================================================================
    goldt               nn2pp: as they are; v = A = 1, or your own
    goldt-normalise     the same with ``--normalise``: v = 1/K, A = 1/M
    goldt-meanfield     the same with ``--meanfield``: v = 1/√K, A = 1/√M
    saad-solla          v = A = 1
    statphys-ml         v = 1/√K, A = 1/√M
    committee_learning  outputs are means (v = 1/K, A = 1/M), ``noise`` is a variance, time is γα/K
    tsdyn               experiment file: J has ½, weights are w/√N, η = N·rate·std², η₂ = N·rate,
                        λ = N·rate·weight_decay; time counts steps; v and A are the networks' own
    torch               ``MSELoss`` of one output and ``SGD``, weights w/√N: no ½, twice these rates; time counts
                        steps; v and A are the networks' own
    gradient_flow       `flow.gradient_flow` of the population loss: no ½, t = ηα/2; compare ``batch=math.inf``;
                        v = A = 1, or your own
    MLPGradientFlow.jl  the same, if its ``tauinv`` makes its sum over samples a mean
    ==================  =================================================================================

    Args:
        name: One of `NAMES`.
        learning_rate: As that code takes it.
        nodes: Number of student nodes K.
        teacher_nodes: Number of teacher nodes M.
        inputs: N; needed where the code's weights are w/√N (tsdyn, torch).
        noise: As that code takes it.
        weight_decay: As that code takes it.
        both: Whether the second layer learns too, at the same rate.
        std: Standard deviation of the inputs (tsdyn: ``data.std``, torch); others have 1.
        v: Outgoing weights of the student, (node,), in place of the convention's.
        A: Outgoing weights of the teacher, (teacher_node,); give both `v` and `A` or neither.

    Raises:
        ValueError: for an unknown name, numbers out of range, and `inputs` where it is needed and missing.

    Source: Saad & Solla (1995); Goldt et al. (2019); Veiga et al. (2022) for the means.
    """
    if name not in _CONVENTIONS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"convention: no convention {name!r}{hint}; there are {', '.join(NAMES)}")
    if name in ("tsdyn", "torch") and inputs is None:
        raise ValueError(f"convention: {name} has weights w/√N; give inputs=N")
    if nodes < 1 or teacher_nodes < 1 or (inputs is not None and inputs < 1):
        raise ValueError(
            f"convention: nodes={nodes}, teacher_nodes={teacher_nodes}, inputs={inputs}; each is at least 1"
        )
    if not (learning_rate > 0 and noise >= 0 and weight_decay >= 0):
        raise ValueError(
            f"convention: learning_rate={learning_rate}, noise={noise}, weight_decay={weight_decay}; the first is "
            "positive, the others are not negative"
        )
    if name == "gradient_flow" and noise:
        raise ValueError("convention: gradient flow on the population has no noise; give noise=0")
    if not std > 0 or (std != 1 and name not in ("tsdyn", "torch")):
        raise ValueError(f"convention: std={std}; it must be positive, and 1 except for tsdyn and torch")
    given = _Given(learning_rate, noise, weight_decay, nodes, teacher_nodes, inputs or 1, both, std)
    found = _CONVENTIONS[name](given)
    if v is None and A is None:
        return found
    outgoing = np.array(v, dtype=float), np.array(A, dtype=float)  # of None, NaN of no dimensions
    if outgoing[0].shape != (nodes,) or outgoing[1].shape != (teacher_nodes,):
        raise ValueError(
            f"convention: v has shape {outgoing[0].shape}, A {outgoing[1].shape}; ({nodes},) and ({teacher_nodes},)"
        )
    return replace(found, outgoing=outgoing)
