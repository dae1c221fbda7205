"""Checks the annotations of tsdyn's functions and dataclasses while the tests run.

Whatever is annotated with shapes goes through `jaxtyping.jaxtyped`, which binds the names of dimensions across a call;
everything else through beartype alone.  (jaxtyping's own import hook binds a signature and pushes a frame for every
call of every function, which made the suite slower by half.)  Functions inside functions are left out, and so are calls
of a function beyond the first `CALLS` of each test: checking every one takes a fifth of the suite's time.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import sys
import typing
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGE = "tsdyn"
#: Calls of a function that are checked in each test.
CALLS = 100
_check = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(thing: Any) -> Any:
    """A function, or a dataclass, whose annotations are checked; with shapes, also that their dimensions agree."""
    if not isinstance(thing, type):
        bound = _has_shapes(thing.__annotations__, thing.__globals__)
        return _first_calls(thing, _bound(thing) if bound else _check(thing))
    if not dataclasses.is_dataclass(thing) or "__init__" not in vars(thing):
        return thing
    if _has_shapes(vars(thing).get("__annotations__", {}), vars(sys.modules[thing.__module__])):
        return _bound(thing)
    thing.__init__ = _first_calls(thing.__init__, _check(thing.__init__))  # type: ignore[misc]
    return thing


#: How many tests have begun.
_tests = 0


def test_begins() -> None:
    """Check the first calls of every function anew."""
    global _tests
    _tests += 1


def _first_calls(function: Callable[..., Any], checking: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is `checking` in its first `CALLS` calls of each test."""
    left, of = CALLS, _tests

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        nonlocal left, of
        if of != _tests:
            left, of = CALLS, _tests
        if left <= 0:
            return function(*args, **keywords)
        left -= 1
        return checking(*args, **keywords)

    return call


_bound = jaxtyping.jaxtyped(typechecker=_check)


def _has_shapes(annotations: Mapping[str, Any], at: Mapping[str, Any]) -> bool:
    """Whether any annotation names one of jaxtyping's types, or an alias of one."""
    words = {word for text in annotations.values() for word in re.findall(r"[A-Za-z_]\w*", str(text))}
    return any(_of_shapes(at[word]) for word in words if word in at)


def _of_shapes(value: Any) -> bool:
    return getattr(value, "__module__", None) == "jaxtyping" or "jaxtyping." in repr(typing.get_args(value))


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a user has it, so that it is tsdyn that refuses a wrong word."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def install() -> None:
    """Check every module of the package that is imported from now on."""
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} is imported already, and cannot be checked; import it in tests alone")
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # never from the cache of plain modules
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = ast.parse(data)
        _Decorated(_hidden(tree)).visit(tree)
        first = sum(itertools.takewhile(bool, map(_comes_first, tree.body)))
        tree.body.insert(first, ast.Import([ast.alias("tests.typechecks", "_typechecks")]))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


def _hidden(tree: ast.Module) -> set[str]:
    """Names that only a type checker imports: what is annotated with one cannot be checked here."""
    asked = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    imports = [node for one in asked for node in ast.walk(one) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(name.asname or name.name).partition(".")[0] for node in imports for name in node.names}


def _names(annotation: ast.expr | None) -> set[str]:
    return set() if annotation is None else {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}


def _comes_first(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


class _Decorated(ast.NodeTransformer):
    """Decorates functions innermost, since other decorators hide annotations, and classes outermost."""

    def __init__(self, hidden: set[str]) -> None:
        self._hidden = hidden

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
            return node
        a = node.args
        for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
            arg.annotation = None if _names(arg.annotation) & self._hidden else arg.annotation
        node.returns = None if _names(node.returns) & self._hidden else node.returns
        node.decorator_list.append(_checked(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        fields = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        if not any(_names(annotation) & self._hidden for annotation in fields):
            node.decorator_list.insert(0, _checked(node))
        return node


def _checked(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Attribute(ast.Name("_typechecks", ast.Load()), "checked", ast.Load()), node)
