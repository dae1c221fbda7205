"""Sweep archives of any size in a minute: files laid out by tsdyn's own writer, filled with drawn correlations."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import netCDF4
import numpy as np

from tests.cases import small
from tsdyn import schema, vocabulary
from tsdyn.archive import hdf5, netcdf, sweep_directory, whole_files
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT
from tsdyn.experiment.experiment import Experiment

#: About 100 MB a run: what the large archives are made of.
LARGE = small(
    name="large", seeds=32, teacher__widths=[100, 20, 50], training__epochs=199, student__overrealization=5.0,
    record__observables=["mse", "correlation"],
)  # fmt: skip
#: About 0.1 MB a run: 10,000 of them are many files.
MANY = small(name="many", seeds=2, training__epochs=20, record__observables=["mse", "correlation"])


def swept(experiment: Experiment, runs: int) -> Experiment:
    """`experiment` at so many learning rates."""
    return experiment.replace({"sweep": {"training.learning_rate": [1e-3 + 1e-6 * i for i in range(runs)]}})


def correlations(experiment: Experiment, position: int, layer: int) -> np.ndarray:
    """(seed, epoch, teacher_node, node) of one run: students that leave 0 for what they were drawn to reach."""
    layout, epochs = experiment.layout, len(experiment.schedule)
    teacher_nodes, nodes = layout.block(vocabulary.VARIABLES["correlation"], layer)
    draw = np.random.default_rng([position, layer])
    ends = draw.uniform(-1, 1, (len(layout.seeds), 1, teacher_nodes, nodes))
    pace = np.linspace(0, 1, epochs)[:, None, None]
    return (ends * pace).astype(experiment.dtype)


def _write(task: tuple[Path, str, int]) -> int:
    """One finished run; returns its bytes."""
    path, text, position = task
    experiment = Experiment.from_toml_text(text)
    layout, names = experiment.layout, schema.expand(experiment.record.observables)
    size = netcdf.bytes_per_epoch(layout, names, experiment.dtype) * len(experiment.schedule)
    attrs = {"experiment": text, "name": experiment.name, "digest": experiment.digest, "schema_version": schema.VERSION}
    with hdf5.guarded():
        nc = netCDF4.Dataset("run", "w", format="NETCDF4", memory=size)
        netcdf.create(nc, layout, experiment.schedule, (*names, *experiment.constants), experiment.dtype, attrs)
        for layer in range(1, layout.depth + 1):
            at = netcdf.index(vocabulary.VARIABLES["correlation"], layout, slice(0, len(experiment.schedule)), layer)
            nc["correlation"][at] = correlations(experiment, position, layer)
        nc["mse_eval"][:] = np.exp(-np.arange(len(experiment.schedule)) / 50)
        content = nc.close()
    path.mkdir(parents=True)
    (path / EXPERIMENT).write_text(text, encoding="utf-8")
    whole_files.write_bytes(path / ARCHIVE, content, seal=True)
    return len(content)


def sweep(path: Path, experiment: Experiment) -> int:
    """Every point of `experiment` as a finished run below `path`; returns the bytes of all."""
    points = sweep_directory.write_sweep(path, experiment)
    tasks = [(path / name, single.to_toml(), position) for position, (name, single) in enumerate(points.items())]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.imap_unordered(_write, tasks, chunksize=4))
