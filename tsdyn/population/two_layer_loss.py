"""The population loss of a two-layer student against a two-layer teacher on Gaussian inputs.

    L = E‖Σ aᵢ σ(wᵢ·x) − Σ bⱼ σ(vⱼ·x)‖²,   x ~ N(0, I),  without ½.

Student and teacher together are one signed measure over rows z with masses m (aᵢ at wᵢ, −bⱼ at vⱼ), so that
L = Σ m_z·m_z' g(z, z'): gradient and Hessian need only g's partial derivatives between student rows and all rows.

Source: Saad & Solla (1995); Simsek et al. (2023), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tsdyn.arguments import NETWORK, takes
from tsdyn.gaussian import interaction
from tsdyn.gaussian.interaction import Interaction
from tsdyn.networks.members_alone import product
from tsdyn.networks.network import Network, require_plain
from tsdyn.problem.inputs import generator

Parameters = Float[Tensor, "*member parameter"]


class PopulationLoss:
    """Population loss L of students of one width against one teacher, batched over leading dimensions.

    A student's parameters are one row (…, n·(d + C)): its incoming weights w (n, d), then its outgoing weights a
    (n, C), both row by row; `pack` and `unpack` convert.

    Args:
        teacher: Two layers, no biases.
        nodes: Hidden width n of the students.
        activation: Activation of the students, which must be the teacher's: others have no closed form.

    Attributes:
        parameters: Length of a row of parameters.
        teacher: As given.

    Raises:
        ValueError: for a teacher of another depth, with biases, or an activation that differs from the teacher's.
    """

    def __init__(self, teacher: Network, nodes: int, *, activation: str | None = None) -> None:
        _check_two_layers("population loss", "teacher", teacher)
        name = teacher.activation.name
        if activation not in (None, name):
            raise ValueError(
                f"population loss: the student is {activation}, the teacher {name}; interactions of two different "
                "activations have no closed form here, use one activation"
            )
        if nodes < 1:
            raise ValueError(f"population loss: nodes={nodes}; a student has at least one hidden node")
        self.teacher = teacher
        self.nodes = nodes
        self.inputs, self.outputs = teacher.widths[0], teacher.widths[-1]
        self.parameters = nodes * (self.inputs + self.outputs)
        self.interaction: Interaction = interaction.interaction_of(teacher.activation)
        self._rows, self._masses = teacher.weights[0].detach(), -teacher.weights[1].detach().T
        norms = self._rows.square().sum(-1)
        among = self.interaction(norms[:, None], norms, self._rows @ self._rows.T)
        self.teacher_power = float((among * (self._masses @ self._masses.T)).sum())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the teacher's weights and of all results."""
        return self._rows.dtype

    def pack(self, students: Network | Sequence[Network]) -> Float[Tensor, "member parameter"]:
        """Parameters of students as rows (student, parameter).

        Raises:
            ValueError: for a student of another shape or activation, or with biases.
        """
        networks = [students] if isinstance(students, Network) else list(students)
        for network in networks:
            _check_two_layers("population loss", "student", network)
            widths = (self.inputs, self.nodes, self.outputs)
            if network.widths != widths or network.activation.name != self.teacher.activation.name:
                raise ValueError(f"population loss: {network} is not {widths} {self.teacher.activation.name}")
        return torch.stack([torch.cat([n.weights[0].flatten(), n.weights[1].T.flatten()]) for n in networks])

    def unpack(
        self, parameters: Parameters
    ) -> tuple[Float[Tensor, "*member node input"], Float[Tensor, "*member node output"]]:
        """Incoming weights w and outgoing weights a from rows of parameters."""
        w, a = parameters.split([self.nodes * self.inputs, self.nodes * self.outputs], -1)
        return w.unflatten(-1, (self.nodes, self.inputs)), a.unflatten(-1, (self.nodes, self.outputs))

    def network(self, row: Float[Tensor, " parameter"]) -> Network:
        """The student with one row of parameters."""
        w, a = self.unpack(row)
        sigma = self.teacher.activation
        return Network([w, a.T], activation=sigma.name, leak=sigma.leak or 0.0)

    def _signed(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """w, a; rows z (…, n+m, d) and masses (…, n+m, C) of student and teacher; covariances of student with rows."""
        w, a = self.unpack(parameters)
        lead = w.shape[:-2]
        z = torch.cat([w, self._rows.to(w).expand(*lead, *self._rows.shape)], -2)
        masses = torch.cat([a, self._masses.to(w).expand(*lead, *self._masses.shape)], -2)
        A, B = w.square().sum(-1)[..., None], z.square().sum(-1)[..., None, :]
        return w, a, z, masses, A, B, product(w, z.mT)

    def value(self, parameters: Parameters) -> Float[Tensor, "*member"]:
        """L of each row of parameters; also differentiable by autograd, with which tests compare `gradient`."""
        _w, a, _z, masses, A, B, c = self._signed(parameters)
        n = self.nodes
        g = self.interaction(A, B, c) * product(a, masses.mT)
        return g[..., :n].sum((-2, -1)) + 2 * g[..., n:].sum((-2, -1)) + self.teacher_power

    def gradient(self, parameters: Parameters) -> Parameters:
        """Gradient ∂L/∂(w, a) in closed form."""
        w, a, z, masses, A, B, c = self._signed(parameters)
        g = self.interaction.partials(A, B, c)
        pull = product(a, masses.mT)
        by_w = 4 * (pull * g.A).sum(-1, keepdim=True) * w + 2 * product(pull * g.c, z)
        by_a = 2 * product(g.value, masses)
        return torch.cat([by_w.flatten(-2), by_a.flatten(-2)], -1)

    def hessian(self, parameters: Parameters) -> Float[Tensor, "*member parameter parameter"]:
        """Hessian ∂²L/∂(w, a)² in closed form."""
        w, a, z, masses, A, B, c = self._signed(parameters)
        lead, (n, d, outputs) = w.shape[:-2], (self.nodes, self.inputs, self.outputs)
        g = self.interaction.partials(A, B, c)
        pull = product(a, masses.mT)
        found = w.new_empty(*lead, self.parameters, self.parameters)
        eye = torch.eye(d, dtype=w.dtype, device=w.device)

        # two different nodes: 2 aᵢ·aₖ [g_c I + g_cc (wᵢwₖᵀ + wₖwᵢᵀ) + 2g_Ac wᵢwᵢᵀ + 2g_Bc wₖwₖᵀ]
        size = n * d
        blocks = found[..., :size, :size].unflatten(-1, (n, d)).unflatten(-3, (n, d))  # (…, i, input, k, input_2)
        own = 2 * pull[..., :n]
        cc, Ac, Bc = (own * part[..., :n] for part in (g.cc, 2 * g.Ac, 2 * g.Bc))
        w_i, w_k = w[..., :, :, None], w.mT[..., None, :, :]  # (…, i, input, k)
        left = cc[..., None, :] * w_k + Ac[..., None, :] * w_i  # times wᵢᵀ
        right = cc[..., None, :] * w_i + Bc[..., None, :] * w_k  # times wₖᵀ
        torch.mul(left[..., None], w[..., :, None, None, :], out=blocks)
        blocks.addcmul_(right[..., None], w[..., None, None, :, :])
        blocks.diagonal(dim1=-3, dim2=-1).add_((own * g.c[..., :n])[..., None])

        # one node, against all rows z: 2 Σ aᵢ·m_z [2g_A I + 4g_AA wᵢwᵢᵀ + 2g_Ac (wᵢzᵀ + zwᵢᵀ) + g_cc zzᵀ]
        both = w[..., :, None] * product(4 * (pull * g.Ac), z)[..., None, :]
        weighted = z[..., None, :, :] * (2 * pull * g.cc)[..., None]
        diagonal = both + both.mT + product(weighted.mT, z[..., None, :, :])
        diagonal += (8 * (pull * g.AA).sum(-1))[..., None, None] * (w[..., :, None] * w[..., None, :])
        diagonal += (4 * (pull * g.A).sum(-1))[..., None, None] * eye
        blocks.diagonal(dim1=-4, dim2=-2).add_(diagonal.movedim(-3, -1))

        # incoming by outgoing: 2 a_ic (2g_A wᵢ + g_c wₖ), and on the diagonal 2 Σ m_zc (2g_A wᵢ + g_c z)
        mixed = 2 * (2 * g.A[..., None, :n] * w_i + g.c[..., None, :n] * w_k)
        cross = mixed[..., None] * a[..., :, None, None, :]  # (…, i, input, k, output)
        force = 4 * w[..., :, None] * product(g.A, masses)[..., None, :]
        force += 2 * product(z.mT[..., None, :, :], g.c[..., :, None] * masses[..., None, :, :])
        cross.diagonal(dim1=-4, dim2=-2).add_(force.movedim(-3, -1))
        cross = cross.reshape(*lead, size, n * outputs)
        found[..., :size, size:] = cross
        found[..., size:, :size] = cross.mT
        eye = torch.eye(outputs, dtype=w.dtype, device=w.device)
        readout = 2 * g.value[..., :n, None, :n, None] * eye[:, None]
        found[..., size:, size:] = readout.reshape(*lead, n * outputs, n * outputs)
        return found

    def least_norm(self, parameters: Parameters) -> Float[Tensor, "*member"]:
        """Least |wᵢ| of each student if σ has a kink at 0, which makes the flow singular at w = 0; else infinite."""
        w, _ = self.unpack(parameters)
        if not self.interaction.homogeneous or self.teacher.activation.leak == 1:
            return w.new_full(w.shape[:-2], torch.inf)
        shortest: Tensor = w.norm(dim=-1).amin(-1)
        return shortest

    @property
    def flat_directions(self) -> int:
        """Number of zero Hessian eigenvalues forced by symmetry: one per node if w → sw, a → a/s leaves L unchanged."""
        return self.nodes if self.interaction.homogeneous else 0

    def labelled(self, parameters: Parameters) -> Mapping[str, tuple[tuple[str, ...], Tensor]]:
        """Named parts of rows of parameters, with the names of their dimensions after the leading ones."""
        w, a = self.unpack(parameters)
        return {"weight": (("node", "input_node"), w), "outgoing": (("node", "output"), a)}


def starts(loss: PopulationLoss, seeds: Iterable[int]) -> Tensor:
    """Initial rows of parameters (seed, parameter) by Glorot & Bengio (2010): each layer N(0, 2/(inputs + outputs))."""
    n, d, outputs = loss.nodes, loss.inputs, loss.outputs
    rows = []
    for seed in seeds:
        draw = generator(seed, "student")
        w = draw.standard_normal(n * d) * np.sqrt(2 / (n + d))
        rows.append(np.concatenate([w, draw.standard_normal(n * outputs) * np.sqrt(2 / (n + outputs))]))
    return torch.from_numpy(np.stack(rows)).to(loss.dtype)


@takes(student=NETWORK, teacher=NETWORK)
def loss(student: Network, teacher: Network) -> Float[Tensor, ""]:
    """Population loss E‖student(x) − teacher(x)‖² on x ~ N(0, I), without ½.

    Args:
        student: Two layers, no biases; gradients flow to its parameters.
        teacher: Two layers, no biases, the same activation, inputs and outputs.

    Raises:
        ValueError: for other depths, biases, different activations, inputs or outputs.

    Source: Simsek et al. (2023), section 3.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import population
        >>> teacher = tsdyn.Network([torch.eye(2, 3).double(), torch.ones(1, 2).double()], activation="erf")
        >>> round(float(population.loss(teacher, teacher)), 12)
        0.0
    """
    _check_two_layers("population.loss", "student", student)
    closed = PopulationLoss(teacher, student.widths[1], activation=student.activation.name)
    return closed.value(closed.pack(student)[0])


def loss_from_overlaps(
    activation: str,
    outgoing: Float[Tensor, "node output"],
    teacher_outgoing: Float[Tensor, "teacher_node output"],
    Q: Float[Tensor, "node node_2"],
    R: Float[Tensor, "node teacher_node"],
    T: Float[Tensor, "teacher_node teacher_node_2"],
    *,
    leak: float = 0.01,
) -> Float[Tensor, ""]:
    """Population loss from the order parameters Q = w·w, R = w·v, T = v·v (not divided by the dimension).

    In the terms of Simsek et al. (2023): Q = rᵢrₖρᵢₖ, R = rᵢ|vⱼ|uᵢⱼ.  Differentiable.

    Raises:
        ValueError: if the overlaps belong to no set of weights: [[Q, R], [Rᵀ, T]] must be positive semidefinite.
    """
    kernel = interaction.interaction_of(activation, leak=leak)
    C = torch.cat([torch.cat([Q, R], 1), torch.cat([R.mT, T], 1)])
    least = torch.linalg.eigvalsh(C.detach())[0]
    if least < -1e-10 * C.detach().diagonal().max():
        raise ValueError(
            f"loss_from_overlaps: [[Q, R], [Rᵀ, T]] has eigenvalue {float(least):.3g}; overlaps of weights have no "
            "negative one"
        )
    masses = torch.cat([outgoing, -teacher_outgoing])
    A = C.diagonal()
    return (kernel(A[:, None].expand_as(C), A.expand_as(C), C) * (masses @ masses.mT)).sum()


def _check_two_layers(caller: str, role: str, network: Network) -> None:
    require_plain(caller, network)
    if network.depth != 2:
        raise ValueError(f"{caller}: the {role} is {network}; the population loss is of two layers")
    if any(b is not None and bool((b.detach() != 0).any()) for b in network.biases):
        raise ValueError(
            f"{caller}: the {role} has biases; E[σ(w·x + b) σ(v·x + b')] has no closed form here. "
            "Set them to None, or use flow.FunctionLoss on a finite sample"
        )
