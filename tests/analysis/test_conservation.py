"""The balance of hidden nodes: recorded as declared, changed by exact amounts, and audited."""

import numpy as np
import pytest
import torch
from tsdyn.analysis.audit import audit

import tsdyn
from tests.cases import small
from tsdyn import theory

CLAIM = "balance of each node"
RECORD = {"record__observables": ["balance", "weight", "mse"]}


def claim(folder, **changes):
    base = {"training__epochs": 2, "training__steps_per_epoch": 20, "student__scale": 0.3, "seeds": 2, **RECORD}
    ds = tsdyn.run(small(**base | changes), folder / "run").load()
    return ds, audit(ds).sel(claim=CLAIM)


DEEP = {"teacher__widths": [6, 4, 3, 2], "student__overrealization": 1.5}
STEPS = {
    "sgd": {},
    "gd": {"training__method": "gd", "training__steps_per_epoch": 5},
    "one pass": {"training__steps_per_epoch": None},
    "table of rates": {"training__learning_rate": {"0": 0.05, "1": 0.01}},
    "rates": {"training__rates": [1.0, 0.3]},
    "decay": {"training__weight_decay": 0.1},
    "decay of weights": {"training__weight_decay": 0.1, "training__decay_biases": False},
    "decay, rates": {"training__weight_decay": 0.1, "training__rates": [1.0, 0.3], "training__decay_biases": False},
    "frozen": {"training__frozen": [2]},
    "clip": {"training__clip": 0.05},
    "cross entropy": {"training__loss": "cross_entropy"},
    "noise": {"data__noise": 0.3},
    "fresh": {"data__train": "fresh"},
    "fresh, noise": {"data__train": "fresh", "data__noise": 0.3},
    "no bias": {"student__bias": False},
    "deep": DEEP,
    "deep, frozen": DEEP | {"training__frozen": [2]},
    "deep, frozen, clip": DEEP | {"training__frozen": [1], "training__clip": 0.05},
    "leaky": {"student__activation": "leaky_relu", "student__leak": 0.2},
    "identity": DEEP | {"student__activation": "identity"},
    "every other": {"training__epochs": 4, "record__every": 2},
    "float32": {"dtype": "float32"},
}


@pytest.mark.parametrize("steps", STEPS)
def test_every_run_without_momentum_holds(steps, tmp_path):
    ds, found = claim(tmp_path, **STEPS[steps])
    assert (found.verdict == "holds").all(), found.margin.values
    change = abs(ds["balance"].isel(epoch=-1) - ds["balance"].isel(epoch=0)).max()
    assert float(change) > 1e-6 or steps == "clip"  # what holds is a change, not a constant


OTHERS = {
    "momentum": {"training__momentum": 0.5},
    "adam": {"training__method": "adam"},
    "normalised rows": {"training__normalize": True},
    "smooth": {"student__activation": "tanh"},
    "one epoch": {"training__epochs": 0},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_the_law_is_not_about_is_unmet(other, tmp_path):
    assert (claim(tmp_path, **OTHERS[other])[1].verdict == "unmet").all()


def test_a_wrong_balance_weight_or_rate_fails(tmp_path):
    ds, _ = claim(tmp_path)
    wrong = ds.copy(deep=True)
    wrong["balance"].loc[{"seed": 1, "epoch": 2, "layer": 1, "node": 3}] += 1e-9
    assert list(audit(wrong).sel(claim=CLAIM).verdict.values) == ["holds", "fails"]
    wrong = ds.copy(deep=True)
    wrong["weight"].loc[{"seed": 0, "epoch": 1, "layer": 2, "node": 0, "input_node": 0}] *= 1 + 1e-6
    assert list(audit(wrong).sel(claim=CLAIM).verdict.values) == ["fails", "holds"]
    experiment = tsdyn.Experiment.from_toml_text(ds.attrs["experiment"])
    other = ds.assign_attrs(experiment=experiment.replace({"training.learning_rate": 0.0200001}).to_toml())
    assert (audit(other).sel(claim=CLAIM).verdict == "fails").all()
    assert (audit(ds.drop_vars("balance")).sel(claim=CLAIM).verdict == "unrecorded").all()


def test_the_dead_and_sweeps(tmp_path):
    experiment = small(
        seeds=2, training__epochs=2, **RECORD,
        sweep={"student.activation": ["relu", "tanh"], "student.overrealization": [1.0, 2.0]},
    )  # fmt: skip
    found = audit(tsdyn.run(experiment, tmp_path / "sweep")).sel(claim=CLAIM)
    assert (found.verdict.sel(activation="relu") == "holds").all()
    assert (found.verdict.sel(activation="tanh") == "unmet").all()
    ds, _ = claim(tmp_path)
    died = ds.assign_coords(death_epoch=("seed", [1, -1]))
    assert list(audit(died).sel(claim=CLAIM).verdict.values) == ["unmet", "holds"]


def test_one_step_by_autograd_alone(tmp_path):
    """c after one GD step is c before plus η² (‖∂a‖² − ‖∂w‖² − ∂b²), with gradients of the recorded loss."""
    rate = 0.05
    ds, _ = claim(
        tmp_path, training__method="gd", training__steps_per_epoch=1, training__learning_rate=rate, data__eval=10
    )
    from tsdyn.problem.inputs import training_inputs

    experiment = tsdyn.Experiment.from_toml_text(ds.attrs["experiment"])
    one = ds.isel(seed=0, epoch=0)
    x = torch.from_numpy(training_inputs(experiment, 0))

    def parameters(prefix, width):
        for layer in (1, 2):
            at = one.sel(layer=layer)
            n, below = int(at[width]), int(at["input_width" if not prefix else "teacher_input_width"])
            yield torch.tensor(at[f"{prefix}weight"].values[:n, :below]).requires_grad_()
            yield torch.tensor(at[f"{prefix}bias"].values[:n]).requires_grad_()

    w, b, a, c = parameters("", "width")
    v, d, u, e = parameters("teacher_", "teacher_width")

    def output(w, b, a, c):
        return torch.relu(x @ w.T + b) @ a.T + c

    loss = 0.5 * (output(w, b, a, c) - output(v, d, u, e).detach()).square().sum(1).mean()
    dw, db, da = torch.autograd.grad(loss, (w, b, a))
    step = rate**2 * (da.square().sum(0) - dw.square().sum(1) - db.square())
    recorded = ds["balance"].isel(seed=0).sel(layer=1)
    change = (recorded.sel(epoch=1) - recorded.sel(epoch=0)).values
    size = float((a.square().sum(0) + w.square().sum(1)).max().detach())
    np.testing.assert_allclose(change, step.detach().numpy(), rtol=0, atol=20 * np.finfo(float).eps * size)
    assert ds["balance"].sel(layer=2).isnull().all()


def test_flow_conserves_what_steps_change(tmp_path):
    """Ten times smaller steps for the same time change the balance ten times less."""
    change = []
    for part in (1, 10):
        ds, _ = claim(
            tmp_path / str(part), training__method="gd", training__learning_rate=0.05 / part,
            training__steps_per_epoch=10 * part,
        )  # fmt: skip
        change.append(abs(ds["balance"].isel(epoch=-1) - ds["balance"].isel(epoch=0)).max(["layer", "node"]))
    np.testing.assert_allclose(change[0] / change[1], 10, rtol=0.25)


def test_convolutions_and_batch_norm_have_no_balance():
    with pytest.raises(tsdyn.ExperimentError, match="balance is not measured of convolutions and BatchNorm"):
        small(student__batch_norm="before", **RECORD)
    network = tsdyn.Network([torch.ones(2, 1, 3, 3), torch.ones(1, 18)], image=(1, 5, 5))
    with pytest.raises(ValueError, match="balances"):
        theory.balances(network)


def test_a_fork_with_another_rate_holds_too(tmp_path):
    claim(tmp_path)
    change = {"set": {"training.learning_rate": 0.05}}
    ds = tsdyn.fork(tmp_path / "run", at=1, perturb=change, draws="other", out=tmp_path / "child")
    assert (audit(ds).sel(claim=CLAIM).verdict == "holds").all()
