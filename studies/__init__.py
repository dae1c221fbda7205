"""Figures of the papers: one module each, with EXPERIMENTS (data), measure(archive) and draw(measured)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Protocol, cast

import xarray as xr
from matplotlib.figure import Figure

from tsdyn.experiment import Experiment

_MODULES = {
    "tian2019-luck": "tian2019_luck",
    "tian2019-heatmaps": "tian2019_heatmaps",
    "tian2019-multilayer": "tian2019_multilayer",
    "tian2019-multilayer-large": "tian2019_multilayer_large",
    "tian2020-digits": "tian2020_digits",
    "tian2020-l-shape": "tian2020_l_shape",
    "tian2020-success-rate": "tian2020_success_rate",
    "tian2020-recovery": "tian2020_recovery",
}


class Study(Protocol):
    """What a study's module offers.

    Attributes:
        TITLE: One line.
        SOURCE: Paper and figure.
        EXPERIMENTS: Scale (smoke, desk, paper) → experiment.
    """

    TITLE: str
    SOURCE: str
    EXPERIMENTS: Mapping[str, Experiment]

    def measure(self, archive: xr.Dataset) -> xr.Dataset: ...

    def draw(self, measured: xr.Dataset) -> Figure: ...


def names() -> tuple[str, ...]:
    """Names of all studies."""
    return tuple(_MODULES)


def load(name: str) -> Study:
    """The study called `name`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in _MODULES:
        close = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"studies: no study {name!r}{hint}; there are {', '.join(_MODULES)}")
    return cast(Study, importlib.import_module(f"tsdyn.studies.{_MODULES[name]}"))
