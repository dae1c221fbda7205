import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tests.networks.test_convolutional_networks import IMAGE, close, images, module
from tsdyn import ExperimentError, theory
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.propagated import step
from tsdyn.engine.rule import Rule
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.problem.inputs import evaluation_inputs
from tsdyn.problem.teachers import draw_teacher


@pytest.mark.parametrize("eps", [1e-300, 1e-3])
def test_the_batch_operator_of_luck_matters_lemma_1(eps):
    draw = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 30, 4, generator=draw, dtype=torch.float64)
    scale = torch.randn(4, generator=draw, dtype=torch.float64)
    f.requires_grad_(True)
    y = nn.functional.batch_norm(f, None, None, scale, None, True, 0.0, eps)
    (expected,) = torch.autograd.grad(y, f, g)
    found = theory.batch_norm_gradient(f.detach(), g, scale=scale, eps=eps)
    close(found, expected)
    close(found.sum(0), torch.zeros(4, dtype=torch.float64))
    along = (found * f.detach()).sum(0)  # orthogonal to f itself only without eps
    assert bool((along.abs() < 1e-12).all()) == (eps < 1e-12)
    # per sample there is no such map: the same (f, g) of one sample, another batch, another gradient
    other = theory.batch_norm_gradient(torch.cat([f.detach()[:1], f.detach()[:9] * 2]), g[:10], scale=scale)
    assert float((other[0] - found[0]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="one sample has no variance"):
        theory.batch_norm_gradient(f.detach()[:1], g[:1])


@pytest.mark.parametrize("place", ["before", "after"])
def test_theorem_3_the_norm_below_batch_norm_grows_by_the_square_of_each_step_only(place):
    """Δ‖w‖² = lr² ‖∇‖² exactly for SGD, since w ⊥ ∇ (eps as good as 0); halving lr quarters the drift."""
    drifts = []
    for rate in (1e-2, 5e-3):
        network = Network.from_torch(module(place, eps=1e-300), image=IMAGE)
        ensemble = Ensemble.of([network])
        before = ensemble.network(0)
        norms, weights = theory.conserved_norms(before), [w.clone() for w in before.weights]
        biases = [b.clone() for b in before.biases]
        x = images(16, seed=4).flatten(1)[None]
        y = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        step(ensemble, x, y, Rule(rate), 1)
        after = ensemble.network(0)
        for i, (old, new) in enumerate(zip(norms, theory.conserved_norms(after), strict=True)):
            moved = (after.weights[i] - weights[i]).flatten(1).square().sum(1)
            if place == "after":
                moved = moved + (after.biases[i] - biases[i]).square()
            assert float(moved.max()) > 0
            torch.testing.assert_close(new.square() - old.square(), moved, rtol=1e-6, atol=1e-13)
        drifts.append(float((theory.conserved_norms(after)[0] - norms[0]).max()))
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=1e-3)


def test_batch_norm_refuses_a_batch_of_one():
    network = Network([np.eye(3), np.ones((1, 3))], norms=[BatchNorm.fresh(3, like=torch.ones(1).double())])
    with pytest.raises(ValueError, match="a batch must hold two samples or more"):
        network(torch.ones(1, 3).double(), training=True)
    network(torch.ones(1, 3).double())
    with pytest.raises(ExperimentError, match=r"training.batch = 1 with student.batch_norm = 'after'.*two samples"):
        small(training__batch=1, student__batch_norm="after")


def multilayer(places, *, momentum=0.1, seed=0):
    """Linear layers with BatchNorm in the places given, statistics off 0 and 1."""
    torch.manual_seed(seed)
    parts, below = [], 5
    for n, place in zip((6, 4), places, strict=True):
        norm, gate = nn.BatchNorm1d(n, momentum=momentum), nn.LeakyReLU(0.1)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        parts += [nn.Linear(below, n), *((norm, gate) if place == "before" else (gate, norm))]
        below = n
    made = nn.Sequential(*parts, nn.Linear(below, 3)).double()
    made(torch.randn(40, 5, dtype=torch.float64))
    return made


@pytest.mark.parametrize("places", [("before", "before"), ("after", "after"), ("before", "after")])
def test_moments_with_batch_norm_are_those_of_the_folded_network(places):
    student, teacher = (Network.from_torch(multilayer(places, seed=s)) for s in (0, 1))
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = theory.expectations(student, teacher, x)
    expected = theory.expectations(student.folded(), teacher.folded(), x)
    for name, arrays in vars(expected).items():
        for a, b in zip(getattr(found, name), arrays, strict=True):
            assert torch.equal(a, b), name
    # the derivative of the output by what comes out of σ, by autograd, one sample at a time
    theirs = multilayer(places).eval()
    sigmas = [i for i, part in enumerate(theirs) if isinstance(part, nn.LeakyReLU)]
    for at, (i, norm) in enumerate(zip(sigmas, theory.fanout_norms(student, x), strict=True)):
        upper = theirs[i + 1 :]
        rows = theirs[: i + 1](x)
        jacobians = torch.stack([torch.autograd.functional.jacobian(upper, row[None])[0, :, 0] for row in rows])
        close(norm, jacobians.square().sum(1).mean(0).sqrt().detach())
        close(norm, theory.fanout_norms(student, student.trace(x))[at])
        close(norm, theory.fanout_norms(student.folded(), x)[at])


def test_a_cumulative_average_is_kept_and_refused_where_it_would_have_to_move():
    theirs = multilayer(("before", "after"), momentum=None)
    network = Network.from_torch(theirs)
    x = torch.randn(6, 5, dtype=torch.float64)
    close(network(x), theirs.eval()(x))
    assert network.to_torch()[1].momentum is None
    with pytest.raises(ValueError, match="momentum=None averages over all batches so far"):
        network(x, training=True)


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_is_recorded_with_batch_norm_is_that_of_the_folded_network(tmp_path, place):
    record = ["fanout_norm", "weight", "bias", "batch_norm", "moments"]
    changes = {"student__batch_norm": place, "student__init": "torch", "record__observables": record}
    experiment = small(seeds=1, dtype="float64", **changes)
    ds = tsdyn.run(experiment, tmp_path / "run").isel(seed=0, epoch=-1).load()
    low, top = (tsdyn.layer(ds, i) for i in (1, 2))
    weights, biases = [low.weight.values, top.weight.values[:, :8]], [low.bias.values, top.bias.values]
    norm = BatchNorm(*(torch.from_numpy(low[f"norm_{n}"].values) for n in ("mean", "variance", "scale", "shift")))
    network = Network(weights, biases, norms=[norm], norm=place).folded()
    x = torch.from_numpy(evaluation_inputs(experiment, 0))
    found = theory.expectations(network, draw_teacher(experiment, 0), x)
    np.testing.assert_allclose(low.fanout_norm, theory.fanout_norms(network, x)[0], rtol=1e-12)
    np.testing.assert_allclose(low.fanout_norm, network.weights[1].norm(dim=0), rtol=1e-12)
    for name in ("A", "B", "H", "H_star", "D", "D_star", "L", "L_star"):
        np.testing.assert_allclose(low[name], getattr(found, name)[0], rtol=1e-9, atol=1e-12, err_msg=name)


def test_moments_of_a_convolution_are_recorded(tmp_path):
    experiment = small(
        seeds=1, teacher__widths=[16, 2, 3], teacher__convolution=True, data__image=[1, 4, 4], teacher__polarity=0.0,
        record__observables=["moments", "fanout_norm", "weight", "bias"], student__overrealization=1.0,
    )  # fmt: skip
    ds = tsdyn.run(experiment, tmp_path / "run").isel(seed=0, epoch=-1).load()
    low, top = (tsdyn.layer(ds, i) for i in (1, 2))
    teacher = draw_teacher(experiment, 0)
    weights = [low.weight.values[:, :9].reshape(2, 1, 3, 3), top.weight.values[:, :8]]
    student = Network(weights, [low.bias.values, top.bias.values], image=(1, 4, 4))
    x = torch.from_numpy(evaluation_inputs(experiment, 0))
    pair = theory.coupling(student.folded(), teacher.folded(), x, layer=1)
    for name, matrix in (("A", pair.A), ("B", pair.B)):
        by_pixel = matrix[..., :-1].mean(0).unflatten(1, (2, -1)).unflatten(0, (2, -1))
        np.testing.assert_allclose(low[name], torch.einsum("kpjp->kj", by_pixel), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(low.fanout_norm, np.sqrt(np.diagonal(low.B)), rtol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_channels_are_differentiated_whatever_mode_the_caller_is_in(mode):
    student, teacher = (Network.from_torch(module(seed=s).eval(), image=IMAGE) for s in (0, 1))
    x = images(4).flatten(1)
    expected = theory.expectations(student, teacher, x)
    norms = theory.fanout_norms(student, x)
    with mode():
        inputs = x * 1
        copies = [n.to(torch.float32).to(torch.float64) for n in (student, teacher)]
        found = theory.expectations(student, teacher, inputs)
        theory.expectations(*copies, inputs)  # whose tensors are the mode's own
        again = theory.fanout_norms(student, inputs)
    for name, arrays in vars(expected).items():
        for a, b in zip(getattr(found, name), arrays, strict=True):
            close(a, b)
    for a, b in zip(again, norms, strict=True):
        close(a, b)
