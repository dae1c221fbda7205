"""Archives as users join, read and move them: by xarray alone, many small files at once, to other formats and back."""

import json
import shutil
import threading

import dask
import netCDF4
import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn import schema, vocabulary
from tsdyn.archive import hdf5, integrity, selecting, small_files, swept_values
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.experiment.sweep_axes import sweep_dimensions

FEW = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "correlation", "weight"]}
PRODUCT = {"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}
#: The call that docs/how-to/without-tsdyn.md shows, without `paths` and `concat_dim`.
CALL = {
    "combine": "nested", "join": "outer", "data_vars": "all", "coords": "different", "compat": "equals",
    "combine_attrs": "override",
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("travelling") / "sweep"
    tsdyn.run(small(sweep=PRODUCT, **FEW), path)
    return path


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A sweep of a list, a truth value and a table."""
    path = tmp_path_factory.mktemp("travelling") / "odd"
    swept = {
        "student.widths": [[10, 4, 6], [10, 6, 6]],
        "student.bias": [True, False],
        "training.learning_rate": [0.02, {"0": 0.02, "1": 0.01}],
    }
    tsdyn.run(small(sweep={"zip": swept}, **{**FEW, "training__epochs": 1}), path)
    return path


def files(path):
    listed = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    return [path / point["directory"] / "archive.nc" for point in listed["points"]]


def equal_numbers(found, ds, names=("mse_eval", "correlation", "weight", "bias", "teacher_weight", "teacher_bias")):
    for name in names:
        mine = ds[name].transpose(*found[name].dims)
        np.testing.assert_array_equal(found[name].values, mine.values, err_msg=name)
        for dim in mine.dims:
            np.testing.assert_array_equal(found[dim], mine[dim])


# --- by xarray alone -----------------------------------------------------------------------------------------


def test_a_points_file_carries_its_swept_values(sweep, odd):
    with xr.open_dataset(files(sweep)[2]) as point:
        assert (int(point.overrealization), float(point.polarity)) == (3, 0.0)
        assert point.overrealization.dims == ()
        assert set(point.overrealization.attrs) >= {"long_name", "units"}
        assert "student.overrealization" in point.overrealization.attrs["long_name"]
    with xr.open_dataset(files(odd)[1]) as point:
        assert json.loads(point["widths"].item()) == [10, 6, 6]
        assert json.loads(point["student.bias"].item()) is False
        assert json.loads(point["learning_rate"].item()) == {"0": 0.02, "1": 0.01}
    assert integrity.check(sweep) == integrity.check(odd) == []


def test_xarrays_call_labels_points_of_one_key(sweep):
    ds = tsdyn.open(sweep).sel(polarity=1.0)
    paths = [file for file in files(sweep) if "polarity=1.0" in str(file)]
    with xr.open_mfdataset(paths, concat_dim="overrealization", **CALL) as found:
        assert list(found.overrealization.values) == [1, 3]
        equal_numbers(found, ds)
        np.testing.assert_array_equal(found.width.transpose("overrealization", "layer"), ds.width)


def test_xarrays_call_labels_points_of_two_keys(sweep):
    a, b, c, d = files(sweep)
    with xr.open_mfdataset([[a, b], [c, d]], concat_dim=["overrealization", "polarity"], **CALL) as found:
        assert list(found.overrealization.values) == [1, 3]
        assert list(found.polarity.values) == [0.0, 1.0]
        equal_numbers(found, tsdyn.open(sweep))


def test_xarrays_call_labels_zipped_points(odd):
    with xr.open_mfdataset(files(odd), concat_dim="point", **CALL) as found:
        assert found["widths"].dims == ("point",)
        equal_numbers(found, tsdyn.open(odd))


def test_a_point_opened_by_tsdyn_has_its_swept_values(sweep, odd):
    one = tsdyn.open(files(sweep)[3].parent)
    assert (int(one.overrealization), float(one.polarity)) == (3, 1.0)
    assert one.overrealization.dims == ()
    schema.validate(one)
    assert int(tsdyn.open(files(sweep)[3]).overrealization) == 3
    assert tsdyn.open(files(odd)[0])["student.bias"].item() == "true"


def test_segments_carry_swept_values_too(sweep, tmp_path):
    whole = shutil.copytree(sweep, tmp_path / "sweep")
    more = tsdyn.run(small(sweep=PRODUCT, **{**FEW, "training__epochs": 3}), whole)
    assert more.sizes["epoch"] == 4
    for file in files(whole):
        with xr.open_dataset(file) as point:
            assert f"polarity={float(point.polarity)}" in str(file)


def test_swept_values_that_are_not_the_experiments_are_noticed(sweep, tmp_path):
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    with netCDF4.Dataset(files(copy)[0], "a") as nc:
        nc["polarity"][...] = 0.5
    problems = integrity.check(copy)
    assert any("teacher.polarity is another in its coordinate" in problem for problem in problems)


def test_a_listing_that_lies_writes_no_coordinate(tmp_path):
    """sweep.json is for other readers: values that are not the experiment's own are not written."""
    experiment = small(**FEW)
    (tmp_path / "point").mkdir()
    for polarity, expected in ((1.0, 1), (0.5, 0)):
        listed = {"points": [{"directory": "point", "values": {"teacher.polarity": polarity}}]}
        (tmp_path / "sweep.json").write_text(json.dumps(listed), encoding="utf-8")
        assert len(swept_values.of_point(tmp_path / "point", experiment)) == expected


def test_recordings_carry_their_config(tmp_path):
    import torch

    x = torch.zeros(4, 3)
    model = torch.nn.Linear(3, 2)
    with tsdyn.Recorder(tmp_path / "rec", model, probe=(x, torch.zeros(4, 2)), seed=1, config={"rate": 0.5}) as rec:
        rec.commit(0)
        rec.commit(1)
    (file,) = (tmp_path / "rec").rglob("archive.nc")
    with xr.open_dataset(file) as point:
        assert float(point["rate"]) == 0.5
    assert list(tsdyn.open(tmp_path / "rec")["rate"].values) == [0.5]


# --- names of dimensions ---------------------------------------------------------------------------------------


def test_a_later_variable_of_the_schema_renames_no_dimension(sweep, monkeypatch):
    before = tsdyn.open(sweep).compute()
    later = {**vocabulary.VARIABLES, "polarity": vocabulary.VARIABLES["mse_eval"]}
    monkeypatch.setattr(vocabulary, "VARIABLES", later)
    assert sweep_dimensions(["teacher.polarity"]) == {"teacher.polarity": "teacher.polarity"}
    xr.testing.assert_identical(tsdyn.open(sweep).compute(), before)
    found = tsdyn.run(small(sweep=PRODUCT, **FEW), sweep)  # finds every point where it is, and trains none
    xr.testing.assert_identical(found.compute(), before)
    listed = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    assert listed["dimensions"] == {"student.overrealization": "overrealization", "teacher.polarity": "polarity"}


def test_experiments_are_found_by_the_names_that_the_dataset_says(sweep, monkeypatch):
    from tsdyn.analysis.members import points

    before = [at for at, _ in points(tsdyn.open(sweep)).values()]
    later = {**vocabulary.VARIABLES, "polarity": vocabulary.VARIABLES["mse_eval"]}
    monkeypatch.setattr(vocabulary, "VARIABLES", later)
    assert [at for at, _ in points(tsdyn.open(sweep)).values()] == before


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"student.overrealization": "epoch", "teacher.polarity": "polarity"},
        {"student.overrealization": "x", "teacher.polarity": "x"},
        {"student.overrealization": ["polarity"], "teacher.polarity": "polarity"},
        [],
    ],
)
def test_names_that_no_version_can_have_given_are_not_taken(sweep, tmp_path, names):
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    listed = json.loads((copy / "sweep.json").read_text(encoding="utf-8"))
    (copy / "sweep.json").write_text(json.dumps({**listed, "dimensions": names}), encoding="utf-8")
    assert set(tsdyn.open(copy).mse_eval.dims[:2]) == {"overrealization", "polarity"}


# --- several sweeps --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Two sweeps that differ in three keys."""
    folder = tmp_path_factory.mktemp("apart")
    few = {**FEW, "seeds": 1, "training__epochs": 1}
    tsdyn.run(small(sweep={"student.overrealization": [1, 2, 3], "teacher.polarity": [0.0, 0.5]}, **few), folder / "a")
    tsdyn.run(small(sweep={"training.learning_rate": [0.01, 0.03, 0.04]}, **few), folder / "b")
    return folder / "a", folder / "b"


def test_a_product_that_would_be_mostly_empty_is_refused(apart):
    with pytest.raises(DirectoryError, match=r"9 points would fill 25 % of 36 places.*along='point'.*DataTree"):
        tsdyn.open(list(apart))


def test_points_of_several_sweeps_along_one_dimension(apart):
    both = tsdyn.open(list(apart), along="point")
    assert both.sizes["point"] == 9
    assert both.mse_eval.dims == ("point", "seed", "epoch")
    assert {"overrealization", "polarity", "learning_rate"} <= set(both.coords)
    assert (both.coverage == 1).all()
    first, second = map(tsdyn.open, apart)
    for over, polarity in ((1, 0.0), (3, 0.5)):
        mine = tsdyn.select(both, overrealization=over, polarity=polarity, learning_rate=0.02)
        np.testing.assert_array_equal(mine.mse_eval, first.mse_eval.sel(overrealization=over, polarity=polarity))
    mine = tsdyn.select(both, learning_rate=0.03)
    np.testing.assert_array_equal(mine.mse_eval, second.mse_eval.sel(learning_rate=0.03))
    schema.problems(both, swept=selecting.swept_dimensions(both))


def test_the_other_way_out_keeps_them_apart(apart):
    tree = xr.DataTree.from_dict({path.name: tsdyn.open(path) for path in apart})
    xr.testing.assert_equal(tree["b"].to_dataset().mse_eval, tsdyn.open(apart[1]).mse_eval)


def test_one_sweep_along_points(sweep):
    flat = tsdyn.open(sweep, along="point")
    assert flat.sizes["point"] == 4
    whole = tsdyn.open(sweep)
    at = flat.isel(point=2)
    same = whole.mse_eval.sel(overrealization=int(at.overrealization), polarity=float(at.polarity))
    np.testing.assert_array_equal(at.mse_eval, same)
    with pytest.raises((DirectoryError, TypeError), match="along='keys2'"):
        tsdyn.open(sweep, along="keys2")


# --- many small files ------------------------------------------------------------------------------------------


@pytest.fixture
def visits(monkeypatch):
    """Files that were opened, one entry per opening, by whatever library."""
    found = []
    of = hdf5.opened  # netcdf.dataset calls it, too
    monkeypatch.setattr(hdf5, "opened", lambda path: found.append(str(path)) or of(path))
    monkeypatch.setattr(small_files, "_kept", {})
    monkeypatch.setattr(small_files, "_asked", {})
    return found


def test_a_series_visits_every_file_once(sweep, visits):
    ds = tsdyn.open(sweep)
    visits.clear()
    ds.mse_eval.compute()
    assert sorted(visits) == sorted(map(str, files(sweep)))


def test_loading_everything_visits_a_file_a_few_times_whatever_the_number_of_variables(sweep, visits, tmp_path):
    ds = tsdyn.open(sweep)
    assert len(ds.data_vars) > 6
    for work in (ds.compute, lambda: ds.to_netcdf(tmp_path / "all.nc"), lambda: tsdyn.open(sweep).compute()):
        visits.clear()
        work()
        own = [path for path in visits if "sweep" in path]
        # at most FEW variables one by one, each once for each of two layers, then all the others at once
        assert max(own.count(path) for path in {*own, ""}) <= 2 * small_files.FEW + 1


def test_what_is_kept_is_bounded_and_gives_the_same_numbers(sweep, visits, monkeypatch):
    whole = tsdyn.open(sweep).compute()
    for most in (0, 30_000):
        monkeypatch.setattr(small_files, "KEPT_BYTES", most)
        monkeypatch.setattr(small_files, "IDLE_SECONDS", 0.0 if most else 5.0)
        small_files._kept.clear()
        xr.testing.assert_identical(tsdyn.open(sweep).compute(), whole)
        assert sum(kept.nbytes for kept in small_files._kept.values()) <= most
    monkeypatch.undo()
    loaded = tsdyn.open(sweep)
    loaded.compute()
    loaded.mse_eval.compute()[...] = 3.0  # what is given away is a copy
    xr.testing.assert_identical(tsdyn.open(sweep).compute(), whole)


def test_threads_read_small_files_at_once(sweep):
    whole = tsdyn.open(sweep).compute()
    wrong = []

    def work():
        with dask.config.set(scheduler="threads"):
            if not tsdyn.open(sweep).compute().identical(whole):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_what_is_kept_is_not_taken_for_a_file_that_replaced_it(sweep, tmp_path):
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    ds = tsdyn.open(copy)
    ds.compute()
    a, *_, d = files(copy)
    shutil.copy(d, a.with_name("new"))
    a.with_name("new").replace(a)
    with pytest.raises(ArchiveError, match=r"checksum differs|open it again"):
        ds.compute()


# --- files and stores that xarray wrote ------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["sweep", "odd", "run"])
def test_what_to_netcdf_and_to_zarr_wrote_opens_as_it_was(of, sweep, odd, tmp_path):
    pytest.importorskip("zarr")
    path = {"sweep": sweep, "odd": odd, "run": files(sweep)[1].parent}[of]
    ds = tsdyn.open(path)
    ds.to_netcdf(tmp_path / "one.nc")
    ds.to_zarr(tmp_path / "two.zarr", zarr_format=2, consolidated=True)
    for name in ("one.nc", "two.zarr"):
        again = tsdyn.open(tmp_path / name)
        assert all(array.chunks for array in again.data_vars.values())
        xr.testing.assert_identical(again.compute(), ds.compute())
    (tmp_path / "two.zarr" / "linked").symlink_to("/etc")
    with pytest.raises(DirectoryError, match="symbolic link"):
        tsdyn.open(tmp_path / "two.zarr")


def test_a_store_that_would_execute_a_pickle_is_refused(sweep, tmp_path):
    pytest.importorskip("zarr")
    tsdyn.open(sweep).to_zarr(tmp_path / "z", zarr_format=2, consolidated=True)
    kept = json.loads((tmp_path / "z" / ".zmetadata").read_text(encoding="utf-8"))
    kept["metadata"]["mse_eval/.zarray"]["filters"] = [{"id": "pickle", "protocol": 5}]
    (tmp_path / "z" / ".zmetadata").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(DirectoryError, match="pickle"):
        tsdyn.open(tmp_path / "z")


def test_layers_of_ones_own_from_zero_keep_their_widths(tmp_path):
    """Two files of a sweep whose labels of layers differ: every width stands at its own label."""
    own = xr.Dataset(
        {"weight": (("seed", "epoch", "layer", "node"), np.ones((1, 2, 3, 4)))},
        coords={"seed": [0], "epoch": [0, 1], "layer": [0, 1, 2], "node": range(4), "width": ("layer", [4, 2, 3])},
    )
    own.to_netcdf(tmp_path / "own.nc")
    ds = tsdyn.open(tmp_path / "own.nc")
    assert [tsdyn.layer(ds, number).sizes["node"] for number in (0, 1, 2)] == [4, 2, 3]
