"""A partial sweep with a dead member gives the same numbers under every scheduler and for every chunking."""

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from tsdyn.analysis import specialization, summary
from tsdyn.analysis.lift import cellwise

import tsdyn
from tests.cases import small

THRESHOLD = 0.3
PROBABILITIES = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedulers") / "sweep"
    few = {"training__epochs": 4, "seeds": 3, "record__observables": ["correlation"]}
    grid = {"student.overrealization": [1, 2], "training.learning_rate": [0.02, 50.0]}  # at 50 members die
    tsdyn.run(small(sweep=grid, **few), path)
    (path / "overrealization=2,learning_rate=50.0" / "archive.nc").unlink()
    return path


def measured(ds):
    rho = specialization.mean_specialization(ds)
    return xr.Dataset(
        {
            "rho": rho,
            "quantiles": summary.summarise(rho, probabilities=PROBABILITIES)["quantiles"],
            "success": specialization.success_rate(ds, threshold=THRESHOLD),
        }
    )


@pytest.fixture(scope="module")
def wanted(sweep):
    """The expected values, by loops over plain arrays."""
    ds = tsdyn.layer(tsdyn.open(sweep), 1)
    values = ds["correlation"].compute(scheduler="synchronous")
    values = values.transpose("overrealization", "learning_rate", "seed", "epoch", "teacher_node", "node").values
    *points, seeds, epochs, teacher_nodes, _ = values.shape
    rho = np.full((*points, seeds, epochs), np.nan)
    quantiles = np.full((*points, epochs, len(PROBABILITIES)), np.nan)
    success = np.full((*points, epochs, teacher_nodes), np.nan)
    for at in np.ndindex(*points):
        for epoch in range(epochs):
            best = np.full((seeds, teacher_nodes), np.nan)
            for seed in range(seeds):
                for j in range(teacher_nodes):
                    known = [c for c in values[(*at, seed, epoch, j)] if c == c]
                    best[seed, j] = max(known) if known else np.nan
                real = [b for b in best[seed] if b == b]
                rho[(*at, seed, epoch)] = sum(real) / len(real) if real else np.nan
            alive = [r for r in rho[(*at, slice(None), epoch)] if r == r]
            if alive:
                quantiles[(*at, epoch)] = np.quantile(alive, PROBABILITIES)
            for j in range(teacher_nodes):
                real = [b for b in best[:, j] if b == b]
                success[(*at, epoch, j)] = sum(b > THRESHOLD for b in real) / len(real) if real else np.nan
    assert np.isnan(rho[1, 1]).all()
    assert 0 < np.isnan(rho[0, 1]).mean() < 1
    assert not np.isnan(rho[:, 0]).any()
    return {"rho": rho, "quantiles": quantiles, "success": success}


def agree(found, wanted):
    outer = ("overrealization", "learning_rate")
    order = {"rho": ("seed", "epoch"), "quantiles": ("epoch", "quantile"), "success": ("epoch", "teacher_node")}
    for name, inner in order.items():
        np.testing.assert_allclose(found[name].transpose(*outer, *inner), wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_schedulers_agree_with_plain_loops(sweep, wanted, scheduler):
    with dask.config.set(scheduler=scheduler):
        agree(measured(tsdyn.layer(tsdyn.open(sweep), 1)).compute(num_workers=2), wanted)


def test_workers_agree_with_plain_loops(sweep, wanted):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        agree(measured(tsdyn.layer(tsdyn.open(sweep), 1)).compute(scheduler=client), wanted)


def test_eagerly_it_is_the_same(sweep, wanted):
    agree(measured(tsdyn.layer(tsdyn.open(sweep), 1).compute()), wanted)


@settings(max_examples=6, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "overrealization": st.integers(1, 2),
            "seed": st.integers(1, 3),
            "epoch": st.integers(2, 5),
            "node": st.integers(4, 12),
        }
    )
)
def test_chunks_change_nothing(sweep, wanted, chunks):
    agree(measured(tsdyn.layer(tsdyn.open(sweep).chunk(chunks), 1)).compute(), wanted)


def test_a_cell_whose_variables_are_cut_apart_differently_is_measured():
    """As those of a fork's child and its parent are, whose files have other chunks."""
    plain = xr.Dataset({"a": ("node", np.arange(6.0)), "b": ("node", np.arange(6.0) ** 2)})
    cell = plain.assign(a=plain.a.chunk(node=4), b=plain.b.chunk(node=3))
    cells = np.full(3, None, dtype=object)
    cells[0], cells[2] = cell, plain
    found = cellwise(lambda ds: [float(ds.a.sum()), float(ds.b.sum())], cells, 2)
    assert hasattr(found, "dask")
    np.testing.assert_array_equal(found.compute(), [[15.0, np.nan, 15.0], [55.0, np.nan, 55.0]])
