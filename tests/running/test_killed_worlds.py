"""Runs with spoiled targets, correlated inputs and new options that SIGKILL ends go on to the bits of whole ones."""

import signal

import numpy as np
import pytest
import tomli_w

import tsdyn
from tests import processes
from tests.cases import small

WORLDS = {
    "flipped classes, fresh samples": {
        "training__loss": "cross_entropy", "data__flip": 0.2, "data__train": "fresh", "data__spectrum": 1.0,
        "training__steps_per_epoch": 6, "training__clip": 0.5, "training__momentum": 0.9, "training__nesterov": True,
    },
    "noise on correlated inputs": {
        "data__noise": 0.3, "data__covariance": "covariance.npy", "training__method": "adamw",
        "training__weight_decay": 0.1, "training__decay_biases": False, "training__rates": [0.5, 2.0],
        "training__warm_up": 2, "training__stop": {"variable": "loss_eval", "patience": 2},
    },
    "mixture with flipped classes": {
        "data__law": "mixture", "data__latent": 3, "training__loss": "cross_entropy", "data__flip": 0.3,
        "training__clip": 0.1,
    },
}  # fmt: skip
KILLED = """
import os, signal, sys
import tsdyn
from tsdyn.running import runner

def stop(epoch, *_):
    if epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)

runner.COMMIT_SECONDS = 0.0
tsdyn.run(tsdyn.Experiment.from_toml("world.toml"), "killed", progress=stop)
"""


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_killed_run_ends_in_the_same_bits(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal((10, 10))
    np.save("covariance.npy", draw @ draw.T / 10 + np.eye(10) / 2)
    asked = small(training__epochs=6, record__observables=["loss", "weight"], **world)
    (tmp_path / "world.toml").write_text(tomli_w.dumps(asked.as_dict()), encoding="utf-8")
    whole = tsdyn.run(asked, "whole").load()
    done = processes.run(["python", "-c", KILLED], tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert tsdyn.open("killed").sizes["epoch"] < whole.sizes["epoch"]
    again = tsdyn.run(asked, "killed").load()
    for name in whole.variables:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=str(name))
