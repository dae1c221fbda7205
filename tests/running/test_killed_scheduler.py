"""A scheduler that the user named is killed while a sweep runs on it."""

import os
import signal
import textwrap

import pytest
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tsdyn.running.workers import WorkersError

FEW = {"training__epochs": 3, "seeds": 2, "record__observables": ["mse", "weight"]}
GRID = {"teacher.polarity": [0.0, 1.0, 2.0]}

SCHEDULER = """
    import time
    from distributed import LocalCluster
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp") as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(600)
"""


def test_a_scheduler_that_is_killed_ends_the_sweep_in_a_line_and_it_goes_on_elsewhere(tmp_path):
    """With its workers, as where one machine of several goes down: no hang, nothing committed is lost."""
    reading, writing = os.pipe()
    scheduler = processes.Process(["python", "-c", textwrap.dedent(SCHEDULER)], tmp_path, {1: writing})
    os.close(writing)
    with os.fdopen(reading) as out:
        address = out.readline().strip()
    experiment = small(sweep=GRID, **FEW | {"training__steps_per_epoch": 20_000})
    with pytest.raises(WorkersError, match="the scheduler is gone; what was committed is intact") as gone:
        tsdyn.run(
            experiment,
            tmp_path / "sweep",
            scheduler=address,
            progress=lambda *_: os.kill(scheduler.pid, signal.SIGKILL),
        )
    assert "\n" not in str(gone.value)
    assert scheduler.wait() == -signal.SIGKILL
    ended = tsdyn.run(experiment, tmp_path / "sweep").load()
    xr.testing.assert_equal(ended, tsdyn.run(experiment, tmp_path / "whole").load())
