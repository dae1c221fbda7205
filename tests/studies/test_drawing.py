"""`tsdyn study draw` draws again from measured.nc alone; `study run` takes seeds and the paths of files."""

import pytest
import torch
import xarray as xr
from PIL import Image
from tsdyn.analysis import style

import tsdyn
from tests.cases import small
from tests.rendering import faults
from tests.test_cli import command as command  # a fixture
from tsdyn import studies
from tsdyn.cli.run_commands import run_announced


def test_a_study_is_drawn_again_from_what_it_measured(command, tmp_path):
    run = tmp_path / "run"
    words = ["study", "run", "tian2020-recovery", "--scale", "smoke", "--seeds", "2", "-o", run, "--quiet"]
    assert command(*words, "--set", "training.epochs=1")[0] == 0
    first = {name: (run / name).read_bytes() for name in ("figure.pdf", "figure.png", "figure.txt")}
    assert b"n = 2 seeds" in first["figure.txt"]
    assert b"/Type3" not in first["figure.pdf"]
    for name in (*first, "experiment.toml"):
        (run / name).unlink()
    assert command("study", "draw", run)[0] == 0
    again = {name: (run / name).read_bytes() for name in first}
    assert again == first
    assert command("study", "draw", run, "--style", "talk", "-o", tmp_path / "talk.svg")[0] == 0
    assert "<text" in (tmp_path / "talk.svg").read_text(encoding="utf-8")
    widths = {}
    for name in style.NAMES:
        assert command("study", "draw", run, "--style", name, "--no-caption", "-o", tmp_path / f"{name}.png")[0] == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            widths[name] = image.width / 300
    assert widths["paper"] == pytest.approx(style.PAGE, abs=0.01)
    assert widths["talk"] > widths["notebook"] > widths["paper"]
    code, _, said = command("study", "draw", run, "--style", "poster")
    assert (code, "no style 'poster'; there are paper, talk, notebook" in said) == (2, True)
    code, _, said = command("study", "draw", tmp_path)
    assert (code, "measured.nc: no such file" in said) == (2, True)


def test_a_state_dict_is_named_by_its_path(command, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    words = ["study", "run", "tian2019-batchnorm-bias-vgg11", "--scale", "paper", "-o", tmp_path / "out"]
    assert command(*words, "--set", f"path={tmp_path / 'mine.pth'}", "--set", "name=mine")[0] == 0
    with xr.open_dataset(tmp_path / "out" / "measured.nc") as found:
        assert found.attrs["name"] == "mine"
        figure = studies.load("tian2019-batchnorm-bias-vgg11").draw(found.load())
    assert faults(figure) == []


def test_every_study_has_panels_that_take_measured_and_axes():
    for name in studies.names():
        panels = studies.load(name).PANELS
        assert panels
        assert all(callable(panel) for panel in panels.values())


@pytest.mark.parametrize(("again", "said"), [(None, False), (lambda seconds: 0.0, False), (lambda seconds: 2.0, True)])
def test_measuring_that_trains_again_is_announced(again, said, tmp_path, capsys):
    run_announced(small(training__epochs=1), tmp_path / "run", "cpu", False, again=again)
    assert (" of measuring" in capsys.readouterr().out) == said


@pytest.mark.parametrize("name", studies.names())
def test_the_number_of_seeds_can_be_set_of_every_study_that_runs(name):
    """As `tsdyn study run NAME --seeds N` sets it, at every scale, of every point of the sweep."""
    for scale, work in studies.load(name).EXPERIMENTS.items():
        if isinstance(work, tsdyn.Experiment):
            assert {len(point.seed_labels) for _, point in work.replace({"seeds": 3}).points()} == {3}, scale
