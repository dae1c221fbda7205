"""Work in a process of its own: results, errors and limits come back, and a crash is an error."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import tsdyn
from tests import processes
from tests.cases import small
from tests.test_cli import command  # noqa: F401
from tsdyn.archive import integrity, joining, own_process
from tsdyn.archive.whole_files import ArchiveError, DirectoryError
from tsdyn.running import runner

FEW = {"seeds": 2, "record__observables": ["mse", "weight"], "training__epochs": 2}


class Unreadable(Exception):
    """An exception whose pickle cannot be read: its __init__ needs more than its text."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


def raising(error):
    def work():
        raise error

    return work


def test_what_the_work_returns_or_raises_comes_back():
    assert own_process.run(os.getpid) != os.getpid()
    assert len(own_process.run(lambda: b"x" * (1 << 20))) == 1 << 20  # more than a pipe holds
    with pytest.raises(DirectoryError, match=r"^that$"):
        own_process.run(raising(DirectoryError("that")))
    with pytest.raises(OSError, match="no space") as told:
        own_process.run(raising(OSError(28, "no space")))
    assert told.value.errno == 28
    # RuntimeError, unless dask has installed what pickles any exception (tblib)
    with pytest.raises((RuntimeError, Unreadable), match="this that"):
        own_process.run(raising(Unreadable("this", "that")))
    with pytest.raises(TypeError, match="cannot pickle"):
        own_process.run(threading.Lock)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_an_error_and_prints_nothing(number, capfd):
    with pytest.raises(own_process.Crashed, match=number.name):
        own_process.run(lambda: os.kill(os.getpid(), number))
    with pytest.raises(own_process.Crashed, match="exit code 7"):
        own_process.run(lambda: os._exit(7))
    assert capfd.readouterr() == ("", "")


def test_work_without_end_is_ended():
    with pytest.raises(own_process.Crashed, match=r"SIGXCPU|SIGKILL"):
        own_process.run(lambda: all(iter(int, 1)) or list(iter(int, 1)), seconds=0.5)


def test_the_process_ends_with_the_one_that_asked(tmp_path):
    """A writer that is killed leaves nobody behind who goes on writing."""

    def outlive():
        (tmp_path / "pid").write_text(str(os.getpid()), encoding="ascii")
        (tmp_path / "pid").rename(tmp_path / "there")
        time.sleep(2 * processes.HUNG)

    pid = os.fork()
    if not pid:
        own_process.run(outlive)
        os._exit(1)
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stat = Path(f"/proc/{(tmp_path / 'there').read_text(encoding='ascii')}/stat")
    until = time.monotonic() + processes.HUNG
    while stat.exists() and stat.read_text(encoding="ascii").split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_crash_while_joining_is_one_line_and_the_segments_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)  # so that there are segments to join
    whole = tsdyn.run(small(**FEW), tmp_path / "whole").load()
    with monkeypatch.context() as patch:
        patch.setattr(joining, "copy", lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
        with pytest.raises(ArchiveError, match=r"archive.nc: .* crashed .* \(SIGSEGV\).* committed is intact") as told:
            tsdyn.run(small(**FEW), tmp_path / "run")
    assert "\n" not in str(told.value)
    assert integrity.check(tmp_path / "run") == []
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for ds in (tsdyn.open(tmp_path / "run").load(), tsdyn.run(small(**FEW), tmp_path / "run").load()):
        assert all(ds[name].equals(array) for name, array in whole.data_vars.items())
    assert (tmp_path / "run" / "archive.nc").exists()


def test_a_crash_while_joining_is_an_exit_code_and_other_points_are_done(tmp_path, monkeypatch, command):  # noqa: F811
    copy, experiment = joining.copy, small(**FEW, sweep={"teacher.polarity": [0.0, 1.0]})

    def dying(parts, *rest):
        if "polarity=0.0" in str(parts[0].path):
            os.kill(os.getpid(), signal.SIGABRT)
        copy(parts, *rest)

    monkeypatch.setattr(joining, "copy", dying)
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    with pytest.raises(ArchiveError, match=r"1 of 2 points failed(.|\n)*polarity=0.0: .*SIGABRT"):
        tsdyn.run(experiment, tmp_path / "sweep")
    assert int((tsdyn.open(tmp_path / "sweep").coverage == 1).sum()) == 2
    (tmp_path / "sweep.toml").write_text(experiment.to_toml(), encoding="utf-8")
    code, _, complained = command("run", tmp_path / "sweep.toml", "-o", tmp_path / "sweep", "--quiet")
    assert (code, complained.count("SIGABRT"), complained.count("\n")) == (1, 1, 2)
