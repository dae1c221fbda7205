"""Radii of the released two-layer configuration by steps: ``python -m tests.through_training.radii``.

Along random unit directions of the start, mean over seeds and both sides; docs/how-to/sensitivity.md has the results.
"""

import torch
from tsdyn.studies.two_layer import PAPER

from tsdyn.through_training.blocks import Block, Job
from tsdyn.through_training.certificate import Direction, Reach, direction_of
from tsdyn.through_training.linearised import pushed

STEPS = (100, 1000, 3000)
#: Name → changes of the experiment, seeds, and the parts of the start that are moved, one direction for each.
CASES = {
    "released": ({}, 16, ("", "weight_1", "weight_2", "bias_1")),
    "inputs of standard deviation 1": ({"data.std": 1.0}, 8, ("",)),
    "500 samples": ({"data.train": 500}, 8, ("",)),
    "Gaussian teacher without biases": ({"teacher.init": "gaussian", "teacher.bias": 0.0}, 8, ("",)),
    "PyTorch's start": ({"student.init": "torch"}, 8, ("",)),
    "teacher nodes of equal fan-out": ({"teacher.polarity": 0.0}, 8, ("",)),
}


def radii(changes, seeds, parts):
    """(steps, side, seed) of each part."""
    size = {"seeds": seeds, "training.epochs": len(STEPS), "training.steps_per_epoch": STEPS[-1] // len(STEPS)}
    course = Block(Job(PAPER.replace(size | changes), len(STEPS), "loss_eval", ("start",), {})).course(recorded=False)
    start, draw = course.state(), torch.Generator().manual_seed(0)
    tangents = []
    for part in parts:
        drawn = {n: torch.randn(t.shape, generator=draw, dtype=t.dtype) * (part in n) for n, t in start.values.items()}
        length = torch.stack([t.flatten(1).norm(dim=1) for t in drawn.values()]).norm(dim=0)
        unit = {n: t / length.view(-1, *[1] * (t.ndim - 1)) for n, t in drawn.items()}
        tangents.append(start._replace(values=unit))
    reach = [Reach.whole(seeds, start.tensors()[0]) for _ in parts]
    found = {part: [] for part in parts}
    course.go_to(start, 0)
    for count in range(1, STEPS[-1] + 1):
        before, given, rule = course.state(), course.given(count), course.rule(count)
        along = direction_of(course, Direction(), count)
        for i, part in enumerate(parts):
            tangents[i], hidden, _ = pushed(course.kind, before, tangents[i], given, along, rule, count)
            for value, dot in hidden:
                reach[i].see(value, dot)
            if count in STEPS:
                found[part].append(torch.stack([reach[i].plus, reach[i].minus]))
        course.advance(1)
    return {part: torch.stack(each) for part, each in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        for part, found in radii(*case).items():
            sides = found.flatten(1)
            error = sides.std(1) / sides.shape[1] ** 0.5
            told = ", ".join(f"{m:.2g} +- {e:.1g}" for m, e in zip(sides.mean(1), error, strict=True))
            print(f"{name} {part or 'all'}: {told}", flush=True)
