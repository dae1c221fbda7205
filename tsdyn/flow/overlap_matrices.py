"""Order parameters of a two-layer student and its teacher: their computation from weights, and weights that have them.

With inputs x ~ N(0, I) and fields l_i = w_i·x/√N, r_m = B_m·x/√N, online learning depends only on

    Q = w wᵀ/N,  R = w Bᵀ/N,  T = B Bᵀ/N   and the outgoing weights v, A:   φ(x) = Σ v_i σ(l_i),  y(x) = Σ A_m σ(r_m).

A `Network` computes σ(w·x): its weights are w/√N already, so its overlaps are not divided by N again.

Source: Saad & Solla (1995); Goldt et al. (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.arguments import NETWORK, takes
from tsdyn.gaussian import interaction
from tsdyn.networks import node_pairs
from tsdyn.networks.activations import Activation
from tsdyn.networks.members_alone import product
from tsdyn.networks.network import Network, require_plain
from tsdyn.networks.node_pairs import FIELDS

SOURCE = "Saad & Solla 1995; Goldt et al. 2019 (arXiv 1906.08632)"
#: Overlaps are refused if their least eigenvalue is below minus this share of the largest: no weights have them.
_INDEFINITE = 1e-9


class Overlaps(NamedTuple):
    """Order parameters and outgoing weights; leading dimensions are members.

    Attributes:
        Q: w_i·w_k/N, (…, node, node_2).
        R: w_i·B_m/N, (…, node, teacher_node).
        T: B_n·B_m/N, (…, teacher_node, teacher_node_2).
        v: Outgoing weights of the student, (…, node).
        A: Outgoing weights of the teacher, (…, teacher_node).
    """

    Q: Float[Tensor, "*member node node"]
    R: Float[Tensor, "*member node teacher_node"]
    T: Float[Tensor, "*member teacher_node teacher_node"]
    v: Float[Tensor, "*member node"]
    A: Float[Tensor, "*member teacher_node"]

    @property
    def covariance(self) -> Float[Tensor, "*member field field"]:
        """Covariance of the fields, [[Q, R], [Rᵀ, T]]."""
        return torch.cat([torch.cat([self.Q, self.R], -1), torch.cat([self.R.mT, self.T], -1)], -2)

    @property
    def masses(self) -> Float[Tensor, "*member field"]:
        """Masses m = (v, −A), by which student minus teacher is Σ m_z σ(field z)."""
        return torch.cat([self.v, -self.A], -1)


def _tensor(x: ArrayLike | Tensor) -> Tensor:
    given = x if isinstance(x, Tensor) else torch.as_tensor(np.array(x), device="cpu")
    return given.detach().to(torch.float64)


def checked(
    caller: str,
    Q: ArrayLike | Tensor,
    R: ArrayLike | Tensor,
    T: ArrayLike | Tensor,
    v: ArrayLike | Tensor | None = None,
    A: ArrayLike | Tensor | None = None,
) -> Overlaps:
    """The overlaps in float64 with leading dimensions broadcast; raises ValueError if no weights can have them.

    Args:
        caller: Name of the public function, for messages.
        Q: (…, K, K).
        R: (…, K, M).
        T: (…, M, M).
        v: (…, K); ones unless given, the committee machine.
        A: (…, M); ones unless given.

    Raises:
        ValueError: for shapes that do not fit together, values that are not finite, and overlaps that are not
            symmetric or not positive semidefinite.
    """
    for name, x in (("Q", Q), ("R", R), ("T", T)):
        said = getattr(x, "attrs", {}).get("normalisation", FIELDS)
        if said != FIELDS:
            raise ValueError(f"{caller}: {name} is the {said!r}, not the {FIELDS!r}")
    q, r, t = (_tensor(x) for x in (Q, R, T))
    if r.ndim < 2:
        raise ValueError(f"{caller}: R has shape {tuple(r.shape)}; it is (node, teacher_node)")
    nodes, teacher_nodes = r.shape[-2:]
    outgoing = [r.new_ones(n) if x is None else _tensor(x) for x, n in ((v, nodes), (A, teacher_nodes))]
    wanted = {"Q": (nodes, nodes), "T": (teacher_nodes, teacher_nodes), "v": (nodes,), "A": (teacher_nodes,)}
    for (name, shape), x in zip(wanted.items(), (q, t, *outgoing), strict=True):
        if x.shape[-len(shape) :] != shape:
            raise ValueError(
                f"{caller}: {name} has shape {tuple(x.shape)}; R says {nodes} student and {teacher_nodes} teacher "
                f"nodes, so it ends in {shape}"
            )
    lead = torch.broadcast_shapes(q.shape[:-2], r.shape[:-2], t.shape[:-2], *(x.shape[:-1] for x in outgoing))
    found = Overlaps(
        *(x.expand(*lead, *x.shape[-2:]) for x in (q, r, t)), *(x.expand(*lead, x.shape[-1]) for x in outgoing)
    )
    if not all(torch.isfinite(x).all() for x in found):
        raise ValueError(f"{caller}: overlaps or outgoing weights are not finite")
    for name, x in (("Q", q), ("T", t)):
        if not torch.allclose(x, x.mT, rtol=1e-9, atol=1e-12):
            raise ValueError(f"{caller}: {name} is not symmetric; an overlap w_i·w_k is w_k·w_i")
    eigenvalues = torch.linalg.eigvalsh(found.covariance)
    if (eigenvalues[..., 0] < -_INDEFINITE * eigenvalues[..., -1]).any():
        raise ValueError(
            f"{caller}: [[Q, R], [Rᵀ, T]] has eigenvalue {float(eigenvalues[..., 0].min()):.3g}; overlaps of weights "
            "have no negative one"
        )
    return found


@takes(student=NETWORK, teacher=NETWORK)
def overlaps(student: Network, teacher: Network) -> Overlaps:
    """Order parameters of a student and its teacher, for inputs of unit variance; ``flow.overlaps``.

    Args:
        student: Two layers, one output, no biases.
        teacher: Likewise, with the same activation and inputs.

    Raises:
        ValueError: for other depths, outputs, biases, or networks that differ in activation or inputs.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import flow
        >>> net = tsdyn.Network([torch.eye(2, 4).double(), torch.ones(1, 2).double()], activation="erf")
        >>> flow.overlaps(net, net).Q.shape
        torch.Size([2, 2])
    """
    require_plain("overlaps", student, teacher)
    for role, network in (("student", student), ("teacher", teacher)):
        if network.depth != 2 or network.widths[-1] != 1:
            raise ValueError(f"overlaps: the {role} is {network}; order parameters are of two layers and one output")
        if any(b is not None and bool((b.detach() != 0).any()) for b in network.biases):
            raise ValueError(f"overlaps: the {role} has biases; its fields then do not have mean zero")
    if student.widths[0] != teacher.widths[0] or _kind(student) != _kind(teacher):
        raise ValueError(f"overlaps: {student} and {teacher} differ in inputs or activation")
    w, b = student.weights[0].detach(), teacher.weights[0].detach()
    return Overlaps(
        Q=node_pairs.overlap(w, w),
        R=node_pairs.overlap(w, b),
        T=node_pairs.overlap(b, b),
        v=student.weights[1].detach()[0],
        A=teacher.weights[1].detach()[0],
    )


def _kind(network: Network) -> tuple[str, float | None]:
    return network.activation.name, network.activation.leak


def generalization_error(overlaps: Overlaps, sigma: Activation) -> Float[Tensor, "*member"]:
    """Generalization error eg = ½ E[(φ − y)²] = ½ Σ m_z m_z' E[σ(z) σ(z')], y without noise; for any activation.

    Terms of order 1 cancel, so its absolute error is about 1e-15 of Σ |m_z m_z' E[σσ]|, or that of the overlaps.
    """
    C, masses = overlaps.covariance, overlaps.masses
    own = C.diagonal(dim1=-2, dim2=-1)
    A, B, c = torch.broadcast_tensors(own[..., :, None], own[..., None, :], C)
    pairs = interaction.interaction_of(sigma)(A, B, c)
    return product(product(masses[..., None, :], pairs), masses[..., :, None])[..., 0, 0] / 2


def _stated(name: str) -> dict[str, str]:
    return {"normalisation": FIELDS} if name in ("Q", "R", "T") else {}


def weights(
    overlaps: Overlaps, inputs: int, draw: np.random.Generator
) -> tuple[Float[Tensor, "node input"], Float[Tensor, "teacher_node input"]]:
    """Draw incoming weights w of the student and B of the teacher with exactly these overlaps, in N dimensions.

    Args:
        overlaps: Overlaps of one member.
        inputs: N, at least the number of student and teacher nodes together.
        draw: Generator for the frame, which is uniform among orthonormal ones.

    Raises:
        ValueError: if there are fewer inputs than nodes.
    """
    nodes, fields = overlaps.Q.shape[-1], len(overlaps.masses)
    if inputs < fields:
        raise ValueError(
            f"weights: inputs={inputs}; {nodes} student and {fields - nodes} teacher nodes with prescribed overlaps "
            f"need {fields} dimensions"
        )
    frame, triangle = np.linalg.qr(draw.standard_normal((inputs, fields)))
    frame = frame * np.sign(np.diag(triangle))  # makes the frame uniform: QR's own choice of signs is not
    values, vectors = torch.linalg.eigh(overlaps.covariance)
    root = vectors * (values.clamp(min=0) * inputs).sqrt()
    rows = root @ torch.from_numpy(frame.T)
    return rows[:nodes], rows[nodes:]


def labelled(
    path: Overlaps,
    alpha: np.ndarray,
    sigma: Activation,
    *,
    seeds: Sequence[int] | None,
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Labelled Dataset of order parameters and ``eg`` over alpha, and over seed if `seeds` are given.

    Args:
        path: Q, R, v (…, alpha, …); T and A (…,) of the teacher, which are constant.
        alpha: Steps/N.
        sigma: Activation.
        seeds: Labels of the leading dimension.
        attrs: Attributes of the Dataset.
    """
    member = () if seeds is None else ("seed",)
    per_alpha = Overlaps(path.Q, path.R, path.T[..., None, :, :], path.v, path.A[..., None, :])
    moving = Overlaps(*(x.expand(*path.v.shape[:-1], *x.shape[path.v.ndim - 1 :]) for x in per_alpha))
    parts = {
        "Q": (("alpha", "node", "node_2"), path.Q, "w_i·w_k/N"),
        "R": (("alpha", "node", "teacher_node"), path.R, "w_i·B_m/N"),
        "T": (("teacher_node", "teacher_node_2"), path.T, "B_n·B_m/N"),
        "v": (("alpha", "node"), path.v, "outgoing weight of the student"),
        "A": (("teacher_node",), path.A, "outgoing weight of the teacher"),
        "eg": (("alpha",), generalization_error(moving, sigma), "½ E[(student − teacher without noise)²]"),
    }
    coordinates: dict[str, Any] = {
        "alpha": ("alpha", alpha, {"units": "1", "long_name": "online time: steps / N"}),
        **({} if seeds is None else {"seed": list(seeds)}),
    }
    return xr.Dataset(
        {
            key: ((*member, *dims), x.numpy(), {"units": "1", "long_name": text, "source": SOURCE} | _stated(key))
            for key, (dims, x, text) in parts.items()
        },
        coordinates,
        {
            "activation": sigma.name,
            "convention": "fields w·x/√N; w += rate/√N v σ'(l) Δ x, v += second rate/N σ(l) Δ, Δ = y + noise − φ; "
            "batches average; noise is a standard deviation; eg has ½",
            **attrs,
        },
    )
