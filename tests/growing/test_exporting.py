"""Exports, read by other libraries and compared value by value; killed and given again."""

import json
import os
import signal

import dask
import numpy as np
import pytest
import xarray as xr
from pandas.testing import assert_frame_equal

import tsdyn
from tests.archive.states.children import child
from tests.cases import small
from tsdyn.archive import lazy_arrays, parquet_stores
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.growing import exporting, parquet_tables

pytest.importorskip("zarr")
pytest.importorskip("pyarrow")

FEW = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "correlation", "weight"]}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    product = {"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}
    tsdyn.run(small(sweep=product, **FEW), folder / "sweep")
    words = {"student.widths": [[10, 4, 6], [10, 6, 6]], "student.bias": [True, False]}
    tsdyn.run(small(sweep={"zip": words}, **FEW), folder / "words")
    return folder


@pytest.fixture(params=["sweep", "words", "run"])
def source(request, archives):
    if request.param == "run":
        return archives / "sweep" / "overrealization=3,polarity=1.0"
    return archives / request.param


@pytest.mark.parametrize("how", [("zarr", 2), ("zarr", 3), ("netcdf", 2)])
def test_an_export_opens_as_the_archive_by_tsdyn_and_by_xarray_alone(source, how, tmp_path):
    ds = tsdyn.open(source).compute()
    to, number = how
    path = exporting.export(source, to, tmp_path / "out.nc", zarr_format=number)
    xr.testing.assert_identical(tsdyn.open(path).compute(), ds)
    if to == "zarr":
        own = xr.open_zarr(path, consolidated=number == 2, decode_timedelta=False)
        assert (path / ".zmetadata").exists() == (number == 2)
        assert not any(array.dtype.kind in "OUS" for array in own.variables.values()) or number == 2
    else:
        own = xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False)
    with own:
        for name in ds.data_vars:
            np.testing.assert_array_equal(own[name].values, ds[name].values)
            assert own[name].attrs == ds[name].attrs
        if number == 2:
            xr.testing.assert_equal(own.load(), ds)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.nc"]


def test_tables_hold_every_number_once_without_padding(source, tmp_path):
    import pyarrow.parquet as pq

    ds = tsdyn.open(source).compute()
    path = exporting.export(source, "parquet", tmp_path / "tables")
    described = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    assert described["attributes"]["experiment"] == ds.attrs["experiment"]
    found = set()
    for name, variables in described["tables"].items():
        table = pq.read_table(path / f"{name}.parquet")
        rows = table.to_pydict()
        dims = [str(dim) for dim in ds[variables[0]].dims]
        assert len(set(zip(*(rows[dim] for dim in dims), strict=True))) == table.num_rows or not dims
        for variable in variables:
            found.add(variable)
            place = tuple(xr.DataArray([ds.get_index(d).get_loc(v) for v in rows[d]], dims="row") for d in dims)
            mine = ds[variable].isel(dict(zip(dims, place, strict=True))).values
            np.testing.assert_array_equal(np.array(rows[variable]), np.atleast_1d(mine))
            # what is left out is padding: there is no number in it
            if ds[variable].dtype.kind == "f":
                assert int(ds[variable].count()) == np.count_nonzero(~np.isnan(np.array(rows[variable], float)))
    assert found == {str(n) for n in ds.variables if n not in ds.dims}
    weights = next(name for name, of in described["tables"].items() if "weight" in of)
    numbers = pq.read_table(path / f"{weights}.parquet").num_rows
    layers = range(1, ds.sizes["layer"] + 1)
    per_member = sum(ds.width.sel(layer=i) * ds.input_width.sel(layer=i) for i in layers)
    assert numbers == int(per_member.sum()) * ds.sizes["seed"] * ds.sizes["epoch"]
    field = pq.read_schema(path / f"{weights}.parquet").field("weight")
    assert field.metadata[b"units"] == b"1"


def test_tables_written_in_small_blocks_are_the_same(archives, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    whole = exporting.export(archives / "words", "parquet", tmp_path / "whole")
    monkeypatch.setattr(parquet_tables, "ROWS", 40)
    small_blocks = exporting.export(archives / "words", "parquet", tmp_path / "small")
    for file in whole.glob("*.parquet"):
        one, other = (pq.read_table(path / file.name) for path in (whole, small_blocks))
        keys = [(name, "ascending") for name in one.column_names]
        assert_frame_equal(*(table.sort_by(keys).to_pandas() for table in (one, other)))
    # swept keys that vary together are columns, too
    assert {"widths", "student.bias"} <= set(pq.read_schema(next(whole.glob("point-seed-epoch.parquet"))).names)


@pytest.mark.parametrize("at", [3, 9])
@pytest.mark.parametrize("to", ["zarr", "netcdf", "parquet"])
def test_killed_and_given_again_it_goes_on(archives, to, at, tmp_path, monkeypatch):
    """Ended by SIGKILL after some pieces, it keeps these, reads none of their chunks again, and writes the others."""
    source, out = archives / "sweep", tmp_path / "out.nc"
    asked = []

    def work():
        def told(done, pieces):
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(lazy_arrays, "RUNS_PER_CHUNK", 1)  # point by point
        with dask.config.set(scheduler="synchronous"):  # threads are not there after a fork
            exporting.export(source, to, out, told=told)

    assert child(work, tmp_path / "words").how == "killed"
    assert not out.exists()
    partial = tmp_path / ".out.nc.partial"
    done = (partial / "progress.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(done) == at
    assert any("#" in piece for piece in done) or to == "zarr"
    with (partial / "progress.txt").open("a") as file:
        file.write("weight#0.0")  # a line that was cut short is none
    monkeypatch.setattr(lazy_arrays, "RUNS_PER_CHUNK", 1)
    compute = exporting._computed
    monkeypatch.setattr(exporting, "_computed", lambda ds, block: (asked.append(block.name), compute(ds, block))[1])
    counts = []
    path = exporting.export(source, to, out, told=lambda *at: counts.append(at))
    assert counts[-1][0] == counts[-1][1] == len(counts)
    assert not set(asked) & set(done)
    assert not partial.exists()
    xr.testing.assert_identical(tsdyn.open(path).compute(), tsdyn.open(source).compute())


@pytest.mark.parametrize("rows", [parquet_stores.ROWS, 1])
def test_tables_open_as_the_archive_that_they_are_of(source, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_stores, "ROWS", rows)  # read at once, or label by label
    ds = tsdyn.open(source).compute()
    found = tsdyn.open(exporting.export(source, "parquet", tmp_path / "tables"))
    assert all(array.chunks is not None for array in found.data_vars.values())
    assert found.weight.data.numblocks[0] == (1 if rows > 1 else found.weight.shape[0])
    xr.testing.assert_identical(found.compute(), ds)
    layer = tsdyn.layer(found, 1)
    xr.testing.assert_identical(layer.compute(), tsdyn.layer(ds, 1))


def test_tables_that_are_not_what_export_writes_are_refused(archives, tmp_path):
    path = exporting.export(archives / "words", "parquet", tmp_path / "tables")
    described = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    for change, said in (
        ({"variables": None}, "cannot be read"),
        ({"tables": {"../elsewhere": ["weight"]}}, "is no name of a table"),
        ({"tables": described["tables"] | {"nowhere": ["weight"]}}, "cannot be read"),
        ({"dimensions": described["dimensions"] | {"layer": {"size": 1, "labels": None, "attributes": {}}}}, "labels"),
    ):
        (path / "dataset.json").write_text(json.dumps(described | change), encoding="utf-8")
        with pytest.raises(DirectoryError, match=said):
            tsdyn.open(path).load()
    del described["variables"]
    (path / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(DirectoryError, match="an earlier version exported these tables"):
        tsdyn.open(path)


def test_what_another_archive_left_is_not_gone_on_from(archives, tmp_path):
    partial = exporting._Partial(tmp_path / "out", "another")
    partial.add("weight")
    path = exporting.export(archives / "sweep", "zarr", tmp_path / "out")
    xr.testing.assert_identical(tsdyn.open(path).compute(), tsdyn.open(archives / "sweep").compute())


def test_wrong_requests(archives, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(DirectoryError, match="is there already; nothing was overwritten"):
        exporting.export(archives / "sweep", "zarr", tmp_path / "there")
    with pytest.raises(DirectoryError, match="zarr_format=4; it is 2 or 3"):
        exporting.export(archives / "sweep", "zarr", tmp_path / "z", zarr_format=4)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DirectoryError, match=r"pip install 'tsdyn\[parquet\]'"):
        exporting.export(archives / "sweep", "parquet", tmp_path / "p")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.undo()
    with pytest.raises(DirectoryError, match="symbolic link"):
        exporting.export(archives / "sweep", "zarr", tmp_path / "link")


def test_the_command(archives, tmp_path):
    from typer.testing import CliRunner

    from tsdyn.cli import app

    out = tmp_path / "by-command.zarr"
    ended = CliRunner().invoke(app, ["export", str(archives / "words"), "--to", "zarr", "-o", str(out)])
    assert ended.exit_code == 0, ended.output
    assert ended.output.strip() == str(out)
    assert tsdyn.open(out).sizes["point"] == 2
