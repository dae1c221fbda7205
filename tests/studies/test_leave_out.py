"""The study of left-out samples: the truth is the atlas's, and the exact derivative predicts a smooth student's."""

import numpy as np
import pytest
from tsdyn.studies import leave_out

import tsdyn
from tsdyn import attribution
from tsdyn.archive.selecting import experiment_of


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    small = leave_out.EXPERIMENTS["smoke"].replace({"training.epochs": 3})
    atlas = tsdyn.run(small, tmp_path_factory.mktemp("leave-out") / "run").load()
    return atlas, leave_out.measure(atlas)


def test_the_retrained_change_differs_from_the_recorded_loss_by_one_number_per_seed(both):
    atlas, measured = both
    rest = atlas["loss_eval"].isel(epoch=-1) - measured["retrained"]
    assert float((rest.max("subset") - rest.min("subset")).max()) < 1e-12  # the loss of the run on all samples


def test_the_exact_derivative_predicts_a_smooth_students_change(both):
    _, measured = both
    exact = measured.sel(activation="softplus", score="d_sample")
    off = (exact["predicted"] - exact["retrained"]).std() / exact["retrained"].std()
    others = measured.sel(activation="softplus", score=["influence", "tracin"])
    worse = (others["predicted"] - others["retrained"]).std(["seed", "subset"]) / others["retrained"].std()
    assert float(off) < 1
    assert (worse > float(off)).all()


def test_ranks_of_changes_are_the_ranks_of_losses(both):
    """Summing over samples that are left out, or over those kept, gives one order."""
    _, measured = both
    for score in leave_out.SCORES:
        one = measured.sel(activation="softplus", score=score)
        for seed in one["seed"].values:
            at = one.sel(seed=seed)
            order = [np.argsort(np.argsort(at[name].values)) for name in ("predicted", "retrained")]
            assert float(at["lds"]) == pytest.approx(np.corrcoef(*order)[0, 1], abs=1e-12)


def test_influence_functions_take_the_least_damping_that_works(both, tmp_path):
    atlas, measured = both
    whole = experiment_of(atlas).replace({"data.leave_out": {}, "sweep": {}, "student.activation": "softplus"})
    run = tsdyn.run(whole, tmp_path / "run")
    chosen = float(measured["damping"].sel(activation="softplus"))
    place = leave_out.DAMPINGS.index(chosen)
    assert place > 0  # three epochs lead to no minimum
    with pytest.raises(ValueError, match="give damping"):
        attribution.influence(run, damping=leave_out.DAMPINGS[place - 1])
    scores = attribution.influence(run, damping=chosen)["influence"].transpose("seed", "sample").values
    absent = ~atlas["kept"].transpose("subset", "sample").values.astype(bool)
    found = measured["predicted"].sel(activation="softplus", score="influence").transpose("seed", "subset")
    np.testing.assert_allclose(found, -scores @ absent.T, rtol=1e-10)


def test_scores_are_announced_whatever_the_number_of_subsets():
    """Four times the subsets take four times as long to train; the scores of the run on all samples do not."""
    few = leave_out.EXPERIMENTS["smoke"]
    many = few.replace({"data.leave_out": {"subsets": 4 * few.data.leave_out.subsets, "share": 0.05}})
    assert leave_out.AGAIN(many, 4.0) == leave_out.AGAIN(few, 1.0) > 0
