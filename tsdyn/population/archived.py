"""The population loss of what a run recorded, in the units of its own ``loss_eval``."""

from __future__ import annotations

import json

import numpy as np
import torch
import xarray as xr

from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.population.two_layer_loss import loss
from tsdyn.problem import covariances, input_files


def expected_loss(ds: xr.Dataset) -> xr.DataArray:
    """What ``loss_eval`` would be over infinitely many samples of the run's own inputs, (seed, epoch).

    J = ½ E‖f* − f‖² over x ~ N(0, std² C), with the experiment's ``data.std`` and its ``data.covariance`` or
    ``data.spectrum``: the same number as ``loss_eval`` but for the finite evaluation set, with no factor between them.
    Label noise is no part of either.

    Args:
        ds: Archive of a run, or a slice of one, with ``weight``: two layers without biases, of one activation.

    Raises:
        ValueError: for another loss, law of inputs or architecture, or a sweep; names it.
    """
    caller = "expected_loss"
    experiment = experiment_of(ds)
    _refuse_others(caller, ds, experiment)
    root = torch.from_numpy(_root(experiment))
    names = ["weight", "teacher_weight"]
    held = ds[names].load()
    lead = [dim for dim in ("seed", "epoch") if dim in held["weight"].dims]
    held = held.transpose(..., "layer", "node", "teacher_node", "input_node", missing_dims="ignore")
    shape = tuple(held.sizes[dim] for dim in lead)
    found = np.full(shape, np.nan)
    for place in np.ndindex(shape):
        one = held.isel(dict(zip(lead, place, strict=True)))
        law, taught = experiment.student, experiment.teacher
        leak = law.leak if taught.leak is None else taught.leak
        student = _network(one["weight"].values, experiment.student_widths, root, law.activation, law.leak)
        teacher = _network(
            one["teacher_weight"].values, experiment.teacher_widths, root, taught.activation or law.activation, leak
        )
        if all(bool(w.isfinite().all()) for w in student.weights):
            found[place] = 0.5 * float(loss(student, teacher))
    coords = {dim: held[dim] for dim in lead}
    attrs = {"units": "1", "long_name": "population loss J", "source": "Simsek et al. 2023, section 3, times 1/2"}
    return xr.DataArray(found, coords, lead, "expected_loss", attrs)


def _refuse_others(caller: str, ds: xr.Dataset, experiment: Experiment) -> None:
    missing = [name for name in ("weight", "teacher_weight") if name not in ds]
    law, student, teacher = experiment.data, experiment.student, experiment.teacher
    refused = {
        f"the archive has no {', '.join(missing)}; record weight": bool(missing),
        f"a sweep; open one of its runs, {', '.join(map(str, experiment.sweep))}": bool(experiment.sweep),
        f"kind = {experiment.kind!r}; a training run is needed": experiment.kind != "training",
        f"training.loss = {experiment.training.loss!r}; the population loss is of 'mse'": (
            experiment.training.loss != "mse"
        ),
        f"data.law = {law.law!r}; inputs must be 'gaussian'": law.law != "gaussian",
        "convolutions, BatchNorm or modules of the user's own; two linear layers are needed": (
            experiment.deep or experiment.of_own_modules
        ),
        "biases; set student.bias = false and teacher.bias = false": student.bias or teacher.bias is not False,
    }
    known = json.loads(ds.attrs.get(input_files.ATTRIBUTE, "{}"))
    if not any(refused.values()) and known != input_files.digests(experiment):
        raise ValueError(f"{caller}: {law.covariance} is not the file that the run read; put that one back")
    what = next((what for what, there in refused.items() if there), None)
    if what:
        raise ValueError(f"{caller}: {what}")


def _root(experiment: Experiment) -> np.ndarray:
    """R with x = z R, z ~ N(0, I)."""
    inputs, data = experiment.teacher.widths[0], experiment.data
    root = np.eye(inputs)
    if data.covariance is not None:
        root = covariances.root(data.covariance, inputs)
    if data.spectrum is not None:
        root = np.diag(np.sqrt(covariances.spectrum(inputs, data.spectrum)))
    return data.std * root


def _network(weight: np.ndarray, widths: tuple[int, ...], root: torch.Tensor, activation: str, leak: float) -> Network:
    """The network as a function of z: W x = (W Rᵀ) z."""
    inputs, nodes, outputs = widths
    first = torch.from_numpy(np.array(weight[0, :nodes, :inputs], float))
    second = torch.from_numpy(np.array(weight[1, :outputs, :nodes], float))
    return Network([first @ root.mT, second], None, activation, leak=leak)
