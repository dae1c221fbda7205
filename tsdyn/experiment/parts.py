"""The sections of an experiment file: each a frozen value with its own rules.  Imports no torch.

Field names are those of the file (DESIGN section 5).  Rules that need several sections are in
`tsdyn.experiment.rules`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, assert_never

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from tsdyn import registers
from tsdyn.experiment.errors import nearest
from tsdyn.experiment.file_values import as_in_a_file
from tsdyn.vocabulary import VARIABLES

MAX_SEEDS = MAX_EPOCHS = 1_000_000
#: Larger counts overflow somewhere.  Much smaller ones may not fit in memory: `runner.run` checks that.
MAX_COUNT = 10**12


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _epochs_as_integers(value: Any) -> Any:
    """TOML keys are strings: ``{ 0 = 0.2, 20 = 0.1 }``."""
    if not isinstance(value, Mapping):
        return _float(value)
    return {int(k) if isinstance(k, str) and re.fullmatch(r"\d{1,9}", k) else k: _float(v) for k, v in value.items()}


Real = Annotated[float, BeforeValidator(_float)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Widths = Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=2)]
Reals = Annotated[tuple[Real, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple)]
Epochs = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...], BeforeValidator(as_tuple), Field(min_length=1)
]
Rate = Annotated[
    Positive | dict[Annotated[int, Field(ge=0)], Positive],
    BeforeValidator(_epochs_as_integers),
    PlainSerializer(lambda v: {str(k): r for k, r in v.items()} if isinstance(v, dict) else v),
]
#: Names of registered parts, which are given by name or themselves; an archived experiment may also name parts that are
#: not installed here.
ActivationName = Annotated[
    str, BeforeValidator(registers.ACTIVATIONS.given), AfterValidator(registers.ACTIVATIONS.check)
]
LossName = Annotated[str, BeforeValidator(registers.LOSSES.given), AfterValidator(registers.LOSSES.check)]
Method = Annotated[str, BeforeValidator(registers.OPTIMIZERS.given), AfterValidator(registers.OPTIMIZERS.check)]
Law = Annotated[str, BeforeValidator(registers.LAWS.given), AfterValidator(registers.LAWS.check)]
TeacherInit = Annotated[str, BeforeValidator(registers.TEACHERS.given), AfterValidator(registers.TEACHERS.check)]
StudentInit = Annotated[str, BeforeValidator(registers.STARTS.given), AfterValidator(registers.STARTS.check)]

#: Keyword arguments of a part that a package offers; tsdyn's own parts have keys of their own.
Arguments = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(as_in_a_file)]

#: Names of a module's labelled layers, the lowest first.
Layers = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]
#: Nodes and inputs of a node of each of them.
LayerShapes = Annotated[
    tuple[Annotated[tuple[Count, Count], BeforeValidator(as_tuple)], ...], BeforeValidator(as_tuple)
]
#: Import path of a function or class that makes an ``nn.Module``, ``package.module:Name``.
ModulePath = Annotated[str, Field(pattern=r"^[^\s:]+:[^:]+$")]


class Made(Part):
    """What tsdyn fills in of one of the modules that a sweep has, as `Teacher` says of the only one of a run."""

    source: str
    numbers: Count
    layers: Layers | None = None
    shapes: LayerShapes | None = None


def _refuse_arguments(
    section: str,
    arguments: Mapping[str, Any] | None,
    register: registers.Register,
    name: str,
    module: str | None = None,
) -> None:
    """Refuse keyword arguments for one of tsdyn's own parts, which would not read them; a module takes them."""
    if arguments is not None and module is None and not register.foreign(name):
        own = section in ("student", "teacher")
        raise ValueError(
            f"{section}.arguments = {dict(arguments)}: the {register.kind} {name!r} is tsdyn's own and takes none; its "
            f"numbers are keys of [{section}]"
            + (f"; of a module of your own, name it, too: {section}.module = 'package.module:name'" if own else "")
        )


BatchNormPlace = Literal["none", "before", "after"]


#: What ``teacher.init = "luck-matters"`` decides, the teacher of Tian et al. (2019), section 5.
LUCK_MATTERS: Mapping[str, Any] = {
    "choices": (-0.5, -0.25, 0.0, 0.25, 0.5),
    "bias": "uniform",
    "unit_norm": False,
    "balanced": False,
}


class Teacher(Part):
    """The fixed network that makes the targets. Each seed draws its own.

    `module` is the import path of a module of the user's own, made with `arguments`, or names one that was passed from
    Python; `source` and `numbers` are its SHA-256 and its size, which tsdyn fills in (`own_modules`).  `layers` are the
    names of its Linear layers and convolutions to label 1..L; tsdyn fills them in where layers are recorded, and their
    `shapes`, (nodes, inputs of a node).  In a sweep of the module, its arguments or layers, `made` holds these of each
    (`made_modules`).
    """

    widths: Widths
    init: TeacherInit = "separated"
    path: str | None = None
    convolution: bool = False
    stride: Count = 1
    padding: Annotated[int, Field(ge=0)] = 0
    batch_norm: BatchNormPlace = "none"
    batch_norm_affine: bool = True
    train_epochs: Count = 20
    train_rate: Positive = 0.01
    prune: Annotated[tuple[Annotated[NonNegative, Field(lt=1)], ...], BeforeValidator(as_tuple)] = ()
    finetune_epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 5
    choices: Reals = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
    scale: Positive = 1.0
    unit_norm: bool | Literal["every-layer"] = True
    polarity: NonNegative = 0.0
    bias: Real | Literal[False, "uniform"] = -0.1
    balanced: bool = False
    activation: ActivationName | None = None
    leak: NonNegative | None = None
    module: ModulePath | None = None
    source: str | None = None
    numbers: Count | None = None
    layers: Layers | None = None
    shapes: LayerShapes | None = None
    arguments: Arguments | None = None
    made: dict[str, Made] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_luck_matters(cls, values: Any) -> Any:
        """The keys that ``init = "luck-matters"`` decides, unless they are written otherwise, which is refused."""
        if not isinstance(values, Mapping) or values.get("init") != "luck-matters":
            return values
        decided = dict(values)
        for key, value in LUCK_MATTERS.items():
            default = cls.model_fields[key].default
            written = tuple(v) if isinstance(v := values.get(key, default), list) else v
            if written not in (default, value):
                raise ValueError(
                    f"teacher.{key} = {written!r}: the teacher of init = 'luck-matters' is that of Tian et al. (2019), "
                    f"with {key} = {value!r}; leave the key out, or choose init = 'separated'"
                )
            decided[key] = value
        return decided

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        _refuse_arguments("teacher", self.arguments, registers.TEACHERS, self.init, self.module)
        if (self.init == "file") != (self.path is not None):
            raise ValueError(f"teacher.init = {self.init!r}, teacher.path = {self.path!r}: a file needs both")
        if self.batch_norm != "none" and self.init not in ("trained", "file"):
            raise ValueError(
                f"teacher.batch_norm = {self.batch_norm!r}: a teacher of init = {self.init!r} never saw a batch, so it "
                "has no statistics; use init = 'trained' or 'file'"
            )
        if self.prune and len(self.prune) != len(self.widths) - 2:
            raise ValueError(
                f"teacher.prune = {list(self.prune)}: one ratio per hidden layer, and there are {len(self.widths) - 2}"
            )
        return self

    @property
    def active_widths(self) -> tuple[int, ...]:
        """Widths of the teacher after pruning: m − ⌊m · ratio⌋ nodes of each hidden layer."""
        if not self.prune:
            return tuple(self.widths)
        return tuple(m - int(m * ratio) for m, ratio in zip(self.widths, (0.0, *self.prune, 0.0), strict=True))


class Student(Part):
    """The network that learns; each seed draws its own start.

    `module`, `source`, `numbers`, `layers`, `shapes`, `arguments` and `made` as in `Teacher`.
    """

    overrealization: Annotated[Positive, Field(le=MAX_COUNT)] | None = None
    widths: Widths | None = None
    init: StudentInit = "gaussian"
    path: str | None = None
    scale: Positive = 0.005
    shrink: Positive = 1.0
    toward_weakest: Literal["free", "adversarial", "helped"] = "free"
    activation: ActivationName = "relu"
    leak: NonNegative = 0.01
    bias: bool = True
    batch_norm: BatchNormPlace = "none"
    batch_norm_affine: bool = True
    module: ModulePath | None = None
    source: str | None = None
    numbers: Count | None = None
    layers: Layers | None = None
    shapes: LayerShapes | None = None
    arguments: Arguments | None = None
    made: dict[str, Made] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Student:
        _refuse_arguments("student", self.arguments, registers.STARTS, self.init, self.module)
        return self


#: (channel, row, column) of the image laws.
IMAGES: Mapping[str, tuple[int, int, int]] = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


class LeaveOut(Part):
    """Training sets that each lack some samples, for runs that differ in nothing else.

    Attributes:
        subsets: How many; each is a point of the sweep, along the dimension ``subset``.
        share: Share of the samples that each lacks; the number is rounded, and at least 1.
        subset: Which of them this run trains on.
    """

    subsets: Count | None = None
    share: Annotated[Positive, Field(lt=1)] | None = None
    subset: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None


class Data(Part):
    """Where inputs come from.

    `augment` adds Definition 7's points of Tian (2020) to a finite training set (agnostic, aware), or crops and
    mirrors images anew at every step (crop-flip).

    ``covariance`` (an .npy file) or ``spectrum`` (s of λ_i ∝ i^−s, trace d, without rotation) correlates or scales
    inputs of the laws gaussian and uniform.  ``mixture`` has ``latent`` components; ``hidden-manifold`` has ``latent``
    dimensions and the activation ``fold`` (`inputs.draw_inputs` has the formulas).  ``noise`` is the standard deviation
    of Gaussian noise on training targets, ``flip`` the share of wrong classes among them; ``loss_train``, gradients and
    Hessians are of these targets, whereas ``mse_train`` and all of evaluation are of the clean ones.
    """

    law: Law = "gaussian"
    path: str | None = None
    eval_path: str | None = None
    image: Annotated[tuple[Count, Count, Count], BeforeValidator(as_tuple)] | None = None
    std: Positive = 1.0
    covariance: str | None = None
    spectrum: NonNegative | None = None
    latent: Count | None = None
    fold: ActivationName | None = None
    noise: NonNegative = 0.0
    flip: Annotated[NonNegative, Field(le=1)] = 0.0
    train: Count | Literal["fresh"] = 10_000
    eval: Count = 10_000
    augment: Literal["none", "agnostic", "aware", "crop-flip"] = "none"
    augment_eps: Positive = 0.1
    augment_c: Positive = 1.0
    leave_out: LeaveOut = LeaveOut()
    arguments: Arguments | None = None

    @property
    def drawn(self) -> bool:
        """Whether inputs are drawn from a distribution, not taken from a data set."""
        return self.law not in registers.LAWS.aliases

    @property
    def adds_samples(self) -> bool:
        """Whether augmentation adds samples to the training set before the first epoch."""
        match self.augment:
            case "agnostic" | "aware":
                return True
            case "none" | "crop-flip":
                return False
            case other:
                assert_never(other)

    @model_validator(mode="after")
    def _whole(self) -> Data:
        _refuse_arguments("data", self.arguments, registers.LAWS, self.law)
        if self.law in ("mnist", "cifar10", "file") and self.path is None:
            what = "its file (.npz, .nc or .npy)" if self.law == "file" else "the folder that holds it"
            raise ValueError(f"data.law = {self.law!r}: name {what} as data.path")
        if self.path is not None and self.law not in ("mnist", "cifar10", "file"):
            raise ValueError(f"data.path = {self.path!r}: data.law = {self.law!r} reads no file")
        if self.eval_path is not None and self.law != "file":
            raise ValueError(f"data.eval_path = {self.eval_path!r}: only data.law = 'file' takes one")
        if self.train == "fresh" and not self.drawn:
            raise ValueError(f"data.train = 'fresh': {self.law} is a finite data set; give a number of samples")
        if self.covariance is not None and self.spectrum is not None:
            raise ValueError(
                f"data.spectrum = {self.spectrum}: data.covariance = {self.covariance!r} has eigenvalues of its own; "
                "give one of them"
            )
        for key in ("covariance", "spectrum"):
            if getattr(self, key) is not None and self.law not in ("gaussian", "uniform"):
                raise ValueError(
                    f"data.{key} = {getattr(self, key)!r}: is of data.law = 'gaussian' and 'uniform', not {self.law!r}"
                )
        if (self.latent is not None) != (self.law in ("mixture", "hidden-manifold")):
            raise ValueError(
                f"data.latent = {self.latent}: data.law = 'mixture' needs its number of components and "
                f"'hidden-manifold' its latent dimension, other laws have none; here it is {self.law!r}"
            )
        if (self.fold is not None) != (self.law == "hidden-manifold"):
            raise ValueError(
                f"data.fold = {self.fold!r}: is the activation f of data.law = 'hidden-manifold', which needs it; here "
                f"it is {self.law!r}"
            )
        if self.augment == "crop-flip" and (self.noise or self.flip):
            raise ValueError(
                f"data.augment = 'crop-flip': noise = {self.noise} and flip = {self.flip} belong to fixed samples; "
                "leave one out"
            )
        if self.augment == "crop-flip" and self.drawn:
            raise ValueError(f"data.augment = 'crop-flip': is of images; data.law is {self.law!r}")
        return self


class Stop(Part):
    """When a member stops learning, which is looked at where it is recorded.

    Attributes:
        variable: A recorded variable of one number per member and epoch.
        below: The member stops once the variable is below this number ...
        patience: ... or once so many records in a row brought no new minimum.
    """

    variable: str
    below: Real | None = None
    patience: Count | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Stop:
        if (self.below is None) == (self.patience is None):
            raise ValueError(f"training.stop: below = {self.below}, patience = {self.patience}; give one of them")
        return self


class Training(Part):
    """How students learn. The update is W += learning_rate · (1/batch) Σ g fᵀ; ``gd`` takes all the data at each
    step, ``flow`` is gradient flow dθ/dt = −∇J, an epoch of which lasts as long as the steps of ``gd`` add up to:
    learning_rate · steps_per_epoch.

    With ``cross_entropy`` the targets are classes: the teacher's largest output, or the data's own labels.

    ``rates`` has one factor on the learning rate per layer.  ``clip`` scales a member's gradient, of all parameters
    that are updated and before weight decay, to this norm where it is longer.  Weight decay is in the gradient, or
    with ``adamw`` apart from it; ``decay_biases = false`` keeps it from biases and from BatchNorm's scale and shift
    (of modules: from parameters of at most one axis).  Over the first ``warm_up`` epochs the rate grows in proportion
    to the epoch's number, up to ``learning_rate``; with ``anneal = "cosine"`` epoch e > w of E
    then has it times ½ (1 + cos π (e − w − 1)/(E − w)), w = ``warm_up``.

    ``stop = { variable, below }`` or ``{ variable, patience }`` stops a member at the first record at which the
    variable is below the number, or so many records in a row brought no new minimum.  It keeps its parameters, its
    later records are NaN, and ``stop_epoch`` (seed), known at the end of the run, says when.
    """

    method: Method = "sgd"
    loss: LossName = "mse"
    labels: Literal["teacher", "data"] = "teacher"
    learning_rate: Rate = 0.01
    batch: Count = 16
    steps_per_epoch: Count | None = None
    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 100
    momentum: Annotated[NonNegative, Field(lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    beta_1: Annotated[NonNegative, Field(lt=1)] = 0.9
    beta_2: Annotated[NonNegative, Field(lt=1)] = 0.999
    epsilon: Positive = 1e-8
    nesterov: bool = False
    decay_biases: bool = True
    rates: Annotated[tuple[NonNegative, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    clip: Positive | None = None
    warm_up: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 0
    anneal: Literal["none", "cosine"] = "none"
    stop: Stop | None = None
    frozen: Counts = ()
    normalize: bool = False
    arguments: Arguments | None = None

    @property
    def whole(self) -> bool:
        """Whether every step sees all the data."""
        return self.method in ("gd", "flow")

    @property
    def of_data(self) -> bool:
        """Whether targets are the data's own labels, not what the teacher says."""
        match self.labels:
            case "data":
                return True
            case "teacher":
                return False
            case other:
                assert_never(other)

    @model_validator(mode="after")
    def _whole(self) -> Training:
        _refuse_arguments("training", self.arguments, registers.OPTIMIZERS, self.method)
        return self

    @model_validator(mode="after")
    def _flow(self) -> Training:
        if self.method == "flow" and (self.momentum or self.normalize):
            raise ValueError(
                f"training.method = 'flow': momentum = {self.momentum}, normalize = {str(self.normalize).lower()}; "
                "gradient flow has neither, use 'gd'"
            )
        return self

    def rate(self, epoch: int) -> float:
        """Learning rate of the epoch that ends at `epoch` (1-based): the last table entry ≤ epoch − 1, as `factor`
        changes it.
        """
        if not isinstance(self.learning_rate, dict):
            return self.factor(epoch) * self.learning_rate
        return self.factor(epoch) * self.learning_rate[max(e for e in self.learning_rate if e <= epoch - 1)]

    def factor(self, epoch: int) -> float:
        """What ``warm_up`` and ``anneal`` multiply the learning rate of the epoch that ends at `epoch` by."""
        before = epoch - 1
        if before < self.warm_up:
            return epoch / self.warm_up
        match self.anneal:
            case "none":
                return 1.0
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * (before - self.warm_up) / max(1, self.epochs - self.warm_up)))
            case other:
                assert_never(other)

    @field_validator("learning_rate")
    @classmethod
    def _starts_at_zero(cls, value: Any) -> Any:
        if isinstance(value, dict) and 0 not in value:
            raise ValueError("a table of rates needs an entry for epoch 0")
        return value


class Record(Part):
    """What to measure and when. Epoch 0 and the last epoch are always recorded."""

    every: Count | None = None
    epochs: Epochs | None = None
    geometric: Annotated[Real, Field(ge=1.0001)] | None = None
    observables: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = (
        "loss",
        "correlation",
        "fanout_norm",
        "weight",
    )
    band: Positive = 0.1
    quantiles: Annotated[tuple[Annotated[Real, Field(ge=0, le=1)], ...], BeforeValidator(as_tuple)] = (
        0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0,
    )  # fmt: skip
    eigenvalues: Annotated[Count, Field(ge=1)] = 10
    state_every: Annotated[Count, Field(ge=1)] | None = None

    @field_validator("observables")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                registers.OBSERVABLES.check(name)
            except registers.PartError:
                known, row = registers.OBSERVABLES.names(), VARIABLES.get(name)
                if row is not None:
                    kinds = " and ".join(f"kind = {kind!r}" for kind in row.kinds)
                    raise ValueError(f"{name!r} is not an observable: runs of {kinds} have it, unasked") from None
                raise ValueError(
                    f"{name!r} is not an observable{nearest(name, known)}; there are: " + ", ".join(known)
                ) from None
        return value

    @field_validator("quantiles")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError("quantiles must increase, and there must be one at least")
        return value

    @model_validator(mode="after")
    def _one_schedule(self) -> Record:
        given = [k for k in ("every", "epochs", "geometric") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"one schedule only, not {' and '.join(given)}")
        return self

    def schedule(self, last: int) -> tuple[int, ...]:
        """Recorded epochs, increasing, from 0 to `last`."""
        if self.epochs is not None:
            chosen = {e for e in self.epochs if e <= last}
        elif self.geometric is not None:
            ratio, steps = self.geometric, math.log(max(last, 1)) / math.log(self.geometric)
            chosen = {round(ratio**k) for k in range(math.floor(steps) + 1)}
        else:
            chosen = set(range(0, last + 1, self.every or 1))
        return tuple(sorted(e for e in chosen | {0, last} if e <= last))


class Times(Part):
    """Times evenly in log t."""

    first: Positive
    last: Positive
    number: Annotated[int, Field(ge=2, le=MAX_EPOCHS)]

    @model_validator(mode="after")
    def _increasing(self) -> Times:
        if not self.first < self.last:
            raise ValueError(f"flow.times: first = {self.first}, last = {self.last}; first < last")
        return self


class Flow(Part):
    """How ``kind = "population-flow"`` runs: gradient flow dθ/dt = −∇L of the population loss on Gaussian inputs.

    Attributes:
        inputs: Width of the input, in the place of the first of ``teacher.widths`` and ``student.widths``.
        times: When students are recorded on their way; the start and the end are, always.
    """

    inputs: Count | None = None
    times: Times | None = None


class Online(Part):
    """How ``kind = "online"`` runs: every sample is seen once, simulated in N dimensions and by the equation N → ∞.

    Attributes:
        inputs: N, in the place of the first of ``teacher.widths`` and ``student.widths``.
        noise: Standard deviation of the noise on the teacher's output.
        layers: Which learn: with ``first`` outgoing weights are 1, with ``both`` they are drawn N(0, 1) and learn.
        last: α = steps / N at the end.
        points: Recorded α, evenly in log α from 0.1 on; the start is recorded, too.
    """

    inputs: Count | None = None
    noise: NonNegative = 0.0
    layers: Literal["first", "both"] = "first"
    last: Annotated[Real, Field(gt=0.1)] = 300.0
    points: Annotated[int, Field(ge=2, le=MAX_EPOCHS)] = 60

    @property
    def both(self) -> bool:
        """Whether outgoing weights are drawn and learn, too."""
        match self.layers:
            case "both":
                return True
            case "first":
                return False
            case other:
                assert_never(other)
