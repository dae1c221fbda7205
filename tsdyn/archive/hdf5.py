"""What the netCDF library does not say about a file, asked of the HDF5 library below it.  Imports no torch."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray
from xarray.backends.locks import HDF5_LOCK, NETCDFC_LOCK, combine_locks

_ID, _INT, _SIZE, _TEXT = ctypes.c_int64, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, then the arguments
    "H5Fopen": (_ID, _TEXT, ctypes.c_uint, _ID),
    "H5Fclose": (_INT, _ID),
    "H5Fget_name": (ctypes.c_ssize_t, _ID, _TEXT, _SIZE),
    "H5Fflush": (_INT, _ID, _INT),
    "H5Fget_obj_count": (ctypes.c_ssize_t, _ID, ctypes.c_uint),
    "H5Fget_obj_ids": (ctypes.c_ssize_t, _ID, ctypes.c_uint, _SIZE, ctypes.c_void_p),
    "H5Fget_file_image": (ctypes.c_ssize_t, _ID, ctypes.c_void_p, _SIZE),
    "H5Gget_info_by_name": (_INT, _ID, _TEXT, ctypes.c_void_p, _ID),
    "H5Dopen2": (_ID, _ID, _TEXT, _ID),
    "H5Dclose": (_INT, _ID),
    "H5Dget_create_plist": (_ID, _ID),
    "H5Dget_type": (_ID, _ID),
    "H5Pget_layout": (_INT, _ID),
    "H5Pget_external_count": (_INT, _ID),
    "H5Pclose": (_INT, _ID),
    "H5Tget_class": (_INT, _ID),
    "H5Tget_size": (_SIZE, _ID),
    "H5Tget_native_type": (_ID, _ID, _INT),
    "H5Tclose": (_INT, _ID),
    "H5Dget_space": (_ID, _ID),
    "H5Screate_simple": (_ID, _INT, ctypes.c_void_p, ctypes.c_void_p),
    "H5Sselect_hyperslab": (_INT, _ID, _INT, *[ctypes.c_void_p] * 4),
    "H5Sget_simple_extent_ndims": (_INT, _ID),
    "H5Sget_simple_extent_dims": (_INT, _ID, ctypes.c_void_p, ctypes.c_void_p),
    "H5Sclose": (_INT, _ID),
    "H5Dread": (_INT, _ID, _ID, _ID, _ID, _ID, ctypes.c_void_p),
    "H5Eset_auto2": (_INT, _ID, ctypes.c_void_p, ctypes.c_void_p),
}
_VIRTUAL, _INTEGER, _FLOATING = 3, 0, 1  # H5D_VIRTUAL, H5T_INTEGER, H5T_FLOAT
_ALL, _FILE = 0x1F, 1  # H5F_OBJ_ALL, H5F_OBJ_FILE
#: netCDF4 is not thread-safe: this is the lock that xarray reads under, and tsdyn takes the same.
_LOCK = combine_locks([NETCDFC_LOCK, HDF5_LOCK])
_inside = threading.local()


@contextmanager
def guarded() -> Iterator[None]:
    """Hold the lock on the netCDF library inside the context; may be nested in one thread."""
    if getattr(_inside, "held", False):
        yield
        return
    with _LOCK:
        _inside.held = True
        try:
            yield
        finally:
            _inside.held = False


def linked(signatures: Mapping[str, tuple[Any, ...]]) -> Any:
    """The HDF5 and netCDF libraries that netCDF4 has loaded: other copies would not know the files that are open.

    Args:
        signatures: Name of a function → its result, then its arguments.

    Raises:
        ImportError: if netCDF4 was built so that they cannot be reached.
    """
    file = sys.modules[netCDF4.Dataset.__module__].__file__
    library = ctypes.CDLL(file)
    for name, (result, *arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise ImportError(
                f"tsdyn calls {name} of the libraries that netCDF4 has loaded, and {file} does not show it; take the "
                "netCDF4 of PyPI or conda-forge on Linux or macOS (on Windows: in WSL)"
            ) from None
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _library() -> Any:
    library = linked(_SIGNATURES)
    library.H5Eset_auto2(0, None, None)  # errors are told by what is raised, not printed by the library
    return library


def prepare() -> None:
    """Look up all functions of the library that this module calls, which needs a lock of the system's linker."""
    _library()


def opened(path: Path) -> int | None:
    """A second handle on a file that netCDF has open, to be closed after it by `closed`; None if there is none.

    Where close(2) fails, as on a file system that went away, netCDF's own closing crashes the process.  While this
    handle is there, that one only counts down, and `closed` is told of the error.
    """
    file = _library().H5Fopen(os.fsencode(path), 0, 0)
    return file if file >= 0 else None


def closed(file: int) -> bool:
    """Close what `opened` gave; whether that succeeded."""
    return bool(_library().H5Fclose(file) >= 0)


def handles() -> set[int]:
    """The library's own handles on files that are open; to be called inside `guarded`."""
    library = _library()
    found = np.empty(library.H5Fget_obj_count(_ALL, _FILE), np.int64)
    library.H5Fget_obj_ids(_ALL, _FILE, len(found), found.ctypes.data)
    return {int(handle) for handle in found}


def image(file: int) -> NDArray:
    """The bytes of an open file, as closing it would leave them.

    Args:
        file: One of `handles`; netCDF must have written all that it holds back (``sync``).

    Raises:
        MemoryError: if the library does not give them.
    """
    found = np.empty(flushed(file), np.uint8)
    if _library().H5Fget_file_image(file, found.ctypes.data, len(found)) != len(found):
        raise MemoryError("image: the HDF5 library does not give the file that it made in memory")
    seal(found)
    return found


def flushed(file: int) -> int:
    """Number of bytes of an open file, after all that the library held back was written to it.

    Raises:
        MemoryError: if the library does not write it.
    """
    size = _library().H5Fget_file_image(file, None, 0) if _library().H5Fflush(file, 0) >= 0 else -1
    if size <= 0:
        raise MemoryError("flushed: the HDF5 library does not write all of the file that it made in memory")
    return int(size)


def seal(image: NDArray) -> None:
    """Write the checksum of a file's first block, which HDF5 before 2.0 leaves as it was while the file was open.

    There it clears the mark of an open file in the image, on which the checksum depends, so that the image could not
    be opened.
    """
    if image[8] < 2:  # the version of the block; older ones have no checksum
        return
    end = 12 + 4 * int(image[9])  # four addresses of so many bytes
    image[end : end + 4] = np.frombuffer(lookup3(image[:end].tobytes()).to_bytes(4, "little"), np.uint8)


def lookup3(data: bytes) -> int:
    """HDF5's checksum of one byte of metadata or more: `hashlittle` of Bob Jenkins' lookup3.c, from 0."""

    def turned(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & 0xFFFFFFFF

    a = b = c = 0xDEADBEEF + len(data)
    blocks = [data[at : at + 12].ljust(12, b"\0") for at in range(0, len(data), 12)]
    for left, block in zip(reversed(range(len(blocks))), blocks, strict=True):
        x, y, z = (int.from_bytes(block[at : at + 4], "little") for at in (0, 4, 8))
        a, b, c = (a + x) & 0xFFFFFFFF, (b + y) & 0xFFFFFFFF, (c + z) & 0xFFFFFFFF
        for by in (4, 6, 8, 16, 19, 4) if left else ():  # each step is the next one's with a, b, c moved on by one
            a = (a - c & 0xFFFFFFFF) ^ turned(c, by)
            c = c + b & 0xFFFFFFFF
            a, b, c = b, c, a
    for by in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - turned(b, by) & 0xFFFFFFFF
        a, b, c = b, c, a
    return b


def read_all(path: Path, spans: Mapping[str, Sequence[slice]], dtypes: Mapping[str, np.dtype]) -> dict[str, NDArray]:
    """Numbers of some variables as they are stored, in one visit of the file; to be called inside `guarded`.

    Opening a file by the netCDF library takes 7 ms, since it reads the header of every variable; this takes 0.2 ms.
    Left out are variables that are not such numbers, lie in another file or cannot be read: the netCDF library then
    reads them, or says what is wrong.

    Args:
        path: The file.
        spans: Variable of its root group → a start and a stop along each dimension.
        dtypes: Variable → type of the stored numbers.
    """
    found = dict[str, NDArray]()
    with visited(path) as file:
        if file is None:
            return found
        for name, of in spans.items():
            numbers = None if oddities(file, [name]) else numbers_of(file, name, of, dtypes[name])
            found |= {} if numbers is None else {name: numbers}
    return found


@contextmanager
def visited(path: Path) -> Iterator[int | None]:
    """What `opened` gives of a file, inside the context."""
    file = opened(path)
    try:
        yield file
    finally:
        if file is not None and not closed(file):
            raise OSError(f"{path}: cannot be closed: the file system fails")


def variable(file: int, name: str) -> int:
    """The library's handle on a variable, of one in a group ``group/variable``; negative if there is none."""
    library = _library()
    found = library.H5Dopen2(file, name.encode(), 0)
    if found >= 0:
        return int(found)
    *groups, last = name.split("/")  # netCDF's name for a variable that a dimension shadows
    return int(library.H5Dopen2(file, "/".join([*groups, f"_nc4_non_coord_{last}"]).encode(), 0))


class _OfGroup(ctypes.Structure):
    """What the library says of a group (``H5G_info_t``)."""

    _fields_ = (("kept", _INT), ("links", ctypes.c_uint64), ("order", ctypes.c_int64), ("mounted", ctypes.c_bool))


def held_in(file: int, group: str) -> int:
    """Number of variables in a group, and of its dimensions without a variable; -1 if there is no such group.

    Args:
        file: What `opened` gave.
        group: Name of a group at the root.
    """
    found = _OfGroup()
    done = _library().H5Gget_info_by_name(file, group.encode(), ctypes.byref(found), 0)
    return int(found.links) if done >= 0 else -1


def numbers_of(file: int, name: str, spans: Sequence[slice], dtype: np.dtype) -> NDArray | None:
    """Numbers of one variable as they are stored, as `read_all` gives them; None if they are not such numbers.

    Args:
        file: What `opened` gave.
        name: Of the variable; of one in a group ``group/variable``.
        spans: A start and a stop along each dimension.
        dtype: Type of the stored numbers.
    """
    library, held = _library(), variable(file, name)
    if held < 0:
        return None
    stored = library.H5Dget_type(held)
    kind, space = library.H5Tget_native_type(stored, 0), library.H5Dget_space(held)
    try:
        classes = {"f": _FLOATING, "i": _INTEGER, "u": _INTEGER}
        alike = library.H5Tget_class(kind) == classes.get(dtype.kind) and library.H5Tget_size(kind) == dtype.itemsize
        there = extent(space)
        if not alike or not dtype.isnative or len(there) != len(spans):
            return None
        if any(span.stop > size for span, size in zip(spans, there, strict=True)):
            return None  # along an unlimited dimension netCDF fills up what is not stored
        counts = [span.stop - span.start for span in spans]
        found = np.empty(counts, dtype)
        if counts == there:
            return found if library.H5Dread(held, kind, 0, 0, 0, found.ctypes.data) >= 0 else None
        count = sizes(counts)
        memory = library.H5Screate_simple(len(counts), count, None)
        try:
            library.H5Sselect_hyperslab(space, 0, sizes([span.start for span in spans]), None, count, None)
            done = library.H5Dread(held, kind, memory, space, 0, found.ctypes.data)
        finally:
            library.H5Sclose(memory)
        return found if done >= 0 else None
    finally:
        library.H5Sclose(space)
        library.H5Tclose(kind)
        library.H5Tclose(stored)
        library.H5Dclose(held)


def extent(space: int) -> list[int]:
    """Sizes along the dimensions of a dataspace of the library's."""
    found = sizes([0] * max(0, _library().H5Sget_simple_extent_ndims(space)))
    _library().H5Sget_simple_extent_dims(space, found, None)
    return list(found)


def sizes(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    """An array of sizes or positions, as the library takes them."""
    return (ctypes.c_uint64 * len(numbers))(*numbers)


def oddities(file: int, names: Iterable[str]) -> list[str]:
    """Storage of these variables that must not be read, one phrase each; to be called inside `guarded`.

    HDF5 can keep a variable's bytes in any file that the header names, so that opening a stranger's file could show
    the contents of other files of this machine.  Floating-point numbers of two bytes are taken for text by netCDF, and
    reading them crashes the process.

    Args:
        file: What `opened` gave.
        names: Variables; those of a group as ``group/variable``.
    """
    library, found = _library(), []
    own = _file_name(library, file)
    for name in names:
        held = variable(file, name)
        if held < 0:
            found.append(f"{name} cannot be opened by the HDF5 library")
            continue
        try:
            found += [f"{name} {what}" for what in _odd(library, held, own)]
        finally:
            library.H5Dclose(held)
    return found


def _odd(library: Any, variable: int, own: bytes) -> list[str]:
    creation, kind = library.H5Dget_create_plist(variable), library.H5Dget_type(variable)
    try:
        outside = (
            library.H5Pget_layout(creation) == _VIRTUAL
            or library.H5Pget_external_count(creation) != 0
            or _file_name(library, variable) != own
        )
        short = library.H5Tget_class(kind) == _FLOATING and library.H5Tget_size(kind) < 4
    finally:
        library.H5Pclose(creation)
        library.H5Tclose(kind)
    found = ["is stored in other files, which are not read"] if outside else []
    return found + (["holds floating-point numbers of two bytes, which netCDF cannot read"] if short else [])


def _file_name(library: Any, of: int) -> bytes:
    name = ctypes.create_string_buffer(1 << 12)
    library.H5Fget_name(of, name, len(name))
    return name.value
