"""Sweeps as one lazy Dataset: from the index, partial, running, damaged, grown and several at once."""

import pickle
import shutil

import dask
import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import similarity
from tsdyn.analysis.audit import audit
from tsdyn.analysis.members import points

import tsdyn
from tests.cases import small
from tsdyn import schema
from tsdyn.archive import headers, lazy_arrays, selecting
from tsdyn.archive.headers import INDEX, Headers
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.experiment.errors import ExperimentError

FEW = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "correlation", "weight"]}
PRODUCT = {"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "sweep"
    tsdyn.run(small(sweep=PRODUCT, **FEW), path)
    return path


@pytest.fixture
def copy(sweep, tmp_path):
    return shutil.copytree(sweep, tmp_path / "sweep")


def same(one, other):
    xr.testing.assert_equal(one.compute(), other.compute())


def test_every_point_is_what_its_own_archive_says(sweep):
    ds = tsdyn.open(sweep)
    schema.validate(ds, swept=["overrealization", "polarity"])
    assert all(array.chunks for array in ds.data_vars.values())
    assert (ds.coverage == 1).all()
    for wide, polarity in [(1, 0.0), (3, 1.0)]:
        run = tsdyn.open(sweep / f"overrealization={wide},polarity={polarity}")
        mine = ds.sel(overrealization=wide, polarity=polarity)
        for name, array in run.data_vars.items():
            wider = mine[name].isel({dim: slice(0, size) for dim, size in array.sizes.items()})
            np.testing.assert_array_equal(wider, array)
            assert int(mine[name].count()) == int(array.count())  # beyond it is padding only
            assert mine[name].attrs == array.attrs
        np.testing.assert_array_equal(mine.width, run.width)


@pytest.mark.parametrize(
    "at",
    [
        {"seed": 1, "layer": 0},
        {"epoch": slice(1, 3), "polarity": 1},
        {"node": [0, 11], "overrealization": [1, 0]},
        {"epoch": slice(None, None, 2), "teacher_node": -1},
        {"node": slice(None, None, -1)},
    ],
)
def test_slicing_lazily_is_slicing_what_was_loaded(sweep, at):
    ds = tsdyn.open(sweep)[["correlation"]]
    same(ds.isel(at), ds.compute().isel(at))
    same(ds.chunk(dict.fromkeys(ds.dims, 2)).isel(at), ds.compute().isel(at))


def test_of_one_layer_no_padding_is_read(sweep, monkeypatch):
    """dask fuses only the first of two successive slices with the read below it."""
    read = []
    rows = lazy_arrays.Stored._rows
    monkeypatch.setattr(lazy_arrays.Stored, "_rows", lambda *at: read.append(rows(*at).shape) or rows(*at))
    one = tsdyn.layer(tsdyn.open(sweep), 1)
    (one.correlation + 1).compute()
    assert {shape[3:] for shape in read} == {(4, 6), (4, 12)}  # as wide as the layer, or as the file


def test_what_is_stored_can_be_indexed_and_shipped(sweep):
    (source,) = Headers(sweep / "overrealization=1,polarity=0.0").committed(
        ".", lambda: small(**FEW, student__overrealization=1, teacher__polarity=0.0)
    )
    labels = source.header.labels
    inner = ("seed", "epoch")
    stored = lazy_arrays.Stored("mse_eval", ("a",), inner, (2, 2, 3), np.dtype(float), {(1,): [source]}, labels)
    whole = stored[...]
    assert np.isnan(whole[0]).all()
    np.testing.assert_array_equal(whole[1], tsdyn.open(source.path).mse_eval)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stored))[1, :, 1], whole[1, :, 1])
    for rows in ([2, 0], [1], [2, 1, 1], np.array([0, 2])):
        np.testing.assert_array_equal(stored[:, :, rows], whole[:, :, rows])
        np.testing.assert_array_equal(stored[1, ::-1, rows[0]], whole[1, ::-1, rows[0]])


def test_the_index_spares_the_files_and_is_not_trusted(copy, monkeypatch):
    ds = tsdyn.open(copy).compute()
    assert (copy / INDEX).is_file()
    opened = []
    of = headers.Source.of.__func__
    counted = classmethod(lambda cls, path, **more: opened.append(path) or of(cls, path, **more))
    monkeypatch.setattr(headers.Source, "of", counted)
    same(tsdyn.open(copy), ds)
    assert opened == []
    archive_file = copy / "overrealization=1,polarity=0.0" / "archive.nc"
    archive_file.touch()  # a file that changed is read again
    same(tsdyn.open(copy), ds)
    assert opened == [archive_file]
    for content in ("", "[]", '{"version": 2}', (copy / INDEX).read_text(encoding="utf-8")[:-1]):
        (copy / INDEX).write_text(content, encoding="utf-8")
        same(tsdyn.open(copy), ds)
    (copy / INDEX).unlink()
    same(tsdyn.open(copy), ds)  # which leaves it for the next
    opened.clear()
    same(tsdyn.open(copy), ds)
    assert opened == []


def test_a_partial_sweep_says_what_it_has(copy):
    shutil.rmtree(copy / "overrealization=3,polarity=1.0")
    ds = tsdyn.open(copy)
    np.testing.assert_array_equal(ds.coverage, [[1, 1], [1, 0]])
    assert ds.sel(overrealization=3, polarity=1.0).mse_eval.isnull().all()
    assert not ds.sel(overrealization=3, polarity=0.0).mse_eval.isnull().any()
    for name in ("overrealization=1,polarity=0.0", "overrealization=1,polarity=1.0", "overrealization=3,polarity=0.0"):
        shutil.rmtree(copy / name)
    with pytest.raises(DirectoryError, match="no point of this sweep has a committed epoch yet"):
        tsdyn.open(copy)


def test_a_running_point_shows_its_committed_epochs(copy):
    point = copy / "overrealization=1,polarity=1.0"
    whole = tsdyn.open(copy).compute()
    (point / "segments").mkdir()
    shutil.copy(point / "archive.nc", point / "segments" / "epoch-000000-000002.nc")
    (point / "archive.nc").unlink()
    (point / "archive.nc.sha256").unlink()
    text = (point / "experiment.toml").read_text(encoding="utf-8").replace("epochs = 2", "epochs = 5")
    (point / "experiment.toml").write_text(text, encoding="utf-8")
    ds = tsdyn.open(copy)
    assert float(ds.coverage.sel(overrealization=1, polarity=1.0)) == 3 / 6  # epochs 0..2 of 0..5
    same(ds.drop_vars("coverage"), whole.drop_vars("coverage"))


def test_a_corrupt_member_is_named_and_skipped_on_request(copy):
    file = copy / "overrealization=3,polarity=0.0" / "archive.nc"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ArchiveError, match=r"overrealization=3,polarity=0\.0/archive\.nc: was changed or is damaged"):
        tsdyn.open(copy)
    file.with_name("archive.nc.sha256").unlink()
    with pytest.raises(DirectoryError, match=r"overrealization=3,polarity=0\.0/archive\.nc: not a readable netCDF"):
        tsdyn.open(copy)
    with pytest.warns(UserWarning, match=r"overrealization=3,polarity=0\.0.*left NaN"):
        ds = tsdyn.open(copy, skip_damaged=True)
    assert ds.sel(overrealization=3, polarity=0.0).mse_eval.isnull().all()
    assert float(ds.coverage.sel(overrealization=3, polarity=0.0)) == 0
    assert not ds.sel(overrealization=3, polarity=1.0).mse_eval.isnull().any()


def test_a_file_damaged_after_opening_is_named(copy):
    ds, skipping = tsdyn.open(copy), tsdyn.open(copy, skip_damaged=True)
    (copy / "overrealization=3,polarity=0.0" / "archive.nc").write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"polarity=0\.0/archive\.nc: mse_eval cannot be read.*tsdyn validate"):
        ds.mse_eval.compute()
    with pytest.warns(UserWarning, match=r"polarity=0\.0/archive\.nc: mse_eval cannot be read"):
        found = skipping.mse_eval.compute()
    assert int(found.isnull().sum()) == 2 * 3


def test_a_version_that_is_not_known_is_named(copy):
    import netCDF4

    (copy / "overrealization=1,polarity=0.0" / "archive.nc.sha256").unlink()
    with netCDF4.Dataset(copy / "overrealization=1,polarity=0.0" / "archive.nc", "a") as nc:
        nc.setncattr("schema_version", np.int64(1))  # an older one is migrated, beside the present one
    same(tsdyn.open(copy).mse_eval.isnull().any(), xr.DataArray(False))
    with netCDF4.Dataset(copy / "overrealization=1,polarity=0.0" / "archive.nc", "a") as nc:
        nc.setncattr("schema_version", np.int64(99))
    with pytest.raises(DirectoryError, match=r"polarity=0\.0/archive\.nc: schema version 99 is not one of"):
        tsdyn.open(copy)


def test_a_directory_that_is_no_sweep(tmp_path):
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DirectoryError, match="holds no run or sweep"):
        tsdyn.open(tmp_path)
    (tmp_path / "experiment.toml").write_text("sweep = 3", encoding="utf-8")
    with pytest.raises(DirectoryError, match="holds no run or sweep"):
        tsdyn.open(tmp_path)
    with pytest.raises(DirectoryError, match="an empty list"):
        tsdyn.open([])


# --- zipped keys and listed points -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    together = {"teacher.polarity": [0.0, 1.0, 1.0], "training.learning_rate": [0.01, 0.01, 0.02]}
    path = tmp_path_factory.mktemp("grid") / "zipped"
    return tsdyn.run(small(sweep={"student.overrealization": [1, 2], "zip": together}, **FEW), path)


def test_keys_that_go_together_are_coordinates_along_point(zipped):
    assert zipped.mse_eval.dims == ("overrealization", "point", "seed", "epoch")
    assert zipped.polarity.dims == zipped.learning_rate.dims == ("point",)
    schema.validate(zipped, swept=selecting.swept_dimensions(zipped))
    one = tsdyn.select(zipped, polarity=1.0, learning_rate=0.02, overrealization=2)
    assert one.mse_eval.dims == ("seed", "epoch")
    np.testing.assert_array_equal(one.mse_eval, zipped.mse_eval.sel(overrealization=2, point=2))
    assert tsdyn.select(zipped, polarity=1.0).sizes["point"] == 2
    assert tsdyn.select(zipped, overrealization=[2]).sizes["overrealization"] == 1
    with pytest.raises(KeyError, match=r"polarity has no \[3.0\]; it has \[0.0, 1.0\]"):
        tsdyn.select(zipped, polarity=3.0)
    with pytest.raises(KeyError, match="no swept key 'width'; there are overrealization, point, polarity"):
        tsdyn.select(zipped, width=3)
    found = points(zipped.sel(overrealization=[2]).isel(point=[0, 2]))
    assert [at for at, _ in found.values()] == [{"overrealization": 2, "point": 0}, {"overrealization": 2, "point": 2}]


def test_listed_points(tmp_path):
    listed = [
        {"teacher.polarity": 0.0, "student.overrealization": 1.0},
        {"teacher.polarity": 1.0, "student.overrealization": 2.0},
    ]
    experiment = small(sweep={"points": listed}, **FEW)
    assert tsdyn.Experiment.from_toml_text(experiment.to_toml()) == experiment
    ds = tsdyn.run(experiment, tmp_path / "listed")
    assert ds.mse_eval.dims == ("point", "seed", "epoch")
    assert ds.attrs["digest"] == experiment.digest
    assert int(tsdyn.select(ds, polarity=1.0).width.sel(layer=1)) == 8


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"zip": {"teacher.polarity": [0.0], "student.scale": [0.1, 0.2]}}, "there must be equally many"),
        ({"points": [{"teacher.polarity": 0.0}, {"student.scale": 0.1}]}, "all with the same keys"),
        ({"points": [{"teacher.polarity": 0.0}] * 2}, "values of 'teacher.polarity' repeat"),
        ({"points": [{"teacher.polarity": 0.0}], "zip": {"student.scale": [0.1]}}, "write one of them"),
        ({"teacher.polarity": [0.0], "zip": {"teacher.polarity": [1.0]}}, "are listed twice"),
        ({"zip": {"teacher.polarty": [1.0]}}, "did you mean 'teacher.polarity'"),
        ({"teacher.polarity": 1.0}, "must be a list of at least one value"),
        ({"teacher.polarity": []}, "must be a list of at least one value"),
    ],
)
def test_wrong_sweeps(sweep, message):
    with pytest.raises(ExperimentError, match=message):
        small(sweep=sweep)


# --- growing and merging ---------------------------------------------------------------------------------------


def test_added_values_compute_only_what_is_new(copy):
    kept = {file: file.stat().st_mtime_ns for file in copy.glob("*/archive.nc")}
    before = tsdyn.open(copy).compute()
    more = small(sweep={**PRODUCT, "teacher.polarity": [0.0, 0.5, 1.0]}, **FEW)
    ds = tsdyn.run(more, copy)
    assert list(ds.polarity.values) == [0.0, 0.5, 1.0]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    xr.testing.assert_equal(ds.sel(polarity=[0.0, 1.0]).compute(), before)
    with pytest.raises(DirectoryError, match="holds another experiment"):
        tsdyn.run(small(sweep={**PRODUCT, "teacher.polarity": [0.0, 2.0]}, **FEW), copy)


def test_several_sweeps_merge_along_what_differs(sweep, tmp_path):
    slower = small(sweep=PRODUCT, training__learning_rate=0.005, **FEW).replace({"name": "slower"})
    tsdyn.run(slower, tmp_path / "slower")
    both = tsdyn.open([sweep, tmp_path / "slower"])
    assert set(both.mse_eval.dims) == {"learning_rate", "overrealization", "polarity", "seed", "epoch"}
    for rate, path in ((0.02, sweep), (0.005, tmp_path / "slower")):
        mine = both.sel(learning_rate=rate)
        np.testing.assert_array_equal(mine.mse_eval, tsdyn.open(path).mse_eval)
    with pytest.raises(DirectoryError, match="hold the same seeds of one point"):
        tsdyn.open([sweep, sweep])


def test_seeds_of_several_runs_join(tmp_path):
    for label, seeds in (("first", [0, 1]), ("second", [2, 5])):
        tsdyn.run(small(**{**FEW, "seeds": seeds}), tmp_path / label)
    both = tsdyn.open([tmp_path / "first", tmp_path / "second"])
    assert list(both.seed.values) == [0, 1, 2, 5]
    np.testing.assert_array_equal(both.mse_eval.sel(seed=[2, 5]), tsdyn.open(tmp_path / "second").mse_eval)
    assert both.mse_eval.notnull().all()


def test_chunks_follow_files(sweep):
    ds = tsdyn.open(sweep)
    assert ds.weight.chunksizes["layer"] == (1, 1)
    assert ds.weight.chunksizes["node"] == (12,)
    assert ds.mse_eval.chunksizes["polarity"] == (2,)  # small ones are gathered, along the last swept key
    assert ds.mse_eval.chunksizes["overrealization"] == (1, 1)
    assert dask.is_dask_collection(ds)


def test_what_needs_the_experiment_says_so_of_several_archives(tmp_path):
    for polarity in (0.0, 1.0):
        tsdyn.run(small(seeds=1, training__epochs=1, teacher__polarity=polarity), tmp_path / str(polarity))
    both = tsdyn.open([tmp_path / "0.0", tmp_path / "1.0"])
    for ask in (audit, similarity.student_teacher):
        with pytest.raises(ValueError, match="several archives opened together have several experiments; ask each"):
            ask(both if ask is audit else both.isel(epoch=-1))
    assert selecting.experiment_of(tsdyn.open(tmp_path / "0.0")).teacher.polarity == 0.0
