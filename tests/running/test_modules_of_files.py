"""Modules that an experiment's file names: the one passed from Python, and what no file may name."""

import functools
import importlib
import linecache
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import tsdyn
from tests import processes
from tests.comparing import assert_same
from tests.running.modules import (
    INPUTS,
    OUTPUTS,
)
from tsdyn.archive import whole_files
from tsdyn.problem import teachers
from tsdyn.problem.inputs import training_inputs
from tsdyn.running import own_modules
from tsdyn.running.members import Members

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
