"""A file without a checksum is opened by no command itself before a process of its own has read all of it."""

import contextlib
import lzma
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.archive.damage import damage
from tests.cases import small
from tests.problem.test_inputs import of_files
from tests.test_cli import command  # noqa: F401
from tsdyn.archive import integrity, netcdf, own_process, run_directory, states
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.growing import history
from tsdyn.running import added_seeds, runner
from tsdyn.running.interrupts import Stopped

FEW = {"seeds": 2, "record__observables": ["mse", "weight"], "training__epochs": 2}
LOOPING = Path(__file__).resolve().parent.parent / "data" / "looping-archive.nc.xz"


@pytest.fixture
def run(tmp_path):
    """A run without its checksum."""
    path = tmp_path / "run"
    tsdyn.run(small(**FEW), path)
    (path / "archive.nc.sha256").unlink()
    return path


@pytest.fixture
def crashing(monkeypatch):
    """The library crashes where it opens a file in a process of its own, and must open none to read it in this one."""
    opened, mine = netcdf._opened, os.getpid()

    def watched(path, mode):
        if mode == "r":
            assert os.getpid() != mine, f"{path} was opened"
            os.kill(os.getpid(), signal.SIGSEGV)
        return opened(path, mode)

    monkeypatch.setattr(netcdf, "_opened", watched)


@pytest.fixture
def tried(monkeypatch):
    """The files that processes of their own were asked to read."""
    found, reading = [], own_process.reading
    monkeypatch.setattr(own_process, "reading", lambda file, work: found.append(file) or reading(file, work))
    netcdf._unreadable.cache_clear()
    return found


def within(seconds, work):
    """The exit code of a fork that does this; the signal, negative, where it was ended."""
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the library's loops run no handler of Python
            signal.alarm(seconds)
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_archive_in_which_the_library_loops_is_refused(tmp_path, monkeypatch):
    """It was overwritten in its middle, and its checksum is gone; found by the trial `fuzz.archives`."""
    monkeypatch.setattr(own_process, "SECONDS", 0)  # the system counts whole seconds: one
    file = tmp_path / "archive.nc"
    file.write_bytes(lzma.decompress(LOOPING.read_bytes()))
    netcdf.refuse_foreign(file)

    def refused():
        with pytest.raises(ArchiveError, match=r"archive.nc: has no checksum beside it (.|\n)* put a whole copy"):
            tsdyn.open(file)
        (told,) = integrity.check(file)
        assert "and was not opened" in told

    assert within(40, refused) == 0


ASKED = {
    "open": lambda path: tsdyn.open(path),
    "open its file": lambda path: tsdyn.open(path / "archive.nc"),
    "open without comparing": lambda path: tsdyn.open(path, verify=False),
    "run again with more epochs": lambda path: tsdyn.run(small(**FEW | {"training__epochs": 6}), path),
    "run again with more seeds": lambda path: tsdyn.run(small(**FEW | {"seeds": 3}), path),
    "run again": lambda path: tsdyn.run(small(**FEW), path),
    "states": states.kept,
    "a state": lambda path: states.state_after(path, 2),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_crashes_the_library_is_refused_by_every_command(run, crashing, asked):
    with pytest.raises(ArchiveError, match=r"archive.nc: has no checksum beside it .*crashed \(SIGSEGV\); put a whole"):
        ASKED[asked](run)


def test_what_crashes_the_library_is_shown_validated_and_repaired_in_sentences(run, crashing, command):  # noqa: F811
    code, _, err = command("show", run)
    assert (code, len(err.splitlines())) == (1, 1)
    assert history._changes(run, swept=False) == []
    code, out, _ = command("validate", run)
    assert code == 1
    assert "has no checksum beside it (archive.nc.sha256) and was not opened" in out
    told = integrity.repair(run)
    assert "moved to damaged/" in told[0]
    assert "reading it crashes the library" in told[1]
    assert not (run / "archive.nc").exists()


def test_a_segment_that_crashes_the_library_is_neither_gone_on_from_nor_joined(tmp_path, monkeypatch, request):
    path = tmp_path / "run"
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(run_directory.RunDirectory, "consolidate", lambda *_: None)
    tsdyn.run(small(**FEW), path)
    monkeypatch.undo()
    for seal in (path / "segments").glob("*.sha256"):
        seal.unlink()
    request.getfixturevalue("crashing")
    with pytest.raises(ArchiveError, match=r"segments/epoch-0.*has no checksum beside it"):
        tsdyn.run(small(**FEW), path)
    with (
        run_directory.RunDirectory(path, small(**FEW)) as held,
        pytest.raises(ArchiveError, match=r"segments/epoch-0.*has no checksum beside it"),
    ):
        held.consolidate({})
    assert len(list((path / "segments").glob("*.nc"))) == 3


def test_a_whole_file_is_tried_once_and_one_with_its_checksum_never(tmp_path, run, tried):
    tsdyn.open(run).load()
    tsdyn.open(run).load()
    assert tried == [run / "archive.nc"]
    tsdyn.run(small(**FEW), tmp_path / "other").load()
    tsdyn.run(small(**FEW | {"training__epochs": 3}), tmp_path / "other").load()
    assert integrity.check(tmp_path / "other") == []
    assert tried == [run / "archive.nc"]


def test_an_index_is_no_proof_of_a_file_without_a_checksum(tmp_path, tried):
    """Whoever makes a file that crashes the library can make the index that lists it."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, sweep={"teacher.polarity": [0.0, 1.0]}), path)
    for seal in path.glob("*/archive.nc.sha256"):
        seal.unlink()
    tsdyn.open(path)
    listed = tsdyn.open(path)
    netcdf._unreadable.cache_clear()
    del tried[:]
    listed.mse_eval.load()
    assert sorted(tried) == sorted(path.glob("*/archive.nc"))


def test_what_needs_more_memory_than_the_file_warrants_is_refused(run, monkeypatch):
    def greedy(path):
        return bytes(own_process.BYTES + own_process.BYTES_PER_BYTE * path.stat().st_size)

    monkeypatch.setattr(netcdf, "_read_all", greedy)
    with pytest.raises(
        ArchiveError, match=r"archive.nc: has no checksum .* needed more memory than such a file warran"
    ):
        tsdyn.open(run)


def test_damage_that_the_library_reports_is_read_as_before(run, tmp_path):
    """One block of one variable: the others can be read."""
    whole = tsdyn.open(run).load()
    damage(run / "archive.nc", whole.weight.values[0, 0, 0, 0, :3])
    ds = tsdyn.open(run)
    np.testing.assert_array_equal(ds.mse_eval, whole.mse_eval)
    with pytest.raises(ArchiveError, match="weight cannot be read"):
        ds.weight.load()


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
def test_input_files_are_looked_up_in_no_file_that_differs_from_its_checksum(tmp_path, monkeypatch, finished, request):
    """Of a finished run that is asked for again, and of one that is to gain seeds."""
    experiment, path = of_files(tmp_path), tmp_path / "run"
    if finished:
        tsdyn.run(experiment, path)
    else:
        monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
        with pytest.raises(Stopped):
            tsdyn.run(experiment, path, progress=lambda *_: signal.raise_signal(signal.SIGTERM))
        monkeypatch.undo()
    for file in path.rglob("*.nc"):
        _flip(file)
    request.getfixturevalue("crashing")
    for asked in (experiment, experiment.replace({"seeds": [0, 1]})):
        with pytest.raises(ArchiveError, match="its checksum differs"):
            tsdyn.run(asked, path)


def test_seeds_that_another_command_joins_meanwhile_are_looked_at_again(tmp_path, monkeypatch):
    """This command looked at the run when it had two seeds, and its turn came when it had three."""
    more, path, look, trained = small(**FEW | {"seeds": 3}), tmp_path / "run", added_seeds.parts_of, []
    tsdyn.run(small(**FEW), path)

    def late(at, experiment):
        found = look(at, experiment)
        if at == path and not trained:
            trained.append(None)
            tsdyn.run(more, path)
        return found

    monkeypatch.setattr(added_seeds, "parts_of", late)
    found = tsdyn.run(more, path, progress=lambda *_: trained.append("the seeds that are there"))
    assert trained == [None]
    assert not (path / "added").exists()
    xr.testing.assert_equal(found.load(), tsdyn.run(more, tmp_path / "whole").load())


def test_another_experiment_is_still_refused_once(tmp_path, monkeypatch):
    """Nothing has changed there since it was looked at."""
    looks, look = [], added_seeds.parts_of
    tsdyn.run(small(**FEW), tmp_path / "run")
    monkeypatch.setattr(added_seeds, "parts_of", lambda *asked: looks.append(asked) or look(*asked))
    with pytest.raises(ArchiveError, match="holds another experiment"):
        tsdyn.run(small(**FEW | {"training__learning_rate": 0.5}), tmp_path / "run")
    assert len(looks) == 2


LOOKED = {
    "seeds that are there": (0, lambda path: added_seeds.parts_of(path, small(**FEW | {"seeds": 3}))),
    "input files": (1, lambda path: added_seeds.parts_of(path, small(**FEW | {"seeds": 3}))),
    "whether a state is kept": (2, lambda path: added_seeds.parts_of(path, small(**FEW | {"seeds": 3}))),
    "states": (0, states.kept),
    "a state": (0, lambda path: sorted(states.state_after(path, 2))),
}


@pytest.mark.parametrize("which", LOOKED)
def test_an_archive_that_is_moved_while_it_is_looked_at_is_looked_at_again(tmp_path, monkeypatch, which):
    """Without the lock, by a command that finds what there is; found by the state machine."""
    path, opened, looks = tmp_path / "run", netcdf._opened, []
    tsdyn.run(small(**FEW), path)
    at, look = LOOKED[which]
    expected = look(path)

    def late(file, mode):
        looks.append(file)
        if len(looks) != at + 1:
            return opened(file, mode)
        shutil.move(file, tmp_path / "aside")
        try:
            return opened(file, mode)
        finally:
            shutil.move(tmp_path / "aside", file)

    monkeypatch.setattr(netcdf, "_opened", late)
    assert look(path) == expected
    assert len(looks) > at + 1


def test_a_file_that_is_moved_while_it_is_tried_is_not_taken_for_proven(run, tmp_path, monkeypatch, tried):
    read = netcdf._read_all

    def late(path):
        shutil.move(path, tmp_path / "aside")
        read(path)

    with monkeypatch.context() as patch:
        patch.setattr(netcdf, "_read_all", late)
        with pytest.raises(FileNotFoundError):
            netcdf.refuse_unproven(run / "archive.nc")
    shutil.move(tmp_path / "aside", run / "archive.nc")
    netcdf.refuse_unproven(run / "archive.nc")
    assert len(tried) == 2
