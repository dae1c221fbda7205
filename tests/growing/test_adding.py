"""What `tsdyn measure` adds to an archive: committed whole, read as if recorded, gone on with after a kill."""

import ctypes
import os
import pickle
import shutil
import signal
import stat
import struct

import numpy as np
import pytest
import torch
import xarray as xr

import tsdyn
from tests.archive.states.children import child
from tests.cases import small
from tsdyn import cli
from tsdyn.archive import additions, integrity, lazy_arrays, whole_files
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.cli import application
from tsdyn.experiment.errors import ExperimentError
from tsdyn.growing.adding import add
from tsdyn.growing.exporting import export
from tsdyn.growing.measuring import lost_parameters
from tsdyn.running import runner
from tsdyn.running.interrupts import Stopped

FEW = {
    "seeds": 2, "training__epochs": 3, "training__steps_per_epoch": 3, "data__train": 24, "data__eval": 20,
    "teacher__widths": [5, 3, 2], "record__observables": ["mse", "weight"],
}  # fmt: skip
NAMES = ["A", "gradient_rms", "hessian_eigenvalue"]
SWEEP = {"sweep": {"student.overrealization": [1.0, 2.0]}, "seeds": 1}


def command(capsys, *words):
    """Exit status and output of the command."""
    with pytest.raises(SystemExit) as end, application.reported_errors():
        cli.app([*map(str, words)])
    said = capsys.readouterr()
    return end.value.code or 0, said.out + said.err


def recorded(folder, **changes):
    asked = small(**FEW).replace({key.replace("__", "."): value for key, value in changes.items()})
    return tsdyn.run(asked.replace({"record.observables": ["mse", "weight", *NAMES]}), folder).load()


@pytest.mark.parametrize("changes", [{}, SWEEP], ids=["run", "sweep"])
def test_the_archive_then_is_what_it_would_be_had_it_been_recorded(tmp_path, capsys, changes):
    known = recorded(tmp_path / "known", **changes)
    before = tsdyn.run(small(**FEW).replace(changes), tmp_path / "run")
    code, said = command(capsys, "measure", tmp_path / "run", "--observables", ",".join(NAMES), "--epochs", "1:2")
    assert (code, "added" in said) == (0, True), said
    part = tsdyn.open(tmp_path / "run")
    for name in NAMES:
        xr.testing.assert_equal(part[name].sel(epoch=[1, 2]).load(), known[name].sel(epoch=[1, 2]))
        assert part[name].sel(epoch=[0, 3]).isnull().all()
    assert command(capsys, "measure", tmp_path / "run", "--observables", ",".join(NAMES))[0] == 0
    found = tsdyn.open(tmp_path / "run")
    xr.testing.assert_equal(found.load(), known)
    for name in NAMES:
        assert found[name].attrs == known[name].attrs
    assert integrity.check(tmp_path / "run") == []
    files = sorted((tmp_path / "run").rglob("*.nc"))
    assert "nothing is left to measure" in command(capsys, "measure", tmp_path / "run", "--observables", "A,mse")[1]
    assert sorted((tmp_path / "run").rglob("*.nc")) == files
    assert set(before.data_vars) == set(small(**FEW).recorded()), "what was opened before stays what it was"
    xr.testing.assert_equal(before.load(), known.drop_vars(NAMES).drop_dims("mode", errors="ignore"))


def test_one_that_is_killed_goes_on_point_by_point(tmp_path):
    """Whatever was added before the kill stays as it is."""
    known = recorded(tmp_path / "known", **SWEEP)
    path = tmp_path / "run"
    tsdyn.run(small(**FEW).replace(SWEEP), path)
    written = additions.write

    def dying(*given):
        done = written(*given)
        if len(list(path.rglob("measured/*.nc"))) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def work():
        additions.write = dying
        add(path, NAMES)

    assert child(work, path).how == "killed"
    first = {file: file.stat().st_mtime_ns for file in path.rglob("measured/*.nc")}
    assert len(first) == 2
    assert integrity.check(path) == []
    with pytest.warns(tsdyn.UnrecordedWarning, match="A, gradient_rms not in .*overrealization=2.0;"):
        part = tsdyn.open(path).load()
    whole = part["A"].sel(layer=1).notnull().any(["node", "teacher_node", "seed", "epoch"])
    assert whole.values.tolist() == [True, False], "one point has it, the other not yet"
    added = add(path, NAMES)
    assert len(added) == 2 * len(NAMES) - 2
    assert {file: file.stat().st_mtime_ns for file in first} == first
    xr.testing.assert_equal(tsdyn.open(path).load(), known)


def test_epochs_that_a_run_gains_later_are_measured_later(tmp_path):
    tsdyn.run(small(**FEW), tmp_path / "run")
    add(tmp_path / "run", ["A"])
    grown = tsdyn.run(
        small(
            **FEW,
        ).replace({"training.epochs": 5}),
        tmp_path / "run",
    )
    assert grown["A"].isel(epoch=slice(4, 6)).isnull().all()
    (file,) = add(tmp_path / "run", ["A"])
    with xr.open_dataset(file) as alone:
        assert alone.epoch.values.tolist() == [4, 5]
    known = recorded(tmp_path / "known", training__epochs=5)
    xr.testing.assert_equal(tsdyn.open(tmp_path / "run")["A"].load(), known["A"])
    assert integrity.check(tmp_path / "run") == []


def test_members_that_die_are_looked_at_once(tmp_path):
    asked = small(**FEW, training__learning_rate=1e9)
    tsdyn.run(asked, tmp_path / "run")
    assert len(add(tmp_path / "run", ["A"])) == 1
    assert add(tmp_path / "run", ["A"]) == []
    found = tsdyn.open(tmp_path / "run")
    assert (found.death_epoch.values > 0).all()
    assert found["A"].isel(epoch=0, layer=0).notnull().any()
    assert found["A"].isel(epoch=-1).isnull().all()


def stopped_after(epoch, asked, path):
    def stop(now, *_):
        if now == epoch:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        tsdyn.run(asked, path, progress=stop)


def test_epochs_that_repair_drops_are_hidden_in_what_was_measured_until_they_are_there_again(tmp_path, monkeypatch):
    """Before, they were shown without the run's own numbers, and what was measured of these was NaN for good."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    asked, path = small(**FEW), tmp_path / "run"
    names = ["A", "gradient_rms"]
    known = tsdyn.run(asked.replace({"record.observables": ["mse", "weight", *names]}), tmp_path / "known").load()
    stopped_after(2, asked, path)
    add(path, ["gradient_rms"])
    seal = path / "segments" / "epoch-000000-000000.nc.sha256"
    seal.write_bytes(bytes([seal.read_bytes()[0] ^ 1]) + seal.read_bytes()[1:])
    assert len(integrity.repair(path)) == 3
    with pytest.raises(DirectoryError, match="holds no committed epoch yet"):
        tsdyn.open(path)
    stopped_after(0, asked, path)
    assert integrity.check(path) == []
    part = pickle.loads(pickle.dumps(tsdyn.open(path)))
    assert part.epoch.values.tolist() == [0]
    for name in ("mse_train", "weight", "gradient_rms"):
        np.testing.assert_array_equal(part[name].values, known[name].sel(epoch=[0]).values)
    add(path, ["A"])
    tsdyn.run(asked, path)
    add(path, names)
    xr.testing.assert_equal(tsdyn.open(path).load(), known)


def test_a_point_shows_what_was_measured_at_its_own_epochs_whatever_others_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    asked, path = small(**FEW).replace(SWEEP), tmp_path / "run"
    tsdyn.run(asked, path)
    add(path, ["gradient_rms"])
    whole = tsdyn.open(path).load()
    whole_files.remove_sealed(path / "overrealization=1.0" / "archive.nc")
    stopped_after(0, asked, path)
    for _ in range(2):  # without, and with what the index remembers
        part = tsdyn.open(path).load()
        xr.testing.assert_equal(part.isel(overrealization=1).drop_vars("coverage"),
                                whole.isel(overrealization=1).drop_vars("coverage"))  # fmt: skip
        for name in ("mse_train", "gradient_rms"):
            now, before = (ds[name].isel(overrealization=0) for ds in (part, whole))
            xr.testing.assert_equal(now.sel(epoch=0, drop=True).drop_vars("coverage"),
                                    before.sel(epoch=0, drop=True).drop_vars("coverage"))  # fmt: skip
            assert now.sel(epoch=slice(1, None)).isnull().all(), name
    tsdyn.run(asked, path)
    xr.testing.assert_equal(tsdyn.open(path).load(), whole)


def test_seeds_that_a_run_lost_are_hidden_in_what_was_measured(tmp_path):
    """Gaining them was cut short before the experiment file named them, and then the archive was lost."""
    more, asked, path = small(**FEW), small(**FEW).replace({"seeds": 1}), tmp_path / "run"
    tsdyn.run(more, path)
    add(path, ["A"])
    whole = tsdyn.open(path).load()
    (path / "experiment.toml").write_text(asked.to_toml(), encoding="utf-8")
    whole_files.remove_sealed(path / "archive.nc")
    xr.testing.assert_equal(tsdyn.run(asked, path).load(), whole.isel(seed=[0]))
    xr.testing.assert_equal(tsdyn.run(more, path).load(), whole)


def measured_at(array):
    """Whether there is any number, (seed, epoch)."""
    inner = [dim for dim in array.dims if dim not in ("seed", "epoch")]
    return array.notnull().any(inner).transpose("seed", "epoch").values


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_is_nan_was_lost_unless_its_member_had_died_or_stopped(tmp_path, name):
    asked = small(**FEW)
    whole = tsdyn.run(asked, tmp_path / "run").load()
    assert not lost_parameters(whole).any()
    here = (whole.seed == 1) & (whole.epoch == 2) & (whole.layer == 2) & (whole.node == 1)
    odd, on = (whole.assign({name: whole[name].where(~at)}) for at in (here, here.cumsum("epoch").astype(bool)))
    gone = np.zeros((2, 4), bool)
    gone[1, 2] = True
    np.testing.assert_array_equal(lost_parameters(odd), gone)
    np.testing.assert_array_equal(measured_at(tsdyn.measure(odd, ["hessian_eigenvalue"]).hessian_eigenvalue), ~gone)
    for death, found in (([-1, 2], False), ([2, -1], True), ([-1, 3], True)):
        np.testing.assert_array_equal(lost_parameters(odd.assign_coords(death_epoch=("seed", death))), gone & found)
    stop = asked.replace({"training.stop": {"variable": "mse_eval", "below": 0.1}}).to_toml()
    np.testing.assert_array_equal(lost_parameters(odd.assign_attrs(experiment=stop)), gone)
    assert not lost_parameters(on.assign_attrs(experiment=stop)).any()
    assert lost_parameters(on).sum() == 2


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_nothing_is_measured_where_parameters_were_lost_until_they_are_there_again(tmp_path, name):
    """Before, it was NaN for good once the archive was computed again; an eigenvalue ended in an error of torch's."""
    asked, path, names = small(**FEW), tmp_path / "run", ["gradient_rms", "hessian_eigenvalue"]
    whole = tsdyn.run(asked, path).load()
    file = path / "archive.nc"
    raw, one = bytearray(file.read_bytes()), whole[name].values[1, 2, 0, :3]
    raw[raw.index(one.tobytes() if name == "bias" else one[0, :3].tobytes())] ^= 1
    file.write_bytes(raw)
    assert any(f"dropped {name} at" in line for line in integrity.repair(path))
    lost = tsdyn.open(path)[name].isel(layer=0, node=0).isnull()
    lost = lost.any([dim for dim in lost.dims if dim not in ("seed", "epoch")]).transpose("seed", "epoch")
    assert lost.any()
    np.testing.assert_array_equal(lost_parameters(tsdyn.open(path)), lost)
    said = []
    add(path, names, told=said.append)
    assert "are not stored; nothing is measured there" in said[0]
    part = tsdyn.open(path)
    for each in names:
        there = measured_at(part[each]) if each in part else np.zeros((2, 4), bool)  # all were in one block
        np.testing.assert_array_equal(there, ~lost.values)
    whole_files.remove_sealed(file)
    tsdyn.run(asked, path)
    add(path, names)
    found = tsdyn.open(path).load()
    assert all(measured_at(found[each]).all() for each in names)
    xr.testing.assert_equal(found.drop_vars(names).drop_dims("mode", errors="ignore"), whole)


def test_a_damaged_addition_is_told_and_measured_again(tmp_path):
    tsdyn.run(small(**FEW), tmp_path / "run")
    (file,) = add(tmp_path / "run", ["A"])
    whole = tsdyn.open(tmp_path / "run").load()
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ArchiveError, match="its checksum differs"):
        tsdyn.open(tmp_path / "run")
    assert any(str(file) in line for line in integrity.check(tmp_path / "run"))
    (line,) = [line for line in integrity.repair(tmp_path / "run") if "tsdyn measure" in line]
    assert str(file) in line
    assert "A" not in tsdyn.open(tmp_path / "run")
    add(tmp_path / "run", ["A"])
    xr.testing.assert_equal(tsdyn.open(tmp_path / "run").load(), whole)
    seal = whole_files.seal_of(next((tmp_path / "run").rglob("measured/*.nc")))
    seal.unlink()
    assert integrity.check(tmp_path / "run")
    integrity.repair(tmp_path / "run")
    assert integrity.check(tmp_path / "run") == []
    assert seal.exists()


def test_bad_requests_are_one_sentence_and_change_nothing(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    tsdyn.run(small(**FEW), path)
    files = sorted(path.rglob("*"))
    for words, part in (
        (["--observables", "hesian_eigenvalue"], "did you mean 'hessian_eigenvalue'"),
        (["--observables", ","], "name one at least"),
        (["--observables", "A", "--epochs", "9"], "epochs [9] are not recorded"),
        (["--observables", "A", "--epochs", "a"], "write 0,10,20"),
        (["--observables", "A", "--workers", "0"], "at least 1"),
        (["--observables", "parameter"], "of modules of your own"),
    ):  # fmt: skip
        code, said = command(capsys, "measure", path, *words)
        assert (code, part in said, said.count("\n")) == (2, True, 1), said
    with pytest.raises(DirectoryError, match="is a file"):
        add(path / "archive.nc", ["A"])
    tsdyn.run(small(**FEW).replace({"record.observables": ["mse"]}), tmp_path / "bare")
    with pytest.raises(ValueError, match="no weight, bias"):
        add(tmp_path / "bare", ["A"])
    monkeypatch.setattr(whole_files.shutil, "disk_usage", lambda _: whole_files.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ArchiveError, match="no space left"):
        add(path, ["A"])
    monkeypatch.undo()
    left = [p for p in sorted(path.rglob("*")) if p not in files and p.name not in ("measured", "LOCK")]
    assert not left
    add(path, ["A"])


def as_anybody():
    """From here on this process, if it is root's, heeds permissions as any other (capabilities 1 and 2 of Linux)."""
    header = struct.pack("Ii", 0x20080522, 0)
    held = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, held) == 0
    sets = list(struct.unpack("6I", held.raw))
    sets[0] &= ~0b110  # effective
    assert libc.capset(header, struct.pack("6I", *sets)) == 0


READ_ONLY = {
    "measured": lambda asked, path: add(path, ["A"]),
    "epochs": lambda asked, path: tsdyn.run(asked.replace({"training.epochs": 4}), path),
    "seeds": lambda asked, path: tsdyn.run(asked.replace({"seeds": 3}), path),
    "exported": lambda asked, path: export(path, "netcdf", path / "run.nc"),
    "forked": lambda asked, path: tsdyn.fork(path, at=1, out=path / "children"),
    "recorded": lambda asked, path: tsdyn.Recorder(
        path / "own", torch.nn.Linear(3, 2), probe=(torch.zeros(4, 3), torch.zeros(4, 2))
    ),
}


@pytest.mark.parametrize("how", READ_ONLY)
def test_a_read_only_directory_is_said_in_a_sentence_and_nothing_is_lost(tmp_path, how):
    asked, path = small(**FEW), tmp_path / "run"
    tsdyn.run(asked, path)
    held = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def work():
        as_anybody()
        READ_ONLY[how](asked, path)

    path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        end = child(work, path)
    finally:
        path.chmod(stat.S_IRWXU)
    assert end.how == "refused", end.words
    assert "cannot be made: permission denied; nothing was written" in end.words
    assert "\n" not in end.words
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == held


def test_another_input_file_is_refused(tmp_path):
    inputs = tmp_path / "covariance.npy"
    np.save(inputs, np.eye(5))
    asked = small(**FEW).replace({"data.covariance": str(inputs)})
    tsdyn.run(asked, tmp_path / "run")
    np.save(inputs, 2 * np.eye(5))
    with pytest.raises((ArchiveError, ExperimentError), match="other input files"):
        add(tmp_path / "run", ["A"])


def test_what_was_measured_of_a_run_with_other_inputs_is_not_shown_beside_the_one_that_took_its_place(tmp_path):
    """The archive was removed and computed again from a changed file: before, both were shown as one run's."""
    path, inputs = tmp_path / "run", tmp_path / "covariance.npy"
    np.save(inputs, np.eye(5))
    asked = small(**FEW).replace({"data.covariance": str(inputs), "training.epochs": 1})
    tsdyn.run(asked, path)
    (file,) = add(path, ["A"])
    whole_files.remove_sealed(path / "archive.nc")
    tsdyn.run(asked, path)
    assert "A" in tsdyn.open(path)  # the same numbers again
    whole_files.remove_sealed(path / "archive.nc")
    np.save(inputs, 2 * np.eye(5))
    words = f"{file.name}: was measured of an earlier run in this directory, which began with another file in data.cov"
    with pytest.raises(ArchiveError, match=words):
        tsdyn.run(asked, path)
    with pytest.raises(ArchiveError, match=words):
        tsdyn.open(path)
    assert [words in line for line in integrity.check(path)] == [True]
    whole_files.remove_sealed(file)
    assert "A" not in tsdyn.open(path)
    add(path, ["A"])
    assert integrity.check(path) == []


class _Sevens:
    """NumPy, whose empty arrays are full of sevens."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype):
        return np.full(shape, 7, dtype)


def test_a_point_without_files_is_nan_beside_one_that_holds_a_variable_twice(tmp_path, monkeypatch):
    """Recorded from some epoch on and measured before it, in files that overlap: their sizes add up to the whole's."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW | {"sweep": {"teacher.polarity": [0.0, 1.0]}}), path)
    add(path, ["correlation"])
    more = {"training__epochs": 4, "record__observables": ["mse", "weight", "correlation"]}
    tsdyn.run(small(**FEW | more | {"sweep": {"teacher.polarity": [0.0, 1.0]}}), path)
    before = tsdyn.open(path).load()
    lost = next(path.glob("*=1.0"))
    shutil.move(lost, tmp_path / "elsewhere")
    found = tsdyn.open(path)
    monkeypatch.setattr(lazy_arrays, "np", _Sevens())
    for window in (slice(0, 3), slice(0, 4), slice(3, 4)):
        now, then = (ds.correlation.isel(epoch=window).load() for ds in (found, before))
        assert now.sel(polarity=1.0).isnull().all()
        xr.testing.assert_equal(now.sel(polarity=0.0), then.sel(polarity=0.0))
