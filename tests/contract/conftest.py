"""What several tests of other people's packages use."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which mylab is installed, by pip, without a network."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(HERE.parent / "mylab", folder / "source")
    words = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source"),
    ]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    return folder / "site"
