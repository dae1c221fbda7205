"""The teacher of Tian et al. (2019), section 5: entries, biases, rows; nothing is tuned or scaled."""

import numpy as np
import pytest

from tests.cases import small
from tsdyn.experiment.errors import ExperimentError
from tsdyn.problem.teachers import draw_teacher

LUCK = {
    "teacher__init": "luck-matters",
    "teacher__widths": [20, 10, 15, 100],
    "teacher__polarity": 0.0,
    "data__std": 10.0,
}


def test_entries_biases_and_rows_are_the_papers():
    experiment = small(**LUCK)
    every = [draw_teacher(experiment, seed) for seed in range(20)]
    for network in every:
        for weight, bias in zip(network.weights, network.biases, strict=True):
            w, b = weight.numpy(), bias.numpy()
            assert set(np.unique(w)) <= {-0.5, -0.25, 0.0, 0.25, 0.5}
            assert len({row.tobytes() for row in w}) == len(w)
            assert w.any(1).all()
            assert (np.abs(b) <= 0.5).all()
    entries = np.concatenate([w.numpy().ravel() for net in every for w in net.weights])
    # entries are uniform over five values, of 20 inputs a zero row has probability 5^-20: five standard errors
    for value in (-0.5, -0.25, 0.0, 0.25, 0.5):
        assert abs((entries == value).mean() - 0.2) <= 5 * np.sqrt(0.2 * 0.8 / entries.size)
    biases = np.concatenate([b.numpy() for net in every for b in net.biases])
    assert abs(biases.mean()) <= 5 / np.sqrt(12 * biases.size)
    assert abs(biases.var() - 1 / 12) <= 5 * np.sqrt(1 / 180 / biases.size)  # var of u² about its mean is 1/180


def test_the_file_says_what_the_name_decides_and_reads_back():
    experiment = small(**LUCK)
    assert (experiment.teacher.bias, experiment.teacher.unit_norm, experiment.teacher.balanced) == (
        "uniform",
        False,
        False,
    )
    again = type(experiment).from_toml_text(experiment.to_toml())
    assert again.digest == experiment.digest


@pytest.mark.parametrize(("key", "value"), [("unit_norm", "every-layer"), ("bias", 0.3), ("balanced", True)])
def test_another_value_of_what_is_decided_is_refused(key, value):
    with pytest.raises(ExperimentError, match=f"teacher.{key} = .* init = 'luck-matters' is that of Tian"):
        small(teacher__init="luck-matters", **{f"teacher__{key}": value})
