"""Reading 60 points of 0.4 MB, before and after one visit per file: ``python -m tests.benchmarks.small_points``.

Before, a file was opened by the netCDF library for every variable, layer and task; that way of reading is put in the
place of the present one on the same files, in the same run.  Prints seconds of processor time and their ratio; exits 1
if a series takes more than 0.15 s, ``to_netcdf`` more than 2 s, or members are more than 1.5 times slower lazily.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import netCDF4
import numpy as np
from tsdyn.analysis import members, similarity

import tsdyn
from tests.cases import small
from tsdyn.archive import hdf5, small_files

POINTS = 60


def opened_each_time(
    path: Path, spans: Mapping[str, tuple[slice, ...]], dtypes: Mapping[str, np.dtype]
) -> dict[str, np.ndarray]:
    """Numbers of variables, each from a file that the netCDF library opens for it."""
    found = {}
    for name, span in spans.items():
        with netCDF4.Dataset(path) as nc:
            nc.set_auto_mask(False)
            found[name] = np.asarray(nc[name][span], dtypes[name])
    return found


def before() -> AbstractContextManager[object]:
    """A context in which every variable of a file costs a visit."""
    stack = ExitStack()
    stack.enter_context(patch.object(small_files, "FEW", 1 << 30))
    stack.enter_context(patch.object(hdf5, "read_all", opened_each_time))
    return stack


def cpu(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep"
        asked = small(
            seeds=4, teacher__widths=[20, 10, 10], training__epochs=12, training__steps_per_epoch=1, data__train=20,
            data__eval=200, record__observables=["loss", "mse", "weight", "correlation", "fanout_norm"],
        )  # fmt: skip
        tsdyn.run(asked.replace({"sweep": {"training.learning_rate": np.geomspace(1e-4, 1e-2, POINTS).tolist()}}), path)
        size = sum(file.stat().st_size for file in path.rglob("archive.nc")) / POINTS
        work: dict[str, tuple[float, Callable[[], object]]] = {
            "series": (0.15, lambda: tsdyn.open(path)["loss_eval"].isel(epoch=-1).compute()),
            "to_netcdf": (2.0, lambda: tsdyn.open(path).to_netcdf(Path(folder) / f"{time.time_ns()}.nc")),
        }
        tsdyn.open(path)["loss_eval"].isel(epoch=0).compute()  # what is imported once
        over = 0
        print(f"{POINTS} points of {size / 1e6:.2f} MB")
        for name, (bound, run) in work.items():
            taken = {}
            for when, way in (("before", before), ("after", nullcontext)):
                small_files._kept.clear()
                small_files._asked.clear()
                with way():
                    taken[when] = cpu(run)
            over += taken["after"] > bound
            ratio = taken["before"] / taken["after"]
            told = f"{taken['before']:.2f} s before, {taken['after']:.2f} s after ({ratio:.1f} times), at most {bound}"
            print(f"{name}: {told}")
        ds = tsdyn.open(path).isel(learning_rate=slice(0, 10))
        loaded = ds.load().copy()
        each = {
            name: cpu(lambda of=of: members.each(of, lambda m: [float(m.student.weights[0].norm())], ["x"]).compute())
            for name, of in (("loaded", loaded), ("lazy", tsdyn.open(path).isel(learning_rate=slice(0, 10))))
        }
        over += each["lazy"] > 1.5 * each["loaded"]
        print(f"members.each of {10 * 4 * 13}: {each['loaded']:.2f} s loaded, {each['lazy']:.2f} s lazy")
        eight = tsdyn.open(path).isel(learning_rate=slice(0, 2), epoch=-1)
        taken_by = cpu(lambda: similarity.student_teacher(eight).compute())
        print(f"similarity.student_teacher of 8: {taken_by:.2f} s")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
