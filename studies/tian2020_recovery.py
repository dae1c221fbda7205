"""Tian (2020), Figure 8: best correlation of each teacher node over training, at 5x over-realization.

Strong teacher nodes are learned first, weak ones later or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, figures, layout
from tsdyn.analysis import style as look
from tsdyn.analysis.figures import measure_recovery as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "best correlation of each teacher node over training"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 8"

_PAPER = PAPER.replace(
    {
        "name": "recovery-paper",
        "teacher.widths": [100, 20, 50],
        "sweep": {"teacher.polarity": [0.5, 1.0, 1.5, 2.0, 2.5]},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace({"name": "recovery-smoke", "sweep": {"teacher.polarity": [0.5, 1.5]}}),
    # 5 seeds and 30 epochs instead of 32 and 100
    "desk": _PAPER.replace(
        {
            "name": "recovery-desk",
            "seeds": 5,
            "training.epochs": 30,
        }
    ),
    "paper": _PAPER,
}


def _panel(measured: xr.Dataset, ax: Axes) -> None:
    figures.recovery(measured.isel(dict.fromkeys(layout.swept(measured), 0)), ax=ax)


#: The panel by name; of a sweep that of the first point, select another with ``measured.sel``.
PANELS: dict[str, layout.Panel] = {"recovery": _panel}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a panel per polarity, a shade per teacher node."""
    cells = [layout.Cell("recovery", at, layout.name_of(measured, at)) for at in layout.points(measured, ["polarity"])]
    says = (
        "Best correlation of each teacher node with any student node over training, five student nodes per teacher "
        "node; from node 1, the strongest, to the weakest: the fan-out of node j is divided by jᵖ; "
        f"{captions.NODES}"
    )
    page = layout.arrange(
        measured, PANELS, [cells], says=says, spread="curves", share_x=True, share_y=True, key=None,
        paper=EXPERIMENTS, columns=2, height=1.9,
    )  # fmt: skip
    layout.shade_bar(page, layout.unpadded(measured)["teacher_node"].values.tolist(), "teacher node")
    return page
