"""Rules that take several keys of an experiment: one small function each, in tables by kind.  Imports no torch.

A rule returns None, or, if the experiment breaks it, a message naming key, value, rule and way out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tsdyn import schema
from tsdyn.experiment.branching import Fork
from tsdyn.experiment.errors import keys, nearest
from tsdyn.experiment.parts import IMAGES, MAX_SEEDS, LeaveOut, Record
from tsdyn.experiment.sweep_axes import axes, swept_keys
from tsdyn.vocabulary import VARIABLES, Kind

if TYPE_CHECKING:
    from tsdyn.experiment.experiment import Experiment

#: The most points that a sweep may have; each is a run.
MAX_POINTS = 100_000
Rule = Callable[["Experiment"], str | None]

#: Activations for which `flow.order_parameters` has the second moment of the update in closed form.
FLUCTUATING = ("erf", "identity", "relu")
_COMMON = ("kind", "name", "seeds", "dtype", "sweep")
_SIZES = (
    "teacher.widths",
    "teacher.init",
    "student.widths",
    "student.overrealization",
    "student.activation",
    "student.leak",
)
#: Kind → the keys that it knows; training knows all keys but those of the sections in `OWN`.
KNOWN: Mapping[Kind, tuple[str, ...]] = {
    "population-flow": (*_COMMON, *_SIZES, "flow.inputs", "flow.times"),
    "online": (
        *_COMMON,
        *_SIZES,
        "training.learning_rate",
        "online.inputs",
        "online.noise",
        "online.layers",
        "online.last",
        "online.points",
    ),
}
#: Section → the only kind that has it.
OWN = {"flow": "population-flow", "online": "online"}

_NO_FORK = Fork()


def known(kind: Kind, key: str) -> bool:
    """Whether experiments of `kind` have this dotted key, or keys in this section."""
    if kind == "training":
        return key != "kind" and key.split(".")[0] not in OWN
    return any(one == key or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in KNOWN[kind])


def only_known(kind: Kind, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested dict `values` without the keys that `kind` does not know."""
    found = {}
    for name, value in values.items():
        if known(kind, prefix + name):
            deeper = isinstance(value, dict) and prefix + name != "sweep"
            found[name] = only_known(kind, value, f"{prefix}{name}.") if deeper else value
    return found


def _given(part: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in sorted(part.model_fields_set):
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name


# --- every kind ----------------------------------------------------------------------------------------------


def _keys_of_the_kind(e: Experiment) -> str | None:
    if e.kind == "training" and not OWN.keys() & e.model_fields_set:
        return None  # it knows all others
    unknown = [key for key in _given(e) if key != "kind" and not known(e.kind, key)]
    if not unknown:
        return None
    key, section = unknown[0], unknown[0].split(".")[0]
    if e.kind == "training":
        return f"{key}: is a key of kind = {OWN[section]!r}; set that kind, or leave [{section}] out"
    siblings = [one for one in KNOWN[e.kind] if one.startswith(f"{section}.")] or KNOWN[e.kind]
    return f"{key}: kind = {e.kind!r} does not know this key{nearest(key, siblings)}; it has {', '.join(siblings)}"


def _seeds(e: Experiment) -> str | None:
    if isinstance(e.seeds, int) and e.seeds > MAX_SEEDS:
        return f"seeds = {e.seeds}: at most {MAX_SEEDS} members per run"
    if len(set(e.seed_labels)) != len(e.seed_labels):
        repeated = [before for before, after in itertools.pairwise(sorted(e.seed_labels)) if before == after]
        return f"seeds: labels repeat: {', '.join(map(str, dict.fromkeys(repeated[:5])))}"
    return None


def _one_of_widths_and_ratio(e: Experiment) -> str | None:
    own = e.student.module is not None or "student.module" in swept_keys(e.sweep)
    if own and e.student.widths is None and e.student.overrealization is None:
        return None
    if (e.student.widths is None) == (e.student.overrealization is None):
        return "student: give either widths or overrealization"
    return None


def _depths(e: Experiment) -> str | None:
    student, teacher = e.student_widths, e.teacher_widths
    if len(student) == len(teacher) or e.of_own_modules:
        return None
    return (
        f"student.widths = {list(student)} has {len(student) - 1} layers and teacher.widths = "
        f"{list(teacher)} has {len(teacher) - 1}: layers are compared one to one, so depths must agree"
    )


def _ends(e: Experiment) -> str | None:
    student, teacher = e.student_widths, e.teacher_widths
    for which, index in (("input", 0), ("output", -1)):
        if student[index] != teacher[index]:
            return (
                f"student.widths = {list(student)} and teacher.widths = {list(teacher)} differ at the {which}: "
                f"{student[index]} against {teacher[index]}; a student learns from the teacher's own "
                "inputs and outputs"
            )
    return None


# --- training ------------------------------------------------------------------------------------------------


def _asked(e: Experiment) -> frozenset[str]:
    """The schema's own variables that are to be recorded; `observables.registry.load` checks others."""
    return _own_variables(tuple(e.record.observables))


@lru_cache(maxsize=64)
def _own_variables(observables: tuple[str, ...]) -> frozenset[str]:
    return frozenset(schema.expand(observables)) & frozenset(VARIABLES)


def _own_modules_record(e: Experiment) -> str | None:
    if e.record.observables == Record().observables and not e.complete:
        return None  # a file that leaves the observables open: `own_modules.described` chooses those of modules
    there = schema.recordable(own=e.student.module is not None, bare_teacher=e.teacher.module is not None)
    unknown = _asked(e) - set(there)
    if not unknown:
        return None
    return (
        f"record.observables: {', '.join(sorted(unknown))} is not measured with student.module = "
        f"{e.student.module!r} and teacher.module = {e.teacher.module!r}; there are {', '.join(there)}"
    )


def _own_modules(e: Experiment) -> str | None:
    """Refuse what an experiment with a module of the user's own cannot have."""
    for who, part in (("student", e.student), ("teacher", e.teacher)):
        if part.module is None and (part.layers is not None or part.shapes is not None):
            return (
                f"{who}.layers: names layers of a module of your own, and there is no {who}.module; name the function "
                f"that makes it, too, {who}.module = 'package.module:name', also where it is passed, {who}=..., or "
                "leave the layers out"
            )
    if not e.of_own_modules:
        return None
    own, taught = e.student.module is not None, e.teacher.module is not None
    near = ("near-teacher", "same-direction", "same-sign")
    refused = {
        "training.method = 'flow'": e.training.method == "flow",
        f"data.augment = {e.data.augment!r}": e.data.adds_samples,
        "convolutions or BatchNorm of the experiment file": e.deep,
        "training.frozen, normalize and rates": own
        and bool(e.training.frozen or e.training.normalize or e.training.rates),
        # a module of the user's own starts as it is made
        f"student.init = {e.student.init!r}": e.student.init != "gaussian" if own else e.student.init in near,
        "teacher.init, prune and balanced": taught
        and (e.teacher.init in ("trained", "file") or bool(e.teacher.prune) or e.teacher.balanced),
    }
    for who, part in (("student", e.student), ("teacher", e.teacher)):
        if (part.source is None) != (part.numbers is None):
            return f"{who}.source and {who}.numbers are written by tsdyn, both or neither; leave them out"
        if part.shapes is not None and (part.source is None or len(part.shapes) != len(part.layers or ())):
            return f"{who}.shapes is written by tsdyn, one per layer; leave it out"
    what = next((what for what, there in refused.items() if there), None)
    return what and f"{what}: works for networks that tsdyn makes only, and here a module is the user's own"


def _starts_from_teacher(e: Experiment) -> str | None:
    student, teacher = e.student_widths, e.teacher_widths
    if e.student.init not in ("near-teacher", "same-direction", "same-sign") or student == teacher:
        return None
    return (
        f"student.init = {e.student.init!r}: starts from the teacher's parameters, so widths must agree: "
        f"{list(student)} and {list(teacher)}; set student.overrealization = 1"
    )


def _shrink(e: Experiment) -> str | None:
    if e.training.normalize and e.student.shrink != 1.0:
        return f"training.normalize keeps hidden rows at norm 1, which student.shrink = {e.student.shrink} would undo"
    return None


def _frozen(e: Experiment) -> str | None:
    depth = len(e.student_widths) - 1
    if any(layer > depth for layer in e.training.frozen):
        return f"training.frozen = {list(e.training.frozen)}: layers are 1..{depth}"
    return None


def _rates(e: Experiment) -> str | None:
    depth, rates = len(e.student_widths) - 1, e.training.rates
    if rates is not None and e.student.module is None and len(rates) != depth:
        return f"training.rates = {list(rates)}: one factor per layer, and the student has {depth}"
    return None


def _nesterov(e: Experiment) -> str | None:
    if e.training.nesterov and (e.training.method not in ("sgd", "gd") or not e.training.momentum):
        return (
            f"training.nesterov = true: changes the momentum of 'sgd' and 'gd', and here are method = "
            f"{e.training.method!r} and momentum = {e.training.momentum}; set training.momentum, or leave nesterov out"
        )
    return None


def _clipped_flow(e: Experiment) -> str | None:
    training = e.training
    asked = {
        "clip": training.clip is not None,
        "rates": training.rates is not None,
        "decay_biases": not training.decay_biases,
    }
    for key, there in asked.items():
        if training.method == "flow" and there:
            return f"training.{key}: gradient flow of J has none; use training.method = 'gd'"
    return None


def _decay(e: Experiment) -> str | None:
    if not e.training.decay_biases and not e.training.weight_decay:
        return "training.decay_biases = false: there is no weight decay; set training.weight_decay, or leave it out"
    return None


def _warm_up(e: Experiment) -> str | None:
    if e.training.warm_up > e.training.epochs:
        return f"training.warm_up = {e.training.warm_up}: is longer than training.epochs = {e.training.epochs}"
    return None


def _stop(e: Experiment) -> str | None:
    stop = e.training.stop
    if stop is None:
        return None
    recorded = schema.expand(e.record.observables)
    if stop.variable not in recorded:
        return (
            f"training.stop.variable = {stop.variable!r}: is not recorded{nearest(stop.variable, recorded)}; add it to "
            "record.observables"
        )
    if stop.variable in VARIABLES and VARIABLES[stop.variable].dims != ("seed", "epoch"):
        dims = ", ".join(VARIABLES[stop.variable].dims)
        return f"training.stop.variable = {stop.variable!r}: has dimensions {dims}; take one of (seed, epoch)"
    return None


def _images(e: Experiment) -> str | None:
    teacher, image = e.teacher_widths, e.data.image or IMAGES.get(e.data.law)
    if image is not None and math.prod(image) != teacher[0]:
        return (
            f"teacher.widths = {list(teacher)}: {e.data.law} has {math.prod(image)} inputs ({image}), not {teacher[0]}"
        )
    if e.teacher.convolution and image is None:
        return "teacher.convolution: needs the shape of its images; set data.image = [channel, row, column]"
    try:
        e.weight_shapes(e.student_widths)
    except ValueError as error:  # where images become smaller than kernels
        return str(error)
    return None


def _trained_teacher(e: Experiment) -> str | None:
    if e.teacher.init == "trained" and e.data.drawn:
        return f"teacher.init = 'trained': trains on labels, and data.law = {e.data.law!r} has none"
    return None


def _labels(e: Experiment) -> str | None:
    if e.training.of_data and (e.training.loss == "mse" or e.data.drawn):
        return (
            f"training.labels = 'data': needs training.loss = 'cross_entropy' and data with labels; they are "
            f"{e.training.loss!r} and data.law = {e.data.law!r}"
        )
    if e.training.of_data and e.data.adds_samples:
        return f"training.labels = 'data': points of data.augment = {e.data.augment!r} have no label"
    if "label_accuracy" in schema.expand(e.record.observables) and e.data.drawn:
        return f"record.observables: label_accuracy needs labels; data.law = {e.data.law!r} has none"
    return None


def _wrong_targets(e: Experiment) -> str | None:
    data, loss = e.data, e.training.loss
    if data.noise and data.flip:
        return f"data.noise = {data.noise}: is of numbers, and data.flip = {data.flip} of classes; give one of them"
    if data.noise and loss == "cross_entropy":
        return f"data.noise = {data.noise}: training.loss = 'cross_entropy' has classes as targets; use data.flip"
    if data.flip and loss == "mse":
        return f"data.flip = {data.flip}: training.loss = 'mse' has no classes; use 'cross_entropy', or data.noise"
    if data.flip and e.teacher_widths[-1] < 2:
        return f"data.flip = {data.flip}: teacher.widths = {list(e.teacher_widths)} has one class, so none is wrong"
    return None


def _deep(e: Experiment) -> str | None:
    if not e.deep:
        return None
    if e.data.adds_samples:
        return f"data.augment = {e.data.augment!r}: is of fully connected layers without BatchNorm"
    there = schema.recordable(deep=True)
    unknown = _asked(e) - set(there)
    if unknown:
        return (
            f"record.observables: {', '.join(sorted(unknown))} is not measured of convolutions and BatchNorm; "
            f"there are {', '.join(there)}; theory has the others on Network.folded()"
        )
    return None


def _batch_norm(e: Experiment) -> str | None:
    if e.student.batch_norm != "none" and e.training.batch == 1 and e.training.method != "gd":
        return (
            f"training.batch = 1 with student.batch_norm = {e.student.batch_norm!r}: one sample has no "
            "variance; use batches of two samples or more"
        )
    return None


def _batch(e: Experiment) -> str | None:
    train = e.data.train
    if isinstance(train, int) and not e.training.whole and e.training.batch > train:
        return f"training.batch = {e.training.batch} is more than data.train = {train} samples"
    return None


def _whole_data(e: Experiment) -> str | None:
    if e.data.train == "fresh" and e.training.whole:
        way = "; kind = 'population-flow' needs none" if e.training.method == "flow" else ""
        return f"training.method = {e.training.method!r} needs finite data; data.train is 'fresh'{way}"
    return None


def _flow_method(e: Experiment) -> str | None:
    if e.training.method == "flow" and (e.deep or e.dtype != "float64"):
        return (
            f"training.method = 'flow': dtype = {e.dtype!r}{', convolutions or BatchNorm' * e.deep}; it "
            "integrates fully connected students in float64, others learn by 'gd'"
        )
    return None


def _leave_out(e: Experiment) -> str | None:
    given, data = e.data.leave_out, e.data
    if given == LeaveOut():
        return None
    if given.subsets is None or given.share is None:
        return f"data.leave_out = {given.model_dump(exclude_none=True)}: give subsets and share"
    if given.subset is not None and given.subset >= given.subsets:
        return f"data.leave_out.subset = {given.subset}: there are subsets 0..{given.subsets - 1}"
    if data.train == "fresh" or data.augment != "none":
        what = "train = 'fresh'" if data.train == "fresh" else f"augment = {data.augment!r}"
        return f"data.leave_out: data.{what} has no samples that stay the same; give a number of samples"
    if round(given.share * data.train) >= data.train:
        return f"data.leave_out.share = {given.share}: nothing of {data.train} samples would be left"
    served = ("sgd", "gd", "adam", "adamw")
    if e.deep or e.student.module is not None or e.training.clip is not None or e.training.method not in served:
        return (
            "data.leave_out: is for fully connected students without BatchNorm and clipping, with training.method "
            + ", ".join(served)
        )
    return None


def _fork(e: Experiment) -> str | None:
    if e.fork.parent is None:
        return "fork: give fork.parent, the directory it branches off (tsdyn.fork does)" if e.fork != _NO_FORK else None
    if e.fork.fork_epoch > e.training.epochs:
        return f"fork.fork_epoch = {e.fork.fork_epoch}: the run has {e.training.epochs} epochs"
    if e.student.module is not None:
        return _fork_of_own_modules(e)
    for kind, given in e.fork.perturb.items():
        layer = given.get("layer") if isinstance(given, Mapping) and kind != "set" else None
        widths = e.student_widths
        if layer is not None and layer >= len(widths):
            return f"fork.perturb.{kind}.layer = {layer}: the student has layers 1..{len(widths) - 1}"
        if layer is not None and kind != "weight" and layer == len(widths) - 1:
            return f"fork.perturb.{kind}.layer = {layer}: is the output layer; a node of a hidden layer is meant"
        nodes = [] if layer is None else [given[k] for k in ("node", "to") if k in given] + list(given.get("nodes", ()))
        for node in nodes:
            if layer is not None and not 0 <= node < widths[layer]:
                return f"fork.perturb.{kind}: node {node} is none of the {widths[layer]} of layer {layer}"
        if kind == "transplant" and given["seed"] not in e.seed_labels:
            return f"fork.perturb.transplant.seed = {given['seed']}: is none of the run's seeds"
    return None


def _fork_of_own_modules(e: Experiment) -> str | None:
    for kind, given in e.fork.perturb.items():
        if kind not in ("gaussian", "weight", "set"):
            return (
                f"fork.perturb.{kind}: which numbers of a module of your own belong to a node is not known; change "
                "gaussian, weight or set"
            )
        if kind != "weight":
            continue
        layer, node, shapes = given["layer"], given["node"], e.student.shapes or ()
        if layer > len(shapes):
            return (
                f"fork.perturb.weight.layer = {layer}: the student has {len(shapes)} labelled layers (student.layers)"
            )
        if node >= shapes[layer - 1][0]:
            return f"fork.perturb.weight: node {node} is none of the {shapes[layer - 1][0]} of layer {layer}"
    return None


def _fresh(e: Experiment) -> str | None:
    if e.data.train == "fresh" and e.training.steps_per_epoch is None:
        return "training.steps_per_epoch: needed with data.train = 'fresh'"
    if e.data.train == "fresh" and e.data.augment != "none":
        return f"data.augment = {e.data.augment!r}: needs finite data; data.train is 'fresh'"
    return None


def _augmented(e: Experiment) -> str | None:
    if e.data.augment == "crop-flip" and e.training.whole:
        return "data.augment = 'crop-flip': moves images anew at every step; use 'sgd' or 'adam'"
    if e.data.augment == "aware" and (e.training.steps_per_epoch is None or e.training.whole):
        return (
            "data.augment = 'aware': how many samples it adds depends on the teacher, so members have training "
            "sets of different size; give training.steps_per_epoch, with 'sgd' or 'adam'"
        )
    return None


# --- population flows and online learning --------------------------------------------------------------------


def _two_layers_one_output(e: Experiment) -> str | None:
    if len(e.teacher_widths) != 3 or e.teacher_widths[-1] != 1:
        return (
            f"teacher.widths = {list(e.teacher_widths)}: kind = {e.kind!r} is of two layers and one output, (d, k, 1)"
        )
    return None


def _double(e: Experiment) -> str | None:
    if e.dtype != "float64":
        return f"dtype = {e.dtype!r}: kind = {e.kind!r} computes in float64"
    return None


def _orthonormal(e: Experiment) -> str | None:
    if e.teacher.init != "orthonormal":
        return (
            f"teacher.init = {e.teacher.init!r}: kind = 'population-flow' has an orthonormal teacher; say 'orthonormal'"
        )
    inputs, nodes = e.teacher_widths[:2]
    if inputs < nodes:
        return (
            f"teacher.widths = {list(e.teacher_widths)}: {inputs} inputs are too few for {nodes} orthonormal nodes; "
            f"it needs at least {nodes}"
        )
    return None


def _gaussian(e: Experiment) -> str | None:
    if e.teacher.init != "gaussian":
        return f"teacher.init = {e.teacher.init!r}: kind = 'online' draws teachers N(0, 1); say 'gaussian'"
    inputs, nodes, taught = e.student_widths[0], e.student_widths[1], e.teacher_widths[1]
    if inputs < nodes + taught:
        return f"online.inputs = {inputs}: is too small for {nodes} student and {taught} teacher nodes"
    return None


def _fluctuation(e: Experiment) -> str | None:
    if e.student.activation not in FLUCTUATING:
        return (
            f"student.activation = {e.student.activation!r}: the equation of kind = 'online' has a form for "
            f"{', '.join(FLUCTUATING)}; flow.online simulates others"
        )
    return None


def _one_rate(e: Experiment) -> str | None:
    if not isinstance(e.training.learning_rate, float):
        return f"training.learning_rate = {e.training.learning_rate}: kind = 'online' has one rate"
    return None


#: Rules of every experiment, sweeps included ...
ALWAYS: tuple[Rule, ...] = (_keys_of_the_kind, _seeds, _one_of_widths_and_ratio)
#: ... and kind → rules of an experiment without a sweep; the message is that of the first broken rule.
RULES: Mapping[Kind, tuple[Rule, ...]] = {
    "training": (
        _own_modules_record,
        _own_modules,
        _depths,
        _ends,
        _starts_from_teacher,
        _shrink,
        _frozen,
        _rates,
        _nesterov,
        _clipped_flow,
        _decay,
        _warm_up,
        _stop,
        _images,
        _trained_teacher,
        _labels,
        _wrong_targets,
        _deep,
        _batch_norm,
        _batch,
        _whole_data,
        _flow_method,
        _fresh,
        _fork,
        _leave_out,
        _augmented,
    ),
    "population-flow": (_two_layers_one_output, _depths, _ends, _double, _orthonormal),
    "online": (_two_layers_one_output, _depths, _ends, _double, _gaussian, _fluctuation, _one_rate),
}


def broken(experiment: Experiment) -> str | None:
    """The message of the first rule that an experiment breaks; None if it breaks none."""
    rules = ALWAYS if experiment.sweep else (*ALWAYS, *RULES[experiment.kind])
    return next((said for rule in rules if (said := rule(experiment)) is not None), None)


def _number_as_such(value: Any) -> Any:
    """`value` with 1.0 replaced by 1 everywhere inside: both are the same point of a sweep."""
    if isinstance(value, Mapping):
        return {key: _number_as_such(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_number_as_such(of) for of in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_sweep(experiment: Experiment, model: type[BaseModel]) -> None:
    """Refuse a sweep of unknown keys, of repeated values or of too many points.

    Raises:
        ValueError: naming the key, the repeated values or the number of points.
    """
    if not experiment.sweep:
        return
    there = [key for key in keys(model) if known(experiment.kind, key)]
    for key in swept_keys(experiment.sweep):
        if key.split(".")[-1] in ("made", "source", "numbers", "shapes"):
            raise ValueError(f"sweep: {key!r} is written by tsdyn; sweep the module or its arguments")
        section, _, rest = key.partition(".arguments.")
        if rest and f"{section}.arguments" in there:  # a number of a part that a package offers
            continue
        if key not in there or key in _COMMON:
            raise ValueError(
                f"sweep: {key!r} is not a key that can be swept{nearest(key, [k for k in there if '.' in k])}"
            )
    for axis in axes(experiment.sweep):
        if len({json.dumps(_number_as_such(v), sort_keys=True, default=str) for v in axis.values}) != len(axis.values):
            shown = [v[0] if len(v) == 1 else list(v) for v in axis.values]
            raise ValueError(f"sweep: values of {', '.join(map(repr, axis.keys))} repeat: {shown}")
    points = math.prod(len(axis.values) for axis in axes(experiment.sweep))
    if points > MAX_POINTS:
        raise ValueError(f"sweep: has {points} points, each of which is a run; at most {MAX_POINTS}")
