"""Any experiment against training unrolled as one autograd graph: options in any combination, drawn by Hypothesis."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.through_training.test_twins import SAME, tiny, unrolled
from tsdyn import ExperimentError
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running.members import Members
from tsdyn.through_training.blocks import Job, compute

OPTIMIZERS = st.sampled_from([
    {"training__method": "sgd"}, {"training__method": "gd"}, {"training__momentum": 0.8},
    {"training__momentum": 0.6, "training__nesterov": True},
    {"training__method": "adam"}, {"training__method": "adamw"},
])  # fmt: skip

ACTIVATIONS = ("relu", "leaky_relu", "identity", "tanh", "softplus", "gelu", "erf")


@st.composite
def changes_of(draw):
    rates = draw(st.sampled_from([0.03, {"0": 0.05, "1": 0.02}, {"0": 0.02, "2": 0.01}]))
    fresh = draw(st.booleans())
    changes = {
        **draw(OPTIMIZERS),
        "teacher__widths": draw(st.sampled_from([[4, 2], [5, 3, 2], [4, 3, 3, 2]])),
        "student__activation": draw(st.sampled_from(ACTIVATIONS)),
        "student__batch_norm": draw(st.sampled_from(["none", "none", "before", "after"])),
        "student__bias": draw(st.booleans()), "student__init": draw(st.sampled_from(["gaussian", "torch"])),
        "data__train": "fresh" if fresh else draw(st.sampled_from([9, 30])), "data__eval": 10,
        "dtype": draw(st.sampled_from(["float64", "float64", "float32"])),
        "training__loss": draw(st.sampled_from(["mse", "cross_entropy"])),
        "training__weight_decay": (decay := draw(st.sampled_from([0.0, 0.1]))),
        "training__decay_biases": decay == 0 or draw(st.booleans()),
        "training__normalize": draw(st.booleans()), "training__clip": draw(st.sampled_from([None, 0.3])),
        "training__learning_rate": rates, "training__epochs": 3, "training__steps_per_epoch": draw(st.integers(1, 4)),
        # BatchNorm of two or three samples leaves gradients of the size of its eps, which Adam divides by
        "training__batch": draw(st.integers(5, 8)),
    }  # fmt: skip
    if changes.get("training__method", "").startswith("adam") and changes["student__batch_norm"] != "none":
        # a parameter that BatchNorm makes of no effect has a gradient of 0 in truth, 1e-17 in rounding; Adam divides
        # by that, and two ways to compute the same agree to 1e-17/1e-8
        changes["student__batch_norm"] = "after"
        if changes["student__activation"] == "identity":
            changes["student__activation"] = "tanh"
    if changes["training__clip"] is None:
        del changes["training__clip"]
    depth = len(changes["teacher__widths"]) - 1
    if depth > 1 and draw(st.booleans()):
        changes["training__frozen"] = [draw(st.integers(1, depth))]
    if draw(st.booleans()):
        changes["training__rates"] = [0.5 + layer for layer in range(depth)]
    if depth == 1:
        changes["student__overrealization"] = 1.0
    return changes


def test_any_combination_of_options_equals_the_unrolled_graph():
    seen = []

    @settings(max_examples=60, deadline=None)
    @given(changes=changes_of(), room=st.sampled_from([0, 1 << 28]))
    def check(changes, room):
        try:
            e = tiny(seeds=[3], **changes)
            Members(e).draw()
        except ExperimentError:
            return  # a combination that is refused
        seen.append(e)
        compare(e, room)

    check()
    assert len(seen) >= 40
    assert {e.student.batch_norm for e in seen} == {"none", "before", "after"}
    assert {e.dtype for e in seen} == {"float64", "float32"}
    assert {e.training.loss for e in seen} == {"mse", "cross_entropy"}
    assert {e.training.normalize for e in seen} == {True, False}


def compare(e, room):
    finite = e.data.train != "fresh"
    wrt = ("start", *(("sample", "target", "input") if finite else ()), "learning_rate")
    found = compute(Job(e, e.training.epochs, "loss_eval", wrt, {}, certificate=False, room=room))
    # in float64 from the numbers that were drawn in e.dtype; the evaluation's targets are never rounded
    teacher = draw_teacher(e, e.seed_labels[0]).to(torch.float64)
    value, slopes = unrolled(e, 0, target=lambda x: teacher(x))
    # a gradient that BatchNorm makes zero is rounding, which Adam divides by: what a start moved by rounding gives
    other, others = unrolled(e, 0, target=lambda x: teacher(x), moved=2**-52)
    assert abs(float(found.value[0]) - value) <= 1e-12 * max(1.0, abs(value)) + 4 * abs(other - value)
    scale = max(np.abs(s).max() for n, s in slopes.items() if n.startswith(("weight_", "bias_", "norm_")))
    for name, slope in slopes.items():
        kind, _, number = name.rpartition("_")
        if name in ("w", "x", "y"):
            mine, room_ = found.slopes[{"w": "d_sample", "x": "d_input", "y": "d_target"}[name]][0], np.abs(slope).max()
        elif kind == "rate":
            mine, room_ = found.slopes["d_learning_rate"][0, int(number) - 1], max(scale, np.abs(slope).max())
        else:
            layers = found.slopes["d_start" + ("" if kind == "weight" else f"_{kind}")]
            mine, room_ = layers[int(number) - 1][0], scale
        rounding = np.abs(others[name] - slope).max()
        assert rounding <= 1e-6 * room_, name
        assert np.abs(mine.reshape(-1) - slope.reshape(-1)).max() <= SAME * room_ + 4 * rounding, name


def test_batch_norm_of_nodes_that_hardly_vary_is_differentiated_too():
    """There the engine's step and the differentiated one are apart by roundings that a small variance enlarges."""
    changes = {"student__batch_norm": "before", "training__batch": 3, "student__activation": "tanh"}
    e = tiny(seeds=[0], teacher__widths=[5, 9, 4, 10, 3], training__epochs=1, training__steps_per_epoch=6, **changes)
    compare(e, 0)
