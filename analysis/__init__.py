"""Analyses of archives, after the runs: lazy functions of Datasets, one topic per module."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "alignment",
        "audit",
        "batch_norm",
        "citations",
        "claims",
        "connectivity",
        "figures",
        "identity",
        "layout",
        "lift",
        "lottery",
        "matching",
        "members",
        "order_parameters",
        "overview",
        "panels",
        "phase",
        "report",
        "similarity",
        "specialization",
        "summary",
    ],
)
