"""Gradient flow and its end points; online learning in infinite and in finite dimension.

Source: Simsek et al. (2023), section 3; Saad & Solla (1995); Goldt et al. (2019); Hairer & Wanner (1996), IV.8, VI.4.
"""

from tsdyn.flow.conventions import Online, convention
from tsdyn.flow.flows import REASONS, gradient_flow
from tsdyn.flow.online_learning import online
from tsdyn.flow.overlap_dynamics import order_parameters
from tsdyn.flow.overlap_matrices import Overlaps, generalization_error, overlaps
from tsdyn.flow.stationary import FunctionLoss, Loss, Polished, Signature, minimum_derivative, polish, signature

__all__ = [
    "REASONS",
    "FunctionLoss",
    "Loss",
    "Online",
    "Overlaps",
    "Polished",
    "Signature",
    "convention",
    "generalization_error",
    "gradient_flow",
    "minimum_derivative",
    "online",
    "order_parameters",
    "overlaps",
    "polish",
    "signature",
]
