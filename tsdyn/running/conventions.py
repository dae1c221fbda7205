"""The attributes of an archive that say which conventions its numbers follow."""

from __future__ import annotations

import datetime
import json
from typing import assert_never

from tsdyn import schema
from tsdyn.engine.loss import loss
from tsdyn.experiment.experiment import Experiment
from tsdyn.flow import epochs
from tsdyn.flow.rodas import Rodas
from tsdyn.running import packages, provenance


def attributes(experiment: Experiment, device: str) -> dict[str, str | int | float]:
    """Global attributes of an archive: what ran, where, with what, under which conventions."""
    return {
        "experiment": experiment.to_toml(),
        "name": experiment.name,
        "digest": experiment.digest,
        **packages.attribute(experiment),
        **schema.declarations(experiment.recorded()),
        "schema_version": schema.VERSION,
        **provenance.facts(device, experiment),
        "dtype": experiment.dtype,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "conventions": json.dumps(_conventions(experiment)),
    }


def _conventions(experiment: Experiment) -> dict[str, str]:
    kind = experiment.kind
    if kind == "training":
        return {
            "loss": _loss_convention(experiment),
            "gradient": "g is the negative gradient at the pre-activation",
            "gate_at_zero": "torch",
            "correlation": "centred, standardised, signed",
            **_time_convention(experiment),
            "batch_norm": _batch_norm_convention(experiment),
        }
    if kind == "population-flow":
        return {
            "loss": "L = E (f* - f)^2 on Gaussian inputs, no 1/2",
            "time": "t of dtheta/dt = -grad L",
            "start": "Glorot normal: each weight N(0, 2/(inputs + outputs of its layer))",
        }
    if kind == "online":
        return {
            "loss": "eg = 1/2 E (f* - f)^2 against the teacher without noise",
            "time": "alpha = steps / N",
            "learning_rate": "w += rate/sqrt(N) v sigma'(l) D x, v += rate/N sigma(l) D, D = y + noise - f",
            "overlaps": "Q = w w^T/N, R = w B^T/N, T = B B^T/N",
        }
    assert_never(kind)


def _time_convention(experiment: Experiment) -> dict[str, str]:
    if experiment.training.method == "flow":
        how = f"{Rodas.NAME}, rtol {epochs.RTOL:g}, atol {epochs.ATOL:g}"
        return {
            "learning_rate": "time an epoch takes, by steps_per_epoch",
            "time": f"epoch = learning_rate steps_per_epoch of t in dtheta/dt = -grad J ({how})",
        }
    return {
        "learning_rate": "W += learning_rate (1/batch) sum g f^T",
        "time": "epoch = steps_per_epoch steps",
    }


def _loss_convention(experiment: Experiment) -> str:
    trained = loss(experiment.training.loss)
    match trained.targets:
        case "outputs":
            return trained.convention
        case "classes":
            whose = {"teacher": "teacher's largest output", "data": "data's label"}[experiment.training.labels]
            return f"{trained.convention} at the {whose}"
        case other:
            assert_never(other)


def _batch_norm_convention(experiment: Experiment) -> str:
    place = experiment.student.batch_norm
    return place if place == "none" else f"{place} the activation; training mode in training, evaluation mode measured"
