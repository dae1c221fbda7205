"""What a recording measures at a commit: the model on its probe, in evaluation mode, changed in nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from tsdyn import derivatives, schema
from tsdyn.engine.loss import MSE
from tsdyn.observables import formulas
from tsdyn.observables.layers import Pass, equal, evaluated, pulled_back, rows_of, traced, weights_of
from tsdyn.observables.registry import tangent_kernel
from tsdyn.vocabulary import Variable

Loss = Callable[[Tensor, Tensor], Tensor]
ACTIVATION = Variable(
    "activation", ("seed", "epoch", "layer", "sample", "node"), "1", "activation of each node on each sample", "tsdyn",
    own=True,
)  # fmt: skip


@dataclass
class Probed:
    """A model on a probe at one commit, with the results that observables share.

    Attributes:
        model: In evaluation mode.
        x, y: The probe.
        loss: The user's, None for ½‖f* − f‖².
        layers: Names of the labelled layers.
        entries: Names of the parameters and buffers in none of them.
        teacher: Standardised activations of the teacher's hidden layers, (sample·position, node).
        layout: Sizes of the recording.
        kernel: Samples of the neural tangent kernel.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss | None
    layers: tuple[str, ...]
    entries: tuple[str, ...]
    teacher: list[Tensor]
    layout: schema.Layout
    kernel: int

    @cached_property
    def passed(self) -> Pass:
        with torch.no_grad():
            return traced(self.model, self.x, self.layers)

    @property
    def output(self) -> Tensor:
        """Output of the model on the probe, (sample, output)."""
        found: Tensor = self.passed.output
        return found

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, as it is differentiated."""
        return MSE.value(output, target) if self.loss is None else self.loss(output, target)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """−∂J_x/∂z at each layer's output, (sample, position, node)."""

        def residual(output: Tensor) -> Tensor:
            free = output.detach().requires_grad_(True)
            return -torch.autograd.grad(self._per_sample(free).sum(), free)[0]

        return pulled_back(self.model, self.layers, self.x, residual)

    def _per_sample(self, output: Tensor) -> Tensor:
        def one(o: Tensor, t: Tensor) -> Tensor:
            return self.of(o[None], t[None])

        if self.loss is not None:
            try:
                found: Tensor = vmap(one)(output, self.y)
                if torch.allclose(found[0], one(output[0], self.y[0])):
                    return found
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                pass  # a loss that torch.func cannot follow is called sample by sample
            return torch.stack([one(o, t) for o, t in zip(output, self.y, strict=True)])
        return 0.5 * (self.y - output).square().sum(1)

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight, (node, input_node), and bias of each layer."""
        return weights_of(self.model, self.layers)

    def parameter(self) -> Tensor:
        """All numbers that belong to no labelled layer, (entry,)."""
        held = {
            path: (own, own.detach().clone(), own.grad, None if own.grad is None else own.grad.clone())
            for path, own in model.named_parameters()
        }

    moved = []
    try:
        yield
    finally:
        for path, (parameter, value, grad, slope) in held.items():
            kept = parameter.grad is grad and (slope is None or equal(grad, slope))
            if not kept or not equal(parameter.detach(), value):
                moved.append(path)
                with torch.no_grad():
                    parameter.copy_(value)
                    parameter.grad = grad if slope is None else grad.copy_(slope)
    if moved:
        raise ValueError(
            f"Recorder.commit: observable {name!r} changes {', '.join(moved[:5])} of the model, or gradients there "
            "(they were put back); let it work on a copy, copy.deepcopy(model), and take torch.autograd.grad for backward()"
        )


def _asked(name: str, probed: Probed, own: Mapping[str, Callable[[Any], Any]]) -> Any:
    try:
        return own[name](probed) if name in own else MEASURED[name](probed)
    except MemoryError:
        raise
    except Exception as error:  # code of the user's own raises errors of every type
        if name not in own and isinstance(error, ValueError):
            raise
        what = f"observable {name!r}" if name in own else f"{name}: the model or the loss"
        raise ValueError(
            f"Recorder.commit: {what} raised {type(error).__name__}: {error}; nothing of this epoch is recorded, what "
            "was committed stays"
        ) from error


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"Recorder.commit: observable {name!r} gave {type(value).__name__}; give a number or a tensor"
        ) from None
    if tensor.is_complex():
        raise ValueError(f"Recorder.commit: observable {name!r} gave complex numbers; give their parts as real ones")
    plain: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor.clone()).numpy()
    return plain
