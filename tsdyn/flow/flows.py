"""Integrates gradient flow dθ/dt = −∇L for many members at once.

The flow is stiff (the Hessian's largest eigenvalue is near 100, times reach 1e5), which rules out explicit methods.
The integrator is linearly implicit: Rodas4(3), an L-stable Rosenbrock method of order 4, with the exact Hessian; a step
costs one Hessian, one factorisation and six gradients.  Members are computed in one batch, each with its own step size,
and leave the batch when they are done.

Source: Hairer & Wanner (1996), Solving Ordinary Differential Equations II, section VI.4 (RODAS, method 1).
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
from tsdyn.flow.stationary import LOSS, Loss, chunk_size, with_rows
from tsdyn.networks.members_alone import combined

_GAMMA = 0.25
#: Coefficients of Rodas4(3): stage i starts from y + Σ_j A[i][j] k_j, with Σ_j C[i][j] k_j / h on its right-hand side;
#: the last two stages give the steps of order 3 and 4, whose difference, the last k, is the error estimate.
_A = (
    (),
    (1.544,),
    (0.9466785280815826, 0.2557011698983284),
    (3.314825187068521, 2.896124015972201, 0.9986419139977817),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950, 1.0),
)
_C = (
    (),
    (-5.6688,),
    (-2.430093356833875, -0.2063599157091915),
    (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
    (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160),
    (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
)
#: Coefficients of the dense output of order 3: y(t + sh) = (1−s) y₀ + s [y₁ + (1−s) (Σ D₀ⱼ kⱼ + s Σ D₁ⱼ kⱼ)].
_D = (
    (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662),
    (-0.6762803392806898, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872),
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 6.0

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
        seeds: Labels of the rows; 0, 1, … unless given.

    Returns:
        Dataset over (seed, time), one seed per row: the named parts of the parameters, ``loss`` and ``gradient_max``,
        NaN beyond a member's end; over (seed,): the coordinate ``stop_reason`` (one of `REASONS`) and ``stop_time``,
        ``stop_loss``, ``stop_gradient_max``, ``steps``, ``rejected``; ``final`` (seed, parameter), the parameters where
        it stopped.

    Raises:
        TypeError: for what is no loss, or no rows of numbers.
        ValueError: for rows of another length than the loss's, times that do not increase or are negative, and
            tolerances that are not positive.

    Source: Simsek et al. (2023), section 3 (the flow, without ½); Hairer & Wanner (1996), section VI.4.

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
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"gradient_flow: rtol={rtol}, atol={atol}; both must be positive")
    until = float(end if end is not None else at[-1] if len(at) else 1e9)
    labels = list(range(len(rows))) if seeds is None else list(seeds)
    if len(labels) != len(rows):
        raise ValueError(f"gradient_flow: {len(labels)} labels for {len(rows)} rows")
    limits = Limits(rtol, atol, gradient_tolerance, least_norm, max_steps, until)
    with torch.no_grad():
        flow = Flow(loss, rows, times=at, limits=limits)
        flow.until(math.inf)
        return _dataset(loss, flow.states, at, labels, limits)


@dataclass(frozen=True)
class Limits:
    """Tolerances of a step and conditions under which a member stops; see `gradient_flow`."""

    rtol: float = 1e-4
    atol: float = 1e-6
    gradient: float = 1e-7
    norm: float = 1e-6
    steps: int = 20_000
    end: float = 1e9


class Flow:
    """A gradient flow in progress, which can be halted at a time common to all members, stored and resumed.

    The steps are the same as without interruption.

    Args:
        loss: As in `gradient_flow`.
        initial: Rows of parameters (member, parameter).
        times: Increasing output times.
        limits: Tolerances of a step and conditions for stopping.
    """

    def __init__(self, loss: Loss, initial: Tensor, *, times: np.ndarray, limits: Limits) -> None:
        self.loss, self._limits = loss, limits
        self._times = torch.tensor(np.asarray(times, float), dtype=initial.dtype, device=initial.device)
        self.states = [_begun(loss, chunk, self._times, limits) for chunk in initial.split(chunk_size(loss))]

    def until(self, time: float) -> None:
        """Advance every member that has not stopped until it reaches `time`."""
        for state in self.states:
            while len(index := ((state.reason == _RUNNING) & (state.t < time)).nonzero()[:, 0]):
                state.gradient[index] = _step(self.loss, state, index, state.gradient[index], self._times, self._limits)

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
        return torch.cat([getattr(state, name) for state in self.states])

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name; for `restore`."""
        return {field.name: self.joined(field.name).numpy() for field in fields(_State)}

    def restore(self, stored: Mapping[str, np.ndarray]) -> None:
        """Continue from a stored `state`."""
        sizes = [len(state.y) for state in self.states]
        for field in fields(_State):
            parts = torch.from_numpy(np.array(stored[field.name])).split(sizes)
            for state, part in zip(self.states, parts, strict=True):
                getattr(state, field.name).copy_(part)


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


def _step(loss: Loss, state: _State, index: Tensor, gradient: Tensor, times: Tensor, limits: Limits) -> Tensor:
    """Try one step of the members in `index`, accepted or rejected; return the gradient where they are afterwards."""
    y, t = state.y[index], state.t[index]
    h = torch.minimum(state.h[index], limits.end - t)
    k, y1 = _stages(loss, y, h, gradient)
    scale = limits.atol + limits.rtol * torch.maximum(y.abs(), y1.abs())
    error = (k[-1] / scale).square().mean(-1).sqrt()
    slope = loss.gradient(y1)
    finite = torch.isfinite(error) & torch.isfinite(slope).all(-1)
    error = torch.where(finite, error, math.inf)
    taken = error <= 1
    factor = (_SAFETY * error.clamp(min=1e-12).sqrt().rsqrt()).clamp(_SHRINK, _GROW)
    state.h[index] = h * factor
    state.steps[index] += 1
    state.rejected[index] += ~taken
    moved = index[taken]
    if len(times):
        _record(state, moved, times, (y[taken], y1[taken], t[taken], h[taken]), [stage[taken] for stage in k])
    state.y[moved], state.t[moved] = y1[taken], t[taken] + h[taken]
    now = torch.where(taken[:, None], slope, gradient)
    _stop(loss, state, index, now, limits)
    # no step is small enough for the state to stay finite
    state.reason[index[~taken & (state.h[index] <= 1e-15 * (1e-15 + state.t[index]))]] = REASONS.index("not finite")
    return now


def _stages(loss: Loss, y: Tensor, h: Tensor, gradient: Tensor) -> tuple[list[Tensor], Tensor]:
    matrix = loss.hessian(y)
    matrix.diagonal(dim1=-2, dim2=-1).add_((1 / (_GAMMA * h))[:, None])
    solve = _solver(matrix)
    k: list[Tensor] = []
    point = y
    for a, c in zip(_A, _C, strict=True):
        right = -gradient
        if k:
            point = y + combined(a, k)
            right = combined(c, k) / h[:, None] - loss.gradient(point)
        k.append(solve(right))
    return k, point + k[-1]


def _solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Function that solves linear systems with H + I/(γh).

    By Cholesky's method, in a third of LU's time, if the matrix is positive definite, as it is for almost all step
    sizes that the error estimate allows; otherwise by LU.  Rows of the identity fill matrices up to a multiple of four
    rows, so that all begin at a line of the cache: solutions round by where a matrix begins.
    """
    order, room = matrix.shape[-1], -matrix.shape[-1] % 4
    if room:
        matrix = torch.nn.functional.pad(matrix, (0, room, 0, room))
        matrix.diagonal(dim1=-2, dim2=-1)[..., order:] = 1
    lower, failed = torch.linalg.cholesky_ex(matrix)
    other = failed.nonzero()[:, 0]
    # one by one: of a batch, MKL on several threads gives wrong factors from some 150 rows on
    each = [torch.linalg.lu_factor_ex(matrix[member]) for member in other.tolist()]
    factors = (torch.stack([f.LU for f in each]), torch.stack([f.pivots for f in each])) if each else None

    def solve(right: Tensor) -> Tensor:
        if room:
            right = torch.nn.functional.pad(right, (0, room))
        # cholesky_solve copies the factor first
        half = torch.linalg.solve_triangular(lower, right[..., None], upper=False)
        found: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)[..., 0]
        if factors is not None:
            found[other] = torch.linalg.lu_solve(*factors, right[other, :, None])[..., 0]
        return found[..., :order]

    return solve


def _record(
    state: _State, index: Tensor, times: Tensor, step: tuple[Tensor, Tensor, Tensor, Tensor], k: list[Tensor]
) -> None:
    """Fill in the output times that the steps just taken passed."""
    y, y1, t, h = step
    low = state.recorded[index]
    high = torch.searchsorted(times, t + h, right=True)
    bends = [combined(d, k) for d in _D]
    for row, member in enumerate(index.tolist()):
        s = ((times[low[row] : high[row]] - t[row]) / h[row])[:, None]
        if len(s):
            inner = bends[0][row] + s * bends[1][row]
            state.path[member, low[row] : high[row]] = (1 - s) * y[row] + s * (y1[row] + (1 - s) * inner)
    state.recorded[index] = high


def _stop(loss: Loss, state: _State, index: Tensor, gradient: Tensor, limits: Limits) -> None:
    reason = torch.full_like(index, _RUNNING)
    reason[state.t[index] >= limits.end] = REASONS.index("time")
    reason[state.steps[index] >= limits.steps] = REASONS.index("steps")
    reason[gradient.abs().amax(-1) <= limits.gradient] = REASONS.index("gradient")
    reason[loss.least_norm(state.y[index]) <= limits.norm] = REASONS.index("singular")
    reason[~torch.isfinite(gradient).all(-1)] = REASONS.index("not finite")
    state.reason[index] = reason


def _dataset(loss: Loss, states: list[_State], times: np.ndarray, labels: list[int], limits: Limits) -> xr.Dataset:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in states])

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
            "method": "Rodas4(3)",
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
