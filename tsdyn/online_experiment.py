"""Online learning beside its equation, as a value: students, teachers, seeds.  Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tomli_w
import xarray as xr

from tsdyn import archive
from tsdyn.experiment import ExperimentError
from tsdyn.lock import Lock
from tsdyn.whole_files import DirectoryError, make_directory, write_text

FILE, RESULT, PARTS = "experiment.toml", "online.nc", "parts"
#: Which layers learn.
LAYERS = ("first", "both")


@dataclass(frozen=True)
class OnlineExperiment:
    """Students of several widths on the samples of a two-layer teacher, in N dimensions and by the equation.

    Every seed draws weights N(0, 1) in N dimensions for teacher and student; outgoing weights are 1 where the first
    layer learns alone, and N(0, 1) where both do.  Simulation and equation start from the same order parameters.

    Args:
        name: Of the directory, and in the archive.
        nodes: Student widths K.
        teacher_nodes: M.
        layers: ``first``, ``both``; each runs with every width.
        inputs: N.
        learning_rate: η, of both layers where both learn.
        noise: Standard deviation of the noise on the teacher's output.
        last: α at the end.
        points: Reported α, evenly in log α from 0.1 on.
        activation: With a fluctuation that `flow.order_parameters` knows.
        seeds: How many, from 0.

    Raises:
        ExperimentError: for counts below 1, N < K + M, unknown layers and an end before 0.1.
    """

    name: str
    nodes: tuple[int, ...]
    teacher_nodes: int = 2
    layers: tuple[str, ...] = LAYERS
    inputs: int = 500
    learning_rate: float = 0.5
    noise: float = 0.0
    last: float = 300.0
    points: int = 60
    activation: str = "erf"
    seeds: int = 5

    def __post_init__(self) -> None:
        counts = (*self.nodes, self.teacher_nodes, self.points - 1, self.seeds, len(self.nodes), len(self.layers))
        if min(counts) < 1 or not set(self.layers) <= set(LAYERS) or self.last <= 0.1:
            raise ExperimentError(
                f"OnlineExperiment {self.name}: nodes={self.nodes}, teacher_nodes={self.teacher_nodes}, "
                f"points={self.points}, seeds={self.seeds}, layers={self.layers}, last={self.last}; at least one of "
                f"each and two points, layers of {', '.join(LAYERS)}, and an end beyond 0.1"
            )
        if self.inputs < max(self.nodes) + self.teacher_nodes:
            raise ExperimentError(
                f"OnlineExperiment {self.name}: inputs={self.inputs} is too small for {max(self.nodes)} student and "
                f"{self.teacher_nodes} teacher nodes"
            )

    @property
    def alpha(self) -> np.ndarray:
        """Reported α: whole steps."""
        steps = np.round(np.geomspace(0.1, self.last, self.points) * self.inputs)
        return np.unique(steps.clip(1)) / self.inputs

    def to_toml(self) -> str:
        """All fields; also what a directory is checked against before its run goes on."""
        return tomli_w.dumps(asdict(self))

    def run(self, directory: Path, *, report: Callable[[str], None] = lambda _: None) -> xr.Dataset:
        """Run what `directory` does not hold yet, then join it in ``online.nc``.

        Returns:
            Dataset over layers, nodes, seed and alpha: ``eg_simulation`` and ``eg_equation``.

        Raises:
            DirectoryError: if the directory is another experiment's.
        """
        make_directory(directory / PARTS)
        with Lock(directory):
            file, text = directory / FILE, self.to_toml()
            if not file.exists():
                write_text(file, text)
            elif file.read_text(encoding="utf-8") != text:
                raise DirectoryError(f"{directory}: holds another experiment ({FILE} differs); give another directory")
            if not (directory / RESULT).is_file():
                self._compute(directory, report)
        return xr.load_dataset(directory / RESULT, engine="netcdf4")

    def _compute(self, directory: Path, report: Callable[[str], None]) -> None:
        parts = {(layer, K): directory / PARTS / f"{layer}-{K}.nc" for layer in self.layers for K in self.nodes}
        for (layer, K), path in parts.items():
            if not path.is_file():
                archive.write_dataset(path, self.one(layer, K))
                report(f"layers {layer}, K = {K}")
        rows = [[xr.load_dataset(parts[layer, K], engine="netcdf4") for K in self.nodes] for layer in self.layers]
        ds = _joined([_joined(row, "nodes") for row in rows], "layers")
        ds = ds.assign_coords(layers=list(self.layers), nodes=list(self.nodes))
        archive.write_dataset(directory / RESULT, ds.assign_attrs(name=self.name, experiment=self.to_toml()))
        for path in parts.values():
            path.unlink()

    def one(self, layer: str, nodes: int) -> xr.Dataset:
        """Simulation and equation of one width."""
        from tsdyn import flow  # torch, which a list of studies does not need

        Q, R, T, v, A = (
            np.stack(x) for x in zip(*(self._start(layer, nodes, s) for s in range(self.seeds)), strict=True)
        )
        second = self.learning_rate if layer == "both" else 0.0
        simulated = flow.online(
            Q, R, T, v, A,
            inputs=self.inputs, learning_rate=self.learning_rate, second_learning_rate=second, noise=self.noise,
            activation=self.activation, alpha=self.alpha, seeds=self.seeds,
        )  # fmt: skip
        solved = flow.order_parameters(
            Q, R, T, v, A,
            learning_rate=self.learning_rate, second_learning_rate=second, noise=self.noise,
            activation=self.activation, alpha=self.alpha,
        )  # fmt: skip
        ds = xr.Dataset({"eg_simulation": simulated["eg"], "eg_equation": solved["eg"]}).drop_vars("stop_reason")
        ds["eg_simulation"].attrs["long_name"] += f", online SGD, N = {self.inputs}"
        ds["eg_equation"].attrs["long_name"] += ", differential equation, N → ∞"
        return ds

    def _start(self, layer: str, nodes: int, seed: int) -> tuple[np.ndarray, ...]:
        draw, M = np.random.default_rng([seed, nodes, self.teacher_nodes]), self.teacher_nodes
        w, B = draw.standard_normal((nodes, self.inputs)), draw.standard_normal((M, self.inputs))
        outgoing = [draw.standard_normal(n) if layer == "both" else np.ones(n) for n in (nodes, M)]
        return w @ w.T / self.inputs, w @ B.T / self.inputs, B @ B.T / self.inputs, *outgoing


def _joined(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    return xr.concat(
        parts, dim, data_vars="all", coords="different", compat="equals", join="exact", combine_attrs="override"
    )
