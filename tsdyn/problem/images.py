"""Read data sets from the user's files: MNIST (IDX), CIFAR-10 (binary version), arrays; and scikit-learn's digits.

Nothing is downloaded.  Pixels are kept as bytes until a sample is used; they are then scaled to [0, 1] and standardised
with the constants of the released code.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, assert_never

import numpy as np
from jaxtyping import Float, Int

from tsdyn import memory
from tsdyn.archive import netcdf
from tsdyn.archive.whole_files import ArchiveError, version
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.parts import Data

_SOURCES: Mapping[str, tuple[str, str]] = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "the four *-ubyte.gz files"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-10-binary.tar.gz, unpacked"),
}
_IDX_UNSIGNED_BYTE = 8
#: The most bytes that deflate can store in one byte.
DEFLATES = 1032
#: A netCDF file of up to this size is first read whole in a subprocess, a larger one is only opened there; the seconds
#: of a processor that this may take, ten times what a whole file of that size does, and the seconds in all.
SUBPROCESS_BYTES, SUBPROCESS_WORK, SUBPROCESS_SECONDS = 1 << 26, 10, 120
_CIFAR10_RECORD = 1 + 3 * 32 * 32


class DataError(ExperimentError):
    """A data file is missing, damaged or of another format; the message says where to get it and where to put it."""


@dataclass(frozen=True)
class Samples:
    """One part of a data set.

    Attributes:
        pixels: (sample, channel, row, column) or (sample, input), bytes or floating point.
        labels: (sample,) in 0..classes−1, or None.
        mean, std: One number per channel; an input is (pixel · scale − mean) / std.
        scale: Factor of the pixels, applied first.
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


def load(data: Data) -> tuple[Samples, Samples]:
    """The training part and the evaluation part of the data that an experiment's ``[data]`` names.

    Both are the same object if the data come in one part (digits, or a file without `data.eval_path`): members then
    draw disjoint samples from it.

    Raises:
        DataError: if a file is missing, damaged or of another format; says where to get it and where to put it.
    """
    return _load(data.law, data.path, data.eval_path, tuple(version(file) for file in files(data)))


def files(data: Data) -> list[Path]:
    """The files that `load` reads, as far as they exist."""
    if data.path is None:
        return []
    match data.law:
        case "mnist":
            named = [_idx_files(Path(data.path), name) for part in _MNIST_PARTS for name in _mnist_names(part)]
            return [file for places in named for file in [p for p in places if p.is_file()][:1]]
        case "cifar10":
            folder = _cifar10_folder(Path(data.path))
            return [folder / name for train in (True, False) for name in _cifar10_names(train)]
        case "file":
            return [Path(path) for path in (data.path, data.eval_path) if path is not None]
        case other:
            raise DataError(f"data.path = {data.path!r}: data.law = {other!r} reads no file; leave data.path out")


Law: TypeAlias = Literal["gaussian", "uniform", "digits", "mnist", "cifar10", "file"]


@functools.lru_cache(maxsize=2)
def _load(
    law: Law, path: str | None, eval_path: str | None, _: tuple[tuple[object, ...] | None, ...]
) -> tuple[Samples, Samples]:
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
    """The 1797 handwritten digits of 8 x 8 pixels that ship with scikit-learn.

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
        DataError: as in `load`.
    """
    file, labels_file = (_idx_file(Path(folder), name) for name in _mnist_names(_MNIST_PARTS[not train]))
    images, labels = read_idx(file), read_idx(labels_file)
    file = labels_file
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{file}: {labels.shape} labels for images of shape {images.shape}; the files are not of one set"
        )
    _check_labels(file, labels, 10)
    return Samples(images[:, None], labels.astype(np.int64), (0.5,), (0.5,), 1 / 255)


_MNIST_PARTS = "train", "t10k"


def _mnist_names(part: str) -> tuple[str, str]:
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _idx_files(folder: Path, name: str) -> list[Path]:
    """Possible paths of an IDX file; the first that exists is used."""
    spellings = name, name.replace("-idx", ".idx")
    return [file for spelling in spellings for file in (folder / spelling, folder / f"{spelling}.gz")]


def _idx_file(folder: Path, name: str) -> Path:
    for file in _idx_files(folder, name):
        if file.is_file():
            return file
    raise DataError(f"{folder}: no {name} or {name}.gz there{_where_from('mnist')}")


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file of unsigned bytes.

    The file holds 0, 0, type 8, the number of dimensions, each size as big-endian uint32, then the bytes.  Of a .gz
    only as much is unpacked as the header announces, and one byte more, to see whether it ends there.

    Raises:
        DataError: if the magic number, the type or the length is another, or it does not fit in memory.
    """
    path = Path(path)
    try:
        with gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _idx(path, file)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {_words(error)}; get it again") from None


def _idx(path: Path, file: io.BufferedIOBase) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _IDX_UNSIGNED_BYTE:
        raise DataError(
            f"{path}: starts with {magic.hex() or 'nothing'}, an IDX file of bytes with 0000 08 and its number of "
            "dimensions; it is another kind of file"
        )
    sizes = file.read(4 * magic[3])
    header = 4 + 4 * magic[3]
    shape = struct.unpack(f">{magic[3]}I", sizes) if len(sizes) == 4 * magic[3] else ()
    wanted = math.prod(shape) if shape else 0
    most = path.stat().st_size * (DEFLATES if path.suffix == ".gz" else 1)
    body = file.read(wanted) if wanted <= most and shape else b""
    if wanted > most or len(body) < wanted or not shape:
        there = most if wanted > most else 4 + len(sizes) + len(body)
        raise DataError(
            f"{path}: {'at most ' * (wanted > most)}{there} bytes, its header announces {header + wanted}: it was cut "
            "off; get it again"
        )
    if file.read(1):
        raise DataError(f"{path}: goes on after the {header + wanted} bytes that its header announces; get it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _words(error: BaseException) -> str:
    """The message of an error on one line; its type's name if the message is empty."""
    said = " ".join(str(error).split())
    return said or type(error).__name__


# --- CIFAR-10 ------------------------------------------------------------------------------------------------


def read_cifar10(folder: str | Path, *, train: bool) -> Samples:
    """One part of CIFAR-10 from its binary version; standardised per channel with the released code's constants.

    Raises:
        DataError: as in `load`; the python version is refused, since it consists of pickles.
    """
    folder, names = _cifar10_folder(Path(folder)), _cifar10_names(train)
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


def _cifar10_folder(folder: Path) -> Path:
    inner = folder / "cifar-10-batches-bin"
    return inner if inner.is_dir() else folder


def _cifar10_names(train: bool) -> list[str]:
    return [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]


def read_cifar10_batch(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, (sample, 3, 32, 32), and labels, (sample,), of a file of records of 3073 bytes.

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
    """Samples from ``.npy`` (inputs), ``.npz`` or ``.nc`` (``inputs`` and perhaps ``labels``), without scaling.

    Inputs are (sample, input) or (sample, channel, row, column) and finite, labels integers from 0.  In ``.nc`` the
    dimension called ``sample`` is taken as the first, whatever its place in the file (R, MATLAB, Julia and Fortran
    write it last), then ``channel``, ``row`` and ``column``.  Values are decoded by the CF conventions
    (``_FillValue``, ``scale_factor``, ``add_offset``).

    Raises:
        DataError: if the file is missing, damaged, holds something else or does not fit in memory once unpacked, or
            a value is missing or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{_where_from('file')}")
    try:
        found = _arrays(path)
    except Exception as error:  # on damaged files the libraries raise a dozen types, some undocumented
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as {path.suffix or 'arrays'}: {_words(error)}") from None
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
        with path.open("rb") as file:
            return {"inputs": _npy(file, path.stat().st_size)}
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".nc":
        return _netcdf(path)
    raise ValueError("it must end in .npz, .nc or .npy")


def _npz(path: Path) -> dict[str, np.ndarray]:
    """Inputs and labels; other names map to an empty array, for the error message only."""
    found = {}
    with zipfile.ZipFile(path) as held:
        for member in held.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"it holds {name} twice")
            with held.open(member) as file:  # zipfile compares the member's two names
                if name in ("inputs", "labels"):
                    found[name] = _npy(file, member.file_size)
                else:
                    found[name] = np.empty(0)
    return found


def _npy(file: io.BufferedIOBase | IO[bytes], size: int) -> np.ndarray:
    """The array in a file of numpy's format with `size` bytes; only as much is read as its header announces."""
    head = file.read(12)
    if len(head) < 12:
        raise ValueError("it is cut off")
    length = int.from_bytes(head[8:10] if head[6] == 1 else head[8:12], "little")
    if length > 1 << 16 or length > size:
        raise ValueError(f"its header of {length} bytes is not that of an array")
    start = io.BytesIO(head + file.read(length))
    kind = np.lib.format.read_magic(start)
    if kind not in ((1, 0), (2, 0)):
        raise ValueError(f"numpy's format {kind[0]}.{kind[1]} is not one of numbers")
    header = np.lib.format.read_array_header_1_0 if kind == (1, 0) else np.lib.format.read_array_header_2_0
    shape, transposed, dtype = header(start)
    if dtype.hasobject:
        raise ValueError(f"{dtype} are pickles, and a pickle runs code when it is read")
    wanted, there = math.prod(shape) * dtype.itemsize, size - start.tell()
    if wanted != there or min(shape, default=0) < 0:
        raise ValueError(f"its header announces {dtype} of shape {shape}, {wanted} bytes, and {there} are there")
    _refuse_beyond_memory(wanted)
    content = start.read() + file.read()  # to the end, where a .npz has its checksum compared
    if len(content) != wanted:
        raise ValueError(f"{len(content)} of {wanted} bytes are there")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if transposed else "C")


def _refuse_beyond_memory(wanted: int) -> None:
    if 2 * wanted > (room := memory.available()):  # as stored, and as inputs
        raise ValueError(f"it unpacks to {wanted / 1e9:.1f} GB, and {room / 1e9:.1f} GB of memory are free")


#: Code of the subprocess that opens a netCDF file and reads the variables named in its arguments.
_SUBPROCESS = """
import netCDF4, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv.pop(1)),) * 2)  # which ends it also where nobody waits any more
with netCDF4.Dataset(sys.argv[1]) as nc:
    for name in sys.argv[2:]:
        if name in nc.variables:
            nc[name][...]
"""


def _netcdf(path: Path) -> dict[str, np.ndarray]:
    """Inputs and labels with samples first; other names map to an empty array, for the error message only."""
    _refuse_crashing(path)
    found = {}
    try:
        with netcdf.dataset(path, upto=None) as nc:
            for name, variable in nc.variables.items():
                found[name] = _decoded(name, variable) if name in ("inputs", "labels") else np.empty(0)
    except ArchiveError as error:
        raise ValueError(_words(error).removeprefix(f"{path}: ")) from None
    return found


def _refuse_crashing(path: Path) -> None:
    """Refuse a file that cannot be read in a subprocess: a damaged one may crash the process that reads it.

    The subprocess runs in isolated mode, so that nothing is imported from the working directory.
    """
    names = ["inputs", "labels"] if path.stat().st_size <= SUBPROCESS_BYTES else []
    words = [sys.executable, "-I", "-c", _SUBPROCESS, str(SUBPROCESS_WORK), str(path.absolute()), *names]
    try:
        ended = subprocess.run(words, capture_output=True, timeout=SUBPROCESS_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it does not end within {SUBPROCESS_SECONDS} s; it is damaged") from None
    if ended in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(f"reading it does not end within {SUBPROCESS_WORK} s of a processor; it is damaged")
    if ended < 0:
        raise ValueError(f"reading it crashes the library ({signal.Signals(-ended).name}); it is damaged")


def _decoded(name: str, variable: Any) -> np.ndarray:
    """The values of a variable, decoded by the CF conventions, with samples first; a missing value is refused."""
    if not isinstance(variable.dtype, np.dtype):
        raise ValueError(f"{name} are no numbers")
    _refuse_beyond_memory(math.prod(variable.shape) * variable.dtype.itemsize)
    order = _samples_first(name, variable.dimensions)
    variable.set_auto_maskandscale(True)
    values = variable[...]
    if isinstance(values, np.ma.MaskedArray):
        missing = np.ma.getmaskarray(values)
        if missing.any():
            where = np.argwhere(missing)[0].tolist()
            raise ValueError(f"{name}{where} is missing: the file has its fill value there")
        values = values.data
    return np.asarray(values).transpose(order)


def _samples_first(name: str, dims: tuple[str, ...]) -> list[int]:
    """The order of dimensions that puts samples first, by their names; the file's own order for other names."""
    if "sample" not in dims or name == "labels":
        return list(range(len(dims)))
    named = ("sample", "channel", "row", "column")
    if len(dims) == 4 and set(dims) == set(named):
        return [dims.index(dim) for dim in named]
    first = dims.index("sample")
    if len(dims) > 2 and first:
        raise ValueError(f"{name} have dimensions {', '.join(dims)}: which is which? Call them {', '.join(named)}")
    return [first, *(i for i in range(len(dims)) if i != first)]


def _check_labels(path: str | Path, labels: np.ndarray, classes: int | None) -> None:
    bad = (labels < 0) if classes is None else (labels >= classes)
    if bad.any():
        at = int(bad.argmax())
        rule = "start at 0" if classes is None else f"are 0..{classes - 1}"
        raise DataError(f"{path}: label of sample {at} is {labels[at]}; labels {rule}")


# --- which samples a member gets ----------------------------------------------------------------------------


def split(data: Data, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of one member's training and evaluation samples, drawn without replacement; disjoint where the data
    come in one part.

    Raises:
        DataError: if there are fewer samples than asked for, or the files cannot be read.
    """
    train, evaluation = load(data)
    assert isinstance(data.train, int)
    if train is evaluation:
        wanted, there = data.train + data.eval, len(train)
        order = rng.permutation(there)
        chosen = order[: data.train], order[data.train : wanted]
        asked = f"data.train + data.eval = {wanted}"
    else:
        short = data.train > len(train)
        wanted, there = (data.train, len(train)) if short else (data.eval, len(evaluation))
        chosen = rng.permutation(len(train))[: data.train], rng.permutation(len(evaluation))[: data.eval]
        asked = f"data.train = {wanted}" if short else f"data.eval = {wanted}"
    if wanted > there:
        raise DataError(f"{asked}: {data.law} has {there} samples {'there' if data.law == 'file' else 'in all'}")
    return chosen


def check_width(data: Data, width: int) -> None:
    """Refuse a teacher whose input does not fit the samples of a file.

    Raises:
        DataError: naming both widths.
    """
    there = math.prod(load(data)[0].pixels.shape[1:])
    if there != width:
        raise DataError(f"teacher.widths: takes {width} inputs, samples of {data.path or data.law} have {there}")
