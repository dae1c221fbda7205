"""The measurements recorded while a student trains: their formulas and the registry of variables they fill."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # names that tsdyn 0.1 had here
    from tsdyn._forwarding import forwarding

    __getattr__ = forwarding(__name__)
