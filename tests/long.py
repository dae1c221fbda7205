"""``python -m tests.long [PART ...]``: what takes too long for the suite, each part a process of its own.

Prints a line per part and writes the table tests/long.md, in which parts that were not asked for keep their line: what
was tested, when and at which commit, with what result.  Exit 1 if a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "long.md"
#: Where the parts' output is kept.
LOGS = ROOT / "build" / "long"
HEAD = """# What takes too long for the suite

Written by `make long` (`python -m tests.long`); a part that was not asked for keeps its line.

| part | what it does | result | date | commit | seconds | its last words |
| --- | --- | --- | --- | --- | --- | --- |
"""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        does: What it does, for the table.
        words: Gives its commands, each run if those before it passed.
        variables: Environment variables of its own.
        lacks: Gives the reason why it cannot be run here, or None.
    """

    does: str
    words: Callable[[], list[Sequence[str]]]
    variables: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[], str | None] = lambda: None


def _tests(*words: str) -> Callable[[], list[Sequence[str]]]:
    return lambda: [(*PYTEST, *words)]


def _module(name: str) -> Callable[[], list[Sequence[str]]]:
    return lambda: [(sys.executable, "-m", name)]


def tutorial_studies() -> list[str]:
    """Studies that the tutorials run."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/tutorial").glob("*.md")))
    return list(dict.fromkeys(re.findall(r"tsdyn study run ([a-z0-9-]+)", pages)))


def _tutorials() -> list[Sequence[str]]:
    code = "import sys; from tsdyn.cli import main; main()"
    run = (sys.executable, "-c", code, "study", "run")
    return [(*run, name, "--scale", "desk", "--quiet", "-o", str(LOGS / f"{name}-desk")) for name in tutorial_studies()]


def _recipes() -> list[Sequence[str]]:
    own = str(LOGS / "venv" / "bin" / "python")
    needs = ("pytest", "pytest-benchmark", "hypothesis", "beartype", "lightning", "transformers", "accelerate")
    return [
        (sys.executable, "-m", "venv", str(LOGS / "venv")),
        # an unconstrained torch draws several GB of CUDA packages
        (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"),
         "-e", str(ROOT), *needs),
        (own, "-m", "pytest", "-q", "--no-typechecks", "tests/recipes/trainers.py", "-W", "default"),
    ]  # fmt: skip


def _browser() -> list[Sequence[str]]:
    pages = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "docs", "docs/_build/html"]
    return [pages, (sys.executable, "-m", "tests.browser")]


PARTS: dict[str, Part] = {
    "multilayer": Part(
        "the released multilayer experiment against its figures", _tests("tests/studies/multilayer_statistics.py")
    ),
    "statistics": Part(
        "the released two-layer experiment against its statistics, every row",
        _tests("tests/studies/test_two_layer_statistics.py"), {"TSDYN_LONG": "1"},
    ),
    "trials": Part("end points of gradient flow by three integrators", _module("tests.population.copy_or_average")),
    "torture": Part("kills, power cuts, full disks and damaged files", _module("tests.torture")),
    "fuzz": Part(
        "property tests with 500 random examples each", _tests("-n", "auto", "--dist", "worksteal", "-m", "hypothesis"),
        {"TSDYN_FUZZ": "500"},
    ),
    "tutorials": Part("the tutorials' studies at desk scale", _tutorials),
    "recipes": Part("Lightning's and Hugging Face's trainers, installed", _recipes),
    "matrix": Part("the suite on every Python, lowest and newest versions", _module("tests.matrix")),
    "peers": Part(  # in an environment of its own, with the packages that it is compared with
        "the same work by other packages", lambda: [("make", "peers", "CELLS=--rounds 3")],
        lacks=lambda: None if shutil.which("make") else "make is not there",
    ),
    "browser": Part(
        "reports and documentation in headless Chromium", _browser,
        lacks=lambda: None if shutil.which("npm") else "npm is not there",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A part's line of the table."""

    part: str
    does: str
    result: str
    date: str = ""
    commit: str = ""
    seconds: str = ""
    words: str = ""

    def __str__(self) -> str:
        return "| " + " | ".join(vars(self).values()) + " |"


def read(text: str) -> dict[str, Row]:
    """The lines of a table that `main` wrote, by part."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: Row(*row) for row in rows[2:] if len(row) == 7}


def table(rows: Mapping[str, Row]) -> str:
    absent = {name: Row(name, part.does, "not run", words="never asked for") for name, part in PARTS.items()}
    return HEAD + "\n".join(str(rows.get(name, absent[name])) for name in PARTS) + "\n"


def commit() -> str:
    """The checkout's commit, with + where files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--abbrev=9"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run(name: str, part: Part, limit: float) -> Row:
    """Run the commands of a part one after another, at most `limit` seconds long together."""
    began, now = time.monotonic(), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    missing = part.lacks()
    if missing is not None:
        return Row(name, part.does, "not run", now, commit(), "0", missing)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    result = "passed"
    with log.open("w", encoding="utf-8") as out:
        for words in part.words():
            left = limit - (time.monotonic() - began)
            code = _ended(words, {**os.environ, **part.variables}, out.fileno(), left)
            if code is None:
                result = f"not run to its end: stopped after {limit:.0f} s"
                break
            if code:
                result = f"failed (exit code {code})"
                break
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = re.sub(r"\s+", " ", said[-1] if said else "").replace("|", "/")[:100]
    return Row(name, part.does, result, now, commit(), f"{time.monotonic() - began:.0f}", last)


def _ended(words: Sequence[str], variables: Mapping[str, str], out: int, seconds: float) -> int | None:
    """Exit code of a command; None if it was stopped, with all that it began, after `seconds`."""
    process = subprocess.Popen(words, cwd=ROOT, env=dict(variables), stdout=out, stderr=out, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.long", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--limit", type=float, default=6 * 3600.0, help="seconds of a part after which it is stopped")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is written")
    asked = parser.parse_args()
    unknown = [name for name in asked.parts if name not in PARTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no part of that name; there are {', '.join(PARTS)}")
    rows = read(asked.table.read_text(encoding="utf-8")) if asked.table.exists() else {}
    failed = False
    for name in asked.parts or PARTS:
        rows[name] = run(name, PARTS[name], asked.limit)
        failed |= rows[name].result.startswith("failed")
        print(f"{name}: {rows[name].result}, {rows[name].seconds} s; {rows[name].words}", flush=True)
        asked.table.write_text(table(rows), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
