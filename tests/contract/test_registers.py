"""Every register: its names are those of its table, and each of tsdyn's own parts is what its definition says."""

import dataclasses
import importlib
import math
from importlib import metadata

import numpy as np
import pytest
import torch

from tsdyn import Experiment, ExperimentError, registers, studies
from tsdyn.engine.loss import LOSSES, loss
from tsdyn.engine.rule import OPTIMIZERS, Rule
from tsdyn.experiment.parts import Student, Teacher
from tsdyn.problem.inputs import draw_inputs, generator
from tsdyn.problem.students import STARTS
from tsdyn.problem.teachers import TEACHERS
from tsdyn.registers import PartError, Register

KINDS = pytest.mark.parametrize("register", registers.ALL.values(), ids=lambda r: r.kind)


def table(register):
    module, _, attribute = register.table.partition(":")
    return getattr(importlib.import_module(module), attribute)


# --- names -------------------------------------------------------------------------------------------------------


@KINDS
def test_the_names_are_those_of_the_table(register):
    assert {*register.own, *register.hidden} == set(table(register))
    assert not {*register.own, *register.hidden} & set(register.aliases)
    assert set(register.names()) >= {*register.own, *register.aliases}


def test_the_groups_are_what_the_documentation_says():
    assert {kind: register.group for kind, register in registers.ALL.items()} == {
        "activation": "tsdyn.activations", "loss": "tsdyn.losses", "optimizer": "tsdyn.optimizers",
        "law": "tsdyn.laws", "teacher": "tsdyn.teachers", "start": "tsdyn.starts",
        "observable": "tsdyn.observables", "study": "tsdyn.studies",
    }  # fmt: skip


@KINDS
def test_an_unknown_name_is_refused_with_the_nearest_and_the_way_out(register):
    name = register.own[0]
    wrong = name[:-1] + "q" + name[-1]
    with pytest.raises(
        PartError, match=rf"'{wrong}' is no {register.kind} \(did you mean '{name}'\?\).*{register.group}"
    ):
        register.check(wrong)
    with pytest.raises(PartError, match=f"'{wrong}' is no {register.kind}"):
        register.load(wrong)
    with registers.accepting([wrong]):  # an archive's name is read, and still there is no code for it
        assert register.check(wrong) == wrong
        with pytest.raises(PartError, match=f"'{wrong}' is no {register.kind}"):
            register.load(wrong)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("student.activation", "tanhh", "tanh"), ("training.loss", "mes", "mse"), ("training.method", "adm", "adam"),
        ("data.law", "gausian", "gaussian"), ("teacher.init", "seperated", "separated"),
        ("student.init", "near-teachr", "near-teacher"), ("record.observables", ["corelation"], "correlation"),
    ],
)  # fmt: skip
def test_an_experiment_file_says_the_nearest(key, value, near):
    base = Experiment(name="e", teacher={"widths": [4, 3, 2]})
    with pytest.raises(ExperimentError, match=f"{key} = .*did you mean '{near}'"):
        base.replace({key: value})


@KINDS
def test_a_part_is_added_to_this_process_and_forgotten(register):
    part = object()
    register.add("mine", part)
    try:
        assert register.load("mine") is part
        assert "mine" in register.names()
        assert register.holds("mine", part)
        assert register.origin("mine") == (registers.THIS_PROCESS, "", "builtins:object")
        assert register.foreign("mine")
        with pytest.raises(PartError, match="'mine' is there already"):
            register.add("mine", object())
    finally:
        register.remove("mine")
    with pytest.raises(PartError):
        register.check("mine")
    with pytest.raises(PartError, match=r"is there already \(tsdyn\)"):
        register.add(register.own[0], part)


def test_a_part_may_be_given_itself_and_is_known_by_its_name():
    def heavy(rng, samples, inputs, *, std):
        return std * rng.standard_t(5.0, (samples, inputs))

    try:
        e = Experiment(name="e", teacher={"widths": [4, 3, 2]}, data={"law": heavy, "train": 20, "eval": 10})
        assert e.data.law == "heavy"
        assert e.replace({"data.law": heavy}) == e == Experiment.from_toml_text(e.to_toml())
        x = draw_inputs(e, generator(0, "train"), 5, seed=0)
        np.testing.assert_array_equal(x, heavy(generator(0, "train"), 5, 4, std=e.data.std))

        def other(rng, samples, inputs, *, std):
            return std * rng.standard_normal((samples, inputs))

        other.__name__ = "heavy"
        with pytest.raises(ExperimentError, match=r"law 'heavy' is there already \(this process\)"):
            e.replace({"data.law": other})
        with pytest.raises(ExperimentError, match="has no name, by which an archive calls it"):
            e.replace({"data.law": lambda rng, samples, inputs, *, std: 0})
        with pytest.raises(ExperimentError, match="law"):
            e.replace({"data.law": 3})
    finally:
        registers.LAWS.remove("heavy")


@KINDS
def test_loading_one_of_tsdyns_own_gives_the_tables(register):
    name = register.own[-1]
    assert register.load(name) is table(register)[name]
    assert not register.foreign(name)
    assert register.origin(name).package == "tsdyn"


# --- entry points ------------------------------------------------------------------------------------------------


class Package:
    def __init__(self, name):
        self.name, self.version = name, "1.0"


def offered(monkeypatch, *entries):
    """A new register of activations, and installed packages that offer (package, name, target)."""
    found = []
    for package, name, target in entries:
        entry = metadata.EntryPoint(name, target, "tsdyn.activations")
        vars(entry)["dist"] = Package(package)
        found.append(entry)
    monkeypatch.setattr(registers.metadata, "entry_points", lambda group: found if group == "tsdyn.activations" else [])
    own = registers.ACTIVATIONS
    return Register(own.kind, own.table, own.own)


def test_an_entry_point_is_loaded_when_it_is_asked_for(monkeypatch):
    register = offered(monkeypatch, ("lab", "root", "math:sqrt"), ("lab", "broken", "no_such_module:part"))
    assert register.check("root") == "root"
    assert register.load("root") is math.sqrt
    assert register.origin("root") == ("lab", "1.0", "math:sqrt")
    assert register.check("broken") == "broken"
    with pytest.raises(PartError, match="'broken': no_such_module:part of lab cannot be imported"):
        register.load("broken")


def test_an_entry_point_with_the_name_of_an_own_part_is_refused(monkeypatch):
    register = offered(monkeypatch, ("lab", "tanh", "math:tanh"))
    with pytest.raises(PartError, match="'tanh' of lab has the name of one of tsdyn's own; rename it"):
        register.names()
    assert register.load("tanh") is table(register)["tanh"]


def test_two_packages_that_offer_one_name_are_refused(monkeypatch):
    register = offered(monkeypatch, ("lab", "root", "math:sqrt"), ("shed", "root", "math:cbrt"))
    with pytest.raises(PartError, match="'root' is offered by lab and by shed; uninstall one"):
        register.check("root")
    twice = offered(monkeypatch, ("lab", "root", "math:sqrt"), ("lab", "root", "math:sqrt"))  # found on two paths
    assert twice.check("root") == "root"


@pytest.mark.parametrize("kind", ["activation", "loss", "optimizer"])
def test_a_part_of_another_type_or_name_is_refused(kind):
    from tsdyn.engine.rule import optimizer
    from tsdyn.networks.activations import activation

    find = {"activation": activation, "loss": loss, "optimizer": optimizer}[kind]
    register = registers.ALL[kind]
    for part in (math.sqrt, register.load(register.own[0])):  # the latter is called otherwise
        register.add("mine", part)
        try:
            with pytest.raises(PartError, match=f"{kind} 'mine': .* of that name"):
                find("mine")
        finally:
            register.remove("mine")


def test_a_study_without_a_part_is_refused():
    registers.STUDIES.add("mine", math)
    try:
        with pytest.raises(PartError, match=r"study 'mine': .* has no TITLE, SOURCE, EXPERIMENTS, measure, draw"):
            studies.load("mine")
    finally:
        registers.STUDIES.remove("mine")


def test_arguments_of_tsdyns_own_parts_are_refused():
    base = Experiment(name="e", teacher={"widths": [4, 3, 2]})
    for section, what in {"teacher": "teacher", "student": "start", "data": "law", "training": "optimizer"}.items():
        with pytest.raises(ExperimentError, match=rf"{section}.arguments = .*the {what} '.*' is tsdyn's own"):
            base.replace({f"{section}.arguments": {"a": 1}})


# --- laws --------------------------------------------------------------------------------------------------------

#: Mean, variance and fourth central moment at standard deviation 1, of the definition.
#: Laws of independent coordinates; tests/problem/test_worlds.py has the others.
MOMENTS = {"gaussian": (0.0, 1.0, 3.0), "uniform": (0.0, 1.0, 9 / 5)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_law_has_its_moments(name, dtype):
    std, samples = 1.5, 40_000
    experiment = Experiment(name="e", dtype=dtype, teacher={"widths": [5, 3, 2]}, data={"law": name, "std": std})
    x = draw_inputs(experiment, generator(0, "train"), samples)
    assert x.dtype == dtype
    assert x.shape == (samples, 5)
    z = x.astype(float) / std
    for power, right in ((1, MOMENTS[name][0]), (2, MOMENTS[name][1]), (4, MOMENTS[name][2])):
        values = (z**power).ravel()
        assert abs(values.mean() - right) <= 5 * values.std() / math.sqrt(values.size)
    products = z[:, :-1] * z[:, 1:]  # coordinates are independent
    assert np.all(np.abs(products.mean(0)) <= 5 * products.std(0) / math.sqrt(samples))
    if name == "uniform":
        assert np.abs(z).max() <= math.sqrt(3) * (1 + np.finfo(dtype).eps)


# --- teachers ----------------------------------------------------------------------------------------------------


def rows(name, nodes, inputs, *, lowest=True, seed=0, **section):
    teacher = Teacher(widths=(6, 4, 3), **section)
    return TEACHERS[name](np.random.default_rng(seed), nodes, inputs, teacher=teacher, lowest=lowest)


def separated():
    choices = (-1.0, 0.0, 0.5)
    found = rows("separated", 20, 3, choices=choices)
    assert set(found.ravel()) <= set(choices)
    assert len(np.unique(found, axis=0)) == 20
    assert found.any(1).all()
    # uniform over the 26 rows there are: each is among the 20 with probability 20/26
    draws = 400
    held = sum((rows("separated", 20, 3, choices=choices, seed=s) == [0.5, 0, -1]).all(1).any() for s in range(draws))
    share = 20 / 26
    assert abs(held / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws)


def luck_matters():
    choices = Experiment(name="e", teacher={"widths": [4, 3, 2], "init": "luck-matters"}).teacher.choices
    found = rows("luck-matters", 20, 3, choices=choices)
    assert set(found.ravel()) <= {-0.5, -0.25, 0.0, 0.25, 0.5}
    assert len(np.unique(found, axis=0)) == 20
    assert found.any(1).all()


def gaussian():
    found = rows("gaussian", 200, 100, scale=0.3).ravel()
    for power, right in ((1, 0.0), (2, 0.09), (4, 3 * 0.09**2)):
        assert abs((found**power).mean() - right) <= 5 * (found**power).std() / math.sqrt(found.size)


def orthonormal():
    for nodes, inputs in ((4, 6), (6, 6), (5, 3)):
        found = rows("orthonormal", nodes, inputs, lowest=False)
        gram = found @ found.T if nodes <= inputs else found.T @ found
        assert np.abs(gram - np.eye(len(gram))).max() <= 32 * np.finfo(float).eps
    with pytest.raises(ExperimentError, match="7 orthonormal rows do not fit in 6 inputs"):
        rows("orthonormal", 7, 6)
    # of Haar's measure an entry has mean 0 and variance 1/inputs
    entries = np.array([rows("orthonormal", 3, 6, seed=s)[0, 0] for s in range(2000)])
    assert abs(entries.mean()) <= 5 * entries.std() / math.sqrt(2000)
    assert abs((entries**2).mean() - 1 / 6) <= 5 * (entries**2).std() / math.sqrt(2000)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_has_its_properties(name):
    {"separated": separated, "gaussian": gaussian, "orthonormal": orthonormal, "luck-matters": luck_matters}[name]()


# --- starts ------------------------------------------------------------------------------------------------------

SHAPES = [(40, 30), (8, 5, 3, 3)]


def of_start(name, shape, **section):
    draw = torch.Generator().manual_seed(1)
    taught = torch.randn(shape, generator=draw, dtype=torch.float64), torch.randn(shape[0], generator=draw).double()
    student = Student(overrealization=1.0, **section)
    return *STARTS[name](np.random.default_rng(0), shape, student=student, taught=taught), *taught


def has_moments(values, variance, kurtosis):
    """Mean 0, that variance, that fourth moment over its square; five standard errors."""
    z = values.flatten() / math.sqrt(variance)
    for power, right in ((1, 0.0), (2, 1.0), (4, kurtosis)):
        assert abs(float((z**power).mean()) - right) <= 5 * float((z**power).std()) / math.sqrt(len(z))


def starts_gaussian(shape):
    weight, bias, *_ = of_start("gaussian", shape, scale=0.2)
    has_moments(weight, 0.04, 3.0)
    assert not bias.any()


def starts_torch(shape):
    weight, bias, *_ = of_start("torch", shape)
    edge = 1 / math.sqrt(math.prod(shape[1:]))
    has_moments(weight, edge**2 / 3, 9 / 5)
    assert float(weight.abs().max()) <= edge
    assert float(bias.abs().max()) <= edge
    # which are torch's own bounds
    layer = torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], 3)
    assert 0.9 * edge <= float(layer.weight.detach().abs().max()) <= edge * (1 + 1e-6)


def starts_near_teacher(shape):
    weight, bias, w_star, b_star = of_start("near-teacher", shape, scale=0.2)
    has_moments(weight - w_star, 0.04, 3.0)
    has_moments(bias - b_star, 0.04, 3.0)


def starts_same_direction(shape):
    weight, bias, w_star, b_star = of_start("same-direction", shape)
    ratio = float(weight.norm() / w_star.norm())
    assert torch.allclose(weight, ratio * w_star, rtol=1e-14, atol=0)
    assert torch.allclose(bias, ratio * b_star, rtol=1e-14, atol=0)
    other = of_start("torch", shape)[0]
    assert float(weight.norm()) == pytest.approx(float(other.norm()), rel=1e-14)  # the same draws


def starts_same_sign(shape):
    weight, bias, w_star, b_star = of_start("same-sign", shape)
    other, offset, *_ = of_start("torch", shape)
    assert bool((weight * w_star >= 0).all() and (bias * b_star >= 0).all())
    assert torch.equal(weight.abs(), other.abs())
    assert torch.equal(bias.abs(), offset.abs())


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("name", STARTS)
def test_a_start_has_its_properties(name, shape):
    {
        "gaussian": starts_gaussian, "torch": starts_torch, "near-teacher": starts_near_teacher,
        "same-direction": starts_same_direction, "same-sign": starts_same_sign,
    }[name](shape)  # fmt: skip


# --- optimizers --------------------------------------------------------------------------------------------------

TORCH = {
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=0.05, weight_decay=decay),
    "momentum": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=decay),
    "nesterov": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=decay, nesterov=True),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay),
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_torchs_steps(name, decay):
    draw = torch.Generator().manual_seed(3)
    start = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    gradients = torch.randn(50, 3, 4, 5, generator=draw, dtype=torch.float64)
    rule = Rule(
        0.05, "sgd" if name == "momentum" else name, momentum=0.9 if name in ("momentum", "nesterov") else 0.0,
        weight_decay=decay, beta_1=0.8, beta_2=0.95, epsilon=1e-6,
    )  # fmt: skip
    assert rule.optimizer is OPTIMIZERS[name]
    mine = start.clone()
    moments = [torch.zeros_like(mine) for _ in rule.optimizer.moments]
    theirs = torch.nn.Parameter(start.clone())
    optimizer = TORCH[name]([theirs], decay)
    for step, gradient in enumerate(gradients, start=1):
        rule.update(mine, gradient.clone(), moments, rule.rates(mine), step)
        theirs.grad = gradient.clone()
        optimizer.step()
    bound = 1e-9 if name.startswith("adam") else 1e-12
    assert float((mine - theirs.detach()).abs().max()) <= bound * float(theirs.detach().abs().max())


# --- losses ------------------------------------------------------------------------------------------------------

#: The definition of one sample's loss, of numbers.
OF_ONE = {
    "mse": lambda f, y: 0.5 * sum((b - a) ** 2 for a, b in zip(f, y, strict=True)),
    "cross_entropy": lambda f, y: (
        -sum(b * (a - torch.log(sum(torch.exp(c) for c in f))) for a, b in zip(f, y, strict=True))
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_definition_and_its_derivatives_are_autograds(name):
    draw = torch.Generator().manual_seed(4)
    f = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    taught = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    one, target = loss(name), loss(name).target(taught)
    assert torch.equal(target, taught) or torch.equal(target, torch.nn.functional.one_hot(taught.argmax(1), 3).double())
    each = torch.stack([OF_ONE[name](a, b) for a, b in zip(f, target, strict=True)])
    assert float(one.value(f, target)) == pytest.approx(float(each.mean()), rel=1e-14)
    assert float(one.over(f, taught)) == pytest.approx(float(each.mean()), rel=1e-14)
    residual, hessian = one.residual(f, target), one.hessian(f, target)
    for i in range(5):

        def sample(a, i=i):
            return OF_ONE[name](a, target[i])

        slope = torch.autograd.functional.jacobian(sample, f[i])
        second = torch.autograd.functional.hessian(sample, f[i])
        assert torch.allclose(residual[i], -slope, rtol=0, atol=1e-14)
        assert torch.allclose(hessian[i], second, rtol=0, atol=1e-14)


def test_a_loss_without_closed_forms_has_them_from_its_value():
    draw = torch.Generator().manual_seed(5)
    f = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    for one in LOSSES.values():
        bare = dataclasses.replace(one, negative_gradient=None, curvature=None)
        target = one.target(torch.randn(4, 3, generator=draw, dtype=torch.float64))
        assert torch.allclose(bare.residual(f, target), one.residual(f, target), rtol=0, atol=1e-14)
        assert torch.allclose(bare.hessian(f, target), one.hessian(f, target), rtol=0, atol=1e-14)
