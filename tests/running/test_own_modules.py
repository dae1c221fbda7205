"""Students and teachers that are modules of a user's own, against plain torch loops on the same batches."""

import functools
import importlib
import json
import linecache
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsdyn
from tests import processes
from tests.archive.states.children import child
from tests.cases import small
from tests.comparing import assert_same
from tsdyn import registers
from tsdyn.archive import whole_files
from tsdyn.engine import general, train
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble, mark_dead
from tsdyn.engine.loss import LOSSES
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.parts import Record
from tsdyn.problem import teachers
from tsdyn.problem.inputs import batch_indices, generator, training_inputs
from tsdyn.running import own_modules, runner
from tsdyn.running.members import Members

INPUTS, OUTPUTS = 16, 3


class Residual(nn.Module):
    """LayerNorm and a skip connection."""

    def __init__(self, width=8):
        super().__init__()
        self.below, self.norm = nn.Linear(INPUTS, width), nn.LayerNorm(width)
        self.inner, self.top = nn.Linear(width, width), nn.Linear(width, OUTPUTS)

    def forward(self, x):
        h = self.below(x)
        return self.top(h + torch.relu(self.inner(self.norm(h))))


class Attention(nn.Module):
    """Four tokens of four numbers, one head, a causal mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.top = nn.Linear(4, 12), nn.Linear(16, OUTPUTS)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(1, (4, 4))).chunk(3, -1)
        weights = (q @ k.mT / 2).masked_fill(~self.mask, -torch.inf).softmax(-1)
        return self.top((x.unflatten(1, (4, 4)) + weights @ v).flatten(1))


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, OUTPUTS),
    )  # fmt: skip


MODULES = {"residual": Residual, "attention": Attention, "convnet": convnet}
RULES = {
    "sgd": {"training__learning_rate": 0.02},
    "momentum": {"training__learning_rate": 0.01, "training__momentum": 0.9, "training__weight_decay": 0.01},
    # a bias below BatchNorm has a gradient of rounding only: 2e-16 over epsilon, times the rate, 50 times
    "adam": {"training__method": "adam", "training__learning_rate": 0.001},
}


def experiment(**changes):
    base = {"teacher__widths": [INPUTS, 5, OUTPUTS], "training__epochs": 1, "training__steps_per_epoch": 50}
    return small(**{"record__observables": ["loss", "mse", "parameter"], "seeds": 2} | base | changes)


def start(make, seed, stream="student"):
    """What the documentation says: torch's generator from the seed's own stream."""
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(seed, stream).integers(2**63)))
        return make().double()


def by_torch(module, of, batches):
    law = of.training
    if law.method == "adam":
        optimizer = torch.optim.Adam(module.parameters(), law.learning_rate)
    else:
        optimizer = torch.optim.SGD(
            module.parameters(), law.learning_rate, momentum=law.momentum, weight_decay=law.weight_decay
        )
    for x, y in batches:
        optimizer.zero_grad()
        (0.5 * (module(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("taught", ["same", "network"])
def test_a_run_is_plain_torch_on_the_same_batches(tmp_path, name, rule, taught):
    """50 steps in float64.  Adam divides by ε where a gradient is rounding: its own, times the rate, each step."""
    make, asked = MODULES[name], experiment(**RULES[rule])
    teacher = make if taught == "same" else None
    ds = tsdyn.run(asked, tmp_path / "run", student=make, teacher=teacher).load()
    for seed in (0, 1):
        x = torch.from_numpy(training_inputs(asked, seed))
        taught_by = start(make, seed, "teacher").eval() if taught == "same" else teachers.draw_teacher(asked, seed)
        with torch.no_grad():
            y = taught_by(x)
        rows = torch.from_numpy(batch_indices(asked, seed, 1, len(x)))
        module = by_torch(start(make, seed), asked, [(x[r], y[r]) for r in rows]).eval()
        found = own_modules.named(ds.sel(seed=seed).isel(epoch=-1))
        state = module.state_dict()
        assert set(found) == set(state)
        for entry, expected in state.items():
            expected = expected.detach().double()
            assert_same(torch.from_numpy(found[entry].values), expected, 1e-9 if rule == "adam" else 1e-12, what=entry)
        with torch.no_grad():
            last = float(0.5 * (module(x) - y).square().sum(1).mean())
        assert float(ds.loss_train.sel(seed=seed)[-1]) == pytest.approx(last, rel=1e-8 if rule == "adam" else 1e-11)


def test_what_is_recorded_and_how_it_is_read(tmp_path, caplog):
    unchosen = Record().observables
    asked = small(teacher__widths=[INPUTS, 5, OUTPUTS], training__epochs=2, record__observables=unchosen)
    with caplog.at_level(logging.INFO):
        ds = tsdyn.run(asked, tmp_path / "run", student=Residual)
    assert "loss, mse, parameter are recorded" in caplog.text  # the default list is of networks
    assert ds.parameter.dims == ("seed", "epoch", "entry")
    assert tsdyn.schema.problems(ds) == []
    assert ds.width.values.tolist() == [0, OUTPUTS]  # a module has no layers below its output
    shapes = json.loads(ds.attrs["parameters"])
    assert shapes == {n: list(t.shape) for n, t in Residual().state_dict().items()}
    named = own_modules.named(ds)
    assert named["inner.weight"].dims == ("seed", "epoch", "dim_0", "dim_1")
    assert named["inner.weight"].chunks is not None  # lazy
    begin = start(Residual, 1).state_dict()["inner.weight"]
    np.testing.assert_array_equal(named["inner.weight"].sel(seed=1, epoch=0), begin)
    with pytest.raises(ValueError, match="holds no parameters of an own module"):
        own_modules.named(ds.drop_vars("parameter"))


def test_a_seed_parameter_is_filled_and_torchs_generator_stays(tmp_path):
    seen = []

    def make(seed):
        seen.append(seed)
        return nn.Linear(INPUTS, OUTPUTS)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Members(own_modules.described(experiment(seeds=[4, 7]), student=make), student=make).draw()
    assert torch.equal(torch.rand(3), expected)
    assert seen == [4, 7, 4, 7]  # looked at before, then drawn


def test_a_resumed_run_has_the_same_bits_and_another_module_is_refused(tmp_path):
    """Also with running statistics, Adam's moments and a boolean buffer in the state."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(INPUTS), Attention()

        def forward(self, x):
            return self.inner(self.norm(x))

    asked = experiment(training__epochs=4, **RULES["adam"])
    whole = tsdyn.run(asked, tmp_path / "whole", student=Both).load()
    tsdyn.run(asked.replace({"training.epochs": 2}), tmp_path / "parts", student=Both)
    again = tsdyn.run(asked, tmp_path / "parts", student=Both).load()
    for name in whole.data_vars:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
    with pytest.raises(whole_files.ArchiveError, match=r"student\.module: .*Residual.* here, .*Both.* there"):
        tsdyn.run(asked, tmp_path / "whole", student=Residual)
    with pytest.raises(whole_files.ArchiveError, match=r"student\.module: 'not set' here, '.*Both' there"):
        tsdyn.run(small(teacher__widths=[INPUTS, 5, OUTPUTS]), tmp_path / "whole")
    changed = type("Both", (Both,), {"forward": lambda self, x: self.inner(x), "__module__": Both.__module__})
    changed.__qualname__ = Both.__qualname__
    with pytest.raises(whole_files.ArchiveError, match=r"student\.source: '[0-9a-f]{64}' here, '[0-9a-f]{64}' there"):
        tsdyn.run(asked, tmp_path / "whole", student=changed)
    held = tsdyn.Experiment.from_toml(tmp_path / "whole" / "experiment.toml").replace({"training.epochs": 9})
    with pytest.raises(tsdyn.ExperimentError, match="pass the function that makes it"):
        tsdyn.run(held, tmp_path / "whole")


@pytest.mark.parametrize("rule", RULES)
def test_eight_killed_and_resumed_seeds_are_eight_plain_loops(tmp_path, rule):
    """50 steps as one ensemble, ended by SIGKILL after some epochs: the bits of a whole run, the numbers of torch."""
    asked = experiment(seeds=8, training__epochs=5, **RULES[rule] | {"training__steps_per_epoch": 10})
    whole = tsdyn.run(asked, tmp_path / "whole", student=Residual).load()

    def work():
        def told(epoch, *_):
            if epoch == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        runner.COMMIT_SECONDS = 0.0
        tsdyn.run(asked, tmp_path / "killed", progress=told, student=Residual)

    assert child(work, tmp_path / "killed").how == "killed"
    assert 1 < tsdyn.open(tmp_path / "killed").sizes["epoch"] < 6
    again = tsdyn.run(asked, tmp_path / "killed", student=Residual).load()
    for name in whole.variables:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=str(name))
    for seed in asked.seed_labels:
        x, teacher = torch.from_numpy(training_inputs(asked, seed)), teachers.draw_teacher(asked, seed)
        rows = [torch.from_numpy(batch_indices(asked, seed, epoch, len(x))) for epoch in range(1, 6)]
        module = by_torch(start(Residual, seed), asked, [(x[r], teacher(x[r])) for each in rows for r in each])
        found = own_modules.named(again.sel(seed=seed).isel(epoch=-1))
        for entry, expected in module.state_dict().items():
            mine = torch.from_numpy(found[entry].values)
            assert_same(mine, expected, 1e-9 if rule == "adam" else 1e-12, what=f"{seed} {entry}")


def test_a_network_learns_from_a_module_of_another_depth(tmp_path):
    asked = small(
        teacher__widths=[INPUTS, 2, 2, OUTPUTS],
        student__widths=[INPUTS, 6, 5, OUTPUTS],
        record__observables=["loss", "weight"],
    )
    ds = tsdyn.run(asked, tmp_path / "run", teacher=Residual).load()
    assert ds.width.values.tolist() == [6, 5, OUTPUTS]
    assert ds.teacher_parameter.dims == ("seed", "teacher_entry")
    assert "teacher_weight" not in ds
    first = torch.cat([t.flatten() for t in start(Residual, 0, "teacher").state_dict().values()])
    np.testing.assert_array_equal(ds.teacher_parameter.sel(seed=0), first)
    assert (ds.loss_eval[:, -1] < ds.loss_eval[:, 0]).all()


def test_a_sweep_of_an_own_module(tmp_path):
    asked = experiment(training__steps_per_epoch=10).replace({"sweep": {"training.learning_rate": [0.01, 0.02]}})
    ds = tsdyn.run(asked, tmp_path / "run", student=Residual)
    assert dict(ds.loss_train.sizes) == {"learning_rate": 2, "seed": 2, "epoch": 2}
    alone = tsdyn.run(
        experiment(training__steps_per_epoch=10, training__learning_rate=0.02), tmp_path / "alone", student=Residual
    )
    np.testing.assert_array_equal(ds.parameter.sel(learning_rate=0.02), alone.parameter)


@pytest.mark.parametrize("trained", LOSSES.values(), ids=LOSSES)
def test_classes_are_learnt_too(tmp_path, trained):
    asked = experiment(training__loss=trained.name, training__learning_rate=0.1)
    ds = tsdyn.run(asked, tmp_path / "run", student=Residual)
    assert (ds.loss_train[:, -1] < ds.loss_train[:, 0]).all()


# --- the engine ----------------------------------------------------------------------------------------------


def drawn(make, members=3, samples=24, steps=6, batch=8):
    ensemble = Ensemble.of([start(make, seed) for seed in range(members)])
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(members, samples, INPUTS, generator=rng, dtype=torch.float64)
    y = torch.randn(members, samples, OUTPUTS, generator=rng, dtype=torch.float64)
    return ensemble, x, y, torch.randint(samples, (members, steps, batch), generator=rng)


def trained_apart(make, x, y, rows, rate=0.05):
    """Train members by torch.optim, one after the other."""
    found = []
    for seed in range(len(x)):
        module = start(make, seed)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], rate)
        for r in rows[seed]:
            optimizer.zero_grad()
            (0.5 * (module(x[seed, r]) - y[seed, r]).square().sum(1).mean()).backward()
            optimizer.step()
        found.append({**dict(module.named_parameters()), **dict(module.named_buffers())})
    return found


class Tied(nn.Module):
    """One tensor in two places, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.top = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(INPUTS, INPUTS).requires_grad_(False)

    def forward(self, x):
        return self.top(torch.tanh(self.frozen(self.two(torch.tanh(self.one(x))))))


class Refused(nn.Module):
    """A module that vmap cannot handle, since it reads numbers."""

    def __init__(self):
        super().__init__()
        self.top = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x):
        return self.top(x) * (1.0 if float(x.sum()) > -1e9 else 2.0)


class Wrong(torch.autograd.Function):
    """The square, with a wrong rule under vmap."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def vmap(info, in_dims, x):
        return x * x * x, in_dims[0]


class Misled(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.top = nn.Linear(INPUTS, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x):
        return self.top(Wrong.apply(self.below(x)))


class Counting(nn.Module):
    """Cumulative averages: BatchNorm then reads a counter."""

    def __init__(self):
        super().__init__()
        self.norm, self.top = nn.BatchNorm1d(INPUTS, momentum=None), nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x):
        return self.top(self.norm(x))


@pytest.mark.parametrize(
    ("make", "looped"),
    [(Residual, None), (Attention, None), (convnet, None), (Tied, None),
     (Refused, "refuses it"), (Misled, "gives other gradients"), (Counting, "refuses it")],
)  # fmt: skip
def test_members_are_trained_as_modules_of_their_own(make, looped, caplog):
    """Whether vmap is right, wrong or refuses; buffers and shared parameters too, frozen ones stay."""
    ensemble, x, y, rows = drawn(make)
    train_epoch(ensemble, finite_stream(x, y, rows), Rule(0.05), batch=8)
    assert [r.message for r in caplog.records if "vmap" in r.message] == caplog.messages
    assert (looped is None and caplog.messages == []) or looped in caplog.text
    way = ensemble.kept["general", LOSSES["mse"]]
    assert way.slope is (general.mapped if looped is None else general.looped)
    for seed, expected in enumerate(trained_apart(make, x, y, rows)):
        for name, tensor in (ensemble.values | ensemble.buffers).items():
            assert_same(tensor[seed], expected[name], 1e-12, what=name)


def test_a_dead_member_leaves_the_others_alone():
    ensemble, x, y, rows = drawn(Residual)
    alone, *_ = drawn(Residual)
    bad = y.clone()
    bad[1] = 1e300
    for targets, epoch in ((bad, 1), (y, 2)):
        train_epoch(ensemble, finite_stream(x, targets, rows), Rule(0.05), batch=8)
        train_epoch(alone, finite_stream(x, y, rows), Rule(0.05), batch=8)
        assert mark_dead(ensemble, epoch) == ([1] if epoch == 1 else [])
    for name, tensor in ensemble.values.items():
        assert bool(tensor[1].isnan().all())
        assert_same(tensor[::2], alone.values[name][::2], 1e-13, what=name)


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


# --- modules that a file names ---------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, hidden, frozen=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, hidden), nn.Linear(hidden, 3)
        self.inner.requires_grad_(not frozen)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))

def wide(hidden: int) -> nn.Module:
    return Wide(hidden)

def bare(hidden):
    return Wide(hidden)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder on the path with a module that is imported anew in each test."""
    folder = tmp_path / "somebodys"
    folder.mkdir()
    (folder / "somebodys_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder / "somebodys_nets.py"
    sys.modules.pop("somebodys_nets", None)


def named_in_a_file(name="Wide", **changes):
    asked = tsdyn.Experiment.from_toml_text(f"""
name = "from-a-file"
seeds = 2
teacher = {{ widths = [{INPUTS}, 5, {OUTPUTS}] }}
data = {{ train = 40, eval = 30 }}
training = {{ epochs = 2, batch = 8 }}
record = {{ observables = ["loss", "parameter", "gradient_norm", "hessian_eigenvalue"], eigenvalues = 4 }}

[student]
module = "somebodys_nets:{name}"
arguments = {{ hidden = 4 }}
""")
    return asked.replace(changes) if changes else asked


@pytest.mark.parametrize("name", ["Wide", "wide"])
def test_a_module_that_a_file_names_is_the_one_passed_from_python(tmp_path, nets, name):
    ds = tsdyn.run(named_in_a_file(name), tmp_path / "file").load()
    make = getattr(importlib.import_module("somebodys_nets"), name)
    passed = tsdyn.run(named_in_a_file(name), tmp_path / "passed", student=make).load()
    for variable in ds.data_vars:
        np.testing.assert_array_equal(ds[variable], passed[variable], err_msg=str(variable))
    assert ds.attrs["digest"] == passed.attrs["digest"]


def test_gradient_norms_and_hessians_of_a_module_are_autograds(tmp_path, nets):
    """The frozen layer has no part in either."""
    for frozen in (False, True):
        asked = named_in_a_file(**{"student.arguments": {"hidden": 4, "frozen": frozen}})
        ds = tsdyn.run(asked, tmp_path / f"{frozen}").load()
        module = importlib.import_module("somebodys_nets").Wide(4, frozen).double()
        x = torch.from_numpy(training_inputs(asked, 1))
        y = teachers.draw_teacher(asked, 1)(x)
        for epoch in (0, 2):
            state = {n: torch.from_numpy(a.values) for n, a in own_modules.named(ds.sel(seed=1, epoch=epoch)).items()}
            module.load_state_dict(state)
            free = [p for p in module.parameters() if p.requires_grad]
            norms = torch.stack([
                torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * (module(a) - b).square().sum(), free)]).norm()
                for a, b in zip(x, y, strict=True)
            ])  # fmt: skip
            quantiles = torch.tensor(asked.record.quantiles, dtype=torch.float64)
            expected = torch.quantile(norms, quantiles)
            assert_same(torch.from_numpy(ds.gradient_norm.sel(seed=1, epoch=epoch).values), expected, 1e-12)
            slope = torch.autograd.grad(0.5 * (module(x) - y).square().sum(1).mean(), free, create_graph=True)
            rows = [torch.autograd.grad(s, free, retain_graph=True) for s in torch.cat([g.flatten() for g in slope])]
            hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            largest = torch.linalg.eigvalsh(hessian).flip(0)[:4]
            found = torch.from_numpy(ds.hessian_eigenvalue.sel(seed=1, epoch=epoch).values)
            assert_same(found, largest, 1e-10)


def test_workers_import_what_a_file_names_and_get_what_is_passed(tmp_path, nets):
    asked = named_in_a_file(sweep={"training.learning_rate": [0.01, 0.02]})
    here = tsdyn.run(asked, tmp_path / "here").load()
    make = importlib.import_module("somebodys_nets").wide
    for where, student in (("file", None), ("passed", functools.partial(make, hidden=4))):
        there = tsdyn.run(asked, tmp_path / where, workers=1, student=student).load()
        np.testing.assert_array_equal(there["parameter"], here["parameter"])
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"student: .* cannot be sent to workers \(TypeError.*leave workers out"):
        tsdyn.run(asked, tmp_path / "lock", workers=1, student=lambda hidden: (lock, make(hidden))[1])


def test_opening_imports_nothing_and_other_source_is_refused(tmp_path, nets):
    asked, run = named_in_a_file(), tmp_path / "run"
    begun = tsdyn.run(asked, run).load()
    held = tsdyn.Experiment.from_toml(run / "experiment.toml").replace({"training.epochs": 4})
    nets.write_text(NETS.replace("tanh", "sin"))
    sys.modules.pop("somebodys_nets")
    linecache.clearcache()
    importlib.invalidate_caches()
    for other in (held, asked.replace({"training.epochs": 4})):
        with pytest.raises(
            whole_files.ArchiveError, match=r"student\.source: '[0-9a-f]{64}' here, '[0-9a-f]{64}' there"
        ):
            tsdyn.run(other, run)
    with pytest.raises(tsdyn.ExperimentError, match=r"source has SHA-256 [0-9a-f]{64} here.*begun with [0-9a-f]{64}"):
        Members(held)
    nets.unlink()
    sys.modules.pop("somebodys_nets")
    importlib.invalidate_caches()
    again = tsdyn.open(run).load()
    assert "somebodys_nets" not in sys.modules
    np.testing.assert_array_equal(again["parameter"], begun["parameter"])
    with pytest.raises(tsdyn.ExperimentError, match=r"somebodys_nets cannot be imported .*PYTHONPATH, or pass"):
        tsdyn.run(held, run)
    nets.write_text(NETS)
    importlib.invalidate_caches()
    grown = tsdyn.run(held, run).load()
    np.testing.assert_array_equal(grown["parameter"].sel(epoch=[0, 1, 2]), begun["parameter"])


def test_the_command_runs_a_module_on_the_python_path_and_not_one_of_the_working_directory(tmp_path, nets):
    (tmp_path / "lying_there.py").write_text(f"open('executed', 'w').close()\n{NETS}")
    words = ["run", "file.toml", "--quiet", "-o", "run"]
    installed = [str(Path(sys.executable).with_name("tsdyn")), *words]  # which decides where modules are searched
    for module, code, said in (
        ("lying_there:Wide", 2, "lying_there cannot be imported"),
        ("somebodys_nets:Wide", 0, ""),
    ):
        (tmp_path / "file.toml").write_text(named_in_a_file().replace({"student.module": module}).to_toml())
        if code:
            done = subprocess.run(installed, cwd=tmp_path, capture_output=True, text=True)
        else:
            done = processes.run(["tsdyn", *words], tmp_path)
        assert done.returncode == code, done.stderr
        assert said in " ".join(done.stderr.split())
        assert bool(said) == bool(done.stderr)
    assert not (tmp_path / "executed").exists()
    assert float(tsdyn.open(tmp_path / "run")["loss_eval"].isel(epoch=-1).max()) < 10


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("os:system", {"command": "touch harm"}, "a file, which may be anybody's, can name a class of nn.Module"),
        ("subprocess:Popen", {"args": "touch harm"}, "can name a class of nn.Module"),
        ("somebodys_nets:bare", {"hidden": 4}, "annotated to return one"),
        ("somebodys_nets:Nobody", {"hidden": 4}, "has no such name"),
        ("nobody.s_nets:Wide", {"hidden": 4}, "nobody.s_nets cannot be imported"),
        ("__main__:Wide", {"hidden": 4}, "not at an import path"),
        ("somebodys_nets:Wide", {"width": 4}, "raised TypeError.*student.arguments = {'width': 4}"),
        ("somebodys_nets:Wide", None, "raised TypeError.*student.arguments = {}"),
    ],
)
def test_what_a_file_cannot_name_is_refused(tmp_path, nets, monkeypatch, path, arguments, message):
    monkeypatch.chdir(tmp_path)
    plain = named_in_a_file().as_dict()
    plain["student"] |= {"module": path, "arguments": arguments}
    if arguments is None:
        del plain["student"]["arguments"]
    with pytest.raises(tsdyn.ExperimentError, match=message):
        tsdyn.run(tsdyn.Experiment.from_dict(plain), tmp_path / "run")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


def test_bad_keys_of_modules_are_refused_when_a_file_is_read(nets):
    for changes, message in (
        ({"student.module": "Wide"}, r"student\.module"),
        ({"sweep": {"student.numbers": [1, 2]}}, "is written by tsdyn"),
        ({"student.numbers": 3}, "written by tsdyn"),
    ):
        with pytest.raises(tsdyn.ExperimentError, match=message):
            named_in_a_file(**changes)
