"""`Recorder`: the labelled archive of a training loop that is the user's own."""

from __future__ import annotations

import datetime
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn import registers, schema
from tsdyn._version import __version__
from tsdyn.archive import machines, whole_files
from tsdyn.archive.recording_directory import RecordingDirectory
from tsdyn.archive.recordings import Recording
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.engine.loss import MSE
from tsdyn.experiment.parts import Record
from tsdyn.experiment.shapes import SAMPLES
from tsdyn.networks.any_module import Own
from tsdyn.observables import registry
from tsdyn.observables.formulas import standardized
from tsdyn.observables.layers import evaluated, refuse_unsteady, traced, weights_of
from tsdyn.observables.member import Measurement, Probe
from tsdyn.observables.registry import Observed
from tsdyn.recording import checks, measuring, own_values, states
from tsdyn.recording.measuring import ACTIVATION, DIFFERENTIATED, FAMILIES, MEASURED, Probed
from tsdyn.recording.writing import Writer
from tsdyn.running import provenance
from tsdyn.vocabulary import COORDINATES, DIMENSIONS, VARIABLES, Variable

_log = logging.getLogger("tsdyn")
#: On resume the outputs for this many samples of the probe must be what they were.
WITNESSES = 8
DEFAULT = ("loss", "weight", "correlation")
_HELD = "held"


class _Fixed(nn.Module):
    """A module whose output is the probe's targets."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


class Recorder:
    """Writes the labelled archive of one seed of a training loop, to be opened by `tsdyn.open`.

    Nothing of the training changes: the model is measured in evaluation mode and is left in the mode it was in, with
    its buffers, gradients and torch's random state as they were.

    `commit` is durable in this sense: the first commit is on disk when it returns; later ones are written together, at
    most `COMMIT_SECONDS` to a minute apart as those of `tsdyn.run`, and `durable` is the last epoch on disk.  `flush`,
    `close`, leaving a ``with`` block, the end of the process and `tsdyn.open` in this process write what is left; a
    killed process goes on from `durable`.

    Args:
        path: Folder of the recordings of all seeds and configs.
        model: Any module from (sample, ...) to (sample, output).
        probe: Inputs and targets on which it is measured, of the model's dtype and on its device.
        loss: ``loss(output, target)``, measured and differentiated; None is ½‖target − output‖², averaged over samples.
            Gradients of single samples are those of the loss of a batch of one.
        teacher: Module whose hidden layers `correlation` compares with; its weights are stored.
        seed: Label of this run along ``seed``.
        config: What else this run is labelled by; its keys are leading dimensions of ``tsdyn.open(path)``.
        layers: Names of the Linear layers and convolutions to label 1..L; by default all, in order of their first call.
        state: Optimizers, schedulers and others with state_dict() and load_state_dict(), and torch.Generators.
        observables: Names, `tsdyn.Observed`, or functions ``f(model, x, y)`` that give a number, recorded under their
            names.  Frozen parameters are stored, and left out of gradients, Hessians and kernels.
        every: Only epochs divisible by this are measured and stored.

    Attributes:
        durable: The last epoch that is on disk, None before the first commit.

    Raises:
        ValueError: if something does not fit, in one sentence; nothing was written.
        ArchiveError: if another process records there, or the directory holds something else.

    Examples:
        >>> import torch, tsdyn
        >>> x, y, model = torch.randn(20, 3), torch.randn(20, 2), torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tsdyn.Recorder("runs/own", model, probe=(x, y), state=optimizer) as rec:
        ...     for epoch in range(rec.resume(), 4):
        ...         loss = 0.5 * (model(x) - y).square().sum(1).mean()
        ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...         rec.commit(epoch + 1, loss_train=loss.item())
        >>> tsdyn.open("runs/own").weight.dims
        ('seed', 'epoch', 'layer', 'node', 'input_node')
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        probe: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher: nn.Module | None = None,
        seed: int = 0,
        config: Mapping[str, Any] = {},
        layers: Sequence[str] | None = None,
        state: Any = (),
        observables: Sequence[str | Observed | Callable[..., Any]] = DEFAULT,
        every: int = 1,
    ) -> None:
        checks.refuse_below(("seed", seed, 0), ("every", every, 1))
        self._x, self._y = checks.checked_probe(model, probe)
        self._model, self._loss, self._teacher = model, loss, teacher
        self._stateful = states.holders(state)
        names = checks.layers_of(model, self._x, layers, "model")
        refuse_unsteady(model, self._x[:WITNESSES], caller="Recorder", whose="model")
        with evaluated(model), torch.no_grad():
            self._called = tuple(traced(model, self._x, names).calls)
        self._chosen, self._own = _chosen(observables, teacher)
        whole = [name for name, part in self._own.items() if isinstance(part, Observed)]
        if whole and loss is not None:
            raise ValueError(
                f"Recorder: observables {whole} are tsdyn.Observed, whose Measurement speaks of the squared error, and "
                "loss= is another; pass a function of (model, x, y) instead"
            )
        self._recording = self._described(names, seed, checks.checked_config(config), every)
        self._teacher_rows = self._teacher_activations() if teacher is not None else []
        if loss is None and self._y.shape != self._output().shape:
            raise ValueError(
                f"Recorder: loss=None is the squared error, and the outputs are {tuple(self._output().shape)}, the "
                f"targets {tuple(self._y.shape)}; give targets of the same shape, or loss="
            )
        folder = checks.directory_of(whole_files.local_path(path), self._recording.config, seed)
        directory = RecordingDirectory(folder, self._recording)
        directory.__enter__()
        try:
            kept = directory.kept()
            if kept is not None:
                self._recording = replace(
                    self._recording, given=kept.given, declared=kept.declared, sizes=kept.sizes,
                    variables=(*self._recording.variables, *kept.given),
                )  # fmt: skip
                directory.sign(self._recording)
            self._writer = Writer(directory)
        except BaseException:
            directory.__exit__()
            raise
        self._last = self._writer.durable
        self._resumed, self._died, self._told = self._last is None, -1, set[str]()
        self._present: dict[str, np.ndarray] = {}
        self._spare: dict[str, np.ndarray] = {}
        self._attrs: dict[str, Any] = {}
        self._finalizer = weakref.finalize(self, self._writer.close)

    @property
    def durable(self) -> int | None:
        """The last epoch that is on disk; None before the first commit."""
        return self._writer.durable

    def commit(self, epoch: int, **own: Any) -> None:
        """Measure the model after `epoch` and record it, with values of the user's own by name.

        Args:
            epoch: Greater than that of the last commit; 0 is before training.
            own: Numbers, or arrays of variables declared by `tsdyn.declare`, one per layer if they have layers; the
                same at every commit.  ``loss_train=`` is the schema's variable.

        Raises:
            ValueError: for an epoch or values that do not fit; what was committed stays.
            ArchiveError: if it cannot be written.
        """
        self._refuse_epoch(epoch)
        if epoch % self._recording.every:
            self._last = epoch
            return
        values = self._checked_own(own)
        dead = self._died >= 0 or not all(checks.is_finite(p) for p in self._model.parameters())
        if dead and self._died < 0:
            self._died = epoch
            _log.warning(
                "%s: parameters are NaN or infinite at epoch %d; records are NaN from here", self._folder, epoch
            )
        given = self._given(values) if not self._recording.given and values else None
        if given is not None and self._writer.durable is None:
            self._recording = given
        record = self._record(values, dead)
        if not dead:
            mine = {name: record[name] for name in record if name in self._own}
            self._told |= own_values.tell_odd(mine, self._told, f"{self._folder}, epoch {epoch}")
        if self._writer.durable is None and not self._writer.pending:
            self._writer.directory.sign(self._recording)
        if not self._attrs:
            self._attrs = self._attributes({}, 0)
        self._writer.attrs = self._attrs
        if self._writer.first == 0 and not self._writer.constants:
            self._writer.constants = self._teacher_parameters()
        self._writer.add(epoch, record, self._state(epoch))
        self._last = epoch

    def resume(self) -> int:
        """Load the model and `state` as they were at the last commit on disk, and return its epoch; 0 if there is none.

        Raises:
            ArchiveError: if the last segment is damaged, or the model is another one.
        """
        self._writer.flush()
        if self._writer.durable is None:
            self._resumed = True
            return 0
        arrays, before = self._writer.directory.state()
        found = states.decoded(
            {name.removeprefix(f"{_HELD}_"): a for name, a in arrays.items() if name != "death_epoch"}
        )
        self._model.load_state_dict(found["model"])
        for name, buffer in found.get("buffers", {}).items():
            self._model.get_buffer(name).copy_(buffer)
        for name, holder in self._stateful.items():
            if name not in found:
                raise ArchiveError(f"{self._folder}: the last commit holds no {name}; give the same state= as then")
            if isinstance(holder, torch.Generator):
                holder.set_state(found[name])
            else:
                holder.load_state_dict(found[name])
        self._died = int(arrays["death_epoch"][0])
        with evaluated(self._model), torch.no_grad():
            now = self._model(self._x[:WITNESSES])
        then = found["witness"].to(now)
        if not torch.allclose(
            now, then, rtol=1e-3, atol=1e-3 * float(then.abs().nan_to_num(0, 0, 0).max()), equal_nan=True
        ):
            raise ArchiveError(
                f"{self._folder}: with its parameters of epoch {self._writer.durable} the model's outputs on "
                "the probe are not those of then; its forward has changed, so give Recorder another path"
            )
        self._attrs = self._attributes(before, self._writer.durable + 1)
        self._last, self._resumed = self._writer.durable, True
        return self._writer.durable

    def flush(self) -> None:
        """Write all that was committed; it is on disk when this returns."""
        self._writer.flush()

    def close(self) -> None:
        """Write all that was committed, join it into one ``archive.nc``, and free the directory."""
        if self._writer.closed:
            return
        self._writer.flush()
        if self._writer.durable is not None and self._writer.attrs:
            self._writer.directory.consolidate(self._writer.attrs)
        self._finalizer()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._finalizer()

    # --- what is recorded ------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self._writer.directory.path

    def _output(self) -> Tensor:
        with evaluated(self._model), torch.no_grad():
            found: Tensor = self._model(self._x)
        return found

    def _described(self, layers: tuple[str, ...], seed: int, config: dict[str, Any], every: int) -> Recording:
        weights = [w for w, _ in weights_of(self._model, layers)]
        taught: list[Tensor] = []
        if self._teacher is not None:
            self._taught = checks.layers_of_teacher(self._teacher, self._model, self._x)
            taught = [w for w, _ in weights_of(self._teacher, self._taught)]
        depth = max(len(weights), len(taught))
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        rest = checks.unlabelled(self._model, layers)
        trainable = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        names = list(self._chosen)
        if "weight" in names and rest:
            names.append("parameter")
        if "parameter" in names and not rest:
            raise ValueError(
                "Recorder: parameter is of parameters and buffers in no labelled layer, and all are in one: leave it "
                "out, and take weight"
            )
        if not trainable and (asked := [n for n in names if n in DIFFERENTIATED]):
            raise ValueError(
                f"Recorder: {asked[0]} is of trainable parameters, and every parameter is frozen; leave it out"
            )
        sizes: dict[str, int] = {}
        if "activation" in names:
            sizes |= {"sample": len(self._x)}
        if "neural_tangent_kernel" in names:
            kernel = len(self._x) if sizes else min(SAMPLES, len(self._x))
            sizes |= {"sample": kernel, "sample_2": kernel}
        sizes |= {
            dim: len(self._x) for n in self._own for dim in schema.variable(n).dims if dim in ("sample", "sample_2")
        }
        if any("output" in schema.variable(n).dims for n in self._own):
            sizes["output"] = self._output().shape[1]
        rows = [schema.variable(name) for name in names if name not in VARIABLES]
        comments = {name: text for name, text in measuring.COMMENTS.items() if name in names}
        if "neural_tangent_kernel" in names:
            comments["neural_tangent_kernel"] = (
                f"of the first {sizes['sample']} samples of the probe, in evaluation mode, over trainable parameters"
            )
        like = next(self._model.parameters())
        dtype = str(torch.promote_types(like.dtype, torch.float32)).removeprefix("torch.")
        return Recording(
            seed, config, every, tuple(self._chosen), dtype,
            f"{type(self._model).__module__}:{type(self._model).__qualname__}",
            rest, checks.shapes(held), checks.digest({"x": self._x, "y": self._y}),
            "" if self._teacher is None else checks.digest(dict(self._teacher.named_parameters())),
            checks.name_of(self._loss),
            int(np.prod(self._x.shape[1:])), layers, _padded([len(w) for w in weights], depth),
            _padded([w.shape[1] for w in weights], depth), _padded([len(w) for w in taught], depth),
            _padded([w.shape[1] for w in taught], depth), Record().quantiles,
            min(Record().eigenvalues, max(1, trainable)),
            sum(int(np.prod(shape)) for shape in rest.values()), tuple(names), sizes,
            declared=tuple(json.loads(json.dumps(asdict(row))) for row in rows), comments=comments,
        )  # fmt: skip

    def _teacher_activations(self) -> list[Tensor]:
        assert self._teacher is not None
        layers, found = self._recording.layers, []
        with evaluated(self._teacher), torch.no_grad():
            passed = traced(self._teacher, self._x, self._taught)
        with evaluated(self._model), torch.no_grad():
            mine = traced(self._model, self._x, layers)
        for name, own in zip(self._taught[:-1], layers[:-1], strict=False):
            rows, there = passed.rows(self._teacher, name), mine.rows(self._model, own)
            if "correlation" in self._chosen and len(rows) != len(there):
                raise ValueError(
                    f"Recorder: correlation: {own} has {len(there) // len(self._x)} positions, the teacher's {name} "
                    f"{len(rows) // len(self._x)}; choose layers= with equally many, or leave correlation out"
                )
            found.append(standardized(rows))
        return found

    def _teacher_parameters(self) -> dict[str, Any]:
        if self._teacher is None:
            return {}
        pairs = weights_of(self._teacher, self._taught)
        weights = [w.cpu().numpy()[None] for w, _ in pairs]
        biases = [(w.new_zeros(len(w)) if b is None else b).cpu().numpy()[None] for w, b in pairs]
        return {"teacher_weight": weights, "teacher_bias": biases}

    def _record(self, values: Mapping[str, own_values.Values], dead: bool) -> dict[str, Any]:
        recording, layout = self._recording, self._recording.layout
        names = tuple(name for name in recording.variables if name not in recording.given)
        self._refuse_other_layers()
        if dead:
            record = {name: own_values.nothing(schema.variable(name), layout) for name in names}
            return record | {
                name: own_values.each(v, lambda one: np.full((1, *one.shape), np.nan)) for name, v in values.items()
            }
        kernel = dict(layout.extra).get("sample_2", SAMPLES)
        probed = Probed(
            self._model, self._x, self._y, self._loss, recording.layers, tuple(recording.parameters),
            self._teacher_rows, layout, kernel,
        )  # fmt: skip
        own = {name: self._asked(name) for name in self._own if name in names}
        found = measuring.measured(names, probed, own)
        for name, value in found.items():
            own_values.refuse_other_shape(name, value, layout)
        stacked = {
            n: [v[None] for v in value] if isinstance(value, list) else value[None] for n, value in found.items()
        }
        return stacked | {name: own_values.each(v, lambda one: one[None]) for name, v in values.items()}

    def _asked(self, name: str) -> Callable[[Any], Any]:
        part = self._own[name]
        if not isinstance(part, Observed):
            return lambda _: part(self._model, self._x, self._y)
        teacher = Own(self._teacher if self._teacher is not None else _Fixed(self._y))
        probe = Probe(self._x, teacher)
        view = Measurement(Own(self._model), probe, probe, layout=self._recording.layout, objective=MSE)
        return lambda _: part.measure(view)

    def _state(self, epoch: int) -> dict[str, np.ndarray]:
        with evaluated(self._model), torch.no_grad():
            passed = traced(self._model, self._x[:WITNESSES], self._recording.layers)
        self._refuse_other_order(tuple(passed.calls))
        held: dict[str, Any] = {"model": self._model.state_dict(), "witness": passed.output}
        held["buffers"] = {n: t for n, t in self._model.named_buffers() if n not in held["model"]}  # not persistent
        for name, holder in self._stateful.items():
            held[name] = holder.get_state() if isinstance(holder, torch.Generator) else holder.state_dict()
        now = states.encoded(held, self._spare)
        self._spare, self._present = self._present, now  # an encoding that fails leaves the one that is pending whole
        arrays = {f"{_HELD}_{name}": array for name, array in now.items()}
        return arrays | {"death_epoch": np.array([self._died], np.int64)}

    def _attributes(self, before: Mapping[str, Any], first: int) -> dict[str, Any]:
        name, flags = provenance.processor()
        device = str(next(self._model.parameters()).device)
        now: dict[str, Any] = {
            "recording": self._recording.to_toml(), "name": self._folder.parent.name, "digest": self._recording.digest,
            **schema.declarations(self._recording.variables), "schema_version": schema.VERSION,
            "tsdyn_version": __version__,
            "torch_version": str(torch.__version__), "numpy_version": np.__version__, "device": device,
            "threads": torch.get_num_threads(), "engine": "the user's loop", "compiler": "none", "cpu": name,
            "cpu_flags": flags,
            "dtype": self._recording.dtype,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parameters": json.dumps(self._recording.parameters), "conventions": json.dumps({
                "loss": "J = 1/2 E|target - output|^2" if self._loss is None else f"{self._recording.loss}, the user's",
                "measured": "on the probe, in evaluation mode; nothing of the training is changed",
                "frozen": "parameters with requires_grad=False are stored, not differentiated",
                "activation": "what the first activation function makes of a layer's output, else the output itself",
                "correlation": "centred, standardised, signed",
            }),
        }  # fmt: skip
        return now | {machines.HISTORY: machines.extended(before, now, first)}

    # --- what is refused -------------------------------------------------------------------------------------

    def _refuse_epoch(self, epoch: int) -> None:
        if self._writer.closed:
            raise ValueError("Recorder.commit: the recorder is closed; make a new one and resume()")
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            raise ValueError(f"Recorder.commit: epoch = {epoch!r}; an integer of at least 0 is needed")
        if not self._resumed:
            raise ValueError(
                f"Recorder.commit: {self._folder} holds epochs to {self._last}; call resume() and go on from there, or "
                "give another path"
            )
        if self._last is not None and epoch <= self._last:
            raise ValueError(f"Recorder.commit: epoch {epoch} is not after epoch {self._last}, the last one committed")

    def _refuse_other_layers(self) -> None:
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        if checks.shapes(held) != self._recording.shapes:
            raise ValueError(
                f"Recorder.commit: names, types or shapes of the parameters of {type(self._model).__name__} are not "
                "those that the recording began with; record it under another path"
            )

    def _refuse_other_order(self, now: tuple[str, ...]) -> None:
        """Refuse a model that calls its layers in another order than at first: the labels would be others."""
        if now != self._called:
            raise ValueError(
                f"Recorder.commit: the model calls its layers in the order {', '.join(now)}; when the recording began "
                f"it was {', '.join(self._called)}, by which they are labelled; record it under another path"
            )

    def _checked_own(self, own: Mapping[str, Any]) -> dict[str, own_values.Values]:
        values = {name: own_values.plain(name, value) for name, value in own.items()}
        expected = self._recording.given
        if (self._writer.durable is not None or self._writer.pending) and set(values) != set(expected):
            raise ValueError(
                f"Recorder.commit: own values {sorted(values)} are given, at the first commit {sorted(expected)}; give "
                "the same at every commit"
            )
        for name, value in values.items():
            if name in self._recording.variables and name not in expected:
                raise ValueError(f"Recorder.commit: {name} is measured by the recorder; leave it out")
            if name in VARIABLES and name != "loss_train" and np.ndim(value):
                raise ValueError(
                    f"Recorder.commit: {name} is a variable of the schema; declare one of your own for arrays"
                )
            if not name.isidentifier() or name in DIMENSIONS or name in COORDINATES:
                raise ValueError(f"Recorder.commit: {name!r} is a word of the schema; give another name")
            if name not in VARIABLES and name not in schema.DECLARED:
                if np.ndim(value):
                    raise ValueError(
                        f"Recorder.commit: {name} has shape {np.shape(value)}; declare what its dimensions are: "
                        f"tsdyn.declare({name!r}, ('seed', 'epoch', ...), ...)"
                    )
                schema.adopt(Variable(name, ("seed", "epoch"), "1", name, "the user's own loop"))
            if expected:
                own_values.refuse_other_shape(name, value, self._recording.layout)
        return values

    def _given(self, values: Mapping[str, own_values.Values]) -> Recording:
        """The recording with the values of the user's own that the first commit was given."""
        sizes = dict(self._recording.sizes)
        for name, value in values.items():
            row = schema.variable(name)
            inner = [dim for dim in row.dims if dim not in ("seed", "epoch", "layer")]
            for one in value if isinstance(value, list) else [value]:
                if len(inner) != one.ndim or row.layered != isinstance(value, list):
                    raise ValueError(f"Recorder.commit: {name} has shape {one.shape}, it was declared over {row.dims}")
                for dim, n in zip(inner, one.shape, strict=True):
                    if dim in schema.SAMPLED and sizes.setdefault(dim, n) != n:
                        raise ValueError(
                            f"Recorder.commit: {name} has {n} along {dim}, which is {sizes[dim]} long here"
                        )
        rows = [json.loads(json.dumps(asdict(schema.variable(n)))) for n in values if n not in VARIABLES]
        given = replace(
            self._recording, given=tuple(values), sizes=sizes, declared=(*self._recording.declared, *rows),
            variables=(*self._recording.variables, *values),
        )  # fmt: skip
        for name, value in values.items():
            own_values.refuse_other_shape(name, value, given.layout)
        return given


def _padded(sizes: list[int], depth: int) -> tuple[int, ...]:
    return (*sizes, *(0 for _ in range(depth - len(sizes))))


def _chosen(
    observables: Sequence[str | Observed | Callable[..., Any]], teacher: nn.Module | None
) -> tuple[list[str], dict[str, Any]]:
    """Names of the variables to measure, and the parts that are not tsdyn's own."""
    if isinstance(observables, str):
        raise ValueError(f"Recorder: observables = {observables!r}; a list of names is needed")
    names, own = dict[str, None](), dict[str, Any]()
    listed = observables
    if teacher is None and tuple(observables) == DEFAULT:
        listed = [name for name in observables if name != "correlation"]
    for each in listed:
        if isinstance(each, Observed):
            schema.adopt(each.variable)
            own[each.name] = each
            names[each.name] = None
        elif callable(each):
            name = getattr(each, "__name__", "")
            if not name.isidentifier() or name in VARIABLES:
                raise ValueError(f"Recorder: the function {name!r} has no name that a variable can have; use def")
            schema.adopt(Variable(name, ("seed", "epoch"), "1", name, "the user's own function"))
            own[name] = each
            names[name] = None
        elif each in FAMILIES or each in MEASURED:
            if each == "correlation" and teacher is None:
                raise ValueError("Recorder: correlation is of a teacher's nodes; give teacher=, or leave it out")
            if each == ACTIVATION.name:
                schema.adopt(ACTIVATION)
            names |= dict.fromkeys(FAMILIES.get(each, (each,)))
        elif each in registers.OBSERVABLES.names() and registers.OBSERVABLES.foreign(each):
            registry.observable(each)
            own[each] = Observed(schema.variable(each), registry.observable(each))
            names[each] = None
        else:
            raise ValueError(
                f"Recorder: {each!r} cannot be recorded of a model of the user's own; there are "
                f"{', '.join(dict.fromkeys([*FAMILIES, *MEASURED]))}"
            )
    return list(names), own
