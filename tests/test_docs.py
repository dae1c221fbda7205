"""What the docs show is executed: each page's Python blocks in order, in one namespace, on a real small run."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from typer.main import get_command

import tsdyn
from tests.desk import blocks
from tsdyn import cli, registers, schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    for register in registers.ALL.values():  # what a page adds is gone after it
        monkeypatch.setattr(register, "_added", {})
    monkeypatch.setattr(schema, "DECLARED", {})
    matplotlib.use("Agg")
    namespace: dict = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    plt.close("all")
    assert "None" not in capsys.readouterr().out


def test_the_pages_that_should_have_code_have_it():
    assert {p.name for p in PAGES if blocks(p, "python")} >= {"README.md", "quickstart.md", "slice.md"}


@pytest.mark.parametrize("page", [p for p in PAGES if "tsdyn " in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_shown_commands_exist(page):
    lines = [
        line.removeprefix("$ ").split("#")[0]
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ tsdyn ")
    ]
    for line in lines:
        group, words = get_command(cli.app), shlex.split(line)[1:]
        while hasattr(group, "commands"):
            assert words[0] in group.commands, line
            group = group.commands[words.pop(0)]
        options = {option for p in group.params for option in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("-")} <= options, line


def test_toml_blocks_are_experiments():
    found = [block for page in PAGES for block in blocks(page, "toml")]
    assert found
    for block in found:
        assert tsdyn.Experiment.from_toml_text(block).as_dict()["name"] == tomllib.loads(block)["name"]


def test_the_example_file_is_the_released_experiment():
    experiment = tsdyn.Experiment.from_toml(ROOT / "examples/l-shape.toml")
    from tsdyn.studies.two_layer import PAPER

    for part in ("teacher", "data"):
        assert getattr(experiment, part) == getattr(PAPER, part)
    assert experiment.training.learning_rate == PAPER.training.learning_rate
    assert experiment.student.scale == PAPER.student.scale


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    for target in re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target in targets


def test_notation_names_what_exists_where_it_says():
    rows = re.findall(r"^\| \$.*\|$", (ROOT / "docs/theory/notation.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(rows) > 20
    for row in rows:
        *_, names, places = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        texts = [(ROOT / place).read_text(encoding="utf-8") for place in re.findall(r"`([^`]+)`", places)]
        for word in (name.rpartition(".")[2] for name in re.findall(r"`([^`]+)`", names)):
            assert any(re.search(rf"\b{word}\b", text) for text in texts), f"{word}: {row}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/tutorial").glob("*.md")), ids=lambda p: p.stem)
def test_a_tutorial_is_its_notebook(page, tmp_path, monkeypatch):
    """It has the page's text and code in the page's order, commands with ! and files by %%writefile."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import notebooks

    files = {file.stem: file for file in notebooks.write(page.parent, tmp_path)}
    found = json.loads(files[page.stem].read_text(encoding="utf-8"))
    assert found["nbformat"] == 4
    every = ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]
    pictures = [c for c in every if c.startswith("from IPython.display import Image")]
    code = [c for c in every if c not in pictures]
    for c in code:  # each picture is shown right below the code that writes it
        for picture in re.findall(r"[\w-]+\.png", c):
            assert every[every.index(c) + 1].endswith(f'Image("{picture}")')
    assert len(pictures) == sum(c.count(".png") for c in code) > 0
    assert [c for c in code if c[0] not in "!%"] == [block.rstrip("\n") for block in blocks(page, "python")]
    commands = [line[1:] for c in code if c[0] == "!" for line in c.splitlines()]
    shown = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands == shown
    written = {c.split("\n", 1)[0].split()[1]: c.split("\n", 1)[1] for c in code if c.startswith("%%writefile ")}
    assert list(written.values()) == [block.rstrip("\n") for block in blocks(page, "toml")]
    for name in written:
        assert any(name in command for command in commands)
    prose = "".join("".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "markdown")
    assert page.read_text(encoding="utf-8").splitlines()[0] in prose
    assert "{download}" not in prose
    assert "![" not in prose


#: Pages that are read outside the built documentation, whose links Sphinx does not check.
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SUPPORT.md", "SECURITY.md", "paper.md")]


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
