"""Phases: the share of seeds that ended up in each class, over the swept keys.

A class is a small integer, named by the array's attributes ``flag_values`` and ``flag_meanings`` (CF conventions, 3.5),
so that classes can be stored in netCDF and any measure that gives such codes can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from tsdyn.analysis.lift import lift
from tsdyn.analysis.specialization import SOURCE, THRESHOLD, correlation_of, counted

from tsdyn.networks.node_pairs import Array, best_match

#: Classes of `recovery_class`: how many teacher nodes have a student node of their own.
RECOVERY = ("none", "some", "all")


def recovery_code(correlation: Array, threshold: float) -> Array:
    """Code 0 if no teacher node is matched above `threshold`, 2 if all are, else 1; (..., teacher_node, node) -> (...).

    NaN for dead members; padding counts as no teacher node.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.phase import recovery_code
        >>> float(recovery_code(np.array([[0.99, 0.1], [0.2, 0.5]]), 0.95))  # some
        1.0
    """
    best = best_match(correlation)
    nodes, found = (~np.isnan(best)).sum(-1), (best > threshold).sum(-1)
    return np.where(nodes == 0, np.nan, np.where(found == 0, 0, np.where(found == nodes, 2, 1)))


def shares(codes: Array, values: Array) -> Array:
    """Share of the codes, leaving out NaN, that equal each of `values`; (..., seed) -> (..., class).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.phase import shares
        >>> shares(np.array([0.0, 2.0, 2.0, np.nan]), np.array([0, 1, 2])).round(3).tolist()
        [0.333, 0.0, 0.667]
    """
    n = (~np.isnan(codes)).sum(-1)[..., None]
    hits = (codes[..., None] == values).sum(-2)
    return np.where(n > 0, hits / np.maximum(n, 1), np.nan)


def flags(meanings: Sequence[str]) -> dict[str, str | Array]:
    """Attributes that name the codes 0, 1, 2, ...; meanings must not contain blanks."""
    return {"flag_values": np.arange(len(meanings), dtype=np.int64), "flag_meanings": " ".join(meanings)}


def recovery_class(archive: xr.Dataset, *, threshold: float = THRESHOLD) -> xr.DataArray:
    """Whether none, some or all teacher nodes are recovered; (...), codes of `RECOVERY`, NaN for dead members.

    A living student all of whose nodes are dead has recovered none.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks a node dimension.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.phase import recovery_class
        >>> recovery_class(ds).isel(epoch=-1).dims
        ('overrealization', 'seed')
    """
    found = lift(
        recovery_code,
        correlation_of(archive, "recovery_class"),
        reads=("teacher_node", "node"),
        name="recovery_class",
        attrs={
            "units": "1",
            "long_name": f"how many teacher nodes are recovered (correlation with a student node > {threshold:g})",
            "source": SOURCE,
            **flags(RECOVERY),
        },
        threshold=threshold,
    )
    return counted(found, archive)


def fractions(codes: xr.DataArray, *, over: str = "seed") -> xr.DataArray:
    """Share of seeds in each class, (..., class); seeds without a class (NaN) are left out.  Lazy.

    Args:
        codes: Numbers with the attributes ``flag_values`` and ``flag_meanings``, such as `recovery_class` gives.
        over: Dimension to count over.

    Raises:
        ValueError: if `codes` lacks `over` or the attributes.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.phase import fractions, recovery_class
        >>> found = fractions(recovery_class(ds).isel(epoch=-1)).compute()
        >>> bool(abs(found.sum("class") - 1).max() < 1e-12)
        True
    """
    if over not in codes.dims:
        raise ValueError(f"fractions: {codes.name!r} has no dimension {over}; select with a list or slice")
    if not {"flag_values", "flag_meanings"} <= set(codes.attrs):
        raise ValueError(
            f"fractions: {codes.name!r} does not name its classes; set attrs flag_values and flag_meanings"
        )
    return lift(
        shares,
        codes,
        reads=(over,),
        gives=("class",),
        labels={"class": str(codes.attrs["flag_meanings"]).split()},
        name="fraction",
        attrs={
            "units": "1",
            "long_name": f"share of {over}s by {codes.attrs.get('long_name', codes.name)}",
            "source": str(codes.attrs.get("source", "")),
        },
        values=np.atleast_1d(codes.attrs["flag_values"]),
    )
