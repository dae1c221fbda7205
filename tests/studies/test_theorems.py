"""The study of theorems: near the teacher hypotheses are met and conclusions hold; far from it nothing is tested."""

import numpy as np
import pytest
from tsdyn.studies import theorems

import tsdyn
from tsdyn import studies

NEAR, FAR = ("2 layers, 1e-10", "3 layers, 1e-10"), ("2 layers, 1e-02", "3 layers, 1e-02")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    study = studies.load("theorems")
    return study.measure(tsdyn.run(study.EXPERIMENTS["smoke"], tmp_path_factory.mktemp("theorems") / "run"))


@pytest.mark.parametrize("claim", ["Theorem 1", "Theorem 3", "Theorem 4"])
def test_hypotheses_are_met_near_the_teacher_and_unmet_far_from_it(measured, claim):
    verdict = measured["verdict"].sel(claim=claim)
    for start in NEAR:
        assert (verdict.sel(start=start) == "holds").all()
        assert (measured["margin"].sel(claim=claim, start=start) <= 1).all()
    for start in FAR:
        assert (verdict.sel(start=start) == "unmet").all()


def test_lemma_1_asks_for_a_piecewise_linear_activation(measured):
    """And the update of 2019's Theorem 2, which is never judged."""
    relu = [str(start) for start in measured["start"].values if not str(start).startswith("tanh")]
    (tanh,) = set(measured["start"].values.tolist()) - set(relu)
    for claim, met in (("Lemma 1", "holds"), ("update L*W*H* − LWH", "reported")):
        verdict = measured["verdict"].sel(claim=claim)
        assert (verdict.sel(start=relu) == met).all()
        assert (verdict.sel(start=tanh) == "unmet").all()


def test_theorem_5_asks_for_a_third_layer(measured):
    five = measured["verdict"].sel(claim="Theorem 5")
    assert [str(w) for w in np.unique(five.sel(start=NEAR[0]))] == ["unmet"]
    assert (five.sel(start=NEAR[1]) == "holds").all()


def test_the_averaged_dynamics_stay_within_the_bounds_of_2019(measured):
    """Theorem 4's envelope, where its hypothesis is met (not far off), and Theorem 5's bound from every start."""
    assert (measured["angle"].sel(away="near") <= measured["bound"].sel(away="near") * (1 + 1e-9)).all()
    assert measured["bound"].sel(away="far").isnull().all()
    assert (measured["moved"] <= measured["moved_bound"] * (1 + 1e-9) + 1e-12).all()


def test_audits_are_announced_by_points(monkeypatch):
    """Of a clock that stands at the number of audits, those announced are one for each point and one beside."""
    small, audits, audit = theorems.EXPERIMENTS["smoke"], [], theorems.audit
    monkeypatch.setattr(theorems, "audit", lambda ds: audits.append(1) or audit(ds))
    monkeypatch.setattr(theorems.time, "perf_counter", lambda: float(len(audits)))
    points = len(list(small.points()))
    assert theorems.AGAIN(small, 0.0) == points + 1
    assert theorems.AGAIN(small, 5.0 * points) == 5 + points + 1
