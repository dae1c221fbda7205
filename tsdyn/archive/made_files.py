"""One file of a run, made in memory, written whole and read back.  Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np
from numpy.typing import NDArray

from tsdyn.archive import file_images, hdf5, joining, netcdf
from tsdyn.archive.netcdf import Records, State
from tsdyn.archive.swept_values import Swept
from tsdyn.archive.whole_files import ArchiveError, refused, replacing, write_new
from tsdyn.schema import Layout
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import Label


class Content(NamedTuple):
    """All numbers of a file.

    Attributes:
        layout: Sizes of its dimensions.
        epochs: Labels of the recorded steps.
        variables: Names of the variables that it declares; those without records are NaN.
        dtype: Of the records.
        records: Measurements by variable.
        states: Training states by the name of their group, `netcdf.STATE` among them.
    """

    layout: Layout
    epochs: Sequence[Label]
    variables: tuple[str, ...]
    dtype: str
    records: Records
    states: Mapping[str, State]


class Made(NamedTuple):
    """What a file that was just written declares.

    Attributes:
        shape: Equal and hashed for files that declare the same but for their global attributes.
        attrs: Its global attributes.
        death: ``death_epoch`` of its members.
    """

    shape: Hashable
    attrs: Mapping[str, Any]
    death: list[int]


def write(target: Path, content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> Made:
    """Write a file with its checksum; it appears in one rename, once it was compared with `content`.

    It is made in memory and written at once, so that a failed write raises the system's error, not HDF5's.

    Raises:
        ArchiveError: if it cannot be written; nothing changed.
    """
    made = _made(content, attrs, swept)
    with replacing(target, made.nbytes, seal=True) as temporary:
        write_new(temporary, made.data)
        del made
        # where memory runs out the library can give a file that lacks numbers, and no error
        try:
            differing = joining.differing_records(
                temporary, content.layout, content.epochs, content.dtype, content.records, content.states
            )
        except ArchiveError as error:  # what this process has just written: the file system fails
            raise refused(target, error) from error
        if differing is not None:
            raise ArchiveError(
                f"{target}: {differing} read back differently from what was written, as where memory runs out; "
                "nothing was added to what was committed"
            )
    return Made(_shape(content, swept), attrs, np.asarray(content.states[netcdf.STATE]["death_epoch"]).tolist())


class _Declared(NamedTuple):
    """The bytes of a file that declares its variables and holds a state, and its global attributes."""

    image: NDArray
    attrs: Mapping[str, Any]


#: What files declare, without and with the lengths of their texts → the file that the next ones begin from; the latest
#: few that are small.
_declared: dict[Hashable, _Declared] = {}
_KEPT, _KEPT_BYTES = 16, 1 << 21


def _made(content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> NDArray:
    """The bytes of the file."""
    with hdf5.guarded():
        key = _key(content, attrs, swept)
        if key is None:
            return _filled(_declare(content, attrs, swept), content, swept, None)
        # a text that keeps its length is written in its place, any other with all attributes after it
        same = (key, *(len(value) for value in attrs.values() if isinstance(value, str)))
        declared = _declared.get(same)
        if declared is None:
            alike = _declared.get(key)
            if alike is None:
                declared = alike = _kept(key, _declare(content, attrs, swept))
            else:
                said = {**alike.attrs, **attrs}
                with file_images.opened(alike.image) as image:
                    image.say(said, alike.attrs)
                    declared = _Declared(image.content(), said)
            _kept(same, declared)
        return _filled(declared, content, swept, attrs)


def _kept(key: Hashable, declared: _Declared) -> _Declared:
    """`declared`, from which the next files of this key begin."""
    if declared.image.nbytes <= _KEPT_BYTES:
        while len(_declared) >= _KEPT:
            del _declared[next(iter(_declared))]
        _declared[key] = declared
    return declared


def _filled(declared: _Declared, content: Content, swept: Sequence[Swept], attrs: Mapping[str, Any] | None) -> NDArray:
    """The bytes of a file that holds the numbers, and `attrs` in place of those declared."""
    held = sum(part.nbytes for value in content.records.values() for part in _parts(value))
    with file_images.opened(declared.image, growth=held // 4) as image:
        _fill(image, content, swept)
        if attrs is not None:
            image.say({**declared.attrs, **attrs}, declared.attrs)
        return image.content()


def _key(content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> Hashable | None:
    """Equal for files that differ in numbers and attributes alone which can be exchanged; None for one of its own."""
    kinds = [(name, file_images.changeable(value)) for name, value in attrs.items()]
    if any(kind is None for _, kind in kinds):
        return None
    states = [
        (group, *((name, np.shape(array), np.asarray(array).dtype.str) for name, array in state.items()))
        for group, state in content.states.items()
    ]
    texts = [each.value for each in swept if isinstance(each.value, str)]
    return _shape(content, swept), tuple(kinds), tuple(states), tuple(texts)


def _shape(content: Content, swept: Sequence[Swept]) -> Hashable:
    keys = tuple((each.name, each.key, type(each.value)) for each in swept)
    declared = tuple(variable_of(name) for name in content.variables)  # one of a user's own may be declared anew
    return content.layout, tuple(content.epochs), content.variables, declared, content.dtype, keys


def _declare(content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> _Declared:
    """The file without its records.

    It is a file of the library's that stays in memory: one of netCDF4's own (``memory=``) does not keep the order of
    its variables, and could not be opened for writing ever after.
    """
    before = hdf5.handles()
    nc = netCDF4.Dataset("in memory", "w", format="NETCDF4", diskless=True, persist=False)
    try:
        netcdf.create(nc, content.layout, content.epochs, content.variables, content.dtype, attrs, swept)
        for group, state in content.states.items():
            netcdf.write_state(nc, state, group)
        nc.sync()
        (file,) = hdf5.handles() - before
        return _Declared(hdf5.image(file), netcdf.attributes(nc))
    finally:
        nc.close()


def _fill(image: file_images.Image, content: Content, swept: Sequence[Swept]) -> None:
    layout, dtype = content.layout, np.dtype(content.dtype)
    death = np.asarray(content.states[netcdf.STATE]["death_epoch"], np.int64)
    image.put("death_epoch", [((slice(0, len(death)),), death)])
    members = slice(0, len(layout.seeds))
    for name, value in content.records.items():
        layers = range(1, len(value) + 1) if isinstance(value, list) else (None,)
        places = (netcdf.index(variable_of(name), layout, slice(0, len(content.epochs)), i, members) for i in layers)
        blocks = [(place, np.asarray(part, dtype)) for place, part in zip(places, _parts(value), strict=True)]
        # what is never written reads as NaN and takes no space
        image.put(name, [(place, part) for place, part in blocks if not np.isnan(part).all()])
    for each in swept:
        if not isinstance(each.value, str):
            image.put(each.name, [((), np.asarray(each.value))])
    for group, state in content.states.items():
        for name, array in state.items():
            image.put(f"{group}/{name}", [([slice(0, size) for size in np.shape(array)], array)])


def _parts(value: NDArray | list[NDArray]) -> Sequence[NDArray]:
    return value if isinstance(value, list) else (value,)
