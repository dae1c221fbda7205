"""docs/architecture.md walks through the code, one function per line: each is there, and is called by one before it."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
WALKS = [
    (title, re.findall(r"^\d+\. `(tsdyn\.[\w.]+)`", text, flags=re.M))
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
]


def found(dotted: str) -> object:
    """What a dotted name is: a module's attribute, or that of a class in it."""
    words = dotted.split(".")
    for end in range(len(words), 0, -1):
        try:
            at: object = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:]:
            at = inspect.getattr_static(at, word) if inspect.isclass(at) else getattr(at, word)
        return at
    raise LookupError(dotted)


def source(dotted: str) -> str:
    thing = found(dotted)
    thing = getattr(thing, "func", None) or getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing
    return inspect.getsource(inspect.unwrap(thing))


def test_there_are_three_walks():
    assert [len(steps) > 4 for _, steps in WALKS] == [True] * 3


@pytest.mark.parametrize(("title", "steps"), WALKS, ids=[title for title, _ in WALKS])
def test_every_step_is_called_by_one_before_it(title, steps):
    for i, step in enumerate(steps[1:], start=1):
        name = step.rpartition(".")[2]
        # a function that only hands on lies between at most: `Members.teachers` asks `_teacher`, of the same class
        before = "\n".join(source(s) for s in steps[:i]) + "\n".join(between(s) for s in steps[:i])
        assert re.search(rf"\b{name}\b", before), f"{step} is not called by {steps[:i]}"


def between(dotted: str) -> str:
    """Source of the private functions of the same module or class that a step calls."""
    owner, text = found(dotted.rpartition(".")[0]), source(dotted)
    names = {n for n in re.findall(r"\b(_\w+)\(", text) if hasattr(owner, n)}
    return "\n".join(inspect.getsource(getattr(owner, n)) for n in names if inspect.isroutine(getattr(owner, n)))
