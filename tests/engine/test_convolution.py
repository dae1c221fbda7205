import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks.test_convolutional_networks import IMAGE, images, module
from tsdyn.engine import convolution
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.propagated import step
from tsdyn.engine.rule import Rule
from tsdyn.networks.network import Network

served = pytest.mark.skipif(not convolution.serves(torch.zeros(1)), reason="no compiler")


@served
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "below", "rows", "columns", "kernel", "samples"),
    [
        (1, 1, 3, 3, (3, 3), 1),
        (7, 2, 6, 5, (3, 3), 3),
        (16, 5, 8, 8, (3, 3), 16),
        (4, 3, 5, 9, (2, 5), 11),
        (9, 2, 8, 16, (3, 3), 64),
    ],
)
def test_it_is_torchs_convolution_of_each_member(channels, below, rows, columns, kernel, samples, dtype, threads):
    """Rows shorter than a vector, of whole vectors and with a remainder; several passes; every height of a tile."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, below, rows, columns, samples, generator=draw, dtype=dtype)
    weight = torch.randn(3, channels, below, *kernel, generator=draw, dtype=dtype)
    bias = torch.randn(3, channels, generator=draw, dtype=dtype)
    above = torch.randn(
        3, channels, rows - kernel[0] + 1, columns - kernel[1] + 1, samples, generator=draw, dtype=dtype
    )
    leaves = [t.requires_grad_(True) for t in (x, weight, bias)]

    def torchs(x, weight, bias):
        each = [F.conv2d(a.permute(3, 0, 1, 2), w, b) for a, w, b in zip(x, weight, bias, strict=True)]
        return torch.stack(each).permute(0, 2, 3, 4, 1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = convolution.convolve(*leaves), torchs(*leaves)
        gradients, wanted = (torch.autograd.grad(z, leaves, above) for z in (found, expected))
    finally:
        torch.set_num_threads(before)
    # sums of at most so many products of standard normals, each rounded
    terms = max(below * kernel[0] * kernel[1], channels * kernel[0] * kernel[1], above[0, 0].numel())
    tolerance = 8 * terms * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    bare = convolution.convolve(x, weight, None)
    torch.testing.assert_close(bare + bias[:, :, None, None, None], found, rtol=0, atol=tolerance)


@served
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_step_is_the_same_without_a_compiler(place, padding, monkeypatch):
    ways = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(convolution, "serves", lambda x: False)
        made = [Network.from_torch(module(place, seed=s).eval(), image=IMAGE) for s in range(2)]
        if padding:
            made = [
                Network(
                    [*n.weights[:-1], torch.ones(3, 4 * 64).double()], n.biases, norms=n.norms, norm=place,
                    image=IMAGE, padding=1,
                )
                for n in made
            ]  # fmt: skip
        ensemble = Ensemble.of(made)
        x = torch.stack([images(6, seed=s).flatten(1) for s in range(2)])
        step(ensemble, x, torch.ones(2, 6, 3, dtype=torch.float64), Rule(0.01), 1)
        ways.append(list(ensemble.tensors()))
    for a, b in zip(*ways, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@served
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("samples", "channels", "below", "image", "kernel", "padding"),
    [
        (8, 32, 16, (16, 16), (3, 3), (1, 1)),
        (19, 7, 24, (9, 30), (3, 5), (0, 2)),
        (33, 12, 12, (20, 7), (5, 3), (4, 0)),
        (64, 32, 64, (5, 5), (1, 3), (0, 1)),
    ],
)
def test_samples_are_convolved_as_by_torch(samples, channels, below, image, kernel, padding, threads):
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(below, channels, kernel, padding=padding, dtype=torch.float64)
    x = torch.randn(samples, below, *image, generator=draw, dtype=torch.float64, requires_grad=True)
    above = torch.randn(layer(x).shape, generator=draw, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert convolution.pays(layer, x)
        found, expected = convolution.of_samples(layer, x), layer(x)
        (gradient,), (wanted,) = (torch.autograd.grad(z, x, above) for z in (found, expected))
        fewer = convolution.of_samples(layer, x[1:])
    finally:
        torch.set_num_threads(before)
    # sums of at most so many products of numbers below five
    terms = max(channels, below) * kernel[0] * kernel[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * terms * torch.finfo(torch.float64).eps)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=8 * terms * torch.finfo(torch.float64).eps)
    assert torch.equal(fewer, found[1:])  # the same bits in every company
    with pytest.raises(RuntimeError, match="used in the graph"):  # none of the parameters', none that is zero
        torch.autograd.grad(convolution.of_samples(layer, x), layer.weight, above)


@served
def test_samples_that_torch_convolves_itself():
    layer, x = nn.Conv2d(32, 32, 3, padding=1, dtype=torch.float64), torch.zeros(32, 32, 16, 16, dtype=torch.float64)
    assert convolution.pays(layer, x)
    assert not convolution.pays(layer, x[:4])  # few samples, little to do
    assert not convolution.pays(layer, x[:, :, :1, :1])
    assert not convolution.pays(layer, torch.cat([x, x], 1))  # too many channels: torch raises its error
    assert not convolution.pays(layer.float(), x.float())  # torch is faster
    assert not convolution.pays(layer, x)  # of two dtypes: torch raises its error
    for changed in ({"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 3}):
        assert not convolution.pays(nn.Conv2d(32, 32, 3, dtype=torch.float64, **changed), x)
