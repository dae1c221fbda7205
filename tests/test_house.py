"""The house itself: what may import what, how long a part may be, what a wheel holds, what an import costs."""

import ast
import functools
import multiprocessing.forkserver
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import distributed.utils
import pytest
import torch

import tsdyn
from tests import processes, typechecks
from tsdyn.networks import activations
from tsdyn.networks.batch_norm import batch_norm_gradient
from tsdyn.networks.propagate import Frame

ROOT = Path(__file__).resolve().parent.parent
#: The floors of the house.  Imports run down; wings of one floor do not import each other.
FLOORS: dict[str, float] = {
    "schema": 1,
    "registers": 1,
    "vocabulary": 1,
    "dimensions": 1,
    "axes": 1,
    "memory": 1,
    "arguments": 1,
    "_version": 1,
    "_forwarding": 1,
    "experiment": 2,
    "networks": 2,
    "archive": 3,
    "gaussian": 3,
    "labelled": 3,
    "derivatives": 3.5,  # its gradients of convolutions are compiled by the engine
    "theory": 3.5,  # its sums over samples are compiled by the engine
    "engine": 3,
    "problem": 4,
    "observables": 4,
    "flow": 4,
    "population": 5,
    "analysis": 5,
    "running": 6,
    "predictions": 6,
    "attribution": 7,
    "through_training": 7,
    "recording": 7,
    "growing": 7,
    "testing": 7,
    "xarray": 7,
    "studies": 8,
    "cli": 9,
    "": 10,  # tsdyn/__init__.py, whose names are imported on first use
}
#: What a later issue builds.
LATER = {"predictions"}
#: Single modules that may import one another within their floor.
FLAT = {"schema", "vocabulary", "dimensions", "registers", "arguments", "axes", "memory", "_version", "_forwarding"}
LONGEST_MODULE = 600
LONGEST_FUNCTION = 60


def _files() -> dict[str, Path]:
    """Every module of tsdyn by its dotted name; analysis/ and studies/ are installed below tsdyn."""
    found = {}
    for name in ("tsdyn", "analysis", "studies"):
        folder, package = ROOT / name, name if name == "tsdyn" else f"tsdyn.{name}"
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


FILES = _files()


def _wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _is_for_types_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imported(module: str, file: Path) -> list[tuple[str, int]]:
    """Modules of tsdyn that `file` imports, also inside functions, each with its line; those for types only are not."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and _is_for_types_only(node):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, file)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if source.split(".")[0] == "tsdyn":
                    found.append((whole if whole in FILES else source, node.lineno))
        elif isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "tsdyn")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


@functools.cache
def _imports() -> dict[str, list[tuple[str, int]]]:
    return {module: _imported(module, file) for module, file in FILES.items()}


def test_every_wing_has_a_floor():
    wings = {_wing(module) for module in FILES}
    assert wings <= set(FLOORS)
    assert set(FLOORS) - LATER <= wings


def test_imports_run_down():
    """Also those inside functions: a function that imports what lies above it cannot be read from below."""
    wrong = []
    for module, imports in _imports().items():
        for other, line in imports:
            here, there = _wing(module), _wing(other)
            within = here == there or {here, there} <= FLAT
            public = there == "" and FLOORS[here] >= FLOORS["analysis"]  # tsdyn.open and the like, from above
            if not within and not public and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{module}:{line} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[there]})")
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    """No module imports itself through others, inside its wing either.

    A package's __init__ runs before each of its modules; what it imports itself is counted, that it runs is not.
    """
    edges = {module: {other for other, _ in imports if other in FILES} for module, imports in _imports().items()}
    circles = [" <-> ".join(sorted(group)) for group in _strongly_connected(edges) if len(group) > 1]
    circles += [module for module, others in edges.items() if module in others]
    assert not circles, "\n".join(circles)


def _strongly_connected(edges: dict[str, set[str]]) -> list[set[str]]:
    """Tarjan's: sets of modules each of which reaches all others of its set."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = set()
            while module not in group:
                group.add(stack.pop())
            found.append(group)

    for module in edges:
        if module not in index:
            visit(module)
    return found


def test_a_planted_import_is_noticed():
    """The laws above see an import inside a function, one that goes sideways, and none that is for types only."""
    text = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from tsdyn.running import sweep\n"
        "def f():\n    from tsdyn.theory import couplings\n"
        "    import tsdyn.archive\n"
    )
    planted = Path(FILES["tsdyn.engine"])

    class Planted:
        name = planted.name

        def read_text(self, encoding: str) -> str:
            return text

    found = _imported("tsdyn.engine.rule", Planted())  # type: ignore[arg-type]
    assert found == [("tsdyn.theory.couplings", 5), ("tsdyn.archive", 6)]
    assert _strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}, {"d"}]


def _private(module: str, file: Path) -> list[tuple[str, int]]:
    """Underscored names of other modules of tsdyn that `file` imports, or takes of an imported one, with their lines.

    Modules themselves may be underscored (tsdyn._version): that says that they are no part of what is public.
    """
    found: list[tuple[str, int]] = []
    modules: dict[str, str] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, file)
            for alias in node.names if source.split(".")[0] == "tsdyn" else ():
                whole = f"{source}.{alias.name}"
                if whole in FILES:
                    modules[alias.asname or alias.name] = whole
                elif _is_underscored(alias.name):
                    found.append((whole, node.lineno))
        elif isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_underscored(node.attr):
            whole = f"{modules.get(node.value.id, '')}.{node.attr}"
            if node.value.id in modules and whole not in FILES:
                found.append((whole, node.lineno))
    return found


def _is_underscored(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_takes_an_underscored_name_of_another():
    """An underscore says that a name is its module's own: what two modules need is public in one of them."""
    wrong = [f"{module}:{line} takes {name}" for module, file in FILES.items() for name, line in _private(module, file)]
    assert not wrong, "\n".join(wrong)


def test_a_planted_underscored_name_is_noticed(tmp_path):
    text = (
        "from tsdyn.running import runner, sweep as other\n"
        "from tsdyn import _version\n"
        "def f():\n    from tsdyn.running.outcome import _reason\n"
        "    return runner._due, other._x, runner.run, self._y\n"
    )
    (tmp_path / "planted.py").write_text(text, encoding="utf-8")
    assert _private("tsdyn.running.planted", tmp_path / "planted.py") == [
        ("tsdyn.running.outcome._reason", 4), ("tsdyn.running.runner._due", 5), ("tsdyn.running.sweep._x", 5),
    ]  # fmt: skip


def test_archives_and_experiment_files_need_no_torch():
    for wing in ("archive", "experiment", "schema"):
        for module, file in FILES.items():
            if _wing(module) == wing:
                assert not re.search(r"^\s*(import|from) torch\b", file.read_text(encoding="utf-8"), flags=re.M), module


def test_modules_are_short():
    """Lines without the examples in docstrings."""
    long = {}
    for module, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        lines = len(re.sub(r"\n *Examples:\n(?: {8}.*\n| *\n)*?(?= *\"{3})", "\n", text).splitlines())
        if lines > LONGEST_MODULE:
            long[module] = lines
    assert not long


def test_functions_are_short():
    """Lines without the docstring."""
    long = []
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                first = node.body[0]
                if ast.get_docstring(node) is not None:
                    lines -= first.end_lineno - first.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{module}.{node.name}: {lines}")
    assert not long, "\n".join(long)


def _exported(file: Path) -> set[str]:
    """Public names that a package's __init__, or its stub, gives."""
    stub = file.with_suffix(".pyi")
    tree = ast.parse((stub if stub.exists() else file).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and not (node.level and node.module is None):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def test_no_module_has_the_name_of_what_its_package_exports():
    """`import tsdyn.population.loss as m` would give the function, and a folder tsdyn/open would hide tsdyn.open."""
    for module, file in FILES.items():
        if file.name == "__init__.py":
            below = {m.rpartition(".")[2] for m in FILES if m.rpartition(".")[0] == module}
            assert not _exported(file) & below, module


def test_import_is_cheap_and_without_torch():
    """Under 0.3 s is the promise (see docs/performance.md); here only its reason: nothing heavy is imported."""
    heavy = "torch", "xarray", "netCDF4", "dask", "matplotlib", "pydantic", "scipy"
    code = f"import tsdyn, sys; print([m for m in {heavy!r} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_opening_an_archive_needs_no_torch():
    code = (
        "import tsdyn, sys; tsdyn.open, tsdyn.Experiment, tsdyn.analysis.specialization; print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def _answer(*command, of):
    """The answer of the command, and which of these modules it has imported when it ends."""
    code = (
        f"import sys; sys.argv = ['tsdyn', *{list(map(str, command))!r}]\n"
        "from tsdyn.cli import main\n"
        f"try:\n    main()\nfinally:\n    print([m for m in {of!r} if m in sys.modules], file=sys.__stderr__)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return answer.stdout, answer.stderr.strip()


@pytest.mark.parametrize("command", [["--help"], ["study", "list"], ["run", "--help"]])
def test_what_the_command_prints_of_itself_needs_nothing_heavy(command):
    said, imported = _answer(*command, of=("torch", "xarray", "netCDF4", "dask", "matplotlib", "scipy"))
    assert imported == "[]"
    assert "Usage" in said or "tian2020" in said


@pytest.mark.parametrize("command", ["show", "validate"])
def test_what_reads_an_archive_imports_what_reads_netcdf(command, tmp_path):
    """`tsdyn show` takes little longer than ``import xarray, netCDF4, dask.array``."""
    copied = shutil.copytree(ROOT / "tests" / "data" / "sweep-v2", tmp_path / "sweep")  # whose index is written anew
    assert _answer(command, copied, of=("torch", "matplotlib", "distributed"))[1] == "[]"


def test_every_public_name_resolves():
    for name in tsdyn.__all__:
        assert getattr(tsdyn, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tsdyn.no_such_name


def test_the_wheel_holds_every_wing_and_only_tsdyn(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {re.split(r"[/-]", n)[0] for n in names} == {"tsdyn"}
    modules = {m.replace(".", "/") + ("/__init__.py" if f.name == "__init__.py" else ".py") for m, f in FILES.items()}
    sources = {str(f.relative_to(ROOT)) for s in ("cpp", "hpp", "pyi") for f in (ROOT / "tsdyn").rglob(f"*.{s}")}
    assert names >= modules | sources | {"tsdyn/py.typed"}


def test_the_conda_recipe_has_the_lower_bounds_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = dict(re.match(r"([\w-]+)(?:\[.*\])?(>=[\d.]+)$", line).groups() for line in project["dependencies"])
    declared["distributed"] = declared["dask"]
    declared = {{"torch": "pytorch", "matplotlib": "matplotlib-base"}.get(n, n.lower()): b for n, b in declared.items()}
    recipe = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    run = recipe[recipe.index("  run:") : recipe.index("test:")]
    assert dict(re.findall(r"- (\S+) (>=\S+)", run)) == declared | {"python": project["requires-python"]}


def test_annotations_are_checked_in_the_suite(pytestconfig):
    if pytestconfig.getoption("--no-typechecks"):
        pytest.skip("asked for")
    with pytest.raises(TypeError, match="name"):  # a plain annotation
        activations.activation(3)
    with pytest.raises(TypeError, match="places"):  # of a dataclass
        Frame(activations.activation("relu"), places=("above",))
    f, g = torch.zeros(4, 2), torch.zeros(4, 3)
    with pytest.raises(TypeError, match="g"):  # the name of a dimension, across arguments
        batch_norm_gradient(f, g)
    assert typechecks.unchecked(batch_norm_gradient)(f, torch.zeros(4, 2)).shape == (4, 2)
    for _ in range(typechecks.CALLS):  # the first calls of a test, and those of the next one again
        activations.activation("relu")
    typechecks.test_begins()
    with pytest.raises(TypeError, match="name"):
        activations.activation(3)


def test_what_is_forked_has_everything_imported_though_dask_asks_for_less(monkeypatch):
    """Else each worker and command would import torch itself wherever a worker of dask's was the first to begin."""
    monkeypatch.setattr(distributed.utils, "_forkserver_preload_set", False, raising=False)
    distributed.utils.get_mp_context()
    assert multiprocessing.forkserver._forkserver._preload_modules == processes.PRELOADED
