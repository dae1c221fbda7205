"""Definitions 3–7 and the boundary jump behind Theorem 1."""

import math

import pytest
import torch

from tests.theory.test_theory import scaled_network
from tsdyn import Network, theory
from tsdyn.problem import augmentation
from tsdyn.theory import alignments


def nodes(weight, bias, outputs=2):
    weight = torch.tensor(weight, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    return Network(
        [weight, torch.randn(outputs, len(weight), generator=draw, dtype=torch.float64)],
        [torch.tensor(bias, dtype=torch.float64), None],
    )


def gaussian(samples, d, seed=0):
    return torch.randn(samples, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_scale_free_and_blind_to_orientation():
    teacher = nodes([[1.0, 0.0], [0.0, 2.0]], [0.5, -1.0])
    angle = 1e-11  # far below sqrt(eps), where 1 − cos² would be zero
    student = nodes(
        [[3.0, 0.0], [-2.0, 0.0], [math.cos(angle), math.sin(angle)], [1.0, 1.0], [0.0, 0.0]],
        [1.5, -1.0, 0.5, 0.0, 1.0],
    )
    eps = alignments.alignment(teacher, student)
    torch.testing.assert_close(eps[0, 0], torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(eps[0, 1], torch.tensor(0.0, dtype=torch.float64))
    assert float(eps[0, 2]) == pytest.approx(angle, rel=1e-4)
    assert float(eps[0, 3]) == pytest.approx(math.sqrt(0.5))
    assert float(eps[1, 0]) == pytest.approx(1.0)
    assert bool(torch.isnan(eps[:, 4]).all())
    assert alignments.separation(teacher) == pytest.approx(1.0)


def test_observers_count_boundary_samples_in_the_active_region():
    teacher = nodes([[2.0, 0.0]], [0.0])
    student = nodes([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]], [0.0, 0.0, 1.0])
    x = torch.tensor([[0.05, 1.0], [-0.05, 2.0], [0.09, -1.0], [0.5, -1.0]], dtype=torch.float64)
    kappa = alignments.observers(teacher, student, x, 0.1)
    torch.testing.assert_close(kappa, torch.tensor([[2 / 3, 1 / 3, 1.0]], dtype=torch.float64))
    assert bool(torch.isnan(alignments.observers(teacher, student, x, 1e-3)).all())
    torch.testing.assert_close(alignments.band_density(teacher, x, 0.1), torch.tensor([3 / 0.4], dtype=torch.float64))


def test_clusters_chain_colinear_nodes_and_cancel():
    student = nodes([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [3.0, 1e-9], [0.0, 0.0]], [1.0, -2.0, 0.0, 3.0, 1.0])
    assert alignments.clusters(student, 1e-6) == [[0, 1, 3], [2]]
    teacher = nodes([[0.0, 4.0]], [0.0])
    student.weights[1][:, 1] = 0
    student.weights[1][:, 3] = -student.weights[1][:, 0] / 3  # ‖w‖ = 1 and 3: Σ v‖w‖ = 0
    free, aligned = alignments.cluster_fanouts(teacher, student, 1e-6)
    assert free.total == pytest.approx(0, abs=1e-15)
    assert free.eps == pytest.approx(1.0)
    assert aligned.eps == pytest.approx(0.0)
    assert aligned.total == pytest.approx(float(student.weights[1][:, 2].norm()))


def test_augmentations_are_definition_7():
    teacher, x = scaled_network((4, 3, 2), "relu", 0.0, True, 1), gaussian(50, 4)
    eps, nodes_, c = 0.3, 7, 5.0
    step = 2 * eps / (c * nodes_**1.5)
    whole = augmentation.augment_agnostic(x, eps=eps, nodes=nodes_, c=c)
    assert len(whole) == (2 * 4 + 1) * 50
    torch.testing.assert_close(whole[:50], x)
    offsets = whole[50:].view(50, 8, 4) - x[:, None]
    axes = torch.eye(4, dtype=torch.float64) * step
    torch.testing.assert_close(offsets, torch.cat([axes, -axes]).expand(50, -1, -1), rtol=1e-12, atol=1e-14)
    near = alignments.boundary(teacher, x, eps)
    assert 0 < int(near.sum()) < near.numel()
    aware = augmentation.augment_aware(teacher, x, eps=eps, nodes=nodes_, c=c)
    assert len(aware) == 50 + 2 * int(near.sum())
    moved = aware[50:]
    distances = torch.cdist(moved, x).amin(1)
    torch.testing.assert_close(distances, torch.full_like(distances, step), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"c=0.0, .* must be above 0"):
        augmentation.augment_agnostic(x, eps=eps, nodes=3, c=0.0)


def test_eta_bounds_the_densities_and_mu_is_the_largest_second_moment():
    teacher, x = scaled_network((4, 3, 2), "relu", 0.0, True, 1), gaussian(4000, 4)
    eps = 0.2
    found = alignments.eta([teacher], x, eps)
    assert found >= float(alignments.band_density(teacher, x, eps).max()) - 5 / (eps * 4000)
    # the density of a unit Gaussian at its middle, both sides: 2/√2π; three deviations of a binomial count
    density = 2 / math.sqrt(2 * math.pi)
    assert found <= density + 4 * math.sqrt(density / (eps * 4000))
    u = torch.randn(4, dtype=torch.float64)
    u /= u.norm()
    assert alignments.mu(x) >= float(((x @ u) ** 2).mean()) - 1e-12


def test_the_boundary_jump_vanishes_for_observers_at_a_critical_point():
    """Theorem 1's mechanism on a trained net: at |g_1| ~ 1e-8 the jump is that small, and every teacher is found."""
    teacher, x = scaled_network((4, 3, 4), "relu", 0.0, True, 1), gaussian(1500, 4)
    start = scaled_network((4, 6, 4), "relu", 0.0, True, 2)
    free = [p.clone().requires_grad_(True) for p in (*start.weights, *start.biases)]
    target = teacher(x)

    def student(tensors):
        return Network(tensors[:2], tensors[2:])

    search = torch.optim.LBFGS(
        free, max_iter=4000, tolerance_grad=1e-13, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        loss = 0.5 * (student(free)(x) - target).square().sum(1).mean()
        loss.backward()
        return loss

    search.step(closure)
    found = student([p.detach() for p in free])
    g = float(theory.backpropagated_gradient(found, teacher, x, 1).abs().max())
    assert g < 1e-6
    jumps = alignments.jumps(teacher, found, tolerance=1e-3)
    seen = alignments.observers(teacher, found, x, 0.05) > 0
    assert bool(seen.any(1).all())
    assert float(jumps[seen].abs().max()) < 100 * g
    assert float(alignments.alignment(teacher, found).amin(1).max()) < 100 * g


def test_widths_and_depths_are_checked():
    two, three = scaled_network((4, 3, 2), "relu", 0.0, True, 1), scaled_network((5, 3, 3, 2), "relu", 0.0, True, 1)
    with pytest.raises(ValueError, match="the teacher takes 4 inputs, the student 5"):
        alignments.alignment(two, three)
    with pytest.raises(ValueError, match=r"cluster_fanouts: .* has 3 layers"):
        alignments.cluster_fanouts(two, three, 1e-3)
    with pytest.raises(ValueError, match=r"jumps: .* has 3 layers"):
        alignments.jumps(two, three, tolerance=1e-3)
