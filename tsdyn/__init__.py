"""Exact, labelled analysis of training dynamics in teacher-student networks.

Names are imported on first use (SPEC 1), so that ``import tsdyn`` is cheap and does not import torch.
"""

import os as _os

import lazy_loader as _lazy

from tsdyn import _forwarding
from tsdyn._version import __version__ as __version__

# HDF5 reads this when it is loaded.  Its locks fail on file systems without flock; tsdyn has locks of its own.
_os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")

_attached, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
_forwarding.install()


def __getattr__(name: str) -> object:
    if name in __all__ or name not in _forwarding.MOVED:
        return _attached(name)
    return _forwarding.old_module(name)
