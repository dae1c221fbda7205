"""Values as an experiment file gives them back.  Imports no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any


def as_in_a_file(value: Any) -> Any:
    """A keyword argument as an experiment file gives it back: a list for a tuple, plain numbers for numpy's.

    Else the same run would get one value when it begins and another when it goes on.

    Raises:
        ValueError: if a file cannot hold it.
    """
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [as_in_a_file(each) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_in_a_file(each) for key, each in value.items()}
    raise ValueError(
        f"{value!r}, a {type(value).__name__}, cannot be an argument, since an experiment file must keep it: give "
        "finite numbers, texts, truth values, lists, and tables of these with texts as keys, and leave out what is None"
    )
