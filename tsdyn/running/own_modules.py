"""Students and teachers of a user's own: any ``nn.Module``, made by a function.

The function is passed from Python, ``tsdyn.run(experiment, path, student=make_module)``, or an experiment file names
it by its import path, ``student.module = "mylab.nets:Residual"``, and its keyword arguments, ``student.arguments``.  A
run calls it once per seed, with torch's generator seeded from the seed's own stream; a parameter called ``seed`` is
given the seed.  Modules are looked at before anything is written, and kept: these are the ones that train (`keeping`).
The module maps (sample, input) to (sample, output).  It trains in the mode in which it was made and is measured in
evaluation mode.

The experiment that is run and stored names the module, how many numbers it holds, and the SHA-256 of its source, so
that a directory is resumed with the same module only.  Parameters and buffers are recorded as one variable,
``parameter`` (seed, epoch, entry): all of them concatenated, in the module's own order.  The attribute ``parameters``
holds the name and shape of each, and `named` gives them back by name.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import math
import pickle
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import torch
import xarray as xr
from torch import nn

from tsdyn import schema
from tsdyn.engine.general import refuse_unfit
from tsdyn.experiment import made_modules
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Record
from tsdyn.experiment.sweep_axes import places
from tsdyn.networks.any_module import held_tensors
from tsdyn.observables import layers, module_couplings
from tsdyn.problem import inputs
from tsdyn.vocabulary import VARIABLES

#: A function that makes the module of one seed.
Maker = Callable[..., nn.Module]
#: The random stream from which a module is seeded.
Stream: TypeAlias = Literal["student", "teacher"]

#: Modules that were looked at and no run has taken yet, by what decides them; None outside of `keeping`.
_kept: contextvars.ContextVar[dict[str, nn.Module] | None] = contextvars.ContextVar("kept modules", default=None)
#: If the modules of all seeds hold more bytes than this, only the first and the last seed's are made to be looked at,
#: and none is sent to workers.
_KEPT_BYTES = 1 << 24


#: Variables of both networks' layers without a dimension that says so.
_COUPLED = ("lemma1_residual",)
#: Variables recorded of own modules if the experiment does not choose any.
OBSERVABLES = ("loss", "mse", "parameter")


_log = logging.getLogger("tsdyn")


@contextlib.contextmanager
def keeping(sent: bytes = b"") -> Iterator[None]:
    """Keep the modules that are looked at inside the context until a run takes them, so that none is made twice.

    Args:
        sent: What `sent` gave in another process.
    """
    if _kept.get() is not None and not sent:  # an outer context has begun
        yield
        return
    before = _kept.set(pickle.loads(sent) if sent else {})
    try:
        yield
    finally:
        _kept.reset(before)


def sent() -> bytes:
    """The modules that are kept, for `keeping` on a worker; empty if they cannot be sent or are large.

    A worker then makes those of the seeds that were looked at anew.
    """
    import cloudpickle

    kept = _kept.get() or {}
    if sum(_bytes(module) for module in kept.values()) > _KEPT_BYTES:
        return b""
    try:
        written: bytes = cloudpickle.dumps(kept)
    except Exception:  # pickling runs the user's code, which raises errors of every type
        return b""
    return written


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in held_tensors(module).values())


def made(make: Maker, experiment: Experiment, seed: int, stream: Stream) -> nn.Module:
    """The module of one seed, in the experiment's dtype, for whoever asks to have it: one that is kept, or a new one.

    Raises:
        ExperimentError: if `make` gives no module, or one that cannot be trained.
    """
    kept = (_kept.get() or {}).pop(_key(make, experiment, seed, stream), None)
    return _new(make, experiment, seed, stream) if kept is None else kept


def _looked_at(make: Maker, experiment: Experiment, seed: int, stream: Stream) -> nn.Module:
    """The module of one seed, to be looked at only; it is kept for `made` inside a context of `keeping`."""
    kept = _kept.get()
    if kept is None:
        return _new(make, experiment, seed, stream)
    key = _key(make, experiment, seed, stream)
    if key not in kept:
        kept[key] = _new(make, experiment, seed, stream)
    return kept[key]


def _key(make: Maker, experiment: Experiment, seed: int, stream: Stream) -> str:
    """What decides a module: the same in every process."""
    given = (make.args, sorted(make.keywords.items())) if isinstance(make, functools.partial) else ()
    return repr((stream, _name(make), given, seed, experiment.dtype))


def _new(make: Maker, experiment: Experiment, seed: int, stream: Stream) -> nn.Module:
    """A new module of one seed, in the experiment's dtype; torch's global generator is left as it was.

    Raises:
        ExperimentError: if `make` gives no module, or one that cannot be trained.
    """
    given = make.keywords if isinstance(make, functools.partial) else {}
    takes_seed = "seed" in inspect.signature(_bare(make)).parameters and "seed" not in given
    with torch.random.fork_rng():
        torch.manual_seed(int(inputs.generator(seed, stream).integers(2**63)))
        try:
            module = make(seed=seed) if takes_seed else make()
        except Exception as error:  # the user's own code raises errors of every type
            said = f"{type(error).__name__}: {error}"
            raise ExperimentError(
                f"{stream}: {_name(make)} raised {said}; it is called with {stream}.arguments = {dict(given)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise ExperimentError(f"{stream}: {_name(make)} gives {type(module).__name__}; it must make an nn.Module")
    unsafe = [name for name in held_tensors(module) if "/" in name or name != name.strip() or not name.isprintable()]
    if unsafe:
        raise ExperimentError(f"{stream}: names {unsafe} cannot be stored; name parts without '/' and blanks at ends")
    match stream:
        case "student":
            try:
                refuse_unfit(module)
            except ValueError as error:
                raise ExperimentError(f"student: {error}") from None
        case "teacher":  # is only evaluated
            pass
        case other:
            assert_never(other)
    return module.to(getattr(torch, experiment.dtype))


def described(experiment: Experiment, *, student: Maker | None = None, teacher: Maker | None = None) -> Experiment:
    """The experiment completed by names, sizes and source digests of the modules; unchanged without any.

    With an own teacher only input and output of ``teacher.widths`` count; a student that tsdyn makes keeps the widths
    that it had with the former ones.  Unless ``record.observables`` is chosen, losses and parameters are recorded.

    Raises:
        ExperimentError: if a module cannot be a member, or something is to be recorded that only networks have.
    """
    if any(made_modules.varied(experiment.sweep, who) for who in made_modules.NETWORKS):
        return _described_at_each(experiment, student, teacher)
    if any(getattr(experiment, who).made for who in made_modules.NETWORKS):
        experiment = experiment.replace({f"{who}.made": None for who in made_modules.NETWORKS})
    student, teacher = makers(experiment, student=student, teacher=teacher)
    alone = [name for name in ("parameter", "jacobian") if name in experiment.record.observables]
    if student is None and experiment.student.module is None and alone:
        raise ExperimentError(
            f"record.observables: {alone[0]!r} is of a module of your own, student.module; "
            "record 'weight' of the networks that tsdyn makes"
        )
    changes: dict[str, Any] = {}
    chosen = experiment
    if (student or teacher) is not None and experiment.record.observables == Record().observables:
        observables = OBSERVABLES if student is not None else ("loss", "mse", "weight")
        _log.info("record.observables is not chosen: %s are recorded of own modules", ", ".join(observables))
        changes["record.observables"] = list(observables)
        chosen = experiment.replace(changes)
    if teacher is not None:
        ends = [experiment.teacher.widths[0], experiment.teacher.widths[-1]]
        changes |= {"teacher.widths": ends, **_keys(chosen, "teacher", teacher)}
        if student is None:
            changes["student.widths"] = list(experiment.student_widths)
    if student is not None:
        changes |= _keys(chosen, "student", student)
    whole = experiment.replace(changes) if changes else experiment
    if student is not None or teacher is not None:
        _refuse_unlike_layers(whole, student, teacher)
    return whole


def _described_at_each(experiment: Experiment, student: Maker | None, teacher: Maker | None) -> Experiment:
    """`described` of a sweep that varies which modules they are: each is made once."""
    given = {"student": student, "teacher": teacher}
    varied: dict[str, tuple[str, ...]] = {
        who: made_modules.varied(experiment.sweep, who) for who in made_modules.NETWORKS
    }
    changes: dict[str, Any] = {}
    for who, make in given.items():
        if make is not None and f"{who}.module" in varied[who]:
            raise ExperimentError(f"{who}.module is swept, and {who}= is passed, too; leave one of them out")
        if make is None and experiment.awaits_a_module(who):
            raise ExperimentError(
                f"sweep: {who}.arguments is of a module of your own, and there is none; name it, {who}.module = "
                f"'package.module:name', or pass the function that makes it, tsdyn.run(experiment, path, {who}=...)"
            )
        if make is not None:
            changes[f"{who}.module"] = _module_name(getattr(experiment, who).module, make)
        if varied[who]:
            changes |= {f"{who}.{name}": None for name in ("made", "source", "numbers", "shapes")}
    base = experiment.replace(changes) if changes else experiment
    points = {json.dumps([p[k] for k in sum(varied.values(), ())]): p for p in places(base.sweep).values()}
    whole, found = base, dict[str, dict[str, Any]](student={}, teacher={})
    for point in points.values():
        single = base.at(point)
        whole = described(single, **given)
        before, after = single.as_dict(), whole.as_dict()
        for who, entries in found.items():
            if after[who].get("module") is not None:
                filled = {name: after[who][name] for name in made_modules.FILLED if name in after[who]}
                entries[made_modules.key(before[who])] = filled
    filled = {"record.observables": list(whole.record.observables)}
    if found["teacher"]:
        filled["teacher.widths"] = [base.teacher.widths[0], base.teacher.widths[-1]]
        filled |= {} if found["student"] else {"student.widths": list(base.student_widths)}
    for who, entries in found.items():
        if entries and varied[who]:
            filled[f"{who}.made"] = entries
        elif entries:
            filled |= {f"{who}.{name}": value for name, value in next(iter(entries.values())).items()}
    return base.replace(filled)


def _module_name(path: str | None, make: Maker) -> str:
    """The import path of a function: as it is named already, if that is the function, else its own."""
    return path if path is not None and _of_path(path) is _bare(make) else _name(make)


def _keys(experiment: Experiment, who: Literal["student", "teacher"], make: Maker) -> dict[str, Any]:
    seeds = experiment.seed_labels
    module = _looked_at(make, experiment, seeds[0], who)
    few = _kept.get() is None or _bytes(module) * len(seeds) > _KEPT_BYTES
    modules = {seed: _looked_at(make, experiment, seed, who) for seed in (seeds[-1:] if few else seeds[1:])}
    _refuse_others(experiment, who, module, modules)
    part = getattr(experiment, who)
    found = {
        f"{who}.module": _module_name(part.module, make),
        f"{who}.source": _source(make, module),
        f"{who}.numbers": sum(t.numel() for t in held_tensors(module).values()),
    }
    needed = part.layers is not None or needs_layers(experiment, who)
    if who == "teacher" and not needed:  # the layers of a deeper one would be layers without nodes of the student
        return found
    try:
        names = layers.labelled(module, _few_inputs(experiment), part.layers, caller=f"{who}.layers", whose=who)
    except ValueError as error:
        if not needed:
            return found  # it has no layers, or calls one twice; what is measured later needs none either
        raise ExperimentError(
            f"{error} ({who}.layers of the experiment, beside {who}.module); or record losses, mse and parameter "
            "alone, which need no layers (record.observables)"
        ) from None
    shapes = [list(w.shape) for w, _ in layers.weights_of(module, names)]
    return found | {f"{who}.layers": list(names), f"{who}.shapes": shapes}


def _refuse_others(experiment: Experiment, who: str, module: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """Refuse a first seed's module that is another one for others, or whose outputs cannot be learnt from.

    Raises:
        ExperimentError: with the reason, before anything is written.
    """
    mine = {name: tuple(tensor.shape) for name, tensor in held_tensors(module).items()}
    for seed, other in others.items():
        theirs = {name: tuple(tensor.shape) for name, tensor in held_tensors(other).items()}
        odd = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
        if odd:
            raise ExperimentError(
                f"{who}: seeds {experiment.seed_labels[0]} and {seed} get modules that differ in "
                f"{', '.join(odd[:5])}; the function must make modules with the same names and shapes for every seed"
            )
    x, outputs = _few_inputs(experiment), experiment.teacher.widths[-1]
    try:
        with layers.evaluated(module), torch.no_grad():
            output = module(x)
        layers.refuse_unsteady(module, x, caller=who, whose=who)
    except layers.UnsteadyError as error:
        raise ExperimentError(f"{who}: {str(error).removeprefix(f'{who}: ')}") from None
    except Exception as error:  # the user's own code raises errors of every type
        raise ExperimentError(
            f"{who}: {type(module).__name__} raised {type(error).__name__} for inputs {tuple(x.shape)}: {error}"
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (len(x), outputs):
        raise ExperimentError(
            f"{who}: {type(module).__name__} gives {shape} for inputs {tuple(x.shape)}; it must map (sample, input) to "
            f"(sample, output), here ({len(x)}, {outputs}): unflatten images inside it, and return one tensor"
        )


def needs_layers(experiment: Experiment, who: Stream) -> bool:
    """Whether something is recorded that needs the layers of the student or teacher."""
    names = schema.expand(experiment.record.observables)
    rows = [row for row in (VARIABLES.get(n) or schema.DECLARED.get(n) for n in names) if row is not None]
    match who:
        case "student":
            return any(row.layered or row.name in _COUPLED for row in rows)
        case "teacher":
            return any(row.name in _COUPLED or any(d.startswith("teacher_") for d in row.dims) for row in rows)
        case other:
            assert_never(other)


def _few_inputs(experiment: Experiment) -> torch.Tensor:
    """A few samples of the first seed's evaluation set, on which modules are looked at before a run begins."""
    return torch.from_numpy(inputs.evaluation_inputs(experiment, experiment.seed_labels[0])[:8])


def _refuse_unlike_layers(experiment: Experiment, student: Maker | None, teacher: Maker | None) -> None:
    """Refuse to pair layers of other numbers of positions, and Lemma 1 where its hypothesis does not hold.

    Raises:
        ExperimentError: with the reason.
    """
    asked = set(schema.expand(experiment.record.observables)) & {
        "correlation",
        *module_couplings.PAIRED,
        "lemma1_residual",
    }
    if not asked:
        return
    x, seed = _few_inputs(experiment), experiment.seed_labels[0]
    found: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    for who, make in (("student", student), ("teacher", teacher)):
        names = getattr(experiment, who).layers
        if make is not None and names is not None:
            found[who] = _looked_at(make, experiment, seed, who), names  # type: ignore[arg-type]
    if not found:
        return
    positions = {who: _positions(module, names, x) for who, (module, names) in found.items()}
    for layer, (mine, theirs) in enumerate(
        zip(positions.get("student", itertools.repeat(1)), positions.get("teacher", itertools.repeat(1)), strict=False)
    ):
        if mine != theirs:
            raise ExperimentError(
                f"record.observables: {', '.join(sorted(asked))}: hidden layer {layer + 1} of the student has {mine} "
                f"positions per sample, that of the teacher {theirs}; name layers with equally many (student.layers, "
                "teacher.layers), or record cross_correlation"
            )
    if "lemma1_residual" in asked:
        for who, (module, names) in found.items():
            reason = module_couplings.not_homogeneous(module, names, x)
            if reason:
                raise ExperimentError(f"record.observables: lemma1_residual: the {who}: {reason}; leave it out")


def _positions(module: nn.Module, names: tuple[str, ...], x: torch.Tensor) -> list[int]:
    """Positions per sample of each hidden layer."""
    with layers.evaluated(module), torch.no_grad():
        passed = layers.traced(module, x, names)
    return [len(passed.rows(module, name)) // len(x) for name in names[:-1]]


def _bare(make: Maker) -> Maker:
    """The function itself, without the arguments bound to it."""
    return _bare(make.func) if isinstance(make, functools.partial) else make


def _name(make: Maker) -> str:
    make = _bare(make)
    return f"{getattr(make, '__module__', '?')}:{getattr(make, '__qualname__', type(make).__qualname__)}"


def _source(make: Maker, module: nn.Module) -> str:
    """SHA-256 of the sources of the function and of the module's classes that are not torch's, and of its shapes."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__ if not _foreign(kind)}
    parts = [_text(make), *(_text(kind) for kind in sorted(kinds, key=lambda kind: kind.__qualname__))]
    parts += [str(module), *(f"{n} {tuple(t.shape)} {t.requires_grad}" for n, t in held_tensors(module).items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _foreign(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("torch", "builtins")


def _text(of: Any) -> str:
    """The source of a function or class; of a class method by method, since of two of one name inspect finds one."""
    if inspect.isclass(of):
        if _foreign(of):
            return of.__qualname__
        return "\n".join(f"{name} = {_text(value)}" for name, value in sorted(vars(of).items()) if name != "__doc__")
    if isinstance(of, (staticmethod, classmethod)):
        return _text(of.__func__)
    if isinstance(of, property):
        return _text(of.fget)
    if isinstance(of, functools.partial):
        return f"{_text(of.func)} of {of.args} {of.keywords}"
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):  # typed at a prompt: its bytecode; or a value
        code = getattr(of, "__code__", None)
        if code is not None:
            return f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}"
        return repr(of) if isinstance(of, (bool, int, float, str, bytes, tuple, list, dict)) else type(of).__qualname__


def attribute(module: nn.Module) -> str:
    """JSON of the name and shape of each parameter and buffer, in order."""
    return json.dumps({name: list(tensor.shape) for name, tensor in held_tensors(module).items()})


def named(ds: xr.Dataset) -> dict[str, xr.DataArray]:
    """The parameters and buffers in an archive of own modules, by name: each (..., seed, epoch, its own dimensions).

    Lazy if `ds` is.  A tensor's own dimensions are called ``dim_0``, ``dim_1``, ...

    Raises:
        ValueError: for an archive that holds none.
    """
    if "parameter" not in ds or "parameters" not in ds.attrs:
        raise ValueError("named: the Dataset holds no parameters of an own module; record 'parameter'")
    shapes = _shapes(ds)
    found, start = {}, 0
    flat = ds["parameter"].transpose(..., "entry").drop_vars("entry", errors="ignore")
    for name, shape in shapes.items():
        part = flat.isel(entry=slice(start, start + math.prod(shape)))
        lead = [str(dim) for dim in part.dims if dim != "entry"]
        sizes = {dim: part.sizes[dim] for dim in lead} | {f"dim_{i}": n for i, n in enumerate(shape)}
        coords = {key: coord for key, coord in part.coords.items() if set(coord.dims) <= set(lead)}
        values = part.data.reshape(tuple(sizes.values()))
        found[name] = xr.DataArray(values, coords, list(sizes), name=name, attrs=part.attrs)
        start += math.prod(shape)
    return found


def _shapes(ds: xr.Dataset) -> Mapping[str, list[int]]:
    """Name → shape of the parameters of the modules in `ds`, which must be those of one module.

    Raises:
        ValueError: if points that differ in their modules are left.
    """
    told = json.loads(ds.attrs["parameters"])
    if isinstance(told, dict):
        return told
    left = [each["shapes"] for each in told if any(_is_at(ds, labels) for labels in each["at"])]
    if len(left) != 1:
        dims = [name for name in told[0]["at"][0] if name in ds.coords and ds[name].ndim]
        raise ValueError(
            f"named: the Dataset holds {len(left)} modules with other parameters; select one point, by "
            f"{', '.join(dims) or 'its swept keys, without drop=True'}"
        )
    found: Mapping[str, list[int]] = left[0]
    return found


def _is_at(ds: xr.Dataset, labels: Mapping[str, Any]) -> bool:
    """Whether `ds` holds the point with these labels, as far as its coordinates tell."""
    return all(value in np.atleast_1d(ds[name].values).tolist() for name, value in labels.items() if name in ds.coords)


def makers(
    experiment: Experiment, *, student: Maker | None = None, teacher: Maker | None = None
) -> tuple[Maker | None, Maker | None]:
    """The functions that make the student and the teacher, with the experiment's arguments; None for tsdyn's networks.

    A function that is not given is imported from ``student.module`` or ``teacher.module``.

    Raises:
        ExperimentError: if it cannot be imported, or is nothing that a file may name.
    """
    return _maker(experiment, "student", student), _maker(experiment, "teacher", teacher)


def _maker(experiment: Experiment, who: Literal["student", "teacher"], given: Maker | None) -> Maker | None:
    part = getattr(experiment, who)
    if given is None and part.module is None:
        return None
    if isinstance(given, nn.Module):
        raise ExperimentError(
            f"{who}: is a {type(given).__name__} that is made already; give its class, or a function that makes one "
            f"for each seed, such as {who}=lambda: {type(given).__name__}(...)"
        )
    make = given if given is not None else _imported(part.module, who)
    return functools.partial(make, **part.arguments) if part.arguments else make


def refuse_unmeasurable(experiment: Experiment, *, student: Maker | None = None, teacher: Maker | None = None) -> None:
    """Refuse modules of another source than an archive's, and observables that need what these modules do not have.

    Raises:
        ExperimentError: with the reason.
    """
    student, teacher = makers(experiment, student=student, teacher=teacher)
    for who, make in (("student", student), ("teacher", teacher)):
        if make is None:
            continue
        refuse_other_source(experiment, who, make)  # type: ignore[arg-type]
        if getattr(experiment, who).shapes is None and needs_layers(experiment, who):  # type: ignore[arg-type]
            raise ExperimentError(
                f"record.observables = {list(experiment.record.observables)}: the {who}'s layers are not labelled in "
                f"{experiment.name}, so that nothing can be measured of single ones; losses, parameters and "
                f"neural_tangent_kernel need no layers, or name them, {who}.layers, in a new directory"
            )
    _refuse_unlike_layers(experiment, student, teacher)


def refuse_other_source(experiment: Experiment, who: Literal["student", "teacher"], make: Maker) -> None:
    """Refuse a module whose source has another SHA-256 than the experiment says; one that says none takes any.

    Raises:
        ExperimentError: naming both.
    """
    part = getattr(experiment, who)
    if part.source is None:
        return
    found = _source(make, _looked_at(make, experiment, experiment.seed_labels[0], who))
    if part.source != found:
        raise ExperimentError(
            f"{who}.module = {part.module!r}: its source has SHA-256 {found} here, and the experiment was begun with "
            f"{part.source}; install the version that it was begun with, or begin in a new directory"
        )


def _of_path(path: str) -> Any:
    """What an import path names if its module was imported already, else None."""
    place, _, name = path.partition(":")
    found: Any = sys.modules.get(place)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _imported(path: str, who: str) -> Maker:
    place, _, name = path.partition(":")
    way_out = f"pass the function that makes it from Python, {who}=..."
    if place == "__main__" or "<" in name:
        raise ExperimentError(f"{who}.module = {path!r}: is not at an import path that other scripts reach; {way_out}")
    try:
        importlib.import_module(place)
    except Exception as error:  # importing runs the user's code, which raises errors of every type
        raise ExperimentError(
            f"{who}.module = {path!r}: {place} cannot be imported ({type(error).__name__}: {error}); install its "
            f"package, add its folder to PYTHONPATH, or {way_out}"
        ) from error
    found = _of_path(path)
    if not _makes_modules(found):
        what = "has no such name" if found is None else f"is {found!r}"
        raise ExperimentError(
            f"{who}.module = {path!r}: {what}; a file, which may be anybody's, can name a class of nn.Module or a "
            f"function that is annotated to return one (-> nn.Module); or {way_out}"
        )
    make: Maker = found
    return make


def _makes_modules(found: Any) -> bool:
    """Whether it is a class of nn.Module or a function annotated to return one: a file can call nothing else."""
    if inspect.isclass(found):
        return issubclass(found, nn.Module)
    if not inspect.isfunction(found):
        return False
    try:
        kind = typing.get_type_hints(found).get("return")
    except Exception:  # annotations are the user's own expressions
        return False
    return inspect.isclass(kind) and issubclass(kind, nn.Module)
