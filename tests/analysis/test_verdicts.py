"""The audit as text: 80 columns, a line per claim and verdict, and why."""

import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis.audit import VERDICTS, audit
from tsdyn.analysis.theorems import CLAIMS
from tsdyn.analysis.verdicts import NEEDS, lines

import tsdyn
from tests.cases import small


def made(verdict, used, reason=""):
    names = [claim.name for claim in CLAIMS]
    shape = (len(names), 3)
    return xr.Dataset(
        {
            "verdict": (("claim", "seed"), np.full(shape, verdict)),
            "margin": (("claim", "seed"), np.full(shape, 0.5 if verdict in ("holds", "fails") else np.nan)),
            "reason": (("claim", "seed"), np.full(shape, reason)),
            "source": ("claim", [claim.source for claim in CLAIMS]),
            "used": ("claim", [used or claim.says for claim in CLAIMS]),
        },
        {"claim": names},
    )


def test_every_claim_has_a_line_of_at_most_80_columns():
    words = {
        "holds": "largest margin 0.5", "fails": "largest margin 0.5", "reported": "", "unmet": "needs ",
        "unrecorded": "record alignment, gradient_max",
    }  # fmt: skip
    assert set(words) == set(VERDICTS)
    for verdict, said in words.items():
        used = "record.observables lacks alignment, gradient_max; and more" if verdict == "unrecorded" else ""
        told = lines(made(verdict, used))
        assert max(map(len, told)) <= 80
        table = told[1 : told.index("")]
        assert len(table) == len(CLAIMS)
        for claim, line in zip(CLAIMS, table, strict=True):
            assert line.startswith(f"{claim.name} ")
            assert f"3 {verdict}" in line
            assert said in line
        assert all(any(claim.name in line for line in told[len(table) + 1 :]) for claim in CLAIMS)


def test_needs_are_of_claims_and_reasons_are_told_apart():
    assert set(NEEDS) == {claim.name for claim in CLAIMS}
    found = made("unmet", "", "the loss is cross entropy")
    found["reason"][0, 0] = ""
    first, second, *_ = lines(found)[1:]
    assert first.endswith(f"1 unmet        needs {NEEDS['Equation 1']}")
    assert second.endswith("2 unmet        because the loss is cross entropy")


BARRED = {
    "Theorem 1": ({"teacher__widths": [10, 1, 6]}, "the teacher has a single node"),
    "Theorem 2": ({"teacher__widths": [10, 4, 3, 6]}, "the student has 3 layers, not two"),
    "Theorem 4": ({}, "data.augment is 'none'"),
    "Theorem 5": ({}, "the student has two layers"),
    "update L*W*H* − LWH": ({"student__activation": "tanh"}, "σ = tanh is not piecewise linear"),
    "Equation 1": ({"training__loss": "cross_entropy"}, "the loss is cross entropy"),
    "Assumption 3": ({"student__batch_norm": "after"}, "there are convolutions or BatchNorm"),
    "BatchNorm keeps ‖w‖": ({}, "the student has no BatchNorm"),
}
RECORD = ["mse", "weight", "moments", "lemma1_residual", "alignment", "gradient_max", "observation", "conserved_norm"]


@pytest.mark.parametrize("claim", BARRED)
def test_a_reason_is_looked_up_in_the_experiment(claim, tmp_path):
    """Where a key is told to rule a hypothesis out, the check itself finds it unmet, for every claim and member."""
    changed, why = BARRED[claim]
    refused = "student__batch_norm" in changed or "student__activation" in changed  # by Lemma 1's residual
    record = ["mse", "weight", "conserved_norm"] if refused else RECORD
    quick = {"seeds": 1, "training__epochs": 1, "training__steps_per_epoch": 1, "data__train": 20, "data__eval": 20}
    ds = tsdyn.run(small(**quick, record__observables=record, **changed), tmp_path / "run")
    found = audit(ds)
    assert found.reason.sel(claim=claim).values.tolist() == [why]
    for each in CLAIMS:
        own = found.sel(claim=each.name)
        barred = each.barred(tsdyn.Experiment.from_toml_text(ds.attrs["experiment"]))
        assert not barred or set(own.verdict.values.tolist()) <= {"unmet", "unrecorded"}
        assert bool(((own.reason == "") | (own.verdict == "unmet")).all())
