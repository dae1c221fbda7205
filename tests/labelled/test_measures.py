"""Every measure of tsdyn.analysis on differentiable arrays: the numbers of NumPy and the derivative of finite
differences, or an error; never a gradient lost without a word."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import tsdyn.analysis
import xarray as xr
from tsdyn.analysis import batch_norm, summary

import tsdyn
from tests.cases import small
from tsdyn.labelled.arrays import DifferentiableArray
from tsdyn.through_training.observed import NAMED, STEPPED

#: Measures that keep the gradient, and in which variable it is taken.
DIFFERENTIATES = {
    "specialization.specialization": "correlation",
    "specialization.student_specialization": "correlation",
    "specialization.mean_specialization": "correlation",
    "alignment.alignment": "alignment",
    "alignment.best_alignment": "alignment",
    "alignment.teacher_separation": "teacher_weight",
    "order_parameters.order_parameters": "weight",
    "order_parameters.cosines": "weight",
    "summary.share_interval": "weight",
}
#: Measures that are counts, ranks, classes and places, statistics by NumPy's loops, or rebuild networks: they raise.
RAISES = {
    "specialization.silent": "correlation",
    "specialization.recovered": "correlation",
    "specialization.success_rate": "correlation",
    "specialization.success_interval": "correlation",
    "specialization.recovery_epoch": "correlation",
    "specialization.mean_rank": "correlation",
    "specialization.median_rank": "correlation",
    "alignment.aligned": "weight",
    "alignment.augmented_samples": "teacher_weight",
    "matching.partner": "correlation",
    "matching.node_order": "correlation",
    "matching.matched_correlation": "correlation",
    "lottery.winner": "correlation",
    "lottery.winner_rank": "correlation",
    "lottery.settled_epoch": "correlation",
    "lottery.rewind_mask": "correlation",
    "phase.recovery_class": "correlation",
    "audit.audit": "weight",
    "batch_norm.negative_shift_share": "norm_shift",
    "batch_norm.shift_histogram": "norm_shift",
    "similarity.student_teacher": "weight",
}
#: Not measures of an archive's numbers: they draw, write, look up, or take arrays and functions.
OTHERS = {
    "captions",
    "style",
    "overview",
    "verdicts",
    "claims",
    "own_modules",
    "figures",
    "panels",
    "report",
    "layout",
    "lift",
    "members",
    "identity",
    "citations",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = small(
        record__observables=["mse", "correlation", "fanout_norm", "weight", "alignment"], training__epochs=1, seeds=2,
        teacher__widths=[4, 3, 2], student__overrealization=1.5, student__scale=0.5, data__train=50, data__eval=40,
    )  # fmt: skip
    ds = tsdyn.run(experiment, tmp_path_factory.mktemp("measures") / "run").load()
    rng = np.random.default_rng(0)
    shift = ("seed", "epoch", "layer", "node"), rng.standard_normal(ds["bias"].shape)
    return ds.assign(norm_shift=shift)


def measures():
    """Public functions of tsdyn.analysis whose first argument is an archive, by module and name."""
    found = {}
    for info in pkgutil.iter_modules(tsdyn.analysis.__path__):
        if info.name in OTHERS:
            continue
        module = importlib.import_module(f"tsdyn.analysis.{info.name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            given = list(inspect.signature(function).parameters.values()) if own else []
            needed = [p.name for p in given if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
            if needed == ["archive"] and not name.startswith("_"):
                found[f"{info.name}.{name}"] = function
    return found


MEASURES = measures() | {"summary.share_interval": lambda ds: summary.share_interval(ds["weight"].clip(0.1, 0.9))}


def test_every_measure_is_in_a_list():
    assert set(MEASURES) == set(DIFFERENTIATES) | set(RAISES)


def number(result):
    """One number of a measure's result: of all its entries, each with another weight."""
    arrays = result.data_vars.values() if isinstance(result, xr.Dataset) else [result]
    total = 0.0
    for array in arrays:
        weights = np.cos(np.arange(array.size)).reshape(array.shape)
        total = total + (array * xr.DataArray(weights, dims=array.dims)).sum()
    return total


@pytest.mark.parametrize("name", sorted(DIFFERENTIATES))
def test_its_values_are_numpys_and_its_derivative_is_that_of_finite_differences(name, run):
    measure, wrt = MEASURES[name], DIFFERENTIATES[name]
    eager, found = measure(run), measure(tsdyn.differentiable(run))
    pairs = [(eager, found)] if isinstance(eager, xr.DataArray) else [(eager[n], found[n]) for n in eager]
    for right, mine in pairs:
        assert mine.dims == right.dims
        inside = mine.data
        assert isinstance(inside, DifferentiableArray)
        np.testing.assert_allclose(np.asarray(inside.detach()), right.values, rtol=1e-14, atol=1e-15)
        xr.testing.assert_equal(xr.Dataset(coords=mine.coords), xr.Dataset(coords=right.coords))

    slope = tsdyn.gradient(lambda ds: number(measure(ds)), run, wrt=wrt)
    assert slope.dims == run[wrt].dims
    entries = np.argwhere(np.isfinite(run[wrt].values))
    rng, step, seen = np.random.default_rng(1), 1e-5, 0
    for at in rng.permutation(entries)[:6]:
        ends = []
        for sign in (1, -1):
            moved = run.copy(deep=True)
            moved[wrt].values[tuple(at)] += sign * step
            ends.append(float(number(measure(moved))))
        difference, own = (ends[0] - ends[1]) / (2 * step), float(slope.values[tuple(at)])
        # an error of order step², and of rounding / step, relative to derivatives of order one
        assert abs((0.0 if np.isnan(own) else own) - difference) <= 1e-6 * max(1.0, abs(difference)), (name, at)
        seen += difference != 0
    assert seen


@pytest.mark.parametrize("name", sorted(set(RAISES) & set(MEASURES)))
def test_what_has_no_derivative_raises(name, run):
    with pytest.raises((TypeError, ValueError)):
        tsdyn.gradient(lambda ds: number(MEASURES[name](ds)), run, wrt=RAISES[name])


@pytest.mark.parametrize("measure", [summary.summarise, summary.interval])
def test_statistics_by_loops_over_numpy_raise(measure, run):
    with pytest.raises((TypeError, ValueError)):
        tsdyn.gradient(lambda ds: number(measure(ds["weight"])), run)


def test_the_error_names_the_smooth_measure(run):
    from tsdyn.analysis.specialization import recovered

    with pytest.raises(TypeError, match="mean_specialization in the place of recovered"):
        tsdyn.gradient(lambda ds: recovered(ds).sum(), run, wrt="correlation")
    assert batch_norm.negative_shift_share(run).notnull().all()


def test_sensitivity_names_the_smooth_observable_for_each_count_and_rank():
    """All of them but what is of no student at an epoch, or draws and rebuilds."""
    others = {"audit", "student_teacher", "augmented_samples", "negative_shift_share", "shift_histogram"}
    counts = {name.partition(".")[2] for name in RAISES} - others
    assert counts <= set(STEPPED)
    assert not set(STEPPED) & set(NAMED)
    assert {instead.strip("('").partition("'")[0] for instead in STEPPED.values()} <= set(NAMED)
