import numpy as np
import pytest
import torch
from tsdyn.analysis import lottery
from tsdyn.analysis.members import member

import tsdyn
from tsdyn import studies

NAMES = ["all nodes", "winners, initial weights", "winners, reinitialised"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    study = studies.load("tian2019-lottery")
    short = {"seeds": 2, "training.epochs": 2, "training.steps_per_epoch": 100}
    archive = tsdyn.run(study.EXPERIMENTS["smoke"].replace(short), tmp_path_factory.mktemp("lottery") / "run").load()
    return archive, study.measure(archive)


def start(archive, seed, masks):
    """Loss of a seed's start with hidden nodes multiplied by `masks`, by a forward pass of its own."""
    one = archive.sel(seed=seed, epoch=0)
    first = member(one, tsdyn.Experiment.from_toml_text(archive.attrs["experiment"]))
    x, (weights, biases) = first.evaluation_inputs, (first.student.weights, first.student.biases)
    h = x
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = h @ weight.T + bias
        h = torch.relu(h) * masks[i] if i < len(masks) else h
    return float((h - first.teacher(x)).square().mean())


def test_winners_start_from_the_first_weights_with_all_others_at_zero(ran):
    archive, measured = ran
    for seed in (0, 1):
        hidden = archive.sel(seed=seed).isel(layer=slice(None, -1))
        mask_of = lottery.rewind_mask(hidden).fillna(0.0)  # nodes that are never active have no correlation
        masks = [
            torch.tensor(mask_of.sel(layer=layer).values[: int(width)], dtype=torch.float32)
            for layer, width in zip(hidden["layer"].values, hidden["width"].values, strict=True)
        ]
        own = measured["mse_eval"].sel(seed=seed).isel(epoch=0)
        whole = start(archive, seed, [torch.ones_like(mask) for mask in masks])
        # float32 with sums of at most a few hundred terms
        np.testing.assert_allclose(own.sel(network=NAMES[0]), whole, rtol=1e-4)
        np.testing.assert_allclose(own.sel(network=NAMES[1]), start(archive, seed, masks), rtol=1e-4)
        assert [float(mask.sum()) for mask in masks] == measured["kept"].sel(seed=seed).values.tolist()
        assert abs(float(own.sel(network=NAMES[2])) - float(own.sel(network=NAMES[1]))) > 1e-3 * whole


def test_the_first_run_is_measured_as_it_is_and_keeps_a_node_per_teacher_node_at_most(ran):
    archive, measured = ran
    np.testing.assert_array_equal(measured["mse_eval"].sel(network=NAMES[0]), archive["mse_eval"])
    assert measured["network"].values.tolist() == NAMES
    assert (measured["kept"] <= measured["teacher_width"]).all()
    assert (measured["kept"] >= 1).all()
