"""An experiment is a value: frozen, validated, read from and written to TOML, named by its digest.

Imports no torch.  Field names are those of the experiment file (DESIGN section 5).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, assert_never

import tomli_w
from pydantic import ValidationError, field_validator, model_validator
from pydantic_core import to_jsonable_python

from tsdyn import registers, schema, vocabulary
from tsdyn.arguments import PATH, takes
from tsdyn.experiment import made_modules, rules, shapes
from tsdyn.experiment.branching import Fork
from tsdyn.experiment.errors import ExperimentError, explain
from tsdyn.experiment.parts import (
    Count,
    Data,
    Epochs,
    Flow,
    Online,
    Part,
    Record,
    Student,
    Teacher,
    Training,
    as_tuple,
)
from tsdyn.experiment.subsets import with_subsets
from tsdyn.experiment.sweep_axes import checked_sweep, places
from tsdyn.vocabulary import Kind

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Experiment(Part):
    """Everything that decides what a run computes, and nothing else.

    Attributes:
        kind: ``training``; ``population-flow``, gradient flow of the population loss; ``online``, every sample seen
            once.  A key that a kind does not know is refused, and its file does not have it.
        name: Letters, digits and ``._+-``; also the default directory.
        seeds: How many members (labels 0..n−1), or their labels.
        dtype: Of training and of the archive.
        sweep: Key → list of values; the sweep runs every combination of them.  ``zip`` is a table of keys that vary
            together, with lists of equal length; ``points`` is a list of tables, one table per point.  Either is
            combined with every value of the other keys.

    Raises:
        ExperimentError: from every constructor, naming each bad key, its value, the rule and, for an
            unknown key, the nearest known one.

    Examples:
        >>> import tsdyn
        >>> experiment = tsdyn.Experiment(name="mine", teacher={"widths": [20, 5, 10]}, training={"epochs": 3})
        >>> experiment.replace({"training.epochs": 5}).training.epochs
        5
    """

    kind: Kind = "training"
    name: str
    seeds: Count | Epochs = 8
    dtype: Literal["float32", "float64"] = "float64"
    teacher: Teacher
    student: Student = Student(overrealization=1.0)
    data: Data = Data()
    training: Training = Training()
    record: Record = Record()
    flow: Flow = Flow()
    online: Online = Online()
    fork: Fork = Fork()
    sweep: dict[str, Any] = {}  # noqa: RUF012 (pydantic gives each its own)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ExperimentError(explain(error, type(self))) from None

    # What follows from an experiment is kept once it is known; a copy may be changed, and a pickle need not hold it.

    def __copy__(self) -> Experiment:
        return _without_what_follows(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Experiment:
        return _without_what_follows(super().__deepcopy__(memo))

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return state | {"__dict__": {name: state["__dict__"][name] for name in type(self).model_fields}}

    @model_validator(mode="before")
    @classmethod
    def _a_point_per_subset(cls, values: Any) -> Any:
        return with_subsets(values) if isinstance(values, dict) else values

    @field_validator("seeds", mode="before")
    @classmethod
    def _seed_list(cls, value: Any) -> Any:
        return as_tuple(value)

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
        wrong = rules.broken(self)
        if wrong is not None:
            raise ValueError(wrong)
        rules.check_sweep(self, Experiment)
        if self.sweep:
            passed = [who for who in made_modules.NETWORKS if self.awaits_a_module(who)]
            if passed:  # that its points are valid is known once it has a module
                _ = self.replace({f"{who}.module": "passed:later" for who in passed})
                return self
            _ = self._every_point  # each point must be a valid experiment
        return self

    def awaits_a_module(self, who: str) -> bool:
        """Whether arguments are swept of a student or teacher that only a module passed from Python can take."""
        part = getattr(self, who)
        varied = made_modules.varied(self.sweep, who)
        register = {"student": registers.STARTS, "teacher": registers.TEACHERS}[who]
        return (
            any(key.split(".")[1] == "arguments" for key in varied)
            and part.module is None
            and f"{who}.module" not in varied
            and not register.foreign(part.init)
        )

    @property
    def of_own_modules(self) -> bool:
        """Whether the student or the teacher is a module of the user's own."""
        return self.student.module is not None or self.teacher.module is not None

    @property
    def as_trained(self) -> Experiment:
        """The experiment with the values that a fork sets from its epoch on; itself for all others."""
        changes = self.fork.perturb.get("set", {})
        return self.replace(changes) if changes else self

    @property
    def complete(self) -> bool:
        """Whether the sizes of its modules are known; a file that names an import path leaves them out."""
        return all(part.module is None or part.numbers is not None for part in (self.student, self.teacher))

    @property
    def constants(self) -> tuple[str, ...]:
        """Variables that are stored once per seed, without epochs, and known when the run begins."""
        names = schema.recorded(self.kind, (), "start")
        if self.kind != "training":
            return names
        own, labelled = self.teacher.module is not None, self.teacher.shapes is not None
        return tuple(name for name in names if (own if name == "teacher_parameter" else not own or labelled))

    def recorded(self, when: vocabulary.When | None = None) -> tuple[str, ...]:
        """Variables that the run records; only those of `when`, if given."""
        names = schema.recorded(self.kind, self.record.observables, when)
        absent = set() if self.training.stop is not None or self.kind != "training" else {"stop_epoch"}
        return tuple(
            name
            for name in names
            if name not in absent and (schema.variable(name).when != "start" or name in self.constants)
        )

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
        return shapes.image(self)

    def weight_shapes(self, widths: Sequence[int]) -> list[tuple[int, ...]]:
        """Weight shapes of a network of these widths: (node, input_node), or those of 3 x 3 convolutions."""
        return shapes.weight_shapes(self, widths)

    @cached_property
    def teacher_widths(self) -> tuple[int, ...]:
        """Widths of what pruning leaves of the teacher: input, hidden ..., output."""
        return shapes.teacher_widths(self)

    @cached_property
    def student_widths(self) -> tuple[int, ...]:
        """Widths of the student: input, hidden ..., output."""
        return shapes.student_widths(self)

    @cached_property
    def layout(self) -> schema.Layout:
        """Shape of the run."""
        return shapes.layout(self)

    @property
    def steps(self) -> int:
        """Steps per epoch: as given, or one pass over the data (a remainder smaller than a batch is left out)."""
        if self.training.steps_per_epoch is not None:
            return self.training.steps_per_epoch
        if self.training.whole:
            return 1
        assert isinstance(self.data.train, int)
        return shapes.points_per_sample(self) * self.data.train // self.training.batch

    @property
    def marks(self) -> tuple[vocabulary.Label, ...]:
        """Epochs, times or α at which the run can be committed and resumed: one for each of its steps 0, 1, ..."""
        return shapes.marks(self)

    @property
    def last(self) -> int:
        """The run's last step: an epoch of training, a position in `marks`."""
        kind = self.kind
        if kind == "training":
            return self.training.epochs
        if kind == "population-flow" or kind == "online":
            return len(self.marks) - 1
        assert_never(kind)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Steps after which the run is recorded; in training a step of the run is an epoch."""
        return shapes.schedule(self)

    @property
    def labels(self) -> tuple[vocabulary.Label, ...]:
        """Labels of the recorded steps along the run's dimension: epochs, times or α."""
        kind = self.kind
        if kind == "training":
            return self.schedule
        if kind == "population-flow" or kind == "online":
            marks = self.marks
            return tuple(marks[step] for step in self.schedule)
        assert_never(kind)

    def _repr_html_(self) -> str:
        """Table for a notebook of the keys that differ from their defaults, with their meanings."""
        from tsdyn.experiment.meanings import table

        return table(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the experiment; see `digest`."""
        return digest(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict with every default filled, as TOML writes it."""
        found: dict[str, Any] = json.loads(self._as_json)
        return found

    @cached_property
    def _as_json(self) -> str:
        plain = rules.only_known(self.kind, json.loads(self.model_dump_json(exclude_none=True)))
        if self.data.leave_out.subsets is None:
            plain.get("data", {}).pop("leave_out", None)
        absent = {*(() if self.sweep else ("sweep",)), *(() if self.fork.parent is not None else ("fork",))}
        return json.dumps({key: value for key, value in plain.items() if key not in absent})

    def to_toml(self) -> str:
        """TOML text with every default filled; `from_toml_text` gives an equal Experiment back."""
        return self._as_toml

    @cached_property
    def _as_toml(self) -> str:
        return _toml(self.as_dict())

    @property
    def parts(self) -> dict[str, tuple[registers.Register, str]]:
        """The registered parts that the experiment names: key → (register, name)."""
        found = {
            "teacher.init": (registers.TEACHERS, self.teacher.init),
            "teacher.activation": (registers.ACTIVATIONS, self.teacher.activation or self.student.activation),
            "student.init": (registers.STARTS, self.student.init),
            "student.activation": (registers.ACTIVATIONS, self.student.activation),
            "data.law": (registers.LAWS, self.data.law),
            **({} if self.data.fold is None else {"data.fold": (registers.ACTIVATIONS, self.data.fold)}),
            "training.method": (registers.OPTIMIZERS, self.training.method),
            "training.loss": (registers.LOSSES, self.training.loss),
        }
        asked = {f"record.observables[{name}]": (registers.OBSERVABLES, name) for name in self.record.observables}
        return found | asked

    @property
    def part_names(self) -> frozenset[str]:
        """Names of the experiment's parts, those that a sweep varies included."""
        named = {name for _, name in self.parts.values()}
        return frozenset({*named, *_strings(self.sweep)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
        """The experiment in a nested dict, as a TOML reader gives it."""
        return cls(**values)

    @classmethod
    def from_toml_text(cls, text: str, *, origin: str = "experiment", archived: bool = False) -> Experiment:
        """The experiment written in TOML text.

        Args:
            text: Content of an experiment file.
            origin: Name of the text in error messages.
            archived: Whether the text comes from an archive: parts that it names then need not be installed here.
        """
        try:
            return _archived(text) if archived else cls(**tomllib.loads(text))
        except ExperimentError as error:
            raise ExperimentError(f"{origin}: {error}") from None
        except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and numbers of thousands of digits
            raise ExperimentError(f"{origin}: not TOML: {error}") from None

    @classmethod
    @takes(path=PATH)
    def from_toml(cls, path: str | Path, *, archived: bool = False) -> Experiment:
        """The experiment in a file; `archived` as in `from_toml_text`.

        Raises:
            ExperimentError: if the file cannot be read or does not hold an experiment.
        """
        if Path(path).is_dir():
            own = Path(path, "experiment.toml")
            raise ExperimentError(
                f"{path}: is a directory; give the experiment's file"
                + (f", of this run {own} (to go on with it: tsdyn run {own} -o {path})" if own.is_file() else "")
            )
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors may write a byte-order mark first
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path}: cannot be read: {error}") from None
        return cls.from_toml_text(text, origin=str(path), archived=archived)

    def replace(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with dotted keys set, e.g. ``{"training.epochs": 5}``.

        Setting one of student.widths and student.overrealization unsets the other.
        """
        with registers.accepting(self.part_names):  # an archived experiment may name parts not installed here
            return type(self)(**_applied(self.as_dict(), changes))

    def says(self, values: Mapping[str, Any]) -> bool:
        """Whether setting these dotted keys changes nothing.

        Raises:
            ExperimentError: if a value cannot be set.
        """
        return json.dumps(_applied(self.as_dict(), values)) == self._as_json or self.replace(values) == self

    def points(self) -> Iterator[tuple[dict[str, Any], Experiment]]:
        """Each point of the sweep: its swept values, and the experiment there (without a sweep)."""
        with registers.accepting(None):  # names were checked when this experiment was made
            found = self._every_point
        yield from found

    @cached_property
    def _every_point(self) -> tuple[tuple[dict[str, Any], Experiment], ...]:
        return tuple((point, self._at(point)) for point in places(self.sweep).values())

    def at(self, point: Mapping[str, Any]) -> Experiment:
        """The experiment of one point of the sweep, given its swept keys and values."""
        with registers.accepting(self.part_names):
            return self._at(point)

    def _at(self, point: Mapping[str, Any]) -> Experiment:
        """`at`; sections in which the point says nothing are those of this experiment, and are not checked again."""
        said = {key.partition(".")[0] for key in point} | {
            who for who in made_modules.NETWORKS if getattr(self, who).made is not None
        }
        base = self._tables
        values = _applied({name: base[name] for name in said if name in base}, point)
        # `as_dict` has no fork where there is none; pydantic would copy its default deeply for every point
        values |= {name: getattr(self, name) for name in (*base, "fork") if name not in said}
        return Experiment(**made_modules.resolved(values))

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """`as_dict` without the sweep; not to be changed."""
        return {name: value for name, value in self.as_dict().items() if name != "sweep"}


@lru_cache(maxsize=4)
def _archived(text: str) -> Experiment:
    """The experiment of an archive, which whoever reads one asks for several times."""
    with registers.accepting(None):
        return Experiment(**tomllib.loads(text))


def _without_what_follows(copied: Experiment) -> Experiment:
    for name in copied.__dict__.keys() - type(copied).model_fields.keys():
        del copied.__dict__[name]
    return copied


def _toml(values: Mapping[str, Any]) -> str:
    """``tomli_w.dumps(values)``, whose tables, which points of a sweep share, are written once."""
    tabled = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values.values())
    if tabled or values.get("sweep"):  # whose values may be many
        return tomli_w.dumps(values)
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = [_table(key, json.dumps(value)) for key, value in values.items() if isinstance(value, dict)]
    return "\n".join([tomli_w.dumps(plain), *tables] if plain else tables)


@lru_cache(maxsize=32)
def _table(key: str, text: str) -> str:
    """A table of a TOML file, from its JSON."""
    return tomli_w.dumps({key: json.loads(text)})


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of an experiment given as a plain nested dict, 64 hex digits.

    Keys at their default are left out, so that a key added by a later version changes no digest.
    """
    canonical = json.dumps(_chosen(values, Experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _chosen(values: Mapping[str, Any], part: type[Part]) -> dict[str, Any]:
    """`values` without the keys that are at the defaults of `part`."""
    found, known = {}, _defaults(part)
    for key, value in values.items():
        inner, default = known[key]
        if inner is not None:
            value = _chosen(value, inner)
        if value != default:
            found[key] = value
    return found


@cache
def _defaults(part: type[Part]) -> dict[str, tuple[type[Part] | None, object]]:
    """For each key the class of its table, if it is one, and its default as plain values."""
    found: dict[str, tuple[type[Part] | None, object]] = {}
    for key, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            found[key] = field.annotation, {}
        else:
            required = field.is_required()
            found[key] = None, None if required else to_jsonable_python(field.get_default(call_default_factory=True))
    return found


def _applied(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict `base` with dotted keys set; the tables in which something is set are copies."""
    values = dict(base)
    for key, value in changes.items():
        *sections, last = key.split(".")
        table = values
        for section in sections:
            inner = table.get(section, {})
            if not isinstance(inner, dict):
                raise ExperimentError(f"{key}: {section} is a value, not a table")
            table[section] = table = dict(inner)
        if key in ("student.widths", "student.overrealization"):
            table.pop("overrealization" if last == "widths" else "widths", None)
        table[last] = value
    return values


def differences(mine: Experiment, theirs: Experiment) -> list[str]:
    """Each key whose value differs, as ``key: mine here, theirs there``."""
    left, right = dict(flattened(mine.as_dict())), dict(flattened(theirs.as_dict()))
    absent = "not set"
    return [
        f"{key}: {left.get(key, absent)!r} here, {right.get(key, absent)!r} there"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, absent) != right.get(key, absent)
    ]


def _strings(values: Any) -> Iterator[str]:
    """Every string in nested tables and lists."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _strings(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _strings(value)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
