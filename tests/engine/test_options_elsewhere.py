"""Options of training on convolutions, BatchNorm and own modules, against torch.optim on the same draws: 50 steps."""

import copy

import pytest
import torch
from torch import nn

from tsdyn import Network
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.parts import Training
from tsdyn.networks.residual import Residual

MEMBERS, STEPS, IMAGE, OUTPUTS = 3, 50, (2, 4, 4), 3


def flat_inputs(module):
    """An image module as a map from (sample, input)."""
    return nn.Sequential(nn.Unflatten(1, IMAGE), *module)


def images(place):
    """A convolution with BatchNorm before or after its activation, or without, and a linear layer.

    Below BatchNorm without a bias: its gradient would be rounding alone, of which Adam makes whole steps.
    """
    middle = {
        "none": [nn.ReLU()],
        "before": [nn.BatchNorm2d(3), nn.ReLU()],
        "after": [nn.ReLU(), nn.BatchNorm2d(3)],
    }[place]
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=place != "before"), *middle, nn.Flatten(), nn.Linear(12, OUTPUTS))


def made(kind, seed):
    torch.manual_seed(seed)
    match kind:
        case "residual":
            return Residual(32, 6, OUTPUTS, blocks=2, layer_norm=True).double()
        case "own convolution":
            return flat_inputs(images("before")).double()
        case _:
            return images(kind).double()


RULES = {
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "clip before momentum and decay": {"clip": 0.5, "momentum": 0.9, "weight_decay": 0.1},
    "adamw that spares biases": {"method": "adamw", "weight_decay": 0.1, "decay_biases": False},
    "clip and decay that spares biases": {"clip": 0.3, "weight_decay": 0.1, "decay_biases": False},
    "rates": {"rates": [0.5, 2.0], "momentum": 0.5},
}


def by_torch(module, x, y, rows, training):
    """The loop that a user of torch.optim writes; parameters of one axis are biases, scales and shifts."""
    module = copy.deepcopy(module).train()
    first = {id(p) for name, p in module.named_parameters() if name.split(".")[0] in ("0", "1", "2")}
    groups = [
        {
            "params": [p],
            "lr": 0.02 * (training.rates[0 if id(p) in first else 1] if training.rates else 1.0),
            "weight_decay": training.weight_decay if training.decay_biases or p.ndim > 1 else 0.0,
        }
        for p in module.parameters()
    ]
    if training.method == "sgd":
        optimizer = torch.optim.SGD(groups, 0.02, momentum=training.momentum, nesterov=training.nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, 0.02)
    for at in rows:
        optimizer.zero_grad()
        (0.5 * (module(x[at]) - y[at]).square().sum(1).mean()).backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), training.clip)
        optimizer.step()
    return module


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["none", "before", "after", "own convolution", "residual"])
def test_fifty_steps_are_those_of_torch_optim(kind, options):
    own = kind in ("own convolution", "residual")
    if own and "rates" in options:
        return  # refused of modules, whose parameters belong to no numbered layer: test_own_modules
    training = Training(learning_rate=0.02, **options)
    modules = [made(kind, seed) for seed in range(MEMBERS)]
    networks = modules if own else [Network.from_torch(m.eval(), image=IMAGE) for m in modules]
    ensemble = Ensemble.of([copy.deepcopy(m).train() for m in modules] if own else networks)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(MEMBERS, 40, 32, generator=draw, dtype=torch.float64)
    y = torch.randn(MEMBERS, 40, OUTPUTS, generator=draw, dtype=torch.float64)
    rows = torch.randint(0, 40, (MEMBERS, STEPS, 8), generator=draw)
    train_epoch(ensemble, finite_stream(x, y, rows), Rule.of(training, 1), batch=8)
    # as in test_options: Adam divides by gradients that may be small
    bound = 1e-9 if training.method == "adamw" else 1e-12
    for i, module in enumerate(modules):
        inputs = x[i] if own else x[i].unflatten(1, IMAGE)
        after = by_torch(module, inputs, y[i], rows[i], training)
        theirs = Ensemble.of([after if own else Network.from_torch(after.eval(), image=IMAGE)])
        for name, value in (theirs.values | theirs.buffers).items():
            mine = (ensemble.values | ensemble.buffers)[name][i]
            off = float((mine - value[0]).abs().max())
            assert off <= bound * max(1.0, float(value.abs().max())), name
    begun = {n: s[0] for n, s in Ensemble.of(networks).values.items() if s.ndim > 2}
    assert not any(torch.equal(ensemble.values[n][0], s) for n, s in begun.items())
