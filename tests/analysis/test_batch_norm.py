import itertools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tsdyn.analysis import batch_norm

DIMS = ("seed", "layer", "node")
shifts = hnp.arrays(
    float,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7)),
    elements=st.sampled_from([0.0, -0.0, -1e-300, 1.0, -1.0, np.nan]) | st.floats(-3, 3),
)


def archive(values):
    return xr.Dataset({"norm_shift": (DIMS, values)})


@settings(max_examples=60, deadline=None)
@given(shifts, st.integers(1, 4))
def test_shares_and_counts_are_those_of_a_plain_loop_lazily_and_eagerly(values, half):
    eager = archive(values)
    share = batch_norm.negative_shift_share(eager)
    found = batch_norm.shift_histogram(eager, bins=2 * half)
    for index in np.ndindex(values.shape[:-1]):
        there = [v for v in values[index] if not np.isnan(v)]
        negative = sum(v < 0 for v in there)
        assert np.isnan(share.values[index]) if not there else share.values[index] == negative / len(there)
        edge, count = found["shift_edge"].values[index], found["shift_count"].values[index]
        assert edge[half] == 0
        np.testing.assert_array_equal(edge, -edge[::-1])
        assert edge[-1] == (max(map(abs, there), default=0.0) or 1.0)
        assert (count[:half].sum(), count[half:].sum()) == (negative, len(there) - negative)
        plain = [sum(low <= v < high for v in there) for low, high in itertools.pairwise(edge)]
        plain[-1] += sum(v == edge[-1] for v in there)
        np.testing.assert_array_equal(count, plain)
    lazy = eager.chunk({"seed": 1, "node": 2})
    xr.testing.assert_equal(batch_norm.negative_shift_share(lazy).compute(), share)
    xr.testing.assert_equal(batch_norm.shift_histogram(lazy, bins=2 * half).compute(), found)


def test_requests_without_an_answer():
    with pytest.raises(ValueError, match=r"shift_histogram: bins = 3; an even number, at least 2"):
        batch_norm.shift_histogram(archive(np.zeros((1, 1, 1))), bins=3)
    with pytest.raises(ValueError, match=r"negative_shift_share: the archive has no norm_shift, only mse_eval"):
        batch_norm.negative_shift_share(xr.Dataset({"mse_eval": 0.0}))
    with pytest.raises(ValueError, match="'norm_shift' has no dimension node"):
        batch_norm.negative_shift_share(archive(np.zeros((1, 1, 1))).isel(node=0))
