"""Exact, labelled analysis of training dynamics in teacher-student networks.

Names are imported on first use (SPEC 1), so that ``import tsdyn`` is cheap and does not import torch.
"""

import lazy_loader as _lazy

from tsdyn._version import __version__ as __version__

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
