"""docs/reproduction.md says what was measured, and the list of studies the times that were."""

import json
import sys
from pathlib import Path

import pytest
from tsdyn.studies import catalogue

from tsdyn import studies

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import reproduction  # noqa: E402

MEASURED = json.loads((DOCS / "reproduction.json").read_text(encoding="utf-8"))
DESK = MEASURED["desk"]


def test_the_page_is_made_of_the_measurements():
    assert (DOCS / "reproduction.md").read_text(encoding="utf-8") == reproduction.page(MEASURED)


def test_every_measurement_says_what_made_it():
    for found in MEASURED["agreement"].values():
        assert found["command"].startswith("python -m tests.agreement ")
        assert found["date"]
        assert found["cpu_seconds"] >= 0
    assert json.dumps(MEASURED, allow_nan=False)


def test_a_difference_is_listed_as_open():
    """A made-up difference of three standard errors appears among those below .05, and as open."""
    rows = [dict(row) for row in MEASURED["agreement"]["two-layer"]["rows"]]
    for row in rows:
        row["p"] = None if row["p"] is None else 0.5
    assert "**Open:**" not in "\n".join(
        reproduction.SECTIONS["two-layer"]({**MEASURED["agreement"]["two-layer"], "rows": rows})
    )
    rows[-2]["p"] = 0.003
    told = "\n".join(reproduction.SECTIONS["two-layer"]({**MEASURED["agreement"]["two-layer"], "rows": rows}))
    assert f"1 of {sum(row['p'] is not None for row in rows)} are below .05" in told
    assert "**Open:**" in told


@pytest.mark.parametrize("name", DESK)
def test_a_desk_study_fits_a_small_machine_and_its_estimate_is_near(name):
    """Ten minutes of one thread (five of two) and 4 GB; time, memory and disk within a factor 1.5 of the estimate."""
    row = DESK[name]
    assert row["cpu_seconds"] < 600
    assert row["memory_mb"] < 4000
    told = row["estimated"]
    spare = 12  # starting Python, the estimate itself and drawing
    assert told["seconds"] / 1.5 - spare <= row["cpu_seconds"] <= 1.5 * told["seconds"] + spare
    assert told["memory_mb"] / 1.5 <= row["memory_mb"] * (1 << 20) / 1e6 <= 1.5 * told["memory_mb"]
    assert told["disk_mb"] / 1.5 <= row["disk_mb"] <= 1.5 * told["disk_mb"]
    assert catalogue.DESK_SECONDS[name] == round(row["cpu_seconds"])
    assert name in studies.names()


def test_a_regime_that_no_size_shows_is_listed_as_open():
    """Made-up counts: one average at each size, and none at the widest; more seeds are told as exceptions."""
    at = {"loss_copy_average": 1.0, "loss_perturbed_copy": 1.1, "index_copy_average": 0, "index_perturbed_copy": 0}
    rows = [{"n": n, "k": n + 4, "seeds": 20, "copy-average": 1, "perturbed-copy": 19, "other": 0} | at for n in (8, 9)]
    assert reproduction._still_higher(rows).startswith("**Open:**")
    rows[-1] |= {"copy-average": 0, "perturbed-copy": 20}
    more = rows[-1] | {"seeds": 100, "copy-average": 3, "perturbed-copy": 96, "other": 1}
    told = reproduction._still_higher([*rows, more])
    assert "Open" not in told
    assert "all of 20 seeds at n = 9, k = 13." in told
    assert "of 100 seeds at n = 9, k = 13 3 average and 1 end at neither" in told
