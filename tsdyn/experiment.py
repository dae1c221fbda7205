"""An experiment is a value: frozen, validated, read from and written to TOML, named by its digest.

Imports no torch.  Field names are those of the experiment file (DESIGN section 5).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from tsdyn import schema
from tsdyn.points import axes, checked_sweep, places, swept_keys

MAX_SEEDS = MAX_EPOCHS = 1_000_000
#: Points of a sweep; each is a run.
MAX_POINTS = 100_000
#: Larger counts overflow somewhere; what fits a machine is much less, and `runner.run` says so.
MAX_COUNT = 10**12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class ExperimentError(ValueError):
    """An experiment that cannot be run as written; the message names each key, its value and the rule."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _tuple(value: Any) -> Any:
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
Widths = Annotated[tuple[Count, ...], BeforeValidator(_tuple), Field(min_length=2)]
Reals = Annotated[tuple[Real, ...], BeforeValidator(_tuple), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_tuple)]
Epochs = Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...], BeforeValidator(_tuple), Field(min_length=1)]
Rate = Annotated[
    Positive | dict[Annotated[int, Field(ge=0)], Positive],
    BeforeValidator(_epochs_as_integers),
    PlainSerializer(lambda v: {str(k): r for k, r in v.items()} if isinstance(v, dict) else v),
]
ActivationName = Literal["relu", "leaky_relu", "identity", "erf", "tanh", "sigmoid", "softplus", "gelu"]


BatchNormPlace = Literal["none", "before", "after"]


class Teacher(_Part):
    """The fixed network. Each seed draws its own.

    `module`, `source` and `numbers` are of a module of the user's own that was passed from Python (`own_modules`).
    """

    widths: Widths
    init: Literal["separated", "orthonormal", "gaussian", "trained", "file"] = "separated"
    path: str | None = None
    convolution: bool = False
    stride: Count = 1
    padding: Annotated[int, Field(ge=0)] = 0
    batch_norm: BatchNormPlace = "none"
    batch_norm_affine: bool = True
    train_epochs: Count = 20
    train_rate: Positive = 0.01
    prune: Annotated[tuple[Annotated[NonNegative, Field(lt=1)], ...], BeforeValidator(_tuple)] = ()
    finetune_epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 5
    choices: Reals = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
    scale: Positive = 1.0
    unit_norm: bool | Literal["every-layer"] = True
    polarity: NonNegative = 0.0
    bias: Real | Literal[False, "uniform"] = -0.1
    balanced: bool = False
    activation: ActivationName | None = None
    leak: NonNegative | None = None
    module: str | None = None
    source: str | None = None
    numbers: Count | None = None

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        if (self.init == "file") != (self.path is not None):
            raise ValueError(f"teacher.init = {self.init!r}, teacher.path = {self.path!r}: a file needs both")
        if self.batch_norm != "none" and self.init not in ("trained", "file"):
            raise ValueError(
                f"teacher.batch_norm = {self.batch_norm!r}: a teacher of init = {self.init!r} never saw a batch, so it "
                "has no statistics; use init = 'trained' or 'file'"
            )
        if self.prune and len(self.prune) != len(self.widths) - 2:
            raise ValueError(
                f"teacher.prune = {list(self.prune)}: one ratio a hidden layer, and there are {len(self.widths) - 2}"
            )
        return self

    @property
    def active_widths(self) -> tuple[int, ...]:
        """Widths of what pruning leaves: m − ⌊m · ratio⌋ nodes of each hidden layer."""
        ratios = (0.0, *(self.prune or (0.0,) * (len(self.widths) - 2)), 0.0)
        return tuple(m - int(m * ratio) for m, ratio in zip(self.widths, ratios, strict=True))


class Student(_Part):
    """The network that learns; each seed draws its own start.

    `module`, `source` and `numbers` are of a module of the user's own that was passed from Python (`own_modules`).
    """

    overrealization: Annotated[Positive, Field(le=MAX_COUNT)] | None = None
    widths: Widths | None = None
    init: Literal[
        "gaussian", "torch", "near-teacher", "same-direction", "same-sign", "file", "rewind", "rewind-reinitialised"
    ] = "gaussian"
    path: str | None = None
    scale: Positive = 0.005
    shrink: Positive = 1.0
    toward_weakest: Literal["free", "adversarial", "helped"] = "free"
    activation: ActivationName = "relu"
    leak: NonNegative = 0.01
    bias: bool = True
    batch_norm: BatchNormPlace = "none"
    batch_norm_affine: bool = True
    module: str | None = None
    source: str | None = None
    numbers: Count | None = None


#: (channel, row, column) of the image laws.
IMAGES: Mapping[str, tuple[int, int, int]] = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


class Data(_Part):
    """Where inputs come from.

    `augment` adds Definition 7's points of Tian (2020) to a finite training set (agnostic, aware), or crops and
    mirrors images anew at every step (crop-flip).
    """

    law: Literal["gaussian", "uniform", "digits", "mnist", "cifar10", "file"] = "gaussian"
    path: str | None = None
    eval_path: str | None = None
    image: Annotated[tuple[Count, Count, Count], BeforeValidator(_tuple)] | None = None
    std: Positive = 1.0
    train: Count | Literal["fresh"] = 10_000
    eval: Count = 10_000
    augment: Literal["none", "agnostic", "aware", "crop-flip"] = "none"
    augment_eps: Positive = 0.1
    augment_c: Positive = 1.0

    @property
    def drawn(self) -> bool:
        """Whether inputs are drawn from a distribution, not taken from a data set."""
        return self.law in ("gaussian", "uniform")

    @model_validator(mode="after")
    def _whole(self) -> Data:
        if self.law in ("mnist", "cifar10", "file") and self.path is None:
            what = "its file (.npz, .nc or .npy)" if self.law == "file" else "the folder that holds it"
            raise ValueError(f"data.law = {self.law!r}: name {what} as data.path")
        if self.path is not None and self.law not in ("mnist", "cifar10", "file"):
            raise ValueError(f"data.path = {self.path!r}: data.law = {self.law!r} reads no file")
        if self.eval_path is not None and self.law != "file":
            raise ValueError(f"data.eval_path = {self.eval_path!r}: only data.law = 'file' takes one")
        if self.train == "fresh" and not self.drawn:
            raise ValueError(f"data.train = 'fresh': {self.law} is a finite data set; give a number of samples")
        if self.augment == "crop-flip" and self.drawn:
            raise ValueError(f"data.augment = 'crop-flip': is of images; data.law is {self.law!r}")
        return self


class Training(_Part):
    """How students learn. The update is W += learning_rate · (1/batch) Σ g fᵀ; ``gd`` takes all the data at each
    step, ``flow`` is gradient flow dθ/dt = −∇J, an epoch of which lasts as long as the steps of ``gd`` add up to:
    learning_rate · steps_per_epoch.

    With ``cross_entropy`` the targets are classes: the teacher's largest output, or the data's own labels.
    """

    method: Literal["sgd", "gd", "adam", "flow"] = "sgd"
    loss: Literal["mse", "cross_entropy"] = "mse"
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
    frozen: Counts = ()
    normalize: bool = False

    @property
    def whole(self) -> bool:
        """Whether every step sees all the data."""
        return self.method in ("gd", "flow")

    @model_validator(mode="after")
    def _flow(self) -> Training:
        if self.method == "flow" and (self.momentum or self.normalize):
            raise ValueError(
                f"training.method = 'flow': momentum = {self.momentum}, normalize = {str(self.normalize).lower()}; "
                "gradient flow has neither, use 'gd'"
            )
        return self

    def rate(self, epoch: int) -> float:
        """Learning rate of the epoch that ends at `epoch` (1-based): the last table entry ≤ epoch − 1."""
        if not isinstance(self.learning_rate, dict):
            return self.learning_rate
        return self.learning_rate[max(start for start in self.learning_rate if start <= epoch - 1)]

    @field_validator("learning_rate")
    @classmethod
    def _starts_at_zero(cls, value: Any) -> Any:
        if isinstance(value, dict) and 0 not in value:
            raise ValueError("a table of rates needs an entry for epoch 0")
        return value


class Record(_Part):
    """What to measure and when. Epoch 0 and the last epoch are always recorded."""

    every: Count | None = None
    epochs: Epochs | None = None
    geometric: Annotated[Real, Field(ge=1.0001)] | None = None
    observables: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = (
        "loss",
        "correlation",
        "fanout_norm",
        "weight",
    )
    band: Positive = 0.1
    quantiles: Annotated[tuple[Annotated[Real, Field(ge=0, le=1)], ...], BeforeValidator(_tuple)] = (
        0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0,
    )  # fmt: skip
    eigenvalues: Annotated[Count, Field(ge=1)] = 10

    @field_validator("observables")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = list(dict.fromkeys([*schema.FAMILIES, *schema.RECORDABLE]))
        for name in value:
            if name not in known:
                raise ValueError(
                    f"{name!r} is not an observable{_nearest(name, known)}; there are: " + ", ".join(known)
                )
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


#: Starts that are not of a module of the user's own, which starts as it is made.
_STARTS = ("torch", "near-teacher", "same-direction", "same-sign", "file", "rewind", "rewind-reinitialised")


class Experiment(_Part):
    """Everything that decides what a run computes, and nothing else.

    Attributes:
        name: Letters, digits and ``._+-``; also the default directory.
        seeds: How many members (labels 0..n−1), or their labels.
        dtype: Of training and of the archive.
        sweep: Key → values; the experiment is then the product of these.  ``zip`` is a table of keys whose values,
            equally many, go together; ``points`` a list of tables, one a point.  Either multiplies with other keys.

    Raises:
        ExperimentError: from every constructor, naming each bad key, its value, the rule and, for an
            unknown key, the nearest known one.
    """

    name: str
    seeds: Count | Epochs = 8
    dtype: Literal["float32", "float64"] = "float64"
    teacher: Teacher
    student: Student = Student(overrealization=1.0)
    data: Data = Data()
    training: Training = Training()
    record: Record = Record()
    sweep: dict[str, Any] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ExperimentError(_explain(error, type(self))) from None

    @field_validator("seeds", mode="before")
    @classmethod
    def _seed_list(cls, value: Any) -> Any:
        return _tuple(value)

    @field_validator("sweep")
    @classmethod
    def _sweep(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_sweep(value)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("a name is 1–100 letters, digits and ._+- and starts with a letter or digit")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if isinstance(self.seeds, int) and self.seeds > MAX_SEEDS:
            raise ValueError(f"seeds = {self.seeds}: at most {MAX_SEEDS} members a run")
        if len(set(self.seed_labels)) != len(self.seed_labels):
            repeated = [before for before, after in itertools.pairwise(sorted(self.seed_labels)) if before == after]
            raise ValueError(f"seeds: labels repeat: {', '.join(map(str, dict.fromkeys(repeated[:5])))}")
        if (self.student.widths is None) == (self.student.overrealization is None):
            raise ValueError("student: give either widths or overrealization")
        if not self.sweep:
            self._check_widths()
        _check_sweep_keys(self)
        return self

    def _check_widths(self) -> None:
        student, teacher = self.student_widths, self.teacher.active_widths
        self._check_modules()
        if len(student) != len(teacher) and not self.of_own_modules:
            raise ValueError(
                f"student.widths = {list(student)} has {len(student) - 1} layers and teacher.widths = "
                f"{list(teacher)} has {len(teacher) - 1}: layers are compared one to one, so depths must agree"
            )
        for which, index in (("input", 0), ("output", -1)):
            if student[index] != teacher[index]:
                raise ValueError(
                    f"student.widths = {list(student)} and teacher.widths = {list(teacher)} differ at the {which}: "
                    f"{student[index]} against {teacher[index]}; a student learns from the teacher's own "
                    "inputs and outputs"
                )
        if self.student.init in ("near-teacher", "same-direction", "same-sign") and student != teacher:
            raise ValueError(
                f"student.init = {self.student.init!r}: starts from the teacher's parameters, so widths must agree: "
                f"{list(student)} and {list(teacher)}; set student.overrealization = 1"
            )
        shrink = self.student.shrink
        if self.training.normalize and shrink != 1.0:
            raise ValueError(
                f"training.normalize keeps hidden rows at norm 1, which student.shrink = {shrink} would undo"
            )
        bad = [layer for layer in self.training.frozen if layer > len(student) - 1]
        if bad:
            raise ValueError(f"training.frozen = {list(self.training.frozen)}: layers are 1..{len(student) - 1}")
        image = self.data.image or IMAGES.get(self.data.law)
        if image is not None and math.prod(image) != teacher[0]:
            raise ValueError(
                f"teacher.widths = {list(teacher)}: {self.data.law} has {math.prod(image)} inputs ({image}), "
                f"not {teacher[0]}"
            )
        if self.teacher.convolution and image is None:
            raise ValueError(
                "teacher.convolution: needs the shape of its images; set data.image = [channel, row, column]"
            )
        self.weight_shapes(student)  # raises where images become smaller than kernels
        if self.teacher.init == "trained" and self.data.drawn:
            raise ValueError(f"teacher.init = 'trained': trains on labels, and data.law = {self.data.law!r} has none")
        if self.training.labels == "data" and (self.training.loss == "mse" or self.data.drawn):
            raise ValueError(
                f"training.labels = 'data': needs training.loss = 'cross_entropy' and data with labels; they are "
                f"{self.training.loss!r} and data.law = {self.data.law!r}"
            )
        if self.training.labels == "data" and self.data.augment in ("agnostic", "aware"):
            raise ValueError(f"training.labels = 'data': points of data.augment = {self.data.augment!r} have no label")
        asked = set(schema.expand(self.record.observables))
        if "label_accuracy" in asked and self.data.drawn:
            raise ValueError(f"record.observables: label_accuracy needs labels; data.law = {self.data.law!r} has none")
        if self.deep and self.data.augment in ("agnostic", "aware"):
            raise ValueError(f"data.augment = {self.data.augment!r}: is of fully connected layers without BatchNorm")
        if self.deep:
            unknown = asked - set(schema.DEEP)
            if unknown:
                raise ValueError(
                    f"record.observables: {', '.join(sorted(unknown))} is not measured of convolutions and BatchNorm; "
                    f"there are {', '.join(schema.DEEP)}; theory has the others on Network.folded()"
                )
        if self.student.batch_norm != "none" and self.training.batch == 1 and self.training.method != "gd":
            raise ValueError(
                f"training.batch = 1 with student.batch_norm = {self.student.batch_norm!r}: one sample has no "
                "variance; use batches of two samples or more"
            )
        train = self.data.train
        if isinstance(train, int) and not self.training.whole and self.training.batch > train:
            raise ValueError(f"training.batch = {self.training.batch} is more than data.train = {train} samples")
        if train == "fresh" and self.training.whole:
            way = "; flow.gradient_flow of a PopulationLoss needs none" if self.training.method == "flow" else ""
            raise ValueError(
                f"training.method = {self.training.method!r} needs finite data; data.train is 'fresh'{way}"
            )
        if self.training.method == "flow" and (self.deep or self.dtype != "float64"):
            raise ValueError(
                f"training.method = 'flow': dtype = {self.dtype!r}{', convolutions or BatchNorm' * self.deep}; it "
                "integrates fully connected students in float64, others learn by 'gd'"
            )
        if train == "fresh" and self.training.steps_per_epoch is None:
            raise ValueError("training.steps_per_epoch: needed with data.train = 'fresh'")
        if train == "fresh" and self.data.augment != "none":
            raise ValueError(f"data.augment = {self.data.augment!r}: needs finite data; data.train is 'fresh'")
        if self.data.augment == "crop-flip" and self.training.whole:
            raise ValueError("data.augment = 'crop-flip': moves images anew at every step; use 'sgd' or 'adam'")
        if self.data.augment == "aware" and (self.training.steps_per_epoch is None or self.training.whole):
            raise ValueError(
                "data.augment = 'aware': how many samples it adds depends on the teacher, so members have training "
                "sets of different size; give training.steps_per_epoch, with 'sgd' or 'adam'"
            )

    def _check_modules(self) -> None:
        """What modules of the user's own cannot have."""
        asked = set(schema.expand(self.record.observables))
        known = set(schema.RECORDABLE)
        if self.teacher.module is not None:
            known -= set(schema.OF_TEACHERS_LAYERS)
        if self.student.module is not None:
            known &= set(schema.OWN)
        if unknown := asked - known:
            raise ValueError(
                f"record.observables: {', '.join(sorted(unknown))} is not measured with student.module = "
                f"{self.student.module!r} and teacher.module = {self.teacher.module!r}; there are "
                f"{', '.join(v for v in schema.RECORDABLE if v in known)}"
            )
        if not self.of_own_modules:
            return
        refused = {
            "training.method = 'flow'": self.training.method == "flow",
            f"data.augment = {self.data.augment!r}": self.data.augment in ("agnostic", "aware"),
            "convolutions or BatchNorm of the experiment file": self.deep,
            "training.frozen and training.normalize": self.student.module is not None
            and bool(self.training.frozen or self.training.normalize),
            f"student.init = {self.student.init!r}": self.student.init
            in (("near-teacher", "same-direction", "same-sign") if self.student.module is None else _STARTS),
            "teacher.init, prune and balanced": self.teacher.module is not None
            and (self.teacher.init in ("trained", "file") or bool(self.teacher.prune) or self.teacher.balanced),
        }
        for what, there in refused.items():
            if there:
                raise ValueError(f"{what}: is of networks that tsdyn makes, and here a module is the user's own")

    @property
    def of_own_modules(self) -> bool:
        """Whether the student or the teacher is a module of the user's own."""
        return self.student.module is not None or self.teacher.module is not None

    @property
    def constants(self) -> tuple[str, ...]:
        """Variables that are stored once a seed."""
        own = self.teacher.module is not None
        return tuple(name for name in schema.CONSTANTS if (name == "teacher_parameter") == own)

    @property
    def seed_labels(self) -> tuple[int, ...]:
        """Labels of the members."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def deep(self) -> bool:
        """Whether there are convolutions or BatchNorm."""
        return self.teacher.convolution or self.student.batch_norm != "none" or self.teacher.batch_norm != "none"

    @property
    def image(self) -> tuple[int, int, int] | None:
        """(channel, row, column) of an input of a convolution; None without convolutions."""
        return (self.data.image or IMAGES[self.data.law]) if self.teacher.convolution else None

    def weight_shapes(self, widths: Sequence[int]) -> list[tuple[int, ...]]:
        """Weight shapes of a network of these widths: (node, input_node), or those of 3 x 3 convolutions."""
        return schema.weight_shapes(widths, self.image, stride=self.teacher.stride, padding=self.teacher.padding)

    @property
    def student_widths(self) -> tuple[int, ...]:
        """Widths of the student: input, hidden ..., output; of a module of the user's own its ends."""
        if self.student.module is not None:
            return self.teacher.widths[0], self.teacher.widths[-1]
        if self.student.widths is not None:
            return self.student.widths
        first, *hidden, last = self.teacher.active_widths
        ratio = self.student.overrealization or 1.0
        return (first, *(max(1, round(m * ratio)) for m in hidden), last)

    @property
    def layout(self) -> schema.Layout:
        """Shape of the run."""
        if self.of_own_modules:
            return self._layout_of_modules()
        widths, taught = self.student_widths, self.teacher.active_widths
        shapes = self.weight_shapes(widths)
        parameters = sum(shape[0] * (math.prod(shape[1:]) + 1) for shape in shapes)
        return schema.Layout(
            self.seed_labels,
            widths[0],
            widths[1:],
            taught[1:],
            self.record.quantiles,
            min(self.record.eigenvalues, parameters),
            tuple(math.prod(shape[1:]) for shape in shapes),
            tuple(math.prod(shape[1:]) for shape in self.weight_shapes(taught)),
        )

    def _layout_of_modules(self) -> schema.Layout:
        """A module has its output as the top layer, and no other: its layers below have width 0."""
        inputs, outputs = self.teacher.widths[0], self.teacher.widths[-1]
        own, taught = self.student.module is not None, self.teacher.module is not None
        depth = max(1, 0 if own else len(self.student_widths) - 1, 0 if taught else len(self.teacher.active_widths) - 1)
        bare = (*(0 for _ in range(depth - 1)), outputs)
        student = bare if own else self.student_widths[1:]
        teacher = bare if taught else self.teacher.active_widths[1:]
        shapes = self.weight_shapes(self.student_widths)
        return schema.Layout(
            self.seed_labels,
            inputs,
            student,
            teacher,
            self.record.quantiles,
            min(self.record.eigenvalues, sum(shape[0] * (math.prod(shape[1:]) + 1) for shape in shapes)),
            (0,) * depth if own else (),
            (0,) * depth if taught else (),
            self.student.numbers or 0,
            self.teacher.numbers or 0,
        )

    @property
    def steps(self) -> int:
        """Steps an epoch: as given, or one pass over the data (a remainder smaller than a batch is left out)."""
        if self.training.steps_per_epoch is not None:
            return self.training.steps_per_epoch
        if self.training.whole:
            return 1
        assert isinstance(self.data.train, int)
        points = 2 * self.teacher.widths[0] + 1 if self.data.augment == "agnostic" else 1
        return points * self.data.train // self.training.batch

    @property
    def schedule(self) -> tuple[int, ...]:
        """Recorded epochs."""
        return self.record.schedule(self.training.epochs)

    @property
    def digest(self) -> str:
        """`digest` of the experiment."""
        return digest(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict with every default filled, as TOML writes it."""
        plain = json.loads(self.model_dump_json(exclude_none=True))
        return plain if self.sweep else {k: v for k, v in plain.items() if k != "sweep"}

    def to_toml(self) -> str:
        """TOML text with every default filled; `from_toml_text` gives an equal Experiment back."""
        return tomli_w.dumps(self.as_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
        """From a nested dict as TOML gives it."""
        return cls(**values)

    @classmethod
    def from_toml_text(cls, text: str, *, origin: str = "experiment") -> Experiment:
        """From TOML text; `origin` names it in errors."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and numbers of thousands of digits
            raise ExperimentError(f"{origin}: not TOML: {error}") from None
        try:
            return cls(**values)
        except ExperimentError as error:
            raise ExperimentError(f"{origin}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Experiment:
        """From a file.

        Raises:
            ExperimentError: if the file cannot be read or does not hold an experiment.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # editors of one system begin with a byte-order mark
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path}: cannot be read: {error}") from None
        return cls.from_toml_text(text, origin=str(path))

    def replace(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with dotted keys set, e.g. ``{"training.epochs": 5}``.

        Setting one of student.widths and student.overrealization unsets the other.
        """
        return type(self)(**_applied(self.as_dict(), changes))

    def points(self) -> Iterator[tuple[dict[str, Any], Experiment]]:
        """Each point of the sweep: its swept values, and the experiment there (without a sweep)."""
        base = {k: v for k, v in self.as_dict().items() if k != "sweep"}
        for point in places(self.sweep).values():
            yield point, Experiment(**_applied(base, point))


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of an experiment as a plain nested dict, 64 hex digits.

    Of what is not at its default only: a key that a later version adds changes no digest.
    """
    canonical = json.dumps(_chosen(values, Experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _chosen(values: Mapping[str, Any], part: type[_Part]) -> dict[str, Any]:
    """`values` without those at the defaults of `part`."""
    found = {}
    for key, value in values.items():
        field = part.model_fields[key]
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Part):
            value = _chosen(value, field.annotation)
            default: object = {}
        else:
            required = field.is_required()
            default = None if required else to_jsonable_python(field.get_default(call_default_factory=True))
        if value != default:
            found[key] = value
    return found


def _applied(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested dict `base` with dotted keys set."""
    values: dict[str, Any] = copy.deepcopy(dict(base))
    for key, value in changes.items():
        *sections, last = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ExperimentError(f"{key}: {section} is a value, not a table")
        if key in ("student.widths", "student.overrealization"):
            table.pop("overrealization" if last == "widths" else "widths", None)
        table[last] = value
    return values


def differences(mine: Experiment, theirs: Experiment) -> list[str]:
    """Each key whose value differs, as ``key: mine here, theirs there``."""
    left, right = dict(_flat(mine.as_dict())), dict(_flat(theirs.as_dict()))
    absent = "not set"
    return [
        f"{key}: {left.get(key, absent)!r} here, {right.get(key, absent)!r} there"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, absent) != right.get(key, absent)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number_as_such(value: Any) -> Any:
    """1.0 as 1, wherever it stands: both are the same point of a sweep."""
    if isinstance(value, Mapping):
        return {key: _number_as_such(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_number_as_such(of) for of in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_sweep_keys(experiment: Experiment) -> None:
    known = _keys(Experiment)
    for key in swept_keys(experiment.sweep):
        if key not in known or key in ("name", "seeds", "dtype") or key.startswith("sweep"):
            raise ValueError(
                f"sweep: {key!r} is not a key that can be swept{_nearest(key, [k for k in known if '.' in k])}"
            )
    for axis in axes(experiment.sweep):
        if len({json.dumps(_number_as_such(v), sort_keys=True, default=str) for v in axis.values}) != len(axis.values):
            shown = [v[0] if len(v) == 1 else list(v) for v in axis.values]
            raise ValueError(f"sweep: values of {', '.join(map(repr, axis.keys))} repeat: {shown}")
    points = math.prod(len(axis.values) for axis in axes(experiment.sweep))
    if points > MAX_POINTS:
        raise ValueError(f"sweep: has {points} points, each of which is a run; at most {MAX_POINTS}")
    if experiment.sweep:
        for _ in experiment.points():  # each point must be a valid experiment
            pass


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            found += _keys(part, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line a mistake: key, value, rule, way out."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        fields = [str(p) for p in item["loc"] if not _is_branch(p)]
        key = ".".join(fields)
        shown = _shown(item.get("input"))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        if item["type"] == "extra_forbidden":
            section = ".".join(fields[:-1])
            siblings = _fields(model, fields[:-1])
            sentence = f"{key}: unknown key{_nearest(fields[-1], siblings)}; " + (
                f"[{section}] has {', '.join(siblings)}" if section else f"there are {', '.join(siblings)}"
            )
        elif item["type"] == "missing":
            sentence = f"{key}: missing, and has no default"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            sentence = f"{key} = {shown}: {message}" if key else message
        else:
            message = item["msg"].removeprefix("Input should be ")
            sentence = (
                f"{key} = {shown}: must be {message}" if message != item["msg"] else f"{key} = {shown}: {message}"
            )
        head, _, rule = sentence.partition(": must be ")
        lines.setdefault(head, [])
        if rule and rule not in lines[head]:
            lines[head].append(rule)
    return "\n  ".join(f"{head}: must be {' or '.join(rules)}" if rules else head for head, rules in lines.items())


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


def _is_branch(part: object) -> bool:
    """Pydantic names the branch of a union in a location; a reader has no use for it."""
    return isinstance(part, int) or (
        isinstance(part, str) and bool(re.search(r"[\[\]()]|^constrained-|^(int|float|bool|str|dict|tuple)$", part))
    )


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        part = field.annotation if field else None
        if isinstance(part, types.UnionType) or not (isinstance(part, type) and issubclass(part, BaseModel)):
            return []
        model = part
    return list(model.model_fields)
