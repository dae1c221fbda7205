import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tsdyn.analysis import specialization
from tsdyn.analysis.lift import lift

DIMS = ("seed", "epoch", "teacher_node", "node")


def archive(values):
    return xr.Dataset(
        {"correlation": (DIMS, values)},
        coords={dim: np.arange(size) for dim, size in zip(DIMS, values.shape, strict=True)},
    )


correlations = hnp.arrays(
    float,
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    elements=st.floats(-1, 1) | st.just(np.nan),
)


def plain_best(values):
    """Best correlations, one entry at a time."""
    best = np.full(values.shape[:-1], np.nan)
    for index in np.ndindex(best.shape):
        real = [v for v in values[index] if not np.isnan(v)]
        if real:
            best[index] = max(real)
    return best


@settings(max_examples=60, deadline=None)
@given(correlations)
def test_every_measure_agrees_with_a_plain_loop_lazily_and_eagerly(values):
    eager = archive(values)
    lazy = eager.chunk({"seed": 1, "node": 2})
    best = plain_best(values)
    np.testing.assert_array_equal(specialization.specialization(eager), best)
    np.testing.assert_array_equal(specialization.student_specialization(eager), plain_best(np.moveaxis(values, -1, -2)))
    mean = np.array(
        [np.mean(b[~np.isnan(b)]) if (~np.isnan(b)).any() else np.nan for b in best.reshape(-1, best.shape[-1])]
    )
    # a mean of at most four numbers within [-1, 1], in another order
    np.testing.assert_allclose(
        specialization.mean_specialization(eager).values.ravel(), mean, atol=8 * np.finfo(float).eps
    )
    for measure in (
        specialization.specialization,
        specialization.student_specialization,
        specialization.mean_specialization,
        specialization.recovered,
        specialization.success_rate,
        specialization.recovery_epoch,
    ):
        result = measure(lazy)
        assert result.chunks is not None
        xr.testing.assert_identical(result.compute(), measure(eager))
        assert {"units", "long_name", "source"} <= set(result.attrs)


def test_known_answers():
    values = np.full((4, 3, 2, 3), 0.1)
    values[0, 1:, 0, 2] = 0.97  # seed 0 recovers teacher 0 from epoch 1
    values[1, 2:, 0, 0] = 0.96  # seed 1 from epoch 2
    values[1, 2:, 1, 0] = 0.96  # the same student is teacher 1's best, too: a maximum is not a matching
    values[3] = np.nan  # seed 3 died
    ds = archive(values)
    rate = specialization.success_rate(ds)
    np.testing.assert_allclose(rate.isel(epoch=-1), [2 / 3, 1 / 3])
    np.testing.assert_allclose(rate.isel(epoch=1), [1 / 3, 0])
    np.testing.assert_array_equal(specialization.recovered(ds).isel(epoch=-1), [1, 2, 0, np.nan])
    np.testing.assert_array_equal(
        specialization.recovery_epoch(ds), [[1, np.nan], [2, 2], [np.nan, np.nan], [np.nan, np.nan]]
    )


def test_anticorrelation_is_no_match():
    ds = archive(np.full((1, 1, 1, 2), -0.99))
    assert float(specialization.specialization(ds).squeeze()) == -0.99
    assert float(specialization.recovered(ds).squeeze()) == 0


def test_slices_that_lack_a_dimension_are_told_so():
    ds = archive(np.zeros((2, 2, 2, 2)))
    with pytest.raises(ValueError, match="specialization: 'correlation' has no dimension node"):
        specialization.specialization(ds.isel(node=0))
    with pytest.raises(ValueError, match="success_rate: the slice has no dimension seed"):
        specialization.success_rate(ds.isel(seed=0))
    with pytest.raises(ValueError, match="recovery_epoch: the slice has no dimension epoch"):
        specialization.recovery_epoch(ds.isel(epoch=0))
    with pytest.raises(ValueError, match=r"specialization: the archive has no correlation.*record it"):
        specialization.specialization(ds.drop_vars("correlation"))


def test_lift_keeps_labels_and_broadcasts():
    a = xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("seed", "node"), coords={"seed": [4, 9]}, name="a")
    b = xr.DataArray(np.ones(3), dims="node", name="b")

    def dot(x, y):
        return (x * y).sum(-1)

    result = lift(dot, a, b, reads=("node",), name="dot", attrs={"units": "1"})
    assert result.dims == ("seed",)
    assert list(result.seed.values) == [4, 9]
    assert result.values.tolist() == [3.0, 12.0]
    assert result.attrs == {"units": "1"}


def test_mean_rank_follows_the_final_winner():
    correlation = np.array(
        [
            [[0.1, 0.5, 0.3, np.nan], [0.9, 0.2, 0.1, np.nan]],
            [[0.6, 0.5, 0.3, np.nan], [0.9, 0.2, 0.1, np.nan]],
        ]
    )
    np.testing.assert_allclose(specialization.winner_rank(correlation), [[2 / 3, 0], [0, 0]])
    dead = correlation.copy()
    dead[0, 0, 0] = np.nan  # the winner was dead at the start
    dead[:, 1] = np.nan
    np.testing.assert_allclose(specialization.winner_rank(dead), [[np.nan, np.nan], [0, np.nan]])
    ds = xr.Dataset({"correlation": (("epoch", "teacher_node", "node"), correlation)}).assign_coords(epoch=[0, 1])
    found = specialization.mean_rank(ds)
    assert found.dims == ("epoch",)
    np.testing.assert_allclose(found, [1 / 3, 0])


@settings(max_examples=60, deadline=None)
@given(correlations)
def test_the_median_rank_is_the_median_of_a_plain_loop(values):
    """The reference sorts one member and epoch at a time."""
    ds = archive(values)
    found, ranks = specialization.median_rank(ds), specialization.winner_rank(values)
    assert found.dims == ("seed", "epoch")
    for at in np.ndindex(found.shape):
        real = sorted(r for r in ranks[at] if not np.isnan(r))
        expected = (real[(len(real) - 1) // 2] + real[len(real) // 2]) / 2 if real else np.nan
        # one sum of two numbers below 1, in whatever way it is interpolated
        np.testing.assert_allclose(found.values[at], expected, rtol=0, atol=4 * np.finfo(float).eps)
    xr.testing.assert_identical(specialization.median_rank(ds.chunk({"seed": 1, "node": 2})).compute(), found)


def test_one_late_winner_moves_the_mean_rank_and_not_the_median():
    correlation = np.full((2, 3, 4), 0.1)
    for teacher in range(3):
        correlation[:, teacher, teacher] = 0.9
    correlation[0, 2] = [0.5, 0.4, 0.2, 0.3]  # the third teacher node's winner was last of four at the start
    ds = xr.Dataset({"correlation": (("epoch", "teacher_node", "node"), correlation)}).assign_coords(epoch=[0, 1])
    np.testing.assert_allclose(specialization.mean_rank(ds), [0.25, 0])
    np.testing.assert_array_equal(specialization.median_rank(ds), [0, 0])
