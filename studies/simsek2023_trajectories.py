"""Simsek et al. (2023), Figure 1: two student nodes on their way to copy one teacher node and average the other two.

On the left the incoming weights of n = 2 nodes against k = 3, seen along (1, 1, 1): teacher nodes are the corners of a
triangle, and the average of two lies opposite to the third.  Then the loss, with that of the copy-average point; relu
falls below it, since its critical point is only near that point.  On the right u_ij at the end for n = 4, k = 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.studies.simsek2023 import at, described, draw_cosines, ends, flows, order

from tsdyn.experiment.experiment import Experiment

TITLE = "trajectories of gradient flow and order parameters at convergence"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 1"

_SIZES = ((2, 3), (4, 8))
_TIMES = {"first": 1e-2, "last": 1e4, "number": 200}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("trajectories-smoke", _SIZES, ("erf", "relu"), seeds=2, times=_TIMES | {"number": 20}),
    "desk": flows("trajectories-desk", _SIZES, ("erf", "relu"), seeds=10, times=_TIMES),
    "paper": flows("trajectories-paper", _SIZES, ("erf", "relu"), seeds=20, times=_TIMES),
}

#: The plane orthogonal to (1, 1, 1): axes whose projections are the corners of an upright triangle.
_PLANE = np.stack([np.array([-1, 0, 1]) / np.sqrt(2), np.array([-1, 2, -1]) / np.sqrt(6)])


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Paths and outgoing weights of the small student, and the large student of least loss; over activation.

    - ``path`` (activation, seed, node, axis, time): incoming weights in the plane across v₁ + v₂ + v₃, times sign a_i,
    - ``path_outgoing`` (activation, seed, node, time): |a_i| along the way,
    - ``overlap`` (activation, seed, node, teacher_node): r_i u_ij at the end,
    - ``one_neuron_place`` (activation, axis): the one-neuron solution against the two teacher nodes that are averaged,
    - ``cosine``, ``length``, ``weight_out`` (larger_node, ...): u_ij, r_i and a_i at the end for n = 4, k = 8.
    """
    path = archive[["weight", "population_loss"]].load()
    path = path.where(path["time"] > 0, drop=True)
    path = path.drop_vars([name for name in path.coords if name not in path.dims])
    ended = ends(archive).assign(
        path_weight=path["weight"].sel(layer=1, drop=True), path_loss=path["population_loss"],
        path_outgoing=path["weight"].sel(layer=2, drop=True).isel(node=0, drop=True).rename(input_node="out_node"),
    )  # fmt: skip
    names = list(dict.fromkeys(ended["activation"].values.tolist()))
    rows = [xr.Dataset(_one_activation(ended, str(name))) for name in names]
    ds = xr.concat(
        rows, dim="activation", data_vars="all", coords="minimal", compat="override", join="exact", combine_attrs="drop"
    ).assign_coords(activation=names)
    texts = {
        "path": "incoming weights across (1, 1, 1), times the sign of a",
        "path_outgoing": "|a| along the flow, n = 2, k = 3",
        "end_outgoing": "|a| at the end, n = 2, k = 3",
        "path_loss": "loss L along the flow, n = 2, k = 3",
        "overlap": "r_i u_ij at the end, n = 2, k = 3",
        "one_neuron_place": "one-neuron solution of the averaged teacher nodes, across (1, 1, 1)",
        "copies_and_averages": "whether the seed ends at the copy-average point",
        "loss_copy_average": "L*(2)",
        "cosine": "u_ij at the end, n = 4, k = 8, the seed of least loss",
        "length": "r_i at the end, n = 4, k = 8, the same seed",
        "weight_out": "a_i at the end, n = 4, k = 8, the same seed",
        "best_loss": "its loss",
    }
    return ds.assign({key: ds[key].assign_attrs(described(text)) for key, text in texts.items()})


def _one_activation(ended: xr.Dataset, name: str) -> dict[str, xr.DataArray]:
    small, large = at(ended, name, 2, 3), at(ended, name, 4, 8)
    sign = np.sign(small["outgoing"])
    w = small["path_weight"].isel(input_node=slice(0, 3)) * sign
    plane = xr.DataArray(_PLANE, dims=("axis", "input_node"))
    outgoing = abs(small["path_outgoing"].isel(out_node=slice(0, 2))).rename(out_node="node")
    end = (small["weight"] * sign).isel(input_node=slice(0, 3)).rename(input_node="teacher_node")
    best = int(large["loss"].argmin("seed"))
    one = large.isel(seed=best)
    u = (one["weight"] / np.sqrt((one["weight"] ** 2).sum("input_node")) * np.sign(one["outgoing"])).isel(
        input_node=slice(0, 8)
    )
    first, columns = order(u.transpose("node", "input_node").values)
    found = {
        "path": xr.dot(w, plane, dim="input_node"),
        "path_outgoing": outgoing,
        "path_loss": small["path_loss"],
        "end_outgoing": abs(small["outgoing"]),
        "overlap": end,
        "one_neuron_place": plane.isel(input_node=slice(0, 3)).dot(
            xr.DataArray(np.array([1.0, 1.0, 0.0]) / np.sqrt(2), dims="input_node")
        ) * (_norm(name) or np.nan),
        "copies_and_averages": small["class"] == "copy-average",
        "loss_copy_average": small["loss_copy_average"],
        "cosine": xr.DataArray(
            u.transpose("node", "input_node").values[first][:, columns], dims=("larger_node", "teacher")
        ),
        "length": ((one["weight"] ** 2).sum("input_node") ** 0.5)[first].rename(node="larger_node"),
        "weight_out": abs(one["outgoing"])[first].rename(node="larger_node"),
        "best_loss": one["loss"],
    }  # fmt: skip
    labels = ("seed", "time")
    return {
        key: array.drop_vars([c for c in array.coords if c not in labels or c not in array.dims])
        for key, array in found.items()
    }


def _norm(activation: str) -> float | None:
    """Norm of the one-neuron solution against two teacher nodes; None for relu, whose norm its start decides."""
    from tsdyn.population.critical_points import one_neuron  # imports torch, which listing studies does not need

    return None if activation == "relu" else one_neuron(activation, 2).norm


_NODES = (look.PALETTE[1], look.PALETTE[2])


def _frame(one: xr.Dataset, ax: Axes) -> None:
    """Teacher nodes as arrows, and limits that hold every path."""
    edge = 1.35 * max(1.1, float(abs(one["path"]).max()))
    for j, corner in enumerate(_PLANE.T, start=1):
        ax.annotate(
            "", corner, (0, 0), arrowprops={"arrowstyle": "-|>", "color": look.GUIDE, "linewidth": look.points(0.8)}
        )
        far = corner / np.hypot(*corner) * 0.8 * edge
        ax.plot([0, far[0]], [0, far[1]], ":", color=look.GREY, linewidth=look.points(0.5), zorder=0)
        ax.annotate(f"$v_{j}$", corner / np.hypot(*corner) * 0.9 * edge, ha="center", va="center", size=look.points(7))
    ax.set(aspect="equal", xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)  # the arrows are the axes
    place = one["one_neuron_place"].values
    for turn, corner in enumerate(_PLANE.T):  # opposite to each teacher node is the average of the two others
        if np.isfinite(place).all():
            x, y = -corner / np.hypot(*corner) * np.hypot(*place)
            ax.plot(
                x, y, "D", color=look.PALETTE[0], markersize=look.points(4), markerfacecolor="none",
                label=None if turn else "one-neuron solution of two teacher nodes",
            )  # fmt: skip
        else:
            x, y = -corner / np.hypot(*corner) * edge
            ax.plot(
                [0, x], [0, y], "--", color=look.PALETTE[0], linewidth=look.points(0.8), zorder=1,
                label=None if turn else "its direction, where any length is one (relu)",
            )  # fmt: skip


def _sizes(outgoing: NDArray) -> NDArray:
    return np.asarray((look.points(2.0) * np.sqrt(np.maximum(outgoing, 0.0))) ** 2)


def _paths(measured: xr.Dataset, ax: Axes) -> None:
    """Paths of the two students' incoming vectors, circles of area |a_i| along them; thin lines: other seeds."""
    one = measured.isel(activation=0) if "activation" in measured.dims else measured
    _frame(one, ax)
    shown = int(one["path_loss"].min("time").argmin("seed"))
    numbers = panels.node_numbers(range(len(_NODES)))
    for seed in range(one.sizes["seed"]):
        for node, colour in enumerate(_NODES):
            own = one[["path", "path_outgoing"]].isel(seed=seed, node=node).dropna("time")
            x, y = own["path"].transpose("axis", "time").values
            if seed != shown:
                ax.plot(x, y, color=look.GREY, linewidth=look.points(0.4), alpha=0.6, gid="seed")
                continue
            ax.plot(x, y, color=colour, linewidth=look.points(0.9), zorder=3)
            every = np.unique(np.linspace(0, len(x) - 1, 12).astype(int))
            a = own["path_outgoing"].values
            ax.scatter(
                x[every], y[every], s=_sizes(a[every]) * 3, facecolors="none", edgecolors=colour, zorder=4,
                linewidths=look.points(0.7), label=f"student node {numbers[node]} (area: |a|)",
            )  # fmt: skip


def _ends(measured: xr.Dataset, ax: Axes) -> None:
    """r_i u_ij of both students at convergence, every seed; circles of area |a_i|."""
    one = measured.isel(activation=0) if "activation" in measured.dims else measured
    _frame(one, ax)
    places = one["overlap"].transpose("seed", "node", "teacher_node").values @ _PLANE.T
    a = one["end_outgoing"].transpose("seed", "node").values
    good = one["copies_and_averages"].values
    for chosen, colour, shape, label in (
        (good, look.PALETTE[0], "o", "ends at the copy-average point"), (~good, look.PALETTE[6], "s", "ends elsewhere")
    ):  # fmt: skip
        if chosen.any():
            x, y = places[chosen].reshape(-1, 2).T
            ax.scatter(
                x, y, s=_sizes(a[chosen].ravel()) * 3, facecolors="none", edgecolors=colour, label=label,
                linewidths=look.points(0.8), zorder=3, marker=shape,
            )  # fmt: skip


def _overlaps(measured: xr.Dataset, ax: Axes) -> None:
    """u_ij at the end for n = 4, k = 8, with r_i and a_i of each student node at the right."""
    one = measured.isel(activation=0) if "activation" in measured.dims else measured
    draw_cosines(one["cosine"], ax)
    for row, (r, a) in enumerate(zip(one["length"].values, one["weight_out"].values, strict=True)):
        ax.annotate(
            f"{r:.2f}  {a:.2f}", (1.0, row), (3, 0), xycoords=("axes fraction", "data"), va="center",
            textcoords="offset points", size=look.points(6.8),
        )  # fmt: skip
    ax.annotate(
        "$r_i$       $a_i$",
        (1.0, 1.0),
        (5, 2),
        xycoords="axes fraction",
        textcoords="offset points",
        size=look.points(6.8),
    )


#: Panels by name; of the first activation unless selected.
PANELS: dict[str, layout.Panel] = {"paths": _paths, "at convergence": _ends, "u, r and a": _overlaps}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with one row per activation: paths, their ends, and order parameters of a larger student."""
    names = measured["activation"].values.tolist()
    rows = [[layout.Cell(name, {"activation": at}, f"{at}: {name}") for name in PANELS] for at in names]
    says = (
        "Two student nodes against k = 3 orthonormal teacher nodes (arrows: their incoming weights v₁, v₂, v₃, "
        "of length 1), seen along v₁ + v₂ + v₃: paths of their incoming "
        "weights (coloured: the seed of least loss; circles: area |a|), the same at convergence in rᵢ uᵢⱼ, and uᵢⱼ "
        "with rᵢ = ‖wᵢ‖ and aᵢ for n = 4, k = 8; of relu the start decides the norm"
    )
    page = layout.arrange(
        measured, PANELS, rows, says=says, spread="points", height=2.05, widths=(1, 1, 1.05), paper=EXPERIMENTS
    )
    page.body.colorbar(page.axes[2].images[0], ax=page.axes, label="cosine uᵢⱼ", aspect=40)
    return page
