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

#: The command, in a process that is killed at a moment of its choice; `calls.txt` has a line for each piece of work.
COMMAND = """
import os, signal, sys
from pathlib import Path
from tsdyn import cli
from tsdyn.running import members, runner
from tsdyn.through_training import blocks, kept
from tsdyn.through_training import sensitivity as made

moment, *words = sys.argv[1:]
runner.COMMIT_SECONDS = 0.0
calls = Path("calls.txt")

def counted(function, kills):
    def call(*given):
        with calls.open("a") as log:
            log.write(f"{getattr(given[1], 'epoch', given[1]) if len(given) > 1 else given[0]}\\n")
        found = function(*given)
        if kills(given):
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call

if moment == "block":  # after the first block of members was kept
    kept.write = counted(kept.write, lambda _: True)
if moment == "back":  # while the second goes back
    compute, done = blocks.compute, []
    def second(job, tick):
        done.append(job)
        return compute(job, tick if len(done) < 2 else lambda _: os.kill(os.getpid(), signal.SIGKILL))
    made.compute = second
if moment == "epoch":
    members.Members.measure = counted(members.Members.measure, lambda given: given[1] == 3)
if moment == "none":
    made.compute = counted(made.compute, lambda _: False)
    members.Members.measure = counted(members.Members.measure, lambda _: False)
sys.argv = ["tsdyn", *words]
cli.main()
"""


def command(folder, moment, *words):
    (folder / "calls.txt").unlink(missing_ok=True)
    done = processes.run([sys.executable, "-c", COMMAND, moment, *words], folder)
    calls = (folder / "calls.txt").read_text().splitlines() if (folder / "calls.txt").exists() else []
    return done, calls


@pytest.mark.parametrize("moment", ["block", "back"])
def test_sensitivity_goes_on_with_the_members_that_were_not_done(tmp_path, moment):
    tsdyn.run(tiny(seeds=3, training__steps_per_epoch=40), tmp_path / "run")
    # room for the states of one member at a time, not of two
    words = ["sensitivity", "run", "--wrt", "start,sample", "--memory", "20kB"]
    done, calls = command(tmp_path, "none", *words, "-o", "whole.nc")
    assert done.returncode == 0, done.stderr
    blocks = len(calls)
    assert blocks == 3
    done, _ = command(tmp_path, moment, *words, "-o", "killed.nc")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed.nc.parts").glob("*.npz"))) == 1
    assert not (tmp_path / "killed.nc").exists()
    done, calls = command(tmp_path, "none", *words, "-o", "killed.nc")
    assert done.returncode == 0, done.stderr
    assert len(calls) == blocks - 1
    assert not (tmp_path / "killed.nc.parts").exists()
    with xr.open_dataset(tmp_path / "whole.nc") as whole, xr.open_dataset(tmp_path / "killed.nc") as again:
        xr.testing.assert_equal(whole, again)


def test_forks_go_on_at_their_last_epoch(tmp_path):
    tsdyn.run(small(training__epochs=5, seeds=2, record__observables=["loss", "weight"]), tmp_path / "run")
    goes_on(tmp_path, "fork", "run", "--at", "1,2", "--perturb", "gaussian=0.1")


def test_an_atlas_of_left_out_samples_goes_on_at_its_last_epoch(tmp_path):
    asked = small(
        training__epochs=5,
        seeds=2,
        record__observables=["loss", "weight"],
        data__leave_out={"subsets": 2, "share": 0.1},
    )
    (tmp_path / "atlas.toml").write_text(tomli_w.dumps(asked.as_dict()), encoding="utf-8")
    goes_on(tmp_path, "run", "atlas.toml")


def goes_on(folder, *words):
    done, every = command(folder, "none", *words, "-o", "whole")
    assert done.returncode == 0, done.stderr
    done, before = command(folder, "epoch", *words, "-o", "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    done, after = command(folder, "none", *words, "-o", "killed")
    assert done.returncode == 0, done.stderr
    assert len(after) < len(every)  # what was committed before the kill is not measured again
    assert len(before) + len(after) >= len(every)
    whole, again = (tsdyn.open(folder / name).load() for name in ("whole", "killed"))
    assert set(whole.variables) == set(again.variables)
    for name in whole.variables:
        if name not in ("wall_seconds", "created"):
            np.testing.assert_array_equal(again[name], whole[name], err_msg=str(name))
