"""The compiled step of relu ConvNets agrees with the batched one, and depends on the member's own numbers alone."""

import dataclasses
import itertools

import pytest
import torch

from tsdyn.engine import compiled_convnet, native, propagated
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.loss import LOSSES, Loss
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network

pytestmark = pytest.mark.skipif(
    native.missing(compiled_convnet.SOURCE, compiled_convnet.Job) is not None, reason="there is no C++ compiler"
)
MEMBERS, SAMPLES = 3, 7
OWN = Loss("quartic", lambda output, target: (output - target).pow(4).sum(1).mean(), "E |f - f*|^4")
#: Of two convolutions and, where there is one, a hidden linear layer.
NORMS = {"none": "---", "before": "bbb", "after": "aaa", "mixed": "a-b", "plain": "Ab-"}


def ensemble(dtype, *, padding=0, bias=True, depth=0, norms="---", kernel=(3, 3), members=MEMBERS):
    """ConvNets on images (2, 8, 9): a channel more than a tile holds, and `depth` hidden linear layers."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    rows, columns = (n + 4 * padding - 2 * (k - 1) for n, k in zip((8, 9), kernel, strict=True))
    shapes = [(9, 2, *kernel), (3, 9, *kernel), *[(6, 3 * rows * columns), *[(6, 6)] * depth]]

    def norm(mark, nodes):
        if mark == "-":
            return None
        affine = [1 + normal(nodes) / 4, normal(nodes) / 4] if mark != "A" else [None, None]
        return BatchNorm(normal(nodes), normal(nodes).square() + 1, *affine)

    hidden = [norm(mark, shape[0]) for mark, shape in zip(norms, shapes[:-1], strict=False)]
    made = [
        Network(
            [normal(*shape) / shape[1:].numel() ** 0.5 for shape in map(torch.Size, shapes)],
            [normal(shape[0]) / 4 for shape in shapes] if bias else None,
            norms=hidden + [None] * (len(shapes) - 1 - len(hidden)),
            norm=["before" if mark == "b" else "after" for mark in (norms + "-" * depth)[: len(shapes) - 1]],
            image=(2, 8, 9),
            padding=padding,
        )
        for _ in range(MEMBERS)
    ]
    return Ensemble.of([n.to(dtype) for n in made[:members]])


def batch(samples=SAMPLES, seed=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(MEMBERS, samples, 2 * 8 * 9, generator=draw, dtype=torch.float64)
    return x.to(dtype), torch.randn(MEMBERS, samples, 6, generator=draw, dtype=torch.float64).softmax(2).to(dtype)


def gradients(of, x, y, loss=LOSSES["mse"], frozen=()):
    with torch.no_grad():
        found = compiled_convnet.Step.of(of, x.shape[1], frozen)(x, y, loss)
    return {name: tensor.clone() for name, tensor in found.items()}


def agree(own, x, y, loss=LOSSES["mse"], frozen=()):
    """Gradients and running statistics are those of the batched step in float64."""
    plain = own.to(torch.float64)
    before = {name: value.clone() for name, value in plain.values.items()}
    found = gradients(own, x, y, loss, frozen)
    # a step at rate 1 is the gradient
    with torch.no_grad():
        propagated.step(plain, x.double(), y.double(), Rule(1.0, loss=loss, frozen=frozen), 1)
    expected = {name: before[name] - plain.values[name] for name in found}
    # all gradients are sums of at most so many products, of a size that the largest gradient stands for
    terms = max(own.weights[-1].shape[2], 9 * x.shape[1] * 8 * 9)
    room = terms * torch.finfo(x.dtype).eps
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name].double(), g, rtol=0, atol=room * max(largest, 1.0), msg=name)
    for name, value in plain.buffers.items():
        torch.testing.assert_close(own.buffers[name].double(), value, rtol=room, atol=room, msg=name)
    assert {*found} == {n for n in own.values if compiled_convnet.layer_of(n) not in frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
@pytest.mark.parametrize(
    ("bias", "depth", "frozen"), [(True, 0, ()), (False, 2, (1,)), (True, 1, (2, 3)), (True, 0, (1, 2))]
)
def test_it_agrees_with_the_batched_step(dtype, padding, norms, bias, depth, frozen):
    own = ensemble(dtype, padding=padding, bias=bias, depth=depth, norms=norms)
    assert compiled_convnet.claims(own)
    agree(own, *batch(dtype=dtype), frozen=frozen)


@pytest.mark.parametrize("loss", [*LOSSES.values(), OWN], ids=lambda loss: loss.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_with_every_loss(loss, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agree(ensemble(torch.float64, norms="aa"), *batch(), loss=loss)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("samples", [2, 8, 16, 33, 64])
@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), 0), ((2, 4), 1), ((2, 4), 3), ((1, 1), 1), ((8, 9), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_every_kernel_and_batch(samples, kernel, padding, dtype):
    """Runs shorter than a vector, of whole vectors and with a rest; kernels narrower than the frame of zeros."""
    agree(ensemble(dtype, padding=padding, norms="b-", kernel=kernel), *batch(samples, dtype=dtype))


def test_statistics_follow_the_batches_of_frozen_layers():
    own, other = (ensemble(torch.float64, norms="ab") for _ in range(2))
    assert gradients(own, *batch(), frozen=(1, 2, 3)) == {}
    gradients(other, *batch())
    assert all(torch.equal(value, other.buffers[name]) for name, value in own.buffers.items())


@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
@pytest.mark.parametrize("loss", [LOSSES["cross_entropy"], OWN], ids=lambda loss: loss.name)
def test_a_member_has_the_same_bits_alone(norms, loss):
    """In whatever company and on however many threads."""
    x, y = batch()
    together = gradients(ensemble(torch.float32, norms=norms, depth=1), x.float(), y.float(), loss)
    whole = ensemble(torch.float32, norms=norms, depth=1)
    before = torch.get_num_threads()
    for threads, member in itertools.product([1, 2], range(MEMBERS)):
        torch.set_num_threads(threads)
        try:
            rows = slice(member, min(member + threads, MEMBERS))
            alone = gradients(whole.block(rows), x[rows].float(), y[rows].float(), loss)
        finally:
            torch.set_num_threads(before)
        for name, g in alone.items():
            assert torch.equal(g, together[name][rows]), name


@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
@pytest.mark.parametrize("samples", [SAMPLES, 16])
def test_memory_that_held_other_numbers_changes_no_bits(norms, samples):
    """A step after steps with other batches, one of them with NaN, has the bits of a first step."""
    x, y = batch(samples)
    fresh = gradients(ensemble(torch.float64, norms=norms, padding=1, depth=1), x, y)
    used = ensemble(torch.float64, norms=norms, padding=1, depth=1)
    other, target = batch(samples, seed=2)
    gradients(used, other, target)
    gradients(used, torch.full_like(other, torch.nan), target)
    for name, g in gradients(used, x, y).items():
        assert torch.equal(g, fresh[name]), name


def test_nan_stays_nan():
    x, y = batch()
    x[1, 3, 5] = torch.nan
    found = gradients(ensemble(torch.float64), x, y)
    assert found["weight_3"][1].isnan().any()
    assert all(g[[0, 2]].isfinite().all() for g in found.values())


@pytest.mark.parametrize("method", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_an_epoch_in_two_has_the_bits_of_one_and_agrees_with_the_batched_steps(method, monkeypatch):
    """Over blocks of any size; the training of the engine comes here by itself."""
    draw = torch.Generator().manual_seed(3)
    x, y = batch(40)
    rows = torch.randint(0, 40, (MEMBERS, 6, 16), generator=draw)
    momentum = 0.9 if method in ("momentum", "nesterov") else 0.0
    # the gradient of a bias below BatchNorm is zero but for rounding, which Adam would divide by its epsilon
    rule = Rule(0.01, method, momentum=momentum, weight_decay=0.1, epsilon=1e-3)
    whole, halves, single, plain = (ensemble(torch.float64, norms="ab") for _ in range(4))
    train_epoch(whole, finite_stream(x, y, rows), rule, batch=16)
    for half in (rows[:, :3], rows[:, 3:]):
        train_epoch(halves, finite_stream(x, y, half), rule, batch=16)
    monkeypatch.setattr(propagated, "BLOCK_BYTES", 1)
    train_epoch(single, finite_stream(x, y, rows), rule, batch=16)
    for other in (halves, single):
        assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), other.tensors(), strict=True))
    monkeypatch.setattr(compiled_convnet, "claims", lambda ensemble: False)
    train_epoch(plain, finite_stream(x, y, rows), rule, batch=16)
    for a, b in zip(whole.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_it_does_not_claim():
    """Other activations, strides, BatchNorm that averages over all batches, and numbers that are elsewhere."""
    assert compiled_convnet.claims(ensemble(torch.float64, norms="aa"))
    own = ensemble(torch.float64).network(0)
    smooth = Network(own.weights, own.biases, "tanh", image=(2, 8, 9))
    strided = Network([own.weights[0], torch.ones(6, 9 * 3 * 4).double()], image=(2, 8, 9), stride=2)
    assert not any(compiled_convnet.claims(Ensemble.of([other])) for other in (smooth, strided))
    averaged = ensemble(torch.float64, norms="aa").network(0)
    norms = [dataclasses.replace(averaged.norms[0], momentum=None), averaged.norms[1]]
    averaged = Network(averaged.weights, averaged.biases, norms=norms, image=(2, 8, 9))
    assert not compiled_convnet.claims(Ensemble.of([averaged]))
    half = ensemble(torch.float64).to(torch.bfloat16)
    assert not compiled_convnet.claims(half)


def test_one_value_per_node_is_refused():
    own = ensemble(torch.float64, depth=1, norms="--a")
    x, y = batch(1)
    assert compiled_convnet.claims(own)
    with pytest.raises(ValueError, match="one value per node"):
        gradients(own, x, y)


@pytest.mark.parametrize("change", [lambda x, y: (x[:2], y), lambda x, y: (x, y[..., 1:]), lambda x, y: (x.float(), y)])
def test_batches_of_another_shape_or_dtype_are_refused(change):
    with pytest.raises(ValueError, match="these members take"):
        gradients(ensemble(torch.float64), *change(*batch()))
