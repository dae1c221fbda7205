"""Real data from the user's own files: MNIST (IDX), CIFAR-10 (binary version), arrays; and scikit-learn's digits.

Nothing is downloaded.  Pixels stay bytes until a sample is used; they are then scaled to [0, 1] and standardised
with the constants of the released code.
"""

from __future__ import annotations

import functools
import gzip
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, assert_never

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from tsdyn import netcdf
from tsdyn.experiment import Data, ExperimentError
from tsdyn.whole_files import ArchiveError

_SOURCES: Mapping[str, tuple[str, str]] = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "the four *-ubyte.gz files"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-10-binary.tar.gz, unpacked"),
}
_IDX_UNSIGNED_BYTE = 8
#: Deflate makes a byte of at most so many.
DEFLATES = 1032
#: ... and what unpacks to this much may be compressed as well as it is.
ANY_RATIO = 1 << 28
_CIFAR10_RECORD = 1 + 3 * 32 * 32


class DataError(ExperimentError):
    """A data file that is missing, damaged or not of the format; the message says where to get it and put it."""


@dataclass(frozen=True)
class Samples:
    """One part of a data set.

    Attributes:
        pixels: (sample, channel, row, column) or (sample, input), bytes or floating point.
        labels: (sample,) in 0..classes−1, or None.
        mean, std: Of each channel; an input is (pixel · scale − mean) / std.
        scale: What a pixel is multiplied by first.
    """

    pixels: np.ndarray
    labels: Int[np.ndarray, " sample"] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, chosen: np.ndarray, dtype: str) -> Float[np.ndarray, "sample input"]:
        """The chosen samples, standardised and flattened (channel, row, column)."""
        return self.standardized(self.pixels[chosen], dtype)

    def standardized(self, pixels: np.ndarray, dtype: str) -> Float[np.ndarray, "sample input"]:
        """Pixels of this part as inputs."""
        shape = (-1, *([1] * (pixels.ndim - 2)))
        mean, std = np.array(self.mean, dtype).reshape(shape), np.array(self.std, dtype).reshape(shape)
        x: np.ndarray = (pixels.astype(dtype) * np.array(self.scale, dtype) - mean) / std
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def cropped(self, chosen: np.ndarray, rng: np.random.Generator, dtype: str) -> Float[np.ndarray, "sample input"]:
        """The chosen images, each shifted by up to an eighth of its side in either direction, black beyond its edge,
        and mirrored left to right with probability one half.

        4 of 32 pixels for CIFAR-10.  Source: Tian (2020), released code.
        """
        images = self.pixels[chosen]
        samples, channels, rows, columns = images.shape
        margin = max(1, rows // 8)
        padded = np.pad(images, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
        top, left = rng.integers(0, 2 * margin + 1, (2, samples))
        mirrored = rng.random(samples) < 0.5
        row = top[:, None] + np.arange(rows)
        column = left[:, None] + np.where(mirrored[:, None], np.arange(columns)[::-1], np.arange(columns))
        moved = padded[
            np.arange(samples)[:, None, None, None],
            np.arange(channels)[:, None, None],
            row[:, None, :, None],
            column[:, None, None, :],
        ]
        return self.standardized(moved, dtype)


def load(law: Data) -> tuple[Samples, Samples]:
    """The training and the evaluation part that an experiment's ``[data]`` names.

    One and the same object where the data come in one part (digits, or a file without `data.eval_path`): members
    then draw disjoint samples from it.

    Raises:
        DataError: if a file is missing, damaged or not of its format; says where to get it and where to put it.
    """
    return _load(law.law, law.path, law.eval_path)


Law: TypeAlias = Literal["gaussian", "uniform", "digits", "mnist", "cifar10", "file"]


@functools.lru_cache(maxsize=2)
def _load(law: Law, path: str | None, eval_path: str | None) -> tuple[Samples, Samples]:
    if law == "digits":
        whole = digits()
        return whole, whole
    if path is None:
        raise DataError(f"data.path: needed with data.law = {law!r}{_where_from(law)}")
    match law:
        case "mnist":
            return read_mnist(path, train=True), read_mnist(path, train=False)
        case "cifar10":
            return read_cifar10(path, train=True), read_cifar10(path, train=False)
        case "file":
            train = read_arrays(path)
            return train, train if eval_path is None else read_arrays(eval_path)
        case "gaussian" | "uniform":
            raise DataError(f"data.law = {law!r} is drawn, and reads no file")
        case other:
            assert_never(other)


def _where_from(law: str) -> str:
    if law not in _SOURCES:
        return "; give a .npz, .nc or .npy file"
    url, what = _SOURCES[law]
    return f"; get {what}, from {url} and name their folder as data.path"


def digits() -> Samples:
    """The 1797 handwritten digits of 8 x 8 pixels that ship with scikit-learn; nothing else is to be called digits.

    Pixels of 0..16 are scaled to [−1, 1].

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data.law = 'digits': they ship with scikit-learn, which is not installed: pip install 'tsdyn[digits]'"
        ) from None
    found = load_digits()
    pixels = found.images.astype(np.uint8)[:, None]
    return Samples(pixels, found.target.astype(np.int64), (0.5,), (0.5,), 1 / 16)


# --- MNIST ---------------------------------------------------------------------------------------------------


def read_mnist(folder: str | Path, *, train: bool) -> Samples:
    """One part of MNIST from its IDX files, plain or .gz; standardised as (pixel/255 − ½)/½.

    Raises:
        DataError: as `load`.
    """
    part = "train" if train else "t10k"
    images = read_idx(_idx_file(Path(folder), f"{part}-images-idx3-ubyte"))
    file = _idx_file(Path(folder), f"{part}-labels-idx1-ubyte")
    labels = read_idx(file)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{file}: {labels.shape} labels for images of shape {images.shape}; the files are not of one set"
        )
    _check_labels(file, labels, 10)
    return Samples(images[:, None], labels.astype(np.int64), (0.5,), (0.5,), 1 / 255)


def _idx_file(folder: Path, name: str) -> Path:
    for spelling in (name, name.replace("-idx", ".idx")):
        for file in (folder / spelling, folder / f"{spelling}.gz"):
            if file.is_file():
                return file
    raise DataError(f"{folder}: no {name} or {name}.gz there{_where_from('mnist')}")


def read_idx(path: str | Path) -> np.ndarray:
    """An IDX file of unsigned bytes: 0, 0, type 8, number of dimensions, each size as big-endian uint32, the bytes.

    Raises:
        DataError: if the magic number, the type or the length is not that.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; get it again") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _IDX_UNSIGNED_BYTE:
        raise DataError(
            f"{path}: starts with {raw[:4].hex() or 'nothing'}, an IDX file of bytes with 0000 08 and its number of "
            "dimensions; it is another kind of file"
        )
    header = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:header]) if len(raw) >= header else ()
    if len(raw) != header + math.prod(shape) or not shape:
        raise DataError(
            f"{path}: {len(raw)} bytes, its header announces {header + math.prod(shape)}: it was cut off; get it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


# --- CIFAR-10 ------------------------------------------------------------------------------------------------


def read_cifar10(folder: str | Path, *, train: bool) -> Samples:
    """One part of CIFAR-10 from its binary version; standardised per channel with the released code's constants.

    Raises:
        DataError: as `load`; the python version, which is pickles, is refused.
    """
    folder = Path(folder)
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickled = [f for f in (folder, folder / "cifar-10-batches-py") if (f / "data_batch_1").exists()]
        if pickled:
            raise DataError(
                f"{pickled[0]}: this is the python version of CIFAR-10, which is pickles, and a pickle runs code when "
                f"it is read{_where_from('cifar10')}"
            )
        raise DataError(f"{folder}: no {', '.join(missing)} there{_where_from('cifar10')}")
    parts = [read_cifar10_batch(folder / name) for name in names]
    pixels, labels = np.concatenate([p for p, _ in parts]), np.concatenate([y for _, y in parts])
    return Samples(pixels, labels, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1 / 255)


def read_cifar10_batch(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of 3073 bytes, a label and 3 x 32 x 32 pixels: (sample, 3, 32, 32) bytes and (sample,) labels.

    Raises:
        DataError: if the length is not a whole number of records, or a label is not in 0..9.
    """
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % _CIFAR10_RECORD:
        raise DataError(
            f"{path}: {len(raw)} bytes are not a whole number of records of {_CIFAR10_RECORD}: it was cut off, or is "
            f"not CIFAR-10's binary version{_where_from('cifar10')}"
        )
    records = raw.reshape(-1, _CIFAR10_RECORD)
    _check_labels(path, records[:, 0], 10)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


# --- arrays --------------------------------------------------------------------------------------------------


def read_arrays(path: str | Path) -> Samples:
    """Samples from ``.npy`` (inputs), ``.npz`` or ``.nc`` (``inputs`` and, if there are any, ``labels``), as they are.

    Inputs are (sample, input) or (sample, channel, row, column) and finite, labels integers from 0.

    Raises:
        DataError: if the file is missing, holds something else, or a value is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{_where_from('file')}")
    try:
        found = _arrays(path)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'arrays'}: {error}") from None
    if "inputs" not in found:
        raise DataError(f"{path}: holds {', '.join(found) or 'nothing'}; the samples must be called inputs")
    inputs, labels = found["inputs"], found.get("labels")
    if inputs.ndim not in (2, 4) or not len(inputs) or inputs.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: inputs are {inputs.dtype} of shape {inputs.shape}; they must be numbers of shape (sample, input) "
            "or (sample, channel, row, column)"
        )
    if not np.isfinite(inputs).all():
        where = np.argwhere(~np.isfinite(inputs))[0]
        raise DataError(f"{path}: inputs{where.tolist()} is {inputs[tuple(where)]}; inputs must be finite")
    if labels is not None:
        if labels.shape != (len(inputs),) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{path}: labels are {labels.dtype} of shape {labels.shape}; they must be {len(inputs)} integers"
            )
        _check_labels(path, labels, None)
        labels = labels.astype(np.int64)
    channels = inputs.shape[1] if inputs.ndim == 4 else 1
    return Samples(inputs, labels, (0.0,) * channels, (1.0,) * channels)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npy":
        return {"inputs": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    if path.suffix == ".nc":
        return _of_netcdf(path)
    raise ValueError("it must end in .npz, .nc or .npy")


def _of_netcdf(path: Path) -> dict[str, np.ndarray]:
    """The variables of a netCDF file, dimensions in the order of `read_arrays` where they have its names."""
    with path.open("rb") as file:
        classic = file.read(3) == b"CDF"
    if not classic:  # which HDF5 reads, from other files too, and the netCDF library crashes over two-byte floats
        try:
            with netcdf.dataset(path):
                pass
        except ArchiveError as error:
            raise ValueError(str(error)) from None
    with xr.open_dataset(path) as ds:
        if ds.nbytes > max(DEFLATES * path.stat().st_size, ANY_RATIO):
            raise ValueError(f"it declares {ds.nbytes} bytes, more than {path.stat().st_size} can hold")
        found = {str(name): ds[name] for name in ds.data_vars}
        for name, array in found.items():
            known = [dim for dim in ("sample", "channel", "row", "column", "input") if dim in array.dims]
            if len(known) == array.ndim:
                found[name] = array.transpose(*known)
        arrays = {name: array.values for name, array in found.items()}
    labels = arrays.get("labels")
    if labels is not None and labels.dtype.kind == "f" and np.equal(labels, np.round(labels)).all():
        arrays["labels"] = labels.astype(np.int64)  # integers with a fill value that no sample has
    return arrays


def _check_labels(path: str | Path, labels: np.ndarray, classes: int | None) -> None:
    bad = (labels < 0) if classes is None else (labels >= classes)
    if bad.any():
        at = int(bad.argmax())
        rule = "start at 0" if classes is None else f"are 0..{classes - 1}"
        raise DataError(f"{path}: label of sample {at} is {labels[at]}; labels {rule}")


# --- which samples a member gets ----------------------------------------------------------------------------


def split(law: Data, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of one member's training and evaluation samples, drawn without replacement; disjoint where the data
    come in one part.

    Raises:
        DataError: if there are fewer samples than asked for, or the files cannot be read.
    """
    train, evaluation = load(law)
    assert isinstance(law.train, int)
    if train is evaluation:
        wanted, there = law.train + law.eval, len(train)
        order = rng.permutation(there)
        chosen = order[: law.train], order[law.train : wanted]
        asked = f"data.train + data.eval = {wanted}"
    else:
        short = law.train > len(train)
        wanted, there = (law.train, len(train)) if short else (law.eval, len(evaluation))
        chosen = rng.permutation(len(train))[: law.train], rng.permutation(len(evaluation))[: law.eval]
        asked = f"data.train = {wanted}" if short else f"data.eval = {wanted}"
    if wanted > there:
        raise DataError(f"{asked}: {law.law} has {there} samples {'there' if law.law == 'file' else 'in all'}")
    return chosen


def check_width(law: Data, width: int) -> None:
    """Refuse a teacher whose input does not fit the samples of a file.

    Raises:
        DataError: naming both widths.
    """
    there = math.prod(load(law)[0].pixels.shape[1:])
    if there != width:
        raise DataError(f"teacher.widths: takes {width} inputs, samples of {law.path or law.law} have {there}")
