"""The study of BatchNorm's biases on a network trained here and saved as anybody would save one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from tsdyn.studies.tian2019_batchnorm_bias import EXPERIMENTS, StateDict, draw, measure, norms

from tsdyn import ExperimentError, studies


class Net(nn.Module):
    """Blocks of which one is the tenth, so that names and numbers sort differently, and a BatchNorm without bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        quiet = [nn.Identity() for _ in range(5)]
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *quiet, nn.Conv2d(6, 9, 3), nn.ReLU(), nn.BatchNorm2d(9)
        )
        self.classifier = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 3))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(10):
        x = torch.randn(32, 1, 6, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x.mean((1, 2, 3)) > 0).long()).backward()
        optimizer.step()
    return net


def save(net, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), path)
    else:
        torch.save(
            {"state_dict": net.state_dict(), "epoch": 3} if "checkpoint" in path.name else net.state_dict(), path
        )


@pytest.mark.parametrize("name", ["net.pth", "checkpoint.pth", "net.safetensors"])
def test_biases_are_the_modules_own_lowest_layer_first(net, tmp_path, name):
    save(net, tmp_path / name)
    found = StateDict("mine", str(tmp_path / name)).read()
    assert found["module"].values.tolist() == ["features.1", "features.10"]
    biases = [net.features[i].bias.detach().numpy() for i in (1, 10)]
    for row, bias in zip(found["norm_shift"].values, biases, strict=True):
        np.testing.assert_array_equal(row[: len(bias)], bias)
        assert np.isnan(row[len(bias) :]).all()
    measured = measure(found)
    assert measured.attrs["data"] == name
    np.testing.assert_array_equal(measured["negative_shift_share"], [(b < 0).mean() for b in biases])
    np.testing.assert_array_equal(measured["shift_count"].sum("bin"), [6, 9])
    draw(measured).savefig(tmp_path / "figure.png")


def test_a_run_leaves_what_was_read(net, tmp_path):
    save(net, tmp_path / "net.pth")
    found = StateDict("mine", str(tmp_path / "net.pth")).run(tmp_path / "biases")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "biases" / "norms.nc")["norm_shift"], found["norm_shift"])


def test_names_sorted_by_a_format_are_put_in_order_and_others_kept():
    keys = [f"{name}.{kind}" for name in ("stem", "layer1.bn", "f.2", "f.10") for kind in ("running_mean", "bias")]
    assert norms(dict.fromkeys(keys)) == ["stem", "layer1.bn", "f.2", "f.10"]
    assert norms(dict.fromkeys(sorted(keys))) == ["f.2", "f.10", "layer1.bn", "stem"]


def test_files_that_hold_no_batch_norm_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = EXPERIMENTS["paper"]
    with pytest.raises(ExperimentError, match=rf"{re.escape(str(tmp_path))}/vgg16_bn.pth: no such file; .*https"):
        paper.read()
    torch.save(nn.Linear(2, 2).state_dict(), "vgg16_bn.pth")
    with pytest.raises(ExperimentError, match="none of its 2 tensors is a bias beside a running_mean: no BatchNorm"):
        paper.read()
    (tmp_path / "vgg16_bn.pth").write_bytes(b"no pickle")
    with pytest.raises(ExperimentError, match="is no state dict that can be read safely"):
        paper.read()


@pytest.mark.parametrize("name", ["tian2019-batchnorm-bias", "tian2019-batchnorm-bias-vgg11"])
def test_a_missing_file_is_to_be_had_at_an_address_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = studies.load(name).EXPERIMENTS["paper"]
    with pytest.raises(ExperimentError) as refused:
        paper.read()
    network = Path(paper.path).stem
    assert re.search(rf"https://\S+/{network}-\w+\.pth", str(refused.value))
