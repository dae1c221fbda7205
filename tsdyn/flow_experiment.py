"""Gradient flow from seeded starts, as a value: which students, which teachers, how many seeds.  Imports no torch.

`flow_runner` runs it.  It stands beside `Experiment` where a study needs no epochs and no samples: the population loss
on Gaussian inputs, two layers, orthonormal teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import tomli_w
import xarray as xr

from tsdyn.experiment import ExperimentError


class Size(NamedTuple):
    """One point: students of n nodes against a teacher of k."""

    activation: str
    n: int
    k: int


@dataclass(frozen=True)
class FlowExperiment:
    """Gradient flows of the population loss, all seeds at each size.

    The teacher has k orthonormal nodes along the axes and outgoing weights 1.  Students start as Glorot & Bengio
    (2010): each weight N(0, 2/(inputs + outputs of its layer)); what a seed draws depends on the seed and n, d only.

    Args:
        name: Of the directory, and in the archive.
        sizes: Pairs (n, k) of nodes of student and teacher.
        activations: Each runs at every size.
        seeds: How many, from 0.
        inputs: d; k + 1 unless given.
        times: First, last and number of output times, evenly in log t; the ends alone without.

    Raises:
        ExperimentError: for no sizes, sizes or seeds below 1, d < k, or times that do not increase.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    activations: tuple[str, ...] = ("erf",)
    seeds: int = 20
    inputs: int | None = None
    times: tuple[float, float, int] | None = None

    def __post_init__(self) -> None:
        wrong = [f"n={n}, k={k}" for n, k in self.sizes if n < 1 or k < 1]
        if wrong or not self.sizes or not self.activations or self.seeds < 1:
            raise ExperimentError(
                f"FlowExperiment {self.name}: sizes={self.sizes}, activations={self.activations}, seeds={self.seeds}; "
                "at least one of each, and at least one node"
            )
        widest = max(k for _, k in self.sizes)
        if self.inputs is not None and self.inputs < widest:
            raise ExperimentError(
                f"FlowExperiment {self.name}: inputs={self.inputs} is too small for a teacher of {widest} orthonormal "
                f"nodes; it needs at least {widest}"
            )
        if self.times is not None and not (0 < self.times[0] < self.times[1] and self.times[2] >= 2):
            raise ExperimentError(
                f"FlowExperiment {self.name}: times={self.times}; first, last and number of times, 0 < first < last"
            )

    def points(self) -> Iterator[Size]:
        """Activation by activation, the cheapest sizes first."""
        for activation in self.activations:
            for n, k in sorted(dict.fromkeys(self.sizes), key=lambda size: (size[0] * size[1], size)):
                yield Size(activation, n, k)

    def to_toml(self) -> str:
        """The fields that are set; also what a directory is checked against before its run goes on."""
        return tomli_w.dumps({key: value for key, value in asdict(self).items() if value is not None})

    def run(self, directory: Path, *, report: Callable[[str], None] = lambda _: None) -> xr.Dataset:
        """`flow_runner.run` of this experiment."""
        from tsdyn import flow_runner  # torch, which a list of studies does not need

        return flow_runner.run(self, directory, report=report)
