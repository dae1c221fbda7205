r"""Second derivatives of a loss of a fully connected network's outputs, layer by layer, from formulas.

With J(f_L(θ)), z_l = W_l f_{l−1} + b_l and f_l = σ(z_l), let t_kl = ∂z_k/∂z_l, where z_l is moved as by a bias of its
own, g_l = ∂J/∂z_l, and c_l = (∂J/∂f_l) ∘ σ''(z_l).  Of one sample

.. math:: \frac{\partial^2 J}{\partial z_l \partial z_m}
          = t_{Ll}^T \frac{\partial^2 J}{\partial f_L^2} t_{Lm} + \sum_{k \ge m} t_{kl}^T \mathrm{diag}(c_k)\, t_{km}

for l ≤ m, and the second derivative in W_l (ij) and W_m (pq) is that of (i, p) times f_{l−1,j} f_{m−1,q}, plus, for
l < m, g_{m,p} f_{l−1,j} ∂f_{m−1,q}/∂z_{l,i}, since W_l moves the input of layer m.  Summed over samples both are matrix
products.

`layered` decides from the module alone; whoever uses it compares a product with one by plain autograd, unless the
module is built of torch's own parts and the loss sees the parameters through the outputs only (`proved`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from tsdyn import memory
from tsdyn.derivatives import graph
from tsdyn.derivatives.agreement import TOWARDS_ZERO, agree, agree_up_to_cancellation, asymmetry
from tsdyn.engine.compiled_curvature import Passed, product_of_squares, serves
from tsdyn.networks.network import Network

#: Limit on the bytes of the samples whose matrices are formed together.
_AT_ONCE = 64 << 20
#: Bytes of new memory that are made and written together, so that they stay in the cache between.
_AT_A_TOUCH = 1 << 20


def layered(
    module: nn.Module, inputs: object, value: Callable[[Tensor], Tensor], leaves: Sequence[Tensor]
) -> Layered | None:
    """The formulas for this module, or None if it is not a plain fully connected network or is given other parameters.

    Args:
        module: An ``nn.Sequential`` of Linear layers and one kind of activation.
        inputs: (sample, input).
        value: Outputs, (sample, output) → J, a sum of terms that have one sample each.
        leaves: The parameters to differentiate in, each a weight or bias of `module`.
    """
    found = plain_network(module, inputs, leaves)
    if found is None or not isinstance(inputs, Tensor):
        return None
    network, order = found
    if len(inputs) * network.widths[-1] ** 2 * inputs.element_size() > _AT_ONCE:
        return None
    walk = walked(network, inputs.detach())
    free = walk.output.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(value(free), free, create_graph=True)
    return Layered(network, inputs.detach(), walk, slope.detach(), _bend(slope, free, value)[0], order)


def proved(
    module: nn.Module,
    inputs: object,
    value: Callable[[Tensor], tuple[Tensor, bool]],
    leaves: Sequence[Tensor],
    *,
    once: bool,
    squares: Callable[[Tensor], tuple[Tensor, float] | None] = lambda _: None,
) -> Layered | OfSquares | None:
    """As `layered`, but None unless autograd's graph proves the formulas, which then need no comparison.

    The loss must depend on the outputs alone.  For more than one product it must also have no second derivative in the
    outputs of two samples.

    Args:
        module: Built of torch's own parts (`graph.known`).
        inputs, leaves: As `layered`.
        value: Outputs, (sample, output) → J, and whether nothing but straight arithmetic of torch's made it of them
            (`straight`); raises ValueError if it is not steady.
        once: Whether one product is all that is asked for; then the loss's own graph serves for its second derivative.
        squares: A tensor like the outputs → target and c, if the loss is proved to be c Σ (output − target)².
    """
    found = plain_network(module, inputs, leaves, compare=False)
    if found is None or not isinstance(inputs, Tensor):
        return None
    network, order = found
    if not once and len(inputs) * network.widths[-1] ** 2 * inputs.element_size() > _AT_ONCE:
        return None
    if once and network.activation.piecewise_linear and serves(network, inputs.detach()):
        told = squares(inputs.detach().new_empty(len(inputs), network.widths[-1]))
        if told is not None:
            return OfSquares(network, inputs.detach(), *told, order)
    walk = walked(network, inputs.detach())
    free = walk.output.detach().requires_grad_(True)
    total, straight = value(free)
    if not total.requires_grad or (not straight and graph.leaves_of([total]) != {id(free)}):
        return None
    (slope,) = torch.autograd.grad(total, free, create_graph=True)

    def alone(output: Tensor) -> Tensor:
        return value(output)[0]

    if once:
        return Layered(network, inputs.detach(), walk, slope.detach(), _Bent(slope, free, alone, straight), order)
    bend, apart = _bend(slope, free, alone)
    if not apart:
        return None
    return Layered(network, inputs.detach(), walk, slope.detach(), bend, order)


def plain_network(
    module: nn.Module, inputs: object, leaves: Sequence[Tensor], *, compare: bool = True
) -> tuple[Network, list[tuple[int, bool]]] | None:
    """The plain network that a module is, and where each of its parameters is in it: (layer from 0, whether a bias).

    None if it is no ``nn.Sequential`` of Linear layers and one kind of activation that is given (sample, input), or if
    one of `leaves` is not in it exactly once.  The network's parameters need no gradient.  Without `compare` outputs
    are not compared with the module's, which is for modules that are known (`graph.known`).
    """
    if type(module) is not nn.Sequential or not isinstance(inputs, Tensor) or inputs.ndim != 2:
        return None
    try:
        network = Network.from_torch(module, compare=compare)
    except ValueError:
        return None
    if not network.plain or network.weights[0].dtype not in (torch.float32, torch.float64):
        return None
    order = [place for place in (_place(network, leaf) for leaf in leaves) if place is not None]
    if len(order) < len(leaves) or len({id(w) for w in network.weights}) < network.depth:
        return None
    network.weights = [w.detach() for w in network.weights]
    network.biases = [None if b is None else b.detach() for b in network.biases]
    return network, order


def fill_jacobians(network: Network, x: Tensor, order: Sequence[tuple[int, bool]], into: Sequence[Tensor]) -> None:
    """Write ∂f_L/∂θ of each sample in place: t_Ll f_{l−1}ᵀ for a weight, t_Ll for a bias, (sample, output, ...).

    Args:
        network: Plain, with parameters that need no gradient.
        x: (sample, input).
        order: (layer from 0, whether it is the bias) of each of `into`.
    """
    trace = network.trace(x)
    below = [x, *trace.activations[:-1]]
    outputs = network.widths[-1]
    moved = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(len(x), outputs, outputs)
    for layer in range(network.depth - 1, -1, -1):
        for (at, bias), result in zip(order, into, strict=True):
            if at == layer and bias:
                result.copy_(moved)
            elif at == layer:
                _fill_outer(moved, below[layer], result)
        if layer:
            moved = (moved @ network.weights[layer]) * trace.gates[layer - 1].unsqueeze(1)


def _fill_outer(moved: Tensor, f: Tensor, into: Tensor) -> None:
    """Write t fᵀ of each sample, (sample, output, node, input_node), page by page if there are many."""
    outputs, nodes, inputs = into.shape[1:]
    step = max(1, _AT_A_TOUCH // max(1, nodes * inputs * into.element_size()))
    if into.nbytes <= _AT_A_TOUCH or step >= outputs * len(into):
        torch.mul(moved.unsqueeze(3), f[:, None, None, :], out=into)
        return
    for sample, part in itertools.product(range(len(into)), range(0, outputs, step)):
        piece = into[sample, part : part + step]
        memory.touch(piece)
        torch.mul(moved[sample, part : part + step].unsqueeze(2), f[sample], out=piece)


def _place(network: Network, leaf: Tensor) -> tuple[int, bool] | None:
    """(layer, whether it is the bias), layers counted from 0; None for a tensor that is not in the network once."""
    found = [(i, False) for i, weight in enumerate(network.weights) if weight is leaf]
    found += [(i, True) for i, bias in enumerate(network.biases) if bias is leaf]
    return found[0] if len(found) == 1 else None


def _bend(slope: Tensor, free: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
    """∂²J/∂f² from the graph of ∂J/∂f, (sample, output, output), or (sample, output) if it is diagonal.

    And whether that is all there is, no second derivative being in the outputs of two samples, and symmetric, as it is
    unless a hook or a backward pass of the loss's own made it.

    Args:
        value: f → J.
    """
    if not slope.requires_grad:
        return torch.zeros_like(free), True
    # of half of the samples: what it gives the others, they have in common
    draw = torch.Generator(device="cpu").manual_seed(0)  # whatever the caller has made torch's default device
    half = torch.randperm(len(free), generator=draw, device="cpu").unsqueeze(1) % 2
    random = torch.empty(free.shape, dtype=free.dtype, device="cpu").uniform_(-1, 1, generator=draw)
    random = (random if len(free) == 1 else random * half).to(free.device)
    # each output by itself: then the product with ones holds all there is, and one with any other vector agrees
    diagonal, product = (_along(slope, free, v) for v in (torch.ones_like(free), random))
    if agree(product, diagonal * random):
        return diagonal, True

    def of_samples(slope: Tensor, free: Tensor) -> Tensor:
        """∂²J/∂f², (sample, output, output), if no two samples meet."""
        ones = torch.ones_like(slope[:, 0])
        return torch.stack([_along(slope[:, c], free, ones) for c in range(free.shape[1])], 2)

    def with_random(bend: Tensor) -> Tensor:
        """Its product with `random`, (sample, output)."""
        return (bend @ random.unsqueeze(2)).squeeze(2)

    bend = of_samples(slope, free)

    @cache  # both comparisons may ask for it
    def others() -> list[tuple[Tensor, Tensor]]:
        """The product with `random`, and what `of_samples` gives, at other points."""
        return [(_along(*at, random), of_samples(*at)) for at in _elsewhere(free, value)]

    apart = agree_up_to_cancellation(
        product, with_random(bend), bend.abs().max(), lambda: [(p, with_random(b), b.abs().max()) for p, b in others()]
    )
    return bend, apart and agree_up_to_cancellation(bend, bend.mT, 0.0, lambda: [(b, b.mT, 0.0) for _, b in others()])


def _along(slope: Tensor, free: Tensor, vector: Tensor) -> Tensor:
    """The product of ∂²J/∂f² with a vector, (sample, output), from the graph of ∂J/∂f or of one column of it."""
    if not slope.requires_grad:
        return torch.zeros_like(free)
    (found,) = torch.autograd.grad(slope, free, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(free) if found is None else found


def _elsewhere(free: Tensor, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(∂J/∂f with its graph, f) at outputs nearer to 0, where J depends on them."""
    for factor in TOWARDS_ZERO:
        there = (free.detach() * factor).requires_grad_(True)
        with suppress(RuntimeError, ValueError):  # it need not be defined there
            total = value(there)
            if total.requires_grad:
                (slope,) = torch.autograd.grad(total, there, create_graph=True)
                yield slope, there


@dataclass(frozen=True)
class _Bent:
    """∂²J/∂f², held as the graph of ∂J/∂f in f, both (sample, output).

    Attributes:
        value: f → J.
        straight: Whether nothing but torch's own arithmetic, of which H is symmetric, made it of f.
    """

    slope: Tensor
    free: Tensor
    value: Callable[[Tensor], Tensor]
    straight: bool

    def along(self, moved: Tensor) -> Tensor:
        """Its product with `moved`; unless it is straight, compared with that of a random vector, uᵀ(H v) = vᵀ(H u).

        Raises:
            ValueError: if they differ.
        """
        if self.straight:
            return _along(self.slope, self.free, moved)
        draw = torch.Generator(device="cpu").manual_seed(0)
        rows, columns = (
            torch.randn(n, generator=draw, dtype=moved.dtype, device="cpu").to(moved.device) for n in moved.shape
        )
        random = torch.outer(rows, columns)

        def elsewhere() -> Iterator[tuple[Tensor, Tensor]]:
            for at in _elsewhere(self.free, self.value):
                yield _along(*at, random), _along(*at, moved)

        found = _along(self.slope, self.free, moved)
        differing = asymmetry(random, _along(self.slope, self.free, random), moved, found, elsewhere)
        if differing is not None:
            raise ValueError(
                "hessian_vector_product: products with the Hessian of the loss in the outputs are not those of a "
                f"symmetric matrix (uHv = {differing[0]:.6g}, vHu = {differing[1]:.6g}); a hook, or a backward pass of "
                "its own, changes its gradients"
            )
        return found


class Walk:
    """A plain network's forward pass on some samples, in torch, and its derivative along directions of the parameters.

    `compiled_curvature.Passed` is the same in compiled code.

    Attributes:
        below: What each layer is given, (sample, input_node).
        gates, curved: σ' and, unless it is zero, (∂J/∂f) ∘ σ'' of each hidden layer, (sample, node).
        slopes: ∂J/∂z of each layer, (sample, node).
    """

    def __init__(self, network: Network, x: Tensor) -> None:
        trace = network.trace(x)
        self._network, self._trace, self.output = network, trace, trace.output
        self.below, self.gates = [x, *trace.activations[:-1]], trace.gates[:-1]

    def descend(self, slope: Tensor, second: Callable[[Tensor], Tensor]) -> None:
        """Take ∂J/∂f_L, (sample, output), and σ''; once, before any direction."""
        network = self._network
        self.curved: list[Tensor | None] = []
        self.slopes = [slope]
        for layer in range(network.depth - 1, 0, -1):
            above = self.slopes[0] @ network.weights[layer]
            linear = network.activation.piecewise_linear
            self.curved.insert(0, None if linear else above * second(self._trace.preactivations[layer - 1]))
            self.slopes.insert(0, above * self.gates[layer - 1])

    def moved(self, along: Mapping[tuple[int, bool], Tensor]) -> Tensor:
        """What the outputs move by along a direction, by (layer, whether the bias), (sample, output)."""
        self._along = along
        self._moved_z: list[Tensor] = []
        self._moved_f: list[Tensor | None] = [None]
        for layer, (weight, below) in enumerate(zip(self._network.weights, self.below, strict=True)):
            bias = along.get((layer, True))
            if (layer, False) in along:
                z = nn.functional.linear(below, along[layer, False], bias)
            elif bias is not None:
                z = bias.repeat(len(below), 1)
            else:
                z = below.new_zeros(len(below), len(weight))
            moved = self._moved_f[layer]
            if moved is not None:
                z.addmm_(moved, weight.T)
            self._moved_z.append(z)
            if layer < len(self.gates):
                self._moved_f.append(self.gates[layer] * z)
        return self._moved_z[-1]

    def back(self, moved_slope: Tensor, order: Sequence[tuple[int, bool]]) -> list[Tensor]:
        """The Hessian's product with the direction of the last `moved`, from what ∂J/∂f_L moves by."""
        moved_g = moved_slope
        found: dict[tuple[int, bool], Tensor] = {}
        for layer in range(len(self.below) - 1, -1, -1):
            moved = self._moved_f[layer]
            found[layer, False] = moved_g.T @ self.below[layer]
            if moved is not None:
                found[layer, False].addmm_(self.slopes[layer].T, moved)
            found[layer, True] = moved_g.sum(0)
            if layer:
                moved_g = moved_g @ self._network.weights[layer]
                if (layer, False) in self._along:
                    moved_g.addmm_(self.slopes[layer], self._along[layer, False])
                moved_g.mul_(self.gates[layer - 1])
                curved = self.curved[layer - 1]
                if curved is not None:
                    moved_g.addcmul_(curved, self._moved_z[layer - 1])
        return [found[place] for place in order]


def walked(network: Network, x: Tensor) -> Walk | Passed:
    """The forward pass of (sample, input), compiled where that is possible."""
    return Passed(network, x) if serves(network, x) else Walk(network, x)


class _Placed:
    """Parameters of a network in an order that was asked for.

    Args:
        network: Plain, with parameters that need no gradient.
        x: (sample, input).
        order: (layer, whether it is the bias) of each parameter of the result.
    """

    def __init__(self, network: Network, x: Tensor, order: Sequence[tuple[int, bool]]) -> None:
        self._network, self._x, self._order, self._weights = network, x, order, network.weights

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(self._shape(*place).numel() for place in self._order)

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    def _shape(self, layer: int, bias: bool) -> torch.Size:
        return self._weights[layer].shape[:1] if bias else self._weights[layer].shape

    def _pieces(self, vector: Tensor) -> dict[tuple[int, bool], Tensor]:
        """A vector, (parameter,), by layer and kind."""
        shapes = [self._shape(*place) for place in self._order]
        pieces = vector.split([s.numel() for s in shapes])
        return {place: p.view(s) for place, p, s in zip(self._order, pieces, shapes, strict=True)}


class OfSquares(_Placed):
    """The Hessian of c Σ (f_L − target)², of a piecewise linear network, for one product, in compiled code."""

    def __init__(
        self, network: Network, x: Tensor, target: Tensor, factor: float, order: Sequence[tuple[int, bool]]
    ) -> None:
        super().__init__(network, x, order)
        self._target, self._factor = target, factor

    def product(self, vector: Tensor) -> Tensor:
        """H v, (parameter,)."""
        along = self._pieces(vector)
        found = product_of_squares(self._network, self._x, self._target, self._factor, along, self._order)
        return torch.cat([each.flatten() for each in found])


class Layered(_Placed):
    """The Hessian of one loss of one network at one point: its products with vectors, and the dense matrix.

    Args:
        network: Plain, with parameters that need no gradient.
        x: (sample, input).
        walk: The forward pass of `x`.
        slope, bend: ∂J/∂f_L and ∂²J/∂f_L² of each sample, the latter as `_bend` gives it, or for products alone a
            `_Bent`.
        order: (layer, whether it is the bias) of each parameter of the result.
    """

    def __init__(
        self,
        network: Network,
        x: Tensor,
        walk: Walk | Passed,
        slope: Tensor,
        bend: Tensor | _Bent,
        order: Sequence[tuple[int, bool]],
    ) -> None:
        super().__init__(network, x, order)
        self._slope, self._second, self._walk = slope, bend, walk
        walk.descend(slope, self._curvature)

    def _curvature(self, z: Tensor) -> Tensor:
        """σ''(z)."""
        return _derivative(self._network.activation.derivative, z)

    @property
    def _bend(self) -> Tensor:
        assert isinstance(self._second, Tensor), "one product was asked for"
        return self._second

    # --- products --------------------------------------------------------------------------------------------

    def product(self, vector: Tensor) -> Tensor:
        """H v, (parameter,), by the derivative of backpropagation along v (Pearlmutter 1994)."""
        moved = self._along(self._walk.moved(self._pieces(vector)))
        return torch.cat([found.flatten() for found in self._walk.back(moved, self._order)])

    def _along(self, moved: Tensor) -> Tensor:
        """∂²J/∂f² times `moved`, (sample, output)."""
        if isinstance(self._second, _Bent):
            return self._second.along(moved)
        return self._second * moved if self._second.ndim == 2 else (self._second @ moved.unsqueeze(2)).squeeze(2)

    # --- the dense matrix ------------------------------------------------------------------------------------

    @cached_property
    def _inner(self) -> Walk:
        if isinstance(self._walk, Walk):
            return self._walk
        walk = Walk(self._network, self._x)
        walk.descend(self._slope, self._curvature)
        return walk

    def dense(self) -> Tensor:
        """H, (parameter, parameter)."""
        depth = len(self._weights)
        nodes, inputs = [len(w) for w in self._weights], [w.shape[1] + 1 for w in self._weights]
        pairs = list(itertools.combinations_with_replacement(range(depth), 2))
        sums: dict[tuple[int, int], Tensor] = {}
        crossed: dict[tuple[int, int], Tensor] = {}
        for part in self._parts():
            below = [torch.cat([f[part], torch.ones_like(f[part][:, :1])], 1) for f in self._inner.below]
            moved = self._moved(part)
            for low, high in pairs:
                both = (below[low].unsqueeze(2) * below[high].unsqueeze(1)).flatten(1)
                _add(sums, (low, high), self._bent(part, moved, low, high).flatten(1).T @ both)
                if low < high:
                    # of the input of `high`, what z of `low` moves; with the layer just below, each node its own
                    path = (
                        self._inner.gates[low][part]
                        if high == low + 1
                        else self._gated(part, moved, high - 1, low).flatten(1)
                    )
                    lever = (self._inner.slopes[high][part].unsqueeze(2) * below[low].unsqueeze(1)).flatten(1)
                    _add(crossed, (low, high), path.T @ lever)
        starts = [0, *itertools.accumulate(n * d for n, d in zip(nodes, inputs, strict=True))]
        whole = self._x.new_zeros(starts[-1], starts[-1])
        for low, high in pairs:
            n, m, d, e = nodes[low], nodes[high], inputs[low], inputs[high]
            if (low, high) == (depth - 1, depth - 1) and self._bend.ndim == 2:  # outputs do not meet
                block = torch.zeros(n, d, n, d, dtype=whole.dtype, device=whole.device)
                block.diagonal(dim1=0, dim2=2).copy_(sums[low, high].view(n, d, d).permute(1, 2, 0))
            else:
                block = sums[low, high].view(n, m, d, e).permute(0, 2, 1, 3).contiguous()
            if low < high and high == low + 1:  # (node = q, p, j)
                block[..., :-1].diagonal(dim1=0, dim2=3).add_(crossed[low, high].view(n, m, d).permute(2, 1, 0))
            elif low < high:  # (q, i, p, j)
                block[..., :-1] += crossed[low, high].view(e - 1, n, m, d).permute(1, 3, 2, 0)
            rows, columns = slice(starts[low], starts[low + 1]), slice(starts[high], starts[high + 1])
            whole[rows, columns] = block.view(n * d, m * e)
            whole[columns, rows] = whole[rows, columns].T.clone()
        at = torch.cat([self._positions(starts[layer], layer, bias) for layer, bias in self._order])
        return whole[at][:, at]

    def _positions(self, start: int, layer: int, bias: bool) -> Tensor:
        nodes, inputs = self._weights[layer].shape
        places = torch.arange(start, start + nodes * (inputs + 1), device=self._bend.device).view(nodes, inputs + 1)
        return places[:, -1] if bias else places[:, :-1].flatten()

    def _parts(self) -> Iterator[slice]:
        """Samples whose matrices fit in `_AT_ONCE` together."""
        widest = max(max(w.shape) + 1 for w in self._weights)
        numbers = (3 + len(self._weights) ** 2) * widest**2
        size = max(1, _AT_ONCE // (numbers * self._bend.element_size()))
        for start in range(0, len(self._bend), size):
            yield slice(start, start + size)

    def _moved(self, part: slice) -> dict[tuple[int, int], Tensor]:
        """t_kl for l < k, each (sample, node of k, node of l)."""
        found: dict[tuple[int, int], Tensor] = {}
        for low in range(len(self._weights) - 1):
            for high in range(low + 1, len(self._weights)):
                weight = self._weights[high]
                if high == low + 1:
                    found[high, low] = weight * self._inner.gates[low][part].unsqueeze(1)
                else:
                    found[high, low] = weight @ self._gated(part, found, high - 1, low)
        return found

    def _gated(self, part: slice, moved: dict[tuple[int, int], Tensor], high: int, low: int) -> Tensor:
        """∂f_k/∂z_l for l < k."""
        return self._inner.gates[high][part].unsqueeze(2) * moved[high, low]

    def _bent(self, part: slice, moved: dict[tuple[int, int], Tensor], low: int, high: int) -> Tensor:
        """∂²J/∂z_l∂z_m of each sample, (sample, node, node_2); at the top (sample, output) if that is diagonal."""
        top, bend = len(self._weights) - 1, self._bend[part]
        if low == high == top:
            return bend
        if bend.ndim == 2:
            scaled = torch.diag_embed(bend) if high == top else bend.unsqueeze(2) * moved[top, high]
        else:
            scaled = bend if high == top else bend @ moved[top, high]
        total = moved[top, low].mT @ scaled
        for k in range(high, top):
            curved = self._inner.curved[k]
            if curved is None:
                continue
            here = curved[part]
            right = torch.diag_embed(here) if k == high else here.unsqueeze(2) * moved[k, high]
            total = total + (right if k == low else moved[k, low].mT @ right)
        return total


def _add(sums: dict[tuple[int, int], Tensor], key: tuple[int, int], more: Tensor) -> None:
    sums[key] = sums[key].add_(more) if key in sums else more


def _derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch.enable_grad():
        free = z.detach().clone().requires_grad_(True)
        (found,) = torch.autograd.grad(function(free).sum(), free)
    return found
