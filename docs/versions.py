"""Builds the documentation of every release beside that of the working tree, as ``python docs/versions.py OUTPUT``.

A release is a tag vX.Y.Z.  Each is built from its own commit and with its own code into ``OUTPUT/X.Y.Z``, the working
tree into ``OUTPUT/dev``; ``OUTPUT/index.html`` leads to the newest release, or to ``dev`` while there is none, and
``OUTPUT/versions.json`` lists them, the newest first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(output: Path) -> None:
    said = subprocess.check_output(["git", "-C", str(ROOT), "tag", "--list", "v*"], text=True)
    releases = sorted((t[1:] for t in said.split() if re.fullmatch(r"v\d+\.\d+\.\d+", t)), key=_numbers, reverse=True)
    for release in releases:
        if (output / release / "index.html").exists():  # a release does not change
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "tree")
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", tree, f"v{release}"], check=True
            )
            try:
                _build(tree, output / release)
            finally:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", tree], check=True)
    _build(ROOT, output / "dev")
    newest = releases[0] if releases else "dev"
    (output / "versions.json").write_text(json.dumps([*releases, "dev"]) + "\n", encoding="utf-8")
    (output / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><title>tsdyn</title>'
        f'<meta http-equiv="refresh" content="0; url={newest}/"></head>'
        f'<body><a href="{newest}/">tsdyn {newest}</a></body></html>\n',
        encoding="utf-8",
    )
    print(f"{output}: {', '.join([*releases, 'dev'])}; index.html leads to {newest}")


def _build(tree: Path, target: Path) -> None:
    """Build one tree's pages with its own code, which comes before what is installed."""
    with tempfile.TemporaryDirectory() as code:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", code, str(tree)], check=True)
        environment = os.environ | {"PYTHONPATH": code}
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(tree / "docs"), str(target)]
        subprocess.run(sphinx, check=True, env=environment)


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
