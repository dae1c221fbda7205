"""The accessor ``ds.tsdyn``: tsdyn's functions of an archive as methods of it.

Whatever reads archives imports this module, so that every Dataset of tsdyn's has the accessor.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import xarray as xr

if TYPE_CHECKING:
    from tsdyn.experiment.experiment import Experiment

#: Topics of `tsdyn.analysis` whose functions take an archive first, as attributes of the accessor.
TOPICS = (
    "alignment", "audit", "batch_norm", "citations", "connectivity", "lottery", "matching", "order_parameters", "phase",
    "similarity", "specialization", "summary",
)  # fmt: skip


class _Topic:
    """The functions of one module of `tsdyn.analysis`, with the archive as their first argument.

    Called itself, it is the function that has the module's name.
    """

    def __init__(self, module: ModuleType, of: xr.Dataset | xr.DataArray) -> None:
        self._module, self._of = module, of
        self.__doc__ = module.__doc__

    def __dir__(self) -> list[str]:
        functions = inspect.getmembers(self._module, inspect.isfunction)
        return [name for name, f in functions if f.__module__ == self._module.__name__ and not name.startswith("_")]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in dir(self):
            raise AttributeError(f"{self._module.__name__} has no function {name!r}; it has {', '.join(dir(self))}")
        return partial(getattr(self._module, name), self._of)

    def __call__(self, *given: Any, **named: Any) -> Any:
        name = self._module.__name__.rpartition(".")[2]
        if name not in dir(self):
            raise TypeError(f"ds.tsdyn.{name} is a topic; call one of its functions: {', '.join(dir(self))}")
        return getattr(self, name)(*given, **named)


@xr.register_dataset_accessor("tsdyn")
@xr.register_dataarray_accessor("tsdyn")
class Accessor:
    """``ds.tsdyn``: what tsdyn does with an archive, as methods of the archive or of a part of it.

    ``ds.tsdyn.layer(1)`` is ``tsdyn.layer(ds, 1)``, ``ds.tsdyn.specialization.recovered()`` is
    ``tsdyn.analysis.specialization.recovered(ds)``, and ``ds.tsdyn.audit()`` is ``tsdyn.analysis.audit.audit(ds)``.
    """

    def __init__(self, of: xr.Dataset | xr.DataArray) -> None:
        self._of: Any = of

    def layer(self, number: int) -> Any:
        """One layer without padding; see `tsdyn.layer`."""
        from tsdyn.archive.selecting import layer

        return layer(self._of, number)

    def select(self, **labels: Any) -> Any:
        """The points of a sweep with these values of swept keys; see `tsdyn.select`."""
        from tsdyn.archive.selecting import select

        return select(self._of, **labels)

    @property
    def experiment(self) -> Experiment:
        """The experiment that made the archive.

        Raises:
            ValueError: if the Dataset names none, or several.
        """
        from tsdyn.archive.selecting import experiment_of

        if isinstance(self._of, xr.DataArray):
            raise ValueError("tsdyn.experiment: a variable does not say of which experiment it is; ask its Dataset")
        return experiment_of(self._of)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *TOPICS]

    def __getattr__(self, name: str) -> _Topic:
        if name not in TOPICS:
            raise AttributeError(f"ds.tsdyn has no {name!r}; it has layer, select, experiment and {', '.join(TOPICS)}")
        return _Topic(importlib.import_module(f"tsdyn.analysis.{name}"), self._of)
