"""What `show` and the page say first: numbers that agree with a plain reading of the archive."""

import json

import numpy as np
import pytest
from tsdyn.analysis import overview

import tsdyn
from tests.cases import small
from tsdyn.archive import reading


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("overview") / "sweep"
    tsdyn.run(small(training__epochs=2, sweep={"teacher.polarity": [0.0, 1.0]}), path)
    return path


def test_the_last_numbers_are_medians_over_seeds(sweep):
    ds = tsdyn.open(sweep).load()
    rows = overview.rows(ds, 10)
    assert [row.point for row in rows] == ["polarity = 0.0", "polarity = 1.0"]
    for row, polarity in zip(rows, (0.0, 1.0), strict=True):
        own = ds.sel(polarity=polarity).isel(epoch=-1)
        assert row.numbers["loss_eval"].median == np.median(own.loss_eval)
        assert row.numbers["loss_eval"].members == 3
        rho = own.correlation.sel(layer=1).max("node").mean("teacher_node")
        np.testing.assert_allclose(row.numbers["rho_1"].median, np.median(rho), rtol=1e-12)
        assert row.numbers["rho_1"].low <= row.numbers["rho_1"].median <= row.numbers["rho_1"].high
        assert row.dead == 0
    assert len(overview.rows(ds, 1)) == 1


def test_dead_members_are_counted_and_left_out(tmp_path):
    with np.errstate(all="ignore"):
        ds = tsdyn.run(small(training__learning_rate=1e6, training__epochs=3), tmp_path / "run")
    (row,) = overview.rows(ds, 1)
    assert row.dead == 3
    assert str(row.numbers["loss_eval"]) == "-"
    assert json.loads(json.dumps(overview.as_json(ds, 1)))["points"][0]["final"]["loss_eval"]["median"] is None


def test_a_point_shows_its_own_last_step(tmp_path):
    path = tmp_path / "sweep"
    tsdyn.run(small(sweep={"training.epochs": [1, 3]}), path)
    ds = tsdyn.open(path)
    first, second = overview.rows(ds, 2)
    assert first.numbers["loss_eval"].median == np.median(ds.loss_eval.sel(epochs=1, epoch=1))
    assert second.numbers["loss_eval"].median == np.median(ds.loss_eval.sel(epochs=3, epoch=3))


def test_the_time_of_a_sweep_is_the_sum_over_its_points(sweep):
    ds = tsdyn.open(sweep)
    each = [reading.open(folder).attrs for folder in sorted(sweep.glob("polarity=*"))]
    assert len(each) == 2
    assert all(attrs["wall_seconds"] > 0 for attrs in each)
    assert ds.attrs["wall_seconds"] == pytest.approx(sum(attrs["wall_seconds"] for attrs in each), abs=2e-3)
    assert ds.attrs["created"] == max(attrs["created"] for attrs in each)
    assert overview.facts(ds)["wall time"].endswith(" s")


def test_an_interrupted_run_adds_up_its_time(tmp_path, monkeypatch):
    from tsdyn.running import runner

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)

    def stop(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(small(), tmp_path / "run", progress=stop)
    before = tsdyn.open(tmp_path / "run").attrs["wall_seconds"]
    assert runner.run(small(), tmp_path / "run").attrs["wall_seconds"] > before > 0
