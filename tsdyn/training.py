"""The ensemble engine: many students of one shape trained in one program.

`train_epoch` takes the quickest way there is: the compiled `kernel`, one member at a time without leaving the cache;
or hand-batched torch, no autograd, in-place batched products, members in blocks whose parameters stay in cache;
on a GPU the same steps in chunks that are recorded as a graph.
`train_epoch_plain` is the same epoch by vmap(grad(loss)), the formula as written: the slow twin that the tests hold
both to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.func import grad, vmap

from tsdyn import kernel, memory
from tsdyn.activations import Activation
from tsdyn.experiment import Training
from tsdyn.networks import Network, require_plain


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
        chunks: Steps recorded on a device, by what they depend on; shared with blocks.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: Activation
    moments: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: int = 0
    death_epoch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    chunks: dict[object, Chunk] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.death_epoch):
            self.death_epoch = torch.full((self.members,), -1, dtype=torch.int64)

    @classmethod
    def of(cls, networks: Sequence[Network], *, device: str = "cpu") -> Ensemble:
        """Members side by side; copies."""
        first = networks[0]
        require_plain("Ensemble.of", *networks)
        return cls(
            [torch.stack([n.weights[i] for n in networks]).to(device) for i in range(first.depth)],
            [
                None if first.biases[i] is None else torch.stack([_present(n.biases[i]) for n in networks]).to(device)
                for i in range(first.depth)
            ],
            first.activation,
        )

    @classmethod
    def joined(cls, parts: Sequence[Ensemble]) -> Ensemble:
        """The members of several ensembles of one shape; copies.

        Raises:
            ValueError: if those with a living member took different numbers of steps.
        """
        first = parts[0]
        taken = {part.steps for part in parts if bool((part.death_epoch < 0).any())}
        if len(taken) > 1:
            raise ValueError(f"Ensemble.joined: took {sorted(taken)} steps; all must have taken as many")
        return cls(
            [torch.cat([part.weights[i] for part in parts]) for i in range(first.depth)],
            [
                None if first.biases[i] is None else torch.cat([_present(part.biases[i]) for part in parts])
                for i in range(first.depth)
            ],
            first.activation,
            {
                name: [torch.cat(of) for of in zip(*(part.moments[name] for part in parts), strict=True)]
                for name in first.moments
            },
            max(part.steps for part in parts),  # a part without a living member has stopped counting
            torch.cat([part.death_epoch for part in parts]),
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
            self.chunks,
        )


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("Ensemble: some members have a bias where others have none; an ensemble is of one shape")
    return tensor


@runtime_checkable
class Trainable(Protocol):
    """What every kind of ensemble has."""

    moments: dict[str, list[Tensor]]
    death_epoch: Tensor

    def parameters(self) -> list[tuple[str, int, Tensor]]: ...


def bury(ensemble: Trainable, epoch: int) -> list[int]:
    """Members that have a NaN or infinite parameter since `epoch`: all their parameters become NaN.

    Returns their positions, only those that died now.
    """
    parameters = [parameter for _, _, parameter in ensemble.parameters()]
    whole = torch.stack([torch.isfinite(parameter).flatten(1).all(1) for parameter in parameters]).all(0)
    dead = ~whole.cpu() & (ensemble.death_epoch < 0)
    for parameter in parameters:
        parameter[dead.to(parameter.device)] = torch.nan
    ensemble.death_epoch[dead] = epoch
    return [int(i) for i in dead.nonzero()]


@dataclass(frozen=True)
class Rule:
    """The update of one epoch.

    With gradients ∇ of J and torch.optim's conventions:
    SGD p ← p − η m, m ← μ m + ∇ + λ p;  Adam with bias-corrected moments of ∇ + λ p.

    Attributes:
        learning_rate: η, of all members or one a member, (member,).
        momentum: μ.
        weight_decay: λ.
        adam: Whether to use Adam's moments.
        beta_1, beta_2, epsilon: Adam's constants.
        frozen: Layers 1..L that are not updated.
        normalize: Whether hidden weight rows are scaled back to unit norm after each step (biases are not).
        loss: J over a batch: ``mse`` is ½ (1/batch) Σ ‖f* − f‖²; ``cross_entropy`` is −(1/batch) Σ yᵀ log softmax(f)
            with targets y that sum to 1.
    """

    learning_rate: float | Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0
    adam: bool = False
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    frozen: tuple[int, ...] = ()
    normalize: bool = False
    loss: Literal["mse", "cross_entropy"] = "mse"

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
            training.loss,
        )

    @property
    def plain(self) -> bool:
        """Whether the update needs no moments."""
        return not self.adam and self.momentum == 0

    def block(self, members: slice) -> Rule:
        """The rule of some of the members."""
        rate = self.learning_rate
        return replace(self, learning_rate=rate[members]) if isinstance(rate, Tensor) else self

    def on(self, parameter: Tensor) -> Rule:
        """The same rule with its rates on a parameter's device, from where no step has to fetch them."""
        rate = torch.as_tensor(self.learning_rate, dtype=parameter.dtype, device=parameter.device)
        return replace(self, learning_rate=rate.expand(len(parameter)).clone())

    def rates(self, like: Tensor) -> Tensor:
        """Learning rate of each member of the parameter `like`, (member, 1, ...), on its device in its dtype.

        One rate for all makes the same tensor, so that a member's rounding does not depend on its neighbours' rates.
        """
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        return rate.expand(len(like)).view(-1, *[1] * (like.dim() - 1))

    def prepare(self, ensemble: Trainable) -> None:
        """Give `ensemble` the moments this rule needs, zero where it has none yet."""
        names = ("first", "second") if self.adam else () if self.momentum == 0 else ("first",)
        for name in names:
            if name not in ensemble.moments:
                ensemble.moments[name] = [torch.zeros_like(p) for _, _, p in ensemble.parameters()]

    def update(
        self, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
    ) -> None:
        """One step of one parameter tensor, in place.

        Args:
            parameter: (member, ...).
            gradient: As `parameter`; overwritten.
            moments: As `parameter`.
            rates: Learning rates, (member, 1, ...).
            step: From 1; a tensor where a device counts for itself.
        """
        if self.weight_decay:
            gradient = gradient.add_(parameter, alpha=self.weight_decay)
        if self.adam:
            first, second = moments
            first.mul_(self.beta_1).add_(gradient, alpha=1 - self.beta_1)
            second.mul_(self.beta_2).addcmul_(gradient, gradient, value=1 - self.beta_2)
            scale = (second / (1 - self.beta_2**step)).sqrt_().add_(self.epsilon)
            parameter.addcdiv_(first * (rates / (1 - self.beta_1**step)), scale, value=-1)
            return
        if self.momentum:
            gradient = moments[0].mul_(self.momentum).add_(gradient)
        parameter.addcmul_(gradient, rates, value=-1)

    def output_gradient(self, targets: Tensor, output: Tensor) -> Tensor:
        """g_L = −batch ∂J/∂f_L, in the place of `output`: f* − f, or y − softmax(f)."""
        if self.loss == "mse":
            return torch.sub(targets, output, out=output)
        return torch.sub(targets, torch.softmax(output, -1), out=output)

    def objective(self, targets: Tensor, output: Tensor) -> Tensor:
        """J of one member's batch, (sample, output) each."""
        if self.loss == "mse":
            return 0.5 * (targets - output).square().sum(1).mean()
        return -(targets * torch.log_softmax(output, -1)).sum(1).mean()


@dataclass(frozen=True)
class Batches:
    """Some consecutive steps of a block of members; iterates over the steps' (inputs, targets).

    Attributes:
        inputs: (member, sample, input).
        targets: (member, sample, output).
        rows: Which samples make each batch, (member, step, batch); None for the whole set at each step.
        steps: How many.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor | None
    steps: int

    def chosen(self) -> Tensor | None:
        """`rows` counted over the samples of all members, (step, member·batch)."""
        if self.rows is None:
            return None
        count, samples, _ = self.inputs.shape
        offsets = torch.arange(count, device=self.inputs.device).view(-1, 1, 1) * samples
        return (self.rows.to(self.inputs.device) + offsets).transpose(0, 1).flatten(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.rows is None:
            yield from ((self.inputs, self.targets) for _ in range(self.steps))
            return
        count, chosen = len(self.inputs), self.chosen()
        assert chosen is not None
        x_rows, y_rows = self.inputs.flatten(0, 1), self.targets.flatten(0, 1)
        x_batch = x_rows.new_empty(chosen.shape[1], x_rows.shape[1])
        y_batch = y_rows.new_empty(chosen.shape[1], y_rows.shape[1])
        for at in chosen:
            torch.index_select(x_rows, 0, at, out=x_batch)
            torch.index_select(y_rows, 0, at, out=y_batch)
            yield x_batch.view(count, -1, x_rows.shape[1]), y_batch.view(count, -1, y_rows.shape[1])


#: For a block of members, the epoch's steps.
Stream: TypeAlias = Callable[[slice], Iterator[Batches]]


def finite_stream(inputs: Tensor, targets: Tensor, rows: Tensor | None, *, steps: int = 1) -> Stream:
    """Batches from finite data.

    Args:
        inputs: (member, sample, input).
        targets: Teacher outputs, (member, sample, output), computed once for the whole run.
        rows: (member, step, batch), or None for the whole set at each of `steps` steps.
        steps: How often the whole set is used, without `rows`.
    """

    def stream(members: slice) -> Iterator[Batches]:
        x, y = inputs[members], targets[members]
        yield Batches(x, y, None, steps) if rows is None else Batches(x, y, rows[members], rows.shape[1])

    return stream


def block_size(ensemble: Ensemble, batch: int) -> int:
    """Members whose parameters, moments and batch buffers fit in a core's cache together; at least one.

    On a CUDA device, whose kernels want all members at once: those whose chunk fits in a quarter of its memory, the
    rest being for data and records.
    """
    element = ensemble.weights[0].element_size()
    numbers = sum(p[0].numel() for _, _, p in ensemble.parameters()) * (1 + len(ensemble.moments))
    numbers += 2 * batch * sum(w.shape[1] + w.shape[2] for w in ensemble.weights)
    room, device = memory.cache(), ensemble.weights[0].device
    if device.type == "cuda":
        numbers += CHUNK * batch * (ensemble.weights[0].shape[2] + ensemble.weights[-1].shape[1])
        room = torch.cuda.mem_get_info(device)[1] // 4
    return max(1, room // (numbers * element))


def living_blocks(death_epoch: Tensor, size: int) -> list[slice]:
    """Runs of neighbouring living members, cut to `size`."""
    blocks: list[slice] = []
    for i in (int(i) for i in (death_epoch < 0).nonzero()):
        if blocks and blocks[-1].stop == i and i - blocks[-1].start < size:
            blocks[-1] = slice(blocks[-1].start, i + 1)
        else:
            blocks.append(slice(i, i + 1))
    return blocks


def train_epoch(ensemble: Ensemble, stream: Stream, rule: Rule, *, batch: int) -> None:
    """One epoch of every living member, in place; member death is the caller's to look for (`bury`).

    Args:
        ensemble: Trained in place.
        stream: The epoch's batches.
        rule: The update.
        batch: Samples a batch, for the choice of block size.
    """
    if compiled(ensemble, rule):
        _epoch(ensemble, stream, rule, ensemble.members, _advance_compiled)
    else:
        advance = _advance_batched if ensemble.weights[0].device.type == "cpu" else _advance_chunks
        _epoch(ensemble, stream, rule, block_size(ensemble, batch), advance)


def train_epoch_plain(ensemble: Ensemble, stream: Stream, rule: Rule) -> None:
    """`train_epoch` by torch.func: vmap over members of the gradient of the loss as written. Slow and plain."""
    _epoch(ensemble, stream, rule, ensemble.members, _advance_plain)


def compiled(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether `train_epoch` takes the compiled kernel: on a CPU, piecewise linear, on squared error."""
    tensors = [p for _, _, p in ensemble.parameters()] + [m for moments in ensemble.moments.values() for m in moments]
    return ensemble.activation.piecewise_linear and rule.loss == "mse" and kernel.serves(tensors)


#: Takes the steps of some batches with a block of members, of which the first is step number ... + 1.
_Advance: TypeAlias = Callable[[Ensemble, Batches, Rule, int], None]


def _epoch(ensemble: Ensemble, stream: Stream, rule: Rule, size: int, advance: _Advance) -> None:
    rule.prepare(ensemble)
    taken = 0
    for members in living_blocks(ensemble.death_epoch, size):
        block, own, taken = ensemble.block(members), rule.block(members), 0
        with torch.no_grad():
            for batches in stream(members):
                advance(block, batches, own, ensemble.steps + taken)
                taken += batches.steps
    ensemble.steps += taken


def _advance_compiled(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    if batches.rows is None:  # a whole data set at once is no small product: torch's are as good
        return _advance_batched(block, batches, rule, taken)
    layers = [kernel.Layers(block.weights, block.biases)]
    for moments in block.moments.values():
        left = iter(moments)
        pairs = [(next(left), None if bias is None else next(left)) for bias in block.biases]
        layers.append(kernel.Layers([w for w, _ in pairs], [b for _, b in pairs]))
    assert block.activation.leak is not None
    kernel.train(
        layers,
        batches.inputs.contiguous(),
        batches.targets.contiguous(),
        batches.rows.contiguous(),
        rule.rates(torch.empty(block.members, dtype=torch.float64)),
        leak=block.activation.leak,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        adam=(rule.beta_1, rule.beta_2, rule.epsilon) if rule.adam else None,
        frozen=rule.frozen,
        normalize=rule.normalize,
        taken=taken,
    )
    return None


def _advance_batched(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    for step, (x, y) in enumerate(batches, start=taken + 1):
        _step(block, x, y, rule, step)


#: Steps of one CUDA graph: a replay costs some 10 µs on the host, their batches must fit beside the data.
CHUNK = 20


class Chunk:
    """Some steps of a block whose batches, rates and step count lie on its device, so that none asks the host.

    On a CUDA device the first call records them as a graph, which later calls replay: the host then launches one thing
    a chunk instead of some fifteen kernels a step.  Elsewhere a call takes the steps one by one.

    Args:
        block: Its parameters and moments, in place.
        batches: Whose shapes the chunk's own batches take.
        rule: The update; `rates` may be written over between calls.
        steps: How many a call takes.
    """

    def __init__(self, block: Ensemble, batches: Batches, rule: Rule, steps: int) -> None:
        self.block, self.steps = block, steps
        x, y, rows = batches.inputs, batches.targets, batches.rows
        per, batch = (1, x.shape[1]) if rows is None else (steps, rows.shape[2])
        self.inputs = x.new_empty(per, len(x), batch, x.shape[2])
        self.targets = y.new_empty(per, len(y), batch, y.shape[2])
        self.rule = rule.on(block.weights[0])
        self.taken = torch.zeros((), dtype=torch.float64, device=x.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def rates(self) -> Tensor:
        assert isinstance(self.rule.learning_rate, Tensor)
        return self.rule.learning_rate

    def load(self, batches: Batches, chosen: Tensor | None) -> None:
        """Fetch the batches of the next call; `chosen` are their rows as `Batches.chosen` counts them."""
        for own, source in ((self.inputs, batches.inputs), (self.targets, batches.targets)):
            if chosen is None:
                own[0].copy_(source)
            else:
                torch.index_select(source.flatten(0, 1), 0, chosen.flatten(), out=own.view(-1, own.shape[-1]))

    def take(self) -> None:
        """The steps, one by one."""
        for i in range(self.steps):
            self.taken += 1
            at = i % len(self.inputs)
            _step(self.block, self.inputs[at], self.targets[at], self.rule, self.taken)

    def __call__(self) -> None:
        if self.inputs.device.type != "cuda":
            self.take()
        elif self._graph is None:
            # libraries set themselves up in a first pass, which a graph must not record; these are steps like any other
            stream = torch.cuda.Stream(self.inputs.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.take()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and takes no step
                self.take()
        else:
            self._graph.replay()


def _advance_chunks(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """As `_advance_batched`, by chunks that are kept from epoch to epoch with the ensemble they are of."""
    chosen, done = batches.chosen(), 0
    rates = rule.rates(block.weights[0]).flatten()
    while done < batches.steps:
        steps = min(CHUNK, batches.steps - done)
        key = (
            steps, batches.inputs.shape[0], None if batches.rows is None else batches.rows.shape[2],
            block.weights[0].data_ptr(), replace(rule, learning_rate=0.0),
        )  # fmt: skip
        if key not in block.chunks:
            block.chunks[key] = Chunk(block, batches, rule, steps)
        chunk = block.chunks[key]
        chunk.rates.copy_(rates)
        chunk.taken.fill_(taken + done)
        chunk.load(batches, None if chosen is None else chosen[done : done + steps])
        chunk()
        done += steps


def _step(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, step: int | Tensor) -> None:
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
    gradient = rule.output_gradient(y, activations.pop())
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


def _update_layer(block: Ensemble, i: int, gradient: Tensor, below: Tensor, rule: Rule, step: int | Tensor) -> None:
    weight, bias, samples = block.weights[i], block.biases[i], gradient.shape[1]
    rates = rule.rates(weight)
    if rule.plain:
        if rule.weight_decay:
            kept = 1 - rates * rule.weight_decay
            weight.mul_(kept)
            if bias is not None:
                bias.mul_(kept.squeeze(2))
        gradient = gradient * (rates / samples)
        weight.baddbmm_(gradient.mT, below)
        if bias is not None:
            bias.add_(gradient.sum(1))
    else:
        position = next(
            p for p, (kind, layer, _) in enumerate(block.parameters()) if (kind, layer) == ("weight", i + 1)
        )
        down = torch.bmm(gradient.mT, below).mul_(-1 / samples)
        rule.update(weight, down, [m[position] for m in block.moments.values()], rates, step)
        if bias is not None:
            down = gradient.sum(1).mul_(-1 / samples)
            rule.update(bias, down, [m[position + 1] for m in block.moments.values()], rates.squeeze(2), step)
    if rule.normalize and i < block.depth - 1:
        weight.div_(weight.norm(dim=2, keepdim=True))


def _advance_plain(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    for step, (x, y) in enumerate(batches, start=taken + 1):
        _step_plain(block, x, y, rule, step)


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
        return rule.objective(targets, network(inputs))

    parameters = [p for _, _, p in block.parameters()]
    gradients = vmap(grad(loss))(parameters, x, y)
    for position, (kind, layer, parameter) in enumerate(block.parameters()):
        if layer in rule.frozen:
            continue
        moments = [m[position] for m in block.moments.values()]
        rule.update(parameter, gradients[position], moments, rule.rates(parameter), step)
        if rule.normalize and kind == "weight" and layer < block.depth:
            parameter.div_(parameter.norm(dim=2, keepdim=True))
