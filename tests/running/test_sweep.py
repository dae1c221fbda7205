"""Sweeps run: in this process and on workers, with points that fail and workers that die."""

import dataclasses
import os
import random
import re
import signal
import time

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import default_client

import tsdyn
from tests import processes
from tests.cases import small
from tests.scale.trials import killing
from tsdyn import memory, registers
from tsdyn.archive import headers, run_directory, sweep_directory
from tsdyn.archive.run_directory import segments
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.engine import compiled_step, native
from tsdyn.engine import train as train_module
from tsdyn.engine.rule import OPTIMIZERS, Optimizer
from tsdyn.engine.train import CHUNKS
from tsdyn.running import estimates, joint_training, outcome, runner, sweep
from tsdyn.running import workers as workers_module
from tsdyn.running.interrupts import Stopped
from tsdyn.running.joint_training import JointTraining, ensemble_key
from tsdyn.running.members import Members
from tsdyn.running.workers import WorkersError, workers_that_fit

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
    with pytest.raises(
        outcome.SweepError, match=r"1 of 3 points failed, the others are done:\n  widths=1-20-6: "
    ) as end:
        tsdyn.run(experiment, tmp_path / "sweep")
    assert list(end.value.failures) == ["widths=1-20-6"]
    np.testing.assert_array_equal(tsdyn.open(tmp_path / "sweep").coverage, [1, 0, 1])


def test_a_point_that_fails_in_training_does_not_stop_the_others(tmp_path, monkeypatch):
    advance = Members.advance

    def failing(members, epoch):
        if members.experiment.teacher.polarity == 0.0:
            raise RuntimeError("no more")
        return advance(members, epoch)

    monkeypatch.setattr(Members, "advance", failing)
    with pytest.raises(outcome.SweepError, match=r"1 of 3 points failed(.|\n)*polarity=0.0: RuntimeError: no more"):
        tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep", together=False)
    with pytest.raises(RuntimeError, match="no more"):
        tsdyn.run(small(teacher__polarity=0.0, **FEW), tmp_path / "run")


def test_an_optimizer_of_the_users_own_trains_a_run(tmp_path):
    """One of SGD's steps, which no compiled kernel takes: 90 steps of some 100 sums each round to 1e-12 at most."""
    registers.OPTIMIZERS.add("plain", Optimizer("plain", (), OPTIMIZERS["sgd"].update))
    try:
        own = tsdyn.run(small(training__method="plain", **FEW), tmp_path / "own")
        wanted = tsdyn.run(small(**FEW), tmp_path / "sgd")
        np.testing.assert_allclose(own["mse_train"], wanted["mse_train"], rtol=1e-12)
    finally:
        registers.OPTIMIZERS.remove("plain")


def test_finished_points_are_not_run_again(tmp_path, monkeypatch, undisturbed):
    ran = []
    run = runner.run_together
    monkeypatch.setattr(runner, "run_together", lambda e, **kw: ran.extend(p.name for p in e) or run(e, **kw))
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


@pytest.mark.parametrize("noticed", [True, False])
def test_a_worker_that_dies_after_its_point_has_ended_does_not_end_the_sweep(
    tmp_path, monkeypatch, undisturbed, noticed
):
    """It takes its answer with it; the scheduler, which may have noticed, has it computed again."""
    end = workers_module._Shared.end
    seen = []

    def later(shared, future):
        if not seen:
            for child in processes.workers():
                child.kill()
            while noticed and future.done():  # until the scheduler has said that the answer is lost
                time.sleep(0.01)
        seen.append(future.done())
        return end(shared, future)

    monkeypatch.setattr(workers_module._Shared, "end", later)
    same(sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", workers=1), undisturbed)
    assert seen[0] != noticed
    assert len(seen) >= 3 + noticed


def test_an_archive_that_another_command_moves_meanwhile_is_left_out_of_the_index(tmp_path, monkeypatch, undisturbed):
    path = tmp_path / "sweep"
    tsdyn.run(small(sweep=GRID, **FEW), path)
    (path / "index.json").unlink()
    points = {name: single for name, (_, single) in sweep_directory.sweep_points(path).items()}

    def moved(*_):
        raise FileNotFoundError("moved while it was opened")

    with monkeypatch.context() as patch:
        patch.setattr(headers, "refuse_other", moved)
        sweep._IndexKeeper(path, points).write()
    same(tsdyn.open(path), undisturbed)


def test_a_worker_that_is_spawned_as_a_user_s_is_computes_the_same_bits(tmp_path, undisturbed):
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        same(sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", workers=1), undisturbed)


COST = estimates.Cost(2, 3, 4, 5, 6.0)


def test_what_is_estimated_is_timed_once_a_shape(monkeypatch):
    timed = []
    monkeypatch.setattr(estimates, "estimate", lambda e, device, together: timed.append((e, together)) or COST)
    grid = {"teacher.polarity": [0.0, 1.0, 2.0], "student.overrealization": [1, 2]}
    points = {str(i): single for i, (_, single) in enumerate(small(sweep=grid).points())}
    assert set(sweep.estimate(points)) == set(points)
    assert [(e.student.overrealization, together) for e, together in timed] == [(1, 1), (2, 1)]


def test_runs_that_each_lack_other_samples_are_timed_once_and_as_they_train_together(monkeypatch):
    timed = []
    monkeypatch.setattr(estimates, "estimate", lambda e, device, together: timed.append((e, together)) or COST)
    atlas = small(data__leave_out={"subsets": 12, "share": 0.1}, sweep={"student.activation": ["relu", "tanh"]})
    points = {str(i): single for i, (_, single) in enumerate(sweep.completed(atlas).points())}
    assert len(points) == 24
    assert set(sweep.estimate(points)) == set(points)
    assert [(e.student.activation, together) for e, together in timed] == [("relu", 12), ("tanh", 12)]


def test_points_that_cannot_begin_are_no_part_of_the_estimate():
    widths = {"teacher.widths": [[10, 4, 6], [1, 20, 6]]}
    points = {str(i): single for i, (_, single) in enumerate(small(sweep=widths, **FEW).points())}
    assert list(sweep.estimate(points)) == ["0"]
    with pytest.raises(tsdyn.ExperimentError):
        sweep.estimate({".": points["1"]})


def test_no_more_workers_than_memory_holds(monkeypatch, caplog):
    points = {"a": small(), "b": small(seeds=30)}
    largest = max(estimates.footprint(single).bytes for single in points.values())
    monkeypatch.setattr(memory, "available", lambda: 2 * largest + 1)
    assert workers_that_fit(2, points) == 2
    assert not caplog.records
    assert workers_that_fit(5, points) == 2
    assert "2 workers instead of 5" in caplog.text
    monkeypatch.setattr(memory, "available", lambda: 0)
    assert workers_that_fit(5, points) == 1  # which says itself what it lacks


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
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 1)
    with pytest.raises(WorkersError, match=message) as refused:
        sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", **how)
    assert refused.tb is not None
    with pytest.raises(ValueError, match="No clients found"):
        default_client()


def test_an_existing_scheduler_is_used(tmp_path, undisturbed):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        ds = sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", scheduler=cluster.scheduler_address)
        with pytest.raises(ValueError, match="No clients found"):  # one would be gone with the cluster
            default_client()
    same(ds, undisturbed)


# --- points of one shape as one ensemble --------------------------------------------------------------------


@pytest.fixture
def ensembles(monkeypatch):
    """Record the sizes of the ensembles that train several points."""
    found = []
    real = joint_training.JointTraining

    def counted(parts):
        found.append(len(parts))
        return real(parts)

    monkeypatch.setattr(runner, "JointTraining", counted)
    return found


MIXED = {"teacher.polarity": [0.0, 1.0], "training.learning_rate": [0.01, {"0": 0.02, "2": 0.005}]}


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, True),
        ({"data__train": "fresh", "training__steps_per_epoch": 7, "student__scale": 0.3}, True),
        ({"training__momentum": 0.5, "training__weight_decay": 0.01, "dtype": "float32"}, True),
        ({"training__method": "gd"}, False),
        ({"student__activation": "erf", "training__method": "adam", "training__epsilon": 0.1}, False),
        ({"training__loss": "cross_entropy", "data__augment": "aware"}, False),
    ],
)
def test_points_of_one_shape_train_as_one_ensemble(tmp_path, ensembles, changes, bits):
    """To the bits of points by themselves in the compiled kernel; to the rounding of some hundred steps elsewhere."""
    experiment = small(sweep=MIXED, **(FEW | changes))
    found = sweep.run(experiment, tmp_path / "together", together=True).compute()
    assert ensembles == [4]
    wanted = sweep.run(experiment, tmp_path / "apart", together=False).compute()
    assert ensembles == [4]
    if bits and native.load(compiled_step.SOURCE, compiled_step.Job) is not None:
        xr.testing.assert_equal(found, wanted)
    else:
        xr.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert not np.allclose(found.mse_eval.isel(learning_rate=0), found.mse_eval.isel(learning_rate=1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__train": "fresh", "training__steps_per_epoch": 7, "student__scale": 0.3},
        {"training__method": "gd"},
        {"student__activation": "erf", "training__method": "adam", "training__epsilon": 0.1, "dtype": "float32"},
        {"training__loss": "cross_entropy", "data__augment": "aware"},
        {"training__stop": {"variable": "mse_eval", "below": 0.3}},
    ],
)
@pytest.mark.parametrize("key", ["training.learning_rate", "teacher.polarity"])  # data that points share, and do not
def test_small_points_train_together_unasked_where_each_has_the_bits_it_has_alone(tmp_path, ensembles, changes, key):
    values = {"training.learning_rate": [0.01, 1e9, {"0": 0.02, "2": 0.005}], "teacher.polarity": [0.0, 1.0, 2.0]}
    every = {"record__observables": ["loss", "mse", "correlation", "weight"]}
    experiment = small(sweep={key: values[key]}, **(FEW | every | changes))
    found = sweep.run(experiment, tmp_path / "small").compute()
    compiled = native.load(compiled_step.SOURCE, compiled_step.Job) is not None
    assert ensembles == ([3] if compiled else [])
    xr.testing.assert_identical(
        found.drop_attrs(), sweep.run(experiment, tmp_path / "apart", together=False).compute().drop_attrs()
    )
    assert ensembles == ([3] if compiled else [])


def test_points_that_are_large_or_whose_bits_would_be_others_train_one_after_another(tmp_path, ensembles, monkeypatch):
    registers.OPTIMIZERS.add("plain", Optimizer("plain", (), OPTIMIZERS["sgd"].update))
    try:
        sweep.run(small(sweep=MIXED, training__method="plain", **FEW), tmp_path / "own").close()
    finally:
        registers.OPTIMIZERS.remove("plain")
    large = small(sweep=GRID, **FEW | {"training__steps_per_epoch": 10**6})
    points = {str(i): single for i, (_, single) in enumerate(large.points())}
    assert len(joint_training.group_points(points, 1, 1 << 40, small=True)) == 3
    many = small(sweep={"training.learning_rate": [0.001 * i for i in range(1, 40)]}, **FEW)
    points = {str(i): single for i, (_, single) in enumerate(many.points())}
    groups = joint_training.group_points(points, 1, 1 << 40, small=True)
    assert [len(group) for group in groups] == [16, 16, 7]
    monkeypatch.setattr(joint_training, "SMALL_BYTES", 1)
    assert len(joint_training.group_points(points, 1, 1 << 40, small=True)) == 39
    assert ensembles == []


def test_points_that_draw_the_same_have_the_same_batches_drawn_once(tmp_path, monkeypatch):
    drawn, rows = [], Members.rows
    monkeypatch.setattr(Members, "rows", lambda members, epoch: drawn.append(epoch) or rows(members, epoch))
    sweep.run(small(sweep={"training.learning_rate": [0.01, 0.02, 0.03]}, **FEW), tmp_path / "rates").close()
    assert drawn == [1, 2, 3]
    sweep.run(small(sweep=GRID, **FEW), tmp_path / "polarities").close()
    assert drawn[3:] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_an_ensemble_of_points_goes_through_the_chunks_of_a_device(tmp_path, monkeypatch, ensembles):
    """As on a GPU: their steps are recorded once and taken again in later epochs, with the rates of each member."""
    wanted = sweep.run(small(sweep=MIXED, **FEW), tmp_path / "apart", together=False).compute()
    chunks = dataclasses.replace(CHUNKS, claims=lambda *_: True)
    monkeypatch.setattr(train_module, "BACKENDS", (chunks,))
    found = sweep.run(small(sweep=MIXED, **FEW), tmp_path / "together", together=True).compute()
    assert ensembles == [4]
    xr.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_member_that_dies_leaves_its_ensemble_as_it_is(tmp_path, ensembles):
    experiment = small(sweep={"training.learning_rate": [0.01, 1e9, 0.02]}, **FEW)
    found = sweep.run(experiment, tmp_path / "together", together=True).compute()
    assert ensembles == [3]
    assert (found.death_epoch.isel(learning_rate=1) > 0).all()
    same(found, sweep.run(experiment, tmp_path / "apart", together=False))


def test_who_fails_in_company_does_not_stop_the_others_and_goes_on_later(tmp_path, monkeypatch, ensembles, undisturbed):
    """One is never drawn, two fail at different epochs: then those two go on in ensembles of their own."""
    widths = {"teacher.widths": [[10, 4, 6], [1, 20, 6]]}
    with pytest.raises(outcome.SweepError, match="1 of 2 points failed"):
        sweep.run(small(sweep=widths, **FEW), tmp_path / "drawn", together=True)
    assert ensembles == []

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    measure = Members.measure
    with monkeypatch.context() as patch:

        def failing(members, epoch, variables):
            if epoch == {1.0: 2, 2.0: 3}.get(members.experiment.teacher.polarity):
                raise OSError("no more")
            return measure(members, epoch, variables)

        patch.setattr(Members, "measure", failing)
        with pytest.raises(outcome.SweepError, match=r"2 of 3 points failed(.|\n)*polarity=1.0: OSError: no more"):
            sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", together=True)
    assert ensembles == [3]
    same(sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", together=True), undisturbed)
    assert ensembles == [3]


@pytest.fixture
def stopping_at(monkeypatch):
    """Every epoch committed, and the signal that comes while a given epoch is measured."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    measure = Members.measure

    def at(stop, patch):
        def measured(members, epoch, variables):
            asks_now = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # a second one acts as ever
            if epoch == stop and asks_now:
                signal.raise_signal(signal.SIGTERM)
            return measure(members, epoch, variables)

        patch.setattr(Members, "measure", measured)

    return at


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_an_ensemble_that_was_stopped_goes_on_as_one(tmp_path, monkeypatch, ensembles, stopping_at, method):
    """All of it committed; with its moments, as many steps as were taken, and a member that died before."""
    rates = {"training.learning_rate": [0.01, 1e9, 0.02]}
    experiment = small(sweep=rates, **FEW, training__momentum=0.5, training__method=method)
    with monkeypatch.context() as patch:
        stopping_at(2, patch)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM; what was computed is committed$"):
            sweep.run(experiment, tmp_path / "sweep", together=True)
    assert {tuple(s.last for s in segments(p)) for p in (tmp_path / "sweep").iterdir() if p.is_dir()} == {(0, 1, 2)}
    found = sweep.run(experiment, tmp_path / "sweep", together=True)
    assert ensembles == [3, 3]
    same(found, sweep.run(experiment, tmp_path / "apart", together=False))


def test_a_point_whose_members_all_died_by_itself_goes_on_in_company(tmp_path, monkeypatch, ensembles, stopping_at):
    """It has stopped counting steps."""
    experiment = small(sweep={"training.learning_rate": [1e9, 0.01, 0.02]}, **FEW)
    with monkeypatch.context() as patch:
        stopping_at(2, patch)
        for name, point in sweep_directory.write_sweep(tmp_path / "sweep", experiment).items():
            with pytest.raises(Stopped):
                runner.run(point, tmp_path / "sweep" / name)
    found = sweep.run(experiment, tmp_path / "sweep", together=True)
    assert ensembles == [3]
    same(found, sweep.run(experiment, tmp_path / "apart", together=False))


def test_data_that_cannot_be_had_fail_one_point_of_an_ensemble(tmp_path, ensembles):
    deep = {"data__law": "digits", "data__eval": 100, "teacher__widths": [64, 5, 10], "training__steps_per_epoch": 10}
    experiment = small(sweep={"data.train": [100, 100_000, 200]}, **(FEW | deep))
    with pytest.raises(outcome.SweepError, match=r"1 of 3 points failed(.|\n)*train=100000: "):
        sweep.run(experiment, tmp_path / "sweep", together=True)
    assert ensembles == [2]


def test_data_of_different_sizes_and_their_own_labels(tmp_path, ensembles):
    labels = {"data__law": "digits", "data__eval": 100, "teacher__widths": [64, 5, 10], "training__steps_per_epoch": 10}
    labels |= {"training__loss": "cross_entropy", "training__labels": "data"}
    experiment = small(sweep={"data.train": [100, 200]}, **(FEW | labels))
    found = sweep.run(experiment, tmp_path / "together", together=True).compute()
    assert ensembles == [2]
    xr.testing.assert_allclose(
        found, sweep.run(experiment, tmp_path / "apart", together=False).compute(), rtol=1e-10, atol=1e-12
    )


def test_an_ensemble_that_cannot_be_trained_is_taken_apart(tmp_path, monkeypatch, undisturbed, caplog):
    def fails(together, epoch):
        raise MemoryError("no room for all")

    monkeypatch.setattr(JointTraining, "train", fails)
    same(sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", together=True), undisturbed)
    assert "cannot train together, so one by one: no room for all" in caplog.text


def test_what_cannot_be_committed_is_said_when_a_signal_stops_the_others(tmp_path, monkeypatch, stopping_at):
    commit = run_directory.RunDirectory.commit

    def full(run, *given):
        if run.experiment.teacher.polarity == 1.0:
            raise ArchiveError("the disk is full")
        commit(run, *given)

    monkeypatch.setattr(run_directory.RunDirectory, "commit", full)
    stopping_at(0, monkeypatch)
    with pytest.raises(Stopped, match=r"committed; but for .*polarity=1.0: the disk is full"):
        sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", together=True)
    with pytest.raises(ArchiveError, match="the disk is full"):
        runner.run(small(**FEW), tmp_path / "run")


def test_companies_on_workers_compute_the_same_bits(tmp_path, undisturbed):
    same(sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", workers=2, together=True), undisturbed)


def test_companies_hold_each_point_once_and_keep_to_room_and_workers(monkeypatch):
    grid = {"teacher.polarity": [0.0, 1.0, 2.0], "student.overrealization": [1, 2]}
    points = {str(i): single for i, (_, single) in enumerate(small(sweep=grid).points())}
    points["flow"] = small(training__method="flow")
    points["flow 2"] = small(training__method="flow")
    two = 2 * max(estimates.footprint(single).bytes for single in points.values())
    for workers, room in ((1, 1 << 40), (3, 1 << 40), (1, two), (1, 0)):
        groups = joint_training.group_points(points, workers, room)
        assert sorted(name for group in groups for name in group) == sorted(points)
        assert len(groups) >= workers
        for group in groups:
            assert len({ensemble_key(single) for single in group.values()}) == 1
            held = sum(map(estimates.footprint, group.values()), estimates.Footprint())
            assert len(group) == 1 or held.bytes <= room
            assert len(group) == 1 or not any(name.startswith("flow") for name in group)
    assert sorted(map(len, joint_training.group_points(points, 1, 1 << 40))) == [1, 1, 3, 3]
    monkeypatch.setattr(
        joint_training.resource, "getrlimit", lambda _: (8, 8)
    )  # of open files: a lock each, and others to join
    assert sorted(map(len, joint_training.group_points(points, 1, 1 << 40))) == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_has_the_workers_commit(tmp_path, number, code):
    """Ctrl-C goes to every process of a terminal, a termination to the command alone."""
    experiment = small(sweep=GRID, training__steps_per_epoch=8_000, **(FEW | {"training__epochs": 200}))
    (tmp_path / "sweep.toml").write_text(experiment.to_toml(), encoding="utf-8")
    words = ["tsdyn", "run", "sweep.toml", "-o", "sweep", "--workers", "2"]
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as stderr:
        child = processes.Process(words, tmp_path, {2: writing})
        os.close(writing)
        said = []
        for line in stderr:
            said.append(line)
            if re.search(r"epoch [1-9]\d*/200", line):
                terminal = {worker.pid for worker in processes.workers()} if number == signal.SIGINT else set()
                for pid in terminal | {child.pid}:  # once each: a second signal ends the command at once
                    os.kill(pid, number)
                break
        said += stderr.readlines()
        ended = child.wait()
    assert ended == code, "".join(said)
    assert "the same command goes on from there" in said[-1], "".join(said)
    assert not any("Traceback" in line for line in said), "".join(said)
    begun = [found[-1].last for found in (segments(p) for p in (tmp_path / "sweep").iterdir() if p.is_dir()) if found]
    assert begun
    assert all(0 < last < 200 for last in begun)
