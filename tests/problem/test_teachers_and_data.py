import itertools

import numpy as np
import pytest
import torch

from tests.cases import small
from tsdyn import ExperimentError
from tsdyn.problem import inputs
from tsdyn.problem.students import draw_student
from tsdyn.problem.teachers import draw_teacher, orthonormal, separated_rows

CHOICES = (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(("rows", "columns"), [(24, 2), (50, 10), (4, 1), (200, 30)])
def test_separated_rows_are_distinct_nonzero_and_from_the_choices(rows, columns):
    drawn = separated_rows(np.random.default_rng(0), rows, columns, CHOICES)
    assert drawn.shape == (rows, columns)
    assert len(np.unique(drawn, axis=0)) == rows
    assert drawn.any(axis=1).all()
    assert np.isin(drawn, CHOICES).all()


@pytest.mark.parametrize("columns", [4, 12])
def test_separated_entries_are_uniform_over_the_choices(columns):
    rows = 600
    drawn = separated_rows(np.random.default_rng(1), rows, columns, CHOICES)
    counts = np.array([(drawn == c).sum() for c in CHOICES])
    expected = rows * columns / len(CHOICES)
    # five standard deviations of a binomial count; distinctness only lowers the scatter
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected * (1 - 1 / len(CHOICES)))).all()


def test_too_few_choices_say_how_many_rows_exist():
    with pytest.raises(
        ExperimentError, match="9 rows of 2 entries from 3 choices: only 8 distinct non-zero rows exist"
    ):
        separated_rows(np.random.default_rng(0), 9, 2, (-1.0, 0.0, 1.0))
    exhausted = separated_rows(np.random.default_rng(0), 8, 2, (-1.0, 0.0, 1.0, 1.0))
    assert len(np.unique(exhausted, axis=0)) == 8


@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (7, 3), (5, 5)])
def test_orthonormal(rows, columns):
    q = orthonormal(np.random.default_rng(0), rows, columns)
    gram = q @ q.T if rows <= columns else q.T @ q
    np.testing.assert_allclose(gram, np.eye(min(rows, columns)), atol=1e-14)


def test_teacher_of_the_released_experiment():
    teacher = draw_teacher(small(teacher__polarity=2.0), seed=5)
    first, second = teacher.weights
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    undivided = second * torch.arange(1, 5, dtype=torch.float64) ** 2
    # multiples of 1/4 again once the division is undone
    torch.testing.assert_close(undivided * 4, (undivided * 4).round(), rtol=0, atol=1e-14)
    assert all(torch.equal(b, torch.full_like(b, -0.1)) for b in teacher.biases)


def test_teacher_options():
    assert draw_teacher(small(teacher__bias=False), 0).biases == [None, None]
    ortho = draw_teacher(small(teacher__init="orthonormal"), 0).weights[0]
    torch.testing.assert_close(ortho @ ortho.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    loose = draw_teacher(small(teacher__init="gaussian", teacher__unit_norm=False, teacher__scale=3.0), 0)
    assert float(loose.weights[0].norm(dim=1).min()) > 2
    with pytest.raises(ExperimentError, match="12 orthonormal rows do not fit in 10 inputs"):
        draw_teacher(small(teacher__widths=[10, 12, 6], teacher__init="orthonormal"), 0)


def test_students_start_as_the_experiment_says():
    student = draw_student(small(student__scale=0.005), 0)
    assert student.widths == (10, 8, 6)
    numbers = torch.cat([w.flatten() for w in student.weights]) / 0.005
    assert abs(float(numbers.square().mean()) - 1) < 5 * (2 / len(numbers)) ** 0.5
    assert not any(b.any() for b in student.biases)
    assert draw_student(small(student__bias=False), 0).biases == [None, None]
    uniform = draw_student(small(student__init="torch"), 0)
    assert float(uniform.weights[1].abs().max()) <= 8**-0.5
    assert bool(uniform.biases[0].any())
    unit = draw_student(small(training__normalize=True), 0)
    torch.testing.assert_close(unit.weights[0].norm(dim=1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_inputs_have_the_law_they_name(law):
    experiment = small(data__law=law, data__std=1.5, data__eval=4000)
    x = inputs.evaluation_inputs(experiment, 0)
    n = x.size
    fourth = {"gaussian": 3.0, "uniform": 9 / 5}[law]
    assert abs(x.mean()) < 5 * 1.5 / n**0.5
    assert abs(x.var() - 1.5**2) < 5 * 1.5**2 * ((fourth - 1) / n) ** 0.5
    if law == "uniform":
        assert np.abs(x).max() <= 1.5 * 3**0.5


def test_streams_are_independent_and_keyed_by_seed_and_epoch_only():
    draws = {
        key: inputs.generator(*key).standard_normal(64)
        for key in itertools.product((0, 1, 2**40), inputs.STREAMS, (0, 1))
    }
    assert len({d.tobytes() for d in draws.values()}) == len(draws)
    np.testing.assert_array_equal(draws[1, "eval", 0], inputs.generator(1, "eval", 0).standard_normal(64))
    stacked = np.stack(list(draws.values()))
    off = np.corrcoef(stacked)[~np.eye(len(stacked), dtype=bool)]
    assert np.abs(off).max() < 6 / 64**0.5


@pytest.mark.parametrize("seed", [2**32, 3 * 2**32, 2**33 + 2, 10**12])
def test_large_seeds_share_no_stream_with_small_ones(seed):
    """numpy cuts a seed into words of 32 bits: its second word must not be taken for the name of a stream."""
    small_seeds = (seed % 2**32, seed // 2**32, 0, 1, 2, 3)
    held = {
        inputs.generator(low, stream, epoch).bytes(16)
        for low, stream, epoch in itertools.product(small_seeds, inputs.STREAMS, (0, 1, 2, 3))
    }
    mine = {inputs.generator(seed, stream, epoch).bytes(16) for stream in inputs.STREAMS for epoch in (0, 1)}
    assert len(mine) == 2 * len(inputs.STREAMS)
    assert not mine & held


def test_small_seeds_draw_what_they_always_drew():
    """Philox of SeedSequence((seed, position of the stream, epoch)), as archives of 0.1 were made."""
    for seed, stream, epoch in itertools.product((0, 7, 2**32 - 1), inputs.STREAMS, (0, 5)):
        key = np.random.SeedSequence((seed, inputs.STREAMS.index(stream), epoch))
        wanted = np.random.Generator(np.random.Philox(key)).bytes(32)
        assert inputs.generator(seed, stream, epoch).bytes(32) == wanted


def test_a_seeds_draws_do_not_depend_on_the_other_seeds_or_what_is_swept():
    alone, among = small(seeds=[7]), small(seeds=[3, 7, 9], teacher__polarity=0.0)
    np.testing.assert_array_equal(inputs.batch_indices(alone, 7, 2, 200), inputs.batch_indices(among, 7, 2, 200))
    assert torch.equal(draw_teacher(alone, 7).weights[0], draw_teacher(among, 7).weights[0])


def test_one_pass_uses_every_sample_at_most_once():
    experiment = small(data__train=100, training__batch=16).replace({})
    experiment = type(experiment)(**{k: v for k, v in experiment.as_dict().items() if k != "training"})
    experiment = experiment.replace({"training.epochs": 1})
    indices = inputs.batch_indices(experiment, 0, 1, 100)
    assert indices.shape == (100 // 16, 16)
    assert len(np.unique(indices)) == indices.size
    assert not np.array_equal(indices, inputs.batch_indices(experiment, 0, 2, 100))


def test_fresh_samples_do_not_depend_on_how_many_are_drawn_at_once():
    experiment = small(data__train="fresh")
    whole = np.concatenate(list(inputs.fresh_batches(experiment, 0, 1, steps_at_once=30)))
    pieces = np.concatenate(list(inputs.fresh_batches(experiment, 0, 1, steps_at_once=7)))
    np.testing.assert_array_equal(whole, pieces)
    assert whole.shape == (30, 16, 10)
    assert not np.array_equal(inputs.training_inputs(experiment, 0, 1), inputs.training_inputs(experiment, 0, 2))


def deep(**changes):
    """A teacher as the released multilayer experiment builds it, smaller."""
    released = {
        "teacher__widths": [10, 6, 5, 7, 4], "teacher__polarity": 0.5, "teacher__bias": "uniform", "data__std": 10.0,
        "teacher__unit_norm": "every-layer", "student__overrealization": 1.0, "student__init": "torch",
    }  # fmt: skip
    return small(**(released | changes))


def test_every_layer_is_normalized_with_its_bias():
    plain = draw_teacher(deep(teacher__unit_norm=False), 3)
    scaled = draw_teacher(deep(), 3)
    for w, b, w0, b0 in zip(scaled.weights, scaled.biases, plain.weights, plain.biases, strict=True):
        norm = w0.norm(dim=1)
        torch.testing.assert_close(w * norm[:, None], w0, rtol=0, atol=1e-15)
        torch.testing.assert_close(b * norm, b0, rtol=0, atol=1e-15)
        assert bool((b0.abs() <= 0.5).all())
        assert len(b0.unique()) == len(b0)
    # polarity divides the columns of every layer above the first
    for w0 in plain.weights[1:]:
        whole = w0 * torch.arange(1, w0.shape[1] + 1, dtype=torch.float64) ** 0.5
        torch.testing.assert_close(whole * 4, (whole * 4).round(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("samples", [150, 151])
def test_a_balanced_teachers_nodes_are_active_half_the_time_and_its_outputs_standard(samples):
    experiment = deep(teacher__balanced=True, data__eval=samples)
    teacher, before = draw_teacher(experiment, 3), draw_teacher(deep(data__eval=samples), 3)
    x = torch.from_numpy(inputs.evaluation_inputs(experiment, 3))
    trace = teacher.trace(x)
    for z in trace.preactivations[:-1]:
        # samples where every node below is inactive share one z; but for such ties exactly half are above
        above, below = (z > 1e-12).sum(0), (z < -1e-12).sum(0)
        assert bool((above <= samples // 2).all())
        assert bool((below <= samples // 2).all())
        assert bool((above == samples // 2).any())
    torch.testing.assert_close(trace.output.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(trace.output.var(0, correction=0), torch.ones(4, dtype=torch.float64))
    for w, w0 in zip(teacher.weights[:-1], before.weights[:-1], strict=True):
        assert torch.equal(w, w0)
    ratio = teacher.weights[-1] / before.weights[-1]
    finite = torch.isfinite(ratio)
    assert bool((ratio[finite] > 0).all())


def test_a_teacher_that_cannot_be_balanced_says_why():
    with pytest.raises(ExperimentError, match="tunes biases, and the teacher has none"):
        draw_teacher(deep(teacher__balanced=True, teacher__bias=False), 0)
    with pytest.raises(ExperimentError, match=r"outputs \[0, 1, 2, 3\] are constant over the evaluation set"):
        draw_teacher(deep(teacher__balanced=True, data__eval=1), 0)


def test_students_near_the_teacher():
    teacher = draw_teacher(deep(), 2)
    near = draw_student(deep(student__init="near-teacher", student__scale=1e-3), 2)
    noise = torch.cat([(s - t).flatten() for s, t in zip(near.weights, teacher.weights, strict=True)]) / 1e-3
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / len(noise)) ** 0.5
    plain = draw_student(deep(), 2)
    along = draw_student(deep(student__init="same-direction"), 2)
    for s, t, w, b, b_star in zip(
        along.weights, teacher.weights, plain.weights, along.biases, teacher.biases, strict=True
    ):
        torch.testing.assert_close(s.norm(), w.norm())
        torch.testing.assert_close(s / s.norm(), t / t.norm())
        torch.testing.assert_close(b / s.norm(), b_star / t.norm())
    signed = draw_student(deep(student__init="same-sign"), 2)
    for s, t, w in zip(
        [*signed.weights, *signed.biases], [*teacher.weights, *teacher.biases], [*plain.weights, *plain.biases],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(s.abs(), w.abs())
        assert bool((s * t >= 0).all())
        assert torch.equal(s[t == 0], w[t == 0])
    with pytest.raises(ExperimentError, match="starts from the teacher's parameters, so widths must agree"):
        small(student__init="same-sign")


def test_students_face_or_shun_the_weakest_teacher_node():
    weakest = draw_teacher(small(), 1).weights[0][-1]
    free = draw_student(small(), 1)
    for name, sign in (("adversarial", -1), ("helped", 1)):
        turned = draw_student(small(student__toward_weakest=name), 1)
        assert bool((sign * (turned.weights[0] @ weakest) >= 0).all())
        assert torch.equal(turned.weights[0].abs(), free.weights[0].abs())
        assert torch.equal(turned.weights[1], free.weights[1])


def test_shrink_scales_every_parameter():
    whole, small_one = draw_student(deep(), 0), draw_student(deep(student__shrink=0.1), 0)
    for a, b in zip([*whole.weights, *whole.biases], [*small_one.weights, *small_one.biases], strict=True):
        torch.testing.assert_close(a * 0.1, b, rtol=1e-15, atol=0)
    with pytest.raises(ExperimentError, match=r"training.normalize.*student.shrink"):
        deep(student__shrink=0.1, training__normalize=True)
