import functools
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.oracles as oracles
from tests.cases import REFERENCE
from tests.comparing import assert_close
from tsdyn import activations, kernel, runner, training
from tsdyn.experiment import Training
from tsdyn.networks import Network
from tsdyn.training import (
    Batches,
    Ensemble,
    Rule,
    block_size,
    bury,
    finite_stream,
    living_blocks,
    train_epoch,
    train_epoch_plain,
)

EPS = torch.finfo(torch.float64).eps


def ensemble(widths, members=3, name="relu", bias=True, seed=0, leak=0.1):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return Ensemble.of(
        [
            Network(
                [normal(n, below) / below**0.5 for below, n in itertools.pairwise(widths)],
                [0.1 * normal(n) for n in widths[1:]] if bias else None,
                name,
                leak=leak,
            )
            for _ in range(members)
        ]
    )


def samples(widths, members=3, count=40, steps=10, batch=8, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(members, count, widths[0], generator=draw, dtype=torch.float64)
    y = torch.randn(members, count, widths[-1], generator=draw, dtype=torch.float64)
    return x, y, torch.randint(0, count, (members, steps, batch), generator=draw)


RULES = {
    "sgd": Rule(0.05),
    "weight decay": Rule(0.05, weight_decay=0.1),
    "momentum": Rule(0.02, momentum=0.9, weight_decay=0.01),
    "adam": Rule(0.01, adam=True),
    "adam with weight decay": Rule(0.01, adam=True, weight_decay=0.1),
    "features fixed": Rule(0.05, frozen=(1,)),
    "top fixed": Rule(0.05, frozen=(2,)),
    "all fixed": Rule(0.05, frozen=(1, 2, 3)),
    "normalized": Rule(0.05, normalize=True),
    "normalized momentum, top fixed": Rule(0.02, momentum=0.5, normalize=True, frozen=(3,)),
}


def assert_same(mine, theirs, tolerance):
    for (kind, layer, a), (_, _, b) in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b, tolerance, what=(kind, layer), floor=1.0)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_batched_plain_and_torch_optim_agree(rule, bias):
    widths = (6, 9, 7, 4)
    x, y, indices = samples(widths)
    fast, plain, start = (ensemble(widths, bias=bias) for _ in range(3))
    train_epoch(fast, finite_stream(x, y, indices), rule, batch=8)
    train_epoch_plain(plain, finite_stream(x, y, indices), rule)
    # ten steps of sums over at most 9 nodes and 8 samples; Adam divides by small numbers, which amplifies
    tolerance = (1e4 if rule.adam else 1e2) * EPS
    assert_same(fast, plain, tolerance)
    for member in range(3):
        batches = [(x[member, rows], y[member, rows]) for rows in indices[member]]
        module = oracles.train(start.network(member), batches, rule)
        expected = Ensemble.of([Network.from_torch(module)])
        for tensor in (*expected.weights, *(b for b in expected.biases if b is not None)):
            tensor.detach_()
        mine = fast.block(slice(member, member + 1))
        assert_same(mine, expected, tolerance)


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
    rule=st.sampled_from([RULES["sgd"], RULES["momentum"], RULES["weight decay"]]),
)
def test_batched_equals_plain_for_any_depth_and_activation(hidden, name, bias, rule):
    widths = (5, *hidden, 3)
    x, y, indices = samples(widths, steps=6)
    fast, plain = (ensemble(widths, name=name, bias=bias) for _ in range(2))
    train_epoch(fast, finite_stream(x, y, indices), rule, batch=8)
    train_epoch_plain(plain, finite_stream(x, y, indices), rule)
    assert_same(fast, plain, 1e3 * EPS)


OPTIONS = st.fixed_dictionaries(
    {
        "learning_rate": st.sampled_from([0.01, torch.tensor([0.01, 0.02, 0.005], dtype=torch.float64)]),
        "momentum": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "adam": st.booleans(),
        "epsilon": st.just(0.1),  # Adam divides by √v + ε: a rounding of the gradient grows by at most η/ε a step
        "frozen": st.sets(st.integers(1, 3)).map(lambda layers: tuple(sorted(layers))),
        "normalize": st.booleans(),
        "loss": st.sampled_from(["mse", "cross_entropy"]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 19), min_size=0, max_size=3),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
    options=OPTIONS,
    batch=st.integers(1, 17),
    data=st.sampled_from(["batches", "whole", "fresh"]),
    dies=st.booleans(),
    with_kernel=st.booleans(),
)
def test_the_engine_equals_the_plain_path_after_100_steps_whatever_the_options(
    hidden, name, bias, options, batch, data, dies, with_kernel
):
    widths = (5, *hidden, 3)
    x, y, rows = samples(widths, steps=50, batch=batch)
    if options["loss"] == "cross_entropy":
        y = y.softmax(2)
    poisoned = y.clone()
    poisoned[1] = 1e300
    held, streams = {"batches": rows, "whole": None, "fresh": None}[data], []
    for targets in (poisoned if dies else y, y):

        def fresh(members, targets=targets):  # in two pieces, as a long epoch of fresh samples comes
            for piece in rows[members].split(25, dim=1):
                pairs = zip(range(3)[members], piece, strict=True)
                own = [(x[m][r.flatten()], targets[m][r.flatten()]) for m, r in pairs]
                order = torch.arange(25 * batch).view(1, 25, batch).expand(len(own), -1, -1)
                yield Batches(torch.stack([a for a, _ in own]), torch.stack([b for _, b in own]), order, 25)

        streams.append(fresh if data == "fresh" else finite_stream(x, targets, held, steps=50))
    fast, plain = (ensemble(widths, name=name, bias=bias) for _ in range(2))
    no_kernel = mock.patch.object(kernel, "load", return_value=None)
    for epoch, stream in enumerate(streams, start=1):
        at = Rule(**{**options, "learning_rate": options["learning_rate"] / epoch})  # a table of rates
        if with_kernel:
            train_epoch(fast, stream, at, batch=batch)
        else:
            with no_kernel:
                train_epoch(fast, stream, at, batch=batch)
        train_epoch_plain(plain, stream, at)
        assert bury(fast, epoch) == bury(plain, epoch)
    alive = fast.death_epoch < 0
    trained = [layer for layer in range(1, len(widths)) if layer not in options["frozen"]]
    assert alive[::2].all()
    assert alive[1] or (dies and trained)
    alive[1] &= not dies  # one layer alone may bear 1e300, which is no target of a cross entropy
    for (kind, layer, a), (_, _, b) in zip(fast.parameters(), plain.parameters(), strict=True):
        assert float((a - b)[alive].abs().max()) <= 1e-12 * float(b[alive].abs().max()), (kind, layer)


def trained(chosen, dtype, threads=1):
    """Some of seven members."""
    widths, members = (20, 30, 11, 10), 7
    x, y, rows = samples(widths, members, steps=30)
    part = Ensemble.of([ensemble(widths, members).network(i).to(dtype) for i in chosen])
    stream = finite_stream(x[chosen].to(dtype), y[chosen].to(dtype), rows[chosen])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train_epoch(part, stream, Rule(0.02, momentum=0.9), batch=8)
    finally:
        torch.set_num_threads(before)
    return [p for _, _, p in part.parameters()]


@pytest.mark.skipif(kernel.load() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_bits_depend_neither_on_neighbours_nor_on_threads(dtype):
    every = list(range(7))
    whole = trained(every, dtype)
    for chosen, threads in ([3], 1), ([6, 3, 0], 1), (every, 2):
        for mine, theirs in zip(trained(chosen, dtype, threads), whole, strict=True):
            assert torch.equal(mine, theirs[chosen])


@pytest.mark.parametrize("load", [kernel.load, lambda *_: None], ids=["kernel", "torch"])
def test_reruns_are_bit_identical(load):
    with mock.patch.object(kernel, "load", load):
        once, again = (trained(list(range(7)), torch.float64) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_chunks_are_the_same_steps(rule):
    """What a GPU runs, here without one: 45 steps in chunks of 20, 20 and 5, kept for an epoch of another rate."""
    widths = (6, 9, 7, 4)
    x, y, rows = samples(widths, steps=45)
    chunked, batched = (ensemble(widths) for _ in range(2))
    for divisor in (1, 2):
        at = Rule(**{**vars(rule), "learning_rate": rule.learning_rate / divisor})
        for members, advance in (chunked, training._advance_chunks), (batched, training._advance_batched):
            training._epoch(members, finite_stream(x, y, rows), at, 3, advance)
    assert len(chunked.chunks) == 2
    assert_same(chunked, batched, 1e2 * EPS)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("whole", [True, False])
def test_no_step_asks_the_host(rule, whole):
    """On the meta device there is nothing to ask: a value that is read raises, and so does a tensor from elsewhere."""
    widths = (6, 9, 7, 4)
    x, y, rows = (t.to("meta") for t in samples(widths, steps=45))
    members = ensemble(widths)
    members.weights = [w.to("meta") for w in members.weights]
    members.biases = [b.to("meta") for b in members.biases]
    train_epoch(members, finite_stream(x, y, None if whole else rows, steps=45), rule, batch=8)
    assert members.steps == 45


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_gpu_takes_the_same_steps(rule):
    widths = (6, 9, 7, 4)
    x, y, rows = samples(widths, steps=45)
    here, there, again = ensemble(widths), ensemble(widths), ensemble(widths)
    train_epoch(here, finite_stream(x, y, rows), rule, batch=8)
    for members in (there, again):
        members.weights = [w.cuda() for w in members.weights]
        members.biases = [b.cuda() for b in members.biases]
        train_epoch(members, finite_stream(x.cuda(), y.cuda(), rows), rule, batch=8)
    for (_, _, a), (_, _, b) in zip(there.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    there.weights = [w.cpu() for w in there.weights]
    there.biases = [b.cpu() for b in there.biases]
    assert_same(there, here, (1e4 if rule.adam else 1e2) * EPS)


def test_float32():
    widths = (6, 9, 4)
    x, y, indices = (t.float() if t.is_floating_point() else t for t in samples(widths))
    fast = ensemble(widths)
    plain = ensemble(widths)
    for e in (fast, plain):
        e.weights = [w.float() for w in e.weights]
        e.biases = [b.float() for b in e.biases]
    train_epoch(fast, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    train_epoch_plain(plain, finite_stream(x, y, indices), RULES["sgd"])
    assert fast.weights[0].dtype == torch.float32
    assert_same(fast, plain, 1e2 * torch.finfo(torch.float32).eps)


def test_gradient_descent_uses_every_sample():
    widths = (6, 9, 4)
    x, y, _ = samples(widths)
    fast = ensemble(widths)
    module = oracles.train(fast.network(0), [(x[0], y[0])] * 3, RULES["sgd"])
    train_epoch(fast, finite_stream(x, y, None, steps=3), RULES["sgd"], batch=40)
    torch.testing.assert_close(fast.weights[0][0], module[0].weight.detach(), rtol=0, atol=1e2 * EPS)


def test_a_dying_member_does_not_touch_the_others():
    widths = (6, 9, 4)
    x, y, indices = samples(widths)
    alone = ensemble(widths)
    train_epoch(alone, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    train_epoch(alone, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    poisoned = ensemble(widths)
    y = y.clone()
    y[1] = 1e300
    train_epoch(poisoned, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    assert bury(poisoned, 1) == [1]
    assert bury(poisoned, 1) == []
    train_epoch(poisoned, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    assert poisoned.death_epoch.tolist() == [-1, 1, -1]
    assert bool(torch.isnan(poisoned.weights[0][1]).all())
    for member in (0, 2):
        torch.testing.assert_close(poisoned.weights[0][member], alone.weights[0][member], rtol=0, atol=1e2 * EPS)


def test_living_blocks_cover_the_living_once_and_are_neighbours():
    death = torch.tensor([-1, -1, 3, -1, -1, -1, -1, 5])
    blocks = living_blocks(death, 2)
    covered = [i for b in blocks for i in range(b.start, b.stop)]
    assert covered == [0, 1, 3, 4, 5, 6]
    assert all(b.stop - b.start <= 2 for b in blocks)
    assert living_blocks(torch.tensor([1, 1]), 4) == []


def test_block_size_falls_with_the_parameters_and_is_at_least_one():
    assert block_size(ensemble((100, 10, 50)), 16) > block_size(ensemble((100, 100, 50)), 16) >= 1
    assert block_size(ensemble((2000, 500, 5)), 16) == 1


def test_members_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="an ensemble is of one shape"):
        Ensemble.of([Network([torch.ones(2, 2)], [torch.ones(2)]), Network([torch.ones(2, 2)])])


def test_learning_rate_table():
    training = Training(learning_rate={"0": 0.2, "20": 0.1})
    assert [training.rate(e) for e in (1, 20, 21, 99)] == [0.2, 0.2, 0.1, 0.1]


def test_replays_the_released_code():
    """Same start, same batches: the same weights, to the rounding of 1000 steps (seen: 6e-16)."""
    with np.load(REFERENCE / "luckmatters_two_layer.npz", allow_pickle=False) as z:
        data = {k: z[k] for k in z.files if k not in ("config",)}

    def network(first, second):  # the released code keeps (input, node) with the bias as last row
        return Network([first[:-1].T.copy(), second[:-1].T.copy()], [first[-1], second[-1]])

    teacher = network(data["W1_t"], data["W2_t"])
    student = Ensemble.of([network(data["e0_W1_s"], data["e0_W2_s"])])
    x = torch.from_numpy(data["X_train"])
    indices = torch.from_numpy(data["sel"].astype(np.int64)).view(2, 1, 500, 16)
    plain = Ensemble.of([student.network(0)])
    for epoch in (1, 2):
        stream = finite_stream(x[None], teacher(x)[None], indices[epoch - 1])
        train_epoch(student, stream, Rule(0.01), batch=16)
        train_epoch_plain(plain, stream, Rule(0.01))
        for members in (student, plain):
            for layer, expected in enumerate((data[f"e{epoch}_W1_s"], data[f"e{epoch}_W2_s"])):
                scale = np.abs(expected).max()
                assert np.abs(members.weights[layer][0].numpy() - expected[:-1].T).max() <= 1e-12 * scale
                assert np.abs(members.biases[layer][0].numpy() - expected[-1]).max() <= 1e-12 * scale


@pytest.mark.parametrize(("asked", "allowed"), [(None, False), ("on", True)])
def test_tf32_is_off_unless_asked(monkeypatch, request, asked, allowed):
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    for switch in switches:  # monkeypatch cannot undo what these make up in __getattr__
        request.addfinalizer(functools.partial(setattr, switch, "allow_tf32", switch.allow_tf32))
        switch.allow_tf32 = True
    if asked is not None:
        monkeypatch.setenv("TSDYN_TF32", asked)
    runner._exact_products("cuda")
    assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
    runner._exact_products("cpu")
    assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
