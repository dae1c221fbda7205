"""Every loss against autograd; what is recorded belongs to the loss that was trained."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tests.comparing import assert_same
from tests.networks.test_networks import random_network
from tsdyn import schema
from tsdyn.engine.loss import LOSSES, Loss, loss
from tsdyn.observables import registry
from tsdyn.observables.member import Measurement, Probe
from tsdyn.running.members import Members

EPS = torch.finfo(torch.float64).eps
BOTH = pytest.mark.parametrize("trained", LOSSES.values(), ids=LOSSES)


def pair(of: Loss, samples=9, outputs=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    f, y = (3 * torch.randn(samples, outputs, generator=draw, dtype=torch.float64) for _ in range(2))
    return f, of.target(y)


@BOTH
@pytest.mark.parametrize("closed", [True, False])
def test_residual_and_hessian_are_autograds(trained, closed):
    """With closed forms and without them, any leading dimensions."""
    if not closed:
        trained = dataclasses.replace(trained, negative_gradient=None, curvature=None)
    f, y = pair(trained)
    one = [
        torch.autograd.functional.hessian(lambda o, t=t: trained.value(o[None], t[None]), o)
        for o, t in zip(f, y, strict=True)
    ]
    residual = []
    for o, t in zip(f, y, strict=True):
        o = o.clone().requires_grad_()
        residual.append(-torch.autograd.grad(trained.value(o[None], t[None]), o)[0])
    assert_same(trained.residual(f, y), torch.stack(residual), 10 * EPS)
    assert_same(trained.hessian(f, y), torch.stack(one), 10 * EPS)
    split = [t.unflatten(0, (3, 3)) for t in (f, y)]
    assert_same(trained.residual(*split).flatten(0, 1), trained.residual(f, y), 0)
    assert_same(trained.hessian(*split).flatten(0, 1), trained.hessian(f, y), 0)


@BOTH
def test_the_value_over_classes_is_that_of_one_hot_rows(trained):
    f, _ = pair(trained)
    teacher = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    classes = torch.arange(9) % 4
    for given in (None, classes):
        assert_same(trained.over(f, teacher, given), trained.value(f, trained.target(teacher, given)), 10 * EPS)
    if trained.targets == "classes":
        assert trained.target(teacher, classes).argmax(1).tolist() == classes.tolist()
        assert trained.target(teacher).argmax(1).tolist() == teacher.argmax(1).tolist()


def test_a_loss_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'hinge' is no loss; there are mse, cross_entropy"):
        loss("hinge")


@BOTH
@pytest.mark.parametrize("labels", ["teacher", "data"])
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_recorded_gradients_and_hessian_are_of_the_loss_that_is_trained(trained, labels, name):
    teacher, student = random_network((4, 3, 5, 3), name, seed=1), random_network((4, 6, 5, 3), name, seed=2)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = Probe(x, teacher, torch.arange(30) % 3)
    layout = schema.Layout((0,), 4, (6, 5, 3), (3, 5, 3), quantiles=(0.0, 0.5, 1.0), modes=4)
    m = Measurement(student, probe, probe, layout=layout, objective=trained, labels=labels)
    asked = ["loss_train", "loss_eval", "gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue"]
    found = registry.measure(asked, m)
    module = student.to_torch()
    linears = [part for part in module if isinstance(part, nn.Linear)]
    classes = probe.labels if labels == "data" else teacher(x).argmax(1)

    def one(output, at):  # of one sample, by torch's own functions
        if trained.name == "mse":
            return 0.5 * (teacher(x[at])[0] - output[0]).square().sum()
        return nn.functional.cross_entropy(output, classes[at])

    by_layer, norms, total = [[] for _ in linears], [], 0.0
    for i in range(len(x)):
        seen = []
        hooks = [part.register_forward_hook(lambda _m, _i, z, seen=seen: seen.append(z)) for part in linears]
        value = one(module(x[i : i + 1]), slice(i, i + 1))
        for hook in hooks:
            hook.remove()
        slopes = torch.autograd.grad(value, [*seen, *module.parameters()])
        for layer, slope in zip(by_layer, slopes[: len(linears)], strict=True):
            layer.append(-slope[0])
        norms.append(float(sum(s.square().sum() for s in slopes[len(linears) :])) ** 0.5)
        total += float(value.detach()) / len(x)
    for layer, rows in enumerate(by_layer):
        g = torch.stack(rows)
        assert_same(found["gradient_rms"][layer], g.square().mean(0).sqrt(), 1e-13)
        assert_same(found["gradient_max"][layer], g.abs().amax(0), 1e-13)
    np.testing.assert_allclose(found["gradient_norm"], np.quantile(norms, [0.0, 0.5, 1.0]), rtol=1e-12)
    assert found["loss_train"] == found["loss_eval"] == pytest.approx(total, rel=1e-13)
    parameters = [p.detach() for p in module.parameters()]
    names, sizes = [n for n, _ in module.named_parameters()], [p.numel() for p in parameters]

    def over_all(row):
        moved = {n: v.view(p.shape) for n, v, p in zip(names, row.split(sizes), parameters, strict=True)}
        output = torch.func.functional_call(module, moved, (x,))
        return sum(one(output[i : i + 1], slice(i, i + 1)) for i in range(len(x))) / len(x)

    matrix = torch.autograd.functional.hessian(over_all, torch.cat([p.flatten() for p in parameters]))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    np.testing.assert_allclose(found["hessian_eigenvalue"], expected, rtol=1e-9, atol=1e-11)


def test_a_run_records_the_loss_it_trains(tmp_path):
    """The gradient at the outputs is softmax(f) − y, whose parts sum to 0: the squared error's do not."""
    experiment = small(training__loss="cross_entropy", training__epochs=2, record__observables=["loss", "gradient_max"])
    ds = tsdyn.run(experiment, tmp_path / "run").load()
    top = tsdyn.layer(ds.gradient_max, 2)
    assert float(top.max()) < 1
    members = Members(experiment)
    g = members_gradient(members, 0)
    np.testing.assert_allclose(top.isel(seed=0, epoch=0), g.abs().amax(0), rtol=1e-12)
    np.testing.assert_allclose(g.sum(1), 0, atol=1e-14)


def members_gradient(members, member):
    """y − softmax(f), by hand."""
    x = members.train_probe(member, 0).inputs
    wanted = nn.functional.one_hot(members.teachers[member](x).argmax(1), 6)
    return wanted - torch.softmax(members.ensemble.network(member)(x), 1)
