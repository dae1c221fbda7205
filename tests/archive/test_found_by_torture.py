"""What the state machine and the faults by number found, each as a fixed example."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tsdyn
from tests.archive.damage import FEW, SWEEP, damage, same, stop_after
from tests.cases import small
from tsdyn.archive import (
    file_images,
    hdf5,
    headers,
    integrity,
    lazy_arrays,
    made_files,
    netcdf,
    run_directory,
    small_files,
    whole_files,
)
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.running import runner
from tsdyn.running.interrupts import Stopped


def test_another_point_s_archive_is_not_gone_on_from(tmp_path):
    """With its own checksum beside it; before, the longer run had the other point's epochs under its own labels."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, training__epochs=2, sweep=SWEEP), path)
    for name in ("archive.nc", "archive.nc.sha256"):
        shutil.copy(path / "polarity=0.0" / name, path / "polarity=1.0" / name)
    longer = small(**FEW, training__epochs=3, sweep=SWEEP)
    with pytest.raises(
        ArchiveError, match=r"polarity=1\.0: .*holds a file of another run(.|\n)*teacher.polarity: 0.0 here, 1.0"
    ):
        tsdyn.run(longer, path)
    shutil.rmtree(path / "polarity=1.0")
    same(tsdyn.run(longer, path), tsdyn.run(longer, tmp_path / "whole"))


@pytest.mark.parametrize("which", [0, 1])
def test_another_run_s_segment_is_neither_gone_on_from_nor_joined(tmp_path, monkeypatch, which):
    """The one that training goes on from, and one before it."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory.RunDirectory, "consolidate", lambda *_: None)
        for rate in (0.02, 0.04):
            with pytest.raises(Stopped):
                tsdyn.run(small(**FEW, training__learning_rate=rate), tmp_path / str(rate), progress=stop_after(1))
    file = f"segments/epoch-{which:06d}-{which:06d}.nc"
    for name in (file, file + ".sha256"):
        shutil.copy(tmp_path / "0.04" / name, tmp_path / "0.02" / name)
    with pytest.raises(ArchiveError, match=r"holds a file of another run(.|\n)*training.learning_rate: 0.04 here"):
        tsdyn.run(small(**FEW, training__learning_rate=0.02), tmp_path / "0.02")


@pytest.mark.parametrize("said", [1, 4])
def test_an_archive_whose_experiment_file_says_other_epochs_is_extended_from_its_own(tmp_path, said):
    """A changed digit: before, the archive's file got the name of other epochs than it holds."""
    tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run")
    file = tmp_path / "run" / "experiment.toml"
    file.write_text(
        file.read_text(encoding="utf-8").replace("\nepochs = 2\n", f"\nepochs = {said}\n"), encoding="utf-8"
    )
    longer = small(**FEW, training__epochs=5)
    same(tsdyn.run(longer, tmp_path / "run"), tsdyn.run(longer, tmp_path / "whole"))
    assert integrity.check(tmp_path / "run") == []


def test_a_sweep_that_is_being_extended_is_whole(tmp_path):
    """Its second point is still that of the shorter sweep; before, it was no point of the sweep."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), path)
    with pytest.raises(Stopped):
        tsdyn.run(small(**FEW, training__epochs=3, sweep=SWEEP), path, together=False, progress=stop_after(2))
    assert integrity.check(path) == []


def test_what_a_killed_writer_left_in_a_sweep_s_folder_is_removed_by_repair(tmp_path):
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, training__epochs=1, sweep=SWEEP), path)
    (path / ".sweep.json.1234.tmp").write_text("{", encoding="ascii")
    assert [line.partition(": ")[2] for line in integrity.repair(path)] == ["removed; a write that was cut short"]
    assert not list(path.glob(".*"))


def test_a_salvaged_archive_that_is_extended_still_says_what_it_lost(tmp_path):
    whole = tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run").load()
    file = tmp_path / "run" / "archive.nc"
    damage(file, whole.weight.values[0, 0, 0, 0, :3])
    integrity.repair(tmp_path / "run")
    grown = tsdyn.run(small(**FEW, training__epochs=3), tmp_path / "run")
    assert "weight at seed" in grown.attrs["dropped"]
    assert any("was repaired; dropped: weight" in line for line in integrity.check(tmp_path / "run"))
    np.testing.assert_array_equal(grown.mse_eval[:, :3], whole.mse_eval)


def test_a_salvaged_run_that_was_opened_can_be_read_while_it_is_extended(tmp_path):
    """Before, it had no name by which its longer archive is known to hold the same epochs."""
    path = tmp_path / "run"
    whole = tsdyn.run(small(**FEW, training__epochs=2), path).load()
    damage(path / "archive.nc", whole.weight.values[0, 0, 0, 0, :3])
    before = tsdyn.open(path, verify=False)
    integrity.repair(path)
    lazy = tsdyn.open(path)
    tsdyn.run(small(**FEW, training__epochs=3), path)
    np.testing.assert_array_equal(lazy.mse_eval.values, whole.mse_eval.values)
    with pytest.raises(ArchiveError, match="open it again"):  # the salvaged one does not hold all that it held
        before.mse_eval.load()


@pytest.mark.parametrize("finished", [True, False])
def test_repair_keeps_a_whole_file_whose_checksum_was_lost(tmp_path, monkeypatch, finished):
    path = tmp_path / "run"
    if not finished:
        monkeypatch.setattr(run_directory.RunDirectory, "consolidate", lambda *_: None)
    tsdyn.run(small(**FEW, training__epochs=1), path)
    lazy = tsdyn.open(path)
    (seal, *_) = sorted(path.rglob("*.sha256"))
    seal.unlink()
    (told,) = integrity.repair(path)
    assert "has no checksum beside it" in told
    assert "written anew" in told
    assert not (path / "damaged").exists()
    assert integrity.check(path) == []
    lazy.load()


@pytest.mark.parametrize("name", ["archive.nc.sha256", "archive.nc"])
def test_a_file_that_the_system_cannot_read_is_refused_in_a_sentence(tmp_path, name):
    path = tmp_path / "run"
    lazy = tsdyn.run(small(**FEW, training__epochs=1), path)
    (path / name).rename(path / "aside")
    (path / name).mkdir()  # reading it is an error of the system, for root too
    with pytest.raises(ArchiveError, match=rf"{name}: cannot be read: "):
        tsdyn.open(path)
    if name == "archive.nc":
        with pytest.raises(ArchiveError):
            lazy.load()
    assert any(f"{name}: cannot be read" in line for line in integrity.check(path))


def test_a_file_that_cannot_be_closed_is_an_error(tmp_path, monkeypatch):
    """As on a file system that went away: `tests.torture` makes close(2) fail, here only what it leads to."""
    ds = tsdyn.run(small(**FEW, training__epochs=1), tmp_path / "run")
    closed = hdf5.closed
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "closed", lambda file: closed(file) and False)
        with pytest.raises(ArchiveError, match="cannot be closed: the file system fails"):
            ds.load()
    ds.load()


def test_a_segment_that_lacks_numbers_is_not_committed(tmp_path, monkeypatch):
    """Where memory ran out, the library gave a file without some of its numbers and no error; it was sealed."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(made_files, "_examples", {})  # in which numbers are exchanged without the library
    put, written = file_images.Image.put, []

    def losing(image, blocks):
        written.append(blocks[0].name)
        if written.count("mse_eval") != 3 or blocks[0].name != "mse_eval":
            put(image, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(file_images.Image, "put", losing)
        with pytest.raises(ArchiveError, match=r"epoch-000002-000002\.nc: mse_eval read back differently"):
            tsdyn.run(small(**FEW, training__epochs=3), tmp_path / "run")
    ds = tsdyn.open(tmp_path / "run").load()
    assert list(ds.epoch.values) == [0, 1]
    assert integrity.check(tmp_path / "run") == []
    same(tsdyn.run(small(**FEW, training__epochs=3), tmp_path / "run").sel(epoch=[0, 1]), ds)


def test_what_is_left_of_the_segments_of_a_finished_point_is_removed(tmp_path, monkeypatch):
    """Its writer was killed while it removed them; before, the point counted as finished, and they stayed."""
    longest = small(**FEW, training__epochs=3, sweep=SWEEP)
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)

    def killed(self):
        first = min((self.path / "segments").glob("*.nc"))
        first.unlink()  # its checksum not yet

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.RunDirectory, "_drop_segments", killed)
        whole = tsdyn.run(longest, tmp_path / "sweep").load()
    assert len(list((tmp_path / "sweep").rglob("epoch-*"))) > 2
    same(tsdyn.run(longest, tmp_path / "sweep"), whole)
    assert not list((tmp_path / "sweep").rglob("segments"))
    assert integrity.check(tmp_path / "sweep") == []


def _joined_aside(path):
    """Make a finished archive the first segment of a longer run, as an extension begins."""
    with run_directory.RunDirectory(path, small(**FEW, training__epochs=3)):
        pass


def _joined(path):
    """Join the segments of a run, as its last step does."""
    with run_directory.RunDirectory(path, small(**FEW, training__epochs=2)) as target:
        _, attrs = target.state()
        target.consolidate(attrs)


def _replaced(path):
    """Write the same archive anew, under other bytes of its own and another checksum."""
    shutil.rmtree(path)
    tsdyn.run(small(**FEW, training__epochs=2, record__state_every=1), path)


@pytest.mark.parametrize(
    ("module", "name", "writer"),
    [
        (netcdf, "_opened", _joined_aside),
        (hdf5, "opened", _joined_aside),
        (whole_files, "sealed", _joined_aside),
        (whole_files, "sealed", _replaced),
        (headers, "segments", _joined),
        (lazy_arrays, "_found_again", _joined_aside),
        (hdf5, "read_all", _joined_aside),
    ],
)
def test_a_reader_whose_files_are_moved_while_it_opens_them_reads_the_same(tmp_path, monkeypatch, module, name, writer):
    """The writer does its next step just before the reader's next call."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        if writer is _joined:
            patch.setattr(run_directory.RunDirectory, "consolidate", lambda *_: None)
            patch.setattr(runner, "COMMIT_SECONDS", 0.0)
        tsdyn.run(small(**FEW, training__epochs=2), path)
    whole = tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "whole").load()
    lazy = tsdyn.open(path)
    if name == "_found_again":  # the file that was opened is elsewhere, and moves again
        _joined_aside(path)
        writer = _joined_again
    whole_files._as_sealed.cache_clear()
    small_files._kept.clear()
    real, done = getattr(module, name), []

    def late(*given, **named):
        if not done:
            done.append(True)
            writer(path)
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, late)
        found = (lazy if name in ("_found_again", "read_all") else tsdyn.open(path)).load()
    assert done
    same(found, whole)


def _joined_again(path):
    tsdyn.run(small(**FEW, training__epochs=3), path)


def test_a_file_that_took_another_s_place_while_it_was_read_is_not_kept_under_its_name(tmp_path, monkeypatch):
    """It comes back: before, the other file's numbers were shown then."""
    one, other = (tmp_path / name for name in ("one", "other"))
    for path, rate in ((one, 0.02), (other, 0.04)):
        tsdyn.run(small(**FEW, training__epochs=1, training__learning_rate=rate), path)
    whole = tsdyn.open(one).load()
    lazy = tsdyn.open(one)
    real = hdf5.read_all

    def of_another(path, *rest):
        (one / "archive.nc").rename(tmp_path / "aside")
        shutil.copy(other / "archive.nc", one / "archive.nc")
        return real(path, *rest)

    monkeypatch.setattr(hdf5, "read_all", of_another)
    small_files._kept.clear()
    with pytest.raises(ArchiveError, match="its checksum differs"):
        lazy.compute()
    monkeypatch.setattr(hdf5, "read_all", real)
    (tmp_path / "aside").rename(one / "archive.nc")
    same(lazy.load(), whole)


def test_repair_moves_no_whole_file_that_the_experiment_file_disagrees_with(tmp_path):
    """The checksum is lost, and a digit of the experiment changed: either of the two can be the right one."""
    path = tmp_path / "run"
    whole = tsdyn.run(small(**FEW, training__epochs=1), path).load()
    (path / "archive.nc.sha256").unlink()
    text = (path / "experiment.toml").read_text(encoding="utf-8")
    (path / "experiment.toml").write_text(
        text.replace("learning_rate = 0.02", "learning_rate = 0.03"), encoding="utf-8"
    )
    with pytest.raises(ArchiveError, match=r"digest is not that of experiment\.toml; otherwise it is whole"):
        integrity.repair(path)
    assert not (path / "damaged").exists()
    (path / "experiment.toml").write_text(text, encoding="utf-8")
    assert len(integrity.repair(path)) == 1
    same(tsdyn.open(path), whole)
    assert integrity.check(path) == []


def test_a_file_that_differs_from_its_checksum_is_opened_by_no_command_itself(tmp_path, monkeypatch):
    """The library loops or crashes in some of them; `validate` looks in a process of its own."""
    path = tmp_path / "run"
    tsdyn.run(small(**FEW), path)
    file = path / "archive.nc"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    opened, mine = netcdf._opened, os.getpid()

    def watched(target, mode):
        assert os.getpid() != mine or mode != "r", f"{target} was opened"
        return opened(target, mode)

    monkeypatch.setattr(netcdf, "_opened", watched)
    assert any("its checksum differs" in told for told in integrity.check(path))
    for asked in (small(**FEW), small(**FEW | {"seeds": 3}), small(**FEW, training__epochs=6)):
        with pytest.raises(ArchiveError, match="its checksum differs"):
            tsdyn.run(asked, path)
    with pytest.raises(ArchiveError, match="its checksum differs"):
        tsdyn.open(path)


def test_attributes_that_cannot_be_read_are_an_error_of_the_archive():
    """netCDF4 raises AttributeError for those that are there and damaged."""

    class Damaged:
        def ncattrs(self):
            raise AttributeError("NetCDF: Can't open HDF5 attribute")

        def group(self):
            return SimpleNamespace(filepath=lambda: "run/archive.nc")

    with pytest.raises(ArchiveError, match=r"^run/archive.nc: not a readable netCDF file: NetCDF: Can't open HDF5"):
        netcdf.attributes(Damaged())


def test_what_is_salvaged_is_compared_with_what_was_read(tmp_path, monkeypatch):
    """The library reports some writes that fail at the next reading only, or not at all."""
    path = tmp_path / "run"
    tsdyn.run(small(**FEW), path)
    (path / "archive.nc.sha256").write_text("0" * 64 + "  archive.nc\n")
    before = netcdf.write_state

    def loses(nc, state, group):
        before(nc, state, group)
        nc["weight"][0] = 0.0

    monkeypatch.setattr(netcdf, "write_state", loses)
    told = integrity.repair(path)
    assert any(
        "nothing of it could be kept (weight at seed 0" in line and "reads back differently" in line for line in told
    )
    assert not (path / "archive.nc").exists()


def test_a_directory_in_which_another_command_begins_meanwhile_is_that_of_its_experiment(tmp_path, monkeypatch):
    """Its file was not there yet at the first look, and the directory was not empty at the second."""
    path = tmp_path / "run"
    tsdyn.run(small(**FEW), path)
    exists, looks = Path.exists, []

    def late(self):
        if self.name == run_directory.EXPERIMENT:
            looks.append(self)
            return exists(self) and len(looks) > 1
        return exists(self)

    monkeypatch.setattr(Path, "exists", late)
    assert run_directory._claimed(path, small(**FEW))
    assert len(looks) > 1


def test_an_unfinished_run_is_of_the_experiment_of_its_directory(tmp_path, monkeypatch):
    """It was extended, and its first segment names the shorter run: before, so did the Dataset, and its forks ended."""
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    longer = small(**FEW, training__epochs=5)
    tsdyn.run(small(**FEW, training__epochs=2), tmp_path / "run")
    with pytest.raises(Stopped):
        tsdyn.run(longer, tmp_path / "run", progress=stop_after(3))
    ds = tsdyn.open(tmp_path / "run")
    assert list(ds.epoch.values) == [0, 1, 2, 3]
    assert tsdyn.Experiment.from_toml_text(ds.attrs["experiment"]) == longer
    assert ds.attrs["digest"] == longer.digest
    assert list(tsdyn.fork(tmp_path / "run", at=3).epoch.values) == [3, 4, 5]
    tsdyn.run(longer.replace({"seeds": [7]}), tmp_path / "other")
    assert dict(tsdyn.open([tmp_path / "run", tmp_path / "other"]).mse_eval.sizes) == {"seed": 3, "epoch": 6}


def test_a_run_s_experiment_in_a_sweep_s_place_is_named_and_not_repaired(tmp_path):
    """`repair` took the directory for its own point and called itself until Python refused."""
    path = tmp_path / "sweep"
    tsdyn.run(small(**FEW, training__epochs=2, sweep=SWEEP), path)
    own, points = path / "experiment.toml", sorted(path.glob("*/archive.nc"))
    kept, numbers = own.read_text(), [point.read_bytes() for point in points]
    own.write_text(small(**FEW, training__epochs=2).to_toml())
    said = "sweeps nothing, although sweep.json is there: it is another's"
    assert [said in line for line in integrity.check(path)] == [True]
    with pytest.raises(ArchiveError, match=f"{said}; put the sweep's experiment file back"):
        integrity.repair(path)
    with pytest.raises(ArchiveError):
        tsdyn.open(path)
    own.write_text(kept)
    assert integrity.check(path) == []
    assert [point.read_bytes() for point in points] == numbers
