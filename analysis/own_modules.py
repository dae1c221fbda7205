"""Rebuilds students and teachers that are modules of a user's own: made by her function, filled from the archive."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network
from tsdyn.observables.layers import evaluated, labelled, rows_of, traced
from tsdyn.problem.inputs import evaluation_inputs
from tsdyn.problem.teachers import draw_teacher

Maker = Callable[..., nn.Module]


@dataclass(frozen=True)
class Activations:
    """Activations of every layer of student and teacher on the evaluation set, each (sample, position·node)."""

    student: list[NDArray]
    teacher: list[NDArray]

    def pairs(self) -> Iterator[tuple[int, NDArray, NDArray]]:
        """(student layer, f, f*): hidden layers paired from the lowest, the output layer with the output layer."""
        hidden = zip(self.student[:-1], self.teacher[:-1], strict=False)
        for layer, (f, f_star) in enumerate(hidden, start=1):
            yield layer, f, f_star
        yield len(self.student), self.student[-1], self.teacher[-1]


def refuse_without_makers(experiment: Experiment, student: Maker | None, teacher: Maker | None, caller: str) -> None:
    """Raise ValueError unless a function is given for each module of the user's own, and only for those."""
    for who, part, make in (("student", experiment.student, student), ("teacher", experiment.teacher, teacher)):
        if part.module is not None and make is None:
            raise ValueError(
                f"{caller}: the {who} is a module of the user's own, {part.module}, and nothing is imported by reading "
                f"an archive; pass the function that makes it, {who}="
            )
        if part.module is None and make is not None:
            raise ValueError(
                f"{caller}: {who}= is given, and the archive's {who} is a network of tsdyn's; leave it out"
            )
    if experiment.student.module is None and experiment.teacher.module is not None:
        raise ValueError(
            f"{caller}: a network whose teacher is a module of the user's own is not rebuilt here; record "
            "cross_correlation along the run"
        )


def activations(
    experiment: Experiment,
    seed: int,
    numbers: Mapping[str, NDArray],
    *,
    student: Maker | None,
    teacher: Maker | None,
    samples: int | None,
) -> Activations:
    """Activations of the member of a seed with the recorded ``parameter`` (and ``teacher_parameter``) `numbers`.

    Raises:
        ValueError: if they are not as many as those of the module that a function makes.
    """
    assert student is not None
    x = torch.from_numpy(evaluation_inputs(experiment, seed)[:samples])
    learner = _filled(student, numbers["parameter"], experiment, seed, "student")
    if teacher is None:
        trace = draw_teacher(experiment, seed)
        assert isinstance(trace, Network)
        with torch.no_grad():
            taught = [f.numpy() for f in trace.trace(x).activations]
    else:
        made = _filled(teacher, numbers["teacher_parameter"], experiment, seed, "teacher")
        taught = _of_module(made, x, experiment.teacher.layers, "teacher")
    return Activations(_of_module(learner, x, experiment.student.layers, "student"), taught)


def _of_module(module: nn.Module, x: Tensor, names: tuple[str, ...] | None, whose: str) -> list[NDArray]:
    names = labelled(module, x[:2], names, caller="student_teacher", whose=whose)
    with evaluated(module), torch.no_grad():
        passed = traced(module, x, names)
    hidden = [rows_of(module.get_submodule(name), passed.activations[name]).flatten(1).numpy() for name in names[:-1]]
    return [*hidden, passed.output.numpy()]


def _filled(make: Maker, numbers: NDArray, experiment: Experiment, seed: int, who: str) -> nn.Module:
    """The module that `make` makes, with the recorded parameters and buffers."""
    part = getattr(experiment, who)
    arguments = dict(part.arguments or {}) if part.module is not None else {}
    takes = inspect.signature(make).parameters  # a partial's, too, which has its arguments bound already
    bound = make.keywords if isinstance(make, functools.partial) else {}
    arguments = {name: value for name, value in arguments.items() if name in takes and name not in bound}
    if "seed" in takes and "seed" not in {*arguments, *bound}:
        arguments["seed"] = seed
    with torch.random.fork_rng():
        module = make(**arguments)
    module = module.to(getattr(torch, experiment.dtype))
    if part.numbers is not None and numbers[part.numbers :].size and np.isnan(numbers[part.numbers :]).all():
        numbers = numbers[: part.numbers]  # padding beside larger modules of the same sweep
    held = Own(module).held
    here = sum(t.numel() for t in held.values())
    if here != numbers.size:
        raise ValueError(
            f"student_teacher: {who}= makes a module of {here} numbers, and the archive holds {numbers.size}; pass the "
            "function, with the arguments, that the run was made with"
        )
    ends = np.cumsum([t.numel() for t in held.values()])
    with torch.no_grad():
        for tensor, part in zip(held.values(), np.split(numbers, ends[:-1]), strict=True):
            tensor.copy_(torch.from_numpy(np.array(part)).reshape(tensor.shape))
    return module
