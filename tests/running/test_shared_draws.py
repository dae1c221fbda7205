"""Points of one sweep that draw the same share it, and have the bits that each has alone."""

import numpy as np
import pytest

import tsdyn
from tests.cases import small
from tsdyn.experiment import parts
from tsdyn.running import members
from tsdyn.running.members import Members, Shared

FEW = {"training__epochs": 1, "training__steps_per_epoch": 2, "seeds": 2}
#: Swept key → values, and whether teachers and data are the same at all of them.
SWEPT = {
    "training.learning_rate": ([0.1, 0.2, 0.3], True),
    "student.scale": ([0.1, 0.2], True),
    "training.momentum": ([0.0, 0.5], True),
    "student.overrealization": ([1.0, 2.0], False),  # an augmented training set depends on it
    "student.activation": (["relu", "tanh"], False),  # the teacher has the student's unless it says its own
    "student.leak": ([0.1, 0.2], False),
    "teacher.polarity": ([0.0, 1.0], False),
    "data.std": ([1.0, 2.0], False),
    "data.noise": ([0.1, 0.2], False),
    "data.eval": ([100, 150], False),
    "training.loss": (["mse", "cross_entropy"], False),
}


@pytest.mark.parametrize("key", SWEPT)
def test_points_have_the_bits_that_each_has_alone(tmp_path, monkeypatch, key):
    values, same = SWEPT[key]
    drawn, draw = [], members.draw_teacher
    monkeypatch.setattr(members, "draw_teacher", lambda *given: drawn.append(given) or draw(*given))
    ds = tsdyn.run(small(**FEW).replace({"sweep": {key: values}}), tmp_path / "sweep").load()
    assert len(drawn) == 2 * (1 if same else len(values))
    for at, value in enumerate(values):
        alone = tsdyn.run(small(**FEW).replace({key: value}), tmp_path / str(at)).load()
        point = ds.isel({key.partition(".")[2]: at})
        for name in alone.data_vars:
            padded = alone[name].reindex({d: point[d] for d in alone[name].dims if d in point.coords})
            np.testing.assert_array_equal(point[name].values, padded.values, err_msg=name)


def keys_read(monkeypatch, sections, draw):
    """Keys of these sections of the experiment file that are read while `draw` is called."""
    read = set()
    for section in sections:
        get = section.__getattribute__

        def noting(self, name, get=get, section=section):
            if name in section.model_fields:
                read.add(f"{section.__name__}.{name}")
            return get(self, name)

        monkeypatch.setattr(section, "__getattribute__", noting)
    draw()
    return read


def test_all_that_draws_read_of_an_experiment_is_compared(monkeypatch):
    """What is read of training, student and record while teachers and data are drawn; other sections count whole."""
    theirs = Members(small(**FEW, data__noise=0.1, data__augment="agnostic"))
    assert theirs.drawn_by() is not None
    read = keys_read(
        monkeypatch,
        (parts.Training, parts.Student, parts.Record),
        lambda: (theirs.teachers, theirs.eval_probes, theirs.finite, theirs.trained_probes),
    )
    # observables decide whether the data's labels are kept, and these data have none
    compared = {"Student.activation", "Student.leak", "Training.loss", "Training.labels", "Record.observables"}
    assert {"Student.activation", "Training.loss"} <= read <= compared


def test_all_that_starts_read_of_an_experiment_is_compared(monkeypatch):
    """What is read while students are drawn: the whole of student, data, seeds and teacher is compared."""
    theirs = Members(small(**FEW, training__normalize=True, student__toward_weakest="adversarial"))
    _ = theirs.teachers
    assert theirs.started_by() is not None
    read = keys_read(monkeypatch, (parts.Training, parts.Record), lambda: theirs._starts)
    assert read == {"Training.normalize"}


def test_starts_are_handed_on_where_they_are_the_same(monkeypatch):
    drawn, draw = [], members.draw_student
    monkeypatch.setattr(members, "draw_student", lambda *given: drawn.append(given) or draw(*given))
    shared, ensembles = Shared(), []
    first = {"training.learning_rate": 0.1}
    for changes in (first, {"training.learning_rate": 0.2}, {"student.scale": 0.2}, {"training.normalize": True}):
        own = Members(small(**FEW).replace(changes))
        shared.hand_on(own)
        own.draw()
        own.advance(1)
        ensembles.append(own)
    assert len(drawn) == 2 * 3
    again = Members(small(**FEW).replace({"training.learning_rate": 0.2}))
    again.advance(1)
    assert again.ensemble.weights[0].equal(ensembles[1].ensemble.weights[0])  # those handed on were not trained
    monkeypatch.setattr(members, "KEPT_NUMBERS", 1)
    assert Members(small(**FEW)).started_by() is None


def test_files_and_modules_are_drawn_anew(tmp_path):
    teacher = tmp_path / "teacher.pt"
    import torch

    torch.save(tsdyn.Network([torch.ones(4, 10), torch.ones(6, 4)]).to_torch().state_dict(), teacher)
    of_file = small(**FEW).replace({"teacher.init": "file", "teacher.path": str(teacher)})
    assert Members(of_file).drawn_by() is None
    one, other, third = (Members(small(**FEW, dtype=dtype)) for dtype in ("float64", "float64", "float32"))
    shared = Shared()
    shared.hand_on(one)
    one.draw()
    shared.hand_on(other)
    assert other.finite is one.finite
    assert other.ensemble is not one.ensemble
    shared.hand_on(third)
    assert "teachers" not in vars(third)
