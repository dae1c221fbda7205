"""A folder as it is after the quickstarts, for what the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path

import tsdyn

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def lay(folder: Path) -> Path:
    """Make the tutorial's run in `folder`, and the README's on fewer samples and epochs; returns `folder`."""
    (text,) = blocks(ROOT / "docs/tutorial/quickstart.md", "toml")
    (folder / "quickstart.toml").write_text(text, encoding="utf-8")
    tsdyn.run(tsdyn.Experiment.from_toml(folder / "quickstart.toml"), folder / "runs/quickstart")
    example = tsdyn.Experiment.from_toml(ROOT / "examples/l-shape.toml")
    less = {"seeds": 4, "training.epochs": 12, "training.steps_per_epoch": 20, "data.train": 200, "data.eval": 200}
    tsdyn.run(example.replace(less), folder / "runs/l-shape")
    return folder
