"""Sweeps run: in this process and on workers, with points that fail and workers that die."""

import random

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tests.scale.trials import killing
from tsdyn import runner, sweep
from tsdyn.segments import segments

FEW = {"training__epochs": 3, "seeds": 2, "record__observables": ["mse", "correlation"]}
GRID = {"teacher.polarity": [0.0, 1.0, 2.0]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tsdyn.run(small(sweep=GRID, **FEW), tmp_path_factory.mktemp("sweep") / "serial")


def same(found, wanted):
    xr.testing.assert_equal(found.compute(), wanted.compute())


def test_a_failing_point_does_not_stop_the_others(tmp_path):
    # 2 separated rows of length 1 from 9 choices exist, 20 do not
    experiment = small(sweep={"teacher.widths": [[10, 4, 6], [1, 20, 6], [10, 5, 6]]}, **FEW)
    with pytest.raises(sweep.SweepError, match=r"1 of 3 points failed, the others are done:\n  widths=1-20-6: ") as end:
        tsdyn.run(experiment, tmp_path / "sweep")
    assert list(end.value.failures) == ["widths=1-20-6"]
    np.testing.assert_array_equal(tsdyn.open(tmp_path / "sweep").coverage, [1, 0, 1])


def test_finished_points_are_not_run_again(tmp_path, monkeypatch, undisturbed):
    ran = []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda e, path, **kw: ran.append(path.name) or run(e, path, **kw))
    tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep")
    assert len(ran) == 3
    tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep")
    assert len(ran) == 3
    tsdyn.run(small(sweep={"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}, **FEW), tmp_path / "sweep")
    assert ran[3:] == ["polarity=0.5"]
    longer = {**FEW, "training__epochs": 5}
    ds = tsdyn.run(small(sweep=GRID | {"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}, **longer), tmp_path / "sweep")
    assert len(ran) == 8
    assert int(ds.epoch[-1]) == 5


def test_workers_compute_the_same_bits_and_survive_each_other(tmp_path, undisturbed):
    """Two processes; two are killed as soon as a point has begun (`make scale`: 50 of them, at any time)."""
    told = []
    path = tmp_path / "sweep"
    with killing(random.Random(0), path, 2, pause=(0.02, 0.1)) as killed:
        ds = sweep.run(small(sweep=GRID, **FEW), path, workers=2, progress=lambda *news: told.append(news[:2]))
    assert killed
    same(ds, undisturbed)
    assert (3, 3) in told
    assert not any(segments(point) for point in path.iterdir() if point.is_dir())


def test_what_is_estimated_is_timed_once_a_shape(monkeypatch):
    timed = []
    monkeypatch.setattr(
        sweep.runner, "estimate", lambda e, device: timed.append(e) or sweep.runner.Cost(2, 3, 4, 5, 6.0)
    )
    grid = {"teacher.polarity": [0.0, 1.0, 2.0], "student.overrealization": [1, 2]}
    points = {str(i): single for i, (_, single) in enumerate(small(sweep=grid).points())}
    assert set(sweep.estimate(points)) == set(points)
    assert [e.student.overrealization for e in timed] == [1, 2]


def test_points_that_cannot_begin_are_no_part_of_the_estimate():
    widths = {"teacher.widths": [[10, 4, 6], [1, 20, 6]]}
    points = {str(i): single for i, (_, single) in enumerate(small(sweep=widths, **FEW).points())}
    assert list(sweep.estimate(points)) == ["0"]
    with pytest.raises(tsdyn.ExperimentError):
        sweep.estimate({".": points["1"]})


def test_no_more_workers_than_memory_holds(monkeypatch, caplog):
    points = {"a": small(), "b": small(seeds=30)}
    largest = max(runner.footprint(single) for single in points.values())
    monkeypatch.setattr(sweep.memory, "available", lambda: 2 * largest + 1)
    assert sweep.fitting(2, points) == 2
    assert not caplog.records
    assert sweep.fitting(5, points) == 2
    assert "2 workers instead of 5" in caplog.text
    monkeypatch.setattr(sweep.memory, "available", lambda: 0)
    assert sweep.fitting(5, points) == 1  # which says itself what it lacks


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 0}, "workers = 0: at least 1"),
        ({"workers": 1, "scheduler": "tcp://127.0.0.1:9"}, "not together with a scheduler"),
        ({"scheduler": "tcp://127.0.0.1:9"}, "scheduler tcp://127.0.0.1:9: does not answer"),
        ({"scheduler": "nonsense://x"}, "scheduler nonsense://x: does not answer"),
    ],
)
def test_workers_that_cannot_be_had(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 1)
    with pytest.raises(sweep.WorkersError, match=message):
        sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", **how)


def test_an_existing_scheduler_is_used(tmp_path, undisturbed):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        ds = sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", scheduler=cluster.scheduler_address)
    same(ds, undisturbed)
