"""Writes the tutorials as notebooks, to be downloaded from their pages."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

#: Pictures that code and commands write.
_PICTURES = re.compile(r'(?:savefig\("|-o )([\w-]+\.png)')
#: Fenced blocks of a page: (language, text).
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```\n?", flags=re.M | re.S)
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def write(pages: Path, target: Path) -> list[Path]:
    """Write each tutorial of the folder `pages` to `target` as a notebook of the same name; returns the files."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for page in sorted(pages.glob("*.md")):
        file = target / f"{page.stem}.ipynb"
        file.write_text(json.dumps(notebook(page.read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")
        written.append(file)
    return written


def notebook(page: str) -> dict:
    """A page as a notebook: text between code; commands with ``!``, experiment files by ``%%writefile``.

    A picture is shown below the code that writes it, and the page's own are left out.

    Raises:
        ValueError: for a fenced block of another language, which has no place in a notebook.
    """
    text = re.sub(r"^\{download\}.*\n\n?", "", page, flags=re.M)  # the page's link to this notebook
    cells, end = [], 0
    for block in _FENCED.finditer(text):
        cells += _text(text[end : block.start()])
        code = _code(*block.groups())
        cells.append(_cell("code", code))
        cells += [
            _cell("code", f'from IPython.display import Image\n\nImage("{name}")') for name in _PICTURES.findall(code)
        ]
        end = block.end()
    cells += _text(text[end:])
    return {"cells": cells, "metadata": {"kernelspec": _KERNEL}, "nbformat": 4, "nbformat_minor": 4}


def _code(language: str, block: str) -> str:
    match language:
        case "python":
            return block
        case "console":
            return "".join(f"!{line[2:]}\n" for line in block.splitlines() if line.startswith("$ "))
        case "toml":
            return f"%%writefile {tomllib.loads(block)['name']}.toml\n{block}"
        case _:
            raise ValueError(f"notebook: a block of {language!r}; a tutorial has python, console and toml")


def _text(markdown: str) -> list[dict]:
    markdown = re.sub(r"^!\[[^]]*\]\([^)]*\)\n?", "", markdown, flags=re.M)
    markdown = re.sub(r"\]\((?!https?:)[^)]*\)", "]", markdown)  # links to other pages lead nowhere from a notebook
    return [_cell("markdown", markdown.strip() + "\n")] if markdown.strip() else []


def _cell(kind: str, source: str) -> dict:
    lines = source.rstrip("\n").splitlines(keepends=True)
    cell = {"cell_type": kind, "metadata": {}, "source": lines}
    return cell | {"execution_count": None, "outputs": []} if kind == "code" else cell
