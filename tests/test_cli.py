import json
import re
from pathlib import Path

import pytest
import xarray as xr
from tsdyn.analysis.figures import FIGURES

import tsdyn
from tests.cases import small
from tsdyn import cli, studies
from tsdyn.archive import netcdf
from tsdyn.running import runner


@pytest.fixture
def command(capfd, monkeypatch):
    """The command as a user calls it: (exit code, printed, complained)."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["tsdyn", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(small().to_toml(), encoding="utf-8")
    return path


def test_run_show_plot_validate(command, file, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("run", file, "-o", run, "--set", "training.epochs=2")
    assert code == 0
    assert re.search(r"1 run, 3 members of 142 parameters; about \d+ MB of memory, \d\.\d MB of disk, \d+ s", out)
    assert [line.split()[1] for line in err.splitlines()] == ["0/2", "1/2", "2/2"]
    code, out, _ = command("show", run)
    assert code == 0
    assert "small" in out
    assert "correlation" in out
    assert "0..2, 3 recorded" in out
    code, out, _ = command("plot", run, "l-shape", "-o", tmp_path / "l.png")
    assert code == 0
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert command("validate", run)[:2] == (0, f"{run}: whole\n")


def test_a_sweep_says_which_point_it_is_at(command, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(small(sweep={"teacher.polarity": [0.0, 1.0]}, training__epochs=1).to_toml(), encoding="utf-8")
    code, out, err = command("run", file, "-o", tmp_path / "sweep")
    assert code == 0
    assert "2 runs, 6 members" in out
    assert "[2/2] polarity=1.0  epoch 1/1" in err
    assert command("run", file, "-o", tmp_path / "sweep", "--quiet") == (0, "", "")
    assert tsdyn.open(tmp_path / "sweep").sizes["polarity"] == 2


def test_workers_share_a_sweep_and_what_failed_is_listed(command, tmp_path):
    file = tmp_path / "sweep.toml"
    widths = [[10, 4, 6], [1, 20, 6], [10, 5, 6]]  # 20 separated rows of length 1 from 9 choices do not exist
    file.write_text(small(sweep={"teacher.widths": widths}, training__epochs=1).to_toml(), encoding="utf-8")
    code, out, err = command("run", file, "-o", tmp_path / "sweep", "--workers", 2)
    assert code == 1
    assert "3 runs, 6 members" in out
    assert "1 of 3 points failed, the others are done:\n  widths=1-20-6: " in err
    assert re.search(r"\[3/3\] widths=10-5-6  epoch 1/1  evaluation \S+  \(\d+%, \d+ s left\)", err)
    assert "(100%, 0 s left)" in err
    code, out, err = command("run", file, "-o", tmp_path / "sweep")  # only what failed is tried again
    assert code == 1
    assert "3 runs, 2 of them finished" in out
    assert "1 of 3 points failed" in err
    code, _, err = command("run", file, "-o", tmp_path / "sweep", "--scheduler", "nonsense://x")
    assert code == 2
    assert "scheduler nonsense://x: does not answer" in err


def test_deaths_are_said(command, tmp_path):
    file = tmp_path / "wild.toml"
    file.write_text(small(training__learning_rate=50.0).to_toml(), encoding="utf-8")
    code, _, err = command("run", file, "-o", tmp_path / "run")
    assert code == 0
    assert "seeds [0, 1, 2] became NaN or infinite and were stopped" in err.replace("\n", " ")
    assert "3 members became NaN" in command("show", tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "FILE", "--set", "training.epoch=2"], 2, "training.epoch: unknown key (did you mean 'epochs'?)"),
        (["run", "FILE", "--set", "training.epochs=two"], 2, "training.epochs = 'two': must be a valid integer"),
        (["run", "FILE", "--set", "training.epochs"], 2, "write KEY=VALUE"),
        (["run", "FILE", "--set", "a=[1,"], 2, "is not a TOML value"),
        (["run", "FILE", "--workers", "0"], 2, "workers = 0: at least 1"),
        (["run", "FILE", "--workers", "2", "--scheduler", "tcp://h:1"], 2, "not together with a scheduler's address"),
        (["run", "nowhere.toml"], 2, "nowhere.toml: cannot be read"),
        (["run", "FILE", "-o", "http://host/dir"], 2, "not a local path"),
        (["show", "nowhere"], 2, "nowhere: does not exist"),
        (["plot", "RUN", "pie-chart"], 2, "RUN: does not exist"),
        (["report", "nowhere"], 2, "nowhere: does not exist"),
        (["cite", "nowhere"], 2, "nowhere: does not exist"),
        (["audit", "nowhere"], 2, "nowhere: does not exist"),
        (["validate", "nowhere"], 2, "nowhere: does not exist"),
        (["study", "run", "tian2020-lshape"], 2, "did you mean 'tian2020-l-shape'?"),
        (["study", "run", "tian2020-l-shape", "--scale", "huge"], 2, "there are smoke, desk, paper"),
        (
            ["study", "run", "tian2019-batchnorm-bias", "--scale", "paper", "--workers", "2"],
            2,
            "--workers has no effect",
        ),
        (["study", "run", "tian2019-batchnorm-bias", "--scale", "paper", "--set", "seeds=1"], 2, "--set has no effect"),
        (["study", "run", "simsek2023-loss", "--scale", "smoke", "--set", "data.std=1"], 2, "does not know this key"),
        (["study", "run", "tian2020-l-shape", "--scale", "smoke", "--workers", "0"], 2, "workers = 0: at least 1"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_wrong_requests_exit_2_in_one_reading(command, file, words, code, message):
    got, _, err = command(*(file if w == "FILE" else w for w in words))
    assert got == code
    assert message in err.replace("\n", " ")


def test_a_device_that_is_not_there(command, file, monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    code, _, err = command("run", file, "--device", "cuda")
    assert code == 2
    assert "device 'cuda' is not there; this machine has cpu" in err
    with pytest.raises(runner.DeviceError, match="this machine has cpu"):
        tsdyn.run(small(), file.parent / "run", device="cuda:3")
    assert not (file.parent / "run").exists()


def test_a_figure_needs_its_variables(command, tmp_path):
    tsdyn.run(small(record__observables=["loss"], training__epochs=1), tmp_path / "run")
    code, _, err = command("plot", tmp_path / "run", "l-shape", "-o", tmp_path / "x.png")
    assert code == 2
    assert "the archive has no correlation, fanout_norm; record it: [record] observables" in err
    assert not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    sweep = {"student.overrealization": [1, 2], "zip": {"teacher.polarity": [0.0, 1.0], "data.std": [1.0, 1.5]}}
    path = tmp_path_factory.mktemp("cli") / "sweep"
    tsdyn.run(small(training__epochs=1, sweep=sweep, record__observables=["mse", "correlation"]), path)
    return path


def test_plot_lists_what_it_can_draw(command, swept):
    code, out, _ = command("plot", swept)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FIGURES)
    needs = {line.split()[0]: line.partition("(needs ")[2].rstrip(")") for line in out.splitlines()}
    assert needs["loss"] == ""
    assert needs["l-shape"] == "fanout_norm"
    assert needs["couplings"] == "A, H_star"
    code, _, err = command("plot", swept, "pie-chart")
    assert code == 2
    assert "no figure 'pie-chart'; there are l-shape" in err


def test_plot_selects_a_part(command, swept, tmp_path):
    picture = tmp_path / "new" / "c.svg"
    words = ["--select", "overrealization=2", "--select", "polarity=1.0", "--select", "seed=2", "--select", "epoch=0"]
    code, out, _ = command("plot", swept, "correlation", *words, "-o", picture)
    assert (code, out) == (0, f"{picture}\n")
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    for word, message in (
        ("polarity=3.0", "select: polarity has no [3.0]; it has [0.0, 1.0]"),
        ("seed=7", "--select seed=7: there is seed 0 to 2"),
        ("width=2", "no swept key 'width'"),
        ("depth=2", "--select depth=2: no 'depth'; there are"),
        ("seed", "--select seed: write KEY=VALUE, e.g. --select seed=0"),
    ):
        code, _, err = command("plot", swept, "correlation", "--select", word, "-o", tmp_path / "x.png")
        assert code == 2
        assert message in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["boundaries"], "record it: [record] observables = ['weight', 'fanout_norm']"),
        (["loss", "-o", "loss.gif"], "only boundaries move"),
        (["loss", "-o", "loss.docx"], "the figure cannot be written"),
        (["loss", "-o", "http://host/x.png"], "not a local path"),
    ],
)
def test_figures_that_cannot_be_drawn(command, swept, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("plot", swept, *words)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_report_and_cite(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    tsdyn.run(small(training__epochs=1, record__observables=["mse"]), run)
    code, out, _ = command("report", run, "--no-audit")
    assert (code, out) == (0, "report.html\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    code, out, _ = command("cite", run)
    assert code == 0
    assert out.count("@") == 2
    assert "9470--9480" in out
    (tmp_path / "taken").write_text("", encoding="utf-8")
    code, _, err = command("report", run, "-o", "taken/page.html", "--no-audit")
    assert code == 1
    assert "cannot be written" in err


def test_show_fits_a_screen_and_shows_any_file(command, swept, tmp_path):
    code, out, _ = command("show", swept)
    assert code == 0
    assert len(out.splitlines()) < 45
    assert max(map(len, out.splitlines())) <= 80
    assert "swept: overrealization" in out
    assert "4 of 4 points finished" in out
    measured = tsdyn.analysis.figures.measure_phase(tsdyn.open(swept))
    netcdf.write_dataset(tmp_path / "measured.nc", measured)
    code, out, _ = command("show", tmp_path / "measured.nc")
    assert code == 0
    assert "fraction" in out


def test_control_characters_do_not_reach_the_terminal(command, tmp_path):
    import netCDF4

    tsdyn.run(small(training__epochs=1), tmp_path / "run")
    with netCDF4.Dataset(tmp_path / "run" / "archive.nc", "a") as nc:
        nc.setncattr("name", "\x1b[31mred[bold]x[/bold]")
    assert "its checksum differs" in command("show", tmp_path / "run")[2]
    (tmp_path / "run" / "archive.nc.sha256").unlink()
    code, out, _ = command("show", tmp_path / "run")
    assert code == 0
    assert "\x1b[31m" not in out
    assert "[bold]" in out


def test_validate_names_what_is_wrong(command, tmp_path):
    import netCDF4

    tsdyn.run(small(training__epochs=1), tmp_path / "run")
    with netCDF4.Dataset(tmp_path / "run" / "archive.nc", "a") as nc:
        nc.setncattr("digest", "0" * 64)
        nc["weight"].setncattr("units", "kg")
    code, out, _ = command("validate", tmp_path / "run")
    assert code == 1
    assert "the archive's digest is not that of experiment.toml" in out
    assert "weight: attribute 'units' is 'kg'" in out


def test_audit_says_what_holds_and_what_to_record(command, tmp_path):
    tsdyn.run(small(record__observables=["mse", "lemma1_residual"]), tmp_path / "run")
    code, out, _ = command("audit", tmp_path / "run")
    assert code == 0
    assert "Lemma 1" in out
    assert "3 holds" in out
    assert "3 unrecorded" in out
    assert "unmet" in out


def test_version(command):
    assert command("--version")[:2] == (0, f"tsdyn {tsdyn.__version__}\n")


def test_studies_are_listed_and_shown(command):
    code, out, _ = command("study", "list")
    assert code == 0
    assert set(studies.names()) <= set(out.split())
    code, out, _ = command("study", "list", "--json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert set(listed) == set(studies.names())
    for name, row in listed.items():  # read from the source, without importing it
        module = studies.load(name)
        assert (row["title"], row["source"]) == (module.TITLE, module.SOURCE)
    code, out, _ = command("study", "show", "tian2020-recovery")
    assert code == 0
    assert "# --scale paper" in out


def test_keys_of_a_study_are_set_and_its_measurement_says_what_was_run(command, tmp_path):
    words = ["study", "run", "tian2020-l-shape", "--scale", "smoke", "-o", tmp_path / "run", "--quiet"]
    assert command(*words, "--set", "seeds=1", "--set", "training.epochs=1")[0] == 0
    with xr.open_dataset(tmp_path / "run" / "measured.nc") as measured:
        assert measured.sizes["seed"] == 1
        made_by = tsdyn.Experiment.from_toml_text(measured.attrs["experiment"])
    assert (made_by.training.epochs, made_by.digest) == (1, measured.attrs["digest"])


@pytest.mark.parametrize(("name", "along"), [("simsek2023-norms", "time"), ("goldt2019-eg", "alpha")])
def test_a_study_that_trains_nothing_is_run_and_read_like_any_other(command, tmp_path, name, along):
    run = tmp_path / "run"
    words = ["study", "run", name, "--scale", "smoke", "-o", run, "--set", "seeds=1"]
    code, out, err = command(*words)
    assert code == 0
    assert re.search(r"2 runs, 2 members of \d+ parameters; about \d+ MB of memory, \d\.\d MB of disk, \d+ s", out)
    assert re.search(rf"\[2/2\] .*  {along} (\d+)/\1  ", err)
    with xr.open_dataset(run / "measured.nc") as measured:
        made_by = tsdyn.Experiment.from_toml_text(measured.attrs["experiment"])
    assert (made_by.seeds, made_by.digest) == (1, measured.attrs["digest"])
    code, out, _ = command("show", run)
    assert (code, "2 of 2 points finished" in out, f"{along}s" in out) == (0, True, True)
    assert command("validate", run)[:2] == (0, f"{run}: whole\n")
    code, out, _ = command("audit", run)
    assert (code, "1 unmet" in out or "2 unmet" in out, re.search(r"\d (holds|fails|reported)", out)) == (0, True, None)
    assert "of students trained on" in " ".join(out.split())
    code, out, _ = command("cite", run)
    assert (code, {"simsek2023-norms": "simsek2023copy", "goldt2019-eg": "goldt2019dynamics"}[name] in out) == (0, True)
    assert command("plot", run)[0] == 0
    assert command("report", run, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{along}s" in page
    assert "2 of 2 points are finished" in page
    code, out, _ = command(*words)
    assert (code, "2 runs, finished" in out) == (0, True)


@pytest.mark.parametrize("name", ["flow-study-v2", "online-study-v2"])
def test_a_directory_of_a_study_of_0_1_is_shown_and_validated(command, name):
    path = Path(__file__).parent / "data" / name
    code, out, _ = command("show", path)
    assert (code, "loss" in out or "eg_equation" in out) == (0, True)
    assert command("validate", path)[:2] == (0, f"{path}: whole\n")
    code, _, err = command("study", "run", "simsek2023-norms", "--scale", "smoke", "-o", path)
    assert (code, "Give another directory with -o" in err) == (2, True)


def test_a_path_is_set_without_quotes(command, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(small(data__law="file", data__path="x.npy").to_toml(), encoding="utf-8")
    code, _, complained = command("run", file, "-o", tmp_path / "run", "--set", "data.path=/no/such-file.npy")
    assert (code, "/no/such-file.npy" in complained) == (2, True)
