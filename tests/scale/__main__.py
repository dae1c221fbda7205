"""``python -m tests.scale [TRIAL ...]``: large archives read lazily, many runs opened, workers killed.

Prints what docs/performance/sweeps.md quotes; exit 1 if a result is wrong or a sweep did not complete.  Takes minutes
and, below --scratch, as many GB as asked for, which go at the end.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path


def main() -> int:
    from tests.scale import trials

    parser = argparse.ArgumentParser(prog="python -m tests.scale")
    parser.add_argument("trials", nargs="*", choices=[[], *trials.TRIALS], metavar="TRIAL")
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of the archive that is read")
    parser.add_argument("--runs", type=int, default=10_000, help="that are opened")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scratch", type=Path, help="made archives are kept here, and used again")
    chosen = parser.parse_args()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    scratch = chosen.scratch or Path(tempfile.mkdtemp(prefix="tsdyn-scale-"))
    try:
        for name in chosen.trials or trials.TRIALS:
            trials.TRIALS[name](scratch, chosen)
    except AssertionError as error:
        print(f"BROKEN: {error}")
        return 1
    finally:
        if not chosen.scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
