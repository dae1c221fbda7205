"""Integrates gradient flow dθ/dt = −∇L for many members at once.

The flow is stiff (the Hessian's largest eigenvalue is near 100, times reach 1e5), which rules out explicit methods.
Two implicit methods use the exact Hessian: Rodas4(3), of order 4, and at tolerances below 1e-6, where its steps would
be many, Radau IIA of order 9.  Members are computed in one batch, each with its own step size, and leave the batch when
they are done.

Source: Hairer & Wanner (1996), Solving Ordinary Differential Equations II.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.arguments import NUMBERS, takes
from tsdyn.flow.radau import Radau
from tsdyn.flow.rodas import Rodas
from tsdyn.flow.stationary import LOSS, Loss, chunk_size, with_rows
from tsdyn.flow.steps import Attempt, Limits, Method

_METHODS: Mapping[str, type[Rodas] | type[Radau]] = {"rodas": Rodas, "radau": Radau}
#: Relative tolerance below which Radau's steps cost less than Rodas's.
_FINE = 1e-6

#: Reasons for which a member stops.
REASONS = ("time", "gradient", "singular", "steps", "not finite")
_RUNNING = -1


@dataclass
class _State:
    """State of the members of one chunk; arrays are (member, …)."""

    y: Tensor
    t: Tensor
    h: Tensor
    reason: Tensor
    steps: Tensor
    rejected: Tensor
    path: Tensor  # (member, time, parameter)
    recorded: Tensor  # output times passed
    gradient: Tensor  # at y


@dataclass
class _Chunk:
    """Members that are computed together."""

    state: _State
    method: Method

    def arrays(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name, (member, …) each."""
        return {field.name: getattr(self.state, field.name) for field in fields(_State)} | self.method.memory()


@takes(loss=LOSS, initial=NUMBERS)
def gradient_flow(
    loss: Loss | Callable[[Tensor], Tensor],
    initial: ArrayLike | Tensor,
    *,
    times: ArrayLike | None = None,
    end: float | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    gradient_tolerance: float = 1e-7,
    least_norm: float = 1e-6,
    max_steps: int = 20_000,
    method: str = "auto",
    seeds: Sequence[int] | None = None,
) -> xr.Dataset:
    """Trajectories of gradient flow dθ/dt = −∇L from each initial row to where it stops.

    Args:
        loss: With gradient and Hessian: `PopulationLoss`, `FunctionLoss`, or your own; or a function of one row, which
            becomes a `FunctionLoss`.
        initial: Rows of parameters (member, parameter), or one row.
        times: Increasing output times, e.g. ``np.geomspace(1e-2, 1e5, 200)``; without them only the end is kept.
        end: Time at which members stop; the last output time unless given, 1e9 if there are none either.
        rtol: Allowed local error per step, relative to each parameter, …
        atol: … and absolute.
        gradient_tolerance: A member whose |∇|_∞ falls below this has converged and stops; 0 to continue to `end`.
        least_norm: A member stops if a weight's norm falls below this: relu's loss is singular at w = 0.
        max_steps: Number of steps, rejected ones included, after which a member stops.
        method: ``rodas``, Rodas4(3); ``radau``, Radau IIA of order 9, the faster one for accurate trajectories; or
            ``auto``: ``radau`` at an `rtol` below 1e-6.  The attribute ``method`` of the result says which.
        seeds: Labels of the rows; 0, 1, … unless given.

    Returns:
        Dataset over (seed, time), one seed per row: the named parts of the parameters, ``loss`` and ``gradient_max``,
        NaN beyond a member's end; over (seed,): the coordinate ``stop_reason`` (one of `REASONS`) and ``stop_time``,
        ``stop_loss``, ``stop_gradient_max``, ``steps``, ``rejected``; ``final`` (seed, parameter), the parameters where
        it stopped.

    Raises:
        TypeError: for what is no loss, or no rows of numbers.
        ValueError: for rows of another length than the loss's, times that do not increase or are negative, tolerances
            that are not positive, an unknown method, and for ``radau`` an `rtol` that the loss's type does not resolve.

    Source: Simsek et al. (2023), section 3 (the flow, without ½); Hairer & Wanner (1996), sections IV.8, VI.4.

    Examples:
        >>> import torch
        >>> from tsdyn import flow
        >>> loss = lambda p: 0.5 * ((p - 1.0) ** 2).sum()
        >>> ds = flow.gradient_flow(loss, torch.zeros(3, 2, dtype=torch.float64), times=[0.1, 1.0])
        >>> ds.loss.dims, ds.sizes["seed"]
        (('seed', 'time'), 3)
    """
    loss, rows = with_rows("gradient_flow", loss, initial, "initial")
    at = np.atleast_1d(np.asarray([] if times is None else times, dtype=float))
    if (np.diff(at) <= 0).any() or (at < 0).any() or not np.isfinite(at).all():
        raise ValueError("gradient_flow: times must increase and not be negative")
    if method not in ("auto", *_METHODS):
        raise ValueError(f"gradient_flow: method={method!r}; it is one of auto, {', '.join(_METHODS)}")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"gradient_flow: rtol={rtol}, atol={atol}; both must be positive")
    until = float(end if end is not None else at[-1] if len(at) else 1e9)
    labels = list(range(len(rows))) if seeds is None else list(seeds)
    if len(labels) != len(rows):
        raise ValueError(f"gradient_flow: {len(labels)} labels for {len(rows)} rows")
    limits = Limits(rtol, atol, gradient_tolerance, least_norm, max_steps, until)
    with torch.no_grad():
        flow = Flow(loss, rows, times=at, limits=limits, method=method)
        flow.until(math.inf)
        return _dataset(flow, at, labels, limits)


class Flow:
    """A gradient flow in progress, which can be halted at a time common to all members, stored and resumed.

    The steps are the same as without interruption.

    Args:
        loss: As in `gradient_flow`.
        initial: Rows of parameters (member, parameter).
        times: Increasing output times.
        limits: Tolerances of a step and conditions for stopping.
        method: As in `gradient_flow`.

    Attributes:
        method: Name of the method of integration.
    """

    def __init__(self, loss: Loss, initial: Tensor, *, times: np.ndarray, limits: Limits, method: str = "auto") -> None:
        self.loss, self._limits = loss, limits
        self._times = torch.tensor(np.asarray(times, float), dtype=initial.dtype, device=initial.device)
        kind = _METHODS[("radau" if limits.rtol < _FINE else "rodas") if method == "auto" else method]
        self.method = kind.NAME
        self._chunks = [
            _Chunk(_begun(loss, rows, self._times, limits), kind(loss, rows, limits))
            for rows in initial.split(chunk_size(loss))
        ]

    def until(self, time: float) -> None:
        """Advance every member that has not stopped until it reaches `time`."""
        for chunk in self._chunks:
            state = chunk.state
            while len(index := ((state.reason == _RUNNING) & (state.t < time)).nonzero()[:, 0]):
                state.gradient[index] = _step(self.loss, chunk, index, self._times, self._limits)
            if len(self._chunks) > 1:
                chunk.method.release()

    @property
    def running(self) -> Tensor:
        """Whether each member is still running, (member,)."""
        return self.joined("reason") == _RUNNING

    @property
    def reasons(self) -> np.ndarray:
        """The word of `REASONS` for which each member stopped; only once none is running."""
        found: np.ndarray = np.array(REASONS)[self.joined("reason").numpy()]
        return found

    def joined(self, name: str) -> Tensor:
        """A named array of all members: ``y`` (parameters), ``t`` (times), ``path`` (member, time, parameter), ..."""
        return torch.cat([chunk.arrays()[name] for chunk in self._chunks])

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name; for `restore`."""
        return {name: self.joined(name).numpy() for name in self._chunks[0].arrays()}

    def restore(self, stored: Mapping[str, np.ndarray]) -> None:
        """Continue from a stored `state`."""
        sizes = [len(chunk.state.y) for chunk in self._chunks]
        for name in self._chunks[0].arrays():
            parts = torch.from_numpy(np.array(stored[name])).split(sizes)
            for chunk, part in zip(self._chunks, parts, strict=True):
                chunk.arrays()[name].copy_(part)
        for chunk in self._chunks:
            chunk.method.release()


def _begun(loss: Loss, begin: Tensor, at: Tensor, limits: Limits) -> _State:
    members = len(begin)
    gradient = loss.gradient(begin)
    zeros = begin.new_zeros(members, dtype=torch.int64)
    state = _State(
        begin.clone(),
        begin.new_zeros(members),
        # the flow should turn little within the first step
        1e-2 * (limits.atol + begin.norm(dim=-1)) / gradient.norm(dim=-1).clamp(min=1e-8),
        torch.full_like(zeros, _RUNNING),
        zeros.clone(),
        zeros.clone(),
        begin.new_full((members, len(at), begin.shape[1]), math.nan),
        zeros.clone(),
        gradient,
    )
    if len(at) and at[0] == 0:
        state.path[:, 0], state.recorded[:] = begin, 1
    _stop(loss, state, torch.arange(members, device=begin.device), gradient, limits)
    return state


def _step(loss: Loss, chunk: _Chunk, index: Tensor, times: Tensor, limits: Limits) -> Tensor:
    """Try one step of the members in `index`, accepted or rejected; return the gradient where they are afterwards."""
    state = chunk.state
    y, t, gradient = state.y[index], state.t[index], state.gradient[index]
    h = torch.minimum(state.h[index], limits.end - t)
    tried = chunk.method.attempt(y, h, gradient, index)
    taken = tried.error <= 1
    state.h[index] = h * tried.factor
    state.steps[index] += 1
    state.rejected[index] += ~taken
    moved = index[taken]
    if len(times):
        _record(state, index, times, (t, h, taken), tried)
    state.y[moved], state.t[moved] = tried.end[taken], t[taken] + h[taken]
    now = torch.where(taken[:, None], tried.slope, gradient)
    _stop(loss, state, index, now, limits)
    # no step is small enough for the state to stay finite
    state.reason[index[~taken & (state.h[index] <= 1e-15 * (1e-15 + state.t[index]))]] = REASONS.index("not finite")
    return now


def _record(state: _State, index: Tensor, times: Tensor, step: tuple[Tensor, Tensor, Tensor], tried: Attempt) -> None:
    """Fill in the output times that the steps just taken passed."""
    t, h, taken = step
    low = state.recorded[index]
    high = torch.where(taken, torch.searchsorted(times, t + h, right=True), low)
    for row, member in enumerate(index.tolist()):
        s = ((times[low[row] : high[row]] - t[row]) / h[row])[:, None]
        if len(s):
            state.path[member, low[row] : high[row]] = tried.inside(row, s)
    state.recorded[index] = high


def _stop(loss: Loss, state: _State, index: Tensor, gradient: Tensor, limits: Limits) -> None:
    reason = torch.full_like(index, _RUNNING)
    reason[state.t[index] >= limits.end] = REASONS.index("time")
    reason[state.steps[index] >= limits.steps] = REASONS.index("steps")
    reason[gradient.abs().amax(-1) <= limits.gradient] = REASONS.index("gradient")
    reason[loss.least_norm(state.y[index]) <= limits.norm] = REASONS.index("singular")
    reason[~torch.isfinite(gradient).all(-1)] = REASONS.index("not finite")
    state.reason[index] = reason


def _dataset(flow: Flow, times: np.ndarray, labels: list[int], limits: Limits) -> xr.Dataset:
    loss, joined = flow.loss, flow.joined
    final, path = joined("y"), joined("path")
    per_seed = {
        "stop_time": (joined("t").numpy(), "time at which it stopped"),
        "stop_loss": (loss.value(final).numpy(), "loss where it stopped"),
        "stop_gradient_max": (loss.gradient(final).abs().amax(-1).numpy(), "|∇|_∞ where it stopped"),
        "steps": (joined("steps").numpy(), "steps tried"),
        "rejected": (joined("rejected").numpy(), "steps refused by the error estimate"),
    }
    reasons = np.array(REASONS)[joined("reason").numpy()]
    ds = xr.Dataset(
        {name: ("seed", values, _described(text)) for name, (values, text) in per_seed.items()},
        {"seed": labels, "stop_reason": ("seed", reasons, {"long_name": "why the member stopped"})},
        {
            "method": flow.method,
            "rtol": limits.rtol,
            "atol": limits.atol,
            "gradient_tolerance": limits.gradient,
            "end": limits.end,
            "time": "t of dθ/dt = −∇L, L as the loss gives it; the population loss has no ½",
        },
    )
    ds["final"] = ("seed", "parameter"), final.numpy(), _described("parameters where it stopped")
    if len(times):
        ds = ds.assign_coords(time=("time", times, {"units": "1", "long_name": "time t of dθ/dt = −∇L"}))
        for name, (dims, values) in loss.labelled(path).items():
            ds[name] = ("seed", "time", *dims), values.numpy(), _described(name)
        ds["loss"] = ("seed", "time"), loss.value(path).numpy(), _described("loss L")
        slope = loss.gradient(path).abs().amax(-1).numpy()
        ds["gradient_max"] = ("seed", "time"), slope, _described("|∇L|_∞")
    return ds


def _described(text: str) -> dict[str, str]:
    return {"units": "1", "long_name": text, "source": "Simsek et al. 2023 (arXiv 2311.01644), section 3"}
