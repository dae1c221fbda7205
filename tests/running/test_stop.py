"""Members that stop keep their parameters; later records are NaN, and a resumed run stops them at the same bits."""

import numpy as np
import pytest

import tsdyn
from tests.cases import small
from tsdyn import Experiment, ExperimentError
from tsdyn.archive import integrity
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.running import runner
from tsdyn.running.members import Members

EPOCHS = 8


def experiment(stop=None, rate=0.1, seeds=4, **more):
    return Experiment(
        name="s", seeds=seeds, teacher={"widths": [5, 4, 3], "init": "gaussian"},
        student={"overrealization": 2.0, "scale": 0.3}, data={"train": 60, "eval": 40},
        training={"epochs": EPOCHS, "batch": 10, "learning_rate": rate, "stop": stop}, **more,
    )  # fmt: skip


def below(path):
    """An experiment whose members stop at different epochs, one never, and the run without a stop."""
    free = tsdyn.run(experiment(), path / "free").load()
    level = float(np.sort(free.loss_eval.min("epoch"))[0]) * 1.2
    return experiment({"variable": "loss_eval", "below": level}), free, level


def test_a_member_stops_at_the_first_record_below_and_is_nan_afterwards(tmp_path):
    stopping, free, level = below(tmp_path)
    ds = tsdyn.run(stopping, tmp_path / "run").load()
    assert 0 < int(ds.stop_epoch.notnull().sum()) < 4
    assert (ds.death_epoch == -1).all()
    for seed in ds.seed.values:
        alone, mine = free.sel(seed=seed), ds.sel(seed=seed)
        first = np.flatnonzero(alone.loss_eval.values < level)
        end = int(first[0]) if len(first) else EPOCHS
        assert np.array_equal(mine.stop_epoch, end if len(first) else np.nan, equal_nan=True)
        for name in ("loss_train", "loss_eval", "weight", "bias", "correlation"):
            np.testing.assert_array_equal(mine[name].sel(epoch=slice(0, end)), alone[name].sel(epoch=slice(0, end)))
            assert mine[name].sel(epoch=slice(end + 1, None)).isnull().all()
    assert integrity.check(tmp_path / "run") == []


def test_patience_counts_records_without_a_new_minimum(tmp_path):
    free = tsdyn.run(experiment(rate=0.6), tmp_path / "free").load().loss_eval
    ds = tsdyn.run(experiment({"variable": "loss_eval", "patience": 2}, rate=0.6), tmp_path / "run").load()
    assert ds.stop_epoch.notnull().any()
    for seed in ds.seed.values:
        values, end = free.sel(seed=seed).values, None
        for epoch in range(EPOCHS + 1):
            if np.isnan(values[epoch]):  # died
                break
            if epoch - int(np.argmin(values[: epoch + 1])) >= 2:
                end = epoch
                break
        assert np.array_equal(ds.stop_epoch.sel(seed=seed), np.nan if end is None else end, equal_nan=True)


def test_a_stopped_member_keeps_its_parameters_in_the_state():
    members = Members(experiment({"variable": "loss_eval", "below": 1e9}))
    members.draw()
    before = {name: value.clone() for name, value in members.ensemble.values.items()}
    members.measure(0, ("loss_eval",))
    members.advance(1)
    assert (members.ensemble.stop_epoch == 0).all()
    assert all(value.equal(before[name]) for name, value in members.ensemble.values.items())


def test_a_resumed_run_stops_the_same_members_at_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    stopping = experiment({"variable": "loss_eval", "patience": 2}, rate=0.6)
    whole = tsdyn.run(stopping, tmp_path / "whole").load()
    for cut_at in (1, 2, EPOCHS // 2, EPOCHS - 1):

        def cut(step, *_, cut_at=cut_at):
            if step == cut_at:
                raise RuntimeError("cut")

        path = tmp_path / f"cut-{cut_at}"
        with pytest.raises(RuntimeError, match="cut"):
            runner.run(stopping, path, progress=cut)
        resumed = tsdyn.run(stopping, path).load()
        for name in whole.data_vars:
            np.testing.assert_array_equal(resumed[name], whole[name], err_msg=f"{name}, cut at {cut_at}")


def test_a_sweep_of_members_that_stop_is_its_points_alone(tmp_path):
    stopping, _, _ = below(tmp_path)
    sweep = stopping.replace({"sweep": {"training.learning_rate": [0.05, 0.1]}})
    ds = tsdyn.run(sweep, tmp_path / "sweep").load().sel(learning_rate=0.1)
    alone = tsdyn.run(stopping, tmp_path / "alone").load()
    np.testing.assert_array_equal(ds.stop_epoch, alone.stop_epoch)
    np.testing.assert_allclose(ds.loss_eval, alone.loss_eval, rtol=1e-9)


def test_one_that_dies_does_not_stop(tmp_path):
    wild = experiment({"variable": "loss_eval", "patience": 1}, rate=1e6)
    ds = tsdyn.run(wild.replace({"record.every": EPOCHS}), tmp_path / "run").load()
    assert (ds.death_epoch > 0).all()
    assert ds.stop_epoch.isnull().all()


def test_without_a_stop_nothing_is_added(tmp_path):
    free = experiment()
    assert "stop_epoch" not in free.recorded()
    assert "stop_epoch" not in tsdyn.run(free, tmp_path / "run")


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"variable": "loss_eval"}, "below = None, patience = None; give one of them"),
        ({"variable": "loss_eval", "below": 1.0, "patience": 2}, "give one of them"),
        ({"variable": "mse_eval", "below": 1.0}, "'mse_eval': is not recorded.*add it to record.observables"),
        ({"variable": "correlation", "below": 1.0}, "'correlation': has dimensions seed, epoch, layer"),
        ({"variable": "loss_eval", "patience": 0}, "patience"),
    ],
)
def test_a_stop_that_cannot_be_is_refused(stop, said):
    with pytest.raises(ExperimentError, match=said):
        experiment(stop)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training__anneal": "cosine"}, "spreads the learning rate over all epochs"),
        ({"training__stop": {"variable": "loss_eval", "patience": 2}, "record__every": 2}, "looked at epoch 3"),
    ],
)
def test_a_run_whose_epochs_depend_on_its_length_is_not_extended(tmp_path, changes, reason):
    """It would go on from epochs that the longer run trains otherwise; it stays as it is."""
    short = small(training__epochs=3, record__observables=["loss"], **changes)
    before = tsdyn.run(short, tmp_path).load()
    with pytest.raises(ArchiveError, match=reason):
        tsdyn.run(short.replace({"training.epochs": 6}), tmp_path)
    np.testing.assert_array_equal(tsdyn.open(tmp_path)["loss_eval"], before["loss_eval"])
