"""Backpropagated gradients, couplings and their expectations, alignment, and the Luck Matters dynamics."""

from tsdyn.networks.batch_norm import batch_norm_gradient
from tsdyn.theory.coupling_moments import (
    MOMENTS,
    Form,
    Moments,
    balances,
    conserved_norms,
    expectations,
    fanout_norms,
    moments,
)
from tsdyn.theory.couplings import (
    Coupling,
    augmented_output_jacobian,
    backpropagated_gradient,
    backpropagated_gradients,
    coupling,
    lemma1_residual,
    output_jacobian,
)
from tsdyn.theory.inputs import MEMORY, Samples
from tsdyn.theory.luck_matters import WeightUpdate, luck_matters_updates

__all__ = [
    "MEMORY",
    "MOMENTS",
    "Coupling",
    "Form",
    "Moments",
    "Samples",
    "WeightUpdate",
    "augmented_output_jacobian",
    "backpropagated_gradient",
    "backpropagated_gradients",
    "balances",
    "batch_norm_gradient",
    "conserved_norms",
    "coupling",
    "expectations",
    "fanout_norms",
    "lemma1_residual",
    "luck_matters_updates",
    "moments",
    "output_jacobian",
]
