"""Tian (2020), Figure 3: boundaries of 2 teacher nodes and 6 student nodes in the plane while the student learns.

What the paper finds: student nodes find every teacher node's boundary, and ‖v_k‖ → 0 for those that find none.  At desk
scale in all 16 seeds some student node is within ε = 0.004 of each teacher node (‖v*_j‖ = 1).  9 of 96 nodes end with
ε > 0.1 and a boundary among the data: seven stay near the size of the start, at 0.03 to 0.07, the largest falls from
0.27 to 0.19, and ‖v_k‖ ‖w_k‖, which counts once rows have unit norm, is at most 0.035.  20 more nodes left the data: 18
are on for almost all samples, with ‖v_k‖ up to 1 but ‖v_k‖ ‖w_k‖ at most 0.002: they add a constant; 2 are off.

``tsdyn plot DIR boundaries -o boundaries.gif`` makes the first seed move.  The paper's numbers of outputs, samples and
steps are not at hand: 10 outputs and inputs of standard deviation 1.5; an epoch is 10 steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from tsdyn.analysis import alignment, captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.figures import boundaries, measure_boundaries, snapshots

from tsdyn import layer as one_layer
from tsdyn.experiment.experiment import Experiment
from tsdyn.vocabulary import TIAN

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "boundaries of 2 teacher and 6 student nodes in the plane over training"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 3"

_DESK = Experiment(
    name="boundaries-desk",
    seeds=16,
    teacher={"widths": [2, 2, 10], "init": "orthonormal", "bias": -0.1},
    student={"overrealization": 3.0, "init": "gaussian", "scale": 0.01},
    data={"law": "gaussian", "std": 1.5, "train": 1000, "eval": 1000},
    training={"learning_rate": 0.05, "batch": 16, "steps_per_epoch": 10, "epochs": 3000},
    record={"geometric": 1.2, "observables": ["mse", "fanout_norm", "weight", "alignment"]},
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _DESK.replace({"name": "boundaries-smoke", "seeds": 2, "training.epochs": 10}),
    "desk": _DESK,
    "paper": _DESK.replace({"name": "boundaries-paper", "seeds": 32, "data.train": 10_000, "training.epochs": 30_000}),
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Dataset of what `boundaries` draws, for the first seed at every epoch, and for all seeds' last student nodes:

    - ``nearest`` (member, node): ε (Definition 3) of the nearest teacher node,
    - ``regular_fanout`` (member, node): ‖v_k‖ ‖w_k‖, the fan-out norm of the same node with ‖w_k‖ = 1 (section 3),
    - ``offset`` (member, node): |b_k| / ‖w_k‖, how far from the origin its boundary is.

    Loaded.
    """
    shown = measure_boundaries(archive)
    end = archive.isel(epoch=-1)
    low = one_layer(end[["weight", "bias", "fanout_norm"]], 1)
    length = (low["weight"] ** 2).sum("input_node") ** 0.5
    found: dict[str, xr.DataArray] = {
        "nearest": alignment.alignment(end).isel(node=slice(0, low.sizes["node"])).min("teacher_node"),
        "regular_fanout": low["fanout_norm"] * length,
        "offset": abs(low["bias"]) / length,
    }
    names = {
        "nearest": ("ε of the nearest teacher node", f"{TIAN}, Definition 3"),
        "regular_fanout": ("‖v‖ ‖w‖", f"{TIAN}, section 3"),
        "offset": ("distance of the boundary from the origin", SOURCE),
    }
    labelled = {
        name: array.drop_vars(("epoch", "layer"), errors="ignore")
        .rename(seed="member")
        .assign_attrs(units="1", long_name=names[name][0], source=names[name][1])
        for name, array in found.items()
    }
    return shown.assign(labelled).load()


def _plane(measured: xr.Dataset, ax: Axes) -> None:
    """Boundaries at the last epoch, or at that of a slice."""
    shown = measured.drop_dims("member", errors="ignore")
    now = shown.isel(epoch=-1) if "epoch" in shown.dims else shown
    boundaries(now, ax=ax, strongest=float(measured.attrs.get("strongest", shown["fanout_norm"].max())))


def _fanouts(measured: xr.Dataset, ax: Axes) -> None:
    """‖v_k‖ of the first seed's student nodes over epochs."""
    norms = measured["fanout_norm"]
    numbers = panels.node_numbers(norms["node"].values)
    for k, number in enumerate(numbers):
        ax.plot(norms["epoch"], norms.isel(node=k), color=panels.colour(k), label=f"student node {number}")
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="epoch", ylabel="fan-out norm ‖v‖", ylim=(0, None))
    panels.name_ends(ax, {str(number): float(norms.isel(node=k)[-1]) for k, number in enumerate(numbers)})


def _against_nearest(measured: xr.Dataset, ax: Axes) -> None:
    """One marker per student node of any seed at the last epoch, hollow if its boundary misses the data."""
    crosses = measured["offset"] < measured["extent"]
    for inside, colour, label in (
        (True, panels.PALETTE[0], "boundary within 3 std"),
        (False, panels.PALETTE[1], "boundary beyond"),
    ):
        own = measured[["nearest", "regular_fanout"]].where(crosses == inside)
        ax.scatter(
            own["nearest"], own["regular_fanout"], s=look.points(3) ** 2, facecolors=colour if inside else "none",
            edgecolors=colour, linewidths=look.points(0.7), label=label,
        )  # fmt: skip
    layout.decades(ax, "x")
    ax.set(xlabel="ε of the nearest teacher node", ylabel="‖v‖ ‖w‖")


#: Panels by name.
PANELS: dict[str, layout.Panel] = {
    "boundaries": _plane, "fan-out norms": _fanouts, "fan-out against distance": _against_nearest
}  # fmt: skip


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure of snapshots of the plane, ‖v_k‖ over epochs, and ‖v_k‖ ‖w_k‖ of all seeds' nodes against ε."""
    page = look.page(2, 3.6)
    above, below = page.body.subfigures(2, 1, height_ratios=(1.15, 1), squeeze=False)[:, 0]
    chosen = snapshots(measured["epoch"].values)
    strongest = float(measured["fanout_norm"].max())
    letters = iter("ABCDEFGH")
    planes = above.subplots(1, len(chosen), squeeze=False)
    for at, ax in zip(chosen, planes[0], strict=True):
        now = measured.isel(epoch=int(at)).assign_attrs(strongest=strongest)
        _plane(now, ax)
        layout.heading(ax, f"epoch {int(now['epoch'])}", next(letters))
    layout.once(page, planes, False, True, part=above)
    left, right = below.subplots(1, 2)
    _fanouts(measured, left)
    layout.heading(left, f"seed {int(measured['seed'])}", next(letters))
    _against_nearest(measured, right)
    layout.heading(right, f"nodes of all seeds, epoch {int(measured['epoch'][-1])}", next(letters))
    teacher = Line2D([], [], color="black", linestyle=(0, (5, 3)), linewidth=look.points(1), label="teacher node")
    handles = left.get_legend_handles_labels()[0] + [teacher] + right.get_legend_handles_labels()[0]
    layout.legend(page, handles=handles)
    says = (
        f"Boundaries of 2 teacher nodes and 6 student nodes (numbers on their lines; wide: large ‖v‖) of seed "
        f"{int(measured['seed'])}, their fan-out norms, at whose ends their numbers stand, and all seeds' nodes by "
        f"distance from the nearest teacher node; {captions.NODES}"
    )
    return layout.told(page, measured, says, "points", EXPERIMENTS)
