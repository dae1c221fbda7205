"""Tian (2020), Figure 5: the L-shape of fan-out norm against best correlation.

Students either specialize (correlation near 1) or fall silent (fan-out norm near 0); 10 teacher nodes,
over-realization 1, 2, 5, 10 and polarity 0, 1, 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import figures, layout
from tsdyn.analysis import style as look
from tsdyn.analysis.figures import measure_l_shape as measure
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "L-shape: fan-out norm against best correlation"
SOURCE = "Tian 2020 (PMLR 119:9470), Figure 5"

_GRID = {"student.overrealization": [1, 2, 5, 10], "teacher.polarity": [0.0, 1.0, 2.0]}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        {"name": "l-shape-smoke", "sweep": {"student.overrealization": [1, 5], "teacher.polarity": [1.0]}}
    ),
    # d = 100 as in the paper; 4 seeds and 25 epochs instead of 32 and 100
    "desk": PAPER.replace(
        {"name": "l-shape-desk", "seeds": 4, "training.epochs": 25, "record.every": 5, "sweep": _GRID}
    ),
    "paper": PAPER.replace({"name": "l-shape-paper", "record.every": 5, "sweep": _GRID}),
}


def _panel(measured: xr.Dataset, ax: Axes) -> None:
    figures.l_shape(measured.isel(dict.fromkeys(layout.swept(measured), 0)), ax=ax)


#: The panel by name; of a sweep that of the first point, select another with ``measured.sel``.
PANELS: dict[str, layout.Panel] = {"l_shape": _panel}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per over-realization and a row per polarity."""
    widths, polarities = (layout.points(measured, [dim]) for dim in ("overrealization", "polarity"))
    rows = [
        [layout.Cell("l_shape", {**w, **p}, "" if i else layout.name_of(measured, w)) for w in widths]
        for i, p in enumerate(polarities)
    ]
    says = (
        "Best correlation with any teacher node and fan-out norm of each student node after epoch "
        f"{int(measured['epoch'])}, a colour per seed; a row per polarity of the teacher's nodes"
    )
    page = layout.arrange(
        measured, PANELS, rows, says=says, spread="points", height=1.5, share_x=True, share_y="row", key=None,
        columns=2, paper=EXPERIMENTS,
    )  # fmt: skip
    if len(rows) > 1:  # whose common label stands at the page's side
        for ax, point in zip(page.axes[:: len(widths)], polarities, strict=True):
            ax.set_ylabel(layout.name_of(measured, point))
    return page
