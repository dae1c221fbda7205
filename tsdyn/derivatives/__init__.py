"""Exact derivatives of any ``torch.nn.Module`` and any loss: per sample, per parameter, second order.

Every number is the one that plain autograd gives for one sample after the other, to rounding, or is refused.  What that
assumes is checked on the input at hand, once per call: samples are independent, the module is deterministic and keeps
its state when it is called; and a way that is shorter than plain autograd is taken only where it agrees with it.  Where
it does not, the log ("tsdyn") says so.

What is trainable is what requires a gradient, everywhere: frozen parameters (``requires_grad=False``) are left out of
gradients, norms, Jacobians, kernels and Hessians, unless they are asked for by name.

A `loss` of per-sample functions is called with a batch of one, ``loss(module(x[i:i+1]), y[i:i+1])``, so its reduction
does not matter; every gradient here is that of one sample's loss, not divided by the number of samples.  A Hessian's
is called with the whole batch, ``loss(module(x), y)``.

The module is left as it was: parameters and their ``.grad``, buffers, training flags, hooks and random states.
"""

from tsdyn.derivatives.assumptions import MEMORY, Loss
from tsdyn.derivatives.curvature import (
    SpectralDensity,
    hessian,
    hessian_density,
    hessian_spectrum,
    hessian_vector_product,
)
from tsdyn.derivatives.jacobians import gauss_newton, jacobian, neural_tangent_kernel
from tsdyn.derivatives.per_sample import Factors, factored_gradients, per_sample_gradient_norms, per_sample_gradients

__all__ = [
    "MEMORY",
    "Factors",
    "Loss",
    "SpectralDensity",
    "factored_gradients",
    "gauss_newton",
    "hessian",
    "hessian_density",
    "hessian_spectrum",
    "hessian_vector_product",
    "jacobian",
    "neural_tangent_kernel",
    "per_sample_gradient_norms",
    "per_sample_gradients",
]
