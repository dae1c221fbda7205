"""The schema of archives: declared variables, the shapes of a run, validation, and reading of earlier versions.

Variables are declared in `tsdyn.vocabulary` or by `declare`; `validate` refuses a Dataset that differs from the
declarations, and observables register under these names.  Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from tsdyn.vocabulary import (
    COORDINATES,
    DIMENSIONS,
    FAMILIES,
    NODE_WIDTHS,
    PATHS,
    SIZED,
    TOP,
    VARIABLES,
    Kind,
    Path,
    Variable,
    When,
)

if TYPE_CHECKING:  # the command's help needs no xarray
    import xarray as xr

#: Version 1: a finished archive has no training state and no checksum.  Version 2: it has both.
#: Version 3: gradients and Hessians are of the trained loss; before, they were of the squared error in any case.
VERSION = 3


#: Dimensions of declared variables that `tsdyn.Recorder` has sizes for, and experiments do not.
SAMPLED = ("sample", "sample_2", "output")
#: Variables that were declared in this process, by name; see `declare`.
DECLARED: dict[str, Variable] = {}


def declare(
    name: str,
    dims: Sequence[str],
    *,
    units: str,
    long_name: str,
    source: str,
    conditions: str = "",
    deep: bool = False,
    own: bool = False,
) -> Variable:
    """Make a variable of your own known to this process, so that runs record and archives hold it.

    Args:
        name: Name of the variable: an identifier that is not the name of a variable, coordinate or dimension.
        dims: ``seed``, ``epoch``, then ``layer`` if it has one array per layer, then node dimensions of `DIMENSIONS`
            whose sizes a run knows (``node``, ``node_2``, ``teacher_node``, ``teacher_node_2``, ``input_node``,
            ``quantile``, ``mode``, ``top_k``), or ``sample``, ``sample_2`` and ``output``, of which only
            `tsdyn.Recorder` knows the sizes.
        units: Units as in the CF conventions; ``"1"`` for a number without units.
        long_name: One line, fit for an axis label.
        source: Paper and equation, or the package.
        conditions: What NaN means, and over which samples it is measured.
        deep: Whether it can be measured on convolutions and networks with BatchNorm, too.
        own: Whether it can be measured on students that are modules of the user's own.

    Returns:
        The variable.  Declaring the same again changes nothing.

    Raises:
        SchemaError: if the name is taken, or a run has no size for a dimension.

    Example:
        >>> import tsdyn
        >>> entropy = tsdyn.declare(
        ...     "weight_entropy", ("seed", "epoch", "layer", "node"), units="1",
        ...     long_name="entropy of squared weights", source="mylab",
        ... )
        >>> entropy.dims
        ('seed', 'epoch', 'layer', 'node')
    """
    row = Variable(
        name, tuple(dims), units, long_name, source, conditions, kinds=("training",), deep=deep, own=own,
        bare_teacher=not any(dim.startswith("teacher_") for dim in dims),
    )  # fmt: skip
    sized = (*NODE_WIDTHS, "input_node", *SIZED, *SAMPLED)
    inner = row.dims[3:] if row.layered else row.dims[2:]
    if row.dims[:2] != ("seed", "epoch") or "layer" in inner or len(set(row.dims)) != len(row.dims):
        raise SchemaError(f"declare: {name}: dims = {row.dims}; begin with seed, epoch and perhaps layer, each once")
    if unknown := [dim for dim in inner if dim not in sized]:
        raise SchemaError(f"declare: {name}: a run has no size for {', '.join(unknown)}; it has {', '.join(sized)}")
    if not name.isidentifier() or name in {*COORDINATES, *DIMENSIONS, *FAMILIES, *VARIABLES}:
        raise SchemaError(f"declare: {name!r} is taken, or is not an identifier; give another name")
    if missing := [key for key in ("units", "long_name", "source") if not getattr(row, key).strip()]:
        raise SchemaError(f"declare: {name}: {', '.join(missing)} is empty; an archive must say what its numbers are")
    adopt(row)
    return row


def adopt(row: Variable) -> None:
    """Make a variable known to this process that was declared before, perhaps in another one.

    Raises:
        SchemaError: if a different variable of that name is declared already.
    """
    if DECLARED.setdefault(row.name, row) != row:
        raise SchemaError(f"declare: {row.name!r} is declared already, differently: {DECLARED[row.name]}")


def variable(name: str) -> Variable:
    """The schema's variable of that name, or the one that was declared in this process.

    Raises:
        SchemaError: if there is none, with the way to declare it.
    """
    found = VARIABLES.get(name) or DECLARED.get(name)
    if found is None:
        raise SchemaError(f"{name!r} is not a variable of the schema; declare it (tsdyn.declare) before it is recorded")
    return found


@cache
def recordable(*, deep: bool = False, own: bool = False, bare_teacher: bool = False) -> tuple[str, ...]:
    """Variables that a training experiment can record; `observables` registers a measurement for each.

    Args:
        deep: Only those that can be measured on convolutions (a node is a channel) and networks with BatchNorm.
        own: Only those that can be measured on students that are modules of the user's own.
        bare_teacher: Only those that can be measured with a teacher that is a module of the user's own.
    """
    rows = (row for row in VARIABLES.values() if "training" in row.kinds and row.when == "along")
    asked = {"deep": deep, "own": own, "bare_teacher": bare_teacher}
    return tuple(row.name for row in rows if all(getattr(row, of) for of, only in asked.items() if only))


@cache
def _of_kind(kind: Kind) -> tuple[Variable, ...]:
    return tuple(row for row in VARIABLES.values() if kind in row.kinds)


def recorded(kind: Kind, asked: Iterable[str], when: When | None = None) -> tuple[str, ...]:
    """Variables that a run of `kind` records: in training those `asked` for, in other kinds all of that kind.

    Args:
        kind: Kind of the experiment.
        asked: ``record.observables``.
        when: Only variables recorded at this time: along the run, at its start or at its end.
    """
    rows = _of_kind(kind)
    match kind:
        case "training":
            names = (*expand(asked), *(row.name for row in rows if row.when != "along"))
        case "population-flow" | "online":
            names = tuple(row.name for row in rows)
        case other:
            assert_never(other)
    return tuple(name for name in names if when is None or variable(name).when == when)


def printable(text: object) -> str:
    """The text without control characters, since attributes and names may come from a stranger's file."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


@dataclass(frozen=True)
class Layout:
    """The sizes of one run's dimensions: its members, and how wide each layer is.

    Attributes:
        seeds: Labels of the members.
        input_width: Width d of the input.
        widths: Student widths n_1..n_L.
        teacher_widths: Teacher widths m_1..m_L.
        quantiles: Labels of the ``quantile`` dimension.
        modes: Number of Hessian eigenvalues recorded.
        fan_ins: Length of a row of each student weight, if it is not the width of the layer below.
        teacher_fan_ins: The same for the teacher.
        entries, teacher_entries: How many numbers the parameters and buffers of a student or teacher hold that is a
            module of the user's own.
        path: The dimension along which the run is recorded.
        extra: Further dimensions with their sizes, which are the same at every layer.
        layer_names: Names of the layers' modules in a model of the user's own; empty if they have none.
        comments: What this run says of variables in the place of the schema's conditions.
    """

    seeds: tuple[int, ...]
    input_width: int
    widths: tuple[int, ...]
    teacher_widths: tuple[int, ...]
    quantiles: tuple[float, ...] = ()
    modes: int = 0
    fan_ins: tuple[int, ...] = ()
    teacher_fan_ins: tuple[int, ...] = ()
    entries: int = 0
    teacher_entries: int = 0
    path: Path = "epoch"
    extra: tuple[tuple[str, int], ...] = ()
    layer_names: tuple[str, ...] = ()
    comments: tuple[tuple[str, str], ...] = ()

    @property
    def depth(self) -> int:
        """L, the number of layers above the input."""
        return len(self.widths)

    @property
    def input_widths(self) -> tuple[int, ...]:
        """Number of inputs of each of the student's layers 1..L."""
        return self.fan_ins or (self.input_width, *self.widths[:-1])

    @property
    def teacher_input_widths(self) -> tuple[int, ...]:
        """Number of inputs of each of the teacher's layers 1..L."""
        return self.teacher_fan_ins or (self.input_width, *self.teacher_widths[:-1])

    def node_widths(self, variable: Variable, dim: str) -> tuple[int, ...]:
        """Sizes without padding of a dimension of `variable` at layers 1..L; one size if it has no layers."""
        if dim in dict(self.extra) or dim in SIZED:
            return (self.padded(dim),) * (self.depth if variable.layered else 1)
        widths = self._node_widths(variable, dim)
        return widths if variable.layered else widths[:1]

    def _node_widths(self, variable: Variable, dim: str) -> tuple[int, ...]:
        if dim.startswith("teacher_node") and "teacher_layer" in variable.dims:  # of all layers side by side
            return (self.padded(dim),) * self.depth
        if dim == "input_node":
            teacher = variable.name.startswith("teacher_")
            return self.teacher_input_widths if teacher else self.input_widths
        return {"width": self.widths, "teacher_width": self.teacher_widths}[NODE_WIDTHS[dim]]

    def padded(self, dim: str) -> int:
        """Size of a dimension in the Dataset; node dimensions are padded to the widest layer."""
        if dim in dict(self.extra):
            return dict(self.extra)[dim]
        if dim in SIZED:
            sizes = {"quantile": len(self.quantiles), "mode": self.modes, "top_k": min(TOP, self.widths[-1])}
            sizes |= {"entry": self.entries, "teacher_entry": self.teacher_entries}
            return (sizes | {"teacher_layer": sum(m > 0 for m in self.teacher_widths)})[dim]
        if dim == "input_node":
            return max(*self.input_widths, *self.teacher_input_widths)
        return max({"width": self.widths, "teacher_width": self.teacher_widths}[NODE_WIDTHS[dim]])

    def block(self, variable: Variable, layer: int | None) -> tuple[int, ...]:
        """Shape without padding of `variable` for one member and epoch, at `layer` (1..L) if it has layers."""
        inner = [dim for dim in variable.dims if dim not in ("seed", "epoch", "layer")]
        return tuple(self.node_widths(variable, dim)[(layer or 1) - 1] for dim in inner)


def weight_shapes(
    widths: Sequence[int], image: tuple[int, int, int] | None, *, kernel: int = 3, stride: int = 1, padding: int = 0
) -> list[tuple[int, ...]]:
    """Weight shapes of a network of input, hidden ..., output widths; with `image` its hidden layers are convolutions.

    Raises:
        ValueError: if an image becomes smaller than a kernel.
    """
    if image is None:
        return [(nodes, below) for below, nodes in itertools.pairwise(widths)]
    found: list[tuple[int, ...]] = []
    channels, *size = image
    for nodes in widths[1:-1]:
        found.append((nodes, channels, kernel, kernel))
        channels, size = nodes, [(s + 2 * padding - kernel) // stride + 1 for s in size]
        if min(size) < 1:
            raise ValueError(
                f"{len(widths) - 2} convolutions of {kernel} x {kernel} do not fit images of {image[1:]}; use fewer "
                "layers, padding or larger images"
            )
    return [*found, (widths[-1], channels * math.prod(size))]


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Variables named by a list of observables, with families replaced by their variables; in order, once each."""
    variables: dict[str, None] = {}
    for name in names:
        variables.update(dict.fromkeys(FAMILIES.get(name, (name,))))
    return tuple(variables)


def path_of(ds: xr.Dataset | xr.DataArray) -> Path:
    """The dimension along which a run was recorded, from its archive or a slice of it; ``epoch`` if it has none."""
    return next((path for path in PATHS if path in ds.dims or path in ds.coords), "epoch")


def words_of(array: xr.DataArray) -> xr.DataArray:
    """The words that a variable's numbers stand for (CF's flag_meanings); the empty string for NaN.

    Raises:
        ValueError: if the variable has no flag_meanings.
    """
    if "flag_meanings" not in array.attrs:
        raise ValueError(f"words_of: {array.name} has no attribute flag_meanings; its numbers stand for themselves")
    words = np.array([*str(array.attrs["flag_meanings"]).split(), ""])
    codes = array.fillna(len(words) - 1).astype(int)
    attrs = {key: value for key, value in array.attrs.items() if not key.startswith("flag_")}
    return codes.copy(data=words[codes.values]).assign_attrs(attrs)


#: Attribute of an archive: the registered parts of its experiment that other packages offered, as JSON.
PARTS = "parts"
#: Attribute of an archive: declarations of the variables in it that are not the schema's own, as JSON.
DECLARES = "declared_variables"


def declarations(names: Iterable[str]) -> dict[str, str]:
    """The attribute that declares those variables of an archive that are not the schema's own."""
    rows = [asdict(variable(name)) for name in names if name not in VARIABLES]
    return {DECLARES: json.dumps(rows)} if rows else {}


def united(attributes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Attributes about packages' parts and declared variables, merged from several archives; the first one wins."""
    found: dict[str, str] = {}
    parts: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for attrs in attributes:
        with suppress(ValueError, TypeError, AttributeError, KeyError):  # `problems` reports it for the archive itself
            parts = {**json.loads(attrs.get(PARTS, "{}")), **parts}
            rows = {**{row["name"]: row for row in json.loads(attrs.get(DECLARES, "[]"))}, **rows}
    if parts:
        found[PARTS] = json.dumps(parts)
    if rows:
        found[DECLARES] = json.dumps(list(rows.values()))
    return found


def declared_in(ds: xr.Dataset) -> dict[str, Variable]:
    """Variables, by name, that a Dataset's attribute declares beside the schema's own."""
    try:
        rows: list[dict[str, Any]] = json.loads(ds.attrs.get(DECLARES, "[]"))
        lists = ("dims", "kinds", "words")
        found = [Variable(**(row | {k: tuple(row[k]) for k in lists if k in row})) for row in rows]
    except (TypeError, ValueError, AttributeError) as error:
        raise SchemaError(f"attribute {DECLARES} is not what tsdyn writes: {error}") from None
    return {row.name: row for row in found}


def problems(ds: xr.Dataset, *, swept: Iterable[str] = ()) -> list[str]:
    """Sentences that say where `ds` breaks the schema; empty if it obeys it.

    Args:
        ds: Dataset of one run or, with `swept`, of a sweep.
        swept: Names of the dimensions of swept keys; they may lead any variable.
    """
    found = []
    extra = tuple(swept)
    known = {**declared_in(ds), **VARIABLES, **COORDINATES}
    for name, array in ds.variables.items():
        name = str(name)
        if name in extra or (name in DIMENSIONS and array.dims == (name,)):
            continue
        if name not in known and name in ds.coords and array.ndim == 1 and array.dims[0] in extra:
            continue  # a swept key that varies together with others is a coordinate
        if name not in known and name in ds.coords and array.ndim == 0 and "key" in array.attrs:
            continue  # the value of a swept key at the one point of the Dataset
        if name not in known:
            found.append(f"{name}: not a variable of schema {VERSION}")
            continue
        dims = tuple(str(d) for d in array.dims if d not in extra)
        wanted = known[name].along(path_of(ds))
        if dims != wanted:
            found.append(f"{name}: dimensions {dims}, the schema says {wanted}")
        if name not in COORDINATES:
            if array.attrs.get("units") != known[name].units:
                found.append(f"{name}: attribute 'units' is {array.attrs.get('units')!r}, not {known[name].units!r}")
            # texts may differ: an archive keeps those of the version that wrote it
            missing = [key for key in ("long_name", "source") if not array.attrs.get(key)]
            found += [f"{name}: attribute {key!r} is missing" for key in missing]
            if array.dtype.kind != "f":
                found.append(f"{name}: dtype {array.dtype}, the schema says floating point")
    for dim in ds.dims:
        if str(dim) not in DIMENSIONS and str(dim) not in extra:
            found.append(f"dimension {dim}: not a dimension of schema {VERSION}")
    path = path_of(ds)
    for dim in ("seed", path, "layer"):
        if dim not in ds.indexes:
            found.append(f"coordinate {dim}: missing")
        elif not ds.indexes[dim].is_unique:
            found.append(f"coordinate {dim}: labels repeat")
    if path in ds.indexes and not ds.indexes[path].is_monotonic_increasing:
        found.append(f"coordinate {path}: not increasing")
    made_by = "recording" if "recording" in ds.attrs else "experiment"
    for key in (made_by, "digest", "schema_version", "tsdyn_version"):
        if key not in ds.attrs:
            found.append(f"attribute {key}: missing")
    return found


class SchemaError(ValueError):
    """A Dataset or variable does not obey the schema."""


def validate(ds: xr.Dataset, *, swept: Iterable[str] = ()) -> xr.Dataset:
    """`ds` itself, if it obeys the schema.

    Raises:
        SchemaError: naming every difference.
    """
    found = problems(ds, swept=swept)
    if found:
        raise SchemaError("validate: the dataset breaks the schema:\n  " + "\n  ".join(found))
    return ds


#: Version → function from a Dataset of that version to the next.  Every former version has an entry, and an archive in
#: ``tests/data``.
MIGRATIONS: Mapping[int, Callable[[xr.Dataset], xr.Dataset]] = {
    1: lambda ds: ds,  # version 2 changed no variables
    2: lambda ds: ds,  # the same variables; `tsdyn.archive.wrong_numbers` names those that are wrong
}


def migrate(ds: xr.Dataset) -> xr.Dataset:
    """`ds` converted to the present version of the schema; unchanged if it has no version attribute.

    Raises:
        SchemaError: if this tsdyn does not know its version.
    """
    version = ds.attrs.get("schema_version", VERSION)
    if not isinstance(version, (int, np.integer)) or not (version == VERSION or version in MIGRATIONS):
        raise SchemaError(
            f"schema version {version} is not one of {[*MIGRATIONS, VERSION]}; it was written by tsdyn "
            f"{ds.attrs.get('tsdyn_version', 'of another version')}: read it with that one or a later one"
        )
    for step in range(int(version), VERSION):
        ds = MIGRATIONS[step](ds).assign_attrs(schema_version=step + 1)
    return ds
