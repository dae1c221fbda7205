"""Losses with a Hessian, and their stationary points: polished by Newton's method and classified by signature.

A small gradient alone does not make a minimum: a few members in a thousand run along a channel to infinity or sit on a
plateau with a gradient below 1e-8.  The Hessian's signature tells minima, saddles and degenerate points apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.arguments import FUNCTION, NUMBERS, Kind, takes
from tsdyn.networks.members_alone import product

#: Number of roundings in one entry of a Hessian and in the eigenvalue solver: eigenvalues err by this many times the
#: matrix's order, ε and its norm (Weyl), and those below that count as zero.
_ROUNDINGS = 10
#: A Newton step is at most this share of 1 + the point's norm, since polishing is not a search.
_REACH = 0.1
#: Polishing moves a point by at most this share of 1 + its norm; a stationary point farther away is another one.
WITHIN = 0.25
_NEWTON_STEPS = 40
#: Limit on the bytes of the Hessians computed together.
CHUNK_BYTES = 32 << 20

Rows: TypeAlias = Float[Tensor, "*member parameter"]


@runtime_checkable
class Loss(Protocol):
    """A twice differentiable function of a row of parameters, batched over leading dimensions.

    Attributes:
        parameters: Length of a row.
        dtype: Type of its values.
        flat_directions: Number of zero Hessian eigenvalues that symmetry forces at every critical point.
    """

    parameters: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of a row's values."""
        ...

    @property
    def flat_directions(self) -> int:
        """Number of zero Hessian eigenvalues that symmetry forces at every critical point."""
        ...

    def value(self, parameters: Tensor) -> Tensor:
        """Loss of each row, (…, parameter) → (…,)."""
        ...

    def gradient(self, parameters: Tensor) -> Tensor:
        """Gradient at each row, (…, parameter) → (…, parameter)."""
        ...

    def hessian(self, parameters: Tensor) -> Tensor:
        """Hessian at each row, (…, parameter) → (…, parameter, parameter)."""
        ...

    def least_norm(self, parameters: Tensor) -> Tensor:
        """Distance of each row from where the loss is not differentiable, (…,); infinite if it is everywhere."""
        ...

    def labelled(self, parameters: Tensor) -> Mapping[str, tuple[tuple[str, ...], Tensor]]:
        """Named parts of each row, with the names of their dimensions after the leading ones."""
        ...


LOSS = Kind(
    "a function of a row of parameters, or a loss with gradient and Hessian such as PopulationLoss or FunctionLoss",
    lambda value: isinstance(value, Loss) or callable(value),
)


class FunctionLoss:
    """Any twice differentiable function of a row of parameters, its derivatives by torch.func.

    Args:
        function: One row (parameter,) → a scalar, e.g. the mean error of a network on a finite sample.
        parameters: Length of the row.
        dtype: Type of the rows.
        flat_directions: Number of zero Hessian eigenvalues that a symmetry of the function forces.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        parameters: int,
        *,
        dtype: torch.dtype = torch.float64,
        flat_directions: int = 0,
    ) -> None:
        self.parameters = parameters
        self._function = function
        self._dtype = dtype
        self._flat_directions = flat_directions

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._dtype

    @property
    def flat_directions(self) -> int:
        """Number of zero Hessian eigenvalues that symmetry forces, as given."""
        return self._flat_directions

    def value(self, parameters: Rows) -> Float[Tensor, "*member"]:
        """The function of each row."""
        return self._batched(self._function, parameters)

    def gradient(self, parameters: Rows) -> Rows:
        """Gradient at each row, by torch.func.grad."""
        return self._batched(torch.func.grad(self._function), parameters)

    def hessian(self, parameters: Rows) -> Float[Tensor, "*member parameter parameter"]:
        """Hessian at each row, by torch.func.hessian."""
        return self._batched(torch.func.hessian(self._function), parameters)

    def least_norm(self, parameters: Rows) -> Float[Tensor, "*member"]:
        """Infinite, since it is not known where the function has kinks."""
        return parameters.new_full(parameters.shape[:-1], torch.inf)

    def labelled(self, parameters: Rows) -> Mapping[str, tuple[tuple[str, ...], Tensor]]:
        """The whole row as one part named ``parameter``."""
        return {"parameters": (("parameter",), parameters)}

    def _batched(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        lead = rows.shape[:-1]
        found = torch.func.vmap(function)(rows.reshape(-1, rows.shape[-1]))
        return found.reshape(*lead, *found.shape[1:])


def _tensor(given: ArrayLike | Tensor) -> Tensor:
    """A tensor as it is, or one of an array or of numbers, which are float64."""
    return given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given), device="cpu")


def with_rows(
    caller: str, loss: Loss | Callable[[Tensor], Tensor], rows: ArrayLike | Tensor, name: str
) -> tuple[Loss, Tensor]:
    """The loss and its rows (member, parameter), of the loss's type; a plain function becomes a `FunctionLoss`.

    Raises:
        ValueError: for rows of another length than the loss's.
    """
    given = _tensor(rows).detach()
    given = given[None] if given.ndim == 1 else given
    if not isinstance(loss, Loss):
        dtype = given.dtype if given.is_floating_point() else torch.float64
        loss = FunctionLoss(loss, given.shape[-1] if given.ndim else 0, dtype=dtype)
    if given.ndim != 2 or given.shape[1] != loss.parameters:
        raise ValueError(f"{caller}: {name} has shape {tuple(given.shape)}; the loss takes (member, {loss.parameters})")
    return loss, given.to(loss.dtype)


@dataclass(frozen=True)
class Signature:
    """Numbers of Hessian eigenvalues by sign, (member,) each.

    The ``flat_directions`` eigenvalues of least magnitude are left out, since symmetry accounts for them.

    Attributes:
        negative: Number of eigenvalues below 0 by more than rounding.
        zero: Number that are zero to rounding or, in `polish`, that may change by half their value or more within the
            remaining Newton step.
        positive: Number above 0 by more than rounding.
        least: Least eigenvalue, flat directions included.
        largest: Largest absolute eigenvalue.
    """

    negative: Int[Tensor, " member"]
    zero: Int[Tensor, " member"]
    positive: Int[Tensor, " member"]
    least: Float[Tensor, " member"]
    largest: Float[Tensor, " member"]


@dataclass(frozen=True)
class Polished:
    """The points at which Newton's method ended, (member, …) each.

    Attributes:
        point: Rows of parameters.
        loss: At the point.
        gradient_max: |∇|_∞ at the point.
        moved: Euclidean distance from where it began.
        signature: Signature of the Hessian at the point.
        kind: ``minimum``; ``saddle``, of index ``signature.negative``; ``degenerate``, no negative eigenvalue but zeros
            that no symmetry explains: a plateau or a channel; ``not stationary``, the gradient stayed above the
            tolerance.
    """

    point: Float[Tensor, "member parameter"]
    loss: Float[Tensor, " member"]
    gradient_max: Float[Tensor, " member"]
    moved: Float[Tensor, " member"]
    signature: Signature
    kind: np.ndarray


@takes(loss=LOSS, point=NUMBERS)
def signature(loss: Loss | Callable[[Tensor], Tensor], point: ArrayLike | Tensor) -> Signature:
    """Number of Hessian eigenvalues of each sign at each point.

    Args:
        loss: A loss with a Hessian, or a function of one row.
        point: Rows of parameters, or one row.

    Raises:
        TypeError, ValueError: as `polish`.
    """
    loss, rows = with_rows("signature", loss, point, "point")
    spectra = [torch.linalg.eigvalsh(loss.hessian(chunk)) for chunk in rows.split(chunk_size(loss))]
    return _joined([_signs(loss, spectrum, _seen(loss, spectrum)) for spectrum in spectra])


def _joined(found: list[Signature]) -> Signature:
    return Signature(*(torch.cat([getattr(s, f.name) for s in found]) for f in fields(Signature)))


def _seen(loss: Loss, spectrum: Tensor) -> Tensor:
    """Whether each eigenvalue exceeds rounding, leaving out the smallest ones that symmetry accounts for."""
    size = spectrum.abs()
    above = size > _ROUNDINGS * loss.parameters * torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)
    return above.scatter(-1, size.argsort(-1)[..., : loss.flat_directions], False)


def _signs(loss: Loss, spectrum: Tensor, certain: Tensor) -> Signature:
    negative, positive = ((certain & (side > 0)).sum(-1) for side in (-spectrum, spectrum))
    zero = loss.parameters - loss.flat_directions - negative - positive
    return Signature(negative, zero, positive, spectrum[..., 0], spectrum.abs().amax(-1))


@takes(loss=LOSS, point=NUMBERS)
def polish(
    loss: Loss | Callable[[Tensor], Tensor],
    point: ArrayLike | Tensor,
    *,
    tolerance: float = 1e-12,
    within: float = WITHIN,
) -> Polished:
    """Move points near a stationary point to |∇|_∞ ≤ `tolerance` by Newton's method, whatever its index, and classify.

    Steps are limited to a tenth of 1 + the point's norm, leave out eigenvectors whose eigenvalue is zero by rounding
    or symmetry, and are halved until the gradient falls.  No member moves farther than `within` times 1 + its norm in
    total; one that would have to is ``not stationary`` and stays where it began, since polishing is to find the
    stationary point nearby and not a better one elsewhere.

    An eigenvalue counts as nonzero by Kantorovich's condition: over the remaining Newton step the Hessian changes by
    less than half of it.  So a minimum may be soft (one neuron against 16: 8e-8 of the largest), while x⁴ at 0 and
    channels like e⁻ˣ or 1/x, whose curvature changes as fast as it is small, are degenerate however small the gradient.

    Args:
        loss: A loss with gradient and Hessian, or a function of one row, which becomes a `FunctionLoss`.
        point: Rows of parameters, or one row.
        tolerance: Of the largest component of the gradient; rounding of the loss limits it to some 1e-14.
        within: How far a point may move, as a share of 1 + its norm.

    Returns:
        Point, loss, gradient and kind of each member, including members that do not converge.

    Raises:
        TypeError: for what is no loss, or no rows of numbers.
        ValueError: for rows of another length, or `within` that is not positive.

    Source: Kantorovich (1948), on the convergence of Newton's method: ‖H⁻¹‖ K ‖step‖ ≤ ½, K the Lipschitz constant.

    Examples:
        >>> import torch
        >>> from tsdyn import flow
        >>> found = flow.polish(lambda p: 0.5 * ((p - 1.0) ** 2).sum(), torch.tensor([0.9, 1.1], dtype=torch.float64))
        >>> bool((found.point - 1).abs().max() < 1e-12)
        True
    """
    loss, rows = with_rows("polish", loss, point, "point")
    if not within > 0:
        raise ValueError(f"polish: within={within}; a share of 1 + the point's norm, above 0")
    found = [_polished(loss, chunk, tolerance, within) for chunk in rows.split(chunk_size(loss))]
    return Polished(
        point=torch.cat([f.point for f in found]),
        loss=torch.cat([f.loss for f in found]),
        gradient_max=torch.cat([f.gradient_max for f in found]),
        moved=torch.cat([f.moved for f in found]),
        signature=_joined([f.signature for f in found]),
        kind=np.concatenate([f.kind for f in found]),
    )


@takes(loss=FUNCTION, point=NUMBERS, of=NUMBERS)
def minimum_derivative(
    loss: Callable[[Tensor, Tensor], Tensor],
    point: ArrayLike | Tensor,
    of: ArrayLike | Tensor,
    *,
    flat_directions: int = 0,
) -> Float[Tensor, "member parameter *of"]:
    """The derivative of minima θ* in what the loss depends on beside: dθ*/dp = −H⁻¹ ∂²L/∂θ∂p.

    So the end of a gradient flow is differentiated in its targets or its teacher without going back through the flow.

    Args:
        loss: L(θ, p), of one row and of `of`, twice differentiable.
        point: Rows θ near minima, or one row; `polish` brings them there.
        of: What is differentiated in, p, of any shape.
        flat_directions: Number of zero Hessian eigenvalues that a symmetry of L forces; along these nothing moves.

    Returns:
        dθ*/dp, (member, parameter, *shape of p), in units of θ per unit of p.

    Raises:
        TypeError: for no rows of numbers, or a loss that is no function.
        ValueError: for a row near which there is no minimum with a Hessian of full rank; it is named.

    Source: the implicit function theorem, for ∂L/∂θ(θ*, p) = 0.

    Examples:
        >>> import torch
        >>> from tsdyn import flow
        >>> def loss(row, p):
        ...     return ((row - p.square()) ** 2).sum()
        >>> flow.minimum_derivative(loss, [[8.9]], [3.0]).squeeze().round(decimals=12).item()
        6.0
    """
    with_respect = _tensor(of).detach()
    at, rows = with_rows("minimum_derivative", lambda row: loss(row, with_respect.to(row)), point, "point")
    here = FunctionLoss(
        lambda row: loss(row, with_respect.to(row)), at.parameters, dtype=at.dtype, flat_directions=flat_directions
    )
    found = polish(here, rows)
    for member, kind in enumerate(found.kind):
        if kind != "minimum":
            raise ValueError(
                f"minimum_derivative: row {member} is {kind}: only a minimum with a Hessian of full rank (beside "
                f"flat_directions={flat_directions}) moves with what the loss depends on as a derivative says"
            )
    mixed: Tensor = torch.func.vmap(torch.func.jacrev(torch.func.grad(loss), 1), (0, None))(
        found.point, with_respect.to(found.point)
    )
    spectrum, basis = torch.linalg.eigh(here.hessian(found.point))
    inverse = torch.where(_seen(here, spectrum), 1 / spectrum, 0.0)
    moved: Tensor = -basis @ (inverse[..., None] * (basis.mT @ mixed.reshape(*spectrum.shape, -1)))
    return moved.reshape(mixed.shape)


def _polished(loss: Loss, begin: Tensor, tolerance: float, within: float) -> Polished:
    point, gradient = _newton_path(loss, begin, tolerance, within)
    at = gradient.abs().amax(-1)
    finite = torch.isfinite(gradient).all(-1)
    safe = torch.where(finite[:, None], point, torch.ones_like(point))
    newton = _Newton(loss, safe, torch.where(finite[:, None], gradient, 0.0))
    signs = _signs(loss, newton.spectrum, newton.certain(loss.hessian(safe + newton.step)))
    kind = np.select(
        [
            (~(at <= tolerance)).numpy(force=True),
            (signs.negative > 0).numpy(force=True),
            signs.zero.numpy(force=True) > 0,
        ],
        ["not stationary", "saddle", "degenerate"],
        "minimum",
    )
    return Polished(point, loss.value(point), at, (point - begin).norm(dim=-1), signs, kind)


def _newton_path(loss: Loss, begin: Tensor, tolerance: float, within: float) -> tuple[Tensor, Tensor]:
    """Points where Newton's steps end, and gradients there; a member whose steps lead too far is put back."""
    point, gradient = begin.clone(), loss.gradient(begin)
    start, reach = gradient.clone(), within * (1 + begin.norm(dim=-1))
    away = torch.zeros_like(reach, dtype=torch.bool)
    # one step more than the tolerance needs: it costs little, and quadratic convergence then reaches rounding
    pending: Bool[Tensor, " member"] = torch.isfinite(gradient).all(-1)
    last = torch.zeros_like(pending)
    for _ in range(_NEWTON_STEPS):
        index = pending.nonzero()[:, 0]
        if not len(index):
            break
        step = _limited(_Newton(loss, point[index], gradient[index]).step, point[index])
        moved, better, improved = _halved(loss, point[index], step, gradient[index])
        gone = (moved - begin[index]).norm(dim=-1) > reach[index]
        away[index] = gone
        point[index[~gone]], gradient[index[~gone]] = moved[~gone], better[~gone]
        done = better.abs().amax(-1) <= tolerance
        pending[index] = improved & ~last[index] & ~gone
        last[index] = done
    # a member on a channel may lead away although it is stationary to the tolerance already
    lost = (away & ~(gradient.abs().amax(-1) <= tolerance))[:, None]
    return torch.where(lost, begin, point), torch.where(lost, start, gradient)


class _Newton:
    """Newton's step at each point, in the eigenvectors of the Hessian."""

    def __init__(self, loss: Loss, point: Tensor, gradient: Tensor) -> None:
        self.spectrum, self._axes = torch.linalg.eigh(loss.hessian(point))
        self._seen = _seen(loss, self.spectrum)
        inverse = torch.where(self._seen, 1 / self.spectrum, 0.0)
        along = inverse * product(self._axes.mT, gradient[..., None])[..., 0]
        self.step = -product(self._axes, along[..., None])[..., 0]

    def certain(self, ahead: Tensor) -> Tensor:
        """Whether each eigenvalue changes by less than half between here and the Hessian at the step's end."""
        there = (self._axes * product(ahead, self._axes)).sum(-2)
        certain: Tensor = self._seen & ((there - self.spectrum).abs() < self.spectrum.abs() / 2)
        return certain


def _limited(step: Tensor, point: Tensor) -> Tensor:
    length = step.norm(dim=-1, keepdim=True)
    reach = _REACH * (1 + point.norm(dim=-1, keepdim=True))
    limited: Tensor = step * (reach / length.clamp(min=torch.finfo(step.dtype).tiny)).clamp(max=1)
    return limited


def _halved(loss: Loss, point: Tensor, step: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """End of the largest of step, step/2, … at which the gradient is smaller; the point itself if there is none."""
    before = gradient.norm(dim=-1)
    moved, after = point.clone(), gradient.clone()
    improved = torch.zeros_like(before, dtype=torch.bool)
    for halvings in range(12):
        index = (~improved).nonzero()[:, 0]
        if not len(index):
            break
        trial = point[index] + step[index] * 0.5**halvings
        slope = loss.gradient(trial)
        better = slope.norm(dim=-1) < before[index]
        moved[index[better]], after[index[better]] = trial[better], slope[better]
        improved[index[better]] = True
    return moved, after, improved


def chunk_size(loss: Loss) -> int:
    """Number of members whose Hessians are computed together."""
    return max(1, CHUNK_BYTES // (8 * loss.parameters**2))
