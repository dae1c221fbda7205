"""Where gradient descent goes: gradient flow, its ends polished and told apart.

Source: Simsek et al. (2023), section 3; Hairer & Wanner (1996), section VI.4.
"""

from tsdyn.gradient_flow import REASONS, gradient_flow
from tsdyn.stationary import FunctionLoss, Loss, Polished, Signature, polish, signature

__all__ = [
    "REASONS",
    "FunctionLoss",
    "Loss",
    "Polished",
    "Signature",
    "gradient_flow",
    "polish",
    "signature",
]
