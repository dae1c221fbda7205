"""Commands of derivatives, forks and left-out samples that SIGKILL ends go on where they were, to the same bits."""

import signal
import sys

import numpy as np
import pytest
import tomli_w
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tests.through_training.test_twins import tiny
from tsdyn import cli
from tsdyn.running.members import Members
from tsdyn.through_training import blocks
from tsdyn.through_training import sensitivity as made

#: The command, in a process that kills itself at a moment of its choice.
KILLED = """
import os, signal, sys
from tsdyn import cli
from tsdyn.running import members, runner
from tsdyn.through_training import blocks, kept
from tsdyn.through_training import sensitivity as made

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

moment, *words = sys.argv[1:]
runner.COMMIT_SECONDS = 0.0
if moment == "kept":  # once the first block of members is kept
    write = kept.write
    kept.write = lambda *given: (write(*given), kill())
if moment == "second":  # while the second is computed
    compute, jobs = blocks.compute, []
    def second(job, tick):
        jobs.append(job)
        return compute(job, tick if len(jobs) < 2 else kill)
    made.compute = second
if moment == "epoch":
    measure = members.Members.measure
    members.Members.measure = lambda self, step, given: kill() if step == 3 else measure(self, step, given)
sys.argv = ["tsdyn", *words]
cli.main()
"""


def kill(folder, moment, *words):
    done = processes.run([sys.executable, "-c", KILLED, moment, *words], folder)
    assert done.returncode == -signal.SIGKILL, done.stderr


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["tsdyn", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


def test_sensitivity_goes_on_with_the_members_that_were_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tsdyn.run(tiny(seeds=3, training__steps_per_epoch=40), "run")
    computed = []

    def counted(job, tick):
        computed.extend(job.experiment.seed_labels)
        return blocks.compute(job, tick)

    monkeypatch.setattr(made, "compute", counted)
    # room for the states of one member at a time
    words = ["sensitivity", "run", "--wrt", "start,sample", "--memory", "10kB", "--quiet", "-o"]
    command(monkeypatch, *words, "whole.nc")
    assert computed == [0, 1, 2]
    for moment in ("kept", "second"):
        file = tmp_path / f"{moment}.nc"
        kill(tmp_path, moment, *words, file.name)
        assert not file.exists()
        assert len(list((tmp_path / f"{file.name}.parts").glob("*.npz"))) == 1
        computed.clear()
        command(monkeypatch, *words, file.name)
        assert computed == [1, 2]
        assert not (tmp_path / f"{file.name}.parts").exists()
        with xr.open_dataset("whole.nc") as whole, xr.open_dataset(file) as again:
            xr.testing.assert_equal(whole, again)


@pytest.mark.parametrize("family", ["forks", "left-out samples"])
def test_runs_of_the_family_go_on_at_their_last_epoch(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = small(training__epochs=5, seeds=2, record__observables=["loss", "weight"])
    if family == "forks":
        tsdyn.run(plain, "run")
        words = ["fork", "run", "--at", "1,2", "--perturb", "gaussian=0.1", "--quiet", "-o"]
    else:
        atlas = plain.replace({"data.leave_out": {"subsets": 2, "share": 0.1}})
        (tmp_path / "atlas.toml").write_text(tomli_w.dumps(atlas.as_dict()), encoding="utf-8")
        words = ["run", "atlas.toml", "--quiet", "-o"]
    measured = []
    measure = Members.measure

    def counted(members, step, variables):
        measured.append(step)
        return measure(members, step, variables)

    monkeypatch.setattr(Members, "measure", counted)
    command(monkeypatch, *words, "whole")
    every = len(measured)
    kill(tmp_path, "epoch", *words, "killed")
    measured.clear()
    command(monkeypatch, *words, "killed")
    assert 0 < len(measured) < every  # what was committed before the kill is not measured again
    whole, again = (tsdyn.open(name).load() for name in ("whole", "killed"))
    assert set(whole.variables) == set(again.variables)
    for name in whole.variables:
        if name != "wall_seconds":
            np.testing.assert_array_equal(again[name], whole[name], err_msg=str(name))
