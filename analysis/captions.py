"""What figures say: captions written from the archive, and words in place of keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal, assert_never

import xarray as xr
from tsdyn.analysis import style

from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment

#: Attributes of an archive that what is measured from it keeps.
KEPT = ("name", "digest", "experiment", "tsdyn_version", "study", "scale")
#: How figures number nodes; `tsdyn.analysis.panels.node_numbers` does it.
NODES = "node j has the label j − 1 in the archive"
#: What the rank of a winner is.
RANKS = (
    "rank: of each teacher node's best student node of the last epoch, among all nodes of its layer by their "
    "correlation with that teacher node at each epoch; 0 is the first, 0.5 the middle"
)
#: What stands for the spread over seeds in a figure.
Spread = Literal["curves", "shares", "points", "none"]


def told(archive: xr.Dataset) -> dict[str, Any]:
    """Attributes that captions of what is measured from `archive` are written from: `KEPT`, and ``seeds``."""
    kept = {key: archive.attrs[key] for key in KEPT if key in archive.attrs}
    seeds = archive.sizes.get("seed", archive.attrs.get("seeds"))
    return kept | ({} if seeds is None else {"seeds": int(seeds)})


def telling(measure: Callable[[xr.Dataset], xr.Dataset]) -> Callable[[xr.Dataset], xr.Dataset]:
    """`measure`, whose result keeps what captions are written from."""

    @functools.wraps(measure)
    def measured(archive: xr.Dataset) -> xr.Dataset:
        found = measure(archive)
        return found.assign_attrs(told(archive) | found.attrs)

    return measured


def spread_words(kind: Spread, seeds: int | None) -> str:
    """What stands for the spread over seeds, in a sentence; the same rule for every figure."""
    match kind:
        case "none":
            return ""
        case "shares":
            told = "Bands: Wilson's 95 % intervals of the solid curves' shares; none where all seeds agree"
            if seeds is None:
                return f"{told}."
            reach = 3.84 / (seeds + 3.84)  # z²/(n + z²), the interval's other end at a share of 0
            return f"{told}, for it would reach from 0 to {reach:.2f} or from {1 - reach:.2f} to 1."
        case "points":
            return "One mark per node or seed; every seed is drawn."
        case "curves":
            if seeds is not None and seeds < style.FEWEST_OF_A_BAND:
                return "Thin lines: every seed."
            return "Lines: medians over seeds; bands: the middle 80 % of seeds."
        case other:
            assert_never(other)


def caption(ds: xr.Dataset, says: str, spread: Spread, *, paper: Mapping[str, Any] | None = None) -> str:
    """A figure's caption: what it shows, its spread, and of which experiment; from the attributes of `ds`.

    Args:
        ds: An archive, or what was measured from one.
        says: What the figure shows.
        spread: What stands for the spread over seeds.
        paper: The paper's experiment, where `ds` may come from a smaller one.
    """
    known = ds.sizes.get("seed", ds.attrs.get("seeds"))
    seeds = None if known is None else int(known)  # a number of NumPy's if xarray read it from a file
    parts = [
        says.rstrip(".") + ".",
        "" if seeds is None else f"n = {seeds} seed{'s' * (seeds != 1)}.",
        spread_words(spread, seeds),
    ]
    own = _experiment(ds)
    if own is not None:
        facts = _facts(own)
        said = "; ".join(facts)
        symbol = said.startswith("d = ") or not said[:1].isascii()  # of which a capital is another
        parts.append(f"{said[:1] if symbol else said[:1].upper()}{said[1:]}." if said else "")
        parts.append(_smaller(own, (paper or {}).get("paper")))
    return " ".join(part for part in parts if part)


def _experiment(ds: xr.Dataset) -> Experiment | None:
    """The experiment that made `ds`; None for files that no experiment made, and for parts that are not installed."""
    try:
        return experiment_of(ds)
    except ValueError:
        return None


def number(value: Any) -> str:
    """A number with thousands apart and without trailing zeros."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1e4 else f"{value:g}"


def _swept(experiment: Experiment) -> dict[str, list[Any]]:
    """Keys that differ between points of the sweep, with their values."""
    found: dict[str, list[Any]] = {}
    for key, values in experiment.sweep.items():
        if key == "points":
            for point in values:
                for name, value in point.items():
                    found.setdefault(name, []).append(value)
        elif key == "zip":
            found |= {name: list(each) for name, each in values.items()}
        else:
            found[key] = list(values)
    return found


def rate(value: Any) -> str:
    """A learning rate in words; a schedule with the epochs at which it changes."""
    if not isinstance(value, Mapping):
        return f"rate {number(value)}"
    first, *rest = sorted((int(epoch), rate) for epoch, rate in value.items())
    return f"rate {number(first[1])}" + "".join(f", {number(r)} from epoch {e} on" for e, r in rest)


#: Most values of a key that a caption lists.
_MOST_LISTED = 5
#: The key of the learning rate.
RATE = "training.learning_rate"


def _differing(experiment: Experiment, swept: Container[str]) -> list[str]:
    """Teachers and rates of a sweep over them, in the order of its points; none if there are many."""
    points = [point for _, point in experiment.points()]
    teachers = list(dict.fromkeys("-".join(map(str, p.teacher_widths[1:])) for p in points))
    listed = [point[RATE] for point in experiment.sweep.get("points", ()) if RATE in point]
    rates = [rate(value).removeprefix("rate ") for value in listed]
    told = []
    if "teacher.widths" in swept and 1 < len(teachers) <= _MOST_LISTED:
        told.append(f"teachers {joined(teachers)}")
    if RATE in swept and 1 < len(rates) <= _MOST_LISTED:
        told.append(f"rates, point by point, {joined(f'({r})' if ',' in r else r for r in rates)}")
    return told


def _facts(experiment: Experiment) -> list[str]:
    """d, teacher, N, rate, batch, length: of what is not swept; of teachers and rates that are, a short list."""
    swept = _swept(experiment)
    fixed: dict[str, str] = {}
    if "teacher.widths" not in swept:
        d, *nodes = experiment.teacher_widths
        fixed["teacher.widths"] = f"d = {d} inputs; teacher {'-'.join(map(str, nodes))}"
    else:
        inputs = {point.teacher_widths[0] for _, point in experiment.points()}
        fixed |= {"inputs": f"d = {inputs.pop()} inputs"} if len(inputs) == 1 else {}
    if experiment.kind == "training":
        if experiment.student.widths is None:
            fixed["student.overrealization"] = words("overrealization", experiment.student.overrealization)
        train = experiment.data.train
        fixed["data.train"] = "new samples at every step" if train == "fresh" else f"N = {number(train)} samples"
        fixed[RATE] = rate(experiment.training.learning_rate)
        fixed["training.batch"] = f"batch {experiment.training.batch}"
        epochs = experiment.training.epochs
        length = f"{epochs} epoch{'s' * (epochs != 1)}"
        steps = {point.steps for _, point in experiment.points()}
        fixed["training.epochs"] = f"{length} of {number(steps.pop())} steps" if len(steps) == 1 else length
        if experiment.teacher.init == "luck-matters":
            fixed["teacher.init"] = "teacher and inputs of Tian et al. (2019)"
    names = {point.student.activation for _, point in experiment.points()}
    if names != {"relu"} and len(names) == 1:
        fixed["σ"] = f"σ = {names.pop()}"
    if experiment.kind == "population-flow":
        fixed["flow"] = "gradient flow of the population loss, d = k + 1 Gaussian inputs, orthonormal teacher"
    elif experiment.kind == "online":
        fixed[RATE] = rate(experiment.training.learning_rate)
    differing = _differing(experiment, swept) if experiment.kind == "training" else []
    return [text for key, text in fixed.items() if key not in swept] + differing


#: Swept keys that follow from others at each scale, and of which captions do not compare the values.
_CONSEQUENCES = frozenset({RATE, "training.steps_per_epoch"})


def _lacking(key: str, ours: Sequence[Any], papers: Sequence[Any]) -> str:
    """What the paper's values of a swept key have that `ours` lack: a larger end, or how many more; empty if nothing.

    Of widths those of hidden layers are compared.
    """
    if key.endswith(".widths"):
        ours, papers = ([list(widths)[1:-1] for widths in values] for values in (ours, papers))
    distinct = [value for i, value in enumerate(papers) if value not in papers[:i]]
    missing = [value for value in distinct if value not in ours]
    if not missing:
        return ""
    if key == "data.leave_out.subset":
        return f"{number(len(distinct))} subsets"
    whose = f"{key.split('.')[0]} nodes" if key.endswith(".widths") else key_words(key.split(".")[-1])
    single = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in missing]
    numbers = _only_numbers(single)
    if len(numbers) == len(missing) and max(numbers) > max(_only_numbers(ours), default=-math.inf):
        return f"{whose} up to {number(max(numbers))}"
    if all(isinstance(value, list) for value in single):
        return f"hidden {whose} {joined('-'.join(map(str, value)) for value in single)}"
    counted = "number" if key.endswith(".widths") else "value"
    return f"{len(missing)} more {counted}{'s' * (len(missing) > 1)} of {whose}"


def _only_numbers(values: Sequence[Any]) -> list[float | int]:
    """The numbers among values, those in lists of one, too."""
    single = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return [value for value in single if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _smaller(own: Experiment, paper: Any) -> str:
    """In what the paper's scale is larger than `own`."""
    if not isinstance(paper, Experiment) or paper.digest == own.digest:
        return ""
    ours, papers = _swept(own), _swept(paper)
    swept = ours.keys() | papers.keys()
    pairs: list[tuple[Any, Any, str]] = [(len(own.seed_labels), len(paper.seed_labels), "seeds")]
    if own.kind == "training":
        pairs.append((own.training.epochs, paper.training.epochs, "epochs"))
        mine, theirs = own.data.train, paper.data.train
        if "data.train" not in swept and "fresh" not in (mine, theirs):
            pairs.append((mine, theirs, "samples"))
        teacher, bigger = ("-".join(map(str, e.teacher_widths[1:-1])) for e in (own, paper))
        if "teacher.widths" not in swept:
            pairs.append((teacher, bigger, "as hidden widths of the teacher"))
        ratio, larger = (f"{e.student.overrealization:g}x" for e in (own, paper))
        if "student.overrealization" not in swept:
            pairs.append((ratio, larger, "as many student nodes as teacher nodes"))
    more = [f"{number(theirs)} {what}" for mine, theirs, what in pairs if mine != theirs]
    more += [_lacking(key, ours[key], papers[key]) for key in ours if key in papers and key not in _CONSEQUENCES]
    more = [text for text in more if text]
    return f"Reduced: --scale paper has {joined(more)}." if more else ""


#: Words for the values of some keys.
_VALUES: Mapping[str, Mapping[Any, str]] = {
    "batch_norm": {"none": "no BatchNorm", "after": "with BatchNorm", "before": "BatchNorm before activation"},
    "augment": {"none": "without augmentation", "agnostic": "teacher-agnostic", "aware": "teacher-aware"},
    "loss": {"mse": "squared error", "cross_entropy": "cross entropy"},
    "method": {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"},
}  # fmt: skip
#: Words around the value of some keys.
_KEYS: Mapping[str, str] = {
    "overrealization": "{}x as many student nodes as teacher nodes",
    "polarity": "polarity p = {}",
    "learning_rate": "rate {}",
    "batch": "batch {}",
    "seed": "seed {}",
    "layer": "layer {}",
    "epoch": "epoch {}",
    "init": "start {}",
}


def words(key: str, value: Any) -> str:
    """What a figure says of a swept key's value, such as ``5x as many student nodes as teacher nodes``."""
    if key in _VALUES and value in _VALUES[key]:
        return _VALUES[key][value]
    if key == "train":
        return "new samples at every step" if value == "fresh" else f"N = {number(_as_number(value))}"
    if key == "widths":
        return f"widths {value}"
    if key in ("moment", "class", "point", "training data"):
        return str(value)
    shown = number(value) if isinstance(value, (int, float)) else str(value)
    return _KEYS[key].format(shown) if key in _KEYS else f"{key.replace('_', ' ')} {shown}"


#: Words for keys, as on an axis.
_AXES: Mapping[str, str] = {
    "overrealization": "student nodes per teacher node",
    "polarity": "polarity p",
    "train": "training samples N",
    "learning_rate": "learning rate",
    "batch_norm": "BatchNorm",
}


def key_words(key: str) -> str:
    """What an axis says of a swept key."""
    return _AXES.get(key, key.replace("_", " "))


def _as_number(value: Any) -> Any:
    return int(value) if str(value).isdigit() else value


def joined(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = list(parts)
    return f"{', '.join(first)} and {last}" if first else last


def provenance(ds: xr.Dataset, command: str = "") -> dict[str, str]:
    """What a file's metadata says of where a figure comes from; no paths."""
    found = {key: str(ds.attrs[key]) for key in ("name", "digest", "tsdyn_version") if key in ds.attrs}
    return found | ({"command": command} if command else {})
