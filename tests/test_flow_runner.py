import shutil
import tomllib

import numpy as np
import pytest
import xarray as xr

from tests.cases import orthonormal_teacher
from tsdyn import ExperimentError, flow_runner, population
from tsdyn.flow_experiment import FlowExperiment
from tsdyn.whole_files import DirectoryError

SMALL = FlowExperiment("small", ((1, 2), (2, 3)), ("erf",), seeds=3, times=(0.1, 1e4, 6))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flows") / "small"
    lines = []
    ds = flow_runner.run(SMALL, directory, report=lines.append, workers=1)
    assert [line.split("  ")[0] for line in lines] == ["erf n=1 k=2", "erf n=2 k=3"]
    return directory, ds


def test_every_seed_is_at_the_copy_average_point(small):
    _, ds = small
    optimum = population.one_neuron("erf", 2)
    assert (ds["kind"] == "minimum").all()
    assert (ds["class"] == "copy-average").all()
    assert ds["reason"].values[1, 0] == "groups of [1, 2]"
    assert abs(ds["loss"] - optimum.loss).max() <= 1e-12
    np.testing.assert_allclose(ds["loss_copy_average"], optimum.loss, atol=1e-13)
    np.testing.assert_allclose(ds["one_neuron_norm"], [optimum.norm, np.nan])
    assert ds["index_copy_average"].values.tolist() == [0, 0]
    assert ds["gradient_max"].max() <= 1e-12


def test_smaller_networks_end_in_nan_and_every_variable_is_described(small):
    _, ds = small
    assert ds["weight"].dims == ("point", "seed", "node", "input_node")
    assert ds["weight"].isel(point=0).notnull().sum() == 3 * 1 * 3
    assert ds["path_weight"].isel(point=1, time=0).notnull().all()
    assert all({"units", "long_name", "source"} <= set(array.attrs) for array in ds.data_vars.values())
    assert FlowExperiment(**_fields(ds.attrs["experiment"])) == SMALL


def _fields(text):
    tuples = {"sizes": lambda v: tuple(map(tuple, v)), "activations": tuple, "times": tuple}
    return {key: tuples.get(key, lambda v: v)(value) for key, value in tomllib.loads(text).items()}


def test_a_run_goes_on_from_the_sizes_it_finished(small, tmp_path, monkeypatch):
    """Killed in its second size: the first is kept, and the end is that of an undisturbed run."""
    directory, whole = small
    real = flow_runner.flows

    def killed(experiment, point):
        if point.n == 2:
            raise KeyboardInterrupt
        return real(experiment, point)

    monkeypatch.setattr(flow_runner, "flows", killed)
    with pytest.raises(KeyboardInterrupt):
        flow_runner.run(SMALL, tmp_path / "run", workers=1)
    monkeypatch.setattr(flow_runner, "flows", real)
    lines = []
    ds = flow_runner.run(SMALL, tmp_path / "run", report=lines.append, workers=1)
    assert len(lines) == 1
    xr.testing.assert_identical(ds.drop_vars("seconds"), whole.drop_vars("seconds"))
    assert flow_runner.run(SMALL, directory, report=lines.append).identical(whole)
    assert len(lines) == 1


def test_a_directory_is_one_experiments(small, tmp_path):
    directory, _ = small
    shutil.copytree(directory, tmp_path / "copy")
    with pytest.raises(DirectoryError, match=r"holds another experiment \(experiment\.toml differs\)"):
        flow_runner.run(FlowExperiment("other", ((1, 2),)), tmp_path / "copy")


def test_a_seeds_start_does_not_depend_on_the_others():
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    np.testing.assert_array_equal(flow_runner.starts(loss, range(4))[3], flow_runner.starts(loss, [3])[0])


def test_starts_have_glorots_variances():
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    rows = flow_runner.starts(loss, range(1000)).numpy()
    for part, variance in ((rows[:, :8], 2 / 6), (rows[:, 8:], 2 / 3)):
        # the sample variance of m normal numbers has standard error σ² √(2/m)
        assert abs(part.var() - variance) <= 5 * variance * np.sqrt(2 / part.size)


def test_bad_input_is_named():
    with pytest.raises(ExperimentError, match=r"inputs=2 is too small for a teacher of 3 orthonormal nodes"):
        FlowExperiment("flat", ((2, 3),), inputs=2)
    with pytest.raises(ExperimentError, match="at least one of each, and at least one node"):
        FlowExperiment("none", ((0, 3),))
    with pytest.raises(ExperimentError, match=r"times=\(1\.0, 0\.5, 3\); first, last and number"):
        FlowExperiment("back", ((2, 3),), times=(1.0, 0.5, 3))
