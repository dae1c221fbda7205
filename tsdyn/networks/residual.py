"""Skip connections and LayerNorm for experiment files: ``student.module = "tsdyn.networks.residual:Residual"``."""

from __future__ import annotations

from torch import Tensor, nn

from tsdyn.networks.activations import activation as named


class Residual(nn.Module):
    """A stem, blocks of one layer with a skip connection each, and a linear output layer.

    f_1 = σ(W_1 x + b_1), f_l = f_{l−1} + σ(W_l N(f_{l−1}) + b_l), f_L = W_L f_{L−1} + b_L; N is LayerNorm or nothing.

    Args:
        inputs, width, outputs: Widths of the input, of every hidden layer and of the output.
        blocks: Number of layers with a skip connection.
        skip: False leaves the skip connections out: f_l = σ(W_l N(f_{l−1}) + b_l).
        layer_norm: Whether each block begins with a LayerNorm.
        activation: Name of σ, as in ``student.activation``.
        leak: Slope of ``"leaky_relu"`` below 0.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        *,
        blocks: int = 1,
        skip: bool = True,
        layer_norm: bool = False,
        activation: str = "relu",
        leak: float = 0.01,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) if layer_norm else nn.Identity() for _ in range(blocks)])
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.top = nn.Linear(width, outputs)
        self.activation, self.skip = named(activation, leak=leak).module(), skip

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.activation(self.stem(x))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            made = self.activation(block(norm(f)))
            f = f + made if self.skip else made
        output: Tensor = self.top(f)
        return output
