"""Tian et al. (2019), Figure 3 and section 1: the lottery ticket. Winners keep their initial weights, the others none.

A first student is trained with all its nodes.  Those that in the end correlate best with some teacher node, its
winners, are trained again, on the same samples in the same order: from their initial weights, and from newly drawn
ones of the same law.  All other nodes of the hidden layers have weights and biases of zero, in and out, and keep them,
since they then have no gradient (``student.init = "rewind"`` and ``"rewind-reinitialised"``).  The paper's explanation
of the ticket is that winners were lucky at the start; then they need fewer steps from there than from a new start.

At smoke scale, with 16 seeds, winners end with a lower loss from their initial weights than from new ones in 15 of 16
(two-sided sign test: p = .0005); ρ̄ of the lowest layer is 0.48 against 0.28 (medians).  They do not reach the student
with all its nodes: their loss ends at 2.0 times its, that of reinitialised ones at 2.9 times (medians).  Training is
short there, and nothing has converged.  The rate is one of four that were tried with 3 seeds; at each of them initial
weights did better in at least 2 of the 3.  At desk scale, with 8 seeds, twice as many nodes and three times the steps,
the loss shows nothing of it: it ends at 1.93 and 1.94 times that of all nodes (medians), initial weights lower in 5 of
8 (two-sided sign test: p = .7).  Only the lowest layer is ahead from initial weights (ρ̄ 0.99 against 0.92 after ten
epochs, 1.00 against 0.97 after fifteen).  Paper scale was not run.

`measure` trains both, which takes twice the time of the first run and is not resumed if it is stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, lottery, panels
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import sweep

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "lottery ticket: winners retrained from their initial weights and from new ones, others clamped to zero"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), section 1 and Figure 3"

#: Seconds of `measure` per second of the run: two students are trained again.
AGAIN = 2.0
#: What is trained → its start; that of all nodes is the experiment's own.
NETWORKS: Mapping[str, str] = {
    "all nodes": "",
    "winners, initial weights": "rewind",
    "winners, reinitialised": "rewind-reinitialised",
}
_SHORT = ("all\nnodes", "initial\nweights", "new\nweights")

_PAPER = MULTILAYER.replace(
    deep_layers.LUCK
    | {
        "name": "lottery-paper",
        "teacher": {"widths": [20, 50, 75, 100, 125, 100], "init": "luck-matters"},
        "seeds": 32,
        "data.train": "fresh",
        "student.overrealization": 10.0,
        "training.learning_rate": deep_layers.RATES["large"][0],
        "training.steps_per_epoch": 1562,
        "training.epochs": 40,
        "record": {"observables": ["mse", "correlation", "weight"], "every": 5},
        "sweep": {},
    }
)
_SMALL = {"teacher.widths": [20, 10, 15, 20, 25, 100], "training.learning_rate": deep_layers.RATES["small"][0]}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "lottery-smoke", "seeds": 3, "student.overrealization": 4.0, "training.epochs": 6, "record.every": 1}
        | {"teacher.widths": [20, 4, 5, 6, 7, 20], "training.learning_rate": 0.001}
        | {"data.eval": 200, "training.steps_per_epoch": 400}
    ),
    # the small teacher, 4x instead of 10x, fewer samples, epochs and seeds
    "desk": _PAPER.replace(
        {"name": "lottery-desk", "seeds": 8, "student.overrealization": 4.0, "training.epochs": 15, "record.every": 1}
        | {"training.steps_per_epoch": 300}
        | _SMALL
    ),
    "paper": _PAPER,
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Train winners again; ``mse_eval`` (network, seed, epoch), ``mean_specialization`` with layers, nodes ``kept``.

    ``kept`` (seed, layer) is the number of winners.  NaN for seeds whose first student died.
    """
    hidden = archive[["correlation"]].isel(layer=slice(None, -1))
    kept = lottery.rewind_mask(hidden).sum("node", min_count=1)
    first = archive[["weight", "bias", "correlation"]].isel(epoch=[0, -1]).load()
    experiment = experiment_of(archive)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.nc"
        first.to_netcdf(path)
        runs = [archive]
        for init in list(NETWORKS.values())[1:]:
            again = {"student.init": init, "student.path": str(path), "record.observables": ["mse", "correlation"]}
            seeds = [int(seed) for seed in archive["seed"].values]
            runs.append(sweep.run(experiment.replace(again | {"seeds": seeds}), Path(folder) / init))
        found = [deep_layers.measure(run)[["mse_eval", "mean_specialization"]].load() for run in runs]
    ds = xr.concat(
        found, dim=xr.DataArray(list(NETWORKS), dims="network", name="network"), coords="minimal", compat="override",
        join="exact", combine_attrs="override",
    )  # fmt: skip
    words = {"units": "1", "long_name": "number of winners", "source": SOURCE}
    return ds.where(kept.notnull().all("layer")).assign(kept=kept.assign_attrs(words)).load()


def _lines(values: xr.DataArray, ax: Axes, along: str = "epoch", marked: bool = False) -> None:
    """A colour and a line style per network."""
    for position, name in enumerate(values["network"].values.tolist()):
        panels.spread(
            values.sel(network=name), ax=ax, along=along, color=panels.colour(position), label=name,
            linestyle=panels.STYLES[position], marker=panels.mark(position) if marked else None,
        )  # fmt: skip


def _loss(measured: xr.Dataset, ax: Axes) -> None:
    """Evaluation loss over training, a line style per network."""
    _lines(measured["mse_eval"], ax)
    deep_layers.scale(measured["mse_eval"], ax)
    ax.set_ylabel("evaluation mse")


def _ends(measured: xr.Dataset, ax: Axes) -> None:
    """Evaluation loss after training: a mark per seed and network, the same seed's joined."""
    last = measured["mse_eval"].isel(epoch=-1).transpose("network", "seed")
    places = np.arange(last.sizes["network"])
    ax.plot(places, last.values, color=look.GREY, linewidth=look.points(0.5), gid="seed")
    for position in places.tolist():
        ax.plot(
            np.full(last.sizes["seed"], position), last.values[position], linestyle="", marker=panels.mark(position),
            color=panels.colour(position), markersize=look.points(2.8),
        )  # fmt: skip
    ax.set_xticks(places, labels=_SHORT)
    ax.set(xlim=(-0.5, len(places) - 0.5))
    deep_layers.scale(measured["mse_eval"], ax)
    ax.set(xlabel="all, or winners with", ylabel="final mse")


def _over_epochs(measured: xr.Dataset, ax: Axes) -> None:
    """ρ̄ over training of one layer, the lowest unless selected."""
    values = measured["mean_specialization"]
    _lines(values.isel(layer=0) if "layer" in values.dims else values, ax)
    deep_layers.scale(values, ax)
    ax.set_ylabel("best correlation ρ̄")


def _by_layer(measured: xr.Dataset, ax: Axes) -> None:
    """ρ̄ of each layer after training."""
    values = measured["mean_specialization"].isel(epoch=-1)
    _lines(values, ax, "layer", marked=True)
    deep_layers.scale(values, ax)
    ax.set_ylabel("final ρ̄")
    panels.whole_numbers(ax)


def _kept(measured: xr.Dataset, ax: Axes) -> None:
    """Number of winners of each layer, and of all its nodes."""
    kept = measured["kept"]
    ax.plot(kept["layer"], kept["width"], color=panels.colour(0), marker=panels.mark(0), markersize=look.points(2.6))
    panels.spread(kept, ax=ax, along="layer", color=panels.colour(1), linestyle=panels.STYLES[1], marker=panels.mark(1))
    ax.update_datalim([(1.0, 0.0)], updatex=False)
    ax.autoscale_view(scalex=False)
    ax.set_ylabel("number of nodes")
    panels.whole_numbers(ax)


#: Panels by name.
PANELS: dict[str, layout.Panel] = {
    "mse_eval": _loss,
    "final mse_eval": _ends,
    "final mean_specialization": _by_layer,
    "nodes kept": _kept,
    "mean_specialization": _over_epochs,
}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: loss over training and at its end, final ρ̄ and the number of winners by layer; ρ̄ over training below."""
    titles = ("loss", "loss at the end", "ρ̄ at the end", "winners of all")
    above: list[layout.Cell | None] = [layout.Cell(name, {}, t) for name, t in zip(PANELS, titles, strict=False)]
    below: list[layout.Cell | None] = [
        layout.Cell("mean_specialization", {"layer": layer}, f"layer {layer}") for layer in measured["layer"].values
    ]
    across = max(len(above), len(below))
    rows = [row + [None] * (across - len(row)) for row in (above, below)]
    last = measured["mse_eval"].isel(epoch=-1)
    own, new = (last.sel(network=name) / last.sel(network="all nodes") for name in list(NETWORKS)[1:])
    alive = own.notnull() & new.notnull()
    says = (
        "Lottery ticket: the nodes that correlate best with some teacher node after training (winners), trained again "
        "on the same samples from their initial weights or from new ones of the same law, all other nodes clamped to "
        "zero. Evaluation mse per output; ρ̄: mean best correlation; D: nodes of each layer, and winners. Final mse "
        f"over that of all nodes, median: {captions.number(round(float(np.nanmedian(own)), 2))} from initial weights, "
        f"{captions.number(round(float(np.nanmedian(new)), 2))} reinitialised; initial weights end lower in "
        f"{int((own < new).sum())} of {int(alive.sum())} seeds"
    )
    return layout.arrange(measured, PANELS, rows, says=says, spread="curves", height=1.5, columns=2, paper=EXPERIMENTS)
