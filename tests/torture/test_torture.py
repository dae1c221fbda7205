"""A few of each trial of `make torture`, in a process of its own: the shim must be loaded before the C library is."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_a_few_of_each_trial():
    command = [sys.executable, "-m", "tests.torture", "--short"]
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_archive_is_read_alike_under_each_of_dasks_schedulers(tmp_path):
    """Here, not in that process, which would begin a server of its own to fork readers from."""
    from tests.torture import trials  # asks git for the commit, which no test that is not run need do

    assert trials.readers(tmp_path, random.Random(1), 1).endswith(": 0 went wrong")
