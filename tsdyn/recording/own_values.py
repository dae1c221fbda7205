"""Values that a user gives to a commit, and the shapes that variables must have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from tsdyn import schema
from tsdyn.vocabulary import Variable

#: A value of the user's own: numbers, or one array per layer.
Values = np.ndarray | list[np.ndarray]


def plain(name: str, value: Any) -> Values:
    """The numbers of a value of the user's own; of a layered variable a list of one array per layer."""

    def array(given: Any) -> np.ndarray:
        return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, float)

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


def refuse_other_shape(name: str, value: Any, layout: schema.Layout) -> None:
    """Raise ValueError unless a value has the shape of its variable in this layout."""
    row = schema.variable(name)
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, list) != row.layered or len(parts) > layout.depth:
        raise ValueError(f"Recorder: {name} gave {len(parts)} arrays; its variable has dimensions {row.dims}")
    for layer, part in enumerate(parts, start=1):
        wanted = layout.block(row, layer if row.layered else None)
        if tuple(np.shape(part)) != wanted:
            raise ValueError(f"Recorder: {name} has shape {tuple(np.shape(part))}; {row.dims[2:]} is {wanted} here")
