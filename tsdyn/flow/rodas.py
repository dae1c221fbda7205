"""Steps of Rodas4(3), a linearly implicit method of order 4: the cheaper one at tolerances of 1e-6 and above.

It is an L-stable Rosenbrock method with the exact Hessian; a step costs one Hessian, one factorisation and six
gradients.

Source: Hairer & Wanner (1996), Solving Ordinary Differential Equations II, section VI.4 (RODAS, method 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsdyn.flow.stationary import Loss
from tsdyn.flow.steps import Attempt, Limits, settled
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


class Rodas:
    """Rodas4(3) for the members of one chunk, which remembers nothing between steps."""

    NAME = "Rodas4(3)"

    def __init__(self, loss: Loss, like: Tensor, limits: Limits) -> None:
        self._loss, self._limits = loss, limits

    def attempt(self, y: Tensor, h: Tensor, gradient: Tensor, index: Tensor) -> Attempt:
        """Try a step of size `h` from `y` of the members in `index`."""
        k, y1 = _stages(self._loss, y, h, gradient)
        slope = self._loss.gradient(y1)
        error = settled(k[-1], y, y1, slope, self._limits)
        factor = (_SAFETY * error.clamp(min=1e-12).sqrt().rsqrt()).clamp(_SHRINK, _GROW)
        bends = [combined(d, k) for d in _D]

        def inside(row: int, s: Tensor) -> Tensor:
            inner = bends[0][row] + s * bends[1][row]
            within: Tensor = (1 - s) * y[row] + s * (y1[row] + (1 - s) * inner)
            return within

        return Attempt(y1, slope, error, factor, inside)

    def memory(self) -> dict[str, Tensor]:
        """Nothing: a step depends on where it begins alone."""
        return {}

    def release(self) -> None:
        """Nothing is held."""


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
