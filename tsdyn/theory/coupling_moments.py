"""Expectations of the theory's matrices over samples: moments, fan-out norms, and what BatchNorm conserves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tsdyn import schema
from tsdyn.arguments import NETWORK, takes
from tsdyn.engine import compiled_moments
from tsdyn.networks.network import Network, Trace, require_plain
from tsdyn.networks.propagate import Parameters, propagate, rows
from tsdyn.theory.inputs import MEMORY, Samples, batches, check_pair, inputs

Form: TypeAlias = Literal["product", "joint"]


def check_form(caller: str, form: str) -> None:
    """Raise ValueError unless `form`, which `caller` was given, is a form of H."""
    if form not in ("product", "joint"):
        raise ValueError(f"{caller}: form={form!r}; it is 'product' (E[β] ∘ E[f'f']) or 'joint' (E[β f'f'])")


@dataclass(frozen=True)
class Moments:
    """Expectations over samples, as lists of one array per hidden layer 1..L−1, without constant nodes.

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
        """Fan-out norm √E β_kk of each hidden layer, (node,)."""
        return [b.diagonal().clamp(min=0).sqrt() for b in self.B]


@takes(student=NETWORK, teacher=NETWORK)
def expectations(
    student: Network, teacher: Network, x: Samples, *, form: Form = "product", memory: int = MEMORY
) -> Moments:
    r"""Expectations over the samples of all matrices of all hidden layers, streamed in batches.

    Networks of linear layers, with or without BatchNorm, count as their ``folded()``.  With convolutions the nodes are
    channels, aggregated over pixels p:

    .. math:: A_{kj} = E \sum_p v_{kp} \cdot v^*_{jp}, \quad B_{kk'} = E \sum_p v_{kp} \cdot v_{k'p}

    with v a column of V_l = ∂f_L/∂f_l, where f_l is the input of the layer above (for BatchNorm after σ, its output).
    D and L are expectations over samples and pixels of f' = ∂f_l/∂z_l and f_l, and H = A ∘ D, in the product form only.
    There is one backward pass per output, and no matrix of a single sample is formed.

    Args:
        student: Any activation.
        teacher: As deep as the student.
        x: (sample, input), or batches of it.
        form: Form of H; the joint form costs one more product, at the lowest layer.
        memory: Limit on the bytes of a batch's matrices.

    Raises:
        ValueError: as `coupling`, or for another form; for convolutions also if images differ in size, or for the
            joint form.

    Source: Tian (2020), Definition 2; Tian et al. (2019), Theorem 2.
    """
    check_form("expectations", form)
    check_pair("expectations", student, teacher)
    if not (student.convolutional or teacher.convolutional):
        return _of_nodes(student.folded(), teacher.folded(), x, form=form, memory=memory)
    pixels = [[None if i is None else i[1:] for i in net.images] for net in (student, teacher)]
    if pixels[0] != pixels[1]:
        raise ValueError(f"expectations: {student!r} and {teacher!r} differ in images: {pixels[0]} and {pixels[1]}")
    if form != "product":
        raise ValueError(f"expectations: form={form!r} of convolutions; there is 'product', or take their folded()")
    return _of_channels(student, teacher, x, memory=memory)


def _of_nodes(student: Network, teacher: Network, x: Samples, *, form: Form, memory: int) -> Moments:
    """Expectations for plain linear layers, without forming per-sample couplings.

    With G_l = V_l D_l (sample·output, node), E[D_l B_l D_l] = G_lᵀ G_l / N is one matrix product over samples and
    outputs together, and the layer below follows from it alone: E[B_{l−1}] = W_lᵀ E[D_l B_l D_l] W_l.  At the top
    hidden layer V = W_L for every x, so that E[D B D] = (W_Lᵀ W_L) ∘ E[f' f'ᵀ] costs nothing.
    """
    match form:
        case "joint":
            lowest = 1
        case "product":
            lowest = 2
        case other:
            assert_never(other)
    hidden = student.depth - 1
    sums: dict[str, list[Tensor]] = {}
    samples = 0
    widest = max(student.widths) + max(teacher.widths)
    compiled = compiled_moments.serves(student, teacher)
    # of two layers no matrix of a single sample is needed, and compiled code holds those of one at a time
    matrices = 0 if compiled or hidden < 2 else 3 * student.widths[-1] * widest
    per_sample = matrices + 3 * (sum(student.widths) + sum(teacher.widths))
    with torch.no_grad():
        for part in batches("expectations", x, student, teacher, numbers=per_sample, memory=memory):
            samples += len(part)
            own, taught = student.trace(part), teacher.trace(part)
            for name, layers in _batch_sums(student, own, teacher, taught, lowest, compiled=compiled).items():
                held = sums.setdefault(name, layers)
                if held is not layers:
                    for total, more in zip(held, layers, strict=True):
                        total += more
        means = {name: [total / samples for total in layers] for name, layers in sums.items()}
        # E[D V' V* D*] and E[D V' V D] of the layers from the lowest to L-1
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


def _batch_sums(
    student: Network, own: Trace, teacher: Network, taught: Trace, lowest: int, *, compiled: bool
) -> dict[str, list[Tensor]]:
    hidden = student.depth - 1
    gates, gates_star = own.gates[:-1], taught.gates[:-1]
    below = list(zip(own.activations, taught.activations, strict=True))[:-1]
    sums = {
        "D": [z.T @ z for z in gates],
        "D_star": [z.T @ s for z, s in zip(gates, gates_star, strict=True)],
        "L": [f.T @ f for f, _ in below],
        "L_star": [f.T @ s for f, s in below],
    }
    if compiled:
        h_star, h = compiled_moments.sums(student, gates, teacher, gates_star, lowest)
        return sums | {"h_star": h_star, "h": h}
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
    """G_l = V_l D_l, (sample·output, node), from V_l, (sample, output, node) or the same for all samples."""
    return (jacobian * trace.gates[layer - 1].unsqueeze(1)).flatten(0, 1)


def _of_channels(student: Network, teacher: Network, x: Samples, *, memory: int) -> Moments:
    """Expectations for networks with convolutions, whose nodes are channels."""
    layers = range(student.depth - 1)
    names = ("A", "B", "D_star", "D", "L_star", "L")
    sums: dict[str, list[Tensor]] = {}
    samples = 0
    numbers = 4 * sum(
        n if image is None else math.prod(image)
        for net in (student, teacher)
        for n, image in zip(net.widths[1:], net.images, strict=True)
    )
    for part in batches("expectations", x, student, teacher, numbers=numbers, memory=memory):
        samples += len(part)
        own, taught = _Backward(student, part), _Backward(teacher, part)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for i in layers:
            per_pixel = len(part) / len(own.f[i])
            for name, left, right in (
                ("D_star", own.slopes, taught.slopes), ("D", own.slopes, own.slopes),
                ("L_star", own.f, taught.f), ("L", own.f, own.f),
            ):  # fmt: skip
                found[name].append(left[i].T @ right[i] * per_pixel)
        for output in range(student.widths[-1]):
            v, v_star = own.jacobian(output), taught.jacobian(output)
            for i in layers:
                for name, product in (("A", v[i].T @ v_star[i]), ("B", v[i].T @ v[i])):
                    if output:
                        found[name][i] += product
                    else:
                        found[name].append(product)
        for name, parts in found.items():
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
    means = {name: [total / samples for total in totals] for name, totals in sums.items()}
    pairs = {"H_star": ("A", "D_star"), "H": ("B", "D")}
    h = {n: [b * d for b, d in zip(means[beta], means[gate], strict=True)] for n, (beta, gate) in pairs.items()}
    return Moments(**means, **h)


class _Backward:
    """One forward pass in evaluation mode with its graph, whatever gradient mode the caller is in.

    Attributes:
        f: Input of the layer above each hidden layer, in rows (sample·pixel, node).
        slopes: ∂f_l/∂z_l, in the same rows.
    """

    def __init__(self, network: Network, x: Tensor) -> None:
        # a caller's no_grad or inference_mode is of no concern here; autograd keeps no inference tensor, so those are
        # copied
        with torch.inference_mode(False), torch.enable_grad():
            inputs = x.detach().clone().unsqueeze(0).requires_grad_(True)
            share = not any(t.is_inference() for t in network.state_dict().values())
            layers = propagate(Parameters.of([network], share=share), network.frame, inputs, training=False)
            self._outputs = layers[-1].activation[0].sum(0).unbind()
        self._layers = layers[:-1]
        self.f = [rows(layer.activation).detach() for layer in self._layers]
        self.slopes = []
        for i, (layer, norm) in enumerate(zip(self._layers, network.norms, strict=True)):
            gate = network.activation.gate(rows(layer.preactivation).detach(), at_zero=network.gate_at_zero)
            above = norm is not None and not network.frame.norm_first(i)
            self.slopes.append(gate * norm.affine()[0].detach() if norm is not None and above else gate)

    def gradient(self, output: int) -> tuple[Tensor, ...]:
        """∂f_Lc/∂f_l of each hidden layer for output c, in the engine's layout."""
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(self._outputs[output], [layer.f for layer in self._layers], retain_graph=True)

    def jacobian(self, output: int) -> list[Tensor]:
        """`gradient` in rows (sample·pixel, node)."""
        pairs = zip(self._layers, self.gradient(output), strict=True)
        return [rows(layer.by_member(v)) for layer, v in pairs]


#: Variables of the schema that `moments` fills.
MOMENTS = ("A", "B", "H", "H_star", "D_star", "D", "L_star", "L", "fanout_norm")


@takes(student=NETWORK, teacher=NETWORK)
def moments(
    student: Network,
    teacher: Network,
    x: Samples,
    *,
    form: Form = "product",
    memory: int = MEMORY,
) -> xr.Dataset:
    """Labelled Dataset of `expectations`: A, B, H, H_star, D, D_star, L, L_star, fanout_norm.

    Args:
        student, teacher, x, memory: As in `expectations`.
        form: Form of H: the paper's ``"product"`` E[β] ∘ E[f' f'], or the ``"joint"`` E[β f' f']; also stored in the
            attributes.

    Returns:
        Dataset over (layer, node, teacher_node or node_2), padded with NaN to the widest layer and NaN at the output
        layer; coordinates width and teacher_width let `tsdyn.layer` take a layer without padding.

    Raises:
        ValueError: as `coupling`, or for another form.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import theory
        >>> student = tsdyn.Network([torch.randn(4, 3), torch.randn(2, 4)], [torch.zeros(4), None])
        >>> teacher = tsdyn.Network([torch.randn(3, 3), torch.randn(2, 3)], [torch.zeros(3), None])
        >>> sorted(theory.moments(student, teacher, torch.randn(100, 3)))
        ['A', 'B', 'D', 'D_star', 'H', 'H_star', 'L', 'L_star', 'fanout_norm']
    """
    check_form("moments", form)
    found = expectations(student, teacher, x, form=form, memory=memory)
    layers = np.arange(1, student.depth + 1)
    widths = {"node": student.widths[1:], "node_2": student.widths[1:], "teacher_node": teacher.widths[1:]}
    variables = {}
    for name in MOMENTS:
        variable = schema.variable(name)
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


def fanout_norms(network: Network, at: Trace | Tensor, *, memory: int = MEMORY) -> list[Tensor]:
    """Fan-out norm √E β_kk = √E‖v_k(x)‖² of every hidden layer l = 1..L−1, each (node,), in evaluation mode.

    Networks of linear layers, with or without BatchNorm, count as their ``folded()``.  For a channel ‖v‖² is summed
    over its pixels, and v is the derivative in the input of the layer above (for BatchNorm after σ, its output).

    Args:
        network: Any network.
        at: Inputs (sample, input); without convolutions also the network's trace of them.
        memory: Limit on the bytes of per-sample matrices.

    Raises:
        ValueError: for the trace of a network with convolutions, or inputs that do not fit.

    Source: Tian (2020), Definition 2.
    """
    if not isinstance(at, Trace):
        at = inputs("fanout_norms", at, network)
    if network.convolutional:
        if isinstance(at, Trace):
            raise ValueError(
                f"fanout_norms: {network!r} has convolutions; give inputs (sample, input), not their trace"
            )
        return _fanouts_of_channels(network, at)
    if isinstance(at, Tensor):
        at = network.trace(at)
    folded = network.folded()
    return _fanouts_of_nodes(folded, at, memory=memory)


def _fanouts_of_nodes(network: Network, trace: Trace, *, memory: int) -> list[Tensor]:
    """Fan-out norms for plain linear layers; at the top hidden layer V is W_L for every x."""
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


def _fanouts_of_channels(network: Network, x: Tensor) -> list[Tensor]:
    """Fan-out norms of channels, by one backward pass per output for all samples at once, which are independent."""
    seen = _Backward(network, x)
    squares = [w.new_zeros(len(w)) for w in network.weights[:-1]]
    for output in range(network.widths[-1]):
        for total, v in zip(squares, seen.gradient(output), strict=True):
            total += v.square().sum((0, 2, 3)) if v.ndim == 4 else v[0].square().sum(0)
    return [(total / len(x)).sqrt() for total in squares]


@takes(network=NETWORK)
def conserved_norms(network: Network) -> list[Tensor]:
    """Norm of each hidden node's incoming weights that BatchNorm conserves, one (node,) per hidden layer.

    ‖w_k‖ where BatchNorm comes before σ, ‖[w_k; b_k]‖ otherwise.  Gradient flow conserves it below BatchNorm (eps = 0),
    whose output does not depend on the scale of its input; SGD adds lr² times the squared gradient at each step.
    Source: Tian et al. (2019), Theorem 3.
    """
    found = []
    for i, (weight, bias) in enumerate(zip(network.weights[:-1], network.biases[:-1], strict=True)):
        squares = weight.flatten(1).square().sum(1)
        if bias is not None and not network.frame.norm_first(i):
            squares = squares + bias.square()
        found.append(squares.sqrt())
    return found


@takes(network=NETWORK)
def balances(network: Network) -> list[Tensor]:
    """Balance c_j = Σ_o W_{l+1,oj}² − ‖W_l,j‖² − b_lj² of each hidden node, one (node,) per hidden layer.

    Gradient flow of any loss conserves it where the activation is relu, leaky_relu or identity; a step of SGD with
    rate η changes it exactly by η² times the same expression of the gradients.  Source: Du, Hu & Lee (2018).

    Raises:
        ValueError: for convolutions and BatchNorm, where other quantities are conserved (`conserved_norms`).
    """
    require_plain("balances", network)
    found = []
    for weight, bias, above in zip(network.weights[:-1], network.biases[:-1], network.weights[1:], strict=True):
        incoming = weight.square().sum(1) if bias is None else weight.square().sum(1) + bias.square()
        found.append(above.square().sum(0) - incoming)
    return found
