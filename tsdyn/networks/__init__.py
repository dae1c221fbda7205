"""Networks as values: parameters, activations, normalization, and the way to and from torch."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # names that tsdyn 0.1 had here
    from tsdyn._forwarding import forwarding

    __getattr__ = forwarding(__name__)
