"""The matrices of the theory of student specialization, exactly: V_l, A_l(x), B_l(x), their expectations, Lemma 1.

Notation (docs: theory/notation).  f_l is the activation of layer l after its gate, D_l = diag σ'(z_l), f_L linear.
V_l(x) = ∂f_L/∂f_l, so V_L = I and V_{l−1} = V_l D_l W_l with W_l as torch stores it.  A constant node carries the
biases: [W̃, b; 0, 1] maps [f_{l−1}; 1] to [z_l; 1], hence column n_l + 1 of the augmented V_l is
c_l = c_{l+1} + V_{l+1} D_{l+1} b_{l+1}, c_L = 0, and f_L = V_l f_l + c_l wherever σ is piecewise linear.

Sources: Tian (2020), PMLR 119:9470; Tian et al. (2019), arXiv:1905.13405 ("Luck Matters").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.axes import Outputs
from tsdyn.batch_norm import batch_norm_gradient
from tsdyn.coupling_moments import (
    MOMENTS,
    Form,
    Moments,
    conserved_norms,
    expectations,
    fanout_norms,
    moments,
)
from tsdyn.networks import Network, Trace, require_plain
from tsdyn.theory_inputs import MEMORY, Samples, batches, check_layer, check_outputs, check_pair, inputs

__all__ = [
    "MEMORY",
    "MOMENTS",
    "Coupling",
    "Form",
    "Moments",
    "Samples",
    "WeightUpdate",
    "augmented_output_jacobian",
    "backpropagated_gradient",
    "backpropagated_gradients",
    "batch_norm_gradient",
    "conserved_norms",
    "coupling",
    "expectations",
    "fanout_norms",
    "lemma1_residual",
    "luck_matters_updates",
    "moments",
    "output_jacobian",
]

# --- one batch, per sample -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coupling:
    """Coupling matrices of one layer, per sample; the last column belongs to the constant node.

    Attributes:
        A: α_kj(x) = v_k(x) · v*_j(x), (sample, node, teacher_node+1).
        B: β_kk'(x) = v_k(x) · v_k'(x), (sample, node, node+1).
    """

    A: Float[Tensor, "sample node teacher_node_1"]
    B: Float[Tensor, "sample node node_1"]


def backpropagated_gradients(student: Network, trace: Trace, residual: Outputs) -> list[Tensor]:
    """g_l(x) for l = 1..L, each (sample, node): the negative gradient of a loss at the pre-activation.

    g_L is given (`residual`, the negative gradient at the output: f* − f for ½‖f* − f‖²), and
    g_l = (W_{l+1}ᵀ g_{l+1}) ∘ σ'(z_l).  Source: Tian (2020), Eq. 1.
    """
    require_plain("backpropagated_gradients", student)
    gradient = residual
    found = [gradient]
    for layer in range(student.depth - 1, 0, -1):
        gradient = (gradient @ student.weights[layer]) * trace.gates[layer - 1]
        found.append(gradient)
    return found[::-1]


def backpropagated_gradient(student: Network, teacher: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """g_l(x), (sample, node): the NEGATIVE gradient of J_x = ½‖f*_L − f_L‖² at the pre-activation z_l.

    Student and teacher may differ in depth.  Source: Tian (2020), Eq. 1.

    Raises:
        ValueError: for a layer out of 1..L, outputs or inputs that do not fit, an empty or non-finite batch.
    """
    caller = "backpropagated_gradient"
    require_plain(caller, student, teacher)
    x = inputs(caller, x, student, teacher)
    check_layer(caller, layer, student)
    check_outputs(caller, student, teacher)
    trace = student.trace(x)
    return backpropagated_gradients(student, trace, teacher(x) - trace.output)[layer - 1]


def output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """V_l(x) = ∂f_L/∂f_l, (sample, output, node): after the gate of layer l; V_L is the identity.

    Exact for every activation.  Column k is the fan-out vector v_k(x).  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, inputs that do not fit, an empty or non-finite batch.
    """
    require_plain("output_jacobian", net)
    x = inputs("output_jacobian", x, net)
    check_layer("output_jacobian", layer, net)
    return _jacobian(net, net.trace(x), layer)[0]


def augmented_output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """[V_l(x), c_l(x)], (sample, output, node+1), with f_L = V_l f_l + c_l.

    c_l gathers the biases of the layers above l.  A smooth activation has no such bias: c_l is then the constant
    of the expansion at x, f_L − V_l f_l.  Source: Tian (2020), Definition 2, with the bias as a constant node.

    Raises:
        ValueError: as `output_jacobian`.
    """
    require_plain("augmented_output_jacobian", net)
    x = inputs("augmented_output_jacobian", x, net)
    check_layer("augmented_output_jacobian", layer, net)
    return _augmented(net, net.trace(x), layer)


def coupling(student: Network, teacher: Network, x: ArrayLike | Tensor, layer: int) -> Coupling:
    """A_l(x) = V_lᵀ [V*_l, c*_l] and B_l(x) = V_lᵀ [V_l, c_l] of every sample.

    Layer l of the student is coupled to layer l of the teacher; widths are free, depths agree.  All samples are
    held at once: use `moments` for expectations.  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, depths, outputs or inputs that do not fit, an empty or non-finite batch.
    """
    require_plain("coupling", student, teacher)
    x = inputs("coupling", x, student, teacher)
    check_pair("coupling", student, teacher)
    check_layer("coupling", layer, student)
    return _coupling(student, student.trace(x), teacher, teacher.trace(x), layer)


def _coupling(student: Network, own: Trace, teacher: Network, taught: Trace, layer: int) -> Coupling:
    v = _augmented(student, own, layer)
    below = v[..., :-1].mT
    return Coupling(below @ _augmented(teacher, taught, layer), below @ v)


def _jacobian(net: Network, trace: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """V_l and the accumulated c_l."""
    samples, outputs = trace.output.shape
    if layer == net.depth:
        eye = torch.eye(outputs, dtype=trace.output.dtype, device=trace.output.device)
        return eye.expand(samples, -1, -1), trace.output.new_zeros(samples, outputs)
    v, top = net.weights[-1].expand(samples, -1, -1), net.biases[-1]
    c = (trace.output.new_zeros(outputs) if top is None else top).expand(samples, -1)
    for above in range(net.depth - 1, layer, -1):
        gated = v * trace.gates[above - 1].unsqueeze(1)
        bias = net.biases[above - 1]
        c = c if bias is None else c + gated @ bias
        v = gated @ net.weights[above - 1]
    return v, c


def _augmented(net: Network, trace: Trace, layer: int) -> Tensor:
    v, c = _jacobian(net, trace, layer)
    if not net.activation.piecewise_linear:
        c = trace.output - (v @ trace.activations[layer - 1].unsqueeze(-1)).squeeze(-1)
    return torch.cat([v, c.unsqueeze(-1)], -1)


def _with_one(f: Tensor) -> Tensor:
    """[f; 1], (sample, node+1)."""
    return torch.cat([f, torch.ones_like(f[:, :1])], 1)


# --- Lemma 1 -------------------------------------------------------------------------------------------------


def lemma1_residual(student: Network, teacher: Network, x: Samples, *, memory: int = MEMORY) -> float:
    """max over layers of the largest |g_l − D_l (A_l [f*_l; 1] − B_l [f_l; 1])| of any sample and node, relative.

    g_l comes from backpropagation, A_l and B_l from Definition 2.  Relative to the largest entry of g_l, D_l A_l f*_l
    and D_l B_l f_l of the same layer: at a fitted student g vanishes while the two products do not, and where upper
    layers have larger entries an error of a lower one still shows.  Of the order of the dtype's rounding if and only if
    the matrices are right.  Source: Tian (2020), Lemma 1.

    Args:
        student: Piecewise linear, like the teacher and as deep.
        teacher: Of the same input and output width.
        x: (sample, input), or batches of it.
        memory: Bytes that per-sample matrices may take.

    Raises:
        ValueError: for a smooth activation (σ(z) ≠ σ'(z) z, so the lemma does not hold), or as `coupling`.
    """
    caller = "lemma1_residual"
    require_plain(caller, student, teacher)
    for who, net in (("student", student), ("teacher", teacher)):
        if not net.activation.piecewise_linear:
            raise ValueError(
                f"{caller}: the {who}'s activation is {net.activation.name}; Lemma 1 needs σ(z) = σ'(z) z, which only "
                "relu, leaky_relu and identity obey (use output_jacobian and coupling, which hold for all)"
            )
    check_pair(caller, student, teacher)
    worst, scale = [0.0] * student.depth, [0.0] * student.depth
    widest = max(student.widths[1:])
    per_sample = (widest + 1) * (2 * widest + 2 * max(teacher.widths[1:]) + 4 * student.widths[-1])
    with torch.no_grad():
        for part in batches(caller, x, student, teacher, numbers=per_sample, memory=memory):
            own, taught = student.trace(part), teacher.trace(part)
            gradients = backpropagated_gradients(student, own, taught.output - own.output)
            for layer in range(1, student.depth + 1):
                pair = _coupling(student, own, teacher, taught, layer)
                gate = own.gates[layer - 1]
                pull = gate * (pair.A @ _with_one(taught.activations[layer - 1]).unsqueeze(-1)).squeeze(-1)
                push = gate * (pair.B @ _with_one(own.activations[layer - 1]).unsqueeze(-1)).squeeze(-1)
                g, i = gradients[layer - 1], layer - 1
                worst[i] = max(worst[i], float((g - (pull - push)).abs().max()))
                scale[i] = max(scale[i], *(float(part.abs().max()) for part in (g, pull, push)))
    return max(off / size if size else 0.0 for off, size in zip(worst, scale, strict=True))


# --- Luck Matters: the expected weight update ----------------------------------------------------------------


@dataclass(frozen=True)
class WeightUpdate:
    """E[f_{l−1} g_lᵀ] of one layer and what the theory puts in its place; (node, input_node+1), bias last.

    Attributes:
        layer: l = 1..L.
        exact: The true negative gradient of J.
        approximate: L* W* H* − L W H.
        gap: ‖approximate − exact‖ / ‖exact‖.
        cosine: Of the angle between the two.
    """

    layer: int
    exact: Tensor
    approximate: Tensor

    @property
    def gap(self) -> float:
        return float((self.approximate - self.exact).norm() / self.exact.norm())

    @property
    def cosine(self) -> float:
        a, b = self.exact.flatten(), self.approximate.flatten()
        return float(a @ b / (a.norm() * b.norm()))


def luck_matters_updates(
    student: Network,
    teacher: Network,
    x: Samples,
    *,
    form: Form = "product",
    memory: int = MEMORY,
) -> list[WeightUpdate]:
    """L*_{l−1} W*_l H*_l − L_{l−1} W_l H_l beside the true E[f_{l−1} g_lᵀ], for l = 1..L.

    With constant nodes throughout, so that biases are exact.  The formula assumes E[β f'f' f f] = E[β f'f'] E[f f]
    (Assumption 1): exact at the top layer, where H is the identity; an approximation below, whose `gap` is to be
    reported and never assumed small.  Source: Tian et al. (2019), Theorem 2.

    Raises:
        ValueError: as `lemma1_residual`.
    """
    caller = "luck_matters_updates"
    require_plain(caller, student, teacher)
    check_pair(caller, student, teacher)
    for net in (student, teacher):
        if not net.activation.piecewise_linear:
            raise ValueError(f"{caller}: {net.activation.name} is smooth; the update needs σ(z) = σ'(z) z")
    depth, samples = student.depth, 0
    sums: dict[tuple[str, int], Tensor] = {}

    def add(name: str, layer: int, value: Tensor) -> None:
        sums[name, layer] = sums[name, layer] + value if (name, layer) in sums else value

    widest = max(student.widths) + 1
    per_sample = widest * (3 * widest + 3 * max(teacher.widths) + 4 * student.widths[-1])
    with torch.no_grad():
        for part in batches(caller, x, student, teacher, numbers=per_sample, memory=memory):
            samples += len(part)
            own, taught = student.trace(part), teacher.trace(part)
            gradients = backpropagated_gradients(student, own, taught.output - own.output)
            f, f_star = [part, *own.activations], [part, *taught.activations]
            for layer in range(1, depth + 1):
                below, below_star = _with_one(f[layer - 1]), _with_one(f_star[layer - 1])
                pair = _coupling(student, own, teacher, taught, layer)
                gate = own.gates[layer - 1]
                with_one, with_one_star = _with_one(gate), _with_one(taught.gates[layer - 1])
                add("exact", layer, gradients[layer - 1].T @ below)
                add("L", layer, below.T @ below)
                add("L*", layer, below.T @ below_star)
                add("D", layer, gate.T @ with_one)
                add("D*", layer, gate.T @ with_one_star)
                add("β", layer, pair.B.sum(0))
                add("β*", layer, pair.A.sum(0))
                add("βD", layer, (gate.unsqueeze(-1) * pair.B * with_one.unsqueeze(1)).sum(0))
                add("βD*", layer, (gate.unsqueeze(-1) * pair.A * with_one_star.unsqueeze(1)).sum(0))
        mean = {key: total / samples for key, total in sums.items()}
        updates = []
        for layer in range(1, depth + 1):
            sides = []
            for star, net in (("*", teacher), ("", student)):
                product = mean[f"β{star}", layer] * mean[f"D{star}", layer]
                h = product if form == "product" else mean[f"βD{star}", layer]
                sides.append(h @ _augmented_weight(net, layer) @ mean[f"L{star}", layer].T)
            updates.append(WeightUpdate(layer, mean["exact", layer], sides[0] - sides[1]))
    return updates


def _augmented_weight(net: Network, layer: int) -> Tensor:
    """[W̃, b; 0, 1], (node+1, input_node+1)."""
    weight, bias = net.weights[layer - 1], net.biases[layer - 1]
    column = weight.new_zeros(len(weight)) if bias is None else bias
    top = torch.cat([weight, column.unsqueeze(1)], 1)
    last = torch.zeros_like(top[:1])
    last[0, -1] = 1
    return torch.cat([top, last])
