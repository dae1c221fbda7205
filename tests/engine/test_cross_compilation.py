"""The C++ sources compile for arm64, by the Clang of the package ziglang; nothing is run."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tsdyn.engine import native

SOURCES = sorted(native.FOLDER.glob("*.cpp"))
MACHINES = {"aarch64-linux-gnu": 183, "x86_64-linux-gnu": 62}


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed (tsdyn[compiler])")
@pytest.mark.parametrize("target", MACHINES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_sources_compile_for_other_processors(source, target, tmp_path):
    """An object file is enough: it needs no C++ library of the target's, which zig would build for minutes."""
    object_file = tmp_path / "it.o"
    flags = [flag for flag in native.FLAGS if flag not in ("-march=native", "-shared")]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, "-fno-sanitize=all", "-c"]
    done = subprocess.run(
        [*command, str(source), "-o", str(object_file)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header = object_file.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == MACHINES[target]
