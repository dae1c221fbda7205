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

from tsdyn.assumptions import MEMORY as MEMORY
from tsdyn.assumptions import Loss as Loss
from tsdyn.curvature import SpectralDensity as SpectralDensity
from tsdyn.curvature import hessian as hessian
from tsdyn.curvature import hessian_density as hessian_density
from tsdyn.curvature import hessian_spectrum as hessian_spectrum
from tsdyn.curvature import hessian_vector_product as hessian_vector_product
from tsdyn.jacobians import gauss_newton as gauss_newton
from tsdyn.jacobians import jacobian as jacobian
from tsdyn.jacobians import neural_tangent_kernel as neural_tangent_kernel
from tsdyn.per_sample import Factors as Factors
from tsdyn.per_sample import factored_gradients as factored_gradients
from tsdyn.per_sample import per_sample_gradient_norms as per_sample_gradient_norms
from tsdyn.per_sample import per_sample_gradients as per_sample_gradients
