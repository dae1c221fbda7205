"""Read the directory of tables that ``tsdyn export --to parquet`` writes, as one lazy Dataset.  Imports no torch.

``dataset.json`` says what the Dataset was: its dimensions with their labels, its variables and attributes.  Rows that a
table leaves out are padding.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray as xr
from dask.base import tokenize
from dask.delayed import delayed
from numpy.typing import NDArray

from tsdyn.archive.whole_files import DirectoryError, Identity, identity

DESCRIPTION = "dataset.json"
#: Tables of at most so many rows are read as one chunk; larger ones label by label of their first dimension.
ROWS = 1 << 20
#: Coordinates, which are loaded at once, may have so many places for each of their rows.
PLACES = 1000


def described(ds: xr.Dataset, tables: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What `read` needs beside the tables, as JSON can hold it.

    Args:
        ds: The Dataset.
        tables: Name of a table → its variables.
    """
    return {
        "attributes": _plain(ds.attrs),
        "tables": {name: list(names) for name, names in tables.items()},
        "dimensions": {
            str(dim): {"size": size, "labels": _labels(ds, str(dim)), "attributes": _plain(ds[dim].attrs)}
            for dim, size in ds.sizes.items()
        },
        "variables": {
            str(name): {
                "dimensions": [str(dim) for dim in array.dims],
                "dtype": "str" if array.dtype.kind in "OUS" else array.dtype.str,
                "coordinate": name in ds.coords,
                "attributes": _plain(array.attrs),
            }
            for name, array in ds.variables.items()
            if name not in ds.dims
        },
    }


def _labels(ds: xr.Dataset, dim: str) -> dict[str, Any] | None:
    if dim not in ds.coords:
        return None
    values = ds[dim].values
    return {"dtype": "str" if values.dtype.kind in "OUS" else values.dtype.str, "values": values.tolist()}


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in attrs.items()}


def is_one(path: Path) -> bool:
    """Whether a directory is an export of tables."""
    return (path / DESCRIPTION).is_file() and any(path.glob("*.parquet"))


def read(path: Path) -> xr.Dataset:
    """The tables as a lazy Dataset; coordinates are loaded.

    Raises:
        DirectoryError: if pyarrow is not installed, or the directory is not what `tsdyn export` writes.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DirectoryError(f"{path}: holds Parquet tables; reading them needs pyarrow: pip install 'tsdyn[parquet]'")
    for entry in path.iterdir():
        if entry.is_symlink():
            raise DirectoryError(f"{entry}: is a symbolic link inside an export; files elsewhere are not read")
    try:
        told = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        if "variables" not in told:
            raise DirectoryError(
                f"{path}: an earlier version exported these tables, without what reads them; export again"
            )
        return _dataset(path, told)
    except DirectoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DirectoryError(f"{path}: the tables cannot be read: {error}") from error


def _dataset(path: Path, told: Mapping[str, Any]) -> xr.Dataset:
    coords: dict[str, xr.Variable] = {}
    variables: dict[str, xr.Variable] = {}
    for dim, kept in told["dimensions"].items():
        if kept["labels"] is not None:
            coords[dim] = xr.Variable(dim, _array(kept["labels"]), kept["attributes"])
    labels = {
        dim: coords[dim].values if dim in coords else np.arange(int(kept["size"]))
        for dim, kept in told["dimensions"].items()
    }
    for name, names in told["tables"].items():
        if Path(name).name != name:
            raise DirectoryError(f"{path}: {name!r} is no name of a table")
        table = _Table(path / f"{name}.parquet", {d: labels[d] for d in told["variables"][names[0]]["dimensions"]})
        for variable in names:
            row = told["variables"][variable]
            if row["dimensions"] != list(table.labels):
                raise DirectoryError(f"{path}: {variable} has the dimensions {row['dimensions']}, its table others")
            values = table.loaded(variable, row["dtype"]) if row["coordinate"] else table.lazy(variable, row["dtype"])
            found = xr.Variable(row["dimensions"], values, row["attributes"])
            (coords if row["coordinate"] else variables)[variable] = found
    order = list(told["variables"])
    return xr.Dataset({n: variables[n] for n in order if n in variables}, coords, told["attributes"])


def _array(labels: Mapping[str, Any]) -> NDArray:
    return np.array(labels["values"], dtype=None if labels["dtype"] == "str" else labels["dtype"])


class _Table:
    """One table.

    Args:
        file: Where it is.
        labels: Dimension → labels, in the variables' order.
    """

    def __init__(self, file: Path, labels: Mapping[str, NDArray]) -> None:
        import pyarrow.parquet as pq

        self.file, self.labels = file.absolute(), dict(labels)
        try:
            self.rows = int(pq.read_metadata(self.file).num_rows)
        except Exception as error:  # pyarrow raises errors of its own
            raise DirectoryError(f"{file}: cannot be read: {error}") from error
        self.shape = tuple(len(values) for values in self.labels.values())

    def loaded(self, name: str, dtype: str) -> NDArray:
        """All numbers of a variable."""
        if math.prod(self.shape) > PLACES * (self.rows + 1000):
            raise DirectoryError(f"{self.file}: {name} would have {self.shape} places for {self.rows} rows")
        return _placed(self.file, name, dtype, self.labels)

    def lazy(self, name: str, dtype: str) -> Any:
        """A variable as a dask array."""
        if not self.shape or self.rows <= ROWS:
            steps = [slice(None)]
        else:
            steps = [slice(i, i + 1) for i in range(self.shape[0])]
        now = identity(self.file)
        token = tokenize(self.file, now, name)
        parts = []
        for number, step in enumerate(steps):
            labels = dict(self.labels)
            if labels:
                first = next(iter(labels))
                labels[first] = labels[first][step]
            shape = tuple(len(values) for values in labels.values())
            task = delayed(_unless_replaced)(
                now, self.file, name, dtype, labels, dask_key_name=f"{name}-{token}-{number}"
            )
            parts.append(dask.array.from_delayed(task, shape, np.dtype(dtype), name=f"{name}-{token}-{number}-a"))
        return dask.array.concatenate(parts) if len(parts) > 1 else parts[0]


def _unless_replaced(before: Identity, file: Path, name: str, dtype: str, labels: Mapping[str, NDArray]) -> NDArray:
    """`_placed`, if the table is still the one that was opened.

    Raises:
        DirectoryError: if another has taken its place.
    """
    found = _placed(file, name, dtype, labels)
    if identity(file)[:3] != before[:3]:
        raise DirectoryError(f"{file}: was replaced since it was opened; open it again")
    return found


def _placed(file: Path, name: str, dtype: str, labels: Mapping[str, NDArray]) -> NDArray:
    """The numbers of a variable at some labels; NaN, -1 or the empty text where there is no row."""
    import pyarrow.parquet as pq

    dims = list(labels)
    first = None if not dims else labels[dims[0]]
    one = first is not None and len(first) == 1
    chosen = [(dims[0], "==", first[0].item())] if one and first is not None else None
    table = pq.read_table(file, columns=[*dims, name], filters=chosen)
    texts = dtype == "str"
    values = np.array(table[name].to_pylist(), dtype=str) if texts else table[name].to_numpy().astype(dtype)
    kind = np.dtype(dtype).kind if not texts else "U"
    shape = tuple(len(of) for of in labels.values())
    found = np.full(shape, {"U": "", "f": np.nan}.get(kind, -1), values.dtype if texts else np.dtype(dtype))
    places = []
    for dim in dims:
        column = table[dim].to_pylist() if labels[dim].dtype.kind == "U" else table[dim].to_numpy()
        places.append(xr.Coordinates({dim: labels[dim]}).to_index().get_indexer(column))
    if any(bool((place < 0).any()) for place in places):
        raise DirectoryError(f"{file}: has rows with labels that {DESCRIPTION} beside it does not name")
    if dims:
        found[tuple(places)] = values
        return found
    return found if not len(values) else values[0:1].reshape(())
