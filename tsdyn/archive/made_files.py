"""One file of a run, made in memory, written whole and read back.  Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np
from numpy.typing import NDArray

from tsdyn.archive import hdf5, joining, netcdf, stored_numbers
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
                temporary, content.layout, content.epochs, content.records, content.states
            )
        except ArchiveError as error:  # what this process has just written: the file system fails
            raise refused(target, error) from error
        if differing is not None:
            raise ArchiveError(
                f"{target}: {differing} read back differently from what was written, as where memory runs out; "
                "nothing was added to what was committed"
            )
    keys = tuple((each.name, each.key, type(each.value)) for each in swept)
    shape = content.layout, tuple(content.epochs), content.variables, content.dtype, keys
    return Made(shape, attrs, np.asarray(content.states[netcdf.STATE]["death_epoch"]).tolist())


def _made(content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> NDArray:
    """The bytes of the file.

    It is a file of the library's that stays in memory: one of netCDF4's own (``memory=``) does not keep the order of
    its variables, and could not be opened for writing ever after.
    """
    with hdf5.guarded():
        before = hdf5.handles()
        nc = netCDF4.Dataset("in memory", "w", format="NETCDF4", diskless=True, persist=False)
        try:
            _fill(nc, content, attrs, swept)
            nc.sync()
            (file,) = hdf5.handles() - before
            return hdf5.image(file)
        finally:
            nc.close()


def _fill(nc: netCDF4.Dataset, content: Content, attrs: Mapping[str, Any], swept: Sequence[Swept]) -> None:
    layout, epochs = content.layout, content.epochs
    netcdf.create(nc, layout, epochs, content.variables, content.dtype, attrs, swept)
    stored_numbers.put_all(nc["death_epoch"], content.states[netcdf.STATE]["death_epoch"])
    members = slice(0, len(layout.seeds))
    for name, value in content.records.items():
        blocks = enumerate(value, start=1) if isinstance(value, list) else ((None, value),)
        for layer, block in blocks:
            if not np.isnan(block).all():  # what is never written reads as NaN and takes no space
                index = netcdf.index(variable_of(name), layout, slice(0, len(epochs)), layer, members)
                stored_numbers.put(nc[name], index, block)
    for group, held in content.states.items():
        netcdf.write_state(nc, held, group)
