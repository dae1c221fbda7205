"""A seed of a population flow or an online run has the bits that it has alone, whichever others run beside it."""

import numpy as np
import pytest

import tsdyn
from tsdyn.running.kinds import members_of

SEEDS = (0, 1, 2, 3, 4)
CHOICES = [(3,), (4, 1), (3, 2, 0)]


def flow(nodes, k, activation, inputs=None):
    return tsdyn.Experiment(
        kind="population-flow",
        name="flow",
        seeds=list(SEEDS),
        teacher={"widths": [inputs or k, k, 1], "init": "orthonormal"},
        student={"widths": [inputs or k, nodes, 1], "activation": activation},
        flow={"times": {"first": 0.1, "last": 3.0, "number": 3}},
    )


def online(inputs, nodes, k, activation, layers="first"):
    return tsdyn.Experiment(
        kind="online",
        name="online",
        seeds=list(SEEDS),
        teacher={"widths": [inputs, k, 1], "init": "gaussian"},
        student={"widths": [inputs, nodes, 1], "activation": activation},
        training={"learning_rate": 0.3},
        online={"noise": 0.1, "last": 0.25, "points": 3, "layers": layers},
    )


def parts(experiment):
    """Everything that is recorded and the state, by name: arrays (seed, ...)."""
    members = members_of(experiment)
    members.draw()
    found = {}
    names = ("weight", "population_loss") if experiment.kind == "population-flow" else experiment.record.observables
    if experiment.kind == "online":
        names = tuple(n + e for n in ("Q", "R", "outgoing", "eg") for e in ("", "_equation"))
    for step in range(len(experiment.labels)):
        if step:
            members.advance(step)
        found |= {f"{name} {step}": value for name, value in members.measure(step, names).items()}
    ended = experiment.last < len(experiment.labels) or experiment.student_widths[1] == 1  # others take seconds to end
    if ended and experiment.kind == "population-flow":
        members.advance(experiment.last)
    for kind in (members.constants, *((members.outcome,) if ended else ()), members.state):
        found |= {f"{name} {kind.__name__}": value for name, value in kind().items()}
    each = {f"{name} {i}": v for name, value in found.items() if isinstance(value, list) for i, v in enumerate(value)}
    return each | {name: value for name, value in found.items() if not isinstance(value, list)}


@pytest.mark.parametrize(
    "experiment",
    [flow(1, 2, "erf", 3), flow(3, 2, "erf"), flow(5, 7, "relu"),
     online(30, 2, 2, "erf"), online(501, 5, 3, "erf", "both")],
    ids=lambda e: f"{e.kind}-{e.student.activation}-{e.student.widths}",
)  # fmt: skip
def test_a_seed_has_the_bits_that_it_has_alone(experiment):
    whole = parts(experiment)
    assert any(np.isfinite(values).all() and np.ptp(values) for values in whole.values())
    for chosen in CHOICES:
        few = parts(experiment.replace({"seeds": list(chosen)}))
        rows = [SEEDS.index(seed) for seed in chosen]
        assert set(few) == set(whole)
        for name, values in whole.items():
            if np.ndim(values):  # the number of steps taken is that of all
                np.testing.assert_array_equal(few[name], values[rows], err_msg=f"{name} of seeds {chosen}")
