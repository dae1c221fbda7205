"""Comparisons of two solutions: matching, similarity, and the loss along paths between them."""

import itertools

import dask
import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tsdyn.analysis import connectivity, matching, similarity, specialization

import tsdyn
from tests.cases import small
from tests.theory.test_theory import scaled_network
from tsdyn import Network

EPS = np.finfo(float).eps
tables = hnp.arrays(
    float,
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    elements=st.floats(-1, 1) | st.just(np.nan),
)


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- matching --------------------------------------------------------------------------------------------------


def best_total(table):
    """Largest total over all one-to-one matchings that pair as many as any, then as few missing scores."""
    rows, columns = table.shape
    if rows > columns:
        return best_total(table.T)
    totals = []
    for chosen in itertools.permutations(range(columns), rows):
        scores = table[np.arange(rows), chosen]
        totals.append((int((~np.isnan(scores)).sum()), float(np.nansum(scores))))
    return max(totals)


@settings(max_examples=80, deadline=None)
@given(tables)
def test_the_matching_is_the_best_of_all(score):
    found = matching.assignment(score)
    for partners, table in zip(found, score, strict=True):
        there = ~np.isnan(table)
        real = ~np.isnan(partners)
        own = table[np.ix_(there.any(1), there.any(0))]
        assert real.sum() == min(own.shape)
        assert len(set(partners[real])) == real.sum()
        scores = table[real, partners[real].astype(int)]
        np.testing.assert_array_equal(matching.matched_score(table)[real], scores)
        if own.size:
            count, total = best_total(own)
            assert (~np.isnan(scores)).sum() == count
            # totals of at most four scores of size at most 1
            assert np.nansum(scores) == pytest.approx(total, abs=32 * EPS)


def test_a_matching_shares_nobody():
    values = np.array([[[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]]])  # both teachers like node 0 best
    ds = xr.Dataset({"correlation": (("seed", "teacher_node", "node"), values)})
    np.testing.assert_array_equal(matching.partner(ds), [[1, 0]])
    np.testing.assert_array_equal(matching.matched_correlation(ds), [[0.8, 0.95]])
    assert (matching.matched_correlation(ds) <= specialization.specialization(ds)).all()
    few = ds.isel(node=[0])  # n < m: one teacher node is left over
    np.testing.assert_array_equal(matching.partner(few), [[np.nan, 0]])
    lazy = ds.chunk(node=1)
    assert dask.is_dask_collection(matching.partner(lazy))
    xr.testing.assert_identical(matching.partner(lazy).compute(), matching.partner(ds))


# --- similarity ------------------------------------------------------------------------------------------------


def activations(n, m, samples=60, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(samples, n)), draw.normal(size=(samples, m))


def test_cka_is_the_centred_kernels_alignment():
    x, y = activations(5, 3)
    centre = np.eye(60) - 1 / 60
    k, q = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # HSIC with linear kernels
    wanted = (k * q).sum() / np.sqrt((k * k).sum() * (q * q).sum())
    assert similarity.linear_cka(x, y) == pytest.approx(wanted, rel=1e-12)


def test_svcca_is_the_cosines_of_principal_angles():
    x, y = activations(5, 3)
    angles = scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0))
    assert similarity.svcca(x, y, variance=1.0) == pytest.approx(np.cos(angles).mean(), rel=1e-12)


def test_what_rotations_and_scales_leave():
    x, _ = activations(5, 3)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    mixed = x @ np.random.default_rng(2).normal(size=(5, 5))
    for measure in (similarity.linear_cka, similarity.svcca):
        assert measure(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
        assert np.isnan(measure(x, np.ones((60, 2))))
    assert similarity.svcca(x, mixed, variance=1.0) == pytest.approx(1, abs=1e-12)  # any invertible map
    assert similarity.linear_cka(x, mixed) < 0.999
    strong = np.c_[x[:, :2] * 100, x[:, 2:] * 1e-3]  # two directions hold 0.99 of it
    assert similarity.svcca(strong, x[:, :2]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("measure", [similarity.linear_cka, similarity.svcca])
def test_too_few_samples_are_refused(measure):
    x, y = activations(5, 3, samples=8)
    with pytest.raises(ValueError, match=r"8 samples of 5 and 3 nodes share directions.*give more than 8"):
        measure(x, y)
    with pytest.raises(ValueError, match="the same samples"):
        measure(x, y[:-1])
    with pytest.raises(ValueError, match=r"variance=0\.0; it lies in"):
        similarity.svcca(*activations(2, 2), variance=0.0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two students of each teacher: only the student's start differs."""
    path = tmp_path_factory.mktemp("solutions") / "sweep"
    experiment = small(student__overrealization=2.5, seeds=2, training__epochs=3, sweep={"student.scale": [0.1, 0.3]})
    return tsdyn.run(experiment, path)


def test_students_grow_similar_to_their_teacher(sweep):
    end = sweep.isel(epoch=-1)
    found = similarity.student_teacher(end)
    assert dask.is_dask_collection(found)
    assert found.cka.dims == ("scale", "seed", "layer")
    xr.testing.assert_allclose(similarity.student_teacher(end.load()), found.compute(), rtol=1e-12)
    from tsdyn.analysis.members import member, points

    at = {"scale": 0.3, "seed": 1}
    (_, experiment) = points(end.sel(at)).popitem()[1]
    one = member(end.sel(at), experiment)
    x = one.evaluation_inputs
    first = [net.trace(x).activations[0].numpy() for net in (one.student, one.teacher)]
    assert float(found.cka.sel(at).sel(layer=1)) == pytest.approx(similarity.linear_cka(*first), rel=1e-12)
    along = similarity.student_teacher(sweep)  # at every epoch what that epoch alone gives
    assert along.cka.dims == ("scale", "seed", "epoch", "layer")
    xr.testing.assert_allclose(along.isel(epoch=-1).compute(), found.compute(), rtol=1e-12)
    with pytest.raises(ValueError, match="10 samples of 10 and 4 nodes"):
        similarity.student_teacher(end, samples=10).compute()


# --- connectivity ----------------------------------------------------------------------------------------------


def noisy_copy(teacher, nodes, seed, noise=1e-3):
    """A student as Theorem 2 has it: each teacher node twice, sharing its fan-out, and unaligned pairs that cancel."""
    m = teacher.widths[1]
    spare, offset = (nodes - 2 * m) // 2, seed + 1
    u, c = tensor(spare, teacher.widths[0], seed=seed), tensor(spare, seed=seed + 2)
    fan = tensor(teacher.widths[2], spare, seed=offset)
    w = torch.cat([2.0 * teacher.weights[0], 0.5 * teacher.weights[0], u, 2 * u])
    b = torch.cat([2.0 * teacher.biases[0], 0.5 * teacher.biases[0], c, 2 * c])
    v = torch.cat([0.25 * teacher.weights[1], teacher.weights[1], fan, -fan / 2], 1)
    net = Network([w + noise * tensor(*w.shape, seed=seed + 3), v], [b, teacher.biases[1].clone()], "relu")
    return connectivity.permuted(net, [torch.randperm(nodes, generator=torch.Generator().manual_seed(seed)).tolist()])


@pytest.fixture(scope="module")
def pair():
    teacher = scaled_network((6, 3, 4), "relu", 0.0, True, 5)
    x = tensor(300, 6, seed=9)
    return teacher, x, noisy_copy(teacher, 12, 1), noisy_copy(teacher, 12, 21)


def test_widening_and_renumbering_change_no_output(pair):
    _, x, first, _ = pair
    same = connectivity.widened(first, [15])
    assert same.widths == (6, 15, 4)
    # sums of the same products, in another order
    torch.testing.assert_close(same(x), first(x), rtol=1e-12, atol=1e-12)
    order = torch.randperm(15).tolist()
    torch.testing.assert_close(connectivity.permuted(same, [order])(x), first(x), rtol=1e-12, atol=1e-12)
    deep = scaled_network((5, 4, 6, 3), "relu", 0.0, True, 2)
    orders = [[2, 0, 3, 1], [5, 4, 3, 2, 1, 0]]
    inputs = tensor(20, 5)
    torch.testing.assert_close(connectivity.permuted(deep, orders)(inputs), deep(inputs), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="no permutations"):
        connectivity.permuted(first, [[0, 0]])
    with pytest.raises(ValueError, match="do not hold"):
        connectivity.widened(first, [3])


def test_a_renumbered_network_is_matched_back(pair):
    _, x, first, _ = pair
    again = connectivity.permuted(first, [torch.randperm(12, generator=torch.Generator().manual_seed(4)).tolist()])
    reference, partner = connectivity.matched(first, again, x)
    for mine, theirs in zip(reference.weights, partner.weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    narrow = scaled_network((6, 3, 4), "relu", 0.0, True, 8)
    wide, widened = connectivity.matched(first, narrow, x)
    assert wide.widths == widened.widths == (6, 12, 4)
    torch.testing.assert_close(widened(x), narrow(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="differ in depth, inputs or outputs"):
        connectivity.matched(first, scaled_network((5, 3, 4), "relu", 0.0, True, 8), x)


def test_theorem_2s_path_meets_no_barrier(pair):
    teacher, x, first, second = pair
    path = connectivity.theorem_2_path(first, second, teacher)
    torch.testing.assert_close(path[-1](x), second(x), rtol=1e-12, atol=1e-12)
    for still in (1, 3):  # only nodes without fan-out move
        for share in (0.0, 0.3, 1.0):
            here = connectivity.between(path[still], path[still + 1], share)
            torch.testing.assert_close(here(x), path[still](x), rtol=1e-12, atol=1e-12)
    corners = connectivity.loss_along(path, teacher, x, np.linspace(0, 1, 6))
    everywhere = connectivity.loss_along(path, teacher, x, np.linspace(0, 1, 101))
    # convex or constant along each leg: nowhere above its ends
    assert everywhere.max() <= corners.max() * (1 + 1e-12)
    straight = connectivity.loss_along([first, second], teacher, x, np.linspace(0, 1, 11))
    assert straight.max() > 10 * corners.max()


def test_what_a_node_stands_for_and_carries_is_known_by_construction(pair):
    """Copies have half of their teacher node's fan-out each; among carriers one has it all, the others none."""
    teacher, *_ = pair
    student = noisy_copy(teacher, 12, 1, noise=0.0)
    for net, wanted in ((student, [0.5, 0.5]), (connectivity.theorem_2_path(student, student, teacher)[1], [0.0, 1.0])):
        stands, share = connectivity._standing(net, teacher)
        for node in (1, 2, 3):
            np.testing.assert_allclose(np.sort(share[stands == node]), wanted, rtol=1e-12, atol=1e-15)
        free = share[stands == 0]
        assert len(free) == 6
        assert bool((free > 0).all()) == (net is student)


def test_an_exact_solution_is_connected_at_its_own_loss(pair):
    """With co-linear copies exact and unaligned fan-outs cancelling, Theorem 2's state: the loss stays at 0."""
    teacher, x, *_ = pair
    ends = []
    for seed in (1, 21):
        ends.append(noisy_copy(teacher, 10, seed, noise=0.0))
    path = connectivity.theorem_2_path(*ends, teacher)
    losses = connectivity.loss_along(path, teacher, x, np.linspace(0, 1, 51))
    # outputs of size 10 with rounding in each of 10 products, squared
    assert losses.max() < (100 * 10 * EPS) ** 2 * 4


def test_too_narrow_or_too_deep_is_refused(pair):
    teacher, _, first, second = pair
    with pytest.raises(ValueError, match="two-layer, of one width"):
        connectivity.theorem_2_path(first, connectivity.widened(second, [13]), teacher)
    exact = Network([teacher.weights[0], teacher.weights[1]], [teacher.biases[0], teacher.biases[1]], "relu")
    with pytest.raises(ValueError, match="3 nodes do not hold 3 carriers of one and 3 of the other"):
        connectivity.theorem_2_path(exact, exact, teacher)


def test_members_of_an_archive_are_connected(sweep):
    end = sweep.isel(epoch=-1)
    first, second = (end.sel(seed=1, scale=scale) for scale in (0.1, 0.3))
    found = connectivity.connect(first, second, points_a_leg=2)
    assert list(found.route.values) == list(connectivity.ROUTES)
    ends = [float(part.loss_eval) for part in (first, second)]
    for route in ("straight", "matched"):
        loss = found.loss.sel(route=route)
        # the recorded loss is a mean over the same samples, summed in another order
        np.testing.assert_allclose([loss[0], loss[-1]], ends, rtol=1e-12)
        assert float(found.barrier.sel(route=route)) == float(loss.max() - max(loss[0], loss[-1]))
    with pytest.raises(ValueError, match="learn from different teachers"):
        connectivity.connect(first, end.sel(seed=0, scale=0.3))
    with pytest.raises(ValueError, match="a slice holds 2 points of the sweep"):
        connectivity.connect(end.sel(seed=1), second)
    with pytest.raises(ValueError, match="member: seed left; select one"):
        connectivity.connect(end.sel(scale=0.1), second)
