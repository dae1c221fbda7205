"""Figures of archives; `FIGURES` is what ``tsdyn plot`` offers.  They only draw: the other modules do the measuring.

For each figure ``x``

- ``measure_x(archive)`` reads a run, a sweep or a slice of one and gives a small loaded Dataset,
- ``x(ds, ax=...)`` draws one point of the sweep, measured or not, on one set of axes,
- ``draw_x(ds)`` lays panels out over the swept keys.

Measuring twice changes nothing: ``measure_x(measure_x(ds))`` is ``measure_x(ds)``.  The lowest layer is shown unless a
slice holds another (``ds.sel(layer=2)``).  Colours: see `tsdyn.analysis.panels`.
"""

from tsdyn.analysis.figures.curves import (
    curve,
    draw_curves,
    draw_loss,
    draw_rank,
    draw_specialization,
    draw_winners,
    loss,
    mean_rank,
    mean_specialization,
    measure_curves,
    measure_loss,
    measure_rank,
    measure_specialization,
    measure_winners,
    winners,
)
from tsdyn.analysis.figures.heat_maps import (
    correlation_map,
    coupling_map,
    draw_correlation,
    draw_couplings,
    measure_correlation,
    measure_couplings,
)
from tsdyn.analysis.figures.phases import draw_phase, measure_phase, phase_diagram
from tsdyn.analysis.figures.planes import (
    SNAPSHOTS,
    animate_boundaries,
    boundaries,
    draw_boundaries,
    measure_boundaries,
    snapshots,
)
from tsdyn.analysis.figures.recipes import FIGURES, Recipe
from tsdyn.analysis.figures.spectra import SPECTRA, draw_spectrum, measure_spectrum, spectrum
from tsdyn.analysis.figures.teacher_nodes import (
    DODGE,
    MAX_LINES,
    dodged,
    draw_l_shape,
    draw_recovery,
    draw_success_rate,
    l_shape,
    measure_l_shape,
    measure_recovery,
    measure_success_rate,
    recovery,
    success_rate,
)
from tsdyn.analysis.layout import MAX_PANELS
from tsdyn.analysis.style import BAND, PALETTE

__all__ = [
    "BAND",
    "DODGE",
    "FIGURES",
    "MAX_LINES",
    "MAX_PANELS",
    "PALETTE",
    "SNAPSHOTS",
    "SPECTRA",
    "Recipe",
    "animate_boundaries",
    "boundaries",
    "correlation_map",
    "coupling_map",
    "curve",
    "dodged",
    "draw_boundaries",
    "draw_correlation",
    "draw_couplings",
    "draw_curves",
    "draw_l_shape",
    "draw_loss",
    "draw_phase",
    "draw_rank",
    "draw_recovery",
    "draw_specialization",
    "draw_spectrum",
    "draw_success_rate",
    "draw_winners",
    "l_shape",
    "loss",
    "mean_rank",
    "mean_specialization",
    "measure_boundaries",
    "measure_correlation",
    "measure_couplings",
    "measure_curves",
    "measure_l_shape",
    "measure_loss",
    "measure_phase",
    "measure_rank",
    "measure_recovery",
    "measure_specialization",
    "measure_spectrum",
    "measure_success_rate",
    "measure_winners",
    "phase_diagram",
    "recovery",
    "snapshots",
    "spectrum",
    "success_rate",
    "winners",
]
