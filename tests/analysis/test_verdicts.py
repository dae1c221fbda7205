"""The audit as text: 80 columns, a line per claim and verdict, and why."""

import numpy as np
import xarray as xr
from tsdyn.analysis.audit import CLAIMS, VERDICTS
from tsdyn.analysis.verdicts import UNMET, lines


def made(verdict, used):
    names = [claim.name for claim in CLAIMS]
    shape = (len(names), 3)
    return xr.Dataset(
        {
            "verdict": (("claim", "seed"), np.full(shape, verdict)),
            "margin": (("claim", "seed"), np.full(shape, 0.5 if verdict in ("holds", "fails") else np.nan)),
            "source": ("claim", [claim.source for claim in CLAIMS]),
            "used": ("claim", [used or claim.says for claim in CLAIMS]),
        },
        {"claim": names},
    )


def test_every_claim_has_a_line_of_at_most_80_columns():
    words = {
        "holds": "largest margin 0.5", "fails": "largest margin 0.5", "reported": "", "unmet": "because ",
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


def test_reasons_are_of_claims():
    assert set(UNMET) <= {claim.name for claim in CLAIMS}
