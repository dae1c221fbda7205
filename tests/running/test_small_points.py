"""What each of many small points of a sweep costs, counted: files opened and synced, forks, experiments checked."""

import copy
import json
import os
import pickle
from collections import Counter

import netCDF4
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn.archive import netcdf, own_process, run_directory, swept_values
from tsdyn.archive.headers import INDEX
from tsdyn.cli import run_commands
from tsdyn.experiment import rules
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import estimates, runner, sweep

RATES = [0.01 * i for i in range(1, 7)]
FEW = {"training__epochs": 2, "training__steps_per_epoch": 1, "seeds": 2}


def _sweep(points, **more):
    return small(**FEW, **more).replace({"sweep": {"training.learning_rate": RATES[:points]}})


def _counted(monkeypatch, owner, name, count):
    function = getattr(owner, name)

    def counting(*given, **named):
        count[name] += 1
        return function(*given, **named)

    monkeypatch.setattr(owner, name, counting)


def test_a_point_forks_nothing_and_syncs_little(tmp_path, monkeypatch):
    tsdyn.run(_sweep(2), tmp_path / "sweep")
    count = Counter()
    _counted(monkeypatch, os, "fsync", count)
    _counted(monkeypatch, os, "fork", count)
    _counted(monkeypatch, netcdf, "_opened", count)
    _counted(monkeypatch, Experiment, "from_toml_text", count)
    tsdyn.run(_sweep(6), tmp_path / "sweep")
    assert count["fork"] == 0
    # the point's directory; its experiment, checksum and archive, each with the directory it appears in; and of the
    # sweep: its own experiment, list and index, each likewise
    assert count["fsync"] <= 4 * 7 + 4 * 2
    # the archive, compared with what was written; the index asks the first one of a shape what it declares
    assert count["_opened"] <= 4 + 1
    assert count["from_toml_text"] <= 6  # of the sweep; a point's own file is compared as text


def test_one_commit_leaves_what_joined_segments_leave(tmp_path, monkeypatch):
    experiment = small(training__epochs=3, record__observables=["loss", "correlation", "weight"])
    tsdyn.run(experiment, tmp_path / "at-once")
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    tsdyn.run(experiment, tmp_path / "joined")
    found = {}
    for name in ("at-once", "joined"):
        with netCDF4.Dataset(tmp_path / name / run_directory.ARCHIVE, "a") as nc:  # users' tools add attributes
            nc.set_auto_maskandscale(False)
            held = {**nc.variables, **{f"state/{n}": v for n, v in nc["state"].variables.items()}}
            found[name] = (
                [(n, v.dimensions, v.dtype, v.chunking(), netcdf.attributes(v)) for n, v in nc.variables.items()],
                {n: v[...].tobytes() for n, v in held.items()},
                [key for key in nc.ncattrs() if key not in ("run", "created", "wall_seconds")],
            )
    assert repr(found["at-once"]) == repr(found["joined"])
    assert not (tmp_path / "at-once" / run_directory.SEGMENTS).exists()
    both = [tsdyn.open(tmp_path / name).load() for name in ("at-once", "joined")]
    xr.testing.assert_equal(*both)


def test_a_run_that_gives_up_before_its_end_has_no_archive(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.made_files, "write_new", full)
    with pytest.raises(run_directory.ArchiveError, match="no space left"):
        tsdyn.run(small(**FEW), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LOCK", "experiment.toml"]


@pytest.mark.parametrize("key", ["training.learning_rate", "student.overrealization"])
def test_the_index_of_written_files_is_that_of_read_ones(tmp_path, key):
    values = {"training.learning_rate": [0.1, 1e30, 0.2], "student.overrealization": [1.0, 2.0, 3.0]}[key]
    tsdyn.run(small(**FEW).replace({"sweep": {key: values}}), tmp_path / "sweep")
    written = json.loads((tmp_path / "sweep" / INDEX).read_text())["kept"]
    (tmp_path / "sweep" / INDEX).unlink()
    tsdyn.open(tmp_path / "sweep")
    assert json.loads((tmp_path / "sweep" / INDEX).read_text())["kept"] == written


def test_announcing_and_running_check_each_point_once(tmp_path, monkeypatch):
    count, single = Counter(), small(**FEW)
    _counted(monkeypatch, rules, "broken", count)
    experiment = single.replace({"sweep": {"training.learning_rate": RATES}})
    made = count["broken"]
    assert made == 6 + 1  # and the sweep itself
    _counted(monkeypatch, estimates, "estimate", count)
    left = sweep.unfinished(experiment, tmp_path / "sweep")
    costs = sweep.estimate(left)
    run_commands._announced(experiment, len(left), costs, 1)
    sweep.sweep_directory.write_sweep(tmp_path / "sweep", experiment)
    assert count["estimate"] == 1  # rates do not change the time
    assert count["broken"] - made <= 8  # trials of the estimate; not once more a point


def test_points_share_what_they_have_in_common_and_are_what_their_files_say():
    experiment = _sweep(3)
    for values, point in experiment.points():
        assert point.teacher is experiment.teacher
        assert point == Experiment.from_toml_text(point.to_toml())
        assert point.training.learning_rate == values["training.learning_rate"]
        assert not point.sweep
    assert [p for _, p in experiment.points()] == [experiment.at(v) for v, _ in experiment.points()]
    with pytest.raises(ExperimentError, match="activation"):
        small().replace({"sweep": {"student.activation": ["relu", "nonsense"]}})


def test_what_follows_from_an_experiment_is_not_copied_with_it():
    experiment = small(seeds=2)
    told = experiment.layout, experiment.digest, experiment.to_toml()
    changed = experiment.model_copy(update={"seeds": 3})
    assert (changed.layout.seeds, told[0].seeds) == ((0, 1, 2), (0, 1))
    assert changed.digest != told[1]
    assert changed.to_toml() != told[2]
    assert changed == small(seeds=3)
    for again in (pickle.loads(pickle.dumps(experiment)), copy.copy(experiment), copy.deepcopy(experiment)):
        assert set(again.__dict__) == set(type(again).model_fields)
        assert again == experiment


def test_a_point_finds_its_values_without_a_look_at_the_others(tmp_path):
    experiment = _sweep(3)
    points = sweep.sweep_directory.write_sweep(tmp_path, experiment)
    name, point = list(points.items())[1]
    assert [each.value for each in swept_values.of_point(tmp_path / name, point)] == [RATES[1]]
    other = point.replace({"training.learning_rate": 0.5})
    assert swept_values.of_point(tmp_path / name, other) == ()  # the list is not trusted
    assert point.says({"training.learning_rate": RATES[1]})
    assert not point.says({"training.learning_rate": 0.5})
    with pytest.raises(ExperimentError):
        point.says({"training.epochs": True})  # True == 1, and is no number of epochs


def test_progress_of_many_runs_adds_up():
    costs = {str(i): estimates.Cost(1, 1, 1, 1, seconds=i + 1.0) for i in range(4)}
    whole = run_commands._Whole(costs)
    for i in (2, 0, 3, 1):
        for epoch in range(3):
            whole.reached(str(i), epoch, 2)
    assert whole.share == pytest.approx(1.0, rel=1e-12)
    resumed = run_commands._Whole(costs)
    resumed.reached("3", 1, 2)  # epoch 0 was committed before
    assert resumed.share == pytest.approx(4 / 10 * 2 / 3)
    assert "left" in str(resumed)


def test_segments_are_joined_in_a_process_of_their_own(tmp_path, monkeypatch):
    count = Counter()
    _counted(monkeypatch, own_process, "run", count)
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    tsdyn.run(small(**FEW), tmp_path / "run")
    assert count["run"] == 1
