"""Studies that reproduce figures of the papers: one module each, with EXPERIMENTS, measure(archive), draw(measured)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Protocol, cast, runtime_checkable

import xarray as xr
from matplotlib.figure import Figure

from tsdyn import registers
from tsdyn.experiment.experiment import Experiment

MODULES = {
    "tian2019-luck": "tian2019_luck",
    "tian2019-data": "tian2019_data",
    "tian2019-ranks": "tian2019_ranks",
    "tian2019-batchnorm-bias": "tian2019_batchnorm_bias",
    "tian2019-cifar10": "tian2019_cifar10",
    "tian2019-digits": "tian2019_digits",
    "tian2019-heatmaps": "tian2019_heatmaps",
    "tian2019-multilayer": "tian2019_multilayer",
    "tian2019-multilayer-large": "tian2019_multilayer_large",
    "tian2020-connectivity": "tian2020_connectivity",
    "tian2020-samples": "tian2020_samples",
    "tian2020-augmentation": "tian2020_augmentation",
    "tian2020-cifar10": "tian2020_cifar10",
    "tian2020-digits": "tian2020_digits",
    "tian2020-boundaries": "tian2020_boundaries",
    "tian2020-l-shape": "tian2020_l_shape",
    "tian2020-multilayer-l-shape": "tian2020_multilayer_l_shape",
    "tian2020-success-rate": "tian2020_success_rate",
    "tian2020-recovery": "tian2020_recovery",
    "simsek2023-trajectories": "simsek2023_trajectories",
    "simsek2023-one-neuron": "simsek2023_one_neuron",
    "simsek2023-loss": "simsek2023_loss",
    "simsek2023-norms": "simsek2023_norms",
    "simsek2023-phase-diagram": "simsek2023_phase_diagram",
    "goldt2019-eg": "goldt2019_eg",
}


@runtime_checkable
class Reading(Protocol):
    """An existing file that a study measures instead of running an experiment."""

    @property
    def name(self) -> str: ...

    def to_toml(self) -> str: ...

    def read(self) -> xr.Dataset:
        """Read the file; gives the argument of `Study.measure`."""
        ...


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

    def measure(self, archive: xr.Dataset) -> xr.Dataset: ...

    def draw(self, measured: xr.Dataset) -> Figure: ...


def names() -> tuple[str, ...]:
    """Names of all studies: tsdyn's own, and those of installed packages (`registers.STUDIES`)."""
    return tuple(dict.fromkeys([*MODULES, *registers.STUDIES.names()]))


def load(name: str) -> Study:
    """The study called `name`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name in MODULES:
        return cast(Study, importlib.import_module(f"tsdyn.studies.{MODULES[name]}"))
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"studies: no study {name!r}{hint}; there are {', '.join(names())}")
    found = registers.STUDIES.load(name)
    if missing := [word for word in ("TITLE", "SOURCE", "EXPERIMENTS", "measure", "draw") if not hasattr(found, word)]:
        raise registers.PartError(
            f"study {name!r}: {registers.STUDIES.origin(name).target} has no {', '.join(missing)}; a study is a module "
            "with TITLE, SOURCE, EXPERIMENTS, measure(archive) and draw(measured)"
        )
    return cast(Study, found)
