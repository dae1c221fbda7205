"""Small modules as other people write them: tied, shared, recurrent, mixing, random, hooked, wrapped, of odd types.

Each `Case` gives the expected result: numbers equal to the loops of tests/oracles_autograd.py, or an error message.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

SAMPLES = 5
PER_SAMPLE = ("gradients", "norms", "jacobian", "ntk")
SECOND = ("hessian", "product", "spectrum", "density")


def plainly(module, x):
    return module(x)


def half_square(output, target):
    return 0.5 * (output - target).abs().square().sum()


@dataclass
class Case:
    make: Callable[[], nn.Module]
    x: Any
    loss: Callable = half_square
    call: Callable = plainly
    y: Any = ...
    refused: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def randn(*shape, **how):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64, **how)


X4 = randn(SAMPLES, 4)
SEQUENCE = randn(SAMPLES, 3, 4)
SQUARE = randn(SAMPLES, SAMPLES, 4)  # as many times as samples
IMAGE = randn(SAMPLES, 4, 5, 5)
TOKENS = torch.randint(0, 7, (SAMPLES, 3), generator=torch.Generator().manual_seed(0))


def refused(words, *quantities):
    return dict.fromkeys(quantities or (*PER_SAMPLE, *SECOND), words)


MIXES = refused("mixes samples", *PER_SAMPLE)


class Does(nn.Module):
    """A module made of named parts, with its forward as a function of them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._forward(self, x)


def does(forward, **parts):
    """Factory of such modules, which makes each part anew for each use."""
    return lambda: Does(forward, **{name: make() for name, make in parts.items()})


def linear(a, b, **how):
    return lambda: nn.Linear(a, b, **how)


def chain(*makers):
    return lambda: nn.Sequential(*[make() for make in makers])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, first, second):
        return torch.tanh(self.a(first)) * self.b(second)


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return torch.tanh(self.base(x) + x @ self.down.T @ self.up.T)


class Twice(torch.autograd.Function):
    """x² with its own backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 3), torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.layer(x) + torch.randn(3, generator=self.draw, dtype=x.dtype)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), 0.0

    def forward(self, x):
        output = self.layer(x) + self.last
        self.last = output.detach().mean()
        return output


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.layer(x))


def cell(m, x):
    h = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
    return h


def hooked(register, hook):
    def make():
        module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        getattr(module[0], register)(hook)
        return module

    return make


def tensor_hook():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    module[0].weight.register_hook(lambda g: 2 * g)
    return module


def shared_parameter():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def parametrized(wrap):
    return lambda: nn.Sequential(wrap(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2))


def weight_norm_written_out(module, x):
    """Torch's fused weight norm has a wrong second derivative (it holds the norm constant)."""
    own = module[0].parametrizations.weight
    weight = own.original0 * own.original1 / own.original1.norm(dim=1, keepdim=True)
    return module[2](torch.tanh(F.linear(x, weight, module[0].bias)))


def hook_weight_norm(layer):
    """torch's former weight_norm, which warns that it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def hook_weight_norm_written_out(module, x):
    first, tanh, last = module
    weight = first.weight_g * first.weight_v / first.weight_v.norm(dim=1, keepdim=True)
    return last(tanh(nn.functional.linear(x, weight, first.bias)))


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def frozen_first():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    return module


def slices_of_one():
    """A Sequential and two slices of it: every layer goes by two names."""
    whole = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return Does(lambda m, x: m.top(m.low(x)) + m.whole(x), whole=whole, low=whole[:2], top=whole[2:])


def listed_thrice():
    layer = nn.Linear(4, 4)
    return nn.ModuleList([layer, layer, nn.Linear(4, 4), layer])


def through_list(m, x):
    for layer in m.layers:
        x = torch.tanh(layer(x))
    return x if x.abs().sum() < 1e9 else x.detach()  # torch.func cannot follow it


def checkpointed(reentrant):
    def forward(m, x):
        return m.c(checkpoint(lambda z: torch.tanh(m.b(z)), m.a(x), use_reentrant=reentrant))

    return forward


def over_samples(m, x):
    """A layer along the axis of samples, which takes as many samples as it is wide."""
    return (x + torch.tanh(m.a(x.transpose(0, -1))).transpose(0, -1)).mean(1)


def under_no_grad(m, x):
    with torch.no_grad():
        h = torch.tanh(m.a(x))
    return m.b(h) + m.a(x)


def sdpa(m, x):
    q, k, v = m.a(x).chunk(3, -1)
    return m.b(F.scaled_dot_product_attention(q, k, v)).mean(1)


def bottom(m, x):
    return torch.tanh(m.a(x)) + torch.softmax(x, 0).sum() * 0 + torch.softmax(m.a(x), 0)


def batch_norm():
    module = nn.BatchNorm1d(3)
    module.running_mean.normal_()
    return module


TWO_OUTPUTS = does(lambda m, x: (torch.tanh(m.a(x)), m.b(x)), a=linear(4, 3), b=linear(4, 2))


def both_squares(output, target):
    first, second = output.values() if isinstance(output, dict) else output
    return first.square().sum() + (second**3).sum()


TRAINED_NORM = "BatchNorm in training mode"
ENCODER = {"d_model": 4, "nhead": 2, "dim_feedforward": 5, "dropout": 0.0}
CASES = {
    "mlp relu": Case(chain(linear(4, 5), nn.ReLU, linear(5, 3)), X4),
    "mlp tanh": Case(chain(linear(4, 5), nn.Tanh, linear(5, 3)), X4),
    "mlp gelu, mse": Case(chain(linear(4, 5), nn.GELU, linear(5, 3)), X4, F.mse_loss),
    "mlp silu, huber": Case(chain(linear(4, 5), nn.SiLU, linear(5, 3)), X4, F.huber_loss),
    "mlp, cross entropy": Case(
        chain(linear(4, 5), nn.Tanh, linear(5, 3)), X4, F.cross_entropy, y=torch.arange(SAMPLES) % 3
    ),
    "relu in place": Case(chain(linear(4, 5), lambda: nn.ReLU(inplace=True), linear(5, 3)), X4),
    "linear without bias": Case(linear(4, 3, bias=False), X4),
    "bilinear": Case(does(lambda m, x: m.a(x, x), a=lambda: nn.Bilinear(4, 4, 3)), X4),
    "residual, layer norm": Case(
        does(lambda m, x: x + m.b(torch.tanh(m.n(m.a(x)))), a=linear(4, 3), n=lambda: nn.LayerNorm(3), b=linear(3, 4)),
        X4,
    ),
    "tied autoencoder": Case(does(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.T), a=linear(4, 3)), X4),
    "layer used twice": Case(does(lambda m, x: m.a(torch.tanh(m.a(x))), a=linear(4, 4)), X4),
    "parameter of two layers": Case(shared_parameter, X4),
    "lstm": Case(
        does(lambda m, x: m.f(m.r(x)[0][:, -1]), r=lambda: nn.LSTM(4, 2, batch_first=True), f=linear(2, 2)), SEQUENCE
    ),
    "gru": Case(
        does(lambda m, x: m.f(m.r(x)[0][:, -1]), r=lambda: nn.GRU(4, 2, batch_first=True), f=linear(2, 2)), SEQUENCE
    ),
    "rnn": Case(does(lambda m, x: m.r(x)[0].sum(1), r=lambda: nn.RNN(4, 3, batch_first=True)), SEQUENCE),
    "lstm, time first": Case(
        does(lambda m, x: m.r(x)[0].sum(1), r=lambda: nn.LSTM(4, 2)),
        SEQUENCE,
        refused=refused("batch_first", *PER_SAMPLE),
    ),
    "gru cell": Case(does(cell, cell=lambda: nn.GRUCell(4, 3)), SEQUENCE),
    "attention": Case(
        does(lambda m, x: m.a(x, x, x)[0].mean(1), a=lambda: nn.MultiheadAttention(4, 2, batch_first=True)), SEQUENCE
    ),
    "attention, time first": Case(
        does(lambda m, x: m.a(x, x, x)[0].mean(1), a=lambda: nn.MultiheadAttention(4, 2)),
        SEQUENCE,
        refused=refused("batch_first", *PER_SAMPLE),
    ),
    "encoder layer": Case(
        does(lambda m, x: m.a(x).mean(1), a=lambda: nn.TransformerEncoderLayer(**ENCODER, batch_first=True)), SEQUENCE
    ),
    "encoder layer, time first": Case(
        does(lambda m, x: m.a(x).mean(1), a=lambda: nn.TransformerEncoderLayer(**ENCODER)),
        SQUARE,
        refused=refused("batch_first", *PER_SAMPLE),
    ),
    "fused attention": Case(does(sdpa, a=linear(4, 9), b=linear(3, 2)), SEQUENCE),
    "embedding": Case(does(lambda m, x: m.f(m.e(x).mean(1)), e=lambda: nn.Embedding(7, 3), f=linear(3, 2)), TOKENS),
    "embedding bag": Case(
        does(lambda m, x: m.f(m.e(x)), e=lambda: nn.EmbeddingBag(7, 3), f=linear(3, 2)),
        TOKENS,
        refused=refused("cannot differentiate", *SECOND),
    ),
    "embedding tied to the output": Case(
        does(lambda m, x: torch.tanh(m.e(x).mean(1)) @ m.e.weight.T, e=lambda: nn.Embedding(7, 3, padding_idx=0)),
        TOKENS,
    ),
    "convolution": Case(
        chain(lambda: nn.Conv2d(4, 2, 3, stride=2, padding=1), nn.Tanh, nn.Flatten, linear(18, 2)), IMAGE
    ),
    "grouped, dilated convolution": Case(
        chain(lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), nn.Tanh, nn.Flatten, linear(36, 1)), IMAGE
    ),
    "depthwise, channels last": Case(
        lambda: chain(lambda: nn.Conv2d(4, 4, 3, groups=4), nn.Flatten, linear(36, 1))().to(
            memory_format=torch.channels_last
        ),
        IMAGE.to(memory_format=torch.channels_last),
    ),
    "transposed convolution": Case(
        chain(lambda: nn.ConvTranspose2d(4, 1, 3, stride=2), nn.Tanh, nn.Flatten, linear(121, 1)), IMAGE
    ),
    "one-dimensional convolution": Case(chain(lambda: nn.Conv1d(3, 2, 2), nn.Tanh, nn.Flatten, linear(6, 2)), SEQUENCE),
    "three-dimensional convolution": Case(
        chain(lambda: nn.Conv3d(1, 2, 2), nn.Tanh, nn.Flatten, linear(16, 2)), randn(SAMPLES, 1, 3, 3, 3)
    ),
    "circular convolution": Case(
        chain(lambda: nn.Conv2d(4, 2, 3, padding="same", padding_mode="circular"), nn.Tanh, nn.Flatten, linear(50, 1)),
        IMAGE,
    ),
    "weight norm": Case(parametrized(parametrizations.weight_norm), X4, call=weight_norm_written_out),
    "weight norm by a hook": Case(parametrized(hook_weight_norm), X4, call=hook_weight_norm_written_out),
    "spectral norm in eval": Case(lambda: parametrized(parametrizations.spectral_norm)().eval(), X4),
    "spectral norm in training": Case(
        parametrized(parametrizations.spectral_norm), X4, refused=refused("changes when the module is called")
    ),
    "symmetric parametrization": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()).apply(
            lambda m: parametrize.register_parametrization(m, "weight", Symmetric()) if type(m) is nn.Linear else None
        ),
        X4,
    ),
    "low rank beside frozen": Case(Lora, X4),
    "frozen layer": Case(frozen_first, X4),
    "batch norm in eval": Case(lambda: chain(linear(4, 3), batch_norm, nn.Tanh, linear(3, 2))().eval(), X4),
    "batch norm in training": Case(
        chain(linear(4, 3), batch_norm),
        X4,
        refused=refused(f"{TRAINED_NORM}", *PER_SAMPLE) | refused("running statistics", *SECOND),
    ),
    "batch norm without statistics": Case(
        lambda: chain(
            linear(4, 3), lambda: nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh, linear(3, 2)
        )().eval(),
        X4,
        refused=refused(f"{TRAINED_NORM} does", *PER_SAMPLE),
    ),
    "instance norm": Case(
        chain(
            lambda: nn.Conv2d(4, 2, 3), lambda: nn.InstanceNorm2d(2, affine=True), nn.Tanh, nn.Flatten, linear(18, 1)
        ),
        IMAGE,
    ),
    "instance norm with statistics": Case(
        chain(lambda: nn.Conv2d(4, 2, 3), lambda: nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten),
        IMAGE,
        refused=refused("moves its running statistics"),
    ),
    "group norm": Case(chain(linear(4, 4), lambda: nn.GroupNorm(2, 4), nn.Tanh, linear(4, 2)), X4),
    "dropout in training": Case(chain(linear(4, 3), nn.Dropout), X4, refused=refused("Dropout in training mode")),
    "random relu in training": Case(chain(linear(4, 3), nn.RReLU), X4, refused=refused("draws random numbers")),
    "noise": Case(
        does(lambda m, x: m.a(x) + torch.randn_like(m.a(x)), a=linear(4, 3)),
        X4,
        refused=refused("draws random numbers"),
    ),
    "noise of its own generator": Case(OwnGenerator, X4, refused=refused("two values for one input")),
    "remembers": Case(Remembers, X4, refused=refused("two values for one input")),
    "counts its calls": Case(Counts, X4, refused=refused("calls of Counts changes")),
    "buffer": Case(
        lambda: chain(linear(4, 3), nn.Tanh)().apply(lambda m: m.register_buffer("scale", torch.ones(2))), X4
    ),
    "hook that scales": Case(hooked("register_forward_hook", lambda m, given, output: 1.7 * output), X4),
    "hook before": Case(hooked("register_forward_pre_hook", lambda m, given: (given[0] * 2,)), X4),
    "backward hook": Case(
        hooked("register_full_backward_hook", lambda m, into, out: tuple(None if g is None else 2 * g for g in into)),
        X4,
    ),
    "hook on a parameter": Case(tensor_hook, X4),
    "keyword call": Case(does(lambda m, x: torch.tanh(m.a(input=x)), a=linear(4, 3)), X4),
    "tuple of inputs": Case(TwoInputs, (X4, randn(SAMPLES, 3)), call=lambda m, x: m(*x)),
    "dict of inputs": Case(TwoInputs, {"first": X4, "second": randn(SAMPLES, 3)}, call=lambda m, x: m(**x)),
    "one list": Case(
        does(lambda m, x: torch.tanh(m.a(x[0])) * m.b(x[1]), a=linear(4, 3), b=linear(3, 3)), [X4, randn(SAMPLES, 3)]
    ),
    "one dict": Case(
        does(lambda m, x: torch.tanh(m.a(x["u"])) + x["v"], a=linear(4, 3)), {"u": X4, "v": randn(SAMPLES, 3)}
    ),
    "two outputs": Case(
        TWO_OUTPUTS,
        X4,
        both_squares,
        y=None,
        refused=refused("one tensor of real numbers is needed", "jacobian", "ntk"),
    ),
    "dict of outputs": Case(
        does(lambda m, x: {"u": torch.tanh(m.a(x)), "v": m.b(x)}, a=linear(4, 3), b=linear(4, 2)),
        X4,
        both_squares,
        y=None,
        refused=refused("one tensor of real numbers is needed", "jacobian", "ntk"),
    ),
    "scalar output": Case(does(lambda m, x: m.b(torch.tanh(m.a(x))).squeeze(), a=linear(4, 3), b=linear(3, 1)), X4),
    "sequence output": Case(
        chain(linear(4, 3), nn.Tanh, linear(3, 2)), SEQUENCE, refused=refused("outputs have shape", "ntk")
    ),
    "time first inside": Case(does(lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).mean(0), a=linear(4, 3)), SEQUENCE),
    "time first, as many as samples": Case(
        does(lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).mean(0), a=linear(4, 3)), SQUARE
    ),
    "frames folded": Case(
        does(lambda m, x: torch.tanh(m.a(x.reshape(-1, 4))).view(len(x), -1, 3).mean(1), a=linear(4, 3)), SEQUENCE
    ),
    "learned query": Case(
        does(
            lambda m, x: torch.tanh(m.a(m.q)) * m.b(x),
            a=linear(4, 3),
            b=linear(4, 3),
            q=lambda: nn.Parameter(torch.ones(1, 4)),
        ),
        X4,
    ),
    "constant branch": Case(
        does(lambda m, x: torch.tanh(m.a(torch.arange(4.0)[None].to(x))) + m.b(x), a=linear(4, 3), b=linear(4, 3)), X4
    ),
    "subtracts the batch's mean": Case(does(lambda m, x: m.a(x - x.mean(0)), a=linear(4, 3)), X4, refused=MIXES),
    "softmax over samples": Case(does(bottom, a=linear(4, 3)), X4, refused=MIXES),
    "looks at its neighbour": Case(does(lambda m, x: m.a(x + 0.1 * x.roll(1, 0)), a=linear(4, 3)), X4, refused=MIXES),
    "mixes in its gradient only": Case(
        does(lambda m, x: m.a(x) + (m.a(x).mean(0) - m.a(x).mean(0).detach()), a=linear(4, 3)), X4, refused=MIXES
    ),
    "mixes without a gradient": Case(
        does(lambda m, x: m.a(x) * x.detach().abs().mean(), a=linear(4, 3)), X4, refused=MIXES
    ),
    "ranks among integers": Case(
        does(lambda m, x: m.a((x > x.double().mean()).double()), a=linear(3, 2)), TOKENS, refused=MIXES
    ),
    "complex weights": Case(
        does(lambda m, x: m.a(x.to(torch.complex128)).abs(), a=linear(4, 3, dtype=torch.complex128)),
        X4,
        refused=refused("complex128", *SECOND),
        dtype=None,
    ),
    "half precision": Case(chain(linear(4, 3), nn.Tanh, linear(3, 2)), X4.half(), dtype=torch.float16),
    "bfloat16": Case(chain(linear(4, 3), nn.Tanh, linear(3, 2)), X4.bfloat16(), dtype=torch.bfloat16),
    "single precision": Case(chain(linear(4, 3), nn.Tanh, linear(3, 2)), X4.float(), dtype=torch.float32),
    "compiled": Case(
        lambda: torch.compile(chain(linear(4, 3), nn.Tanh, linear(3, 2))()), X4, call=lambda m, x: m._orig_mod(x)
    ),
    "data parallel": Case(lambda: nn.DataParallel(chain(linear(4, 3), nn.Tanh, linear(3, 2))()), X4),
    "input that is not contiguous": Case(chain(linear(4, 3), nn.Tanh), randn(4, SAMPLES).T),
    "numpy": Case(chain(linear(4, 3), nn.Tanh), X4.numpy(), call=lambda m, x: m(torch.as_tensor(x))),
    "meta": Case(lambda: chain(linear(4, 3))().to("meta"), X4, refused=refused("meta tensor")),
    "lazy": Case(lambda: nn.LazyLinear(3), X4, refused=refused("no shape yet")),
    "prelu twice": Case(does(lambda m, x: m.p(m.b(m.p(m.a(x)))), a=linear(4, 3), b=linear(3, 2), p=nn.PReLU), X4),
    "distances": Case(
        does(
            lambda m, x: torch.cdist(m.a(x)[:, None], m.c[None].expand(len(x), -1, -1))[:, 0],
            a=linear(4, 3),
            c=lambda: nn.Parameter(torch.randn(2, 3)),
        ),
        X4,
        refused=refused("cannot differentiate|not those of a symmetric", *SECOND),
    ),
    "branch without gradient": Case(does(under_no_grad, a=linear(4, 3), b=linear(3, 3)), X4),
    "checkpoint": Case(
        does(
            lambda m, x: m.b(checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False)),
            a=linear(4, 3),
            b=linear(3, 2),
        ),
        X4,
    ),
    "reentrant checkpoint": Case(
        does(checkpointed(True), a=linear(4, 4), b=linear(4, 3), c=linear(3, 2)),
        X4,
        call=lambda m, x: checkpointed(False)(m, x),
        refused=refused(r"use checkpoint\(\.\.\., use_reentrant=False\)", *SECOND),
    ),
    "scalar parameters": Case(
        does(
            lambda m, x: m.s * torch.tanh(m.a(x)) + m.t,
            a=linear(4, 3),
            s=lambda: nn.Parameter(torch.tensor(1.3)),
            t=lambda: nn.Parameter(torch.tensor(0.3)),
        ),
        X4,
    ),
    "one scalar": Case(does(lambda m, x: m.s * x, s=lambda: nn.Parameter(torch.tensor(1.3))), X4),
    "slices of one sequential": Case(slices_of_one, X4),
    "one layer listed thrice": Case(does(through_list, layers=listed_thrice), X4),
    "sparse embedding": Case(
        does(lambda m, x: m.f(torch.tanh(m.e(x)).sum(1)), e=lambda: nn.Embedding(7, 3, sparse=True), f=linear(3, 2)),
        TOKENS,
    ),
    "as wide as samples": Case(
        does(over_samples, a=linear(SAMPLES, SAMPLES)),
        SQUARE,
        refused=refused("takes 5 samples together but not one alone", *PER_SAMPLE),
    ),
    "scripted": Case(
        lambda: torch.jit.script(chain(linear(4, 3), nn.Tanh)()), X4, refused=refused("is a torch.jit.ScriptModule")
    ),
    "backward of its own": Case(does(lambda m, x: m.b(Twice.apply(m.a(x))), a=linear(4, 3), b=linear(3, 2)), X4),
    "einsum": Case(
        does(lambda m, x: torch.tanh(torch.einsum("...i,oi->...o", x, m.w)), w=lambda: nn.Parameter(torch.randn(3, 4))),
        X4,
    ),
    "unused layer": Case(does(lambda m, x: torch.tanh(m.a(x)), a=linear(4, 3), b=linear(4, 3)), X4),
    "dead units": Case(does(lambda m, x: m.b(torch.relu(m.a(x) - 100)), a=linear(4, 3), b=linear(3, 2)), X4),
    "output detached": Case(does(lambda m, x: m.a(x).detach(), a=linear(4, 3)), X4, refused=refused("does not depend")),
}
