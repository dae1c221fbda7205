"""Options of training against torch.optim on the same draws: 50 steps in float64, on every backend that serves them."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torch import nn

from tsdyn import Experiment, ExperimentError
from tsdyn.engine import batched, compiled_step, graph, native, propagated, train
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.parts import Training
from tsdyn.networks.activations import NAMES, activation
from tsdyn.networks.network import Network

WIDTHS, MEMBERS, STEPS = (6, 9, 7, 4), 3, 50


def ensemble(name="relu"):
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    shapes = list(itertools.pairwise(WIDTHS))
    return Ensemble.of(
        [
            Network([normal(n, m) / m**0.5 for m, n in shapes], [0.1 * normal(n) for _, n in shapes], name)
            for _ in range(MEMBERS)
        ]
    )


def batches():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(MEMBERS, 40, WIDTHS[0], generator=draw, dtype=torch.float64)
    y = torch.randn(MEMBERS, 40, WIDTHS[-1], generator=draw, dtype=torch.float64)
    return x, y, torch.randint(0, 40, (MEMBERS, STEPS, 8), generator=draw)


#: Options as an experiment file writes them.
RULES = {
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"method": "adamw", "weight_decay": 0.1},
    "adamw that spares biases": {"method": "adamw", "weight_decay": 0.1, "decay_biases": False},
    "decay that spares biases": {"weight_decay": 0.1, "decay_biases": False},
    "momentum and decay that spares biases": {"momentum": 0.9, "weight_decay": 0.1, "decay_biases": False},
    "rates": {"rates": [0.5, 2.0, 0.0]},
    "rates of adam": {"method": "adam", "rates": [0.5, 2.0, 1.0]},
    "clip": {"clip": 0.5},
    "clip before momentum and decay": {"clip": 0.5, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "clip without the frozen": {"clip": 0.5, "frozen": [2]},
    "all": {
        "clip": 0.5, "momentum": 0.9, "weight_decay": 0.1, "decay_biases": False, "rates": [0.5, 2.0, 1.0],
        "warm_up": 1, "anneal": "cosine", "epochs": 4,
    },
}  # fmt: skip


def by_torch(network, rows, x, y, training):
    """The loop that a user of torch.optim writes."""
    module = network.to_torch()
    linears = [part for part in module if isinstance(part, nn.Linear)]
    for layer in training.frozen:
        linears[layer - 1].requires_grad_(False)
    groups = [
        {
            "params": [p],
            "lr": 0.02 * (training.rates[layer] if training.rates else 1.0),
            "weight_decay": training.weight_decay if training.decay_biases or p is part.weight else 0.0,
        }
        for layer, part in enumerate(linears)
        for p in (part.weight, part.bias)
        if p.requires_grad
    ]
    if training.method == "sgd":
        optimizer = torch.optim.SGD(groups, 0.02, momentum=training.momentum, nesterov=training.nesterov)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.method]
        optimizer = kind(groups, 0.02, weight_decay=0.0)
    for at in rows:
        optimizer.zero_grad()
        (0.5 * (module(x[at]) - y[at]).square().sum(1).mean()).backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], training.clip)
        optimizer.step()
    return Ensemble.of([Network.from_torch(module)])


@pytest.mark.parametrize("backend", [None, train.BATCHED, train.GENERAL], ids=["chosen", "batched", "general"])
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_fifty_steps_are_those_of_torch_optim(options, backend):
    training = Training(learning_rate=0.02, **options)
    rule = Rule.of(training, training.warm_up + 1)  # the first epoch after the warm-up has the whole rate
    assert rule.learning_rate == 0.02
    mine, start = ensemble(), ensemble()
    if backend is train.BATCHED and not batched.claims(mine, rule):
        assert rule.options - batched.OPTIONS == {"clip"}
        return
    x, y, rows = batches()
    train_epoch(mine, finite_stream(x, y, rows), rule, batch=8, backend=backend)
    bound = 1e-9 if training.method.startswith("adam") else 1e-12
    for member in range(MEMBERS):
        theirs = by_torch(start.network(member), rows[member], x[member], y[member], training)
        for name, value in theirs.values.items():
            off = (mine.values[name][member] - value[0]).abs().max()
            assert float(off) <= bound * max(1.0, float(value.abs().max())), name
    if "clip" in options:  # and it did clip
        loose = ensemble()
        train_epoch(loose, finite_stream(x, y, rows), Rule.of(training.model_copy(update={"clip": None}), 2), batch=8)
        assert not torch.allclose(loose.values["weight_1"], mine.values["weight_1"])


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_a_backend_takes_no_rule_that_it_does_not_serve(options):
    """The compiled step takes all of these; with the others, clipping is left to the general engine."""
    rule = Rule.of(Training(**options), 1)
    if native.load(compiled_step.SOURCE, compiled_step.Job) is not None:
        assert train.chosen(ensemble(), rule) is train.COMPILED
    with mock.patch.object(native, "load", return_value=None):
        assert (train.chosen(ensemble(), rule) is train.GENERAL) == ("clip" in options)
    assert not (graph.claims(ensemble(), rule) and "clip" in options)
    assert not propagated.claims(ensemble(), rule)


@pytest.mark.parametrize("warm_up", [0, 1, 4, 11])
@pytest.mark.parametrize("anneal", ["none", "cosine"])
def test_warm_up_and_cosine_are_those_of_lambda_lr(warm_up, anneal):
    training = Training(learning_rate=0.3, epochs=12, warm_up=warm_up, anneal=anneal)

    def factor(epoch):
        if epoch < warm_up:
            return (epoch + 1) / warm_up
        return 1.0 if anneal == "none" else (1 + math.cos(math.pi * (epoch - warm_up) / (12 - warm_up))) / 2

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(1, 13):
        assert training.rate(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-15, abs=0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("warm_up", [0, 3])
def test_the_cosine_is_that_of_torch(warm_up):
    training = Training(learning_rate=0.3, epochs=12, warm_up=warm_up, anneal="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12 - warm_up)
    for epoch in range(warm_up + 1, 13):
        # torch multiplies ratios epoch by epoch: a rounding or two each
        assert training.rate(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-13)
        optimizer.step()
        schedule.step()


def test_a_table_of_rates_is_warmed_up_too():
    training = Training(learning_rate={0: 0.4, 3: 0.1}, epochs=6, warm_up=2)
    assert [training.rate(epoch) for epoch in range(1, 7)] == pytest.approx([0.2, 0.4, 0.4, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"clip": 0.0}, "training.clip"),
        ({"clip": -1.0}, "training.clip"),
        ({"rates": [1.0]}, "training.rates = .*one factor per layer, and the student has 2"),
        ({"rates": [1.0, -1.0]}, "training.rates"),
        ({"nesterov": True}, "training.nesterov = true.*set training.momentum"),
        ({"nesterov": True, "momentum": 0.9, "method": "adam"}, "training.nesterov = true.*'adam'"),
        ({"decay_biases": False}, "training.decay_biases = false: there is no weight decay"),
        ({"warm_up": 9, "epochs": 3}, "training.warm_up = 9: is longer than training.epochs = 3"),
        ({"anneal": "cosin"}, "training.anneal"),
        ({"method": "flow", "clip": 1.0}, "training.clip: gradient flow"),
        ({"method": "flow", "rates": [1.0, 1.0]}, "training.rates: gradient flow"),
        ({"method": "flow", "weight_decay": 0.1, "decay_biases": False}, "training.decay_biases: gradient flow"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(training, said):
    with pytest.raises(ExperimentError, match=said):
        Experiment(name="e", teacher={"widths": [4, 3, 2]}, training=training)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hand_written_step_multiplies_by_the_gate_to_the_last_bit(name, dtype):
    z = torch.linspace(-40, 40, 4001, dtype=dtype)
    sigma, gradient = activation(name), torch.randn(4001, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = gradient * sigma.gate(z)
    assert torch.equal(batched._through_gate(gradient.clone(), sigma, z, sigma(z)), expected)
