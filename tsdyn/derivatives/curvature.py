"""Second derivatives of a scalar loss in its parameters: products, the dense Hessian, its spectrum and its density.

Each function takes either ``(loss, params)``, a function of parameters and the point to differentiate it at, or
``(module, loss, x, y)``: then the function is ``loss(module(x), y)`` on the whole batch, and its arguments are the
module's parameters that require a gradient.  Products with the Hessian are reverse mode over reverse mode; the dense
Hessian is its products with all unit vectors, by vmap where a random combination of them agrees with a single product
(Freivalds 1977).  Of fully connected networks both are formulas (`layered`), where these agree with plain autograd.
A loss that ignores its parameters, draws random numbers or changes the module's state is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tsdyn.arguments import WHOLE, check
from tsdyn.derivatives import labels
from tsdyn.derivatives.agreement import TOWARDS_ZERO, Compared, agree, agree_up_to_cancellation, asymmetry, comparable
from tsdyn.derivatives.assumptions import Asked, Loss, Tree, asked, gradients_on, log
from tsdyn.derivatives.given import (
    Parameters,
    as_tensor,
    bound_to_a_form,
    flat,
    leaves_of,
    names_of,
    refuse_unreal,
    steady,
)
from tsdyn.derivatives.layered import Layered, OfSquares, layered, proved
from tsdyn.derivatives.straight import straight
from tsdyn.derivatives.unfit import explained, strided
from tsdyn.memory import refuse_beyond
from tsdyn.networks.network import Network

#: Hessians of at most this many parameters are diagonalized densely, which takes less than a second and is exact.
DENSE_PARAMETERS = 1000
#: Limit on the bytes of the Hessian-vector products computed together.
_AT_ONCE = 64 << 20


@overload
def hessian(loss: Callable[[Any], Tensor], params: Parameters) -> Tensor: ...
@overload
def hessian(module: nn.Module | Network, loss: Loss, x: Tree, y: Tree = None) -> Tensor: ...
@overload
def hessian(*args: Any, labelled: Literal[True], **keywords: Any) -> xr.Dataset: ...
def hessian(*args: Any, labelled: bool = False, **keywords: Any) -> Any:
    """∂²loss/∂θ∂θ', dense, (parameter, parameter), in the order the parameters are given, each flattened.

    Called ``hessian(loss, params)`` or ``hessian(module, loss, x, y)``; with ``labelled=True`` a Dataset of ``hessian``
    (parameter, parameter_2), whose coordinates say the layer, node and input node of each parameter.

    Args:
        loss: Of parameters of the structure of `params` → scalar; with a module, ``loss(output, target)`` of the batch.
        params: A tensor, a sequence or a mapping of tensors.
        module: Deterministic; samples may mix. Its parameters that require a gradient, in their order, are θ.
        x, y: As in `per_sample_gradients`.

    Raises:
        ValueError: for a loss that ignores its parameters, draws random numbers, or has no second derivative in torch.
        MemoryError: before it starts, if it does not fit.

    Examples:
        >>> import torch
        >>> from tsdyn import derivatives
        >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> derivatives.hessian(lambda p: (p["w"] ** 2).sum(), params).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    if labelled:
        return _labelled("hessian", hessian, args, keywords)
    with _curved("hessian", args, keywords) as (curve, _):
        curve.refuse_asymmetry()
        return curve.dense()


@overload
def hessian_vector_product(loss: Callable[[Any], Tensor], params: Parameters, vector: Parameters) -> Tensor: ...
@overload
def hessian_vector_product(module: nn.Module | Network, loss: Loss, x: Tree, y: Tree, vector: Parameters) -> Tensor: ...
def hessian_vector_product(*args: Any, **keywords: Any) -> Tensor:
    """(∂²loss/∂θ∂θ') v, (parameter,), flattened as in `hessian`; reverse over reverse, about two gradients.

    Called ``hessian_vector_product(loss, params, vector)`` or ``hessian_vector_product(module, loss, x, y, vector)``.

    Args:
        vector: v, (parameter,), or its pieces in the order of the parameters, or by their names.

    Raises:
        ValueError: as `hessian`, or for a vector of another length, of other pieces or other names.

    Examples:
        >>> import torch
        >>> from tsdyn import derivatives
        >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> along = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> derivatives.hessian_vector_product(lambda p: (p["w"] ** 2).sum(), params, along)
        tensor([2., 0.], dtype=torch.float64)
    """
    with _curved("hessian_vector_product", args, keywords, vector=inspect.Parameter.empty) as (curve, given):
        vector = flat(given["vector"], lambda: list(names_of(given)))
        if vector.shape != (curve.size,):
            raise ValueError(
                f"hessian_vector_product: the vector has shape {tuple(vector.shape)}, there are {curve.size} parameters"
            )
        curve.refuse_asymmetry()
        return curve.product(vector.detach().to(curve.device, curve.dtype))


@overload
def hessian_spectrum(loss: Callable[[Any], Tensor], params: Parameters, k: int | None = 10) -> Tensor: ...
@overload
def hessian_spectrum(
    module: nn.Module | Network, loss: Loss, x: Tree, y: Tree = None, k: int | None = 10
) -> Tensor: ...
@overload
def hessian_spectrum(*args: Any, labelled: Literal[True], **keywords: Any) -> xr.Dataset: ...
def hessian_spectrum(*args: Any, labelled: bool = False, **keywords: Any) -> Any:
    """The k algebraically largest Hessian eigenvalues, largest first; all of them for k=None.

    Called ``hessian_spectrum(loss, params, k=10)`` or ``hessian_spectrum(module, loss, x, y, k=10)``.  Dense up to
    `DENSE_PARAMETERS` parameters or if k is not below their number, otherwise SciPy's ``eigsh`` on Hessian-vector
    products to machine precision.  A Hessian that is zero has eigenvalues zero.  With ``labelled=True`` a Dataset of
    ``hessian_eigenvalue`` (mode,).

    Raises:
        ValueError: as `hessian`, for k < 1, or for products that are not those of a symmetric matrix.
        RuntimeError: if Lanczos does not converge, with what did.
        MemoryError: before it starts, if a dense Hessian does not fit.

    Examples:
        >>> import torch
        >>> from tsdyn import derivatives
        >>> params = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
        >>> derivatives.hessian_spectrum(lambda p: (p["w"] ** 4).sum(), params, k=2)
        tensor([108.,  48.], dtype=torch.float64)
    """
    if labelled:
        return _labelled("hessian_spectrum", hessian_spectrum, args, keywords, k=10)
    with _curved("hessian_spectrum", args, keywords, k=10) as (curve, given):
        k = given["k"]
        check("hessian_spectrum", "k", 1 if k is None else k, WHOLE)
        if k is not None and k < 1:
            raise ValueError(f"hessian_spectrum: k={k}; ask for at least one eigenvalue, or None for all")
        curve.refuse_asymmetry()
        if k is None or k >= curve.size - 1 or curve.size <= DENSE_PARAMETERS:
            every: Tensor = torch.linalg.eigvalsh(curve.dense()).flip(0)
            return every if k is None else every[:k]
        return _largest(curve, k)


def _largest(curve: _Curve | _Formulas, k: int) -> Tensor:
    """The k largest eigenvalues, by Lanczos with implicit restarts."""

    def apply(vector: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1))).to(curve.device)
        found: np.ndarray = curve.product(at).cpu().numpy()
        return found

    dtype = torch.zeros((), dtype=curve.dtype, device="cpu").numpy().dtype
    operator = LinearOperator((curve.size, curve.size), matvec=apply, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(curve.size).astype(dtype)
    if not apply(start).any():  # only the zero operator maps a random vector to 0, and ARPACK refuses it
        return torch.zeros(k, dtype=curve.dtype, device=curve.device)
    try:
        values = eigsh(operator, k=k, which="LA", v0=start, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"hessian_spectrum: {len(error.eigenvalues)} of {k} eigenvalues converged, {error.eigenvalues}; "
            "ask for fewer, or for all (k=None)"
        ) from error
    except ArpackError as error:
        raise RuntimeError(f"hessian_spectrum: Lanczos failed ({error}); ask for all (k=None)") from error
    return torch.from_numpy(np.sort(values)[::-1].copy()).to(curve.device)


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of the density of Hessian eigenvalues, (1/n) Σ_i δ(λ − λ_i), by Gauss quadrature.

    Attributes:
        nodes: Ritz values of each probe, increasing.
        weights: Quadrature weight of each node, ≥ 0; those of one probe sum to 1.
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


@overload
def hessian_density(
    loss: Callable[[Any], Tensor], params: Parameters, *, probes: int = 10, steps: int = 80, seed: int = 0
) -> SpectralDensity: ...
@overload
def hessian_density(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    probes: int = 10,
    steps: int = 80,
    seed: int = 0,
) -> SpectralDensity: ...
@overload
def hessian_density(*args: Any, labelled: Literal[True], **keywords: Any) -> xr.Dataset: ...
def hessian_density(*args: Any, labelled: bool = False, **keywords: Any) -> Any:
    """Density of the Hessian's eigenvalues by stochastic Lanczos quadrature; no Hessian is formed.

    Called ``hessian_density(loss, params)`` or ``hessian_density(module, loss, x, y)``; probes=10, steps=80, seed=0.
    `probes` random directions, for each `steps` Hessian-vector products and a full reorthogonalization, without which
    converged eigenvalues come back as ghosts and weigh twice.  Fewer steps are taken where a Krylov space is exhausted;
    its nodes are repeated with weight 0.  With ``labelled=True`` a Dataset of ``eigenvalue`` and ``share``
    (probe, step).

    Source: Golub and Meurant (2010), Matrices, Moments and Quadrature, chapter 7.

    Raises:
        ValueError: as `hessian_spectrum`, for fewer than one probe or step.
        MemoryError: before it starts, if the basis, (steps, parameter), does not fit.
    """
    if labelled:
        return _labelled("hessian_density", hessian_density, args, keywords, probes=10, steps=80, seed=0)
    with _curved("hessian_density", args, keywords, probes=10, steps=80, seed=0) as (curve, given):
        probes, steps = given["probes"], given["steps"]
        if probes < 1 or steps < 1:
            raise ValueError(f"hessian_density: probes={probes}, steps={steps}; at least one of each")
        steps = min(steps, curve.size)
        refuse_beyond(
            "hessian_density", 2 * steps * curve.size * curve.dtype.itemsize, curve.device, "take fewer steps"
        )
        curve.refuse_asymmetry()
        draw = torch.Generator().manual_seed(given["seed"])
        nodes, weights = np.zeros((2, probes, steps))
        for probe in range(probes):
            start = torch.randn(curve.size, generator=draw, dtype=curve.dtype, device="cpu").to(curve.device)
            diagonal, beside = _lanczos(curve.product, start, steps)
            values, vectors = eigh_tridiagonal(diagonal, beside)
            nodes[probe] = values[-1]
            nodes[probe, : len(values)] = values
            weights[probe, : len(values)] = vectors[0] ** 2
        return SpectralDensity(nodes, weights)


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of the tridiagonal matrix that `apply` is in the Krylov space of `start`."""
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        image = apply(basis[step])
        diagonal.append(float(image @ basis[step]))
        size = float(image.norm())
        for _ in range(2):  # one orthogonalization leaves what cancellation lost; two are enough (Kahan)
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        left = float(image.norm())
        if step + 1 == steps or left <= 10 * torch.finfo(start.dtype).eps * size:
            break
        beside.append(left)
        basis[step + 1] = image / left
    return diagonal, beside


def _labelled(
    caller: str, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], **more: Any
) -> xr.Dataset:
    """The result of one of these functions as a Dataset; arrays with labels among the arguments lose theirs."""
    given = {name: labels.unlabelled(value) for name, value in bound_to_a_form(caller, args, keywords, more).items()}
    found = function(**given)
    if isinstance(found, SpectralDensity):
        attrs = [{"units": "1", "long_name": what, "source": labels.SOURCE} for what in ("Ritz value", "its weight")]
        pairs = zip(("eigenvalue", "share"), (found.nodes, found.weights), attrs, strict=True)
        return xr.Dataset({name: (("probe", "step"), values, held) for name, values, held in pairs})
    if caller == "hessian_spectrum":
        return labels.single("hessian_eigenvalue", found, ("mode",), {}, "eigenvalue of the Hessian, largest first")
    if "module" in given:
        return labels.in_pairs("hessian", found, given["module"], "Hessian of the loss")
    params = given["params"]
    mapping = isinstance(params, Mapping | nn.ParameterDict)
    each = dict(params.items()) if mapping else dict(enumerate([params] if hasattr(params, "shape") else params))
    own = {str(name): as_tensor(value) for name, value in each.items()}
    coords = labels.twice(labels.of_parameters(own, None))
    return labels.single("hessian", found, ("parameter", "parameter_2"), coords, "Hessian of the loss")


# --- what is differentiated ----------------------------------------------------------------------------------


#: Tensors in place of the parameters → the function's value there.
_At: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


class _Curve:
    """A scalar function at one point; its gradient's graph is kept, so that a Hessian product is one backward pass.

    Args:
        caller, name: For messages.
        leaves: The parameters.
        value: The function's value.
        at: Gives it at other parameters.
    """

    def __init__(self, caller: str, name: str, leaves: Sequence[Tensor], value: Tensor, at: _At) -> None:
        self._caller, self._name, self._leaves, self._at_others = caller, name, list(leaves), at
        self._sizes = [t.numel() for t in leaves]
        self.size, self.device = sum(self._sizes), leaves[0].device
        self.dtype = torch.float32
        for t in leaves:  # 16-bit types cannot be diagonalized
            self.dtype = torch.promote_types(self.dtype, t.dtype)
        if value.requires_grad:
            slopes = self._differentiate([value], create_graph=True)
        if not value.requires_grad or all(s is None for s in slopes):
            raise ValueError(
                f"{caller}: the loss does not depend on its parameters; it must be computed from what it is given"
            )
        bent = [s for s in slopes if s is not None and s.requires_grad]
        self._slopes, self._at = bent, [i for i, s in enumerate(slopes) if any(s is b for b in bent)]
        self._quick: Layered | None = None

    def _differentiate(self, of: Sequence[Tensor], along: Sequence[Tensor] | None = None, **how: bool) -> list[Any]:
        try:
            found = torch.autograd.grad(of, self._leaves, along, allow_unused=True, **how)
        except RuntimeError as error:
            raise explained(self._caller, self._name, error) from error
        return [None if g is None else strided(g) for g in found]

    def use(self, quick: Layered | None) -> None:
        """Compute products by formulas from now on, if one agrees with plain autograd."""
        if quick is None or not comparable(self._leaves):
            return
        draw = torch.Generator().manual_seed(2)
        vector = torch.randn(self.size, generator=draw, dtype=self.dtype, device="cpu").to(self.device)
        right, found = self._plain(vector), quick.product(vector)
        if agree(found, right):
            self._quick = quick
        else:  # samples that the loss mixes, a hook on a parameter
            log.warning("%s: %s: formulas differ from plain autograd, which is used", self._caller, self._name)

    def product(self, vector: Tensor) -> Tensor:
        """H v, by formulas where there are some, else by reverse mode over reverse mode."""
        return self._plain(vector) if self._quick is None else self._quick.product(vector)

    def _plain(self, vector: Tensor) -> Tensor:
        return self._products(vector, batched=False)

    def _products(self, vectors: Tensor, *, batched: bool) -> Tensor:
        if not self._slopes:
            return torch.zeros_like(vectors)
        pieces = torch.split(vectors, self._sizes, -1)
        along = [
            pieces[i].reshape((*vectors.shape[:-1], *self._leaves[i].shape)).to(self._leaves[i].dtype) for i in self._at
        ]
        found = self._differentiate(self._slopes, along, retain_graph=True, is_grads_batched=batched)
        flat = [
            vectors.new_zeros(*vectors.shape[:-1], size)
            if g is None
            else g.detach().reshape(*vectors.shape[:-1], size).to(vectors)
            for g, size in zip(found, self._sizes, strict=True)
        ]
        return torch.cat(flat, -1)

    def dense(self) -> Tensor:
        """The dense Hessian, from its products with unit vectors; symmetric to rounding."""
        _refuse_large(self.size, self.dtype, self.device)
        unit = torch.eye(self.size, dtype=self.dtype, device=self.device)
        draw = torch.Generator().manual_seed(0)
        random = torch.randn(2, self.size, generator=draw, dtype=self.dtype, device="cpu").to(self.device)
        right = torch.stack([self._plain(v) for v in random])
        if self._quick is not None:
            found = self._quick.dense()
            if agree(random @ found, right, self._scale(found)):
                return found
            log.warning("%s: %s: the formulas' Hessian differs from plain products", self._caller, self._name)
        try:
            step = max(1, _AT_ONCE // max(1, 64 * self.size * self.dtype.itemsize))
            found = torch.cat([self._products(part, batched=True) for part in unit.split(step)])
            if comparable(self._leaves) and agree_up_to_cancellation(
                random @ found, right, self._scale(found), lambda: self._both(random)
            ):
                return found
            reason = "differs from plain products"
        except (RuntimeError, ValueError) as error:
            reason = f"fails ({str(error).strip().splitlines()[0][:120]})"
        log.warning("%s: the Hessian of %s by vmap %s; column by column instead", self._caller, self._name, reason)
        return torch.stack([self._plain(v) for v in unit])

    def _scale(self, matrix: Tensor) -> Tensor:
        """Of the rounding of a row's product with a random vector: that of its terms, not of their sum."""
        return matrix.abs().max() * math.sqrt(self.size)

    def _both(self, vectors: Tensor) -> Iterator[Compared]:
        """Products with vectors at other points, by vmap and plainly, (vector, parameter); their scale is their own."""
        for there in self._elsewhere():
            with suppress(RuntimeError, ValueError):
                yield there._products(vectors, batched=True), torch.stack([there._plain(v) for v in vectors]), 0.0

    def _elsewhere(self) -> Iterator[_Curve]:
        """The same function at points nearer to 0, where it is defined there."""
        for factor in TOWARDS_ZERO:
            leaves = [(t.detach() * factor).requires_grad_(True) for t in self._leaves]
            with suppress(RuntimeError, ValueError):
                yield _Curve(self._caller, self._name, leaves, self._at_others(leaves), self._at_others)

    def refuse_asymmetry(self) -> None:
        """Raise ValueError unless uᵀ(H w) = wᵀ(H u) for random u and w; a user's hook or backward may break it."""
        draw = torch.Generator().manual_seed(1)
        u, w = torch.randn(2, self.size, generator=draw, dtype=self.dtype, device="cpu").to(self.device)
        if not comparable(self._leaves):
            return

        def elsewhere() -> Iterator[tuple[Tensor, Tensor]]:
            for there in self._elsewhere():
                with suppress(RuntimeError, ValueError):
                    yield there.product(u), there.product(w)

        differing = asymmetry(u, self.product(u), w, self.product(w), elsewhere)
        if differing is not None:
            raise ValueError(
                f"{self._caller}: products with the Hessian of {self._name} are not those of a symmetric matrix "
                f"(uHw = {differing[0]:.6g}, wHu = {differing[1]:.6g}); a hook, or a backward pass of its own, "
                "changes its gradients"
            )


def _refuse_large(size: int, dtype: torch.dtype, device: torch.device) -> None:
    needed = 3 * size**2 * dtype.itemsize
    refuse_beyond("hessian", needed, device, "use hessian_spectrum or hessian_vector_product")


class _Formulas:
    """As `_Curve`, by formulas alone."""

    def __init__(self, caller: str, name: str, formulas: Layered | OfSquares) -> None:
        self._caller, self._name, self._formulas = caller, name, formulas
        self.size, self.device, self.dtype = formulas.size, formulas.device, formulas.dtype

    def product(self, vector: Tensor) -> Tensor:
        """H v."""
        try:
            return self._formulas.product(vector)
        except RuntimeError as error:  # of the loss, which is differentiated here
            raise explained(self._caller, self._name, error) from error

    def dense(self) -> Tensor:
        """The dense Hessian."""
        _refuse_large(self.size, self.dtype, self.device)
        assert isinstance(self._formulas, Layered), "one product was asked for"
        return self._formulas.dense()

    def refuse_asymmetry(self) -> None:
        """Nothing to refuse: `proved` takes a symmetric ∂²J/∂f² alone, and a single product looks at its own."""


@contextmanager
def _curved(
    caller: str, args: tuple[Any, ...], keywords: dict[str, Any], **more: Any
) -> Iterator[tuple[_Curve | _Formulas, dict[str, Any]]]:
    """The function to differentiate (`_Curve`), from either form of the call, and the remaining arguments."""
    given = bound_to_a_form(caller, args, keywords, more)
    with ExitStack() as stack:
        if "module" in given:
            one = stack.enter_context(asked(caller, given["module"], given["x"], given["y"], per_sample=False))
            leaves: list[Tensor] = list(one.parameters.values())
            name = one.name
            if not leaves:
                raise ValueError(f"{caller}: {name} has no parameter that requires a gradient")
            refuse_unreal(caller, leaves)

            def of_outputs(output: Tensor) -> Tensor:
                return one.value(given["loss"], output, one.targets)

            def value() -> Tensor:
                return of_outputs(one.call(one.inputs))

            formulas = _proved(one, given["loss"], leaves, once="vector" in given)
            if formulas is not None:
                yield _Formulas(caller, name, formulas), given
                return

            def at_others(parameters: Sequence[Tensor]) -> Tensor:
                named = dict(zip(one.parameters, parameters, strict=True))
                return of_outputs(one.call_with(named, one.inputs))

            curve = _traced(caller, name, leaves, lambda: one.refuse_unsteady(value), value, at_others)
            if "vector" not in given:  # a single product is not worth the comparison
                curve.use(layered(one.module, one.inputs, of_outputs, leaves))
            yield curve, given
            return
        stack.enter_context(gradients_on())
        leaves, structured = leaves_of(caller, given["params"])

        def here() -> Tensor:
            return at(leaves)

        def at(parameters: Sequence[Tensor]) -> Tensor:
            return _scalar(caller, given["loss"](structured(parameters)))

        yield _traced(caller, "the loss", leaves, lambda: steady(caller, here), here, at), given


def _proved(one: Asked, loss: Loss, leaves: Sequence[Tensor], *, once: bool) -> Layered | OfSquares | None:
    """Formulas that need no comparison; for a single product, if `once`."""
    if not comparable(leaves) or not one.known:
        return None

    def value(output: Tensor) -> tuple[Tensor, bool]:
        if straight(loss, output, one.targets) is not None:
            return loss(output, one.targets), True
        return one.refuse_unsteady(lambda: one.value(loss, output, one.targets)), False

    def squares(like: Tensor) -> tuple[Tensor, float] | None:
        told = straight(loss, like, one.targets)
        return None if told is None or told.squares is None else (one.targets.detach(), told.squares)

    try:
        return proved(one.module, one.inputs, value, leaves, once=once, squares=squares)
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return None  # plain autograd works, or raises its own error


def _traced(
    caller: str, name: str, leaves: list[Tensor], steady: Callable[[], Tensor], value: Callable[[], Tensor], at: _At
) -> _Curve:
    """The value with a graph that can be differentiated twice.

    Torch's fused weight norm has a wrong second derivative (it holds the norm constant), so it is replaced by its
    formula.  Fused attention kernels have none and are switched off; so are the recurrent layers of cuDNN and MKL-DNN
    once a product has failed.
    """
    with sdpa_kernel(SDPBackend.MATH), _WrittenOut():
        curve = _Curve(caller, name, leaves, steady(), at)
        ones = torch.ones(curve.size, dtype=curve.dtype, device=curve.device)
        try:
            curve.product(ones)
            return curve
        except (RuntimeError, ValueError) as error:
            log.warning("%s: %s; without fused kernels instead", caller, str(error).strip().splitlines()[0][:120])
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            curve = _Curve(caller, name, leaves, value(), at)
            curve.product(ones)
    return curve


class _WrittenOut(TorchFunctionMode):
    """Mode in which torch's fused weight norm is computed by its formula, w = v g/‖v‖."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3] if not kwargs else (*args, *kwargs.values(), 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def _scalar(caller: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: the loss has shape {shape}; it must be one real number")
    return value
