"""Teacher constructions: fixed networks, one drawn per seed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsdyn import registers
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Student, Teacher
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.networks.torch_io import carried_activation, load_state
from tsdyn.problem.inputs import evaluation_inputs, generator, labels, training_inputs

_ENUMERABLE = 1 << 16


def separated_rows(
    rng: np.random.Generator, rows: int, columns: int, choices: Sequence[float]
) -> Float[np.ndarray, "rows columns"]:
    """A matrix with entries drawn from `choices` whose rows are all distinct and non-zero.

    It is uniform over such matrices: rows are drawn one by one, and drawn again when they repeat or are zero.

    Raises:
        ExperimentError: if `choices` cannot give that many distinct non-zero rows.

    Source: Tian (2020), section 6 and released code.
    """
    values = np.unique(np.asarray(choices, dtype=float))
    available = len(values) ** columns - (0.0 in values)
    if rows > available:
        raise ExperimentError(
            f"separated_rows: {rows} rows of {columns} entries from {len(values)} choices: only {available} distinct "
            "non-zero rows exist; use fewer nodes, more inputs or more choices"
        )
    if len(values) ** columns <= _ENUMERABLE:
        # all rows in the order of counting in base len(values), without the one of zeros
        count = np.arange(len(values) ** columns)
        if 0.0 in values:
            zeros = np.ravel_multi_index((np.searchsorted(values, 0.0),) * columns, (len(values),) * columns)
            count = np.delete(count, zeros)
        chosen = count[rng.choice(len(count), size=rows, replace=False)]
        return values[np.stack(np.unravel_index(chosen, (len(values),) * columns), axis=1)]
    drawn: dict[bytes, np.ndarray] = {}
    while len(drawn) < rows:
        row = rng.choice(values, size=columns)
        if row.any():
            drawn.setdefault(row.tobytes(), row)
    return np.stack(list(drawn.values()))


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    """A uniformly distributed matrix with orthonormal rows; with orthonormal columns if there are more rows."""
    tall = rng.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q = q * np.sign(np.diag(r))  # without the signs the QR of a Gaussian matrix is not Haar distributed
    return q if rows >= columns else q.T


def draw_teacher(experiment: Experiment, seed: int) -> Network:
    """The teacher of one member, with the convolutions and BatchNorm that the experiment asks for.

    Weights are drawn (`separated_rows`, `orthonormal` or Gaussian) layer by layer from the lowest.  Above the first
    layer the column of node j = 1, 2, ... is divided by j^p (``teacher.polarity`` p, Tian (2020) Eq. 10).  With
    ``unit_norm`` the rows of the first layer are scaled to unit norm, but not their biases; with ``"every-layer"`` the
    rows of all layers are, each with its bias.  Biases are constant, or with ``"uniform"`` U[−½, ½].  A ``trained``
    teacher is trained from torch's start on the data's own labels; one of ``file`` is read from a state dict.
    ``luck-matters`` is the teacher of Tian et al. (2019): entries from ±½, ±¼, 0, biases U[−½, ½], no row of unit norm.

    ``prune`` then removes the nodes of least fan-out (`prune`), after which a trained teacher is trained for
    ``finetune_epochs`` more.  Last, ``balanced`` tunes biases on the evaluation set (`balance`).

    Raises:
        ExperimentError: if the choices cannot give distinct rows, more rows than inputs should be orthonormal, a
            balanced teacher's output is constant, the data have no labels, or a state dict does not fit.
    """
    teacher, rng = experiment.teacher, generator(seed, "teacher")
    if teacher.init == "file":
        network = from_file(experiment, str(teacher.path), teacher, teacher.widths)
    elif teacher.init == "trained":
        start = network_of(experiment, *uniform_start(experiment.weight_shapes(teacher.widths), rng), who=teacher)
        network = _on_labels(experiment, seed, start, rng, teacher.train_epochs)
    else:
        network = _drawn(experiment, rng)
    if teacher.prune:
        network, _ = prune(network, teacher.prune)
        if teacher.init == "trained" and teacher.finetune_epochs:
            network = _on_labels(experiment, seed, network, rng, teacher.finetune_epochs)
    if teacher.balanced:
        network = balance(network, torch.from_numpy(evaluation_inputs(experiment, seed)).double())
    return network.to(getattr(torch, experiment.dtype))


def network_of(
    experiment: Experiment,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    who: Teacher | Student,
    norms: Sequence[BatchNorm | None] | None = None,
) -> Network:
    """A network of the teacher's or student's architecture with these parameters; BatchNorm is new unless given."""
    leak = experiment.student.leak if who.leak is None else who.leak
    activation = who.activation or experiment.student.activation
    place = who.batch_norm
    if norms is None and place != "none":
        norms = [BatchNorm.fresh(len(w), affine=who.batch_norm_affine, like=w) for w in weights[:-1]]
    shared = experiment.teacher
    return Network(
        weights, biases, activation, leak=leak, norms=norms, norm="after" if place == "none" else place,
        image=experiment.image, stride=shared.stride, padding=shared.padding,
    )  # fmt: skip


def _drawn(experiment: Experiment, rng: np.random.Generator) -> Network:
    teacher = experiment.teacher
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    below = teacher.widths[0]
    for shape in experiment.weight_shapes(teacher.widths):
        nodes, inputs = shape[0], math.prod(shape[1:])
        weight = _rows(experiment, rng, nodes, inputs, lowest=not weights)
        bias = rng.uniform(-0.5, 0.5, nodes) if teacher.bias == "uniform" else np.full(nodes, float(teacher.bias))
        if weights:  # columns of one node below are adjacent: (node, its image's rows and columns)
            weight = weight / np.repeat(np.arange(1, below + 1), inputs // below) ** teacher.polarity
        norm = np.linalg.norm(weight, axis=1)
        match teacher.unit_norm:
            case "every-layer":
                weight, bias = weight / norm[:, None], bias / norm
            case True:
                weight = weight if weights else weight / norm[:, None]
            case False:
                pass
            case other:
                assert_never(other)
        weights.append(torch.from_numpy(weight.reshape(shape)))
        biases.append(None if teacher.bias is False else torch.from_numpy(bias))
        below = nodes
    return network_of(experiment, weights, biases, who=teacher)


def _separated(rng: np.random.Generator, nodes: int, inputs: int, *, teacher: Teacher, lowest: bool) -> np.ndarray:
    return separated_rows(rng, nodes, inputs, teacher.choices)


def _gaussian(rng: np.random.Generator, nodes: int, inputs: int, *, teacher: Teacher, lowest: bool) -> np.ndarray:
    return rng.standard_normal((nodes, inputs)) * teacher.scale


def _orthonormal(rng: np.random.Generator, nodes: int, inputs: int, *, teacher: Teacher, lowest: bool) -> np.ndarray:
    if lowest and nodes > inputs:
        raise ExperimentError(f"teacher.init = 'orthonormal': {nodes} orthonormal rows do not fit in {inputs} inputs")
    return orthonormal(rng, nodes, inputs)


def _luck_matters(rng: np.random.Generator, nodes: int, inputs: int, *, teacher: Teacher, lowest: bool) -> np.ndarray:
    """Entries from ±½, ±¼, 0, rows distinct and not zero (Tian et al. 2019, section 5); for ConvNets, of kernels."""
    return separated_rows(rng, nodes, inputs, teacher.choices)


#: ``teacher.init`` → the function that draws a layer's weight: (rng, nodes, inputs, *, teacher, lowest) →
#: (node, input_node), with the experiment's section ``[teacher]`` and whether the layer is the lowest.
TEACHERS: Mapping[str, Callable[..., np.ndarray]] = {
    "separated": _separated,
    "gaussian": _gaussian,
    "orthonormal": _orthonormal,
    "luck-matters": _luck_matters,
}


def _rows(experiment: Experiment, rng: np.random.Generator, nodes: int, below: int, *, lowest: bool) -> np.ndarray:
    teacher = experiment.teacher
    rows = np.asarray(registers.TEACHERS.load(teacher.init)(rng, nodes, below, teacher=teacher, lowest=lowest))
    foreign = registers.TEACHERS.foreign(teacher.init)
    if foreign and (rows.shape != (nodes, below) or rows.dtype.kind != "f" or not np.isfinite(rows).all()):
        raise registers.PartError(
            f"teacher {teacher.init!r} of {registers.TEACHERS.origin(teacher.init).package} drew {rows.dtype} of shape "
            f"{rows.shape}; it must draw finite real numbers of shape {(nodes, below)}, (node, input_node)"
        )
    return rows


def uniform_start(shapes: Sequence[tuple[int, ...]], rng: np.random.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases uniform on ±1/√(inputs), as in new ``nn.Linear`` and ``nn.Conv2d`` modules; float64."""
    weights, biases = [], []
    for shape in shapes:
        edge = 1 / math.sqrt(math.prod(shape[1:]))
        weights.append(torch.from_numpy(rng.uniform(-edge, edge, shape)))
        biases.append(torch.from_numpy(rng.uniform(-edge, edge, shape[0])))
    return weights, biases


def from_file(experiment: Experiment, path: str, who: Teacher | Student, widths: Sequence[int]) -> Network:
    """The network of these widths from a state dict in a file (`load_state`).

    Keys are the names of ``to_torch()``'s modules, or those of `Network.state_dict`.

    Raises:
        ExperimentError: if the file cannot be read safely, or keys and shapes differ; names each.
    """
    shapes = experiment.weight_shapes(widths)
    weights = [torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes]
    biases = [None if who.bias is False else w.new_zeros(len(w)) for w in weights]
    blank = network_of(experiment, weights, biases, who=who)
    try:
        _refuse_another_activation(path, blank.activation.name)
        return blank.with_state(load_state(path))
    except ValueError as error:
        raise ExperimentError(f"{path}: {error}") from None


def _refuse_another_activation(path: str, used: str) -> None:
    carried = carried_activation(path)
    if carried not in (None, used):
        raise ValueError(
            f"the file says activation {carried!r}, and the experiment {used!r}; set the activation it says"
        )


def refuse_unsaid_activation(experiment: Experiment) -> None:
    """Refuse a teacher's file of parameters whose activation neither the file nor ``teacher.activation`` says.

    With the student's activation in its place the targets would be another function's, and nothing would show it.

    Raises:
        ExperimentError: naming the file.
    """
    teacher = experiment.teacher
    if teacher.init != "file" or teacher.activation is not None or "teacher.activation" in swept_keys(experiment.sweep):
        return
    try:
        carried = carried_activation(str(teacher.path))
    except ValueError as error:
        raise ExperimentError(f"{teacher.path}: {error}") from None
    if carried is None:
        raise ExperimentError(
            f"teacher.path = {teacher.path!r}: parameters alone do not say the teacher's activation; set "
            f"teacher.activation (the student's is {experiment.student.activation!r}), or save it in the file as "
            "'activation'"
        )


def _on_labels(experiment: Experiment, seed: int, network: Network, rng: np.random.Generator, epochs: int) -> Network:
    """The network after `epochs` epochs of SGD (momentum 0.9) on the cross entropy with the data's own labels."""
    x = torch.from_numpy(training_inputs(experiment, seed)).double()
    y = torch.from_numpy(labels(experiment, seed, "train"))
    module = network.to_torch().train()
    x = x if experiment.image is None else x.unflatten(1, experiment.image)
    optimizer = torch.optim.SGD(module.parameters(), lr=experiment.teacher.train_rate, momentum=0.9)
    batch = min(experiment.training.batch, len(x))
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        for chosen in order[: len(x) // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Network.from_torch(module.eval(), image=experiment.image)


# --- pruning -------------------------------------------------------------------------------------------------


def fanouts(network: Network) -> list[Tensor]:
    """Mean |outgoing weight| of each node, (node,) per hidden layer; for a channel over all its kernels or pixels.

    Source: Tian (2020), released code.
    """
    found = []
    for below, above in itertools.pairwise(network.weights):
        nodes = len(below)
        by_node = above.flatten(1).unflatten(1, (nodes, -1))  # (node above, node, its image's rows and columns)
        found.append(by_node.abs().mean((0, 2)))
    return found


def prune(network: Network, ratios: Sequence[float]) -> tuple[Network, list[Tensor]]:
    """The network without the ⌊m · ratio⌋ nodes of least fan-out in each hidden layer, and the nodes that are left.

    Pruned nodes are removed with their weights, instead of set to zero, so that widths, correlations and students of
    the pruned network are about active nodes only.

    Args:
        network: Any network.
        ratios: One per hidden layer, in [0, 1).

    Returns:
        The smaller network, and for each hidden layer the positions in `network` of its nodes, increasing.

    Source: Tian (2020), section 6.3 and released code.

    Raises:
        ValueError: if a ratio is not in [0, 1), or there is not one per hidden layer.
    """
    if len(ratios) != network.depth - 1 or not all(0 <= r < 1 for r in ratios):
        raise ValueError(
            f"prune: ratios {list(ratios)} for {network.depth - 1} hidden layers; give one per layer, at least 0 and "
            "below 1: pruning everything leaves no network"
        )
    active = []
    for norm, ratio in zip(fanouts(network), ratios, strict=True):
        order = norm.argsort(stable=True)
        active.append(order[int(len(norm) * ratio) :].sort().values)
    weights: list[Tensor] = []
    for i, weight in enumerate(network.weights):
        kept = weight if i == network.depth - 1 else weight[active[i]]
        if i:
            shape = kept.shape[2:] if kept.ndim == 4 else ()
            columns = kept.flatten(1).unflatten(1, (len(network.weights[i - 1]), -1))[:, active[i - 1]]
            kept = columns.reshape(len(kept), -1, *shape) if shape else columns.flatten(1)
        weights.append(kept)
    hidden = zip(network.biases[:-1], active, strict=True)
    biases = [*(None if b is None else b[at] for b, at in hidden), network.biases[-1]]
    # `index_select` binds the nodes now; a lambda would use those of the last layer
    norms = [
        None if n is None else n.map(functools.partial(torch.index_select, dim=0, index=at))
        for n, at in zip(network.norms, active, strict=True)
    ]
    return network.with_parameters(weights, biases, norms), active


def balance(network: Network, x: Float[Tensor, "sample input"]) -> Network:
    """A network with other biases whose hidden nodes are each active on half of `x` and whose outputs have mean 0 and
    variance 1 over it.

    From the lowest layer up the median of each pre-activation (for a channel over pixels too) is subtracted from its
    bias; the rows and biases of the last layer are divided by the standard deviations of the outputs.  Needs biases.

    Source: Tian et al. (2019), section 5 and released code.

    Raises:
        ExperimentError: without biases, or if an output is constant over `x`.
    """
    if any(b is None for b in network.biases):
        raise ExperimentError("teacher.balanced: tunes biases, and the teacher has none; set teacher.bias")
    weights, biases = list(network.weights), [b for b in network.biases if b is not None]
    for i in range(network.depth - 1):
        z = network.with_parameters(weights, biases).trace(x).preactivations[i]
        biases[i] = biases[i] - z.median(0).values
    output = network.with_parameters(weights, biases)(x)
    std, mean = torch.std_mean(output, 0, correction=0)
    constant = [int(j) for j in (output.amax(0) == output.amin(0)).nonzero().flatten()]
    if constant:
        raise ExperimentError(
            f"teacher.balanced: outputs {constant} are constant over the evaluation set, so they cannot be scaled to "
            "unit variance; use more nodes, or a lower teacher.polarity"
        )
    weights[-1], biases[-1] = weights[-1] / std[:, None], (biases[-1] - mean) / std
    return network.with_parameters(weights, biases)
