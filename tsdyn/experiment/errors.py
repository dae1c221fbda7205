"""Error messages about experiment files: each names the key, its value, the rule and the way out.  Imports no torch."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


class ExperimentError(ValueError):
    """An experiment that cannot be run as written; the message names each key, its value and the rule."""


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            found += keys(part, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The text of an error, one line per mistake: key, value, rule, way out."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        fields = [str(p) for p in item["loc"] if not _is_branch(p)]
        key = ".".join(fields)
        shown = _shown(item.get("input"))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        if item["type"] == "extra_forbidden":
            section = ".".join(fields[:-1])
            siblings = _fields(model, fields[:-1])
            elsewhere = [k for k in keys(model) if k.rpartition(".")[2] == fields[-1]]
            meant = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(fields[-1], siblings)
            sentence = f"{key}: unknown key{meant}; " + (
                f"[{section}] has {', '.join(siblings)}" if section else f"there are {', '.join(siblings)}"
            )
        elif item["type"] == "missing":
            sentence = f"{key}: missing, and has no default"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            sentence = f"{key} = {shown}: {message}" if key else message
        else:
            message = item["msg"].removeprefix("Input should be ")
            sentence = (
                f"{key} = {shown}: must be {message}" if message != item["msg"] else f"{key} = {shown}: {message}"
            )
        head, _, rule = sentence.partition(": must be ")
        lines.setdefault(head, [])
        if rule and rule not in lines[head]:
            lines[head].append(rule)
    return "\n  ".join(f"{head}: must be {' or '.join(rules)}" if rules else head for head, rules in lines.items())


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


def _is_branch(part: object) -> bool:
    """Whether this part of pydantic's location names a branch of a union, which is no key of the file."""
    return isinstance(part, int) or (
        isinstance(part, str) and bool(re.search(r"[\[\]()]|^constrained-|^(int|float|bool|str|dict|tuple)$", part))
    )


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        part = field.annotation if field else None
        if isinstance(part, types.UnionType) or not (isinstance(part, type) and issubclass(part, BaseModel)):
            return []
        model = part
    return list(model.model_fields)
