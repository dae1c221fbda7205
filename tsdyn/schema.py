"""The archive's alphabet: every dimension, coordinate and variable, declared once.

What is declared here is law: `validate` refuses a Dataset that differs, observables register under these
names, and the reference table of the documentation is printed from `VARIABLES`.  Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

#: 1: no state in a finished archive, no checksum beside it.  2: both.
#: 3: gradients and Hessians are those of the loss that was trained; before, of the squared error whatever was trained.
VERSION = 3

DIMENSIONS: Mapping[str, str] = {
    "seed": "member of the ensemble; names every random draw of that member",
    "epoch": "epochs of training done; 0 is before training",
    "layer": "1..L; L is the output layer",
    "node": "student node, padded to the widest layer",
    "node_2": "second student node of a pair",
    "teacher_node": "teacher node, padded to the widest layer",
    "teacher_node_2": "second teacher node of a pair",
    "input_node": "node of the layer below (layer 1: the input); of a convolution (channel, row, column) of its kernel",
    "output": "node of the output layer",
    "sample": "sample of a data set",
    "mode": "eigenvalue, largest first",
    "quantile": "quantile over samples",
    "top_k": "how many of the largest outputs count",
    "entry": "number in the parameters and buffers of a student that is a module of the user's own, one after another",
    "teacher_entry": "the same of a teacher",
}

TIAN = "Tian 2020 (PMLR 119:9470)"
LUCK = "Tian et al. 2019 (arXiv:1905.13405)"
SAAD = "Saad & Solla 1995; Goldt et al. 2019 (arXiv:1906.08632)"


@dataclass(frozen=True)
class Variable:
    """One variable of the archive.

    Attributes:
        name: Name in the Dataset.
        dims: Dimensions in order, without those of swept keys, which come first.
        units: ``1`` for dimensionless.
        long_name: One line, as an axis label would say it.
        source: Paper and equation.
        conditions: What NaN means and over which set it is measured.
    """

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    source: str
    conditions: str = ""

    @property
    def layered(self) -> bool:
        """Whether the variable has one block a layer."""
        return "layer" in self.dims

    @property
    def attrs(self) -> dict[str, str]:
        """netCDF attributes; only strings."""
        attrs = {"units": self.units, "long_name": self.long_name, "source": self.source}
        return attrs | ({"comment": self.conditions} if self.conditions else {})


def _table(*rows: Variable) -> dict[str, Variable]:
    return {row.name: row for row in rows}


_MEMBER = ("seed", "epoch")
_LAYER = (*_MEMBER, "layer")
_NODE = (*_LAYER, "node")
_MIXED = (*_LAYER, "node", "teacher_node")
_PAIR = (*_LAYER, "node", "node_2")
_HIDDEN = "hidden layers; NaN at the output layer"
_MOMENT = f"over the evaluation set; without the constant node; {_HIDDEN}"
_LOSS = "J = ½ E‖f* − f‖², or E[−log softmax(f)_class]: training.loss and the attribute conventions say which"
_NORM = f"{LUCK}, section 3"
_NORM_AT = f"layers with BatchNorm; {_HIDDEN}"

VARIABLES: Mapping[str, Variable] = _table(
    Variable("loss_train", _MEMBER, "1", "training loss", f"{TIAN}, Eq. 1", _LOSS),
    Variable("loss_eval", _MEMBER, "1", "evaluation loss", f"{TIAN}, Eq. 1", _LOSS),
    Variable("mse_train", _MEMBER, "1", "training mean squared error per output", f"{TIAN}, released code"),
    Variable("mse_eval", _MEMBER, "1", "evaluation mean squared error per output", f"{TIAN}, released code"),
    Variable("weight", (*_NODE, "input_node"), "1", "student weight", f"{TIAN}, section 3"),
    Variable("bias", _NODE, "1", "student bias", f"{TIAN}, section 3", "0 where the student has no bias"),
    Variable(
        "teacher_weight",
        ("seed", "layer", "teacher_node", "input_node"),
        "1",
        "teacher weight",
        f"{TIAN}, section 3",
    ),
    Variable("teacher_bias", ("seed", "layer", "teacher_node"), "1", "teacher bias", f"{TIAN}, section 3"),
    Variable(
        "correlation",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "correlation of teacher and student activations",
        f"{TIAN}, Eq. 9, centred as in {LUCK}",
        f"over the evaluation set, signed; NaN for a node whose activation is constant; {_HIDDEN}",
    ),
    Variable(
        "fanout_norm",
        _NODE,
        "1",
        "student fan-out norm √E β_kk",
        f"{TIAN}, Definition 2",
        f"over the evaluation set; ‖v_k‖ in a two-layer network; {_HIDDEN}",
    ),
    Variable(
        "teacher_fanout_norm",
        (*_LAYER, "teacher_node"),
        "1",
        "teacher fan-out norm √E β*_jj",
        f"{TIAN}, Definition 2",
        f"over the evaluation set; ‖v*_j‖ in a two-layer network; {_HIDDEN}",
    ),
    Variable("A", _MIXED, "1", "E[α_kj] = E[v_k · v*_j]", f"{TIAN}, Definition 2", _MOMENT),
    Variable("B", _PAIR, "1", "E[β_kk'] = E[v_k · v_k']", f"{TIAN}, Definition 2", _MOMENT),
    Variable("H_star", _MIXED, "1", "H* = β* ∘ D*", f"{LUCK}, section 4", _MOMENT),
    Variable("H", _PAIR, "1", "H = β ∘ D", f"{LUCK}, section 4", _MOMENT),
    Variable("D_star", _MIXED, "1", "D* = E[f' f*']", f"{LUCK}, section 4", _MOMENT),
    Variable("D", _PAIR, "1", "D = E[f' f']", f"{LUCK}, section 4", _MOMENT),
    Variable("L_star", _MIXED, "1", "L* = E[f f*ᵀ]", f"{LUCK}, section 4", _MOMENT),
    Variable("L", _PAIR, "1", "L = E[f fᵀ]", f"{LUCK}, section 4", _MOMENT),
    Variable(
        "gradient_rms",
        _NODE,
        "1",
        "root mean square of the backpropagated gradient g_l(x)",
        f"{TIAN}, Eq. 1",
        "over the training set; g is the negative gradient at the pre-activation",
    ),
    Variable(
        "gradient_max",
        _NODE,
        "1",
        "largest |g_l(x)|",
        f"{TIAN}, Theorem 1",
        "over the training set; g is the negative gradient at the pre-activation",
    ),
    Variable(
        "gradient_norm",
        (*_MEMBER, "quantile"),
        "1",
        "norm of the per-sample parameter gradient",
        f"{TIAN}, Assumption 2",
        "quantiles over the training set of ‖∂J_x/∂θ‖ over all parameters; quantile 1 is the largest",
    ),
    Variable(
        "observation",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "share of a teacher's boundary samples inside the student's active region",
        f"{TIAN}, Definition 4 (finite sample: κ of Theorem 3)",
        "over the training set; boundary: pre-activation within record.band of its standard deviation; "
        f"NaN without boundary samples; {_HIDDEN}",
    ),
    Variable(
        "observation_count",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "samples on the rarer side of a teacher's boundary inside the student's active region",
        f"{TIAN}, released code",
        f"over the training set; {_HIDDEN}",
    ),
    Variable(
        "alignment",
        (*_MEMBER, "teacher_node", "node"),
        "1",
        "ε of ε-alignment, lowest layer",
        f"{TIAN}, Definition 3 (orientation-safe)",
        "max of sin ∠(w*_j, w_k) and |b*_j ∓ b_k|, weights scaled to norm 1; NaN for a zero weight",
    ),
    Variable(
        "accuracy",
        (*_MEMBER, "top_k"),
        "1",
        "share of samples with the teacher's class among the k largest outputs",
        f"{TIAN}, section 6",
        "over the evaluation set; the teacher's class is its largest output",
    ),
    Variable(
        "label_accuracy",
        (*_MEMBER, "top_k"),
        "1",
        "share of samples with their label among the k largest outputs",
        f"{TIAN}, section 6",
        "over the evaluation set; the data's own labels",
    ),
    Variable("norm_scale", _NODE, "1", "BatchNorm scale", _NORM, _NORM_AT),
    Variable("norm_shift", _NODE, "1", "BatchNorm shift (bias)", _NORM, _NORM_AT),
    Variable("norm_mean", _NODE, "1", "BatchNorm running mean", _NORM, _NORM_AT),
    Variable("norm_variance", _NODE, "1", "BatchNorm running variance", _NORM, _NORM_AT),
    Variable(
        "conserved_norm",
        _NODE,
        "1",
        "norm of a node's incoming weight and bias",
        f"{LUCK}, Theorem 3",
        "gradient flow conserves it below BatchNorm; ‖w‖ where BatchNorm precedes the activation, else ‖[w; b]‖; "
        f"{_HIDDEN}",
    ),
    Variable(
        "lemma1_residual",
        _MEMBER,
        "1",
        "relative residual of Lemma 1",
        f"{TIAN}, Lemma 1",
        "over the evaluation set; largest error over layers, samples and nodes, relative to the largest term",
    ),
    Variable(
        "parameter",
        (*_MEMBER, "entry"),
        "1",
        "parameters and buffers of a module of the user's own",
        "tsdyn",
        "all of them one after another; the attribute parameters of the Dataset has the name and shape of each",
    ),
    Variable(
        "teacher_parameter",
        ("seed", "teacher_entry"),
        "1",
        "parameters and buffers of a teacher that is a module of the user's own",
        "tsdyn",
        "all of them one after another",
    ),
    Variable("Q", (*_MEMBER, "node", "node_2"), "1", "order parameter w_i · w_k / N", SAAD),
    Variable("R", (*_MEMBER, "node", "teacher_node"), "1", "order parameter w_i · B_m / N", SAAD),
    Variable("T", (*_MEMBER, "teacher_node", "teacher_node_2"), "1", "order parameter B_n · B_m / N", SAAD),
    Variable(
        "hessian_eigenvalue",
        (*_MEMBER, "mode"),
        "1",
        "eigenvalue of the Hessian of J",
        "definition",
        "of the training loss in all parameters; the algebraically largest",
    ),
)

COORDINATES: Mapping[str, Variable] = _table(
    Variable("width", ("layer",), "1", "nodes of the student layer", "tsdyn"),
    Variable("teacher_width", ("layer",), "1", "nodes of the teacher layer", "tsdyn"),
    Variable("input_width", ("layer",), "1", "nodes of the layer below the student layer", "tsdyn"),
    Variable("teacher_input_width", ("layer",), "1", "nodes of the layer below the teacher layer", "tsdyn"),
    Variable(
        "death_epoch",
        ("seed",),
        "1",
        "first epoch at whose end the member was NaN or infinite",
        "tsdyn",
        "−1: alive to the end",
    ),
    Variable(
        "coverage",
        (),
        "1",
        "share of a point's recorded epochs that are committed",
        "tsdyn",
        "of a sweep; 0: nothing yet, all NaN",
    ),
)

#: Dimensions whose sizes the record decides, not the networks.
SIZED = ("quantile", "mode", "top_k", "entry", "teacher_entry")
#: Most outputs that `accuracy` counts.
TOP = 5

#: Size of each node dimension at one layer: the coordinate that says where the layer ends.
NODE_WIDTHS: Mapping[str, str] = {
    "node": "width",
    "node_2": "width",
    "teacher_node": "teacher_width",
    "teacher_node_2": "teacher_width",
}

#: What one word in ``record.observables`` asks for, where it is more than the variable of that name.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss_train", "loss_eval"),
    "mse": ("mse_train", "mse_eval"),
    "weight": ("weight", "bias"),
    "fanout_norm": ("fanout_norm", "teacher_fanout_norm"),
    "observation": ("observation", "observation_count"),
    "batch_norm": ("norm_scale", "norm_shift", "norm_mean", "norm_variance"),
    "moments": ("A", "B", "H", "H_star", "D", "D_star", "L", "L_star"),
}

#: Stored once a seed: weights and biases of the teacher, or the parameters of one that is a user's own module.
CONSTANTS = ("teacher_weight", "teacher_bias", "teacher_parameter")


#: Variables that an experiment file can ask for; `observables` registers a measurement for each of these.
RECORDABLE = (
    "loss_train",
    "loss_eval",
    "mse_train",
    "mse_eval",
    "weight",
    "bias",
    "correlation",
    "fanout_norm",
    "teacher_fanout_norm",
    "gradient_rms",
    "gradient_max",
    "observation",
    "observation_count",
    "A",
    "B",
    "H",
    "H_star",
    "D",
    "D_star",
    "L",
    "L_star",
    "accuracy",
    "label_accuracy",
    "norm_scale",
    "norm_shift",
    "norm_mean",
    "norm_variance",
    "conserved_norm",
    "lemma1_residual",
    "alignment",
    "gradient_norm",
    "hessian_eigenvalue",
    "parameter",
)

#: Those of them that are measured of students that are modules of the user's own ...
OWN = ("loss_train", "loss_eval", "mse_train", "mse_eval", "accuracy", "label_accuracy", "parameter")
#: ... and those that need the layers of a teacher.
OF_TEACHERS_LAYERS = (
    "correlation",
    "teacher_fanout_norm",
    "observation",
    "observation_count",
    "alignment",
    "lemma1_residual",
    "A",
    "B",
    "H",
    "H_star",
    "D",
    "D_star",
    "L",
    "L_star",
)


#: Those of them that are measured of convolutions (a node is a channel) and of networks with BatchNorm.
DEEP = (
    "loss_train",
    "loss_eval",
    "mse_train",
    "mse_eval",
    "weight",
    "bias",
    "correlation",
    "fanout_norm",
    "teacher_fanout_norm",
    "accuracy",
    "label_accuracy",
    "norm_scale",
    "norm_shift",
    "norm_mean",
    "norm_variance",
    "conserved_norm",
    *FAMILIES["moments"],
)


def printable(text: object) -> str:
    """Without control characters: attributes and names may come from anybody's file."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


@dataclass(frozen=True)
class Layout:
    """The shape of one run: who its members are and how wide each layer is.

    Attributes:
        seeds: Labels of the members.
        input_width: Width d of the input.
        widths: Student widths n_1..n_L.
        teacher_widths: Teacher widths m_1..m_L.
        quantiles: Labels of the ``quantile`` dimension.
        modes: Hessian eigenvalues recorded.
        fan_ins: Numbers in a row of each student weight, where that is not the width of the layer below.
        teacher_fan_ins: Likewise of the teacher.
        entries, teacher_entries: Numbers of a student's or teacher's parameters and buffers, if it is an own module.
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

    @property
    def depth(self) -> int:
        """L, the number of layers above the input."""
        return len(self.widths)

    @property
    def input_widths(self) -> tuple[int, ...]:
        return self.fan_ins or (self.input_width, *self.widths[:-1])

    @property
    def teacher_input_widths(self) -> tuple[int, ...]:
        return self.teacher_fan_ins or (self.input_width, *self.teacher_widths[:-1])

    def node_widths(self, variable: Variable, dim: str) -> tuple[int, ...]:
        """True sizes of a dimension at layers 1..L, for `variable`; without layers, at the lowest, or the one size."""
        if dim in SIZED:
            return (self.padded(dim),)
        widths = self._node_widths(variable, dim)
        return widths if variable.layered else widths[:1]

    def _node_widths(self, variable: Variable, dim: str) -> tuple[int, ...]:
        if dim == "input_node":
            teacher = variable.name.startswith("teacher_")
            return self.teacher_input_widths if teacher else self.input_widths
        return self.teacher_widths if dim.startswith("teacher_") else self.widths

    def padded(self, dim: str) -> int:
        """Size of a dimension in the Dataset; of node dimensions, that of the widest layer."""
        if dim in SIZED:
            sizes = {"quantile": len(self.quantiles), "mode": self.modes, "top_k": min(TOP, self.widths[-1])}
            return (sizes | {"entry": self.entries, "teacher_entry": self.teacher_entries})[dim]
        if dim == "input_node":
            return max(*self.input_widths, *self.teacher_input_widths)
        return max(self.teacher_widths if dim.startswith("teacher_") else self.widths)

    def block(self, variable: Variable, layer: int | None) -> tuple[int, ...]:
        """True sizes of what `variable` holds of one member and epoch, at `layer` (1..L) if it has layers."""
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
    """Variables asked for by a list of observables, families spelled out, in order and once each."""
    variables: dict[str, None] = {}
    for name in names:
        variables.update(dict.fromkeys(FAMILIES.get(name, (name,))))
    return tuple(variables)


def problems(ds: xr.Dataset, *, swept: Iterable[str] = ()) -> list[str]:
    """What in `ds` breaks the schema, one sentence each; empty if nothing does.

    Args:
        ds: Dataset of one run or, with `swept`, of a sweep.
        swept: Names of the dimensions of swept keys; they may lead any variable.
    """
    found = []
    extra = tuple(swept)
    known = {**VARIABLES, **COORDINATES}
    for name, array in ds.variables.items():
        name = str(name)
        if name in extra or (name in DIMENSIONS and array.dims == (name,)):
            continue
        if name not in known and name in ds.coords and array.ndim == 1 and array.dims[0] in extra:
            continue  # a swept key that varies along a dimension with others
        if name not in known:
            found.append(f"{name}: not a variable of schema {VERSION}")
            continue
        dims = tuple(str(d) for d in array.dims if d not in extra)
        if dims != known[name].dims:
            found.append(f"{name}: dimensions {dims}, the schema says {known[name].dims}")
        if name in VARIABLES:
            if array.attrs.get("units") != known[name].units:
                found.append(f"{name}: attribute 'units' is {array.attrs.get('units')!r}, not {known[name].units!r}")
            # an archive keeps the words of its day
            missing = [key for key in ("long_name", "source") if not array.attrs.get(key)]
            found += [f"{name}: attribute {key!r} is missing" for key in missing]
            if array.dtype.kind != "f":
                found.append(f"{name}: dtype {array.dtype}, the schema says floating point")
    for dim in ds.dims:
        if str(dim) not in DIMENSIONS and str(dim) not in extra:
            found.append(f"dimension {dim}: not a dimension of schema {VERSION}")
    for dim in ("seed", "epoch", "layer"):
        if dim not in ds.indexes:
            found.append(f"coordinate {dim}: missing")
        elif not ds.indexes[dim].is_unique:
            found.append(f"coordinate {dim}: labels repeat")
    if "epoch" in ds.indexes and not ds.indexes["epoch"].is_monotonic_increasing:
        found.append("coordinate epoch: not increasing")
    for key in ("experiment", "digest", "schema_version", "tsdyn_version"):
        if key not in ds.attrs:
            found.append(f"attribute {key}: missing")
    return found


class SchemaError(ValueError):
    """A Dataset that is not of the schema."""


def validate(ds: xr.Dataset, *, swept: Iterable[str] = ()) -> xr.Dataset:
    """`ds` itself, if it obeys the schema.

    Raises:
        SchemaError: naming every difference.
    """
    found = problems(ds, swept=swept)
    if found:
        raise SchemaError("validate: the dataset breaks the schema:\n  " + "\n  ".join(found))
    return ds


#: Version → what makes a Dataset of it one of the next.  Every version that ever was has an entry, and an archive of
#: it in ``tests/data``.
MIGRATIONS: Mapping[int, Callable[[xr.Dataset], xr.Dataset]] = {
    1: lambda ds: ds,  # what version 2 added is beside the variables
    2: lambda ds: ds,  # the same variables; which of them are wrong, `tsdyn.wrong_numbers` says
}


def migrate(ds: xr.Dataset) -> xr.Dataset:
    """`ds` as the present version of the schema has it; itself if it says no version.

    Raises:
        SchemaError: if its version is not known to this tsdyn.
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
