"""A `FlowExperiment` to one labelled netCDF file, size by size; what was computed is kept when it is interrupted.

At every size: the flow of all seeds, Newton to |∇| ≤ 1e-12, the Hessian's signature, the class with its reason; and
beside them what theory says without a seed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tsdyn import archive
from tsdyn.classification import classify
from tsdyn.critical_points import ODD, copy_average, one_neuron, perturbed_copy
from tsdyn.data import generator
from tsdyn.flow_experiment import FlowExperiment, Size
from tsdyn.gradient_flow import gradient_flow
from tsdyn.lock import Lock
from tsdyn.networks import Network
from tsdyn.population_loss import PopulationLoss
from tsdyn.stationary import polish, signature
from tsdyn.whole_files import DirectoryError, make_directory, write_text

EXPERIMENT, FLOWS, PARTS = "experiment.toml", "flows.nc", "parts"
_WORDS = ("kind", "class", "reason", "stop_reason")
_SOURCE = "Simsek et al. 2023 (arXiv:2311.01644)"
_TEXTS = {
    "loss": "loss L at the end, no ½",
    "gradient_max": "|∇L|_∞ at the end",
    "index": "negative Hessian eigenvalues at the end, −1 where the flow did not arrive",
    "margin": "distance of the class's deciding number from its threshold",
    "stop_time": "time at which the flow stopped",
    "weight": "incoming weights w at the end",
    "outgoing": "outgoing weights a at the end",
    "start_weight": "incoming weights w at the start",
    "start_outgoing": "outgoing weights a at the start",
    "path_weight": "incoming weights w along the flow",
    "path_outgoing": "outgoing weights a along the flow",
    "path_loss": "loss L along the flow",
    "loss_copy_average": "L*(k−n+1), the loss of the least copy-average point",
    "loss_perturbed_copy": "loss of the perturbed n-copy point",
    "index_copy_average": "negative Hessian eigenvalues at the copy-average point, −1 where it is not critical",
    "index_perturbed_copy": "negative Hessian eigenvalues at the perturbed n-copy point, −1 where it is not known",
    "one_neuron_norm": "norm of the best single neuron",
    "one_neuron_outgoing": "outgoing weight of the best single neuron",
    "seconds": "time that this size took",
}


def run(
    experiment: FlowExperiment, directory: Path, *, report: Callable[[str], None] = lambda _: None, workers: int = 0
) -> xr.Dataset:
    """Run what `directory` does not hold yet, then join it in ``flows.nc``.

    Args:
        experiment: What to run.
        directory: Made if missing.
        report: Told one line a size.
        workers: Processes, one thread each; 0 for as many as this process may use cores.

    Returns:
        Dataset over ``point`` (coordinates activation, n, k) and ``seed``: ``kind`` (minimum, saddle, degenerate, not
        stationary, or why the flow stopped short), ``class`` (see `classify`) with ``reason`` and ``margin``, ``loss``,
        weights at start and end (and along the flow if there are times), and seed-free ``loss_copy_average``,
        ``loss_perturbed_copy`` with their indices.  Weights of smaller networks end in NaN.

    Raises:
        DirectoryError: if the directory is another experiment's.
    """
    make_directory(directory / PARTS)
    with Lock(directory):
        _claim(experiment, directory)
        if not (directory / FLOWS).is_file():
            left = [(p, _part(directory, p)) for p in experiment.points() if not _part(directory, p).is_file()]
            for point, seconds in _each(experiment, left, workers or len(os.sched_getaffinity(0))):
                report(f"{point.activation} n={point.n} k={point.k}  {seconds:.1f} s")
            parts = [xr.load_dataset(_part(directory, p), engine="netcdf4") for p in experiment.points()]
            archive.write_dataset(directory / FLOWS, _joined(experiment, parts))
            for point in experiment.points():
                _part(directory, point).unlink()
    return xr.load_dataset(directory / FLOWS, engine="netcdf4")


def _claim(experiment: FlowExperiment, directory: Path) -> None:
    text, file = experiment.to_toml(), directory / EXPERIMENT
    if not file.exists():
        write_text(file, text)
    elif file.read_text(encoding="utf-8") != text:
        raise DirectoryError(f"{directory}: holds another experiment ({EXPERIMENT} differs); give another directory")


def _part(directory: Path, point: Size) -> Path:
    return directory / PARTS / f"{point.activation}-n{point.n}-k{point.k}.nc"


def _each(experiment: FlowExperiment, left: list[tuple[Size, Path]], workers: int) -> Iterator[tuple[Size, float]]:
    """Every size, as it is done; the slowest are begun first so that no process is left with them at the end."""
    if workers == 1 or len(left) < 2:
        for point, path in left:
            yield point, _committed(experiment, point, path)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = {pool.submit(_committed, experiment, point, path): point for point, path in reversed(left)}
        try:
            for done in as_completed(work):
                yield work[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _committed(experiment: FlowExperiment, point: Size, path: Path) -> float:
    began = time.monotonic()
    ds = flows(experiment, point)
    seconds = time.monotonic() - began
    archive.write_dataset(path, ds.assign(seconds=seconds))
    return seconds


def starts(loss: PopulationLoss, seeds: Iterable[int]) -> Tensor:
    """Rows of parameters (seed, parameter) as Glorot & Bengio (2010) start: N(0, 2/(inputs + outputs)) a layer."""
    n, d, outputs = loss.nodes, loss.inputs, loss.outputs
    rows = []
    for seed in seeds:
        draw = generator(seed, "student")
        w = draw.standard_normal(n * d) * np.sqrt(2 / (n + d))
        rows.append(np.concatenate([w, draw.standard_normal(n * outputs) * np.sqrt(2 / (n + outputs))]))
    return torch.from_numpy(np.stack(rows)).to(loss.dtype)


def flows(experiment: FlowExperiment, point: Size) -> xr.Dataset:
    """All seeds at one size."""
    activation, n, k = point
    eye = torch.eye(k, experiment.inputs or k + 1, dtype=torch.float64)
    loss = PopulationLoss(Network([eye, torch.ones(1, k, dtype=torch.float64)], activation=activation), n)
    begin = starts(loss, range(experiment.seeds))
    times = None if experiment.times is None else np.geomspace(*experiment.times)
    flow = gradient_flow(loss, begin, times=times, end=1e9)
    final = torch.from_numpy(flow["final"].values)
    end = polish(loss, final)
    # elsewhere Newton would lead away: a member that ran into a singularity or along a channel is left where it stopped
    arrived = torch.from_numpy(flow["stop_reason"].values == "gradient")
    at = torch.where(arrived[:, None], end.point, final)
    found = [classify(loss.network(row), loss.teacher) for row in at]

    def weights(prefix: str, rows: Tensor, *dims: str) -> dict[str, Any]:
        w, a = loss.unpack(rows)
        lead = ("seed", *dims)
        return {
            f"{prefix}weight": ((*lead, "node", "input_node"), w.numpy()),
            f"{prefix}outgoing": ((*lead, "node"), a[..., 0].numpy()),
        }

    values = {
        "loss": ("seed", loss.value(at).numpy()),
        "gradient_max": ("seed", loss.gradient(at).abs().amax(-1).numpy()),
        "index": ("seed", torch.where(arrived, end.signature.negative, -1).numpy()),
        "margin": ("seed", np.array([c.margin for c in found])),
        "stop_time": ("seed", flow["stop_time"].values),
        **weights("", at),
        **weights("start_", begin),
        **{name: ((), value) for name, value in _theory(loss).items()},
    }
    if times is not None:
        names = {"weight": "path_weight", "outgoing": "path_outgoing", "loss": "path_loss"}
        path = flow[list(names)].isel(output=0).rename(names)
        values |= {str(name): (array.dims, array.values) for name, array in path.data_vars.items()}
    words = {
        "kind": np.where(arrived.numpy(), end.kind, flow["stop_reason"].values),
        "class": [c.kind for c in found],
        "reason": [c.reason for c in found],
        "stop_reason": flow["stop_reason"].values,
    }
    values |= {name: ("seed", np.array(column, dtype=object)) for name, column in words.items()}
    return xr.Dataset(values, {"seed": np.arange(experiment.seeds)} | ({} if times is None else {"time": times}))


def _theory(loss: PopulationLoss) -> dict[str, float]:
    """What no seed is needed for; NaN and −1 where there is no such point."""
    activation, n, k = loss.teacher.activation.name, loss.nodes, loss.teacher.widths[1]
    values = dict.fromkeys(
        ("loss_copy_average", "loss_perturbed_copy", "one_neuron_norm", "one_neuron_outgoing"), np.nan
    )
    values |= {"index_copy_average": -1, "index_perturbed_copy": -1}
    if n > k:
        return values
    best = one_neuron(activation, k - n + 1)
    values |= {"loss_copy_average": best.loss}
    if n == 1:
        values |= {"one_neuron_norm": best.norm, "one_neuron_outgoing": best.outgoing}
    if activation in ODD:
        points = [copy_average(activation, loss.teacher, [1] * (n - 1) + [k - n + 1])]
        points += [perturbed_copy(loss.teacher, n)] if n < k else []
        rows = loss.pack(points)
        for name, value, index in zip(
            ("copy_average", "perturbed_copy"),
            loss.value(rows).tolist(),
            signature(loss, rows).negative.tolist(),
            strict=False,
        ):
            values |= {f"loss_{name}": value, f"index_{name}": index}
    return values


def _joined(experiment: FlowExperiment, parts: list[xr.Dataset]) -> xr.Dataset:
    widest = {dim: max(part.sizes[dim] for part in parts) for dim in ("node", "input_node")}
    # strings as read have the width of the longest, to which xarray would cut another part's
    parts = [part.assign({name: part[name].astype(object) for name in _WORDS}) for part in parts]
    padded = [part.pad({dim: (0, size - part.sizes[dim]) for dim, size in widest.items()}) for part in parts]
    ds = xr.concat(
        padded,
        dim="point",
        data_vars="all",
        coords="different",
        compat="equals",
        join="exact",
        combine_attrs="override",
    )
    names = np.array([point.activation for point in experiment.points()])
    n, k = ([getattr(point, dim) for point in experiment.points()] for dim in ("n", "k"))
    ds = ds.assign_coords(activation=("point", names), n=("point", n), k=("point", k)).set_coords(_WORDS)
    for name, array in ds.data_vars.items():
        array.attrs = {"units": "1", "long_name": _TEXTS[str(name)], "source": _SOURCE}
    ds["seconds"].attrs["units"] = "s"
    return ds.assign_attrs(
        name=experiment.name,
        experiment=experiment.to_toml(),
        start="Glorot normal: each weight N(0, 2/(inputs + outputs of its layer))",
        loss_factor="no ½",
        time="t of dθ/dt = −∇L",
    )
