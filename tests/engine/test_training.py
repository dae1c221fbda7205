import functools
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tests.oracles as oracles
from tests.cases import REFERENCE
from tests.comparing import assert_same, assert_same_but_for_rounding, last_digits
from tsdyn import registers
from tsdyn.engine import batched, compiled_step, native, train
from tsdyn.engine.batches import Batches, finite_stream
from tsdyn.engine.ensemble import Ensemble, layer_of, living_blocks, mark_dead
from tsdyn.engine.loss import LOSSES, Loss
from tsdyn.engine.rule import Optimizer, Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.parts import Training
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.running import runner

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
    "adam": Rule(0.01, "adam"),
    "adam with weight decay": Rule(0.01, "adam", weight_decay=0.1),
    "features fixed": Rule(0.05, frozen=(1,)),
    "top fixed": Rule(0.05, frozen=(2,)),
    "all fixed": Rule(0.05, frozen=(1, 2, 3)),
    "normalized": Rule(0.05, normalize=True),
    "normalized momentum, top fixed": Rule(0.02, momentum=0.5, normalize=True, frozen=(3,)),
}


def general(ensemble, stream, rule, *, batch=8):
    """Trained by the general backend, the reference."""
    train_epoch(ensemble, stream, rule, batch=batch, backend=train.GENERAL)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_batched_plain_and_torch_optim_agree(rule, bias):
    widths = (6, 9, 7, 4)
    x, y, indices = samples(widths)
    fast, plain, start = (ensemble(widths, bias=bias) for _ in range(3))
    train_epoch(fast, finite_stream(x, y, indices), rule, batch=8)
    general(plain, finite_stream(x, y, indices), rule)
    # ten steps of sums over at most 9 nodes and 8 samples; Adam divides by small numbers, which amplifies
    tolerance = (1e4 if rule.name == "adam" else 1e2) * EPS
    assert_same(fast.values, plain.values, tolerance)
    for member in range(3):
        batches = [(x[member, rows], y[member, rows]) for rows in indices[member]]
        module = oracles.train(start.network(member), batches, rule)
        expected = Ensemble.of([Network.from_torch(module)])
        assert_same(fast.block(slice(member, member + 1)).values, expected.values, tolerance)


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

    def trained(backend=None, moved=False):
        members = ensemble(widths, name=name, bias=bias)
        if moved:
            last_digits(members.values)
        train_epoch(members, finite_stream(x, y, indices), rule, batch=8, backend=backend)
        return members.values

    plain = trained(train.GENERAL)
    # training that grew to 1e20 within 6 steps overflows in the next, in one order of summation before the other
    assume(all(float(tensor.abs().max()) < 1e20 for tensor in plain.values()))
    assert_same_but_for_rounding(trained(), plain, 1e3 * EPS, lambda: trained(train.GENERAL, moved=True))


OPTIONS = st.fixed_dictionaries(
    {
        "learning_rate": st.sampled_from([0.01, torch.tensor([0.01, 0.02, 0.005], dtype=torch.float64)]),
        "momentum": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "name": st.sampled_from(["sgd", "nesterov", "adam", "adamw"]),
        "epsilon": st.just(0.1),  # Adam divides by √v + ε: a rounding of the gradient grows by at most η/ε a step
        "frozen": st.sets(st.integers(1, 3)).map(lambda layers: tuple(sorted(layers))),
        "normalize": st.booleans(),
        "factors": st.sampled_from([(), (0.5, 2.0, 0.0, 1.0)]),
        "clip": st.sampled_from([None, None, 0.3]),
        "decay_biases": st.booleans(),
        "loss": st.sampled_from(list(LOSSES.values())),
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
    count = 150 if data == "whole" else 40  # three parts of the compiled step, the last of them not full
    x, y, rows = samples(widths, count=count, steps=50, batch=batch)
    if options["loss"].targets == "classes":
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
    no_kernel = mock.patch.object(native, "load", return_value=None)
    for epoch, stream in enumerate(streams, start=1):
        at = Rule(**{**options, "learning_rate": options["learning_rate"] / epoch})  # a table of rates
        if with_kernel:
            train_epoch(fast, stream, at, batch=batch)
        else:
            with no_kernel:
                train_epoch(fast, stream, at, batch=batch)
        general(plain, stream, at)
        dead = {*mark_dead(fast, epoch)}, {*mark_dead(plain, epoch)}
        # 1e300 is no target of a cross entropy: sums overflow in one order and not in another, and the member may live
        chance = {1} if dies and options["loss"].targets == "classes" else set()
        assert dead[0] - chance == dead[1] - chance
    alive = fast.death_epoch < 0
    trained = [layer for layer in range(1, len(widths)) if layer not in options["frozen"]]
    assert alive[::2].all()
    assert alive[1] or (dies and trained)
    alive[1] &= not dies  # one layer alone may bear 1e300, which is no target of a cross entropy
    for name, b in plain.values.items():
        assert_same(fast.values[name][alive], b[alive], 1e-12, scale=float(b[alive].abs().max()), what=name)


def normalized_ensemble(hidden, places, name="tanh", affine=True, bias=True, seed=0):
    """Three members with BatchNorm in some hidden layers: "before" or "after" the activation, None without."""
    draw = torch.Generator().manual_seed(seed)
    plain = ensemble((5, *hidden, 3), name=name, bias=bias, seed=seed)

    def norm(width):
        fresh = BatchNorm.fresh(width, affine=affine, like=torch.zeros((), dtype=torch.float64))
        return fresh.map(lambda t: t + 0.3 * torch.rand(t.shape, generator=draw, dtype=t.dtype))

    members = []
    for i in range(3):
        one = plain.network(i)
        norms = [None if place is None else norm(w) for w, place in zip(hidden, places, strict=True)]
        norm_places = ["before" if place is None else place for place in places]
        members.append(Network(one.weights, one.biases, name, leak=0.1, norms=norms, norm=norm_places))
    return Ensemble.of(members)


@settings(max_examples=15, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 19), st.sampled_from([None, "before", "after"])), min_size=1, max_size=3),
    name=st.sampled_from(activations.NAMES),
    affine=st.booleans(),
    bias=st.booleans(),
    options=OPTIONS,
    batch=st.integers(2, 17),
    data=st.sampled_from(["batches", "whole"]),
)
@example(
    [(9, None), (4, "after"), (10, "after")], "relu", False, True, {"learning_rate": 0.01, "name": "sgd"}, 2, "batches"
)  # nodes that hardly vary
def test_batch_norm_in_compiled_code_equals_the_plain_path(layers, name, affine, bias, options, batch, data):
    """Twenty steps; running statistics follow also in frozen layers.

    BatchNorm of a node that hardly varies in a batch divides by √(variance + eps) ≥ 3e-3, so that a rounding grows by
    up to 300 in each of at most three layers of a step.  Where numbers are farther apart than roundings that do not
    grow, the plain path tells how much they grow here, by one more start from parameters whose last digits are others.
    """
    hidden, places = zip(*layers, strict=True)
    x, y, rows = samples((5, 3), steps=10, batch=batch)
    y = y.softmax(2)
    stream = finite_stream(x, y, rows if data == "batches" else None, steps=10)

    def trained(backend, moved=False):
        members = normalized_ensemble(hidden, places, name, affine, bias)
        if moved:
            last_digits(members.values)
        for epoch in (1, 2):
            rule = Rule(**{**options, "learning_rate": options["learning_rate"] / epoch})
            train_epoch(members, stream, rule, batch=batch, backend=backend)
        return {**members.values, **members.buffers}

    assert_same_but_for_rounding(
        trained(None), trained(train.GENERAL), 1e-11, lambda: trained(train.GENERAL, moved=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", activations.NAMES)
def test_compiled_steps_of_both_types_follow_the_plain_path(name, dtype):
    widths = (6, 9, 7, 4)
    x, y, rows = samples(widths)
    for loss in LOSSES.values():
        fast, plain = (ensemble(widths, name=name).to(dtype) for _ in range(2))
        stream = finite_stream(x.to(dtype), y.softmax(2).to(dtype), rows)
        train_epoch(fast, stream, Rule(0.05, momentum=0.9, loss=loss), batch=8)
        general(plain, stream, Rule(0.05, momentum=0.9, loss=loss))
        assert fast.weights[0].dtype == dtype
        assert_same(fast.values, plain.values, 1e3 * torch.finfo(dtype).eps)


needs_compiler = pytest.mark.skipif(native.load(compiled_step.SOURCE, compiled_step.Job) is None, reason="no compiler")


@needs_compiler
def test_one_sample_per_batch_has_no_variance():
    x, y, rows = samples((5, 3), steps=1, batch=1)
    with pytest.raises(ValueError, match="a batch must hold two samples or more"):
        train_epoch(normalized_ensemble((4,), ("before",)), finite_stream(x, y, rows), Rule(0.1), batch=1)


@needs_compiler
@pytest.mark.parametrize("part", ["activation", "loss", "optimizer", "none"])
def test_a_part_of_the_users_own_is_trained_batched_and_the_log_says_so(part, caplog):
    train._say_once.cache_clear()
    sine = Activation("sine", torch.sin, torch.cos, torch.nn.Identity)
    quartic = Loss("quartic", lambda f, y: (y - f).pow(4).sum(1).mean(), "E |f* - f|^4")
    sign = Optimizer("sign", (), lambda rule, p, g, moments, rates, step: p.addcmul_(g.sign(), rates, value=-1))
    registers.ACTIVATIONS.add("sine", sine)
    registers.OPTIMIZERS.add("sign", sign)
    try:
        widths = (6, 9, 4)
        members = ensemble(widths, name="sine" if part == "activation" else "tanh")
        rule = Rule(0.05, "sign" if part == "optimizer" else "sgd", loss=quartic if part == "loss" else LOSSES["mse"])
        for _ in range(2):
            chosen = train.chosen(members, rule)
    finally:
        registers.ACTIVATIONS.remove("sine")
        registers.OPTIMIZERS.remove("sign")
    assert (chosen is train.COMPILED) == (part == "none")
    said = [record.getMessage() for record in caplog.records if "not tsdyn's own" in record.getMessage()]
    assert len(said) == (part != "none")
    assert all(part in each and chosen.name in each for each in said)


def trained(chosen, dtype, threads=1, name="relu"):
    """Train some of seven members."""
    widths, members = (20, 30, 11, 10), 7
    x, y, rows = samples(widths, members, steps=30)
    part = Ensemble.of([ensemble(widths, members, name).network(i).to(dtype) for i in chosen])
    stream = finite_stream(x[chosen].to(dtype), y[chosen].to(dtype), rows[chosen])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train_epoch(part, stream, Rule(0.02, momentum=0.9), batch=8)
    finally:
        torch.set_num_threads(before)
    return list(part.values.values())


@pytest.mark.skipif(native.load(compiled_step.SOURCE, compiled_step.Job) is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_the_kernels_bits_depend_neither_on_neighbours_nor_on_threads(dtype, name):
    every = list(range(7))
    whole = trained(every, dtype, name=name)
    for chosen, threads in ([3], 1), ([6, 3, 0], 1), (every, 2):
        for mine, theirs in zip(trained(chosen, dtype, threads, name), whole, strict=True):
            assert torch.equal(mine, theirs[chosen])


@pytest.mark.parametrize("load", [native.load, lambda *_: None], ids=["compiled", "torch"])
def test_reruns_are_bit_identical(load):
    with mock.patch.object(native, "load", load):
        once, again = (trained(list(range(7)), torch.float64) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_chunks_are_the_same_steps(rule):
    """The steps of a GPU, on the CPU: 45 steps in chunks of 20, 20 and 5, reused in an epoch with another rate."""
    widths = (6, 9, 7, 4)
    x, y, rows = samples(widths, steps=45)
    chunked, plain = (ensemble(widths) for _ in range(2))
    for divisor in (1, 2):
        at = Rule(**{**vars(rule), "learning_rate": rule.learning_rate / divisor})
        for members, backend in (chunked, train.CHUNKS), (plain, train.BATCHED):
            train_epoch(members, finite_stream(x, y, rows), at, batch=8, backend=backend)
    assert len(chunked.kept) == 2
    assert_same(chunked.values, plain.values, 1e2 * EPS)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("whole", [True, False])
def test_no_step_asks_the_host(rule, whole):
    """On the meta device reading a value raises an error, and so does a tensor of another device."""
    widths = (6, 9, 7, 4)
    x, y, rows = (t.to("meta") for t in samples(widths, steps=45))
    members = ensemble(widths).to("meta")
    train_epoch(members, finite_stream(x, y, None if whole else rows, steps=45), rule, batch=8)
    assert members.steps == 45


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_gpu_takes_the_same_steps(rule):
    widths = (6, 9, 7, 4)
    x, y, rows = samples(widths, steps=45)
    here, there, again = ensemble(widths), ensemble(widths).to("cuda"), ensemble(widths).to("cuda")
    train_epoch(here, finite_stream(x, y, rows), rule, batch=8)
    for members in (there, again):
        train_epoch(members, finite_stream(x.cuda(), y.cuda(), rows), rule, batch=8)
    assert all(map(torch.equal, there.values.values(), again.values.values()))
    assert_same(there.values, here.values, (1e4 if rule.name == "adam" else 1e2) * EPS)


def test_float32():
    widths = (6, 9, 4)
    x, y, indices = (t.float() if t.is_floating_point() else t for t in samples(widths))
    fast, plain = (ensemble(widths).to(torch.float32) for _ in range(2))
    train_epoch(fast, finite_stream(x, y, indices), RULES["sgd"], batch=8)
    general(plain, finite_stream(x, y, indices), RULES["sgd"])
    assert fast.weights[0].dtype == torch.float32
    assert_same(fast.values, plain.values, 1e2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("count", [40, 150])
def test_gradient_descent_uses_every_sample(count):
    widths = (6, 9, 4)
    x, y, _ = samples(widths, count=count)
    fast = ensemble(widths)
    module = oracles.train(fast.network(0), [(x[0], y[0])] * 3, RULES["sgd"])
    train_epoch(fast, finite_stream(x, y, None, steps=3), RULES["sgd"], batch=count)
    torch.testing.assert_close(fast.weights[0][0], module[0].weight.detach(), rtol=0, atol=1e2 * EPS)


def test_batch_norm_sees_every_sample_of_gradient_descent():
    fast, plain = (normalized_ensemble([7, 6], ["before", "after"]) for _ in range(2))
    x, y, _ = samples((5, 7, 6, 3), count=150)
    train_epoch(fast, finite_stream(x, y, None, steps=5), RULES["sgd"], batch=150)
    general(plain, finite_stream(x, y, None, steps=5), RULES["sgd"], batch=150)
    for held in ("values", "buffers"):
        assert_same(getattr(fast, held), getattr(plain, held), 1e3 * EPS)


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
    assert mark_dead(poisoned, 1) == [1]
    assert mark_dead(poisoned, 1) == []
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
    assert batched.block_size(ensemble((100, 10, 50)), 16) > batched.block_size(ensemble((100, 100, 50)), 16) >= 1
    assert batched.block_size(ensemble((2000, 500, 5)), 16) == 1


def test_members_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="members must have the same tensors"):
        Ensemble.of([Network([torch.ones(2, 2)], [torch.ones(2)]), Network([torch.ones(2, 2)])])


def test_learning_rate_table():
    training = Training(learning_rate={"0": 0.2, "20": 0.1})
    assert [training.rate(e) for e in (1, 20, 21, 99)] == [0.2, 0.2, 0.1, 0.1]


def test_replays_the_released_code():
    """From the same start and batches the weights are the same, to the rounding of 1000 steps (seen: 6e-16)."""
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
        general(plain, stream, Rule(0.01))
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


# --- rules and claims ----------------------------------------------------------------------------------------


@pytest.fixture
def sign():
    """An optimizer of this process: p ← p − η sign ∇."""

    def update(rule, parameter, gradient, moments, rates, step):
        parameter.addcmul_(gradient.sign(), rates, value=-1)

    registers.OPTIMIZERS.add("sign", Optimizer("sign", (), update))
    yield "sign"
    registers.OPTIMIZERS.remove("sign")


def test_a_rule_that_is_written_anew_is_never_silently_sgd(sign):
    """No fast backend claims it; the general one takes the steps as they are written."""
    rule, widths = Rule(0.01, sign), (6, 9, 4)
    x, y, rows = samples(widths)
    mine, start = ensemble(widths), ensemble(widths)
    assert train.chosen(mine, rule) is train.GENERAL
    train_epoch(mine, finite_stream(x, y, rows), rule, batch=8)
    for member in range(3):
        values = {n: t[member].clone().requires_grad_() for n, t in start.values.items()}
        for chosen in rows[member]:
            f = torch.relu(x[member, chosen] @ values["weight_1"].T + values["bias_1"])
            f = f @ values["weight_2"].T + values["bias_2"]
            loss = 0.5 * (y[member, chosen] - f).square().sum(1).mean()
            slopes = torch.autograd.grad(loss, list(values.values()))
            with torch.no_grad():
                for value, slope in zip(values.values(), slopes, strict=True):
                    value -= 0.01 * slope.sign()
        assert_same({n: t[member] for n, t in mine.values.items()}, values, 1e2 * EPS)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"'adagrad' is no optimizer; there are sgd, adam"):
        Rule(0.1, "adagrad")


def test_backends_serve_what_they_name(monkeypatch):
    members, smooth = ensemble((3, 4, 2)), ensemble((3, 4, 2), name="tanh")
    compiled = native.load(compiled_step.SOURCE, compiled_step.Job) is not None
    for rule in Rule(0.1), Rule(0.1, loss=LOSSES["cross_entropy"]), Rule(0.1, "adamw"):
        assert train.chosen(smooth, rule) is (train.COMPILED if compiled else train.BATCHED)
    huber = type(LOSSES["mse"])("huber", lambda f, y: torch.nn.functional.huber_loss(f, y), "Huber's")
    assert train.chosen(members, Rule(0.1, loss=huber)) is train.GENERAL
    monkeypatch.setattr(native, "load", lambda *_: None)
    assert train.chosen(members, Rule(0.1)) is train.BATCHED


def test_moments_of_a_state_keep_their_names():
    members = ensemble((3, 4, 2))
    members.prepare(Rule(0.1, "adam").optimizer.moments)
    assert list(members.state()) == [
        *(names := ["weight_1", "bias_1", "weight_2", "bias_2"]),
        *(f"first_{n}" for n in names), *(f"second_{n}" for n in names), "death_epoch", "steps",
    ]  # fmt: skip
    assert [layer_of(n) for n in names] == [1, 1, 2, 2]
