"""Members of archives as networks: one by one, over epochs, with array results, lazily and loaded."""

import dask
import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis.members import each, member, points

import tsdyn
from tests.cases import small
from tsdyn.archive import hdf5, small_files


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("members") / "sweep"
    few = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "weight"]}
    tsdyn.run(small(sweep={"student.overrealization": [1, 2]}, **few), path)
    return path


def sums(one):
    return [[float(w.sum()) for w in one.student.weights], one.seed]


GIVES = {"sums": {"layer": [1, 2]}}


def test_every_epoch_gives_what_it_gives_alone(sweep):
    ds = tsdyn.open(sweep)
    found = each(ds, sums, ["sums", "label"], gives=GIVES)
    assert found.sums.dims == ("overrealization", "seed", "epoch", "layer")
    assert dask.is_dask_collection(found)
    loaded = each(ds.compute(), sums, ["sums", "label"], gives=GIVES)
    xr.testing.assert_identical(found.compute(), loaded)
    for chosen, experiment in points(ds).values():
        for seed in (0, 1):
            for epoch in (0, 2):
                at = {**chosen, "seed": seed, "epoch": epoch}
                expected, _ = sums(member(ds.sel(at), experiment))
                np.testing.assert_array_equal(loaded.sums.sel(at), expected)
                xr.testing.assert_equal(
                    each(ds.sel(seed=[seed], epoch=epoch), sums, ["sums", "label"], gives=GIVES).compute(),
                    loaded.sel(seed=[seed], epoch=epoch),
                )
    np.testing.assert_array_equal(loaded.label, np.broadcast_to([[[0], [1]]], (2, 2, 3)))


def test_a_member_counts_until_it_dies(sweep):
    ds = tsdyn.open(sweep).compute()
    death = ds.death_epoch.copy(data=[[-1, 1], [-1, -1]])
    found = each(ds.assign_coords(death_epoch=death), sums, ["sums", "label"], gives=GIVES)
    alive = found.label.notnull().sel(overrealization=1)
    np.testing.assert_array_equal(alive, [[True, True, True], [True, False, False]])
    assert bool(found.label.notnull().sel(overrealization=2).all())


def test_a_value_of_another_shape_than_said_is_refused(sweep):
    with pytest.raises(ValueError, match=r"sums has the shape \(2,\), not \(\): say its dimensions in `gives`"):
        each(tsdyn.open(sweep).compute(), sums, ["sums", "label"])


def test_lazily_no_file_is_visited_more_often_than_its_variables(sweep, monkeypatch):
    ds = tsdyn.open(sweep)
    visits, opened = [], hdf5.opened
    monkeypatch.setattr(small_files, "_kept", {})  # what earlier tests read
    monkeypatch.setattr(small_files, "_asked", {})
    monkeypatch.setattr(hdf5, "opened", lambda path: visits.append(str(path)) or opened(path))
    each(ds, sums, ["sums", "label"], gives=GIVES).compute()
    # four variables of two layers each, whatever the number of seeds and epochs
    assert max(visits.count(path) for path in visits) <= 8
