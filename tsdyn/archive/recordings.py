"""What a recording of a user's own loop is (`tsdyn.Recorder`), and where recordings lie.  Imports no torch.

A recording has ``recording.toml`` in the place of ``experiment.toml``.  A folder of recordings holds
``KEY=VALUE,.../seed=N/``, or ``seed=N/`` if there is no config.
"""

from __future__ import annotations

import hashlib
import tomllib
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tomli_w

from tsdyn import schema, vocabulary
from tsdyn.archive.whole_files import DirectoryError, refuse_link
from tsdyn.schema import Layout
from tsdyn.vocabulary import Variable

FILE = "recording.toml"


@dataclass(frozen=True)
class Recording:
    """All that decides what a recording's numbers mean and how large they are.

    Attributes:
        seed, config, every, observables: As given to `tsdyn.Recorder`.
        dtype: Of the numbers in the archive.
        model: Class of the model.
        parameters: Name → shape of the parameters and buffers in no labelled layer.
        shapes: SHA-256 of the names, shapes and types of all parameters and buffers.
        probe, teacher: SHA-256 of the probe, and of the teacher's parameters (empty without a teacher).
        loss: Name of the loss.
        input_width, layers, widths, fan_ins: Of the model's labelled layers.
        teacher_widths, teacher_fan_ins: Of the teacher's, 0 without one.
        quantiles, modes, sizes: Sizes of further dimensions.
        variables: What is recorded at each commit.
        given: Those of them that are given to each commit.
        declared: Declarations of those that are not the schema's.
        comments: Over which samples and positions variables are measured.
        path: The dimension along which it was recorded; another than ``epoch`` for what was imported.
    """

    seed: int
    config: dict[str, Any]
    every: int
    observables: tuple[str, ...]
    dtype: str
    model: str
    parameters: dict[str, list[int]]
    shapes: str
    probe: str
    teacher: str
    loss: str
    input_width: int
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    fan_ins: tuple[int, ...]
    teacher_widths: tuple[int, ...]
    teacher_fan_ins: tuple[int, ...]
    quantiles: tuple[float, ...]
    modes: int
    entries: int
    variables: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    declared: tuple[dict[str, Any], ...] = ()
    comments: dict[str, str] = field(default_factory=dict)
    path: vocabulary.Path = "epoch"

    @property
    def layout(self) -> Layout:
        """Sizes of the recording's dimensions."""
        return Layout(
            (self.seed,), self.input_width, self.widths, self.teacher_widths, self.quantiles, self.modes, self.fan_ins,
            self.teacher_fan_ins, self.entries, path=self.path, extra=tuple(self.sizes.items()),
            layer_names=self.layers, comments=tuple(self.comments.items()),
        )  # fmt: skip

    def recorded(self, when: vocabulary.When | None = None) -> tuple[str, ...]:
        """Variables that the archive holds; only those of `when`, if given."""
        self.adopt()
        constants = ("teacher_weight", "teacher_bias") if self.teacher else ()
        names = (*self.variables, *constants)
        return tuple(name for name in names if when is None or schema.variable(name).when == when)

    def adopt(self) -> None:
        """Declare in this process the variables that the recording declared in its own.

        Raises:
            SchemaError: if a variable of that name is declared here, differently.
        """
        for row in self.declared:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            schema.adopt(Variable(**values))

    @property
    def labels(self) -> tuple[int, ...]:
        """An empty tuple: which epochs a loop commits is not known beforehand."""
        return ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that is not the seed's or the point's own."""
        own = {"seed": 0, "config": {}, "teacher": "", "probe": ""}
        return hashlib.sha256(tomli_w.dumps({**self._values(), **own}).encode()).hexdigest()

    def to_toml(self) -> str:
        """TOML text; `of_text` gives an equal Recording back."""
        return tomli_w.dumps({"kind": "recording", **self._values()})

    def _values(self) -> dict[str, Any]:
        """All fields; without `path` where it is the usual one, so that texts and digests stay what they were."""
        return {key: value for key, value in asdict(self).items() if key != "path" or value != "epoch"}

    @classmethod
    def of_text(cls, text: str, origin: str = FILE) -> Recording:
        """The recording written in TOML text.

        Raises:
            DirectoryError: if it is not one.
        """
        try:
            values = tomllib.loads(text)
            if values.pop("kind", None) != "recording":
                raise ValueError('kind = "recording" is missing')
            tuples = {f.name for f in fields(cls) if str(f.type).startswith("tuple")}
            given: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in values.items()}
            return cls(**given)
        except (ValueError, TypeError, RecursionError) as error:
            raise DirectoryError(f"{origin}: is not a recording of tsdyn's: {error}") from None

    @classmethod
    def of_directory(cls, path: Path) -> Recording:
        """The recording in the directory of one seed."""
        refuse_link(path / FILE)
        try:
            return cls.of_text((path / FILE).read_text(encoding="utf-8"), str(path / FILE))
        except (OSError, UnicodeDecodeError) as error:
            raise DirectoryError(f"{path / FILE}: cannot be read: {error}") from None


def differences(mine: Recording, theirs: Recording) -> list[str]:
    """Each field whose value differs, as ``name: mine here, theirs there``."""
    left, right = asdict(mine), asdict(theirs)
    return [f"{key}: {left[key]!r} here, {right[key]!r} there" for key in left if left[key] != right[key]]


def recordings_below(path: Path) -> list[Path]:
    """Directories of single seeds in `path`: itself, ``seed=N`` or ``KEY=VALUE,.../seed=N``; sorted.

    Raises:
        DirectoryError: if one of them is a symbolic link.
    """
    if (path / FILE).is_file():
        return [path]
    found = sorted({file.parent for pattern in ("seed=*", "*=*/seed=*") for file in path.glob(f"{pattern}/{FILE}")})
    for folder in found:
        for part in (folder, folder.parent):
            if part != path:
                refuse_link(part)
    return sorted(found, key=lambda folder: (folder.parent.name, len(folder.name), folder.name))


@runtime_checkable
class Writer(Protocol):
    """A recorder of this process, which may hold commits that are not on disk yet."""

    path: Path

    def flush(self) -> None:
        """Write what was committed."""
        ...


#: Recorders of this process that are open.
WRITERS: weakref.WeakSet[Any] = weakref.WeakSet()


def flush_below(path: Path) -> None:
    """Write what recorders of this process have committed below `path`, so that it can be read."""
    for writer in list(_writers_below(path.absolute())):
        writer.flush()


def _writers_below(path: Path) -> Iterator[Writer]:
    for writer in list(WRITERS):
        if path == writer.path or path in writer.path.parents:
            yield writer
