"""What forked processes need not import again, which takes a second of a processor: see tests/processes.py."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries below make threads
os.environ.setdefault("MPLBACKEND", "Agg")

import dask
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # as torch.optim does at its first optimiser
import tsdyn.analysis.audit
import tsdyn.analysis.overview
import tsdyn.analysis.report
import typer.rich_utils  # noqa: F401
import xarray  # noqa: F401
from distributed import Client, LocalCluster, Nanny, Security, Worker  # noqa: F401

import tsdyn.cli.application
import tsdyn.cli.run_commands
import tsdyn.growing.adding
import tsdyn.recording.recorder
import tsdyn.running.own_modules
import tsdyn.running.sweep
import tsdyn.running.workers
import tsdyn.through_training.forks
import tsdyn.xarray  # noqa: F401
from tests import processes

torch.set_num_threads(1)
os.fsync = lambda handle: None  # nothing waits for the disk: see tests/conftest.py
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
processes.allow_for_coverage()
