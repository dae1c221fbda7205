"""The study of forks: below the first gate that flips they follow the tangent, above it only a smooth student's do."""

import numpy as np
import pytest
from tsdyn.studies import fork_divergence

import tsdyn
from tsdyn import studies
from tsdyn.engine import train
from tsdyn.through_training import certificate, forks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    small = fork_divergence.EXPERIMENTS["smoke"].replace({"seeds": 2, "training.epochs": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_divergence, "SIZES", (1e-6, 1e-1))
        for name in ("_seconds_of_tangents", "_seconds_of_a_fork"):
            patch.setattr(fork_divergence, name, lambda experiment: 0.0)
        advance = train.train_epoch
        trained = [0]
        count = lambda ensemble, *given, **more: trained.append(ensemble.members) or advance(ensemble, *given, **more)  # noqa: E731
        patch.setattr(train, "train_epoch", count)
        archive = tsdyn.run(small, tmp_path_factory.mktemp("fork") / "run")
        run = sum(trained)
        found = fork_divergence.measure(archive)
        # of what is trained, as much again as is announced, counted in students and epochs
        assert sum(trained) - run == studies.seconds_of_measuring(fork_divergence, small, float(run))
        return found


def test_gates_divide_forks_that_follow_the_tangent_from_those_that_leave_it(measured):
    below, above = measured["size"].transpose("gaussian", "activation", "seed")
    radius = measured["radius"].sel(activation="relu")
    assert measured["radius"].sel(activation="softplus").isnull().all()
    assert (below.sel(activation="relu") < radius).all()
    assert (above.sel(activation="relu") > radius).all()
    wanted = measured["size"] * measured["tangent_growth"].isel(epoch=-1)
    off = np.abs(measured["distance"].isel(epoch=-1) / wanted - 1)
    assert (off.isel(gaussian=0) < 1e-5).all()  # BEYOND, section 2
    relu, smooth = (off.sel(activation=name).isel(gaussian=1) for name in ("relu", "softplus"))
    # what curvature alone does is of the order of the change; gates do more
    assert (smooth < above.sel(activation="softplus")).all()
    assert (relu > 10 * smooth).all()


def test_the_tangent_has_the_size_of_the_change_at_the_fork(measured):
    np.testing.assert_allclose(measured["tangent_growth"].isel(epoch=0), 1, rtol=1e-12)
    np.testing.assert_array_equal(measured["size"], measured["distance"].isel(epoch=0))


def test_tangents_are_announced_by_their_steps(monkeypatch):
    """Of a clock that stands at the number of steps pushed, the seconds announced are all steps of all points."""
    small = fork_divergence.EXPERIMENTS["smoke"].replace({"seeds": 2, "training.epochs": 3})
    pushed, push = [], certificate.pushed
    monkeypatch.setattr(certificate, "pushed", lambda *given: pushed.append(1) or push(*given))
    monkeypatch.setattr(fork_divergence.time, "perf_counter", lambda: float(len(pushed)))
    steps = small.steps * small.training.epochs
    assert fork_divergence.AGAIN(small, 0.0) == pytest.approx(2 * steps)
    assert len(pushed) == 2 * 2 * 10


def test_forks_are_announced_with_what_they_take_beside_training(monkeypatch):
    """Of a clock that stands at the number of forks compared, the seconds announced are one for each size."""
    small = fork_divergence.EXPERIMENTS["smoke"].replace({"seeds": 2, "training.epochs": 3})
    told, compared = [], forks.compared
    monkeypatch.setattr(forks, "compared", lambda *given: told.append(1) or compared(*given))
    monkeypatch.setattr(fork_divergence.time, "perf_counter", lambda: float(len(told)))
    monkeypatch.setattr(fork_divergence, "_seconds_of_tangents", lambda experiment: 0.0)
    assert fork_divergence.AGAIN(small, 10.0) == 10 + len(fork_divergence.SIZES) * (10 + 1)
    assert len(told) == 2
