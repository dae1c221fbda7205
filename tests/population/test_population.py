import itertools
import json
import math

import numpy as np
import pytest
import torch

from tests.cases import REFERENCE, glorot_students, orthonormal_teacher, rng
from tsdyn import Network, population
from tsdyn.flow.flows import gradient_flow
from tsdyn.flow.stationary import polish, signature
from tsdyn.population import PopulationLoss

#: One-neuron losses of THEORY section 7 to the digits given there.
VALUES = {
    ("erf", 2): 0.023221680625337,
    ("erf", 3): 0.040593177313954,
    ("relu", 2): 0.177023873265767,
    ("relu", 3): 0.484710060482448,
    ("tanh", 2): 0.043297210151,
    ("sigmoid", 2): 0.001045807549,
    ("softplus", 2): 0.021647936863,
}


@pytest.mark.parametrize(("name", "k"), VALUES)
def test_one_neuron_losses_are_the_published_ones(name, k):
    assert population.one_neuron(name, k).loss == pytest.approx(VALUES[name, k], abs=5e-13)


@pytest.mark.parametrize("name", ["erf", "relu"])
def test_one_neuron_optima_are_the_reference(name):
    reference = json.loads((REFERENCE / "copy_average.json").read_text())[name]
    for k, row in reference.items():
        found = population.one_neuron(name, int(k))
        assert found.loss == pytest.approx(row["L"], abs=1e-10)
        if name == "erf":
            assert (found.norm, found.outgoing) == pytest.approx((row["r"], row["a"]), abs=1e-10)
        else:
            assert found.norm * found.outgoing == pytest.approx(row["ra"], abs=1e-10)


@pytest.mark.parametrize("name", ["erf", "relu", "tanh", "sigmoid", "softplus"])
def test_one_neuron_optima_are_where_newton_ends(name):
    """The second way: the whole problem in k + 1 dimensions from beside the optimum."""
    for k in range(1, 17) if name == "erf" else (1, 2, 3, 4, 8, 16):
        best = population.one_neuron(name, k)
        loss = PopulationLoss(orthonormal_teacher(k, activation=name), 1)
        row = torch.zeros(1, k + 2, dtype=torch.float64)
        row[0, :k], row[0, -1] = best.norm / math.sqrt(k), best.outgoing
        begin = row + 1e-3 * torch.from_numpy(rng(k).standard_normal((1, k + 2))) * best.norm / math.sqrt(k)
        end = polish(loss, begin)
        assert end.kind.tolist() == ["minimum"], (name, k)
        assert float(end.loss[0]) == pytest.approx(best.loss, abs=1e-10)
        w, a = loss.unpack(end.point[0])
        if name == "relu":
            assert float(w.norm() * a) == pytest.approx(best.norm * best.outgoing, abs=1e-10)
        else:
            assert (float(w.norm()), float(a)) == pytest.approx((best.norm, best.outgoing), abs=1e-10)


@pytest.mark.parametrize(("n", "k"), [(2, 3), (2, 4), (3, 6), (4, 8), (8, 16)])
def test_copy_average_points_are_critical_and_their_losses_add(n, k):
    """Every partition; the index is at least the number of groups above one, less one, and 0 only for (1, …, k−n+1)."""
    teacher = orthonormal_teacher(k)
    loss = PopulationLoss(teacher, n)
    groups = list(population.partitions(k, n))
    points = loss.pack([population.copy_average("erf", teacher, g) for g in groups])
    assert loss.gradient(points).abs().max() <= 1e-12
    wanted = [sum(population.one_neuron("erf", size).loss for size in g) for g in groups]
    np.testing.assert_allclose(loss.value(points), wanted, rtol=0, atol=1e-12)
    assert groups[int(loss.value(points).argmin())] == (*[1] * (n - 1), k - n + 1)
    negative = signature(loss, points).negative.tolist()
    for group, index in zip(groups, negative, strict=True):
        large = sum(size > 1 for size in group)
        assert index >= large - 1
        assert (index == 0) == (large == 1)


def test_relu_members_that_go_wrong_are_told():
    """Glorot starts of n = 2, k = 3: one copies and averages, one is trapped by a sign and is no minimum of its own,
    one runs into w = 0, where the flow is singular."""
    loss = PopulationLoss(orthonormal_teacher(3, activation="relu"), 2)
    flow = gradient_flow(loss, population.starts(loss, (0, 2, 7)))
    end = polish(loss, torch.from_numpy(flow.final.values))
    good, trapped, _ = (population.classify(loss.network(row), loss.teacher) for row in end.point)
    assert flow.stop_reason.values.tolist() == ["gradient", "gradient", "singular"]
    assert (good.kind, end.kind[0]) == ("copy-average", "minimum")
    assert (trapped.kind, end.kind[1]) == ("other", "degenerate")
    assert trapped.reason == "nodes [1] are trapped: their outgoing weights have the wrong sign"
    assert float(end.loss[1]) == pytest.approx(population.one_neuron("relu", 3).loss, abs=1e-12)


def test_copy_average_takes_nodes_by_name_and_any_rotation():
    draw = rng(0)
    q, _ = np.linalg.qr(draw.standard_normal((6, 6)))
    teacher = Network([torch.from_numpy(q[:4].copy()), torch.full((1, 4), -2.0, dtype=torch.float64)], activation="erf")
    student = population.copy_average("erf", teacher, [[3], [0, 2, 1]])
    assert population.loss(student, teacher) == pytest.approx(4 * population.one_neuron("erf", 3).loss, abs=1e-12)
    torch.testing.assert_close(student.weights[0][0], teacher.weights[0][3])
    assert population.classify(student, teacher).groups == ((3,), (0, 1, 2))


@pytest.mark.parametrize("groups", [(1, 2), (1, 3), (2, 2), (1, 2, 3), (3,), (1, 1)])
@pytest.mark.parametrize("name", ["erf", "tanh", "identity"])
def test_copy_average_points_of_odd_activations_are_critical(name, groups):
    """What the theorem says of erf; of tanh the construction itself has a gradient of 5e-5 and more."""
    teacher = orthonormal_teacher(sum(groups), activation=name)
    loss = PopulationLoss(teacher, len(groups))
    row = loss.pack(population.copy_average(name, teacher, groups))
    assert loss.gradient(row).abs().max() <= 1e-12
    sum_of_parts = sum(population.one_neuron(name, size).loss for size in groups)
    assert float(loss.value(row)[0]) <= sum_of_parts + 1e-12
    if name == "erf":
        assert float(loss.value(row)[0]) == pytest.approx(sum_of_parts, abs=1e-12)


def test_phase_boundaries_are_of_odd_activations():
    with pytest.raises(ValueError, match="phase_boundaries: activation='relu' is not odd"):
        population.phase_boundaries(3, activation="relu")


def test_polish_stays_at_the_point_at_hand():
    """Three members run into w = 0, from where Newton's method would walk 14, 1.3 and 0.7 away to other points."""
    loss = PopulationLoss(orthonormal_teacher(4, activation="relu"), 2)
    stopped = torch.from_numpy(gradient_flow(loss, population.starts(loss, (11, 32, 34))).final.values)
    end = polish(loss, stopped)
    assert list(end.kind) == ["not stationary"] * 3
    assert end.moved.tolist() == [0, 0, 0]
    torch.testing.assert_close(end.loss, loss.value(stopped))
    assert (end.moved <= 0.25 * (1 + stopped.norm(dim=-1))).all()
    with pytest.raises(ValueError, match=r"polish: within=0\.0; a share of 1"):
        polish(loss, stopped, within=0.0)


def test_relus_copy_average_point_is_only_near_a_critical_one():
    teacher = orthonormal_teacher(3, activation="relu")
    loss = PopulationLoss(teacher, 2)
    near = loss.pack(population.copy_average("relu", teacher, [1, 2]))
    assert loss.gradient(near).abs().max() > 0.1
    found = population.perturbed_copy_average(teacher, 2)
    row = loss.pack(found)
    assert loss.gradient(row).abs().max() <= 1e-12
    assert float(loss.value(row)[0]) == pytest.approx(0.153667717531, abs=1e-12)
    assert population.classify(found, teacher).kind == "copy-average"


@pytest.mark.parametrize(("n", "k", "value"), [(4, 6, 0.04403587491622), (5, 6, 0.02228060126859)])
def test_perturbed_copies_are_critical_with_the_published_losses(n, k, value):
    teacher = orthonormal_teacher(k)
    loss = PopulationLoss(teacher, n)
    row = loss.pack(population.perturbed_copy(teacher, n))
    assert float(loss.value(row)[0]) == pytest.approx(value, abs=1e-13)
    end = polish(loss, row)
    assert end.kind.tolist() == ["minimum"]
    assert float(end.moved[0]) <= 1e-9
    assert population.classify(loss.network(row[0]), teacher).kind == "perturbed-copy"


@pytest.mark.parametrize(("n", "k"), [(2, 3), (4, 8)])
def test_the_flow_of_erf_reaches_the_copy_average_loss(n, k):
    loss = PopulationLoss(orthonormal_teacher(k), n)
    flow = gradient_flow(loss, glorot_students(loss, 20))
    end = polish(loss, torch.from_numpy(flow.final.values))
    assert set(end.kind) == {"minimum"}
    assert (end.loss - population.one_neuron("erf", k - n + 1).loss).abs().max() <= 1e-12
    kinds = [population.classify(loss.network(row), loss.teacher) for row in end.point]
    assert {c.kind for c in kinds} == {"copy-average"}
    assert all(sorted(map(len, c.groups)) == [1] * (n - 1) + [k - n + 1] for c in kinds)


def test_the_mixed_regime_has_both_classes_and_no_member_changes_with_the_tolerance():
    teacher = orthonormal_teacher(6)
    loss = PopulationLoss(teacher, 5)
    initial = glorot_students(loss, 12)

    def classes(rtol):
        flow = gradient_flow(loss, initial, rtol=rtol, atol=rtol / 100)
        end = polish(loss, torch.from_numpy(flow.final.values))
        return [population.classify(loss.network(row), teacher).kind for row in end.point], end.loss

    coarse, losses = classes(1e-4)
    assert set(coarse) == {"copy-average", "perturbed-copy"}
    assert classes(1e-7)[0] == coarse
    wanted = {
        "copy-average": population.one_neuron("erf", 2).loss,
        "perturbed-copy": float(population.loss(population.perturbed_copy(teacher, 5), teacher)),
    }
    for kind, value in zip(coarse, losses.tolist(), strict=True):
        assert value == pytest.approx(wanted[kind], abs=1e-12)


def test_phase_boundaries():
    """By k = 6 and 8 of THEORY section 7; both kinds meet at one node."""
    six, eight = population.phase_boundaries(6), population.phase_boundaries(8)
    assert six.attrs["perturbed_copy_below_from"] == 5
    assert (six.attrs["perturbed_copy_from"], eight.attrs["perturbed_copy_from"]) == (4, 5)
    assert (six.attrs["copy_average_to"], eight.attrs["copy_average_to"]) == (5, 6)
    for ds in (six, eight):
        sizes = ds.attrs["k"] - ds.n.values + 1
        wanted = [population.one_neuron("erf", int(m)).loss for m in sizes]
        np.testing.assert_allclose(ds.loss_copy_average, wanted, atol=1e-12)
        assert ds.loss_perturbed_copy[0] == pytest.approx(ds.loss_copy_average[0].item(), abs=1e-12)


def test_partitions_are_all_there_are():
    for k, n in itertools.product(range(1, 9), range(1, 9)):
        brute = (
            {tuple(sorted(p)) for p in itertools.product(range(1, k + 1), repeat=n) if sum(p) == k} if n <= 5 else None
        )
        if brute is not None:
            assert set(population.partitions(k, n)) == brute
            assert len(list(population.partitions(k, n))) == len(brute)


def test_classification_says_why_not():
    teacher = orthonormal_teacher(3)
    eye = torch.eye(3, 4, dtype=torch.float64)
    ones = torch.ones(1, 2, dtype=torch.float64)

    def reason(w, a=ones):
        found = population.classify(Network([w, a], activation="erf"), teacher)
        assert found.kind == "other"
        return found.reason

    assert "no part in the output" in reason(eye[:2], torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert "own no teacher node" in reason(torch.stack([eye.sum(0), eye.sum(0)]))
    assert "point away" in reason(torch.stack([-eye[0], eye[1] + eye[2]]))
    assert "not averaged evenly" in reason(torch.stack([eye[0], eye[1] + 0.5 * eye[2]]))
    exact = population.classify(population.copy_average("erf", teacher, [1, 2]), teacher)
    torch.testing.assert_close(exact.share.sum(0), torch.ones(3, dtype=torch.float64))
    assert exact.margin == pytest.approx(0.2)


def test_a_warm_start_is_the_least_copy_average_point_and_ahead_of_random_ones():
    teacher = orthonormal_teacher(8)
    loss = PopulationLoss(teacher, 3)
    warm = population.warm_start(teacher, 3)
    assert population.loss(warm, teacher) == pytest.approx(population.one_neuron("erf", 6).loss, abs=1e-12)
    # a teacher that no formula covers: the start is below what every random start reaches by time 1
    draw = rng(1)
    teacher = Network(
        [torch.from_numpy(draw.standard_normal((8, 10))) / 3, torch.from_numpy(draw.standard_normal((2, 8)))],
        activation="erf",
    )
    loss = PopulationLoss(teacher, 4)
    begin = loss.pack(population.warm_start(teacher, 4))
    random = gradient_flow(loss, glorot_students(loss, 10), times=[1.0])
    assert float(loss.value(begin)[0]) < random.loss.min()
    trained = gradient_flow(loss, begin, times=[1.0])
    assert trained.loss.item() < float(loss.value(begin)[0])
    whole = population.warm_start(teacher, 8)
    assert abs(population.loss(whole, teacher)) <= 1e-12


def test_bad_input_is_named():
    teacher = orthonormal_teacher(3)
    skew = Network([torch.eye(3, dtype=torch.float64) + 0.1, teacher.weights[1]], activation="erf")
    for call in (
        lambda t: population.copy_average("erf", t, [1, 2]),
        lambda t: population.perturbed_copy(t, 2),
        lambda t: population.perturbed_copy_average(t, 2),
        lambda t: population.classify(t, t),
    ):
        with pytest.raises(ValueError, match=r"must be orthonormal \(they are off by 0\.2"):
            call(skew)
    with pytest.raises(
        ValueError, match=r"groups=\[1, 1, 1, 1\] do not partition the 3 teacher nodes.*at most as many"
    ):
        population.copy_average("erf", teacher, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="copy_average: activation='relu', the teacher's is 'erf'"):
        population.copy_average("relu", teacher, [1, 2])
    with pytest.raises(ValueError, match="perturbed_copy: nodes=3 for a teacher of 3; it exists for 1 <= nodes < 3"):
        population.perturbed_copy(teacher, 3)
    with pytest.raises(ValueError, match="one_neuron: k=0"):
        population.one_neuron("erf", 0)
    with pytest.raises(ValueError, match="for gelu and k=2 the loss falls towards norm 50; no finite optimum"):
        population.one_neuron("gelu", 2)
    with pytest.raises(ValueError, match="warm_start: nodes=4; a student of the teacher's nodes has 1 to 3"):
        population.warm_start(teacher, 4)
    with pytest.raises(ValueError, match="phase_boundaries: k=1"):
        population.phase_boundaries(1)
    with pytest.raises(ValueError, match=r"classify: owns=0\.3"):
        population.classify(teacher, teacher, owns=0.3)
