"""Directories that grew, moved or were exchanged after opening give the right numbers or an error."""

import contextlib
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests import processes
from tests.archive.damage import FEW, SWEEP
from tests.cases import small
from tsdyn.archive import integrity, joining
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.running import runner

EVERY_4 = {**FEW, "record__every": 4}


def same(one, other):
    xr.testing.assert_equal(one.load(), other.load())


# --- what was opened stays what it is -------------------------------------------------------------------------


def test_an_extended_run_is_read_on_by_label_and_keeps_what_it_had(tmp_path):
    """With every 4th epoch recorded, ten epochs record their last, 10, which twenty would not."""
    short = tsdyn.run(small(**EVERY_4, training__epochs=10), tmp_path / "run").load()
    lazy = tsdyn.open(tmp_path / "run")
    part = lazy.weight.isel(epoch=[1, -1])
    grown = tsdyn.run(small(**EVERY_4, training__epochs=20), tmp_path / "run")
    assert list(grown.epoch.values) == [0, 4, 8, 10, 12, 16, 20]
    same(lazy, short)
    same(part, short.weight.isel(epoch=[1, -1]))
    same(grown.sel(epoch=short.epoch), short)
    whole = tsdyn.run(small(**EVERY_4, training__epochs=20), tmp_path / "whole")
    same(grown.sel(epoch=whole.epoch), whole)
    assert integrity.check(tmp_path / "run") == []
    longest = tsdyn.run(small(**EVERY_4, training__epochs=24), tmp_path / "run")
    assert list(longest.epoch.values) == [0, 4, 8, 10, 12, 16, 20, 24]
    same(lazy, short)


def test_a_run_that_goes_on_is_read_on_in_every_state(tmp_path, monkeypatch):
    """It is opened after each commit, and read after each later one, after joining, and after an extension."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    opened = []

    def look(epoch, *_):
        for ds in opened:
            ds.load(scheduler="sync") if epoch == 3 else ds.mse_eval.load()
        if epoch in (1, 2):
            opened.append(tsdyn.open(tmp_path / "run"))

    whole = tsdyn.run(small(**FEW, training__epochs=4), tmp_path / "run", progress=look).load()
    kept = [tsdyn.open(tmp_path / "run"), *opened]
    assert [list(ds.epoch.values) for ds in opened] == [[0], [0, 1]]
    tsdyn.run(small(**FEW, training__epochs=6), tmp_path / "run")
    for ds in kept:
        same(ds, whole.sel(epoch=ds.epoch))


@pytest.mark.parametrize("swept", [False, True])
def test_another_run_in_its_place_is_not_read(tmp_path, swept):
    changes = {**FEW, "training__epochs": 2} | ({"sweep": SWEEP} if swept else {})
    path = tmp_path / "run"
    tsdyn.run(small(**changes), path)
    lazy, skipping = tsdyn.open(path), tsdyn.open(path, skip_damaged=True) if swept else None
    shutil.rmtree(path)
    with pytest.raises(ArchiveError, match="opened before the file was replaced or removed"):
        lazy.mse_eval.load()
    tsdyn.run(small(**changes, training__learning_rate=0.04), path)
    for variable in ("mse_eval", "weight", "teacher_weight"):
        with pytest.raises(ArchiveError, match=rf"{variable} cannot be read: it was opened before .*open it again$"):
            lazy[variable].compute()
    if skipping is not None:
        with pytest.warns(UserWarning, match="opened before the file was replaced"):
            assert bool(skipping.mse_eval.compute().isnull().all())
    shutil.rmtree(path)
    tsdyn.run(small(**changes), path)  # the same experiment anew is another run: its bits are another engine's, perhaps
    with pytest.raises(ArchiveError, match="open it again"):
        lazy.mse_eval.compute()
    tsdyn.open(path).load()


def test_a_copy_of_the_same_file_is_read_on(tmp_path):
    ds = tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run")
    lazy, whole = tsdyn.open(tmp_path / "run"), ds.load()
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "backup").rename(tmp_path / "run")
    same(lazy, whole)


def test_a_file_overwritten_beside_its_old_checksum_is_not_read(tmp_path):
    for rate in (0.02, 0.04):
        tsdyn.run(small(**FEW, training__epochs=2, training__learning_rate=rate), tmp_path / str(rate))
    lazy = tsdyn.open(tmp_path / "0.02")
    shutil.copy(tmp_path / "0.04" / "archive.nc", tmp_path / "0.02" / "archive.nc")
    with pytest.raises(ArchiveError, match="its checksum differs"):
        lazy.mse_eval.load()


def test_a_lazy_dataset_is_read_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), "sweep").load()
    for path in ("sweep", "sweep/polarity=0.0", "sweep/polarity=0.0/archive.nc"):
        (tmp_path / "ds.pkl").write_bytes(pickle.dumps(tsdyn.open(path)))
        (tmp_path / "else").mkdir(exist_ok=True)
        code = "import pickle, sys; print(float(pickle.load(open(sys.argv[1], 'rb')).mse_eval.sum()))"
        told = processes.run(["python", "-c", code, tmp_path / "ds.pkl"], tmp_path / "else")
        assert told.returncode == 0, told.stderr
        one = want if path == "sweep" else want.sel(polarity=0.0)
        assert float(told.stdout) == float(one.mse_eval.sum())


# --- points under their own labels ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("exchanged") / "sweep"
    tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), path)
    return path


def exchange(one, other):
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("how", ["directories", "archives", "one over another"])
def test_points_that_were_exchanged_are_refused_and_named(swept, tmp_path, how, indexed):
    path = Path(shutil.copytree(swept, tmp_path / "sweep"))
    for file in path.rglob("archive.nc"):
        os.utime(file, (10**9, 10**9))  # as a tape gives them back: size and time tell nothing
    same(tsdyn.open(path), tsdyn.open(swept))
    if not indexed:
        (path / "index.json").unlink()
    points = path / "polarity=0.0", path / "polarity=1.0"
    if how == "directories":
        exchange(*points)
    else:
        for name in ("archive.nc", "archive.nc.sha256"):
            if how == "archives":
                exchange(points[0] / name, points[1] / name)
            else:
                shutil.copy2(points[0] / name, points[1] / name)
    for verify in (None, True, False):
        with pytest.raises(ArchiveError, match=r"another run; what differs(.|\n)*teacher.polarity: [01].0 here"):
            tsdyn.open(path, verify=verify)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with contextlib.suppress(DirectoryError):  # where no point is left
            ds = tsdyn.open(path, skip_damaged=True)
            assert how == "one over another"
            assert bool(ds.mse_eval.sel(polarity=1.0).isnull().all())
            assert not bool(ds.mse_eval.sel(polarity=0.0).isnull().any())
    assert {"another run" in str(one.message) for one in told} == {True}
    assert integrity.check(path) != []


def test_two_values_never_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    np.savez("data/a.npz", inputs=draw.standard_normal((60, 10)))
    np.savez("data-a.npz", inputs=5 * draw.standard_normal((60, 10)))
    files = {"data__law": "file", "data__train": 40, "data__eval": 20, "training__epochs": 1}
    paths = ["data/a.npz", "data-a.npz"]
    swept = small(**FEW, **files, data__path=paths[0], sweep={"data.path": paths})
    both = tsdyn.run(swept, "sweep").load()
    for path in paths:
        alone = tsdyn.run(small(**FEW, **files, data__path=path), path.replace("/", "_") + "-alone").load()
        np.testing.assert_array_equal(both.mse_eval.sel(path=path), alone.mse_eval)
    assert integrity.check("sweep") == []
    # as versions before named it: the point is found there, and trained on there
    (old,) = (p for p in Path("sweep").glob("path=data-a.npz-*"))
    before = Path("sweep/path=data-a.npz")
    assert before.exists()  # the other value's own name
    shutil.rmtree(before)
    old.rename(before)
    Path("sweep/index.json").unlink()
    ds = tsdyn.open("sweep")
    assert ds.coverage.values.tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(ds.mse_eval.sel(path=paths[0]), both.mse_eval.sel(path=paths[0]))


def test_values_that_differ_in_case_alone_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = small(**FEW, data__law="file", data__path="a.npz", sweep={"data.path": ["a.npz", "A.npz"]})
    np.savez("a.npz", inputs=np.zeros((400, 10)))
    np.savez("A.npz", inputs=np.zeros((400, 10)))
    with pytest.raises(DirectoryError, match=r"would share .* ignore case"):
        tsdyn.run(experiment, "sweep")
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    "sweep",
    [
        {"student.overrealization": [1, 1.0]},
        {"student.widths": [[10, 5, 6], [10.0, 5, 6]]},
        {"zip": {"teacher.polarity": [0, 0.0], "student.scale": [1, 1.0]}},
        {"points": [{"teacher.polarity": 0}, {"teacher.polarity": -0.0}]},
    ],
)
def test_one_value_spelled_twice_is_refused(sweep):
    with pytest.raises(tsdyn.ExperimentError, match="repeat"):
        small(sweep=sweep)


def test_home_is_where_a_tilde_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    tsdyn.run(small(**FEW, training__epochs=1), "~/run")
    assert (tmp_path / "home" / "run" / "archive.nc").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]
    assert tsdyn.open("~/run").sizes["epoch"] == 2
    with pytest.raises(DirectoryError, match="nobody-of-this-name"):
        tsdyn.open("~nobody-of-this-name/run")


# --- joining --------------------------------------------------------------------------------------------------


def test_joining_opens_one_segment_at_a_time_and_copies_every_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    counts = tmp_path / "counts"  # a file: joining has a process of its own
    fill = joining._fill

    def counting(*given):
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        with counts.open("a", encoding="ascii") as file:
            file.write(f"{sum('/segments/' in str(link.readlink()) for link in links)}\n")
        fill(*given)

    experiment = small(**FEW, training__epochs=12)
    whole = tsdyn.run(experiment, tmp_path / "whole").load()
    monkeypatch.setattr(joining, "_fill", counting)
    for size in (1, 10_000):
        monkeypatch.setattr(joining, "GATHERED_BYTES", size)
        monkeypatch.setattr(joining, "BLOCK_BYTES", size)
        same(tsdyn.run(experiment, tmp_path / str(size)), whole)
    most = [int(line) for line in counts.read_text(encoding="ascii").split()]
    assert max(most) == 0  # between the fillings none is open
    assert len(most) > 20


def test_an_archive_copied_without_its_checksum_is_extended(tmp_path):
    tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run")
    (tmp_path / "run" / "archive.nc.sha256").unlink()
    grown = tsdyn.run(small(**FEW, training__epochs=3), tmp_path / "run")
    same(grown, tsdyn.run(small(**FEW, training__epochs=3), tmp_path / "whole"))
    assert integrity.check(tmp_path / "run") == []


def test_a_partial_sweep_of_before_with_names_that_lack_a_character_is_whole(tmp_path, monkeypatch):
    """Versions before 0.2 omitted the hash; here the second point does not exist yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("a b.npz", "b b.npz"):
        np.savez(name, inputs=np.random.default_rng(0).standard_normal((60, 10)))
    files = {"data__law": "file", "data__train": 40, "data__eval": 20, "training__epochs": 1, "data__path": "a b.npz"}
    experiment = small(**FEW, **files, sweep={"data.path": ["a b.npz", "b b.npz"]})
    whole = tsdyn.run(experiment, "sweep").load()
    listed = json.loads(Path("sweep/sweep.json").read_text(encoding="utf-8"))
    for point, before in zip(listed["points"], ("path=a-b.npz", "path=b-b.npz"), strict=True):
        (Path("sweep") / point["directory"]).rename(Path("sweep") / before)
        point["directory"] = before
    Path("sweep/sweep.json").write_text(json.dumps(listed), encoding="utf-8")
    assert integrity.check("sweep") == []
    same(tsdyn.open("sweep"), whole)
    shutil.rmtree("sweep/path=b-b.npz")
    assert integrity.check("sweep") == []
    same(tsdyn.run(experiment, "sweep"), whole)
    assert sorted(p.name for p in Path("sweep").glob("path=*"))[0] == "path=a-b.npz"
    assert integrity.check("sweep") == []
