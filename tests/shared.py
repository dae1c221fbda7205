"""What is made once for the whole suite, whatever the number of its workers, and only read afterwards."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(tmp_path_factory: Any, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` as `make` left it, made by the worker that asks first; the others wait for it.

    Whoever writes into it works on a copy.  What fails is made again by the next that asks.
    """
    base = tmp_path_factory.getbasetemp()
    # workers of pytest-xdist have folders of their own in that of the run
    shared = Path(base.parent if base.name.startswith("popen-gw") else base) / "shared"
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for attempt in range(100):
            folder = shared / f"{name}-{attempt}"
            if (folder / "whole").exists():
                return folder / "made"
            if not folder.exists():
                (folder / "made").mkdir(parents=True)
                make(folder / "made")
                (folder / "whole").touch()
                return folder / "made"
    raise AssertionError(f"{name} could not be made")
