"""What the studies of Tian (2020) on boundaries, connectivity and multilayer L-shapes measure."""

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tsdyn import studies


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """A short run of the study of boundaries."""
    smoke = studies.load("tian2020-boundaries").EXPERIMENTS["smoke"]
    return tsdyn.run(smoke.replace({"training.epochs": 3}), tmp_path_factory.mktemp("plane") / "run").load()


def test_boundaries_do_not_depend_on_how_a_node_shares_its_scale(plane):
    """w_k, b_k times c and v_k over c is the same node: ε, ‖v_k‖ ‖w_k‖ and the boundary stay; exactly, c is 2."""
    measure = studies.load("tian2020-boundaries").measure
    lowest = plane["layer"] == 1
    same = plane.drop_vars("alignment")
    scaled = same.assign(
        weight=same["weight"] * xr.where(lowest, 2.0, 1.0),
        bias=same["bias"] * xr.where(lowest, 2.0, 1.0),
        fanout_norm=same["fanout_norm"] / 2.0,
    )
    found, wanted = measure(scaled), measure(same)
    for name in ("nearest", "regular_fanout", "offset"):
        np.testing.assert_array_equal(found[name].values, wanted[name].values)
        assert np.isfinite(found[name]).all()
    # of the recorded ε's, the least; both storeys sum in another order
    recorded = plane["alignment"].isel(epoch=-1, node=slice(0, 6)).min("teacher_node")
    np.testing.assert_allclose(wanted["nearest"], recorded, rtol=1e-10)
