"""A netCDF file in memory whose numbers and attributes are changed by the HDF5 library.  Imports no torch.

Declaring the variables of a small file takes the netCDF library ten times as long as writing its numbers.  What it
declared once is kept as bytes, and files that declare the same begin from them.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsdyn.archive import hdf5
from tsdyn.archive.exchanged_numbers import CHECKSUM, Block, Piece

_ID, _INT, _SIZE, _TEXT, _AT = ctypes.c_int64, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p
_ADDRESS = _NUMBER = ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, then the arguments
    "H5Pcreate": (_ID, _ID),
    "H5Pclose": (_INT, _ID),
    "H5Pset_fapl_core": (_INT, _ID, _SIZE, _INT),
    "H5Pset_file_image": (_INT, _ID, _AT, _SIZE),
    "H5Pset_file_image_callbacks": (_INT, _ID, _AT),
    "H5Fopen": (_ID, _TEXT, ctypes.c_uint, _ID),
    "H5Fclose": (_INT, _ID),
    "H5Dget_space": (_ID, _ID),
    "H5Dget_type": (_ID, _ID),
    "H5Dget_create_plist": (_ID, _ID),
    "H5Dget_offset": (_ADDRESS, _ID),
    "H5Dget_num_chunks": (_INT, _ID, _ID, _AT),
    "H5Dget_chunk_info": (_INT, _ID, _ID, _NUMBER, *[_AT] * 4),
    "H5Pget_layout": (_INT, _ID),
    "H5Pget_chunk": (_INT, _ID, _INT, _AT),
    "H5Pget_nfilters": (_INT, _ID),
    "H5Dwrite": (_INT, _ID, _ID, _ID, _ID, _ID, _AT),
    "H5Dclose": (_INT, _ID),
    "H5Screate_simple": (_ID, _INT, _AT, _AT),
    "H5Sselect_hyperslab": (_INT, _ID, _INT, *[_AT] * 4),
    "H5Sclose": (_INT, _ID),
    "H5Tcopy": (_ID, _ID),
    "H5Tget_size": (_SIZE, _ID),
    "H5Tset_size": (_INT, _ID, _SIZE),
    "H5Tclose": (_INT, _ID),
    "H5Aopen": (_ID, _ID, _TEXT, _ID),
    "H5Acreate2": (_ID, _ID, _TEXT, _ID, _ID, _ID, _ID),
    "H5Aget_type": (_ID, _ID),
    "H5Aget_space": (_ID, _ID),
    "H5Awrite": (_INT, _ID, _ID, _AT),
    "H5Adelete": (_INT, _ID, _TEXT),
    "H5Aclose": (_INT, _ID),
}
_WRITABLE = 1  # H5F_ACC_RDWR
_CONTIGUOUS, _CHUNKED, _NOWHERE = 1, 2, (1 << 64) - 1  # H5D_CONTIGUOUS, H5D_CHUNKED, HADDR_UNDEF
_GROWTH = 1 << 16


@cache
def _library() -> Any:
    hdf5.prepare()
    return hdf5.linked(_SIGNATURES)


@cache
def _of_access() -> int:
    """The library's class of the properties with which files are opened."""
    return int(_ID.in_dll(_library(), "H5P_CLS_FILE_ACCESS_ID_g").value)


# --- memory that outlives its file --------------------------------------------------------------------------

_ALLOCATED, _RESIZED = ctypes.CFUNCTYPE(_AT, _SIZE, _INT, _AT), ctypes.CFUNCTYPE(_AT, _AT, _SIZE, _INT, _AT)
_FREED = ctypes.CFUNCTYPE(_INT, _AT, _INT, _AT)
_CLOSING = 7  # H5FD_FILE_IMAGE_OP_FILE_CLOSE
#: Bytes at each address that the library was given, and the addresses of files that it has closed since.
_given: dict[int, int] = {}
_left: list[int] = []


class _Callbacks(ctypes.Structure):
    """How the library has and resizes memory (``H5FD_file_image_callbacks_t``)."""

    _fields_ = (("allocate", _ALLOCATED), ("copy", _AT), ("resize", _RESIZED), ("free", _FREED), ("others", _AT * 3))


@cache
def _system() -> Any:
    """The system's malloc, realloc and free: its realloc moves pages, not bytes."""
    system = ctypes.CDLL(None)
    system.malloc.restype = system.realloc.restype = _AT
    system.malloc.argtypes, system.realloc.argtypes = (_SIZE,), (_AT, _SIZE)
    system.free.restype, system.free.argtypes = None, (_AT,)
    return system


def _allocated(size: int, operation: int, of: int | None) -> int | None:
    return _noted(_system().malloc(size), size)


def _resized(address: int, size: int, operation: int, of: int | None) -> int | None:
    found = _noted(_system().realloc(address, size), size)
    if found not in (None, address):
        del _given[address]
    return found


def _freed(address: int, operation: int, of: int | None) -> int:
    if operation == _CLOSING:  # the file's own bytes stay
        _left.append(address)
    else:
        del _given[address]
        _system().free(address)
    return 0


def _noted(address: int | None, size: int) -> int | None:
    if address is not None:
        _given[address] = size
    return address


#: Never let go: the library calls these while any of its files is open.
_CALLBACKS = _Callbacks(_ALLOCATED(_allocated), None, _RESIZED(_resized), _FREED(_freed))


def _taken(size: int) -> NDArray | None:
    """The first `size` bytes of the file that the library closed last, freed with the array; None if there is none."""
    found = None
    while _left:
        address = _left.pop()
        held = (ctypes.c_uint8 * min(size, _given.pop(address))).from_address(address)
        weakref.finalize(held, _system().free, address).atexit = False
        found = np.ctypeslib.as_array(held)
    return found


# --- files in memory ----------------------------------------------------------------------------------------


@contextmanager
def opened(image: NDArray, growth: int = _GROWTH) -> Iterator[Image]:
    """A copy of a file's bytes, open for writing in memory; to be called inside `hdf5.guarded`.

    Args:
        image: As `hdf5.image` gives it.
        growth: Bytes that will be written to it; it grows by this much at a time.

    Raises:
        MemoryError: if the library cannot open it, or write all of it.
    """
    library, access = _library(), _library().H5Pcreate(_of_access())
    try:
        ready = (
            library.H5Pset_fapl_core(access, max(growth, _GROWTH), 0) >= 0
            and library.H5Pset_file_image_callbacks(access, ctypes.byref(_CALLBACKS)) >= 0
            and library.H5Pset_file_image(access, image.ctypes.data, image.nbytes) >= 0
        )
        file = library.H5Fopen(b"in memory", _WRITABLE, access) if ready else -1
    finally:
        library.H5Pclose(access)
    if file < 0:
        _taken(0)
        raise MemoryError("opened: the HDF5 library cannot open the file that it made in memory")
    made, size = Image(file), 0
    try:
        yield made
        size = hdf5.flushed(file)
    finally:
        library.H5Fclose(file)
        made._left = _taken(size)
    if made._left is None or len(made._left) < size:
        raise MemoryError("opened: the HDF5 library does not close the file that it made in memory")


class Image:
    """A file that is open in memory; what is written must have been declared in it.

    Args:
        file: The library's handle.
    """

    def __init__(self, file: int) -> None:
        self._file, self._library = file, _library()
        self._left: NDArray | None = None

    def put(self, blocks: Sequence[Block]) -> None:
        """Write blocks of numbers of one variable.

        Raises:
            KeyError: if there is no such variable.
            MemoryError: if the library does not write them.
            ValueError: if numbers do not fit their place or the variable's type.
        """
        library, name = self._library, blocks[0].name
        with self._variable(name) as (variable, stored, space):
            for block in blocks:
                shape = tuple(part.stop - part.start for part in block.place if isinstance(part, slice))
                numbers = np.ascontiguousarray(block.numbers)
                if np.shape(block.numbers) != shape:
                    raise ValueError(f"{name}: numbers of shape {np.shape(block.numbers)} do not fit the place {shape}")
                if numbers.dtype.itemsize != library.H5Tget_size(stored):
                    raise ValueError(f"{name}: numbers of type {numbers.dtype} are not of the type that was declared")
                if numbers.size and not self._written(variable, stored, space, block, numbers):
                    raise MemoryError(f"{name}: the HDF5 library does not write it to the file in memory")

    @contextmanager
    def _variable(self, name: str) -> Iterator[tuple[int, int, int]]:
        """The library's handles on a variable, the type of its numbers and its dataspace."""
        variable = hdf5.variable(self._file, name)
        if variable < 0:
            raise KeyError(f"{name}: not declared in the file in memory")
        stored, space = self._library.H5Dget_type(variable), self._library.H5Dget_space(variable)
        try:
            yield variable, stored, space
        finally:
            self._library.H5Sclose(space)
            self._library.H5Tclose(stored)
            self._library.H5Dclose(variable)

    def _written(self, variable: int, stored: int, space: int, block: Block, numbers: NDArray) -> bool:
        library, starts, counts = self._library, block.starts, block.counts
        if not any(starts) and counts == hdf5.extent(space):
            return bool(library.H5Dwrite(variable, stored, 0, 0, 0, numbers.ctypes.data) >= 0)
        start, count = hdf5.sizes(starts), hdf5.sizes(counts)
        memory = library.H5Screate_simple(len(counts), count, None)
        try:
            chosen = library.H5Sselect_hyperslab(space, 0, start, None, count, None) >= 0
            return chosen and bool(library.H5Dwrite(variable, stored, memory, space, 0, numbers.ctypes.data) >= 0)
        finally:
            library.H5Sclose(memory)

    def pieces(self, name: str) -> list[Piece] | None:
        """Where a variable's numbers that were written lie in the file; None if they are not stored as they are.

        Raises:
            KeyError: if there is no such variable.
        """
        library = self._library
        with self._variable(name) as (variable, stored, space):
            creation = library.H5Dget_create_plist(variable)
            try:
                layout, filters = library.H5Pget_layout(creation), library.H5Pget_nfilters(creation)
                shape, chunk = hdf5.extent(space), hdf5.sizes(hdf5.extent(space))
                if layout == _CONTIGUOUS:
                    byte = library.H5Dget_offset(variable)
                    return [] if byte == _NOWHERE else [Piece(byte, (0,) * len(shape), tuple(shape), checked=False)]
                if layout != _CHUNKED or library.H5Pget_chunk(creation, len(shape), chunk) != len(shape):
                    return None
            finally:
                library.H5Pclose(creation)
            plain = math.prod(chunk) * library.H5Tget_size(stored)
            return self._chunks(variable, space, tuple(chunk), plain, checked=filters == 1)

    def _chunks(
        self, variable: int, space: int, shape: tuple[int, ...], plain: int, *, checked: bool
    ) -> list[Piece] | None:
        """The chunks of a variable; None unless each holds its `plain` bytes and, if `checked`, those of a checksum."""
        library, found, held = self._library, [], plain + CHECKSUM * checked
        number, byte, size, left_out = _NUMBER(), _ADDRESS(), _NUMBER(), ctypes.c_uint()
        if library.H5Dget_num_chunks(variable, space, ctypes.byref(number)) < 0:
            return None
        for index in range(number.value):
            origin = hdf5.sizes([0] * len(shape))
            told = (origin, *(ctypes.byref(each) for each in (left_out, byte, size)))
            if library.H5Dget_chunk_info(variable, space, index, *told) < 0 or size.value != held or left_out.value:
                return None
            found.append(Piece(byte.value, tuple(origin), shape, checked))
        return found

    def say(self, attrs: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Change the file's attributes from `before`, all that it has, to `attrs`, in the same order.

        Text may change its length; a number stays one of its type.

        Raises:
            MemoryError: if the library does not write them.
        """
        names = list(before)
        longer = (
            i
            for i, name in enumerate(names)
            if not _same_text(attrs[name], before[name]) and _bytes(attrs[name]).nbytes != _bytes(before[name]).nbytes
        )
        first = next(longer, len(names))
        kept = names[:first]
        others = changed({name: attrs[name] for name in kept}, before)
        done = all(self._said(name, _bytes(attrs[name])) for name in others)
        if not done or not self._anew({name: _bytes(attrs[name]) for name in names[first:]}):
            raise MemoryError("say: the HDF5 library does not write the attributes of the file in memory")

    def _said(self, name: str, content: NDArray) -> bool:
        """Write an attribute in its place; whether that succeeded."""
        library = self._library
        attribute = library.H5Aopen(self._file, name.encode(), 0)
        kind = library.H5Aget_type(attribute)
        done = library.H5Awrite(attribute, kind, content.ctypes.data) >= 0
        library.H5Tclose(kind)
        return bool(library.H5Aclose(attribute) >= 0 and done)

    def _anew(self, contents: Mapping[str, NDArray]) -> bool:
        """Remove attributes and make them again, of the same kinds, so that they keep their order."""
        library, kinds = self._library, {}
        for name in contents:
            attribute = library.H5Aopen(self._file, name.encode(), 0)
            kinds[name] = library.H5Aget_type(attribute), library.H5Aget_space(attribute)
            library.H5Aclose(attribute)
            library.H5Adelete(self._file, name.encode())
        done = True
        for name, content in contents.items():
            kind, space = kinds[name]
            sized = library.H5Tcopy(kind)
            if content.dtype.kind == "S":
                library.H5Tset_size(sized, content.nbytes)
            attribute = library.H5Acreate2(self._file, name.encode(), sized, space, 0, 0)
            done &= library.H5Awrite(attribute, sized, content.ctypes.data) >= 0
            done &= library.H5Aclose(attribute) >= 0
            library.H5Tclose(sized)
            library.H5Tclose(kind)
            library.H5Sclose(space)
        return bool(done)

    def content(self) -> NDArray:
        """The bytes of the file, once `opened` has closed it; they are not copied."""
        assert self._left is not None
        return self._left


def changeable(value: Any) -> object | None:
    """What values of an attribute have in common that `Image.say` can exchange; None for one that it cannot write.

    The netCDF library stores other text than ASCII, and empty text, in other ways.
    """
    if isinstance(value, str):
        return "text" if value and value.isascii() and "\0" not in value else None
    numbers = np.asarray(value)
    return (numbers.dtype.str, numbers.size) if numbers.dtype.kind in "fiu" and numbers.ndim <= 1 else None


def changed(attrs: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, int]:
    """Names of attributes that are others than before → how many of their bytes are others: all, at another length."""
    found: dict[str, int] = {}
    for name, value in attrs.items():
        if _same_text(value, before[name]):
            continue
        new, old = (np.frombuffer(_bytes(each).tobytes(), np.uint8) for each in (value, before[name]))
        others = len(new) if len(new) != len(old) else int(np.count_nonzero(new != old))
        found |= {name: others} if others else {}
    return found


def _same_text(value: Any, before: Any) -> bool:
    return isinstance(value, str) and isinstance(before, str) and value == before


def _bytes(value: Any) -> NDArray:
    """An attribute's value as the library takes it."""
    return np.array(value.encode()) if isinstance(value, str) else np.ascontiguousarray(value)
