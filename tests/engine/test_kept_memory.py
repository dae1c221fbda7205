"""The ConvNets' step over kept memory gives autograd's bits."""

import pytest
import torch

from tsdyn.engine import convolution, kept_memory, native, propagated
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.loss import LOSSES
from tsdyn.engine.rule import Rule
from tsdyn.networks.network import Network

pytestmark = pytest.mark.skipif(
    native.missing(convolution.SOURCE, convolution.Job) is not None, reason="there is no C++ compiler"
)
MEMBERS, SAMPLES = 3, 7


def ensemble(dtype, padding, bias, depth):
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(dtype) / shape[-1]  # noqa: E731
    side = 8 + 4 * padding - 4
    shapes = [(4, 2, 3, 3), (3, 4, 3, 3), (6, 3 * side * side), *[(6, 6)] * depth]
    made = [
        Network(
            [normal(*shape) for shape in shapes],
            [normal(shape[0]) for shape in shapes] if bias else None,
            image=(2, 8, 8),
            padding=[padding] * 2,
        )
        for _ in range(MEMBERS)
    ]
    return Ensemble.of(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("bias", "depth", "frozen"), [(True, 0, ()), (False, 2, (1,)), (True, 1, (2, 3)), (True, 0, (1, 2))]
)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_steps_have_the_bits_of_autograd(dtype, padding, bias, depth, frozen, loss):
    rule = Rule(0.05, "momentum", momentum=0.9, frozen=frozen, loss=loss)
    own, plain = (ensemble(dtype, padding, bias, depth) for _ in range(2))
    draw, memory = torch.Generator().manual_seed(1), kept_memory.Memory()
    for each in (own, plain):
        each.prepare(rule.optimizer.moments)
    for count in range(1, 4):
        x = torch.randn(MEMBERS, SAMPLES, 128, generator=draw).to(dtype)
        y = torch.randn(MEMBERS, SAMPLES, 6, generator=draw).to(dtype).softmax(2)
        assert kept_memory.claims(own, x)
        with torch.no_grad():
            own.take(kept_memory.gradients(own, x, y, rule, memory), rule, count)
            propagated.step(plain, x, y, rule, count)
        for name, value in plain.values.items():
            assert torch.equal(own.values[name], value), name
