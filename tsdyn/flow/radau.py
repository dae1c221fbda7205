"""Steps of Radau IIA of order 9, an implicit method of five stages: the cheaper one at tolerances below 1e-6.

A step solves the equations of collocation, z_i = h Σ_j a_ij f(y + z_j) with f = −∇L, by Newton's method with one
Hessian for all stages.  In its eigenvectors, and in those of the matrix (a_ij), the linear systems are divisions of
numbers.  So neither another step size nor another iteration needs a factorisation, and a Hessian is kept while the
iterations converge fast.  It is taken in the middle of the step, at the parameters that the last step's polynomial
predicts there: it then differs from that of any stage by half as much as if it were taken at the step's beginning.

Source: Hairer & Wanner (1996), Solving Ordinary Differential Equations II, sections IV.5 (Radau IIA), IV.8 (Newton's
method, error estimate, step sizes); Hairer & Wanner (1999), Stiff differential equations solved by Radau methods, for
more than three stages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsdyn.flow.stationary import Loss
from tsdyn.flow.steps import Attempt, Limits, settled
from tsdyn.networks.members_alone import LINE, elementwise

STAGES = 5
#: Stage in the middle of a step (at 0.58 of it), where the Hessian is taken.
_MIDDLE = 2
_ITERATIONS = 14
#: Newton's method ends where its error is this share of the tolerance.
_SHARE = 1e-2
#: A Hessian is kept while an iteration leaves less than this share of the error, and a step takes fewer iterations.
_KEPT, _KEPT_ITERATIONS = 0.15, 5
#: Share of the error that an iteration shall leave; since the Hessian is right in the middle, it grows as the square
#: of the step size.
_RATE = 0.3
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 8.0


class _Tableau(NamedTuple):
    nodes: np.ndarray  # c_i
    matrix: np.ndarray  # a_ij
    real: float  # the real eigenvalue of (a_ij)
    pairs: tuple[complex, complex]  # one of each pair of complex ones
    forth: np.ndarray  # from the eigenvectors of (a_ij), real and imaginary parts as rows, to stages
    back: np.ndarray
    estimate: np.ndarray  # e_i of the error estimate, γ₀ h f(y) + Σ e_i z_i with γ₀ = `real`


def _tableau() -> _Tableau:
    """Coefficients by quadrature that is exact for them; the nodes are the zeros of P₅ − P₄ on [0, 1]."""
    legendre = np.polynomial.legendre
    zeros = np.sort(legendre.legroots([0.0] * (STAGES - 1) + [-1.0, 1.0]).real)
    nodes = np.append((zeros[:-1] + 1) / 2, 1.0)
    at, weights = legendre.leggauss(STAGES)
    at, weights = (at + 1) / 2, weights / 2
    matrix = np.array(
        [[c * weights @ _lagrange(nodes, j, c * at) for j in range(STAGES)] for c in nodes]  # ∫₀ᶜ ℓ_j
    )
    values, vectors = np.linalg.eig(matrix)
    real = int(np.argmin(abs(values.imag)))
    first, second = (i for i in np.argsort(values.real) if values[i].imag > 1e-3)
    columns = [vectors[:, real].real]
    for pair in (first, second):
        columns += [2 * vectors[:, pair].real, -2 * vectors[:, pair].imag]
    forth = np.stack(columns, 1)
    gamma = float(values[real].real)
    # ŷ = y + h (γ₀ f(y) + Σ b̂_i f(y + z_i)) of order 5, and h f(y + z) = matrix⁻¹ z
    moments = 1 / np.arange(1, STAGES + 1)
    moments[0] -= gamma
    embedded = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    estimate = (embedded - matrix[-1]) @ np.linalg.inv(matrix)
    pairs = complex(values[first]), complex(values[second])
    return _Tableau(nodes, matrix, gamma, pairs, forth, np.linalg.inv(forth), estimate)


def _lagrange(nodes: np.ndarray, j: int, at: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at node j and 0 at the others."""
    others = np.delete(nodes, j)
    found: np.ndarray = np.prod([(at - c) / (nodes[j] - c) for c in others], axis=0)
    return found


_TABLEAU = _tableau()
#: Where a step's polynomial is known: at its beginning, where z = 0, and at its stages.
_KNOWN = np.append(0.0, _TABLEAU.nodes)
#: Where the other part of a complex number lies.
_PARTNER = [0, 2, 1, 4, 3]


class _Solved(NamedTuple):
    stages: Tensor  # z_i, (member, stage, parameter)
    converged: Tensor
    iterations: Tensor
    rate: Tensor  # largest share of the error that an iteration left; 0 of one iteration
    last_rate: Tensor  # NaN of one iteration


class Radau:
    """Radau IIA of order 9 for the members of one chunk.

    Args:
        loss: Whose gradient flow is integrated.
        like: Parameters (member, parameter): their number, type and device.
        limits: Tolerances of a step.

    Raises:
        ValueError: for a relative tolerance that the parameters' type does not resolve.
    """

    NAME = "Radau IIA of order 9"

    def __init__(self, loss: Loss, like: Tensor, limits: Limits) -> None:
        least = 10 * torch.finfo(like.dtype).eps
        if limits.rtol < least:
            raise ValueError(
                f"gradient_flow: rtol={limits.rtol:g}; {str(like.dtype).removeprefix('torch.')} resolves {least:.1g}, "
                "give at least that"
            )
        self._loss, self._limits = loss, limits
        self._share = max(least / limits.rtol, _SHARE)
        members, self._parameters = like.shape
        # products round by where a matrix begins: at a line of the cache, all of them
        self._room = -self._parameters % (LINE // like.element_size())
        self._order = self._parameters + self._room
        self._back = torch.from_numpy(_TABLEAU.back).to(like)
        self._forth = torch.from_numpy(_TABLEAU.forth).to(like)
        self._slopes = torch.from_numpy(_TABLEAU.back @ _TABLEAU.matrix).to(like)
        self._held = like.new_zeros(members, dtype=torch.bool)
        self._basis: Tensor | None = None
        self._curvature = like.new_zeros(members, self._order)
        self._memory = {
            "linearised": torch.full_like(like, math.nan),  # where the Hessian was taken
            "due": torch.ones_like(self._held),  # whether the next step takes another one
            "fresh": torch.zeros_like(self._held),  # whether no step has been taken with this one
            "stages": like.new_zeros(members, STAGES, self._order),  # z_i of the last step
            "last_size": like.new_full((members,), math.nan),
            "last_error": like.new_full((members,), math.nan),
        }

    def memory(self) -> dict[str, Tensor]:
        """Where the Hessian was taken and whether it is kept; the last step's stages, size and error."""
        return self._memory

    def release(self) -> None:
        """Give back the eigenvectors; they are computed again from where the Hessian was taken."""
        self._basis = None
        self._held[:] = False

    def attempt(self, y: Tensor, h: Tensor, gradient: Tensor, index: Tensor) -> Attempt:
        """Try a step of size `h` (member,) from `y` (member, parameter) of the members in `index`; see `Attempt`."""
        memory = self._memory
        stages = self._predicted(h, index)
        self._linearise(y + stages[:, _MIDDLE, : self._parameters], index)
        solved = self._solve(y, h, stages, index)
        end = y + solved.stages[:, -1, : self._parameters]
        slope = self._loss.gradient(end)
        error = settled(self._estimate(solved.stages, h, gradient, index), y, end, slope, self._limits)
        error = torch.where(solved.converged, error, math.inf)
        taken = error <= 1
        factor = self._factor(solved, error, h, index)
        again = taken & ((solved.rate > _KEPT) | (solved.iterations >= _KEPT_ITERATIONS))
        memory["due"][index] = again | (~solved.converged)
        moved = index[taken]
        memory["fresh"][moved] = False
        memory["stages"][moved] = solved.stages[taken]
        memory["last_size"][moved] = h[taken]
        memory["last_error"][moved] = error[taken].clamp(min=1e-2)

        def inside(row: int, s: Tensor) -> Tensor:
            at = s.numpy(force=True)
            within = y[row].expand(len(at), -1).clone()
            for j in range(STAGES):
                share = torch.from_numpy(_lagrange(_KNOWN, j + 1, at)).to(within)
                within += share * solved.stages[row, j, : self._parameters]
            return within

        return Attempt(end, slope, error, factor, inside)

    def _predicted(self, h: Tensor, index: Tensor) -> Tensor:
        """The last step's polynomial at the stages of the next; 0 before there is one."""
        memory = self._memory
        ratio = (h / memory["last_size"][index]).nan_to_num(0.0).numpy(force=True)
        at = 1 + _TABLEAU.nodes * ratio[:, None]
        # less 1 at the last stage: from where the last step ended
        shares = [_lagrange(_KNOWN, j, at) - (j == STAGES) for j in range(1, STAGES + 1)]
        return _mixed(torch.from_numpy(np.stack(shares, -1)).to(h), memory["stages"][index])

    def _linearise(self, point: Tensor, index: Tensor) -> None:
        """Take the Hessian at `point` where it is due, and once more where it was if its eigenvectors are not held."""
        memory = self._memory
        due = memory["due"][index]
        memory["linearised"][index[due]] = point[due]
        memory["fresh"][index[due]] = True
        memory["due"][index] = False
        missing = index[due | ~self._held[index]]
        if not len(missing):
            return
        if self._basis is None:
            self._basis = point.new_zeros(len(self._held), self._order, self._order)
        hessian = torch.nn.functional.pad(
            self._loss.hessian(memory["linearised"][missing]), (0, self._room, 0, self._room)
        )
        finite = torch.isfinite(hessian).flatten(1).all(-1)
        for member, matrix, fit in zip(missing.tolist(), hessian, finite.tolist(), strict=True):
            # what is not finite solves nothing: the step is refused, and a smaller one taken
            values, self._basis[member] = torch.linalg.eigh(matrix if fit else torch.eye(self._order).to(matrix))
            self._curvature[member] = values if fit else math.nan
        self._held[missing] = True

    def _solve(self, y: Tensor, h: Tensor, stages: Tensor, index: Tensor) -> _Solved:
        """The stages by Newton's method from what was predicted, each member until it has converged or will not."""
        assert self._basis is not None
        bases = [self._basis[member] for member in index.tolist()]
        own, partner = self._inverses(h, index)
        inner = _mixed(self._back, _turned(stages, bases))  # in the eigenvectors of both matrices
        scale = (self._limits.atol + self._limits.rtol * y.abs())[:, None]
        members = len(index)
        pending, converged = (torch.full_like(index, value, dtype=torch.bool) for value in (True, False))
        size, rate, last_rate = y.new_zeros(3, members).fill_(math.nan)
        iterations = torch.zeros_like(index)
        for left in reversed(range(_ITERATIONS)):
            now = pending.nonzero()[:, 0]
            if not len(now):
                break
            used = [bases[row] for row in now.tolist()]
            slope = self._loss.gradient(y[now, None] + stages[now, :, : self._parameters])
            slope = torch.nn.functional.pad(slope, (0, self._room))
            residual = -h[now, None, None] * _mixed(self._slopes, _turned(slope, used)) - inner[now]
            moved = own[now] * residual + partner[now] * residual[:, _PARTNER]
            inner[now] += moved
            change = _turned(_mixed(self._forth, moved), used, back=True)
            stages[now] += change
            iterations[now] += 1
            before = size[now]
            size[now] = after = (change[..., : self._parameters] / scale[now]).square().flatten(1).mean(-1).sqrt()
            last_rate[now] = ratio = after / before
            rate[now] = torch.fmax(rate[now], ratio)
            ready = (after <= self._share / 100) | ((ratio < 1) & (ratio / (1 - ratio) * after <= self._share))
            hopeless = elementwise(torch.pow, ratio, torch.full_like(ratio, left)) / (1 - ratio) * after > self._share
            lost = ~torch.isfinite(after) | (ratio >= 1) | hopeless
            converged[now] = ready
            pending[now] = ~ready & ~lost & (left > 0)
        return _Solved(stages, converged, iterations, rate.nan_to_num(0.0), last_rate)

    def _inverses(self, h: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """1/(1 + hμλ) of every eigenvalue μ of the method and λ of the Hessian: what a number is multiplied by to give
        its own part, and what its partner, the other part of a complex number, is."""
        stretched = h[:, None] * self._curvature[index]
        own = stretched.new_empty(len(index), STAGES, self._order)
        partner = torch.zeros_like(own)
        own[:, 0] = 1 / (1 + _TABLEAU.real * stretched)
        for row, pair in zip((1, 3), _TABLEAU.pairs, strict=True):
            real, imaginary = 1 + pair.real * stretched, pair.imag * stretched
            squared = real * real + imaginary * imaginary
            own[:, row] = own[:, row + 1] = real / squared
            partner[:, row], partner[:, row + 1] = imaginary / squared, -imaginary / squared
        return own, partner

    def _estimate(self, stages: Tensor, h: Tensor, gradient: Tensor, index: Tensor) -> Tensor:
        """Difference to an embedded method of order 5, without its stiff parts, (I + γ₀ h H)⁻¹ of it."""
        assert self._basis is not None
        difference = -_TABLEAU.real * h[:, None] * torch.nn.functional.pad(gradient, (0, self._room))
        for j in range(STAGES):
            difference += float(_TABLEAU.estimate[j]) * stages[:, j]
        bases = [self._basis[member] for member in index.tolist()]
        damped = 1 + _TABLEAU.real * h[:, None] * self._curvature[index].clamp(min=0)
        found = _turned(_turned(difference[:, None], bases) / damped[:, None], bases, back=True)
        return found[:, 0, : self._parameters]

    def _factor(self, solved: _Solved, error: Tensor, h: Tensor, index: Tensor) -> Tensor:
        """What the next step's size is of this one's: by the error and its trend, and by how Newton's method fared."""
        memory = self._memory
        taken = error <= 1
        bounded = error.clamp(min=1e-10)
        order = torch.full_like(error, 1 / (STAGES + 1))
        safety = _SAFETY * 21 / (20 + solved.iterations.to(error))
        factor = safety / elementwise(torch.pow, bounded, order)
        trend = (h / memory["last_size"][index]) * elementwise(torch.pow, memory["last_error"][index] / bounded, order)
        factor = torch.where(taken & torch.isfinite(trend), torch.minimum(factor, factor * trend), factor)
        factor = factor.clamp(_SHRINK, _GROW)
        allowed = (_RATE / solved.rate).sqrt().clamp(min=1)
        factor = torch.where(taken, torch.minimum(factor, allowed), factor)
        # with a new Hessian a failure is of the step's size, with a kept one it may be of the Hessian
        smaller = (0.7 * _RATE / solved.last_rate.nan_to_num(2.0)).sqrt().clamp(_SHRINK, 0.7)
        failed = torch.where(memory["fresh"][index], smaller, 1.0)
        return torch.where(solved.converged, factor, failed)


def _mixed(matrix: Tensor, stages: Tensor) -> Tensor:
    """matrix @ stages, (…, stage, stage) and (member, stage, parameter), added in order: alike wherever a member is."""
    found = matrix[..., 0, None] * stages[:, None, 0]
    for j in range(1, STAGES):
        found += matrix[..., j, None] * stages[:, None, j]
    return found


def _turned(rows: Tensor, bases: list[Tensor], *, back: bool = False) -> Tensor:
    """Each member's rows (row, parameter) in its eigenvectors, or back from there; no basis is copied."""
    found = torch.empty_like(rows)
    for own, basis, out in zip(rows, bases, found, strict=True):
        torch.mm(own, basis.mT if back else basis, out=out)
    return found
