"""Checks the annotations of tsdyn's functions and dataclasses while the tests run.

Whatever is annotated with shapes goes through `jaxtyping.jaxtyped`, which binds the names of dimensions across a call;
everything else through beartype alone.  (jaxtyping's own import hook binds a signature and pushes a frame for every
call of every function, which made the suite slower by half.)  Functions inside functions are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGE = "tsdyn"
_check = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(thing: Any) -> Any:
    """A function, or the ``__init__`` that a dataclass got, whose annotations are checked by beartype."""
    if not isinstance(thing, type):
        return _check(thing)
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _check(thing.__init__)  # type: ignore[misc]
    return thing


def bound(thing: Any) -> Any:
    """A function or dataclass whose annotations are checked and agree in the names of their dimensions."""
    return jaxtyping.jaxtyped(typechecker=_check)(thing)


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
        shapes = {
            name.asname or name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
            for name in node.names
        }
        _Decorated(shapes, _hidden(tree)).visit(tree)
        first = sum(itertools.takewhile(bool, map(_comes_first, tree.body)))
        tree.body.insert(first, ast.Import([ast.alias("tests.typechecks", "_typechecks")]))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


def _hidden(tree: ast.Module) -> set[str]:
    """Names that only a type checker imports: what is annotated with one cannot be checked here."""
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    imports = [node for one in asked for node in ast.walk(one) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(name.asname or name.name).partition(".")[0] for node in imports for name in node.names}


def _names(annotation: ast.expr | None) -> set[str]:
    return set() if annotation is None else {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}


def _comes_first(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


class _Decorated(ast.NodeTransformer):
    """Decorates functions innermost, since other decorators hide annotations, and classes outermost."""

    def __init__(self, shapes: set[str], hidden: set[str]) -> None:
        self._shapes, self._hidden = shapes, hidden

    def _by(self, names: set[str]) -> ast.expr:
        how = "bound" if names & self._shapes else "checked"
        return ast.Attribute(ast.Name("_typechecks", ast.Load()), how, ast.Load())

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
            return node
        a, names = node.args, set()
        for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
            arg.annotation = None if _names(arg.annotation) & self._hidden else arg.annotation
            names |= _names(arg.annotation)
        node.returns = None if _names(node.returns) & self._hidden else node.returns
        node.decorator_list.append(ast.copy_location(self._by(names | _names(node.returns)), node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        names = set().union(*(_names(field.annotation) for field in node.body if isinstance(field, ast.AnnAssign)))
        if not names & self._hidden:
            node.decorator_list.insert(0, ast.copy_location(self._by(names), node))
        return node
