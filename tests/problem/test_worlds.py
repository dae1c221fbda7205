"""Correlated and structured inputs, label noise and wrong classes: against their moments and closed forms.

A bound of 6 standard errors of the sample itself; a normal exceeds it with probability 2e-9, and the largest test
compares 120 numbers, so that a right law fails a fixed seed with probability below 3e-7.
"""

import math

import numpy as np
import pytest
import torch

import tsdyn
from tsdyn import Experiment, ExperimentError
from tsdyn.engine.loss import loss
from tsdyn.problem import targets
from tsdyn.problem.images import DataError
from tsdyn.problem.inputs import (
    SEEDED,
    draw_inputs,
    evaluation_inputs,
    fresh_batches,
    generator,
    training_inputs,
)
from tsdyn.problem.teachers import draw_teacher

D, SAMPLES, ERRORS = 6, 40_000, 6.0


def world(**data):
    return Experiment(
        name="w", seeds=2, teacher={"widths": [D, 4, 3], "init": "gaussian"},
        data={"train": 60, "eval": 40} | data, training={"epochs": 2, "batch": 10, "steps_per_epoch": 6},
    )  # fmt: skip


def drawn(experiment, seed=0):
    return draw_inputs(experiment, generator(seed, "train"), SAMPLES, seed=seed)


def assert_mean(values, right):
    """The means of columns of `values` are `right` within `ERRORS` standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - right) <= ERRORS * error + 1e-15)


def pairs(x):
    return x[:, :, None] * x[:, None, :]


def matrix(rank=D, seed=5):
    half = np.random.default_rng(seed).standard_normal((D, rank))
    return half @ half.T / rank


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("rank", [D, 2])
def test_a_covariance_is_that_of_the_inputs(law, rank, tmp_path):
    sigma = matrix(rank)
    np.save(tmp_path / "sigma.npy", sigma)
    x = drawn(world(law=law, std=1.5, covariance=str(tmp_path / "sigma.npy")))
    assert_mean(x, 0.0)
    assert_mean(pairs(x), 1.5**2 * sigma)
    assert np.linalg.matrix_rank(x) == rank


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_a_spectrum_is_a_power_law_of_trace_d_along_the_coordinates(power):
    x = drawn(world(spectrum=power, std=0.5)) / 0.5
    eigenvalues = np.arange(1, D + 1) ** -power
    assert_mean(pairs(x), np.diag(eigenvalues * D / eigenvalues.sum()))
    if not power:  # a flat spectrum changes nothing
        np.testing.assert_array_equal(x, drawn(world(std=0.5)) / 0.5)


def test_a_mixture_has_equally_likely_components_round_means_of_the_seed():
    std, latent = 0.01, 3
    x = drawn(world(law="mixture", latent=latent, std=std))
    means = generator(0, "law").standard_normal((latent, D))
    distance = ((x[:, None] - means) ** 2).sum(2)
    component = distance.argmin(1)
    assert_mean(np.eye(latent)[component], 1 / latent)
    assert_mean((x - means[component]) / std, 0.0)
    assert_mean(pairs((x - means[component]) / std), np.eye(D))


@pytest.mark.parametrize("fold", ["identity", "erf"])
def test_a_hidden_manifold_has_the_closed_second_moment_of_its_fold(fold):
    std, latent = 1.3, 2
    x = drawn(world(law="hidden-manifold", latent=latent, fold=fold, std=std))
    features = generator(0, "law").standard_normal((latent, D))
    below = std**2 * features.T @ features / latent  # covariance of F^T c / sqrt(D)
    scale = np.sqrt(np.outer(1 + below.diagonal(), 1 + below.diagonal()))
    right = {"identity": below, "erf": 2 / np.pi * np.arcsin(below / scale)}[fold]
    assert_mean(x, 0.0)
    assert_mean(pairs(x), right)
    if fold == "identity":
        assert np.linalg.matrix_rank(x) == latent


LAWS = {
    "mixture": {"law": "mixture", "latent": 3},
    "hidden-manifold": {"law": "hidden-manifold", "latent": 2, "fold": "tanh"},
    "spectrum": {"spectrum": 1.0},
    "covariance": {"covariance": "sigma.npy"},
}


@pytest.fixture
def sigma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("sigma.npy", matrix())


@pytest.mark.parametrize("data", LAWS.values(), ids=LAWS)
def test_a_draw_depends_on_experiment_seed_and_epoch_only(data, sigma):
    finite, fresh = world(**data), world(**data, train="fresh")
    np.testing.assert_array_equal(training_inputs(finite, 1), training_inputs(finite, 1))
    assert not np.array_equal(training_inputs(finite, 0), training_inputs(finite, 1))
    assert not np.array_equal(training_inputs(finite, 0)[:40], evaluation_inputs(finite, 0))
    whole = np.concatenate(list(fresh_batches(fresh, 1, 2, steps_at_once=6)))
    for at_once in (1, 4):
        np.testing.assert_array_equal(np.concatenate(list(fresh_batches(fresh, 1, 2, steps_at_once=at_once))), whole)
    assert not np.array_equal(whole, np.concatenate(list(fresh_batches(fresh, 1, 1, steps_at_once=6))))


@pytest.mark.parametrize("law", SEEDED)
def test_what_a_seed_shares_needs_the_seed(law):
    with pytest.raises(ValueError, match="pass seed="):
        draw_inputs(world(**LAWS[law]), generator(0, "train"), 3)


# --- targets -------------------------------------------------------------------------------------------------------


def test_noise_on_targets_is_gaussian_of_its_standard_deviation():
    clean = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (targets.spoiled(world(noise=0.3), clean, generator(0, "noise")) - clean).numpy() / 0.3
    assert_mean(noise, 0.0)
    assert_mean(pairs(noise), np.eye(3))
    assert_mean(noise**4, 3.0)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_share_of_the_classes_is_wrong_and_all_wrong_ones_are_equally_likely(share, classes):
    experiment = flipped(share, classes)
    right = np.arange(SAMPLES) % classes
    clean = torch.from_numpy(np.eye(classes)[right])
    found = targets.spoiled(experiment, clean, generator(0, "noise")).numpy()
    assert set(np.unique(found)) == {0.0, 1.0}
    assert (found.sum(1) == 1).all()
    further = (found.argmax(1) - right) % classes
    expected = np.array([1 - share, *[share / (classes - 1)] * (classes - 1)])
    assert_mean(np.eye(classes)[further], expected)


def flipped(share, classes=3, **data):
    return Experiment(
        name="w", seeds=2, teacher={"widths": [D, 4, classes], "init": "gaussian"},
        data={"train": 60, "eval": 40, "flip": share} | data,
        training={"epochs": 2, "batch": 10, "steps_per_epoch": 6, "loss": "cross_entropy"},
    )  # fmt: skip


@pytest.mark.parametrize("train", [60, "fresh"])
@pytest.mark.parametrize(
    "make", [lambda **d: world(noise=0.5, **d), lambda **d: flipped(0.4, **d)], ids=["noise", "flip"]
)
def test_the_loss_that_is_recorded_is_of_the_targets_that_are_trained(make, train, tmp_path):
    experiment = make(train=train).replace({"record.observables": ["loss", "mse", "weight", "gradient_norm"]})
    ds = tsdyn.run(experiment, tmp_path / "run").load()
    clean = experiment.replace({"data.noise": 0.0, "data.flip": 0.0})
    other = tsdyn.run(clean, tmp_path / "clean").load()
    of = loss(experiment.training.loss)
    for seed in experiment.seed_labels:
        teacher = draw_teacher(experiment, seed)
        x = torch.from_numpy(training_inputs(experiment, seed, 0))
        known = of.target(teacher(x))
        noisy = targets.of_training_set(experiment, seed, known, 0)
        assert not torch.equal(noisy, known)
        first = ds.sel(seed=seed, epoch=0)
        if experiment.training.loss == "mse":  # students start near 0: J is that of the targets
            assert float(first.loss_train) == pytest.approx(float(0.5 * noisy.square().sum(1).mean()), rel=0.05)
            assert float(first.mse_train) == pytest.approx(float(other.mse_train.sel(seed=seed, epoch=0)), rel=1e-12)
    # evaluation is of the same samples, the same targets and the same start: clean
    np.testing.assert_array_equal(ds.loss_eval.sel(epoch=0), other.loss_eval.sel(epoch=0))
    assert not np.array_equal(ds.loss_train, other.loss_train)
    assert not np.array_equal(ds.weight.sel(epoch=2), other.weight.sel(epoch=2))


# --- runs ----------------------------------------------------------------------------------------------------------


RUNS = {**LAWS, "noise": {"noise": 0.3}, "noise and covariance": {"noise": 0.3, "covariance": "sigma.npy"}}


@pytest.mark.parametrize("train", [60, "fresh"])
@pytest.mark.parametrize("data", RUNS.values(), ids=RUNS)
def test_a_run_that_stopped_goes_on_to_the_same_bits(data, train, sigma, tmp_path, monkeypatch):
    from tsdyn.running import runner

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    experiment = world(**data | {"train": train})
    whole = tsdyn.run(experiment, tmp_path / "whole").load()

    class Cut(Exception):
        pass

    def cut(step, *_):
        if step == 2:
            raise Cut

    with pytest.raises(Cut):
        runner.run(experiment, tmp_path / "cut", progress=cut)
    resumed = tsdyn.run(experiment, tmp_path / "cut").load()
    for name in whole.data_vars:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=str(name))


def test_a_sweep_over_the_new_keys_is_its_points_alone(sigma, tmp_path):
    swept = {"data.noise": [0.0, 0.5], "data.spectrum": [0.5, 1.0], "training.clip": [0.1, 10.0]}
    base = world(train="fresh", spectrum=0.5).replace({"training.momentum": 0.5, "training.clip": 1.0})
    sweep = tsdyn.run(base.replace({"sweep": swept}), tmp_path / "sweep").load()
    point = base.replace({"data.noise": 0.5, "data.spectrum": 1.0, "training.clip": 0.1})
    alone = tsdyn.run(point, tmp_path / "alone").load()
    together = sweep.sel(noise=0.5, spectrum=1.0, clip=0.1)
    for name in alone.data_vars:  # an ensemble of more members may round its products otherwise
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-9, atol=1e-12, err_msg=str(name))


def test_another_covariance_is_refused_when_the_run_goes_on(sigma, tmp_path, monkeypatch):
    from tsdyn.archive.whole_files import DirectoryError
    from tsdyn.running import runner

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    experiment = world(covariance="sigma.npy")

    def cut(step, *_):
        if step == 2:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        runner.run(experiment, tmp_path / "run", progress=cut)
    np.save("sigma.npy", matrix(seed=6))
    with pytest.raises(DirectoryError, match=r"data\.covariance: sigma\.npy: SHA-256"):
        runner.run(experiment, tmp_path / "run")


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.eye(D + 1), r"has shape \(7, 7\)"),
        (np.ones(D), r"has shape \(6,\)"),
        (np.diag([1.0, 1, 1, 1, 1, -1]), "has the eigenvalue -1; a covariance is positive semidefinite"),
        (np.eye(D) + np.eye(D, k=1), "differs from its transpose by 1"),
        (np.full((D, D), np.nan), "has entries that are NaN or infinite"),
        (np.eye(D) * 1j, "holds complex128"),
        (np.array([["a"] * D] * D), "holds <U1"),
    ],
)
def test_what_is_no_covariance_is_refused(array, said, tmp_path):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(DataError, match=f"data.covariance = .*wrong.npy': {said}"):
        tsdyn.run(world(covariance=str(tmp_path / "wrong.npy")), tmp_path / "run")


def test_a_covariance_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.covariance = .*absent\.npy': cannot be read"):
        tsdyn.run(world(covariance=str(tmp_path / "absent.npy")), tmp_path / "run")
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(DataError, match=r"is not an \.npy file"):
        tsdyn.run(world(covariance=str(tmp_path / "text.npy")), tmp_path / "run2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.noise": -1.0}, "data.noise"),
        ({"data.flip": 1.5}, "data.flip"),
        ({"data.flip": 0.1}, "data.flip = 0.1: training.loss = 'mse' has no classes"),
        ({"data.noise": 0.1, "training.loss": "cross_entropy"}, "data.noise = 0.1: .*use data.flip"),
        ({"data.noise": 0.1, "data.flip": 0.1}, "give one of them"),
        ({"data.covariance": "a.npy", "data.spectrum": 1.0}, "data.spectrum = 1.0: data.covariance = 'a.npy' has"),
        ({"data.law": "mixture"}, "data.latent = None: data.law = 'mixture' needs its number of components"),
        ({"data.latent": 3}, "data.latent = 3: .*other laws have none; here it is 'gaussian'"),
        ({"data.fold": "erf"}, "data.fold = 'erf'.*here it is 'gaussian'"),
        ({"data.law": "hidden-manifold", "data.latent": 3}, "data.fold = None: .*needs it"),
        ({"data.law": "hidden-manifold", "data.latent": 3, "data.fold": "erff"}, "data.fold.*did you mean 'erf'"),
        ({"data.law": "mixture", "data.latent": 3, "data.spectrum": 1.0}, "data.spectrum = 1.0: is of data.law"),
    ],
)
def test_worlds_that_contradict_themselves_are_refused_in_one_sentence(changes, said):
    with pytest.raises(ExperimentError, match=said):
        world().replace(changes)


def test_one_class_cannot_be_wrong():
    with pytest.raises(ExperimentError, match="has one class, so none is wrong"):
        flipped(0.1, classes=1)
