"""Tian (2020), Figure 7: which of 20 teacher nodes are recovered, by index.

The stronger a teacher node (small index, since the fan-out of node j = 1, 2, ... is divided by j^p) the sooner it is
recovered; over-realization helps the weak ones.  Epoch 5 dotted, the last solid.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, figures, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.figures import measure_success_rate as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "success rate of recovery by teacher node"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 7"

_PAPER = PAPER.replace(
    {
        "name": "success-rate-paper",
        "teacher.widths": [100, 20, 50],
        "record.every": 5,
        "sweep": {"teacher.polarity": [0.5, 1.0, 1.5, 2.0, 2.5], "student.overrealization": [1, 2, 5, 10]},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        {
            "name": "success-rate-smoke",
            "sweep": {"teacher.polarity": [0.5, 1.5], "student.overrealization": [1, 2]},
        }
    ),
    # 8 seeds and 20 epochs instead of 32 and 100
    "desk": _PAPER.replace(
        {
            "name": "success-rate-desk",
            "seeds": 8,
            "training.epochs": 20,
        }
    ),
    "paper": _PAPER,
}


def _panel(measured: xr.Dataset, ax: Axes) -> None:
    figures.success_rate(measured.isel(dict.fromkeys(layout.swept(measured), 0)), ax=ax)


#: The panel by name; of a sweep that of the first point, select another with ``measured.sel``.
PANELS: dict[str, layout.Panel] = {"success_rate": _panel}


def _widths(measured: xr.Dataset, ax: Axes) -> None:
    """Success rates of every width at one polarity: a colour per width."""
    one = measured.isel(polarity=0) if "polarity" in measured.dims else measured
    ratios = one["overrealization"].values
    for position, ratio in enumerate(ratios):
        own, shift = one.sel(overrealization=ratio), figures.dodged(position, len(ratios))
        figures.success_rate(
            own, ax=ax, color=panels.colour(position), label=f"{ratio:g}x", shift=shift, marker=panels.mark(position)
        )


PANELS["success_rate of every width"] = _widths


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a panel per polarity, a colour per width; the early epoch dotted, the last solid."""
    cells = [
        layout.Cell("success_rate of every width", at, layout.name_of(measured, at))
        for at in layout.points(measured, ["polarity"])
    ]
    says = (
        "Share of seeds in which each teacher node is recovered (correlation with some student node above 0.95), from "
        f"node 1, the strongest, to the weakest: the fan-out of node j is divided by jᵖ; {captions.NODES}; the "
        f"curves of the widths are drawn {figures.DODGE:g} above one another, since many coincide at 0 and 1"
    )
    return layout.arrange(
        measured, PANELS, [cells], says=says, spread="shares", share_x=True, share_y=True,
        key="student nodes per teacher node, and epoch", paper=EXPERIMENTS, columns=2, height=1.9,
    )  # fmt: skip
