"""Losses whose slopes are taken of the whole batch at once: only where that is proved, and equal to one by one."""

from functools import partial
from types import FunctionType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.derivatives.test_proven import drawn
from tsdyn import derivatives
from tsdyn.derivatives import graph
from tsdyn.derivatives.agreement import agree, agree_by_name
from tsdyn.derivatives.straight import straight

EPS = torch.finfo(torch.float64).eps
SAMPLES, OUTPUTS = 6, 3


def half_square(output, target):
    return 0.5 * (output - target).square().sum()


def mean_square(output, target):
    return 0.5 * (output - target).square().sum(1).mean()


def two_lines(output, target):
    apart = output - target
    return (apart * apart).sum()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double()


def problem():
    return network(), drawn(SAMPLES, 4), drawn(SAMPLES, OUTPUTS, seed=1).abs() + 0.5


def one_by_one(module, loss, x, y):
    parameters = dict(module.named_parameters())
    rows = [
        torch.autograd.grad(loss(module(x[i : i + 1]), y[i : i + 1]), list(parameters.values())) for i in range(len(x))
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


def compared(module, loss, x, y):
    """Gradients, norms and one Hessian product beside plain autograd."""
    right = one_by_one(module, loss, x, y)
    largest = max(1.0, *(float(g.abs().max()) for g in right.values()))
    found = derivatives.per_sample_gradients(module, loss, x, y)
    for name, g in right.items():  # sums of at most 10^2 terms, each of a few roundings
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e4 * EPS * largest)
    norms = torch.cat([g.flatten(1) for g in right.values()], 1).norm(dim=1)
    torch.testing.assert_close(
        derivatives.per_sample_gradient_norms(module, loss, x, y), norms, rtol=1e4 * EPS, atol=1e4 * EPS * largest
    )
    leaves = list(module.parameters())
    slopes = torch.autograd.grad(loss(module(x), y), leaves, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])
    v = drawn(len(flat), seed=2)
    bent = torch.autograd.grad(flat, leaves, v, allow_unused=True) if flat.requires_grad else [None] * len(leaves)
    product = torch.cat([torch.zeros(p.numel()).double() if b is None else b.flatten() for b, p in zip(bent, leaves)])  # noqa: B905
    found = derivatives.hessian_vector_product(module, loss, x, y, v)
    torch.testing.assert_close(found, product, rtol=0, atol=1e5 * EPS * max(1.0, float(product.abs().max())))


SUMS = {
    "half square": half_square,
    "divided": lambda f, t: (f - t).square().sum() / 2,
    "shifted": lambda f, t: 3 - 0.1 * (f - t).pow(2).sum() + 1,
    "cross terms of one sample": lambda f, t: (f * t).sum(1).square().sum(),
    "by methods": lambda f, t: f.sub(t).abs().add(1).log().sum().mul(2),
    "exponential": lambda f, t: (f.exp() - t * f).sum(),
    "ratio": lambda f, t: (f.sigmoid() / t).sum(-1).sum(),
    "with a variable": two_lines,
}

NO_SUMS = {
    "mean": lambda f, t: (f - t).square().mean(),
    "mean of sums": mean_square,
    "square of the total": lambda f, t: (f - t).sum().square(),
    "inverse of the total": lambda f, t: 1 / (1 + (f - t).square().sum()),
    "product of totals": lambda f, t: f.sum() * t.sum() + f.square().sum(),
    "batch's mean taken off": lambda f, t: (f - f.mean(0)).square().sum() + (f - t).sum(),
    "sum over samples within": lambda f, t: (f - t).sum(0).square().sum(),
    "total within": lambda f, t: (f * (f - t).sum()).sum(),
    "targets' total": lambda f, t: (f * t.sum()).square().sum(),
    "two totals": lambda f, t: (f - t).square().sum() + f.sum(),
}
SCALE = 2.0
NOT_STRAIGHT = {
    "a name from outside": lambda f, t: SCALE * (f - t).square().sum(),
    "torch's own function": lambda f, t: F.mse_loss(f, t, reduction="sum"),
    "a jump": lambda f, t: (f - t).square().sum() if t is not None else f.sum(),
    "a length": lambda f, t: (f - t).square().sum() / f.shape[0],
    "a number of its own": lambda f, t: (f - t).square().sum() / f.numel(),
    "a default": lambda f, t, scale=2.0: scale * (f - t).square().sum(),
    "an object": nn.MSELoss(reduction="sum"),
    "a partial": partial(lambda scale, f, t: scale * (f - t).square().sum(), 2.0),
    "any arguments": lambda *given: (given[0] - given[1]).square().sum(),
}


@pytest.mark.parametrize("name", [*SUMS, *NO_SUMS, *NOT_STRAIGHT])
def test_losses_are_told_apart_and_right(name):
    module, x, y = problem()
    loss = {**SUMS, **NO_SUMS, **NOT_STRAIGHT}[name]
    told = straight(loss, module(x), y)
    assert (told is None) == (name in NOT_STRAIGHT)
    assert told is None or told.sums == (name in SUMS)
    for _ in range(2):  # anew, and as remembered
        compared(module, loss, x, y)


#: Loss → c of c Σ (f − t)² over 6 samples of 3 outputs.
SQUARES = {
    "half square": (half_square, 0.5),
    "mean": (lambda f, t: (f - t).square().mean(), 1 / 18),
    "mean of sums": (mean_square, 0.5 / 6),
    "sum of means": (lambda f, t: (t - f).pow(2).mean(1).sum(), 1 / 3),
    "by itself": (two_lines, 1.0),
    "scaled before": (lambda f, t: ((f - t) / 2).square().sum(), 0.25),
    "scaled after": (lambda f, t: -3 * (2 * f - 2 * t).square().sum(-1).sum(), -12.0),
    "negative": (lambda f, t: (-(f - t)).square().sum() / 4, 0.25),
    "by methods": (lambda f, t: f.sub(t).mul(3).square().sum().div(2), 4.5),
    "added": (lambda f, t: (f + (-t)).square().sum(), 1.0),
    "with alpha": (lambda f, t: f.sub(t, alpha=1).square().sum(), 1.0),
}
NO_SQUARES = {
    "another multiple": lambda f, t: (f - 2 * t).square().sum(),
    "alpha": lambda f, t: f.sub(t, alpha=2).square().sum(),
    "sum": lambda f, t: (f + t).square().sum(),
    "outputs alone": lambda f, t: f.square().sum() + 0 * t.sum(),
    "a product of two": lambda f, t: ((f - t) * (t - f)).sum(),
    "of sums": lambda f, t: (f - t).sum(1).square().sum(),
    "a cube": lambda f, t: (f - t).pow(3).sum(),
    "a shifted difference": lambda f, t: (f - t + 1).square().sum(),
    "a shifted total": lambda f, t: (f - t).square().sum() + 1,
    "two of them": lambda f, t: (f - t).square().sum() + (f - t).square().sum(),
    "a root": lambda f, t: (f - t).square().sum().sqrt(),
    "absolute": lambda f, t: (f - t).abs().square().sum(),
    "divided by it": lambda f, t: (1 / (f - t)).square().sum(),
    "over targets": lambda f, t: ((f - t) / t).square().sum(),
}


@pytest.mark.parametrize("name", [*SQUARES, *NO_SQUARES])
def test_sums_of_squares_are_told_with_their_factor(name):
    """All that is not recognised is computed by the loss's own graph: both are compared with autograd."""
    loss, factor = SQUARES.get(name, (NO_SQUARES.get(name), None))
    _, x, y = problem()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, OUTPUTS)).double()
    found = straight(loss, module(x), y).squares
    assert (found is None) == (factor is None)
    assert factor is None or found == pytest.approx(factor, rel=4 * EPS)
    compared(module, loss, x, y)


def test_squares_are_of_tensors_of_one_shape_and_type():
    f, t = drawn(SAMPLES, OUTPUTS), drawn(SAMPLES, OUTPUTS)
    assert straight(half_square, f, t).squares == 0.5
    assert straight(half_square, f, drawn(OUTPUTS).view(1, -1)).squares is None
    assert straight(half_square, f, drawn(SAMPLES).view(-1, 1)).squares is None
    assert straight(half_square, f, t.float()).squares is None
    assert straight(lambda f, t: (f * f).sum(), f, None).squares is None


def test_shapes_that_put_samples_together_are_no_sums():
    f = drawn(SAMPLES, SAMPLES)
    assert straight(half_square, f, drawn(SAMPLES, SAMPLES)).sums
    assert not straight(half_square, f, drawn(SAMPLES)).sums  # a row for all, not one for each
    assert not straight(half_square, f, drawn(1, SAMPLES)).sums
    assert straight(lambda f, t: (f * f).sum(), f, None).sums  # no targets
    assert straight(half_square, f.requires_grad_(True), drawn(SAMPLES, SAMPLES).long()) is None


def test_what_is_seen_from_outside_is_read_anew_at_each_call(monkeypatch):
    module, x, y = problem()
    scale = [1.0]

    def scaled(f, t):
        return scale[0] * (f - t).square().sum()

    for scale[0] in (1.0, 3.0):
        compared(module, scaled, x, y)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    compared(module, NOT_STRAIGHT["a name from outside"], x, y)


def test_a_loss_whose_code_is_replaced_is_another_loss():
    module, x, y = problem()

    def loss(f, t):
        return (f - t).square().sum()

    compared(module, loss, x, y)
    loss.__code__ = (lambda f, t: (f - t).sum().square()).__code__
    compared(module, loss, x, y)
    loss.__defaults__ = (None,)
    assert straight(loss, module(x), y) is None
    made = FunctionType(half_square.__code__, {})  # the same code is the same loss
    assert straight(made, module(x), y).sums


@pytest.mark.parametrize("name", ["square", "sum", "__sub__", "__rmul__", "__mul__"])
def test_methods_of_tensors_that_are_replaced_are_seen(name, monkeypatch):
    module, x, y = problem()
    loss = lambda f, t: 0.5 * ((f - t).square() * 2.0).sum()  # noqa: E731
    compared(module, loss, x, y)
    own = getattr(torch.Tensor, name)

    def mixed(self, *given):
        return own(self, *given) + own(self, *given).mean()

    monkeypatch.setattr(torch.Tensor, name, mixed)
    assert straight(loss, module(x), y) is None
    monkeypatch.undo()
    assert straight(loss, module(x), y).sums


def test_code_that_writes_in_place_changes_nothing_while_it_is_examined():
    f, t = drawn(SAMPLES, OUTPUTS), drawn(SAMPLES, OUTPUTS, seed=1)
    before = f.clone()

    def loss(f, t):
        f -= t
        return f.square().sum()

    assert straight(loss, f, t) is None
    assert torch.equal(f, before)


@pytest.mark.parametrize("draw", [np.random.rand, lambda: torch.rand(())])
def test_a_loss_that_draws_is_refused_of_known_modules_too(draw):
    module, x, y = problem()
    loss = lambda f, t: draw() * (f - t).square().sum()  # noqa: E731
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for function in (derivatives.per_sample_gradients, derivatives.per_sample_gradient_norms):
        with pytest.raises(ValueError, match="random"):
            function(module, loss, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, f, t):
        self.calls += 1
        return self.calls * (f - t).square().sum()


@pytest.mark.parametrize("moment", [1, 3])
def test_a_loss_that_remembers_its_calls_is_refused_of_known_modules_too(moment):
    module, x, y = problem()
    for loss in (Counts(), lambda f, t, calls=[]: (calls.append(1), (f - t).square().sum() * len(calls))[1]):
        for _ in range(moment):
            loss(module(x), y)
        for function in (derivatives.per_sample_gradients, derivatives.per_sample_gradient_norms, derivatives.hessian):
            with pytest.raises(ValueError, match="or the loss, gives two values for one input"):
                function(module, loss, x, y)


def test_a_loss_without_a_second_derivative_is_named_where_formulas_are_used():
    module, x, _ = problem()
    classes, vector = torch.zeros(len(x), dtype=torch.long), drawn(sum(p.numel() for p in module.parameters()))
    with pytest.raises(ValueError, match="Sequential holds an operation that torch cannot differentiate here"):
        derivatives.hessian_vector_product(module, F.multi_margin_loss, x, classes, vector)


# --- the module, between two calls -----------------------------------------------------------------------------


def hooked(module, monkeypatch):
    module[0].register_forward_hook(lambda _, __, out: 2 * out)


def replaced_forward(module, monkeypatch):
    own = module[2].forward
    module[2].forward = lambda x: own(x) ** 2


def replaced_class(module, monkeypatch):
    own = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: 3 * own(self, x))


def replaced_part(module, monkeypatch):
    module[1] = nn.Sigmoid()


def replaced_parameter(module, monkeypatch):
    module[0].weight = nn.Parameter(drawn(5, 4, seed=9))


def moved_parameter(module, monkeypatch):
    with torch.no_grad():
        module[0].weight.mul_(-3)


def frozen(module, monkeypatch):
    module[0].bias.requires_grad_(False)
    module[0].bias = None


def replaced_function(module, monkeypatch):
    own = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: 2 * own(x, w, b))


def replaced_call(module, monkeypatch):
    own = nn.Module.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: 2 * own(self, x), raising=False)


def hook_of_gradient(module, monkeypatch):
    module[2].weight.register_hook(lambda g: 2 * g)


@pytest.mark.parametrize(
    "change",
    [hooked, replaced_forward, replaced_class, replaced_part, replaced_parameter, moved_parameter, frozen,
     replaced_function, replaced_call],
)  # fmt: skip
def test_a_module_that_is_changed_between_two_calls_is_differentiated_as_it_is(change, monkeypatch):
    module, x, y = problem()
    compared(module, half_square, x, y)
    change(module, monkeypatch)
    compared(module, half_square, x, y)
    jacobian = derivatives.jacobian(module, x)
    slopes = one_by_one(module, lambda f, _: f[0, 1], x, y)
    for name, g in slopes.items():
        torch.testing.assert_close(jacobian[name][:, 1], g, rtol=0, atol=1e4 * EPS * max(1.0, float(g.abs().max())))


def test_gradients_that_a_hook_changes_are_those_of_plain_autograd():
    module, x, y = problem()
    derivatives.per_sample_gradients(module, half_square, x, y)
    hook_of_gradient(module, None)
    right = one_by_one(module, half_square, x, y)
    for name, g in derivatives.per_sample_gradients(module, half_square, x, y).items():
        torch.testing.assert_close(g, right[name], rtol=0, atol=1e4 * EPS * float(g.abs().max()))


def mixing_linear(own):
    return lambda x, w, b=None: own(x - x.mean(0), w, b)


def test_a_function_of_torchs_that_is_made_to_mix_samples_is_refused(monkeypatch):
    module, x, y = problem()
    compared(module, half_square, x, y)
    monkeypatch.setattr(F, "linear", mixing_linear(F.linear))
    for call in (derivatives.per_sample_gradients, derivatives.per_sample_gradient_norms):
        with pytest.raises(ValueError, match="mixes samples"):
            call(module, half_square, x, y)
    with pytest.raises(ValueError, match="mixes samples"):
        derivatives.jacobian(module, x)


def test_a_module_is_not_known_while_torch_computes_something_else():
    class Twice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    module = network()
    assert graph.known(module)
    with Twice():
        assert not graph.known(module)


def test_a_part_that_is_random_when_it_is_put_in_is_refused():
    module, x, y = problem()
    derivatives.per_sample_gradients(module, half_square, x, y)
    module.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match="Dropout in training mode"):
        derivatives.per_sample_gradients(module, half_square, x, y)


def test_an_infinity_agrees_with_an_equal_one_only():
    right = torch.tensor([torch.inf, 1.0, torch.nan])
    assert agree(right.clone(), right)
    assert agree(right * (1 + 1e-7), right)  # 4,504 roundings of float32 are allowed
    for place, wrong in ((0, 3.0), (0, -torch.inf), (1, 7.0), (1, torch.nan), (2, 0.0)):
        found = right.clone()
        found[place] = wrong
        assert not agree(found, right)
        assert not agree_by_name({"": found, "other": right[1]}, {"": right, "other": right[1]})
    assert not agree(torch.zeros(2), torch.zeros(3))
