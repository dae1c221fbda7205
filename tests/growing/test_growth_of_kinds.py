"""Population flows, online runs and runs of own modules gain seeds and points, also killed in between."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tsdyn
from tests.archive.states.children import child, die_at
from tests.cases import small
from tsdyn.archive import changes, integrity
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.running import runner

FLOW = tsdyn.Experiment(
    kind="population-flow",
    name="flow",
    seeds=2,
    teacher={"widths": [3, 2, 1], "init": "orthonormal"},
    student={"widths": [3, 1, 1], "activation": "erf"},
    flow={"times": {"first": 0.1, "last": 100.0, "number": 4}},
)
ONLINE = tsdyn.Experiment(
    kind="online",
    name="online",
    seeds=2,
    teacher={"widths": [30, 2, 1], "init": "gaussian"},
    student={"widths": [30, 2, 1], "activation": "erf"},
    training={"learning_rate": 0.5},
    online={"noise": 0.1, "last": 2.0, "points": 5},
)


@pytest.mark.parametrize("experiment", [FLOW, ONLINE], ids=["flow", "online"])
def test_a_run_that_gains_seeds_has_the_bits_of_one_from_the_start(tmp_path, experiment):
    first = tsdyn.run(experiment, tmp_path / "run")
    held, more = first.load(), experiment.replace({"seeds": [5, 0, 1]})
    grown = tsdyn.run(more, tmp_path / "run").load()
    whole = tsdyn.run(more, tmp_path / "whole").load()
    assert grown.seed.values.tolist() == whole.seed.values.tolist() == [5, 0, 1]
    for name in whole.data_vars:
        np.testing.assert_array_equal(grown[name], whole[name], err_msg=str(name))
        np.testing.assert_array_equal(grown[name].sel(seed=[0, 1]), held[name], err_msg=str(name))
    xr.testing.assert_equal(first.load(), held)  # what was opened before stays what it was
    assert [entry["added"] for entry in changes.listed(grown.attrs)] == ["seed 5"]
    assert integrity.check(tmp_path / "run") == []


@pytest.mark.parametrize("moment", [4, 40, 90])
def test_killed_while_it_gains_seeds_an_online_run_is_the_same(tmp_path, moment):
    path, more = tmp_path / "run", ONLINE.replace({"seeds": 3})
    whole = tsdyn.run(more, tmp_path / "whole").load()
    first = tsdyn.run(ONLINE, path).load()

    def work():
        die_at(moment, path)
        runner.COMMIT_SECONDS = 0.0
        tsdyn.run(more, path)

    assert child(work, path).how in ("killed", "done")
    xr.testing.assert_equal(tsdyn.open(path).sel(seed=[0, 1]).load(), first)
    found = tsdyn.run(more, path).load()
    for name in whole.data_vars:
        np.testing.assert_array_equal(found[name], whole[name], err_msg=str(name))
    assert integrity.check(path) == []
    assert not (path / "added").exists()


@pytest.mark.parametrize("experiment", [FLOW, ONLINE], ids=["flow", "online"])
def test_a_sweep_gains_seeds_and_values(tmp_path, experiment):
    key, values = ("student.activation", ["erf", "relu"])
    few = experiment.replace({"sweep": {key: values[:1]}})
    tsdyn.run(few, tmp_path / "run")
    more = experiment.replace({"seeds": 3, "sweep": {key: values}})
    grown, whole = (tsdyn.run(more, tmp_path / name).load() for name in ("run", "whole"))
    assert grown.sizes == whole.sizes
    name = "weight" if experiment is FLOW else "Q"
    assert grown[name].notnull().any()
    np.testing.assert_array_equal(grown[name], whole[name])


def test_what_has_no_meaning_is_refused_with_the_reason(tmp_path):
    tsdyn.run(FLOW, tmp_path / "flow")
    tsdyn.run(ONLINE, tmp_path / "online")
    held = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, more in (
        ("flow", FLOW.replace({"flow.times.last": 1e3})),
        ("online", ONLINE.replace({"online.points": 9})),
        ("online", ONLINE.replace({"seeds": 1})),
    ):
        with pytest.raises(DirectoryError, match=r"can be extended by more seeds and a sweep by .*another run"):
            tsdyn.run(more, tmp_path / name)
    with pytest.raises(ValueError, match="give the archive of a training run; flows and online runs record all"):
        tsdyn.measure(tmp_path / "flow", ["weight"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == held


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.top, self.drop = nn.Linear(5, 3), nn.Linear(3, 2), nn.Dropout(0.2)

    def forward(self, x):
        return self.top(self.drop(torch.relu(self.below(x))))


def test_own_modules_gain_seeds_epochs_and_observables(tmp_path):
    asked = small(
        seeds=2, training__epochs=2, training__steps_per_epoch=3, data__train=24, data__eval=20,
        teacher__widths=[5, 3, 2], record__observables=["loss", "parameter"],
    )  # fmt: skip
    tsdyn.run(asked, tmp_path / "run", student=Skip)
    longer = asked.replace({"seeds": 3, "training.epochs": 4})
    tsdyn.run(longer, tmp_path / "run", student=Skip)
    whole = tsdyn.run(longer, tmp_path / "whole", student=Skip).load()
    found = tsdyn.open(tmp_path / "run").load()
    for name in whole.data_vars:  # vmap's products round with the number of members
        np.testing.assert_allclose(found[name], whole[name], rtol=0, atol=1e-13, err_msg=str(name))
    more = longer.replace({"training.epochs": 5, "record.observables": ["loss", "parameter", "gradient_norm"]})
    again = tsdyn.run(more, tmp_path / "run", student=Skip)
    assert again.gradient_norm.sel(epoch=5).notnull().all()
    assert again.gradient_norm.sel(epoch=4).isnull().all()
