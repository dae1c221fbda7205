"""Values that a user gives to a commit, and the shapes that variables must have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor

from tsdyn import schema
from tsdyn.vocabulary import Variable

_log = logging.getLogger("tsdyn")
#: A value of the user's own: numbers, or one array per layer.
Values = np.ndarray | list[np.ndarray]


def plain(name: str, value: Any) -> Values:
    """The numbers of a value of the user's own; of a layered variable a list of one array per layer."""

    def array(given: Any) -> np.ndarray:
        try:
            found = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
            if given is not None and not np.iscomplexobj(found):
                return found.astype(float)
        except (TypeError, ValueError):
            pass
        raise ValueError(f"Recorder.commit: {name} = {given!r}; give a real number or an array of such")

    row = schema.DECLARED.get(name)
    if row is None or not row.layered:
        return array(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"Recorder.commit: {name} is {type(value).__name__}, and it was declared over {row.dims}; give a list of "
            "one array per layer, from the lowest up"
        )
    return [array(one) for one in value]


def each(value: Values, change: Callable[[np.ndarray], np.ndarray]) -> Values:
    """The value with its arrays changed."""
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def nothing(row: Variable, layout: schema.Layout) -> Any:
    """NaN for one member and epoch, in the shape of the variable."""
    if not row.layered:
        return np.full((1, *layout.block(row, None)), np.nan)
    return [np.full((1, *layout.block(row, layer)), np.nan) for layer in range(1, layout.depth + 1)]


def tell_odd(record: Mapping[str, Any], told: Set[str], where: str) -> set[str]:
    """Log which values, but for those that were told of before, are NaN or infinite; returns their names."""
    found = set()
    for name in record.keys() - told:
        parts = record[name] if isinstance(record[name], list) else [record[name]]
        if not all(np.isfinite(part).all() for part in parts):
            found.add(name)
            _log.warning("%s: %s is NaN or infinite; it is recorded as it is", where, name)
    return found


def refuse_other_shape(name: str, value: Any, layout: schema.Layout) -> None:
    """Raise ValueError unless a value has the shape of its variable in this layout."""
    row = schema.variable(name)
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, list) != row.layered or len(parts) > layout.depth:
        gave = f"a list of {len(parts)}" if isinstance(value, list) else "one array"
        raise ValueError(
            f"Recorder: {name} gave {gave}; its variable has dimensions {row.dims}: "
            + (f"give a list of one array per layer, {layout.depth} here" if row.layered else "give one array")
        )
    for layer, part in enumerate(parts, start=1):
        wanted, found = layout.block(row, layer if row.layered else None), tuple(np.shape(part))
        if found != wanted and not wanted:
            whole = "; a loss is the mean over the batch, not one number per sample" if name == "loss_eval" else ""
            raise ValueError(f"Recorder: {name} has shape {found}; over {row.dims} it is one number{whole}")
        if found != wanted:
            raise ValueError(f"Recorder: {name} has shape {found}; {row.dims[2:]} is {wanted} here")
