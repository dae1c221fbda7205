"""Files that begin from what another one declared say what the netCDF library alone would have written."""

import netCDF4
import numpy as np
import pytest

import tsdyn
from tests.cases import FEW, small
from tsdyn import schema
from tsdyn.archive import file_images, hdf5, made_files, netcdf
from tsdyn.archive.run_directory import ARCHIVE


def held(file):
    """All that netCDF4 reads of a file but what differs between two runs of the same."""
    with netCDF4.Dataset(file) as nc:
        nc.set_auto_maskandscale(False)
        groups = {"": nc, **nc.groups}
        variables = {f"{g}/{n}": v for g, of in groups.items() for n, v in of.variables.items()}
        told = netcdf.attributes(nc)
        return (
            {n: (v.dimensions, v.dtype, v.chunking(), v.filters(), netcdf.attributes(v)) for n, v in variables.items()},
            {n: np.asarray(v[...]).tobytes() if v.dtype is not str else v[...] for n, v in variables.items()},
            list(told),
            {name: value for name, value in told.items() if name not in ("run", "created", "wall_seconds", "history")},
        )


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("training.learning_rate", [0.02, 0.012345678, 1e30]),  # text of other lengths; one in which all members die
        ("student.activation", ["relu", "tanh"]),
        ("name", ["short", "a-much-longer-name"]),
    ],
)
def test_a_file_from_a_template_holds_what_one_of_its_own_does(tmp_path, monkeypatch, key, values):
    experiments = [small(**FEW).replace({key: value}) for value in values]
    for i, experiment in enumerate(experiments):
        tsdyn.run(experiment, tmp_path / f"after-others-{i}")
    monkeypatch.setattr(made_files, "_KEPT_BYTES", -1)
    for i, experiment in enumerate(experiments):
        made_files._declared.clear()
        tsdyn.run(experiment, tmp_path / f"alone-{i}")
        one, other = (held(tmp_path / f"{how}-{i}" / ARCHIVE) for how in ("after-others", "alone"))
        assert repr(one) == repr(other)


def test_points_of_one_shape_are_declared_once(tmp_path, monkeypatch):
    made_files._declared.clear()
    seen, declare = [], made_files._declare
    monkeypatch.setattr(made_files, "_declare", lambda *given: seen.append(1) or declare(*given))
    rates = [0.01, 0.0123, 0.5]
    ds = tsdyn.run(small(**FEW).replace({"sweep": {"training.learning_rate": rates}}), tmp_path / "sweep")
    assert len(seen) == 1
    alone = tsdyn.run(small(**FEW).replace({"training.learning_rate": 0.0123}), tmp_path / "run")
    np.testing.assert_array_equal(ds["weight"].isel(learning_rate=1).values, alone["weight"].values)


def test_no_more_files_are_kept_than_said(tmp_path):
    made_files._declared.clear()
    for seeds in range(1, made_files._KEPT + 3):
        tsdyn.run(small(**FEW | {"seeds": seeds, "training__epochs": 1}), tmp_path / str(seeds))
    assert len(made_files._declared) == made_files._KEPT


def test_a_variable_that_is_declared_anew_is_written_as_it_is_now(tmp_path, monkeypatch):
    """In one process, with the same name: dims and words are those of the second declaration."""
    rows = {("seed", "epoch"): "s", ("seed", "epoch", "layer", "node"): "m"}
    for dims, units in rows.items():
        monkeypatch.setattr(schema, "DECLARED", {})
        declared = tsdyn.declare("planted", dims, units=units, long_name=f"in {units}", source="tests", own=True)
        measured = {2: lambda m: m.on_eval.mse, 4: lambda m: [w.norm(dim=1) for w in m.network.weights[:-1]]}
        observed = tsdyn.Observed(declared, measured[len(dims)])
        ds = tsdyn.run(small(**FEW), tmp_path / units, observables=[observed])
        assert ds.planted.dims == dims
        assert (ds.planted.units, ds.planted.long_name) == (units, f"in {units}")


@pytest.fixture
def image(tmp_path):
    with netCDF4.Dataset(tmp_path / "file.nc", "w") as nc:
        nc.createDimension("x", 4)
        nc.createVariable("v", "f8", ("x",), fletcher32=True)
        for name, value in {"a": "one", "b": 3, "c": "x" * 100, **{f"d{i}": i * 0.5 for i in range(10)}}.items():
            nc.setncattr(name, value)
        before = netcdf.attributes(nc)
    return np.frombuffer((tmp_path / "file.nc").read_bytes(), np.uint8), before


@pytest.mark.parametrize(("text", "number"), [("two", 4), ("t", 3), ("x" * 70_000, -(2**62))])
def test_attributes_keep_their_order_and_kinds(tmp_path, image, text, number):
    content, before = image
    after = before | {"a": text, "b": np.int64(number), "d3": np.float64(np.nan)}
    with hdf5.guarded(), file_images.opened(content) as made:
        made.put("v", [((slice(0, 4),), np.arange(4.0))])
        made.say(after, before)
        (tmp_path / "new.nc").write_bytes(made.content().tobytes())
    with netCDF4.Dataset(tmp_path / "new.nc", "a") as nc:
        found = netcdf.attributes(nc)
        assert repr(found) == repr(after)
        assert nc["v"][:].tolist() == [0, 1, 2, 3]
        nc.setncattr("added", 1)


def test_what_does_not_fit_is_refused(image):
    with hdf5.guarded(), file_images.opened(image[0]) as made:
        with pytest.raises(ValueError, match="do not fit"):
            made.put("v", [((slice(0, 3),), np.arange(4.0))])
        with pytest.raises(ValueError, match="type"):
            made.put("v", [((slice(0, 4),), np.arange(4, dtype=np.float32))])
        with pytest.raises(MemoryError, match="does not write"):
            made.put("v", [((slice(1, 5),), np.arange(4.0))])
        with pytest.raises(MemoryError, match="attributes"):
            made.say({"absent": "y"}, {"absent": "x"})
        with pytest.raises(KeyError, match="absent"):
            made.put("absent", [((slice(0, 4),), np.arange(4.0))])
    with hdf5.guarded(), pytest.raises(MemoryError, match="cannot open"), file_images.opened(image[0][:100].copy()):
        pass
    assert file_images.changeable("é") is file_images.changeable("") is file_images.changeable(["a", "b"]) is None
