"""torch's default device is the user's: what is computed is computed where its inputs are, of arrays on the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from tests.cases import small
from tsdyn import Network, derivatives, flow, population, theory
from tsdyn.engine.loss import LOSSES
from tsdyn.engine.rule import OPTIMIZERS
from tsdyn.networks.activations import activation
from tsdyn.problem import augmentation, students, teachers
from tsdyn.testing import check

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


def _half_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum() / 2


def _deep() -> Network:
    draw = np.random.default_rng(0)
    return Network([draw.standard_normal(shape) for shape in ((5, 4), (4, 5), (2, 4))])


_X, _Y = np.random.default_rng(1).standard_normal((40, 4)), np.ones((40, 2))

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
    "minimum_derivative": lambda: flow.minimum_derivative(
        lambda row, p: ((row - p.square()) ** 2).sum(), [[8.9]], [3.0]
    ),
    "overlaps": lambda: flow.overlaps(_student(), _teacher()),
    "generalization_error": lambda: flow.generalization_error(
        flow.overlaps(_student(), _teacher()), _teacher().activation
    ),
    "order_parameters": lambda: flow.order_parameters(_Q, _R, _T, learning_rate=0.5, alpha=[0, 0.5], activation="erf"),
    "order_parameters of relu": lambda: flow.order_parameters(
        _Q, _R, _T, learning_rate=0.5, alpha=[0, 0.5], batch=np.inf, activation="relu"
    ),
    "hessian": lambda: derivatives.hessian(_deep(), _half_square, _X, _Y),
    "hessian_vector_product": lambda: derivatives.hessian_vector_product(
        _deep(), _half_square, _X, _Y, np.ones(5 * 4 + 4 * 5 + 2 * 4)
    ),
    "hessian_spectrum": lambda: derivatives.hessian_spectrum(_deep(), _half_square, _X, _Y, 3),
    "hessian_density": lambda: derivatives.hessian_density(_deep(), _half_square, _X, _Y, probes=1, steps=5),
    "hessian_density of a function": lambda: derivatives.hessian_density(lambda p: (p**4).sum(), np.ones(6)),
    "gauss_newton": lambda: derivatives.gauss_newton(_deep(), _half_square, _X, _Y),
    "per_sample_gradients": lambda: derivatives.per_sample_gradients(_deep(), _half_square, _X, _Y),
    "per_sample_gradient_norms": lambda: derivatives.per_sample_gradient_norms(_deep(), _half_square, _X, _Y),
    "jacobian": lambda: derivatives.jacobian(_deep(), _X),
    "neural_tangent_kernel": lambda: derivatives.neural_tangent_kernel(_deep(), _X),
    "lemma1_residual": lambda: theory.lemma1_residual(_deep(), _deep(), _X),
    "luck_matters_updates": lambda: theory.luck_matters_updates(_deep(), _deep(), _X),
    "output_jacobian": lambda: theory.output_jacobian(_deep(), torch.from_numpy(_X), 1),
    "online": lambda: flow.online(_Q, _R, _T, inputs=8, learning_rate=0.5, alpha=[0, 1], noise=0.1),
}
#: Teachers, students and inputs of an experiment, drawn by themselves.
DRAWN = small(seeds=1, data__augment="aware")


def _drawn_teacher(init: str) -> list[torch.Tensor | None]:
    network = teachers.draw_teacher(DRAWN.replace({"teacher.init": init}), 0)
    return [*network.weights, *network.biases]


def _drawn_student(init: str) -> list[torch.Tensor | None]:
    network = students.draw_student(DRAWN.replace({"student.init": init, "student.overrealization": 1.0}), 0)
    return [*network.weights, *network.biases]


COMPUTED |= {
    **{f"teacher {i}": partial(_drawn_teacher, i) for i in ("gaussian", "separated")},
    **{
        f"student {i}": partial(_drawn_student, i)
        for i in ("gaussian", "torch", "near-teacher", "same-direction", "same-sign")
    },
    "augmented inputs": lambda: augmentation.training_set(DRAWN, 0, teachers.draw_teacher(DRAWN, 0)),
    "balanced teacher": lambda: (
        teachers.balance(
            teachers.draw_teacher(DRAWN, 0),
            torch.randn(9, 10, device="cpu", generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64),
        ).weights
    ),
    "pruned teacher": lambda: teachers.prune(_teacher(), [0.5])[0].weights,
    "contract of an activation": lambda: check(activation("tanh")),
    "contract of a loss": lambda: check(LOSSES["mse"]),
    "contract of an optimizer": lambda: check(OPTIMIZERS["adam"]),
}


def _numbers(found: Any) -> Any:
    """What was found, as arrays; a tensor on another device than the CPU has none and raises."""
    match found:
        case torch.Tensor():
            assert found.device.type == "cpu"
            return found.detach().numpy()
        case xr.Dataset():
            return {str(name): variable.values for name, variable in found.variables.items()}
        case dict():
            return {name: _numbers(each) for name, each in found.items()}
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
    if name == "warm_start":  # a minimum: rounding that depends on addresses moves it by some sqrt(eps)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=4 * np.sqrt(np.finfo(float).eps))
        return
    np.testing.assert_equal(found, wanted)


def test_nothing_is_drawn_from_the_users_generator():
    """Derivatives of a Network go by a module made of it; a kernel of two sets of inputs makes two."""
    before = torch.get_rng_state()
    _deep().to_torch()
    derivatives.neural_tangent_kernel(_deep(), _X, _X)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_function_of_population_and_flow_is_tried():
    functions = {n for m in (population, flow) for n in m.__all__ if callable(getattr(m, n)) and n[0].islower()}
    numbers_only = {"partitions", "convention", "expected_loss"}  # the last takes an archive
    assert functions - numbers_only == {name.split(" ")[0] for name in COMPUTED} & functions
