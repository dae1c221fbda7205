"""Two-layer networks on Gaussian inputs, without samples: interactions, population loss, copy or average.

Everything here is exact for x ~ N(0, I) up to rounding.  Losses are E‖f − f*‖², without ½ (docs/theory).
"""

from tsdyn.gaussian.closed_forms import Partials
from tsdyn.gaussian.interaction import Derivatives, Interaction
from tsdyn.gaussian.interaction import derivatives as interaction_derivatives
from tsdyn.gaussian.interaction import in_cosine as interaction
from tsdyn.population.archived import expected_loss
from tsdyn.population.critical_point_kinds import Classification, classify, phase_boundaries
from tsdyn.population.critical_points import (
    OneNeuron,
    ReducedLoss,
    copy_average,
    one_neuron,
    partitions,
    perturbed_copy,
    perturbed_copy_average,
)
from tsdyn.population.two_layer_loss import PopulationLoss, loss, loss_from_overlaps, starts
from tsdyn.population.warm_starts import warm_start

__all__ = [
    "Classification",
    "Derivatives",
    "Interaction",
    "OneNeuron",
    "Partials",
    "PopulationLoss",
    "ReducedLoss",
    "classify",
    "copy_average",
    "expected_loss",
    "interaction",
    "interaction_derivatives",
    "loss",
    "loss_from_overlaps",
    "one_neuron",
    "partitions",
    "perturbed_copy",
    "perturbed_copy_average",
    "phase_boundaries",
    "starts",
    "warm_start",
]
