"""The names in archives: every dimension, coordinate and variable, declared once.  Imports no torch.

The reference table of the documentation is printed from `VARIABLES`; `tsdyn.schema` checks Datasets against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# isort: off
# names of the vocabulary, too
from tsdyn.dimensions import DIMENSIONS as DIMENSIONS, PATHS as PATHS, REAL_LABELS as REAL_LABELS, WALL as WALL
from tsdyn.dimensions import Kind as Kind, Label as Label, Path as Path, When as When
# isort: on

TIAN = "Tian 2020 (PMLR 119:9470)"
LUCK = "Tian et al. 2019 (arXiv:1905.13405)"
DU = "Du, Hu & Lee 2018 (arXiv:1806.00900), Theorem 2.1"
SIMSEK = "Simsek et al. 2023 (arXiv:2311.01644)"
SAAD = "Saad & Solla 1995; Goldt et al. 2019 (arXiv:1906.08632)"


@dataclass(frozen=True)
class Variable:
    """One variable of the archive.

    Attributes:
        name: Name in the Dataset.
        dims: Dimensions in order, without those of swept keys, which come first.
        units: ``1`` for dimensionless.
        long_name: One line, fit for an axis label.
        source: Paper and equation.
        conditions: What NaN means, and over which samples it is measured.
        kinds: Kinds of experiments whose runs record it; training runs only if the experiment asks for it.
        deep: Whether it can be measured on convolutions and networks with BatchNorm, too ...
        own: ... on students that are modules of the user's own ...
        bare_teacher: ... and with teachers that are modules of the user's own.
        when: Recorded ``along`` the run, once at its ``start`` or once at its ``end``.
        words: What the numbers 0, 1, ... stand for.
    """

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    source: str
    conditions: str = ""
    kinds: tuple[Kind, ...] = ()
    deep: bool = False
    own: bool = False
    bare_teacher: bool = True
    when: When = "along"
    words: tuple[str, ...] = ()

    def along(self, path: Path) -> tuple[str, ...]:
        """Its dimensions in a file of a run that is recorded along `path`."""
        return tuple(path if dim == "epoch" else dim for dim in self.dims)

    @property
    def layered(self) -> bool:
        """Whether the variable has one array per layer."""
        return "layer" in self.dims

    @property
    def attrs(self) -> dict[str, Any]:
        """Its netCDF attributes; for numbers that stand for words, CF's flag_values and flag_meanings too."""
        attrs: dict[str, Any] = {"units": self.units, "long_name": self.long_name, "source": self.source}
        if self.words:
            attrs |= {"flag_values": [float(i) for i in range(len(self.words))], "flag_meanings": " ".join(self.words)}
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

_TRAINED: tuple[Kind, ...] = ("training",)
_FLOW: tuple[Kind, ...] = ("population-flow",)
_FLOWN: tuple[Kind, ...] = ("training", "population-flow")
_ONLINE: tuple[Kind, ...] = ("online",)
_EQUATION = "from the same start as the simulation"
_GONE = "NaN beyond the time at which the flow stopped"
_END = "after Newton's method where the flow arrived, else where it stopped"
_ODD = "NaN where it is not known: n >= k and activations that are not odd"

STOP_REASONS = ("time", "gradient", "singular", "steps", "not-finite")
#: Kinds of stationary points, then reasons why a flow stopped elsewhere.
END_KINDS = ("minimum", "saddle", "degenerate", "not-stationary", "time", "singular", "steps", "not-finite")
END_CLASSES = ("copy-average", "perturbed-copy", "other")
END_GROUNDS = (
    "groups", "copies", "no-part", "wrong-sign", "pointing-away", "owning-nothing", "uneven", "groups-and-shared"
)  # fmt: skip


def _online(name: str, dims: tuple[str, ...], text: str, conditions: str = "", when: When = "along") -> Variable:
    return Variable(name, dims, "1", text, SAAD, conditions, _ONLINE, when=when)


def _moment(name: str, dims: tuple[str, ...], text: str, source: str, *, own: bool = False) -> Variable:
    return Variable(name, dims, "1", text, source, _MOMENT, _TRAINED, deep=True, own=own, bare_teacher=own)


def _flow(
    name: str,
    text: str,
    section: str = "",
    conditions: str = _END,
    *,
    dims: tuple[str, ...] = ("seed",),
    when: When = "end",
    words: tuple[str, ...] = (),
) -> Variable:
    source = f"{SIMSEK}, {section}" if section else SIMSEK
    return Variable(name, dims, "1", text, source, conditions, _FLOW, when=when, words=words)


VARIABLES: Mapping[str, Variable] = _table(
    Variable("loss_train", _MEMBER, "1", "training loss", f"{TIAN}, Eq. 1", _LOSS, kinds=_TRAINED, deep=True, own=True),
    Variable(
        "loss_eval", _MEMBER, "1", "evaluation loss", f"{TIAN}, Eq. 1", _LOSS, kinds=_TRAINED, deep=True, own=True
    ),
    Variable(
        "mse_train",
        _MEMBER,
        "1",
        "training mean squared error per output",
        f"{TIAN}, released code",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "mse_eval",
        _MEMBER,
        "1",
        "evaluation mean squared error per output",
        f"{TIAN}, released code",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "weight", (*_NODE, "input_node"), "1", "student weight", f"{TIAN}, section 3", kinds=_FLOWN, deep=True, own=True
    ),
    Variable(
        "bias",
        _NODE,
        "1",
        "student bias",
        f"{TIAN}, section 3",
        "0 where the student has no bias",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "teacher_weight",
        ("seed", "layer", "teacher_node", "input_node"),
        "1",
        "teacher weight",
        f"{TIAN}, section 3",
        kinds=_FLOWN,
        when="start",
    ),
    Variable(
        "teacher_bias",
        ("seed", "layer", "teacher_node"),
        "1",
        "teacher bias",
        f"{TIAN}, section 3",
        kinds=_TRAINED,
        when="start",
    ),
    Variable(
        "correlation",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "correlation of teacher and student activations",
        f"{TIAN}, Eq. 9, centred as in {LUCK}",
        f"over the evaluation set, signed; NaN for a node whose activation is constant; {_HIDDEN}",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "fanout_norm",
        _NODE,
        "1",
        "student fan-out norm √E β_kk",
        f"{TIAN}, Definition 2",
        f"over the evaluation set; ‖v_k‖ in a two-layer network; {_HIDDEN}",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "teacher_fanout_norm",
        (*_LAYER, "teacher_node"),
        "1",
        "teacher fan-out norm √E β*_jj",
        f"{TIAN}, Definition 2",
        f"over the evaluation set; ‖v*_j‖ in a two-layer network; {_HIDDEN}",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    _moment("A", _MIXED, "E[α_kj] = E[v_k · v*_j]", f"{TIAN}, Definition 2", own=True),
    _moment("B", _PAIR, "E[β_kk'] = E[v_k · v_k']", f"{TIAN}, Definition 2", own=True),
    _moment("H_star", _MIXED, "H* = β* ∘ D*", f"{LUCK}, section 4", own=True),
    _moment("H", _PAIR, "H = β ∘ D", f"{LUCK}, section 4", own=True),
    _moment("D_star", _MIXED, "D* = E[f' f*']", f"{LUCK}, section 4", own=True),
    _moment("D", _PAIR, "D = E[f' f']", f"{LUCK}, section 4", own=True),
    _moment("L_star", _MIXED, "L* = E[f f*ᵀ]", f"{LUCK}, section 4", own=True),
    _moment("L", _PAIR, "L = E[f fᵀ]", f"{LUCK}, section 4", own=True),
    Variable(
        "gradient_rms",
        _NODE,
        "1",
        "root mean square of the backpropagated gradient g_l(x)",
        f"{TIAN}, Eq. 1",
        "over the training set; g is the negative gradient at the pre-activation",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "gradient_max",
        _NODE,
        "1",
        "largest |g_l(x)|",
        f"{TIAN}, Theorem 1",
        "over the training set; g is the negative gradient at the pre-activation",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "gradient_norm",
        (*_MEMBER, "quantile"),
        "1",
        "norm of the per-sample parameter gradient",
        f"{TIAN}, Assumption 2",
        "quantiles over the training set of ‖∂J_x/∂θ‖ over all parameters; quantile 1 is the largest",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "observation",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "share of a teacher's boundary samples inside the student's active region",
        f"{TIAN}, Definition 4 (finite sample: κ of Theorem 3)",
        "over the training set; boundary: pre-activation within record.band of its standard deviation; "
        f"NaN without boundary samples; {_HIDDEN}",
        kinds=_TRAINED,
        bare_teacher=False,
    ),
    Variable(
        "observation_count",
        (*_LAYER, "teacher_node", "node"),
        "1",
        "samples on the rarer side of a teacher's boundary inside the student's active region",
        f"{TIAN}, released code",
        f"over the training set; {_HIDDEN}",
        kinds=_TRAINED,
        bare_teacher=False,
    ),
    Variable(
        "alignment",
        (*_MEMBER, "teacher_node", "node"),
        "1",
        "ε of ε-alignment, lowest layer",
        f"{TIAN}, Definition 3 (orientation-safe)",
        "max of sin ∠(w*_j, w_k) and |b*_j ∓ b_k|, weights scaled to norm 1; NaN for a zero weight",
        kinds=_TRAINED,
        bare_teacher=False,
    ),
    Variable(
        "accuracy",
        (*_MEMBER, "top_k"),
        "1",
        "share of samples with the teacher's class among the k largest outputs",
        f"{TIAN}, section 6",
        "over the evaluation set; the teacher's class is its largest output",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "label_accuracy",
        (*_MEMBER, "top_k"),
        "1",
        "share of samples with their label among the k largest outputs",
        f"{TIAN}, section 6",
        "over the evaluation set; the data's own labels",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable("norm_scale", _NODE, "1", "BatchNorm scale", _NORM, _NORM_AT, kinds=_TRAINED, deep=True),
    Variable("norm_shift", _NODE, "1", "BatchNorm shift (bias)", _NORM, _NORM_AT, kinds=_TRAINED, deep=True),
    Variable("norm_mean", _NODE, "1", "BatchNorm running mean", _NORM, _NORM_AT, kinds=_TRAINED, deep=True),
    Variable("norm_variance", _NODE, "1", "BatchNorm running variance", _NORM, _NORM_AT, kinds=_TRAINED, deep=True),
    Variable(
        "conserved_norm",
        _NODE,
        "1",
        "norm of a node's incoming weight and bias",
        f"{LUCK}, Theorem 3",
        "gradient flow conserves it below BatchNorm; ‖w‖ where BatchNorm precedes the activation, else ‖[w; b]‖; "
        f"{_HIDDEN}",
        kinds=_TRAINED,
        deep=True,
    ),
    Variable(
        "balance",
        _NODE,
        "1",
        "balance c = ‖a‖² − ‖w‖² − b² of outgoing and incoming weights",
        DU,
        "gradient flow conserves it where the activation is relu, leaky_relu or identity; an SGD step of rate η "
        f"changes it by η²(‖∂a‖² − ‖∂w‖² − ∂b²); {_HIDDEN}",
        kinds=_TRAINED,
    ),
    Variable(
        "lemma1_residual",
        _MEMBER,
        "1",
        "relative residual of Lemma 1",
        f"{TIAN}, Lemma 1",
        "over the evaluation set; largest error over layers, samples and nodes, relative to the largest term",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "stop_epoch",
        ("seed",),
        "1",
        "recorded epoch at which the member stopped learning",
        "tsdyn",
        "training.stop says why; NaN: it did not stop",
        kinds=_TRAINED,
        deep=True,
        own=True,
        when="end",
    ),
    Variable("Q", (*_MEMBER, "node", "node_2"), "1", "order parameter w_i · w_k / N", SAAD, kinds=_ONLINE),
    Variable("R", (*_MEMBER, "node", "teacher_node"), "1", "order parameter w_i · B_m / N", SAAD, kinds=_ONLINE),
    Variable(
        "T",
        ("seed", "teacher_node", "teacher_node_2"),
        "1",
        "order parameter B_n · B_m / N",
        SAAD,
        kinds=_ONLINE,
        when="start",
    ),
    Variable(
        "parameter",
        (*_MEMBER, "entry"),
        "1",
        "parameters and buffers of a module of the user's own",
        "tsdyn",
        "all of them one after another; the attribute parameters of the Dataset has the name and shape of each",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "teacher_parameter",
        ("seed", "teacher_entry"),
        "1",
        "parameters and buffers of a teacher that is a module of the user's own",
        "tsdyn",
        "all of them one after another",
        kinds=_TRAINED,
        when="start",
    ),
    Variable(
        "cross_correlation",
        (*_LAYER, "teacher_layer", "teacher_node", "node"),
        "1",
        "correlation of activations, of every layer with every teacher layer",
        f"{TIAN}, Eq. 9; centred as in Tian et al. 2019",
        "over the evaluation set, output layers included; signed; NaN for a node whose activation is constant, and "
        "between layers of other numbers of positions per sample",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "cka",
        (*_LAYER, "teacher_layer"),
        "1",
        "linear CKA of activations, of every layer with every teacher layer",
        "Kornblith et al. 2019 (arXiv:1905.00414), Eq. 4",
        "over the evaluation set, output layers included; of convolutions and tokens every position is a feature; NaN "
        "for a constant layer, and where there are no more samples than features of both layers",
        kinds=_TRAINED,
        deep=True,
        own=True,
    ),
    Variable(
        "neural_tangent_kernel",
        (*_MEMBER, "sample", "sample_2"),
        "1",
        "empirical neural tangent kernel, summed over outputs",
        "Jacot et al. 2018 (arXiv:1806.07572)",
        "of the first samples of the evaluation set, in evaluation mode, over trainable parameters",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "jacobian",
        (*_MEMBER, "sample", "output", "entry"),
        "1",
        "derivative of an output by a number of a module of the user's own",
        "definition",
        "on the first samples of the evaluation set, in evaluation mode; entries as in parameter, NaN for buffers and "
        "frozen parameters",
        kinds=_TRAINED,
        own=True,
    ),
    Variable(
        "hessian_eigenvalue",
        (*_MEMBER, "mode"),
        "1",
        "eigenvalue of the Hessian of J",
        "definition",
        "of the training loss in all parameters; the algebraically largest",
        kinds=_TRAINED,
        own=True,
    ),
    _online("Q_equation", (*_MEMBER, "node", "node_2"), "Q by the equation, N → ∞", _EQUATION),
    _online("R_equation", (*_MEMBER, "node", "teacher_node"), "R by the equation, N → ∞", _EQUATION),
    _online("outgoing", (*_MEMBER, "node"), "outgoing weight v of the student"),
    _online("outgoing_equation", (*_MEMBER, "node"), "v by the equation, N → ∞", _EQUATION),
    _online("teacher_outgoing", ("seed", "teacher_node"), "outgoing weight A of the teacher", when="start"),
    _online(
        "eg",
        _MEMBER,
        "generalization error ½ E[(student − teacher)²]",
        "online SGD in N dimensions; exact from Q, R, T, v; the teacher without noise",
    ),
    _online("eg_equation", _MEMBER, "generalization error by the equation, N → ∞", _EQUATION),
    _flow("population_loss", "loss L = E(f* − f)², no ½", "section 3", _GONE, dims=_MEMBER, when="along"),
    _flow("end_weight", "student weight at the end", dims=("seed", "layer", "node", "input_node")),
    _flow("end_loss", "loss L at the end, no ½", "section 3"),
    _flow("end_gradient_max", "|∇L|_∞ at the end"),
    _flow("end_index", "negative Hessian eigenvalues at the end", conditions="NaN where the flow did not arrive"),
    _flow("end_kind", "kind of stationary point at the end, or why the flow stopped short of one", words=END_KINDS),
    _flow("end_class", "what the student does with the teacher's nodes at the end", "section 5", words=END_CLASSES),
    _flow("end_ground", "what decided the class", "section 5", words=END_GROUNDS),
    _flow("end_margin", "distance of the class's deciding number from its threshold"),
    _flow(
        "end_owner",
        "student node that owns the teacher node at the end",
        "section 5",
        "NaN for a teacher node that is shared",
        dims=("seed", "teacher_node"),
    ),
    _flow("stop_time", "time t of dθ/dt = −∇L at which the flow stopped", conditions=""),
    _flow("stop_reason", "why the flow stopped", conditions="", words=STOP_REASONS),
    _flow(
        "loss_copy_average",
        "L*(k−n+1), the loss of the least copy-average point",
        "Theorem 5.1",
        "NaN for n > k",
        when="start",
    ),
    _flow("loss_perturbed_copy", "loss of the perturbed n-copy point", "section 5", _ODD, when="start"),
    _flow(
        "index_copy_average",
        "negative Hessian eigenvalues at the copy-average point",
        "section 5",
        "NaN where it is not critical: n > k and activations that are not odd",
        when="start",
    ),
    _flow(
        "index_perturbed_copy",
        "negative Hessian eigenvalues at the perturbed n-copy point",
        "section 5",
        _ODD,
        when="start",
    ),
    _flow("one_neuron_norm", "norm of the best single neuron", "Theorem 4.2", "NaN for n > 1", when="start"),
    _flow(
        "one_neuron_outgoing", "outgoing weight of the best single neuron", "Theorem 4.2", "NaN for n > 1", when="start"
    ),
)

COORDINATES: Mapping[str, Variable] = _table(
    Variable("width", ("layer",), "1", "nodes of the student layer", "tsdyn"),
    Variable("teacher_width", ("layer",), "1", "nodes of the teacher layer", "tsdyn"),
    Variable("input_width", ("layer",), "1", "nodes of the layer below the student layer", "tsdyn"),
    Variable("teacher_input_width", ("layer",), "1", "nodes of the layer below the teacher layer", "tsdyn"),
    Variable("layer_name", ("layer",), "1", "name of the layer's module in a model of the user's own", "tsdyn"),
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

#: Dimensions whose sizes depend on ``[record]`` instead of the networks.
SIZED = ("quantile", "mode", "top_k", "entry", "teacher_entry", "teacher_layer")
#: The largest k of the top-k `accuracy`.
TOP = 5

#: Node dimension → the coordinate that holds its size at each layer.
NODE_WIDTHS: Mapping[str, str] = {
    "node": "width",
    "node_2": "width",
    "teacher_node": "teacher_width",
    "teacher_node_2": "teacher_width",
}

#: Word in ``record.observables`` → variables, for words that are not the name of a single variable.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss_train", "loss_eval"),
    "mse": ("mse_train", "mse_eval"),
    "weight": ("weight", "bias"),
    "fanout_norm": ("fanout_norm", "teacher_fanout_norm"),
    "observation": ("observation", "observation_count"),
    "batch_norm": ("norm_scale", "norm_shift", "norm_mean", "norm_variance"),
    "moments": ("A", "B", "H", "H_star", "D", "D_star", "L", "L_star"),
}

#: Variables stored once per seed, and known when a run begins.
CONSTANTS = tuple(row.name for row in VARIABLES.values() if row.when == "start")
#: Variables stored once per seed, and known when a run has ended.
OUTCOMES = tuple(row.name for row in VARIABLES.values() if row.when == "end")
