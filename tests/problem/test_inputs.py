"""Input files are identified by their content: in the attributes, on resuming, and within one process."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tsdyn
from tests.cases import cifar10, small
from tests.problem.test_images import mnist
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.problem import images, input_files
from tsdyn.problem.inputs import training_inputs
from tsdyn.running import runner

FEW = {"seeds": 1, "training__epochs": 2, "record__observables": ["mse", "weight", "correlation"]}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).state_dict()


def table(path, seed, rows=40):
    draw = np.random.default_rng(seed)
    np.savez(path, inputs=draw.standard_normal((rows, 4)), labels=np.arange(rows) % 3)


def of_files(folder, **changes):
    """An experiment that reads four files."""
    torch.save(network(1), folder / "teacher.pt")
    torch.save(network(2), folder / "student.pt")
    table(folder / "train.npz", 3)
    table(folder / "eval.npz", 4)
    named = {
        "teacher__widths": [4, 3, 3], "teacher__init": "file", "teacher__path": str(folder / "teacher.pt"),
        "teacher__activation": "relu",
        "student__init": "file", "student__path": str(folder / "student.pt"), "student__overrealization": 1.0,
        "data__law": "file", "data__path": str(folder / "train.npz"), "data__eval_path": str(folder / "eval.npz"),
        "data__train": 20, "data__eval": 10, "training__batch": 5,
    }  # fmt: skip
    return small(**(FEW | named | changes))


FILES = {
    "teacher.path": ("teacher.pt", lambda path: torch.save(network(9), path)),
    "student.path": ("student.pt", lambda path: torch.save(network(9), path)),
    "data.path": ("train.npz", lambda path: table(path, 9)),
    "data.eval_path": ("eval.npz", lambda path: table(path, 9)),
}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_archive_names_every_input_file_by_its_sha256(tmp_path):
    ds = tsdyn.run(of_files(tmp_path), tmp_path / "run")
    assert json.loads(ds.attrs["input_sha256"]) == {key: sha256(tmp_path / name) for key, (name, _) in FILES.items()}
    drawn = tsdyn.run(small(**FEW), tmp_path / "drawn")
    assert json.loads(drawn.attrs["input_sha256"]) == {}


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "finished"])
def test_another_input_file_is_refused_on_resume_with_both_named(tmp_path, monkeypatch, key, stopped):
    experiment = of_files(tmp_path)
    if stopped:
        monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)

        def stop(epoch, *_):
            if epoch == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tsdyn.run(experiment, tmp_path / "run", progress=stop)
    else:
        tsdyn.run(experiment, tmp_path / "run")
    longer = experiment.replace({"training.epochs": 4})
    name, change = FILES[key]
    file = tmp_path / name
    before, was = file.read_bytes(), sha256(file)
    change(file)
    with pytest.raises(ArchiveError, match="other input files") as refused:
        tsdyn.run(longer, tmp_path / "run")
    for word in (key, str(file), was, sha256(file)):
        assert word in str(refused.value)
    file.write_bytes(before)
    ended = tsdyn.run(longer, tmp_path / "run").load()
    xr.testing.assert_equal(ended, tsdyn.run(longer, tmp_path / "whole").load())


@pytest.mark.parametrize("swept", [False, True], ids=["run", "sweep"])
def test_a_finished_run_asked_for_again_with_another_input_file_says_so(tmp_path, caplog, swept):
    """Its archive is returned as it is: nothing is computed, and nothing is silent."""
    experiment = of_files(tmp_path)
    if swept:
        experiment = experiment.replace({"sweep": {"training.learning_rate": [0.01, 0.02]}})
    whole = tsdyn.run(experiment, tmp_path / "run").load()
    tsdyn.run(experiment, tmp_path / "run")
    assert not caplog.records
    name, change = FILES["teacher.path"]
    was = sha256(tmp_path / name)
    change(tmp_path / name)
    again = tsdyn.run(experiment, tmp_path / "run").load()
    xr.testing.assert_equal(again, whole)
    assert caplog.text.count("was computed from other input files than are there now") == (2 if swept else 1)
    for word in ("teacher.path", was, sha256(tmp_path / name)):
        assert word in caplog.text
    (tmp_path / name).unlink()  # nothing is known of a file that is not there
    caplog.clear()
    tsdyn.run(experiment, tmp_path / "run")
    assert not caplog.records


def test_a_missing_input_file_is_refused_on_resume(tmp_path):
    experiment = of_files(tmp_path)
    tsdyn.run(experiment, tmp_path / "run")
    (tmp_path / "teacher.pt").unlink()
    with pytest.raises(
        ArchiveError, match=r"teacher\.path: .*SHA-256 [0-9a-f]{64} of the committed epochs, missing now"
    ):
        tsdyn.run(experiment.replace({"training.epochs": 4}), tmp_path / "run")


def test_epochs_without_checksums_are_gone_on_with_and_that_is_said(tmp_path, caplog, monkeypatch):
    experiment = of_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(input_files, "ATTRIBUTE", "of_an_earlier_version")
        tsdyn.run(experiment, tmp_path / "run")
    tsdyn.run(experiment.replace({"training.epochs": 3}), tmp_path / "run")
    assert (
        "its committed epochs keep no checksums of teacher.path, student.path, data.path, data.eval_path" in caplog.text
    )


def test_a_file_that_changes_between_reading_and_the_first_commit_is_refused(tmp_path):
    experiment = of_files(tmp_path)

    def change(epoch, *_):
        if epoch == 0:
            FILES["teacher.path"][1](tmp_path / "teacher.pt")

    with pytest.raises(ArchiveError, match=r"teacher\.path"):
        tsdyn.run(experiment, tmp_path / "run", progress=change)


@pytest.mark.parametrize("folder", [True, False], ids=["a folder of files", "an earlier run"])
def test_of_several_files_the_checksum_is_that_of_sha256sum_s_lines(tmp_path, folder):
    if folder:
        mnist(tmp_path, zipped=True)
        experiment = small(
            teacher__widths=[784, 3, 10], data__law="mnist", data__path=str(tmp_path), data__train=10, data__eval=5,
            training__batch=5,
        )  # fmt: skip
        key, files = "data.path", [
            f"{part}-{what}.gz" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]  # fmt: skip
        lines = "".join(f"{sha256(tmp_path / name)}  {name}\n" for name in files)
        expected = hashlib.sha256(lines.encode()).hexdigest()
    else:
        tsdyn.run(small(**FEW), tmp_path / "first")
        experiment = small(**FEW, student__init="rewind", student__path=str(tmp_path / "first"))
        key, expected = "student.path", sha256(tmp_path / "first" / "archive.nc")
    assert input_files.digests(experiment) == {key: expected}


def test_a_rewritten_file_is_read_anew_in_one_process(tmp_path):
    """It has the same size and modification time, so that neither shows the change."""
    table(tmp_path / "x.npz", 0)
    experiment = small(
        teacher__widths=[4, 3, 3], data__law="file", data__path=str(tmp_path / "x.npz"), data__train=20, data__eval=10
    )
    status = (tmp_path / "x.npz").stat()
    for seed in range(1, 6):
        before = training_inputs(experiment, 0)
        table(tmp_path / "x.npz", seed)
        os.utime(tmp_path / "x.npz", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (tmp_path / "x.npz").stat().st_size == status.st_size
        assert not np.array_equal(training_inputs(experiment, 0), before)


def test_every_file_of_a_folder_is_watched(tmp_path):
    cifar10(tmp_path)
    law = small(teacher__widths=[3072, 3, 10], data__law="cifar10", data__path=str(tmp_path), data__train=5,
                data__eval=3, training__batch=5).data  # fmt: skip
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        before = [part.pixels.copy() for part in images.load(law)]
        raw = bytearray((tmp_path / name).read_bytes())
        raw[5] ^= 1
        (tmp_path / name).write_bytes(raw)
        after = [part.pixels for part in images.load(law)]
        assert sum(int((a != b).sum()) for a, b in zip(after, before, strict=True)) == 1
