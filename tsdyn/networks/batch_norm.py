"""BatchNorm as a value: its formula, its gradient, and conversion from and to torch's modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm of one layer: (x − mean)/√(variance + eps) · scale + shift for each node.

    In training mode mean and variance are those of the batch, in evaluation mode the running statistics.

    Attributes:
        mean, variance: Running statistics, (node,) or (member, node); the variance is the unbiased one, as torch's.
        scale, shift: Parameters of the affine map, (node,) or (member, node); None without one.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.  None, as in torch, for their plain average over
            batches: such a network can be evaluated, but not trained here.
    """

    mean: Tensor
    variance: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1

    def __post_init__(self) -> None:
        if (self.scale is None) != (self.shift is None):
            raise ValueError(
                "BatchNorm: has a scale or a shift alone; give both (ones and zeros change nothing), or neither"
            )

    @classmethod
    def fresh(cls, nodes: int, *, affine: bool = True, like: Tensor, eps: float = 1e-5) -> BatchNorm:
        """BatchNorm as torch's modules start: mean 0, variance 1, scale 1, shift 0."""
        zeros, ones = like.new_zeros(nodes), like.new_ones(nodes)
        return cls(zeros, ones, ones.clone() if affine else None, zeros.clone() if affine else None, eps)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by torch's names."""
        named = {
            "weight": self.scale, "bias": self.shift, "running_mean": self.mean, "running_var": self.variance,
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> BatchNorm:
        """A copy with `change` applied to each tensor."""
        return replace(
            self,
            mean=change(self.mean),
            variance=change(self.variance),
            scale=None if self.scale is None else change(self.scale),
            shift=None if self.shift is None else change(self.shift),
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each node in evaluation mode, which maps x to scale · x + shift."""
        scale = (self.variance + self.eps).rsqrt()
        scale = scale if self.scale is None else self.scale * scale
        shift = -scale * self.mean
        return scale, shift if self.shift is None else self.shift + shift


def batch_norm_gradient(
    f: Float[Tensor, "sample node"], g: Float[Tensor, "sample node"], *, scale: Tensor | None = None, eps: float = 0.0
) -> Float[Tensor, "sample node"]:
    r"""Gradient with respect to the input f of BatchNorm in training mode, from the gradient g of its output.

    .. math:: \frac{c}{\sigma} P^\perp_{\{f, 1\}}\, g, \qquad \sigma^2 = \mathrm{Var} f + \epsilon

    For each node the map acts on the vector of all samples: it removes from g the components along 1 and along the
    centred f.  With eps > 0 the component along f is divided by σ² instead of Var f, so the map is a projection only
    as eps → 0.

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


def require_two(values: int) -> None:
    """Raise ValueError if a batch has a single value per node, which has no variance."""
    if values == 1:
        raise ValueError("BatchNorm: one value per node in training mode; a batch must hold two samples or more")


def normalized(flat: Tensor, norm: BatchNorm, *, training: bool) -> Tensor:
    """BatchNorm applied to a tensor (any, member·node, ...).

    In training mode it uses the statistics of this batch and updates the running ones in place.

    Raises:
        ValueError: in training mode for a single value per node, or running statistics without a momentum.
    """
    if training and norm.momentum is None:
        raise ValueError(
            "BatchNorm: momentum=None averages over all batches so far, and how many there were is not kept; train "
            "with a number, dataclasses.replace(norm, momentum=0.1)"
        )
    if training:
        require_two(flat.numel() // flat.shape[1])
    scale, shift = (None if t is None else t.flatten() for t in (norm.scale, norm.shift))
    eps = max(norm.eps, torch.finfo(flat.dtype).tiny)  # torch refuses 0
    mean, variance = norm.mean.view(-1), norm.variance.view(-1)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    found: Tensor = F.batch_norm(flat, mean, variance, scale, shift, training, momentum, eps)
    return found


# --- torch's modules -----------------------------------------------------------------------------------------


def norm_of(module: nn.BatchNorm1d | nn.BatchNorm2d) -> BatchNorm:
    """The BatchNorm of a torch module; it shares the module's tensors.

    Raises:
        ValueError: if the module keeps no running statistics.
    """
    if module.running_mean is None or module.running_var is None:
        raise ValueError(
            f"from_torch: {module} keeps no running statistics, so that a sample's output depends on its batch even in "
            "evaluation mode; set track_running_stats=True and run batches through it in training mode"
        )
    return BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, module.eps, module.momentum)


def torch_norm(norm: BatchNorm, *, image: bool) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """A torch module with copies of the tensors, for images or for vectors."""
    kind = nn.BatchNorm2d if image else nn.BatchNorm1d
    made: nn.BatchNorm1d | nn.BatchNorm2d = kind(
        len(norm.mean), norm.eps, norm.momentum, affine=norm.scale is not None,
        device=norm.mean.device, dtype=norm.mean.dtype,
    )  # fmt: skip
    made.load_state_dict(norm.tensors(), strict=False)
    return made
