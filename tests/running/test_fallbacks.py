"""What keeps a run from compiled code is in its archive, and `tsdyn show` says it."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tsdyn
from tests.cases import small
from tsdyn.archive import machines
from tsdyn.cli import app
from tsdyn.engine import compiled_step, convolution, native, train
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Rule
from tsdyn.networks.network import Network


@pytest.fixture
def without_library(monkeypatch):
    native.load.cache_clear()
    monkeypatch.setenv("TSDYN_KERNEL", "off")
    yield
    native.load.cache_clear()


def shown(path):
    found = CliRunner().invoke(app, ["show", str(path)], env={"COLUMNS": "300"})
    assert found.exit_code == 0
    return found.output


def test_a_run_without_a_compiler_says_so(without_library, tmp_path):
    tsdyn.run(small(training__epochs=1), tmp_path / "run")
    (reason,) = machines.fallbacks(tsdyn.open(tmp_path / "run").attrs)
    assert reason == "the step is not compiled: TSDYN_KERNEL=off; so the batched engine trains"
    assert reason in shown(tmp_path / "run")


@pytest.mark.skipif(
    native.missing(compiled_step.SOURCE, compiled_step.Job) is not None, reason="there is no C++ compiler"
)
def test_a_compiled_run_says_nothing(tmp_path):
    tsdyn.run(small(training__epochs=1), tmp_path / "run")
    assert machines.FALLBACKS not in tsdyn.open(tmp_path / "run").attrs
    assert "not compiled" not in shown(tmp_path / "run")


def connected():
    return Network([torch.eye(3, dtype=torch.float64)] * 2, None)


def convolved(stride, activation="relu"):
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    side = (8 - 3) // stride + 1
    top = torch.ones(2, side * side, dtype=torch.float64)
    return Network([kernel, top], None, activation, image=(1, 8, 8), stride=[stride])


@pytest.mark.skipif(native.missing(convolution.SOURCE, convolution.Job) is not None, reason="there is no C++ compiler")
def test_reasons_of_parts_that_are_not_compiled():
    own = Loss("own", lambda f, y: (f - y).abs().mean(), "J = E |f* - f|", "outputs")
    for network, rule, expected in (
        (connected(), Rule(0.1), []),
        (connected(), Rule(0.1, loss=own), ["loss 'own' is not tsdyn's own, so the general engine trains"]),
        (convolved(1), Rule(0.1), []),
        (convolved(2), Rule(0.1), ["convolutions of stride 2 are torch's own"]),
        (convolved(1, "tanh"), Rule(0.1), ["steps of ConvNets are compiled for relu, not for tanh"]),
    ):
        assert train.fallbacks(Ensemble.of([network]), rule) == expected


def test_reasons_that_cannot_be_read_are_none():
    for text in ("no list", json.dumps({"a": 1})):
        assert machines.fallbacks({machines.FALLBACKS: text}) == []
