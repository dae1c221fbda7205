"""`record.state_every`: training states along the way, from which training goes on to the same bits."""

import os
import shutil

import netCDF4
import numpy as np
import pytest

import tsdyn
from tests.archive.states.children import child
from tests.cases import small
from tests.growing.test_adding import command
from tsdyn.archive import integrity, netcdf, states
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import DirectoryError, sha256
from tsdyn.running import runner
from tsdyn.running.members import Members

ASKED = small(
    seeds=2, training__epochs=5, training__steps_per_epoch=3, data__train=24, data__eval=20, teacher__widths=[5, 3, 2],
    record__observables=["mse", "weight"], training__method="adam", record__state_every=2,
)  # fmt: skip


def test_training_on_from_any_state_gives_the_runs_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    ds = tsdyn.run(ASKED, tmp_path / "run").load()
    assert list(states.kept(tmp_path / "run")) == [0, 2, 4, 5]
    for start in (0, 2, 4, 5):
        members = Members(ASKED)
        members.restore(states.state_after(tmp_path / "run", start))
        for epoch in range(start, 6):
            if epoch > start:
                members.advance(epoch)
            weights = members.measure(epoch, ("weight",))["weight"]
            for layer, weight in enumerate(weights, start=1):
                stored = ds.weight.sel(epoch=epoch, layer=layer).values
                np.testing.assert_array_equal(weight, stored[:, : weight.shape[1], : weight.shape[2]])
    with pytest.raises(DirectoryError, match=r"no training state after epoch 3; it keeps those after 0, 2, 4, 5\."):
        states.state_after(tmp_path / "run", 3)
    assert integrity.check(tmp_path / "run") == []


def test_states_survive_kills_more_epochs_and_more_seeds(tmp_path, capsys):
    path = tmp_path / "run"

    def work():
        commit = RunDirectory.commit

        def dying(self, first, last, *given):
            commit(self, first, last, *given)
            if last == 3:
                os.kill(os.getpid(), 9)

        RunDirectory.commit = dying
        runner.COMMIT_SECONDS = 0.0
        tsdyn.run(ASKED, path)

    assert child(work, path).how == "killed"
    assert list(states.kept(path)) == [0, 1, 2, 3], "each segment keeps its last one"
    tsdyn.run(ASKED, path)
    assert list(states.kept(path)) == [0, 2, 4, 5]
    more = ASKED.replace({"training.epochs": 7, "seeds": 3})
    tsdyn.run(more, path)
    tsdyn.run(more, tmp_path / "whole")
    assert list(states.kept(path)) == list(states.kept(tmp_path / "whole")) == [0, 2, 4, 6, 7]
    for epoch in (0, 2, 4, 6, 7):
        found, wanted = (states.state_after(p, epoch) for p in (path, tmp_path / "whole"))
        assert set(found) == set(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{name} after {epoch}")
    said = " ".join(command(capsys, "show", path)[1].split())
    assert "5 training states, after epochs 0, 2, 4, 6, 7" in said
    assert integrity.check(path) == []


def test_it_may_be_asked_for_later_and_decides_no_number(tmp_path):
    bare = ASKED.replace({"record.state_every": None})
    first = tsdyn.run(bare, tmp_path / "run").load()
    grown = tsdyn.run(ASKED.replace({"training.epochs": 8}), tmp_path / "run").load()
    assert list(states.kept(tmp_path / "run")) == [6, 8]
    np.testing.assert_array_equal(grown.weight.sel(epoch=first.epoch).values, first.weight.values)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(tsdyn.ExperimentError, match=r"record\.state_every = 0"):
        ASKED.replace({"record.state_every": 0})


def test_states_that_only_the_newer_seeds_keep_are_not_taken_for_those_of_all(tmp_path):
    """Before, they stayed in the file: a fork found states of other members, and more seeds ended in a traceback."""
    path, asked = tmp_path / "run", ASKED.replace({"training.epochs": 2, "record.state_every": None, "seeds": 1})
    tsdyn.run(asked, path)
    asked = asked.replace({"record.state_every": 1, "seeds": 2})
    tsdyn.run(asked, path)
    assert list(states.kept(path)) == [2]
    children = tsdyn.fork(path, at=1, out=tmp_path / "children").isel(fork_epoch=0, branch=0)
    whole = tsdyn.run(asked.replace({"seeds": 3}), tmp_path / "whole").load()
    np.testing.assert_array_equal(children.weight.sel(epoch=2), whole.weight.sel(epoch=2, seed=[0, 1]))
    grown = tsdyn.run(asked.replace({"seeds": 3}), path)
    np.testing.assert_array_equal(grown.weight.values, whole.weight.values)
    assert integrity.check(path) == []


def test_a_state_of_some_of_the_members_is_no_state_of_the_run(tmp_path):
    """As development versions of 0.2 left it."""
    path = tmp_path / "run"
    tsdyn.run(ASKED.replace({"training.epochs": 2, "record.state_every": 1}), path)
    with netCDF4.Dataset(path / "archive.nc", "a") as nc:
        part = {name: array[:1] if array.ndim else array for name, array in netcdf.read_state(nc).items()}
        netcdf.write_state(nc, part, netcdf.state_at(7))
    (path / "archive.nc.sha256").write_text(f"{sha256(path / 'archive.nc')}  archive.nc\n", encoding="ascii")
    assert list(states.kept(path)) == [0, 1, 2]
    with pytest.raises(DirectoryError, match="keeps no training state after epoch 7"):
        states.state_after(path, 7)
