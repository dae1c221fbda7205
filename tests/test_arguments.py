"""Public functions refuse an argument of another kind: they name themselves, it, what was given and what they take."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tsdyn
from tsdyn import derivatives, flow, population, theory
from tsdyn.arguments import WHOLE, takes

NETWORK = tsdyn.Network([torch.ones(3, 2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)])
ERF = tsdyn.Network([torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)], activation="erf")
X = torch.ones(4, 2, dtype=torch.float64)
MODULE = nn.Linear(2, 1).double()
LOSS = nn.MSELoss()


def bowl(p):
    return 0.5 * (p - 1.0).square().sum()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: tsdyn.Network(3), "Network: weights is 3; it takes a list of arrays"),
        (lambda: tsdyn.Network(NETWORK.weights, activation=xr.Dataset()), "activation is a Dataset; it takes a name"),
        (lambda: tsdyn.Network.from_torch(NETWORK), "from_torch: module is a Network; it takes an nn.Module"),
        (
            lambda: theory.moments(MODULE, NETWORK, X),
            "moments: student is a Linear; it takes a Network, which",
        ),
        (lambda: theory.moments(NETWORK, NETWORK, "x"), "x is 'x'; it takes an array or a tensor of numbers"),
        (lambda: theory.coupling(NETWORK, NETWORK, X, layer="1"), "coupling: layer is '1'; it takes a whole number"),
        (lambda: theory.output_jacobian(NETWORK, X, True), "output_jacobian: layer is True; it takes a whole number"),
        (lambda: derivatives.jacobian("module", X), "jacobian: module is 'module'; it takes an nn.Module or a Network"),
        (lambda: derivatives.per_sample_gradients(MODULE, 2, X, X[:, :1]), "loss is 2; it takes a function"),
        (lambda: derivatives.hessian_spectrum(MODULE, LOSS, X, X[:, :1], k="all"), "hessian_spectrum: k is 'all'"),
        (lambda: derivatives.hessian(3, torch.ones(2)), "hessian: loss is 3; it takes a function"),
        (lambda: population.one_neuron("erf", 2.5), "one_neuron: k is 2.5; it takes a whole number"),
        (lambda: population.one_neuron([], 2), "one_neuron: activation is a list; it takes the name"),
        (lambda: population.classify(ERF, X), "classify: teacher is a Tensor; it takes a Network"),
        (lambda: flow.gradient_flow(3, X), "gradient_flow: loss is 3; it takes a function of a row"),
        (lambda: flow.polish(bowl, None), "polish: point is None; it takes an array"),
        (lambda: tsdyn.open(3), "open: path is 3; it takes a path, or a list of paths"),
        (lambda: tsdyn.layer(xr.Dataset(), 1.5), "layer: number is 1.5; it takes a layer's number, or its name"),
        (lambda: tsdyn.gradient(3, xr.Dataset()), "gradient: f is 3; it takes a function"),
        (lambda: tsdyn.jacobian(bowl, X), "jacobian: ds is a Tensor; it takes an xarray.Dataset"),
        (lambda: tsdyn.measure(X, ["A"]), "measure: ds is a Tensor; it takes the path of an archive, or a Dataset"),
        (lambda: tsdyn.sensitivity(X), "sensitivity: path_or_dataset is a Tensor; it takes the path"),
        (lambda: tsdyn.sensitivity("runs", wrt=3), "sensitivity: wrt is 3; it takes a name, or a list of names"),
        (lambda: tsdyn.fork(None), "fork: path is None; it takes a path"),
        (lambda: tsdyn.Experiment.from_toml(3), "from_toml: path is 3; it takes a path"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(call, told):
    with pytest.raises(TypeError) as error:
        call()
    assert told in str(error.value)


def test_an_argument_that_is_none_by_default_may_be_none():
    @takes(epoch=WHOLE)
    def at(epoch=None):
        return epoch

    assert at() is None
    assert at(None) is None
    assert at(np.int64(3)) == 3


def test_a_kind_of_no_argument_is_refused_when_decorating():
    with pytest.raises(TypeError, match="nodes"):
        takes(nodes=WHOLE)(lambda layer: layer)


def test_a_flow_takes_a_function_of_one_row():
    """θ(t) = 1 − (1 − θ₀)e^{−t} of ½|θ − 1|²; `polish` and `signature` take the same function."""
    begin = torch.tensor([[0.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    ds = flow.gradient_flow(bowl, begin, times=[0.5, 1.0], rtol=1e-9, atol=1e-12, gradient_tolerance=0.0)
    exact = 1 - (1 - begin.numpy())[:, None] * np.exp(-np.array([0.5, 1.0]))[None, :, None]
    np.testing.assert_allclose(ds.parameters.values, exact, rtol=0, atol=1e-7)  # an order-4 method at rtol 1e-9
    assert flow.polish(bowl, [0.9, 1.2]).kind.tolist() == ["minimum"]
    assert flow.signature(bowl, begin).positive.tolist() == [2, 2]


def test_a_product_takes_the_vector_in_pieces():
    """Along each parameter by itself, by name and in order, of a module and of a function."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    y = torch.ones(4, 1, dtype=torch.float64)
    pieces = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    flat = torch.cat([piece.reshape(-1) for piece in pieces.values()])
    right = derivatives.hessian(module, LOSS, X, y) @ flat
    for vector in (flat, pieces, dict(reversed(pieces.items())), list(pieces.values()), flat.tolist()):
        found = derivatives.hessian_vector_product(module, LOSS, X, y, vector)
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    along = {"b": torch.ones(1, dtype=torch.float64), "a": torch.zeros(2, dtype=torch.float64)}
    found = derivatives.hessian_vector_product(lambda p: (p["a"] ** 2).sum() * p["b"][0] ** 2, params, along)
    assert found.tolist() == [4.0, 4.0, 4.0]  # ∂²(a²b²)/∂a∂b = 4ab, ∂²/∂b² = 2(a₁² + a₂²)
    with pytest.raises(ValueError, match="pieces"):
        derivatives.hessian_vector_product(module, LOSS, X, y, {"0.weight": pieces["0.weight"]})
