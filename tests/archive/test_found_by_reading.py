"""What reading found where the state machine does not reach, each as a fixed example."""

import errno
import os
import shutil
from pathlib import Path

import netCDF4
import numpy as np
import pytest

import tsdyn
from tests.archive.damage import FEW, SWEEP, damage, same, stop_after
from tests.cases import small
from tsdyn.archive import (
    additions,
    integrity,
    lock,
    machines,
    sweep_directory,
    whole_files,
)
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.growing import adding, exporting
from tsdyn.running import members, runner
from tsdyn.running.interrupts import Stopped


def test_a_fork_begins_from_no_weights_that_are_missing(tmp_path):
    """Of seed 1, gained later, epoch 3 was not recorded: before, its child began as NaN and counted as dead."""
    asked = small(**FEW, training__epochs=3, record__every=2).replace({"seeds": 1})
    tsdyn.run(asked, tmp_path / "run")
    parent = tsdyn.run(asked.replace({"seeds": 2, "training.epochs": 4}), tmp_path / "run").load()
    assert np.isnan(parent.weight.sel(seed=1, epoch=3)).all()
    child = tsdyn.fork(tmp_path / "run", at=3).isel(fork_epoch=0, branch=0).sel(epoch=4).load()
    same(child, parent[["weight", "mse_eval"]].sel(epoch=4))
    assert (child.death_epoch == -1).all()


def test_a_fork_begins_from_no_weights_that_repair_could_not_keep(tmp_path):
    whole = tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run").load()
    file = tmp_path / "run" / "archive.nc"
    damage(file, whole.weight.values[0, 0, 0, 0, :3])
    integrity.repair(tmp_path / "run")
    assert np.isnan(tsdyn.open(tmp_path / "run").weight.sel(seed=0, epoch=1)).all()
    child = tsdyn.fork(tmp_path / "run", at=1).isel(fork_epoch=0, branch=0).sel(epoch=2).load()
    same(child, whole[["weight", "mse_eval"]].sel(epoch=2))


def test_what_lasts_is_made_from_no_large_file_that_differs_from_its_checksum(tmp_path):
    """Of more than 16 MB, so that `tsdyn.open` compares it only when asked to."""
    path = tmp_path / "run"
    large = small(
        seeds=1, teacher__widths=[800, 800, 1], student__overrealization=1.0, data__train=16, training__epochs=0,
        record__observables=["mse", "weight"],
    )  # fmt: skip
    tsdyn.run(large, path)
    file = path / "archive.nc"
    assert file.stat().st_size > whole_files.ALWAYS_VERIFIED
    damage(file, tsdyn.open(path).weight.values[0, 0, 0, 0, :3])
    tsdyn.open(path).mse_eval.load()
    for asked in (
        lambda: tsdyn.open(path, verify=True),
        lambda: tsdyn.run(large.replace({"training.epochs": 1}), path),
        lambda: tsdyn.run(large.replace({"seeds": 2}), path),
        lambda: tsdyn.run(large.replace({"record.observables": ["mse", "weight", "loss"]}), path),
        lambda: tsdyn.fork(path, at=0),
        lambda: tsdyn.measure(path, ["loss"]),
        lambda: adding.add(path, ["loss"]),
        lambda: exporting.export(path, "netcdf"),
    ):
        with pytest.raises(ArchiveError, match="its checksum differs from the one in archive"):
            asked()
    assert any("its checksum differs" in line for line in integrity.check(path))
    assert "moved to damaged/" in integrity.repair(path)[0]


def test_what_an_earlier_version_measured_of_lost_parameters_is_named_and_measured_again(tmp_path):
    """As NaN, which stayed when the run was whole again; of a member that died NaN is right."""
    path = tmp_path / "run"
    experiment = small(**FEW, training__epochs=1)
    tsdyn.run(experiment, path)
    adding.add(path, ["correlation"])
    whole = tsdyn.open(path).correlation.load()
    (file,) = additions.files(path)
    with netCDF4.Dataset(file) as nc:
        attrs = {name: nc.getncattr(name) for name in nc.ncattrs() if name != "coordinates"}
    assert additions.trusted(attrs)
    attrs[additions.ADDED] = '{"at": "2026-11-29T20:00:00+00:00", "tsdyn_version": "0.2"}'
    whole_files.remove_sealed(file)
    values = whole.values.copy()
    values[1, 0] = np.nan
    asked = experiment.replace({"record.observables": ["correlation"]})
    additions.write(path, asked, "correlation", [0, 1], [0, 1], values, attrs)
    (told,) = integrity.check(path)
    assert "correlation is NaN at seeds 1, epochs 0, where the run's parameters are stored" in told
    assert "tsdyn measure" in told
    assert len(adding.add(path, ["correlation"])) == 1
    np.testing.assert_array_equal(tsdyn.open(path).correlation, whole)
    assert integrity.check(path) == []
    assert adding.add(path, ["correlation"]) == []


def test_an_archive_that_is_extended_keeps_its_own_checksum(tmp_path):
    """A byte changed within its time after it was compared: before, it got the checksum of the damage."""
    path = tmp_path / "run"
    tsdyn.run(small(**FEW, training__epochs=1), path).load()
    file = path / "archive.nc"
    times = file.stat()
    damage(file, tsdyn.open(path).weight.values[0, 0, 0, 0, :3])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArchiveError, match="its checksum differs"):
        tsdyn.run(small(**FEW, training__epochs=3), path)
    assert any("its checksum differs" in line for line in integrity.check(path))


def test_a_sweep_that_another_command_has_extended_meanwhile_keeps_its_list(tmp_path, monkeypatch):
    """Between this command's claim and its list of points; before, the list was that of the shorter sweep."""
    path = tmp_path / "sweep"
    shorter = small(**FEW, training__epochs=1, sweep=SWEEP)
    longer = shorter.replace({"sweep": {"teacher.polarity": [0.0, 0.5, 1.0]}})
    named = sweep_directory.named_points

    def meanwhile(*given):
        monkeypatch.setattr(sweep_directory, "named_points", named)
        sweep_directory.write_sweep(path, longer)
        return named(*given)

    monkeypatch.setattr(sweep_directory, "named_points", meanwhile)
    tsdyn.run(shorter, path)
    assert integrity.check(path) == []
    assert tsdyn.run(longer, path).sizes["polarity"] == 3


def test_a_lock_whose_holder_ends_while_it_is_looked_at_is_taken(tmp_path, monkeypatch):
    """On a file system without flock; before, it was a traceback."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no flock")))
    (tmp_path / lock.NAME).write_text("{}", encoding="ascii")
    read = Path.read_bytes

    def ended(self):
        monkeypatch.setattr(Path, "read_bytes", read)
        self.unlink()
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", ended)
    with lock.Lock(tmp_path) as held:
        held.confirm()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [[2**53 + 1, 0.5, 2**53], ["a\0", "a"]])
def test_swept_values_that_would_be_one_label_are_refused_before_anything_is_trained(tmp_path, values):
    experiment = small(student={"module": "passed:later"}, sweep={"student.arguments.kind": values})
    with pytest.raises(ArchiveError, match=r"student.arguments.kind has the values .* would be one label"):
        sweep_directory.write_sweep(tmp_path / "sweep", experiment)
    assert not (tmp_path / "sweep").exists()


def test_points_without_checksums_that_were_exchanged_are_noticed_though_an_index_lists_them(tmp_path):
    """Their files have one size and, unpacked in one second, one time: before, each was shown as the other."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), path)
    for file in path.rglob("archive.nc"):
        whole_files.seal_of(file).unlink()
        os.utime(file, (1e9, 1e9))
    assert len({file.stat().st_size for file in path.rglob("archive.nc")}) == 1
    tsdyn.open(path)  # writes the index
    (path / "polarity=0.0").rename(tmp_path / "aside")
    (path / "polarity=1.0").rename(path / "polarity=0.0")
    (tmp_path / "aside").rename(path / "polarity=1.0")
    with pytest.raises(ArchiveError, match="holds a file of another run"):
        tsdyn.open(path)


def test_nothing_is_measured_where_a_batch_norm_was_lost(tmp_path):
    """Weights and biases alone are not all: before, NaN was measured, and stayed when the run was whole again."""
    path = tmp_path / "run"
    asked = small(
        seeds=2, training__epochs=2, student__batch_norm="before", record__observables=["weight", "batch_norm"]
    )
    whole = tsdyn.run(asked, path).load()
    file = path / "archive.nc"
    damage(file, whole.norm_mean.values[1, 1, 0, :3])
    integrity.repair(path)
    told = []
    adding.add(path, ["mse"], told=told.append)
    assert any("parameters of seeds" in line and "nothing is measured there" in line for line in told)
    whole_files.remove_sealed(file)
    tsdyn.run(asked, path)
    adding.add(path, ["mse"])
    assert tsdyn.open(path).mse_eval.notnull().all()


def test_a_run_that_gains_a_seed_still_says_how_long_it_took_and_why_it_was_not_compiled(tmp_path, monkeypatch):
    """Before, it said neither, which is read as: compiled."""
    why = ["there is no compiler here"]
    with monkeypatch.context() as patch:
        patch.setattr(members.Members, "fallbacks", lambda _: why)
        first = tsdyn.run(small(**FEW, training__epochs=1), tmp_path / "run")
    more = small(**FEW | {"seeds": 3}, training__epochs=1)
    gained = tsdyn.run(more, tmp_path / "run")
    assert machines.fallbacks(gained.attrs) == why
    assert gained.attrs["wall_seconds"] >= first.attrs["wall_seconds"] > 0
    longer = tsdyn.run(more.replace({"training.epochs": 2}), tmp_path / "run")
    assert machines.fallbacks(longer.attrs) == why
    assert longer.attrs["wall_seconds"] >= gained.attrs["wall_seconds"]


def test_exported_tables_that_were_replaced_are_not_read_as_those_that_were_opened(tmp_path):
    for rate in (0.02, 0.04):
        tsdyn.run(small(**FEW, training__epochs=1, training__learning_rate=rate), tmp_path / f"{rate}")
    out = exporting.export(tmp_path / "0.02", "parquet", tmp_path / "tables")
    lazy = tsdyn.open(out)
    shutil.rmtree(out)
    exporting.export(tmp_path / "0.04", "parquet", out)
    with pytest.raises(ArchiveError, match="was replaced since it was opened; open it again"):
        lazy.mse_eval.load()
    same(tsdyn.open(out), tsdyn.open(tmp_path / "0.04")[["mse_eval"]])


def test_a_sweep_that_lost_its_list_of_points_is_still_one(tmp_path):
    """Before, `open` said that nothing was committed, and `validate` that all was whole."""
    path = tmp_path / "sweep"
    experiment = small(**FEW, training__epochs=1, sweep=SWEEP)
    whole = tsdyn.run(experiment, path).load()
    (path / "sweep.json").unlink()
    same(tsdyn.open(path), whole)
    assert dict(tsdyn.open(path, along="point").mse_eval.sizes) == {"point": 2, "seed": 2, "epoch": 2}
    assert integrity.check(path) == [f"{path}/sweep.json: is not there; the same `tsdyn run` writes it anew"]
    assert len(adding.add(path, ["correlation"])) == 2
    assert integrity.repair(path) == []
    same(tsdyn.run(experiment, path), whole)
    assert integrity.check(path) == []


def test_a_damaged_list_of_points_is_what_validate_names(tmp_path):
    """Before, it said that the sweep cannot be read, which is read without its list."""
    experiment = small(**FEW, training__epochs=1, sweep=SWEEP)
    whole = tsdyn.run(experiment, tmp_path).load()
    for damaged in (b"{", b"[]", b'{"points": 3}', b"\xff", b"[" * 100_000):
        (tmp_path / "sweep.json").write_bytes(damaged)
        (problem,) = integrity.check(tmp_path)
        assert problem.startswith(f"{tmp_path}/sweep.json: cannot be read as a list of points (")
        assert problem.endswith("; the same `tsdyn run` writes it anew")
        same(tsdyn.open(tmp_path), whole)
        tsdyn.run(experiment, tmp_path)
        assert integrity.check(tmp_path) == []


def test_a_run_whose_experiment_file_was_saved_with_a_byte_order_mark_is_read(tmp_path):
    """As editors of Windows write it first; `tsdyn run` took it, and `open` of a sweep refused it."""
    whole = tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), tmp_path / "sweep").load()
    file = tmp_path / "sweep" / "experiment.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    ds = tsdyn.open(tmp_path / "sweep")
    same(ds, whole)
    assert ds.attrs["experiment"] == whole.attrs["experiment"]
    assert integrity.check(tmp_path / "sweep") == []


def test_an_unfinished_point_is_read_without_its_experiment_file(tmp_path, monkeypatch):
    """As a finished one is; before, the whole sweep was refused, with ``skip_damaged``, too."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    path = tmp_path / "sweep"
    with pytest.raises(Stopped):
        tsdyn.run(small(**FEW, training__epochs=3, sweep=SWEEP), path, together=False, progress=stop_after(1))
    before = tsdyn.open(path).load()
    (path / "polarity=0.0" / "experiment.toml").write_text("epochs = [", encoding="utf-8")
    found = tsdyn.open(path)
    same(found, before)
    np.testing.assert_array_equal(found.coverage, before.coverage)
    assert found.coverage.values.tolist() == [0.5, 0.0]
    assert any("experiment.toml" in line for line in integrity.check(path))
