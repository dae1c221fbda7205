"""The measurements recorded while a student trains: their formulas and the registry of variables they fill.

`correlation`, `output_jacobian`, `coupling` and `lemma1_residual` take any two modules, at layers named by the user.
"""

from typing import TYPE_CHECKING

from tsdyn.observables.layers import correlation
from tsdyn.observables.module_couplings import coupling, lemma1_residual, output_jacobian

__all__ = ["correlation", "coupling", "lemma1_residual", "output_jacobian"]

if not TYPE_CHECKING:  # names that tsdyn 0.1 had here
    from tsdyn._forwarding import forwarding

    __getattr__ = forwarding(__name__)
