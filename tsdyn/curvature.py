"""Second derivatives of a scalar loss in its parameters: products, the dense Hessian, its spectrum and its density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.func import grad, jvp
from torch.func import hessian as torch_hessian

from tsdyn.memory import refuse_beyond

Parameters: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

#: Hessians with at most this many parameters are diagonalized whole: below a second, and every eigenvalue is exact.
DENSE_PARAMETERS = 1000


def hessian(loss: Callable[[Any], Tensor], params: Parameters) -> Tensor:
    """∂²loss/∂θ∂θ', dense, (parameter, parameter), in the order the parameters are given, each flattened.

    Args:
        loss: Of parameters of the structure of `params` → scalar.
        params: A tensor, a sequence or a mapping of tensors.

    Raises:
        MemoryError: before it starts, if it does not fit.
    """
    flat, shaped = _flattened(params)
    refuse_beyond(
        "hessian",
        3 * len(flat) ** 2 * flat.element_size(),
        flat.device,
        "use hessian_spectrum or hessian_vector_product",
    )
    found: Tensor = torch_hessian(lambda v: loss(shaped(v)))(flat)
    return found


def hessian_vector_product(loss: Callable[[Any], Tensor], params: Parameters, vector: Tensor) -> Tensor:
    """(∂²loss/∂θ∂θ') v, forward over reverse: about two gradients; (parameter,), flattened as in `hessian`."""
    flat, shaped = _flattened(params)
    if vector.shape != flat.shape:
        raise ValueError(
            f"hessian_vector_product: the vector has shape {tuple(vector.shape)}, there are {len(flat)} parameters"
        )

    return _product(loss, flat, shaped)(vector)


def hessian_spectrum(loss: Callable[[Any], Tensor], params: Parameters, k: int | None = 10) -> Tensor:
    """The k algebraically largest Hessian eigenvalues, largest first; all of them for k=None.

    Dense up to `DENSE_PARAMETERS` parameters or if k is not below their number, otherwise SciPy's ``eigsh`` on
    Hessian-vector products to machine precision.

    Raises:
        ValueError: for k < 1.
        RuntimeError: if Lanczos does not converge, with what did.
        MemoryError: before it starts, if a dense Hessian does not fit.
    """
    flat, shaped = _flattened(params)
    if k is not None and k < 1:
        raise ValueError(f"hessian_spectrum: k={k}; ask for at least one eigenvalue, or None for all")
    if k is None or k >= len(flat) - 1 or len(flat) <= DENSE_PARAMETERS:
        dense = hessian(lambda v: loss(shaped(v)), flat)
        every: Tensor = torch.linalg.eigvalsh(dense).flip(0)
        return every if k is None else every[:k]

    product = _product(loss, flat, shaped)

    def apply(vector: np.ndarray) -> np.ndarray:
        found: np.ndarray = product(torch.from_numpy(vector.reshape(-1)).to(flat)).cpu().numpy()
        return found

    dtype = torch.zeros((), dtype=flat.dtype).numpy().dtype
    operator = LinearOperator((len(flat), len(flat)), matvec=apply, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(len(flat)).astype(dtype)
    try:
        values = eigsh(operator, k=k, which="LA", v0=start, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"hessian_spectrum: {len(error.eigenvalues)} of {k} eigenvalues converged, {error.eigenvalues}; "
            "ask for fewer, or for all (k=None)"
        ) from error
    return torch.from_numpy(np.sort(values)[::-1].copy()).to(flat.device)


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of the density of Hessian eigenvalues, (1/n) Σ_i δ(λ − λ_i), by Gauss quadrature.

    Attributes:
        nodes: Ritz values of each probe, increasing.
        weights: Theirs; above 0, sum 1 over the nodes of a probe.
    """

    nodes: Float[np.ndarray, "probe step"]
    weights: Float[np.ndarray, "probe step"]

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """tr f(H)/n and its standard error over the probes.

        Each probe is exact, for its own vᵀ f(H) v, at polynomials up to degree 2·step − 1.
        """
        values = (self.weights * function(self.nodes)).sum(1)
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return float(values.mean()), float(error)

    def __call__(self, at: np.ndarray, width: float) -> np.ndarray:
        """The density at the eigenvalues `at`, blurred by a Gaussian of standard deviation `width`."""
        apart = (np.asarray(at)[..., None, None] - self.nodes) / width
        kernel = np.exp(-(apart**2) / 2) / (width * np.sqrt(2 * np.pi))
        blurred: np.ndarray = (kernel * self.weights).sum(-1).mean(-1)
        return blurred


def hessian_density(
    loss: Callable[[Any], Tensor], params: Parameters, *, probes: int = 10, steps: int = 80, seed: int = 0
) -> SpectralDensity:
    """Density of the Hessian's eigenvalues by stochastic Lanczos quadrature; no Hessian is formed.

    `probes` random directions, for each `steps` Hessian-vector products and a full reorthogonalization, without which
    converged eigenvalues come back as ghosts and weigh twice.  Fewer steps are taken where a Krylov space is exhausted;
    its nodes are repeated with weight 0.

    Source: Golub and Meurant (2010), Matrices, Moments and Quadrature, chapter 7.

    Raises:
        ValueError: for fewer than one probe or step.
        MemoryError: before it starts, if the basis, (steps, parameter), does not fit.
    """
    flat, shaped = _flattened(params)
    if probes < 1 or steps < 1:
        raise ValueError(f"hessian_density: probes={probes}, steps={steps}; at least one of each")
    steps = min(steps, len(flat))
    refuse_beyond("hessian_density", 2 * steps * flat.nbytes, flat.device, "take fewer steps")
    apply = _product(loss, flat, shaped)
    draw = torch.Generator().manual_seed(seed)
    nodes, weights = np.zeros((2, probes, steps))
    for probe in range(probes):
        start = torch.randn(len(flat), generator=draw, dtype=flat.dtype).to(flat.device)
        diagonal, beside = _lanczos(apply, start, steps)
        values, vectors = eigh_tridiagonal(diagonal, beside)
        nodes[probe] = values[-1]
        nodes[probe, : len(values)] = values
        weights[probe, : len(values)] = vectors[0] ** 2
    return SpectralDensity(nodes, weights)


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of the tridiagonal matrix of `apply` in the Krylov space of `start`."""
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        image = apply(basis[step])
        diagonal.append(float(image @ basis[step]))
        size = float(image.norm())
        for _ in range(2):  # once leaves what cancellation lost; twice is enough (Kahan)
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        left = float(image.norm())
        if step + 1 == steps or left <= 10 * torch.finfo(start.dtype).eps * size:
            break
        beside.append(left)
        basis[step + 1] = image / left
    return diagonal, beside


def _product(
    loss: Callable[[Any], Tensor], flat: Tensor, shaped: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """v ↦ (∂²loss/∂θ∂θ') v, forward over reverse: about two gradients."""
    gradient = grad(lambda v: loss(shaped(v)))

    def apply(vector: Tensor) -> Tensor:
        found: Tensor = jvp(gradient, (flat,), (vector,))[1]
        return found

    return apply


def _flattened(params: Parameters) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One vector of all parameters, and the way back to their structure."""
    if isinstance(params, Tensor):
        return params.detach().flatten(), lambda v: v.view(params.shape)
    tensors = list(params.values()) if isinstance(params, Mapping) else list(params)
    sizes = [t.numel() for t in tensors]

    def shaped(vector: Tensor) -> Any:
        pieces = [v.view(t.shape) for v, t in zip(torch.split(vector, sizes), tensors, strict=True)]
        if isinstance(params, Mapping):
            return dict(zip(params, pieces, strict=True))
        return pieces

    return torch.cat([t.detach().flatten() for t in tensors]), shaped
