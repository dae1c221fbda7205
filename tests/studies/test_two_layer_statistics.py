"""The released two-layer experiment, run with our own seeds, against the statistics of the released code.

One row of them in the suite, every row in `make long`.
"""

import json
import os

import numpy as np
import pytest
from tsdyn.analysis import specialization

import tsdyn
from tests.cases import REFERENCE

STATISTICS = json.loads((REFERENCE / "two_layer_statistics.json").read_text(encoding="utf-8"))
#: Student sizes and polarities.
ROWS = STATISTICS["rows"] if "TSDYN_LONG" in os.environ else STATISTICS["rows"][:1]
SEEDS = 16
#: Its numbers are given to five decimals.
ROUNDING = 0.5e-5


def two_layer(config, row):
    return tsdyn.Experiment(
        name="statistics",
        seeds=SEEDS,
        teacher={
            "widths": [config["d"], config["m"], config["C"]],
            "init": "separated",
            "choices": config["choices"],
            "polarity": row["polarity"],
            "bias": config["bias"],
        },
        student={"overrealization": row["overrealization"], "init": "gaussian", "scale": config["student_scale"]},
        data={"law": "gaussian", "std": config["std"], "train": config["train"], "eval": config["eval"]},
        training={k: config[k] for k in ("learning_rate", "batch", "steps_per_epoch", "epochs")},
        record={"every": 5, "observables": ["mse", "correlation"]},
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['overrealization']}x-polarity-{row['polarity']}")
def test_statistics_of_the_released_experiment(row, tmp_path):
    """Means within three standard errors, taken from both samples (8 and 16 seeds), and the reference's rounding."""
    config = STATISTICS["config"]
    ds = tsdyn.run(two_layer(config, row), tmp_path / "run")
    for stage, epoch in (("init", 0), ("epoch5", 5), ("last", config["epochs"])):
        at = tsdyn.layer(ds, 1).sel(epoch=epoch)
        measured = {
            "eval_loss": ds.mse_eval.sel(epoch=epoch),
            "mean_max_rho_eval": specialization.specialization(at).mean("teacher_node"),
            "covered_0.95_eval": specialization.recovered(at, threshold=0.95),
        }
        for quantity, values in measured.items():
            mean, deviation = row[f"{stage}.{quantity}"]
            ours = values.values.astype(float)
            assert ours.shape == (SEEDS,)
            error = np.sqrt(deviation**2 / row["seeds"] + ours.var(ddof=1) / SEEDS)
            assert abs(ours.mean() - mean) <= 3 * error + ROUNDING, (stage, quantity, ours.mean(), mean, error)
