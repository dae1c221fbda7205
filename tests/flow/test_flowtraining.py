"""`training.method = "flow"`: gradient flow of each member's own training loss, epoch by epoch."""

import json
import math

import numpy as np
import pytest
import torch

import tsdyn
from tests.cases import small
from tsdyn import ExperimentError
from tsdyn.engine.ensemble import layer_of
from tsdyn.engine.rule import Rule
from tsdyn.flow.epochs import TrainingLoss
from tsdyn.flow.flows import gradient_flow
from tsdyn.running import estimates
from tsdyn.running.members import Members

SMALL = {
    "seeds": 2,
    "teacher__widths": [3, 2, 2],
    "data__train": 40,
    "data__eval": 20,
    "student__scale": 0.3,
    "student__activation": "tanh",
    "training__method": "flow",
    "training__learning_rate": 0.5,
    "training__steps_per_epoch": 4,
}


def test_an_epoch_is_the_flow_of_the_training_loss_for_rate_times_steps():
    """Compared with one flow through all epochs: both err by 1e-6 per step over some tens of steps."""
    experiment = small(**SMALL, training__weight_decay=0.01)
    begin, members = Members(experiment), Members(experiment)
    for epoch in (1, 2):
        assert members.advance(epoch) == []
    for member in range(2):
        loss = TrainingLoss(begin.ensemble, member, *(x[member] for x in begin.finite), Rule(1.0, weight_decay=0.01))
        row = torch.cat([p[member].flatten() for p in begin.ensemble.values.values()])
        ds = gradient_flow(loss, row, end=2 * 0.5 * 4, rtol=1e-7, atol=1e-9, gradient_tolerance=0.0)
        reached = torch.cat([p[member].flatten() for p in members.ensemble.values.values()])
        np.testing.assert_allclose(reached, ds.final[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("activation", "loss"), [("relu", "mse"), ("tanh", "cross_entropy")])
def test_gradient_descent_tends_to_the_flow_as_its_rate_falls(activation, loss):
    """Euler's error is of first order in the rate: halving it about halves the distance."""
    changes = SMALL | {"student__activation": activation, "training__loss": loss, "seeds": 1, "data__train": 20}
    flow = Members(small(**changes))
    flow.advance(1)
    apart = []
    for finer in (50, 100):
        more = {
            "training__method": "gd",
            "training__learning_rate": 0.5 / finer,
            "training__steps_per_epoch": 4 * finer,
        }
        descent = Members(small(**(changes | more)))
        descent.advance(1)
        pairs = zip(flow.ensemble.values.values(), descent.ensemble.values.values(), strict=True)
        apart.append(math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs)))
    assert apart[1] == pytest.approx(apart[0] / 2, rel=0.2)
    assert apart[1] < 0.01


def test_frozen_layers_stay():
    experiment = small(**SMALL, training__frozen=[1])
    members = Members(experiment)
    before = [p.clone() for p in members.ensemble.values.values()]
    members.advance(1)
    moved = [bool((p != q).any()) for p, q in zip(members.ensemble.values.values(), before, strict=True)]
    layers = [layer_of(name) for name in members.ensemble.values]
    assert [m for m, layer in zip(moved, layers, strict=True) if layer == 1] == [False, False]
    assert all(m for m, layer in zip(moved, layers, strict=True) if layer == 2)


def test_a_run_says_what_its_epochs_are_and_resumes_to_the_same_bits(tmp_path):
    experiment = small(**SMALL, training__epochs=2)
    whole = tsdyn.run(experiment, tmp_path / "whole").load()
    assert "dtheta/dt = -grad J" in json.loads(whole.attrs["conventions"])["time"]
    losses = whole.loss_train
    assert (losses.diff("epoch") < 0).all()
    members = Members(experiment)
    members.advance(1)
    state = {name: array.copy() for name, array in members.state().items()}
    again = Members(experiment)
    again.restore(state)
    again.advance(2)
    found = again.measure(2, ("loss_train",))["loss_train"]
    np.testing.assert_array_equal(found, losses.sel(epoch=2))
    assert estimates.estimate(experiment).seconds > 0


def test_a_member_that_does_not_arrive_is_dead_and_the_log_says_why(caplog):
    members = Members(small(**SMALL))
    members.ensemble.weights[0][1] = torch.nan
    assert members.advance(1) == [1]
    assert "ended by 'not finite'" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__momentum": 0.9}, "momentum = 0.9, normalize = false; gradient flow has neither"),
        ({"training__normalize": True}, "normalize = true; gradient flow has neither"),
        ({"data__train": "fresh"}, r"'flow' needs finite data.*kind = 'population-flow' needs none"),
        ({"dtype": "float32"}, "dtype = 'float32'; it integrates fully connected students in float64"),
    ],
)
def test_what_a_flow_cannot_do_is_named(changes, message):
    with pytest.raises(ExperimentError, match=message):
        small(**(SMALL | changes))
