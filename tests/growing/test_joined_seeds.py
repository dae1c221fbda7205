"""Archives joined along seed keep their experiment, so that what rebuilds networks works on them or refuses."""

import shutil
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import audit, similarity

import tsdyn
from tests.cases import small
from tsdyn.archive import sweep_directory, whole_files
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.running import runner

DATA = Path(__file__).resolve().parent.parent / "data"
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
    with pytest.raises(
        DirectoryError, match=r"a/archive\.nc and .*again/archive\.nc hold the same seeds of .*, 1; open"
    ):
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


def test_what_is_not_in_all_of_them_is_nan_and_one_sentence_says_so(tmp_path):
    few = ASKED.replace({"seeds": [0, 1], "record.observables": ["mse", "weight"]})
    more = few.replace({"seeds": [5], "record.observables": ["mse", "weight", "correlation"]})
    tsdyn.run(few, tmp_path / "few")
    tsdyn.run(more, tmp_path / "more")
    with pytest.warns(tsdyn.UnrecordedWarning) as told:
        ds = tsdyn.open([tmp_path / "few", tmp_path / "more"])
    (sentence,) = {str(each.message) for each in told}
    assert sentence.startswith(f"open: NaN where not recorded: correlation not in {tmp_path / 'few'}; `tsdyn measure`")
    assert ds.correlation.sel(seed=[0, 1]).isnull().all()
    assert ds.correlation.sel(seed=5, layer=1).notnull().any()
    assert list(ds.mse_eval.dims) == ["seed", "epoch"]
    assert set(experiment_of(ds).record.observables) == {"mse", "weight", "correlation"}
    added = tsdyn.measure(ds, ["A"])  # of all seeds
    assert added.A.isel(layer=0).notnull().any(["node", "teacher_node"]).all()


def test_a_point_that_does_not_record_yet_what_others_do_is_named(tmp_path):
    few = small(seeds=1, training__epochs=1, record__observables=["mse"], sweep={"training.learning_rate": [0.1, 0.2]})
    before = tsdyn.run(few, tmp_path).load()  # all points record the same: nothing is said
    points = sweep_directory.write_sweep(
        tmp_path, few.replace({"training.epochs": 2, "record.observables": ["mse", "weight"]})
    )
    assert not runner.run_together({tmp_path / "learning_rate=0.2": points["learning_rate=0.2"]})
    with pytest.warns(tsdyn.UnrecordedWarning, match=r"weight not in .*learning_rate=0\.1; `tsdyn measure`"):
        ds = tsdyn.open(tmp_path)
    assert ds.weight.notnull().any(["seed", "epoch", "layer", "node", "input_node"]).values.tolist() == [False, True]
    xr.testing.assert_equal(ds.mse_eval.isel(epoch=[0, 1]).drop_vars("coverage"), before.mse_eval.drop_vars("coverage"))


def test_a_key_that_an_earlier_version_did_not_write_is_at_its_default(tmp_path):
    """Files of versions before lack keys that later ones write: the archives differ in none of these."""
    one = small(seeds=1, training__epochs=1, record__observables=["mse"])
    tsdyn.run(one, tmp_path / "now")
    tsdyn.run(one.replace({"training.learning_rate": 0.5}), tmp_path / "before")
    file = tmp_path / "before" / "experiment.toml"
    dropped = ("nesterov", "warm_up", "noise", "flip", "stride", "padding", "convolution")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if line.split(" = ")[0] not in dropped))
    ds = tsdyn.open([tmp_path / "now", tmp_path / "before"])
    assert ds.mse_eval.dims == ("learning_rate", "seed", "epoch")


def test_archives_of_different_schema_versions_join_and_one_of_a_later_version_is_named(tmp_path):
    shutil.copytree(DATA / "archive-v2", tmp_path / "before")
    asked = tsdyn.Experiment.from_toml(tmp_path / "before" / "experiment.toml")
    now = tsdyn.run(asked.replace({"seeds": [7, 8]}), tmp_path / "now").load()
    before = tsdyn.open(tmp_path / "before").load()
    both = tsdyn.open([tmp_path / "before", tmp_path / "now"]).load()
    assert both.seed.values.tolist() == [*before.seed.values.tolist(), 7, 8]
    for name in now.data_vars:
        for part in (before, now):
            xr.testing.assert_equal(both[name].sel(seed=part.seed).drop_vars("coverage", errors="ignore"), part[name])
    file = tmp_path / "now" / "archive.nc"
    with netCDF4.Dataset(file, "a") as nc:
        nc.setncattr("schema_version", 99)
    whole_files.seal_of(file).unlink()
    with pytest.raises(DirectoryError, match=r"now/archive\.nc: schema version 99 is not one of"):
        tsdyn.open([tmp_path / "before", tmp_path / "now"])
