"""`tsdyn.testing.check`: it accepts every part of tsdyn's own, and notices one planted error for each promise."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tsdyn import registers, schema, studies
from tsdyn.engine.loss import CROSS_ENTROPY, MSE, Loss
from tsdyn.engine.rule import OPTIMIZERS, Optimizer
from tsdyn.networks.activations import Activation, activation
from tsdyn.problem.inputs import SEEDED
from tsdyn.testing import ContractError, check

#: Observables and studies are whole runs: those are checked below.  Laws with parts drawn once per seed are functions
#: of the seed as well, which no package's law is; tests/problem/test_worlds.py has their moments.
QUICK = [
    (kind, name)
    for kind, register in registers.ALL.items()
    for name in (*register.own, *register.hidden)
    if kind not in ("observable", "study") and not (kind == "law" and name in SEEDED)
]
SHORT = tsdyn.Experiment(
    name="short", seeds=1, teacher={"widths": [4, 3, 2]}, student={"overrealization": 1.0},
    data={"train": 20, "eval": 20}, training={"epochs": 1, "batch": 10}, record={"observables": ["loss"]},
)  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), QUICK, ids=lambda word: word)
def test_it_accepts_every_part_of_tsdyns_own(kind, name):
    check(registers.ALL[kind].load(name), kind)


def test_it_accepts_an_own_study():
    check(studies.load("goldt2019-eg"))


@pytest.fixture
def declared(monkeypatch):
    """A variable of this test alone: name, dims -> declared."""
    monkeypatch.setattr(schema, "DECLARED", {})

    def declare(name="planted", dims=("seed", "epoch", "layer", "node"), **more):
        return tsdyn.declare(name, dims, units="1", long_name="planted", source="this test", **more)

    return declare


def norms(m):
    return [w.flatten(1).norm(dim=1) for w in m.network.weights]


def test_it_accepts_an_observable_also_of_convolutions_and_one_that_is_registered_already(declared):
    observed = tsdyn.Observed(declared(deep=True), norms)
    registers.OBSERVABLES.add("planted", observed)
    try:
        check(observed)
    finally:
        registers.OBSERVABLES.remove("planted")


def test_it_accepts_a_module():
    check(lambda: nn.Linear(3, 2), "module")
    check(lambda seed: nn.Linear(3, 2 + 0 * seed), "module")


# --- planted errors: each breaks one promise --------------------------------------------------------------------

TANH = activation("tanh")
RELU = activation("relu")


class Cut(nn.Module):
    def forward(self, z):
        return torch.tanh(z).clamp(max=0.9)


def mixing(z):
    """Of one row itself, of several each with another in it."""
    return z if z.ndim == 1 else z + z.flip(0)


ACTIVATIONS = {
    "derivative: .* by torch.autograd": dataclasses.replace(TANH, derivative=lambda z: 1 - torch.tanh(z)),
    r"derivative: torch\.float32, it must be torch\.float64": dataclasses.replace(
        TANH, derivative=lambda z: (1 - torch.tanh(z) ** 2).float()
    ),
    r"derivative: .* \(entry 128\)": dataclasses.replace(RELU, derivative=lambda z: (z >= 0).to(z)),  # at 0
    r"module\(\): ": dataclasses.replace(TANH, module=Cut),
    "elementwise: ": Activation("mixing", mixing, torch.ones_like, nn.Identity, 1.0),
    "leak = None, but .* holds": dataclasses.replace(RELU, leak=None),
    "leak = 0.0, but .* does not hold": dataclasses.replace(TANH, leak=0.0),
}


@pytest.mark.parametrize(("said", "planted"), ACTIVATIONS.items(), ids=range(len(ACTIVATIONS)))
def test_it_notices_a_wrong_activation(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted)


LOSSES = {
    "mean over samples": Loss("sum", lambda f, y: (f - y).square().sum(), "a sum"),
    "must be one number": Loss("rows", lambda f, y: (f - y).square().mean(1), "of each sample"),
    "residual": dataclasses.replace(MSE, negative_gradient=lambda f, y: f - y),
    r"residual of \(2, 3\) samples": dataclasses.replace(
        MSE, negative_gradient=lambda f, y: (y - f) * (1.0 if f.ndim == 2 else 2.0)
    ),
    "hessian": dataclasses.replace(MSE, curvature=lambda f, y: 2 * MSE.hessian(f, y)),
    "of_classes": dataclasses.replace(CROSS_ENTROPY, of_classes=lambda f, c: 2 * nn.functional.cross_entropy(f, c)),
    "convention is empty": dataclasses.replace(MSE, convention=" "),
}


@pytest.mark.parametrize(("said", "planted"), LOSSES.items(), ids=range(len(LOSSES)))
def test_it_notices_a_wrong_loss(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted)


def step(change, moments=()):
    """An optimizer that moves a parameter by -rate · change(gradient, moments, step)."""

    def update(rule, parameter, gradient, held, rates, number):
        parameter.sub_(rates * change(gradient, held, number))

    return Optimizer("planted", moments, update)


def remembering():
    seen = []

    def change(gradient, held, number):
        seen.append(gradient)
        return gradient * len(seen)

    return step(change)


def update_elsewhere(rule, parameter, gradient, moments, rates, number):
    return parameter - rates * gradient


def update_at_its_own_rate(rule, parameter, gradient, moments, rates, number):
    parameter.sub_(gradient, alpha=0.01)


STEPS = {
    "a member alone": step(lambda g, held, n: g / g.norm()),
    "not finite": step(lambda g, held, n: g / 0),
    "leave the parameters": Optimizer("planted", (), update_elsewhere),
    "learning rate of 0": Optimizer("planted", (), update_at_its_own_rate),
    "not one of its moments": remembering(),
    "with the step as a tensor": step(lambda g, held, n: g * (n if isinstance(n, int) else 1)),
}


@pytest.mark.parametrize(("said", "planted"), STEPS.items(), ids=range(len(STEPS)))
def test_it_notices_a_wrong_optimizer(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted)


def walk(rng, samples, inputs, *, std):
    return rng.standard_normal((samples, inputs)).cumsum(0) * std


LAWS = {
    r"not \(4000, 5\) numbers": lambda rng, samples, inputs, *, std: rng.standard_normal((inputs, samples)) * std,
    "int64": lambda rng, samples, inputs, *, std: rng.integers(0, 9, (samples, inputs)),
    "not finite": lambda rng, samples, inputs, *, std: np.log(rng.uniform(-1, 1, (samples, inputs)) * std),
    "the same rng": lambda rng, samples, inputs, *, std: np.random.default_rng().normal(0, std, (samples, inputs)),
    "another rng": lambda rng, samples, inputs, *, std: np.random.default_rng(0).normal(0, std, (samples, inputs)),
    "left unread": lambda rng, samples, inputs, *, std: rng.standard_normal((samples, inputs)),
    "neighbouring samples": walk,
}


@pytest.mark.parametrize(("said", "planted"), LAWS.items(), ids=range(len(LAWS)))
@pytest.mark.filterwarnings("ignore:invalid value encountered in log:RuntimeWarning")
def test_it_notices_a_wrong_law(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted, "law")


TEACHERS = {
    "are asked for": lambda rng, nodes, inputs, *, teacher, lowest: rng.standard_normal((inputs, nodes)),
    "the same rng": lambda rng, nodes, inputs, *, teacher, lowest: np.random.default_rng().normal(size=(nodes, inputs)),
    "row is zero": lambda rng, nodes, inputs, *, teacher, lowest: np.eye(nodes, inputs) * (np.arange(inputs) > 0),
}


@pytest.mark.parametrize(("said", "planted"), TEACHERS.items(), ids=range(len(TEACHERS)))
def test_it_notices_a_wrong_teacher(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted, "teacher")


def spoiling(rng, shape, *, student, taught):
    taught[0].mul_(2)
    return torch.ones(shape), torch.zeros(shape[0])


STARTS = {
    "a weight and a bias": lambda rng, shape, *, student, taught: (torch.ones(shape),),
    "asked": lambda rng, shape, *, student, taught: (torch.ones(shape), torch.zeros(shape)),
    "real numbers": lambda rng, shape, *, student, taught: (
        torch.ones(shape, dtype=torch.int64),
        torch.zeros(shape[0]),
    ),
    "starts elsewhere": lambda rng, shape, *, student, taught: (torch.randn(shape), torch.zeros(shape[0])),
    "only shown": spoiling,
}


@pytest.mark.parametrize(("said", "planted"), STARTS.items(), ids=range(len(STARTS)))
def test_it_notices_a_wrong_start(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted, "start")


def training_on(m):
    for weight in m.network.weights:
        weight.mul_(1.001)
    return norms(m)


OBSERVED = {
    "give one tensor": (("seed", "epoch"), norms),
    "give a list": (("seed", "epoch", "layer", "node"), lambda m: m.on_train.mse),
    r"gave shape \(5,\) at layer 1": (
        ("seed", "epoch", "layer", "node"), lambda m: [w.norm(dim=0) for w in m.network.weights],
    ),
    "changes": (("seed", "epoch", "layer", "node"), training_on),
    "nothing but NaN": (("seed", "epoch"), lambda m: torch.tensor(torch.nan)),
    "complex numbers": (("seed", "epoch"), lambda m: torch.tensor(3j)),
}  # fmt: skip


@pytest.mark.parametrize(("said", "planted"), OBSERVED.items(), ids=range(len(OBSERVED)))
def test_it_notices_a_wrong_observable(said, planted, declared):
    dims, measure = planted
    with pytest.raises(ContractError, match=said):
        check(tsdyn.Observed(declared(dims=dims), measure))


ONE = nn.Linear(3, 2)
DRAWS = np.random.default_rng(0)


def of_numpy():
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(DRAWS.standard_normal((2, 3))))
    return module


MODULES = {
    "not an nn.Module": lambda: torch.tanh,
    "share parameters": lambda: ONE,
    "nothing to train": lambda: nn.Linear(3, 2).requires_grad_(False),
    "noise": lambda: nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout()),
    "start differently": of_numpy,
}


@pytest.mark.parametrize(("said", "planted"), MODULES.items(), ids=range(len(MODULES)))
def test_it_notices_a_wrong_module(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted, "module")


def study(**changes):
    whole = {
        "TITLE": "t", "SOURCE": "s", "EXPERIMENTS": dict.fromkeys(("smoke", "desk", "paper"), SHORT),
        "measure": lambda archive: archive[["loss_eval"]], "draw": lambda measured: tsdyn,
    }  # fmt: skip
    module = types.ModuleType("study")
    vars(module).update({key: value for key, value in (whole | changes).items() if value is not None})
    return module


STUDIES = {
    "has no SOURCE": study(SOURCE=None),
    "EXPERIMENTS lacks desk, paper": study(EXPERIMENTS={"smoke": SHORT}),
    "not a Dataset": study(measure=lambda archive: archive["loss_eval"]),
    "not a matplotlib Figure": study(),
}


@pytest.mark.parametrize(("said", "planted"), STUDIES.items(), ids=range(len(STUDIES)))
def test_it_notices_a_wrong_study(said, planted):
    with pytest.raises(ContractError, match=said):
        check(planted)


def test_it_says_what_it_needs_to_know():
    for kind in (None, "module"):
        with pytest.raises(TypeError, match="Linear is a module that was made; give the function or class"):
            check(nn.Linear(3, 2), kind)
    with pytest.raises(TypeError, match="Give kind="):
        check(lambda: None)
    with pytest.raises(TypeError, match="not a loss"):
        check(MSE, arguments={"delta": 1.0})
    with pytest.raises(ContractError, match="a member alone"):
        check(dataclasses.replace(OPTIMIZERS["adam"], update=STEPS["a member alone"].update), arguments={"memory": 0.5})
