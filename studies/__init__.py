"""Studies that reproduce figures of the papers: one module each, with EXPERIMENTS, measure(archive), draw(measured)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from tsdyn import registers
from tsdyn.experiment.experiment import Experiment

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

#: What a study's module has.
_WORDS = ("TITLE", "SOURCE", "EXPERIMENTS", "measure", "draw")


@runtime_checkable
class Reading(Protocol):
    """An existing file that a study measures instead of running an experiment."""

    @property
    def name(self) -> str:
        """Name of what is measured, as an experiment's."""
        ...

    def to_toml(self) -> str:
        """What is read, as the text of an experiment file."""
        ...

    def read(self) -> xr.Dataset:
        """Read the file; gives the argument of `Study.measure`."""
        ...


def seconds_of_measuring(study: object, experiment: Experiment, seconds: float) -> float:
    """Seconds that a study's `measure` takes after a run of so many `seconds`, where it trains again; 0 where not.

    ``study.AGAIN`` says it: a number of seconds per second of the run, or a function of experiment and seconds.
    """
    said = getattr(study, "AGAIN", 0.0)
    return float(said(experiment, seconds)) if callable(said) else float(said) * seconds


class Study(Protocol):
    """Interface of a study's module.

    Attributes:
        TITLE: What the figure shows, in one line.
        SOURCE: Paper and figure.
        EXPERIMENTS: Scale (smoke, desk, paper) → experiment to run, or file to read.
    """

    TITLE: str
    SOURCE: str
    EXPERIMENTS: Mapping[str, Experiment | Reading]

    def measure(self, archive: xr.Dataset) -> xr.Dataset:
        """The numbers that the figure shows, from the experiment's archive."""
        ...

    def draw(self, measured: xr.Dataset) -> Figure:
        """The figure, from the numbers of `measure`."""
        ...


class _Modules(Mapping[str, Study]):
    """tsdyn's own studies by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> Study:
        return cast(Study, importlib.import_module(f"tsdyn.studies.{name.replace('-', '_')}"))

    def __iter__(self) -> Iterator[str]:
        return iter(registers.STUDIES.own)

    def __len__(self) -> int:
        return len(registers.STUDIES.own)


STUDIES = _Modules()


def names() -> tuple[str, ...]:
    """Names of all studies: tsdyn's own, and those of installed packages (`registers.STUDIES`)."""
    return registers.STUDIES.names()


def load(name: str) -> Study:
    """The study called `name`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    found = registers.STUDIES.load(name)
    if missing := [word for word in _WORDS if not hasattr(found, word)]:
        raise registers.PartError(
            f"study {name!r}: {registers.STUDIES.origin(name).target} has no {', '.join(missing)}; a study is a module "
            "with TITLE, SOURCE, EXPERIMENTS, measure(archive) and draw(measured)"
        )
    return cast(Study, found)
