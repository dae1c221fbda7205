"""The activations that compiled code knows (smooth.hpp), and by which numbers its jobs name them."""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.networks import activations
from tsdyn.networks.activations import Activation

#: Number of an activation in smooth.hpp's Kind; 0 are the piecewise linear ones, which their leak tells apart.
KINDS: Mapping[str, int] = {"erf": 1, "tanh": 2, "sigmoid": 3, "softplus": 4, "gelu": 5, "silu": 6}


def kind(activation: Activation) -> int | None:
    """The number of an activation in compiled code; None for one that it does not know: a user's own."""
    if activation.leak is not None:
        return 0
    own = activations.TABLE.get(activation.name)
    return KINDS.get(activation.name) if own is activation else None
