"""Gradients that autograd's graph proves: equal to one backward pass per sample, and proved of nothing that mixes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tsdyn import derivatives
from tsdyn.derivatives import graph
from tsdyn.derivatives.assumptions import asked
from tsdyn.derivatives.factors import Convolved
from tsdyn.derivatives.proven import proven

EPS = torch.finfo(torch.float64).eps
SAMPLES = 6


def half_square(output, target):
    return 0.5 * (output - target).square().sum()


def one_by_one(module, x, y):
    parameters = dict(module.named_parameters())
    rows = [
        torch.autograd.grad(half_square(module(x[i : i + 1]), y[i : i + 1]), list(parameters.values()))
        for i in range(len(x))
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compared(module, x):
    y = drawn(*module(x).shape, seed=1)
    right = one_by_one(module, x, y)
    largest = max(float(g.abs().max()) for g in right.values())
    for memory in (1, derivatives.MEMORY):
        found = derivatives.per_sample_gradients(module, half_square, x, y, memory=memory)
        for name, g in right.items():  # sums of at most 10^4 terms
            torch.testing.assert_close(found[name], g, rtol=0, atol=1e4 * EPS * max(1.0, largest))
        norms = derivatives.per_sample_gradient_norms(module, half_square, x, y, memory=memory)
        expected = torch.cat([g.flatten(1) for g in right.values()], 1).norm(dim=1)
        torch.testing.assert_close(norms, expected, rtol=1e4 * EPS, atol=1e4 * EPS)


def is_proved(module, x):
    with asked("test", module, x, drawn(*module(x).shape)) as one:
        return proven(one, half_square, derivatives.MEMORY) is not None


@settings(max_examples=25, deadline=None)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    side=st.sampled_from([5, 8, 16, 17]),
)
def test_convolutions_of_any_geometry(stride, padding, dilation, kernel, groups, bias, side):
    layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias).double()
    x = drawn(3, 2, side, side)
    if min(layer(x).shape[2:]) < 1:
        return
    assert is_proved(layer, x)
    compared(layer, x)
    g = drawn(*layer(x).shape)
    held = Convolved(x, g, layer)
    patches = held.factors()
    room = 1e4 * EPS * float(held.weight().abs().max() + 1)
    torch.testing.assert_close(held.weight(), patches.weight(), rtol=0, atol=room)
    torch.testing.assert_close(held.squared_norms(), patches.squared_norms(), rtol=1e4 * EPS, atol=room)


class Residual(nn.Module):
    """Convolutions with normalisation, an addition, and a mean over places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.top = nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.top(F.relu(x + self.norm(self.second(F.gelu(x)))).mean((2, 3)))


class Wide(nn.Module):
    """Convolutions that the engine takes; with `twist`, something that its convolutions do not know."""

    def __init__(self, twist=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.top, self.twist, self.seen = nn.Linear(32, 2), twist, []

    def forward(self, x):
        x = F.relu(self.first(x))
        self.seen.append("forward" in vars(self.second))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.twist == "autocast"):
            z = self.second(x)
        match self.twist:
            case "in place":
                z = z.relu_()
            case "twice":
                z = self.second(z)
            case "raises":
                if self.seen[-1]:
                    raise TypeError("a layer whose forward pass is torch's own, please")
        return self.top((x + z).mean((2, 3)))


@pytest.mark.parametrize("twist", [None, "in place", "twice", "autocast", "raises"])
def test_convolutions_by_the_engine(twist):
    torch.manual_seed(0)
    module, x = Wide(twist).double(), drawn(9, 3, 16, 16)
    y = drawn(9, 2, seed=1)
    right = one_by_one(module, x, y)
    module.seen.clear()
    found = derivatives.per_sample_gradients(module, half_square, x, y)
    assert any(module.seen) == (twist != "twice")  # which is known of one sample's pass
    assert "forward" not in vars(module.second)
    for name, g in right.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e4 * EPS * float(1 + g.abs().max()))


class Attention(nn.Module):
    """A block of a transformer."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (x + self.out(torch.softmax(q @ k.mT / 2, -1) @ v)).mean(1)


class Folded(nn.Module):
    """Frames that are taken for samples inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x.reshape(-1, 4))).view(len(x), -1, 3).sum(1)


@pytest.mark.parametrize(("make", "shape"), [(Residual, (3, 6, 6)), (Attention, (5, 4)), (Folded, (5, 4))])
def test_modules_with_a_forward_pass_of_their_own(make, shape):
    torch.manual_seed(0)
    module, x = make().double(), drawn(SAMPLES, *shape)
    assert is_proved(module, x)
    compared(module, x)


class Does(nn.Module):
    """A layer between two functions."""

    def __init__(self, before, after):
        super().__init__()
        self.layer, self.before, self.after = nn.Linear(SAMPLES, SAMPLES), before, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


ORDER = torch.tensor([1, 0, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.roll(1, 0), lambda x: x.flip(0), lambda x: x.T, lambda x: x - x.mean(0), lambda x: x.softmax(0),
        lambda x: x.cumsum(0), lambda x: x[ORDER[: len(x)]] if len(x) == SAMPLES else x, lambda x: x @ x.T @ x,
        lambda x: torch.cat([x[1:], x[:1]]), lambda x: x * x.sum(1), lambda x: x.sort(0).values,
        lambda x: x.unfold(0, 1, 1).squeeze(-1) + x.sum(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_nothing_that_moves_or_mixes_samples_is_proved(change, first):
    module = (Does(change, nn.Identity()) if first else Does(nn.Identity(), change)).double()
    x = drawn(SAMPLES, SAMPLES).requires_grad_(True)
    assert graph.rows_of([module(x)], [x], SAMPLES) is None


def test_a_permutation_that_is_undone_is_right_though_it_is_not_proved():
    torch.manual_seed(0)
    back = torch.argsort(ORDER)
    module = Does(
        lambda x: x[ORDER] if len(x) == SAMPLES else x, lambda x: x[back] if len(x) == SAMPLES else x
    ).double()
    x = drawn(SAMPLES, SAMPLES)
    assert not is_proved(module, x)
    compared(module, x)


def test_a_parameter_that_the_loss_sees_is_differentiated_there_too():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = drawn(SAMPLES, 4), drawn(SAMPLES, 2)
    decayed = lambda f, t: half_square(f, t) + (module[0].weight ** 4).sum()  # noqa: E731
    found = derivatives.per_sample_gradients(module, decayed, x, y)
    plain = derivatives.per_sample_gradients(module, half_square, x, y)
    torch.testing.assert_close(found["0.weight"], plain["0.weight"] + 4 * module[0].weight.detach() ** 3)
    torch.testing.assert_close(found["2.weight"], plain["2.weight"])


def test_parts_that_are_not_as_torch_made_them_are_not_known():
    assert graph.known(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))

    class Own(nn.Linear):
        pass

    hooked, replaced, watched = (nn.Linear(2, 2) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    watched.weight.register_hook(lambda g: g)
    for part in (Own(2, 2), hooked, replaced, watched, nn.Flatten(0), nn.Dropout(), nn.BatchNorm1d(2)):
        assert not graph.known(nn.Sequential(part))


class Relu(torch.autograd.Function):
    """Takes the mean over samples off, under the name of an operation that keeps samples apart."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return Relu.apply(self.inner(x))


def test_a_function_of_a_users_own_proves_nothing_whatever_its_name():
    module, x = Named().double(), drawn(SAMPLES, 3)
    free = x.clone().requires_grad_(True)
    assert graph.rows_of([module(free)], [free], SAMPLES) is None
    with pytest.raises(ValueError, match="mixes samples"):
        derivatives.per_sample_gradients(module, half_square, x, drawn(SAMPLES, 2))
