"""tsdyn inside xarray: engine, tree, accessor, pickles."""

import importlib.metadata
import pickle
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import specialization

import tsdyn
from tests.cases import small
from tsdyn.xarray import Engine


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("xarray") / "sweep"
    few = {"training__epochs": 2, "seeds": 2, "record__observables": ["mse", "correlation", "weight", "alignment"]}
    tsdyn.run(small(sweep={"student.overrealization": [1, 3]}, **few), path)
    return path


def test_the_engine_reads_what_tsdyn_reads(sweep):
    ds = tsdyn.open(sweep)
    found = xr.open_dataset(sweep, engine=Engine)
    assert all(array.chunks is None for array in found.data_vars.values())
    assert not any(found[name].variable._in_memory for name in found.data_vars)
    picked = found.weight.isel(seed=[1, 0], epoch=slice(None, None, -1), node=2)
    np.testing.assert_array_equal(picked, ds.weight.isel(seed=[1, 0], epoch=slice(None, None, -1), node=2))
    xr.testing.assert_identical(found.load(), ds.compute())
    lazy = xr.open_dataset(sweep, engine=Engine, chunks={}, drop_variables=["mse_eval"])
    assert "mse_eval" not in lazy
    assert lazy.weight.data.chunks == ds.weight.data.chunks
    xr.testing.assert_identical(lazy.compute(), ds.drop_vars("mse_eval").compute())
    flat = xr.open_dataset(sweep, engine=Engine, along="point")
    assert flat.sizes["point"] == 2


def test_the_entry_point_makes_it_an_engine_of_xarray(sweep):
    from xarray.backends import plugins

    entry = importlib.metadata.EntryPoint("tsdyn", "tsdyn.xarray:Engine", "xarray.backends")
    engines = plugins.build_engines(importlib.metadata.EntryPoints([entry]))
    assert isinstance(engines["tsdyn"], Engine)
    assert engines["tsdyn"].guess_can_open(sweep)
    assert engines["tsdyn"].guess_can_open(str(sweep / "overrealization=1"))
    assert not engines["tsdyn"].guess_can_open(sweep / "overrealization=1" / "archive.nc")
    assert not engines["tsdyn"].guess_can_open(sweep.parent)


def test_a_tree_has_a_node_per_layer_at_its_own_widths(sweep):
    run = sweep / "overrealization=3"
    tree = xr.open_datatree(run, engine=Engine)
    assert list(tree.children) == ["layer_1", "layer_2"]
    ds = tsdyn.open(run)
    for number, (nodes, below) in enumerate([(12, 10), (6, 12)], start=1):
        one = tree[f"layer_{number}"].to_dataset(inherit=False)
        assert (one.sizes["node"], one.sizes["input_node"]) == (nodes, max(below, 10 if number == 1 else 4))
        np.testing.assert_array_equal(one.weight, tsdyn.layer(ds, number).weight)
        assert ("alignment" in one) == (number == 1)
    assert set(tree.to_dataset().data_vars) == {"mse_train", "mse_eval"}
    assert "epoch" in tree["layer_1"].coords
    whole = tree.load()
    assert float(whole["layer_2"].weight.isel(seed=0, epoch=0, node=0, input_node=0)) == float(
        ds.weight.sel(layer=2).isel(seed=0, epoch=0, node=0, input_node=0)
    )


def test_the_accessor_is_the_functions(sweep):
    ds = tsdyn.open(sweep)
    xr.testing.assert_identical(ds.tsdyn.layer(1).compute(), tsdyn.layer(ds, 1).compute())
    xr.testing.assert_identical(ds.weight.tsdyn.layer(2).compute(), tsdyn.layer(ds.weight, 2).compute())
    low = ds.tsdyn.layer(1)
    xr.testing.assert_identical(low.tsdyn.specialization.recovered().compute(), specialization.recovered(low).compute())
    assert ds.tsdyn.experiment.name == "small"
    assert ds.tsdyn.select(overrealization=3).width.dims == ("layer",)
    assert "specialization" in dir(ds.tsdyn)
    assert "recovered" in dir(ds.tsdyn.specialization)
    with pytest.raises(AttributeError, match="has no 'specialisation'; it has layer"):
        _ = ds.tsdyn.specialisation
    with pytest.raises(AttributeError, match="has no function 'recovery'; it has"):
        _ = ds.tsdyn.specialization.recovery
    with pytest.raises(TypeError, match="is a topic; call one of its functions"):
        ds.tsdyn.summary()
    with pytest.raises(ValueError, match="ask its Dataset"):
        _ = ds.weight.tsdyn.experiment


def test_whatever_reads_archives_registers_the_accessor():
    code = "import tsdyn.archive.reading, xarray as xr; print(hasattr(xr.Dataset, 'tsdyn'))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True"]


def test_importing_it_is_cheap_and_registers_the_accessor():
    code = (
        "import tsdyn.xarray, sys, xarray as xr; print('torch' in sys.modules, 'netCDF4' in sys.modules, "
        "xr.Dataset({'a': ('layer', [1.0, 2.0])}, {'layer': [0, 1]}).tsdyn.layer(0).a.item())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False", "1.0"]


@pytest.mark.parametrize("by", [pickle, cloudpickle])
def test_lazy_datasets_travel_in_pickles(sweep, by):
    ds = tsdyn.open(sweep)
    again = by.loads(by.dumps(ds[["weight", "mse_eval"]].isel(epoch=-1)))
    assert again.weight.chunks is not None
    xr.testing.assert_identical(again.compute(), ds[["weight", "mse_eval"]].isel(epoch=-1).compute())
    engine = xr.open_dataset(sweep, engine=Engine)
    xr.testing.assert_identical(by.loads(by.dumps(engine)).load(), ds.compute())
