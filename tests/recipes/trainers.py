"""The recipes of docs/how-to/trainers.md against the real packages: ``make long`` installs them and runs this file.

Each is run to the end, and stopped half-way and run again; both must leave the same archive, that of plain torch.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tsdyn

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/trainers.md"
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X[:, :2])


def block(name):
    found = re.search(
        rf"^```{{code-block}} python\n:name: {name}\n\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    assert found, name
    return found.group(1)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def whole_batches():
    """One batch of all samples an epoch, so that no trainer's order of samples matters."""
    return DataLoader(TensorDataset(X, Y), batch_size=len(X))


def named():
    return [{"x": a, "labels": b} for a, b in zip(X, Y, strict=True)]


def plain(path):
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    rec = tsdyn.Recorder(path, net, probe=(X, Y), state=optimizer)
    rec.commit(0)
    for epoch in range(1, 5):
        optimizer.zero_grad()
        (0.5 * (net(X) - Y).square().sum(1).mean()).backward()
        optimizer.step()
        rec.commit(epoch)
    rec.close()
    return tsdyn.open(path).load()


@pytest.mark.parametrize("name", ["lightning", "huggingface"])
def test_a_recipe_has_30_lines_at_most_and_records_what_plain_torch_does(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe, use = block(name), block(f"{name}-use")
    assert len(recipe.splitlines()) <= 30
    if name == "huggingface":
        use = use.replace(
            '"trainer", ', f'"trainer", per_device_train_batch_size={len(X)}, lr_scheduler_type="constant", '
        )
    for last, folder in ((4, "whole"), (2, "parts"), (4, "parts")):
        names = {"x": X, "y": Y, "model": model(), "loader": whole_batches(), "data": named()}
        if name == "lightning":
            exec(compile(block("lightning-model"), name, "exec"), names)
        exec(compile(recipe, name, "exec"), names)
        exec(compile(use.replace("=4", f"={last}").replace("runs/", f"{folder}/"), name, "exec"), names)
        (names["record"].rec if name == "huggingface" else names["trainer"].callbacks[0].rec).close()
    expected = plain(tmp_path / "plain")
    whole, parts = (tsdyn.open(tmp_path / folder / name).load() for folder in ("whole", "parts"))
    assert whole.epoch.values.tolist() == [0, 1, 2, 3, 4]
    for variable in ("weight", "bias", "loss_eval"):
        np.testing.assert_allclose(whole[variable], expected[variable], rtol=1e-5, atol=1e-7)
        # Hugging Face sorts the samples of its one batch anew: sums are rounded otherwise
        np.testing.assert_allclose(parts[variable], whole[variable], rtol=1e-5, atol=1e-7)
