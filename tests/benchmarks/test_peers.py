"""Per-sample gradients and norms beside BackPACK, Opacus and torch's ExpandedWeights, where those are installed.

They are no dependencies: ``pip install --no-deps --target PEERS opacus backpack-for-pytorch opt_einsum einops
unfoldNd``, then ``PYTHONPATH=PEERS make bench``.  Every way's result is compared with ours before it is timed.
"""

import copy
import importlib
import warnings

import pytest
import torch

from tests.benchmarks.test_theory import DTYPES, NETS, SAMPLES, half_square, problem
from tsdyn import derivatives


def summed(output, target):
    return 0.5 * (output - target).square().sum()


def peer(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def collect(module, name):
    """The attribute that the peer left on every parameter."""
    found = {n.removeprefix("_module."): getattr(p, name).detach() for n, p in module.named_parameters()}
    for p in module.parameters():
        setattr(p, name, None)
        p.grad = None
    return found


def backpack_way(module, x, y, extension):
    backpack = peer("backpack")
    extensions = importlib.import_module("backpack.extensions")
    module = backpack.extend(copy.deepcopy(module))
    loss = backpack.extend(torch.nn.MSELoss(reduction="sum"))
    field = {"BatchGrad": "grad_batch", "BatchL2Grad": "batch_l2"}[extension]

    def gradients():
        value = 0.5 * loss(module(x), y)
        with backpack.backpack(getattr(extensions, extension)()):
            value.backward()
        return collect(module, field)

    return gradients


def opacus_gradients(module, x, y):
    peer("opacus")
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModule(
        copy.deepcopy(module), loss_reduction="sum"
    )

    def gradients():
        summed(wrapped(x), y).backward()
        return collect(wrapped, "grad_sample")

    return gradients


def opacus_norms(module, x, y):
    peer("opacus")
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping(
        copy.deepcopy(module), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def norms():
        summed(wrapped(x), y).backward()
        found = wrapped.get_norm_sample()
        for p in wrapped.parameters():
            p.grad = None
        return found

    return norms


def expanded_weights(module, x, y):
    per_sample = importlib.import_module("torch.nn.utils._per_sample_grad").call_for_per_sample_grads
    module = copy.deepcopy(module)

    def gradients():
        summed(per_sample(module, loss_reduction="sum")(x), y).backward()
        return collect(module, "grad_sample")

    return gradients


def norm_ways(module, x, y):
    squares = backpack_way(module, x, y, "BatchL2Grad")
    return lambda: torch.stack(list(squares().values())).sum(0).sqrt()


NORMS = {
    "tsdyn": lambda m, x, y: lambda: derivatives.per_sample_gradient_norms(m, half_square, x, y),
    "backpack": norm_ways,
    "opacus": opacus_norms,
}
GRADIENTS = {
    "tsdyn": lambda m, x, y: lambda: derivatives.per_sample_gradients(m, half_square, x, y),
    "backpack": lambda m, x, y: backpack_way(m, x, y, "BatchGrad"),
    "opacus": opacus_gradients,
    "expanded-weights": expanded_weights,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("way", NORMS)
def test_norms(benchmark, net, dtype, way):
    module, x, y = problem(net, DTYPES[dtype])
    run = NORMS[way](module, x, y)
    expected = NORMS["tsdyn"](module, x, y)()
    torch.testing.assert_close(run(), expected, rtol=1e3 * torch.finfo(x.dtype).eps, atol=0)
    benchmark.group = f"norms {net} {dtype}, {SAMPLES} samples"
    benchmark(run)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("net", "samples"), [("two-layer", SAMPLES), ("deep", 200)])
@pytest.mark.parametrize("way", GRADIENTS)
def test_gradients(benchmark, net, samples, dtype, way):
    module, x, y = problem(net, DTYPES[dtype])
    x, y = x[:samples], y[:samples]
    run = GRADIENTS[way](module, x, y)
    expected, found = GRADIENTS["tsdyn"](module, x, y)(), run()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e3 * torch.finfo(x.dtype).eps * value.abs().max().item()
        )
    del expected, found
    benchmark.group = f"gradients {net} {dtype}, {samples} samples"
    benchmark(run)
