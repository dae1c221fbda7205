"""Sweeps of own modules that differ in size, depth and layers: each point is the run of its own, padded if joined."""

import importlib
import json
import sys

import numpy as np
import pytest
from tsdyn.analysis import similarity
from typer.testing import CliRunner

import tsdyn
from tests.cases import small
from tsdyn import cli
from tsdyn.running import own_modules

INPUTS, OUTPUTS = 6, 2
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=3, depth=2):
        super().__init__()
        widths = [6, *(depth - 1) * [hidden]]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths, widths[1:])])
        self.top = nn.Linear(hidden, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.top(x)

class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "sizes_lab.py").write_text(NETS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield importlib.import_module("sizes_lab")
    sys.modules.pop("sizes_lab", None)


def asked(sweep=None, **changes):
    base = small(
        seeds=2, teacher__widths=[INPUTS, 3, OUTPUTS], data__train=40, data__eval=30, training__epochs=1,
        record__observables=["loss", "parameter", "weight", "correlation", "gradient_rms"],
    )  # fmt: skip
    return base.replace({"student.module": "sizes_lab:Net"} | changes | ({"sweep": sweep} if sweep else {}))


def alone(swept, point):
    """The run of one point by itself: the same keys, set."""
    return swept.replace({"sweep": {}, **point})


def assert_points_are_runs(ds, runs):
    """Every number of every point is that of the run, and all beside it is padding."""
    for chosen, run in runs:
        one = ds.sel(chosen)
        for name, array in run.data_vars.items():
            at = {dim: run[dim] for dim in array.dims if dim in run.coords}
            found = one[name].sel(at)
            found = found.isel({dim: slice(n) for dim, n in array.sizes.items() if dim not in at})
            np.testing.assert_array_equal(found, array, err_msg=f"{name} at {chosen}")
            assert int(one[name].notnull().sum()) == int(array.notnull().sum()), name


def test_arguments_of_a_file_are_swept(tmp_path, nets):
    swept = asked({"student.arguments.hidden": [2, 5], "student.arguments.depth": [2, 3]})
    ds = tsdyn.run(swept, tmp_path / "sweep")
    runs = []
    for hidden, depth in ((2, 3), (5, 2)):
        point = {"student.arguments": {"hidden": hidden, "depth": depth}}
        runs.append(
            ({"hidden": hidden, "depth": depth}, tsdyn.run(alone(swept, point), tmp_path / f"{hidden}{depth}").load())
        )
    assert_points_are_runs(ds.load(), runs)
    assert ds.parameter.dims == ("hidden", "depth", "seed", "epoch", "entry")
    assert ds.sizes["entry"] == 6 * 5 + 5 + 5 * 5 + 5 + 5 * 2 + 2
    assert ds.width.sel(hidden=2, depth=3).values.tolist() == [2, 2, OUTPUTS]
    assert ds.layer_name.values.tolist() == [
        "layer 1",
        "layer 2",
        "layer 3",
    ]  # "top" is the second here or the third
    named = own_modules.named(ds.sel(hidden=5, depth=3))
    assert named["layers.1.weight"].shape == (2, 2, 5, 5)
    assert named["top.weight"].notnull().all()
    with pytest.raises(ValueError, match="4 modules with other parameters; select one point, by hidden, depth"):
        own_modules.named(ds)


def test_python_passes_what_a_sweep_sizes(tmp_path, nets):
    """The module need not be named: it is the one that is passed."""
    sweep = {"student.arguments.hidden": [2, 4]}
    named = tsdyn.run(asked(sweep), tmp_path / "named", workers=1).load()
    plain = asked().as_dict()
    del plain["student"]["module"]
    unnamed = tsdyn.Experiment.from_dict({**plain, "sweep": sweep})
    passed = tsdyn.run(unnamed, tmp_path / "passed", student=nets.Net).load()
    for name in named.data_vars:
        np.testing.assert_array_equal(passed[name], named[name], err_msg=str(name))
    with pytest.raises(tsdyn.ExperimentError, match=r"there is none; name it, student.module = .*or pass"):
        tsdyn.run(unnamed, tmp_path / "none")
    both = asked({"student.module": ["sizes_lab:Net", "sizes_lab:Other"]})
    with pytest.raises(tsdyn.ExperimentError, match=r"student\.module is swept, and student= is passed, too"):
        tsdyn.run(both, tmp_path / "none", student=nets.Net)
    assert not (tmp_path / "none").exists()


def test_modules_of_student_and_teacher_are_swept(tmp_path, nets):
    sweep = {"student.module": ["sizes_lab:Net", "sizes_lab:Other"], "teacher.arguments.hidden": [2, 7]}
    swept = asked(sweep, **{"teacher.module": "sizes_lab:Net"})
    ds = tsdyn.run(swept, tmp_path / "sweep").load()
    point = {"student.module": "sizes_lab:Other", "teacher.arguments": {"hidden": 7}}
    run = tsdyn.run(alone(swept, point), tmp_path / "run").load()
    chosen = {"module": "sizes_lab:Other", "hidden": 7}
    assert_points_are_runs(ds, [(chosen, run)])
    measured = tsdyn.measure(ds, ["gradient_max"]).sel(chosen).load()
    np.testing.assert_array_equal(
        measured.gradient_max.isel(node=slice(4)), tsdyn.measure(run, ["gradient_max"]).gradient_max
    )
    last = ds.isel(epoch=-1)
    net = last.sel(module=["sizes_lab:Net"])
    cka = similarity.student_teacher(net, student=nets.Net, teacher=nets.Net).cka
    assert cka.sel(hidden=7).notnull().all()
    assert tsdyn.schema.problems(ds, swept=("module", "hidden")) == []


def test_a_sweep_gains_modules_and_is_whole(tmp_path, nets):
    short = asked({"student.arguments.hidden": [2, 4]})
    tsdyn.run(short, tmp_path / "sweep")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "sweep").glob("*/archive.nc")}
    grown = tsdyn.run(asked({"student.arguments.hidden": [2, 4, 6]}), tmp_path / "sweep").load()
    assert {f: f.stat().st_mtime_ns for f in before} == before
    whole = tsdyn.run(asked({"student.arguments.hidden": [2, 4, 6]}), tmp_path / "whole").load()
    for name in whole.data_vars:
        np.testing.assert_array_equal(grown[name], whole[name], err_msg=str(name))
    for words in ("validate", "show"):
        done = CliRunner().invoke(cli.app, [words, str(tmp_path / "sweep")])
        assert done.exit_code == 0, done.output
    held = tsdyn.Experiment.from_toml(tmp_path / "sweep" / "experiment.toml")
    assert {json.loads(key)["arguments"]["hidden"] for key in held.student.made} == {2, 4, 6}


def test_two_runs_of_one_module_are_joined_by_its_arguments(tmp_path, nets):
    for hidden in (2, 4):
        tsdyn.run(asked(**{"student.arguments": {"hidden": hidden}}), tmp_path / f"{hidden}")
    ds = tsdyn.open([tmp_path / "2", tmp_path / "4"])
    assert dict(ds.loss_eval.sizes) == {"hidden": 2, "seed": 2, "epoch": 2}


def test_what_tsdyn_writes_is_not_swept(nets):
    for key in ("student.numbers", "student.made", "teacher.source"):
        with pytest.raises(tsdyn.ExperimentError, match="is written by tsdyn"):
            asked({key: [1, 2]})
