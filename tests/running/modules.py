"""Modules of a user's own, and experiments and ensembles of them."""

import torch
from torch import nn

from tests.cases import small
from tsdyn.engine.ensemble import Ensemble
from tsdyn.problem.inputs import generator

INPUTS, OUTPUTS = 16, 3


class Residual(nn.Module):
    """LayerNorm and a skip connection."""

    def __init__(self, width=8):
        super().__init__()
        self.below, self.norm = nn.Linear(INPUTS, width), nn.LayerNorm(width)
        self.inner, self.top = nn.Linear(width, width), nn.Linear(width, OUTPUTS)

    def forward(self, x):
        h = self.below(x)
        return self.top(h + torch.relu(self.inner(self.norm(h))))


class Attention(nn.Module):
    """Four tokens of four numbers, one head, a causal mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.top = nn.Linear(4, 12), nn.Linear(16, OUTPUTS)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(1, (4, 4))).chunk(3, -1)
        weights = (q @ k.mT / 2).masked_fill(~self.mask, -torch.inf).softmax(-1)
        return self.top((x.unflatten(1, (4, 4)) + weights @ v).flatten(1))


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, OUTPUTS),
    )  # fmt: skip


MODULES = {"residual": Residual, "attention": Attention, "convnet": convnet}
RULES = {
    "sgd": {"training__learning_rate": 0.02},
    "momentum": {"training__learning_rate": 0.01, "training__momentum": 0.9, "training__weight_decay": 0.01},
    # a bias below BatchNorm has a gradient of rounding only: 2e-16 over epsilon, times the rate, 50 times
    "adam": {"training__method": "adam", "training__learning_rate": 0.001},
}


def experiment(**changes):
    base = {"teacher__widths": [INPUTS, 5, OUTPUTS], "training__epochs": 1, "training__steps_per_epoch": 50}
    return small(**{"record__observables": ["loss", "mse", "parameter"], "seeds": 2} | base | changes)


def start(make, seed, stream="student"):
    """What the documentation says: torch's generator from the seed's own stream."""
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(seed, stream).integers(2**63)))
        return make().double()


def drawn(make, members=3, samples=24, steps=6, batch=8):
    ensemble = Ensemble.of([start(make, seed) for seed in range(members)])
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(members, samples, INPUTS, generator=rng, dtype=torch.float64)
    y = torch.randn(members, samples, OUTPUTS, generator=rng, dtype=torch.float64)
    return ensemble, x, y, torch.randint(samples, (members, steps, batch), generator=rng)
