"""The matrices of the theory of student specialization, exactly: V_l, A_l(x), B_l(x), their expectations, Lemma 1.

Notation (docs: theory/notation).  f_l is the activation of layer l after its gate, D_l = diag σ'(z_l), f_L linear.
V_l(x) = ∂f_L/∂f_l, so V_L = I and V_{l−1} = V_l D_l W_l with W_l as torch stores it.  A constant node carries the
biases: [W̃, b; 0, 1] maps [f_{l−1}; 1] to [z_l; 1], hence column n_l + 1 of the augmented V_l is
c_l = c_{l+1} + V_{l+1} D_{l+1} b_{l+1}, c_L = 0, and f_L = V_l f_l + c_l wherever σ is piecewise linear.

Sources: Tian (2020), PMLR 119:9470; Tian et al. (2019), arXiv:1905.13405 ("Luck Matters").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn import schema
from tsdyn.axes import Inputs, Outputs
from tsdyn.networks import Network, Trace

#: Per-sample matrices are formed in batches of at most this many bytes.
MEMORY = 8 << 20

Form: TypeAlias = Literal["product", "joint"]
Samples: TypeAlias = ArrayLike | Tensor | Iterable[Tensor]


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
    _check_network("backpropagated_gradients", student)
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
    x = _inputs(caller, x, student, teacher)
    _check_layer(caller, layer, student)
    _check_outputs(caller, student, teacher)
    trace = student.trace(x)
    return backpropagated_gradients(student, trace, teacher(x) - trace.output)[layer - 1]


def output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """V_l(x) = ∂f_L/∂f_l, (sample, output, node): after the gate of layer l; V_L is the identity.

    Exact for every activation.  Column k is the fan-out vector v_k(x).  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, inputs that do not fit, an empty or non-finite batch.
    """
    x = _inputs("output_jacobian", x, net)
    _check_layer("output_jacobian", layer, net)
    return _jacobian(net, net.trace(x), layer)[0]


def augmented_output_jacobian(net: Network, x: ArrayLike | Tensor, layer: int) -> Tensor:
    """[V_l(x), c_l(x)], (sample, output, node+1), with f_L = V_l f_l + c_l.

    c_l gathers the biases of the layers above l.  A smooth activation has no such bias: c_l is then the constant
    of the expansion at x, f_L − V_l f_l.  Source: Tian (2020), Definition 2, with the bias as a constant node.

    Raises:
        ValueError: as `output_jacobian`.
    """
    x = _inputs("augmented_output_jacobian", x, net)
    _check_layer("augmented_output_jacobian", layer, net)
    return _augmented(net, net.trace(x), layer)


def coupling(student: Network, teacher: Network, x: ArrayLike | Tensor, layer: int) -> Coupling:
    """A_l(x) = V_lᵀ [V*_l, c*_l] and B_l(x) = V_lᵀ [V_l, c_l] of every sample.

    Layer l of the student is coupled to layer l of the teacher; widths are free, depths agree.  All samples are
    held at once: use `moments` for expectations.  Source: Tian (2020), Definition 2.

    Raises:
        ValueError: for a layer out of 1..L, depths, outputs or inputs that do not fit, an empty or non-finite batch.
    """
    x = _inputs("coupling", x, student, teacher)
    _check_pair("coupling", student, teacher)
    _check_layer("coupling", layer, student)
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
    """max over layers, samples and nodes of |g_l − D_l (A_l [f*_l; 1] − B_l [f_l; 1])|, relative.

    g_l comes from backpropagation, A_l and B_l from Definition 2.  Relative to the largest entry of g_l, D_l A_l f*_l
    and D_l B_l f_l of any layer: at a fitted student g vanishes while the two products do not.  Of the order of the
    dtype's rounding if and only if the matrices are right.  Source: Tian (2020), Lemma 1.

    Args:
        student: Piecewise linear, like the teacher and as deep.
        teacher: Of the same input and output width.
        x: (sample, input), or batches of it.
        memory: Bytes that per-sample matrices may take.

    Raises:
        ValueError: for a smooth activation (σ(z) ≠ σ'(z) z, so the lemma does not hold), or inputs as in `coupling`.
    """
    caller = "lemma1_residual"
    for who, net in (("student", student), ("teacher", teacher)):
        if not net.activation.piecewise_linear:
            raise ValueError(
                f"{caller}: the {who}'s activation is {net.activation.name}; Lemma 1 needs σ(z) = σ'(z) z, which only "
                "relu, leaky_relu and identity obey (use output_jacobian and coupling, which hold for all)"
            )
    _check_pair(caller, student, teacher)
    worst, scale = 0.0, 0.0
    widest = max(student.widths[1:])
    per_sample = (widest + 1) * (2 * widest + 2 * max(teacher.widths[1:]) + 4 * student.widths[-1])
    with torch.no_grad():
        for part in _batches(caller, x, student, teacher, numbers=per_sample, memory=memory):
            own, taught = student.trace(part), teacher.trace(part)
            gradients = backpropagated_gradients(student, own, taught.output - own.output)
            for layer in range(1, student.depth + 1):
                pair = _coupling(student, own, teacher, taught, layer)
                gate = own.gates[layer - 1]
                pull = gate * (pair.A @ _with_one(taught.activations[layer - 1]).unsqueeze(-1)).squeeze(-1)
                push = gate * (pair.B @ _with_one(own.activations[layer - 1]).unsqueeze(-1)).squeeze(-1)
                g = gradients[layer - 1]
                worst = max(worst, float((g - (pull - push)).abs().max()))
                scale = max(scale, *(float(part.abs().max()) for part in (g, pull, push)))
    return worst / scale if scale else 0.0


# --- expectations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Expectations over samples, one array a hidden layer 1..L−1, constant nodes left out.

    Attributes:
        A, B: E[α_kj] and E[β_kk'], (node, teacher_node) and (node, node_2).
        H_star, H: E[α_kj] E[f'_k f*'_j] and E[β_kk'] E[f'_k f'_k'] in the product form, E[α_kj f'_k f*'_j] and
            E[β_kk' f'_k f'_k'] in the joint form.
        D_star, D: E[f'_k f*'_j] and E[f'_k f'_k'].
        L_star, L: E[f_k f*_j] and E[f_k f_k'].
    """

    A: list[Tensor]
    B: list[Tensor]
    H_star: list[Tensor]
    H: list[Tensor]
    D_star: list[Tensor]
    D: list[Tensor]
    L_star: list[Tensor]
    L: list[Tensor]

    @property
    def fanout_norm(self) -> list[Tensor]:
        """√E β_kk, (node,)."""
        return [b.diagonal().clamp(min=0).sqrt() for b in self.B]


def expectations(
    student: Network, teacher: Network, x: Samples, *, form: Form = "product", memory: int = MEMORY
) -> Moments:
    """E over the samples of all matrices of all hidden layers, streamed.

    Per-sample couplings are never formed.  With G_l = V_l D_l (sample·output, node),
    E[D_l B_l D_l] = G_lᵀ G_l / N is one matrix product over samples and outputs together, and the layer below follows
    from it alone: E[B_{l−1}] = W_lᵀ E[D_l B_l D_l] W_l.  At the top hidden layer V = W_L for every x, so that
    E[D B D] = (W_Lᵀ W_L) ∘ E[f' f'ᵀ] costs nothing.

    Args:
        student: Any activation.
        teacher: As deep as the student.
        x: (sample, input), or batches of it.
        form: Of H; the joint form costs one more product, at the lowest layer.
        memory: Bytes that batches may take.

    Raises:
        ValueError: as `coupling`.
    """
    _check_pair("expectations", student, teacher)
    lowest = 1 if form == "joint" else 2
    hidden = student.depth - 1
    sums: dict[str, list[Tensor]] = {}
    samples = 0
    widest = max(student.widths) + max(teacher.widths)
    per_sample = 3 * student.widths[-1] * widest + 3 * (sum(student.widths) + sum(teacher.widths))
    with torch.no_grad():
        for part in _batches("expectations", x, student, teacher, numbers=per_sample, memory=memory):
            samples += len(part)
            for name, layers in _batch_sums(student, student.trace(part), teacher, teacher.trace(part), lowest).items():
                held = sums.setdefault(name, layers)
                if held is not layers:
                    for total, more in zip(held, layers, strict=True):
                        total += more
        means = {name: [total / samples for total in layers] for name, layers in sums.items()}
        # E[D V' V* D*] and E[D V' V D] of the layers lowest..L-1
        h_star, h = means.pop("h_star"), means.pop("h")
        w, w_star = student.weights, teacher.weights
        top, top_star = w[-1].T @ w[-1], w[-1].T @ w_star[-1]
        if hidden >= lowest:
            h_star.append(top_star * means["D_star"][-1])
            h.append(top * means["D"][-1])
        above = zip(range(1, hidden), h_star[2 - lowest :], h[2 - lowest :], strict=True)
        pairs = [(w[i].T @ inner_star @ w_star[i], w[i].T @ inner @ w[i]) for i, inner_star, inner in above]
        pairs += [(top_star, top)] if hidden else []
        a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if form == "product":
            h_star = [alpha * d for alpha, d in zip(a, means["D_star"], strict=True)]
            h = [beta * d for beta, d in zip(b, means["D"], strict=True)]
    return Moments(A=a, B=b, H_star=h_star, H=h, **means)


def _batch_sums(student: Network, own: Trace, teacher: Network, taught: Trace, lowest: int) -> dict[str, list[Tensor]]:
    hidden = student.depth - 1
    gates, gates_star = own.gates[:-1], taught.gates[:-1]
    below = list(zip(own.activations, taught.activations, strict=True))[:-1]
    sums = {
        "D": [z.T @ z for z in gates],
        "D_star": [z.T @ s for z, s in zip(gates, gates_star, strict=True)],
        "L": [f.T @ f for f, _ in below],
        "L_star": [f.T @ s for f, s in below],
    }
    sums |= {"h_star": [], "h": []}
    # (sample·output, node) of student and teacher, from the top hidden layer, which needs no sum, downwards
    rows = [_gate(net.weights[-1], trace, hidden) for net, trace in ((student, own), (teacher, taught)) if hidden > 1]
    for layer in range(hidden - 1, lowest - 1, -1):
        g, g_star = rows = [
            _gate((above @ net.weights[layer]).view(len(trace.output), -1, net.widths[layer]), trace, layer)
            for above, net, trace in zip(rows, (student, teacher), (own, taught), strict=True)
        ]
        sums["h_star"].insert(0, g.T @ g_star)
        sums["h"].insert(0, g.T @ g)
    return sums


def _gate(jacobian: Tensor, trace: Trace, layer: int) -> Tensor:
    """G_l = V_l D_l, (sample·output, node), from V_l (sample or none, output, node)."""
    return (jacobian * trace.gates[layer - 1].unsqueeze(1)).flatten(0, 1)


#: Variables of the schema that `moments` fills.
MOMENTS = ("A", "B", "H", "H_star", "D_star", "D", "L_star", "L", "fanout_norm")


def moments(
    student: Network,
    teacher: Network,
    x: Samples,
    *,
    form: Form = "product",
    memory: int = MEMORY,
) -> xr.Dataset:
    """`expectations` as a labelled Dataset: A, B, H, H_star, D, D_star, L, L_star, fanout_norm.

    Args:
        student, teacher, x, memory: As in `expectations`.
        form: H as the ``"product"`` E[β] ∘ E[f' f'] of the paper, or the ``"joint"`` E[β f' f']; named in the
            attributes.

    Returns:
        Over (layer, node, teacher_node or node_2), padded with NaN to the widest layer and NaN at the output layer;
        coordinates width and teacher_width, so that `tsdyn.layer` gives a layer without padding.

    Raises:
        ValueError: as `coupling`, or for another form.
    """
    if form not in ("product", "joint"):
        raise ValueError(f"moments: form={form!r}; it is 'product' (E[β] ∘ E[f'f']) or 'joint' (E[β f'f'])")
    found = expectations(student, teacher, x, form=form, memory=memory)
    layers = np.arange(1, student.depth + 1)
    widths = {"node": student.widths[1:], "node_2": student.widths[1:], "teacher_node": teacher.widths[1:]}
    variables = {}
    for name in MOMENTS:
        variable = schema.VARIABLES[name]
        dims = tuple(d for d in variable.dims if d not in ("seed", "epoch"))
        array = np.full((student.depth, *(max(widths[d]) for d in dims[1:])), np.nan)
        for i, block in enumerate(getattr(found, name)):
            array[i][tuple(slice(size) for size in block.shape)] = block.cpu().numpy()
        extra = {"definition": f"{form} form"} if name in ("H", "H_star") else {}
        variables[name] = xr.Variable(dims, array, variable.attrs | extra)
    coords = {
        "layer": layers,
        "width": ("layer", np.array(student.widths[1:])),
        "teacher_width": ("layer", np.array(teacher.widths[1:])),
    } | {d: np.arange(max(w)) for d, w in widths.items()}
    return xr.Dataset(variables, coords)


def fanout_norms(network: Network, trace: Trace, *, memory: int = MEMORY) -> list[Tensor]:
    """√E β_kk = √E‖v_k(x)‖² of every hidden layer l = 1..L−1, each (node,).

    The top hidden layer's V is W_L for every x.  Source: Tian (2020), Definition 2.
    """
    _check_network("fanout_norms", network)
    outputs, samples = network.widths[-1], len(trace.output)
    piece = max(1, memory // (3 * trace.output.element_size() * outputs * max(network.widths[1:])))
    squares = [torch.zeros_like(g[0]) for g in trace.gates[:-1]]
    if network.depth >= 2:
        squares[-1] = network.weights[-1].square().sum(0) * samples
    for start in range(0, samples if network.depth > 2 else 0, piece):
        v = network.weights[-1].expand(min(piece, samples - start), -1, -1)
        for layer in range(network.depth - 2, 0, -1):
            v = (v * trace.gates[layer][start : start + piece, None, :]) @ network.weights[layer]
            squares[layer - 1] += v.square().sum((0, 1))
    return [(s / samples).sqrt() for s in squares]


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
    _check_pair(caller, student, teacher)
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
        for part in _batches(caller, x, student, teacher, numbers=per_sample, memory=memory):
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


# --- what may be asked ---------------------------------------------------------------------------------------


def _check_network(caller: str, net: object) -> None:
    """Refuse what is no plain `Network`: its parameters would be read as one's, and say something else.

    Raises:
        TypeError: naming the way out.
    """
    if not isinstance(net, Network):
        raise TypeError(
            f"{caller}: {net!r} is no Network; of one with convolutions or BatchNorm take .folded(), which is the same "
            "function in evaluation mode, or tsdyn.deepnets.expectations, whose nodes are channels"
        )


def _inputs(caller: str, x: ArrayLike | Tensor, *nets: Network) -> Inputs:
    inputs = torch.as_tensor(x)
    if inputs.ndim != 2 or len(inputs) == 0:
        raise ValueError(
            f"{caller}: x has shape {tuple(inputs.shape)}; it must be (sample, input) with at least one sample"
        )
    for net in nets:
        _check_network(caller, net)
        weight = net.weights[0]
        if inputs.shape[1] != net.widths[0]:
            raise ValueError(f"{caller}: x has {inputs.shape[1]} features, {net!r} takes {net.widths[0]}")
        if (inputs.dtype, inputs.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"{caller}: x is {inputs.dtype} on {inputs.device}, {net!r} is on {weight.device}; "
                "move all to one dtype and device"
            )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError(f"{caller}: x holds NaN or infinite values; drop those samples first")
    return inputs


def _batches(
    caller: str,
    x: Samples,
    *nets: Network,
    numbers: int,
    memory: int,
) -> Iterator[Inputs]:
    """`x` in batches whose per-sample matrices, of `numbers` numbers a sample, stay within `memory`."""
    whole = isinstance(x, (Tensor, np.ndarray, list, tuple)) and not (
        isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)
    )
    parts: Iterable[ArrayLike | Tensor] = [x] if whole else x  # type: ignore[list-item, assignment]
    empty = True
    for part in parts:
        inputs = _inputs(caller, part, *nets)
        size = max(1, memory // (numbers * inputs.element_size()))
        if size == 1 and numbers * inputs.element_size() > 64 * memory:
            raise ValueError(
                f"{caller}: one sample needs {numbers * inputs.element_size() / 1e9:.1f} GB, "
                f"memory={memory / 1e9:.3f} GB is allowed; give more"
            )
        for start in range(0, len(inputs), size):
            empty = False
            yield inputs[start : start + size]
    if empty:
        raise ValueError(f"{caller}: no samples")


def _check_layer(caller: str, layer: int, net: Network) -> None:
    if not 1 <= layer <= net.depth:
        raise ValueError(f"{caller}: layer={layer}; {net!r} has layers 1..{net.depth}")


def _check_outputs(caller: str, student: Network, teacher: Network) -> None:
    for end, index in (("inputs", 0), ("outputs", -1)):
        if student.widths[index] != teacher.widths[index]:
            raise ValueError(
                f"{caller}: student and teacher must agree in their {end}, {student.widths[index]} and "
                f"{teacher.widths[index]}: {student!r}, {teacher!r}"
            )


def _check_pair(caller: str, student: Network, teacher: Network) -> None:
    _check_outputs(caller, student, teacher)
    if student.depth != teacher.depth:
        raise ValueError(
            f"{caller}: the student has {student.depth} layers, the teacher {teacher.depth}; layer l is coupled to "
            "layer l, so depths must agree (a network can be deepened with identity layers)"
        )
