"""What forked processes need not import again: see tests/processes.py."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries below make threads

import dask
import torch
from distributed import Client, LocalCluster, Nanny, Security, Worker  # noqa: F401

torch.set_num_threads(1)
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
