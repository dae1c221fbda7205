import ctypes
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tsdyn import schema
from tsdyn.archive import hdf5, integrity, lock, run_directory, whole_files
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.running import runner


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "run"
    tsdyn.run(small(), path)
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "sweep"
    tsdyn.run(small(sweep={"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}), path)
    return path


def test_a_run_leaves_a_whole_archive_that_needs_no_tsdyn(finished):
    assert sorted(p.name for p in finished.iterdir()) == ["LOCK", "archive.nc", "archive.nc.sha256", "experiment.toml"]
    with xr.open_dataset(finished / "archive.nc") as ds:
        assert dict(ds.sizes) == {
            "seed": 3,
            "epoch": 5,
            "layer": 2,
            "node": 8,
            "input_node": 10,
            "teacher_node": 6,
        }
        assert "width" in ds.coords
        assert tsdyn.Experiment.from_toml_text(ds.attrs["experiment"]) == small()
        assert json.loads(ds.attrs["conventions"])["gate_at_zero"] == "torch"
        schema.validate(ds)
    assert integrity.check(finished) == []


def test_open_is_lazy_and_labelled(finished):
    ds = tsdyn.open(finished)
    assert all(array.chunks is not None for array in ds.data_vars.values())
    one = ds.sel(seed=2, epoch=slice(1, 3), layer=1)
    assert one.weight.dims == ("epoch", "node", "input_node")
    assert list(one.epoch.values) == [1, 2, 3]
    xr.testing.assert_identical(tsdyn.open(finished / "archive.nc"), ds)


def test_padding_is_nan_and_one_layer_has_none(finished):
    ds = tsdyn.open(finished)
    assert bool(ds.weight.sel(layer=2, node=slice(6, None)).isnull().all())
    assert bool(ds.weight.sel(layer=2, input_node=slice(8, None)).isnull().all())
    first, second = tsdyn.layer(ds, 1), tsdyn.layer(ds, 2)
    assert dict(first.correlation.sizes) == {"seed": 3, "epoch": 5, "teacher_node": 4, "node": 8}
    assert not bool(first.correlation.isnull().any())
    assert tsdyn.layer(ds.weight, 2).shape == (3, 5, 6, 8)
    assert tsdyn.layer(ds.teacher_weight, 2).shape == (3, 6, 4)
    assert not bool(tsdyn.layer(ds.weight, 2).isnull().any())
    assert bool(second.correlation.isnull().all())
    with pytest.raises(KeyError):
        second.weight.sel(node=6)
    assert bool(ds.weight.sel(layer=2, node=6).isnull().all())
    with pytest.raises(ValueError, match=r"layer: 3 is not in the dataset, which has \[1, 2\]"):
        tsdyn.layer(ds, 3)


def test_tiles_of_pure_padding_are_never_written(tmp_path):
    """A network with a few very wide layers takes disk space in proportion to its true size."""
    experiment = small(
        teacher__widths=[6000, 4, 6],
        student__overrealization=2.0,
        data__train=20,
        data__eval=20,
        training__epochs=1,
        seeds=1,
        record__observables=["weight"],
    )
    tsdyn.run(experiment, tmp_path / "wide")
    tsdyn.run(experiment.replace({"teacher.widths": [6, 4, 6]}), tmp_path / "narrow")
    ds = tsdyn.open(tmp_path / "wide")
    student = 8 * (8 * 6000 + 6 * 8 + 8 + 6)
    true = 2 * student + 8 * (4 * 6000 + 6 * 4 + 4 + 6)
    size = (tmp_path / "wide" / "archive.nc").stat().st_size
    assert ds.weight.nbytes + ds.teacher_weight.nbytes > 1.7 * true
    # the eighth that a tile may waste along each node dimension; the state to train on from, as it is; headers
    headers = (tmp_path / "narrow" / "archive.nc").stat().st_size
    assert size < 1.125**2 * true + student + 8 * 6000 + headers  # and the label of each input


def test_every_variable_of_epochs_carries_a_checksum(finished):
    with netCDF4.Dataset(finished / "archive.nc") as nc:
        assert all(array.filters()["fletcher32"] for array in nc.variables.values())
    damaged = finished.parent / "damaged.nc"
    raw = bytearray((finished / "archive.nc").read_bytes())
    with xr.open_dataset(finished / "archive.nc") as ds:
        needle = ds.weight.sel(seed=1, layer=1, epoch=3, node=2).values[:8].tobytes()
    assert raw.count(needle) == 1
    raw[raw.index(needle) + 3] ^= 1
    damaged.write_bytes(raw)
    assert any("weight cannot be read" in problem for problem in integrity.check(damaged))


def test_a_sweep_has_its_keys_as_leading_dimensions(swept):
    ds = tsdyn.open(swept)
    assert ds.weight.dims[:4] == ("overrealization", "polarity", "seed", "epoch")
    assert integrity.check(swept) == []
    one = ds.sel(overrealization=1, polarity=1.0, seed=1, epoch=slice(1, 2), layer=1)
    alone = tsdyn.open(swept / "overrealization=1,polarity=1.0").sel(seed=1, epoch=slice(1, 2), layer=1)
    np.testing.assert_array_equal(one.correlation.values[..., :6], alone.correlation.values)
    assert bool(one.correlation.sel(node=slice(6, None)).isnull().all())
    assert ds.width.sel(overrealization=3, polarity=0.0).values.tolist() == [12, 6]
    assert tsdyn.layer(ds, 1).sizes["node"] == 12
    assert ds.sel(seed=1, epoch=slice(1, 3), layer=1).sizes["epoch"] == 3


def test_points_of_a_sweep_that_are_not_there_yet_are_nan(swept, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(swept, partial)
    shutil.rmtree(partial / "overrealization=3,polarity=0.0")
    ds = tsdyn.open(partial)
    assert bool(ds.loss_eval.sel(overrealization=3, polarity=0.0).isnull().all())
    assert not bool(ds.loss_eval.sel(overrealization=3, polarity=1.0).isnull().any())
    shutil.rmtree(partial)
    shutil.copytree(swept, partial)
    for point in partial.glob("overrealization=*"):
        shutil.rmtree(point)
    with pytest.raises(DirectoryError, match="no point of this sweep has a committed epoch"):
        tsdyn.open(partial)


def test_a_sweep_with_the_experiment_of_another_says_so(swept, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(swept, other)
    of = tsdyn.Experiment.from_toml(other / "experiment.toml")
    of = of.replace({"sweep": {"student.overrealization": [7.0, 8.0]}})
    (other / "experiment.toml").write_text(of.to_toml())
    with pytest.raises(DirectoryError, match=r"polarity=0.0.* of its experiment.toml; if that is another sweep's"):
        tsdyn.open(other)


class _Stop(Exception):
    pass


def _interrupted(experiment, path, at):
    def stop(epoch, *_):
        if epoch == at:
            raise _Stop

    with pytest.raises(_Stop):
        tsdyn.run(experiment, path, progress=stop)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_an_interrupted_run_shows_its_epochs_and_ends_bit_identical(tmp_path, monkeypatch, method):
    absent = "label_accuracy", "parameter", "jacobian"  # Gaussian inputs have no labels; the students are networks
    everything = [name for name in schema.recordable() if name not in absent]
    experiment = small(training__method=method, record__observables=everything)
    whole = tsdyn.run(experiment, tmp_path / "whole").load()
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    _interrupted(experiment, tmp_path / "broken", at=3)
    shown = tsdyn.open(tmp_path / "broken")
    assert list(shown.epoch.values) == [0, 1, 2]
    xr.testing.assert_equal(shown.load(), whole.sel(epoch=slice(0, 2)))
    resumed = tsdyn.run(experiment, tmp_path / "broken").load()
    xr.testing.assert_equal(resumed, whole)
    assert not (tmp_path / "broken" / "segments").exists()


@pytest.mark.parametrize(("cost", "whole"), [(0.001, 60), (0.05, 60), (0.05, 3000), (1.9, 36_000), (5.0, 36_000)])
def test_commits_keep_their_share_of_a_run_and_are_never_far_apart(cost, whole):
    """Epochs of 0.1 s, commits that always take as long: the first is due before its cost is known, all others fit;
    whatever they cost, a minute of work is between two, or thirty times what one takes.
    """
    clock, last, spent, count, gap = 0.0, 0.0, 0.0, 0, 0.0
    while clock < whole:
        clock += 0.1
        if runner.commit_is_due(clock, clock - last, cost if count else 0.0, spent):
            gap = max(gap, clock - last)
            clock, spent, count = clock + cost, spent + cost, count + 1
            last = clock
    spent += cost
    longest = max(60, 30 * cost)
    assert max(gap, clock - last) <= longest + 0.1 + 1e-6
    assert spent <= max(runner.COMMIT_SHARE * clock, 2 * cost) + clock * cost / longest
    # as often as that allows, or as time does: every 2 s, after 200 s every hundredth of the run, after 6000 s 60 s
    share = runner.COMMIT_SHARE
    often = [
        min(1 / max(2.2, min(share * t, 60.1)), max(share / cost, 1 / (longest + cost + 0.1))) for t in range(whole)
    ]
    assert count >= 0.9 * sum(often) - 3


def test_a_slow_disk_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(runner, "LONGEST_SECONDS", 0.3)
    commit = RunDirectory.commit

    def slow(run, *given):
        time.sleep(0.02)
        commit(run, *given)

    monkeypatch.setattr(RunDirectory, "commit", slow)
    tsdyn.run(small(training__epochs=3), tmp_path / "run")
    said = [record for record in caplog.records if "a commit takes" in record.getMessage()]
    assert len(said) == 1


def test_consolidation_can_be_repeated(tmp_path, monkeypatch):
    experiment = small()
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_drop_segments", lambda _: None)
        first = tsdyn.run(experiment, tmp_path / "run").load()
    assert len(run_directory.segments(tmp_path / "run")) == 5
    (tmp_path / "run" / "archive.nc").unlink()
    xr.testing.assert_equal(tsdyn.run(experiment, tmp_path / "run").load(), first)


def test_segments_with_a_gap_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    _interrupted(small(), tmp_path / "run", at=4)
    (tmp_path / "run" / "segments" / "epoch-000001-000001.nc").unlink()
    with pytest.raises(ArchiveError, match="end at epoch 0 and go on at 2"):
        tsdyn.open(tmp_path / "run")


def test_another_experiment_is_refused_and_nothing_changes(finished):
    before = {p: p.read_bytes() for p in finished.iterdir()}
    with pytest.raises(DirectoryError, match=r"another experiment(.|\n)*training.learning_rate: 0.5 here, 0.02 there"):
        tsdyn.run(small(training__learning_rate=0.5), finished)
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


def test_foreign_directories_and_names_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DirectoryError, match="is not empty and holds no experiment"):
        tsdyn.run(small(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DirectoryError, match="is a file"):
        tsdyn.run(small(), tmp_path / "thesis.tex")
    for name in ("http://example.org/a", "runs/a#b", "a\nb"):
        with pytest.raises(DirectoryError, match="not a local path"):
            tsdyn.open(name)
    with pytest.raises(DirectoryError, match="does not exist"):
        tsdyn.open(tmp_path / "nowhere")
    with pytest.raises(DirectoryError, match="not a readable netCDF file"):
        tsdyn.open(tmp_path / "thesis.tex")


def test_no_space_left_is_said_and_what_is_committed_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    _interrupted(small(), tmp_path / "run", at=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(whole_files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ArchiveError, match=r"no space left: 1.\d MB needed, 0.0 MB free; what was committed is intact"):
        tsdyn.run(small(), tmp_path / "run")
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1]
    monkeypatch.undo()
    assert tsdyn.run(small(), tmp_path / "run").sizes["epoch"] == 5


def test_a_write_that_fails_midway_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunDirectory(tmp_path / "run", small()):
        monkeypatch.setattr(whole_files.os, "fsync", full)
        with pytest.raises(ArchiveError, match="no space left"):
            whole_files.write_text(tmp_path / "run" / "note.txt", "x")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LOCK", "experiment.toml"]


def _hold(path, ready, leave):
    with RunDirectory(path, small()):
        ready.set()
        leave.wait(processes.HUNG)


def test_one_writer_a_directory(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", ready, leave))
    other.start()
    try:
        assert ready.wait(processes.HUNG)
        with pytest.raises(ArchiveError, match=rf"another process is writing here \(.* pid {other.pid}, since .*\)"):
            tsdyn.run(small(), tmp_path / "run")
    finally:
        leave.set()
        other.join()
    tsdyn.run(small(), tmp_path / "run")


def test_run_refuses_a_sweep():
    with pytest.raises(ValueError, match="has a sweep"):
        RunDirectory(Path("x"), small(sweep={"teacher.polarity": [0.0]}))


def test_schema_problems_are_each_named(finished):
    ds = tsdyn.open(finished).load()
    wrong = ds.rename(loss_eval="lost").assign(correlation=ds.correlation.transpose("node", ...))
    wrong = wrong.assign(bias=ds.bias.assign_attrs(units="m")).drop_attrs(deep=False)
    text = "\n".join(schema.problems(wrong))
    for expected in (
        "lost: not a variable",
        "correlation: dimensions ('node', 'seed'",
        "bias: attribute 'units' is 'm'",
        "attribute digest: missing",
    ):
        assert expected in text
    with pytest.raises(schema.SchemaError, match="lost: not a variable"):
        schema.validate(wrong)


def test_measurements_of_dead_members_are_nan_and_the_rest_goes_on(tmp_path):
    told = []
    experiment = small(training__learning_rate=2.5, seeds=6, training__epochs=6, record__observables=["loss", "weight"])
    ds = tsdyn.run(
        experiment,
        tmp_path / "run",
        progress=lambda epoch, _, died, __: told.extend((epoch, s) for s in died),
    )
    ds = ds.load()
    dead = ds.death_epoch >= 0
    assert bool(dead.any())
    assert sorted(told) == sorted((int(e), int(s)) for s, e in zip(ds.seed, ds.death_epoch, strict=True) if e >= 0)
    after = ds.epoch >= ds.death_epoch
    assert bool(ds.loss_eval.where(dead & after, drop=True).isnull().all())
    assert bool(ds.loss_eval.where(~(dead & after)).notnull().sum() == (~(dead & after)).sum())


DATA = Path(__file__).resolve().parent.parent / "data"


def _old(name, tmp_path):
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def test_archives_of_every_earlier_schema_open_as_the_present_one(tmp_path):
    assert set(schema.MIGRATIONS) == set(range(1, schema.VERSION))
    for version in schema.MIGRATIONS:
        path = _old(f"archive-v{version}", tmp_path)
        assert integrity.check(path) == []
        ds = tsdyn.open(path)
        assert ds.attrs["schema_version"] == schema.VERSION
        schema.validate(ds)


def test_an_unfinished_run_of_version_1_is_gone_on_with(tmp_path):
    path = _old("unfinished-v1", tmp_path)
    assert list(tsdyn.open(path).epoch.values) == [0, 1]
    experiment = tsdyn.Experiment.from_toml(path / "experiment.toml")
    ended = tsdyn.run(experiment, path).load()
    # another machine's arithmetic may differ in the last bit of each step
    xr.testing.assert_allclose(ended, tsdyn.open(DATA / "archive-v1").load(), rtol=1e-12)
    assert integrity.check(path) == []


def test_a_finished_run_of_version_1_keeps_no_state_and_is_left_alone(tmp_path):
    path = _old("archive-v1", tmp_path)
    longer = tsdyn.Experiment.from_toml(path / "experiment.toml").replace({"training.epochs": 5})
    before = (path / "archive.nc").read_bytes()
    with pytest.raises(DirectoryError, match="of schema 1, which keeps no state to train on from; it stays as it is"):
        tsdyn.run(longer, path)
    assert (path / "archive.nc").read_bytes() == before
    assert integrity.check(path) == []


def test_a_later_schema_is_refused_by_name(tmp_path):
    path = _old("archive-v1", tmp_path)
    with netCDF4.Dataset(path / "archive.nc", "a") as nc:
        nc.setncattr("schema_version", schema.VERSION + 1)
    with pytest.raises(DirectoryError, match=f"schema version {schema.VERSION + 1} is not one of"):
        tsdyn.open(path)


@pytest.mark.parametrize("record", [{}, {"record__every": 3}, {"training__method": "adam"}])
def test_a_finished_run_goes_on_with_more_epochs(tmp_path, record):
    """Four epochs, then three, then two give the bits of nine at once; a last epoch off the schedule is kept, too."""
    whole = tsdyn.run(small(training__epochs=9, **record), tmp_path / "whole").load()
    recorded = set()
    for epochs in (4, 7, 9):
        recorded |= set(tsdyn.run(small(training__epochs=epochs, **record), tmp_path / "longer").epoch.values)
        assert integrity.check(tmp_path / "longer") == []
    longer = tsdyn.open(tmp_path / "longer").load()
    assert set(longer.epoch.values) == recorded
    xr.testing.assert_equal(longer.sel(epoch=whole.epoch), whole)
    with pytest.raises(DirectoryError, match=r"training\.epochs: 4 here, 9 there"):
        tsdyn.run(small(training__epochs=4, **record), tmp_path / "longer")


def test_an_interrupted_extension_is_whole_at_every_epoch(tmp_path, monkeypatch):
    whole = tsdyn.run(small(training__epochs=7), tmp_path / "whole").load()
    path = tmp_path / "run"
    tsdyn.run(small(), path)
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    _interrupted(small(training__epochs=7), path, at=6)
    assert integrity.check(path) == []
    xr.testing.assert_equal(tsdyn.open(path).load(), whole.sel(epoch=slice(0, 5)))
    xr.testing.assert_equal(tsdyn.run(small(training__epochs=7), path).load(), whole)


def test_a_sweep_goes_on_with_more_epochs(tmp_path):
    sweep = {"teacher.polarity": [0.0, 1.0]}
    whole = tsdyn.run(small(sweep=sweep, training__epochs=3), tmp_path / "whole").load()
    tsdyn.run(small(sweep=sweep, training__epochs=1), tmp_path / "sweep")
    xr.testing.assert_equal(tsdyn.run(small(sweep=sweep, training__epochs=3), tmp_path / "sweep").load(), whole)
    assert integrity.check(tmp_path / "sweep") == []


@pytest.fixture
def no_flock(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", missing)


def test_without_flock_the_file_itself_is_the_lock(tmp_path, no_flock, monkeypatch, caplog):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    first, second = lock.Lock(tmp_path), lock.Lock(tmp_path)
    with first:
        with pytest.raises(ArchiveError, match="another process is writing here"):
            second.acquire()
        before = first.path.stat().st_mtime_ns
        while first.path.stat().st_mtime_ns == before:  # it beats
            pass
        first.confirm()
    assert not first.path.exists()
    assert not caplog.records
    with second:
        second.path.unlink()
        with pytest.raises(ArchiveError, match="the lock was taken away"):
            second.confirm()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stale_lock_file_is_taken_over_and_whose_it_was_is_said(tmp_path, no_flock, monkeypatch, caplog, elsewhere):
    """A lock of this machine once its process is gone; of another machine once it has been silent for `SILENCE`."""
    holder = json.loads(lock.Lock(tmp_path)._owner()) | {"pid": 2**22 + 1}
    holder |= {"host": "elsewhere", "world": "another machine"} if elsewhere else {}
    (tmp_path / "LOCK").write_text(json.dumps(holder))
    if elsewhere:
        with pytest.raises(ArchiveError, match=r"another process is writing here .*elsewhere pid"):
            lock.Lock(tmp_path).acquire()
        long_ago = time.time() - lock.SILENCE - 1
        os.utime(tmp_path / "LOCK", (long_ago, long_ago))
    with lock.Lock(tmp_path) as mine:
        mine.confirm()
    assert "ended without finishing; going on from what it committed" in caplog.text
    assert str(2**22 + 1) in caplog.text
    assert not any(tmp_path.iterdir())


def test_layers_of_ones_own_may_be_counted_from_0_and_have_no_widths():
    """The lowest label is the lowest layer, whose variables have no layer dimension."""
    own = xr.Dataset(
        {"weight": (("layer", "node", "input_node"), np.zeros((3, 4, 5))), "alignment": (("node",), np.zeros(4))},
        coords={"layer": [0, 1, 2]},
    )
    assert set(tsdyn.layer(own, 0).data_vars) == {"weight", "alignment"}
    assert set(tsdyn.layer(own, 1).data_vars) == {"weight"}
    assert tsdyn.layer(own, 1)["weight"].shape == (4, 5)
    with pytest.raises(ValueError, match=r"layer: 3 is not in the dataset, which has \[0, 1, 2\]"):
        tsdyn.layer(own, 3)
    counted = own.assign_coords(layer=[1, 2, 3])
    assert set(tsdyn.layer(counted.sel(layer=[2, 3]), 2).data_vars) == {"weight"}


def test_a_zarr_store_is_called_one(tmp_path):
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(whole_files.DirectoryError, match=r"zarr store"):
        tsdyn.open(tmp_path)


def test_the_index_that_workers_wrote_beside_a_single_run_takes_none_of_its_attributes(tmp_path):
    """Up to 0.2.0 a run with workers= left an index of itself, by which it was opened without its experiment."""
    from tsdyn.archive.headers import INDEX, Headers

    e = small(**{"training.epochs": 1, "seeds": 1})
    plain = tsdyn.run(e, tmp_path / "run").attrs
    headers = Headers(tmp_path)
    headers.committed("run", lambda: tsdyn.Experiment.from_toml(tmp_path / "run/experiment.toml", archived=True))
    headers.write()
    kept = json.loads((tmp_path / INDEX).read_text())["kept"]
    text = json.dumps(kept | {"runs": {".": kept["runs"]["run"]}}, separators=(",", ":"))
    seal = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "run" / INDEX).write_text(f'{{"sha256": "{seal}", "kept": {text}}}')
    assert tsdyn.open(tmp_path / "run").attrs == plain
    assert "experiment" in plain
    single = Headers(tmp_path / "run")
    assert single.committed(".", lambda: tsdyn.Experiment.from_toml(tmp_path / "run/experiment.toml", archived=True))
    (tmp_path / "run" / INDEX).unlink()
    single.write()
    assert not (tmp_path / "run" / INDEX).exists()


def test_a_library_that_cannot_be_called_is_named():
    with pytest.raises(ImportError, match=r"tsdyn calls nc_no_such .* does not show it; take the netCDF4 of PyPI"):
        hdf5.linked({"nc_no_such": (ctypes.c_int, ctypes.c_int)})
