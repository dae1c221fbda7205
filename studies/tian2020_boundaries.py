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

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tsdyn.analysis import alignment
from tsdyn.analysis.figures import PANEL, SNAPSHOTS, boundaries, measure_boundaries
from tsdyn.analysis.panels import axis_label, colour

from tsdyn import layer as one_layer
from tsdyn.experiment.experiment import Experiment
from tsdyn.vocabulary import TIAN

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

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


def draw(measured: xr.Dataset) -> Figure:
    """Figure of snapshots with ‖v_k‖ of each student node, ‖v_k‖ over epochs, and ‖v_k‖ ‖w_k‖ of nodes against ε."""
    shown = measured.drop_dims("member")
    chosen = np.unique(np.linspace(0, shown.sizes["epoch"] - 1, SNAPSHOTS).round().astype(int))
    figure = Figure(figsize=(PANEL[0] * 1.15 * len(chosen), PANEL[1] * 2.7), layout="constrained")
    (above,), (below,) = figure.subfigures(2, 1, height_ratios=(1.3, 1), squeeze=False)
    strongest = float(shown["fanout_norm"].max())
    for position, ax in zip(chosen, above.subplots(1, len(chosen), sharey=True), strict=True):
        now = shown.isel(epoch=position)
        boundaries(now, ax=ax, strongest=strongest)
        ax.set_title(f"epoch {int(now['epoch'])}", fontsize=9)
        ax.label_outer()
        _key(now["fanout_norm"], ax)
    left, right = below.subplots(1, 2)
    for k in range(shown.sizes["node"]):
        left.plot(shown["epoch"], shown["fanout_norm"].isel(node=k), color=colour(k), linewidth=1.4)
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="epoch", ylabel=axis_label(shown["fanout_norm"]), ylim=(0, None))
    left.set_title(f"seed {int(shown['seed'])}, colours as above", fontsize=9)
    _against_nearest(measured, right)
    figure.suptitle(
        f"student nodes (coloured; wide: large ‖v‖) and teacher nodes (dashed), seed {int(shown['seed'])}", fontsize=10
    )
    return figure


def _key(norms: xr.DataArray, ax: Axes) -> None:
    """Add a legend below `ax` with ‖v_k‖ of each student node; (node,)."""
    handles = [
        Line2D([], [], color=colour(k), linewidth=2, label=f"{k + 1}: {float(norms[k]):.2f}") for k in range(norms.size)
    ]
    ax.legend(
        handles=handles, title="‖v‖ of student node", ncols=3, fontsize=7, title_fontsize=7, handlelength=1,
        columnspacing=0.8, loc="upper center", bbox_to_anchor=(0.5, -0.2),
    )  # fmt: skip


def _against_nearest(measured: xr.Dataset, ax: Axes) -> None:
    """Draw one marker per student node of any seed at the last epoch, hollow if its boundary misses the data."""
    crosses = measured["offset"] < measured["extent"]
    for inside, face, label in (
        (True, colour(0), "boundary within 3 std"),
        (False, "none", "beyond: on or off for almost all"),
    ):
        own = measured[["nearest", "regular_fanout"]].where(crosses == inside)
        ax.scatter(
            own["nearest"], own["regular_fanout"], s=14, facecolors=face, edgecolors=colour(0 if inside else 5),
            linewidths=0.8, alpha=0.7, label=label,
        )  # fmt: skip
    ax.set(xscale="log", xlabel=axis_label(measured["nearest"]), ylabel=axis_label(measured["regular_fanout"]))
    ax.set_title(f"nodes of all {measured.sizes['member']} seeds, epoch {int(measured['epoch'][-1])}", fontsize=9)
    ax.legend(fontsize=7)
