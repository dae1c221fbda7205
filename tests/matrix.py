"""``python -m tests.matrix``: the suite under every Python and set of dependencies that this machine has.

Rows are Pythons by dependencies: the lowest versions that pyproject.toml declares, and the newest that a registry
gives.  torch is that of constraints.txt everywhere (a CPU build; other builds draw several GB).  What cannot be run
here is printed as not run, with the reason; ``.github/workflows/tests.yml`` has the same rows for a host.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
#: Where pytest's output is kept.
LOGS = ROOT / "build" / "matrix"
#: Extras that the suite needs.
EXTRAS = "dev,docs"
#: Options of pip on a machine or network that is busy.
PATIENT = ("--timeout", "60", "--retries", "10")
_TESTED = re.compile(r"(\d+ (?:passed|failed|error|skipped)[^\n]*)")


def floors() -> list[str]:
    """``name==version`` for every lower bound that pyproject.toml declares, torch excepted."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(d for e in EXTRAS.split(",") for d in project["optional-dependencies"][e])]
    found: dict[str, str] = {}
    for line in declared:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[([^]]*)\])?>=([0-9.]+)", line)
        if match is None:
            raise ValueError(f"pyproject.toml: {line!r} declares no lower bound; write name>=version")
        if match[1] == "torch":
            continue
        found[match[1]] = match[3]
        if match[1] == "dask":  # whose extra pins the other half to the same version
            found["distributed"] = match[3]
    return [f"{name}=={version}" for name, version in found.items()]


def interpreter(version: str) -> str | None:
    """Path of a Python of that version on this machine, from PATH or pyenv."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for name in [shutil.which(f"python{version}"), *map(str, pyenv)]:
        if name is None:
            continue
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([name, "-c", code], capture_output=True, text=True)
        if answer.stdout.strip() == version:
            return name
    return None


def torch_reason(python: str) -> str | None:
    """Why torch cannot be had for this Python without CUDA's packages; None if it can."""
    (pinned,) = re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    install = [python, "-m", "pip", "install", "--quiet", *PATIENT]
    command = [*install, "--dry-run", "--ignore-installed", "--report", "-", pinned]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:  # no such wheel, or no network
        return f"{pinned} is not to be had for it: {_last(answer.stderr)}"
    return "its torch comes with CUDA's packages, several GB" if '"nvidia-' in answer.stdout else None


def _last(said: str) -> str:
    """The last line of what a command complained; pip's is the error, unless it says that a newer pip is to be had."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1] if lines else "it said nothing"


def run(python: str, constraints: list[str], folder: Path, tests: list[str]) -> str:
    """Last line of pytest's output, all of which is kept in `LOGS`, run in a new environment at `folder`."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    bounds = folder / "bounds.txt"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    bounds.write_text("\n".join([*constraints, pinned]), encoding="utf-8")
    own = folder / "bin" / "python"
    install = [str(own), "-m", "pip", "install", "--quiet", *PATIENT, "-c", str(bounds), "-e", f"{ROOT}[{EXTRAS}]"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        return f"FAILED to install: {_last(installed.stderr)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(own), "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-p", "no:cacheprovider", *tests]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{folder.name}.log").write_text(answer.stdout + answer.stderr, encoding="utf-8")
    said = _TESTED.findall(answer.stdout)
    return f"{'passed' if answer.returncode == 0 else 'FAILED'}: {said[-1] if said else 'no test ran'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only these; may be given again")
    parser.add_argument("--any-torch", action="store_true", help="also where torch brings CUDA's packages")
    parser.add_argument("--dependencies", choices=["lowest", "newest"], help="only these")
    parser.add_argument("tests", nargs="*", help="given to pytest")
    asked = parser.parse_args()
    wanted = [asked.dependencies] if asked.dependencies else ["lowest", "newest"]
    failed = False
    print(f"{'python':8}{'dependencies':14}result")
    for version in asked.python or PYTHONS:
        python = interpreter(version)
        reason = f"no python{version} on this machine" if python is None else None
        if python is not None and not asked.any_torch:
            reason = torch_reason(python)
        for dependencies in wanted:
            if reason is not None:
                said = f"not run: {reason}"
            else:
                assert python is not None
                with tempfile.TemporaryDirectory() as folder:
                    bounds = floors() if dependencies == "lowest" else []
                    said = run(python, bounds, Path(folder) / f"{version}-{dependencies}", asked.tests)
            failed |= said.startswith("FAILED")
            print(f"{version:8}{dependencies:14}{said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
