"""The house itself: what may import what, what a wheel holds, what an import costs."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tsdyn

ROOT = Path(__file__).resolve().parent.parent
RANKS = {
    "_version": 0,
    "axes": 0,
    "schema": 0,
    "experiment": 0,
    "durable": 0,
    "interrupts": 0,
    "points": 0,
    "lock": 1,
    "netcdf": 1,
    "segments": 2,
    "grid": 2,
    "index": 2,
    "archive": 3,
    "integrity": 4,
    "activations": 1,
    "interaction": 1,
    "population_loss": 2,
    "stationary": 1,
    "gradient_flow": 2,
    "overlaps": 2,
    "orthants": 0,
    "order_parameters": 3,
    "online": 4,
    "conventions": 0,
    "online_experiment": 4,
    "flow": 5,
    "critical_points": 3,
    "classification": 4,
    "population": 5,
    "flow_experiment": 1,
    "flow_runner": 5,
    "networks": 1,
    "deepnets": 1,
    "images": 1,
    "data": 1,
    "teachers": 2,
    "students": 3,
    "alignment": 2,
    "memory": 0,
    "kernel": 0,
    "convolution": 1,
    "assumptions": 1,
    "module_state": 0,
    "curvature": 2,
    "jacobians": 2,
    "per_sample": 2,
    "derivatives": 2,
    "dynamics": 2,
    "theory": 2,
    "training": 2,
    "forward": 2,
    "deeptraining": 3,
    "flowtraining": 3,
    "observables": 3,
    "members": 4,
    "costs": 5,
    "runner": 5,
    "sweep": 6,
    "cli": 7,
}
#: Within a rank, who may import whom.
SAME_RANK = {
    ("experiment", "schema"),
    ("experiment", "points"),
    ("points", "schema"),
    ("networks", "activations"),
    ("assumptions", "networks"),
    ("derivatives", "curvature"),
    ("derivatives", "jacobians"),
    ("derivatives", "per_sample"),
    ("interaction", "activations"),
    ("students", "archive"),
    ("data", "images"),
    ("grid", "segments"),
    ("grid", "index"),
    ("index", "segments"),
    ("deepnets", "networks"),
    ("deepnets", "activations"),
    ("runner", "costs"),
}


def _imports(file: Path) -> set[str]:
    """Modules of tsdyn that `file` imports while it is itself imported; inside functions is the command's business."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tsdyn":
            below = node.module.split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tsdyn.")}
    return found


def test_imports_point_down():
    files = {f.stem: f for f in (ROOT / "tsdyn").glob("*.py") if f.stem != "__init__"}
    assert set(files) == set(RANKS)
    for name, file in files.items():
        for other in _imports(file):
            assert RANKS[other] < RANKS[name] or (name, other) in SAME_RANK, f"{name} imports {other}"


def test_analysis_and_studies_import_no_engine():
    for folder in ("analysis", "studies"):
        for file in (ROOT / folder).glob("*.py"):
            allowed = {"analysis", "studies", "experiment", "flow_experiment", "online_experiment"}
            allowed |= {"archive", "schema", "points", "layer"}
            if file.stem in (
                "members",
                "audit",
                "similarity",
                "connectivity",
            ):  # which make networks of what was recorded, and ask the theory
                allowed |= {"data", "networks", "alignment", "theory"}
            if file.stem == "simsek2023_one_neuron":  # which maps a network's output
                allowed |= {"networks"}
            assert _imports(file) <= allowed, file


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


def test_every_public_name_resolves():
    for name in tsdyn.__all__:
        assert getattr(tsdyn, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tsdyn.no_such_name


def test_the_wheel_holds_only_tsdyn(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"tsdyn"}
    for needed in ("tsdyn/py.typed", "tsdyn/__init__.pyi", "tsdyn/analysis/lift.py", "tsdyn/studies/__init__.py"):
        assert needed in names
