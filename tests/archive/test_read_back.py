"""What a file that was just written is compared with: any number, epoch or state that differs is named."""

import pytest

import tsdyn
from tests.cases import FEW, small
from tsdyn.archive import joining
from tsdyn.archive.whole_files import ArchiveError

COMPARED = joining.differing_records


def changed(records, states):
    """What may differ of a file, each with the name under which it is to be found."""
    weight = [layer.copy() for layer in records["weight"]]
    weight[1][-1, -1, 0, 0] += 1e-12
    held = states["state"]
    yield {"epochs": True}, "epoch"
    yield {"records": records | {"mse_eval": -records["mse_eval"]}}, "mse_eval"
    yield {"records": records | {"weight": weight}}, "weight"
    yield {"states": {"state": {**held, "death_epoch": held["death_epoch"] + 1}}}, "death_epoch"
    yield {"states": {"state": {**held, "steps": held["steps"] + 1}}}, "state/steps"
    yield {"states": {"state": {name: array for name, array in held.items() if name != "steps"}}}, "state"
    yield {"states": {"state": held, "state_1": held}}, "state_1"


def test_whatever_differs_is_named(tmp_path, monkeypatch):
    found = []

    def compared(file, layout, epochs, dtype, records, states):
        for change, name in changed(records, states):
            other = [epoch + 1 for epoch in epochs] if "epochs" in change else epochs
            given = change.get("records", records), change.get("states", states)
            found.append((name, COMPARED(file, layout, other, dtype, *given)))
        return COMPARED(file, layout, epochs, dtype, records, states)

    monkeypatch.setattr(joining, "differing_records", compared)
    tsdyn.run(small(**FEW), tmp_path / "run")
    assert len(found) >= 7
    assert all(name == said for name, said in found), found


def test_what_reads_back_differently_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "differing_records", lambda *_: "weight")
    with pytest.raises(ArchiveError, match=r"weight read back differently .*nothing was added"):
        tsdyn.run(small(**FEW), tmp_path / "run")
    monkeypatch.undo()
    assert tsdyn.run(small(**FEW), tmp_path / "run").sizes["epoch"] == 4


def test_a_joined_archive_that_differs_from_its_segments_is_not_kept(tmp_path, monkeypatch):
    """Segments stay, and the same call joins them once the comparison holds."""
    from tsdyn.running import runner

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(joining, "differing", lambda *_: "death_epoch")
    with pytest.raises(ArchiveError, match="death_epoch"):
        tsdyn.run(small(**FEW), tmp_path / "run")
    assert not (tmp_path / "run" / "archive.nc").exists()
    monkeypatch.undo()
    assert tsdyn.run(small(**FEW), tmp_path / "run").sizes["epoch"] == 4
