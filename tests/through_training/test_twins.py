"""Every optimizer, loss and option of the engine against training unrolled as one autograd graph."""

import numpy as np
import pytest
import torch

import tsdyn
from tests.through_training import twin
from tsdyn import Experiment
from tsdyn.problem.inputs import batch_indices
from tsdyn.running.members import Members

#: Relative to the largest derivative of a variable.
SAME = 1e-10


def tiny(**changes):
    base = Experiment(
        name="tiny",
        seeds=[3, 5],
        teacher={"widths": [5, 3, 2], "init": "gaussian"},
        student={"overrealization": 2.0, "scale": 0.4},
        data={"train": 30, "eval": 25},
        training={"epochs": 2, "steps_per_epoch": 6, "learning_rate": 0.1, "batch": 8},
        record={"observables": ["loss", "weight"]},
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


OPTIONS = {
    "sgd": {},
    "weight decay": {"training__weight_decay": 0.1},
    "momentum": {"training__momentum": 0.8},
    "momentum, decay of weights alone": {
        "training__momentum": 0.8, "training__weight_decay": 0.1, "training__decay_biases": False,
    },
    "nesterov": {"training__momentum": 0.8, "training__nesterov": True, "training__weight_decay": 0.05},
    "adam": {"training__method": "adam", "training__learning_rate": 0.02},
    "adam with decay": {"training__method": "adam", "training__learning_rate": 0.02, "training__weight_decay": 0.1},
    "adamw": {"training__method": "adamw", "training__learning_rate": 0.02, "training__weight_decay": 0.1},
    "gd": {"training__method": "gd"},
    "table of rates": {"training__learning_rate": {"0": 0.1, "1": 0.03}},
    "warm-up and cosine": {"training__warm_up": 1, "training__anneal": "cosine", "training__epochs": 3},
    "one pass over the data": {"training__steps_per_epoch": None},
    "rates of layers": {"training__rates": [0.5, 2.0]},
    "clip": {"training__clip": 0.2},
    "clip, momentum and decay": {"training__clip": 0.2, "training__momentum": 0.5, "training__weight_decay": 0.1},
    "frozen": {"training__frozen": [1]},
    "normalised rows": {"training__normalize": True},
    "cross entropy": {"training__loss": "cross_entropy"},
    "cross entropy with flips": {"training__loss": "cross_entropy", "data__flip": 0.3},
    "noise": {"data__noise": 0.3},
    "leaky": {"student__activation": "leaky_relu"},
    "tanh": {"student__activation": "tanh"},
    "erf": {"student__activation": "erf"},
    "softplus": {"student__activation": "softplus"},
    "gelu": {"student__activation": "gelu"},
    "no biases": {"student__bias": False},
    "deeper": {"teacher__widths": [5, 4, 3, 2], "student__init": "torch"},
    "fresh": {"data__train": "fresh"},
    "points added": {"data__augment": "agnostic", "data__train": 8},
    "batch norm before": {"student__batch_norm": "before"},
    "batch norm after, adam": {"student__batch_norm": "after", "training__method": "adam"},
    "convolutions": {
        "teacher__widths": [64, 2, 3], "teacher__convolution": True, "data__law": "digits",
        "student__batch_norm": "before", "training__epochs": 1, "training__steps_per_epoch": 3,
    },
}  # fmt: skip


def dropped(changes):
    """The experiment with these changes; a change to None leaves the key out."""
    given = {k: v for k, v in changes.items() if v is not None}
    made = tiny(**given)
    gone = [k.replace("__", ".") for k, v in changes.items() if v is None]
    if gone:
        plain = made.as_dict()
        for key in gone:
            section, name = key.split(".")
            del plain[section][name]
        made = Experiment.from_dict(plain)
    return made


def how_of(e):
    t = e.training
    return {
        "depth": len(e.student_widths) - 1, "activation": e.student.activation, "momentum": t.momentum,
        "weight_decay": t.weight_decay, "method": t.method, "nesterov": t.nesterov, "clip": t.clip,
        "rates": t.rates, "frozen": t.frozen, "normalize": t.normalize, "decay_biases": t.decay_biases,
        "loss": t.loss, "norm": e.student.batch_norm, "image": e.image, "padding": e.teacher.padding,
    }  # fmt: skip


def steps_of(e, members, position):
    seed, epochs = e.seed_labels[position], e.training.epochs
    for epoch in range(1, epochs + 1):
        if e.data.train == "fresh":
            for batches in members.stream(epoch)(slice(position, position + 1)):
                yield from ((epoch - 1, x[0].clone().double(), y[0].clone().double()) for x, y in batches)
        elif e.training.whole:
            yield from ((epoch - 1, None) for _ in range(e.steps))
        else:
            samples = len(members._finite_probes[position].inputs)
            yield from ((epoch - 1, torch.from_numpy(r)) for r in batch_indices(e, seed, epoch, samples))


def unrolled(e, position, target=None, moved=0.0):
    """The derivatives of one member by autograd through the unrolled graph; `target` gives those of the evaluation.

    Each number of the start is moved by up to so much of itself.
    """
    members = Members(e)
    members.draw()
    ensemble = members.ensemble
    draw, p = torch.Generator().manual_seed(0), {}
    for n, t in ensemble.values.items():
        step = torch.randint(-1, 2, t[position].shape, generator=draw).double()
        p[n] = (t[position].double() * (1 + moved * step)).requires_grad_()
    stats = {n: t[position].double() for n, t in ensemble.buffers.items()}
    x = y = w = None
    if e.data.train != "fresh":
        x, y = (t[position].double().clone().requires_grad_() for t in members.finite)
        w = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    rates = [
        torch.tensor(e.training.rate(k), dtype=torch.float64, requires_grad=True)
        for k in range(1, e.training.epochs + 1)
    ]
    how = how_of(e)
    end, stats = twin.trained(p, stats, x, y, w, rates, steps_of(e, members, position), how)
    probe = members.eval_probes[position]
    output, _ = twin.forward(end, stats, probe.inputs.double(), how, False)
    wanted = members.targets(position, probe.inputs).double() if target is None else target(probe.inputs.double())
    if target is not None and how["loss"] == "cross_entropy":
        wanted = torch.nn.functional.one_hot(wanted.argmax(1), wanted.shape[1]).double()
    value = twin.sample_losses(how["loss"], output, wanted).mean()
    leaves = {**p, **{f"rate_{k}": r for k, r in enumerate(rates, start=1)}}
    leaves |= {} if x is None else {"x": x, "y": y, "w": w}
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    zero = {n: torch.zeros_like(t) for n, t in leaves.items()}
    return float(value.detach()), {
        n: (zero[n] if g is None else g).numpy() for n, g in zip(leaves, slopes, strict=True)
    }


def close(found, wanted, scale):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= SAME * scale, (np.abs(found - wanted).max(), scale)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_the_unrolled_graph(option, tmp_path):
    e = dropped(OPTIONS[option])
    tsdyn.run(e, tmp_path / "run")
    finite = e.data.train != "fresh"
    wrt = ["start", "learning_rate", *(["sample", "target", "input"] if finite else [])]
    found = tsdyn.sensitivity(tmp_path / "run", "loss_eval", wrt=wrt, certificate=False)
    for position, seed in enumerate(e.seed_labels):
        value, slopes = unrolled(e, position)
        at = found.sel(seed=seed)
        assert float(at["value"]) == pytest.approx(value, rel=1e-12)
        scale = max(np.abs(s).max() for n, s in slopes.items() if "weight_" in n or "bias_" in n)
        for name, slope in slopes.items():
            kind, _, number = name.rpartition("_")
            if kind == "weight":
                flat = slope.reshape(len(slope), -1)
                close(at["d_start"].sel(layer=int(number)).values[: flat.shape[0], : flat.shape[1]], flat, scale)
            elif kind in ("bias", "norm_scale", "norm_shift"):
                close(at[f"d_start_{kind}"].sel(layer=int(number)).values[: len(slope)], slope, scale)
            elif kind == "rate":
                close(at["d_learning_rate"].sel(epoch=int(number)).values, slope, max(scale, np.abs(slope).max()))
        if finite:
            for variable, name in (("d_sample", "w"), ("d_target", "y"), ("d_input", "x")):
                mine = at[variable].transpose("sample", ...).values
                mine = mine[tuple(slice(n) for n in slopes[name].shape)]
                close(mine, slopes[name], np.abs(slopes[name]).max())
    assert float(found["replay_difference"].max()) <= 1e-12


def test_float32_runs_are_differentiated_in_float64_with_the_difference_reported(tmp_path):
    e = tiny(dtype="float32")
    tsdyn.run(e, tmp_path / "run")
    found = tsdyn.sensitivity(tmp_path / "run", wrt="start")
    assert found["d_start"].dtype == np.float64
    assert 0 < float(found["replay_difference"].max()) < 1e-5
    _, slopes = unrolled(e, 0)
    # the twin starts from the same float32 numbers and does not return to the recorded ones
    assert np.abs(found["d_start"].sel(seed=3, layer=1).values[:, :5] - slopes["weight_1"]).max() < 1e-4


def test_biases_that_batch_norm_subtracts_again_consist_of_rounding_and_are_no_other_run(tmp_path):
    """Their gradients are 0 but for rounding, and float32 rounds otherwise than the float64 in which it is repeated."""
    e = tiny(dtype="float32", student__batch_norm="before", training__batch=8)
    bias = tsdyn.run(e, tmp_path / "run")["bias"].sel(layer=1, epoch=2)
    assert 0 < float(abs(bias).max()) < 1e-6
    found = tsdyn.sensitivity(tmp_path / "run", wrt="start")
    assert bool(found["value"].notnull().all())
    assert float(found["replay_difference"].max()) < 1e-4


BY_HAND = [
    option for option in OPTIONS if "norm b" not in option and "norm a" not in option and option != "convolutions"
]


@pytest.mark.parametrize("option", BY_HAND)
def test_the_step_written_out_is_that_of_torch_func(option, monkeypatch):
    """Backwards and forwards, at one step with every part moved."""
    from tsdyn.through_training import linearised
    from tsdyn.through_training.replay import Course
    from tsdyn.through_training.steps import Inputs

    e = dropped(OPTIONS[option])
    members = Members(e)
    course = Course(members, e.training.epochs)
    draw = torch.Generator().manual_seed(0)

    def noise(t):
        return torch.randn(t.shape, generator=draw, dtype=torch.float64)

    course.advance(3)
    state, given, rule = course.state(), course.given(4), course.rule(4)
    slope, tangent = state.map(noise), state.map(noise)
    # moments and weights move along; second moments stay positive
    along = Inputs(*(noise(part) for part in given))
    found = {}
    for hand in (True, False):
        if not hand:
            monkeypatch.setattr(linearised, "by_hand", lambda kind, rule: False)
        assert linearised.by_hand(course.kind, rule) is hand
        back = linearised.pulled(course.kind, state, given, rule, 4, slope, ["rate", "weight", "target", "input"])
        forth = linearised.pushed(course.kind, state, tangent, given, along, rule, 4)
        tensors = [*back[0].tensors(), *back[1].tensors(), *back[2].values(), *forth[0].tensors()]
        found[hand] = [*tensors, *(t for pair in forth[1] for t in pair), *(forth[2] or ())]
    for mine, theirs in zip(found[True], found[False], strict=True):
        assert (mine - theirs).abs().max() <= 1e-11 * max(1.0, float(theirs.abs().max()))
