"""A sweep that gets epochs, an observable, seeds and swept values more, stopped in the middle of each."""

import os
import signal
import time

import pytest
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import small
from tsdyn.archive import integrity
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.growing import history
from tsdyn.growing.adding import add

ASKED = small(
    seeds=3, training__epochs=4, training__steps_per_epoch=2, data__train=16, data__eval=12, teacher__widths=[4, 3, 2],
    record__observables=["mse", "weight"], sweep={"training.learning_rate": [0.01, 0.05]},
)  # fmt: skip
#: What is asked for: first epochs and an observable, then seeds and values.
MORE = ["training.epochs=6", 'record.observables=["mse", "weight", "alignment"]']
MOST = [*MORE, "seeds=5", 'sweep={"training.learning_rate" = [0.005, 0.01, 0.05, 0.1]}']


def command(*words, stop_once=None, folder):
    """Run the command in `folder`; stopped by SIGTERM as soon as a file matches `stop_once`."""
    code = (
        "import sys; from tsdyn.running import runner; runner.COMMIT_SECONDS = 0.0; from tsdyn import cli; "
        "sys.argv[0] = 'tsdyn'; cli.main()"
    )
    with (folder / "said").open("w+", encoding="utf-8") as said:
        process = processes.Process(["python", "-c", code, *words], folder, {1: said.fileno(), 2: said.fileno()})
        while stop_once is not None and not process.ended:
            if any(folder.glob(stop_once)):
                os.kill(process.pid, signal.SIGTERM)
                break
            time.sleep(0.005)
        code = process.wait()
        said.seek(0)
        return code, said.read()


def test_what_was_added_is_what_one_run_from_the_start_gives(tmp_path):
    (tmp_path / "e.toml").write_text(ASKED.to_toml())
    tsdyn.run(ASKED, tmp_path / "runs" / "small")
    first = tsdyn.open(tmp_path / "runs" / "small")
    held = first.load()
    lazy = tsdyn.open(tmp_path / "runs" / "small")
    for more, middle, workers in (
        (MORE, "runs/small/learning_rate=0.05/segments/epoch-000005-*.nc", []),
        (MOST, "runs/small/learning_rate=0.05/added/segments/*.nc", ["--workers", 2]),
    ):
        words = ["run", "e.toml", "--quiet", *(word for text in more for word in ("--set", text))]
        code, said = command(*words, stop_once=middle, folder=tmp_path)
        assert code in (0, 143), said
        assert [line for line in integrity.check(tmp_path / "runs" / "small") if "cut short" not in line] == []
        xr.testing.assert_equal(lazy.load(), held)
        code, said = command(*words, *workers, folder=tmp_path)
        assert code == 0, said
    whole = tsdyn.run(
        ASKED.replace({
            "training.epochs": 6, "seeds": 5, "record.observables": ["mse", "weight", "alignment"],
            "sweep": {"training.learning_rate": [0.005, 0.01, 0.05, 0.1]},
        }), tmp_path / "whole",
    ).load()  # fmt: skip
    found = tsdyn.open(tmp_path / "runs" / "small").load()
    old = whole.learning_rate.isin([0.01, 0.05]) & (whole.seed < 3) & (whole.epoch <= 4)
    wanted = whole.assign(alignment=whole.alignment.where(~old))
    for name in wanted.data_vars:
        xr.testing.assert_equal(found[name].transpose(*wanted[name].dims), wanted[name])
    assert (found.coverage == 1).all()
    assert integrity.check(tmp_path / "runs" / "small") == []
    said = "\n".join(history.lines(tmp_path / "runs" / "small"))
    assert "epochs 5..6; alignment (recorded from epoch 5 on)" in said
    assert "seeds 3, 4; training.learning_rate = 0.005, 0.1" in said
    add(tmp_path / "runs" / "small", ["alignment"])
    measured = tsdyn.open(tmp_path / "runs" / "small")["alignment"]
    xr.testing.assert_equal(measured.transpose(*whole.alignment.dims).load(), whole.alignment)


def test_a_run_asked_for_swept_values_says_the_way_out_and_the_way_works(tmp_path):
    run = ASKED.replace({"sweep": {}, "seeds": 1, "training.epochs": 2})
    tsdyn.run(run, tmp_path / "a")
    swept = run.replace({"sweep": {"training.learning_rate": [0.02, 0.05]}})
    with pytest.raises(DirectoryError, match=r"new directory .* tsdyn.open"):
        tsdyn.run(swept, tmp_path / "a")
    tsdyn.run(run.replace({"sweep": {"training.learning_rate": [0.05, 0.1]}}), tmp_path / "b")
    both = tsdyn.open([tmp_path / "a", tmp_path / "b"])
    assert sorted(both.learning_rate.values) == [0.02, 0.05, 0.1]
    whole = tsdyn.run(run.replace({"sweep": {"training.learning_rate": [0.02, 0.05, 0.1]}}), tmp_path / "whole")
    xr.testing.assert_equal(both["weight"].load(), whole["weight"].load())
