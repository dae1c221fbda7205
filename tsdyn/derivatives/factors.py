"""Per-sample gradients of one layer's parameters, held as the layer's input and the gradient at its output.

Gradients and norms follow from these two; which formula is taken depends on shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsdyn.engine import compiled_factors, compiled_patches

#: Bytes of the gradients that are formed, squared and dropped together, so that they stay in a core's cache.
_IN_CACHE = 1 << 20
#: How much faster than torch's the compiled products of a sample's factors are in float64.
_COMPILED = 2


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients of one layer's parameters, stored as the two factors f and g of their product.

    Attributes:
        inputs: f, (sample, position, input); of a convolution its patches, with groups counted as samples.
        gradients: g, (sample, position, output): the gradient of each sample's loss at the layer's output.
        weight_shape: Shape of the weight.
        groups: Number of groups of a convolution; 1 for a linear layer.
        bias: Whether the layer has a bias.
    """

    inputs: Tensor
    gradients: Tensor
    weight_shape: torch.Size
    groups: int
    bias: bool

    def weight(self, into: Tensor | None = None) -> Tensor:
        """Gradient of the weight, Σ_t g_t f_tᴴ, (sample, *weight_shape); written to `into` if that is given."""
        out = None if into is None else into.view(len(self.inputs), -1, self.inputs.shape[2])
        if self.inputs.shape[1] == 1:
            product = torch.mul(self.gradients.mT, self.inputs.conj(), out=out)
        else:
            product = _products(self.inputs, self.gradients, out)
        return product.view(-1, *self.weight_shape)

    def bias_gradient(self) -> Tensor:
        """Gradient of the bias, Σ_t g_t, (sample, output)."""
        total = self.gradients[:, 0] if self.gradients.shape[1] == 1 else self.gradients.sum(1)
        return total.reshape(-1, self.weight_shape[0])

    def squared_norms(self, *, weight: bool = True, bias: bool = True) -> Tensor:
        """Squared norm of each sample's gradient, (sample,), in at least float32.

        For one position ‖f‖² ‖g‖².  For more, Σ_tt' (f_t · f_t')(g_t · g_t') where that is cheaper than forming the
        gradient, unless the terms cancel to a hundredth of their size, which would cost digits.
        """
        f, g = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.inputs, self.gradients))
        total = torch.zeros(len(f) // self.groups, dtype=g.real.dtype, device=g.device)
        if weight:
            _, positions, inputs = f.shape
            outputs = g.shape[2]
            squares = None
            if positions == 1:
                squares = _square(f).sum((1, 2)) * _square(g).sum((1, 2))
            else:
                compiled = compiled_factors.serves(f, g := g.contiguous())
                if _pairs_pay(positions, inputs, outputs, f.dtype if compiled else None):
                    gram = (torch.bmm(f, f.mH) * torch.bmm(g, g.mH).conj()).real
                    squares = gram.sum((1, 2))
                    if bool((squares < gram.abs().sum((1, 2)) / 100).any()):
                        squares = None
                if squares is None and compiled:
                    squares = compiled_factors.squared_norms(f, g)
            if squares is None:
                at_once = max(1, _IN_CACHE // (inputs * outputs * f.element_size()))
                parts = zip(f.split(at_once), g.split(at_once), strict=True)
                squares = torch.cat([_square(torch.bmm(b.mT, a.conj())).sum((1, 2)) for a, b in parts])
            total = total + squares.view(-1, self.groups).sum(1)
        if bias and self.bias:
            total = total + _square(g.sum(1).view(-1, self.weight_shape[0])).sum(1)
        return total

    def combined(self, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Σ_i c_i g_i by kind ("weight", "bias"), each as (sum, size of its terms), without forming any g_i."""
        inputs, outputs = self.inputs.shape[-1], self.gradients.shape[-1]
        f = (
            self.inputs.reshape(-1, self.groups, self.inputs.shape[1], inputs)
            .transpose(0, 1)
            .reshape(self.groups, -1, inputs)
        )
        g = self.gradients.view(-1, self.groups, self.gradients.shape[1], outputs) * weights.to(
            self.gradients.dtype
        ).view(-1, 1, 1, 1)
        g = g.transpose(0, 1).reshape(self.groups, -1, outputs)
        size = torch.linalg.vector_norm(g, dim=1).max()
        found = {
            "weight": (
                torch.bmm(g.mT, f.conj()).view(self.weight_shape),
                size * torch.linalg.vector_norm(f, dim=1).max(),
            )
        }
        if self.bias:
            found["bias"] = (g.sum(1).flatten(), size * f.shape[1] ** 0.5)
        return found

    def row(self, sample: int) -> Factors:
        """The factors of one sample."""
        of = slice(sample * self.groups, (sample + 1) * self.groups)
        return Factors(self.inputs[of], self.gradients[of], self.weight_shape, self.groups, self.bias)

    def scaled(self) -> tuple[Factors, Tensor, Tensor]:
        """Factors in float64 whose largest entries are 1, and what f and g of each sample were divided by."""
        samples = len(self.inputs) // self.groups
        scales = [_largest(t, samples) for t in (self.inputs, self.gradients)]
        f, g = (
            t.to(torch.promote_types(t.dtype, torch.float64)) / scale.repeat_interleave(self.groups).view(-1, 1, 1)
            for t, scale in zip((self.inputs, self.gradients), scales, strict=True)
        )
        return Factors(f, g, self.weight_shape, self.groups, self.bias), scales[0], scales[1]


@dataclass(frozen=True)
class Convolved:
    """Per-sample gradients of a convolution; its patches, which overlap, are formed only where that is cheaper.

    Attributes:
        inputs: (sample, channel, row, column).
        gradients: The gradient at its output, (sample, channel, row, column).
        layer: The convolution, padded with zeros.
    """

    inputs: Tensor
    gradients: Tensor
    layer: nn.Conv2d

    def factors(self) -> Factors:
        """The same with patches as inputs."""
        weight, groups = self.layer.weight, self.layer.groups
        patches = F.unfold(
            self.inputs, self.layer.kernel_size, self.layer.dilation, self.layer.padding, self.layer.stride  # type: ignore[arg-type]
        )  # fmt: skip
        patches = patches.reshape(len(self.inputs) * groups, -1, patches.shape[-1]).mT
        g = self.gradients.flatten(2).reshape(len(patches), -1, patches.shape[1]).mT
        return Factors(patches, g, weight.shape, groups, self.layer.bias is not None)

    def weight(self, into: Tensor | None = None) -> Tensor:
        """Gradient of the weight, (sample, *weight_shape); written to `into` if that is given."""
        if not compiled_patches.serves(self.inputs, self.gradients):
            return self.factors().weight(into)
        shape = (len(self.inputs), *self.layer.weight.shape)
        target = self.inputs.new_empty(shape) if into is None else into.view(shape)
        return compiled_patches.gradients(self.layer, self.inputs, self.gradients, target)

    def bias_gradient(self) -> Tensor:
        """Gradient of the bias, (sample, output)."""
        return self.gradients.sum((2, 3))

    def squared_norms(self, *, weight: bool = True, bias: bool = True) -> Tensor:
        """Squared norm of each sample's gradient, (sample,), in at least float32."""
        outputs, inputs = len(self.layer.weight) // self.layer.groups, self.layer.weight[0].numel()
        positions = self.gradients[0, 0].numel()
        compiled = compiled_patches.serves(self.inputs, self.gradients)
        if weight and (not compiled or _pairs_pay(positions, inputs, outputs, self.inputs.dtype)):
            return self.factors().squared_norms(weight=weight, bias=bias)
        total = torch.zeros(len(self.inputs), dtype=self.gradients.dtype, device=self.gradients.device)
        if weight:
            total = compiled_patches.squared_norms(self.layer, self.inputs, self.gradients)
        if bias and self.layer.bias is not None:
            total = total + _square(self.bias_gradient()).sum(1)
        return total

    def row(self, sample: int) -> Convolved:
        """The factors of one sample."""
        of = slice(sample, sample + 1)
        return Convolved(self.inputs[of], self.gradients[of], self.layer)

    def scaled(self) -> tuple[Factors, Tensor, Tensor]:
        return self.factors().scaled()


@dataclass(frozen=True)
class Scaled:
    """Per-sample gradients of the affine map of a normalisation, Σ_t g_t ∘ f_t and Σ_t g_t, which are formed at once.

    Attributes:
        of_weight, of_bias: (sample, *parameter).
    """

    of_weight: Tensor
    of_bias: Tensor

    @classmethod
    def of(cls, layer: nn.LayerNorm | nn.GroupNorm, f: Tensor, g: Tensor, count: int) -> Scaled:
        """Of a layer's input f and the gradient g at its output, both with as many rows as samples, or a multiple."""
        if isinstance(layer, nn.LayerNorm):
            normal = F.layer_norm(f, list(layer.normalized_shape), None, None, layer.eps)
            shape = (count, -1, *layer.normalized_shape)
            return cls((normal * g).reshape(shape).sum(1), g.reshape(shape).sum(1))
        normal = F.group_norm(f, layer.num_groups, None, None, layer.eps)
        shape = (count, len(f) // count, layer.num_channels, -1)
        return cls((normal * g).reshape(shape).sum((1, 3)), g.reshape(shape).sum((1, 3)))

    def weight(self, into: Tensor | None = None) -> Tensor:
        return self.of_weight if into is None else into.copy_(self.of_weight)

    def bias_gradient(self) -> Tensor:
        return self.of_bias

    def squared_norms(self, *, weight: bool = True, bias: bool = True) -> Tensor:
        """Squared norm of each sample's gradient, (sample,), in at least float32."""
        dtype = torch.promote_types(self.of_bias.dtype, torch.float32)
        asked = [t for t, wanted in ((self.of_weight, weight), (self.of_bias, bias)) if wanted]
        total = torch.zeros(len(self.of_bias), dtype=dtype, device=self.of_bias.device)
        for t in asked:
            total = total + t.to(dtype).square().flatten(1).sum(1)
        return total

    def row(self, sample: int) -> Scaled:
        """The gradients of one sample."""
        return Scaled(self.of_weight[sample : sample + 1], self.of_bias[sample : sample + 1])


Held: TypeAlias = Factors | Convolved | Scaled


def norms(held: Held, *, weight: bool, bias: bool) -> Tensor:
    """Norm of each sample's gradient; where squares overflow or vanish, again in float64 with entries scaled to one."""
    squares = held.squared_norms(weight=weight, bias=bias)
    limits = torch.finfo(squares.dtype)
    if bool(((squares > limits.tiny / limits.eps**2) & (squares < limits.max)).all()):
        return squares.sqrt()
    if isinstance(held, Scaled):
        parts = [t.double() for t, wanted in ((held.of_weight, weight), (held.of_bias, bias)) if wanted]
        rows = torch.cat([t.flatten(1) for t in parts], 1)
        scale = _largest(rows, len(rows))
        found: Tensor = torch.linalg.vector_norm(rows / scale[:, None], dim=1) * scale
        return found
    scaled, of_inputs, of_gradients = held.scaled()
    of_weight = scaled.squared_norms(weight=weight, bias=False).sqrt() * of_inputs * of_gradients
    return torch.hypot(of_weight, scaled.squared_norms(weight=False, bias=bias).sqrt() * of_gradients)


def _pairs_pay(positions: int, inputs: int, outputs: int, compiled: torch.dtype | None) -> bool:
    """Whether products of a sample's positions in pairs cost less than its gradient.

    `compiled` is the dtype in which compiled code would form the gradient, None where torch would.
    """
    ahead = _COMPILED if compiled == torch.float64 else 1
    return positions * (inputs + outputs) * ahead <= inputs * outputs


def _products(f: Tensor, g: Tensor, into: Tensor | None) -> Tensor:
    """Σ_t g_t f_tᴴ of each sample, (sample, output, input); written to `into` if that is given."""
    g = g.contiguous()
    if compiled_factors.serves(f, g):
        target = f.new_empty(len(f), g.shape[2], f.shape[2]) if into is None else into
        if compiled_factors.serves(f, g, target):
            return compiled_factors.products(f, g, target)
    return torch.bmm(g.mT, f.conj(), out=into)


def _square(values: Tensor) -> Tensor:
    return values.real.square() + values.imag.square() if values.is_complex() else values.square()


def _largest(values: Tensor, samples: int) -> Tensor:
    """Largest entry of each sample in float64; 1 where that is 0 or not finite."""
    most = values.abs().reshape(samples, -1).amax(1).double()
    return torch.where((most > 0) & most.isfinite(), most, torch.ones_like(most))
