"""The table of figures that ``tsdyn plot`` offers: what each shows, what it needs, what draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xarray as xr
from tsdyn.analysis.figures.curves import draw_loss, draw_rank, draw_specialization, draw_winners
from tsdyn.analysis.figures.heat_maps import draw_correlation, draw_couplings
from tsdyn.analysis.figures.phases import draw_phase
from tsdyn.analysis.figures.planes import draw_boundaries
from tsdyn.analysis.figures.reading import NEEDS, missing
from tsdyn.analysis.figures.spectra import draw_spectrum
from tsdyn.analysis.figures.teacher_nodes import draw_l_shape, draw_recovery, draw_success_rate
from tsdyn.analysis.identity import refuse_odd
from tsdyn.analysis.style import Page


@dataclass(frozen=True)
class Recipe:
    """A figure by name.

    Attributes:
        shows: What the figure shows, in one line.
        needs: Variables of the archive; ``a|b`` where either will do.
        draw: Function from an archive to the figure.
    """

    shows: str
    needs: tuple[str, ...]
    draw: Callable[[xr.Dataset], Page]

    def missing(self, archive: xr.Dataset) -> list[str]:
        """Needed variables that were not recorded."""
        return missing(archive, self.needs)

    def __call__(self, archive: xr.Dataset) -> Page:
        refuse_odd(archive, "plot")
        return self.draw(archive)


#: What ``tsdyn plot DIR NAME`` draws.
FIGURES: Mapping[str, Recipe] = {
    "l-shape": Recipe("fan-out norm against best correlation", NEEDS["l-shape"], draw_l_shape),
    "success-rate": Recipe("share of seeds that recover each teacher node", NEEDS["success-rate"], draw_success_rate),
    "recovery": Recipe("best correlation of each teacher node over epochs", NEEDS["recovery"], draw_recovery),
    "loss": Recipe("evaluation mse or loss over epochs", NEEDS["loss"], draw_loss),
    "specialization": Recipe("mean best correlation over epochs", NEEDS["specialization"], draw_specialization),
    "rank": Recipe("mean rank of the final winners over epochs", NEEDS["rank"], draw_rank),
    "winners": Recipe("rank of each final winner over epochs", NEEDS["winners"], draw_winners),
    "correlation": Recipe("heat map of correlations by best match", NEEDS["correlation"], draw_correlation),
    "couplings": Recipe("heat maps of β* and H* before and after", NEEDS["couplings"], draw_couplings),
    "spectrum": Recipe("largest eigenvalues of the Hessian", NEEDS["spectrum"], draw_spectrum),
    "boundaries": Recipe("boundaries in the plane over epochs (also .gif)", NEEDS["boundaries"], draw_boundaries),
    "phase": Recipe("share of seeds by what they recover", NEEDS["phase"], draw_phase),
}  # fmt: skip
