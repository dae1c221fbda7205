"""Registry of observables: pure functions of a student and its teacher, under the schema variable they fill.

A layered observable gives one array per layer, or None for a layer where it has no meaning; the archive pads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn import registers, schema, vocabulary
from tsdyn.derivatives import curvature, jacobians
from tsdyn.derivatives.per_sample import per_sample_gradient_norms
from tsdyn.engine.loss import loss
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network
from tsdyn.observables.formulas import accuracy, observation, observation_count, padded_modes, quantiles_of
from tsdyn.observables.member import Measurement
from tsdyn.theory import alignments, coupling_moments

Layers: TypeAlias = list[Tensor | None]


Observable: TypeAlias = Callable[[Measurement], Tensor | Layers]


#: tsdyn's own observables, by the variable that each fills.
OBSERVABLES: dict[str, Observable] = {}


@dataclass(frozen=True)
class Observed:
    """An observable that a package or a user defines; an entry point of ``tsdyn.observables`` names an instance.

    Attributes:
        variable: The result of `tsdyn.declare`; experiment files request it by its name.
        measure: Function of a `Measurement` that gives a tensor of the variable's sizes, or a list of one tensor per
            layer from the lowest up.
    """

    variable: vocabulary.Variable
    measure: Observable

    @property
    def name(self) -> str:
        """Name of the variable."""
        return self.variable.name


def observable(name: str) -> Observable:
    """The measuring function of an observable: tsdyn's own, one that a package offers, or one given to `tsdyn.run`.

    Raises:
        PartError: if there is none, or if what a package offers is not an `Observed` of that name.
    """
    if name in OBSERVABLES:
        return OBSERVABLES[name]
    found = registers.OBSERVABLES.part(name, Observed)
    if schema.DECLARED.get(name) != found.variable:
        raise registers.PartError(
            f"observable {name!r}: {registers.OBSERVABLES.origin(name).target} has a variable that was not declared; "
            "take what tsdyn.declare gives"
        )
    return found.measure


@contextmanager
def added(observables: Sequence[Observed]) -> Iterator[None]:
    """Context in which experiments of this process can request the given observables by name."""
    done: list[str] = []
    try:
        for each in observables:
            if not registers.OBSERVABLES.holds(each.name, each):
                schema.adopt(each.variable)
                registers.OBSERVABLES.add(each.name, each)
                done.append(each.name)
        yield
    finally:
        for name in done:
            registers.OBSERVABLES.remove(name)


def load(experiment: Experiment) -> None:
    """Import the observables of packages that `experiment` requests, so that their variables are declared.

    Raises:
        ExperimentError: if one is not there, or cannot be measured of this experiment's networks; or if a loss that a
            package offers has no classes and is asked for the data's.
    """
    law = experiment.training
    if experiment.kind == "training" and law.of_data and loss(law.loss).targets == "outputs":
        raise ExperimentError(f"training.labels = 'data': training.loss = {law.loss!r} is of outputs, not of classes")
    for register, name in experiment.parts.values():
        if register is not registers.OBSERVABLES or not register.foreign(name):
            continue
        try:
            observable(name)
        except registers.PartError as error:
            raise ExperimentError(f"record.observables: {error}") from None
        row = schema.variable(name)
        if experiment.kind == "training" and set(row.dims) & set(schema.SAMPLED):
            raise ExperimentError(
                f"record.observables: {name} has dimensions {row.dims}, of which {schema.SAMPLED} have a size in a "
                "tsdyn.Recorder only; record it there, or reduce it over samples"
            )
        if experiment.deep and not row.deep:
            raise ExperimentError(
                f"record.observables: {name} cannot be measured on networks with convolutions or BatchNorm"
            )
        if experiment.student.module is not None and not row.own:
            raise ExperimentError(
                f"record.observables: {name} cannot be measured on modules of your own; an observable of your own can, "
                "if it is declared so: tsdyn.declare(..., own=True)"
            )
        if experiment.teacher.module is not None and not row.bare_teacher:
            raise ExperimentError(f"record.observables: {name} has dimensions of the teacher, a module of your own")


def without_foreign(experiment: Experiment, but: Sequence[str] = ()) -> Experiment:
    """The experiment without the observables of packages and users, which need not be here to compute others.

    Args:
        experiment: One that may record them.
        but: Names of those that stay.
    """
    names = schema.expand(experiment.record.observables)
    kept = [name for name in names if name in but or not registers.OBSERVABLES.foreign(name)]
    return experiment if len(kept) == len(names) else experiment.replace({"record.observables": kept or ["loss"]})


def fills(variable: str) -> Callable[[Observable], Observable]:
    """Decorator that registers a measuring function under the schema variable it fills."""
    if variable not in vocabulary.VARIABLES:
        raise ValueError(f"fills: {variable!r} is not a variable of the schema; declare it in tsdyn.vocabulary first")

    def register(observable: Observable) -> Observable:
        OBSERVABLES[variable] = observable
        return observable

    return register


fills("loss_train")(lambda m: m.loss(m.on_train))


fills("loss_eval")(lambda m: m.loss(m.on_eval))


fills("mse_train")(lambda m: m.on_train.mse)


fills("mse_eval")(lambda m: m.on_eval.mse)


fills("weight")(lambda m: [w for w, _ in m.layer_weights])


fills("bias")(lambda m: [w.new_zeros(len(w)) if b is None else b for w, b in m.layer_weights])


fills("correlation")(lambda m: list(m.on_eval.correlations))


fills("fanout_norm")(lambda m: list(m.fanout_norms))


fills("teacher_fanout_norm")(lambda m: list(m.teacher_fanout_norms))


fills("cross_correlation")(lambda m: list(m.on_eval.cross_correlations))


@fills("cka")
def _cka(m: Measurement) -> Layers:
    found = m.on_eval.similarities
    if all(bool(of_layer.isnan().all()) for of_layer in found) and not m.on_eval.enough_samples:
        raise ExperimentError(
            f"record.observables: cka: {len(m.eval.inputs)} samples are no more than the features of any two layers, "
            "which then share directions whatever they hold; raise data.eval"
        )
    return list(found)


fills("gradient_rms")(lambda m: [g.square().mean(0).sqrt() for g in m.gradients])


fills("gradient_max")(lambda m: [g.abs().amax(0) for g in m.gradients])


fills("observation")(lambda m: [observation(t, s, band=m.band) for t, s in _hidden_z(m)])


fills("observation_count")(lambda m: [observation_count(t, s) for t, s in _hidden_z(m)])


for _moment in vocabulary.FAMILIES["moments"]:
    fills(_moment)(lambda m, name=_moment: list(getattr(m.pair_sums if m.own else m.moments, name)))  # type: ignore[misc]


@fills("lemma1_residual")
def _lemma1_residual(m: Measurement) -> Tensor:
    return torch.tensor(m.lemma1_residual)


@fills("alignment")
def _alignment(m: Measurement) -> Tensor:
    return alignments.alignment(m.teacher, m.net)


@fills("gradient_norm")
def _gradient_norm(m: Measurement) -> Tensor:
    """Norm of each sample's gradient: ‖∂J_x/∂θ‖² = Σ_l ‖g_l‖² (‖f_{l−1}‖² + 1), with the 1 if layer l has a bias."""
    if isinstance(m.student, Own):
        module = m.student.module.eval()
        norms = per_sample_gradient_norms(module, m.objective.value, m.train.inputs, m.target(m.train))
    else:
        below = [m.train.inputs, *m.on_train.trace.activations[:-1]]
        squares = [
            g.square().sum(1) * (f.square().sum(1) + (bias is not None))
            for g, f, bias in zip(m.gradients, below, m.net.biases, strict=True)
        ]
        norms = torch.stack(squares).sum(0).sqrt()
    return quantiles_of(norms, _layout(m).quantiles)


@fills("hessian_eigenvalue")
def _hessian_eigenvalue(m: Measurement) -> Tensor:
    inputs, target, wanted = m.train.inputs, m.target(m.train), _layout(m).modes
    if isinstance(m.student, Own):
        module = m.student.module.eval()
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        values = curvature.hessian_spectrum(module, m.objective.value, inputs, target, k=min(wanted, trained))
        return padded_modes(values, wanted)
    return padded_modes(curvature.hessian_spectrum(m.net, m.objective.value, inputs, target, k=wanted), wanted)


@fills("neural_tangent_kernel")
def _neural_tangent_kernel(m: Measurement) -> Tensor:
    student = m.student.module.eval() if isinstance(m.student, Own) else m.student
    return tangent_kernel(student, m.eval.inputs[: _layout(m).padded("sample")])


@fills("jacobian")
def _jacobian(m: Measurement) -> Tensor:
    if not isinstance(m.student, Own):
        raise ValueError("measure: jacobian is of students that are modules of the user's own")
    module = m.student.module.eval()
    found = jacobians.jacobian(module, m.eval.inputs[: _layout(m).padded("sample")])
    assert isinstance(found, Mapping)
    like = next(iter(found.values()))
    return torch.cat(
        [
            found[name].reshape(*like.shape[:2], t.numel())
            if name in found
            else like.new_full((*like.shape[:2], t.numel()), torch.nan)
            for name, t in m.student.held.items()
        ],
        2,
    )


def tangent_kernel(module: nn.Module | Network, x: Tensor) -> Tensor:
    """Σ_o Θ_oo(x, x'), (sample, sample_2), over trainable parameters."""
    kernel: Tensor = jacobians.neural_tangent_kernel(module, x)
    return kernel.diagonal(dim1=2, dim2=3).sum(-1)


def _layout(m: Measurement) -> schema.Layout:
    if m.layout is None:
        raise ValueError("measure: gradient_norm, hessian_eigenvalue and accuracy need the Measurement's layout")
    return m.layout


@fills("accuracy")
def _accuracy(m: Measurement) -> Tensor:
    return accuracy(m.eval.classes, m.on_eval.output, most=_layout(m).padded("top_k"))


@fills("label_accuracy")
def _label_accuracy(m: Measurement) -> Tensor:
    if m.eval.labels is None:
        raise ValueError("measure: label_accuracy needs a Probe with labels")
    return accuracy(m.eval.labels, m.on_eval.output, most=_layout(m).padded("top_k"))


@fills("conserved_norm")
def _conserved_norm(m: Measurement) -> Layers:
    return list(coupling_moments.conserved_norms(m.network))


@fills("balance")
def _balance(m: Measurement) -> Layers:
    return list(coupling_moments.balances(m.net))


def _of_norms(variable: str, name: str) -> None:
    def measured(m: Measurement) -> Layers:
        nothing = [torch.full_like(w.flatten(1)[:, 0], torch.nan) for w in m.network.weights[:-1]]
        held = [None if n is None else n.tensors().get(name) for n in m.network.norms]
        return [n if h is None else h for h, n in zip(held, nothing, strict=True)]

    fills(variable)(measured)


for _variable, _name in (
    ("norm_scale", "weight"), ("norm_shift", "bias"), ("norm_mean", "running_mean"), ("norm_variance", "running_var"),
):  # fmt: skip
    _of_norms(_variable, _name)


@fills("parameter")
def _parameter(m: Measurement) -> Tensor:
    if not isinstance(m.student, Own):
        raise ValueError("measure: parameter is of students that are modules of the user's own; record weight")
    return m.student.entries()


def _hidden_z(m: Measurement) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(m.train.trace.preactivations, m.on_train.trace.preactivations, strict=True)
    return list(pairs)[:-1]


Record: TypeAlias = Mapping[str, np.ndarray | list[np.ndarray]]


def measure(variables: Iterable[str], measurement: Measurement) -> dict[str, np.ndarray | list[np.ndarray]]:
    """Measure the named variables of one member: each an array, or a list of one per layer from the lowest up.

    A list shorter than the depth means that the variable has no value at the layers above.

    Raises:
        KeyError: for a variable without a registered measuring function.
    """
    found: dict[str, np.ndarray | list[np.ndarray]] = {}
    with torch.no_grad():
        for name in variables:
            if name in OBSERVABLES:
                value = _ours(name, measurement)
            else:
                value = _checked(name, _theirs(name, measurement), _layout(measurement))
            found[name] = (
                [v.cpu().numpy() for v in value if v is not None] if isinstance(value, list) else value.cpu().numpy()
            )
    return found


def _ours(name: str, measurement: Measurement) -> Tensor | Layers:
    """What an observable of tsdyn's own gives.

    Raises:
        PartError: if a module of the user's own raises in it.
    """
    try:
        return OBSERVABLES[name](measurement)
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        student = measurement.student
        if not isinstance(student, Own):
            raise
        raise registers.PartError(
            f"{name}: {type(student.module).__name__} raised {type(error).__name__} while it was measured: {error}"
        ) from error


def _theirs(name: str, measurement: Measurement) -> Any:
    """What an observable of a package or a user gives.

    Raises:
        PartError: if it raises; names it and the error.
    """
    measured = observable(name)
    try:
        return measured(measurement)
    except Exception as error:  # the user's own code raises errors of every type
        raise registers.PartError(f"observable {name!r} raised {type(error).__name__}: {error}") from error


def _tensor(name: str, part: Any) -> Tensor:
    try:
        return torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError):
        raise registers.PartError(
            f"observable {name!r} gave {type(part).__name__}; give a number or a tensor"
        ) from None


def _checked(name: str, value: Any, layout: schema.Layout) -> Tensor | Layers:
    """Return a user's observable unchanged if it has the dimensions that its variable declares.

    Raises:
        PartError: otherwise; names the shapes found and declared.
    """
    row = schema.variable(name)
    parts = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) != row.layered or len(parts) > max(layout.depth, 1):
        what = f"a list of {len(parts)}" if isinstance(value, (list, tuple)) else "one array"
        raise registers.PartError(
            f"observable {name!r} gave {what}; its variable has dimensions {row.dims}: "
            + ("give a list of one tensor per layer from the lowest up" if row.layered else "give one tensor")
        )
    if not row.layered and value is None:
        raise registers.PartError(f"observable {name!r} gave None; give a number or a tensor")
    tensors = [_tensor(name, part) for part in parts if part is not None]
    for layer, tensor in enumerate(tensors, start=1):
        wanted = layout.block(row, layer if row.layered else None)
        if tensor.is_complex():
            raise registers.PartError(f"observable {name!r} gave complex numbers; give their parts as real ones")
        if tuple(tensor.shape) != wanted:
            inner = [dim for dim in row.dims if dim not in ("seed", "epoch", "layer")]
            where = f" at layer {layer}" if row.layered else ""
            size = f"({', '.join(inner)}), which is {wanted} here" if inner else "no dimension here: one number"
            raise registers.PartError(
                f"observable {name!r} gave shape {tuple(tensor.shape)}{where}; its variable declares {size}"
            )
    return list(tensors) if row.layered else tensors[0]
