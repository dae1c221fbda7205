"""From an experiment to its archive: draw, train, measure, commit, resume, consolidate."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tsdyn import alignment, archive, data, deeptraining, flowtraining, memory, observables, schema, training
from tsdyn._version import __version__
from tsdyn.archive import ArchiveError, Run
from tsdyn.deepnets import DeepNetwork
from tsdyn.deeptraining import DeepEnsemble
from tsdyn.experiment import Experiment
from tsdyn.interrupts import Stopped, stopping
from tsdyn.networks import Network
from tsdyn.observables import Measurement, Probe
from tsdyn.students import draw_student
from tsdyn.teachers import draw_teacher
from tsdyn.training import Ensemble, Rule

#: A segment is committed after this much work (0: after every epoch), ...
COMMIT_SECONDS = 2.0
#: ... or this share of the run so far if that is more, so that a run of days has hundreds of segments and not 100,000,
#: ... and not before all commits together keep this share, so that a slow disk takes no more either, ...
COMMIT_SHARE = 0.01
#: ... but once its records hold this many bytes at the latest.
COMMIT_BYTES = 1 << 27
#: Fresh batches of a block of members are drawn in pieces of about this size.
FRESH_BYTES = 1 << 26
_log = logging.getLogger("tsdyn")


class DeviceError(ValueError):
    """A device that is not there."""


def check_device(device: str) -> str:
    """`device` itself, if this machine has it.

    Raises:
        DeviceError: if not; names what there is.
    """
    available = ["cpu", *([f"cuda:{i}" for i in range(torch.cuda.device_count())])]
    if device == "cpu" or (device == "cuda" and len(available) > 1) or device in available:
        return device
    raise DeviceError(f"device {device!r} is not there; this machine has {', '.join(available)}")


def _exact_products(device: str) -> None:
    """float32 products on a GPU in float32 unless the environment says ``TSDYN_TF32=on``: TF32 keeps 10 bits of 23,
    and torch's own choice differs between matrices (off) and convolutions (on).
    """
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = os.environ.get("TSDYN_TF32") == "on"


@dataclass(frozen=True)
class Cost:
    """What a run will take, estimated from shapes and a timed handful of steps.

    Attributes:
        members: Students trained side by side.
        parameters: Numbers a student has.
        memory: Bytes held at once.
        disk: Bytes of the finished archive.
        seconds: Wall time on this machine.
    """

    members: int
    parameters: int
    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.members} members of {self.parameters} parameters; about {self.memory / 1e6:.0f} MB of memory, "
            f"{self.disk / 1e6:.1f} MB of disk, {duration(self.seconds)}"
        )


def duration(seconds: float) -> str:
    """A time as one says it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class Members:
    """All members of a run: teachers, data and the ensemble in training."""

    experiment: Experiment
    device: str = "cpu"

    @cached_property
    def teachers(self) -> list[Network | DeepNetwork]:
        return [draw_teacher(self.experiment, seed).to(self.device) for seed in self.experiment.seed_labels]

    @cached_property
    def ensemble(self) -> Ensemble | DeepEnsemble:
        pairs = zip(self.experiment.seed_labels, self.teachers, strict=True)
        students = [draw_student(self.experiment, seed, t.to("cpu")) for seed, t in pairs]
        kind: Any = DeepEnsemble if self.experiment.deep else Ensemble
        ensemble: Ensemble | DeepEnsemble = kind.of(students, device=self.device)
        return ensemble

    @cached_property
    def eval_probes(self) -> list[Probe]:
        pairs = zip(self.experiment.seed_labels, self.teachers, strict=True)
        draws = [(data.evaluation_inputs(self.experiment, seed), t, self._labels(seed, "eval")) for seed, t in pairs]
        return [Probe(self._tensor(x), t, labels) for x, t, labels in draws]

    @cached_property
    def _finite(self) -> tuple[Tensor, Tensor]:
        """Inputs and teacher outputs, (member, sample, ...); NaN beyond a member's own samples."""
        inputs = pad_sequence([p.inputs for p in self._finite_probes], batch_first=True, padding_value=torch.nan)
        return inputs, torch.stack([self._targets(i, x) for i, x in enumerate(inputs)])

    def _targets(self, member: int, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """What a member learns on its inputs `x`, (sample, output): the teacher's outputs; with a cross entropy one-hot
        rows of `classes`, of the data's labels (x then being the training set) or of the teacher's largest output.
        """
        law = self.experiment.training
        with torch.no_grad():
            output = self.teachers[member](x)
        if law.loss == "mse":
            return output
        if law.labels == "data" and classes is None:
            classes = self._finite_probes[member].labels
        classes = output.argmax(1) if classes is None else classes
        return torch.nn.functional.one_hot(classes, output.shape[1]).to(output.dtype)

    def _labels(self, seed: int, part: Literal["train", "eval"]) -> Tensor | None:
        """The data's own labels, where anything asks for them."""
        asked = "label_accuracy" in schema.expand(self.experiment.record.observables)
        if not asked and self.experiment.training.labels == "teacher":
            return None
        return self._tensor(data.labels(self.experiment, seed, part))

    @cached_property
    def _finite_probes(self) -> list[Probe]:
        pairs = zip(self.experiment.seed_labels, self.teachers, strict=True)
        return [Probe(self._training_set(s, t), t, self._labels(s, "train")) for s, t in pairs]

    def _training_set(self, seed: int, teacher: Network | DeepNetwork) -> Tensor:
        if isinstance(teacher, Network):
            return alignment.training_set(self.experiment, seed, teacher)
        return self._tensor(data.training_inputs(self.experiment, seed))

    def train_probe(self, member: int, epoch: int) -> Probe:
        """The set on which this member's training quantities are measured."""
        if self.experiment.data.train != "fresh":
            return self._finite_probes[member]
        seed = self.experiment.seed_labels[member]
        return Probe(self._tensor(data.training_inputs(self.experiment, seed, epoch)), self.teachers[member])

    def stream(self, epoch: int) -> training.Stream:
        """Batches of the epoch that ends at `epoch`."""
        if data.new_at_every_step(self.experiment):
            return lambda members: self._fresh(members, epoch)
        if self.experiment.training.whole:
            return training.finite_stream(*self._finite, None, steps=self.experiment.steps)
        pairs = zip(self.experiment.seed_labels, self._finite_probes, strict=True)
        draws = [data.batch_indices(self.experiment, seed, epoch, len(probe.inputs)) for seed, probe in pairs]
        return training.finite_stream(*self._finite, torch.from_numpy(np.stack(draws)))

    def _fresh(self, members: slice, epoch: int) -> Iterator[training.Batches]:
        seeds = self.experiment.seed_labels[members]
        classes = [None] * len(seeds) if self.experiment.training.labels == "teacher" else self._shown(members, epoch)
        taken = 0
        step = len(seeds) * self.experiment.training.batch * self.experiment.layout.input_width * 8
        pieces = [
            data.fresh_batches(self.experiment, seed, epoch, steps_at_once=max(1, FRESH_BYTES // step))
            for seed in seeds
        ]
        for draws in zip(*pieces, strict=True):
            steps, batch, _ = draws[0].shape
            x = torch.stack([self._tensor(draw) for draw in draws]).flatten(1, 2)  # (member, sample, input)
            y = torch.stack([
                self._targets(member, part, None if shown is None else shown[taken : taken + steps].flatten())
                for member, part, shown in zip(range(*members.indices(len(self.teachers))), x, classes, strict=True)
            ])  # fmt: skip
            taken += steps
            rows = torch.arange(steps * batch).view(1, steps, batch).expand(len(seeds), -1, -1)
            yield training.Batches(x, y, rows, steps)

    def _shown(self, members: slice, epoch: int) -> list[Tensor]:
        """Labels of the samples that each step of the epoch shows, (step, batch) a member."""
        found = []
        for seed, probe in zip(self.experiment.seed_labels[members], self._finite_probes[members], strict=True):
            assert probe.labels is not None
            rows = data.batch_indices(self.experiment, seed, epoch, len(probe.labels))
            found.append(probe.labels[torch.from_numpy(rows).to(probe.labels.device)])
        return found

    def measure(self, epoch: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """One epoch of every member: variable → (seed,), or one (seed, node...) array a layer; NaN for the dead."""
        found: list[dict[str, Any] | None] = []
        for member in range(self.ensemble.members):
            if self.ensemble.death_epoch[member] >= 0:
                found.append(None)
                continue
            view = Measurement(
                self.ensemble.network(member),
                self.train_probe(member, epoch),
                self.eval_probes[member],
                self.experiment.record.band,
                self.experiment.layout,
                self.experiment.training.loss,
                self.experiment.training.labels,
            )
            found.append(observables.measure(variables, view))
        return {name: self._stacked(name, [None if f is None else f[name] for f in found]) for name in variables}

    def _stacked(self, name: str, values: list[Any]) -> Any:
        variable, dtype = schema.VARIABLES[name], self.experiment.dtype
        if not variable.layered:
            shape = self.experiment.layout.block(variable, None)
            return np.stack([np.full(shape, np.nan, dtype) if v is None else np.asarray(v, dtype) for v in values])
        layers = max((len(v) for v in values if v is not None), default=0)
        shapes = [self.experiment.layout.block(variable, layer) for layer in range(1, layers + 1)]
        return [
            np.stack([np.full(shape, np.nan, dtype) if v is None else v[i] for v in values])
            for i, shape in enumerate(shapes)
        ]

    def constants(self) -> dict[str, list[np.ndarray]]:
        """The teachers' parameters, one (seed, node...) array a layer."""
        depth = self.experiment.layout.depth
        weights = [np.stack([t.weights[i].flatten(1).cpu().numpy() for t in self.teachers]) for i in range(depth)]
        biases = []
        for i in range(depth):
            columns = [t.biases[i] for t in self.teachers]
            biases.append(
                np.stack(
                    [
                        np.zeros(w.shape[0], w.dtype) if b is None else b.cpu().numpy()
                        for b, w in zip(columns, weights[i], strict=True)
                    ]
                )
            )
        return {"teacher_weight": weights, "teacher_bias": biases}

    def state(self) -> dict[str, np.ndarray]:
        """Everything the next epoch depends on; draws need no state, they are keyed by (seed, epoch)."""
        ensemble = self.ensemble
        found = {f"{kind}_{layer}": p.cpu().numpy() for kind, layer, p in _held(ensemble)}
        for name, moments in ensemble.moments.items():
            for (kind, layer, _), moment in zip(ensemble.parameters(), moments, strict=True):
                found[f"{name}_{kind}_{layer}"] = moment.cpu().numpy()
        return found | {"death_epoch": ensemble.death_epoch.numpy(), "steps": np.array(ensemble.steps)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a stored state."""
        ensemble = self.ensemble
        Rule.of(self.experiment.training, 1).prepare(ensemble)
        for kind, layer, parameter in _held(ensemble):
            parameter.copy_(torch.from_numpy(state[f"{kind}_{layer}"]))
        for name, moments in ensemble.moments.items():
            for (kind, layer, _), moment in zip(ensemble.parameters(), moments, strict=True):
                moment.copy_(torch.from_numpy(state[f"{name}_{kind}_{layer}"]))
        ensemble.death_epoch = torch.from_numpy(np.array(state["death_epoch"]))
        ensemble.steps = int(state["steps"])

    def train(self, epoch: int) -> list[int]:
        """The epoch that ends at `epoch`; returns the seeds that died in it."""
        rule = Rule.of(self.experiment.training, epoch)
        if self.experiment.training.method == "flow":
            assert isinstance(self.ensemble, Ensemble)
            lasting = self.experiment.training.rate(epoch) * self.experiment.steps
            flowtraining.train_epoch(self.ensemble, list(zip(*self._finite, strict=True)), rule, time=lasting)
        elif isinstance(self.ensemble, DeepEnsemble):
            deeptraining.train_epoch(self.ensemble, self.stream(epoch), rule, batch=self._batch)
        else:
            training.train_epoch(self.ensemble, self.stream(epoch), rule, batch=self._batch)
        return [self.experiment.seed_labels[i] for i in self.ensemble.bury(epoch)]

    @property
    def _batch(self) -> int:
        return len(self._finite[0][0]) if self.experiment.training.whole else self.experiment.training.batch

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _held(ensemble: Ensemble | DeepEnsemble) -> list[tuple[str, int, Tensor]]:
    """(kind, layer, tensor) of parameters and running statistics."""
    return ensemble.parameters() + (ensemble.buffers() if isinstance(ensemble, DeepEnsemble) else [])


def estimate(experiment: Experiment, *, device: str = "cpu") -> Cost:
    """What `experiment` (one run, no sweep) will take; times a few steps and one measurement of one member."""
    layout, members = experiment.layout, len(experiment.seed_labels)
    flow = experiment.training.method == "flow"  # whose time an epoch is no sum of its steps'
    seeds = list(experiment.seed_labels[: 1 if flow else 8])
    few = experiment.replace({"seeds": seeds, "data.eval": min(512, experiment.data.eval)})
    steps = experiment.steps if flow else min(experiment.steps, 60)
    few = few.replace({"training.steps_per_epoch": steps})
    if isinstance(experiment.data.train, int) and not experiment.training.whole:
        few = few.replace({"data.train": min(experiment.data.train, max(512, experiment.training.batch))})
    memory.refuse_beyond("estimate", footprint(few), torch.device(device), "narrower networks, fewer samples")
    trial = Members(few, device)
    variables = schema.expand(experiment.record.observables)
    per_step = _quickest(lambda: trial.train(1)) / steps / trial.ensemble.members
    per_sample = _quickest(lambda: trial.measure(0, variables)) / trial.ensemble.members / few.data.eval
    recorded = len(experiment.schedule)
    seconds = members * (
        per_step * experiment.steps * experiment.training.epochs + per_sample * experiment.data.eval * recorded
    )
    train = None
    if isinstance(experiment.data.train, int) and isinstance(few.data.train, int):
        train = experiment.data.train * len(trial.train_probe(0, 0).inputs) // few.data.train
    parameters = sum(p[0].numel() for _, _, p in trial.ensemble.parameters())
    epoch = archive.bytes_per_epoch(layout, variables, experiment.dtype)
    return Cost(members, parameters, footprint(experiment, train=train), epoch * recorded, seconds)


def footprint(experiment: Experiment, *, train: int | None = None) -> int:
    """Bytes that a run of `experiment` holds at once, from shapes alone; nothing is drawn.

    The members' samples with the teacher's activations on them, parameters, moments and gradients; and the records of
    a segment three times: as measured, stacked, and as the file made of them.

    Args:
        experiment: One run, no sweep.
        train: Samples of a member's training set, where augmentation makes that another number than ``data.train``.
    """
    layout = experiment.layout
    if train is None:
        points = 2 * layout.input_width + 1 if experiment.data.augment == "agnostic" else 1
        train = points * experiment.data.train if isinstance(experiment.data.train, int) else 0
    samples = (train + experiment.data.eval) * (layout.input_width + 2 * sum(layout.teacher_widths))
    parameters = sum(n * (below + 1) for n, below in zip(layout.widths, layout.input_widths, strict=True))
    parameters += sum(
        n * (below + 1) for n, below in zip(layout.teacher_widths, layout.teacher_input_widths, strict=True)
    )
    numbers = len(layout.seeds) * (samples + 4 * parameters)
    if experiment.training.method == "flow":  # the Hessian of one member, its factors and what becomes of it
        numbers += 4 * sum(n * (below + 1) for n, below in zip(layout.widths, layout.input_widths, strict=True)) ** 2
    epoch = archive.bytes_per_epoch(layout, schema.expand(experiment.record.observables), experiment.dtype)
    whole = epoch * len(experiment.schedule)
    return numbers * np.dtype(experiment.dtype).itemsize + 3 * min(max(COMMIT_BYTES, epoch), whole)


def _quickest(work: Callable[[], object], *, times: int = 3) -> float:
    """Seconds of the quickest of a few calls: the first ones warm caches, others may be disturbed."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


#: Called after each epoch with (epoch, epochs, seeds that died, evaluation mse or None).
Progress = Callable[[int, int, list[int], "float | None"], None]


def run(
    experiment: Experiment, path: str | Path, *, device: str = "cpu", progress: Progress | None = None
) -> xr.Dataset:
    """Train and measure one experiment into `path`; goes on from the last committed epoch if there is one.

    Args:
        experiment: Without a sweep.
        path: Directory; made if absent.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        progress: Told after every epoch.

    Returns:
        The lazy archive, as `tsdyn.open` gives it.

    Raises:
        ArchiveError: if the directory is another's, held by another process, or cannot be written.
        DeviceError: if there is no such device.
        ExperimentError: if the teacher cannot be drawn as asked.
        MemoryError: if the members would not fit, before any is drawn.
        Stopped: after SIGINT or SIGTERM, once the epoch in work is committed.
    """
    check_device(device)
    _exact_products(device)
    memory.refuse_beyond(
        "run",
        footprint(experiment),
        torch.device(device),
        "train fewer seeds a directory (seeds = [0, 1, ...]) or on less data (data.train, data.eval)",
    )
    with Run(path, experiment) as target, stopping() as asked:
        if not target.finished:
            _train(target, Members(experiment, device), progress, asked)
    return archive.open(path)


def _train(target: Run, members: Members, progress: Progress | None, asked: Callable[[], int | None]) -> None:
    experiment = target.experiment
    variables = schema.expand(experiment.record.observables)
    attrs = attributes(experiment, members.device)
    recorded, last = set(experiment.schedule), experiment.training.epochs
    committed = target.committed()
    start = 0
    if committed is not None:
        state, before = target.state()
        _say_what_changed(target.path, before, attrs)
        members.restore(_of_this_shape(target.path, state, members))
        start = committed + 1
    pending: list[dict[str, Any]] = []
    epochs: list[int] = []
    first, began, took, spent = start, time.monotonic(), 0.0, 0.0
    clock = began
    for epoch in range(start, last + 1):
        died = members.train(epoch) if epoch else []
        if epoch in recorded:
            pending.append(members.measure(epoch, variables))
            epochs.append(epoch)
        if progress is not None:
            progress(epoch, last, died, _mean_mse(pending[-1]) if epoch in recorded else None)
        full = len(pending) * target.bytes_per_epoch >= COMMIT_BYTES
        now = time.monotonic()
        if epoch == last or full or _due(now - began, now - clock, took, spent) or asked() is not None:
            records = _along_epochs(pending) if pending else {}
            target.commit(
                first,
                epoch,
                epochs,
                {**records, **(members.constants() if first == 0 else {})},
                members.state(),
                attrs,
            )
            pending, epochs, first, clock = [], [], epoch + 1, time.monotonic()
            took = clock - now
            spent += took
            stop = asked()
            if stop is not None:
                raise Stopped(stop)
    target.consolidate(attrs)


def _due(elapsed: float, since: float, took: float, spent: float) -> bool:
    """Whether to commit, seconds into the run and since the last commit, which took `took`, and all so far `spent`.

    This one and the run's last, which comes whatever it costs, are to keep the share.
    """
    waited = since >= max(COMMIT_SECONDS, COMMIT_SHARE * elapsed)
    return COMMIT_SECONDS == 0 or (waited and spent + 2 * took <= COMMIT_SHARE * elapsed)


def _of_this_shape(path: Path, stored: dict[str, np.ndarray], members: Members) -> dict[str, np.ndarray]:
    """The committed state, refused if it is not one of these members: copied, a wrong shape could broadcast."""
    Rule.of(members.experiment.training, 1).prepare(members.ensemble)
    for name, array in members.state().items():
        found = stored.get(name)
        if found is None or found.shape != array.shape or found.dtype != array.dtype:
            held = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise ArchiveError(
                f"{path}: the state to go on from has {name} {held}, this experiment needs {array.dtype} "
                f"{array.shape}; the segments are of another tsdyn or not whole: see `tsdyn validate`"
            )
    return stored


def _say_what_changed(path: Path, before: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
    """Bits are promised for the same device, threads and versions; where these changed, the log says so."""
    changed = [
        f"{key} {before.get(key)} before, {attrs[key]} now"
        for key in ("device", "threads", "torch_version", "numpy_version", "tsdyn_version")
        if before.get(key) != attrs[key]
    ]
    if changed:
        _log.warning("%s: goes on elsewhere than it began (%s): bits may differ", path, "; ".join(changed))


def _along_epochs(pending: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of several epochs, stacked along a second axis."""
    found: dict[str, Any] = {}
    for name, value in pending[0].items():
        if isinstance(value, list):
            depth = max(len(p[name]) for p in pending)
            whole = [p[name] for p in pending if len(p[name]) == depth]
            found[name] = [
                np.stack(
                    [p[name][i] if i < len(p[name]) else np.full_like(whole[0][i], np.nan) for p in pending],
                    1,
                )
                for i in range(depth)
            ]
        else:
            found[name] = np.stack([p[name] for p in pending], 1)
    return found


def _mean_mse(record: Mapping[str, Any]) -> float | None:
    for name in ("mse_eval", "loss_eval"):
        if name in record:
            alive = record[name][~np.isnan(record[name])]
            return float(alive.mean()) if len(alive) else float("nan")
    return None


def attributes(experiment: Experiment, device: str) -> dict[str, str | int]:
    """Global attributes of an archive: what ran, where, with what, under which conventions."""
    return {
        "experiment": experiment.to_toml(),
        "name": experiment.name,
        "digest": experiment.digest,
        "schema_version": schema.VERSION,
        "tsdyn_version": __version__,
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "dtype": experiment.dtype,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "conventions": json.dumps(
            {
                "loss": _loss_convention(experiment),
                "gradient": "g is the negative gradient at the pre-activation",
                "gate_at_zero": "torch",
                "correlation": "centred, standardised, signed",
                **_time_convention(experiment),
                "batch_norm": _batch_norm_convention(experiment),
            }
        ),
    }


def _time_convention(experiment: Experiment) -> dict[str, str]:
    if experiment.training.method == "flow":
        how = f"Rodas4(3), rtol {flowtraining.RTOL:g}, atol {flowtraining.ATOL:g}"
        return {
            "learning_rate": "time an epoch takes, by steps_per_epoch",
            "time": f"epoch = learning_rate steps_per_epoch of t in dtheta/dt = -grad J ({how})",
        }
    return {
        "learning_rate": "W += learning_rate (1/batch) sum g f^T",
        "time": "epoch = steps_per_epoch steps",
    }


def _loss_convention(experiment: Experiment) -> str:
    if experiment.training.loss == "mse":
        return "J = 1/2 E |f* - f|^2, summed over outputs"
    whose = "teacher's largest output" if experiment.training.labels == "teacher" else "data's label"
    return f"E[-log softmax(f)] at the {whose}"


def _batch_norm_convention(experiment: Experiment) -> str:
    place = experiment.student.batch_norm
    return place if place == "none" else f"{place} the activation; training mode in training, evaluation mode measured"


@cache
def _git_commit() -> str:
    """Commit of the checkout this code runs from, ``unknown`` for an installed wheel."""
    try:
        here = Path(__file__).resolve().parent
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"
