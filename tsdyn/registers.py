"""Registers of the parts that an experiment can name (activations, losses, optimizers, ...), and where their code is.

A register knows names: tsdyn's own and, by entry points, those of installed packages; it imports neither torch nor any
part.  The module that uses a part loads it on first use (`Register.load`).  Archives open without loading any part, and
may name parts that are not installed here (`accepting`).

A package offers a part by an entry point, for example in its pyproject.toml::

    [project.entry-points."tsdyn.activations"]
    sine = "mylab.parts:sine"
"""

from __future__ import annotations

import difflib
import importlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

from tsdyn.vocabulary import FAMILIES, VARIABLES

#: Named as the package of a part that was added by `Register.add`.
THIS_PROCESS = "this process"


T = TypeVar("T")


class PartError(ValueError):
    """A part does not exist, or is of another kind than its register's; the message names it and the way out."""


class Origin(NamedTuple):
    """Where a part comes from.

    Attributes:
        package: Name of the distribution; ``this process`` for a part that was added by `Register.add`.
        version: Version of that distribution.
        target: ``module:attribute``.
    """

    package: str
    version: str
    target: str


#: Names that `Register.check` accepts although no such part is installed; None: every name.
_ACCEPTED: ContextVar[frozenset[str] | None] = ContextVar("tsdyn_accepted", default=frozenset())


@contextmanager
def accepting(names: Iterable[str] | None) -> Iterator[None]:
    """Accept, inside the context, these names of parts that are not installed; None accepts every name.

    It is for experiments read from archives, whose parts were installed when the archive was made.
    """
    token = _ACCEPTED.set(None if names is None else frozenset(names))
    try:
        yield
    finally:
        _ACCEPTED.reset(token)


@dataclass
class Register:
    """Parts of one kind by name.

    Attributes:
        kind: Word for one part in messages, such as ``activation``.
        table: ``module:attribute`` of the mapping name → part that holds tsdyn's own parts.
        own: Names of tsdyn's own parts.
        aliases: Names that an experiment file may use but that are not in the table.
        hidden: Names in the table that an experiment file cannot use.
    """

    kind: str
    table: str
    own: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    _added: dict[str, Any] = field(default_factory=dict, repr=False)
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> str:
        """The entry-point group by which packages offer parts: ``tsdyn.activations``."""
        ending = {"s": "es", "y": "ies"}.get(self.kind[-1], "s")
        return f"tsdyn.{self.kind.removesuffix('y')}{ending}"

    @cached_property
    def _installed(self) -> Mapping[str, metadata.EntryPoint]:
        found: dict[str, metadata.EntryPoint] = {}
        for entry in metadata.entry_points(group=self.group):
            if not self.foreign(entry.name):
                raise PartError(
                    f"{self.kind} {entry.name!r} of {_package(entry)[0]} has the name of one of tsdyn's own; rename it "
                    f"in that package's entry points ({self.group})"
                )
            if entry.name in found and found[entry.name].value != entry.value:
                raise PartError(
                    f"{self.kind} {entry.name!r} is offered by {_package(found[entry.name])[0]} and by "
                    f"{_package(entry)[0]}; uninstall one of them"
                )
            found[entry.name] = entry
        return found

    def names(self) -> tuple[str, ...]:
        """Every name that can be used here: tsdyn's own, those of installed packages, and those added."""
        return tuple(dict.fromkeys([*self.own, *self.aliases, *self._installed, *self._added]))

    def check(self, name: str) -> str:
        """`name` itself, if there is a part of that name or `accepting` accepts it.

        Raises:
            PartError: otherwise; names the nearest name, and how a package offers a part.
        """
        accepted = _ACCEPTED.get()
        if name in self.own or name in self.aliases or name in self._added or accepted is None or name in accepted:
            return name
        if name in self._installed:
            return name
        known = self.names()
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise PartError(
            f"{name!r} is no {self.kind}{meant}; there are {', '.join(known)}; a package offers its own by an entry "
            f"point in the group {self.group!r}"
        )

    def load(self, name: str) -> Any:
        """The part itself; its module is imported on first use.

        Raises:
            PartError: if there is none of that name, or its code cannot be imported.
        """
        if name not in self._loaded:
            if name in self._added:
                return self._added[name]
            if name in (*self.own, *self.hidden):
                self._loaded[name] = _attribute(self.table)[name]
            elif name in self._installed:
                entry = self._installed[name]
                try:
                    self._loaded[name] = entry.load()
                except Exception as error:  # a package's code may raise anything
                    raise PartError(
                        f"{self.kind} {name!r}: {entry.value} of {_package(entry)[0]} cannot be imported: "
                        f"{type(error).__name__}: {error}"
                    ) from error
            else:
                with accepting(()):
                    self.check(name)  # raises the error that lists all names, unless the name is accepted
                raise AssertionError(name)
        return self._loaded[name]

    def part(self, name: str, type: type[T]) -> T:
        """The part of that name, which must be of `type` and call itself so.

        Raises:
            PartError: if there is none, or if what a package offers is something else.
        """
        found = self.load(name)
        if not isinstance(found, type) or getattr(found, "name", None) != name:
            raise PartError(
                f"{self.kind} {name!r}: {self.origin(name).target} is {found!r}; it must be a "
                f"{type.__module__}.{type.__qualname__} of that name"
            )
        return found

    def add(self, name: str, part: Any) -> None:
        """Make a part known to this process, and to the workers of its runs, under `name`.

        Raises:
            PartError: if the name is taken.
        """
        if not self.foreign(name) or name in self._added or name in self._installed:
            raise PartError(f"{self.kind} {name!r} is there already ({self.origin(name).package}); give another name")
        self._added[name] = part

    def given(self, part: Any) -> Any:
        """The name of a part that is given itself, known to this process from then on; anything else as it is.

        Raises:
            PartError: for a part without a name of its own, such as a lambda, or whose name is another's.
        """
        name = getattr(part, "name", getattr(part, "__name__", None))
        if isinstance(part, str) or not isinstance(name, str):
            return part
        if not name.isidentifier():
            raise PartError(f"{self.kind} {part!r} has no name, by which an archive calls it; write it as a function")
        if name not in self._added or self._added[name] is not part:
            self.add(name, part)
        return name

    @property
    def adds(self) -> bool:
        """Whether parts were added to this process."""
        return bool(self._added)

    def holds(self, name: str, part: Any) -> bool:
        """Whether `part` itself is registered under `name`."""
        if name not in self._added and name not in self._installed:
            return False
        return bool(self.load(name) == part)

    def remove(self, name: str) -> None:
        """Forget a part that was added to this process."""
        self._added.pop(name, None)

    def origin(self, name: str) -> Origin:
        """Package, version and place of the part of that name; nothing is imported."""
        if not self.foreign(name):
            from tsdyn._version import __version__

            return Origin("tsdyn", __version__, f"{self.table}[{name!r}]")
        if name in self._installed:
            entry = self._installed[name]
            return Origin(*_package(entry), entry.value)
        self.check(name)
        where = THIS_PROCESS if name in self._added else "unknown"
        return Origin(where, "", _place(self._added.get(name)))

    def foreign(self, name: str) -> bool:
        """Whether the part is not one of tsdyn's own."""
        return name not in (*self.own, *self.aliases, *self.hidden)


def _package(entry: metadata.EntryPoint) -> tuple[str, str]:
    return ("?", "") if entry.dist is None else (entry.dist.name, entry.dist.version)


def _place(part: Any) -> str:
    """``module:name`` of a function or class; for other parts, of their type."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


ACTIVATIONS = Register(
    "activation",
    "tsdyn.networks.activations:TABLE",
    ("relu", "leaky_relu", "identity", "erf", "tanh", "sigmoid", "softplus", "gelu", "silu"),
)
LOSSES = Register("loss", "tsdyn.engine.loss:LOSSES", ("mse", "cross_entropy"))
#: SGD with training.momentum > 0 is a part of its own, "momentum" or "nesterov"; experiment files write "sgd" for both.
OPTIMIZERS = Register(
    "optimizer",
    "tsdyn.engine.rule:OPTIMIZERS",
    ("sgd", "adam", "adamw"),
    ("gd", "flow"),
    hidden=("momentum", "nesterov"),
)
LAWS = Register(
    "law",
    "tsdyn.problem.inputs:LAWS",
    ("gaussian", "uniform", "mixture", "hidden-manifold"),
    ("digits", "mnist", "cifar10", "file"),
)
TEACHERS = Register(
    "teacher",
    "tsdyn.problem.teachers:TEACHERS",
    ("separated", "orthonormal", "gaussian", "luck-matters"),
    aliases=("trained", "file"),
)
STARTS = Register(
    "start",
    "tsdyn.problem.students:STARTS",
    ("gaussian", "torch", "near-teacher", "same-direction", "same-sign"),
    aliases=("file", "rewind", "rewind-reinitialised"),
)
#: Variables that training records at each recorded epoch; the aliases are words for several of them.
OBSERVABLES = Register(
    "observable",
    "tsdyn.observables.registry:OBSERVABLES",
    tuple(row.name for row in VARIABLES.values() if "training" in row.kinds and row.when == "along"),
    aliases=tuple(family for family in FAMILIES if family not in VARIABLES),
)
#: The study "a-b" is the module studies/a_b.py.
STUDIES = Register(
    "study",
    "tsdyn.studies:STUDIES",
    (
        "tian2019-luck",
        "tian2019-data",
        "tian2019-ranks",
        "tian2019-sizes",
        "tian2019-batchnorm-bias",
        "tian2019-batchnorm-bias-vgg11",
        "tian2019-cifar10",
        "tian2019-digits",
        "tian2019-heatmaps",
        "tian2019-lottery",
        "tian2019-multilayer",
        "tian2019-multilayer-large",
        "theorems",
        "tian2020-connectivity",
        "tian2020-samples",
        "tian2020-augmentation",
        "tian2020-cifar10",
        "tian2020-digits",
        "tian2020-boundaries",
        "tian2020-l-shape",
        "tian2020-multilayer-l-shape",
        "tian2020-success-rate",
        "tian2020-recovery",
        "simsek2023-trajectories",
        "simsek2023-one-neuron",
        "simsek2023-loss",
        "simsek2023-norms",
        "simsek2023-phase-diagram",
        "goldt2019-eg",
        "fork-divergence",
        "leave-out",
    ),
)

#: Kind → its register.
ALL: Mapping[str, Register] = {
    register.kind: register
    for register in (ACTIVATIONS, LOSSES, OPTIMIZERS, LAWS, TEACHERS, STARTS, OBSERVABLES, STUDIES)
}


class Sent(NamedTuple):
    """A part of one process on its way to another."""

    kind: str
    name: str
    part: Any


#: How many contexts of `present` use each part that was sent here, by kind and name.
_USED: dict[tuple[str, str], int] = {}
_USED_LOCK = threading.Lock()


@contextmanager
def present(parts: Iterable[Sent]) -> Iterator[None]:
    """Context in which this process knows the parts that another one sent, forgotten after the last such context."""
    mine: list[tuple[str, str]] = []
    try:
        with _USED_LOCK:
            for kind, name, part in parts:
                used = _USED.get((kind, name), 0)
                if not used and name in ALL[kind]._added:
                    continue  # the process that sent it
                if not used:
                    ALL[kind].add(name, part)
                _USED[kind, name] = used + 1
                mine.append((kind, name))
        yield
    finally:
        with _USED_LOCK:
            for kind, name in mine:
                _USED[kind, name] -= 1
                if not _USED[kind, name]:
                    ALL[kind].remove(name)
