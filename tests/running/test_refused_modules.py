"""Modules of a user's own that cannot be trained or measured are refused, before anything is written."""

import threading
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsdyn
from tests.running.modules import INPUTS, OUTPUTS, Residual, drawn, experiment
from tsdyn import registers
from tsdyn.engine import train
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.running import own_modules


def hooked():
    module = nn.Linear(INPUTS, OUTPUTS)
    module.weight.register_hook(lambda g: 2 * g)
    return module


def hook_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(INPUTS, OUTPUTS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hooked, "weight has a hook on its gradient"),
        (hook_weight_norm, "cannot be copied"),
        (
            lambda: nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.AlphaDropout(0.1)),
            r"not keyed by seed and epoch.*set p = 0, call its eval\(\), or take Dropout, Dropout1d",
        ),
        (lambda: nn.Linear(INPUTS, OUTPUTS).requires_grad_(False), "no parameter that requires grad"),
        (lambda: nn.LazyLinear(OUTPUTS), "lazy or complex"),
        (lambda: nn.Linear(INPUTS, OUTPUTS, dtype=torch.complex64), "lazy or complex"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(make, message):
    with pytest.raises(tsdyn.ExperimentError, match=message):
        own_modules.made(make, experiment(), 0, "student")


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x):
        return F.dropout(self.top(x), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Noisy, "draws random numbers"),
        (lambda: nn.Linear(INPUTS, OUTPUTS + 1), r"gives \(8, 4\) for inputs \(8, 16\)"),
        (lambda: nn.LSTM(INPUTS, OUTPUTS), "gives tuple"),
        (lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Linear(4, OUTPUTS)), r"gives \(8, 4, 3\)"),
    ],
)
def test_outputs_that_cannot_be_learnt_from_are_refused(make, message):
    ensemble, x, y, rows = drawn(make)
    with pytest.raises(ValueError, match=message):
        train_epoch(ensemble, finite_stream(x, y, rows), Rule(0.05), batch=8)


class Counter(nn.Module):
    """Counts its calls in a buffer, or where only Python sees it."""

    def __init__(self, buffer):
        super().__init__()
        self.top, self.calls = nn.Linear(INPUTS, OUTPUTS), 0
        if buffer:
            del self.calls
            self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.top(x) * self.calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Counter, buffer=True), "changes calls when it is called in evaluation mode"),
        (partial(Counter, buffer=False), "gives other outputs for the same inputs in evaluation mode"),
        (Noisy, "gives other outputs for the same inputs in evaluation mode"),
    ],
)
def test_what_measuring_would_change_is_refused_before_anything_is_written(tmp_path, make, message):
    with pytest.raises(tsdyn.ExperimentError, match=message):
        tsdyn.run(experiment(), tmp_path / "run", student=make)
    module = make().double()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x, y = torch.ones(4, INPUTS, dtype=torch.float64), torch.ones(4, OUTPUTS, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        tsdyn.Recorder(tmp_path / "own", module, probe=(x, y), observables=("loss", "weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not list(tmp_path.iterdir())


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(INPUTS, OUTPUTS)
        self.lock = threading.Lock()


CALLS: list[int] = []


class Tiring(nn.Linear):
    """Raises when it has been called too often, in training or in evaluation."""

    def __init__(self, training):
        super().__init__(INPUTS, OUTPUTS)
        self.when = training

    def forward(self, x):
        CALLS[0] += self.training == self.when
        if CALLS[0] > 20:
            raise RuntimeError("too often")
        return super().forward(x)


def test_a_module_that_cannot_be_copied_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(tsdyn.ExperimentError, match=r"Locked cannot be copied .*lock.* each member is a copy"):
        tsdyn.run(experiment(), tmp_path / "run", student=Locked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "error", "said"),
    [
        (False, registers.PartError, "Tiring raised RuntimeError while it was measured: too often"),
        (True, tsdyn.ExperimentError, r"raised RuntimeError while it was trained in epoch \d+: too often"),
    ],
)
def test_a_module_that_raises_on_the_way_is_named_and_the_run_goes_on_when_it_is_mended(
    tmp_path, training, error, said
):
    def make():
        return Tiring(training)

    asked = experiment(training__epochs=12, training__steps_per_epoch=4)
    CALLS[:] = [0]
    with pytest.raises(error, match=said):
        tsdyn.run(asked, tmp_path / "run", student=make)
    CALLS[0] = -(10**6)
    assert tsdyn.run(asked, tmp_path / "run", student=make)["epoch"].values[-1] == 12


def test_dropout_that_is_off_is_no_dropout():
    module = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Dropout(0.5).eval(), nn.Dropout(0.0))
    assert own_modules.made(lambda: module, experiment(), 0, "student") is module


def test_what_only_networks_have_is_refused_of_modules():
    for changes, message in (
        ({"training__frozen": [1]}, "frozen, normalize and rates"),
        ({"training__method": "flow"}, "training.method = 'flow'"),
        ({"data__augment": "aware"}, "data.augment = 'aware'"),
        ({"student__init": "torch"}, "student.init = 'torch'"),
        ({"record__observables": ["alignment"]}, r"alignment is not measured with student.module = .*; there are"),
    ):
        with pytest.raises(tsdyn.ExperimentError, match=message):
            own_modules.described(experiment(**changes), student=Residual)
    with pytest.raises(tsdyn.ExperimentError, match="'parameter' is of a module of your own"):
        own_modules.described(experiment())
    module = nn.Linear(INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match="call requires_grad_"):
        train.chosen(Ensemble.of([module]), Rule(0.1, frozen=(1,)))


class Raising(nn.Linear):
    def forward(self, x):
        raise RuntimeError("out of order")


def unnamable():
    module = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    module.add_module("a/b", nn.Linear(OUTPUTS, OUTPUTS))
    return module


def wider_with_the_seed(seed):
    return nn.Sequential(nn.Linear(INPUTS, 3 + seed), nn.Linear(3 + seed, OUTPUTS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [nn.Linear(INPUTS, OUTPUTS)], "gives list; it must make an nn.Module"),
        (unnamable, r"names \['a/b.weight', 'a/b.bias'\] cannot be stored"),
        (wider_with_the_seed, "seeds 0 and 1 get modules that differ in 0.weight, 0.bias, 1.weight"),
        (lambda: Raising(INPUTS, OUTPUTS), r"Raising raised RuntimeError for inputs \(.*\): out of order"),
    ],
)
def test_what_makes_no_member_is_refused_before_anything_is_written(tmp_path, make, message):
    with pytest.raises(tsdyn.ExperimentError, match=message):
        tsdyn.run(experiment(), tmp_path / "run", student=make)
    assert not (tmp_path / "run").exists()


def _doubled(x):
    return 2.0 * x


def _tripled(x):
    return 3.0 * x


def test_the_digest_of_a_source_sees_static_methods_properties_and_partial_arguments():
    def of(biased, used):
        class Scaled(nn.Linear):
            factor = staticmethod(_doubled if used else _tripled)

            @property
            def size(self):
                return self.weight.shape

            def forward(self, x):
                return self.factor(super().forward(x))

        return partial(Scaled, INPUTS, OUTPUTS, bias=biased)

    sources = {
        own_modules.described(experiment(), student=of(biased, used)).student.source
        for biased in (True, False)
        for used in (True, False)
    }
    assert len(sources) == 4
    assert own_modules.described(experiment(), student=of(True, True)).student.source in sources
