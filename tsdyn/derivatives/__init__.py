"""Exact derivatives of any ``torch.nn.Module`` and any loss: per sample, per parameter, second order.

Every function gives what a loop of plain autograd over single samples gives, to rounding, or raises an error.  The
assumptions are checked on the given input, once per call: samples are independent, the module is deterministic, and
calling it does not change its state.  A faster method (factors, vmap) is used only where it agrees with plain autograd;
where it does not, the log ("tsdyn") says so.

"Trainable" means ``requires_grad=True`` throughout: frozen parameters are left out of gradients, norms, Jacobians,
kernels and Hessians, unless they are asked for by name.

Per-sample functions call `loss` with a batch of one, ``loss(module(x[i:i+1]), y[i:i+1])``, so its reduction does not
matter; every gradient here is that of one sample's loss, not divided by the number of samples.  Hessians call it with
the whole batch, ``loss(module(x), y)``.

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
from tsdyn.derivatives.factors import Factors
from tsdyn.derivatives.jacobians import gauss_newton, jacobian, neural_tangent_kernel
from tsdyn.derivatives.per_sample import factored_gradients, per_sample_gradient_norms, per_sample_gradients

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
