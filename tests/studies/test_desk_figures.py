"""Figures of the shape of desk and paper scale, from made-up measurements: as many panels, lines, seeds and nodes."""

import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import captions

from tests.rendering import faults
from tsdyn import studies

WIDTHS, POLARITIES = [1.0, 2.0, 5.0, 10.0], [0.5, 1.0, 1.5, 2.0, 2.5]


def told(name, **more):
    experiment = studies.load(name).EXPERIMENTS["desk"]
    return {
        "experiment": experiment.to_toml(),
        "digest": experiment.digest,
        "seeds": len(experiment.seed_labels),
        **more,
    }


def success_rate(rng):
    """A share falls with the node's index; its interval is about it."""
    share = np.clip(1.3 - np.arange(20) / 20 * np.array(POLARITIES)[:, None] + 0.1 * np.arange(4)[:, None, None], 0, 1)
    share = np.round(np.stack([0.5 * share, share], -1) * 8) / 8  # (width, polarity, node, epoch)
    dims = ("overrealization", "polarity", "teacher_node", "epoch")
    coords = {"overrealization": WIDTHS, "polarity": POLARITIES, "teacher_node": range(20), "epoch": [5, 20]}
    rate = xr.DataArray(share, dims=dims, coords=coords, attrs={"long_name": "share of seeds with correlation > 0.95"})
    ends = xr.concat([(rate - 0.2).clip(0, 1), (rate + 0.2).clip(0, 1)], "bound")
    return xr.Dataset({"success_rate": rate, "success_interval": ends}), "tian2020-success-rate"


def recovery(rng):
    best = 1 - rng.uniform(0, 1, (5, 5, 31, 20)) * np.exp(-np.linspace(0, 3, 31))[:, None]
    dims = ("polarity", "seed", "epoch", "teacher_node")
    coords = {"polarity": POLARITIES, "seed": range(5), "epoch": range(31), "teacher_node": range(20)}
    attrs = {"long_name": "best correlation with any student node"}
    return xr.Dataset(
        {"specialization": xr.DataArray(best, dims=dims, coords=coords, attrs=attrs)}
    ), "tian2020-recovery"


def l_shape(rng):
    dims = ("overrealization", "polarity", "seed", "node")
    shape = (4, 3, 32, 100)
    coords = {"overrealization": WIDTHS, "polarity": [0.0, 1.0, 2.0], "seed": range(32), "epoch": 100}
    values = {
        "student_specialization": (rng.uniform(0, 1, shape), "best correlation with any teacher node"),
        "fanout_norm": (rng.exponential(1, shape), "student fan-out norm √E β_kk"),
    }
    arrays = {n: xr.DataArray(v, dims=dims, attrs={"long_name": text}) for n, (v, text) in values.items()}
    return xr.Dataset(arrays, coords), "tian2020-l-shape"


def luck(rng):
    dims, shape = ("point", "seed", "epoch", "layer"), (4, 5, 16, 4)
    rho = 1 - np.exp(-np.linspace(0, 3, 16))[:, None] * rng.uniform(0.5, 1, shape)
    coords = {"seed": range(5), "epoch": range(16), "layer": [1, 2, 3, 4]}
    coords["convolution"] = "point", np.array(["false", "false", "true", "true"])
    coords["batch_norm"] = "point", np.array(["none", "after"] * 2)
    values = {"mean_specialization": rho, "mean_rank": 0.3 * (1 - rho), "median_rank": 0.1 * (1 - rho)}
    layered = {name: xr.DataArray(v, dims=dims) for name, v in values.items()}
    mse = xr.DataArray(100 * (1.01 - rho[..., 0]), dims=dims[:-1])
    return xr.Dataset({**layered, "mse_eval": mse}, coords), "tian2019-luck"


@pytest.mark.parametrize("made", [success_rate, recovery, l_shape, luck])
def test_figures_of_desk_shape_have_no_fault(made):
    measured, name = made(np.random.default_rng(0))
    figure = studies.load(name).draw(measured.assign_attrs(told(name)))
    assert faults(figure) == []
    assert "Reduced: --scale paper" in figure.caption


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("simsek2023-loss", "has teacher nodes up to 32 and 4 more numbers of student nodes."),
        ("simsek2023-norms", "has 4 more numbers of teacher nodes."),
        ("tian2019-luck", "and hidden teacher nodes 50-75-100-125 and 64-64-64-64."),
        ("tian2020-samples", "and training samples N up to 200,000."),
        ("goldt2019-eg", "has 10 seeds and student nodes up to 8."),
        ("leave-out", "has 32 seeds and 200 subsets."),
        ("tian2020-l-shape", "has 32 seeds and 100 epochs."),
    ],
)
def test_captions_say_which_sizes_the_desk_leaves_out(name, said):
    """The sentence of the numbers that studies/ gives at both scales; at the paper's scale there is none."""
    experiments = studies.load(name).EXPERIMENTS
    measured = {scale: xr.Dataset(attrs={"experiment": experiments[scale].to_toml()}) for scale in experiments}
    captions_of = {s: captions.caption(ds, "A", "none", paper=experiments) for s, ds in measured.items()}
    assert captions_of["desk"].endswith(said)
    assert "Reduced" not in captions_of["paper"]
