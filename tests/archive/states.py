"""What people do to a directory of tsdyn's, in any order, against a model: the numbers of an undisturbed run.

`Directory` is a Hypothesis state machine.  Its rules run, kill, resume, extend, validate, repair, open, copy, move,
damage and exchange; the model knows which epochs were reported as committed, what was damaged, and every number.
After each rule three things must hold.  What is shown under a label is the model's number: the same bits if the engine
is the same, rounding otherwise.  No committed epoch is lost unless a rule damaged its bytes, and that is then said.
What is refused is refused in a sentence of the library's own.  The suite makes 100 steps, `python -m tests.torture`
2,000.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import tsdyn
from tests.cases import small
from tsdyn.archive import integrity, sweep_directory, whole_files
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT, SEGMENTS, RunDirectory, segment_epochs
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.engine import native
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import places
from tsdyn.growing import adding
from tsdyn.running import runner
from tsdyn.running.interrupts import Stopped

#: What the library raises on purpose, in a sentence.
SENTENCES = (ArchiveError, ExperimentError)
DATA = Path(__file__).resolve().parent.parent / "data"
#: Epochs that a run can be extended by in all.
MORE = 4
#: Seeds that a run can gain in all, and an observable that is measured after the run.
MORE_SEEDS, LATER = 2, "correlation"
#: Seconds after which a child counts as hung.
HUNG = 120
#: Another engine, or another machine, sums in another order: a few thousand roundings of numbers of order 1, divided by
#: Adam's ε at worst.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}

TINY = small(
    seeds=2,
    teacher__widths=[4, 2, 2],
    student__overrealization=1.0,
    data__train=12,
    data__eval=8,
    training__epochs=3,
    training__steps_per_epoch=2,
    training__batch=4,
    training__momentum=0.9,
    record__observables=["mse", "weight"],
)
#: How a directory may begin: name → experiment of a new one, or a directory that an earlier version wrote.
STARTS: dict[str, Experiment | Path] = {
    "run": TINY,
    "seldom": TINY.replace({"record.every": 2}),
    "teacher file": TINY.replace({
        "teacher.init": "file", "teacher.path": "teacher.pt", "teacher.activation": "relu",
    }),
    "sweep": TINY.replace({"training.epochs": 2, "sweep": {"teacher.polarity": [0.0, 1.0]}}),
    **{
        name: DATA / name
        for name in ("archive-v1", "unfinished-v1", "archive-v2", "unfinished-v2", "sweep-v2", "points-v2",
                     "cross-entropy-v2")
    },
}  # fmt: skip

#: Rules that were applied in this process, by name, and those that found nothing to do.
steps: Counter[str] = Counter()


@functools.cache
def teacher(which: int) -> bytes:
    """A file of teacher weights."""
    draw = torch.Generator().manual_seed(which)
    shapes = {"0.weight": (2, 4), "0.bias": (2,), "2.weight": (2, 2), "2.bias": (2,)}
    weights = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(weights, file.name)
        return Path(file.name).read_bytes()


@functools.cache
def _undisturbed(text: str, which: int) -> xr.Dataset:
    experiment = Experiment.from_toml_text(text, archived=True)
    labels = experiment.seed_labels
    changes: dict[str, Any] = {
        "training.epochs": experiment.training.epochs + MORE, "record.every": 1,
        "seeds": [*labels, *(max(labels) + 1 + i for i in range(MORE_SEEDS))],
        "record.observables": [*experiment.record.observables, LATER],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tsdyn-model-") as scratch:
        if experiment.teacher.path is not None:
            changes["teacher.path"] = str(Path(scratch) / "teacher.pt")
            Path(changes["teacher.path"]).write_bytes(teacher(which))
        return tsdyn.run(experiment.replace(changes), Path(scratch) / "run").load()


@dataclass
class Point:
    """What is known of one run of the directory."""

    place: tuple[int, ...]
    single: Experiment
    required: set[int] = field(default_factory=set)  #: epochs that were reported as committed, and recorded
    rounded: float = float("inf")  #: the first epoch that another engine, or another machine, may have computed
    born: int = 0  #: the teacher file with which it began
    salvaged: bool = False  #: parts of its archive were lost, and `repair` said so
    seeds: set[int] = field(default_factory=set)  #: seeds that it was reported to have
    inexact: set[int] = field(default_factory=set)  #: seeds, added later, that another engine may have computed

    def members(self, shown: list[int]) -> Iterator[tuple[list[int], bool]]:
        """The shown seeds in two groups: those that must be there, and those that may be."""
        yield from (
            (group, must)
            for must in (True, False)
            if (group := [seed for seed in shown if (seed in self.seeds) == must])
        )

    @property
    def truth(self) -> xr.Dataset:
        named = {} if self.single.teacher.path is None else {"teacher.path": "teacher.pt"}
        return _undisturbed(self.single.replace(named).to_toml(), self.born)


@dataclass
class Damage:
    """Files that a rule changed: path below the directory → content before and after; None where there is no file.

    Attributes:
        kind: ``bytes``, ``checksum`` (a checksum was removed) or ``experiment``.
        first: Epochs of `point` from this one on can be lost with it; None for none.
    """

    kind: str
    files: dict[str, tuple[bytes | None, bytes | None]]
    point: str | None = None
    first: int | None = None
    required: dict[str, set[int]] = field(default_factory=dict)


@dataclass
class Opened:
    """A lazy Dataset, and whether it must still be readable."""

    ds: xr.Dataset
    points: dict[str, Point]
    must: bool = True


def _differs(found: np.ndarray, model: np.ndarray, exact: bool) -> str:
    """How numbers differ from the model's; empty if they do not.  Beyond the model's shape is padding."""
    inside = np.full(model.shape, np.nan)  # narrower where a wider point is damaged and left out
    part = found[tuple(slice(n) for n in model.shape)]
    inside[tuple(slice(n) for n in part.shape)] = part
    if np.isfinite(found).sum() > np.isfinite(inside).sum():
        return "numbers beyond the layer's nodes"
    there = ~np.isnan(inside)
    alike = inside == model if exact else np.isclose(inside, model, **ROUNDING)
    if not (alike | ~there | np.isnan(model)).all() or (there & np.isnan(model)).any():
        return f"other numbers: {inside} instead of {model}"
    lost = np.isnan(inside) & ~np.isnan(model)
    return ("partly missing" if there.any() else "missing") if lost.any() else ""


def _allowed(condition: bool, words: str) -> None:
    if not condition:
        raise AssertionError(words)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True)
class End:
    """How a child ended: ``done``, ``refused`` (in a sentence), ``stopped``, ``killed``, or else badly."""

    how: str
    words: str
    told: list[tuple[str, int]]


def child(work: Callable[[], None], path: Path) -> End:
    """`work` in a forked child, which reports each commit below `path`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        how, words = "traceback", ""
        try:
            os.close(reading)
            signal.alarm(HUNG)
            logging.getLogger("tsdyn").setLevel(logging.CRITICAL)
            _tell_commits(path, writing)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
            how = "done"
        except SENTENCES as error:
            how, words = "refused", str(error)
        except Stopped:
            how = "stopped"
        except BaseException:
            words = traceback.format_exc()
        finally:
            os.write(writing, json.dumps({"end": how, "words": words}).encode() + b"\n")
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = [json.loads(line) for line in pipe.read().splitlines()]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = [(line["point"], line["last"]) for line in lines if "point" in line]
    if code:
        names = {-signal.SIGKILL: "killed", -signal.SIGALRM: "hung"}
        return End(names.get(signal.Signals(code) if code > 0 else code, "crashed"), f"exit {code}", told)
    return End(lines[-1]["end"], lines[-1]["words"], told)


def _tell_commits(path: Path, pipe: int) -> None:
    commit = RunDirectory.commit

    def telling(self: RunDirectory, first: int, last: int, *rest: Any) -> None:
        commit(self, first, last, *rest)
        if self.path.name == "added":  # of seeds that are not there yet
            return
        name = "." if self.path == path else self.path.name
        os.write(pipe, json.dumps({"point": name, "last": last}).encode() + b"\n")
        if name in _dying and _dying[name] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.commit = telling  # type: ignore[method-assign]
    runner.COMMIT_SECONDS = 0.0


#: In a child: point → the epoch after whose commit it dies.
_dying: dict[str, int] = {}


def die_at(moment: int, path: Path) -> None:
    """From here on this process is killed at the `moment`-th time that it looks at a file below `path`."""
    seen, process = [0], os.getpid()

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir") and str(
            given[0]
        ).startswith(str(path)):
            seen[0] += 1
            if seen[0] == moment:
                os.kill(process, signal.SIGKILL)  # joining has a process of its own, which ends with this one

    sys.addaudithook(hear)


class Directory(RuleBasedStateMachine):
    """One directory, and all that is known of what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="tsdyn-states-"))
        self.path = self.scratch / "place-0"
        self.moves = 0
        self.input = 0
        self.swapped = False
        self.damages: list[Damage] = []
        self.opened: list[Opened] = []
        self.seen: object = None

    @initialize(start=st.sampled_from(sorted(STARTS)), committed=st.integers(0, 5))
    def begin(self, start: str, committed: int = 0) -> None:
        from_before = STARTS[start]
        if isinstance(from_before, Path):
            shutil.copytree(from_before, self.path)
            self.base = Experiment.from_toml(self.path / EXPERIMENT, archived=True)
        else:
            self.base = from_before
            if self.base.teacher.path is not None:
                self._put_teacher()
                self.base = self.base.replace({"teacher.path": str(self.scratch / "teacher.pt")})
        self.epochs = self.first_epochs = self.base.training.epochs
        self.seeds = self.base.seed_labels
        self.points = self._points()
        for point in self.points.values():
            point.seeds = set(self.seeds)
        self.stateless = start == "archive-v1"
        if isinstance(from_before, Path):
            for point in self.points.values():
                point.rounded = -1
                labels = set(point.single.labels)
                point.required = {0, 1} if start.startswith("unfinished") else labels
        elif committed:  # most rules find nothing to do in an empty directory
            last = list(self.points)[-1]
            self._train(self.epochs, lambda: _dying.update({last: committed - 1}))

    def teardown(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- what is known -------------------------------------------------------------------------------------------

    def _points(self) -> dict[str, Point]:
        if not self.base.sweep:
            return {".": Point((), self.base)}
        singles = list(self.base.points())
        return {
            sweep_directory.point_name(values): Point(place, single)
            for (place, values), (_, single) in zip(places(self.base.sweep).items(), singles, strict=True)
        }

    def _asked(self, epochs: int) -> Experiment:
        gained = {} if self.seeds == self.base.seed_labels else {"seeds": list(self.seeds)}
        return self.base.replace({"training.epochs": epochs, **gained})

    def _put_teacher(self) -> None:
        (self.scratch / "teacher.pt").write_bytes(teacher(self.input))

    def _standing(self, damage: Damage) -> bool:
        """Whether what a rule did is still so."""
        if damage.kind == "checksum":
            (seal,) = damage.files
            return not (self.path / seal).exists() and (self.path / seal.removesuffix(whole_files.SUFFIX)).exists()
        return any(after is not None and _content(self.path / name) == after
                   for name, (_, after) in damage.files.items())  # fmt: skip

    @property
    def standing(self) -> list[Damage]:
        return [damage for damage in self.damages if self._standing(damage)]

    @property
    def harmed(self) -> bool:
        """Whether the library may refuse because of what a rule did."""
        return self.swapped or any(damage.kind != "checksum" for damage in self.standing)

    def _may_change(self) -> None:
        """What is done now can change files under the Datasets that are open."""
        for opened in self.opened:
            opened.must = False

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_wrong(self) -> None:
        found = [(p, p.stat()) for p in sorted(self.scratch.rglob("*"))]
        now = [(p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found], list(map(id, self.opened))
        if not self.path.exists() or self.seen == now:
            return
        self.seen = now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._look(skip_damaged=False)
            if self.harmed and self.base.sweep:
                self._look(skip_damaged=True)
            for opened in self.opened:
                try:
                    found = opened.ds.compute()
                except SENTENCES as error:
                    _allowed(not opened.must, f"what was opened before is refused: {error}")
                else:
                    self._compare(found, opened.points, required=False)

    def _look(self, *, skip_damaged: bool) -> None:
        required = any(point.required for point in self.points.values())
        try:
            found = tsdyn.open(self.path, skip_damaged=skip_damaged).compute()
        except SENTENCES as error:
            _allowed(self.harmed or not required, f"refused: {error}")
        else:
            self._compare(found, self.points, required=not self.harmed)

    def _compare(self, found: xr.Dataset, points: dict[str, Point], *, required: bool) -> None:
        swept = swept_dimensions(found)
        for name, point in points.items():
            part = found.isel(dict(zip(swept, point.place, strict=True)))
            shown = [int(epoch) for epoch in part.epoch.values]
            truth = point.truth
            assert set(shown) <= set(truth.epoch.values.tolist()), f"{name}: labels {shown}"
            seeds = [int(seed) for seed in part.seed.values]
            assert set(seeds) <= set(truth.seed.values.tolist()), f"{name}: seeds {seeds}"
            if required:
                assert point.required <= set(shown), f"{name}: {sorted(point.required - set(shown))} are lost"
                assert not point.required or point.seeds <= set(seeds), f"{name}: seeds {seeds} of {point.seeds}"
            for variable, array in truth.data_vars.items():
                if variable not in part:
                    assert variable == LATER or not (required and point.required), f"{name}: {variable} is lost"
                elif "wrong" not in part[variable].attrs:
                    for label in shown if "epoch" in array.dims else [0]:
                        for group, must in point.members(seeds):
                            at = {"seed": group} | ({"epoch": label} if "epoch" in array.dims else {})
                            exact = label < point.rounded and not point.inexact & set(group)
                            said = _differs(part[variable].sel(at).values, array.sel(at).values, exact)
                            asked = required and must and label in point.required and not point.salvaged
                            may = swept or point.salvaged or not must
                            fine = not said or (said == "missing" and not asked and may)
                            fine = fine or (said == "partly missing" and (point.salvaged or not must))
                            fine = fine or ("missing" in said and variable == LATER)
                            assert fine, f"{name}: {variable} at epoch {label}, seeds {group}: {said}"

    def _whole(self, problems: list[str]) -> None:
        """Check what `tsdyn validate` said."""
        told = [
            line for line in problems
            if "commit was cut short" not in line and "of the squared error" not in line
        ]  # fmt: skip
        named = [damage for damage in self.standing if not self._harmless(damage)]
        salvaged = any(point.salvaged for point in self.points.values())
        if named or self.swapped or salvaged:
            assert told, f"validate names nothing; standing {[(d.kind, list(d.files)) for d in named]}"
        elif not self.harmed:
            assert not told, told

    def _harmless(self, damage: Damage) -> bool:
        """Whether a changed byte changes nothing that anybody reads: a blank, the name beside a checksum."""
        (name, *_) = damage.files
        file = self.path / name
        if damage.kind == "checksum":
            return False
        if file.name.endswith(whole_files.SUFFIX):
            return whole_files.sealed(file.with_name(file.name.removesuffix(whole_files.SUFFIX))) is True
        if file.name == EXPERIMENT:
            with contextlib.suppress(ExperimentError):
                before = damage.files[name][0]
                assert before is not None
                return Experiment.from_toml(file, archived=True) == Experiment.from_toml_text(
                    before.decode(), archived=True
                ) or self._extended(file)
        return file.name in (sweep_directory.SWEEP, "index.json")

    def _extended(self, file: Path) -> bool:
        """Whether the changed experiment only asks for more epochs or seeds, of what is not finished or a sweep."""
        theirs = Experiment.from_toml(file, archived=True)
        alike = {"training.epochs": 1, "seeds": 1}
        same = theirs.replace(alike) == self._asked(1).replace(alike)
        return same and (bool(self.base.sweep) or not list(self.path.rglob(ARCHIVE)))

    # --- train ---------------------------------------------------------------------------------------------------

    def _train(self, epochs: int, before: Callable[[], None] = lambda: None, *, engine: str = "on",
               progress: Callable[..., None] | None = None) -> End:  # fmt: skip
        """Train in a child up to `epochs`, and learn from what it reports."""
        experiment, path = self._asked(epochs), self.path
        other_input = any(point.born != self.input for point in self.points.values()) and bool(self.base.teacher.path)
        fresh = [point for point in self.points.values() if not point.required and not self._there()]

        def work() -> None:
            if engine == "off":
                os.environ["TSDYN_KERNEL"] = "off"
                native.load.cache_clear()
            before()
            tsdyn.run(experiment, path, progress=progress)

        for point in fresh:
            point.born = self.input
        if engine == "off":
            for point in self.points.values():
                point.rounded = min(point.rounded, max(point.required, default=-1) + 1)
                point.inexact |= set(self.seeds) - point.seeds
        harmed = self.harmed
        end = child(work, path)
        assert end.how in ("done", "refused", "stopped", "killed"), f"{end.how}: {end.words}"
        if end.how == "refused":
            stateless = self.stateless and (epochs > self.first_epochs or self.seeds != self.base.seed_labels)
            assert harmed or other_input or stateless, f"refused: {end.words}"
            if stateless:
                return end
        self.epochs = epochs
        singles = dict(zip(self.points, [e for _, e in experiment.points()] if experiment.sweep else [experiment],
                           strict=True))  # fmt: skip
        for name, last in end.told:
            self.points[name].required |= {label for label in singles[name].labels if label <= last}
        if end.how == "done" and not harmed:
            for name, single in singles.items():
                if not self.points[name].salvaged:
                    self.points[name].required |= set(single.labels)
                    self.points[name].seeds |= set(self.seeds)
            # other commands may be writing into a sweep's own folder: there only `repair` removes what is left
            left = [p.name for p in path.rglob("*") if p.parent.name == SEGMENTS or (
                p.name.endswith(".tmp") and not (self.base.sweep and p.parent == path))]  # fmt: skip
            assert not left, f"left {left}"
            assert self.swapped or not list(path.rglob("added")), "seeds were not joined"
        return end

    def _there(self) -> bool:
        """Whether anything is committed: a child that was killed may have had no time to say so."""
        return any(self.path.rglob("*.nc"))

    @rule(more=st.integers(0, 2), engine=st.sampled_from(["on", "on", "off"]))
    def run_resume_or_extend(self, more: int, engine: str) -> None:
        steps["run"] += 1
        before = self.epochs
        self._train(min(before + more, self.first_epochs + MORE), engine=engine)

    @rule(epoch=st.integers(0, 6), more=st.integers(0, 1))
    def kill_after_a_commit(self, epoch: int, more: int) -> None:
        steps["kill after a commit"] += 1
        point = list(self.points)[epoch % len(self.points)]
        self._train(min(self.epochs + more, self.first_epochs + MORE), lambda: _dying.update({point: epoch}))

    @rule(moment=st.integers(1, 120), more=st.integers(0, 1))
    def kill_at_a_file(self, moment: int, more: int) -> None:
        steps["kill at a file"] += 1
        self._train(min(self.epochs + more, self.first_epochs + MORE), lambda: die_at(moment, self.path))

    def _gain(self, before: Callable[[], None] = lambda: None) -> None:
        """Ask for one seed more; it stays asked for unless that is refused."""
        if len(self.seeds) == len(self.base.seed_labels) + MORE_SEEDS:
            return
        kept, self.seeds = self.seeds, (*self.seeds, max(self.seeds) + 1)
        if self._train(self.epochs, before).how == "refused":
            self.seeds = kept

    @rule()
    def gain_a_seed(self) -> None:
        steps["gain a seed"] += 1
        self._gain()

    @rule(moment=st.integers(1, 150))
    def kill_while_a_seed_is_gained(self, moment: int) -> None:
        steps["kill in gaining a seed"] += 1
        self._gain(lambda: die_at(moment, self.path))

    @rule(moment=st.integers(0, 40))
    def measure_afterwards(self, moment: int) -> None:
        """To the end, or killed; what is measured is in `nothing_is_lost_or_wrong`'s numbers from then on."""
        if not self._there():
            return
        steps["measure afterwards"] += 1

        def work() -> None:
            if moment > 20:
                die_at(moment, self.path)
            adding.add(self.path, [LATER])

        other_input = any(point.born != self.input for point in self.points.values()) and bool(self.base.teacher.path)
        harmed = self.harmed
        end = child(work, self.path)
        assert end.how in ("done", "refused", "killed"), f"{end.how}: {end.words}"
        assert end.how != "refused" or harmed or other_input, f"refused: {end.words}"

    @rule(epoch=st.integers(0, 4))
    def ask_it_to_stop(self, epoch: int) -> None:
        steps["stop"] += 1

        def ask(now: int, *_: object) -> None:
            if now == epoch:
                os.kill(os.getpid(), signal.SIGTERM)

        self._train(self.epochs, progress=ask)

    @rule(key=st.sampled_from(["record.every", "training.learning_rate", "training.epochs"]))
    def ask_for_another_run_here(self, key: str) -> None:
        """What is no extension is refused, naming the key, and nothing changes."""
        if self.harmed or not (self.path / EXPERIMENT).exists() or (key == "training.epochs" and self.base.sweep):
            return
        steps["another run"] += 1
        other: dict[str, Any] = {
            "record.every": (self.base.record.every or 1) + 1, "training.learning_rate": 0.5, "training.epochs": 0
        }  # fmt: skip
        kept = Experiment.from_toml(self.path / EXPERIMENT, archived=True)
        asked = kept.replace({key: other[key]})
        end = child(lambda: tsdyn.run(asked, self.path) and None, self.path)
        assert end.how == "refused", end
        assert key in end.words, end.words
        assert not end.told

    @rule()
    def change_the_teacher_file(self) -> None:
        if self.base.teacher.path is not None:
            steps["another teacher"] += 1
            self.input = 1 - self.input
            self._put_teacher()

    # --- look ----------------------------------------------------------------------------------------------------

    @rule()
    def validate(self) -> None:
        if (self.path / EXPERIMENT).exists():  # a writer that was killed at once leaves no run
            steps["validate"] += 1
            self._whole(integrity.check(self.path))

    @rule()
    def open_lazily(self) -> None:
        if not self.path.exists():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(SENTENCES):  # whether it may be refused is looked at in any case
                ds = tsdyn.open(self.path)
                steps["open"] += 1
                must = not self.harmed and not any(point.rounded < 0 for point in self.points.values())
                self.opened = [*self.opened[-1:], Opened(ds, dict(self.points), must)]

    @rule(name=st.sampled_from(sorted(name for name, start in STARTS.items() if isinstance(start, Path))))
    def open_one_of_an_earlier_version(self, name: str) -> None:
        steps["open an earlier version"] += 1
        other = Directory()
        try:
            other.begin(name)
            other.nothing_is_lost_or_wrong()
            other.validate()
        finally:
            other.teardown()

    @rule()
    def read_from_another_process(self) -> None:
        """It opens the directory itself, and reads what was opened here, from another working directory."""
        steps["read elsewhere"] += 1
        lazy = pickle.dumps([(opened.ds, opened.points, opened.must) for opened in self.opened])

        def work() -> None:
            os.chdir("/")
            self.opened = [Opened(*held) for held in pickle.loads(lazy)]
            self.nothing_is_lost_or_wrong()

        end = child(work, self.path)
        assert end.how == "done", end.words

    # --- put elsewhere -------------------------------------------------------------------------------------------

    def _elsewhere(self) -> Path:
        self.moves += 1
        return self.scratch / f"place-{self.moves}"

    @rule(times=st.booleans())
    def copy(self, times: bool) -> None:
        """A copy, with its times or as new; what follows happens to the copy."""
        if self.path.exists():
            steps["copy"] += 1
            target = self._elsewhere()
            shutil.copytree(self.path, target, copy_function=shutil.copy2 if times else shutil.copy)
            self.path = target

    @rule()
    def move(self) -> None:
        if self.path.exists():
            steps["move"] += 1
            self._may_change()
            self.path = self.path.rename(self._elsewhere())

    @rule()
    def rename_and_back(self) -> None:
        if self.path.exists():
            steps["rename and back"] += 1
            self.path.rename(self.scratch / "aside").rename(self.path)

    @rule()
    def exchange_two_points(self) -> None:
        names = [self.path / name for name in self.points]
        if len(names) < 2 or not all(name.exists() for name in names[:2]) or self.standing:
            return
        steps["exchange points"] += 1
        self._may_change()
        names[0].rename(self.path / "aside")
        names[1].rename(names[0])
        (self.path / "aside").rename(names[1])
        self.swapped = not self.swapped

    # --- damage --------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        """Files of the directory, in order, whose bytes are not all zero by chance."""
        found = sorted(p for p in self.path.rglob("*") if p.is_file() and integrity.DAMAGED not in p.parts)
        return [p for p in found if p.suffix in (".nc", whole_files.SUFFIX, ".toml", ".json") and p.stat().st_size]

    def _note(self, kind: str, files: dict[Path, tuple[bytes | None, bytes | None]]) -> None:
        """Note what a rule did to the files of one point."""
        (file, *_) = files
        inside = file.relative_to(self.path).parts
        point = "." if "." in self.points else inside[0] if inside[0] in self.points else None
        data = file.name.removesuffix(whole_files.SUFFIX)
        span = segment_epochs(file.with_name(data))
        first = span[0] if span else 0 if data == ARCHIVE else None
        undone = [d for d in self.damages if {self.path / n: c[::-1] for n, c in d.files.items()} == files]
        self.damages = [d for d in self.damages if d not in undone]
        if not undone:
            named = {str(f.relative_to(self.path)): content for f, content in files.items()}
            kept = {name: set(held.required) for name, held in self.points.items()}
            self.damages.append(Damage(kind, named, point, first, kept))
        self._may_change()

    @rule(which=st.integers(0, 30), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_a_byte(self, which: int, where: float, bit: int) -> None:
        """Of a file beside which a checksum is kept: what has none can say anything (`tests.torture.fuzz` tries)."""
        if self.swapped:
            return
        files = [p for p in self._files() if p.suffix != ".nc" or whole_files.seal_of(p).exists()]
        if not files:
            return
        steps["damage a byte"] += 1
        file = files[which % len(files)]
        before = file.read_bytes()
        after = bytearray(before)
        after[int(where * len(before))] ^= 1 << bit
        file.write_bytes(after)
        self._note("bytes", {file: (before, bytes(after))})

    @rule(which=st.integers(0, 30))
    def remove_a_checksum(self, which: int) -> None:
        seals = [p for p in self._files() if p.suffix == whole_files.SUFFIX]
        if self.swapped or not seals:
            return
        seal = seals[which % len(seals)]
        data = seal.with_name(seal.name.removesuffix(whole_files.SUFFIX))
        if not data.exists() or not whole_files.sealed(data):
            return
        steps["remove a checksum"] += 1
        before = seal.read_bytes()
        seal.unlink()
        self._note("checksum", {seal: (before, None)})

    @rule()
    def put_one_archive_over_another(self) -> None:
        if len(self.points) < 2 or self.standing or self.swapped:
            return
        one, other = (self.path / name / ARCHIVE for name in list(self.points)[:2])
        if not (one.exists() and other.exists() and whole_files.seal_of(one).exists()):
            return
        steps["an archive over another"] += 1
        files = {}
        for source, target in ((one, other), (whole_files.seal_of(one), whole_files.seal_of(other))):
            files[target] = _content(target), source.read_bytes()
            shutil.copy2(source, target)
        self._note("bytes", files)

    @rule()
    def put_back_what_was_damaged(self) -> None:
        standing = self.standing
        if not standing:
            return
        steps["put back"] += 1
        damage = standing[-1]
        for name, (before, _) in damage.files.items():
            if before is not None:
                (self.path / name).write_bytes(before)
        for name, required in damage.required.items():
            self.points[name].required |= required
        self.damages.remove(damage)
        self._may_change()

    @rule()
    def repair(self) -> None:
        """What is whole stays; what is not is said, and afterwards the rest can be opened and gone on with."""
        if not self.path.exists():
            return
        steps["repair"] += 1
        standing, harmed = self.standing, self.harmed
        try:
            told = integrity.repair(self.path)
        except SENTENCES as error:
            _allowed(harmed or not self._there(), f"repair refuses: {error}")
            return
        if not standing:
            assert all("cut short" in line for line in told) or self.swapped, told
            return
        self._may_change()
        for damage in standing:
            if damage.kind == "bytes" and damage.point is not None and damage.first is not None:
                held = self.points[damage.point]
                lost = not self._standing(damage)
                assert not lost or told, "repair says nothing"
                if lost:
                    held.required = {label for label in held.required if label < damage.first}
                    folder = self.path / damage.point
                    written = any("written anew with what" in line and str(folder / ARCHIVE) in line for line in told)
                    held.salvaged = (held.salvaged or written) and (folder / ARCHIVE).exists()
        self.damages = self.standing
        lost = [damage for damage in self.damages if damage.kind == "checksum" and not self.swapped]
        assert not lost, "repair leaves a whole file without its checksum"

    @rule()
    def remove_what_was_salvaged(self) -> None:
        """As `repair` says: removed, it is computed again."""
        for name, point in self.points.items():
            if point.salvaged:
                steps["remove the salvaged"] += 1
                self._may_change()
                whole_files.remove_sealed(self.path / name / ARCHIVE)
                point.salvaged, point.required, point.rounded = False, set(), point.rounded
                point.born = self.input

    # --- rules that join when the library has them: forks of a run --------------------------------------------------
    # Each needs: a rule that asks for it through `_train`; `_undisturbed` to know its numbers; `Point.required` to
    # gain what was reported as committed.


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's log."""
    before = logging.getLogger("tsdyn").level
    logging.getLogger("tsdyn").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("tsdyn").setLevel(before)
