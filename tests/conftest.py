"""Sets one thread, no display and fixed examples, so that results depend neither on chance nor on load."""

import gc
import os
import random
import shutil
import sys
import zlib
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# The hundred subprocesses of the suite would otherwise compile tsdyn's modules each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import dask
import hypothesis
import numpy as np
import pytest
import torch

from tests import processes, typechecks
from tests.shared import once

sys.dont_write_bytecode = False  # or each worker rewrites the assertions of all modules whenever the suite begins
torch.set_num_threads(1)
processes.dask_by_fork()

# `make test` draws its examples from a fixed seed and cannot fail by chance; `make fuzz` searches at random.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile(
    "fuzz", derandomize=False, deadline=None, max_examples=int(os.environ.get("TSDYN_FUZZ", "0")) or 500
)
hypothesis.settings.load_profile("fuzz" if "TSDYN_FUZZ" in os.environ else "fixed")
FUZZING = "TSDYN_FUZZ" in os.environ


def pytest_addoption(parser):
    parser.addoption("--no-typechecks", action="store_true", help="do not check tsdyn's annotations at run time")


def pytest_configure(config):
    gc.disable()  # until all modules are imported, among which there is no garbage
    if not config.getoption("--no-typechecks"):
        typechecks.install()


#: Tests that take so long that they would end last, by themselves, if they did not begin first.
LONG = ("tests/torture/", "tests/archive/test_states.py")


def pytest_collection_finish():
    """Look for garbage from here on, and not again and again among what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # a test makes some 100,000 objects, few of which are garbage in a circle
    gc.enable()
    processes.allow_for_coverage()


def pytest_collection_modifyitems(items):
    """What takes longest first; with `make fuzz` all property tests use the same number of examples."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    if not FUZZING:
        return
    examples = hypothesis.settings.get_profile("fuzz").max_examples
    for item in items:
        test = getattr(item, "obj", None)
        if hypothesis.is_hypothesis_test(test):
            target = getattr(test, "__func__", test)
            own = target._hypothesis_internal_use_settings
            target._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=examples)


@pytest.fixture(autouse=True)
def one_thread():
    """One dask thread: NumPy silences its all-NaN warning by `warnings.catch_warnings`, which is not thread-safe."""
    typechecks.test_begins()
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(autouse=True)
def draws_of_its_own(request):
    """What a test draws without naming a seed depends on its name alone, not on the tests before it in this process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what a test draws from numpy's global generator
    torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """What lies there after a power cut is tried by tests/torture, in a process of its own that syncs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """A folder as it is after the quickstarts; pages and examples read its runs and write files of their own."""
    from tests.desk import lay

    laid = once(tmp_path_factory, "desk", lay)
    return Path(shutil.copytree(laid, tmp_path_factory.mktemp("desk"), dirs_exist_ok=True))
