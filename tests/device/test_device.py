"""The device script runs to the end on a CPU, so that a GPU is needed for its numbers only."""

import json

import pytest
import torch

from tests.device import __main__ as script


@pytest.fixture(autouse=True)
def switches_restored():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    held = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, held, strict=True):
        switch.allow_tf32 = value


def test_it_runs_to_the_end_and_writes_both_files(tmp_path, capsys):
    assert script.main(["--device", "cpu", "--seconds", "8", "--no-tests", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "device.json").read_text())
    assert len(found["agreement"]) == 10
    assert all(off <= script.AGREEMENT for off in found["agreement"].values())
    rows = len(found["steps"]) + len(found["derivatives"]) + len(found["left_out"])
    assert rows == 2 * 2 * 5 + 2 * 4
    assert (tmp_path / "device.md").read_text().count("\n|") == len(found["agreement"]) + 6 + rows - len(
        found["left_out"]
    )
    assert "seed-steps per second" in capsys.readouterr().out


def test_what_is_off_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "compare", lambda found, clock, *, small: found.agreement.update(planted=1e-9))
    arguments = ["--device", "cpu", "--seconds", "0", "--no-tests", "--output", str(tmp_path)]
    assert script.main(arguments) == 1
    found = json.loads((tmp_path / "device.json").read_text())
    assert not found["steps"]
    assert len(found["left_out"]) == 2 * 2 * 5 + 2 * 4


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["--device", "cuda"])
    assert "--device cpu runs at small sizes" in capsys.readouterr().err
