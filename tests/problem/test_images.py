"""Readers against small files of the true formats, written here byte by byte."""

import gzip
import struct
import tracemalloc

import netCDF4
import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import cifar10, small
from tsdyn import ExperimentError
from tsdyn.problem import images
from tsdyn.problem.images import DataError
from tsdyn.problem.inputs import evaluation_inputs, fresh_batches, labels, training_inputs

RNG = np.random.default_rng(0)


def idx(array):
    """An IDX file of unsigned bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder, train=12, test=7, *, zipped=False):
    made = {}
    for part, count in (("train", train), ("t10k", test)):
        pixels = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        made[part] = pixels, labels
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            file = folder / (name + (".gz" if zipped else ""))
            file.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return made


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    made = mnist(tmp_path, zipped=zipped)
    for train, part in ((True, "train"), (False, "t10k")):
        pixels, labels = made[part]
        found = images.read_mnist(tmp_path, train=train)
        np.testing.assert_array_equal(found.labels, labels)
        x = found.inputs(np.arange(len(labels)), "float64")
        np.testing.assert_allclose(x, (pixels.reshape(-1, 784) / 255 - 0.5) / 0.5, rtol=0, atol=1e-15)


def test_cifar10(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    made = cifar10(inner)
    for folder in (tmp_path, inner):
        found = images.read_cifar10(folder, train=True)
        np.testing.assert_array_equal(
            found.labels, np.concatenate([made[f"data_batch_{i}.bin"][1] for i in range(1, 6)])
        )
    pixels = made["data_batch_2.bin"][0][1]
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(found.inputs(np.array([4]), "float64")[0], expected.ravel(), rtol=1e-14, atol=1e-14)
    assert len(images.read_cifar10(tmp_path, train=False)) == 3


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    found, theirs = images.digits(), datasets.load_digits()
    np.testing.assert_allclose(found.inputs(np.arange(1797), "float64"), theirs.data / 8 - 1, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(found.labels, theirs.target)


def test_arrays(tmp_path):
    inputs, labels = RNG.standard_normal((6, 4)), np.arange(6) % 3
    np.save(tmp_path / "a.npy", inputs)
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
    both = {"inputs": (("sample", "input"), inputs), "labels": ("sample", labels)}
    xr.Dataset(both).to_netcdf(tmp_path / "a.nc")
    for name in ("a.npy", "a.npz", "a.nc"):
        found = images.read_arrays(tmp_path / name)
        np.testing.assert_array_equal(found.inputs(np.arange(6), "float64"), inputs)
        assert (found.labels is None) == (name == "a.npy")
    np.testing.assert_array_equal(found.labels, labels)


def spoil(folder, name, change):
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"9423 bytes, its header announces 9424: it was cut off"),
        ("train-images-idx3-ubyte", lambda b: b[:6], r"6 bytes, its header announces"),
        ("train-images-idx3-ubyte", lambda b: b"", "starts with nothing"),
        ("train-images-idx3-ubyte", lambda b: b"\0\0\x0d" + b[3:], "starts with 00000d03, an IDX file of bytes"),
        ("train-images-idx3-ubyte", lambda b: b"PK\3\4" + b[4:], "starts with 504b0304"),
        ("train-labels-idx1-ubyte", lambda b: b[:10] + b"\x0a" + b[11:], r"label of sample 2 is 10; labels are 0\.\.9"),
        ("train-labels-idx1-ubyte", lambda b: struct.pack(">BBBBI", 0, 0, 8, 1, 11) + b[8:-1], "not of one set"),
        ("train-labels-idx1-ubyte", lambda b: idx(np.zeros((3, 4), np.uint8)), "not of one set"),
    ],
)  # fmt: skip
def test_damaged_mnist_is_refused(tmp_path, name, change, message):
    mnist(tmp_path)
    spoil(tmp_path, name, change)
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        images.read_mnist(tmp_path, train=True)


@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_cut_gzip_file_is_refused(tmp_path, keep):
    mnist(tmp_path, zipped=True)
    spoil(tmp_path, "train-images-idx3-ubyte.gz", lambda b: b[:keep])
    with pytest.raises(DataError, match=r"ubyte.gz: (cannot be read|starts with nothing)"):
        images.read_mnist(tmp_path, train=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "9218 bytes are not a whole number of records of 3073"),
        (lambda b: b"", "0 bytes are not"),
        (lambda b: b[:3073] + b"\x0c" + b[3074:], r"label of sample 1 is 12; labels are 0\.\.9"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path, change, message):
    cifar10(tmp_path)
    spoil(tmp_path, "data_batch_3.bin", change)
    with pytest.raises(DataError, match=rf"data_batch_3.bin: {message}"):
        images.read_cifar10(tmp_path, train=True)


def test_missing_data_say_where_to_get_them_and_where_to_put_them(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no train-images-idx3-ubyte .*get .* from https.*data.path"):
        images.read_mnist(tmp_path, train=True)
    with pytest.raises(DataError, match=r"no data_batch_1.bin, .*get cifar-10-binary.tar.gz.* from https.*data.path"):
        images.read_cifar10(tmp_path, train=True)
    with pytest.raises(DataError, match=r"no such file; give a .npz, .nc or .npy file"):
        images.read_arrays(tmp_path / "absent.npz")


def test_the_pickled_cifar10_is_refused_with_the_way_out(tmp_path):
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        folder.mkdir(exist_ok=True)
        (folder / "data_batch_1").write_bytes(b"\x80\x02}")
        with pytest.raises(DataError, match=r"python version of CIFAR-10, which is pickles.*cifar-10-binary.tar.gz"):
            images.read_cifar10(tmp_path, train=True)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2))}, "holds x; the samples must be called inputs"),
        ({"inputs": np.ones(3)}, r"shape \(3,\)"),
        ({"inputs": np.ones((0, 2))}, r"shape \(0, 2\)"),
        ({"inputs": np.array([["a"]])}, "must be numbers"),
        ({"inputs": np.array([[1.0, np.nan]])}, r"inputs\[0, 1\] is nan"),
        ({"inputs": np.ones((3, 2)), "labels": np.arange(2)}, "must be 3 integers"),
        ({"inputs": np.ones((3, 2)), "labels": np.ones(3)}, "must be 3 integers"),
        ({"inputs": np.ones((3, 2)), "labels": np.array([0, 1, -1])}, "label of sample 2 is -1; labels start at 0"),
        ({"inputs": np.array([[None]], dtype=object)}, "cannot be read as .npz"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        images.read_arrays(tmp_path / "a.npz")


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    (tmp_path / "a.csv").write_text("1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot be read as .npz"):
        images.read_arrays(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"it must end in .npz, .nc or .npy"):
        images.read_arrays(tmp_path / "a.csv")


# --- as a law of an experiment -------------------------------------------------------------------------------


def from_file(path, **changes):
    named = {
        "teacher__widths": [4, 3, 3], "data__law": "file", "data__path": str(path), "data__train": 20,
        "data__eval": 10, "training__batch": 5,
    }  # fmt: skip
    return small(**(named | changes))


@pytest.fixture
def table(tmp_path):
    inputs = np.arange(120.0).reshape(30, 4) % 7
    inputs[:, 0] = np.arange(30)  # names the sample
    np.savez(tmp_path / "table.npz", inputs=inputs, labels=np.arange(30) % 3)
    return tmp_path / "table.npz"


def test_members_draw_disjoint_samples_from_one_file(table):
    experiment = from_file(table)
    drawn = []
    for seed in (0, 1):
        train, evaluation = training_inputs(experiment, seed), evaluation_inputs(experiment, seed)
        assert len({*train[:, 0], *evaluation[:, 0]}) == 30
        for part, x in (("train", train), ("eval", evaluation)):
            np.testing.assert_array_equal(labels(experiment, seed, part), x[:, 0] % 3)
        drawn.append(train)
    assert not np.array_equal(*drawn)
    np.testing.assert_array_equal(training_inputs(experiment, 0), drawn[0])


def test_a_run_on_a_file(table, tmp_path):
    ds = tsdyn.run(from_file(table, seeds=2), tmp_path / "run")
    assert ds.mse_eval.isel(epoch=-1).notnull().all()


def test_requests_that_the_data_cannot_meet(table, tmp_path):
    with pytest.raises(DataError, match=r"data.train \+ data.eval = 35: file has 30 samples"):
        training_inputs(from_file(table, data__eval=15), 0)
    with pytest.raises(DataError, match=r"teacher.widths: takes 5 inputs, samples of .*table.npz have 4"):
        training_inputs(from_file(table, teacher__widths=[5, 3, 3]), 0)
    with pytest.raises(DataError, match="2 outputs, but there is a label 2"):
        labels(from_file(table, teacher__widths=[4, 3, 2]), 0, "train")
    np.save(tmp_path / "bare.npy", np.ones((40, 4)))
    with pytest.raises(DataError, match="these data have no labels"):
        labels(from_file(tmp_path / "bare.npy"), 0, "train")
    with pytest.raises(DataError, match=r"data.eval = 31: file has 30 samples"):
        training_inputs(from_file(table, data__eval_path=str(table), data__eval=31), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__law": "mnist"}, "name the folder that holds it as data.path"),
        ({"data__law": "file"}, r"name its file \(.npz, .nc or .npy\) as data.path"),
        ({"data__path": "x"}, "'gaussian' reads no file"),
        ({"data__law": "digits", "data__eval_path": "x"}, "only data.law = 'file' takes one"),
        ({"data__law": "digits"}, r"digits has 64 inputs \(\(1, 8, 8\)\), not 10"),
        ({"data__law": "digits", "data__train": "fresh"}, "digits is a finite data set"),
        ({"data__augment": "crop-flip"}, "is of images; data.law is 'gaussian'"),
    ],
)
def test_experiments_that_name_data_wrongly(changes, message):
    with pytest.raises(ExperimentError, match=message):
        small(**changes)


def test_crops_are_shifted_and_mirrored_images(tmp_path):
    cifar10(tmp_path)
    held = images.read_cifar10(tmp_path, train=True)
    moved = held.cropped(np.arange(15), np.random.default_rng(0), "float64").reshape(15, 3, 32, 32)
    black = held.standardized(np.zeros((1, 3, 32, 32), np.uint8), "float64")[0].reshape(3, 32, 32)
    framed = np.broadcast_to(black[:, :1, :1], (15, 3, 40, 40)).copy()
    framed[:, :, 4:36, 4:36] = held.inputs(np.arange(15), "float64").reshape(15, 3, 32, 32)
    seen = set()
    for image, frame in zip(moved, framed, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(image, frame[:, top : top + 32, left : left + 32][:, :, ::flip])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len({flip for *_, flip in seen}) == 2
    assert len(seen) > 10


def test_cropped_batches_do_not_depend_on_how_many_are_drawn_at_once(tmp_path):
    cifar10(tmp_path)
    experiment = small(
        teacher__widths=[3072, 3, 10], data__law="cifar10", data__path=str(tmp_path), data__train=15, data__eval=3,
        data__augment="crop-flip", training__batch=4, training__steps_per_epoch=5,
    )  # fmt: skip
    whole = np.concatenate(list(fresh_batches(experiment, 0, 1, steps_at_once=5)))
    pieces = np.concatenate(list(fresh_batches(experiment, 0, 1, steps_at_once=2)))
    np.testing.assert_array_equal(whole, pieces)
    assert whole.shape == (5, 4, 3072)
    assert tsdyn.run(experiment.replace({"seeds": 1, "training.epochs": 1}), tmp_path / "run").sizes["epoch"] == 2


# --- damaged and odd files -----------------------------------------------------------------------------------


def read_or_refuse(reader, path):
    """Whether the file was read; asserts that an error names it in one line."""
    said = ""
    try:
        reader(path)
    except DataError as error:
        said = str(error)
    assert not said or (str(path) in said and len(said.splitlines()) == 1)
    return not said


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "compressed.npz", "a.gz"])
def test_every_byte_flipped_or_cut_off_is_read_or_refused_in_a_sentence(tmp_path, name):
    whole = tmp_path / name
    inputs, labels = RNG.standard_normal((5, 4)), np.arange(5)
    if name == "a.npy":
        np.save(whole, inputs)
    elif name == "a.gz":
        whole.write_bytes(gzip.compress(idx(RNG.integers(0, 256, (40, 3, 3), dtype=np.uint8))))
    else:
        (np.savez_compressed if "compressed" in name else np.savez)(whole, inputs=inputs, labels=labels)
    reader = images.read_idx if name == "a.gz" else images.read_arrays
    raw, damaged = whole.read_bytes(), tmp_path / f"damaged{whole.suffix}"
    for at in range(len(raw)):
        damaged.write_bytes(raw[:at] + bytes([raw[at] ^ (255, 1)[at % 2]]) + raw[at + 1 :])
        read_or_refuse(reader, damaged)
        if at % 5 == 0:
            damaged.write_bytes(raw[:at])
            assert not read_or_refuse(reader, damaged), f"{at} bytes of {len(raw)}"


def test_numbers_changed_in_a_zip_or_gzip_are_noticed(tmp_path):
    """Both keep a checksum of what they hold."""
    inputs = RNG.standard_normal((5, 4))
    np.savez(tmp_path / "a.npz", inputs=inputs)
    raw = (tmp_path / "a.npz").read_bytes()
    start = raw.index(inputs.tobytes())
    for at in range(start, start + inputs.nbytes):
        (tmp_path / "b.npz").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert not read_or_refuse(images.read_arrays, tmp_path / "b.npz")


@pytest.mark.parametrize("at", [3, 8, 40, 300, 700, 1500, 2500])
def test_a_damaged_netcdf_file_is_read_or_refused_in_a_sentence(tmp_path, at):
    xr.Dataset({"inputs": (("sample", "input"), RNG.standard_normal((5, 4)))}).to_netcdf(tmp_path / "a.nc")
    raw = (tmp_path / "a.nc").read_bytes()
    (tmp_path / "flipped.nc").write_bytes(raw[:at] + bytes(b ^ 255 for b in raw[at : at + 8]) + raw[at + 8 :])
    (tmp_path / "cut.nc").write_bytes(raw[:at])
    read_or_refuse(images.read_arrays, tmp_path / "flipped.nc")
    assert not read_or_refuse(images.read_arrays, tmp_path / "cut.nc")


def test_a_netcdf_file_in_which_the_library_loops_is_refused(tmp_path, monkeypatch):
    """The fuzzing of `tests.torture.inputs` found one: HDF5 then looks for ever."""
    xr.Dataset({"inputs": (("sample", "input"), np.ones((5, 4)))}).to_netcdf(tmp_path / "a.nc")
    monkeypatch.setattr(images, "SUBPROCESS_WORK", 1)
    monkeypatch.setattr(
        images, "_SUBPROCESS", images._SUBPROCESS.replace("with netCDF4", "while True: pass\nwith netCDF4")
    )
    with pytest.raises(DataError, match=r"a\.nc: .*does not end within 1 s of a processor; it is damaged"):
        images.read_arrays(tmp_path / "a.nc")


def test_a_netcdf_file_that_crashes_the_library_is_refused(tmp_path, monkeypatch):
    xr.Dataset({"inputs": (("sample", "input"), np.ones((5, 4)))}).to_netcdf(tmp_path / "a.nc")
    (tmp_path / "python").write_text("#!/bin/sh\nkill -SEGV $$\n", encoding="ascii")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(DataError, match=r"a\.nc: .*crashes the library \(SIGSEGV\); it is damaged"):
        images.read_arrays(tmp_path / "a.nc")


@pytest.mark.parametrize("order", [("sample", "input"), ("input", "sample")])
def test_samples_of_netcdf_are_found_by_the_name_of_their_dimension(tmp_path, order):
    x = RNG.standard_normal((5, 5))  # square: nothing but the name tells
    stored = xr.DataArray(x, dims=("sample", "input")).transpose(*order)
    xr.Dataset({"inputs": stored}).to_netcdf(tmp_path / "a.nc")
    np.testing.assert_array_equal(images.read_arrays(tmp_path / "a.nc").pixels, x)


def test_images_of_netcdf_are_found_by_the_names_of_their_dimensions(tmp_path):
    x = xr.DataArray(RNG.standard_normal((3, 3, 3, 3)), dims=("sample", "channel", "row", "column"))
    for order in (x.dims, x.dims[::-1], ("row", "sample", "column", "channel")):
        xr.Dataset({"inputs": x.transpose(*order)}).to_netcdf(tmp_path / "a.nc")
        np.testing.assert_array_equal(images.read_arrays(tmp_path / "a.nc").pixels, x.values)
    xr.Dataset({"inputs": (("x", "y", "z", "sample"), x.values)}).to_netcdf(tmp_path / "a.nc")
    with pytest.raises(DataError, match="x, y, z, sample: which is which"):
        images.read_arrays(tmp_path / "a.nc")


def test_values_of_netcdf_are_decoded(tmp_path):
    x, y = np.round(RNG.standard_normal((30, 4)), 2), np.arange(30, dtype="i4") % 3
    ds = xr.Dataset({"inputs": (("sample", "input"), x), "labels": ("sample", y)})
    packed = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 5.0, "_FillValue": -32768}
    for fill in (-2147483647, -1, 99):
        ds.to_netcdf(tmp_path / "a.nc", encoding={"labels": {"_FillValue": fill}, "inputs": packed})
        found = images.read_arrays(tmp_path / "a.nc")
        np.testing.assert_array_equal(found.labels, y)
        np.testing.assert_allclose(found.pixels, x, rtol=0, atol=0.005)
    ds.to_netcdf(tmp_path / "a.nc", encoding={"labels": {"_FillValue": 2}})
    with pytest.raises(DataError, match=r"labels\[2\] is missing: the file has its fill value there"):
        images.read_arrays(tmp_path / "a.nc")


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_inputs_that_compress_well_are_read(tmp_path, codec):
    """A thousand times and more: deflate's bound is not that of others, and memory is what has to hold them."""
    if codec == "zstd" and not netCDF4.__has_zstandard_support__:
        pytest.skip("this build of netCDF4 has no Zstandard")
    one_hot = np.eye(2000)[:1000]
    encoding = {"inputs": {"compression": codec, "complevel": 9, "chunksizes": one_hot.shape}}
    xr.Dataset({"inputs": (("sample", "input"), one_hot)}).to_netcdf(tmp_path / "a.nc", encoding=encoding)
    np.testing.assert_array_equal(images.read_arrays(tmp_path / "a.nc").pixels, one_hot)


@pytest.mark.parametrize("name", ["a.npz", "a.nc"])
def test_what_unpacks_to_more_than_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name):
    wide = np.zeros((1000, 12_500))  # 100 MB
    if name == "a.npz":
        np.savez_compressed(tmp_path / name, inputs=wide)
    else:
        encoding = {"inputs": {"zlib": True, "chunksizes": (100, 12_500)}}
        xr.Dataset({"inputs": (("sample", "input"), wide)}).to_netcdf(tmp_path / name, encoding=encoding)
    monkeypatch.setattr(images, "SUBPROCESS_BYTES", 0)
    monkeypatch.setattr("tsdyn.memory.available", lambda: 150_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"it unpacks to 0\.1 GB, and 0\.1 GB of memory are free"):
        images.read_arrays(tmp_path / name)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000


def test_a_gzip_is_unpacked_as_far_as_its_header_announces(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8)) + bytes(100_000_000), 1))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.gz: goes on after the 2368 bytes that its header announces"):
        images.read_idx(tmp_path / "a.gz")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5_000_000
    lying = struct.pack(">BBBB3I", 0, 0, 8, 3, 4_000_000_000, 28, 28) + bytes(1000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(lying))
    with pytest.raises(DataError, match=r"at most \d+ bytes, its header announces 3136000000016: it was cut off"):
        images.read_idx(tmp_path / "b.gz")


def test_an_encrypted_zip_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.ones((3, 4)))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        raw[raw.index(header) + flags] |= 1
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as \.npz: .*(encrypted|password)"):
        images.read_arrays(tmp_path / "a.npz")
