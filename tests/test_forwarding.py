"""What the docs of 0.1 let a user import works for one release more, and says where it is now."""

import ast
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tsdyn import _forwarding

#: Public names of every module that the docs of 0.1 show.
NAMES = json.loads((Path(__file__).parent / "data" / "names-0.1.json").read_text(encoding="utf-8"))


def _in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-W", "error", "-W", "always::DeprecationWarning:__main__", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout + answer.stderr


@pytest.mark.parametrize("old", NAMES)
def test_every_documented_name_of_0_1_is_there(old):
    importlib.import_module("tsdyn")
    for name in NAMES[old]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = getattr(importlib.import_module(f"tsdyn.{old}"), name)
        new = _forwarding.place(old, name)
        if new is None:  # it did not move
            assert not said, name
            continue
        module, _, attribute = new.rpartition(".")
        assert found is getattr(importlib.import_module(module), attribute)
        assert f"tsdyn.{old}.{name} is {new} now; the old name goes with tsdyn 0.3" in {str(w.message) for w in said}
        assert {w.category for w in said} == {DeprecationWarning}


@pytest.mark.parametrize(
    "line",
    ["from tsdyn import interaction", "import tsdyn.interaction", "import tsdyn; tsdyn.interaction"],
)
def test_an_old_module_is_found_and_says_where_it_is(line):
    said = _in_a_fresh_process(line)
    assert said.startswith(
        "<string>:1: DeprecationWarning: tsdyn.interaction is not a module any more: its names are in tsdyn."
    )


def test_an_old_name_says_where_it_is():
    said = _in_a_fresh_process("from tsdyn.networks import Network; print(Network.__name__)")
    assert said.startswith("Network\n<string>:1: DeprecationWarning: tsdyn.networks.Network is tsdyn.Network now")


def test_what_never_was_is_refused_by_name():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("tsdyn.no_such_module")
    with pytest.raises(AttributeError, match=r"tsdyn\.networks.*no_such_name.*migration"):
        _ = importlib.import_module("tsdyn.networks").no_such_name


def test_nothing_of_ours_uses_an_old_name():
    root = Path(__file__).resolve().parent.parent
    gone = {f"tsdyn.{old}" for old in _forwarding.MOVED if not (root / "tsdyn" / old).exists()}
    for file in [f for folder in ("tsdyn", "analysis", "studies", "tests") for f in (root / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
            else:
                continue
            assert not named & gone, f"{file}:{node.lineno}"
