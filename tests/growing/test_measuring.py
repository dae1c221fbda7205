"""What is measured afterwards is what recording it would have given, to the bit where the engine is the same."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tsdyn
from tests.cases import small
from tsdyn import registers, schema
from tsdyn.archive import integrity
from tsdyn.growing import measuring
from tsdyn.growing.adding import add

FEW = {
    "seeds": 2, "training__epochs": 2, "training__steps_per_epoch": 3, "data__train": 24, "data__eval": 20,
    "teacher__widths": [5, 3, 2], "record__eigenvalues": 3,
}  # fmt: skip
DEEP = {
    "teacher__widths": [25, 2, 3, 4], "teacher__convolution": True, "data__image": [1, 5, 5], "record__eigenvalues": 3,
    "student__batch_norm": "before", "student__init": "torch",
}  # fmt: skip


def both(folder, names, recorded=("weight",), **changes):
    """An archive that recorded the names, and what is measured of one that did not."""
    asked = small(**FEW).replace({key.replace("__", "."): value for key, value in changes.items()})
    known = asked.replace({"record.observables": [*recorded, *(n for n in names if n not in recorded)]})
    bare = asked.replace({"record.observables": list(recorded)})
    return tsdyn.run(known, folder / "known").load(), tsdyn.measure(tsdyn.run(bare, folder / "bare"), names)


def assert_alike(known, measured, names):
    measured = measured.load()  # at once: each name alone would measure all of them
    for name in schema.expand(names):
        xr.testing.assert_equal(measured[name], known[name])
        assert measured[name].attrs == known[name].attrs
        assert measured[name].dtype == known[name].dtype
        assert set(measured[name].coords) == set(known[name].coords)


def assert_added(known, folder, names, **makers):
    """The same numbers, kept in the archive: also of dimensions that no recorded variable of it has."""
    add(folder, names, **makers)
    found = tsdyn.open(folder)
    assert_alike(known, found, names)
    assert integrity.check(folder) == []


NAMES = [
    n for n in schema.recordable()
    if n not in ("parameter", "label_accuracy", "weight", "bias", "jacobian") and not n.startswith("norm_")
]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"data__noise": 0.1}, {"dtype": "float32", "data__train": "fresh", "training__batch": 8},
     {"student__activation": "erf", "teacher__widths": [4, 3, 3, 2]}],
    ids=["noise", "float32 fresh", "deep erf"],
)  # fmt: skip
def test_every_observable_is_the_bits_that_recording_would_have_given(tmp_path, changes):
    names = NAMES
    if len(changes.get("teacher__widths", ())) > 3:
        names = [n for n in names if n not in ("alignment", "observation", "observation_count", "lemma1_residual")]
    known, measured = both(tmp_path, names, **changes)
    assert all(array.chunks for array in measured.data_vars.values())
    assert_alike(known, measured[["mse_eval"]], ["mse_eval"])  # alone, too
    assert_alike(known, measured, names)
    assert_added(known, tmp_path / "bare", names)


def test_convolutions_with_batch_norm_are_measured_alike(tmp_path):
    names = [n for n in NAMES if n in schema.recordable(deep=True)]
    known, measured = both(tmp_path, names, recorded=("weight", "batch_norm"), **DEEP)
    assert_alike(known, measured, names)
    assert_added(known, tmp_path / "bare", names)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.norm, self.top = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.top(torch.tanh(self.norm(self.below(x))))


def make():
    return Residual()


def test_own_modules_are_measured_alike_and_another_source_is_refused(tmp_path):
    names = ["loss", "gradient_norm", "hessian_eigenvalue", "neural_tangent_kernel", "jacobian", "cka"]
    asked = small(**FEW).replace({"record.observables": ["parameter", *names]})
    known = tsdyn.run(asked, tmp_path / "known", student=make).load()
    tsdyn.run(asked.replace({"record.observables": ["parameter"]}), tmp_path / "bare", student=make)
    assert_alike(known, tsdyn.measure(tmp_path / "bare", names, student=make), names)
    assert_added(known, tmp_path / "bare", names, student=make)
    with pytest.raises(tsdyn.ExperimentError, match="its source has SHA-256"):
        tsdyn.measure(tmp_path / "bare", names, student=lambda: nn.Linear(5, 2))
    with pytest.raises(tsdyn.ExperimentError, match=r"alignment is not measured with student.module"):
        tsdyn.measure(tmp_path / "bare", ["alignment"], student=make)


class Unlayered(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return x @ self.matrix


def test_a_module_without_layers_is_measured_as_a_whole_alone(tmp_path):
    asked = small(**FEW).replace({"record.observables": ["parameter"]})
    ds = tsdyn.run(asked, tmp_path / "run", student=Unlayered)
    assert tsdyn.measure(ds, ["neural_tangent_kernel"], student=Unlayered).load().notnull().all()
    for name in ("weight", "cka", "A", "lemma1_residual"):
        with pytest.raises(tsdyn.ExperimentError, match="the student's layers are not labelled in small"):
            tsdyn.measure(ds, [name], student=Unlayered)


def test_a_sweep_is_measured_lazily_and_by_parts(tmp_path, monkeypatch):
    """Over swept keys, points without epochs and members of other widths; any slice that keeps the layers."""
    changes = {"sweep": {"student.overrealization": [1.0, 2.0], "training.learning_rate": [0.01, 1e9]}}
    names = ["A", "gradient_max", "mse"]
    known, measured = both(tmp_path, names, **changes)
    assert int((known.death_epoch >= 0).sum()) == 4, "the large rate kills its members"
    assert_alike(known, measured, names)
    drawn = []
    whole = measuring.Members
    monkeypatch.setattr(measuring, "Members", lambda *given: drawn.append(given) or whole(*given))
    part = tsdyn.open(tmp_path / "bare").sel(overrealization=2.0, seed=1, epoch=[0, 2])
    found = tsdyn.measure(part, ["A"])
    assert not drawn
    assert found.A.dims == ("learning_rate", "epoch", "layer", "node", "teacher_node")
    xr.testing.assert_equal(found.A.load(), known.A.sel(overrealization=2.0, seed=1, epoch=[0, 2]))
    assert len(drawn) == 2, "one task for each member, whatever the number of epochs"
    last = tsdyn.measure(tmp_path / "bare", ["A"], epochs=2)
    xr.testing.assert_equal(last.A.load(), known.A.sel(epoch=[2]))


def test_members_that_stopped_are_nan_from_there_on(tmp_path):
    stop = {
        "training.stop": {"variable": "mse_eval", "below": 0.1},
        "training.epochs": 4,
        "training.learning_rate": 0.1,
    }
    known, measured = both(tmp_path, ["mse", "A"], recorded=("weight", "mse"), **stop)
    assert known.mse_eval.isnull().any()
    assert_alike(known, measured, ["A"])


def sharpness(m):
    return m.on_eval.trace.output.abs().amax()


@pytest.fixture
def own(monkeypatch):
    """An observable of the user's own, which is forgotten after the test."""
    monkeypatch.setattr(schema, "DECLARED", {})
    monkeypatch.setattr(registers.OBSERVABLES, "_added", {})
    variable = tsdyn.declare("largest_output", ("seed", "epoch"), units="1", long_name="l", source="here")
    return tsdyn.Observed(variable, sharpness)


def test_an_observable_of_the_users_own_is_measured(tmp_path, own):
    asked = small(**FEW).replace({"record.observables": ["weight"]})
    known = tsdyn.run(asked, tmp_path / "known", observables=[own]).load()
    measured = tsdyn.measure(tsdyn.run(asked, tmp_path / "bare"), [own, "mse"])
    assert_alike(known, measured, ["largest_output"])
    assert tsdyn.schema.problems(measured.load()) == []


def test_what_does_not_need_a_users_observable_goes_without_it(tmp_path, own):
    """An observable that was passed to `tsdyn.run` is known to that run alone."""
    asked = small(**FEW).replace({"record.observables": ["weight"]})
    run = tsdyn.run(asked, tmp_path / "run", observables=[own])
    known = tsdyn.run(asked.replace({"record.observables": ["mse"]}), tmp_path / "known").load()
    assert_alike(known, tsdyn.measure(run, ["mse"]), ["mse_eval"])
    assert "d_start" in tsdyn.sensitivity(run, wrt="start", certificate=False)
    with pytest.raises(tsdyn.ExperimentError, match="'largest_output' is no observable"):
        tsdyn.fork(tmp_path / "run", at=1, out=tmp_path / "fork")
    children = tsdyn.fork(tmp_path / "run", at=1, out=tmp_path / "fork", observables=[own])
    last = children.largest_output.isel(epoch=-1, fork_epoch=0, branch=0)  # nothing was changed
    np.testing.assert_array_equal(last, run.largest_output.isel(epoch=-1))


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    ds = tsdyn.run(small(**FEW).replace({"record.observables": ["mse"]}), tmp_path / "bare")
    whole = tsdyn.run(small(**FEW), tmp_path / "whole")
    with pytest.raises(ValueError, match="the archive has no weight, bias; only recorded parameters"):
        tsdyn.measure(ds, ["A"])
    with pytest.raises(ValueError, match=r"epochs \[7\] are not recorded; there are 0, 1, 2"):
        tsdyn.measure(whole, ["A"], epochs=[0, 7])
    with pytest.raises(tsdyn.ExperimentError, match=r"'hesian_eigenvalue' is not an observable .did you"):
        tsdyn.measure(whole, ["hesian_eigenvalue"])
    with pytest.raises(ValueError, match="all layers"):
        tsdyn.measure(whole.sel(layer=[2]), ["A"])
    with pytest.raises(ValueError, match=r"teacher recorded for seed \d is not the one that small draws"):
        tsdyn.measure(whole.assign(teacher_weight=whole.teacher_weight * 1.01), ["A"]).load()
    with pytest.raises(tsdyn.ExperimentError, match=r"label"):
        tsdyn.measure(whole, ["label_accuracy"])
    online = tsdyn.Experiment(
        kind="online", name="o", seeds=1, teacher={"widths": [1, 2, 1], "init": "gaussian"},
        student={"widths": [1, 2, 1]}, training={"learning_rate": 0.1},
        online={"inputs": 20, "last": 1.0, "points": 3},
    )  # fmt: skip
    with pytest.raises((ValueError, tsdyn.ExperimentError), match="measure:"):
        tsdyn.measure(tsdyn.run(online, tmp_path / "online"), ["A"])


def test_numbers_are_the_dtype_and_padding_of_an_archive(tmp_path):
    _, measured = both(tmp_path, ["A"], student__widths=[5, 4, 2])
    assert np.isnan(measured.A.sel(layer=2)).all()
