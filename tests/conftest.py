"""One thread and no display, so that results do not depend on the machine's load."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import torch

torch.set_num_threads(1)
