"""Archives joined along seed keep their experiment, so that what rebuilds networks works on them or refuses."""

import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import audit, similarity

import tsdyn
from tests.cases import small
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.whole_files import DirectoryError

ASKED = small(
    seeds=4, training__epochs=1, training__steps_per_epoch=5, data__train=40, data__eval=60, teacher__widths=[5, 3, 2],
    record__observables=["mse", "weight", "correlation", "lemma1_residual"],
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    for name, more in (("a", {"seeds": [0, 1], "name": "a"}), ("b", {"seeds": [2, 3]}), ("whole", {}),
                       ("other data", {"data.std": 3.0}), ("again", {"seeds": [1, 2]})):  # fmt: skip
        tsdyn.run(ASKED.replace(more), folder / name)
    return folder


def joined(parts):
    return xr.concat(
        parts, "seed", data_vars="minimal", coords="minimal", compat="override", join="outer", combine_attrs="override"
    )


def test_opened_together_they_are_one_experiment(folders):
    both, whole = tsdyn.open([folders / "a", folders / "b"]), tsdyn.open(folders / "whole")
    assert experiment_of(both).replace({"name": "small"}) == ASKED.replace({"seeds": [0, 1, 2, 3]})
    xr.testing.assert_equal(both.drop_vars("coverage").load(), whole.load())
    for measure in (lambda ds: similarity.student_teacher(ds.isel(epoch=-1)), audit.audit):
        found, wanted = measure(both.load()), measure(whole.load())
        for name in wanted.data_vars:
            np.testing.assert_array_equal(found[name].values, wanted[name].values, err_msg=name)
    measured = tsdyn.measure(both, ["A"])["A"].drop_vars("coverage")
    xr.testing.assert_equal(measured.load(), tsdyn.measure(whole, ["A"])["A"].load())


def test_the_same_seeds_are_refused_and_both_are_named(folders):
    with pytest.raises(DirectoryError, match=r"a/archive\.nc and .*again/archive\.nc hold the same seeds of one point"):
        tsdyn.open([folders / "a", folders / "again"])


@pytest.mark.parametrize("names", [["mse_eval"], ["loss_eval"]])
def test_joined_by_xarray_another_experiments_numbers_are_noticed(folders, tmp_path, names):
    """Both have seeds 0 to 3 and the same teachers; only the recorded error tells that the data were others."""
    one, other = (tsdyn.open(folders / name).load() for name in ("whole", "other data"))
    if names == ["loss_eval"]:
        one, other = (ds.assign(loss_eval=ds.mse_eval).drop_vars("mse_eval") for ds in (one, other))  # two outputs
    mixed = joined([one.isel(seed=[0, 1]), other.isel(seed=[2, 3])])
    with pytest.raises(ValueError, match=r"the error recorded for seed 2 is .* another archive's"):
        similarity.student_teacher(mixed.isel(epoch=-1))
    right = joined([one.isel(seed=[0, 1]), one.isel(seed=[2, 3])])
    xr.testing.assert_equal(
        similarity.student_teacher(right.isel(epoch=-1)), similarity.student_teacher(one.isel(epoch=-1))
    )
