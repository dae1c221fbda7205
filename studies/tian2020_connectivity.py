"""After the slides of Tian (2020): two solutions joined by line segments, loss along the way and height of the barrier.

Theorem 2 has it that student nodes aligned with no teacher node end without fan-out, so two students of one teacher can
be joined without a barrier: fan-outs move onto one node per teacher node, free nodes take the other student's weights,
fan-outs move over, and so on (`tsdyn.analysis.connectivity.theorem_2_path`).  A seed draws its own teacher, so the two
students are of one seed with different starts, ``gaussian`` and ``torch``; their batches are the same.

At desk scale the barrier of the straight line stays at 24 to 41 from epoch 5 to 100, that of the matched one at 0.5 to
3 at 2x and 5x, where several nodes share a teacher node and no permutation is enough, and at 0.001 at 1x.  That of the
path falls with the loss of its ends: from 0.009 to 0.02 at epoch 5 to 8e-11 to 9e-5 at epoch 100 at 2x, from 0.03 to
0.05 to 8e-5 to 5e-4 at 5x, where the worse ends are at 2e-6 to 5e-6.  So it is a path without a barrier only in the
limit, as the theorem is of vanishing gradients.  At 1x no node is free, so there is no path.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.connectivity import LEGS, ROUTES, STATES, connect, states
from tsdyn.analysis.members import PARAMETERS
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "loss along line segments between two solutions: straight, matched and Theorem 2's path"
SOURCE = "after Tian 2020 (PMLR 119:9470), Theorem 2 and slides; Kuditipudi et al. 2019"

#: Losses below this are drawn at this value, since rounding in float64 leaves 1e-28.
_FLOOR = 1e-12

_PAIRS = {
    "teacher.polarity": 0.0,
    "record.observables": ["loss", "weight"],
    "sweep": {"student.init": ["gaussian", "torch"], "student.overrealization": [1, 2, 5]},
}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        _PAIRS
        | {"name": "connectivity-smoke", "seeds": 2, "record.epochs": [6], "data.eval": 200}
        | {"sweep": {"student.init": ["gaussian", "torch"], "student.overrealization": [1, 2]}}
    ),
    # the paper's two-layer experiment with 4 seeds instead of 32, and loss on 2000 samples instead of 10,000
    "desk": PAPER.replace(
        _PAIRS | {"name": "connectivity-desk", "seeds": 4, "record.epochs": [5, 10, 25, 50, 100], "data.eval": 2000}
    ),
    "paper": PAPER.replace(_PAIRS | {"name": "connectivity-paper", "record.epochs": [5, 10, 25, 50, 100]}),
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Dataset of ``loss`` (..., route, position) and ``barrier`` (..., route) between the students of the two starts.

    Over overrealization, epoch and seed, by `tsdyn.analysis.connectivity.connect`; loaded.
    NaN where there is no path.  Epoch 0 is left out, since students are no solutions yet.  Of the first seed and the
    last epoch also ``stands_for`` and ``carried`` (overrealization, state, node) by `connectivity.states`.
    """
    trained = archive[list(PARAMETERS)].sel(epoch=archive["epoch"] > 0).load()
    along = {str(dim): trained[dim].values for dim in ("overrealization", "epoch", "seed")}
    found = []
    for values in itertools.product(*along.values()):
        at = trained.sel(dict(zip(along, values, strict=True)))
        found.append(connect(*(at.sel(init=start) for start in trained["init"].values)))
    sizes = [len(values) for values in along.values()]
    gathered = {
        name: xr.DataArray(
            np.stack([one[name].values for one in found]).reshape(*sizes, *first.shape),
            dims=(*along, *first.dims),
            coords=along | {str(dim): first[dim].values for dim in first.dims},
            attrs={key: value for key, value in first.attrs.items() if key != "comment"},
        )
        for name, first in found[0].data_vars.items()
    }
    last = trained.isel(epoch=-1, seed=0)
    pairs = [last.sel(overrealization=width) for width in along["overrealization"]]
    drawn = [states(*(pair.sel(init=start) for start in trained["init"].values)) for pair in pairs]
    named = trained["overrealization"].drop_vars("node_width", errors="ignore")
    of_states = xr.concat(drawn, named, join="outer", coords="minimal", compat="override", combine_attrs="override")
    return xr.Dataset(gathered | {str(name): values for name, values in of_states.data_vars.items()})


#: Share of its teacher node's fan-out below which a student node counts as one without any.
_SILENT = 0.01
#: Words for the routes.
_ROUTES = {"straight": "straight line", "matched": "straight line, nodes matched", "theorem 2": "path of Theorem 2"}


def _along(measured: xr.Dataset, ax: Axes) -> None:
    """Loss along each route at the last epoch, of the first over-realization unless selected; a line per seed."""
    own = measured.isel(overrealization=0) if "overrealization" in measured.dims else measured
    loss = (own["loss"].isel(epoch=-1) if "epoch" in own["loss"].dims else own["loss"]).clip(min=_FLOOR)
    for corner in range(1, LEGS):
        ax.axvline(corner / LEGS, color=look.GREY, linewidth=look.points(0.5), linestyle=":")
    _lines(loss, "position", ax)
    ax.set(xlabel="share of the way (dotted: corners)", ylabel="loss")


def _barriers(measured: xr.Dataset, ax: Axes) -> None:
    """Height of the barrier along each route over epochs, and the loss at the worse end; a line per seed."""
    own = measured.isel(overrealization=0) if "overrealization" in measured.dims else measured
    _lines(own["barrier"].where(own["barrier"] > 0), "epoch", ax, marker="o")
    ends = own["loss"].sel(route=ROUTES[0]).isel(position=[0, -1]).max("position").clip(min=_FLOOR)
    panels.spread(ends, ax=ax, color=look.GUIDE, linestyle="--", label="loss at the worse end", marker="s", band=0.0)
    ax.set(xlabel="epoch", ylabel="barrier")


def _state(measured: xr.Dataset, ax: Axes) -> None:
    """Teacher node that each student node stands for at a state of the path, of the first one unless selected.

    Areas of marks: share of the teacher node's fan-out.  Circles: nodes without any.
    """
    own = measured.isel({dim: 0 for dim in ("overrealization", "state") if dim in measured["carried"].dims})
    own = own[["stands_for", "carried"]].dropna("node")
    number, share = panels.node_numbers(own["node"].values), own["carried"].values
    teacher = own["stands_for"].values  # numbers; 0: aligned with none
    silent = share < _SILENT
    area = look.points(2) ** 2 + look.points(4.5) ** 2 * share
    for where, face in ((silent, "none"), (~silent, look.PALETTE[0])):
        ax.scatter(
            number[where], teacher[where], s=area[where],
            facecolor=face, edgecolor=look.GREY if face == "none" else face, linewidth=look.points(0.6),
        )  # fmt: skip
    ax.set_xticks(panels.node_ticks(number))
    shown = range(1, int(teacher.max()) + 1)
    ax.set_yticks([0, *shown], labels=["none", *map(str, shown)])
    ax.set(xlabel="student node", ylabel="teacher node", xlim=(0, number.max() + 1))


#: Panels by name.
PANELS: dict[str, layout.Panel] = {
    "loss along the way": _along, "barrier over epochs": _barriers, "state": _state
}  # fmt: skip


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: loss along each route at the end and barriers over epochs, by over-realization; states of the path."""
    widths = layout.points(measured, ["overrealization"])
    last = int(measured["epoch"][-1])
    page = look.page(2, 5.9)
    parts = page.body.subfigures(3, 1, height_ratios=(1.0, 1.0, 1.1), squeeze=False)[:, 0]
    letters = iter("ABCDEFGHIJ")
    for part, name in zip(parts, PANELS, strict=False):
        if name == "state":
            break
        cells = part.subplots(1, len(widths), squeeze=False, sharey=True)
        for at, ax in zip(widths, cells.flat, strict=True):
            title = layout.name_of(measured, at) if name == "loss along the way" else ""
            barred = measured["barrier"].sel(at).sel(route=ROUTES[-1])
            if name != "loss along the way" and bool(barred.isnull().all()):
                title = "no free nodes, so no path of Theorem 2"
            PANELS[name](measured.sel(at), ax)
            layout.heading(ax, title, next(letters))
        layout.once(page, cells, False, True, part=part)
    with_path = [at for at in widths if bool(measured["carried"].sel(at).notnull().any("node").all())]
    shown = measured.sel(with_path[0] if with_path else widths[-1])
    there = [state for state in STATES if bool(shown["carried"].sel(state=state).notnull().any())]
    cells = parts[-1].subplots(1, len(there), squeeze=False, sharey=True)
    for letter, state, ax in zip("abcd", there, cells.flat, strict=False):
        PANELS["state"](shown.sel(state=state), ax)
        layout.heading(ax, f"({letter}) {state}")
    layout.once(page, cells, False, True, part=parts[-1])
    layout.legend(page)
    width = captions.words("overrealization", float(shown["overrealization"]))
    says = (
        f"Loss along routes between two students of one teacher at epoch {last}, no lower than {_FLOOR:g}, and "
        f"barriers over epochs. States along Theorem 2's path with {width}, seed {int(measured['seed'][0])}: the "
        f"teacher node that each student node is aligned with (areas of marks: shares of its fan-out; circles: below "
        f"{_SILENT:.0%}); {captions.NODES}"
    )
    page.say(captions.caption(measured, says, "curves", paper=EXPERIMENTS))
    page.provenance = captions.provenance(measured)
    return page


def _lines(values: xr.DataArray, along: str, ax: Axes, **line: Any) -> None:
    """Draw one curve per route, by the rule for spread, on a log scale; (seed, route, `along`)."""
    for position, route in enumerate(values["route"].values):
        own = values.sel(route=route)
        if bool(own.notnull().any()):
            panels.spread(
                own, along=along, ax=ax, color=panels.colour(position), linestyle=panels.STYLES[position],
                label=_ROUTES.get(str(route), str(route)), **line,
            )  # fmt: skip
    if ax.has_data() and bool((values > 0).any()):
        layout.decades(ax)
