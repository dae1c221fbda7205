"""Sweeps run: in this process and on workers, with points that fail and workers that die."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tsdyn import runner, sweep
from tsdyn.segments import segments

FEW = {"training__epochs": 3, "seeds": 2, "record__observables": ["mse", "correlation"]}
GRID = {"teacher.polarity": [0.0, 1.0, 2.0]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tsdyn.run(small(sweep=GRID, **FEW), tmp_path_factory.mktemp("sweep") / "serial")


def same(found, wanted):
    xr.testing.assert_equal(found.compute(), wanted.compute())


def test_a_failing_point_does_not_stop_the_others(tmp_path):
    # 2 separated rows of length 1 from 9 choices exist, 20 do not
    experiment = small(sweep={"teacher.widths": [[10, 4, 6], [1, 20, 6], [10, 5, 6]]}, **FEW)
    with pytest.raises(sweep.SweepError, match=r"1 of 3 points failed, the others are done:\n  widths=1-20-6: ") as end:
        tsdyn.run(experiment, tmp_path / "sweep")
    assert list(end.value.failures) == ["widths=1-20-6"]
    np.testing.assert_array_equal(tsdyn.open(tmp_path / "sweep").coverage, [1, 0, 1])


def test_finished_points_are_not_run_again(tmp_path, monkeypatch, undisturbed):
    ran = []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda e, path, **kw: ran.append(path.name) or run(e, path, **kw))
    tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep")
    assert len(ran) == 3
    tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep")
    assert len(ran) == 3
    tsdyn.run(small(sweep={"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}, **FEW), tmp_path / "sweep")
    assert ran[3:] == ["polarity=0.5"]
    longer = {**FEW, "training__epochs": 5}
    ds = tsdyn.run(small(sweep=GRID | {"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}, **longer), tmp_path / "sweep")
    assert len(ran) == 8
    assert int(ds.epoch[-1]) == 5


def test_workers_compute_the_same_bits_and_survive_each_other(tmp_path, undisturbed):
    """Two processes; one is killed whenever a new epoch was committed, three times."""
    told, killed = [], []
    path = tmp_path / "sweep"
    stop = threading.Event()

    def progress(epoch, epochs, died, mse):
        told.append((epoch, epochs))

    def kill():
        while not stop.is_set() and len(killed) < 3:
            time.sleep(0.05)
            for child in children():
                if len(killed) < 3 and any(path.glob("*/segments/*.nc")) and child not in killed:
                    os.kill(child, signal.SIGKILL)
                    killed.append(child)
                    time.sleep(0.5)

    def children():
        """Processes of workers: those of ours that say so, not the helper that spawns them."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
                words = Path(f"/proc/{entry}/cmdline").read_text()
            except (OSError, ValueError, IndexError):
                continue
            if parent == os.getpid() and "spawn_main" in words:
                found.append(int(entry))
        return found

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        ds = sweep.run(small(sweep=GRID, **FEW), path, workers=2, progress=progress)
    finally:
        stop.set()
        killer.join()
    assert killed
    same(ds, undisturbed)
    assert (3, 3) in told
    assert not any(segments(point) for point in path.iterdir() if point.is_dir())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 0}, "workers = 0: at least 1"),
        ({"workers": 1, "scheduler": "tcp://127.0.0.1:9"}, "not together with a scheduler"),
        ({"scheduler": "tcp://127.0.0.1:9"}, "scheduler tcp://127.0.0.1:9: does not answer"),
        ({"scheduler": "nonsense://x"}, "scheduler nonsense://x: does not answer"),
    ],
)
def test_workers_that_cannot_be_had(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 1)
    with pytest.raises(sweep.WorkersError, match=message):
        sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", **how)


def test_an_existing_scheduler_is_used(tmp_path, undisturbed):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        ds = sweep.run(small(sweep=GRID, **FEW), tmp_path / "sweep", scheduler=cluster.scheduler_address)
    same(ds, undisturbed)
