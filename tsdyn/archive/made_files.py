"""One file of a run, made in memory, written whole and read back.  Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import netCDF4
import numpy as np
from numpy.typing import NDArray

from tsdyn.archive import exchanged_numbers, file_images, hdf5, joining, netcdf
from tsdyn.archive.exchanged_numbers import Block
from tsdyn.archive.netcdf import Records, State
from tsdyn.archive.swept_values import Swept
from tsdyn.archive.whole_files import ArchiveError, refused, replacing, write_new
from tsdyn.schema import Layout
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import Label

_log = logging.getLogger("tsdyn.archive")


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
    made, in_place = _made(content, attrs, swept)
    with replacing(target, made.nbytes, seal=True) as temporary:
        write_new(temporary, made.data)
        if in_place:  # of a file that was compared by the library
            differing = None if temporary.read_bytes() == made.data else "the file"
        else:
            del made
            # where memory runs out the library can give a file that lacks numbers, and no error
            try:
                differing = joining.differing_records(
                    temporary, content.layout, content.epochs, content.dtype, content.records, content.states
                )
            except ArchiveError as error:  # what this process has just written: the file system fails
                raise refused(target, error) from error
        if differing is not None:
            _declared.clear()  # what this file began from, or is an example of others, may be what is wrong
            _examples.clear()
            raise ArchiveError(
                f"{target}: {differing} read back differently from what was written, as where memory runs out; "
                "nothing was added to what was committed"
            )
    return Made(_shape(content, swept), attrs, np.asarray(content.states[netcdf.STATE]["death_epoch"]).tolist())


class _Declared(NamedTuple):
    """The bytes of a file that declares its variables and holds a state, and its global attributes."""

    image: NDArray
    attrs: Mapping[str, Any]


class _Example(NamedTuple):
    """The bytes of a whole file, its global attributes, and where its numbers are."""

    image: NDArray
    attrs: Mapping[str, Any]
    targets: Sequence[exchanged_numbers.Target]


#: What files declare → the file that the next ones begin from; the latest few that are small.
_declared: dict[Hashable, _Declared] = {}
#: The same with which numbers there are, without and with the lengths of texts → the file in which the next ones
#: exchange theirs.
_examples: dict[Hashable, _Example] = {}
_KEPT, _KEPT_BYTES = 16, 1 << 21
_K = TypeVar("_K", _Declared, _Example)


def _made(content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> tuple[NDArray, bool]:
    """The bytes of the file, and whether they are those of an example but for numbers and attributes in their places.

    The first file of its kind is declared by the netCDF library and filled by HDF5; the second begins from what the
    first declared, and is the example of all later ones.
    """
    with hdf5.guarded():
        blocks = list(_blocks(content, swept))
        key = _key(content, attrs, swept)
        if key is None:
            return _filled(_declare(content, attrs, swept), blocks, None), False
        kind = key, tuple((block.name, tuple(block.starts)) for block in blocks)
        example = _examples.get(kind)
        if example is not None:
            made = _exchanged(kind, example, blocks, attrs)
            if made is not None:
                return made
            _examples.clear()
            _log.info("the HDF5 library changed more of a file in memory than its attributes; it fills the file itself")
        declared = _declared.get(key)
        if declared is None:
            return _filled(_keep(_declared, key, _declare(content, attrs, swept)), blocks, attrs), False
        image = _filled(declared, blocks, attrs)
        found = _example(image, {**declared.attrs, **attrs}, blocks)
        if found is not None:
            _keep(_examples, kind, found)
        return image, False


def _example(image: NDArray, attrs: Mapping[str, Any], blocks: Sequence[Block]) -> _Example | None:
    """A file that was just filled, as an example; None if the library stores its numbers in a way not known here."""
    if image.nbytes > _KEPT_BYTES:
        return None
    with file_images.opened(image) as opened:
        pieces = {name: opened.pieces(name) for name in {block.name for block in blocks}}
    targets = exchanged_numbers.targets(blocks, pieces)
    if targets is None:
        return None
    again = image.copy()
    exchanged_numbers.exchange(again, targets, blocks)
    return _Example(image, attrs, targets) if np.array_equal(again, image) else None


def _exchanged(
    kind: Hashable, example: _Example, blocks: Sequence[Block], attrs: Mapping[str, Any]
) -> tuple[NDArray, bool] | None:
    """The bytes of a file that differs from the example by these numbers and attributes, and whether by no others.

    None if the library changed more of an example than its attributes, as where memory runs out.
    """
    said = {**example.attrs, **attrs}
    # a text that keeps its length is written in its place, any other with all attributes after it
    same = kind, *(len(value) for value in said.values() if isinstance(value, str))
    in_place = same in _examples
    nearest = _examples[same] if in_place else example
    with file_images.opened(nearest.image) as opened:
        opened.say(said, nearest.attrs)
    image = opened.content()
    if in_place:
        changed = file_images.changed(said, nearest.attrs)
        room = sum(others + exchanged_numbers.CHECKSUM for others in changed.values())
        if len(image) != len(nearest.image) or np.count_nonzero(image != nearest.image) > room:
            return None
    exchanged_numbers.exchange(image, nearest.targets, blocks)
    if not in_place:
        _keep(_examples, same, _Example(image, said, nearest.targets))
    return image, in_place


def _keep(kept: dict[Hashable, _K], key: Hashable, what: _K) -> _K:
    """`what`, kept from now on, if it is small, in place of the oldest."""
    if what.image.nbytes <= _KEPT_BYTES:
        while len(kept) >= _KEPT:
            del kept[next(iter(kept))]
        kept[key] = what
    return what


def _filled(declared: _Declared, blocks: Sequence[Block], attrs: Mapping[str, Any] | None) -> NDArray:
    """The bytes of a file that holds the numbers, and `attrs` in place of those declared."""
    with file_images.opened(declared.image, growth=sum(block.numbers.nbytes for block in blocks) // 4) as image:
        for _, own in itertools.groupby(blocks, lambda block: block.name):
            image.put(list(own))
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


def _blocks(content: Content, swept: Sequence[Swept]) -> Iterator[Block]:
    """All numbers but blocks of NaN alone, those of one variable one after another."""
    layout, dtype = content.layout, np.dtype(content.dtype)
    death = np.asarray(content.states[netcdf.STATE]["death_epoch"], np.int64)
    yield Block("death_epoch", (slice(0, len(death)),), death)
    members, epochs = slice(0, len(layout.seeds)), slice(0, len(content.epochs))
    for name, value in content.records.items():
        for layer, part in enumerate(value, start=1) if isinstance(value, list) else ((None, value),):
            numbers = np.asarray(part, dtype)
            if not _nothing(numbers):  # what is never written reads as NaN and takes no space
                yield Block(name, netcdf.index(variable_of(name), layout, epochs, layer, members), numbers)
    for each in swept:
        if not isinstance(each.value, str):
            yield Block(each.name, (), np.asarray(each.value))
    for group, state in content.states.items():
        for name, array in state.items():
            yield Block(f"{group}/{name}", [slice(0, size) for size in np.shape(array)], np.asarray(array))


def _nothing(numbers: NDArray) -> bool:
    """Whether all numbers are NaN; most arrays are told by their first one."""
    return not numbers.size or bool(np.isnan(numbers.flat[0]) and np.isnan(numbers).all())
