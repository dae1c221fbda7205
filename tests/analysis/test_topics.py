"""Every lazy measure of the analysis against a plain loop, chunked or not, under every scheduler."""

import os
import warnings

import dask
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tsdyn.analysis import alignment, lottery, matching, order_parameters, phase, similarity, specialization, summary
from tsdyn.analysis.members import member

import tsdyn
from tests.cases import small
from tests.theory.test_theory import scaled_network
from tests.typechecks import unchecked
from tsdyn import derivatives, flow
from tsdyn.problem import augmentation, inputs
from tsdyn.problem.teachers import draw_teacher
from tsdyn.theory import alignments as engine

DIMS = ("seed", "epoch", "teacher_node", "node")
EPS = np.finfo(float).eps


def archive(values):
    return xr.Dataset(
        {"correlation": (DIMS, values)},
        coords={dim: np.arange(size) for dim, size in zip(DIMS, values.shape, strict=True)},
    )


def arrays(*limits, elements):
    shape = st.tuples(*(st.integers(1, limit) for limit in limits))
    return hnp.arrays(float, shape, elements=elements)


values_or_nan = st.floats(-1, 1) | st.just(np.nan)
correlations = arrays(3, 4, 4, 5, elements=values_or_nan)
chunkings = st.fixed_dictionaries(dict.fromkeys(DIMS, st.integers(1, 3)))


def recovery_summary(ds):
    return summary.summarise(specialization.mean_specialization(ds))


#: name → measure of a Dataset with `correlation`; what every one of them must give is the same everywhere.
MEASURES = {
    "specialization": specialization.specialization,
    "student_specialization": specialization.student_specialization,
    "mean_specialization": specialization.mean_specialization,
    "recovered": specialization.recovered,
    "success_rate": specialization.success_rate,
    "success_interval": specialization.success_interval,
    "recovery_epoch": specialization.recovery_epoch,
    "mean_rank": specialization.mean_rank,
    "median_rank": specialization.median_rank,
    "winner": lottery.winner,
    "winner_rank": lottery.winner_rank,
    "settled_epoch": lottery.settled_epoch,
    "rewind_mask": lottery.rewind_mask,
    "partner": matching.partner,
    "matched_correlation": matching.matched_correlation,
    "node_order": matching.node_order,
    "recovery_class": phase.recovery_class,
    "fractions": lambda ds: phase.fractions(phase.recovery_class(ds, threshold=0.3)),
    "summarise": recovery_summary,
    "mean interval": lambda ds: summary.interval(specialization.mean_specialization(ds)),
    "median interval": lambda ds: summary.interval(specialization.mean_specialization(ds), statistic="median"),
}


@settings(max_examples=15, deadline=None)
@given(correlations, chunkings)
def test_chunking_and_laziness_change_nothing(values, chunks):
    eager = archive(values)
    lazy = eager.chunk(chunks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, measure in MEASURES.items():
            result = measure(lazy)
            assert dask.is_dask_collection(result), name
            wanted = measure(eager)
            assert not dask.is_dask_collection(wanted), name
            xr.testing.assert_allclose(result.compute(), wanted, rtol=1e-12, atol=1e-12)
            arrays = result.data_vars.values() if isinstance(result, xr.Dataset) else [result]
            assert all({"units", "long_name"} <= set(a.attrs) for a in arrays), name


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_every_scheduler_gives_the_same(scheduler):
    values = np.random.default_rng(0).uniform(-1, 1, (6, 5, 3, 7))
    values[1] = np.nan
    eager = archive(values)
    lazy = eager.chunk(seed=2, epoch=2)
    with dask.config.set(scheduler=scheduler):
        found = dask.compute({name: measure(lazy) for name, measure in MEASURES.items()}, num_workers=2)[0]
    for name, result in found.items():
        xr.testing.assert_allclose(result, MEASURES[name](eager), rtol=1e-12, atol=1e-12)


def test_workers_of_a_cluster_give_the_same():
    eager = archive(np.random.default_rng(0).uniform(-1, 1, (6, 5, 3, 7)))
    lazy = eager.chunk(seed=2, epoch=2)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        for measure in MEASURES.values():
            found = measure(lazy).compute(scheduler=client)
            xr.testing.assert_allclose(found, measure(eager), rtol=1e-12, atol=1e-12)


# --- summaries -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(arrays(4, 7, elements=st.floats(-1e3, 1e3) | st.just(np.nan)))
def test_summaries_are_numpys_of_what_is_there(values):
    array = xr.DataArray(values, dims=("node", "seed"), name="x")
    found = summary.summarise(array, probabilities=(0.0, 0.3, 1.0))
    for row, whole in enumerate(values):
        real = whole[~np.isnan(whole)]
        assert int(found["count"][row]) == len(real)
        if not len(real):
            assert found["mean"][row].isnull()
            assert found["quantiles"][row].isnull().all()
            continue
        tolerance = 4 * len(real) * EPS * max(1.0, np.abs(real).max())
        np.testing.assert_allclose(found["mean"][row], real.mean(), atol=tolerance)
        np.testing.assert_allclose(found["quantiles"][row], np.quantile(real, (0, 0.3, 1)), atol=tolerance)
        spread = real.std(ddof=1) if len(real) > 1 else np.nan
        np.testing.assert_allclose(found["standard_deviation"][row], spread, rtol=1e-9, atol=tolerance)


def test_the_interval_of_a_mean_is_scipys_and_leaves_out_the_missing():
    values = np.random.default_rng(3).normal(size=(5, 9))
    values[1, 2] = values[1, 5] = np.nan
    values[2] = np.nan
    values[3, 1:] = np.nan  # one value has no spread
    found = summary.interval(xr.DataArray(values, dims=("node", "seed"), name="x"), confidence=0.9)
    for row, whole in enumerate(values):
        real = whole[~np.isnan(whole)]
        if len(real) < 2:
            assert found[row].isnull().all()
            continue
        wanted = scipy.stats.ttest_1samp(real, 0).confidence_interval(0.9)
        np.testing.assert_allclose(found[row], [wanted.low, wanted.high], rtol=1e-12)


@pytest.mark.parametrize("n", [3, 5, 8, 20])
def test_the_interval_of_a_mean_covers_as_it_says(n):
    """20,000 times n normal seeds: 95 %, with a standard error of 0.15 %."""
    values = xr.DataArray(np.random.default_rng(n).normal(2.0, 3.0, (20_000, n)), dims=("trial", "seed"), name="x")
    found = summary.interval(values)
    inside = (found.sel(bound="low") <= 2.0) & (found.sel(bound="high") >= 2.0)
    assert abs(float(inside.mean()) - 0.95) < 5 * (0.95 * 0.05 / 20_000) ** 0.5


@pytest.mark.parametrize("n", [6, 9, 30])
def test_the_interval_of_a_median_covers_as_its_level_says(n):
    """For a skewed distribution, whose mean is not its median: e^z of a standard normal z has median 1."""
    draw = np.random.default_rng(n).lognormal(size=(20_000, n))
    found = summary.interval(xr.DataArray(draw, dims=("trial", "seed"), name="x"), statistic="median")
    level = float(found["level"][0])
    assert level >= 0.95
    inside = (found.sel(bound="low") <= 1.0) & (found.sel(bound="high") >= 1.0)
    assert abs(float(inside.mean()) - level) < 5 * (0.05 / 20_000) ** 0.5


def test_the_median_has_no_interval_below_six_and_the_least_that_suffices_above():
    ranks = xr.DataArray(np.arange(1.0, 12.0), dims="seed", name="x")
    for n in range(1, 6):
        none = summary.interval(ranks[:n], statistic="median", confidence=0.8)
        assert none.isnull().all()
        assert none["level"].isnull()
    six = summary.interval(ranks[:6], statistic="median")
    np.testing.assert_array_equal(six, [1, 6])
    assert float(six["level"]) == 1 - 2 / 2**6
    np.testing.assert_array_equal(summary.interval(ranks, statistic="median"), [2, 10])  # 1 − 24/2¹¹; [3, 9] has 93 %
    assert summary.interval(ranks[:6], statistic="median", confidence=0.99).isnull().all()
    gappy = summary.interval(xr.concat([ranks[:6], ranks[:2] * np.nan], "seed"), statistic="median")
    np.testing.assert_array_equal(gappy, six)


def test_quantiles_of_infinite_values_are_order_statistics():
    def middle(*values):
        array = xr.DataArray(list(values), dims="seed", name="x")
        return summary.summarise(array, probabilities=(0.5,))["quantiles"].item()

    inf = np.inf
    assert middle(1, 2, inf) == 2
    assert middle(-inf, 2, inf) == 2
    assert middle(1, 2, inf, inf) == inf
    assert middle(inf, inf) == inf
    assert np.isnan(middle(-inf, inf))
    assert middle(1.0, inf, np.nan, 3.0) == 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_the_wilson_interval_is_scipys(counts, confidence):
    successes, trials = counts
    ones = np.r_[np.ones(successes), np.zeros(trials - successes), np.nan]
    found = summary.share_interval(xr.DataArray(ones, dims="seed", name="success"), confidence=confidence)
    wanted = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(found, wanted, atol=16 * EPS)


def test_intervals_of_nothing_are_nan():
    nothing = xr.DataArray(np.full((2, 3), np.nan), dims=("node", "seed"), name="success")
    assert summary.share_interval(nothing).isnull().all()
    assert summary.interval(nothing).isnull().all()
    assert summary.interval(nothing, statistic="median").isnull().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: summary.summarise(x, over="epoch"), "summarise: 'x' has no dimension epoch"),
        (lambda x: summary.summarise(x, probabilities=(1.2,)), r"probabilities=\(1.2,\); each lies in"),
        (lambda x: summary.interval(x, confidence=95.0), "confidence=95.0; it lies between 0 and 1"),
        (lambda x: unchecked(summary.interval)(x, statistic="mode"), "statistic='mode'; it is 'mean' or 'median'"),
        (lambda x: summary.share_interval(x, confidence=0.0), "confidence=0.0; it lies between 0 and 1"),
        (phase.fractions, "'x' does not name its classes; set attrs flag_values"),
        (lambda x: phase.fractions(x, over="epoch"), "'x' has no dimension epoch"),
    ],
)
def test_wrong_requests_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(xr.DataArray(np.zeros((2, 3)), dims=("node", "seed"), name="x"))


# --- winners ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(correlations)
def test_winners_agree_with_a_plain_loop(values):
    ds = archive(values)
    seeds, epochs, teachers, nodes = values.shape
    best = np.full((seeds, epochs, teachers), np.nan)
    for at in np.ndindex(best.shape):
        real = [(-v, k) for k, v in enumerate(values[at]) if not np.isnan(v)]
        best[at] = min(real)[1] if real else np.nan
    np.testing.assert_array_equal(lottery.winner(ds), best)
    mask = np.full((seeds, nodes), np.nan)
    settled = np.full((seeds, teachers), np.nan)
    for s in range(seeds):
        for k in range(nodes):
            if not np.isnan(values[s, -1, :, k]).all():
                mask[s, k] = k in best[s, -1]
        for j in range(teachers):
            if not np.isnan(best[s, -1, j]):
                later = [t for t in range(epochs) if all(best[s, u, j] == best[s, -1, j] for u in range(t, epochs))]
                settled[s, j] = later[0]
    np.testing.assert_array_equal(lottery.rewind_mask(ds, threshold=-1.1), mask)
    np.testing.assert_array_equal(lottery.settled_epoch(ds), settled)


@settings(max_examples=60, deadline=None)
@given(correlations)
def test_the_order_of_nodes_is_a_plain_sort(values):
    order = matching.node_order(archive(values))
    for at in np.ndindex(values.shape[:2]):

        def place(k, table=values[at]):
            real = [(-v, j) for j, v in enumerate(table[:, k]) if not np.isnan(v)]
            return (min(real)[1], min(real)[0], k) if real else (len(table), 0, k)

        np.testing.assert_array_equal(order[at], sorted(range(values.shape[3]), key=place))


def test_a_ticket_holds_winners_above_the_threshold_only():
    values = np.zeros((1, 2, 2, 3))
    values[0, 1] = [[0.99, 0.1, 0.2], [0.3, 0.4, 0.1]]
    np.testing.assert_array_equal(lottery.rewind_mask(archive(values)), [[1, 1, 0]])
    np.testing.assert_array_equal(lottery.rewind_mask(archive(values), threshold=0.9), [[1, 0, 0]])
    ranks = lottery.winner_rank(archive(values)).sel(epoch=1)
    np.testing.assert_array_equal(ranks, [[0, 0]])


# --- phases ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(correlations)
def test_fractions_count_seeds(values):
    codes = phase.recovery_class(archive(values), threshold=0.2)
    found = phase.fractions(codes)
    assert list(found["class"].values) == list(phase.RECOVERY)
    for epoch in range(values.shape[1]):
        classes = []
        for seed in range(values.shape[0]):
            best = [max(r) for row in values[seed, epoch] if (r := [v for v in row if not np.isnan(v)])]
            if best:
                hits = [b > 0.2 for b in best]
                classes.append("none" if not any(hits) else "all" if all(hits) else "some")
        for name in phase.RECOVERY:
            wanted = classes.count(name) / len(classes) if classes else np.nan
            np.testing.assert_allclose(found.sel({"class": name}).isel(epoch=epoch), wanted, rtol=EPS)


def test_classes_survive_netcdf(tmp_path):
    codes = phase.recovery_class(archive(np.ones((2, 2, 3, 3))))
    codes.to_netcdf(tmp_path / "codes.nc")
    again = xr.load_dataarray(tmp_path / "codes.nc")
    xr.testing.assert_identical(phase.fractions(again), phase.fractions(codes))
    assert float(phase.fractions(again).sel({"class": "all"}).min()) == 1


# --- what is computed from weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = small(record__observables=["mse", "weight", "correlation", "alignment"], student__overrealization=3.0)
    return tsdyn.run(experiment, tmp_path_factory.mktemp("topics") / "run")


def test_alignment_from_weights_is_the_recorded_one(run):
    computed = alignment.alignment(run.drop_vars("alignment"))
    assert dask.is_dask_collection(computed)
    recorded = run["alignment"].isel(node=slice(0, computed.sizes["node"])).isel(teacher_node=slice(0, 4))
    # both sines come from a difference of unit vectors: a rounding of each of the d products
    np.testing.assert_allclose(computed.transpose(*recorded.dims), recorded, atol=8 * 10 * EPS)
    best = alignment.best_alignment(run)
    np.testing.assert_array_equal(best.isel(teacher_node=slice(0, 4)), recorded.min("node"))


def test_separation_is_the_engines():
    teacher = scaled_network((4, 5, 2), "relu", 0.0, True, 3)
    weight, bias = teacher.weights[0].numpy(), teacher.biases[0].numpy()
    assert float(alignment.separation(weight, bias)) == pytest.approx(engine.separation(teacher), rel=1e-12)
    padded = np.full((7, 4), np.nan)
    padded[:5] = weight
    assert alignment.separation(padded, np.r_[bias, np.nan, np.nan]) == alignment.separation(weight, bias)
    assert alignment.separation(weight[:1], bias[:1]) == np.inf


def test_augmented_samples_are_the_size_of_the_training_set(tmp_path, monkeypatch):
    """Against the engine's training sets: exactly if nothing is random, else in the mean."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one process: starting others costs more than it saves
    keys = ("data.augment", "data.train", "data.augment_eps", "data.std")
    chosen = [("none", 40, 0.1, 1.0), ("agnostic", 40, 0.1, 1.0), ("aware", 9000, 0.1, 0.5), ("aware", 3000, 0.6, 2.0)]
    points = [dict(zip(keys, values, strict=True)) for values in chosen]
    experiment = small(seeds=2, training__epochs=0, record__observables=["mse"], sweep={"points": points})
    counted = alignment.augmented_samples(tsdyn.run(experiment, tmp_path / "run"))
    for place, (_, one) in enumerate(experiment.points()):
        for seed in one.seed_labels:
            teacher, (augment, n, eps, _) = draw_teacher(one, seed), chosen[place]
            size, found = len(augmentation.training_set(one, seed, teacher)), float(counted.sel(point=place, seed=seed))
            if augment != "aware":
                assert found == size
            else:
                x = torch.from_numpy(inputs.training_inputs(one, seed))
                each = 2 * engine.boundary(teacher, x, eps).sum(1).double()  # points that a sample adds
                assert abs(size - found) < 5 * float(each.std()) * n**0.5


def test_augmented_samples_are_counted_of_gaussian_and_finite_data_only(run):
    def of(changes):
        experiment = tsdyn.Experiment.from_toml_text(run.attrs["experiment"])
        return run.assign_attrs(experiment=experiment.replace(changes).to_toml())

    with pytest.raises(ValueError, match=r"augmented_samples: data\.train = 'fresh' has no training set"):
        alignment.augmented_samples(of({"data.train": "fresh"}))
    with pytest.raises(ValueError, match="augmented_samples: teacher-aware points are counted for Gaussian inputs"):
        alignment.augmented_samples(of({"data.law": "uniform", "data.augment": "aware"}))
    agnostic = alignment.augmented_samples(of({"data.law": "uniform", "data.augment": "agnostic", "data.train": 70}))
    assert (agnostic == 70 * (2 * 10 + 1)).all()


def test_a_copy_of_the_teacher_is_aligned(run):
    ds = run.drop_vars("alignment").compute()
    student, teacher = ds["weight"].copy(), ds["teacher_weight"]
    copied = student.copy()
    copied[:, -1, 0, :4] = -3 * teacher[:, 0, :4].values  # the other way round and longer
    bias = ds["bias"].copy()
    bias[:, -1, 0, :4] = -3 * ds["teacher_bias"][:, 0, :4].values
    ds = ds.assign(weight=copied, bias=bias)
    assert (alignment.aligned(ds).isel(epoch=-1) == 4).all()
    # the largest offset is of the order of 1, and so is its rounding
    assert float(alignment.best_alignment(ds).isel(epoch=-1).max()) < 100 * EPS


@pytest.mark.parametrize("std", [1.0, 1.5])
def test_order_parameters_are_the_covariance_of_fields(run, std):
    experiment = tsdyn.Experiment.from_toml_text(run.attrs["experiment"])
    run = run.assign_attrs(experiment=experiment.replace({"data.std": std}).to_toml())
    found = order_parameters.order_parameters(run)
    assert dask.is_dask_collection(found)
    for name, array in found.data_vars.items():
        assert set(array.dims) == set(tsdyn.vocabulary.VARIABLES[name].dims) - ({"epoch"} if name == "T" else set())
        assert array.attrs["normalisation"].startswith("covariance of the fields")
    low = tsdyn.layer(run[["weight", "teacher_weight"]], 1).load()
    cosines = order_parameters.cosines(run).compute()
    for seed in range(3):
        w = torch.as_tensor(low.weight.sel(seed=seed).isel(epoch=2).values[:, :10])
        b = torch.as_tensor(low.teacher_weight.sel(seed=seed).values[:, :10])
        at = found.sel(seed=seed)
        np.testing.assert_allclose(at.Q.isel(epoch=2), std**2 * w @ w.T, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(at.R.isel(epoch=2), std**2 * w @ b.T, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(at["T"], std**2 * b @ b.T, rtol=1e-12, atol=1e-13)
        wanted = torch.nn.functional.cosine_similarity(w[:, None], b[None], dim=-1)
        np.testing.assert_allclose(cosines.sel(seed=seed).isel(epoch=2), wanted, atol=20 * EPS)


def test_what_was_not_recorded_is_named(run):
    with pytest.raises(ValueError, match="alignment: the archive has neither alignment nor weight"):
        alignment.alignment(run.drop_vars(["alignment", "weight"]))
    with pytest.raises(ValueError, match="order_parameters: the archive has no weight; record it"):
        order_parameters.order_parameters(run.drop_vars("weight"))
    with pytest.raises(ValueError, match="winner: the archive has no correlation"):
        lottery.winner(run.drop_vars("correlation"))
    with pytest.raises(ValueError, match="order_parameters: defined at the lowest layer only, not at layer 2"):
        order_parameters.order_parameters(run.sel(layer=2))
    with pytest.raises(
        ValueError, match="cosines: the slice has no dimension teacher_node; select with a list or slice"
    ):
        order_parameters.cosines(run.sel(teacher_node=0))
    with pytest.raises(ValueError, match="specialization: 'correlation' has no dimension teacher_node, only"):
        specialization.specialization(run.sel(teacher_node=0))
    with pytest.raises(ValueError, match="student_teacher: one layer is left"):
        similarity.student_teacher(run.sel(layer=1).isel(epoch=-1))
    with pytest.raises(ValueError, match="defined at the lowest layer only, not at layer 2"):
        alignment.alignment(run.drop_vars("alignment").sel(layer=2))


# --- dead is not missing ----------------------------------------------------------------------------------------


def test_a_living_student_without_a_living_node_has_found_nothing(run):
    """One of four seeds recovers its teacher, three live with dead nodes only: a rate of ¼, not of 1."""
    ds = run.load()
    values = np.full_like(ds["correlation"].values, np.nan)
    values[0, :, 0, :4, :4] = np.eye(4)
    ds = ds.assign(correlation=(ds["correlation"].dims, values))
    low = tsdyn.layer(ds[["correlation"]], 1)
    np.testing.assert_allclose(specialization.success_rate(low), 1 / 3)
    assert (specialization.recovered(low).isel(epoch=-1) == [4, 0, 0]).all()
    shares = phase.fractions(phase.recovery_class(low)).isel(epoch=-1)
    np.testing.assert_allclose(shares.sel({"class": ["none", "all"]}), [2 / 3, 1 / 3])
    died = low.assign_coords(death_epoch=("seed", [-1, 2, -1]))
    np.testing.assert_allclose(specialization.success_rate(died).sel(epoch=[0, 1]), 1 / 3)
    np.testing.assert_allclose(specialization.success_rate(died).sel(epoch=[2, 4]), 1 / 2)  # the dead are missing
    whole = specialization.success_rate(ds[["correlation"]])
    assert whole.sel(layer=2).isnull().all()  # of the output layer there is nothing to recover
    np.testing.assert_allclose(whole.sel(layer=1).isel(teacher_node=slice(0, 4)), 1 / 3)
    assert whole.isel(teacher_node=slice(4, None)).isnull().all()


def test_a_member_without_a_last_epoch_has_no_final_winner():
    values = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 5))
    values[1, -1] = np.nan
    ranks = lottery.winner_rank(archive(values))
    assert ranks.isel(seed=1).isnull().all()
    assert ranks.isel(seed=0).notnull().all()
    assert specialization.mean_rank(archive(values)).isel(seed=1).isnull().all()


# --- similarity -------------------------------------------------------------------------------------------------


def layers(draw, samples=600):
    x = draw.standard_normal((samples, 3))
    return x, x @ draw.standard_normal((3, 5)) + 0.7 * draw.standard_normal((samples, 5))


@pytest.mark.parametrize(("dtype", "scale"), [("f8", 1e100), ("f8", 1e-100), ("f4", 1e15), ("f4", 1e-15)])
def test_similarity_does_not_depend_on_scale(dtype, scale):
    x, y = layers(np.random.default_rng(0))
    for measure in (similarity.linear_cka, similarity.svcca, lambda a, b: similarity.linear_cka(a, b, debiased=True)):
        found = measure((scale * x).astype(dtype), (y / scale).astype(dtype))
        assert found == pytest.approx(measure(x, y), abs=10 * float(np.finfo(dtype).eps))


def test_similarity_does_not_depend_on_the_mean():
    """float32 activations with mean 100 resolve 5e-6 of their spread."""
    x, y = layers(np.random.default_rng(0))
    assert similarity.linear_cka((x + 100).astype("f4"), y) == pytest.approx(similarity.linear_cka(x, y), abs=1e-5)


def test_similarity_of_a_constant_or_infinite_layer_is_nan():
    x, y = layers(np.random.default_rng(0))
    for other in (np.full_like(x, 0.1), np.full_like(x, np.nan), np.where(x > 2, np.inf, x)):
        for measure in (similarity.linear_cka, similarity.svcca):
            assert np.isnan(measure(other, y))
            assert np.isnan(measure(y, other))


def test_the_debiased_estimator_is_the_sum_over_different_samples_and_zero_for_independent_layers():
    def product(x, y):
        """Song et al. (2012), Eq. 5, as printed."""
        n, one = len(x), np.ones(len(x))
        K, L = x @ x.T, y @ y.T
        np.fill_diagonal(K, 0)
        np.fill_diagonal(L, 0)
        sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return np.trace(K @ L) + sums - 2 / (n - 2) * (one @ K @ L @ one)

    draw = np.random.default_rng(0)
    found, plain = [], []
    for _ in range(500):
        x, y = draw.standard_normal((9, 4)) + 3, draw.standard_normal((9, 4))
        wanted = product(x, y) / np.sqrt(product(x, x) * product(y, y))
        found.append(similarity.linear_cka(x, y, debiased=True))
        plain.append(similarity.linear_cka(x, y))
        assert found[-1] == pytest.approx(wanted, rel=1e-9, abs=1e-11)
    # the three products are unbiased, their ratio but for terms of order 1/samples
    assert abs(np.mean(found)) < 0.03 + 5 * np.std(found) / 500**0.5
    assert np.mean(plain) > 0.3


# --- overlaps that a flow takes -----------------------------------------------------------------------------------


def test_an_archives_order_parameters_start_the_flow_at_its_recorded_loss(tmp_path):
    """eg(0) is ½ E[(φ − y)²] over all inputs, the recorded loss a mean over 20,000: five standard errors."""
    experiment = small(
        seeds=2, teacher__widths=[8, 2, 1], teacher__bias=False, student__activation="erf", student__bias=False,
        student__scale=0.4, data__eval=20_000, training__epochs=0, record__observables=["loss", "weight"],
        sweep={"data.std": [1.0, 2.0]},
    )  # fmt: skip
    ds = tsdyn.run(experiment, tmp_path / "run")
    found = order_parameters.order_parameters(ds).isel(epoch=0)
    for std in (1.0, 2.0):
        at = found.sel(std=std)
        path = flow.order_parameters(
            at["Q"], at["R"], at["T"], at["v"], at["A"], learning_rate=0.1, alpha=[0.0, 0.1], activation="erf"
        )
        wanted = ds["loss_eval"].sel(std=std).isel(epoch=0)
        np.testing.assert_allclose(path["eg"].isel(alpha=0), wanted, rtol=5 * 2 / 20_000**0.5)
        divided = at["Q"].assign_attrs(normalisation="w·w/N")
        with pytest.raises(ValueError, match="order_parameters: Q is the 'w·w/N', not the 'covariance of the fields"):
            flow.order_parameters(divided, at["R"], at["T"], learning_rate=0.1, alpha=[0.0])


def test_members_have_the_biases_that_their_networks_have(tmp_path):
    """The recorded norm of per-sample gradients is over parameters that there are: √(Σ ‖g_l‖² ‖f_{l−1}‖²) without."""
    experiment = small(
        seeds=1, teacher__bias=False, student__bias=False, record__observables=["weight", "gradient_norm"],
        training__epochs=1,
    )  # fmt: skip
    ds = tsdyn.run(experiment, tmp_path / "run")
    one = member(ds.isel(seed=0, epoch=-1), experiment)
    assert one.student.biases == one.teacher.biases == [None, None]
    x = one.training_inputs
    module, target = one.student.to_torch(), one.teacher(x)
    norms = derivatives.per_sample_gradient_norms(
        module, lambda found, wanted: 0.5 * (found - wanted).square().sum(), x, target
    )
    recorded = ds["gradient_norm"].isel(seed=0, epoch=-1).sel(quantile=1.0)
    assert float(norms.max()) == pytest.approx(float(recorded), rel=1e-12)
