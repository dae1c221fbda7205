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
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        like = next(self.model.parameters())
        return torch.cat([held[name].detach().reshape(-1).to(like) for name in self.entries])

    def correlations(self) -> list[Tensor]:
        """Correlation of each hidden layer with the teacher's of the same label, (teacher_node, node)."""
        pairs = zip(self.teacher, self.layers[:-1], strict=False)
        return [t.T @ formulas.standardized(self.passed.rows(self.model, name)) for t, name in pairs]

    def gradient_norm(self) -> Tensor:
        """Quantiles of the norms of per-sample gradients over all trainable parameters."""
        norms = derivatives.per_sample_gradient_norms(self.model, self.of, self.x, self.y)
        return formulas.quantiles_of(norms, self.layout.quantiles)

    def hessian_eigenvalue(self) -> Tensor:
        """Largest eigenvalues of the Hessian of the loss on the whole probe."""
        values = derivatives.hessian_spectrum(self.model, self.of, self.x, self.y, k=self.layout.modes)
        return formulas.padded_modes(values, self.layout.modes)

    def tangent_kernel(self) -> Tensor:
        """Σ_o Θ_oo(x, x') on the first samples of the probe."""
        return tangent_kernel(self.model, self.x[: self.kernel])

    def activation(self) -> list[Tensor]:
        """Mean over positions of each layer's activation, (sample, node)."""
        of = self.passed.activations
        return [rows_of(self.model.get_submodule(name), of[name]).mean(1) for name in self.layers]


MEASURED: Mapping[str, Callable[[Probed], Tensor | list[Tensor]]] = {
    "loss_eval": lambda m: m.of(m.output, m.y),
    "mse_eval": lambda m: formulas.mse(m.y, m.output),
    "weight": lambda m: [w for w, _ in m.weights()],
    "bias": lambda m: [w.new_zeros(len(w)) if b is None else b for w, b in m.weights()],
    "parameter": Probed.parameter,
    "correlation": Probed.correlations,
    "gradient_rms": lambda m: [g.square().mean((0, 1)).sqrt() for g in m.gradients],
    "gradient_max": lambda m: [g.abs().amax((0, 1)) for g in m.gradients],
    "gradient_norm": Probed.gradient_norm,
    "hessian_eigenvalue": Probed.hessian_eigenvalue,
    "neural_tangent_kernel": Probed.tangent_kernel,
    "activation": Probed.activation,
}
_PROBE = "over the probe, in evaluation mode"
_POSITIONS = "positions of convolutions and tokens count as samples"
#: What a recording says of its variables in the place of the schema's conditions.
COMMENTS: Mapping[str, str] = {
    "loss_eval": f"{_PROBE}; the attribute conventions says which loss",
    "mse_eval": _PROBE,
    "weight": "of a convolution (channel, row, column) of its kernel along input_node",
    "correlation": f"{_PROBE}, {_POSITIONS}; layer l with the teacher's layer l, both counted from the lowest; signed; "
    "NaN for a node whose activation is constant, at the output layer, and where one of them has no such layer",
    "gradient_rms": f"{_PROBE}, {_POSITIONS}; g is the negative gradient of one sample's loss at the layer's output",
    "gradient_max": f"{_PROBE}, {_POSITIONS}; g is the negative gradient of one sample's loss at the layer's output",
    "gradient_norm": f"quantiles of ‖∂J_x/∂θ‖ {_PROBE}, over trainable parameters; quantile 1 is the largest",
    "hessian_eigenvalue": f"of the loss {_PROBE}, in trainable parameters",
    "activation": f"{_PROBE}; mean over positions of convolutions and tokens",
}
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss_eval",), "mse": ("mse_eval",), "weight": ("weight", "bias"),
}  # fmt: skip
#: Observables that differentiate, and so need a trainable parameter.
DIFFERENTIATED = ("gradient_norm", "hessian_eigenvalue", "neural_tangent_kernel")


def measured(names: tuple[str, ...], probed: Probed, own: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The named variables of a model: each an array, or a list of one per layer, as copies on the CPU.

    Raises:
        ValueError: if one cannot be measured, be it the user's own, the loss or the model that raised, gives no real
            numbers, or if the user's own changes the model.
    """
    found: dict[str, Any] = {}
    with evaluated(probed.model), torch.no_grad():
        for name in names:
            with _unchanged(name, probed.model) if name in own else nullcontext():
                value = _asked(name, probed, own)
            layered = isinstance(value, (list, tuple)) and (name not in own or schema.variable(name).layered)
            found[name] = [_numbers(name, v) for v in value] if layered else _numbers(name, value)
    probed.__dict__.pop("passed", None)  # the activations of the whole probe
    return found


@contextmanager
def _unchanged(name: str, model: nn.Module) -> Iterator[None]:
    """Refuse an observable that changes parameters or their gradients; they are put back."""
    held = {
        path: (own, own.detach().clone(), own.grad, None if own.grad is None else own.grad.clone())
        for path, own in model.named_parameters()
    }
    moved = []
    try:
        yield
    finally:
        for path, (parameter, value, grad, slope) in held.items():
            kept = parameter.grad is grad and (grad is None or slope is None or equal(grad, slope))
            if not kept or not equal(parameter.detach(), value):
                moved.append(path)
                with torch.no_grad():
                    parameter.copy_(value)
                    parameter.grad = grad if grad is None or slope is None else grad.copy_(slope)
    if moved:
        raise ValueError(
            f"Recorder.commit: observable {name!r} changes {', '.join(moved[:5])} of the model, or gradients there "
            "(they were put back); let it work on a copy, copy.deepcopy(model), and take torch.autograd.grad for "
            "backward()"
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
