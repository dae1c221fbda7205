"""Which samples each training set of ``data.leave_out`` keeps.  Imports no torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tsdyn.experiment.parts import Data

#: Key along which the training sets are points of the sweep; its last word is their dimension.
KEY = "data.leave_out.subset"
#: First word of the key of the draws, which are the same for all seeds.
_STREAM = 0x1EAFE0


def with_subsets(values: dict[str, Any]) -> dict[str, Any]:
    """The experiment's tables with `KEY` swept over all subsets, if there are some and none is chosen."""
    data = values.get("data")
    given = data.leave_out.model_dump(exclude_none=True) if isinstance(data, Data) else None
    given = data.get("leave_out") if isinstance(data, dict) else given
    sweep = values.get("sweep", {})
    if not isinstance(given, dict) or "subset" in given or not isinstance(given.get("subsets"), int):
        return values
    if not isinstance(sweep, dict) or KEY in sweep or not 1 <= given["subsets"] <= 10**6:
        return values
    return copy.copy(values) | {"sweep": {**sweep, KEY: list(range(given["subsets"]))}}


def left_out(data: Data, subset: int) -> np.ndarray:
    """Indices of the samples that a training set lacks, increasing; the same for every seed."""
    given = data.leave_out
    assert given.share is not None
    assert isinstance(data.train, int)
    count = max(1, round(given.share * data.train))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((_STREAM, subset))))
    return np.sort(rng.choice(data.train, count, replace=False))


def kept(data: Data) -> np.ndarray:
    """Whether each training set keeps each sample, (subset, sample)."""
    assert data.leave_out.subsets is not None
    assert isinstance(data.train, int)
    found = np.ones((data.leave_out.subsets, data.train), dtype=bool)
    for subset, row in enumerate(found):
        row[left_out(data, subset)] = False
    return found
