"""Radii of the released two-layer configuration by steps: ``python -m tests.through_training.radii``.

Along random unit directions of the start, mean over seeds and both sides, and how many single ones of many directions
are those reported elsewhere; docs/how-to/sensitivity.md has the results.
"""

import torch
from tsdyn.studies.two_layer import PAPER

from tsdyn.through_training.blocks import Block, Job
from tsdyn.through_training.certificate import Direction, Reach, direction_of
from tsdyn.through_training.linearised import pushed

STEPS = (100, 1000, 3000)
#: After as many steps, BEYOND, section 1: "unit direction in θ_0".
REPORTED = (2.3e-5, 3.6e-6, 2.0e-6)
#: Random directions of all weights and biases, for the scatter of single ones.
DIRECTIONS = 6
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
    """(steps, side, seed) of each part, a draw of its own for each time that it is named."""
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


def distances(drawn, points):
    """Mahalanobis distance of some points, (coordinate, point), from the mean of what was drawn."""
    apart = points - drawn.mean(1, keepdim=True)
    return (apart * torch.linalg.solve(torch.cov(drawn), apart)).sum(0).sqrt()


def single(seeds):
    """What single directions of the released configuration say of the reported values."""
    sides = torch.cat([each.flatten(1) for each in radii({}, seeds, ("",) * DIRECTIONS)], 1)
    wanted = torch.tensor(REPORTED, dtype=sides.dtype)[:, None]
    reached, near = sides >= wanted, (sides / wanted - 1).abs() < 0.2
    counts = ", ".join(str(int(n)) for n in reached.sum(1))
    print(f"{DIRECTIONS} directions, {seeds} seeds, both sides: {told(sides)}")
    print(f"of {sides.shape[1]} sides {counts} reach the reported values, {int(reached.all(0).sum())} all of them;")
    print(f"{int(near.all(0).sum())} are within 20 % of all of them;")
    beside = ((sides[:, :, None] / sides[:, None, :] - 1).abs() < 0.2).all(0).sum(0) - 1
    print(f"a single one has {float(beside.double().mean()):.2f} others within 20 % at all three lengths, on average;")
    logarithms, reported = sides.log(), wanted.log()
    apart = distances(logarithms, logarithms)
    farther = float((apart > distances(logarithms, reported)).double().mean())
    print(f"{farther:.0%} are farther from the means than the reported values (Mahalanobis, of logarithms);")
    slow = float((sides[1] / sides[2] <= REPORTED[1] / REPORTED[2]).double().mean())
    print(f"{slow:.0%} fall as little from {STEPS[1]} to {STEPS[2]} steps", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        for part, found in zip(case[2], radii(*case), strict=True):
            print(f"{name} {part or 'all'}: {told(found.flatten(1))}", flush=True)
    single(16)
