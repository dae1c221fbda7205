"""torch's default device is the user's: population and flow compute where their inputs are, numbers on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from tsdyn import Network, flow, population

_EYE = np.eye(3, 4)
_Q, _R, _T = np.eye(2), np.full((2, 3), 0.1), np.eye(3)


def _teacher() -> Network:
    return Network([_EYE, np.ones((1, 3))], activation="erf")


def _student() -> Network:
    return Network([_EYE[:2] + 0.1, np.full((1, 2), 1.5)], activation="erf")


def _loss() -> population.PopulationLoss:
    return population.PopulationLoss(_teacher(), 2)


def _quartic() -> flow.FunctionLoss:
    return flow.FunctionLoss(lambda x: (x**4).sum() + (x**2).sum(), 2)


COMPUTED: dict[str, Callable[[], Any]] = {
    "interaction": lambda: population.interaction("erf", 1.0, 2.0, [0.1, 0.2]),
    "interaction of a tensor and numbers": lambda: population.interaction(
        "softplus", torch.ones(2, dtype=torch.float64, device="cpu"), 1.0, 0.5
    ),
    "interaction_derivatives": lambda: population.interaction_derivatives("tanh", 1.0, 2.0, 0.3),
    "loss": lambda: population.loss(_student(), _teacher()),
    "loss_from_overlaps": lambda: population.loss_from_overlaps(
        "erf", *(torch.from_numpy(a) for a in (np.ones((2, 1)), np.ones((3, 1)), _Q, _R, _T))
    ),
    "PopulationLoss": lambda: [
        f(_loss().pack([_student()])) for f in (_loss().value, _loss().gradient, _loss().hessian)
    ],
    "starts": lambda: population.starts(_loss(), [1, 2]),
    "one_neuron": lambda: population.one_neuron("tanh", 3),
    "copy_average": lambda: population.copy_average("erf", _teacher(), [1, 2]).weights,
    "perturbed_copy": lambda: population.perturbed_copy(_teacher(), 2).weights,
    "perturbed_copy_average": lambda: population.perturbed_copy_average(_teacher(), 2).weights,
    "phase_boundaries": lambda: population.phase_boundaries(3, activation="erf"),
    "classify": lambda: population.classify(population.copy_average("erf", _teacher(), [1, 2]), _teacher()),
    "warm_start": lambda: population.warm_start(_teacher(), 2).weights,
    "gradient_flow": lambda: flow.gradient_flow(_loss(), population.starts(_loss(), [1, 2]), times=[0, 0.5, 1.0]),
    "gradient_flow of an array": lambda: flow.gradient_flow(_quartic(), np.ones((1, 2)), times=[0, 0.5]),
    "polish": lambda: flow.polish(_loss(), _loss().pack([population.copy_average("erf", _teacher(), [1, 2])])),
    "signature": lambda: flow.signature(_loss(), _loss().pack([_student()])),
    "overlaps": lambda: flow.overlaps(_student(), _teacher()),
    "generalization_error": lambda: flow.generalization_error(
        flow.overlaps(_student(), _teacher()), _teacher().activation
    ),
    "order_parameters": lambda: flow.order_parameters(_Q, _R, _T, learning_rate=0.5, alpha=[0, 0.5], activation="erf"),
    "order_parameters of relu": lambda: flow.order_parameters(
        _Q, _R, _T, learning_rate=0.5, alpha=[0, 0.5], batch=np.inf, activation="relu"
    ),
    "online": lambda: flow.online(_Q, _R, _T, inputs=8, learning_rate=0.5, alpha=[0, 1], noise=0.1),
}


def _numbers(found: Any) -> Any:
    """What was found, as arrays; a tensor on another device than the CPU has none and raises."""
    match found:
        case torch.Tensor():
            assert found.device.type == "cpu"
            return found.detach().numpy()
        case xr.Dataset():
            return {str(name): variable.values for name, variable in found.variables.items()}
        case list() | tuple():
            return [_numbers(each) for each in found]
        case _ if hasattr(found, "__dataclass_fields__"):
            return {name: _numbers(getattr(found, name)) for name in found.__dataclass_fields__}
        case _:
            return found


@pytest.mark.parametrize("name", COMPUTED)
def test_the_default_device_changes_no_number(name):
    """``meta`` has no numbers: a tensor that lands there by default cannot be read, or mixed with others."""
    wanted = _numbers(COMPUTED[name]())
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        found = _numbers(COMPUTED[name]())
    np.testing.assert_equal(found, wanted)


def test_every_function_of_population_and_flow_is_tried():
    functions = {n for m in (population, flow) for n in m.__all__ if callable(getattr(m, n)) and n[0].islower()}
    numbers_only = {"partitions", "convention"}
    assert functions - numbers_only == {name.split(" ")[0] for name in COMPUTED} & functions
