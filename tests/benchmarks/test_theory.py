"""Exact derivatives and moments compared with plain methods; only ratios within one run count (`make bench`)."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.theory.test_theory import scaled_network
from tsdyn import derivatives, theory

NETS = {"two-layer": (100, 50, 50), "deep": (20, 100, 150, 200, 250, 100)}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SAMPLES = 1000


def half_square(output, target):
    return 0.5 * (output - target).square().sum()


def problem(net, dtype):
    widths = NETS[net]
    module = scaled_network(widths, "relu", 0.0, True, 0).to_torch().to(dtype)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, widths[0], generator=draw, dtype=dtype)
    return module, x, torch.randn(SAMPLES, widths[-1], generator=draw, dtype=dtype)


def plain(module, x, y):
    """vmap(grad(functional_call)), in chunks of 100 samples."""
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def one(free, sample, target):
        return half_square(functional_call(module, free, (sample[None],)), target[None])

    return vmap(grad(one), (None, 0, 0), chunk_size=100)(parameters, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("way", ["tsdyn", "vmap-then-norm"])
def test_per_sample_gradient_norms(benchmark, net, dtype, way):
    module, x, y = problem(net, DTYPES[dtype])
    benchmark.group = f"norms {net} {dtype}"
    if way == "tsdyn":
        benchmark(derivatives.per_sample_gradient_norms, module, half_square, x, y)
    else:
        benchmark(
            lambda: torch.stack([g.flatten(1).square().sum(1) for g in plain(module, x, y).values()]).sum(0).sqrt()
        )


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("way", ["tsdyn", "vmap"])
def test_per_sample_gradients(benchmark, net, way):
    module, x, y = problem(net, torch.float64)
    x, y = x[:200], y[:200]
    benchmark.group = f"gradients {net}"
    if way == "tsdyn":
        benchmark(derivatives.per_sample_gradients, module, half_square, x, y)
    else:
        benchmark(plain, module, x, y)


PAIRS = {
    "wide": ((20, 50, 75, 100, 125, 100), (20, 100, 150, 200, 250, 100)),
    "small": ((10, 10, 15, 20, 25, 10), (10, 20, 30, 40, 50, 10)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("way", ["tsdyn", "per-sample loop"])
def test_expectations(benchmark, pair, way):
    teacher, student = (scaled_network(w, "relu", 0.0, True, i) for i, w in enumerate(PAIRS[pair]))
    x = torch.randn(64, teacher.widths[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    benchmark.group = f"expectations {pair}, 64 samples"

    def loop():
        sums = [0.0] * (student.depth - 1)
        for sample in x.split(1):
            for layer in range(1, student.depth):
                found = theory.coupling(student, teacher, sample, layer)
                sums[layer - 1] = sums[layer - 1] + found.A.sum() + found.B.sum()
        return sums

    benchmark((lambda: theory.expectations(student, teacher, x)) if way == "tsdyn" else loop)


def test_matrix_product(benchmark):
    """This core's peak, for comparison with the others: 2·512³ flops."""
    a, b = torch.randn(2, 512, 512, dtype=torch.float64)
    benchmark(torch.matmul, a, b)
