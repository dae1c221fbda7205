"""What several tests of other people's packages use."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import once

HERE = Path(__file__).resolve().parent


def install(folder):
    shutil.copytree(HERE.parent / "mylab", folder / "source")
    words = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source"),
    ]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder in which mylab is installed, by pip, without a network."""
    return once(tmp_path_factory, "mylab", install) / "site"
