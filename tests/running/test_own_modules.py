"""Students and teachers that are modules of a user's own, against plain torch loops on the same batches."""

import copy
import json
import logging
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.archive.states.children import child
from tests.cases import small
from tests.comparing import assert_same
from tests.running.modules import (
    INPUTS,
    MODULES,
    OUTPUTS,
    RULES,
    Attention,
    Residual,
    convnet,
    drawn,
    experiment,
    start,
)
from tsdyn.archive import whole_files
from tsdyn.engine import general
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import mark_dead
from tsdyn.engine.loss import LOSSES
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.parts import Record
from tsdyn.problem import teachers
from tsdyn.problem.inputs import batch_indices, evaluation_inputs, training_inputs
from tsdyn.running import own_modules, runner


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


class Odd(nn.Module):
    """One layer that goes by three names, a weight that moves buffers when it is read, and a parameter of no number."""

    def __init__(self):
        super().__init__()
        again = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.utils.parametrizations.spectral_norm(nn.Linear(INPUTS, 4)), again, again])
        self.top, self.nothing = nn.Sequential(again, nn.Linear(4, OUTPUTS)), nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.scale * self.top(x) + self.nothing.sum()


class Followed(Odd):
    """The same in a way that torch.func cannot follow."""

    def forward(self, x):
        return super().forward(x) if x.abs().sum() < 1e9 else x


@pytest.mark.parametrize("make", [Odd, Followed])
def test_shared_computed_and_empty_parts_are_trained_as_by_torch(tmp_path, make):
    asked = experiment(**RULES["momentum"], training__steps_per_epoch=10)
    ds = tsdyn.run(asked, tmp_path / "run", student=make).load()
    for seed in (0, 1):
        x = torch.from_numpy(training_inputs(asked, seed))
        y = teachers.draw_teacher(asked, seed)(x)
        rows = torch.from_numpy(batch_indices(asked, seed, 1, len(x)))
        module = by_torch(start(make, seed), asked, [(x[r], y[r]) for r in rows])
        for epoch, expected in ((0, start(make, seed)), (1, module)):
            found = own_modules.named(ds.sel(seed=seed, epoch=epoch))
            held = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
            assert found.keys() == held.keys()
            for name, tensor in held.items():
                assert_same(torch.from_numpy(found[name].values), tensor.detach(), 1e-12, what=name)


class Few(nn.Module):
    """Parameters of one number, of none, and of a layer that goes by two names."""

    def __init__(self):
        super().__init__()
        self.below, self.nothing = nn.Linear(INPUTS, 4), nn.Parameter(torch.zeros(0, 3))
        self.again = nn.Sequential(self.below, nn.Tanh(), nn.Linear(4, OUTPUTS))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.scale * self.again(x + self.below(x).mean(1, keepdim=True)) + self.nothing.sum()


class Branching(Few):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else super().forward(-x)


def test_parameters_of_one_number_or_none_are_measured_and_differentiated_through_training(tmp_path):
    asked = experiment(
        training__learning_rate=0.1, training__steps_per_epoch=5, training__clip=0.5, data__eval=7, seeds=1,
        record__observables=["loss", "parameter", "jacobian"],
    )  # fmt: skip
    ds = tsdyn.run(asked, tmp_path / "run", student=Few).load().isel(seed=0)
    teacher, x = teachers.draw_teacher(asked, 0), torch.from_numpy(training_inputs(asked, 0))
    seen = torch.from_numpy(evaluation_inputs(asked, 0))
    module = start(Few, 0)
    names, values = zip(*module.named_parameters(), strict=True)

    def loss(values, x):
        output = torch.func.functional_call(copy.deepcopy(module), dict(zip(names, values, strict=True)), (x,))
        return 0.5 * (output - teacher(x).detach()).square().sum(1).mean()

    now = values
    for rows in torch.from_numpy(batch_indices(asked, 0, 1, len(x))):
        slopes = torch.autograd.grad(loss(now, x[rows]), now, create_graph=True)
        length = torch.cat([g.flatten() for g in slopes]).norm()
        now = [v - 0.1 * g * (0.5 / (length + 1e-6)).clamp(max=1) for v, g in zip(now, slopes, strict=True)]
    assert_same(torch.from_numpy(ds.parameter.values[-1]), torch.cat([v.detach().flatten() for v in now]), 1e-12)
    right = torch.autograd.grad(loss(now, seen), values)
    found = tsdyn.sensitivity(tmp_path / "run", wrt="start", student=Few).d_start.isel(seed=0)
    assert_same(torch.from_numpy(found.values), torch.cat([g.flatten() for g in right]), 1e-10)
    output = module(seen)
    slopes = torch.autograd.grad(output[2, 1], values)
    found = torch.from_numpy(ds.jacobian.isel(epoch=0).values[2, 1])
    assert_same(found, torch.cat([g.flatten() for g in slopes]), 1e-12)
    tsdyn.run(asked.replace({"record.observables": ["loss", "parameter"]}), tmp_path / "other", student=Branching)
    with pytest.raises(tsdyn.ExperimentError, match=r"sensitivity: torch\.func\.vmap refuses Branching .* branches"):
        tsdyn.sensitivity(tmp_path / "other", wrt="start", student=Branching)


def test_what_is_recorded_and_how_it_is_read(tmp_path, caplog):
    unchosen = Record().observables
    asked = small(teacher__widths=[INPUTS, 5, OUTPUTS], training__epochs=2, record__observables=unchosen)
    with caplog.at_level(logging.INFO):
        ds = tsdyn.run(asked, tmp_path / "run", student=Residual)
    assert "loss, mse, parameter are recorded" in caplog.text  # the default list is of networks
    assert ds.parameter.dims == ("seed", "epoch", "entry")
    assert tsdyn.schema.problems(ds) == []
    # labelled whatever is recorded, so that it can be measured later
    assert ds.layer_name.values.tolist() == ["below", "inner", "top"]
    shapes = json.loads(ds.attrs["parameters"])
    assert shapes == {n: list(t.shape) for n, t in Residual().state_dict().items()}
    named = own_modules.named(ds)
    assert named["inner.weight"].dims == ("seed", "epoch", "dim_0", "dim_1")
    assert named["inner.weight"].chunks is not None  # lazy
    begin = start(Residual, 1).state_dict()["inner.weight"]
    np.testing.assert_array_equal(named["inner.weight"].sel(seed=1, epoch=0), begin)
    with pytest.raises(ValueError, match="holds no parameters of an own module"):
        own_modules.named(ds.drop_vars("parameter"))


def counted(folder, **changes):
    """A function that makes a module and notes in a file for which seed, also on a worker."""

    def make(seed):
        with open(folder / "calls", "a", encoding="utf-8") as file:
            file.write(f"{seed}\n")
        return nn.Linear(INPUTS, OUTPUTS)

    return experiment(**{"training__steps_per_epoch": 2} | changes), make


def calls(folder):
    """Seeds since the last call, in order."""
    file = folder / "calls"
    found = [int(line) for line in file.read_text(encoding="utf-8").split()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_a_seed_parameter_is_filled_and_torchs_generator_stays(tmp_path):
    asked, make = counted(tmp_path, seeds=[4, 7, 5])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tsdyn.run(asked, tmp_path / "run", student=make)
    assert torch.equal(torch.rand(3), expected)
    assert calls(tmp_path) == [4, 7, 5]  # looked at before, and trained


def test_a_module_is_made_once_per_seed(tmp_path, monkeypatch):
    """In a run, one that is resumed, seeds that are added, and each point of a sweep; large modules, too."""
    asked, make = counted(tmp_path, seeds=3)
    first = tsdyn.run(asked, tmp_path / "run", student=make, teacher=Residual).load()
    assert calls(tmp_path) == [0, 1, 2]
    tsdyn.run(asked.replace({"training.epochs": 2}), tmp_path / "run", student=make, teacher=Residual)
    assert calls(tmp_path) == [0, 1, 2]
    tsdyn.run(asked.replace({"training.epochs": 2, "seeds": 5}), tmp_path / "run", student=make, teacher=Residual)
    assert calls(tmp_path) == [0, 1, 2, 3, 4]
    rates = {"sweep": {"training.learning_rate": [0.01, 0.02]}}
    tsdyn.run(asked.replace(rates), tmp_path / "sweep", student=make)
    assert calls(tmp_path) == [0, 1, 2] * 2
    monkeypatch.setattr(own_modules, "_KEPT_BYTES", 0)
    again = tsdyn.run(asked, tmp_path / "large", student=make, teacher=Residual).load()
    assert calls(tmp_path) == [0, 2, 1]
    for name in first.data_vars:
        np.testing.assert_array_equal(again[name], first[name], err_msg=str(name))


def test_a_worker_trains_the_modules_that_were_looked_at(tmp_path):
    asked, make = counted(tmp_path, seeds=3)
    here = tsdyn.run(asked, tmp_path / "here", student=make).load()
    assert calls(tmp_path) == [0, 1, 2]
    there = tsdyn.run(asked, tmp_path / "there", student=make, workers=1).load()
    assert calls(tmp_path) == [0, 1, 2]
    np.testing.assert_array_equal(there.parameter, here.parameter)


def test_a_layer_by_itself_is_a_module_with_one_layer(tmp_path):
    """Its name among its own submodules is the empty string."""
    asked = experiment(teacher__widths=[INPUTS, OUTPUTS], record__observables=["weight", "bias", "gradient_rms"])
    make = lambda: nn.Linear(INPUTS, OUTPUTS)  # noqa: E731
    ds = tsdyn.run(asked, tmp_path / "run", student=make).load()
    assert ds.layer_name.values.tolist() == [""]
    first = start(make, int(ds.seed[0]))
    np.testing.assert_array_equal(ds.weight.isel(seed=0, epoch=0, layer=0), first.weight.detach())
    again = tsdyn.Experiment.from_toml(tmp_path / "run" / "experiment.toml")
    assert again.student.layers == ("",)
    assert tsdyn.layer(ds, "").identical(tsdyn.layer(ds, 1))


def test_a_run_begun_before_layers_were_always_named_goes_on(tmp_path, monkeypatch):
    def unnamed(*_, **__):
        raise ValueError

    asked, path = experiment(training__epochs=1), tmp_path / "run"
    longer = asked.replace({"training.epochs": 2, "seeds": 3})
    with monkeypatch.context() as before:
        before.setattr(own_modules.layers, "labelled", unnamed)
        tsdyn.run(asked, path, student=Residual)
    assert tsdyn.Experiment.from_toml(path / "experiment.toml").student.layers is None
    grown = tsdyn.run(longer, path, student=Residual).load()
    np.testing.assert_array_equal(grown.parameter, tsdyn.run(longer, tmp_path / "whole", student=Residual).parameter)
    more = longer.replace({"record.observables": ["loss", "mse", "parameter", "gradient_rms"]})
    with pytest.raises(whole_files.ArchiveError, match=r"student\.layers"):  # there are none to record
        tsdyn.run(more, path, student=Residual)


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
