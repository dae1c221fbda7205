"""Runs and sweeps that gain epochs, seeds, observables and points hold what one run from the start would have given."""

import itertools
import json
import os
import pickle
import shutil

import pytest
import xarray as xr

import tsdyn
from tests.archive.states.children import child, die_at
from tests.cases import small
from tsdyn.archive import changes, integrity
from tsdyn.archive.lock import HeldError
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.running import runner

FEW = {
    "seeds": 2, "training__epochs": 2, "training__steps_per_epoch": 3, "data__train": 24, "data__eval": 20,
    "teacher__widths": [5, 3, 2], "record__observables": ["mse", "weight"], "training__momentum": 0.9,
}  # fmt: skip
SWEEP = {"sweep": {"teacher.polarity": [0.0, 1.0]}}


def tiny(**changes):
    return small(**{**FEW, **{key.replace(".", "__"): value for key, value in changes.items()}})


def assert_grown(found, whole, since=None):
    """Each number is the undisturbed run's; a variable that was added is NaN before, where it was not recorded."""
    found, whole = found.load(), whole.load()
    assert set(found.data_vars) == set(whole.data_vars)
    for dim in ("seed", "epoch"):
        assert found.indexes[dim].tolist() == whole.indexes[dim].tolist()
    for name in whole.data_vars:
        array = whole[name]
        if since is not None and name in since:
            array = array.where(since[name](whole))
        xr.testing.assert_equal(found[name].transpose(*array.dims), array)
    xr.testing.assert_equal(found.death_epoch, whole.death_epoch)


GROWTHS = {
    "a list of seeds": {"seeds": [7, 0, 3, 1]},
    "seeds and epochs": {"seeds": 3, "training.epochs": 4},
    "epochs": {"training.epochs": 5},
}


@pytest.mark.parametrize("name", GROWTHS)
def test_a_grown_run_is_the_run_from_the_start(tmp_path, name):
    before = tsdyn.run(tiny(), tmp_path / "run")
    lazy, held = pickle.loads(pickle.dumps(before)), before.load()
    grown = tsdyn.run(tiny().replace(GROWTHS[name]), tmp_path / "run")
    assert_grown(grown, tsdyn.run(tiny().replace(GROWTHS[name]), tmp_path / "whole"))
    xr.testing.assert_equal(lazy.load(), held)
    assert integrity.check(tmp_path / "run") == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    told = {"a list of seeds": ["seeds 7, 3"], "seeds and epochs": ["epochs 3..4", "seed 2"]}
    entries = [entry["added"] for entry in changes.listed(grown.attrs)]
    assert entries == told.get(name, ["epochs 3..5"])
    more = {"training.epochs": 6, "seeds": [*grown.seed.values.tolist(), 9]}
    again = tsdyn.run(tiny().replace(more), tmp_path / "run")
    assert_grown(again, tsdyn.run(tiny().replace(more), tmp_path / "again"))
    last = grown.epoch.values[-1]
    now = [f"epochs {last + 1}..6", "seed 9"]
    assert [entry["added"] for entry in changes.listed(again.attrs)] == [*entries, *now]
    xr.testing.assert_equal(lazy.load(), held)


def test_an_observable_is_recorded_from_there_on(tmp_path):
    tsdyn.run(tiny(), tmp_path / "run")
    more = {"record.observables": ["mse", "weight", "A"], "training.epochs": 4, "seeds": 3}
    grown = tsdyn.run(tiny().replace(more), tmp_path / "run")
    whole = tsdyn.run(tiny().replace(more), tmp_path / "whole")
    assert_grown(grown, whole, {"A": lambda ds: (ds.epoch > 2) | (ds.seed >= 2)})
    assert integrity.check(tmp_path / "run") == []
    from tsdyn.growing.adding import add

    add(tmp_path / "run", ["A"])
    assert_grown(tsdyn.open(tmp_path / "run"), whole)


@pytest.mark.parametrize("at", ["commits", "files"])
def test_killed_again_and_again_it_is_the_same(tmp_path, at):
    """At the commits of the run and of the seeds that are added, and while archives are joined."""
    asked = tiny(seeds=3, **{"training.epochs": 3})
    whole = tsdyn.run(asked, tmp_path / "whole").load()
    first = tsdyn.run(tiny(), tmp_path / "first").load()
    for moment in (3,) if at == "commits" else (30, 80, 110):
        path = tmp_path / f"run-{moment}"
        shutil.copytree(tmp_path / "first", path)
        lazy = tsdyn.open(path)

        def work(path=path, moment=moment):
            if at == "files":
                die_at(moment, path)
            else:
                count, commit = itertools.count(1), RunDirectory.commit

                def dying(self, *given):
                    commit(self, *given)
                    if next(count) == moment:
                        os.kill(os.getpid(), 9)

                RunDirectory.commit = dying
            runner.COMMIT_SECONDS = 0.0
            tsdyn.run(asked, path)

        end = child(work, path)
        assert end.how in ("killed", "done"), end.words
        assert [line for line in integrity.check(path) if "cut short" not in line] == []
        found = tsdyn.open(path).load()
        xr.testing.assert_equal(found.sel(seed=[0, 1], epoch=[0, 1, 2]), first)
        xr.testing.assert_equal(lazy.load(), first)
        assert_grown(tsdyn.run(asked, path), whole)
        assert integrity.check(path) == []
        assert not (path / "added").exists()


def test_a_sweep_gains_all_at_once(tmp_path):
    """Each point is a run: those that are there grow, those that are new begin."""
    few = tiny(**SWEEP)
    tsdyn.run(few, tmp_path / "run")
    more = few.replace({
        "seeds": 3, "training.epochs": 3, "sweep": {"teacher.polarity": [0.5, 0.0, 1.0]},
        "record.observables": ["mse", "weight", "alignment"],
    })  # fmt: skip
    grown = tsdyn.run(more, tmp_path / "run")
    whole = tsdyn.run(more, tmp_path / "whole")
    assert grown.polarity.values.tolist() == whole.polarity.values.tolist() == [0.5, 0.0, 1.0]
    new = {"alignment": lambda ds: (ds.epoch > 2) | (ds.seed >= 2) | (ds.polarity == 0.5)}
    assert_grown(grown, whole, new)
    assert integrity.check(tmp_path / "run") == []
    listed = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [entry["added"] for entry in listed["changes"]] == [
        "epochs 3..3; seed 2; alignment (recorded from epoch 3 on); teacher.polarity = 0.5"
    ]


def test_what_does_not_grow_is_refused_and_nothing_changes(tmp_path):
    tsdyn.run(tiny(), tmp_path / "run")
    held = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for more, said in (
        (SWEEP, r"does not become one of swept values: run this into a new directory .* tsdyn\.open\(\[one, other\]\)"),
        ({"seeds": 1}, "seeds: 1 here, 2 there"),
        ({"seeds": [1, 2, 3]}, "seeds"),
        ({"record.observables": ["mse"]}, "record.observables"),
        ({"seeds": 4, "training.learning_rate": 0.5}, "training.learning_rate"),
    ):
        with pytest.raises(DirectoryError, match=said):
            tsdyn.run(tiny().replace(more), tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == held
    tsdyn.run(tiny(**SWEEP), tmp_path / "sweep")
    with pytest.raises(DirectoryError, match="is a sweep's and does not become one of a run without them"):
        tsdyn.run(tiny(), tmp_path / "sweep")
    both = tsdyn.open([tmp_path / "run", tmp_path / "sweep" / "polarity=0.0"])
    assert both.polarity.values.tolist() == [1.0, 0.0]


def test_an_archive_of_before_without_a_state_says_where_to_run_further_seeds(tmp_path):
    from pathlib import Path

    shutil.copytree(Path(__file__).parent.parent / "data" / "archive-v1", tmp_path / "run")
    asked = tsdyn.Experiment.from_toml(tmp_path / "run" / "experiment.toml")
    with pytest.raises(DirectoryError, match=r"keeps no state to train on from; .* tsdyn.open\(\[one, other\]\)"):
        tsdyn.run(asked.replace({"seeds": len(asked.seed_labels) + 1}), tmp_path / "run")


def test_another_addition_that_is_unfinished_is_named(tmp_path, monkeypatch):
    tsdyn.run(tiny(), tmp_path / "run")
    asked = tiny(seeds=3)

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "gain", failing)
    with pytest.raises((ArchiveError, OSError), match="space"):
        tsdyn.run(asked, tmp_path / "run")
    monkeypatch.undo()
    assert tsdyn.open(tmp_path / "run").seed.values.tolist() == [0, 1]
    with pytest.raises(DirectoryError, match=r"run/added: holds another experiment; .*\n  seeds: \[3\] here, \[2\]"):
        tsdyn.run(tiny(seeds=[0, 1, 3]), tmp_path / "run")
    assert_grown(tsdyn.run(asked, tmp_path / "run"), tsdyn.run(asked, tmp_path / "whole"))


def test_a_command_that_may_not_write_a_run_does_not_hold_its_new_seeds_either(tmp_path, monkeypatch):
    """Before, of two commands at once one could hold the run and one the seeds, and each left the join to the other."""
    path, enter, entered = tmp_path / "run", RunDirectory.__enter__, []
    tsdyn.run(tiny(), path)

    def held(self):
        if self.path == path:
            raise HeldError("another process is writing here")
        entered.append(self.path)
        return enter(self)

    monkeypatch.setattr(RunDirectory, "__enter__", held)
    (error,) = runner.run_together({path: tiny(seeds=3)}).values()
    assert isinstance(error, HeldError)
    assert not entered
    monkeypatch.undo()
    assert_grown(tsdyn.run(tiny(seeds=3), path), tsdyn.run(tiny(seeds=3), tmp_path / "whole"))
