"""Which samples decided: the change of the loss by leaving samples out, predicted by three scores, and retrained.

Members differ only in which samples they see.  The exact derivative through training, influence functions at the end
and gradient products along recorded epochs each predict how the evaluation loss changes; training again says how it
does.  All three are of first order: what they miss is curvature and, for relu, gates that flip between the student and
the one that never saw the samples.  Influence functions assume a minimum, which none of these runs has reached.  At
desk scale ranks correlate with retraining by 0.78 (relu) and 0.97 (softplus) for the derivative through training, 0.70
and 0.68 for influence functions, 0.24 and 0.04 for gradient products: medians of 5 seeds, 48 sets each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look

import tsdyn
from tsdyn import attribution
from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "predicted against retrained change of the loss when samples are left out, for three scores"
SOURCE = (
    "Koh & Liang 2017 (arXiv:1703.04730); Pruthi et al. 2020 (arXiv:2002.08484); Park et al. 2023 (arXiv:2303.14186)"
)

#: `measure` scores a run on all samples, which takes as long as training that many.
_SCORES_PER_RUN = 24.0


def _again(experiment: Experiment, seconds: float) -> float:
    """Seconds of `measure`, whatever the number of subsets, each of which is trained once."""
    subsets = experiment.data.leave_out.subsets
    assert subsets, "an experiment of this study leaves samples out"
    return _SCORES_PER_RUN * seconds / subsets


AGAIN = _again
#: Scores, with a word for each on an axis.
SCORES: Mapping[str, str] = {"d_sample": "exact", "influence": "influence", "tracin": "products"}
#: Dampings of the Hessian, of which the first is taken that makes it positive definite for every seed.
DAMPINGS = (0.0, *(float(f"{size:.4g}") for size in np.logspace(-4, 4, 17)))

_WHOLE = Experiment(
    name="leave-out-whole",
    seeds=5,
    teacher={"widths": [10, 3, 3], "init": "gaussian"},
    student={"overrealization": 2.0, "init": "torch", "activation": "relu"},
    data={"train": 500, "eval": 1000, "noise": 0.3},
    training={"epochs": 15, "steps_per_epoch": 100, "batch": 16, "learning_rate": 0.03},
    record={"observables": ["loss", "mse", "weight"]},
    sweep={"student.activation": ["relu", "softplus"]},
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _WHOLE.replace(
        {"name": "leave-out-smoke", "seeds": 2, "data.train": 100, "data.eval": 200, "training.epochs": 6}
        | {"data.leave_out": {"subsets": 8, "share": 0.05}, "training.steps_per_epoch": 20}
    ),
    "desk": _WHOLE.replace({"name": "leave-out-desk", "data.leave_out": {"subsets": 48, "share": 0.02}}),
    "paper": _WHOLE.replace(
        {"name": "leave-out-paper", "seeds": 32, "data.leave_out": {"subsets": 200, "share": 0.02}}
    ),
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Changes of the evaluation loss at the last epoch by leaving samples out; scores are of a run on all samples.

    - ``predicted`` (activation, score, seed, subset): −Σ of the scores of the samples that are left out,
    - ``retrained`` (activation, seed, subset),
    - ``lds`` and ``lds_interval`` (activation, score, seed, bound): their Spearman correlation, as `attribution.lds`,
    - ``damping`` (activation): what was added to the Hessian's diagonal for influence functions.
    """
    atlas = archive.load()
    with tempfile.TemporaryDirectory() as folder:
        own = experiment_of(archive)
        sweep = {key: values for key, values in own.sweep.items() if key != "data.leave_out.subset"}
        whole = own.replace({"name": "leave-out-whole", "data.leave_out": {}, "sweep": sweep})
        run = tsdyn.run(whole, Path(folder) / "run").load()
    found = [_of(tsdyn.select(run, activation=name), atlas.sel(activation=name)) for name in run["activation"].values]
    along = xr.DataArray(run["activation"].values, dims="activation", name="activation")
    ds = xr.concat(found, along, coords="minimal", compat="override", join="exact", combine_attrs="drop")
    texts = {
        "predicted": "predicted change of the loss",
        "retrained": "change of the loss, trained again",
        "lds": "Spearman correlation of predicted and retrained loss",
        "lds_interval": "its 95 % bootstrap interval over subsets",
        "damping": "damping of the Hessian for influence functions",
    }
    return ds.assign(
        {name: ds[name].assign_attrs(units="1", long_name=text, source=SOURCE) for name, text in texts.items()}
    )


def _of(run: xr.Dataset, atlas: xr.Dataset) -> xr.Dataset:
    """The measures of one activation."""
    influence, damping = _influence(run)
    scores = {
        "d_sample": tsdyn.sensitivity(run, wrt=["sample"], certificate=False)["d_sample"],
        "influence": influence,
        "tracin": attribution.tracin(run)["tracin"],
    }
    outcome = atlas["loss_eval"].isel(epoch=-1).reset_coords(drop=True)
    absent = ~atlas["kept"].astype(bool).reset_coords(drop=True).drop_vars("sample", errors="ignore")
    along = xr.DataArray(list(SCORES), dims="score", name="score")
    plain = [scores[name].reset_coords(drop=True).drop_vars("sample", errors="ignore") for name in SCORES]
    every = xr.concat(plain, along, coords="minimal", compat="override", join="exact", combine_attrs="drop")
    agreement = xr.concat(
        [attribution.lds(scores[name], atlas)[["lds", "lds_interval"]] for name in SCORES], along,
        coords="minimal", compat="override", join="exact", combine_attrs="drop",
    )  # fmt: skip
    return agreement.assign(
        predicted=-xr.dot(every, absent.astype(float), dim="sample").transpose("score", "seed", "subset"),
        retrained=(outcome - run["loss_eval"].isel(epoch=-1).reset_coords(drop=True)).transpose("seed", "subset"),
        damping=damping,
    )


def _influence(run: xr.Dataset) -> tuple[xr.DataArray, float]:
    """Influence functions with the least of `DAMPINGS` for which there are any."""
    for damping in DAMPINGS[:-1]:
        try:
            return attribution.influence(run, damping=damping)["influence"], damping
        except ValueError as error:
            if "give damping" not in str(error):
                raise
    return attribution.influence(run, damping=DAMPINGS[-1])["influence"], DAMPINGS[-1]


def _one(measured: xr.Dataset, *dims: str) -> xr.Dataset:
    return measured.isel({dim: 0 for dim in dims if dim in measured.dims})


def _change(measured: xr.Dataset, ax: Axes) -> None:
    """Retrained over predicted change, a mark per subset and a colour per seed; the line is where both agree.

    There is none where the score is not on the loss's scale: ten times larger or more.
    """
    own = _one(measured, "activation", "score")
    seeds = own.sizes["seed"]
    for i in range(seeds):
        one = own.isel(seed=i)
        ax.plot(
            one["predicted"], one["retrained"], "o", markersize=look.points(1.8), markeredgewidth=0,
            color=panels.colour(i) if seeds <= len(look.PALETTE) else look.shade(i, seeds),
        )  # fmt: skip
    ends = [float(f(own["retrained"])) for f in (np.nanmin, np.nanmax)]
    if float(abs(own["predicted"]).max()) < 10 * float(abs(own["retrained"]).max()):
        ax.plot(ends, ends, color=look.GUIDE, linewidth=look.points(0.8))
    ax.ticklabel_format(scilimits=(-5, 5), useOffset=False)  # a factor beside the axis would stand on its label
    ax.locator_params(nbins=3)
    ax.set(xlabel="predicted change", ylabel="retrained change")


def _agreement(measured: xr.Dataset, ax: Axes) -> None:
    """Spearman correlation of every score and seed, with its interval over subsets."""
    own = _one(measured, "activation")
    seeds = own.sizes["seed"]
    for i in range(seeds):
        one = own.isel(seed=i)
        place = np.arange(one.sizes["score"]) + 0.5 * ((i + 0.5) / seeds - 0.5)
        colour = panels.colour(i) if seeds <= len(look.PALETTE) else look.shade(i, seeds)
        bounds = one["lds_interval"].transpose("bound", "score").values
        ax.vlines(place, *bounds, color=colour, linewidth=look.points(0.7))
        ax.plot(place, one["lds"], "o", color=colour, markersize=look.points(2.2), markeredgewidth=0)
    ax.axhline(0.0, color=look.GUIDE, linewidth=look.points(0.6))
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(own.sizes["score"]), labels=[SCORES[str(s)] for s in own["score"].values], **turned)
    least = min(0.0, float(own["lds_interval"].min()))
    ax.set(ylim=(least - 0.05, 1.05), xlim=(-0.5, own.sizes["score"] - 0.5), xlabel="score", ylabel="rank correlation")


#: Panels by name.
PANELS: dict[str, layout.Panel] = {"change": _change, "agreement": _agreement}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: a row per activation; retrained over predicted change for each score, and their rank correlations."""
    rows = []
    for activation in measured["activation"].values.tolist():
        at = {"activation": activation}
        cells = [layout.Cell("change", {**at, "score": s}, f"{activation}, {SCORES[s]}") for s in SCORES]
        rows.append([*cells, layout.Cell("agreement", at, f"{activation}, ranks")])
    dampings = [
        f"{float(measured['damping'].sel(activation=name)):g} ({name})" for name in measured["activation"].values
    ]
    says = (
        f"Change of the evaluation loss when samples are left out, for {measured.sizes['subset']} sets of samples, by "
        "training again and as three scores predict it (exact: the derivative through training; influence: influence "
        "functions; products: gradient products over recorded epochs; colours: seeds; lines: both equal, but for "
        "products, whose scale is another), and the rank correlation of the two with 95 % intervals over sets. Damping "
        "of the Hessian for influence functions: "
        f"{captions.joined(dampings)}"
    )
    return layout.arrange(
        measured,
        PANELS,
        rows,
        says=says,
        spread="points",
        paper=EXPERIMENTS,
        key=None,
        height=1.9,
        widths=(1, 1, 1, 1.1),
    )
