"""Convolutions and BatchNorm: deep networks as the papers train them, one by one or many members side by side.

The formula is written for stacked members, (member, sample, ...): convolutions of all members are one grouped
convolution over (sample, member·channel), which on one core takes two thirds of the time of separate modules at
batch 16 and less below (docs: performance).  A single network is one member.

A node of a convolution is a channel.  Its activations over samples, rows and columns are the rows of its trace, so
that whatever is defined for nodes - correlation, dead nodes, moments - is defined for channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from tsdyn import activations
from tsdyn.activations import Activation
from tsdyn.networks import Network, Trace

Image: TypeAlias = tuple[int, int, int]
Place: TypeAlias = Literal["before", "after"]


@dataclass(frozen=True)
class BatchNorm:
    """(x − mean)/√(variance + eps) · scale + shift of each node: by the batch in training, by running statistics else.

    Attributes:
        mean, variance: Running statistics, (node,) or (member, node); the variance is the unbiased one, as torch's.
        scale, shift: Of the affine map, or None.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
    """

    mean: Tensor
    variance: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1

    @classmethod
    def fresh(cls, nodes: int, *, affine: bool = True, like: Tensor, eps: float = 1e-5) -> BatchNorm:
        """As torch's modules start: mean 0, variance 1, scale 1, shift 0."""
        zeros, ones = like.new_zeros(nodes), like.new_ones(nodes)
        return cls(zeros, ones, ones.clone() if affine else None, zeros.clone() if affine else None, eps)

    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by torch's names."""
        named = {
            "weight": self.scale, "bias": self.shift, "running_mean": self.mean, "running_var": self.variance,
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: object) -> BatchNorm:
        """The same with `change` applied to each tensor."""
        assert callable(change)
        return replace(
            self,
            mean=change(self.mean),
            variance=change(self.variance),
            scale=None if self.scale is None else change(self.scale),
            shift=None if self.shift is None else change(self.shift),
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each node by the running statistics: x → scale · x + shift."""
        scale = (self.variance + self.eps).rsqrt()
        scale = scale if self.scale is None else self.scale * scale
        shift = -scale * self.mean
        return scale, shift if self.shift is None else self.shift + shift


@dataclass(frozen=True)
class Frame:
    """What layers share.

    Attributes:
        activation: σ of the hidden layers.
        image: (channel, row, column) of an input, None for a network without convolutions.
        stride, padding: Of every convolution; padding 0 is "valid".
        norm: Whether BatchNorm is applied before or after σ.
    """

    activation: Activation
    image: Image | None = None
    stride: int = 1
    padding: int = 0
    norm: Place = "after"


class DeepNetwork:
    """Convolutions, then linear layers, each hidden one with σ and perhaps BatchNorm; f_L linear.

    Args:
        weights: W_1..W_L: (channel, channel below, row, column) of a convolution, (node, input_node) of a linear
            layer; convolutions come first.
        biases: b_1..b_L, each (node,) or None.
        activation, leak: As of `Network`.
        norms: BatchNorm of each hidden layer or None.
        norm: ``"before"`` or ``"after"`` σ.
        image: (channel, row, column) of an input; needed if there are convolutions.
        stride, padding: Of every convolution.

    Inputs and outputs are (sample, input) and (sample, output); an image is flattened (channel, row, column).

    Raises:
        ValueError: if shapes do not chain, an image becomes smaller than a kernel, or BatchNorm has another width.
    """

    def __init__(
        self,
        weights: Sequence[ArrayLike | Tensor],
        biases: Sequence[ArrayLike | Tensor | None] | None = None,
        activation: str = "relu",
        *,
        leak: float = 0.01,
        norms: Sequence[BatchNorm | None] | None = None,
        norm: Place = "after",
        image: Image | None = None,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        self.weights = [torch.as_tensor(w) for w in weights]
        given = [None] * len(self.weights) if biases is None else list(biases)
        self.biases = [None if b is None else torch.as_tensor(b) for b in given]
        self.norms = [None] * (len(self.weights) - 1) if norms is None else list(norms)
        if norm not in ("before", "after"):
            raise ValueError(f"DeepNetwork: norm={norm!r}; BatchNorm is 'before' or 'after' the activation")
        self.frame = Frame(activations.activation(activation, leak=leak), image, stride, padding, norm)
        self._images = _check(self.weights, self.biases, self.norms, self.frame)

    @property
    def activation(self) -> Activation:
        return self.frame.activation

    @property
    def depth(self) -> int:
        """L, the number of layers above the input."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of an input, nodes (channels) of each layer."""
        first = self.weights[0]
        inputs = first.shape[1] if self.frame.image is None else math.prod(self.frame.image)
        return (inputs, *(len(w) for w in self.weights))

    @property
    def images(self) -> list[Image | None]:
        """(channel, row, column) of each layer's activation; None for a linear layer."""
        return list(self._images)

    def __call__(self, x: Tensor, *, training: bool = False) -> Tensor:
        """f_L(x), (sample, output); with `training` BatchNorm uses the batch and moves its running statistics.

        Raises:
            ValueError: for inputs of another width, or a single value a channel in training mode.
        """
        return self._propagate(x, training)[-1].activation[0]

    forward = __call__

    def trace(self, x: Tensor, *, training: bool = False) -> Trace:
        """Pre-activation, gate and activation (after σ and BatchNorm) of every layer.

        (sample, node); of a convolution (sample·row·column, channel).
        """
        found = self._propagate(x, training)
        rows = [(_rows(part.preactivation), _rows(part.activation)) for part in found]
        gates = [self.activation.gate(z) for z, _ in rows[:-1]] + [torch.ones_like(rows[-1][0])]
        return Trace([z for z, _ in rows], gates, [f for _, f in rows])

    def _propagate(self, x: Tensor, training: bool) -> list[Layer]:
        if x.ndim != 2 or x.shape[1] != self.widths[0]:
            raise ValueError(
                f"DeepNetwork: inputs of shape {tuple(x.shape)}, it takes (sample, {self.widths[0]}); flatten images"
            )
        stacked = Parameters.of([self], share=True)
        return propagate(stacked, self.frame, x.unsqueeze(0), training=training)

    def to(self, target: torch.dtype | str) -> DeepNetwork:
        """The same network in another floating-point type or on another device."""
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
    ) -> DeepNetwork:
        """Other parameters in the same architecture; the same BatchNorm if none is given."""
        f = self.frame
        return DeepNetwork(
            weights, biases, f.activation.name, leak=f.activation.leak or 0.0,
            norms=self.norms if norms is None else norms, norm=f.norm,
            image=f.image, stride=f.stride, padding=f.padding,
        )  # fmt: skip

    # --- torch -----------------------------------------------------------------------------------------------

    def to_torch(self) -> nn.Sequential:
        """An ``nn.Sequential`` in evaluation mode with copies of everything, computing the same function.

        It takes images (sample, channel, row, column) if there are convolutions.
        """
        parts: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            parts += self._torch_layer(i, weight, bias)
            if i == self.depth - 1:
                break
            gate = self.activation.module()
            held = self.norms[i]
            norm = [] if held is None else [_torch_norm(held, weight)]
            parts += [*norm, gate] if self.frame.norm == "before" else [gate, *norm]
        return nn.Sequential(*parts).eval()

    def _torch_layer(self, i: int, weight: Tensor, bias: Tensor | None) -> list[nn.Module]:
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        made: nn.Conv2d | nn.Linear
        if weight.ndim == 4:
            channels, below, *kernel = weight.shape
            made = nn.Conv2d(
                below, channels, (kernel[0], kernel[1]), self.frame.stride, self.frame.padding,
                bias=bias is not None, **like,
            )  # fmt: skip
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **like)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                assert made.bias is not None
                made.bias.copy_(bias)
        flatten = i > 0 and weight.ndim == 2 and self.weights[i - 1].ndim == 4
        return [nn.Flatten(), made] if flatten else [made]

    @classmethod
    def from_torch(cls, module: nn.Module, *, image: Image | None = None) -> DeepNetwork:
        """The network an ``nn.Sequential`` of Conv2d, Linear, BatchNorm and one kind of activation computes.

        Parameters and running statistics are the module's own tensors.

        Args:
            module: Sequential, nested or not; Flatten between convolutions and linear layers may be there.
            image: (channel, row, column) of the inputs of a convolution.

        Raises:
            ValueError: naming the module that has no place here.
        """
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        norms: list[BatchNorm | None] = []
        gates: list[Activation] = []
        geometry: set[tuple[int, int]] = set()
        places: set[Place] = set()
        for part in _leaves(module):
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                if len(gates) < len(weights):
                    raise ValueError(f"from_torch: no activation below {part}")
                if isinstance(part, nn.Conv2d):
                    geometry.add(_geometry(part))
                weights.append(part.weight)
                biases.append(part.bias)
                norms.append(None)
            elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and weights and norms[-1] is None:
                norms[-1] = _norm_of(part)
                places.add("before" if len(gates) < len(weights) else "after")
            elif isinstance(part, nn.Flatten):
                continue
            else:
                sigma = activations.from_module(part)
                if sigma is None or len(gates) >= len(weights):
                    raise ValueError(
                        f"from_torch: {part} has no place here; a network is Conv2d or Linear, BatchNorm and one "
                        "activation in either order, ..., Linear"
                    )
                gates.append(sigma)
        for what, kinds in (
            ("activations", {(a.name, a.leak) for a in gates}),
            ("strides and paddings", geometry),
            ("places of BatchNorm", places),
        ):
            if len(kinds) > 1:
                raise ValueError(f"from_torch: {what} differ between layers: {sorted(map(str, kinds))}; use one")
        if not weights or len(gates) != len(weights) - 1 or norms[-1] is not None:
            raise ValueError(f"from_torch: {type(module).__name__} must end with a Linear layer and hold at least one")
        sigma = gates[0] if gates else activations.activation("relu")
        stride, padding = geometry.pop() if geometry else (1, 0)
        return cls(
            weights, biases, sigma.name, leak=sigma.leak or 0.0, norms=norms[:-1],
            norm=places.pop() if places else "after", image=image, stride=stride, padding=padding,
        )  # fmt: skip

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

    def with_state(self, state: Mapping[str, Tensor]) -> DeepNetwork:
        """This architecture with the tensors of a state dict.

        By the names of `state_dict`, or those of ``to_torch()``: then in its order, layer by layer.

        Raises:
            ValueError: naming every missing, unexpected and misshapen key.
        """
        own, module = self.state_dict(), self.to_torch().state_dict()
        module = {k: v for k, v in module.items() if not k.endswith("num_batches_tracked")}
        given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        expected = own if set(given) & set(own) else module
        if problems := _mismatches(expected, given):
            raise ValueError("with_state: the state dict does not fit:\n  " + "\n  ".join(problems))
        # both name layer by layer, in the same order
        by_name = {n: given[k].detach().to(self.weights[0]) for n, k in zip(own, expected, strict=True)}
        layers = range(1, self.depth + 1)
        norms: list[BatchNorm | None] = []
        for i, norm in enumerate(self.norms, start=1):
            held: dict[str, Any] = {
                field: by_name[f"norm.{i}.{name}"]
                for field, name in _NORM_FIELDS.items()
                if f"norm.{i}.{name}" in by_name
            }
            norms.append(None if norm is None else replace(norm, **held))
        return self.with_parameters(
            [by_name[f"layer.{i}.weight"] for i in layers], [by_name.get(f"layer.{i}.bias") for i in layers], norms
        )

    # --- theory ----------------------------------------------------------------------------------------------

    def folded(self, *, training: bool = False) -> Network:
        """The same function, evaluation mode, as a fully connected `Network`: what `theory` works on.

        BatchNorm is folded into the linear maps, a convolution becomes its matrix, (channel·row·column,
        channel·row·column below), which only small images allow.  Source: Tian et al. (2019), section 3.

        Raises:
            MemoryError: if a convolution's matrix does not fit.
            ValueError: for BatchNorm in training mode, which is no map of one sample.
        """
        if training and any(n is not None for n in self.norms):
            raise ValueError(
                "folded: BatchNorm in training mode couples the samples of a batch, so no V_l(x), A_l(x) or B_l(x) of "
                "one sample exists; its exact backward map is the batch operator deepnets.batch_norm_gradient"
            )
        return Network.from_torch(self.to_torch(), input_shape=self.frame.image)

    def __repr__(self) -> str:
        shapes = [f"{n}" + ("" if w.ndim == 2 else f"@{w.shape[2]}x{w.shape[3]}") for n, w in _named(self)]
        norm = f", BatchNorm {self.frame.norm}" if any(self.norms) else ""
        return f"DeepNetwork({self.widths[0]}-{'-'.join(shapes)}, {self.activation.name}{norm})"


_NORM_FIELDS = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict that ``torch.save`` wrote: tensors only, so that nothing in the file is executed.

    A checkpoint that holds one under ``state_dict``, ``model`` or ``net`` gives that.
    A file ``*.safetensors`` is read by the library of that name.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but tensors; or that library is not installed.
    """
    read: Callable[[str], Any] = functools.partial(torch.load, map_location="cpu", weights_only=True)
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as read
        except ImportError:
            raise ValueError(f"load_state: {path} needs safetensors: pip install 'tsdyn[safetensors]'") from None
    try:
        held = read(str(path))
    except Exception as error:  # torch raises a different type for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"load_state: {path} is no state dict that can be read safely ({reason}); save one with "
            "torch.save(module.state_dict(), path)"
        ) from None
    for key in ("state_dict", "model", "net"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    bad = [k for k, v in held.items() if not isinstance(v, Tensor)] if isinstance(held, Mapping) else ["the whole"]
    if bad:
        raise ValueError(f"load_state: {path}: {', '.join(map(str, bad))} is not a tensor; save module.state_dict()")
    return dict(held)


def _mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    found = [f"{k}: missing, {tuple(v.shape)} expected" for k, v in expected.items() if k not in given]
    found += [f"{k}: unexpected, {tuple(v.shape)}" for k, v in given.items() if k not in expected]
    return found + [
        f"{k}: {tuple(given[k].shape)}, {tuple(v.shape)} expected"
        for k, v in expected.items()
        if k in given and given[k].shape != v.shape
    ]


def _named(network: DeepNetwork) -> Iterable[tuple[int, Tensor]]:
    return zip(network.widths[1:], network.weights, strict=True)


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [leaf for part in module for leaf in _leaves(part)] if isinstance(module, nn.Sequential) else [module]


def _geometry(part: nn.Conv2d) -> tuple[int, int]:
    """(stride, padding)."""
    same = {*part.stride, *part.dilation} == {part.stride[0], 1}
    padding = part.padding if isinstance(part.padding, tuple) else ()
    if part.groups != 1 or part.padding_mode != "zeros" or not same or len(set(padding)) != 1:
        raise ValueError(f"from_torch: {part}: one stride and one zero padding in both directions, no groups")
    return part.stride[0], padding[0]


def _norm_of(part: nn.BatchNorm1d | nn.BatchNorm2d) -> BatchNorm:
    if part.running_mean is None or part.running_var is None or part.momentum is None:
        raise ValueError(f"from_torch: {part} keeps no running statistics; set track_running_stats=True")
    return BatchNorm(part.running_mean, part.running_var, part.weight, part.bias, part.eps, part.momentum)


def _torch_norm(norm: BatchNorm, weight: Tensor) -> nn.Module:
    kind = nn.BatchNorm2d if weight.ndim == 4 else nn.BatchNorm1d
    made = kind(
        len(norm.mean), norm.eps, norm.momentum, affine=norm.scale is not None, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    made.load_state_dict(norm.tensors(), strict=False)
    return made


def _check(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[BatchNorm | None], frame: Frame
) -> list[Image | None]:
    """Images of each layer; raises where something does not chain."""
    if not weights or len(biases) != len(weights) or len(norms) != len(weights) - 1:
        raise ValueError(
            f"DeepNetwork: {len(weights)} weights, {len(biases)} biases and {len(norms)} norms; give a bias a layer "
            "and a norm a hidden layer"
        )
    image, flat = frame.image, None
    images: list[Image | None] = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        if weight.ndim not in (2, 4) or not weight.is_floating_point():
            raise ValueError(
                f"DeepNetwork: weight of layer {i} is {weight.dtype} of shape {tuple(weight.shape)}; it must be "
                "floating point (node, input_node) or (channel, channel below, row, column)"
            )
        if weight.ndim == 4:
            image = _convolved(i, weight, image, frame)
            images.append(image)
        else:
            takes = math.prod(image) if image is not None else flat
            if takes is not None and weight.shape[1] != takes:
                raise ValueError(f"DeepNetwork: layer {i} takes {weight.shape[1]} inputs, the layer below has {takes}")
            image, flat = None, len(weight)
            images.append(None)
        norm = norms[i - 1] if i < len(weights) else None
        for what, held in (("bias", bias), *((norm.tensors() if norm else {}).items())):
            if held is not None and held.shape != (len(weight),):
                raise ValueError(
                    f"DeepNetwork: {what} of layer {i} has shape {tuple(held.shape)}, it has {len(weight)}"
                )
    if images[-1] is not None:
        raise ValueError("DeepNetwork: the last layer must be linear")
    return images


def _convolved(i: int, weight: Tensor, image: Image | None, frame: Frame) -> Image:
    if image is None or weight.shape[1] != image[0]:
        raise ValueError(
            f"DeepNetwork: layer {i} convolves images of {weight.shape[1]} channels and gets "
            f"{image or 'a flat vector'}; give image=(channel, row, column)"
        )
    rows, columns = (
        (size + 2 * frame.padding - kernel) // frame.stride + 1
        for size, kernel in zip(image[1:], weight.shape[2:], strict=True)
    )
    if min(rows, columns) < 1:
        raise ValueError(
            f"DeepNetwork: layer {i} has kernels of {tuple(weight.shape[2:])} and gets images of {image[1:]}; use "
            "fewer layers, padding or larger images"
        )
    return len(weight), rows, columns


def fanout_norms(network: DeepNetwork, x: Tensor) -> list[Tensor]:
    """√E β_kk = √E‖∂f_L/∂f_k‖² of every hidden layer, (node,), in evaluation mode; of a channel summed over its pixels.

    One backward pass an output, for all samples at once: they are independent.  Source: Tian (2020), Definition 2.
    """
    stacked = Parameters.of([network], share=True)
    with torch.enable_grad():
        layers = propagate(stacked, network.frame, x.detach().unsqueeze(0).requires_grad_(True), training=False)
        hidden = [layer.f for layer in layers[:-1]]
        output = layers[-1].activation[0].sum(0)
        squares = [torch.zeros_like(weight[:, 0].flatten(1)[:, 0]) for weight in network.weights[:-1]]
        for c in range(len(output)):
            for total, v in zip(squares, torch.autograd.grad(output[c], hidden, retain_graph=True), strict=True):
                total += v.square().sum((0, 2, 3)) if v.ndim == 4 else v[0].square().sum(0)
    return [(total / len(x)).sqrt() for total in squares]


def expectations(student: DeepNetwork, teacher: DeepNetwork, x: Tensor) -> dict[str, list[Tensor]]:
    r"""Expectations over samples, one array a hidden layer, in evaluation mode; of channels aggregated over pixels p.

    .. math:: A_{kj} = E \sum_p v_{kp} \cdot v^*_{jp}, \quad B_{kk'} = E \sum_p v_{kp} \cdot v_{k'p}

    with v a column of V_l = ∂f_L/∂f_l, so that √B_kk is `fanout_norms`.  D_star, D are E[f'_k f*'_j], E[f'_k f'_k'] and
    L_star, L E[f_k f*_j], E[f_k f_k'], over samples and pixels; H_star = A ∘ D_star, H = B ∘ D.  f' = ∂f_l/∂z_l, with
    BatchNorm after σ its slope times the gate.  No matrix of one sample is formed: one backward pass an output.

    Raises:
        ValueError: if the networks differ in depth, outputs or images.

    Source: Tian (2020), Definition 2; Tian et al. (2019), Theorem 2.
    """
    ends = [(net.depth, net.widths[0], net.widths[-1]) for net in (student, teacher)]
    pixels = [[None if i is None else i[1:] for i in net.images] for net in (student, teacher)]
    if ends[0] != ends[1] or pixels[0] != pixels[1]:
        raise ValueError(f"expectations: {student!r} and {teacher!r} differ in depth, inputs, outputs or images")
    layers = range(student.depth - 1)
    sums: dict[str, list[Tensor | float]] = {
        name: [0.0 for _ in layers] for name in ("A", "B", "D_star", "D", "L_star", "L")
    }
    for part in x.detach().split(_samples_at_once(student, teacher)):
        (f, slopes, passes), (f_star, slopes_star, passes_star) = (_backward(net, part) for net in (student, teacher))
        for i in layers:
            per_pixel = len(part) / (len(x) * len(f[i]))
            for name, left, right in (
                ("D_star", slopes, slopes_star), ("D", slopes, slopes), ("L_star", f, f_star), ("L", f, f),
            ):  # fmt: skip
                sums[name][i] += left[i].T @ right[i] * per_pixel
        for v, v_star in zip(passes, passes_star, strict=True):
            for i in layers:
                sums["A"][i] += v[i].T @ v_star[i] / len(x)
                sums["B"][i] += v[i].T @ v[i] / len(x)
    found = {name: [torch.as_tensor(total) for total in totals] for name, totals in sums.items()}
    pairs = {"H_star": ("A", "D_star"), "H": ("B", "D")}
    return found | {
        name: [b * d for b, d in zip(found[beta], found[gate], strict=True)] for name, (beta, gate) in pairs.items()
    }


#: Activations and their gradients of as many samples as `expectations` takes together.
_BYTES_AT_ONCE = 1 << 27


def _samples_at_once(*networks: DeepNetwork) -> int:
    numbers = sum(
        n if image is None else math.prod(image)
        for net in networks
        for n, image in zip(net.widths[1:], net.images, strict=True)
    )
    return max(1, _BYTES_AT_ONCE // (4 * numbers * networks[0].weights[0].element_size()))


def _backward(network: DeepNetwork, x: Tensor) -> tuple[list[Tensor], list[Tensor], Iterator[list[Tensor]]]:
    """Of the hidden layers, by rows (sample·pixel, node): f_l, ∂f_l/∂z_l and, an output at a time, ∂f_Lc/∂f_l."""
    with torch.enable_grad():
        layers = propagate(
            Parameters.of([network], share=True),
            network.frame, x.unsqueeze(0).requires_grad_(True), training=False,
        )  # fmt: skip
        hidden, output = [layer.f for layer in layers[:-1]], layers[-1].activation[0].sum(0)

    def jacobians() -> Iterator[list[Tensor]]:
        for c in range(len(output)):
            yield [_rows(layer._by_member(v)) for layer, v in zip(layers, _gradient(output[c], hidden), strict=False)]

    slopes = []
    for layer, norm in zip(layers[:-1], network.norms, strict=True):
        gate = network.activation.gate(_rows(layer.preactivation).detach())
        slopes.append(gate * norm.affine()[0] if norm is not None and network.frame.norm == "after" else gate)
    return [_rows(layer.activation).detach() for layer in layers[:-1]], slopes, jacobians()


def _gradient(output: Tensor, at: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, at, retain_graph=True)


def batch_norm_gradient(
    f: Float[Tensor, "sample node"], g: Float[Tensor, "sample node"], *, scale: Tensor | None = None, eps: float = 0.0
) -> Float[Tensor, "sample node"]:
    r"""Gradient below BatchNorm in training mode from the gradient g above it, f being what it normalises.

    .. math:: \frac{c}{\sigma} P^\perp_{\{f, 1\}}\, g, \qquad \sigma^2 = \mathrm{Var} f + \epsilon

    A map of the whole batch, one a node: g without its parts along 1 and along the centred f.  With eps > 0 the part
    along f is taken in the metric of σ², and the map is a projection only as eps → 0.

    Raises:
        ValueError: for a batch of one sample.

    Source: Tian et al. (2019), Lemma 1.
    """
    if len(f) < 2:
        raise ValueError("batch_norm_gradient: a batch of one sample has no variance; give two or more")
    centred = f - f.mean(0)
    variance = centred.square().mean(0) + eps
    flat = g - g.mean(0)
    projected = flat - centred * ((flat * centred).mean(0) / variance)
    return projected * variance.rsqrt() * (1 if scale is None else scale)


def conserved_norms(network: DeepNetwork) -> list[Tensor]:
    """‖w_k‖ of each hidden node where BatchNorm comes before σ, ‖[w_k; b_k]‖ otherwise, (node,).

    Gradient flow conserves it below BatchNorm (eps = 0), which is blind to the scale of its input; SGD adds lr² times
    the square of each gradient.  Source: Tian et al. (2019), Theorem 3.
    """
    found = []
    for weight, bias in zip(network.weights[:-1], network.biases, strict=False):
        squares = weight.flatten(1).square().sum(1)
        if bias is not None and network.frame.norm == "after":
            squares = squares + bias.square()
        found.append(squares.sqrt())
    return found


# --- many members --------------------------------------------------------------------------------------------


@dataclass
class Parameters:
    """Parameters of S members side by side, each tensor (member, ...)."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[BatchNorm | None]

    @classmethod
    def of(cls, networks: Sequence[DeepNetwork], *, share: bool = False) -> Parameters:
        """Members side by side; copies, or with `share` a view of one network's own tensors."""

        def beside(tensors: Sequence[Tensor]) -> Tensor:
            return tensors[0].unsqueeze(0) if share else torch.stack([t.detach() for t in tensors])

        def optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [t for t in tensors if t is not None]
            if there and len(there) < len(tensors):
                raise ValueError("Parameters: some members have a bias or BatchNorm that others lack; use one shape")
            return beside(there) if there else None

        norms: list[BatchNorm | None] = []
        for column in zip(*(n.norms for n in networks), strict=True):
            held = [n for n in column if n is not None]
            norms.append(
                replace(
                    held[0],
                    mean=beside([n.mean for n in held]),
                    variance=beside([n.variance for n in held]),
                    scale=optional([n.scale for n in held]),
                    shift=optional([n.shift for n in held]),
                )
                if held
                else None
            )
        return cls(
            [beside(column) for column in zip(*(n.weights for n in networks), strict=True)],
            [optional(column) for column in zip(*(n.biases for n in networks), strict=True)],
            norms,
        )

    @property
    def members(self) -> int:
        return len(self.weights[0])


@dataclass(frozen=True)
class Layer:
    """One layer of a forward pass, in the engine's layout: of a convolution (sample, member·channel, row, column).

    Attributes:
        z: What σ is applied to.
        f: What the layer above gets.
        members: S.
    """

    z: Tensor
    f: Tensor
    members: int

    @property
    def preactivation(self) -> Tensor:
        """(member, sample, node), of a convolution (member, sample, channel, row, column)."""
        return self._by_member(self.z)

    @property
    def activation(self) -> Tensor:
        """(member, sample, node), of a convolution (member, sample, channel, row, column)."""
        return self._by_member(self.f)

    def _by_member(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.members, -1)).transpose(0, 1) if x.ndim == 4 else x


def propagate(p: Parameters, frame: Frame, x: Tensor, *, training: bool) -> list[Layer]:
    """Every layer of every member on its own inputs, (member, sample, input).

    z = W f + b; then BatchNorm and σ in the frame's order.  `preactivation` is what σ is applied to.  In training
    mode each member's BatchNorm uses its own batch and moves its own running statistics, in place.
    """
    members = len(x)
    f = x if frame.image is None else x.unflatten(2, frame.image).transpose(0, 1).flatten(1, 2)
    if f.ndim == 4 and f.device.type == "cpu":
        f = f.contiguous(memory_format=torch.channels_last)
    found = []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        if weight.ndim == 5:
            flat = None if bias is None else bias.flatten()
            z = F.conv2d(f, weight.flatten(0, 1), flat, frame.stride, frame.padding, groups=members)
        else:
            if f.ndim == 4:
                f = f.unflatten(1, (members, -1)).transpose(0, 1).flatten(2)
            z = torch.bmm(f, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), f, weight.mT)
        norm = p.norms[i] if i < len(p.norms) else None
        if i == len(p.weights) - 1:
            f = z
        elif norm is None:
            f = frame.activation(z)
        elif frame.norm == "before":
            z = _normalized(z, norm, training)
            f = frame.activation(z)
        else:
            f = _normalized(frame.activation(z), norm, training)
        found.append(Layer(z, f, members))
    return found


def _normalized(x: Tensor, norm: BatchNorm, training: bool) -> Tensor:
    """BatchNorm of (sample, member·channel, row, column) or (member, sample, node); members do not mix."""
    if x.ndim == 4:
        return normalized(x, norm, training=training)
    flat = normalized(x.transpose(0, 1).flatten(1), norm, training=training)
    by_member: Tensor = flat.unflatten(1, (len(norm.mean), -1)).transpose(0, 1)
    return by_member


def normalized(flat: Tensor, norm: BatchNorm, *, training: bool) -> Tensor:
    """BatchNorm of (any, member·node, ...); in training mode by this batch, and running statistics move, in place.

    Raises:
        ValueError: for a single value a node in training mode.
    """
    if training and flat.numel() == flat.shape[1]:
        raise ValueError("BatchNorm: one value a node in training mode; a batch must hold two samples or more")
    scale, shift = (None if t is None else t.flatten() for t in (norm.scale, norm.shift))
    eps = max(norm.eps, torch.finfo(flat.dtype).tiny)  # torch refuses 0
    mean, variance = norm.mean.view(-1), norm.variance.view(-1)
    found: Tensor = F.batch_norm(flat, mean, variance, scale, shift, training, norm.momentum, eps)
    return found


def _rows(x: Tensor) -> Tensor:
    """(sample, node), or (sample·row·column, channel), of one member."""
    return x[0] if x.ndim == 3 else x[0].permute(0, 2, 3, 1).flatten(0, 2)
