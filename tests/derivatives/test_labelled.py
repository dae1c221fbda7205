"""The labelled form of derivatives: the numbers of the plain form, under the network's and the samples' labels."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tsdyn
from tests.networks.test_networks import random_network
from tsdyn import derivatives

LOSS = nn.functional.mse_loss


@pytest.fixture
def network():
    return random_network((4, 5, 3, 2), "tanh", True, seed=1)


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return xr.DataArray(rng.standard_normal((6, 4)), {"sample": [10, 11, 12, 20, 21, 22]}, ("sample", "input_node"))


def plain(x):
    return torch.from_numpy(x.values)


def test_per_sample_gradients_have_layers_nodes_and_samples(network, x):
    y = torch.zeros(6, 2, dtype=torch.float64)
    found = derivatives.per_sample_gradients(network, LOSS, x, y, labelled=True)
    right = derivatives.per_sample_gradients(network, LOSS, plain(x), y)
    assert found["weight"].dims == ("sample", "layer", "node", "input_node")
    assert found["bias"].dims == ("sample", "layer", "node")
    assert list(found.sample.values) == list(x.sample.values)
    assert list(found.width.values) == [5, 3, 2]
    names = [name for name in right if name.endswith("weight")]
    for layer, name in enumerate(names, start=1):
        one = tsdyn.layer(found, layer)
        np.testing.assert_array_equal(one["weight"].transpose("sample", "node", "input_node"), right[name])
        np.testing.assert_array_equal(one["bias"].transpose("sample", "node"), right[name.replace("weight", "bias")])
    assert int(found["weight"].isel(sample=0).notnull().sum()) == 5 * 4 + 3 * 5 + 2 * 3
    norms = derivatives.per_sample_gradient_norms(network, LOSS, x, y, labelled=True)["gradient_norm"]
    np.testing.assert_array_equal(norms, derivatives.per_sample_gradient_norms(network, LOSS, plain(x), y))
    total = (found["weight"] ** 2).sum(["layer", "node", "input_node"]) + (found["bias"] ** 2).sum(["layer", "node"])
    np.testing.assert_allclose(norms**2, total)
    xr.testing.assert_equal(norms.sample, found.sample)


def test_jacobians_and_the_kernel_agree_under_their_labels(network, x):
    found = derivatives.jacobian(network, x, labelled=True)
    assert found["weight"].dims == ("sample", "output", "layer", "node", "input_node")
    kernel = derivatives.neural_tangent_kernel(network, x, x.isel(sample=[4, 1]), labelled=True)["kernel"]
    assert kernel.dims == ("sample", "sample_2", "output", "output_2")
    assert list(kernel.sample_2.values) == [21, 11]
    other = found.isel(sample=[4, 1]).rename(sample="sample_2", output="output_2")
    product = sum(
        (found[n] * other[n]).sum(["layer", "node", "input_node"][: found[n].ndim - 2]) for n in ("weight", "bias")
    )
    xr.testing.assert_allclose(kernel.transpose(*product.dims), product)
    inputs = derivatives.jacobian(network, x, wrt="inputs", labelled=True)["inputs"]
    assert inputs.dims == ("sample", "output", "input_node")
    np.testing.assert_array_equal(inputs, derivatives.jacobian(network, plain(x), wrt="inputs"))
    module = network.to_torch()
    at = derivatives.jacobian(module, x, wrt="1", labelled=True)["activation"]
    assert at.dims == ("sample", "output", "node")
    np.testing.assert_array_equal(at, derivatives.jacobian(module, plain(x), wrt="1"))
    assert list(derivatives.jacobian(module, plain(x), labelled=True).sample.values) == list(range(6))


def test_hessians_have_parameters_on_both_sides(network, x):
    y = torch.zeros(6, 2, dtype=torch.float64)
    found = derivatives.hessian(network, LOSS, x, y, labelled=True)
    assert found["hessian"].dims == ("parameter", "parameter_2")
    np.testing.assert_array_equal(found["hessian"], derivatives.hessian(network, LOSS, plain(x), y))
    # the block of two nodes' weights, by label, is the Jacobian of the gradient
    here = (found.layer == 2) & (found.node == 1) & (found.input_node >= 0)
    there = (found.layer_2 == 1) & (found.node_2 == 3) & (found.input_node_2 >= 0)
    block = found["hessian"].isel(parameter=np.flatnonzero(here), parameter_2=np.flatnonzero(there))
    assert block.shape == (5, 4)
    w1, w2, w3 = network.weights
    b1, b2, b3 = network.biases

    def slope(row):
        first, second = torch.cat([w1[:3], row[None], w1[4:]]), w2.clone().requires_grad_()
        hidden = torch.tanh(torch.tanh(plain(x) @ first.T + b1) @ second.T + b2)
        return torch.autograd.grad(LOSS(hidden @ w3.T + b3, y), second, create_graph=True)[0][1]

    right = torch.autograd.functional.jacobian(slope, w1[3].clone())
    np.testing.assert_allclose(block, right, atol=1e-15)
    values = derivatives.hessian_spectrum(network, LOSS, x, y, k=3, labelled=True)["hessian_eigenvalue"]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(found["hessian"])[::-1][:3], atol=1e-12)
    density = derivatives.hessian_density(network, LOSS, x, y, probes=2, steps=5, labelled=True)
    np.testing.assert_allclose(density["share"].sum("step"), 1)
    matrix = derivatives.gauss_newton(network, LOSS, x, y, labelled=True)["gauss_newton"]
    assert list(matrix.layer.values) == list(found.layer.values)
    square = derivatives.hessian(lambda p: (p["a"] ** 2).sum(), {"a": torch.ones(2), "b": torch.ones(1)}, labelled=True)
    assert list(square.parameter_name.values) == ["a", "a", "b"]


def test_modules_of_other_kinds_keep_their_parameters_names(x):
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)).double()
    found = derivatives.per_sample_gradients(module, LOSS, x, torch.zeros(6, 1, dtype=torch.float64), labelled=True)
    assert set(found.data_vars) == {"weight", "bias", "1.weight", "1.bias"}
    assert list(found.layer_name.values) == ["0", "2"]
    assert found["1.weight"].dims == ("sample", "1.weight_dim_0")
