"""Parts shared by the figures of Simsek et al. (2023): experiments, ends of flows, u_ij, colours of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from tsdyn.analysis import panels
from tsdyn.analysis.style import PALETTE

from tsdyn.experiment.experiment import Experiment
from tsdyn.schema import words_of

#: Colours of the classes, and of the regimes in which each is the best minimum.
COLOURS = {"copy-average": PALETTE[0], "perturbed-copy": PALETTE[1], "other": PALETTE[2]}
NAMES = {"copy-average": "copy-average", "perturbed-copy": "perturbed n-copy", "other": "neither"}
#: Marks of the classes, so that they differ in grey, too.
MARKS = {"copy-average": "o", "perturbed-copy": "s", "other": "X"}


#: Variables of `ends` that do not depend on the seed.
THEORY = (
    "loss_copy_average", "loss_perturbed_copy", "index_copy_average", "index_perturbed_copy",
    "one_neuron_norm", "one_neuron_outgoing",
)  # fmt: skip


def flows(
    name: str,
    sizes: Sequence[tuple[int, int]],
    activations: Sequence[str] = ("erf",),
    *,
    seeds: int = 20,
    times: Mapping[str, Any] | None = None,
) -> Experiment:
    """Gradient flows of students of n nodes against orthonormal teachers of k on k + 1 inputs, at every (n, k).

    Activation by activation, the cheapest sizes first.
    """
    ordered = sorted(dict.fromkeys(sizes), key=lambda size: (size[0] * size[1], size))
    points = [(activation, n, k) for activation in activations for n, k in ordered]
    zipped: dict[str, list[Any]] = {
        "student.activation": [activation for activation, _, _ in points],
        "teacher.widths": [[k + 1, k, 1] for _, _, k in points],
        "student.widths": [[k + 1, n, 1] for _, n, k in points],
    }
    return Experiment(
        kind="population-flow",
        name=name,
        seeds=seeds,
        teacher={"widths": zipped["teacher.widths"][0], "init": "orthonormal"},
        student={"widths": zipped["student.widths"][0], "activation": points[0][0]},
        flow={} if times is None else {"times": times},
        sweep={"zip": zipped},
    )


def ends(archive: xr.Dataset) -> xr.Dataset:
    """End points of the flows over (point, seed), loaded: ``weight`` (node, input_node) of layer 1, ``outgoing`` (node)
    of layer 2, ``loss``, ``class`` in words, and the variables of `THEORY`; coordinates activation, n and k."""
    ds = archive[["end_weight", "end_loss", "end_class", *THEORY]].load()
    lower, upper = (ds["end_weight"].sel(layer=layer, drop=True) for layer in (1, 2))
    outgoing = upper.isel(node=0, drop=True).isel(input_node=slice(0, ds.sizes["node"]))
    found = {
        "loss": ds["end_loss"],
        "class": words_of(ds["end_class"]),
        "weight": lower,
        "outgoing": outgoing.rename(input_node="node"),
        **{name: ds[name].isel(seed=0, drop=True) for name in THEORY},
    }
    kept = [name for name in ("point", "seed", "activation") if name in ds.coords]
    bare = {name: array.drop_vars(set(array.coords) - set(kept)) for name, array in found.items()}
    return xr.Dataset(bare).assign_coords(nodes_of(archive))


def nodes_of(archive: xr.Dataset) -> dict[str, xr.DataArray]:
    """Coordinates n and k of each point."""
    columns = {"n": archive["width"], "k": archive["teacher_width"]}
    return {name: column.sel(layer=1, drop=True).reset_coords(drop=True) for name, column in columns.items()}


def at(ends: xr.Dataset, activation: str, n: int, k: int) -> xr.Dataset:
    """One size of `ends` without padding; the first inputs are those along the teacher's nodes.

    Raises:
        KeyError: if the archive does not hold that size.
    """
    here = (ends["activation"] == activation) & (ends["n"] == n) & (ends["k"] == k)
    if not here.any():
        raise KeyError(f"no flows of {activation} with n={n}, k={k} in the archive")
    one = ends.isel(point=int(here.values.argmax()))
    inputs = int(one["weight"].notnull().any(["seed", "node"]).sum())
    return one.isel(node=slice(0, n), input_node=slice(0, inputs))


def cosines(one: xr.Dataset) -> xr.DataArray:
    """Cosine u_ij of student node i and teacher node j at the end, (seed, node, teacher_node), with the sign of a_i.

    Nodes are ordered by their best matching teacher nodes, so that copies lie on the diagonal and teacher nodes matched
    best by the same node are adjacent.
    """
    w, a = one["weight"], one["outgoing"]
    k = int(one["k"])
    u = (w / np.sqrt((w**2).sum("input_node")) * np.sign(a)).isel(input_node=slice(0, k))
    rows = []
    for values in u.transpose("seed", "node", "input_node").values:
        first, columns = order(values)
        rows.append(values[first][:, columns])
    dims = ("seed", "node", "teacher_node")
    return xr.DataArray(np.stack(rows), dims=dims, coords={"seed": u["seed"]}, attrs=described("cosine u of w and v"))


def order(values: NDArray) -> tuple[NDArray, NDArray]:
    """Orders of student and teacher nodes by best match, of cosines (node, teacher_node)."""
    best, margin = values.argmax(0), values.max(0)
    first = np.argsort([(best == i).sum() - margin[best == i].max(initial=0) for i in range(len(values))])
    columns = np.lexsort((-margin, np.argsort(first)[best]))
    return first, columns


def described(text: str) -> dict[str, str]:
    """Attributes of a measured variable."""
    return {"units": "1", "long_name": text, "source": "Simsek et al. 2023 (arXiv:2311.01644)"}


def draw_cosines(u: xr.DataArray, ax: Axes, *, labels: bool = True) -> AxesImage:
    """Draw a heat map of u (node, teacher_node) in the given order; blue positive, red negative; gives the image."""
    image = ax.imshow(u, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    panels.signs(np.asarray(u), -1, ax)
    ax.set(xticks=[], yticks=[])
    if labels:
        ax.set(xlabel="teacher nodes j, by match", ylabel="student nodes i")
    return image
