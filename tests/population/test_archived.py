"""The population loss of recorded weights, against the evaluation loss of many samples of the run's own inputs."""

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tsdyn import population, registers
from tsdyn.networks.activations import Activation


class Sine(nn.Module):
    def forward(self, z):
        return torch.sin(z)


@pytest.fixture
def sine(monkeypatch):
    monkeypatch.setattr(registers.ACTIVATIONS, "_added", {})
    registers.ACTIVATIONS.add("sine", Activation("sine", torch.sin, torch.cos, Sine))


def experiment(folder, **changes):
    draw = np.random.default_rng(3).standard_normal((4, 4))
    np.save(folder / "covariance.npy", draw @ draw.T / 4 + np.eye(4) / 2)
    base = {
        "dtype": "float64", "seeds": 2, "teacher__widths": [4, 2, 3], "student__widths": [4, 3, 3],
        "teacher__bias": False, "student__bias": False, "student__scale": 0.5, "data__train": 40, "data__std": 1.3,
        "data__eval": 40_000, "training__epochs": 1, "record__observables": ["loss", "weight"],
    }  # fmt: skip
    return small(**base | changes)


@pytest.mark.parametrize(
    ("activation", "world"),
    [
        ("relu", {"data__noise": 0.3}),
        ("erf", {"data__spectrum": 1.0}),
        ("sine", {"data__covariance": "covariance.npy"}),
        ("leaky_relu", {"student__leak": 0.3}),
    ],
)
def test_it_is_the_evaluation_loss_of_infinitely_many_samples(tmp_path, monkeypatch, sine, activation, world):
    """40,000 samples of a mean of squares: within a few per cent; the relative deviation of a square is of order 2."""
    monkeypatch.chdir(tmp_path)
    ds = tsdyn.run(experiment(tmp_path, student__activation=activation, **world), tmp_path / "run")
    found = population.expected_loss(ds)
    assert found.dims == ("seed", "epoch")
    np.testing.assert_allclose(ds["loss_eval"], found, rtol=6 * 2 / np.sqrt(40_000))
    one = population.expected_loss(ds.sel(seed=1).isel(epoch=-1))
    assert float(one) == float(found.sel(seed=1).isel(epoch=-1))


def test_what_has_no_population_loss_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    less = {"data__eval": 20, "training__epochs": 0}
    for changes, message in (
        ({"teacher__bias": -0.1, "student__bias": True}, "biases; set student.bias = false"),
        ({"data__law": "uniform"}, "data.law = 'uniform'"),
        ({"training__loss": "cross_entropy"}, "training.loss = 'cross_entropy'"),
        ({"record__observables": ["loss"]}, "no weight; record weight"),
    ):
        ds = tsdyn.run(experiment(tmp_path, **less | changes), tmp_path / str(len(message)))
        with pytest.raises(ValueError, match=f"expected_loss: .*{message}"):
            population.expected_loss(ds)
    ds = tsdyn.run(experiment(tmp_path, **less, data__covariance="covariance.npy"), tmp_path / "run")
    np.save("covariance.npy", np.eye(4))
    with pytest.raises(ValueError, match="not the file that the run read"):
        population.expected_loss(ds)
