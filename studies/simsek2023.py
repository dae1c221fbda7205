"""What the figures of Simsek et al. (2023) share: points of a flow archive, u_ij, colours of the classes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis.panels import PALETTE

#: Of the classes, and of the regimes where each is the best that is a minimum.
COLOURS = {"copy-average": PALETTE[2], "perturbed-copy": PALETTE[1], "other": "#999999"}
NAMES = {"copy-average": "copy-average", "perturbed-copy": "perturbed n-copy", "other": "other"}


def at(archive: xr.Dataset, activation: str, n: int, k: int) -> xr.Dataset:
    """One size without padding, the inputs being the teacher's nodes first.

    Raises:
        KeyError: if the archive does not hold that size.
    """
    here = (archive["activation"] == activation) & (archive["n"] == n) & (archive["k"] == k)
    if not here.any():
        raise KeyError(f"no flows of {activation} with n={n}, k={k} in the archive")
    one = archive.isel(point=int(here.values.argmax()))
    inputs = int(one["weight"].notnull().any(["seed", "node"]).sum())
    return one.isel(node=slice(0, n), input_node=slice(0, inputs))


def cosines(one: xr.Dataset) -> xr.DataArray:
    """u_ij of student node i and teacher node j at the end, (seed, node, teacher_node), with the sign of a_i.

    Nodes are in the order in which they best match teacher nodes, so that copies lie on the diagonal, and teacher
    nodes that the same node matches best stand together.
    """
    w, a = one["weight"], one["outgoing"]
    k = int(one["k"])
    u = (w / np.sqrt((w**2).sum("input_node")) * np.sign(a)).isel(input_node=slice(0, k))
    rows = []
    for values in u.transpose("seed", "node", "input_node").values:
        best, margin = values.argmax(0), values.max(0)
        first = np.argsort([(best == i).sum() - margin[best == i].max(initial=0) for i in range(len(values))])
        place = np.argsort(first)
        columns = np.lexsort((-margin, place[best]))
        rows.append(values[first][:, columns])
    dims = ("seed", "node", "teacher_node")
    return xr.DataArray(np.stack(rows), dims=dims, coords={"seed": u["seed"]}, attrs=described("cosine u of w and v"))


def described(text: str) -> dict[str, str]:
    """Attributes of a measured variable."""
    return {"units": "1", "long_name": text, "source": "Simsek et al. 2023 (arXiv:2311.01644)"}


def draw_cosines(u: xr.DataArray, ax: Axes, *, labels: bool = True) -> None:
    """Map of u, (node, teacher_node) in this order; blue positive, red negative."""
    ax.imshow(u, cmap="RdBu", vmin=-1, vmax=1, aspect="equal")
    ax.set(xticks=[], yticks=[])
    if labels:
        ax.set(xlabel="teacher node", ylabel="student node")
