import numpy as np
import pytest
import torch
from tsdyn.analysis.audit import CLAIMS, VERDICTS, audit, teacher_separation

import tsdyn
from tests.cases import small
from tests.test_theory import scaled_network
from tsdyn import alignment

RECORD = ["mse", "correlation", "fanout_norm", "weight", "moments", "lemma1_residual", "alignment", "gradient_max"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = small(record__observables=[*RECORD, "observation"], teacher__polarity=0.5)
    return tsdyn.run(experiment, tmp_path_factory.mktemp("audit") / "run").load()


def changed(run, **values):
    """The run with some variables overwritten at the last epoch of the lowest layer."""
    ds = run.copy(deep=True)
    for name, value in values.items():
        at = {"epoch": ds.epoch[-1], "layer": 1} if "layer" in ds[name].dims else {"epoch": ds.epoch[-1]}
        ds[name].loc[at] = value
    return ds


def test_every_claim_has_a_verdict_and_lemma_1_holds(run):
    found = audit(run)
    assert list(found.claim.values) == [claim.name for claim in CLAIMS]
    assert set(np.unique(found.verdict)) <= set(VERDICTS)
    lemma = found.sel(claim="Lemma 1")
    assert (lemma.verdict == "holds").all()
    np.testing.assert_allclose(lemma.margin, run.lemma1_residual.max("epoch") / 1e-12)
    untrained = found.sel(claim="Theorem 1")  # four epochs are far from a critical point
    assert (untrained.verdict == "unmet").all()
    assert untrained.margin.isnull().all()


def test_a_wrong_matrix_fails_lemma_1(run):
    found = audit(changed(run, lemma1_residual=1e-3)).sel(claim="Lemma 1")
    assert (found.verdict == "fails").all()


def test_theorem_1_is_tested_where_its_hypothesis_is_met_only(run):
    critical = changed(run, gradient_max=1e-9, observation=0.5, A=1.0)
    aligned = audit(changed(critical, alignment=1e-9)).sel(claim="Theorem 1")
    assert (aligned.verdict == "holds").all()
    apart = audit(changed(critical, alignment=0.9)).sel(claim="Theorem 1")
    assert (apart.verdict == "fails").all()
    unobserved = audit(changed(critical, alignment=0.9, observation=0.0)).sel(claim="Theorem 1")
    assert (unobserved.verdict == "unmet").all()


def test_theorem_3_compares_with_its_own_bound(run):
    ds = changed(run, gradient_max=1e-9, observation=0.5, A=2.0)
    nodes, inputs = int(run.width[0] + run.teacher_width[0]), int(run.input_width[0])
    bound = 5 * nodes**1.5 * inputs**0.5 * 1e-9 / 2
    found = audit(changed(ds, alignment=3 * bound)).sel(claim="Theorem 3")
    assert (found.verdict == "fails").all()
    np.testing.assert_allclose(found.margin, 3)
    assert (audit(changed(ds, alignment=bound / 2)).sel(claim="Theorem 3").verdict == "holds").all()
    far = changed(ds, gradient_max=1.0)
    assert (audit(far).sel(claim="Theorem 3").verdict == "unmet").all()


def test_what_is_not_recorded_is_named(run):
    found = audit(run.drop_vars(["alignment", "A"])).sel(claim="Theorem 3")
    assert (found.verdict == "unrecorded").all()
    assert str(found.used.values).startswith("record.observables lacks A, alignment")


def test_the_dead_prove_nothing(run):
    died = run.assign_coords(death_epoch=("seed", [2, -1, -1]))
    verdict = audit(died).sel(claim="Assumption 1").verdict
    assert list(verdict.values) == ["unmet", "holds", "holds"]


def test_a_sweep_is_audited_point_by_point(tmp_path):
    experiment = small(record__observables=["lemma1_residual", "mse"], sweep={"teacher.widths": [[6, 3, 2], [6, 5, 2]]})
    found = audit(tsdyn.run(experiment, tmp_path / "sweep"))
    assert found.sel(claim="Lemma 1").verdict.size == 6
    for name in ("Lemma 1", "Assumption 1"):
        assert (found.sel(claim=name).verdict == "holds").all()


def test_separation_is_the_engines():
    teacher = scaled_network((4, 5, 2), "relu", 0.0, True, 3)
    mine = teacher_separation(teacher.weights[0].numpy(), teacher.biases[0].numpy())
    assert float(mine) == pytest.approx(alignment.separation(teacher), rel=1e-12)
    padded = np.full((7, 4), np.nan)
    padded[:5] = teacher.weights[0]
    bias = torch.cat([teacher.biases[0], torch.full((2,), torch.nan)])
    assert float(teacher_separation(padded, bias.numpy())) == float(mine)
