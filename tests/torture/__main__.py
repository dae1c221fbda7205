"""``python -m tests.torture [--short] [TRIAL ...]``: repeats the trials of docs/reliability.md.

Prints one line per trial; exit 1 if a promise was broken.  ``--short`` is what the test suite runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Trial → how often, in full and in short.
NUMBERS = {
    "kills": (500, 2),
    "prefixes": (100_000, 2),
    "power_cuts": (200, 3),
    "at_once": (200, 4),
    "faults": (100_000, 3),
    "full_disks": (50, 2),
    "two_writers": (100, 2),
    "readers": (20, 0),  # needs no shim: the suite has a test of its own
    "by_number.calls": (10_000, 4),
    "by_number.memory": (10, 2),
    "states.steps": (2000, 0),  # the suite has a test of its own
    "fuzz.archives": (3000, 3),
    "fuzz.experiments": (2000, 8),
    "inputs.files": (840, 11),
}
SHIM = "TSDYN_TORTURE_SHIM"


def _with_shim() -> None:
    """Restart with the shim loaded, which must be there before the C library is."""
    library = Path(tempfile.mkdtemp(prefix="tsdyn-torture-")) / "shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), SHIM: str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.torture", *sys.argv[1:]], environment)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("trials", nargs="*", choices=[[], *NUMBERS], metavar="TRIAL")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--number", type=int)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if SHIM not in os.environ:
        _with_shim()

    import torch

    from tests.torture import by_number, fuzz, inputs, states, trials

    modules = {"trials": trials, "fuzz": fuzz, "inputs": inputs, "by_number": by_number, "states": states}

    torch.set_num_threads(1)
    logging.getLogger("tsdyn").setLevel(logging.ERROR)  # stale locks are taken over hundreds of times
    failed = False
    for name in chosen.trials or NUMBERS:
        number = chosen.number or NUMBERS[name][chosen.short]
        if not number:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tsdyn-torture-") as scratch:
            try:
                module, _, function = name.rpartition(".")
                told = getattr(modules[module or "trials"], function)(
                    Path(scratch), random.Random(f"{name} {chosen.seed}"), number
                )
            except AssertionError as error:
                failed, told = True, f"BROKEN: {error}"
        print(f"{name}: {told} [{time.monotonic() - began:.0f} s]", flush=True)
    shutil.rmtree(Path(os.environ[SHIM]).parent)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
