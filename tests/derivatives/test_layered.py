"""Hessians of fully connected networks by formulas, against torch.autograd.functional.hessian."""

import logging
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks.test_networks import random_network
from tsdyn import derivatives, memory
from tsdyn.derivatives import curvature
from tsdyn.derivatives import layered as layered_module
from tsdyn.derivatives.layered import Walk, layered, plain_network
from tsdyn.engine.compiled_curvature import Passed, serves
from tsdyn.engine.loss import LOSSES
from tsdyn.networks import activations

EPS = torch.finfo(torch.float64).eps


def by_autograd(module, loss, x, y, parameters):
    """Hessian in the parameters, flattened in their order, by torch's own double backward."""
    sizes = [p.numel() for p in parameters]
    names = [next(n for n, q in module.named_parameters() if q is p) for p in parameters]

    def at(flat):
        named = dict(module.named_parameters())
        pieces = zip(names, parameters, flat.split(sizes), strict=True)
        moved = named | {n: piece.view(p.shape) for n, p, piece in pieces}
        return loss(torch.func.functional_call(module, moved, (x,)), y)

    return torch.autograd.functional.hessian(at, torch.cat([p.detach().flatten() for p in parameters]))


@settings(max_examples=30, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 5), max_size=3),
    ends=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
    loss=st.sampled_from(list(LOSSES.values())),
    frozen=st.sets(st.integers(0, 7), max_size=3),
    samples=st.integers(1, 9),
    seed=st.integers(0, 99),
    compiled=st.booleans(),
)
@example([3, 3, 3], (3, 3), "relu", False, LOSSES["cross_entropy"], set(), 1, 58, False)  # a softmax that is nearly 1
def test_matrix_and_products_are_those_of_double_backward(
    hidden, ends, name, bias, loss, frozen, samples, seed, compiled
):
    """Sums over at most 9 samples and the paths of at most four layers of five nodes: 10⁴ terms of one size."""
    net = random_network((ends[0], *hidden, ends[1]), name, seed=seed, bias=bias)
    module = net.to_torch()
    parameters = list(module.parameters())
    for i in frozen:
        if i < len(parameters) - 1:
            parameters[i].requires_grad_(False)
    free = [p for p in parameters if p.requires_grad]
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, ends[0], generator=draw, dtype=torch.float64)
    y = torch.randn(samples, ends[1], generator=draw, dtype=torch.float64).softmax(1)
    expected = by_autograd(module, loss.value, x, y, free)
    room = 1e4 * EPS * (1 + float(expected.abs().max()))
    with patch("tsdyn.derivatives.layered.serves", serves if compiled else lambda *_: False):
        formulas = layered(module, x, lambda f: loss.value(f, y), free)
    assert formulas is not None
    vector = torch.randn(formulas.size, generator=draw, dtype=torch.float64)
    dense, product = formulas.dense(), formulas.product(vector)
    torch.testing.assert_close(dense, expected, rtol=0, atol=room)
    torch.testing.assert_close(product, expected @ vector, rtol=0, atol=room * len(expected))
    torch.testing.assert_close(derivatives.hessian(module, loss.value, x, y), expected, rtol=0, atol=room)
    found = derivatives.hessian_vector_product(module, loss.value, x, y, vector)
    torch.testing.assert_close(found, expected @ vector, rtol=0, atol=room * len(expected))


def pieces_of(module, vector):
    parameters = list(module.parameters())
    cut = vector.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(cut, parameters, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 33), max_size=3),
    ends=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    loss=st.sampled_from(list(LOSSES.values())),
    samples=st.sampled_from([1, 2, 63, 64, 65, 150]),
    seed=st.integers(0, 99),
)
def test_compiled_products_of_one_pass_are_those_of_double_backward(
    hidden, ends, name, bias, dtype, loss, samples, seed
):
    """Of several directions after one another, the first once more with the same bits.

    A sum of n terms is off by n eps of the sum of their sizes; both ways sum over samples and the widths in turn.
    """
    widths = (ends[0], *hidden, ends[1])
    module = random_network(widths, name, seed=seed, bias=bias).to_torch().to(dtype)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, ends[0], generator=draw, dtype=torch.float64).to(dtype)
    y = torch.randn(samples, ends[1], generator=draw, dtype=torch.float64).softmax(1).to(dtype)
    free = list(module.parameters())
    network = plain_network(module, x, free, compare=False)[0]
    assert serves(network, x)
    formulas = layered(module, x, lambda f: loss.value(f, y), free)
    assert isinstance(formulas._walk, Passed)
    if dtype == torch.float32:  # gates that rounding turns would be another function
        room = torch.finfo(dtype).eps * (samples + sum(widths))
        hidden_z = network.trace(x).preactivations[:-1]
        assume(not network.activation.piecewise_linear or all(float(z.abs().min()) > 20 * room for z in hidden_z))
    slow = module.double()
    leaves = list(slow.parameters())
    slopes = torch.autograd.grad(loss.value(slow(x.double()), y.double()), leaves, create_graph=True)
    vectors = torch.randn(3, formulas.size, generator=draw, dtype=torch.float64).to(dtype)
    found = [formulas.product(v) for v in vectors]
    assert torch.equal(formulas.product(vectors[0]), found[0])
    for vector, product in zip(vectors.double(), found, strict=True):
        right = torch.autograd.grad(slopes, leaves, pieces_of(slow, vector), retain_graph=True, allow_unused=True)
        expected = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, right, strict=True)]
        )
        size = float(vector.norm()) * (1 + float(expected.abs().max()))
        room = torch.finfo(dtype).eps * (samples + sum(widths)) * size
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=room, check_dtype=False)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_compiled_products_have_the_same_bits_on_any_number_of_threads(name):
    network = random_network((7, 9, 5), name, seed=1, bias=True)
    draw = torch.Generator().manual_seed(0)
    x, slope, moved = (torch.randn(2100, n, generator=draw, dtype=torch.float64) for n in (7, 5, 5))
    order = [(0, False), (1, True)]
    along = {(0, False): torch.randn(9, 7, generator=draw, dtype=torch.float64)}

    def products(walk):
        walk.descend(slope, lambda z: -z.sin())
        return [walk.output, walk.moved(along), *walk.back(moved, order)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products(Passed(network, x))
        torch.set_num_threads(3)
        three = products(Passed(network, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    for a, b in zip(one, products(Walk(network, x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2100 * EPS * float(b.abs().max()))


PIECEWISE_LINEAR = [name for name in activations.NAMES if activations.activation(name).piecewise_linear]


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 33), max_size=3),
    ends=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    name=st.sampled_from(PIECEWISE_LINEAR),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    frozen=st.sets(st.integers(0, 7), max_size=3),
    samples=st.sampled_from([1, 2, 63, 64, 65, 150, 1100]),
    seed=st.integers(0, 99),
)
def test_products_of_a_sum_of_squares_in_one_call_are_those_of_double_backward(
    hidden, ends, name, bias, dtype, frozen, samples, seed
):
    """As above; and of the same bits whatever the number of threads."""
    widths = (ends[0], *hidden, ends[1])
    module = random_network(widths, name, seed=seed, bias=bias).to_torch().to(dtype)
    parameters = list(module.parameters())
    for i in frozen:
        if i < len(parameters) - 1:
            parameters[i].requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(samples, n, generator=draw, dtype=torch.float64).to(dtype) for n in ends)
    free = [p for p in parameters if p.requires_grad]
    room = 4 * torch.finfo(dtype).eps * (samples + sum(widths))
    if dtype == torch.float32:  # gates that rounding turns would be another function
        network = plain_network(module, x, free, compare=False)[0]
        zs = network.trace(x).preactivations[:-1]
        assume(all(float(z.abs().min()) > 20 * room for z in zs))

    def loss(f, t):
        return 0.3 * (f - t).square().sum(1).mean()

    vector = torch.randn(sum(p.numel() for p in free), generator=draw, dtype=torch.float64).to(dtype)
    calls, made, found = [], layered_module.product_of_squares, []
    before = torch.get_num_threads()
    with patch.object(layered_module, "product_of_squares", lambda *given: calls.append(given) or made(*given)):
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(derivatives.hessian_vector_product(module, loss, x, y, vector))
        finally:
            torch.set_num_threads(before)
    assert len(calls) == 2
    assert torch.equal(*found)
    slow = module.double()
    leaves = [p for p in slow.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss(slow(x.double()), y.double()), leaves, create_graph=True)
    sizes = [p.numel() for p in leaves]
    moved = sum((g * v.view_as(g)).sum() for g, v in zip(slopes, vector.double().split(sizes), strict=True))
    expected = torch.autograd.grad(moved, leaves, allow_unused=True) if moved.requires_grad else [None] * len(leaves)
    flat = [torch.zeros_like(p).flatten() if e is None else e.flatten() for p, e in zip(leaves, expected, strict=True)]
    size = float(torch.cat(flat).abs().max()) + float(vector.abs().max()) * float(x.square().sum()) / samples
    torch.testing.assert_close(found[0].double(), torch.cat(flat), rtol=0, atol=room * (1 + size))


def test_samples_may_come_in_parts(monkeypatch):
    net = random_network((3, 5, 4, 2), "tanh", seed=1)
    x, y = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = derivatives.hessian(net, LOSSES["mse"].value, x, y[:, :2])
    with curvature._curved("test", (net, LOSSES["mse"].value, x, y[:, :2]), {}) as (curve, _):
        monkeypatch.setattr("tsdyn.derivatives.layered._AT_ONCE", 1 << 14)
        assert len(list(curve._formulas._parts())) > 3
        torch.testing.assert_close(curve._formulas.dense(), whole, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("what", ["mixes samples", "hook", "shared weight", "own activation"])
def test_what_the_formulas_do_not_hold_for_goes_by_autograd(what, caplog):
    module = random_network((3, 3, 3, 2), "tanh", seed=1).to_torch()
    loss = LOSSES["mse"].value
    if what == "mixes samples":
        loss = lambda f, y: (f - y).mean().pow(2)  # noqa: E731
    elif what == "shared weight":
        module[2].weight = module[0].weight
    elif what == "own activation":
        module[1] = nn.Mish()
    x, y = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if what == "hook":
        module[0].weight.register_hook(lambda g: 2 * g)
    with caplog.at_level(logging.WARNING, "tsdyn"):
        found = derivatives.hessian(module, loss, x, y[:, :2])
    expected = by_autograd(module, loss, x, y[:, :2], list(module.parameters()))
    if what == "hook":  # torch hands that weight's gradient doubled in both passes
        twice = torch.cat([torch.full((p.numel(),), 2.0 - (p is not module[0].weight)) for p in module.parameters()])
        expected = twice[:, None] * expected * twice
    room = 1e4 * EPS * (1 + float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=room)
    vector = torch.ones(len(expected), dtype=torch.float64)
    if what != "hook":  # whose Hessian is not symmetric, which is refused
        product = derivatives.hessian_vector_product(module, loss, x, y[:, :2], vector)
        torch.testing.assert_close(product, expected @ vector, rtol=0, atol=room * len(expected))
    assert any("formulas differ" in r.getMessage() for r in caplog.records) == (what in ("mixes samples", "hook"))


@settings(max_examples=20, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 5), max_size=3),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
    frozen=st.sets(st.integers(0, 7), max_size=3),
    memory=st.sampled_from([1, 8 << 20]),
    seed=st.integers(0, 99),
)
def test_jacobians_are_those_of_torch_func(hidden, name, bias, frozen, memory, seed):
    """Products of at most four layers of five nodes each: as many roundings."""
    module = random_network((3, *hidden, 2), name, seed=seed, bias=bias).to_torch()
    for i, p in enumerate(list(module.parameters())[:-1]):
        p.requires_grad_(i not in frozen)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    output = lambda values, a: torch.func.functional_call(module, values | rest, (a[None],))[0]  # noqa: E731
    expected = torch.vmap(torch.func.jacrev(output), (None, 0))(held, x)
    found = derivatives.jacobian(module, x, memory=memory)
    assert list(found) == list(expected)
    for key, jacobian in expected.items():
        torch.testing.assert_close(found[key], jacobian, rtol=0, atol=1e2 * EPS * (1 + float(jacobian.abs().max())))


def test_a_jacobian_that_a_hook_changes_is_torchs_own(caplog):
    module = random_network((3, 3, 2), "tanh", seed=1).to_torch()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = derivatives.jacobian(module, x)
    module[0].weight.register_hook(lambda g: 2 * g)
    with caplog.at_level(logging.WARNING, "tsdyn"):
        found = derivatives.jacobian(module, x)
    assert "formulas differ from plain autograd" in caplog.text
    torch.testing.assert_close(found["0.weight"], 2 * right["0.weight"])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
@pytest.mark.parametrize("name", ["relu", "tanh", "softplus"])
def test_torchs_own_layers_need_no_comparison(loss, name):
    """A loss that sees the parameters, or puts samples together, is differentiated by autograd all the same."""
    module = random_network((3, 5, 2), name, seed=1, bias=True).to_torch()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(6, 2, generator=draw, dtype=torch.float64).softmax(1)
    free = list(module.parameters())
    room = 1e4 * EPS
    for odd in (
        loss.value,
        lambda f, t: loss.value(f, t) + 0.1 * (module[0].weight ** 4).sum(),
        lambda f, t: loss.value(f, t) + (f.mean(0) ** 3).sum(),
        lambda f, t: loss.value(f, t) * loss.value(f.roll(1, 0), t),
    ):
        with curvature._curved("test", (module, odd, x, y), {}) as (curve, _):
            assert isinstance(curve, curvature._Formulas) == (odd is loss.value)
        slopes = torch.autograd.grad(odd(module(x), y), free, create_graph=True)
        rows = [torch.autograd.grad(s, free, retain_graph=True) for s in torch.cat([s.flatten() for s in slopes])]
        expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        found = derivatives.hessian(module, odd, x, y)
        torch.testing.assert_close(found, expected, rtol=0, atol=room * (1 + float(expected.abs().max())))


def test_one_product_takes_a_loss_that_puts_samples_together():
    module = random_network((3, 4, 2), "tanh", seed=1).to_torch()
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, n, generator=draw, dtype=torch.float64) for n in (3, 2))
    parameters = list(module.parameters())
    vector = torch.randn(sum(p.numel() for p in parameters), generator=draw, dtype=torch.float64)

    def spread(output, target):
        return (output - target).mean(0).pow(4).sum() + torch.logsumexp(output.flatten(), 0)

    expected = by_autograd(module, spread, x, y, parameters) @ vector
    found = derivatives.hessian_vector_product(module, spread, x, y, vector)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e4 * EPS * float(expected.abs().max()))


class Sheared(torch.autograd.Function):
    """The identity, with a gradient of which no function is: its derivative is not symmetric."""

    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.clone()

    @staticmethod
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        return g * f.cumsum(1)


def test_one_product_refuses_a_loss_whose_hessian_is_not_symmetric():
    module = random_network((3, 4, 2), "tanh", seed=1).to_torch()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = torch.ones(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    with pytest.raises(ValueError, match="not those of a symmetric matrix"):
        derivatives.hessian_vector_product(module, lambda o, t: Sheared.apply(o).sum(), x, x[:, :2], vector)


class Beside(nn.Module):
    """A module of which there are no formulas."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.top = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.top(h + torch.tanh(self.second(h)))


def sure(module, gain, samples):
    """Inputs, and the class that a module finds likeliest of each: the surer, the larger the gain of its top layer."""
    with torch.no_grad():
        list(module.parameters())[-2].mul_(gain)
    x = torch.randn(samples, 4, dtype=next(module.parameters()).dtype)
    return x, module(x).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [5, 20, 60, 300])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), Beside])
def test_the_hessian_of_a_classifier_that_is_sure_is_computed_as_any_other(make, gain, dtype, monkeypatch):
    """Its softmax is nearly, then exactly, 1: what cancels there leaves products that are symmetric to no digit.

    Nor is it computed column by column with a warning that one way differs from another: all are equal to roundings.
    """
    monkeypatch.setattr(curvature.log, "warning", lambda *said: pytest.fail(str(said)))
    for samples in (1, 7):
        torch.manual_seed(gain + samples)
        module = make().to(dtype)
        x, y = sure(module, gain, samples)
        parameters = list(module.parameters())
        vector = torch.randn(sum(p.numel() for p in parameters), dtype=dtype)
        expected = by_autograd(module, nn.functional.cross_entropy, x, y, parameters)
        # the rounding of terms of size ‖v‖, times the weights on the paths that they go back along
        room = 1e4 * torch.finfo(dtype).eps * gain**2
        given = module, nn.functional.cross_entropy, x, y
        torch.testing.assert_close(derivatives.hessian(*given), expected, rtol=0, atol=room)
        torch.testing.assert_close(
            derivatives.hessian_vector_product(*given, vector), expected @ vector, rtol=0, atol=room
        )
        names = [name for name, _ in module.named_parameters()]

        def loss(params, module=module, x=x, y=y, names=names):
            called = torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))
            return nn.functional.cross_entropy(called, y)

        found = derivatives.hessian_vector_product(loss, [p.detach() for p in parameters], vector)
        torch.testing.assert_close(found, expected @ vector, rtol=0, atol=room)


@pytest.mark.parametrize("gain", [1, 60, 300])
def test_a_backward_pass_of_its_own_is_refused_where_the_softmax_is_sure_too(gain):
    torch.manual_seed(0)
    for module in (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), Beside()):
        with torch.no_grad():
            list(module.parameters())[-2].mul_(gain)
        x, y = torch.randn(7, 4), torch.randint(3, (7,))
        with pytest.raises(ValueError, match="not those of a symmetric matrix"):
            derivatives.hessian(module, lambda o, t: nn.functional.cross_entropy(Sheared.apply(o), t), x, y)


@pytest.mark.parametrize("gain", [1, 80, 100])
def test_a_way_that_is_wrong_by_a_millionth_is_noticed_where_the_softmax_is_sure_too(gain, monkeypatch):
    """There it differs by less than terms that cancel leave; it is noticed at other points."""
    torch.manual_seed(0)
    module = Beside().double()
    x, y = sure(module, gain, 1)
    products, said = curvature._Curve._products, []
    monkeypatch.setattr(
        curvature._Curve,
        "_products",
        lambda curve, vectors, *, batched: products(curve, vectors, batched=batched) * (1 + 1e-6 * batched),
    )
    monkeypatch.setattr(curvature.log, "warning", lambda text, *_: said.append(text))
    found = derivatives.hessian(module, nn.functional.cross_entropy, x, y)
    assert ["column by column" in text for text in said] == [True]
    # less than the tolerance of numbers of size 1
    assert 1e-6 * found.abs().max() < 1e-12 or gain == 1


@pytest.mark.parametrize("gain", [1, 20, 40])
def test_a_loss_that_mixes_samples_is_computed_as_such_where_the_softmax_is_sure_too(gain):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = sure(module, gain, 3)

    def mixing(o, t):
        return nn.functional.cross_entropy(o + 0.1 * o.mean(0), t)

    alone, expected = (
        by_autograd(module, loss, x, y, list(module.parameters())) for loss in (nn.functional.cross_entropy, mixing)
    )
    room = 1e4 * torch.finfo(x.dtype).eps * gain**2  # as for a sure classifier above
    torch.testing.assert_close(derivatives.hessian(module, mixing, x, y), expected, rtol=0, atol=room)
    assert (alone - expected).abs().max() > 100 * room


@pytest.mark.parametrize("room", [1, 500, 1 << 20])
def test_jacobians_that_are_written_piece_by_piece_are_the_same(room, monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    whole = derivatives.jacobian(module, x)
    touched = []
    monkeypatch.setattr("tsdyn.derivatives.layered._AT_A_TOUCH", room)
    monkeypatch.setattr("tsdyn.memory.touch", lambda piece: touched.append(piece.nbytes))
    pieces = derivatives.jacobian(module, x)
    assert {name: torch.equal(j, whole[name]) for name, j in pieces.items()} == dict.fromkeys(whole, True)
    weights = sum(j.nbytes for name, j in whole.items() if "weight" in name)
    assert sum(touched) == (weights if room < 1000 else 0)


def test_new_memory_is_made_when_it_is_touched_and_numbers_stay():
    large = torch.empty((40 << 20) // 8, dtype=torch.float64)
    piece = large[: (16 << 20) // 8]
    before = memory.resident()
    memory.touch(piece)
    made = memory.resident() - before
    if memory.resident():  # 16 MB at once, where the system can; none where it cannot
        assert made < 1 << 20 or made > 15 << 20
    piece.fill_(3.0)
    memory.touch(piece)
    assert bool((piece == 3.0).all())
    small = torch.ones(8)
    memory.touch(small)  # too small to be new memory
    memory.touch(large.view(2, -1).T)  # nothing that lies together
    assert bool((small == 1).all())


@pytest.mark.parametrize("loss", [nn.functional.l1_loss, lambda f, t: (f - t).abs().mean(), lambda f, t: f.sgn().sum()])
@pytest.mark.parametrize("middle", [nn.Tanh, nn.ReLU])
def test_losses_whose_second_derivative_is_no_number_in_memory(loss, middle):
    """Torch gives the derivative of a sign as a tensor without memory, which no compiled code may read."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), middle(), nn.Linear(5, 3)).double()
    x, y, v = (torch.randn(*shape).double() for shape in ((6, 4), (6, 3), (43,)))
    leaves = list(module.parameters())
    slopes = torch.autograd.grad(loss(module(x), y), leaves, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])
    bent = torch.autograd.grad(flat, leaves, v, allow_unused=True)
    right = torch.cat([torch.zeros(p.numel()) if b is None else b.flatten() for p, b in zip(leaves, bent, strict=True)])
    found = derivatives.hessian_vector_product(module, loss, x, y, v)
    torch.testing.assert_close(found, right.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(derivatives.hessian(module, loss, x, y) @ v, right.double(), rtol=0, atol=1e-12)
    for name, gradient in derivatives.per_sample_gradients(module, loss, x, y).items():
        gradient.add_(0)  # of memory of its own
        assert gradient.shape == (6, *module.get_parameter(name).shape)
