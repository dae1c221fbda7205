"""Signals, terminals, limits and neighbours: what a machine does to a run, and what the run makes of it."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

import tsdyn
from tests.cases import small
from tests.test_cli import command  # noqa: F401
from tsdyn import integrity
from tsdyn.experiment import Experiment
from tsdyn.members import Members

FEW = {"training__epochs": 3, "seeds": 2, "record__observables": ["mse", "weight"]}
TSDYN = str(Path(sys.executable).with_name("tsdyn"))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "small.toml").write_text(small(**FEW).to_toml(), encoding="utf-8")
    return tmp_path / "small.toml"


def shell(script, folder, **more):
    """Run by sh with ``$tsdyn``; (exit code, what it said)."""
    environment = {**os.environ, "tsdyn": TSDYN, **more}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


# --- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1])
def test_a_warning_commits_the_epoch_in_work_and_may_come_again(command, file, tmp_path, monkeypatch, number):  # noqa: F811
    """A dropped connection, the limit on processor time, a batch system: the kernel repeats SIGXCPU every second."""
    train = Members.train

    def interrupted(self, epoch):
        if epoch == 2:
            for _ in range(3):
                os.kill(os.getpid(), number)
        return train(self, epoch)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Members, "train", interrupted)
        code, _, err = command("run", file, "-o", tmp_path / "run", "--quiet")
    assert code == 128 + number
    assert "the same command goes on from there" in err
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2]
    assert signal.getsignal(number) == before
    ended = tsdyn.run(Experiment.from_toml(file), tmp_path / "run").load()
    xr.testing.assert_equal(ended, tsdyn.run(Experiment.from_toml(file), tmp_path / "whole").load())


def test_what_nohup_ignores_stays_ignored(file, tmp_path, monkeypatch):
    train = Members.train

    def interrupted(self, epoch):
        os.kill(os.getpid(), signal.SIGHUP)
        return train(self, epoch)

    monkeypatch.setattr(Members, "train", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert tsdyn.run(Experiment.from_toml(file), tmp_path / "run").sizes["epoch"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)


# --- what is printed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "streams",
    ["2> >(exec 0<&-)", ">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full | true"],
    ids=["stderr a closed pipe", "full disk", "closed", "all closed", "both"],
)
def test_a_run_goes_on_where_nothing_can_be_printed(file, tmp_path, streams):
    code, out, err = shell(f'"$tsdyn" run small.toml -o run {streams}; echo "code $?"', tmp_path)
    assert b"code 0" in out + err or (code == 0 and "|" in streams), (code, out, err)
    assert b"Traceback" not in err
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2, 3]
    assert integrity.check(tmp_path / "run") == []


def test_a_progress_that_cannot_print_is_dropped(tmp_path, caplog):
    def broken(*_):
        raise BrokenPipeError("nobody reads")

    assert tsdyn.run(small(**FEW), tmp_path / "run", progress=broken).sizes["epoch"] == 4
    assert caplog.text.count("goes on, without telling of its epochs: nobody reads") == 1


def test_a_reader_that_has_enough_is_no_error(file, tmp_path):
    tsdyn.run(small(**FEW), tmp_path / "run")
    code, _, err = shell('"$tsdyn" show run | true', tmp_path)
    assert (code, err) == (0, b"")
    code, out, err = shell('"$tsdyn" show run | head -n 1', tmp_path)
    assert (code, err, out.count(b"\n")) == (0, b"", 1)
    code, _, err = shell('"$tsdyn" show run > /dev/full', tmp_path)
    assert (code, err) == (1, b"tsdyn: standard output: No space left on device; what was to be printed is incomplete\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8_shows_what_it_can(tmp_path, encoding):
    tsdyn.run(small(**FEW), tmp_path / "run")
    for words in ("study list", "show run", "study show simsek2023-loss", "--help", "plot run"):
        code, out, err = shell(f'"$tsdyn" {words}', tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (code, err) == (0, b""), words
        assert out.decode(encoding)
