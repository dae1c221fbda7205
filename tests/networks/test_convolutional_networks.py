import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tests.comparing import assert_same
from tests.networks.test_networks import random_network
from tsdyn import ExperimentError, flow, population, theory
from tsdyn.archive import reading
from tsdyn.engine import train
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble, mark_dead
from tsdyn.engine.loss import LOSSES
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.problem.students import draw_student, winners
from tsdyn.problem.teachers import balance, draw_teacher, fanouts, prune
from tsdyn.theory import alignments

IMAGE = (2, 8, 8)


def module(place="before", *, affine=True, channels=(5, 4), eps=1e-5, seed=0):
    """Two 3x3 convolutions with BatchNorm and a linear layer, statistics off 0 and 1."""
    torch.manual_seed(seed)
    parts, below = [], 2
    for n in channels:
        norm, gate = nn.BatchNorm2d(n, affine=affine, eps=eps), nn.LeakyReLU(0.1)
        parts += [nn.Conv2d(below, n, 3), *((norm, gate) if place == "before" else (gate, norm))]
        below = n
    made = nn.Sequential(*parts, nn.Flatten(), nn.Linear(below * 16, 3)).double()
    for norm in (p for p in made if isinstance(p, nn.BatchNorm2d) and affine):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    made(images(20, seed=9))
    return made


def images(samples, seed=1):
    return torch.randn(samples, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_deep_network_is_its_torch_module_and_its_folded_matrix(place, affine):
    theirs = module(place, affine=affine).eval()
    mine, x = Network.from_torch(theirs, image=IMAGE), images(7)
    assert mine.widths == (128, 5, 4, 3)
    assert mine.images == [(5, 6, 6), (4, 4, 4), None]
    for found in (mine(x.flatten(1)), mine.to_torch()(x), mine.folded()(x.flatten(1))):
        close(found, theirs(x))
    # training mode: the batch normalises, and the running statistics move as torch's do
    again = Network.from_torch(module(place, affine=affine), image=IMAGE)
    twin = module(place, affine=affine).train()
    close(again(x.flatten(1), training=True), twin(x))
    for norm, part in zip(again.norms, (p for p in twin if isinstance(p, nn.BatchNorm2d)), strict=True):
        close(norm.mean, part.running_mean)
        close(norm.variance, part.running_var)


def test_traces_are_rows_of_samples_and_pixels():
    network = Network.from_torch(module().eval(), image=IMAGE)
    x = images(3)
    trace = network.trace(x.flatten(1))
    theirs = network.to_torch()[:3](x)
    assert [f.shape for f in trace.activations] == [(3 * 36, 5), (3 * 16, 4), (3, 3)]
    close(trace.activations[0], theirs.permute(0, 2, 3, 1).flatten(0, 2))


def test_lemma_1_holds_for_batch_norm_in_evaluation_mode_and_is_refused_in_training_mode():
    student = Network.from_torch(module(channels=(5, 4)).eval(), image=IMAGE)
    teacher = Network.from_torch(module(channels=(3, 4), seed=3).eval(), image=IMAGE)
    x = images(6).flatten(1)
    assert theory.lemma1_residual(student.folded(), teacher.folded(), x) < 1e-12
    with pytest.raises(ValueError, match=r"couples the samples of a batch, so no V_l.*batch_norm_gradient"):
        student.folded(training=True)


def test_what_is_of_one_sample_takes_no_batch_norm_for_a_plain_network():
    """Taken for those of a plain network, the parameters would give wrong numbers."""
    linear = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    net, x = Network.from_torch(nn.Sequential(*linear).double().eval()), torch.randn(7, 5).double()
    for refused in (
        lambda: theory.coupling(net.folded(), net, x, 1),
        lambda: theory.output_jacobian(net, x, 1),
        lambda: theory.augmented_output_jacobian(net, x, 1),
        lambda: theory.backpropagated_gradient(net, net, x, 1),
        lambda: theory.backpropagated_gradients(net, net.trace(x), net(x)),
        lambda: theory.lemma1_residual(net, net, x),
        lambda: theory.luck_matters_updates(net, net, x),
        lambda: alignments.alignment(net.folded(), net),
        lambda: alignments.regular(net),
        lambda: population.loss(net, net.folded()),
        lambda: flow.overlaps(net, net),
    ):
        with pytest.raises(ValueError, match=r"Network\(5-6-3, .*BatchNorm before.* take its folded\(\)"):
            refused()


def test_fanout_norms_are_those_of_the_unrolled_network():
    network = Network.from_torch(module().eval(), image=IMAGE)
    x, unrolled = images(5).flatten(1), network.folded()
    pixels = theory.fanout_norms(unrolled, unrolled.trace(x))
    # BatchNorm before the gate is folded below it, so f_l is the same; a channel sums over its pixels
    for found, by_pixel, channels in zip(theory.fanout_norms(network, x), pixels, (5, 4), strict=True):
        close(found, by_pixel.view(channels, -1).square().sum(1).sqrt())


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (1, 1)])
def test_a_convolution_is_the_linear_network_of_its_unrolled_matrix(stride, padding):
    """The reference puts every weight at the pixel it multiplies, row by row and column by column."""
    draw = np.random.default_rng(0)
    kernel, offset = draw.standard_normal((4, 2, 3, 3)), draw.standard_normal(4)
    rows, columns = ((n + 2 * padding - 3) // stride + 1 for n in (7, 6))
    unrolled = np.zeros((4, rows, columns, 2, 7, 6))
    for r, c, i, j in np.ndindex(rows, columns, 3, 3):
        y, x = r * stride + i - padding, c * stride + j - padding
        if 0 <= y < 7 and 0 <= x < 6:
            unrolled[:, r, c, :, y, x] = kernel[:, :, i, j]
    top = draw.standard_normal((3, 4 * rows * columns))
    deep = Network([kernel, top], [offset, None], image=(2, 7, 6), stride=stride, padding=padding)
    matrix = unrolled.reshape(4 * rows * columns, -1)
    linear = tsdyn.Network([matrix, top], [np.repeat(offset, rows * columns), np.zeros(3)])
    x = torch.from_numpy(draw.standard_normal((5, 84)))
    close(deep(x), linear(x))
    close(deep.folded().weights[0], torch.from_numpy(matrix))


@pytest.mark.parametrize("place", ["before", "after"])
def test_expectations_of_channels_are_those_of_the_unrolled_network_summed_over_pixels(place):
    student = Network.from_torch(module(place).eval().requires_grad_(False), image=IMAGE)
    teacher = Network.from_torch(module(place, channels=(3, 2), seed=3).eval().requires_grad_(False), image=IMAGE)
    x = images(6).flatten(1)
    moments = theory.expectations(student, teacher, x)
    found = vars(moments)
    for again in (
        theory.expectations(student, teacher, x, memory=15000),  # one sample at a time
        theory.expectations(student, teacher, iter(x.split(4))),
    ):
        for name, arrays in found.items():
            for a, b in zip(arrays, getattr(again, name), strict=True):
                close(a, b)
    for norm, diagonal in zip(theory.fanout_norms(student, x), found["B"], strict=True):
        close(norm.square(), diagonal.diagonal())
    trace, taught = student.trace(x), teacher.trace(x)
    for at, (f, f_star) in enumerate(zip(trace.activations[:-1], taught.activations[:-1], strict=True)):
        close(found["L_star"][at], f.T @ f_star / len(f))
        close(found["H"][at], found["B"][at] * found["D"][at])
    if place == "after":  # folded above the gate: V is then of σ, not of what BatchNorm makes of it
        scales = [[n.affine()[0] for n in net.norms] for net in (student, teacher)]
    else:
        scales = [[torch.ones(1)] * 2, [torch.ones(1)] * 2]
    own, theirs = student.folded(), teacher.folded()
    for at, (n, m) in enumerate(((5, 3), (4, 2))):
        pair = theory.coupling(own, theirs, x, layer=at + 1)
        for name, matrix, other in (("A", pair.A, m), ("B", pair.B, n)):
            by_pixel = matrix[..., :-1].mean(0).unflatten(1, (other, -1)).unflatten(0, (n, -1))
            left, right = scales[0][at], scales[1 if name == "A" else 0][at]
            close(torch.einsum("kpjp->kj", by_pixel), found[name][at] * left[:, None] * right)
    with pytest.raises(ValueError, match="must agree in their inputs, 128 and 36"):
        theory.expectations(student, Network([torch.ones(3, 36).double()], image=None), x)


# --- ensembles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
def test_members_of_an_ensemble_train_as_modules_of_their_own(place):
    made = [module(place, seed=s) for s in range(3)]
    ensemble = Ensemble.of([Network.from_torch(m, image=IMAGE) for m in made])
    x = torch.stack([images(24, seed=10 + s).flatten(1) for s in range(3)])
    y = torch.randn(3, 24, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows = torch.randint(24, (3, 6, 8), generator=torch.Generator().manual_seed(6))
    rule = Rule(0.02, momentum=0.9, weight_decay=0.01)
    train_epoch(ensemble, finite_stream(x, y, rows), rule, batch=8)
    for s, theirs in enumerate(made):
        optimizer = torch.optim.SGD(theirs.train().parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        for chosen in rows[s]:
            optimizer.zero_grad()
            output = theirs(x[s, chosen].unflatten(1, IMAGE))
            (0.5 * (output - y[s, chosen]).square().sum(1).mean()).backward()
            optimizer.step()
        expected, found = Network.from_torch(theirs, image=IMAGE).state_dict(), ensemble.network(s).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("rule", [Rule(0.05), Rule(0.01, "adam"), Rule(0.05, normalize=True, frozen=(1,))])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_without_convolution_and_norm_it_is_the_engine(rule, loss):
    rule = Rule(**{**rule.__dict__, "loss": LOSSES[loss]})
    networks = [random_network((4, 6, 5, 3), seed=s) for s in range(3)]
    deep = Ensemble.of(networks)
    plain = Ensemble.of(networks)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 4, generator=draw, dtype=torch.float64)
    y = torch.softmax(torch.randn(3, 40, 3, generator=draw, dtype=torch.float64), 2)
    stream = finite_stream(x, y, torch.randint(40, (3, 10, 8), generator=draw))
    train_epoch(deep, stream, rule, batch=8, backend=train.PROPAGATED)
    train_epoch(plain, stream, rule, batch=8)
    for name, expected in plain.values.items():
        torch.testing.assert_close(deep.values[name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dies", [False, True])
def test_the_general_engine_is_its_slow_twin(place, loss, dies, caplog):
    """Convolutions and running statistics under vmap, to rounding of six steps."""
    quick, slow = (
        Ensemble.of([Network.from_torch(module(place, seed=s), image=IMAGE) for s in range(3)]) for _ in "ab"
    )
    x = torch.stack([images(24, seed=10 + s).flatten(1) for s in range(3)])
    y = loss.target(torch.randn(72, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).view(3, 24, 3)
    if dies:
        x[1] = torch.nan
    stream = finite_stream(x, y, torch.randint(24, (3, 6, 8), generator=torch.Generator().manual_seed(6)))
    assert train.chosen(quick, Rule(0.02, loss=loss)) is train.PROPAGATED
    for ensemble, backend in ((quick, train.PROPAGATED), (slow, train.GENERAL)):
        train_epoch(ensemble, stream, Rule(0.02, momentum=0.9, loss=loss), batch=8, backend=backend)
        assert mark_dead(ensemble, 1) == ([1] if dies else [])
    assert caplog.messages == []  # vmap was found right
    for name, expected in (slow.values | slow.buffers).items():
        assert_same((quick.values | quick.buffers)[name][::2], expected[::2], 1e-11, what=name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network([torch.ones(3, 2, 3, 3), torch.ones(1, 3)]), "gets a flat vector; give image="),
        (lambda: Network([torch.ones(3, 2, 3, 3), torch.ones(1, 3)], image=(2, 2, 2)), "fewer layers, padding"),
        (lambda: Network([torch.ones(3, 2, 3, 3), torch.ones(1, 5)], image=(2, 4, 4)), "takes 5 inputs.* has 12"),
        (lambda: Network([torch.ones(3, 2, 3, 3)], image=(2, 4, 4)), "last layer must be linear"),
        (lambda: Network([torch.ones(3, 2), torch.ones(1, 3)], norms=[]), "0 norms; give"),
        (lambda: Network.from_torch(nn.Sequential(nn.Linear(2, 2), nn.Dropout())), "Dropout.* has no place here"),
        (
            lambda: Network.from_torch(
                nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
            ),
            "activations differ between layers",
        ),
        (lambda: Network([torch.ones(3, 2), torch.ones(1, 3, 1, 1)], image=(1, 1, 2)), "convolutions come first"),
        (
            lambda: Network([torch.ones(3, 2), torch.ones(1, 3)], norm=["after"] * 2),
            "of all 1 hidden layers or of each",
        ),
        (lambda: Network([torch.ones(3, 2, 3, 3), torch.ones(1, 3)], image=(2, 3, 3), stride=0), "stride=0"),
        (lambda: BatchNorm(torch.zeros(2), torch.ones(2), torch.ones(2)), "a scale or a shift alone"),
        (
            lambda: Network.from_torch(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.ReLU(), nn.Linear(8, 2))),
            "no groups",
        ),
    ],
)
def test_deep_networks_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- teachers and students -----------------------------------------------------------------------------------


def test_pruned_is_the_network_without_the_fan_out_of_its_weakest_nodes():
    network = Network.from_torch(module().eval().requires_grad_(False), image=IMAGE)
    smaller, active = prune(network, [0.4, 0.5])
    assert smaller.widths == (128, 3, 2, 3)
    # the same function as with the outgoing weights of those nodes at zero
    weights = [w.detach().clone() for w in network.weights]
    for i, kept in enumerate(active):
        gone = [k for k in range(len(weights[i])) if k not in kept.tolist()]
        outgoing = weights[i + 1].flatten(1).unflatten(1, (len(weights[i]), -1))
        strength = fanouts(network)[i]
        assert float(strength[gone].max()) <= float(strength[kept].min())
        outgoing[:, gone] = 0
    x = images(4).flatten(1)
    close(smaller(x), network.with_parameters(weights, network.biases)(x))
    mlp, kept = prune(random_network((4, 9, 3)), [0.3])
    assert mlp.widths == (4, 7, 3)
    assert kept[0].tolist() == sorted(kept[0].tolist())
    for ratios in ([1.0, 0.0], [0.5], [-0.1, 0.0]):
        with pytest.raises(ValueError, match="pruning everything leaves no network"):
            prune(network, ratios)


def test_channels_are_balanced_over_samples_and_pixels():
    network = Network.from_torch(module("after").eval(), image=IMAGE)
    plain = Network(network.weights, network.biases, "relu", image=IMAGE)
    x = images(20).flatten(1)
    trace = balance(plain, x).trace(x)
    for z in trace.preactivations[:-1]:
        assert bool(((z > 1e-12).sum(0) <= len(z) // 2).all())
        assert bool(((z < -1e-12).sum(0) <= len(z) // 2).all())
    close(trace.output.var(0, correction=0), torch.ones(3, dtype=torch.float64))


def labelled(tmp_path, **changes):
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((120, 1, 6, 6))
    np.savez(tmp_path / "set.npz", inputs=inputs, labels=(inputs.mean((1, 2, 3)) > 0).astype(int))
    named = {
        "teacher__widths": [36, 8, 6, 2], "teacher__init": "trained", "teacher__prune": [0.25, 0.5],
        "teacher__train_epochs": 3, "teacher__train_rate": 0.05, "teacher__polarity": 0.0, "data__law": "file",
        "data__path": str(tmp_path / "set.npz"), "data__train": 80, "data__eval": 40, "training__batch": 10,
        "training__epochs": 2, "training__steps_per_epoch": 5, "seeds": 2,
        "record__observables": ["loss", "mse", "correlation", "fanout_norm", "weight", "accuracy", "label_accuracy"],
    }  # fmt: skip
    return small(**(named | changes))


def test_trained_pruned_teachers_are_drawn_again_the_same_and_reused_from_their_file(tmp_path):
    experiment = labelled(tmp_path)
    teacher, again = draw_teacher(experiment, 0), draw_teacher(experiment, 0)
    assert teacher.widths == experiment.teacher.active_widths == (36, 6, 3, 2)
    assert experiment.student_widths == (36, 12, 6, 2)
    for a, b in zip(teacher.weights, again.weights, strict=True):
        assert torch.equal(a, b)
    torch.save(teacher.to_torch().state_dict(), tmp_path / "teacher.pt")
    saved = {"teacher__init": "file", "teacher__path": str(tmp_path / "teacher.pt"), "teacher__prune": []}
    reused = draw_teacher(labelled(tmp_path, **saved, teacher__widths=[36, 6, 3, 2]), 5)
    x = torch.randn(4, 36, dtype=torch.float64)
    assert torch.equal(reused(x), teacher(x))
    with pytest.raises(ExperimentError, match=r"(?s)teacher.pt: .*0.weight: \(6, 36\), \(7, 36\) expected"):
        draw_teacher(labelled(tmp_path, **saved, teacher__widths=[36, 7, 3, 2]), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__loss": "cross_entropy"},
        {"training__loss": "cross_entropy", "training__labels": "data", "teacher__convolution": True,
         "data__image": [1, 6, 6], "data__augment": "crop-flip", "student__batch_norm": "after"},
        {"teacher__convolution": True, "data__image": [1, 6, 6], "student__batch_norm": "before",
         "teacher__batch_norm": "before"},
    ],
)  # fmt: skip
def test_runs_with_convolutions_batch_norm_and_classes(tmp_path, changes):
    experiment = labelled(tmp_path, **changes)
    ds = tsdyn.run(experiment, tmp_path / "run")
    assert reading.open(tmp_path / "run").sizes["top_k"] == 2
    for name in ("loss_eval", "mse_eval", "accuracy", "label_accuracy"):
        assert ds[name].notnull().all(), name
    np.testing.assert_allclose(ds.accuracy.sel(top_k=2), 1)
    assert tsdyn.layer(ds, 1).correlation.sizes["teacher_node"] == 6
    # stopped after an epoch and gone on with: the same, running statistics included
    tsdyn.run(experiment.replace({"training.epochs": 1}), tmp_path / "short")
    resumed = tsdyn.run(experiment, tmp_path / "short")
    np.testing.assert_array_equal(resumed.weight.values, ds.weight.values)


def test_what_convolutions_do_not_have_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="gradient_rms is not measured of convolutions and BatchNorm"):
        labelled(tmp_path, teacher__convolution=True, data__image=[1, 6, 6], record__observables=["gradient_rms"])
    with pytest.raises(ExperimentError, match=r"set data.image = \[channel, row, column\]"):
        labelled(tmp_path, teacher__convolution=True)
    with pytest.raises(ExperimentError, match="3 convolutions of 3 x 3 do not fit images"):
        labelled(tmp_path, teacher__convolution=True, data__image=[1, 6, 6], teacher__widths=[36, 4, 4, 4, 2],
                 teacher__prune=[])  # fmt: skip
    with pytest.raises(ExperimentError, match="one ratio per hidden layer, and there are 2"):
        labelled(tmp_path, teacher__prune=[0.5])
    with pytest.raises(ExperimentError, match=r"needs training.loss = 'cross_entropy' and data with labels"):
        labelled(tmp_path, training__labels="data")


@pytest.mark.parametrize("law", ["gaussian", "torch"])
def test_rewound_students_keep_the_winners_and_nothing_else(tmp_path, law):
    record = ["correlation", "weight", "mse"]
    first = small(seeds=2, student__init=law, record__observables=record)
    ds = tsdyn.run(first, tmp_path / "first")
    for init in ("rewind", "rewind-reinitialised"):
        second = small(seeds=2, student__init=init, student__path=str(tmp_path / "first"))
        for seed in (0, 1):
            student = draw_student(second, seed)
            won = winners(tsdyn.layer(ds, 1).correlation.sel(seed=seed).isel(epoch=-1).values)
            assert 1 <= won.sum() <= 4
            assert not student.weights[0][~won].any()
            assert not student.weights[1][:, ~won].any()
            start = draw_student(first, seed).weights[0]
            assert torch.equal(student.weights[0][won], start[won]) == (init == "rewind")
        trained = tsdyn.run(second.replace({"record.observables": record}), tmp_path / init)
        end = tsdyn.layer(trained, 1).weight.sel(seed=1).isel(epoch=-1).values
        assert not end[~won].any()
        assert end[won].any(1).all()
    with pytest.raises(
        ExperimentError, match=r"layers of \(node, inputs\) \[\(8, 10\), \(6, 8\)\], these \[\(4, 10\), \(6, 4\)\]"
    ):
        draw_student(second.replace({"student.overrealization": 1.0}), 0)
    with pytest.raises(ExperimentError, match="its run must hold seed 9"):
        draw_student(second, 9)
    for alive in ("softplus", "sigmoid"):  # at 0, so that who lost would have a gradient
        with pytest.raises(
            ExperimentError, match=rf"student.activation = '{alive}' a node without weights still has an output"
        ):
            draw_student(second.replace({"student.activation": alive}), 0)


@pytest.mark.parametrize("place", ["none", "before", "after"])
def test_channels_are_rewound_with_their_kernels_and_pixels(tmp_path, place):
    first = small(
        seeds=1, teacher__widths=[64, 3, 4, 5], teacher__convolution=True, data__image=[1, 8, 8],
        student__batch_norm=place, student__init="torch", record__observables=["correlation", "weight", "mse"],
    )  # fmt: skip
    ds = tsdyn.run(first, tmp_path / "first")
    second = first.replace({"student.init": "rewind", "student.path": str(tmp_path / "first")})
    start, before = draw_student(second, 0), draw_student(first, 0)
    won = [
        winners(tsdyn.layer(ds, i).correlation.isel(seed=0, epoch=-1).transpose("teacher_node", "node").values)
        for i in (1, 2)
    ]
    assert not all(w.all() for w in won)
    assert torch.equal(start.weights[0][won[0]], before.weights[0][won[0]])
    assert torch.equal(start.weights[1][np.ix_(*won[::-1])], before.weights[1][np.ix_(*won[::-1])])
    for i, kept in enumerate(won):
        above = start.weights[i + 1].flatten(1).unflatten(1, (len(kept), -1))
        assert not start.weights[i][~kept].any()
        assert not above[:, ~kept].any()
    ends = tsdyn.layer(tsdyn.run(second, tmp_path / "second"), 1).weight.isel(seed=0, epoch=-1).values
    assert not ends[~won[0]].any()


def test_winners_are_the_best_of_some_teacher():
    correlation = np.array([[0.9, 0.2, np.nan], [0.8, 0.1, np.nan], [np.nan, np.nan, np.nan]])
    assert winners(correlation).tolist() == [True, False, False]


def test_shapes_chain():
    from tsdyn.schema import weight_shapes

    shapes = weight_shapes([128, 5, 4, 3], IMAGE, stride=2, padding=1)
    assert shapes == [(5, 2, 3, 3), (4, 5, 3, 3), (3, 4 * 2 * 2)]
    network = Network([torch.zeros(s) for s in shapes], image=IMAGE, stride=2, padding=1)
    assert network(torch.zeros(2, 128)).shape == (2, 3)
