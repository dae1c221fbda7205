"""A power user of xarray: two sweeps joined, derived quantities in zarr, reduced on two workers; then without tsdyn."""

import math
import pickle

import cloudpickle
import numpy as np
import pytest
import xarray as xr
from dask.distributed import Client, LocalCluster
from tsdyn.analysis import specialization

import tsdyn
from tests.cases import small
from tsdyn.archive.lazy_arrays import RUNS_PER_CHUNK

POLARITIES = {"a": [0.0, 0.5, 1.0], "b": [1.5, 2.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("power")
    for name, polarities in POLARITIES.items():
        sweep = {"teacher.polarity": polarities, "student.overrealization": [1, 2]}
        tsdyn.run(small(name=name, training__epochs=2, training__steps_per_epoch=5, sweep=sweep), path / name)
    return path


def test_two_sweeps_are_joined_derived_from_and_reduced_on_two_workers(folder):
    ds = tsdyn.open([folder / "a", folder / "b"])
    assert ds.polarity.values.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    rho = specialization.mean_specialization(ds).rename("rho")
    derived = xr.Dataset({"rho": rho, "loss_eval": ds.loss_eval})
    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB") as cluster,
        Client(cluster),
    ):
        derived.to_zarr(folder / "derived.zarr", zarr_format=2, consolidated=True)
        reduced = ds.loss_eval.isel(epoch=-1).mean("seed").compute()
    store = xr.open_zarr(folder / "derived.zarr", consolidated=True)
    np.testing.assert_array_equal(store.rho.values, specialization.mean_specialization(ds.compute()).values)
    for name, polarities in POLARITIES.items():
        for polarity in polarities:
            one = xr.open_dataset(folder / name / f"polarity={polarity},overrealization=2" / "archive.nc")
            found = reduced.sel(polarity=polarity, overrealization=2)
            np.testing.assert_allclose(found, one.loss_eval.isel(epoch=-1).mean("seed"), rtol=1e-14)
            one.close()


def test_a_series_has_few_tasks(folder):
    """One task per `RUNS_PER_CHUNK` points reads a series; joining and reducing add a few each."""
    ds = tsdyn.open([folder / "a", folder / "b"])
    points = ds.sizes["polarity"] * ds.sizes["overrealization"]
    blocks = math.prod(len(ds.loss_eval.chunksizes[dim]) for dim in ds.loss_eval.dims)
    assert blocks <= ds.sizes["polarity"] * math.ceil(points / RUNS_PER_CHUNK)
    assert len(ds.loss_eval.__dask_graph__()) <= 3 * blocks + 2


def test_graphs_carry_no_experiments(folder):
    """What a task needs of a file is its place and which file it was: no text of some kilobytes per point."""
    ds = tsdyn.open(folder / "b")
    sent = cloudpickle.dumps(dict(ds.loss_eval.__dask_graph__()))
    assert b"archive.nc" in sent
    assert b"[training]" not in sent
    assert pickle.loads(sent).keys() == dict(ds.loss_eval.__dask_graph__()).keys()


def test_everything_again_by_xarray_alone(folder):
    ds = tsdyn.open(folder / "a").load()
    paths = [
        [folder / "a" / f"polarity={p},overrealization={o}" / "archive.nc" for o in (1, 2)] for p in POLARITIES["a"]
    ]
    plain = xr.open_mfdataset(
        paths, combine="nested", concat_dim=["polarity", "overrealization"], join="outer", data_vars="all",
        coords="minimal", compat="override", combine_attrs="override",
    ).load()  # fmt: skip
    for name in ("loss_eval", "correlation", "weight"):
        np.testing.assert_array_equal(plain[name].transpose(*ds[name].dims), ds[name])
    best = plain.correlation.max("node").sel(layer=1).mean("teacher_node", skipna=True)
    rho = specialization.mean_specialization(tsdyn.layer(ds, 1))
    np.testing.assert_allclose(best.transpose(*rho.dims), rho, rtol=1e-12)
