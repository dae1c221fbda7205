"""Radii of the released two-layer configuration by steps: ``python -m tests.through_training.radii``.

Along random unit directions of the start, mean over seeds and both sides, and the one direction of BEYOND, section 1;
docs/how-to/sensitivity.md has the results.
"""

import torch
from tsdyn.studies.two_layer import PAPER

from tsdyn.through_training.blocks import Block, Job
from tsdyn.through_training.certificate import Direction, Reach, direction_of
from tsdyn.through_training.linearised import pushed

STEPS = (100, 1000, 3000)
#: The smaller side's after as many, BEYOND, section 1: "unit direction in θ_0".
REPORTED = (2.3e-5, 3.6e-6, 2.0e-6)
#: Name → changes of the experiment, seeds, and the parts of the start that are moved, one direction for each.
CASES = {
    "released": ({}, 16, ("", "weight_1", "weight_2", "bias_1")),
    "inputs of standard deviation 1": ({"data.std": 1.0}, 8, ("",)),
    "500 samples": ({"data.train": 500}, 8, ("",)),
    "Gaussian teacher without biases": ({"teacher.init": "gaussian", "teacher.bias": 0.0}, 8, ("",)),
    "PyTorch's start": ({"student.init": "torch"}, 8, ("",)),
    "teacher nodes of equal fan-out": ({"teacher.polarity": 0.0}, 8, ("",)),
}


def radii(changes, seeds, parts, drawn_by=0):
    """(steps, side, seed) of each part; torch's generator of the seed `drawn_by` draws the directions in turn."""
    size = {"seeds": seeds, "training.epochs": len(STEPS), "training.steps_per_epoch": STEPS[-1] // len(STEPS)}
    course = Block(Job(PAPER.replace(size | changes), len(STEPS), "loss_eval", ("start",), {})).course(recorded=False)
    start, draw = course.state(), torch.Generator().manual_seed(drawn_by)
    tangents = []
    for part in parts:
        drawn = {n: torch.randn(t.shape, generator=draw, dtype=t.dtype) * (part in n) for n, t in start.values.items()}
        length = torch.stack([t.flatten(1).norm(dim=1) for t in drawn.values()]).norm(dim=0)
        unit = {n: t / length.view(-1, *[1] * (t.ndim - 1)) for n, t in drawn.items()}
        tangents.append(start._replace(values=unit))
    reach = [Reach.whole(len(start.tensors()[0]), start.tensors()[0]) for _ in parts]
    found = [[] for _ in parts]
    course.go_to(start, 0)
    for count in range(1, STEPS[-1] + 1):
        before, given, rule = course.state(), course.given(count), course.rule(count)
        along = direction_of(course, Direction(), count)
        for i in range(len(parts)):
            tangents[i], hidden, _ = pushed(course.kind, before, tangents[i], given, along, rule, count)
            for value, dot in hidden:
                reach[i].see(value, dot)
            if count in STEPS:
                found[i].append(torch.stack([reach[i].plus, reach[i].minus]))
        course.advance(1)
    return [torch.stack(each) for each in found]


def told(found):
    """Means over the last dimension and their standard errors."""
    error = found.std(1) / found.shape[1] ** 0.5
    return ", ".join(f"{m:.2g} +- {e:.1g}" for m, e in zip(found.mean(1), error, strict=True))


def reported():
    """(steps,) of seed 0 along the direction of `torch.manual_seed(1)`, the smaller of both sides."""
    return radii({}, [0], ("",), drawn_by=1)[0].amin((1, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        for part, found in zip(case[2], radii(*case), strict=True):
            print(f"{name} {part or 'all'}: {told(found.flatten(1))}", flush=True)
    print(f"seed 0 along the direction of torch.manual_seed(1), the smaller side: {reported().tolist()}")
