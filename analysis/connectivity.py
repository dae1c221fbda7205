"""Connectivity of solutions: the loss along straight lines, matched lines and the path that Theorem 2 allows.

A straight line between two students of one teacher crosses a barrier, if only because their nodes are numbered
differently; a line to the matched student crosses a lower one; and where unaligned nodes cancel (Theorem 2), there is a
path without a barrier.  Source: Tian (2020), Theorem 2 and its discussion of connectivity; Kuditipudi et al. 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tsdyn.analysis.identity import points
from tsdyn.analysis.matching import assignment
from tsdyn.analysis.members import Member, member

from tsdyn.networks.network import Network, require_plain
from tsdyn.theory import alignments
from tsdyn.vocabulary import TIAN

#: Names of the routes from one student to the other.
ROUTES = ("straight", "matched", "theorem 2")
#: Number of straight legs of Theorem 2's path.
LEGS = 5
#: States along the path that differ in what carries the function, and their corners.
STATES = {"one solution": 0, "on its carriers": 1, "on the other's carriers": 3, "the other": 5}


def _like(network: Network, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Network:
    require_plain("connectivity", network)
    leak = network.activation.leak
    return Network(list(weights), list(biases), network.activation.name, leak=leak or 0.0)


def _biases(network: Network) -> list[Tensor]:
    pairs = zip(network.weights, network.biases, strict=True)
    return [w.new_zeros(len(w)) if b is None else b for w, b in pairs]


def widened(network: Network, widths: Sequence[int]) -> Network:
    """The network with hidden layers of the given widths; added nodes have zero weights, so the function is the same.

    Raises:
        ValueError: if a width is less than the layer has.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn.analysis.connectivity import widened
        >>> net = tsdyn.Network([torch.eye(3), torch.ones(1, 3)], [torch.zeros(3), None])
        >>> x = torch.randn(5, 3)
        >>> wide = widened(net, [4])
        >>> wide.widths, bool(torch.equal(wide(x), net(x)))
        ((3, 4, 1), True)
    """
    have = network.widths[1:-1]
    if len(widths) != len(have) or any(n < m for n, m in zip(widths, have, strict=True)):
        raise ValueError(f"widened: widths {tuple(widths)} do not hold a network with hidden layers {have}")
    sizes = (network.widths[0], *widths, network.widths[-1])
    weights, biases = [], []
    for (below, nodes), w, b in zip(itertools.pairwise(sizes), network.weights, _biases(network), strict=True):
        weights.append(torch.nn.functional.pad(w, (0, below - w.shape[1], 0, nodes - w.shape[0])))
        biases.append(torch.nn.functional.pad(b, (0, nodes - len(b))))
    return _like(network, weights, biases)


def permuted(network: Network, orders: Sequence[Sequence[int]]) -> Network:
    """The network with the nodes of each hidden layer in another order, given as old positions; same function.

    Raises:
        ValueError: if an order is no permutation of its layer.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn.analysis.connectivity import permuted
        >>> net = tsdyn.Network([torch.eye(3), torch.ones(1, 3)], [torch.zeros(3), None])
        >>> permuted(net, [[2, 0, 1]]).weights[0].argmax(1).tolist()
        [2, 0, 1]
    """
    hidden = network.widths[1:-1]
    if [sorted(order) for order in orders] != [list(range(n)) for n in hidden]:
        raise ValueError(f"permuted: orders {list(orders)} are no permutations of hidden layers {hidden}")
    around = [list(range(network.widths[0])), *map(list, orders), list(range(network.widths[-1]))]
    weights = [
        w[above][:, below] for w, (below, above) in zip(network.weights, itertools.pairwise(around), strict=True)
    ]
    return _like(network, weights, [b[above] for b, above in zip(_biases(network), around[1:], strict=True)])


def matched(reference: Network, other: Network, x: Tensor) -> tuple[Network, Network]:
    """Both networks at the wider one's widths, with the hidden nodes of `other` reordered to match `reference`.

    Nodes are matched one to one, layer by layer, with the largest total correlation of activations on `x`.  The
    functions are unchanged.

    Raises:
        ValueError: if depths, inputs or outputs differ.
    """
    ends = [(net.depth, net.widths[0], net.widths[-1]) for net in (reference, other)]
    if ends[0] != ends[1]:
        raise ValueError(f"matched: {reference!r} and {other!r} differ in depth, inputs or outputs")
    widths = [max(pair) for pair in zip(reference.widths[1:-1], other.widths[1:-1], strict=True)]
    reference, other = widened(reference, widths), widened(other, widths)
    traces = [net.trace(x).activations[:-1] for net in (reference, other)]
    orders = []
    for f, g in zip(*traces, strict=True):
        f, g = f - f.mean(0), g - g.mean(0)
        scale = f.norm(dim=0)[:, None] * g.norm(dim=0)
        score = torch.where(scale > 0, f.T @ g / torch.where(scale > 0, scale, 1.0), 0.0)  # dead nodes go anywhere
        orders.append([int(k) for k in assignment(score.numpy())])
    return reference, permuted(other, orders)


def between(first: Network, second: Network, share: float) -> Network:
    """The network with parameters (1 − share) first + share second.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn.analysis.connectivity import between
        >>> first = tsdyn.Network([torch.zeros(2, 2), torch.zeros(1, 2)], [torch.zeros(2), None])
        >>> second = tsdyn.Network([torch.ones(2, 2), torch.ones(1, 2)], [torch.ones(2), None])
        >>> between(first, second, 0.25).weights[1].tolist()
        [[0.25, 0.25]]
    """
    mix = [
        [(1 - share) * a + share * b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in ((first.weights, second.weights), (_biases(first), _biases(second)))
    ]
    return _like(first, *mix)


def carriers(student: Network, teacher: Network) -> tuple[list[int], Tensor]:
    """Carriers: one student node per aligned teacher node and orientation, and fan-outs that are zero elsewhere.

    Nodes aligned with one teacher node within ε_0/2 that point the same way act as one, by homogeneity: the one with
    the largest norm becomes the carrier of Σ v_k ‖w_k‖ of them all.  Unaligned nodes, whose fan-outs cancel by Theorem
    2, get 0.

    Returns:
        The carriers' positions, and the new W_2 (output, node).
    """
    eps = alignments.alignment(teacher, student)
    near = alignments.separation(teacher) / 2
    nearest = torch.where(eps.isnan(), torch.inf, eps).min(0)
    norm = student.weights[0].norm(dim=1)
    same_way = (student.weights[0] * teacher.weights[0][nearest.indices]).sum(1) > 0
    scaled = student.weights[1] * norm
    fanout = torch.zeros_like(student.weights[1])
    kept: list[int] = []
    for teacher_node, way in itertools.product(range(teacher.widths[1]), (True, False)):
        group = ((nearest.indices == teacher_node) & (nearest.values <= near) & (same_way == way)).nonzero().flatten()
        if len(group):
            carrier = int(group[scaled[:, group].norm(dim=0).argmax()])
            fanout[:, carrier] = scaled[:, group].sum(1) / norm[carrier]
            kept.append(carrier)
    return kept, fanout


def theorem_2_path(first: Network, second: Network, teacher: Network) -> list[Network]:
    """Corners of a path without a barrier in the loss, from `first` to `second` with its nodes renumbered.

    1. Fan-outs of `first` move onto its carriers.  2. Free nodes take the incoming weights of the carriers of
    `second`.  3. Fan-outs move over to those.  4. The other nodes take their weights of `second`.  5. Fan-outs become
    those of `second`.  Legs 2 and 4 move nodes without fan-out, which leaves the function unchanged.  Along legs 1, 3
    and 5 the output is affine in the moving parameters, so the loss is convex and at most the larger of the leg's two
    ends.

    Raises:
        ValueError: if the networks are not two-layer of one width with a piecewise linear activation, or have too few
            nodes for the carriers of both.  Source: Tian (2020), Theorem 2; Kuditipudi et al. 2019.
    """
    if first.widths != second.widths or first.depth != 2 or not first.activation.piecewise_linear:
        raise ValueError(
            f"theorem_2_path: {first!r} and {second!r}; they must be two-layer, of one width and piecewise linear"
        )
    (mine, my_fanout), (theirs, their_fanout) = (carriers(net, teacher) for net in (first, second))
    nodes = first.widths[1]
    free = [k for k in range(nodes) if k not in mine]
    if len(free) < len(theirs):
        raise ValueError(
            f"theorem_2_path: {nodes} nodes do not hold {len(mine)} carriers of one and {len(theirs)} of the other; "
            "it needs over-realization"
        )
    places = free[: len(theirs)]
    rest = iter([k for k in range(nodes) if k not in theirs])
    at = dict(zip(places, theirs, strict=True))
    order = [at[k] if k in at else next(rest) for k in range(nodes)]
    second, their_fanout = permuted(second, [order]), their_fanout[:, order]
    (w, _), (b, c) = first.weights, _biases(first)
    (w2, v2), (b2, c2) = second.weights, _biases(second)
    w_both, b_both = w.clone(), b.clone()
    w_both[places], b_both[places] = w2[places], b2[places]
    return [
        first,
        _like(first, [w, my_fanout], [b, c]),
        _like(first, [w_both, my_fanout], [b_both, c]),
        _like(first, [w_both, their_fanout], [b_both, c2]),
        _like(first, [w2, their_fanout], [b2, c2]),
        _like(first, [w2, v2], [b2, c2]),
    ]


def loss_along(corners: Sequence[Network], teacher: Network, x: Tensor, positions: np.ndarray) -> np.ndarray:
    """Loss J = ½ E‖f* − f‖² at `positions` in [0, 1] along straight legs between `corners`, of equal length each."""
    wanted = teacher(x)
    legs = len(corners) - 1
    found = []
    with torch.no_grad():
        for position in positions:
            leg = min(int(position * legs), legs - 1)
            here = between(corners[leg], corners[leg + 1], position * legs - leg)
            found.append(float(0.5 * (wanted - here(x)).square().sum(1).mean()))
    return np.array(found)


def _one(ds: xr.Dataset) -> Member:
    experiments = [experiment for _, experiment in points(ds).values()]
    if len(experiments) != 1:
        raise ValueError(f"connect: a slice holds {len(experiments)} points of the sweep; select one by its swept keys")
    return member(ds, experiments[0])


def _of_one_teacher(first: xr.Dataset, second: xr.Dataset, caller: str) -> tuple[Member, Member]:
    a, b = _one(first), _one(second)
    same = a.teacher.widths == b.teacher.widths and all(
        torch.equal(t, u)
        for mine, theirs in ((a.teacher.weights, b.teacher.weights), (_biases(a.teacher), _biases(b.teacher)))
        for t, u in zip(mine, theirs, strict=True)
    )
    same = same and a.teacher.activation.name == b.teacher.activation.name
    same = same and a.teacher.activation.leak == b.teacher.activation.leak
    if not same:
        raise ValueError(
            f"{caller}: seed {a.seed} and seed {b.seed} learn from different teachers; compare points of a sweep that "
            "differ in the student, data or training only, at one seed"
        )
    return a, b


def _path(a: Member, b: Member) -> tuple[Network, Network, list[Network], str]:
    """Both students, the second's nodes matched, and the corners of `theorem_2_path`; or none, and the reason."""
    reference, partner = matched(a.student, b.student, a.evaluation_inputs)
    try:
        return reference, partner, theorem_2_path(reference, partner, a.teacher), ""
    except ValueError as error:
        return reference, partner, [], str(error)


def connect(first: xr.Dataset, second: xr.Dataset, *, points_a_leg: int = 10) -> xr.Dataset:
    """Dataset of ``loss`` (route, position) on the evaluation set along every route from one student to another.

    ``straight``: with the nodes as they are numbered, the narrower student widened by zero nodes; ``matched``: after
    one-to-one matching; ``theorem 2``: `theorem_2_path`, NaN if the students do not allow it, with the reason in attrs.
    ``barrier`` (route): largest loss along the route, minus the larger of its ends.  Computed eagerly.

    Args:
        first, second: One member each (seed, epoch and swept keys selected) with weights; of the same teacher.
        points_a_leg: Number of intervals along each of the path's five legs; other routes have as many in total.

    Raises:
        ValueError: if a slice holds more than a member or no weights, or the teachers differ.

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis.connectivity import connect
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=1, epoch=-1)
        >>> connect(ds.sel(seed=0), ds.sel(seed=0)).loss.dims
        ('route', 'position')
    """
    a, b = _of_one_teacher(first, second, "connect")
    x, teacher = a.evaluation_inputs, a.teacher
    reference, partner, path, reason = _path(a, b)
    widths = reference.widths[1:-1]
    routes = ([reference, widened(b.student, widths)], [reference, partner], path)
    positions = np.linspace(0, 1, LEGS * points_a_leg + 1)
    losses = [
        loss_along(route, teacher, x, positions) if route else np.full(len(positions), np.nan) for route in routes
    ]
    loss = xr.DataArray(
        np.stack(losses),
        coords={"route": list(ROUTES), "position": positions},
        dims=("route", "position"),
        attrs={"units": "1", "long_name": "evaluation loss J = ½ E‖f* − f‖²", "source": f"{TIAN}, Theorem 2"},
    )
    if reason:
        loss.attrs["comment"] = reason
    ends = np.maximum(loss.isel(position=0), loss.isel(position=-1))
    barrier = (loss.max("position") - ends).assign_attrs(
        units="1", long_name="barrier: largest loss above the ends", source=loss.attrs["source"]
    )
    return xr.Dataset({"loss": loss, "barrier": barrier.drop_vars("position", errors="ignore")})


def _standing(student: Network, teacher: Network) -> np.ndarray:
    """Number of the teacher node that each node is aligned with, 0 for none, and its share of that one's fan-out."""
    norms = teacher.weights[1].norm(dim=0) * teacher.weights[0].norm(dim=1)
    eps = alignments.alignment(teacher, student)
    nearest = torch.where(eps.isnan(), torch.inf, eps).min(0)
    aligned = nearest.values <= alignments.separation(teacher) / 2
    strength = student.weights[1].norm(dim=0) * student.weights[0].norm(dim=1)
    share = strength / torch.where(aligned, norms[nearest.indices], norms.max())
    return np.stack([torch.where(aligned, nearest.indices + 1, 0).numpy(), share.numpy()])


def states(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Which teacher node each student node stands for, and how much it carries, at the `STATES` of Theorem 2's path.

    ``stands_for`` (state, node): number of the teacher node, from 1, that it is aligned with within ε_0/2; 0 for none.
    ``carried`` (state, node): ‖v_k‖ ‖w_k‖ over the same of that teacher node, of the largest one for nodes aligned with
    none.  NaN where there is no path; its ends are there always.  Computed eagerly.

    Args:
        first, second: As `connect` takes them.

    Raises:
        ValueError: as `connect`; and if there is a single teacher node, or students have more than two layers.

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis.connectivity import states
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=1, epoch=-1)
        >>> states(ds.sel(seed=0), ds.sel(seed=0)).carried.dims
        ('state', 'node')
    """
    a, b = _of_one_teacher(first, second, "states")
    if a.teacher.depth != 2 or a.student.depth != 2 or a.teacher.widths[1] < 2:
        raise ValueError(f"states: {a.teacher!r} and {a.student!r}; they must be two-layer, with several teacher nodes")
    reference, partner, path, _ = _path(a, b)
    corners: list[Network | None] = [*path] or [reference, *itertools.repeat(None, LEGS - 1), partner]
    found = np.full((2, len(STATES), reference.widths[1]), np.nan)
    for row, corner in enumerate(STATES.values()):
        student = corners[corner]
        if student is not None:
            found[:, row] = _standing(student, a.teacher)
    words = ("number of the teacher node that it is aligned with, 0: none", "its share of the teacher node's fan-out")
    source = {"units": "1", "source": f"{TIAN}, Theorem 2"}
    return xr.Dataset(
        {
            name: (("state", "node"), values, {"long_name": text, **source})
            for name, values, text in zip(("stands_for", "carried"), found, words, strict=True)
        },
        {"state": list(STATES), "node": np.arange(reference.widths[1])},
    )
