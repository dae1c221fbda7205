"""Files that begin from what another one declared say what the netCDF library alone would have written."""

import netCDF4
import numpy as np
import pytest

import tsdyn
from tests.cases import FEW, small
from tsdyn import schema
from tsdyn.archive import exchanged_numbers, file_images, hdf5, made_files, netcdf, whole_files
from tsdyn.archive.exchanged_numbers import Block
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


def test_the_checksum_of_chunks_is_that_of_hdf5(tmp_path):
    """As the library wrote it to a file, and word by word."""

    def once(total):
        return (total & 0xFFFF) + (total >> 16)

    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 8, 719, 720, 721, 1442, 100_000):
        for stored in (rng.integers(0, 256, size, np.uint8), np.zeros(size, np.uint8), np.full(size, 255, np.uint8)):
            first = second = 0
            for at in range(0, size, 2):
                first = once(first + int.from_bytes(stored[at : at + 2].tobytes().ljust(2, b"\0"), "big"))
                second = once(second + first)
            found = exchanged_numbers.fletcher32(stored)
            assert found == second << 16 | first
            with netCDF4.Dataset(tmp_path / "file.nc", "w") as nc:
                nc.createDimension("x", size)
                nc.createVariable("v", "u1", ("x",), fletcher32=True, chunksizes=(size,))[:] = stored
            assert stored.tobytes() + found.to_bytes(4, "little") in (tmp_path / "file.nc").read_bytes()


#: Attributes that differ between two runs of the same.
ALIKE = {"run": "0" * 32, "created": "2000-01-01T00:00:00+00:00", "wall_seconds": 0.5}


def _made(tmp_path, monkeypatch, changes):
    """(bytes, whether in place) of each file that runs of these changes make, one after another, in a new process."""
    monkeypatch.setattr(made_files, "_declared", {})
    monkeypatch.setattr(made_files, "_examples", {})
    made, make = [], made_files._made

    def noting(content, attrs, swept):
        assert attrs.keys() >= ALIKE.keys()
        found = make(content, {**attrs, **ALIKE}, swept)
        made.append((found[0].copy(), found[1]))
        return found

    monkeypatch.setattr(made_files, "_made", noting)
    for each in changes:
        tsdyn.run(small(**FEW).replace(each), tmp_path / f"run-{len(made)}")
    return made


SAME = [{"training.learning_rate": rate} for rate in (0.011, 0.012, 0.013, 0.014, 0.015)]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": "float32"},
        {"training.method": "adam"},
        {"seeds": 3},
        {"record.observables": ["mse", "correlation", "weight"], "record.state_every": 1},
    ],
)
def test_numbers_that_are_exchanged_leave_the_bytes_that_the_library_writes(tmp_path, monkeypatch, more):
    made = _made(tmp_path, monkeypatch, [{**more, **each} for each in SAME])
    assert [in_place for _, in_place in made][-2:] == [True, True]
    monkeypatch.setattr(made_files, "_example", lambda *given: None)
    plain = _made(tmp_path / "plain", monkeypatch, [{**more, **each} for each in SAME])
    assert not any(in_place for _, in_place in plain)
    assert plain[-1][0].tobytes() == made[-1][0].tobytes()


def test_no_example_is_made_of_a_file_that_is_stored_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(exchanged_numbers, "fletcher32", lambda stored: 1)
    made = _made(tmp_path, monkeypatch, SAME)
    assert not any(in_place for _, in_place in made)
    assert not made_files._examples


def test_a_file_that_the_disk_changes_is_not_committed(tmp_path, monkeypatch):
    """Of one whose numbers were exchanged, which the library does not read again."""
    _made(tmp_path, monkeypatch, SAME[:4])
    write = made_files.write_new
    monkeypatch.setattr(
        made_files, "write_new", lambda path, content: write(path, bytes(content)[:-9] + b"?" + bytes(content)[-8:])
    )
    with pytest.raises(whole_files.ArchiveError, match="the file read back differently"):
        tsdyn.run(small(**FEW).replace(SAME[4]), tmp_path / "last")
    assert not (tmp_path / "last" / ARCHIVE).exists()
    assert not made_files._examples


def test_where_more_than_attributes_changed_the_library_fills_the_file(tmp_path, monkeypatch, caplog):
    made = _made(tmp_path, monkeypatch, SAME[:4])
    content = file_images.Image.content

    def losing(image):
        monkeypatch.setattr(file_images.Image, "content", content)
        found = content(image)
        found[1000:9000] = 0
        return found

    monkeypatch.setattr(file_images.Image, "content", losing)
    with caplog.at_level("INFO", logger="tsdyn.archive"):
        tsdyn.run(small(**FEW).replace(SAME[4]), tmp_path / "last")
    assert "changed more of a file in memory than its attributes" in caplog.text
    assert [in_place for _, in_place in made] == [False, False, False, True, False]
    monkeypatch.setattr(made_files, "_declared", {})
    tsdyn.run(small(**FEW).replace(SAME[4]), tmp_path / "alone")
    assert repr(held(tmp_path / "last" / ARCHIVE)) == repr(held(tmp_path / "alone" / ARCHIVE))


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
        made.put([Block("v", (slice(0, 4),), np.arange(4.0))])
        made.say(after, before)
    (tmp_path / "new.nc").write_bytes(made.content().tobytes())
    with netCDF4.Dataset(tmp_path / "new.nc", "a") as nc:
        found = netcdf.attributes(nc)
        assert repr(found) == repr(after)
        assert nc["v"][:].tolist() == [0, 1, 2, 3]
        nc.setncattr("added", 1)


def test_the_bytes_that_are_left_are_those_of_the_open_file_and_outlive_it():
    """Of 1 MB written 64 kB at a time, so that the file moves while it grows."""
    numbers = np.arange(1 << 17, dtype=np.float64)
    with netCDF4.Dataset("larger", "w", diskless=True, persist=False) as nc, hdf5.guarded():
        nc.createDimension("x", len(numbers))
        nc.createVariable("v", "f8", ("x",), fletcher32=True, chunksizes=(1 << 12,))
        nc.sync()
        (file,) = hdf5.handles()
        declared = hdf5.image(file)
    with hdf5.guarded(), file_images.opened(declared) as made:
        made.put([Block("v", (slice(0, len(numbers)),), numbers)])
        (file,) = hdf5.handles()
        open_still = hdf5.image(file)
    left = made.content()
    del made
    assert left.tobytes() == open_still.tobytes()
    assert len(file_images._given) == len(file_images._left) == 0


def test_where_the_system_gives_no_memory_nothing_is_kept(image, monkeypatch):
    class Refusing:
        calls = 0

        def __getattr__(self, name):
            def call(*given):
                Refusing.calls -= name != "free"
                return getattr(system, name)(*given) if name == "free" or Refusing.calls >= 0 else None

            return call

    system = file_images._system()
    monkeypatch.setattr(file_images, "_system", Refusing)
    numbers = np.arange(4.0)
    for calls in range(12):
        Refusing.calls = calls
        try:
            with hdf5.guarded(), file_images.opened(image[0]) as made:
                made.put([Block("v", (slice(0, 4),), numbers)])
                made.say(image[1] | {"a": "x" * 200_000}, image[1])
        except MemoryError:
            assert Refusing.calls < 0
        else:
            assert Refusing.calls >= 0
            break
        assert len(file_images._given) == len(file_images._left) == 0
    assert calls > 2


def test_what_does_not_fit_is_refused(image):
    with hdf5.guarded(), file_images.opened(image[0]) as made:
        with pytest.raises(ValueError, match="do not fit"):
            made.put([Block("v", (slice(0, 3),), np.arange(4.0))])
        with pytest.raises(ValueError, match="type"):
            made.put([Block("v", (slice(0, 4),), np.arange(4, dtype=np.float32))])
        with pytest.raises(MemoryError, match="does not write"):
            made.put([Block("v", (slice(1, 5),), np.arange(4.0))])
        with pytest.raises(MemoryError, match="attributes"):
            made.say({"absent": "y"}, {"absent": "x"})
        with pytest.raises(KeyError, match="absent"):
            made.put([Block("absent", (slice(0, 4),), np.arange(4.0))])
    with hdf5.guarded(), pytest.raises(MemoryError, match="cannot open"), file_images.opened(image[0][:100].copy()):
        pass
    assert file_images.changeable("é") is file_images.changeable("") is file_images.changeable(["a", "b"]) is None
