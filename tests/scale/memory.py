"""How much memory a run of many segments takes at its peak, joining included, beside what was announced."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.cases import small
from tsdyn.experiment.experiment import Experiment

#: How far the peak may be from what was announced.
WITHIN = 0.1


def large(gigabytes: float) -> Experiment:
    """A run that records about so much, of which training takes little."""
    experiment = small(
        name="segments", seeds=8, teacher__widths=[200, 50, 50], student__overrealization=5.0, data__train=40,
        data__eval=20, training__steps_per_epoch=1, record__observables=["mse", "weight"],
    )  # fmt: skip
    epoch = 8 * 8 * (250 * 200 + 50 * 250)
    return experiment.replace({"training.epochs": round(gigabytes * 1e9 / epoch)})


def peak(scratch: Path, gigabytes: float) -> tuple[int, int, int]:
    """Bytes announced by ``tsdyn run``, its peak and that of its joining process included, and segments at most."""
    path = scratch / "segments"
    file = scratch / "segments.toml"
    file.write_text(large(gigabytes).to_toml(), encoding="utf-8")
    command = [sys.executable, "-c", "from tsdyn.cli import main; main()", "run", str(file), "-o", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    most = segments = 0
    while run.poll() is None:
        most = max(most, sum(map(_shared_out, _tree(run.pid))))
        segments = max(segments, len(list(path.glob("segments/*.nc"))))
        time.sleep(0.01)
    assert run.stdout is not None
    said = run.stdout.read()
    found = re.search(r"about (\d+) MB of memory", said)
    assert run.returncode == 0, said
    assert found is not None, said
    return int(found[1]) * 1_000_000, most, segments


def _tree(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        below = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(one for child in below for one in _tree(child))]


def _shared_out(pid: int) -> int:
    """Resident bytes of a process, pages that it shares with others divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
