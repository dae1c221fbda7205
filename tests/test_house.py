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
    "registers": 0,
    "axes": 0,
    "node_pairs": 0,
    "vocabulary": 0,
    "schema": 0,
    "experiment_errors": 0,
    "experiment_parts": 0,
    "experiment_rules": 0,
    "experiment_shapes": 0,
    "experiment": 0,
    "protocol": 1,
    "study_directories": 2,
    "flow_members": 7,
    "online_members": 7,
    "kinds": 8,
    "whole_files": 0,
    "wrong_numbers": 0,
    "hdf5": 0,
    "interrupts": 0,
    "terminal": 0,
    "sweep_axes": 0,
    "lock": 1,
    "netcdf": 1,
    "joining": 2,
    "run_directory": 2,
    "headers": 2,
    "sweep_directory": 2,
    "selecting": 1,
    "reading": 2,
    "lazy_arrays": 2,
    "archive": 3,
    "integrity": 4,
    "activations": 0,
    "interaction": 1,
    "population_loss": 2,
    "stationary": 1,
    "gradient_flow": 2,
    "overlaps": 2,
    "orthants": 0,
    "order_parameters": 3,
    "online": 6,
    "conventions": 0,
    "flow": 7,
    "critical_points": 3,
    "classification": 4,
    "population": 5,
    "networks": 1,
    "batch_norm": 0,
    "propagate": 1,
    "torch_io": 1,
    "theory_inputs": 2,
    "coupling_moments": 2,
    "images": 1,
    "inputs": 2,
    "data": 1,
    "teachers": 2,
    "students": 3,
    "alignment": 2,
    "memory": 0,
    "native": 0,
    "convolution": 1,
    "assumptions": 1,
    "module_state": 0,
    "curvature": 2,
    "jacobians": 2,
    "per_sample": 2,
    "derivatives": 2,
    "dynamics": 2,
    "theory": 2,
    "losses": 0,
    "batches": 0,
    "rules": 1,
    "ensemble": 2,
    "batched": 3,
    "graph": 4,
    "propagated": 3,
    "general": 3,
    "compiled_step": 4,
    "train": 5,
    "compiled_sums": 2,
    "flowtraining": 3,
    "own_modules": 4,
    "observables": 5,
    "provenance": 5,
    "diagnosis": 5,
    "testing": 11,
    "members": 6,
    "costs": 8,
    "runner": 9,
    "sweep": 10,
    "cli": 11,
}
#: Within a rank, who may import whom.
SAME_RANK = {
    ("reading", "study_directories"),
    ("run_directory", "study_directories"),
    ("experiment", "experiment_errors"),
    ("experiment", "experiment_parts"),
    ("experiment", "experiment_rules"),
    ("experiment", "experiment_shapes"),
    ("experiment_parts", "experiment_errors"),
    ("experiment_parts", "schema"),
    ("experiment_rules", "experiment_errors"),
    ("experiment_rules", "experiment_parts"),
    ("experiment_rules", "schema"),
    ("experiment_rules", "sweep_axes"),
    ("experiment_shapes", "experiment_parts"),
    ("experiment_shapes", "schema"),
    ("activations", "registers"),
    ("experiment", "schema"),
    ("experiment", "sweep_axes"),
    ("sweep_axes", "schema"),
    ("networks", "propagate"),
    ("networks", "torch_io"),
    ("torch_io", "propagate"),
    ("theory", "coupling_moments"),
    ("theory", "theory_inputs"),
    ("coupling_moments", "theory_inputs"),
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
    ("run_directory", "joining"),
    ("images", "netcdf"),
    ("headers", "run_directory"),
    ("sweep_directory", "run_directory"),
    ("reading", "headers"),
    ("reading", "lazy_arrays"),
    ("lazy_arrays", "headers"),
    ("lazy_arrays", "run_directory"),
    ("reading", "run_directory"),
    ("reading", "sweep_directory"),
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
            allowed = {"analysis", "studies", "experiment"}
            allowed |= {"archive", "schema", "sweep_axes", "layer", "node_pairs"}
            if file.stem in (
                "members",
                "audit",
                "similarity",
                "connectivity",
            ):  # which make networks of what was recorded, and ask the theory
                allowed |= {"data", "networks", "alignment", "theory", "losses", "teachers"}
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
