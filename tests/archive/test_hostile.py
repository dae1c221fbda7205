"""Hostile files and environments: one clear error, nothing executed, nothing written elsewhere."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal

import netCDF4
import numpy as np
import pytest
import torch
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tests.test_cli import command  # noqa: F401
from tsdyn import memory
from tsdyn.archive import integrity, lock, own_process, reading, run_directory, whole_files
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import outcome, runner, sweep
from tsdyn.running.members import Members

FEW = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "weight"]}

MANY_POINTS = "[sweep]\n" + "".join(
    f'"{key}" = {list(range(1, 200))}\n' for key in ("data.eval", "training.batch", "student.scale")
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "run"
    tsdyn.run(small(**FEW), path)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def _truncated(file):
    file.write_bytes(file.read_bytes()[:20_000])


def _flipped(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def _empty(file):
    file.write_bytes(b"")


def _not_netcdf(file):
    file.write_bytes(b"GIF89a" + bytes(1000))


def _netcdf_3(file):
    with netCDF4.Dataset(file, "w", format="NETCDF3_CLASSIC") as nc:
        nc.createDimension("x", 2)


def _foreign(file):
    xr.Dataset({"temperature": ("time", [1.0, 2.0])}).to_netcdf(file, engine="netcdf4")


def _huge(file):
    with netCDF4.Dataset(file, "a") as nc:
        nc.createDimension("sample", 1 << 60)


def _huge_chunks(file):
    with netCDF4.Dataset(file, "a") as nc:
        nc.createDimension("mode", 1 << 31)
        nc.createVariable("hessian_eigenvalue", "f8", ("mode",), chunksizes=(1 << 28,))


def _lying(file):
    with netCDF4.Dataset(file, "a") as nc:
        nc.renameVariable("weight", "correlation")


def _of_another_run(file):
    with netCDF4.Dataset(file, "a") as nc:
        nc.setncattr("experiment", small(training__learning_rate=0.5, **FEW).to_toml())


DAMAGES = [
    _truncated, _flipped, _empty, _not_netcdf, _netcdf_3, _foreign, _huge, _huge_chunks, _lying, _of_another_run,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_a_file_that_is_not_what_was_written_is_named(copy, command, damage):  # noqa: F811
    before = sorted(copy.parent.rglob("*"))
    damage(copy / "archive.nc")
    code, out, _ = command("validate", copy)
    assert code == 1
    assert "archive.nc: its checksum differs from the one kept in archive.nc.sha256" in out
    with pytest.raises(ArchiveError, match=r"archive\.nc: was changed or is damaged"):
        tsdyn.open(copy)
    code, _, err = command("show", copy)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert sorted(copy.parent.rglob("*")) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_without_its_checksum_it_is_still_not_taken_for_a_run(copy, command, damage):  # noqa: F811
    (copy / "archive.nc.sha256").unlink()
    damage(copy / "archive.nc")
    code, out, _ = command("validate", copy)
    assert code == 1
    assert "archive.nc" in out
    if damage in (_foreign, _lying, _flipped):  # validate names these; a flipped bit may hit what nobody reads
        with contextlib.suppress(ArchiveError):
            tsdyn.open(copy).load()
    else:
        with pytest.raises(ArchiveError, match=r"archive\.nc|another run"):
            tsdyn.open(copy).load()
    assert command("show", copy)[0] in (0, 1, 2)


def test_memory_is_what_the_file_warrants(copy):
    for damage in (_huge, _huge_chunks):
        file = shutil.copy(copy / "archive.nc", copy.parent / "alone.nc")
        damage(copy.parent / "alone.nc")
        with pytest.raises(DirectoryError, match=r"more than a (file of|file) \d+ bytes warrants"):
            tsdyn.open(file)


def test_a_damaged_block_is_named_when_it_is_read(finished, tmp_path):
    file = tmp_path / "alone.nc"
    raw = bytearray((finished / "archive.nc").read_bytes())
    with xr.open_dataset(finished / "archive.nc") as ds:
        needle = ds.weight.sel(seed=1, layer=1, epoch=1, node=2).values[:8].tobytes()
    raw[raw.index(needle) + 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArchiveError, match=r"alone\.nc: weight cannot be read.*tsdyn validate"):
        tsdyn.open(file).weight.load()


def _number_flipped(file):
    """Change a bit of a number, of which opening the file reads nothing."""
    with netCDF4.Dataset(file) as nc:
        stored = nc["weight"][0, 0, 0, 0].data.tobytes()
    raw = bytearray(file.read_bytes())
    raw[raw.index(stored)] ^= 1
    file.write_bytes(raw)


def test_verify_reads_files_of_any_size(copy, monkeypatch):
    _number_flipped(copy / "archive.nc")
    monkeypatch.setattr(reading, "ALWAYS_VERIFIED", 1000.0)
    tsdyn.open(copy, verify=False)
    with pytest.raises(ArchiveError, match="was changed or is damaged"):
        tsdyn.open(copy, verify=True)


def test_a_dataset_of_a_run_that_goes_on_is_readable_when_it_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    opened = []

    def look(epoch, *_):
        if epoch == 3:
            opened.append(tsdyn.open(tmp_path / "run"))

    experiment = small(**{**FEW, "training__epochs": 4})
    whole = tsdyn.run(experiment, tmp_path / "run", progress=look).load()
    xr.testing.assert_equal(opened[0].load(), whole.sel(epoch=slice(0, 2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "teacher: missing"),
        ("teacher = 3", "teacher = 3: must be"),
        ("name = '../../etc/cron.d/x'", "a name is 1–100 letters"),
        ("name = 'a/b'", "a name is 1–100 letters"),
        ("name = '\\u0000'", "a name is 1–100 letters"),
        ("seeds = 10000000000000000000000", "must be less than or equal to"),
        ("seeds = [[[[[1]]]]]", "seeds"),
        ("[training]\nepochs = 1e400", "training.epochs"),
        ("[training]\nepochs = 1000000001", "must be less than or equal to 1000000"),
        ("[training]\nlearning_rate = nan", "training.learning_rate = nan"),
        (MANY_POINTS, "7880599 points, each of which is a run; at most 100000"),
        ("x = " + "[" * 20_000 + "]" * 20_000, "not TOML"),
        ("x = " + "{a=" * 20_000 + "1" + "}" * 20_000, "not TOML"),
        ("\x00", "not TOML"),
    ],
    ids=lambda v: v[:20] if isinstance(v, str) else None,
)  # fmt: skip
def test_experiment_files_that_mean_harm(command, tmp_path, text, message):  # noqa: F811
    name = "" if "name" in text else "name = 'x'\n"
    teacher = "" if text in ("", "teacher = 3") else "\n[teacher]\nwidths = [10, 4, 6]\n"
    file = tmp_path / "hostile.toml"
    file.write_text(name + text + teacher, encoding="utf-8")
    code, _, err = command("run", file, "-o", tmp_path / "run")
    assert code == 2
    assert message in err
    assert len(err) < 5000
    assert not (tmp_path / "run").exists()


def test_bytes_that_are_no_text(command, tmp_path):  # noqa: F811
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    code, _, err = command("run", tmp_path / "binary.toml")
    assert (code, "cannot be read" in err) == (2, True)
    code, _, err = command("run", "/dev/null")
    assert (code, "teacher: missing" in err) == (2, True)


def test_directories_of_points_come_from_the_experiment(tmp_path):
    """Names in ``sweep.json`` and ``index.json`` may be forged, and are not used as paths."""
    path = tmp_path / "sweep"
    whole = tsdyn.run(small(sweep={"teacher.polarity": [0.0, 1.0]}, **FEW), path).load()
    for name in ("sweep.json", "index.json"):
        listed = (path / name).read_text(encoding="utf-8")
        (path / name).write_text(listed.replace("polarity=1.0", "../../../etc"), encoding="utf-8")
    xr.testing.assert_equal(tsdyn.open(path).load(), whole)
    assert any("lists other points" in problem for problem in integrity.check(path))


@pytest.mark.parametrize("name", ["archive.nc", "experiment.toml", "segments", "LOCK"])
def test_symbolic_links_in_a_run_are_refused(copy, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    if (copy / name).exists():
        (copy / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
    (copy / name).symlink_to(elsewhere)
    before = elsewhere.stat().st_mtime_ns
    with pytest.raises(ArchiveError, match=rf"{name}: (is a symbolic link|cannot be written: it is a symbolic link)"):
        tsdyn.run(small(**{**FEW, "training__epochs": 3}), copy)
    assert elsewhere.stat().st_mtime_ns == before
    if name != "LOCK":
        assert any("is a symbolic link" in problem for problem in integrity.check(copy))


def _tree(path):
    return {p.relative_to(path): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in path.rglob("*")}


@pytest.mark.parametrize("name", ["segments", "archive.nc", "damaged", "segments/epoch-000000-000000.nc"])
def test_nothing_is_read_moved_or_removed_through_a_link(tmp_path, monkeypatch, name):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        if name != "archive.nc":
            patch.setattr(run_directory.RunDirectory, "consolidate", lambda *_: None)
        with contextlib.suppress(ArchiveError):
            tsdyn.run(small(**FEW), path)
    if name == "damaged":
        elsewhere.mkdir()
    else:
        (path / name).rename(elsewhere)
    if elsewhere.is_dir():
        (elsewhere / ".precious.tmp").write_text("mine")
    (path / name).symlink_to(elsewhere)
    before = _tree(tmp_path)
    said = rf"{re.escape(str(path / name))}: is a symbolic link; runs and sweeps hold their own files"
    with pytest.raises(ArchiveError, match=said):
        integrity.repair(path)
    if name != "damaged":  # which nobody reads
        with pytest.raises(ArchiveError, match=said):
            tsdyn.open(path)
        with pytest.raises(ArchiveError, match=said):
            tsdyn.run(small(**FEW), path)
        assert any("is a symbolic link" in problem for problem in integrity.check(path))
    after = _tree(tmp_path)
    assert {f: after.get(f) for f in before if f.name not in ("LOCK", "run")} == {
        f: kept for f, kept in before.items() if f.name not in ("LOCK", "run")
    }


def test_a_point_that_is_a_link_is_not_trained_into(tmp_path):
    sweep_file = small(sweep={"teacher.polarity": [0.0, 1.0]}, **FEW)
    path, elsewhere = tmp_path / "sweep", tmp_path / "elsewhere"
    tsdyn.run(sweep_file, path)
    shutil.rmtree(path / "polarity=1.0")
    elsewhere.mkdir()
    (path / "polarity=1.0").symlink_to(elsewhere)
    with pytest.raises(ArchiveError, match=r"1 of 2 points failed(.|\n)*polarity=1.0: is a symbolic link"):
        tsdyn.run(sweep_file, path)
    assert not any(elsewhere.iterdir())
    assert any("is a symbolic link" in problem for problem in integrity.check(path))
    with pytest.raises(ArchiveError, match="is a symbolic link"):
        integrity.repair(path)
    with pytest.raises(ArchiveError, match="is a symbolic link"):
        tsdyn.open(path)
    with pytest.warns(UserWarning, match="is a symbolic link"):
        assert int((tsdyn.open(path, skip_damaged=True).coverage == 1).sum()) == 1


def test_a_figure_is_not_written_through_a_link(tmp_path, command):  # noqa: F811
    tsdyn.run(small(**FEW), tmp_path / "run")
    (tmp_path / "figure.png").symlink_to(tmp_path / "elsewhere.png")
    code, _, complained = command("plot", tmp_path / "run", "loss", "-o", tmp_path / "figure.png")
    assert (code, "is a symbolic link" in complained) == (2, True)
    assert not (tmp_path / "elsewhere.png").exists()


def test_a_run_is_refused_a_url_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchiveError, match="s3://bucket/run"):
        runner.run(small(**FEW), "s3://bucket/run")
    assert not any(tmp_path.iterdir())


class _Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_weights_are_loaded_without_executing_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Harm()}, tmp_path / "weights.pt")
    experiment = small(teacher__init="file", teacher__path=str(tmp_path / "weights.pt"))
    with pytest.raises(ExperimentError, match=r"weights\.pt is no state dict that can be read safely"):
        tsdyn.run(experiment, tmp_path / "run")
    np.save(tmp_path / "inputs.npy", np.array([_Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"inputs\.npy: cannot be read"):
        tsdyn.run(small(data__law="file", data__path=str(tmp_path / "inputs.npy")), tmp_path / "other")
    assert not (tmp_path / "harm").exists()


# --- the environment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_the_epoch_in_work(command, tmp_path, monkeypatch, number, code):  # noqa: F811
    file = tmp_path / "small.toml"
    file.write_text(small(**{**FEW, "training__epochs": 6}).to_toml(), encoding="utf-8")
    train = Members.advance

    def interrupted(self, epoch):
        if epoch == 3:
            os.kill(os.getpid(), number)
        return train(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Members, "advance", interrupted)
        got, _, err = command("run", file, "-o", tmp_path / "run", "--quiet")
    assert got == code
    assert "the same command goes on from there" in err
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2, 3]
    assert command("run", file, "-o", tmp_path / "run", "--quiet")[0] == 0
    whole = tsdyn.run(Experiment.from_toml(file), tmp_path / "whole").load()
    xr.testing.assert_equal(tsdyn.open(tmp_path / "run").load(), whole)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.ESTALE, "the network file system went away"),
        (errno.EIO, "the device reports an input/output error"),
    ],
)
def test_what_a_file_system_refuses_is_said_and_survived(tmp_path, monkeypatch, number, reason):
    experiment = small(**FEW)
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    opening = os.open

    def refusing(path, flags, *rest, **more):
        if "epoch-000001" in str(path) and flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return opening(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "open", refusing)
        with pytest.raises(ArchiveError, match=f"{reason}; what was committed is intact"):
            tsdyn.run(experiment, tmp_path / "run")
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert tsdyn.run(experiment, tmp_path / "run").sizes["epoch"] == 3


def test_a_directory_that_vanishes_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)

    def vanish(epoch, *_):
        if epoch == 2:
            (tmp_path / "run").rename(tmp_path / "unmounted")

    with pytest.raises(ArchiveError, match="the lock was taken away"):
        tsdyn.run(small(**FEW), tmp_path / "run", progress=vanish)
    assert not (tmp_path / "run").exists()
    assert list(tsdyn.open(tmp_path / "unmounted").epoch.values) == [0, 1]


def test_a_clock_that_goes_backwards_changes_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    now = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(lock.time, "time", lambda: float(next(now)))

    def older(epoch, *_):
        for file in (tmp_path / "run").rglob("*.nc*"):
            os.utime(file, (1, 1))

    ended = tsdyn.run(small(**FEW), tmp_path / "run", progress=older).load()
    xr.testing.assert_equal(ended, tsdyn.open(finished).load())
    assert integrity.check(tmp_path / "run") == []


def test_what_does_not_fit_in_memory_is_refused_before_it_is_drawn(command, tmp_path, monkeypatch):  # noqa: F811
    file = tmp_path / "wide.toml"
    file.write_text(small(teacher__widths=[100_000, 100_000, 10]).to_toml(), encoding="utf-8")
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    for quiet in ([], ["--quiet"]):
        code, _, err = command("run", file, "-o", tmp_path / "run", *quiet)
        assert code == 1
        assert "GB of memory are free" in err
    with pytest.raises(MemoryError, match=r"run: the result needs \d+\.\d GB, 1\.1 GB of memory are free; train fewer"):
        tsdyn.run(Experiment.from_toml(file), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _sealed_index(kept):
    text = json.dumps(kept)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "kept": {text}}}'


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "sweep"
    return path, tsdyn.run(small(sweep={"teacher.polarity": [0.0, 1.0]}, **FEW), path).load()


@pytest.fixture
def swept(finished_sweep, tmp_path):
    return shutil.copytree(finished_sweep[0], tmp_path / "sweep", dirs_exist_ok=True)


def test_an_index_of_somebody_else_s_is_not_believed(swept, finished_sweep):
    index = json.loads((swept / "index.json").read_text(encoding="utf-8"))["kept"]
    for damage in (
        {"headers": {k: h[:2] for k, h in index["headers"].items()}},
        {"headers": {k: [2, {}, {}, {}, {}] for k in index["headers"]}},
        {"runs": {k: [e[0]] for k, e in index["runs"].items()}},
    ):
        (swept / "index.json").write_text(_sealed_index({**index, **damage}), encoding="utf-8")
        xr.testing.assert_equal(tsdyn.open(swept).load(), finished_sweep[1])


def test_a_damaged_index_is_read_anew(swept, finished_sweep):
    """With a letter or a digit changed it is still JSON, and only its checksum shows the damage."""
    text = (swept / "index.json").read_text(encoding="utf-8")
    for was, now in (("teacher_input_width", "teacher_inp5t_width"), ('"seed":[0,1]', '"seed":[0,3]')):
        assert was in text
        (swept / "index.json").write_text(text.replace(was, now), encoding="utf-8")
        xr.testing.assert_identical(tsdyn.open(swept).load(), finished_sweep[1])


def test_a_sweep_whose_experiment_is_damaged_is_refused_by_every_verb(command, swept):  # noqa: F811
    file = swept / "experiment.toml"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace("[training]", "[tr~ining"), encoding="utf-8")
    for verb in ("show", "validate", "repair"):
        code, _, told = command(verb, swept)
        assert code in (1, 2)
        assert "Traceback" not in told
    with pytest.raises(ArchiveError, match="put the sweep's experiment file back"):
        integrity.repair(swept)
    file.write_text(whole.replace("observables", "observ5bles"), encoding="utf-8")
    with pytest.raises(ArchiveError, match="not an experiment of tsdyn's"):
        tsdyn.open(swept)


def test_a_point_whose_experiment_is_no_text_fails_alone(swept):
    experiment = Experiment.from_toml(swept / "experiment.toml")
    (swept / "polarity=1.0" / "experiment.toml").write_bytes(b"\x89\xff\x00")
    with pytest.raises(outcome.SweepError, match=r"polarity=1\.0"):
        sweep.run(experiment, swept)


def _dying(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_file_that_crashes_the_library_is_named_and_put_aside(copy, monkeypatch):
    """A file that differs from its checksum is inspected in a separate process; here one that crashes."""
    _flipped(copy / "archive.nc")
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "_contents", _dying)
        patch.setattr(integrity, "_salvage", _dying)
        assert any("crashes the library" in line for line in integrity.check(copy))
        told = integrity.repair(copy)
    assert any("nothing of it could be kept" in line for line in told)
    assert not list(copy.glob(".*.tmp"))
    tsdyn.run(small(**FEW), copy)
    assert integrity.check(copy) == []


def test_a_damaged_checksum_is_named_and_no_crash_is_claimed(copy):
    seal = copy / "archive.nc.sha256"
    text = seal.read_text(encoding="ascii")
    seal.write_text(("1" if text[0] == "0" else "0") + text[1:], encoding="ascii")
    told = integrity.check(copy)
    assert any("its checksum differs" in line for line in told)
    assert not any("crashes" in line for line in told)


def test_nothing_is_kept_of_an_archive_of_another_experiment(tmp_path):
    """An archive of the same shape lies in this one's place, beside this one's checksum."""
    experiment = small(sweep={"teacher.polarity": [0.0, 1.0]}, **FEW)
    path = tmp_path / "sweep"
    whole = tsdyn.run(experiment, path).load()
    shutil.copy(path / "polarity=0.0" / "archive.nc", path / "polarity=1.0" / "archive.nc")
    assert any("its checksum differs" in line for line in integrity.check(path))
    told = integrity.repair(path)
    assert any("nothing of it could be kept (it is of another experiment" in line for line in told)
    xr.testing.assert_equal(tsdyn.run(experiment, path).load(), whole)


def test_reading_a_damaged_file_apart_has_a_limit(copy, monkeypatch):
    """An endless loop is ended by the limit on processor time."""
    _flipped(copy / "archive.nc")
    monkeypatch.setattr(own_process, "SECONDS", 0.5)
    monkeypatch.setattr(integrity, "_contents", lambda *_: iter(int, 1))
    assert any("crashes the library" in line for line in integrity.check(copy))


def test_a_file_that_is_opened_and_not_understood_is_never_closed(copy, tmp_path):
    """netCDF4 crashes the process when a dataset that it opened half-way is closed by garbage collection."""
    code = """
import gc, random, sys
from pathlib import Path
from tsdyn.archive import headers
from tsdyn.archive.whole_files import ArchiveError

whole, file = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
draw, refused = random.Random(0), 0
gc.collect()
gc.freeze()  # what was imported is not looked through again each time
for trial in range(150):
    at = draw.randrange(len(whole))
    file.write_bytes(whole[:at] + draw.choice([bytes(64), b"\\xff" * 64, draw.randbytes(64)]) + whole[at + 64:])
    try:
        headers.Source.of(file)
    except ArchiveError:
        refused += 1
    gc.collect()
print(refused)
"""
    told = processes.run(["python", "-c", code, copy / "archive.nc", tmp_path / "broken.nc"], tmp_path)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 10
