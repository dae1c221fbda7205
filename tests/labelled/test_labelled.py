"""Labels and gradients together: what xarray does keeps the derivative, and nothing loses it without an error."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr

import tsdyn
from tsdyn.labelled.arrays import DifferentiableArray, tracked

OUTER = {"coords": "minimal", "compat": "override", "join": "exact", "combine_attrs": "drop"}


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4))
    weight[2, 3] = np.nan  # padding
    return xr.Dataset(
        {
            "weight": (("seed", "node"), weight, {"units": "1"}),
            "bias": ("seed", rng.standard_normal(3)),
            "count": ("seed", [1, 2, 3]),
        },
        coords={"seed": [0, 1, 5], "half": ("seed", ["a", "b", "a"]), "node": [0, 1, 2, 3]},
        attrs={"experiment": "kept"},
    )


KEEPS = {
    "sum": lambda d: (d.weight**2).sum(),
    "Dataset.sum": lambda d: (d[["weight"]] ** 2).sum()["weight"],
    "mean": lambda d: d.weight.mean(),
    "mean over": lambda d: (d.weight.mean("seed") ** 3).sum(),
    "Dataset.mean": lambda d: (d.mean("seed")["weight"] ** 2).sum(),
    "std": lambda d: d.weight.std("node", ddof=1).sum(),
    "var": lambda d: d.weight.var("node", skipna=True).sum(),
    "max": lambda d: (d.weight.max("node") ** 2).sum(),
    "max, skipna=False": lambda d: d.weight.sel(seed=[0, 1]).max("node", skipna=False).sum(),
    "min": lambda d: d.weight.min(),
    "median": lambda d: d.weight.median("node").sum(),
    "quantile": lambda d: d.weight.quantile([0.2, 0.7], "node").sum(),
    "prod": lambda d: d.weight.prod("node").sum(),
    "cumsum": lambda d: (d.weight.cumsum("node") ** 2).sum(),
    "diff": lambda d: (d.weight.diff("node") ** 2).sum(),
    "sel": lambda d: d.weight.sel(seed=5, node=slice(1, 2)).sum(),
    "isel": lambda d: d.weight.isel(seed=[2, 0], node=slice(None, None, -2)).isel(node=1).sum(),
    "arithmetic": lambda d: ((2 - d.weight) / (1 + d.bias**2) * d["count"] - 3 % (abs(d.weight) + 1)).sum(),
    "numpy": lambda d: (np.exp(d.weight) + np.tanh(d.weight) * np.sqrt(abs(d.weight))).sum(),
    "array left": lambda d: (np.arange(4.0) * d.weight + np.float64(2)).sum(),
    "where": lambda d: d.weight.where(d.weight > 0, -1.0).sum(),
    "fillna": lambda d: (d.weight.fillna(2.0) ** 2).sum(),
    "xr.where": lambda d: xr.where(d.weight > 0, d.weight**2, 0.0).sum(),
    "clip": lambda d: (d.weight.clip(-0.5, 0.5) ** 2).sum(),
    "dot": lambda d: (xr.dot(d.weight.fillna(0.0), d.bias, dim="seed") ** 2).sum(),
    "matmul": lambda d: ((d.weight.fillna(0.0) @ d.weight.fillna(0.0).rename(seed="other")) ** 2).sum(),
    "concat": lambda d: (xr.concat([d.weight, d.weight**2], "part", **OUTER) ** 2).sum(),
    "transpose": lambda d: (d.weight.transpose("node", "seed") * d.weight).sum(),
    "stack": lambda d: (d.weight.stack(both=("seed", "node")).isel(both=slice(2, 6)) ** 2).sum(),
    "groupby": lambda d: (d.weight.groupby("half").mean() ** 2).sum(),
    "sortby": lambda d: d.weight.sortby("seed", ascending=False).isel(seed=0, node=1),
    "reindex": lambda d: (d.weight.reindex(seed=[0, 1, 9]) ** 2).sum(),
    "shift": lambda d: (d.weight.shift(node=1) * d.weight).sum(),
    "coarsen": lambda d: (d.weight.coarsen(node=2).mean() ** 2).sum(),
    "weighted": lambda d: d.weight.weighted(abs(d["count"])).mean(),
    "to_array": lambda d: (d[["weight"]].to_array() ** 2).sum(),
    "apply_ufunc": lambda d: xr.apply_ufunc(lambda a: (a * a).sum(-1), d.weight, input_core_dims=[["node"]]).sum(),
    "broadcast": lambda d: (xr.broadcast(d.bias * d.weight.mean(), d.weight)[0] ** 2).sum(),
    "expand_dims": lambda d: (d.weight.expand_dims(epoch=[3]) ** 2).squeeze("epoch").sum(),
    "copy": lambda d: (d.copy(deep=True).weight ** 2).sum(),
}


@pytest.mark.parametrize("name", KEEPS)
def test_derivatives_are_those_of_finite_differences(name, ds):
    f = KEEPS[name]
    plain, kept = f(ds), f(tsdyn.differentiable(ds))
    np.testing.assert_allclose(np.asarray(kept.data.detach()), plain.values, rtol=1e-14)
    slope = tsdyn.gradient(f, ds)
    assert slope.name == "d_weight"
    assert slope.dims == ds.weight.dims
    assert set(slope.coords) == set(ds.weight.coords)
    step = 1e-5
    for at in np.argwhere(np.isfinite(ds.weight.values)):
        ends = []
        for sign in (1, -1):
            moved = ds.copy(deep=True)
            moved["weight"].values[tuple(at)] += sign * step
            ends.append(float(f(moved)))
        assert abs(slope.values[tuple(at)] - (ends[0] - ends[1]) / (2 * step)) <= 1e-6 * max(1, abs(ends[0]))


LOSES = {
    "values": lambda d: d.weight.values.sum(),
    "float": lambda d: float(d.weight.sum()),
    "np.asarray": lambda d: np.asarray(d.weight).sum(),
    "np.sort_complex": lambda d: np.sort_complex(d.weight.data).sum(),
    "interp": lambda d: d.weight.interp(seed=0.5).sum(),
    "into numpy": lambda d: np.zeros(12).__setitem__(slice(None), d.weight.data.ravel()),
    "rank": lambda d: d.weight.argmax("node").sum(),
    "count": lambda d: (d.weight > 0).sum(),
    "int": lambda d: d.weight.fillna(0).astype(int).sum(),
    "another variable": lambda d: (d.bias**2).sum(),
    "to_pandas": lambda d: d.weight.to_pandas().sum().sum(),
}


@pytest.mark.parametrize("name", LOSES)
def test_no_gradient_is_lost_without_an_error(name, ds):
    with pytest.raises(TypeError, match=r"gradient|differentiable"):
        tsdyn.gradient(LOSES[name], ds)


def test_the_way_out_is_named(ds):
    with pytest.raises(TypeError, match=r"skipna=False.*detach"):
        np.asarray(tsdyn.differentiable(ds).weight)
    numbers = tsdyn.differentiable(ds).weight.data.detach()
    np.testing.assert_array_equal(np.asarray(numbers), ds.weight)
    with pytest.raises(TypeError, match="jacobian"):
        tsdyn.gradient(lambda d: d.weight.mean("node"), ds)
    with pytest.raises(KeyError, match="no variable weights; it has weight, bias"):
        tsdyn.gradient(lambda d: d.weight.mean(), ds, wrt="weights")
    with pytest.raises(TypeError, match="count holds no real numbers"):
        tsdyn.gradient(lambda d: d["count"].sum(), ds, wrt="count")
    with pytest.raises(TypeError, match="do not change in place"):
        tsdyn.differentiable(ds).weight.data[0] = 1.0
    with pytest.raises(TypeError, match="give a Dataset"):
        tsdyn.differentiable([1.0])


def test_differentiable_keeps_labels_and_leaves_the_rest(ds):
    found = tsdyn.differentiable(ds)
    assert isinstance(found.weight.data, DifferentiableArray)
    assert found.weight.data.tensor.requires_grad
    assert isinstance(found["count"].data, np.ndarray)
    assert found.attrs == ds.attrs
    assert found.weight.attrs == ds.weight.attrs
    assert found.weight.dtype == np.float64
    assert "with gradient" in repr(found)
    found.weight.sum().data.tensor.backward()
    assert float(found.weight.data.tensor.grad[0, 0]) == 1.0
    assert isinstance(ds.weight.data, np.ndarray)  # the argument is as it was
    lazy = tsdyn.gradient(lambda d: (d.weight**2).sum(), ds.chunk({"seed": 1}))
    np.testing.assert_array_equal(lazy, 2 * ds.weight)
    both = tsdyn.gradient(lambda d: (d.weight * d.bias).sum(), ds, wrt=["weight", "bias"])
    np.testing.assert_allclose(both.d_bias, ds.weight.sum("node"))
    assert both.d_bias.dims == ("seed",)


def test_jacobian_has_the_dimensions_of_output_and_input(ds):
    found = tsdyn.jacobian(lambda d: d.weight.mean("node") ** 2, ds)
    assert found.dims == ("seed", "seed_in", "node_in")
    assert list(found.seed_in.values) == [0, 1, 5]
    assert list(found.half_in.values) == ["a", "b", "a"]
    mean, count = ds.weight.mean("node"), ds.weight.notnull().sum("node")
    for row, seed in enumerate(ds.seed.values):
        own = 2 * mean.sel(seed=seed, drop=True) / count.sel(seed=seed, drop=True)
        expected = (own * (ds.seed == seed)).where(ds.weight.notnull())  # NaN for padding
        np.testing.assert_allclose(
            found.isel(seed=row).transpose("seed_in", "node_in"), expected.transpose("seed", "node")
        )
    several = tsdyn.jacobian(lambda d: d.weight.sum("node") * d.bias, ds, wrt=["weight", "bias"])
    assert several.d_bias.dims == ("seed", "seed_in")
    with pytest.raises(TypeError, match="give a DataArray"):
        tsdyn.jacobian(lambda d: d.weight.data, ds)


def test_torch_func_passes_through_labelled_code(ds):
    dims, ds = ds.weight.dims, ds.fillna(1.0)

    def cubes(weight):
        return (ds.assign(weight=(dims, tsdyn.differentiable(weight))).weight ** 3).sum().data.tensor

    w = torch.tensor(ds.weight.values)
    torch.testing.assert_close(torch.func.grad(cubes)(w), 3 * w**2, rtol=1e-15, atol=1e-18)
    value, tangent = torch.func.jvp(cubes, (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, (3 * w**2).sum())
    assert float(value) == pytest.approx(float((w**3).sum()), rel=1e-15)
    pair = torch.stack([w, 2 * w])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cubes))(pair), 3 * pair**2, rtol=1e-15, atol=1e-18)
    second = torch.func.jacrev(torch.func.grad(cubes))(w).reshape(12, 12)
    torch.testing.assert_close(second, torch.diag(6 * w.flatten()), rtol=1e-15, atol=1e-18)

    def lossy(weight):
        return torch.as_tensor(np.asarray(ds.assign(weight=(dims, tsdyn.differentiable(weight))).weight).sum())

    for transformed in (torch.func.grad(lossy), lambda w: torch.func.jvp(lossy, (w,), (w,))):
        with pytest.raises(TypeError, match="lose its gradient"):
            transformed(w)
    assert not tracked(w)


def test_the_names_cost_no_torch():
    code = "import tsdyn, sys; assert 'gradient' in dir(tsdyn); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
