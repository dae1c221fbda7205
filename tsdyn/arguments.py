"""Kinds of arguments of public functions; an argument of another kind is refused by name, before any work."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
_MISSING = object()


class Kind(NamedTuple):
    """What an argument has to be: in words, and as a test of a value."""

    words: str
    holds: Callable[[Any], bool]


def takes(**kinds: Kind) -> Callable[[F], F]:
    """Decorate a function so that it refuses arguments that are not of these kinds.

    An argument whose default is None may be None.

    Raises:
        TypeError: by the decorated function, naming it, the argument, what was given and what it takes.

    Examples:
        >>> from tsdyn.arguments import WHOLE, takes
        >>> @takes(layer=WHOLE)
        ... def width(layer):
        ...     return layer
        >>> width("first")
        Traceback (most recent call last):
            ...
        TypeError: width: layer is 'first'; it takes a whole number
    """

    def decorate(function: F) -> F:
        parameters = list(inspect.signature(function).parameters.values())
        asked = [
            (at, one.name, kinds[one.name], one.default is None)
            for at, one in enumerate(parameters)
            if one.name in kinds
        ]
        if len(asked) != len(kinds):
            raise TypeError(f"takes: {function.__name__} has no arguments {sorted({*kinds} - {a[1] for a in asked})}")

        caller = function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[-1]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for at, name, kind, optional in asked:
                value = args[at] if at < len(args) else keywords.get(name, _MISSING)
                if value is not _MISSING and not (optional and value is None):
                    check(caller, name, value, kind)
            return function(*args, **keywords)

        return checked  # type: ignore[return-value]

    return decorate


def check(caller: str, name: str, value: object, kind: Kind) -> None:
    """Refuse a value that is not of a kind.

    Raises:
        TypeError: naming caller, argument, what was given and what it takes.
    """
    if not kind.holds(value):
        raise TypeError(f"{caller}: {name} is {_told(value)}; it takes {kind.words}")


def _told(value: object) -> str:
    """A value in a few words: itself if it is short, otherwise its class."""
    if value is None or isinstance(value, str | bytes | int | float):
        return reprlib.repr(value)
    word = value.__name__ if inspect.isclass(value) else type(value).__name__
    kind = "the class" if inspect.isclass(value) else "an" if word[:1].lower() in "aeiou" else "a"
    return f"{kind} {word}"


def _of(module: str, *names: str) -> Callable[[Any], bool]:
    """Whether a value is of one of these classes; none is if the module that defines them was never imported."""

    def holds(value: Any) -> bool:
        found = sys.modules.get(module)
        return found is not None and isinstance(value, tuple(getattr(found, name) for name in names))

    return holds


_tensor = _of("torch", "Tensor")
_network = _of("tsdyn.networks.network", "Network")
_module = _of("torch.nn", "Module")
_dataset = _of("xarray", "Dataset")


def _path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _name(value: Any) -> bool:
    return isinstance(value, str)


def _listed(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether a value is a collection, read as often as wanted, of what holds."""
    once = isinstance(value, str | bytes | Mapping | Iterator) or not isinstance(value, Iterable)
    return not once and all(holds(one) for one in value)


def _numbers(value: Any) -> bool:
    if _tensor(value):
        return True
    try:
        return np.asarray(value).dtype.kind in "biufc"
    except (TypeError, ValueError, RuntimeError):  # of unequal rows, of what refuses to be an array
        return False


def _whole(value: Any) -> bool:
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        return False
    return not isinstance(value, bool | np.bool_)


NETWORK = Kind("a Network, which Network.from_torch makes of an nn.Sequential", _network)
MODULE = Kind("an nn.Module or a Network", lambda value: _module(value) or _network(value))
TORCH = Kind("an nn.Module", _module)
LAYERS = Kind("a list of arrays, one per layer", lambda value: _listed(value, lambda one: one is None or _numbers(one)))
NUMBER = Kind("a number", lambda value: isinstance(value, Real | np.number) and not isinstance(value, bool))
NUMBERS = Kind("an array or a tensor of numbers", _numbers)
WHOLE = Kind("a whole number", _whole)
LAYER = Kind("a layer's number, or its name in a module of your own", lambda value: _whole(value) or _name(value))
FUNCTION = Kind("a function", callable)
DATASET = Kind("an xarray.Dataset, as tsdyn.open gives it", _dataset)
LABELLED = Kind("an xarray.Dataset or DataArray, as tsdyn.open gives it", _of("xarray", "Dataset", "DataArray"))
PATH = Kind("a path", _path)
ARCHIVE = Kind(
    "the path of an archive, or a Dataset as tsdyn.open gives it", lambda value: _path(value) or _dataset(value)
)
PATHS = Kind("a path, or a list of paths", lambda value: _path(value) or _listed(value, _path))
NAMES = Kind("a name, or a list of names", lambda value: _name(value) or _listed(value, _name))
SIGMA = Kind("the name of an activation, or a function", lambda value: _name(value) or callable(value))
TEXT = Kind("a name", _name)
