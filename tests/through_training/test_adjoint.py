"""The compiled adjoint is the general one to rounding, whatever is trained, and says where it is not taken."""

import functools
import logging

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tsdyn
from tests.comparing import last_digits
from tests.through_training.test_twins import tiny
from tsdyn.engine import compiled_adjoint, native
from tsdyn.engine.rule import Rule
from tsdyn.experiment.errors import ExperimentError
from tsdyn.networks.network import Network
from tsdyn.running.members import Members
from tsdyn.through_training import adjoint
from tsdyn.through_training.replay import Course

compiled = pytest.mark.skipif(
    native.load(compiled_adjoint.SOURCE, compiled_adjoint.Job) is None, reason="no compiler here"
)
ROOM = 1 << 28
#: Sums of some hundred products per number and step, over some tens of steps, relative to the largest number.
ROUNDING = 1e-11


@st.composite
def changes_of(draw):
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    fresh = draw(st.booleans())
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(2, 5))
    hidden = draw(st.lists(st.integers(2, 5), min_size=0, max_size=2))
    leak = draw(st.sampled_from([0.0, 0.3, 1.0]))
    steps, epochs = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rates = {"0": draw(st.sampled_from([0.05, 0.2])), "1": draw(st.sampled_from([0.02, 0.1]))}
    changes = {
        "teacher__widths": [inputs, *hidden, outputs],
        "student__overrealization": 2.0 if hidden else 1.0,
        "student__bias": draw(st.booleans()), "student__activation": "leaky_relu", "student__leak": leak,
        "student__init": "torch",
        "data__train": "fresh" if fresh else draw(st.integers(12, 30)), "data__eval": 5,
        "training__batch": draw(st.integers(1, 12)), "training__epochs": epochs, "training__steps_per_epoch": steps,
        "training__learning_rate": rates if epochs > 1 else 0.1,
        "training__momentum": momentum, "training__nesterov": momentum > 0 and draw(st.booleans()),
        # 2: of a step of rate 0.2 most of the weights are lost, which is not undone
        "training__weight_decay": (decay := draw(st.sampled_from([0.0, 0.1, 2.0]))),
        "training__decay_biases": decay == 0 or draw(st.booleans()),
        "training__loss": draw(st.sampled_from(["mse", "cross_entropy"])),
    }  # fmt: skip
    if draw(st.booleans()):
        changes["training__frozen"] = [draw(st.integers(1, len(hidden) + 1))]
    if draw(st.booleans()):
        changes["training__rates"] = [0.5 + layer for layer in range(len(hidden) + 1)]
    return changes


def gone_back(course, start, wanted, slope, room, rooms_taught):
    course.go_to(start, 0)
    kept = adjoint.forward_pass(course, room=room)
    end = kept.end
    taught = []
    if rooms_taught:
        wanted = adjoint.Wanted(
            wanted.learning_rate,
            of_target=lambda _, part, given: taught.append((part * given.input.sum(-1, True)).sum(1)),
        )
    sums = adjoint.reverse_pass(course, kept, slope.map(torch.clone), wanted)
    found = [*end.tensors(), *sums.start.tensors(), sums.learning_rate, sums.sample, sums.target, sums.input]
    return [t for t in [*found, sum(taught) if taught else None] if t is not None], kept.way


#: What the longer random search found: linear students whose training grows, beyond all numbers in the first example.
GROWING = {
    "student__overrealization": 2.0, "student__bias": False, "student__activation": "leaky_relu", "student__leak": 1.0,
    "student__init": "torch", "data__train": "fresh", "data__eval": 5, "training__epochs": 1,
    "training__steps_per_epoch": 6, "training__learning_rate": 0.1, "training__rates": [0.5, 1.5, 2.5],
}  # fmt: skip


@compiled
@settings(max_examples=60, deadline=None)
@given(changes=changes_of(), seed=st.integers(0, 99), recorded=st.booleans(), room=st.sampled_from([0, ROOM]))
@example(changes=GROWING | {"teacher__widths": [1, 5, 3, 3], "training__batch": 3}, seed=0, recorded=False, room=0)
@example(changes=GROWING | {"teacher__widths": [1, 2, 4, 2], "training__batch": 1}, seed=0, recorded=False, room=0)
def test_the_compiled_adjoint_is_the_general_one(changes, seed, recorded, room):
    e = tiny(**changes)
    course = Course(Members(e), e.training.epochs)
    start = course.state()
    draw = torch.Generator().manual_seed(seed)
    slope = start.map(lambda t: torch.randn(t.shape, generator=draw, dtype=t.dtype))
    if recorded and course.anchors:  # the replay goes on from recorded weights, which differ in rounding
        held = {}
        for epoch in range(1, e.training.epochs + 1):
            course.advance(course.per_epoch)
            held[epoch] = {n: t * (1 + 1e-12) for n, t in course.ensemble.values.items()}
        course.recorded = {epoch: held[epoch] for epoch in list(held)[::2]}
    finite = not course.fresh
    wanted = adjoint.Wanted(True, finite, finite, finite)

    def gone(way, begin=start):
        """What `gone_back` gives by one of the ways; None if it refuses since a derivative is not finite."""
        with pytest.MonkeyPatch.context() as patch:
            if way != "compiled":
                patch.setattr(adjoint, "not_compiled", lambda _: "compared")
            try:
                found, told = gone_back(course, begin, wanted, slope, room, course.fresh)
            except ExperimentError as error:
                if "is not finite" not in str(error):
                    raise
                return None
        assert told == way
        return found

    course.go_to(start, 0)
    assume(all(bool(t.isfinite().all()) for t in adjoint.forward_pass(course, room=room).end.tensors()))  # it lives
    mine, theirs = gone("compiled"), gone("general (compared)")
    assert (mine is None) == (theirs is None)
    if theirs is None:
        return
    assert len(mine) == len(theirs)

    @functools.cache
    def moved():
        """The general way from a start whose last digits are others: training that grows makes much of them."""
        begin = start.map(torch.clone)
        last_digits(begin.values)
        return gone("general (compared)", begin)

    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.shape == b.shape
        apart = float((a - b).abs().max())
        if apart > ROUNDING * max(1.0, float(b.abs().max())):
            # of a few dozen roundings per step, where the start was moved by one
            assert apart <= 100 * float((moved()[i] - b).abs().max())


@compiled
def test_bits_depend_neither_on_threads_nor_on_other_members():
    e = tiny(seeds=5, training__momentum=0.5)
    found = {}
    threads = torch.get_num_threads()
    for count, seeds in ((1, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4]), (1, [2])):
        torch.set_num_threads(count)
        try:
            course = Course(Members(e.replace({"seeds": seeds})), e.training.epochs)
            slope = course.state().map(torch.ones_like)
            sums = adjoint.reverse_pass(
                course, adjoint.forward_pass(course, room=ROOM), slope, adjoint.Wanted(sample=True)
            )
        finally:
            torch.set_num_threads(threads)
        place = seeds.index(2)
        found[count, len(seeds)] = [t[place] for t in [*sums.start.tensors(), sums.sample]]
    first, *rest = found.values()
    assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


@compiled
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"student__activation": "tanh"}, "not piecewise linear"),
        ({"training__method": "adam"}, "optimizer 'adam'"),
        ({"training__clip": 0.2}, "clipped"),
        ({"training__normalize": True}, "normalised"),
        ({"student__batch_norm": "before"}, "BatchNorm"),
        ({"training__method": "gd"}, "the whole training set is the batch"),
    ],
)
def test_result_and_log_say_which_adjoint_was_taken(changes, reason, tmp_path, caplog):
    tsdyn.run(tiny(seeds=1, **changes), tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="tsdyn"):
        found = tsdyn.sensitivity(tmp_path / "run", certificate=False)
    assert reason in found.attrs["adjoint"]
    assert found.attrs["adjoint"].startswith("general (")
    assert any(reason in record.getMessage() for record in caplog.records)


def test_without_compiled_code_the_general_adjoint_is_taken(tmp_path, monkeypatch):
    tsdyn.run(tiny(seeds=1), tmp_path / "run")
    first = tsdyn.sensitivity(tmp_path / "run", wrt=["start", "sample"], certificate=False)
    monkeypatch.setattr(compiled_adjoint.native, "load", lambda source, job: None)
    found = tsdyn.sensitivity(tmp_path / "run", wrt=["start", "sample"], certificate=False)
    assert found.attrs["adjoint"] == "general (no compiled code on this machine)"
    np.testing.assert_allclose(found["d_sample"], first["d_sample"], rtol=1e-10, atol=1e-14)


@compiled
def test_rows_outside_the_samples_are_refused():
    network = Network([torch.ones(1, 3, 2)[0].double()], [None])
    steps = compiled_adjoint.Steps(
        torch.zeros(1, 4, 2).double(), torch.zeros(1, 4, 3).double(), torch.full((1, 1, 2), 4), [0.1]
    )
    with pytest.raises(IndexError, match=r"samples: 0\.\.3"):
        compiled_adjoint.Passage(network, [{"weight_1": torch.ones(1, 3, 2).double()}], Rule(0.1), steps)
