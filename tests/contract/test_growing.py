"""Parts of the user's own where they meet the rest: ensembles, labels, modules, versions."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tsdyn import registers, schema
from tsdyn.archive import integrity
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Optimizer
from tsdyn.networks.any_module import Own
from tsdyn.running import packages

FEW = {"seeds": 2, "training.epochs": 1, "training.steps_per_epoch": 3, "record.observables": ["loss", "weight"]}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    for register in registers.ALL.values():
        monkeypatch.setattr(register, "_added", {})
    monkeypatch.setattr(schema, "DECLARED", {})


def halved(rule, parameter, gradient, moments, rates, step):
    parameter.sub_(rates * gradient * rule.argument("factor", 0.5))


def test_points_with_other_arguments_train_apart_and_those_with_the_same_together(tmp_path):
    registers.OPTIMIZERS.add("halved", Optimizer("halved", (), halved))
    swept = small().replace(
        FEW | {"training.method": "halved", "training.arguments": {"factor": 0.25}, "seeds": 1}
        | {"sweep": {"training.learning_rate": [0.01, 0.02], "training.arguments": [{"factor": 0.25}, {"factor": 1.0}]}}
    )  # fmt: skip
    one, other = (tsdyn.run(swept, tmp_path / str(t), together=t).load() for t in (True, False))
    right = tsdyn.run(small().replace(FEW | {"seeds": 1, "training.learning_rate": 0.02}), tmp_path / "sgd").load()
    for ds in (one, other):
        last = ds["weight"].isel(learning_rate=1, arguments=1)
        assert float(abs(last - right["weight"]).max()) < 1e-14
        assert float(abs(ds["weight"].isel(arguments=0) - ds["weight"].isel(arguments=1)).max()) > 1e-8
    assert float(abs(one["weight"] - other["weight"]).max()) < 1e-14


def test_a_loss_of_outputs_is_refused_the_datas_labels(tmp_path):
    registers.LOSSES.add("mine", Loss("mine", lambda f, y: (f - y).square().sum(-1).mean(), "twice the error"))
    pytest.importorskip("sklearn")
    asked = tsdyn.Experiment(
        name="e", seeds=1, teacher={"widths": [64, 5, 10]}, student={"overrealization": 1.0},
        data={"law": "digits", "train": 50, "eval": 50}, training={"loss": "mine", "labels": "data", "epochs": 1},
        record={"observables": ["loss"]},
    )  # fmt: skip
    with pytest.raises(tsdyn.ExperimentError, match=r"training\.loss = 'mine' is of outputs, not of classes"):
        tsdyn.run(asked, tmp_path / "run")


def sizes(m):
    assert isinstance(m.student, Own)
    return torch.stack([p.norm() for p in m.student.module.parameters()]).sum()


def declared(**more):
    dims = ("seed", "epoch")
    return tsdyn.declare("whole_norm", dims, units="1", long_name="sum of norms", source="this test", **more)


def test_an_observable_declared_for_modules_is_measured_of_them_and_another_is_refused(tmp_path):
    asked = small().replace({**FEW, "record.observables": ["loss", "parameter"]})

    def make():
        return nn.Linear(10, 6)

    ds = tsdyn.run(asked, tmp_path / "run", student=make, observables=[tsdyn.Observed(declared(own=True), sizes)])
    weight, bias = ds["parameter"].values[..., :60], ds["parameter"].values[..., 60:]
    right = (weight**2).sum(-1) ** 0.5 + (bias**2).sum(-1) ** 0.5
    assert abs(ds["whole_norm"].values - right).max() < 1e-13
    schema.DECLARED.clear()
    with pytest.raises(tsdyn.ExperimentError, match=r"whole_norm cannot be measured on modules of your own"):
        tsdyn.run(asked, tmp_path / "other", student=make, observables=[tsdyn.Observed(declared(), sizes)])


def later(value):
    """A measuring function that gives 1 for two members at epochs 0 and 1, and then this."""
    calls = []

    def measured(m):
        calls.append(1)
        return torch.tensor(1.0) if len(calls) < 5 else value()

    return measured


def lost():
    raise KeyError("key")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lost, "observable 'whole_norm' raised KeyError: 'key'"),
        (lambda: torch.ones(3), r"gave shape \(3,\); its variable declares no dimension here: one number"),
        (lambda: None, "gave None; give a number or a tensor"),
        (lambda: "a", "gave str; give a number or a tensor"),
        (dict, "gave dict"),
        (lambda: 1j, "complex numbers"),
    ],
)
def test_an_observable_that_fails_on_the_way_is_one_sentence_and_the_run_goes_on_when_it_is_mended(
    tmp_path, value, said
):
    asked = small().replace({**FEW, "training.epochs": 3, "seeds": 2, "record.observables": ["loss"]})
    broken, mended = (tsdyn.Observed(declared(), f) for f in (later(value), lambda m: torch.tensor(1.0)))
    with pytest.raises(registers.PartError, match=said):
        tsdyn.run(asked, tmp_path / "run", observables=[broken])
    ds = tsdyn.run(asked, tmp_path / "run", observables=[mended])
    assert (ds["whole_norm"] == 1).all()
    assert not integrity.check(tmp_path / "run")


def test_an_observable_that_is_not_finite_is_told_once_and_recorded(tmp_path, caplog):
    asked = small().replace({**FEW, "training.epochs": 3, "seeds": 2, "record.observables": ["loss"]})
    ds = tsdyn.run(asked, tmp_path / "run", observables=[tsdyn.Observed(declared(), later(lambda: math.inf))])
    assert np.isinf(ds["whole_norm"].values).sum() == 4
    said = [r.getMessage() for r in caplog.records if "NaN or infinite" in r.getMessage()]
    assert len(said) == 1
    assert "epoch 2" in said[0]


def test_a_name_that_is_declared_differently_is_refused():
    declared()
    declared()
    with pytest.raises(schema.SchemaError, match="'whole_norm' is declared already, differently"):
        declared(own=True)
    for name, dims, said in (
        ("loss", ("seed", "epoch"), "is taken"), ("weight", ("seed", "epoch"), "is taken"),
        ("a b", ("seed", "epoch"), "is not an identifier"), ("mine", ("epoch", "seed"), "begin with seed, epoch"),
        ("mine", ("seed", "epoch", "pixel"), "no size for pixel"),
    ):  # fmt: skip
        with pytest.raises(schema.SchemaError, match=said):
            tsdyn.declare(name, dims, units="1", long_name="l", source="s")
    with pytest.raises(schema.SchemaError, match="units, source is empty"):
        tsdyn.declare("mine", ("seed", "epoch"), units=" ", long_name="l", source="")


def test_another_version_of_a_package_is_said():
    def attrs(version):
        return {schema.PARTS: json.dumps({"loss mine": {"package": "lab", "version": version, "target": "lab:mine"}})}

    assert packages.changed(attrs("1.0"), attrs("1.1")) == ["loss mine lab 1.0 before, lab 1.1 now"]
    assert packages.changed(attrs("1.0"), attrs("1.0")) == packages.changed({}, attrs("1.0")) == []
    assert packages.changed({schema.PARTS: "no JSON"}, attrs("1.0")) == []
