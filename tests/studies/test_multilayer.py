"""The multilayer study is the released experiment: its rule step by step; its statistics take ``make multilayer``."""

import itertools

import numpy as np
import torch

from tsdyn import studies
from tsdyn.problem import inputs
from tsdyn.problem.students import draw_student
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running.members import Members

DESK = studies.load("tian2019-multilayer").EXPERIMENTS["desk"]


def test_an_epoch_is_the_released_codes():
    """torch.optim.SGD at the released rate 0.2 on the mean over samples and outputs, batch by batch."""
    short = {"sweep": {}, "seeds": 1, "dtype": "float64", "data.train": 640, "data.eval": 256}
    experiment = DESK.replace(short | {"student.overrealization": 2.0})
    teacher, theirs = draw_teacher(experiment, 0), draw_student(experiment, 0).to_torch()
    x = torch.from_numpy(inputs.training_inputs(experiment, 0))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.2)
    for rows in inputs.batch_indices(experiment, 0, 1, len(x)):
        optimizer.zero_grad()
        torch.nn.MSELoss()(theirs(x[rows]), teacher(x[rows])).backward()
        optimizer.step()
    members = Members(experiment)
    members.advance(1)
    ours = members.ensemble.network(0).to_torch()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    assert DESK.training.rate(20) / DESK.training.rate(21) == 2  # the released 0.2 and, from epoch 20 on, 0.1


def test_the_teacher_is_the_released_codes():
    experiment = DESK.replace({"sweep": {}, "dtype": "float64", "data.eval": 1000})
    teacher, x = draw_teacher(experiment, 1), torch.from_numpy(inputs.evaluation_inputs(experiment, 1))
    assert teacher.widths == (20, 10, 15, 20, 25, 100)
    assert abs(float(x.std()) - 10) < 5 * 10 / np.sqrt(2 * x.numel())
    trace = teacher.trace(x)
    for weight, z in itertools.islice(zip(teacher.weights, trace.preactivations, strict=True), 4):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)).double(), rtol=0, atol=1e-14)
        assert bool((((z > 1e-9).double().mean(0)) <= 0.5).all())
    torch.testing.assert_close(trace.output.std(0, correction=0), torch.ones(100).double())
