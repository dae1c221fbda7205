"""Two researchers with problems of their own, each in an empty folder with the installed package.

(A) has a module, a loop and five seeds; (C) has noise, correlated inputs, an activation and an observable in a package,
two workers, and stops and goes on.
"""

import os
import signal
import textwrap
import time

import numpy as np

import tsdyn
from tests import processes


def run(folder, *words, site=None):
    done = processes.run(words, folder, environment=processes.variables(site))
    assert done.returncode == 0, done.stdout + done.stderr


LOOP = textwrap.dedent("""
    import torch
    from torch import nn

    import tsdyn  # hers


    class Skip(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.below, self.inner, self.top = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 2)

        def forward(self, x):
            h = torch.relu(self.below(x))
            return self.top(h + torch.relu(self.inner(h)))


    torch.manual_seed(100)
    teacher, x = Skip(3), torch.randn(80, 6)
    y = teacher(x).detach()
    asked = ["loss", "weight", "correlation", "gradient_norm", "hessian_eigenvalue", "neural_tangent_kernel"]  # hers
    for seed in range(5):
        torch.manual_seed(seed)
        model = Skip(5)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        rec = tsdyn.Recorder("run", model, probe=(x, y), teacher=teacher, seed=seed, observables=asked)  # hers
        for epoch in range(3):
            rec.commit(epoch)  # hers
            loss = 0.5 * (model(x) - y).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rec.close()  # hers
""")
LOOK = textwrap.dedent("""
    import sys
    import tsdyn
    from tsdyn import cli

    ds = tsdyn.open("run")
    assert dict(ds["weight"].sel(seed=3, epoch=slice(0, 1), layer=2).sizes) == {"epoch": 2, "node": 5, "input_node": 6}
    assert ds["correlation"].sel(seed=4, layer=1).isel(epoch=-1).notnull().any()
    assert ds["gradient_norm"].sel(quantile=1).shape == (5, 3)
    assert (ds["hessian_eigenvalue"].sel(mode=0) > ds["hessian_eigenvalue"].sel(mode=1)).all()
    assert ds["neural_tangent_kernel"].isel(epoch=-1).notnull().all()
    for words in ("plot run loss -o loss.png", "report run -o report.html", "validate run", "show run", "audit run"):
        sys.argv = ["tsdyn", *words.split()]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, words
""")


def test_a_her_loop_needs_six_lines(tmp_path):
    assert sum(line.endswith("# hers") for line in LOOP.splitlines()) <= 6
    (tmp_path / "loop.py").write_text(LOOP + LOOK, encoding="utf-8")
    run(tmp_path, "python", "loop.py")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert "weight" in (tmp_path / "report.html").read_text(encoding="utf-8")


WORLD = """
name = "world"
seeds = 2

[teacher]
widths = [4, 2, 1]
bias = false

[student]
overrealization = 2.0
scale = 0.3
activation = "sine"
bias = false

[data]
covariance = "covariance.npy"
noise = 0.2
train = 200
eval = 2000

[training]
method = "gd"
learning_rate = 0.01
steps_per_epoch = 4
epochs = 10

[record]
observables = ["loss", "weight", "weight_entropy"]

[sweep]
"data.noise" = [0.0, 0.2]
"""


def test_c_his_world_on_two_workers_stopped_and_resumed(tmp_path, site):
    draw = np.random.default_rng(0).standard_normal((4, 4))
    np.save(tmp_path / "covariance.npy", draw @ draw.T / 4 + np.eye(4) / 2)
    (tmp_path / "world.toml").write_text(WORLD, encoding="utf-8")
    command = ["tsdyn", "run", "world.toml", "-o", "world", "--quiet"]
    stopped = processes.Process([*command, "--workers", "2"], tmp_path, {}, processes.variables(site))
    deadline = time.monotonic() + processes.HUNG
    while not list((tmp_path / "world").glob("*/LOCK")):  # a point is being run
        assert not stopped.ended, "the sweep ended before it could be stopped"
        assert time.monotonic() < deadline, "no point was begun"
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGINT)
    stopped.wait()
    run(tmp_path, *command, "--workers", "2", site=site)
    run(tmp_path, "python", "-c", COMPARED, site=site)
    ds, ode = tsdyn.open(tmp_path / "world").load(), tsdyn.open(tmp_path / "flow").load()
    assert ds["weight_entropy"].isel(epoch=-1).notnull().any()
    assert (ds["loss_train"].sel(noise=0.2) > ds["loss_eval"].sel(noise=0.2)).all()  # only training targets are noisy
    # a step of 0.01 against the flow: second order in the step, so within a few per cent of the change
    both = ds["loss_train"].sel(epoch=ode["epoch"])
    change = abs(ode["loss_train"].isel(epoch=-1) - ode["loss_train"].isel(epoch=0))
    assert float((abs(both - ode["loss_train"]) / change).max()) < 0.05


COMPARED = textwrap.dedent("""
    import tsdyn
    from tsdyn import population
    from pathlib import Path

    world = tsdyn.Experiment.from_toml("world.toml")
    tsdyn.run(world.replace({"training.method": "flow", "training.epochs": 2}), "flow")
    for folder in sorted(Path("world").iterdir()):
        if folder.is_dir():
            ds = tsdyn.open(folder)
            expected = population.expected_loss(ds.isel(epoch=[0, -1]))
            ratio = ds["loss_eval"].isel(epoch=[0, -1]) / expected
            assert float(abs(ratio - 1).max()) < 6 * 2 / 2000**0.5, ratio.values  # six deviations
""")
