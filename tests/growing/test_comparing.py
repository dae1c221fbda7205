"""`tsdyn diff`: the keys, labels and variables that differ, and the largest difference of each variable."""

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tests.growing.test_adding import command
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.growing.adding import add
from tsdyn.growing.comparing import compare

FEW = small(
    seeds=2, training__epochs=2, training__steps_per_epoch=3, data__train=24, data__eval=20, teacher__widths=[5, 3, 2],
    record__observables=["mse", "weight"],
)  # fmt: skip


def test_two_archives_differ_by_what_was_changed(tmp_path, capsys):
    one = tsdyn.run(FEW, tmp_path / "a").load()
    more = {"seeds": [1, 2], "training.epochs": 3, "record.observables": ["mse", "weight", "A"]}
    other = tsdyn.run(FEW.replace(more), tmp_path / "b").load()
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.keys["training.epochs"] == (2, 3)
    assert found.labels == {"seed": ([0], [2]), "epoch": ([], [3])}
    assert found.variables == ([], ["A"])
    assert all(n.equal for n in found.numbers.values()), "seed 1 has the same numbers"
    changed = one.copy(deep=True)
    changed.weight[{"seed": 1, "epoch": 2, "layer": 0, "node": 1, "input_node": 3}] += 0.5
    changed.mse_eval[0, 0] = np.nan
    there = compare(one, changed)
    assert there.numbers["weight"].largest == pytest.approx(0.5, rel=1e-12)
    assert there.numbers["weight"].where == {"seed": 1, "epoch": 2, "layer": 1, "node": 1, "input_node": 3}
    assert (there.numbers["mse_eval"].missing, there.numbers["mse_eval"].largest) == (1, 0.0)
    assert not there.same
    assert compare(one, tsdyn.open(tmp_path / "a")).same
    code, said = command(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 0
    for part in ("training.epochs: 2 in A, 3 in B", "epoch: 3 only in B", "variables only in B: A", "equal where both"):
        assert part in said
    assert "nothing differs" in command(capsys, "diff", tmp_path / "a", tmp_path / "a")[1]
    (tmp_path / "e.toml").write_text(FEW.replace({"training.epochs": 9}).to_toml())
    assert command(capsys, "diff", tmp_path / "e.toml", tmp_path / "a")[1] == "training.epochs: 9 in A, 2 in B\n"
    with pytest.raises(DirectoryError, match="does not exist"):
        compare(tmp_path / "none", tmp_path / "a")
    xr.testing.assert_equal(other, tsdyn.open(tmp_path / "b").load())


def test_infinities_and_other_dimensions():
    a = xr.Dataset({"x": ("seed", [np.inf, 1.0, np.nan]), "y": ("seed", [1.0, 2.0, 3.0])}, {"seed": [0, 1, 2]})
    b = xr.Dataset({"x": ("seed", [np.inf, 3.0, np.nan]), "y": ("epoch", [1.0])}, {"seed": [0, 1, 2], "epoch": [0]})
    found = compare(a, b)
    assert (found.numbers["x"].largest, found.numbers["x"].where, found.numbers["x"].missing) == (2.0, {"seed": 1}, 0)
    assert found.numbers["y"].dims == (("seed",), ("epoch",))
    assert any("dimensions" in line for line in found.lines())


def test_show_tells_what_was_added_and_when(tmp_path, capsys):
    path = tmp_path / "run"
    tsdyn.run(FEW, path)
    tsdyn.run(FEW.replace({"training.epochs": 3, "seeds": 3}), path)
    add(path, ["A"], epochs=[1, 2])
    said = " ".join(command(capsys, "show", path)[1].split())  # lines are broken at the terminal's width
    at = [said.find(part) for part in ("epochs 3..3", "seed 2", "A measured afterwards, epochs 1..2")]
    assert 0 < at[0] < at[1] < at[2], said
    sweep = FEW.replace({"sweep": {"teacher.polarity": [0.0]}, "seeds": 1})
    tsdyn.run(sweep, tmp_path / "sweep")
    tsdyn.run(sweep.replace({"sweep": {"teacher.polarity": [0.0, 1.0]}}), tmp_path / "sweep")
    add(tmp_path / "sweep", ["A"])
    said = " ".join(command(capsys, "show", tmp_path / "sweep")[1].split())
    assert "teacher.polarity = 1.0" in said
    assert "A measured afterwards, in 2 of 2 points" in said
