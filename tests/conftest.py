"""One thread and no display, so that results do not depend on the machine's load."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import dask
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """NumPy silences its all-NaN warning by `warnings.catch_warnings`, which threads undo for one another."""
    with dask.config.set(scheduler="synchronous"):
        yield
