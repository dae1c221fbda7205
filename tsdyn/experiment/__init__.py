"""What an experiment file says: its parts, their rules, the sweep. Needs no torch."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # names that tsdyn 0.1 had here
    from tsdyn._forwarding import forwarding

    __getattr__ = forwarding(__name__)
