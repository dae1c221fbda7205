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

from tsdyn.arguments import NETWORK, WHOLE, takes
from tsdyn.axes import Outputs
from tsdyn.networks.network import Network, Trace, require_plain
from tsdyn.theory.inputs import MEMORY, Samples, batches, check_layer, check_outputs, check_pair, inputs


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
    """Negative gradients g_l(x) of a loss at the pre-activations of all layers l = 1..L, each (sample, node).

    g_L is the argument `residual`, the negative gradient at the output (f* − f for ½‖f* − f‖²), and
    g_l = (W_{l+1}ᵀ g_{l+1}) ∘ σ'(z_l).  Source: Tian (2020), Eq. 1.
    """
    require_plain("backpropagated_gradients", student)
    gradient = residual
    found = [gradient]
    for layer in range(student.depth - 1, 0, -1):
        gradient = (gradient @ student.weights[layer]) * trace.gates[layer - 1]
        found.append(gradient)
    return found[::-1]


@takes(student=NETWORK, teacher=NETWORK, layer=WHOLE)
def backpropagated_gradient(student: Network, teacher: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """Backpropagated gradient g_l(x), (sample, node): minus the gradient of J_x = ½‖f*_L − f_L‖² at z_l.

    Student and teacher may differ in depth.  Source: Tian (2020), Eq. 1.

    Raises:
        ValueError: for a layer out of 1..L, outputs or inputs that do not fit, an empty or non-finite batch.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import theory
        >>> student = tsdyn.Network([torch.randn(4, 3), torch.randn(2, 4)], [torch.zeros(4), None])
        >>> teacher = tsdyn.Network([torch.randn(3, 3), torch.randn(2, 3)], [torch.zeros(3), None])
        >>> theory.backpropagated_gradient(student, teacher, torch.randn(7, 3), layer=1).shape
        torch.Size([7, 4])
    """
    caller = "backpropagated_gradient"
    require_plain(caller, student, teacher)
    x = inputs(caller, x, student, teacher)
    check_layer(caller, layer, student)
    check_outputs(caller, student, teacher)
    trace = student.trace(x)
    return backpropagated_gradients(student, trace, teacher(x) - trace.output)[layer - 1]


@takes(net=NETWORK, layer=WHOLE)
def output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """Output Jacobian V_l(x) = ∂f_L/∂f_l, (sample, output, node), in the activation f_l after the gate; V_L = I.

    Exact for every activation.  Column k is the fan-out vector v_k(x).  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, inputs that do not fit, an empty or non-finite batch.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import theory
        >>> net = tsdyn.Network([torch.randn(4, 3), torch.randn(2, 4)], [torch.zeros(4), None])
        >>> theory.output_jacobian(net, torch.randn(7, 3), layer=1).shape  # (sample, output, node)
        torch.Size([7, 2, 4])
    """
    require_plain("output_jacobian", net)
    x = inputs("output_jacobian", x, net)
    check_layer("output_jacobian", layer, net)
    return _jacobian(net, net.trace(x), layer)[0].expand(len(x), -1, -1)


@takes(net=NETWORK, layer=WHOLE)
def augmented_output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """Output Jacobian with the constant node's column, [V_l(x), c_l(x)], (sample, output, node+1): f_L = V_l f_l + c_l.

    c_l collects the biases of the layers above l.  For a smooth activation c_l is the constant of the linear expansion
    at x, f_L − V_l f_l.  Source: Tian (2020), Definition 2, with the bias as a constant node.

    Raises:
        ValueError: as `output_jacobian`.
    """
    require_plain("augmented_output_jacobian", net)
    x = inputs("augmented_output_jacobian", x, net)
    check_layer("augmented_output_jacobian", layer, net)
    return _augmented(net, net.trace(x), layer).expand(len(x), -1, -1).contiguous()


@takes(student=NETWORK, teacher=NETWORK, layer=WHOLE)
def coupling(student: Network, teacher: Network, x: ArrayLike | Tensor, layer: int) -> Coupling:
    """Coupling matrices A_l(x) = V_lᵀ [V*_l, c*_l] and B_l(x) = V_lᵀ [V_l, c_l] of every sample.

    Layer l of the student is coupled to layer l of the teacher; widths are free, depths agree.  All samples are
    held at once: use `moments` for expectations.  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, depths, outputs or inputs that do not fit, an empty or non-finite batch.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import theory
        >>> student = tsdyn.Network([torch.randn(4, 3), torch.randn(2, 4)], [torch.zeros(4), None])
        >>> teacher = tsdyn.Network([torch.randn(3, 3), torch.randn(2, 3)], [torch.zeros(3), None])
        >>> found = theory.coupling(student, teacher, torch.randn(7, 3), layer=1)
        >>> found.A.shape, found.B.shape  # last column: the constant node
        (torch.Size([7, 4, 4]), torch.Size([7, 4, 5]))
    """
    require_plain("coupling", student, teacher)
    x = inputs("coupling", x, student, teacher)
    check_pair("coupling", student, teacher)
    check_layer("coupling", layer, student)
    return coupling_of_traces(student, student.trace(x), teacher, teacher.trace(x), layer)


def coupling_of_traces(student: Network, own: Trace, teacher: Network, taught: Trace, layer: int) -> Coupling:
    v = _augmented(student, own, layer)
    below = v[..., :-1].mT
    found = (below @ _augmented(teacher, taught, layer), below @ v)
    return Coupling(*(pair.expand(len(own.output), -1, -1).contiguous() for pair in found))


def _jacobian(net: Network, trace: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """V_l, (sample, output, node), and c_l, the constant column accumulated from the layers above, (sample, output).

    At the top, where all samples have the same, their axis has the length 1.
    """
    outputs = trace.output.shape[1]
    if layer == net.depth:
        eye = torch.eye(outputs, dtype=trace.output.dtype, device=trace.output.device)
        return eye.unsqueeze(0), trace.output.new_zeros(1, outputs)
    v, top = net.weights[-1].unsqueeze(0), net.biases[-1]
    c = (trace.output.new_zeros(outputs) if top is None else top).unsqueeze(0)
    for above in range(net.depth - 1, layer, -1):
        gated = v * trace.gates[above - 1].unsqueeze(1)
        bias = net.biases[above - 1]
        c = c if bias is None else c + gated @ bias
        v = gated @ net.weights[above - 1]
    return v, c


def _augmented(net: Network, trace: Trace, layer: int) -> Tensor:
    v, c = _jacobian(net, trace, layer)
    if not net.activation.piecewise_linear:
        c = trace.output - _times(v, trace.activations[layer - 1])
    samples = max(len(v), len(c))
    return torch.cat([v.expand(samples, -1, -1), c.expand(samples, -1).unsqueeze(-1)], -1)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """A matrix times a vector for each sample, (sample, row); one matrix stands for all samples."""
    if len(matrices) == 1:
        return vectors @ matrices[0].mT
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def with_one_node(f: Tensor) -> Tensor:
    """Activations with the constant node appended, [f; 1], (sample, node+1)."""
    return torch.cat([f, torch.ones_like(f[:, :1])], 1)


@takes(student=NETWORK, teacher=NETWORK)
def lemma1_residual(student: Network, teacher: Network, x: Samples, *, memory: int = MEMORY) -> float:
    """Largest relative error of Lemma 1, g_l = D_l (A_l [f*_l; 1] − B_l [f_l; 1]), over layers, samples and nodes.

    g_l comes from backpropagation, A_l and B_l from Definition 2.  Each layer's error is relative to the largest entry
    of its g_l, D_l A_l f*_l and D_l B_l f_l: for a fitted student g vanishes while the two products do not, and an
    error in a layer of small entries is not hidden by layers of large ones.  The result is of the order of the dtype's
    rounding if and only if the matrices are right.  Source: Tian (2020), Lemma 1.

    Args:
        student: Piecewise linear, as deep as the teacher.
        teacher: Piecewise linear, of the same input and output width.
        x: (sample, input), or batches of it.
        memory: Limit on the bytes of per-sample matrices.

    Raises:
        ValueError: for a smooth activation (σ(z) ≠ σ'(z) z, so the lemma does not hold), or as `coupling`.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import theory
        >>> kind = {"dtype": torch.float64}
        >>> student = tsdyn.Network([torch.randn(4, 3, **kind), torch.randn(2, 4, **kind)])
        >>> teacher = tsdyn.Network([torch.randn(3, 3, **kind), torch.randn(2, 3, **kind)])
        >>> theory.lemma1_residual(student, teacher, torch.randn(50, 3, **kind)) < 1e-12
        True
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
    widest = max(student.widths[1:]) + max(teacher.widths[1:])
    per_sample = 4 * (widest + 2) * student.widths[-1] + 3 * (sum(student.widths) + sum(teacher.widths))
    with torch.no_grad():
        for part in batches(caller, x, student, teacher, numbers=per_sample, memory=memory):
            own, taught = student.trace(part), teacher.trace(part)
            gradients = backpropagated_gradients(student, own, taught.output - own.output)
            for layer in range(1, student.depth + 1):
                # A [f*; 1] = Vᵀ (V* [f*; 1]) and B [f; 1] = Vᵀ (V [f; 1]), without a matrix of nodes times nodes
                v, v_star = _augmented(student, own, layer), _augmented(teacher, taught, layer)
                gate = own.gates[layer - 1]
                pull, push = (
                    gate * _times(v[..., :-1].mT, _times(side, with_one_node(trace.activations[layer - 1])))
                    for side, trace in ((v_star, taught), (v, own))
                )
                g, i = gradients[layer - 1], layer - 1
                worst[i] = max(worst[i], float((g - (pull - push)).abs().max()))
                scale[i] = max(scale[i], *(float(part.abs().max()) for part in (g, pull, push)))
    return max(off / size if size else 0.0 for off, size in zip(worst, scale, strict=True))
