"""The ensemble engine: many students of one shape trained in one program.

`train_epoch` is hand-batched: no autograd, in-place batched matrix products, members in blocks whose
parameters stay in cache while many steps run.  `train_epoch_plain` is the same epoch by vmap(grad(loss)), the
formula as written: the slow twin that the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap

from tsdyn.activations import Activation
from tsdyn.experiment import Training
from tsdyn.networks import Network

#: Parameters and batch buffers of a block of members should fit in a core's second-level cache.
CACHE_BYTES = 1 << 20


@dataclass
class Ensemble:
    """Parameters and optimiser state of S members of one shape.

    Attributes:
        weights: Layer l = 1..L at index l−1, each (member, node, input_node).
        biases: Each (member, node), or None.
        activation: Of the hidden layers.
        moments: Optimiser moments by name, one tensor per parameter (`parameters` order).
        steps: Steps taken, the same for all members (Adam's bias correction).
        death_epoch: (member,), the epoch at whose end a parameter was NaN or infinite; −1 while alive.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: Activation
    moments: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: int = 0
    death_epoch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not len(self.death_epoch):
            self.death_epoch = torch.full((self.members,), -1, dtype=torch.int64)

    @classmethod
    def of(cls, networks: Sequence[Network], *, device: str = "cpu") -> Ensemble:
        """Members side by side; copies."""
        first = networks[0]
        return cls(
            [torch.stack([n.weights[i] for n in networks]).to(device) for i in range(first.depth)],
            [
                None if first.biases[i] is None else torch.stack([_present(n.biases[i]) for n in networks]).to(device)
                for i in range(first.depth)
            ],
            first.activation,
        )

    @property
    def members(self) -> int:
        return len(self.weights[0])

    @property
    def depth(self) -> int:
        return len(self.weights)

    def parameters(self) -> list[tuple[str, int, Tensor]]:
        """(kind, layer, tensor) for every parameter, lowest layer first, weight before bias."""
        found = []
        for i in range(self.depth):
            found.append(("weight", i + 1, self.weights[i]))
            bias = self.biases[i]
            if bias is not None:
                found.append(("bias", i + 1, bias))
        return found

    def network(self, member: int) -> Network:
        """One member; shares memory."""
        leak = self.activation.leak
        return Network(
            [w[member] for w in self.weights],
            [None if b is None else b[member] for b in self.biases],
            self.activation.name,
            leak=0.0 if leak is None else leak,
        )

    def block(self, members: slice) -> Ensemble:
        """Some members; a view that shares memory."""
        return Ensemble(
            [w[members] for w in self.weights],
            [None if b is None else b[members] for b in self.biases],
            self.activation,
            {name: [m[members] for m in moments] for name, moments in self.moments.items()},
            self.steps,
            self.death_epoch[members],
        )

    def bury(self, epoch: int) -> list[int]:
        """Members that have a NaN or infinite parameter since `epoch`: all their parameters become NaN.

        Returns their positions, only those that died now.
        """
        whole = torch.ones(self.members, dtype=torch.bool, device=self.weights[0].device)
        for _, _, parameter in self.parameters():
            whole &= torch.isfinite(parameter).flatten(1).all(1)
        dead = ~whole.cpu() & (self.death_epoch < 0)
        for _, _, parameter in self.parameters():
            parameter[dead.to(parameter.device)] = torch.nan
        self.death_epoch[dead] = epoch
        return [int(i) for i in dead.nonzero()]


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("Ensemble: some members have a bias where others have none; an ensemble is of one shape")
    return tensor


@dataclass(frozen=True)
class Rule:
    """The update of one epoch.

    With gradients ∇ of J = ½ (1/batch) Σ ‖f* − f‖² and torch.optim's conventions:
    SGD p ← p − η m, m ← μ m + ∇ + λ p;  Adam with bias-corrected moments of ∇ + λ p.

    Attributes:
        learning_rate: η.
        momentum: μ.
        weight_decay: λ.
        adam: Whether to use Adam's moments.
        beta_1, beta_2, epsilon: Adam's constants.
        frozen: Layers 1..L that are not updated.
        normalize: Whether hidden weight rows are scaled back to unit norm after each step (biases are not).
    """

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    adam: bool = False
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    frozen: tuple[int, ...] = ()
    normalize: bool = False

    @classmethod
    def of(cls, training: Training, epoch: int) -> Rule:
        """The rule of the epoch that ends at `epoch`."""
        return cls(
            training.rate(epoch),
            training.momentum,
            training.weight_decay,
            training.method == "adam",
            training.beta_1,
            training.beta_2,
            training.epsilon,
            training.frozen,
            training.normalize,
        )

    @property
    def plain(self) -> bool:
        """Whether the update needs no moments."""
        return not self.adam and self.momentum == 0

    def prepare(self, ensemble: Ensemble) -> None:
        """Give `ensemble` the moments this rule needs, zero where it has none yet."""
        names = ("first", "second") if self.adam else () if self.momentum == 0 else ("first",)
        for name in names:
            if name not in ensemble.moments:
                ensemble.moments[name] = [torch.zeros_like(p) for _, _, p in ensemble.parameters()]

    def update(self, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: int) -> None:
        """One step of one parameter tensor, in place; `step` counts from 1.  `gradient` is overwritten."""
        if self.weight_decay:
            gradient = gradient.add_(parameter, alpha=self.weight_decay)
        if self.adam:
            first, second = moments
            first.mul_(self.beta_1).add_(gradient, alpha=1 - self.beta_1)
            second.mul_(self.beta_2).addcmul_(gradient, gradient, value=1 - self.beta_2)
            scale = (second / (1 - self.beta_2**step)).sqrt_().add_(self.epsilon)
            parameter.addcdiv_(first, scale, value=-self.learning_rate / (1 - self.beta_1**step))
            return
        if self.momentum:
            gradient = moments[0].mul_(self.momentum).add_(gradient)
        parameter.add_(gradient, alpha=-self.learning_rate)


Batch: TypeAlias = tuple[Tensor, Tensor]
#: For a block of members, the epoch's steps: (inputs (member, batch, input), teacher outputs (member, batch, output)).
Stream: TypeAlias = Callable[[slice], Iterator[Batch]]


def finite_stream(inputs: Tensor, targets: Tensor, indices: Tensor | None, *, steps: int = 1) -> Stream:
    """Batches from finite data.

    Args:
        inputs: (member, sample, input).
        targets: Teacher outputs, (member, sample, output), computed once for the whole run.
        indices: (member, step, batch), or None for the whole set at each of `steps` steps.
        steps: How often the whole set is used, without `indices`.
    """

    def stream(members: slice) -> Iterator[Batch]:
        x, y = inputs[members], targets[members]
        if indices is None:
            yield from ((x, y) for _ in range(steps))
            return
        count, samples, _ = x.shape
        offsets = torch.arange(count, device=x.device).view(-1, 1, 1) * samples
        chosen = (indices[members].to(x.device) + offsets).transpose(0, 1).flatten(1)  # (step, member·batch)
        x_rows, y_rows = x.flatten(0, 1), y.flatten(0, 1)
        x_batch = x.new_empty(chosen.shape[1], x.shape[2])
        y_batch = y.new_empty(chosen.shape[1], y.shape[2])
        for rows in chosen:
            torch.index_select(x_rows, 0, rows, out=x_batch)
            torch.index_select(y_rows, 0, rows, out=y_batch)
            yield x_batch.view(count, -1, x.shape[2]), y_batch.view(count, -1, y.shape[2])

    return stream


def block_size(ensemble: Ensemble, batch: int) -> int:
    """Members whose parameters, moments and batch buffers fit in `CACHE_BYTES` together; at least one."""
    element = ensemble.weights[0].element_size()
    numbers = sum(p[0].numel() for _, _, p in ensemble.parameters()) * (1 + len(ensemble.moments))
    numbers += 2 * batch * sum(w.shape[1] + w.shape[2] for w in ensemble.weights)
    return max(1, CACHE_BYTES // (numbers * element))


def living_blocks(death_epoch: Tensor, size: int) -> list[slice]:
    """Runs of neighbouring living members, cut to `size`."""
    blocks: list[slice] = []
    for i in (int(i) for i in (death_epoch < 0).nonzero()):
        if blocks and blocks[-1].stop == i and i - blocks[-1].start < size:
            blocks[-1] = slice(blocks[-1].start, i + 1)
        else:
            blocks.append(slice(i, i + 1))
    return blocks


def train_epoch(
    ensemble: Ensemble, stream: Stream, rule: Rule, *, batch: int, tick: Callable[[int], None] | None = None
) -> None:
    """One epoch of every living member, in place; member death is the caller's to look for (`Ensemble.bury`).

    Args:
        ensemble: Trained in place.
        stream: The epoch's batches.
        rule: The update.
        batch: Samples a batch, for the choice of block size.
        tick: Called with the number of members after each block.
    """
    _epoch(ensemble, stream, rule, batch, _step, tick)


def train_epoch_plain(ensemble: Ensemble, stream: Stream, rule: Rule, *, batch: int) -> None:
    """`train_epoch` by torch.func: vmap over members of the gradient of the loss as written. Slow and plain."""
    _epoch(ensemble, stream, rule, batch, _step_plain, None)


_Step: TypeAlias = Callable[[Ensemble, Tensor, Tensor, Rule, int], None]


def _epoch(
    ensemble: Ensemble,
    stream: Stream,
    rule: Rule,
    batch: int,
    step: _Step,
    tick: Callable[[int], None] | None,
) -> None:
    rule.prepare(ensemble)
    taken = 0
    for members in living_blocks(ensemble.death_epoch, block_size(ensemble, batch)):
        block = ensemble.block(members)
        with torch.no_grad():
            for taken, (x, y) in enumerate(stream(members), start=1):
                step(block, x, y, rule, ensemble.steps + taken)
        if tick is not None:
            tick(block.members)
    ensemble.steps += taken


def _step(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, step: int) -> None:
    r"""Forward, then down the layers: ∂J/∂W_l = −(1/batch) g_l f_{l−1}ᵀ, g_{l−1} = (W_lᵀ g_l) ∘ σ'(z_{l−1})."""
    activations, gates = [x], []
    for i, weight in enumerate(block.weights):
        bias = block.biases[i]
        below = activations[-1]
        z = torch.bmm(below, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), below, weight.mT)
        if i < block.depth - 1:
            gates.append(z)
            activations.append(block.activation(z))
        else:
            activations.append(z)
    gradient = torch.sub(y, activations.pop(), out=z)  # g_L = f* − f
    lowest = min((i for i in range(block.depth) if i + 1 not in rule.frozen), default=block.depth)
    for i in range(block.depth - 1, lowest - 1, -1):
        weight, below = block.weights[i], activations[i]
        # g below uses W before its update
        passed = torch.bmm(gradient, weight) if i > lowest else None
        if i + 1 not in rule.frozen:
            _update_layer(block, i, gradient, below, rule, step)
        if passed is not None:
            gradient = _through_gate(passed, block.activation, gates[i - 1], below)


def _through_gate(gradient: Tensor, activation: Activation, z: Tensor, f: Tensor) -> Tensor:
    if activation.name == "identity":
        return gradient
    if activation.name == "relu":  # f > 0 where z > 0
        torch.ops.aten.threshold_backward.grad_input(gradient, f, 0.0, grad_input=gradient)
        return gradient
    return gradient.mul_(activation.gate(z))


def _update_layer(block: Ensemble, i: int, gradient: Tensor, below: Tensor, rule: Rule, step: int) -> None:
    weight, bias, samples = block.weights[i], block.biases[i], gradient.shape[1]
    if rule.plain:
        rate, kept = rule.learning_rate / samples, 1 - rule.learning_rate * rule.weight_decay
        weight.baddbmm_(gradient.mT, below, beta=kept, alpha=rate)
        if bias is not None:
            if kept != 1:
                bias.mul_(kept)
            bias.add_(gradient.sum(1), alpha=rate)
    else:
        position = next(
            p for p, (kind, layer, _) in enumerate(block.parameters()) if (kind, layer) == ("weight", i + 1)
        )
        down = torch.bmm(gradient.mT, below).mul_(-1 / samples)
        rule.update(weight, down, [m[position] for m in block.moments.values()], step)
        if bias is not None:
            down = gradient.sum(1).mul_(-1 / samples)
            rule.update(bias, down, [m[position + 1] for m in block.moments.values()], step)
    if rule.normalize and i < block.depth - 1:
        weight.div_(weight.norm(dim=2, keepdim=True))


def _step_plain(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, step: int) -> None:
    leak = block.activation.leak
    names = [(kind, layer) for kind, layer, _ in block.parameters()]

    def loss(parameters: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        by_name = dict(zip(names, parameters, strict=True))
        layers = range(1, block.depth + 1)
        network = Network(
            [by_name["weight", layer] for layer in layers],
            [by_name.get(("bias", layer)) for layer in layers],
            block.activation.name,
            leak=0.0 if leak is None else leak,
        )
        return 0.5 * (targets - network(inputs)).square().sum(1).mean()

    parameters = [p for _, _, p in block.parameters()]
    gradients = vmap(grad(loss))(parameters, x, y)
    for position, (kind, layer, parameter) in enumerate(block.parameters()):
        if layer in rule.frozen:
            continue
        rule.update(parameter, gradients[position], [m[position] for m in block.moments.values()], step)
        if rule.normalize and kind == "weight" and layer < block.depth:
            parameter.div_(parameter.norm(dim=2, keepdim=True))
