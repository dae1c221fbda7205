"""What a newcomer gets wrong: refused in one sentence that names the value, the rule and the way out."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from tsdyn.analysis import alignment, lift, members, order_parameters

import tsdyn
from tests.cases import small
from tests.typechecks import unchecked
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.cli.run_commands import changed
from tsdyn.experiment.errors import ExperimentError
from tsdyn.recording.checks import directory_of


@pytest.fixture
def ds(desk):
    return tsdyn.open(desk / "runs/quickstart").isel(overrealization=0)


def test_a_recorder_does_not_write_into_a_run_or_a_sweep(desk):
    for name in ("runs/quickstart", "runs/quickstart/overrealization=1"):
        before = sorted(desk.joinpath(name).iterdir())
        with pytest.raises(ValueError, match=r"quickstart.* is a run, a sweep .*record into a folder of its own"):
            tsdyn.Recorder(desk / name, nn.Linear(3, 2), probe=(torch.randn(5, 3), torch.randn(5, 2)))
        assert sorted(desk.joinpath(name).iterdir()) == before
    assert directory_of(desk / "own", {}, 0) == desk / "own/seed=0"


def test_a_swept_key_is_set_by_the_sweep():
    experiment = small(sweep={"training.learning_rate": [0.01, 0.1]})
    with pytest.raises(ExperimentError, match=r"--set training.learning_rate: is swept over \[0.01, 0.1\]"):
        changed(experiment, ["training.learning_rate=0.5"])
    way = 'sweep={"training.learning_rate" = [0.5]}'
    assert list(changed(experiment, [way]).sweep["training.learning_rate"]) == [0.5]
    assert changed(experiment, ["training.epochs=2"]).training.epochs == 2


PARTS = {
    "fewer nodes": {"node": slice(0, 3)},
    "nodes in another order": {"node": slice(None, None, -1)},
    "fewer inputs": {"input_node": slice(0, 8)},
    "fewer teacher nodes": {"teacher_node": slice(0, 2)},
}


@pytest.mark.parametrize("part", PARTS)
def test_networks_are_not_made_of_a_part_of_the_nodes(part, ds):
    (dim,) = PARTS[part]
    cut = ds.isel(PARTS[part])
    with pytest.raises(ValueError, match=rf"measure: {dim} holds .* select {dim} afterwards"):
        tsdyn.measure(cut, ["A"])
    with pytest.raises(ValueError, match=rf"member: {dim} holds"):
        members.member(cut.isel(seed=0, epoch=-1))
    if dim == "input_node":
        bare = cut.drop_vars("alignment")
        with pytest.raises(ValueError, match=r"alignment: input_node holds 0, 1, .* all 20 in their order"):
            alignment.alignment(bare)
        with pytest.raises(ValueError, match=r"input_node holds"):
            order_parameters.order_parameters(bare)
    else:  # a node's own measures are the same, whatever other nodes are there
        whole, own = (alignment.alignment(each.drop_vars("alignment")).load() for each in (ds, cut))
        # a cosine is a sum of 20 products, and a product of matrices adds them in an order that depends on their shapes
        np.testing.assert_allclose(own, whole.isel(PARTS[part]), rtol=0, atol=20 * np.finfo(float).eps)


def test_an_analysis_takes_a_dataset(ds):
    with pytest.raises(TypeError, match=r"mean_specialization: got DataArray; give the Dataset"):
        unchecked(lift.recorded)(ds.correlation, "correlation", "mean_specialization")


def test_a_layer_of_nodes_in_another_order_has_all_its_nodes(ds):
    turned = tsdyn.layer(ds.isel(node=slice(None, None, -1)), 1)
    whole = tsdyn.layer(ds, 1)
    np.testing.assert_array_equal(turned.node, whole.node[::-1])
    np.testing.assert_array_equal(turned.weight, whole.weight.sel(node=turned.node))
    part = tsdyn.layer(ds.isel(node=[1, 3, 19]), 1)
    np.testing.assert_array_equal(part.node, [1, 3])
    np.testing.assert_array_equal(part.weight, whole.weight.sel(node=[1, 3]))


def test_a_run_takes_an_experiment_classes_and_observables(tmp_path):
    with pytest.raises(ExperimentError, match=r"experiment is a str; give .*from_toml"):
        unchecked(tsdyn.run)("quickstart.toml", tmp_path / "run")
    with pytest.raises(ExperimentError, match=r"observables holds a function; give tsdyn.Observed"):
        unchecked(tsdyn.run)(small(), tmp_path / "run", observables=[lambda m: 1.0])
    with pytest.raises(ExperimentError, match=r"student: is a Linear that is made already; give its class"):
        tsdyn.run(small(), tmp_path / "run", student=nn.Linear(10, 6))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_archives_names_them(desk, tmp_path):
    with pytest.raises(DirectoryError, match=r"holds no archive; archives in it: [a-z]"):
        tsdyn.open(desk / "runs")
    (tmp_path / "notes.txt").write_text("notes", encoding="utf-8")
    with pytest.raises(DirectoryError, match=r"holds no archive$"):
        tsdyn.open(tmp_path)


@pytest.mark.parametrize(("key", "meant"), [("training.seeds", "seeds"), ("epochs", "training.epochs")])
def test_a_key_in_another_section_is_found(key, meant):
    with pytest.raises(ExperimentError, match=f"unknown key .did you mean '{meant}'"):
        small().replace({key: 3})


def test_a_probe_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Recorder: the model raised RuntimeError for inputs \(5, 7\) of the probe"):
        tsdyn.Recorder(tmp_path / "own", nn.Linear(6, 2), probe=(torch.randn(5, 7), torch.randn(5, 2)))


def test_the_way_out_of_a_swept_key_is_a_command():
    """What the message shows after --set is what it sets."""
    experiment = small(sweep={"student.overrealization": [1.0, 2.0]})
    with pytest.raises(ExperimentError) as refused:
        changed(experiment, ["student.overrealization=3"])
    shown = str(refused.value).split("--set '")[1].split("'")[0]
    again = changed(experiment, [shown])
    assert json.loads(json.dumps(list(again.sweep["student.overrealization"]))) == [1.0, 2.0]
