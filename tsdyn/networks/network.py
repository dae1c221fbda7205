"""Networks as values: an architecture with its parameters.

A formula is written for one network and batched from outside with torch.func.vmap: every operation on plain fully
connected layers accepts leading dimensions through vmap and keeps gradients.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tsdyn.arguments import LAYERS, NETWORK, TEXT, TORCH, check, takes
from tsdyn.networks import activations, torch_io
from tsdyn.networks.activations import Activation, AtZero
from tsdyn.networks.batch_norm import BatchNorm, torch_norm
from tsdyn.networks.propagate import Frame, Image, Layer, Parameters, Place, propagate, rows

#: Bytes of the traces that `Network.output` makes at once.
PASS_BYTES = 1 << 30


@dataclass(frozen=True)
class Trace:
    """One forward pass, layer by layer; index l−1 holds layer l = 1..L, each (sample, node).

    For a convolution the rows are samples and pixels, (sample·row·column, channel).

    Attributes:
        preactivations: What σ is applied to: z_l = W_l f_{l−1} + b_l, normalised where BatchNorm comes before σ.
        gates: σ'(z_l); ones at the output layer, which has no σ.
        activations: What the layer above gets: f_l = σ(z_l), normalised where BatchNorm comes after σ; at the output
            layer f_L = z_L.
    """

    preactivations: list[Tensor]
    gates: list[Tensor]
    activations: list[Tensor]

    @property
    def output(self) -> Tensor:
        """f_L, (sample, output)."""
        return self.activations[-1]


def _as_given(parameter: Any) -> Tensor:
    """A tensor as it is, where it is; an array on the CPU, whatever device the caller has made torch's default."""
    return parameter if isinstance(parameter, Tensor) else torch.as_tensor(parameter, device="cpu")


class Network:
    """Linear layers and convolutions, each hidden one with σ and perhaps BatchNorm, the last one linear.

    Without convolutions and BatchNorm it is f_l = σ(W_l f_{l−1} + b_l), l = 1..L, with f_L linear.

    Args:
        weights: W_1..W_L, arrays or tensors: (n_l, n_{l−1}) of a linear layer as torch stores it, (channel, channel
            below, row, column) of a convolution; convolutions come first.
        biases: b_1..b_L, each (n_l,) or None; None for no biases at all.
        activation: Name registered in `tsdyn.networks.activations`.
        leak: Slope below 0 of ``"leaky_relu"``.
        gate_at_zero: Gate at exactly 0: ``"torch"`` (autograd's) or ``"paper"`` (1).
        norms: BatchNorm of each hidden layer, or None; None for none at all.
        norm: ``"before"`` or ``"after"`` σ; one of them, or one for each hidden layer.
        image: (channel, row, column) of an input; needed if there are convolutions.
        stride, padding: Of every convolution; a number, or one for each.

    Tensors are kept as given, so gradients flow through them.  Inputs and outputs are (sample, input) and
    (sample, output); an image is flattened (channel, row, column).

    Raises:
        TypeError: for arguments of another kind.
        ValueError: if shapes do not chain, dtypes or devices are mixed, an image becomes smaller than a kernel, or the
            activation is unknown.

    Examples:
        >>> import torch, tsdyn
        >>> net = tsdyn.Network([torch.ones(4, 3), torch.ones(2, 4)], [torch.zeros(4), None], activation="relu")
        >>> net(torch.ones(5, 3)).shape
        torch.Size([5, 2])
        >>> net.widths
        (3, 4, 2)
    """

    @takes(weights=LAYERS, biases=LAYERS, activation=TEXT)
    def __init__(
        self,
        weights: Sequence[ArrayLike | Tensor],
        biases: Sequence[ArrayLike | Tensor | None] | None = None,
        activation: str = "relu",
        *,
        leak: float = 0.01,
        gate_at_zero: AtZero = "torch",
        norms: Sequence[BatchNorm | None] | None = None,
        norm: Place | Sequence[Place] = "after",
        image: Image | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
    ) -> None:
        self.weights: list[Tensor] = [_as_given(w) for w in weights]
        given = [None] * len(self.weights) if biases is None else list(biases)
        self.biases: list[Tensor | None] = [None if b is None else _as_given(b) for b in given]
        self.norms: list[BatchNorm | None] = [None] * (len(self.weights) - 1) if norms is None else list(norms)
        activations.check_gate("Network", "gate_at_zero", gate_at_zero)
        self.gate_at_zero: AtZero = gate_at_zero
        convolutions = sum(w.ndim == 4 for w in self.weights)
        hidden = len(self.weights) - 1
        places: tuple[Place, ...] = (norm,) * hidden if isinstance(norm, str) else tuple(norm)
        if len(places) != max(hidden, 0) or not {*places, *([norm] if isinstance(norm, str) else [])} <= _PLACES:
            raise ValueError(
                f"Network: norm={norm!r}; BatchNorm is 'before' or 'after' the activation, of all {hidden} hidden "
                "layers or of each"
            )
        strides, paddings = (
            (given,) * convolutions if isinstance(given, int) else tuple(given) for given in (stride, padding)
        )
        if {len(strides), len(paddings)} != {convolutions} or min((1, *strides)) < 1 or min((0, *paddings)) < 0:
            raise ValueError(
                f"Network: stride={stride}, padding={padding}; the one is 1 or more, the other 0 or more, of all "
                f"{convolutions} convolutions or of each"
            )
        self.frame = Frame(activations.activation(activation, leak=leak), image, strides, paddings, places)
        self._images = _check(self)

    @property
    def activation(self) -> Activation:
        """σ of the hidden layers."""
        return self.frame.activation

    @property
    def depth(self) -> int:
        """L, the number of layers above the input."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the input, then the number of nodes (or channels) of each layer: n_0..n_L."""
        image, first = self.frame.image, self.weights[0]
        return (
            first.shape[1] if image is None else math.prod(image),
            *(w.shape[0] for w in self.weights),
        )  # len() of a tensor is slow

    @property
    def images(self) -> list[Image | None]:
        """(channel, row, column) of each layer's activation; None for a linear layer."""
        return list(self._images)

    @property
    def convolutional(self) -> bool:
        """Whether there is a convolution."""
        return any(w.ndim == 4 for w in self.weights)

    @property
    def plain(self) -> bool:
        """Whether all layers are linear and none has BatchNorm."""
        return not self.convolutional and all(n is None for n in self.norms)

    # --- forward ---------------------------------------------------------------------------------------------

    def __call__(self, x: Float[Tensor, "sample input"], *, training: bool = False) -> Float[Tensor, "sample output"]:
        """f_L(x), (sample, output); with `training` BatchNorm uses the batch and updates its running statistics.

        Raises:
            ValueError: for inputs of another width, or a single value per node in training mode.
        """
        if not self.plain:
            return self._propagate(x, training)[-1].activation[0]
        for layer in range(self.depth):
            z = self._affine(layer, x)
            x = self.activation(z) if layer < self.depth - 1 else z
        return x

    forward = __call__

    @property
    def trace_bytes(self) -> int:
        """Bytes of the trace of one sample."""
        hidden = zip(self.widths[1:], self._images, strict=True)
        numbers = sum(width if image is None else math.prod(image) for width, image in hidden)
        return 3 * numbers * self.weights[0].element_size()

    def pieces(self, x: Float[Tensor, "sample input"]) -> tuple[Tensor, ...]:
        """The inputs `x` in their order, cut so that the trace of each piece takes `PASS_BYTES` at most."""
        found: tuple[Tensor, ...] = x.split(max(1, PASS_BYTES // self.trace_bytes))
        return found

    def output(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample output"]:
        """f_L(x) in evaluation mode as a call gives it, `pieces` one after another: memory does not grow with x."""
        outputs = [self(piece) for piece in self.pieces(x)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def trace(self, x: Float[Tensor, "sample input"], *, training: bool = False) -> Trace:
        """Pre-activation, gate and activation of every layer, each (sample, node).

        For a convolution each is (sample·row·column, channel).

        Source: Tian (2020), section 3 (f_l, D_l = diag of the gate).
        """
        if self.plain:
            pairs = list(self._layers(x))
        else:
            found = self._propagate(x, training)
            pairs = [(rows(part.preactivation), rows(part.activation)) for part in found]
        gates = [self.activation.gate(z, at_zero=self.gate_at_zero) for z, _ in pairs[:-1]]
        return Trace([z for z, _ in pairs], [*gates, torch.ones_like(pairs[-1][0])], [f for _, f in pairs])

    def _layers(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """z_l and f_l of plain layers."""
        for layer in range(self.depth):
            z = self._affine(layer, x)
            x = self.activation(z) if layer < self.depth - 1 else z
            yield z, x

    def _affine(self, layer: int, x: Tensor) -> Tensor:
        weight, bias = self.weights[layer], self.biases[layer]
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"Network: inputs have {x.shape[-1]} features, layer {layer + 1} takes {weight.shape[-1]}; "
                "x is (sample, input)"
            )
        return nn.functional.linear(x, weight, bias)

    def _propagate(self, x: Tensor, training: bool) -> list[Layer]:
        if x.ndim != 2 or x.shape[1] != self.widths[0]:
            raise ValueError(
                f"Network: inputs of shape {tuple(x.shape)}, it takes (sample, {self.widths[0]}); flatten images"
            )
        stacked = Parameters.of([self], share=True)
        return propagate(stacked, self.frame, x.unsqueeze(0), training=training)

    # --- other parameters ------------------------------------------------------------------------------------

    def to(self, target: torch.dtype | str) -> Network:
        """The same network in another floating-point type or on another device; tensors already there are shared."""
        return self.with_parameters(
            [w.to(target) for w in self.weights],
            [None if b is None else b.to(target) for b in self.biases],
            [None if n is None else n.map(lambda t: t.to(target)) for n in self.norms],
        )

    def with_parameters(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norms: Sequence[BatchNorm | None] | None = None,
    ) -> Network:
        """A network of the same architecture with other parameters; it keeps this one's BatchNorm if none is given."""
        f = self.frame
        return Network(
            weights, biases, f.activation.name, leak=f.activation.leak or 0.0, gate_at_zero=self.gate_at_zero,
            norms=self.norms if norms is None else norms, norm=f.places,
            image=f.image, stride=f.strides, padding=f.paddings,
        )  # fmt: skip

    def folded(self, *, training: bool = False) -> Network:
        """A network of plain linear layers that computes the same function in evaluation mode: `theory` works on it.

        BatchNorm is folded into the linear map below it, or above it if it follows σ; a convolution becomes its matrix,
        (channel·row·column, channel·row·column below), which only small images allow.  Gradients reach the parameters.
        A plain network is returned as it is.  Source: Tian et al. (2019), section 3.

        Raises:
            MemoryError: if a convolution's matrix does not fit.
            ValueError: for BatchNorm in training mode, where a sample's output depends on the rest of its batch.
        """
        if training and any(n is not None for n in self.norms):
            raise ValueError(
                "folded: BatchNorm in training mode couples the samples of a batch, so no V_l(x), A_l(x) or B_l(x) of "
                "one sample exists; its exact backward map is the batch operator theory.batch_norm_gradient"
            )
        if self.plain:
            return self
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        pending: tuple[Tensor, Tensor] | None = None  # of a BatchNorm above an activation
        below = self.frame.image
        for i, (weight, bias, image) in enumerate(zip(self.weights, self.biases, self._images, strict=True)):
            if image is not None:
                assert below is not None
                weight, bias = torch_io.unrolled(
                    weight, bias, below, image, stride=self.frame.strides[i], padding=self.frame.paddings[i]
                )
            if pending is not None:
                scale, shift = pending
                bias = weight @ shift if bias is None else bias + weight @ shift
                weight, pending = weight * scale, None
            norm = self.norms[i] if i < self.depth - 1 else None
            if norm is not None:
                pixels = len(weight) // len(norm.mean)
                scale, shift = (t.repeat_interleave(pixels) for t in norm.affine())
                if self.frame.norm_first(i):
                    weight, bias = scale[:, None] * weight, shift if bias is None else scale * bias + shift
                else:
                    pending = scale, shift
            weights.append(weight)
            biases.append(bias)
            below = image
        leak = self.activation.leak or 0.0
        return Network(weights, biases, self.activation.name, leak=leak, gate_at_zero=self.gate_at_zero)

    # --- torch -----------------------------------------------------------------------------------------------

    @classmethod
    @takes(module=TORCH)
    def from_torch(
        cls, module: nn.Module, *, image: Image | None = None, gate_at_zero: AtZero = "torch", compare: bool = True
    ) -> Network:
        """The network that an ``nn.Sequential`` of Conv2d, Linear, BatchNorm and one kind of activation computes.

        Parameters and running statistics are the module's own tensors, so gradients reach them; a parametrized weight
        is computed once, now.  BatchNorm (`norms`) and convolutions are kept; `folded` makes linear layers of them.
        Before the network is returned, its outputs on random inputs are compared with the module's in evaluation mode.

        Args:
            module: Sequential, nested or not; Flatten between convolutions and linear layers may be there.
            image: (channel, row, column) of the inputs of a convolution; x is then (sample, channel·row·column).
            gate_at_zero: Gate at exactly 0: ``"torch"`` (autograd's) or ``"paper"`` (1).
            compare: Whether to compare outputs; False is for those who know that each part is torch's own.

        Raises:
            ValueError: naming the module that cannot be converted (subclasses of these classes, forward hooks,
                activations that differ between layers), or if the module computes something else.
        """
        parts = torch_io.parts_of(module)
        sigma = parts.activation
        made = cls(
            parts.weights, parts.biases, sigma.name, leak=sigma.leak or 0.0, gate_at_zero=gate_at_zero,
            norms=parts.norms[:-1], norm=parts.places[:-1], image=image,
            stride=[stride for stride, _ in parts.geometry], padding=[padding for _, padding in parts.geometry],
        )  # fmt: skip
        if compare:
            made._compare(module)
        return made

    def _compare(self, module: nn.Module) -> None:
        """Refuse a module whose output on three random inputs differs; torch's global generator is left as it is."""
        first, last, bias = self.weights[0], self.weights[-1].detach(), self.biases[-1]
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(3, self.widths[0], generator=draw, dtype=torch.float64, device="cpu").to(first)
        image = self.frame.image
        with torch.no_grad():
            below = self._propagate(x, False)[-2].activation[0] if self.depth > 1 else x
            terms = below.flatten(1).abs() @ last.abs().T + (0 if bias is None else bias.abs())
            given = x.unflatten(1, image) if image is not None and first.ndim == 4 else x
            torch_io.compare(self, terms, module, x, given)

    def to_torch(self) -> nn.Sequential:
        """An ``nn.Sequential`` in evaluation mode that computes the same function, with copies of all parameters.

        It takes images (sample, channel, row, column) if there are convolutions.
        """
        parts: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            parts += self._torch_layer(i, weight, bias)
            if i == self.depth - 1:
                break
            gate, held = self.activation.module(), self.norms[i]
            norm = [] if held is None else [torch_norm(held, image=weight.ndim == 4)]
            parts += [*norm, gate] if self.frame.norm_first(i) else [gate, *norm]
        return nn.Sequential(*parts).eval()

    def _torch_layer(self, i: int, weight: Tensor, bias: Tensor | None) -> list[nn.Module]:
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        made: nn.Conv2d | nn.Linear  # without torch's own start, which would draw from the caller's generator
        if weight.ndim == 4:
            channels, below, *kernel = weight.shape
            made = skip_init(
                nn.Conv2d, below, channels, (kernel[0], kernel[1]), self.frame.strides[i], self.frame.paddings[i],
                bias=bias is not None, **like,
            )  # fmt: skip
        else:
            made = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None, **like)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                assert made.bias is not None
                made.bias.copy_(bias)
        flatten = i > 0 and weight.ndim == 2 and self.weights[i - 1].ndim == 4
        return [nn.Flatten(), made] if flatten else [made]

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name: ``layer.1.weight``, ``layer.1.bias``, ``norm.1.running_mean``, ..."""
        found: dict[str, Tensor] = {}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            found[f"layer.{i}.weight"] = weight
            if bias is not None:
                found[f"layer.{i}.bias"] = bias
            if i < self.depth and (norm := self.norms[i - 1]) is not None:
                found |= {f"norm.{i}.{name}": t for name, t in norm.tensors().items()}
        return found

    def with_state(self, state: Mapping[str, Tensor]) -> Network:
        """A network of this architecture with the tensors of a state dict.

        Keys are the names of `state_dict` or those of ``to_torch()``, with a prefix or without (`torch_io.fit`).

        Raises:
            ValueError: naming every missing, unexpected and misshapen key.
        """
        own = self.state_dict()
        # both list their tensors layer by layer, in the same order
        found = torch_io.fit(state, self.to_torch().state_dict(), own)
        by_name = {name: t.to(self.weights[0]) for name, t in zip(own, found, strict=True)}
        layers = range(1, self.depth + 1)
        norms: list[BatchNorm | None] = []
        for i, norm in enumerate(self.norms, start=1):
            held: dict[str, Any] = {
                part: by_name[f"norm.{i}.{name}"]
                for part, name in _NORM_FIELDS.items()
                if f"norm.{i}.{name}" in by_name
            }
            norms.append(None if norm is None else replace(norm, **held))
        return self.with_parameters(
            [by_name[f"layer.{i}.weight"] for i in layers], [by_name.get(f"layer.{i}.bias") for i in layers], norms
        )

    def __repr__(self) -> str:
        named = zip(self.widths[1:], self.weights, strict=True)
        shapes = [f"{n}" + ("" if w.ndim == 2 else f"@{w.shape[2]}x{w.shape[3]}") for n, w in named]
        places = dict.fromkeys(p for p, n in zip(self.frame.places, self.norms, strict=True) if n is not None)
        norm = f", BatchNorm {' and '.join(places)}" if places else ""
        bias = "" if any(b is not None for b in self.biases) else ", no bias"
        widths = "-".join([str(self.widths[0]), *shapes])
        return f"Network({widths}, {self.activation.name}{norm}{bias}, {self.weights[0].dtype})"

    def _repr_html_(self) -> str:
        """Table of the layers for a notebook: widths, kernels, biases, BatchNorm, numbers of parameters."""
        norms = [*((norm, place) for norm, place in zip(self.norms, self.frame.places, strict=True)), (None, "")]
        rows = "".join(
            f"<tr><td>{layer}</td><td>{weight.shape[1]}</td><td>{weight.shape[0]}</td>"
            f"<td>{'linear' if weight.ndim == 2 else f'convolution {weight.shape[2]}x{weight.shape[3]}'}</td>"
            f"<td>{'' if bias is None else 'bias'}</td><td>{'' if norm is None else f'BatchNorm {place}'}</td>"
            f"<td>{weight.numel() + (0 if bias is None else bias.numel())}</td></tr>"
            for layer, (weight, bias, (norm, place)) in enumerate(
                zip(self.weights, self.biases, norms, strict=True), start=1
            )
        )
        head = "".join(f"<th>{word}</th>" for word in ("layer", "inputs", "nodes", "kind", "", "", "parameters"))
        return f"<p><code>{html.escape(repr(self))}</code></p><table><tr>{head}</tr>{rows}</table>"


_PLACES = {"before", "after"}
_NORM_FIELDS = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}


def require_plain(caller: str, *networks: Network) -> None:
    """Refuse networks with convolutions or BatchNorm, whose weights alone are not the function that they compute.

    Raises:
        TypeError, ValueError: naming the way out.
    """
    for network in networks:
        check(caller, "network", network, NETWORK)
        if not network.plain:
            raise ValueError(
                f"{caller}: {network!r} has convolutions or BatchNorm; take its folded(), which is the same function "
                "in evaluation mode, of plain linear layers"
            )


def _check(network: Network) -> list[Image | None]:
    """Image shape of each layer; raises ValueError where shapes of successive layers do not fit together."""
    weights, biases, norms, frame = network.weights, network.biases, network.norms, network.frame
    if not weights or len(biases) != len(weights) or len(norms) != len(weights) - 1:
        raise ValueError(
            f"Network: {len(weights)} weights, {len(biases)} biases and {len(norms)} norms; give at least one weight, "
            "a bias for each and a norm for each hidden layer"
        )
    image, flat = frame.image, None if frame.image is None else math.prod(frame.image)
    images: list[Image | None] = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        if weight.ndim not in (2, 4) or not weight.is_floating_point():
            raise ValueError(
                f"Network: weight of layer {i} is {weight.dtype} of shape {tuple(weight.shape)}; it must be "
                "floating point (node, input_node), or (channel, channel below, row, column)"
            )
        if weight.ndim == 4:
            if weights[0].ndim != 4:
                raise ValueError(f"Network: layer {i} is a convolution above a linear layer; convolutions come first")
            image = _convolved(i, weight, image, frame)
            flat = math.prod(image)
        else:
            if flat is not None and weight.shape[1] != flat:
                below = f"layer {i - 1}" if i > 1 else "an input"
                raise ValueError(f"Network: layer {i} takes {weight.shape[1]} inputs, {below} has {flat} nodes")
            image, flat = None, weight.shape[0]
        images.append(image)
        norm = norms[i - 1] if i < len(weights) else None
        _check_layer(i, weight, {"bias": bias, **({} if norm is None else norm.tensors())}, weights[0])
    if images[-1] is not None:
        raise ValueError("Network: the last layer must be linear")
    return images


def _check_layer(i: int, weight: Tensor, held: Mapping[str, Tensor | None], first: Tensor) -> None:
    """Refuse a bias or BatchNorm tensor of another shape than the layer's, or any tensor of another dtype or device."""
    for what, tensor in {"weight": weight, **held}.items():
        if tensor is None:
            continue
        if tensor is not weight and tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"Network: {what} of layer {i} has shape {tuple(tensor.shape)}, the layer has {len(weight)} nodes"
            )
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"Network: layer {i} is {tensor.dtype} on {tensor.device}, layer 1 {first.dtype} on "
                f"{first.device}; move all to one dtype and device"
            )


def _convolved(i: int, weight: Tensor, image: Image | None, frame: Frame) -> Image:
    if image is None or weight.shape[1] != image[0]:
        raise ValueError(
            f"Network: layer {i} convolves images of {weight.shape[1]} channels and gets "
            f"{image or 'a flat vector'}; give image=(channel, row, column)"
        )
    row, column = (
        (size + 2 * frame.paddings[i - 1] - kernel) // frame.strides[i - 1] + 1
        for size, kernel in zip(image[1:], weight.shape[2:], strict=True)
    )
    if min(row, column) < 1:
        raise ValueError(
            f"Network: layer {i} has kernels of {tuple(weight.shape[2:])} and gets images of {image[1:]}; use "
            "fewer layers, padding or larger images"
        )
    return len(weight), row, column
