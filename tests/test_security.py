"""The promises of docs/security.md that no other test is about."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tsdyn.problem import images

ROOT = Path(__file__).resolve().parent.parent
#: A sentence of the page → the tests that hold it.
HELD = {
    "Experiment files.": ["test_experiment_files_that_mean_harm", "test_numbers_of_thousands_of_digits_are_refused"],
    "pickled arrays are refused": ["test_weights_are_loaded_without_executing_anything"],
    "the Python version of CIFAR-10": ["test_the_pickled_cifar10_is_refused_with_the_way_out"],
    "A damaged or truncated file": ["test_every_byte_flipped_or_cut_off_is_read_or_refused_in_a_sentence"],
    "declares are compared with its length and with the free memory": [
        "test_what_unpacks_to_more_than_memory_is_refused_before_it_is_unpacked"
    ],
    "no more of a `.gz` is unpacked than its header declares": [
        "test_a_gzip_is_unpacked_as_far_as_its_header_announces"
    ],
    "a file that crashes the library": ["test_a_netcdf_file_that_crashes_the_library_is_refused"],
    "isolated mode": ["test_a_data_file_is_read_without_importing_what_lies_beside_it"],
    "`weights_only=True`": ["test_weights_are_loaded_without_executing_anything"],
    "does not search the working directory": [
        "test_the_command_runs_a_module_on_the_python_path_and_not_one_of_the_working_directory"
    ],
    "or a function annotated to return one, is called": ["test_what_a_file_cannot_name_is_refused"],
    "Symbolic links inside a run": [
        "test_symbolic_links_in_a_run_are_refused",
        "test_nothing_is_read_moved_or_removed_through_a_link",
    ],
    "Control characters": ["test_control_characters_do_not_reach_the_terminal"],
    "whoever lacks that certificate is refused": ["test_nobody_without_the_certificate_reaches_a_sweep_s_workers"],
    "Without the package `cryptography`": ["test_workers_without_cryptography_say_what_to_install"],
    "The SHA-256 of every input file": ["test_another_input_file_is_refused_on_resume_with_both_named"],
    "a path with `://`": ["test_a_run_is_refused_a_url_before_anything_is_trained"],
    "encrypted archives": ["test_an_encrypted_zip_is_refused"],
    "as a figure's name": ["test_a_figure_is_not_written_through_a_link"],
    "tsdyn says so each time": ["test_a_scheduler_s_address_decides_how_it_is_talked_to"],
}


@pytest.mark.parametrize("sentence", HELD)
def test_each_promise_of_the_page_has_its_test(sentence):
    assert sentence in " ".join((ROOT / "docs" / "security.md").read_text(encoding="utf-8").split())
    written = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for name in HELD[sentence]:
        assert re.search(rf"^def {name}\(", written, re.MULTILINE), name


def test_a_data_file_is_read_without_importing_what_lies_beside_it(tmp_path, monkeypatch):
    """By the process that reads it first, whose directory would be the first to import from."""
    xr.Dataset({"inputs": (("sample", "input"), np.ones((5, 4)))}).to_netcdf(tmp_path / "a.nc")
    for name in ("netCDF4", "numpy", "sys", "site"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()\n", encoding="ascii")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert images.read_arrays("a.nc").pixels.shape == (5, 4)
    assert not (tmp_path / "executed").exists()
    subprocess.run([sys.executable, "-c", "import netCDF4"], check=False)  # which a process not so careful does
    assert (tmp_path / "executed").exists()
