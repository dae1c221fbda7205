"""`tsdyn doctor`: each check finds the problem it is for."""

import os
import shutil
import subprocess
import time

import pytest
import torch

from tests import processes
from tests.test_cli import command  # noqa: F401
from tsdyn import memory
from tsdyn.archive import lock
from tsdyn.running import diagnosis


def findings(directory, seconds=60.0):
    return {finding.subject: finding for finding in diagnosis.diagnose(directory, seconds=seconds)}


@pytest.fixture
def quick(monkeypatch):
    """`tsdyn doctor` without training steps."""
    monkeypatch.setattr(diagnosis, "_steps", lambda: time.sleep(60))
    return lambda directory: findings(directory, seconds=0.5)


def test_it_looks_at_everything_and_leaves_nothing(tmp_path):
    found = findings(tmp_path)
    assert {
        "threads",
        "BLAS",
        "denormals",
        "TF32",
        "memory, of the machine",
        "disk",
        "commit",
        "locks",
        "compiled step",
    } <= {*found}
    assert all(finding.meaning and finding.found for finding in found.values())
    assert not any(tmp_path.iterdir())
    if shutil.which("c++"):
        assert found["compiled against plain"].verdict == "good"


def test_the_command_ends_in_its_time_and_says_what_is_bad(command, tmp_path, quick, monkeypatch):  # noqa: F811
    monkeypatch.setattr(diagnosis, "SECONDS", 0.5)
    began = time.monotonic()
    code, out, _ = command("doctor", tmp_path)
    assert time.monotonic() - began < processes.HUNG
    assert code == int("bad   " in out)
    assert "note  compiled step: no answer within" in out
    code, out, _ = command("doctor", tmp_path / "absent")
    assert code == 1
    assert "bad   directory:" in out


def test_flushed_denormals_are_noticed(tmp_path, quick):
    assert quick(tmp_path)["denormals"].verdict == "good"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps denormals")
    try:
        assert quick(tmp_path)["denormals"].verdict == "bad"
    finally:
        torch.set_flush_denormal(False)


def test_more_threads_than_cores_are_noticed(tmp_path, quick, monkeypatch):
    assert quick(tmp_path)["threads"].verdict == "good"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert quick(tmp_path)["threads"].verdict == "bad"


def test_limits_are_shown(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(memory, "limits", lambda: {"machine": 1 << 40, "control groups": 1 << 20, "ulimit": 1 << 35})
    found = quick(tmp_path)
    assert found["memory, of a container or batch job"].verdict == "bad"
    assert found["memory, of ulimit -v or -d"].verdict == "good"


def test_a_directory_that_cannot_be_written_is_noticed(tmp_path, quick):
    mounted = tmp_path / "full"
    mounted.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("this user mounts nothing")
    try:
        found = quick(mounted)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert found["disk"].verdict == "bad"
    assert found["commit"].verdict == "bad"
    assert "no space left" in found["commit"].found


def test_locks_that_keep_nobody_out_are_noticed(tmp_path, quick, monkeypatch):
    assert quick(tmp_path)["locks"].found == "flock"
    with monkeypatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", lambda *_: None)
        assert quick(tmp_path)["locks"].verdict == "bad"

    def missing(*_):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    assert quick(tmp_path)["locks"].verdict == "note"


def test_steps_that_differ_are_noticed(tmp_path, monkeypatch):
    steps = diagnosis._steps

    def off_by_little():
        found = steps()
        return found | {"plain": [(1 + 1e-6) * value for value in found["plain"]]}

    monkeypatch.setattr(diagnosis, "_steps", off_by_little)
    assert findings(tmp_path)["compiled against plain"].verdict == "bad"


def test_steps_that_fail_are_said(tmp_path, monkeypatch):
    def failing():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(diagnosis, "_steps", failing)
    training = findings(tmp_path)["training"]
    assert training.verdict == "bad"
    assert "Cannot allocate memory" in training.found
    monkeypatch.setattr(diagnosis, "_steps", lambda: os.kill(os.getpid(), 9))
    assert findings(tmp_path)["training"].found == "it ended without a word"
