"""Directories written by earlier versions, frozen in tests/data, are read with the numbers they had then."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tsdyn
from tsdyn.archive import integrity

DATA = Path(__file__).resolve().parent.parent / "data"
EXPECTED = json.loads((DATA / "expected-v2.json").read_text(encoding="utf-8"))
FLOWS = {"flow-study-v2", "online-study-v2"}
#: Sums of float64 numbers of order 1 in another order: their count times half a rounding, with room.
ROUNDING = 1e-12


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - FLOWS))
def test_a_frozen_archive_reads_as_its_own_version_read_it(name, tmp_path):
    path = Path(shutil.copytree(DATA / name, tmp_path / name))
    told = pytest.warns(tsdyn.WrongNumbersWarning) if name == "cross-entropy-v2" else contextlib.nullcontext()
    with told:
        ds = tsdyn.open(path).load()
    assert {str(n) for n in ds.variables} == set(EXPECTED[name])
    for variable, then in EXPECTED[name].items():
        now = ds[variable]
        assert list(now.dims) == then["dims"], variable
        assert list(now.shape) == then["shape"], variable
        if now.dtype.kind == "f":
            assert int(now.isnull().sum()) == then["missing"], variable
        if then["sum"] is not None:
            assert np.nansum(now.values) == pytest.approx(then["sum"], rel=ROUNDING, abs=ROUNDING), variable


def test_an_unfinished_run_of_version_2_goes_on_with_adam_s_moments(tmp_path):
    path = Path(shutil.copytree(DATA / "unfinished-v2", tmp_path / "run"))
    assert list(tsdyn.open(path).epoch.values) == [0, 1]
    ended = tsdyn.run(tsdyn.Experiment.from_toml(path / "experiment.toml"), path).load()
    whole = tsdyn.open(DATA / "archive-v2").load()
    assert list(ended.epoch.values) == list(whole.epoch.values)
    for name, array in whole.data_vars.items():
        # another machine's arithmetic may differ in the last bits of each of the eight steps, which Adam divides by ε
        np.testing.assert_allclose(ended[name].values, array.values, rtol=1e-9, atol=1e-12, err_msg=str(name))
    assert integrity.check(path) == []
