"""Runs studies at desk scale and stores what they took beside what was estimated, for docs/reproduction.md.

``python -m tests.desk_runs NAME ...`` (``all``: every study that needs no files) takes minutes for each, all in a
process of its own; ``--paper`` stores the estimates at paper scale instead, which train no students.  Times are
processor times of one thread, so that they mean something on a busy machine; archives stay in ``--runs`` if given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Studies that read files of the user's, at every scale.
OF_FILES = ("tian2019-cifar10", "tian2020-cifar10")


def estimated(name: str, scale: str, path: Path) -> dict[str, float]:
    """Seconds of processor time, megabytes of memory and disk as `tsdyn study run` announces them."""
    from tsdyn import studies
    from tsdyn.running import estimates, sweep

    estimates.time.perf_counter = time.process_time  # type: ignore[attr-defined]
    study = studies.load(name)
    work = sweep.completed(study.EXPERIMENTS[scale])
    costs = sweep.estimate(sweep.unfinished(work, path)).values()
    return {
        "seconds": (run := sum(c.seconds for c in costs)) + studies.seconds_of_measuring(study, work, run),
        "memory_mb": max(c.memory for c in costs) / 1e6,
        "disk_mb": sum(c.disk for c in costs) / 1e6,
    }


def run(name: str, path: Path) -> dict[str, Any]:
    """Run, measure and draw a study; processor seconds of each part, peak memory and size of the archive."""
    from tsdyn.analysis import captions

    from tsdyn import studies
    from tsdyn.archive import reading
    from tsdyn.running import sweep

    study = studies.load(name)
    told = estimated(name, "desk", path)
    marks = [time.process_time()]
    sweep.run(study.EXPERIMENTS["desk"], path)
    marks.append(time.process_time())
    archived = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = reading.open(path)
    measured = study.measure(found).load()
    measured = measured.assign_attrs(captions.told(found) | {"study": name, "scale": "desk"} | measured.attrs)
    measured.to_netcdf(path / "measured.nc")
    marks.append(time.process_time())
    study.draw(measured).savefig(path / "figure.png")
    marks.append(time.process_time())
    parts = dict(zip(("run", "measure", "draw"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return {
        "source": study.SOURCE,
        "cpu_seconds": round(time.process_time(), 1),
        "parts": {key: round(value, 1) for key, value in parts.items()},
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "run_memory_mb": round(memory),
        "disk_mb": round(archived / 1e6, 2),
        "estimated": {key: round(value, 2) for key, value in told.items()},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("names", nargs="*")
    asked.add_argument("--runs", type=Path)
    asked.add_argument("--paper", action="store_true")
    asked.add_argument("--one", action="store_true", help="this process is of one study")
    given = asked.parse_args()
    if given.one:
        (name,) = given.names
        told = estimated(name, "paper", given.runs / "none") if given.paper else run(name, given.runs / name)
        print(json.dumps(told))
        return
    import tsdyn
    from tests import agreement
    from tsdyn import studies

    scale = "paper" if given.paper else "desk"
    own = [n for n in studies.names() if n not in OF_FILES]
    own = [n for n in own if isinstance(studies.load(n).EXPERIMENTS[scale], tsdyn.Experiment)]  # no file of the user's
    names = own if given.names == ["all"] else given.names
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "tests.desk_runs", "--one", name, "--runs", str(given.runs or folder)]
            words += ["--paper"] if given.paper else []
            made = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
        if made.returncode:
            print(f"{name}: exit {made.returncode}", file=sys.stderr)
            continue
        known = agreement.stored()
        known.setdefault("paper" if given.paper else "desk", {})[name] = json.loads(made.stdout.splitlines()[-1])
        agreement.keep(known)


if __name__ == "__main__":
    main()
