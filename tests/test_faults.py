"""Every fault that was found by use has its line in faults.md: tests that exist, and what showed it before."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Sections of the list of faults, and how many entries each has; D is one list, E the declared lower bounds.
SECTIONS = {"A": 30, "B": 10, "C": 6, "F": 6}


def lines():
    """The tests of each entry; of one whose last column is empty, none."""
    text = (HERE / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-F]\d*) \| (\S.*?) \| \S.* \|$", text, flags=re.MULTILINE)
    return dict(rows)


def test_every_fault_has_its_tests():
    wanted = {f"{section}{number}" for section, count in SECTIONS.items() for number in range(1, count + 1)}
    assert {*lines()} == wanted | {"D"}


def test_every_test_that_is_named_exists():
    missing = []
    for named in lines().values():
        for one in named.split(", "):
            file, _, function = one.partition("::")
            tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
            if function not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
                missing.append(one)
    assert not missing
