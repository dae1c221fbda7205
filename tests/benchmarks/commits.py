"""What a Recorder's commit adds to its observables' own passes: ``python -m tests.benchmarks.commits``.

Asked: at most 10 ms, or 5 % of one pass over 10,000 samples, whichever is larger.  Prints medians in milliseconds of
the processor's time, which other processes of the machine do not change much, and exits 1 if a commit adds more.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import tsdyn
from tsdyn.recording import measuring

COMMITS = 30


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def added(width: int) -> tuple[float, float]:
    """Median milliseconds that a commit takes beside measuring, and those of one pass over 10,000 samples."""
    model, x = network(width), torch.randn(10_000, 100)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()  # so that there are moments to store
    measured, spent = measuring.measured, [0.0]

    def timed(*given: object) -> object:
        begin = time.process_time()
        try:
            return measured(*given)  # type: ignore[arg-type]
        finally:
            spent[0] += time.process_time() - begin

    beside, passes = [], []
    with tempfile.TemporaryDirectory() as folder, patch.object(measuring, "measured", timed), torch.no_grad():
        rec = tsdyn.Recorder(Path(folder) / "run", model, probe=(x, torch.zeros(10_000, 10)), state=optimizer)
        for epoch in range(COMMITS):
            spent[0], begin = 0.0, time.process_time()
            rec.commit(epoch)
            beside.append(time.process_time() - begin - spent[0])
            begin = time.process_time()
            model(x)
            passes.append(time.process_time() - begin)
        rec.close()
    return 1e3 * statistics.median(beside), 1e3 * statistics.median(passes)


def main() -> int:
    torch.set_num_threads(1)
    over = 0
    for width in (32, 256, 1024):
        commit, one = added(width)
        bound = max(10.0, 0.05 * one)
        over += commit > bound
        print(f"width {width}: a commit adds {commit:.1f} ms, at most {bound:.1f}; a pass takes {one:.1f} ms")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
