"""Files and file systems that are not tsdyn's: read rightly or refused in words, never run, never a crash."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn.archive import hdf5, integrity, lock, netcdf
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError, DirectoryError

FEW = {"training__epochs": 1, "seeds": 2, "record__observables": ["mse", "correlation", "weight"]}
WITHOUT_COMPILER = sys.platform != "linux" or shutil.which("cc") is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "run"
    tsdyn.run(small(**FEW), path)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- numbers stored otherwise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "error"),
    [
        ({"dtype": "i2", "scale_factor": 1e-4, "_FillValue": -32768}, 0.5e-4),
        ({"dtype": "i2", "scale_factor": 1e-4, "add_offset": 0.5, "_FillValue": -32768}, 0.5e-4),
        ({"dtype": "f4", "_FillValue": -9999.0}, 1e-7),
        ({"dtype": ">f8"}, 0.0),
    ],
)
def test_a_packed_copy_reads_as_what_it_means(finished, tmp_path, encoding, error):
    whole = tsdyn.open(finished).load()
    whole.to_netcdf(tmp_path / "packed.nc", encoding={"correlation": encoding})
    packed = tsdyn.open(tmp_path / "packed.nc")
    assert packed.correlation.dtype.kind == "f"
    np.testing.assert_array_equal(packed.correlation.isnull(), whole.correlation.isnull())
    assert float(abs(packed.correlation - whole.correlation).max()) <= error * 1.001
    at = {"seed": 1, "node": [3, 1]}
    xr.testing.assert_equal(packed.correlation.isel(at).load(), packed.correlation.load().isel(at))
    xr.testing.assert_equal(packed.weight.load(), whole.weight)


def test_what_xarray_wrote_reads_as_it_was(tmp_path):
    ds = xr.Dataset(
        {
            "found": (("name", "x"), np.arange(6.0).reshape(2, 3)),
            "counted": ("x", np.array([1, 2, 3])),
            "converged": ("x", np.array([True, False, True])),
            "reason": ("x", np.array(["a", "bc", "δ"], dtype=object)),
        },
        {"name": ["first", "second"], "x": [0.5, 0.5, np.nan], "size": ("x", [1.0, 2.0, 3.0])},
        {"experiment": "none", "created": "today"},
    )
    ds.to_netcdf(tmp_path / "own.nc")
    read = tsdyn.open(tmp_path / "own.nc")
    assert read.found.chunks is not None
    xr.testing.assert_equal(read.load(), ds)  # labels that repeat, or are NaN, choose nothing wrongly
    assert read.attrs == ds.attrs


# --- HDF5 that means harm --------------------------------------------------------------------------------------


def _raw(path, kind):
    """Write a dataset ``weight`` of five numbers with HDF5 directly: stored externally, or with two bytes each."""
    library, hid = hdf5._library(), ctypes.c_int64
    size, text = ctypes.c_size_t, ctypes.c_char_p

    def call(name, result, *given):
        function = getattr(library, name)
        function.restype = result
        return function(*given)

    file = call("H5Fcreate", hid, text(os.fsencode(path)), ctypes.c_uint(2), hid(0), hid(0))
    form = call("H5Tcopy", hid, hid(hid.in_dll(library, "H5T_IEEE_F32LE_g").value))
    if kind == "float16":
        call("H5Tset_fields", ctypes.c_int, hid(form), size(15), size(10), size(5), size(0), size(10))
        call("H5Tset_size", ctypes.c_int, hid(form), size(2))
        call("H5Tset_ebias", ctypes.c_int, hid(form), size(15))
    space = call("H5Screate_simple", hid, ctypes.c_int(1), (ctypes.c_uint64 * 1)(5), None)
    creation = call("H5Pcreate", hid, hid(hid.in_dll(library, "H5P_CLS_DATASET_CREATE_ID_g").value))
    secret = os.fsencode(path.parent / "secret")
    if kind == "external":
        call("H5Pset_external", ctypes.c_int, hid(creation), text(secret), ctypes.c_int64(0), ctypes.c_uint64(20))
    if kind == "virtual":
        call("H5Pset_virtual", ctypes.c_int, hid(creation), hid(space), text(secret), text(b"weight"), hid(space))
    if kind == "link":
        call(
            "H5Lcreate_external",
            ctypes.c_int,
            text(secret),
            text(b"weight"),
            hid(file),
            text(b"weight"),
            hid(0),
            hid(0),
        )
    else:
        made = call("H5Dcreate2", hid, hid(file), text(b"weight"), hid(form), hid(space), hid(0), hid(creation), hid(0))
        assert made > 0
        call("H5Dclose", ctypes.c_int, hid(made))
    call("H5Fclose", ctypes.c_int, hid(file))


@pytest.mark.parametrize("kind", ["external", "virtual", "link", "float16"])
def test_numbers_of_other_files_or_of_two_bytes_are_refused(tmp_path, kind):
    (tmp_path / "secret").write_bytes(b"twenty secret bytes.")
    if kind in ("link", "virtual"):
        _raw(tmp_path / "secret", "plain")
    _raw(tmp_path / "alone.nc", kind)
    said = "floating-point numbers of two bytes" if kind == "float16" else "stored in other files"
    with pytest.raises(DirectoryError, match=rf"alone\.nc: weight .*{said}"):
        tsdyn.open(tmp_path / "alone.nc")
    assert any(said in problem for problem in integrity.check(tmp_path / "alone.nc"))
    _raw(tmp_path / "plain.nc", "plain")
    assert tsdyn.open(tmp_path / "plain.nc").weight.load().shape == (5,)


@pytest.mark.parametrize("how", ["text", "characters", "named"])
def test_what_is_loaded_at_once_is_what_the_file_warrants(tmp_path, how):
    file = tmp_path / "alone.nc"
    with netCDF4.Dataset(file, "w") as nc:
        nc.createDimension("x", 4000)
        nc.createDimension("y", 4000)
        kind = {"text": str, "characters": "S1", "named": "f8"}[how]
        chunks = {"chunksizes": (1000, 1000)} | ({} if how == "text" else {"zlib": True})
        nc.createVariable("large", kind, ("x", "y"), **chunks)
        if how == "named":
            nc.createVariable("weight", "f8", ()).coordinates = "large"
    assert 4000 < file.stat().st_size < 100_000
    with pytest.raises(DirectoryError, match=r"large declares the shape .* more than a file of \d+ bytes warrants"):
        tsdyn.open(file)


def test_a_text_that_many_share_is_bounded(tmp_path):
    """References compress: each of these is to the same megabyte of text."""
    file = tmp_path / "alone.nc"
    with netCDF4.Dataset(file, "w") as nc:
        nc.createDimension("x", 40)
        nc.createVariable("large", str, ("x",))[:] = np.array(["x" * 100_000] * 40, dtype=object)
    tsdyn.open(file)  # as much as it is large
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netcdf, "_room", lambda _: 1000)
        with pytest.raises(DirectoryError, match="warrants"):
            tsdyn.open(file)


def test_nothing_that_lies_beside_an_archive_is_imported(copy, monkeypatch):
    raw = bytearray((copy / "archive.nc").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "archive.nc").write_bytes(raw)
    for name in ("netCDF4.py", "json.py", "numpy.py", "tsdyn.py", "sitecustomize.py"):
        (copy / name).write_text("open('executed', 'w').close()", encoding="ascii")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", os.environ.get("PYTHONPATH", "")]))
    assert any("its checksum differs" in line for line in integrity.check("."))
    integrity.repair(".")
    assert not (copy / "executed").exists()


# --- paths and file systems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a\\b", "C:/x", "c:\\x"])
def test_paths_that_netcdf_takes_for_others_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for use in (tsdyn.open, lambda p: tsdyn.run(small(**FEW), p), integrity.check, integrity.repair):
        with pytest.raises(DirectoryError, match="backslash"):
            use(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]
    (tmp_path / "b\\c").mkdir()
    monkeypatch.chdir(tmp_path / "b\\c")
    with pytest.raises(DirectoryError, match="backslash"):
        tsdyn.open("run")


@pytest.mark.skipif(WITHOUT_COMPILER, reason="needs Linux and a C compiler")
def test_where_flock_fails_runs_are_written_read_and_repaired(copy, tmp_path):
    (tmp_path / "shim.c").write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c"], check=True)
    code = """
import sys, tsdyn
from tests.cases import small
from tsdyn.archive import integrity; from tsdyn.running import runner
runner.COMMIT_SECONDS = 0.0
print(float(tsdyn.open(sys.argv[1]).mse_eval.sum()), integrity.check(sys.argv[1]), integrity.repair(sys.argv[1]))
tsdyn.run(small(training__epochs=3, seeds=2), sys.argv[2]).load()
print(integrity.check(sys.argv[2]))
"""
    env = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    env.pop("HDF5_USE_FILE_LOCKING", None)
    root = Path(__file__).resolve().parent.parent.parent
    words = [sys.executable, "-c", code, copy, tmp_path / "new"]
    told = subprocess.run(words, env=env, cwd=root, capture_output=True, text=True, check=True)
    want = float(tsdyn.open(copy).mse_eval.sum())
    assert told.stdout.splitlines() == [f"{want} [] []", "[]"]


def test_a_file_whose_checksum_agrees_is_never_moved(copy, monkeypatch):
    """If it cannot be read although its checksum agrees, the cause is not in the file."""
    before = sorted(copy.rglob("*"))

    def failing(*_, **__):
        raise DirectoryError("not a readable netCDF file: [Errno 37] No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "opened", failing)
        with pytest.raises(ArchiveError, match=r"its checksum agrees(.|\n)*nothing was moved"):
            integrity.repair(copy)
    assert sorted(copy.rglob("*")) == before
    assert integrity.repair(copy) == []


def _hold_and_leave_a_child(path, told):
    held = RunDirectory(path, small(**FEW))
    held.__enter__()
    if os.fork() == 0:
        told.send(os.getpid())  # by then the child has let go of the lock
    signal.pause()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_writer(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    writer = context.Process(target=_hold_and_leave_a_child, args=(tmp_path / "run", there))
    writer.start()
    child = here.recv()
    try:
        with pytest.raises(ArchiveError, match="another process is writing here"):
            lock.Lock(tmp_path / "run").acquire()
        writer.kill()
        writer.join()
        lock.Lock(tmp_path / "run").acquire().release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_live_lock_of_another_container_of_this_name_is_not_taken(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_world", lambda: "boot pid:[1]")
        patch.setattr(lock, "_started", lambda _: 12345)  # a process that cannot be seen from here
        held = lock.Lock(tmp_path).acquire()
    with pytest.raises(ArchiveError, match="another process is writing here"):
        lock.Lock(tmp_path).acquire()
    held.release()
