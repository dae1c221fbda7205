"""A point whose worker dies again and again is found by halving groups and fails alone."""

from types import SimpleNamespace

import pytest
from distributed import KilledWorker, LocalCluster

import tsdyn
from tests.cases import FEW, small
from tsdyn.running import workers as workers_module
from tsdyn.running.outcome import SweepError

COMPUTE = workers_module._work
TRIED: list[int] = []


def dying(texts, *given):
    """What the scheduler answers for a group in which one point kills its worker; else the group's own answer."""
    if any("polarity = 2.0" in text for text in texts.values()):
        TRIED.append(len(texts))
        raise KilledWorker("group", SimpleNamespace(address="tcp://gone"), 3)
    return COMPUTE(texts, *given)


@pytest.mark.parametrize("together", [False, True])
def test_a_point_that_kills_its_workers_fails_alone_and_only_after_several_tries(tmp_path, monkeypatch, together):
    TRIED.clear()
    experiment = small(sweep={"teacher.polarity": [0.0, 0.5, 1.0, 2.0]}, **FEW)
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp") as cluster:
        monkeypatch.setattr(workers_module, "_work", dying)
        with pytest.raises(SweepError, match="1 of 4 points failed") as told:
            tsdyn.run(experiment, tmp_path / "sweep", scheduler=cluster.scheduler_address, together=together)
        monkeypatch.undo()
        assert "polarity=2.0" in str(told.value)
        assert len(TRIED) == workers_module.FRUITLESS
        assert TRIED[-1] == 1 or not together  # alone in the end
        assert tsdyn.open(tmp_path / "sweep").coverage.values.tolist() == [1, 1, 1, 0]
        ds = tsdyn.run(experiment, tmp_path / "sweep", scheduler=cluster.scheduler_address)
    assert ds.coverage.values.tolist() == [1, 1, 1, 1]
