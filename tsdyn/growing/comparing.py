"""What differs between two experiments or archives: keys, labels, variables, and by how much the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tsdyn.archive import reading
from tsdyn.archive.whole_files import local_path
from tsdyn.experiment.experiment import Experiment, flattened

#: So many labels are shown of a dimension.
FEW = 6


@dataclass(frozen=True)
class VariableDifference:
    """How the numbers of one variable differ where both have labels.

    Attributes:
        largest: Largest absolute difference; NaN if no number is in both.
        where: Dimension → label at which it is largest.
        missing: How many numbers only one of the two has.
        equal: Whether all numbers are the same, NaN at the same places.
        dims: Dimensions of the two, where they differ, so that nothing was compared; else empty.
    """

    largest: float
    where: Mapping[str, Any]
    missing: int
    equal: bool
    dims: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What differs between A and B.

    Attributes:
        keys: Key of the experiment → its values, None where it is not set.
        labels: Dimension → labels that only A has, and only B.
        variables: Variables that only A has, and only B.
        numbers: Variable that both have → how its numbers differ; empty if one of the two is only an experiment.
    """

    keys: Mapping[str, tuple[Any, Any]]
    labels: Mapping[str, tuple[list[Any], list[Any]]]
    variables: tuple[list[str], list[str]]
    numbers: Mapping[str, VariableDifference]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.keys or self.labels or any(self.variables)) and all(n.equal for n in self.numbers.values())

    def lines(self) -> list[str]:
        """The differences in words."""
        told = [f"{key}: {a!r} in A, {b!r} in B" for key, (a, b) in self.keys.items()]
        for dim, (a, b) in self.labels.items():
            told += [f"{dim}: {_few(own)} only in {who}" for who, own in (("A", a), ("B", b)) if own]
        told += [
            f"variables only in {who}: {', '.join(names)}"
            for who, names in zip("AB", self.variables, strict=True)
            if names
        ]
        for name, found in self.numbers.items():
            if found.dims:
                told.append(f"{name}: dimensions {found.dims[0]} in A, {found.dims[1]} in B")
            elif not found.equal:
                at = ", ".join(f"{dim} {label}" for dim, label in found.where.items())
                largest = f"largest difference {found.largest:.3g}" + (f" at {at}" if at else "")
                lost = f"{found.missing} numbers in one only" if found.missing else ""
                told.append(f"{name}: " + "; ".join(filter(None, [largest if found.where or not lost else "", lost])))
        equal = [name for name, found in self.numbers.items() if found.equal]
        return told + ([f"equal where both have labels: {', '.join(equal)}"] if equal else [])


def compare(a: str | Path | xr.Dataset | Experiment, b: str | Path | xr.Dataset | Experiment) -> Comparison:
    """What differs between two experiments or archives; numbers are compared by label, block by block.

    Args:
        a, b: Directories, experiment files, Datasets or experiments.

    Raises:
        ArchiveError, ExperimentError: if one cannot be read.
    """
    (mine, first), (theirs, second) = _read(a), _read(b)
    keys = {}
    if mine is not None and theirs is not None:
        left, right = (dict(flattened(one.as_dict())) for one in (mine, theirs))
        keys = {
            key: (left.get(key), right.get(key))
            for key in dict.fromkeys([*left, *right])
            if left.get(key) != right.get(key)
        }
    if first is None or second is None:
        return Comparison(keys, {}, ([], []), {})
    labels = {}
    for dim in dict.fromkeys(map(str, [*first.indexes, *second.indexes])):
        own = [ds.indexes[dim].tolist() if dim in ds.indexes else [] for ds in (first, second)]
        only = tuple([label for label in own[i] if label not in set(own[1 - i])] for i in (0, 1))
        if any(only):
            labels[dim] = only[0], only[1]
    names = [[str(name) for name in ds.data_vars] for ds in (first, second)]
    only_a, only_b = ([name for name in names[i] if name not in names[1 - i]] for i in (0, 1))
    numbers = {name: _numbers(first[name], second[name]) for name in names[0] if name in names[1]}
    return Comparison(keys, labels, (only_a, only_b), numbers)


def _read(one: str | Path | xr.Dataset | Experiment) -> tuple[Experiment | None, xr.Dataset | None]:
    """The experiment and the archive; None for what it does not have."""
    if isinstance(one, Experiment):
        return one, None
    if not isinstance(one, xr.Dataset):
        path = local_path(one)
        if path.suffix == ".toml":
            return Experiment.from_toml(path, archived=True), None
        one = reading.open(path)
    text = one.attrs.get("experiment")
    return None if text is None else Experiment.from_toml_text(str(text), archived=True), one


def _numbers(a: xr.DataArray, b: xr.DataArray) -> VariableDifference:
    if set(a.dims) != set(b.dims):
        own = tuple(tuple(map(str, array.dims)) for array in (a, b))
        return VariableDifference(np.nan, {}, 0, False, own)
    a, b = xr.align(a.reset_coords(drop=True), b.reset_coords(drop=True), join="inner", copy=False)
    b = b.transpose(*a.dims)
    if a.dtype.kind not in "fiu" or b.dtype.kind not in "fiu":
        equal = bool((a == b).all())
        return VariableDifference(np.nan, {}, 0 if equal else a.size, equal)
    if not a.size:
        return VariableDifference(np.nan, {}, 0, True)
    gap = abs(a.astype(np.float64) - b.astype(np.float64))
    gap = gap.where(a != b, 0.0).where(a.notnull() & b.notnull())  # equal infinities differ by nothing
    flat = gap.fillna(-1.0).data.reshape(-1)
    asked = {"place": ((), flat.argmax()), "largest": ((), flat.max()), "missing": (a.isnull() != b.isnull()).sum()}
    found = xr.Dataset(asked).compute()  # in one visit
    place, largest, missing = (found[name].item() for name in asked)
    if largest < 0:
        return VariableDifference(np.nan, {}, missing, not missing)
    at = np.unravel_index(place, gap.shape) if gap.ndim else ()
    where = {str(dim): _label(gap, str(dim), int(i)) for dim, i in zip(gap.dims, at, strict=True)} if largest else {}
    return VariableDifference(largest, where, missing, largest == 0 and not missing)


def _label(array: xr.DataArray, dim: str, position: int) -> Any:
    return array.indexes[dim].tolist()[position] if dim in array.indexes else position


def _few(labels: list[Any]) -> str:
    if len(labels) > FEW:
        return f"{', '.join(map(str, labels[: FEW - 1]))}, ... {labels[-1]} ({len(labels)})"
    return ", ".join(map(str, labels))
