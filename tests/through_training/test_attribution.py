"""Attribution: the atlas of left-out samples is exact, and scores of samples are what they say."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

import tsdyn
from tests.cases import small
from tsdyn import attribution
from tsdyn.archive import integrity
from tsdyn.experiment import subsets
from tsdyn.problem.inputs import evaluation_inputs
from tsdyn.running.members import Members

LINEAR = {
    "name": "linear", "seeds": 2, "teacher": {"widths": [4, 2], "init": "gaussian"},
    "student": {"widths": [4, 2], "activation": "identity"},
    "data": {"train": 25, "eval": 20, "noise": 0.5},
    "training": {"method": "gd", "epochs": 1, "steps_per_epoch": 1500, "learning_rate": 0.3, "weight_decay": 0.05},
    "record": {"observables": ["loss", "weight"]},
}  # fmt: skip


def linear(**changes):
    return tsdyn.Experiment(**LINEAR).replace({key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tsdyn.run(linear(), tmp_path_factory.mktemp("whole") / "run").load()


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """Subsets that each lack one sample."""
    path = tmp_path_factory.mktemp("atlas") / "run"
    ds = tsdyn.run(linear(data__leave_out={"subsets": 4, "share": 0.04}), path)
    assert not integrity.check(path)
    return ds.load()


def ridge(seed, without=None):
    """The minimum of the linear student's loss by numpy alone: weights and bias, and its evaluation loss."""
    experiment = linear()
    members = Members(experiment)
    x, y = (t[seed].numpy() for t in members.finite)
    full = np.concatenate([x, np.ones((len(x), 1))], 1)
    rows = np.arange(len(x)) != (-1 if without is None else without)
    decay = experiment.training.weight_decay * len(x) * np.eye(full.shape[1])
    theta = np.linalg.solve(full[rows].T @ full[rows] + decay, full[rows].T @ y[rows])
    test = evaluation_inputs(experiment, seed)
    taught = members.teachers[seed](torch.from_numpy(test)).numpy()
    output = np.concatenate([test, np.ones((len(test), 1))], 1) @ theta
    return theta, 0.5 * ((output - taught) ** 2).sum(1).mean()


def test_the_atlas_is_the_exact_leave_one_out_of_a_linear_student(whole, atlas):
    """Retrained, by normal equations without the row, and by Sherman and Morrison: the same to 1e-10."""
    assert atlas["kept"].dims == ("subset", "sample")
    assert (atlas.kept.sum("sample") == 24).all()
    scores = attribution.leave_one_out(whole)["leave_one_out"]
    assert scores.dims == ("seed", "sample")
    for subset in atlas.subset.values:
        missing = int(np.flatnonzero(~atlas.kept.sel(subset=subset).values)[0])
        for seed in (0, 1):
            theta, loss = ridge(seed, missing)
            end = atlas.sel(subset=subset, seed=seed).isel(epoch=-1, layer=0)
            np.testing.assert_allclose(end.weight.values, theta[:4].T, atol=1e-10)
            np.testing.assert_allclose(end.bias.values, theta[4], atol=1e-10)
            assert abs(float(end.loss_eval) - loss) < 1e-10
            full = float(whole.loss_eval.sel(seed=seed).isel(epoch=-1))
            assert abs(full - float(scores.sel(seed=seed, sample=missing)) - loss) < 1e-10


def test_the_training_loss_is_of_the_samples_that_are_kept(atlas):
    experiment = linear()
    one = atlas.sel(subset=3, seed=1, epoch=0)
    x, y = (t[1].numpy() for t in Members(experiment).finite)
    kept = atlas.kept.sel(subset=3).values
    output = x @ one.weight.isel(layer=0).values.T + one.bias.isel(layer=0).values
    assert float(one.loss_train) == pytest.approx(0.5 * ((output - y)[kept] ** 2).sum(1).mean(), rel=1e-13)


def test_influence_at_the_minimum_is_the_derivative_in_the_samples_weight(whole):
    scores = attribution.influence(whole)["influence"]
    experiment, step = linear(), 1e-5
    members = Members(experiment)
    for seed in (0, 1):
        x, y = (t[seed].numpy() for t in members.finite)
        full = np.concatenate([x, np.ones((len(x), 1))], 1)
        test = evaluation_inputs(experiment, seed)
        taught = members.teachers[seed](torch.from_numpy(test)).numpy()

        def loss(weights, full=full, y=y, test=test, taught=taught):
            decay = 0.05 * len(y) * np.eye(full.shape[1])
            theta = np.linalg.solve(full.T @ (weights[:, None] * full) + decay, full.T @ (weights[:, None] * y))
            output = np.concatenate([test, np.ones((len(test), 1))], 1) @ theta
            return 0.5 * ((output - taught) ** 2).sum(1).mean()

        for sample in (0, 7, 24):
            ends = []
            for sign in (1, -1):
                weights = np.ones(len(y))
                weights[sample] += sign * step
                ends.append(loss(weights))
            assert abs(float(scores.sel(seed=seed, sample=sample)) - (ends[0] - ends[1]) / (2 * step)) < 1e-9


def test_tracin_of_one_gd_step_is_the_derivative_in_the_samples_weight(tmp_path):
    """After a single step O depends on w_i through that step alone: finite differences of it, at the moved parameters
    to first order in the rate."""
    experiment = linear(training__steps_per_epoch=1, training__learning_rate=1e-6, training__weight_decay=0.0)
    ds = tsdyn.run(experiment, tmp_path / "run").load()
    found = attribution.tracin(ds)["tracin"]
    x, y = (t[0].numpy() for t in Members(experiment).finite)
    start = ds.sel(seed=0, epoch=0).isel(layer=0)
    w, b = start.weight.values, start.bias.values
    test = evaluation_inputs(experiment, 0)
    taught = Members(experiment).teachers[0](torch.from_numpy(test)).numpy()

    def outcome(w, b):
        return 0.5 * ((test @ w.T + b - taught) ** 2).sum(1).mean()

    for sample in (0, 11):
        residual = y[sample] - (w @ x[sample] + b)
        step = 1e-3
        change = [outcome(w + s * step * np.outer(residual, x[sample]), b + s * step * residual) for s in (1, -1)]
        slope = (change[0] - change[1]) / (2 * step)
        assert float(found.sel(seed=0, sample=sample)) == pytest.approx(1e-6 / len(x) * slope, rel=1e-8)


def test_lds_of_influence_is_high_for_a_linear_student(whole, tmp_path):
    atlas = tsdyn.run(linear(data__leave_out={"subsets": 8, "share": 0.08}, seeds=2), tmp_path / "run").load()
    good = attribution.lds(attribution.influence(whole), atlas, resamples=200)
    assert good["lds"].dims == ("seed",)
    assert (good["lds"] > 0.9).all()
    assert (good["lds_interval"].sel(bound="low") <= good["lds"]).all()
    assert (good["lds_interval"].sel(bound="high") >= good["lds"]).all()
    assert good["ceiling"].dims == ()
    # the definition, by scipy
    scores = attribution.influence(whole)["influence"].sel(seed=1).values
    predicted = atlas.kept.values.astype(float) @ scores
    right = spearmanr(predicted, atlas.loss_eval.sel(seed=1).isel(epoch=-1).values).statistic
    assert float(good["lds"].sel(seed=1)) == pytest.approx(right, abs=1e-12)
    assert float(attribution.lds(-attribution.influence(whole)["influence"], atlas, resamples=10)["lds"].max()) < -0.9
    halves = atlas.loss_eval.isel(epoch=-1)
    assert float(good["ceiling"]) == pytest.approx(spearmanr(halves.sel(seed=0), halves.sel(seed=1)).statistic)


def test_lds_per_evaluation_sample_and_what_does_not_fit():
    rng = np.random.default_rng(0)
    kept = xr.DataArray(rng.random((30, 12)) < 0.8, dims=("subset", "sample"))
    scores = xr.DataArray(rng.standard_normal((2, 12, 3)), {"seed": [0, 1]}, ("seed", "sample", "point"))
    outcome = xr.dot(kept.astype(float), scores, dim="sample")
    atlas = xr.Dataset({"loss_eval": outcome, "kept": kept})
    found = attribution.lds(scores, atlas, resamples=20)
    assert found["lds"].dims == ("seed", "point")
    ranks = attribution.lds(scores, atlas, of=np.exp(outcome), resamples=5)["lds"]
    np.testing.assert_allclose(ranks, 1)
    shuffled = scores.assign_coords(sample=np.arange(12)).isel(sample=rng.permutation(12))  # labels count, not places
    np.testing.assert_allclose(attribution.lds(shuffled, atlas, resamples=5)["lds"], 1)
    with pytest.raises(ValueError, match="lack the samples"):
        attribution.lds(scores.assign_coords(sample=np.arange(1, 13)), atlas)
    constant = attribution.lds(xr.zeros_like(scores), atlas, resamples=5)
    assert constant["lds"].isnull().all()
    with pytest.raises(ValueError, match="lack the seeds"):
        attribution.lds(scores.isel(seed=[0]), atlas)
    with pytest.raises(ValueError, match="of one training set"):
        attribution.lds(scores.isel(sample=slice(5)), atlas)
    with pytest.raises(ValueError, match="an archive of data"):
        attribution.lds(scores, atlas.drop_vars("kept"))
    with pytest.raises(ValueError, match="the atlas has no mse_eval; it has loss_eval, kept"):
        attribution.lds(scores, atlas, of="mse_eval")
    with pytest.raises(ValueError, match="sample is needed"):
        attribution.lds(scores.isel(sample=0), atlas)
    with pytest.raises(ValueError, match="has none of d_sample"):
        attribution.lds(scores.to_dataset(name="other"), atlas)


def test_start_and_rows_are_the_same_and_only_samples_differ(tmp_path):
    """SGD with the rows of the full run, a left-out sample weighing nothing: against steps written out here."""
    base = {
        "seeds": 1, "training__epochs": 2, "training__steps_per_epoch": 8, "training__learning_rate": 0.1,
        "data__train": 40, "data__eval": 20, "student__scale": 0.5, "training__batch": 6,
        "record__observables": ["weight", "loss"],
    }  # fmt: skip
    whole = tsdyn.run(small(**base), tmp_path / "whole").load()
    atlas = tsdyn.run(small(**base, data__leave_out={"subsets": 3, "share": 0.2}), tmp_path / "atlas").load()
    np.testing.assert_array_equal(atlas.weight.sel(epoch=0), whole.weight.sel(epoch=0).expand_dims(subset=3))
    alone = tsdyn.run(
        small(**base, data__leave_out={"subsets": 3, "share": 0.2, "subset": 1}), tmp_path / "alone"
    ).load()
    np.testing.assert_allclose(alone.weight, atlas.weight.sel(subset=1), atol=1e-13)
    members = Members(small(**base))
    x, y = (t[0] for t in members.finite)
    weights = torch.ones(40, dtype=torch.float64)
    weights[subsets.left_out(small(**base, data__leave_out={"subsets": 3, "share": 0.2, "subset": 1}).data, 1)] = 0
    one = whole.sel(seed=0, epoch=0)
    p = [
        torch.tensor(one[n].sel(layer=i).values[: int(one.width.sel(layer=i))])
        for i in (1, 2)
        for n in ("weight", "bias")
    ]
    p[2] = p[2][:, : int(one.width.sel(layer=1))]

    def loss(w, b, a, c, rows):
        f = torch.relu(x[rows] @ w.T + b) @ a.T + c
        return (weights[rows] * 0.5 * (y[rows] - f).square().sum(1)).mean()

    for epoch in (1, 2):
        for rows in members.rows(epoch)[0]:
            slopes = torch.func.grad(loss, (0, 1, 2, 3))(*p, rows)
            p = [q - 0.1 * s for q, s in zip(p, slopes, strict=True)]
    end = atlas.sel(subset=1, seed=0, epoch=2, layer=1)
    np.testing.assert_allclose(end.weight.values[: len(p[0])], p[0].numpy(), atol=1e-13)
    assert float(abs(atlas.weight.isel(epoch=-1) - whole.weight.isel(epoch=-1)).max()) > 1e-4


def test_subsets_do_not_depend_on_their_number_and_files_go_round():
    few = linear(data__leave_out={"subsets": 5, "share": 0.2})
    many = linear(data__leave_out={"subsets": 50, "share": 0.2})
    np.testing.assert_array_equal(subsets.kept(few.data), subsets.kept(many.data)[:5])
    assert (~subsets.kept(many.data)).sum(1).tolist() == [5] * 50
    assert few.sweep == {"data.leave_out.subset": tuple(range(5))}
    assert tsdyn.Experiment.from_toml_text(few.to_toml()) == few
    assert "leave_out" not in linear().to_toml()
    for wrong, match in (
        ({"subsets": 5}, "give subsets and share"),
        ({"subsets": 5, "share": 0.99}, "nothing of 25 samples"),
        ({"subsets": 5, "share": 0.1, "subset": 7}, r"there are subsets 0\.\.4"),
    ):
        with pytest.raises(tsdyn.ExperimentError, match=match):
            linear(data__leave_out=wrong)
    with pytest.raises(tsdyn.ExperimentError, match="no samples that stay the same"):
        small(data__train="fresh", data__leave_out={"subsets": 2, "share": 0.1})


def test_scores_say_what_they_need(tmp_path, whole, atlas):
    with pytest.raises(ValueError, match="points of a sweep"):
        attribution.influence(atlas)
    with pytest.raises(ValueError, match="the run leaves samples out"):
        attribution.tracin(atlas.sel(subset=[2]))
    with pytest.raises(ValueError, match="record weight"):
        attribution.tracin(whole.drop_vars("weight"))
    with pytest.raises(ValueError, match="of='loss'"):
        attribution.influence(whole, of="loss")
    deep = tsdyn.run(small(training__epochs=1, seeds=1, data__train=30, data__eval=20), tmp_path / "run")
    with pytest.raises(ValueError, match="give damping, above"):
        attribution.influence(deep)
    assert attribution.influence(deep, damping=10.0)["influence"].notnull().all()
    with pytest.raises(ValueError, match="a linear layer with mse"):
        attribution.leave_one_out(deep)
    own = attribution.influence(whole, of=lambda member, network: network.weights[0][0, 0])
    assert own["influence"].notnull().all()
