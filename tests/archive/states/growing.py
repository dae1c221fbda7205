"""The rules that write: run, kill, grow, fork, measure, export; each learns from what the children report."""

from __future__ import annotations

import os
import select
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import tsdyn
from tests.archive.states.checks import Checked, allowed, steps
from tests.archive.states.children import SENTENCES, End, begun, child, die_at, dying
from tests.archive.states.model import GAINED, GAINING, LATER, MORE, MORE_SEEDS, OFTEN, STARTS
from tsdyn.archive import additions
from tsdyn.archive.run_directory import EXPERIMENT, SEGMENTS
from tsdyn.engine import native
from tsdyn.experiment.experiment import Experiment
from tsdyn.growing import adding, exporting


class Growing(Checked):
    """One directory, and the rules that are applied to it."""

    #: Whether processes may work on the directory side by side; what happens then is another thing each time.
    side_by_side = True

    def __init__(self) -> None:
        super().__init__()
        self.stateless = False
        self.gained: int | None = None  #: the last epoch that was asked for before `LATER` was recorded along the way

    @initialize(start=st.sampled_from([*OFTEN, *sorted(STARTS)]), committed=st.integers(0, 5))
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
            self._train(self.epochs, lambda: dying.update({last: committed - 1}))

    # --- train ---------------------------------------------------------------------------------------------------

    def _train(self, epochs: int, before: Callable[[], None] = lambda: None, *, engine: str = "on",
               progress: Callable[..., None] | None = None, commands: int = 1) -> End:  # fmt: skip
        """Train in a child up to `epochs`, and learn from what it reports; of several `before` is of the first."""
        experiment, path = self._asked(epochs), self.path
        other_input = self._other_input()
        fresh = [point for point in self.points.values() if not point.required and not self._there()]

        def work() -> None:
            if engine == "off":
                os.environ["TSDYN_KERNEL"] = "off"
                native.load.cache_clear()
            tsdyn.run(experiment, path, progress=progress)

        def first() -> None:
            before()
            work()

        for point in fresh:
            point.born = self.input
        if engine == "off":
            for point in self.points.values():
                point.rounded = min(point.rounded, max(point.required, default=-1) + 1)
                point.inexact |= set(self.seeds) - point.seeds
        harmed = self.harmed
        going = [begun(first, path), *(begun(work, path) for _ in range(commands - 1))]
        end = self._together([each.end() for each in going])
        assert end.how in ("done", "refused", "stopped", "killed"), f"{end.how}: {end.words}"
        if end.how == "refused":
            asks = epochs > self.first_epochs or self.seeds != self.base.seed_labels or bool(self.more)
            stateless = self.stateless and asks
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
                if not (point := self.points[name]).salvaged:
                    kept = point.required - set(single.labels)
                    point.lacking |= {seed: kept for seed in self.seeds if seed not in point.seeds}
                    point.required |= set(single.labels)
                    point.seeds |= set(self.seeds)
                    for seed in point.seeds if self.gained is not None else ():
                        new = {label for label in single.labels if label > (self.gained or 0)}
                        point.later.setdefault(seed, set()).update(new)
            # other commands may be writing into a sweep's own folder, and `measure` beside a run: there only `repair`
            # and `measure` given again remove what is left
            left = [p.name for p in path.rglob("*") if p.parent.name == SEGMENTS or (
                p.name.endswith(".tmp") and p.parent.name != additions.MEASURED
                and not (self.base.sweep and p.parent == path))]  # fmt: skip
            assert not left, f"left {left}"
            assert self.swapped or not list(path.rglob("added")), "seeds were not joined"
        return end

    def _together(self, ends: list[End]) -> End:
        """How several commands on one directory ended, of which one may have been killed; one run has one writer."""
        told = [line for end in ends for line in end.told]
        busy = "another process is writing"
        bad = [end for end in ends if end.how not in ("done", "killed") and busy not in end.words]
        # of a sweep the other leaves out the point that the killed one was writing
        order = ["killed", "done", "refused"] if self.base.sweep else ["done", "killed", "refused"]
        chosen = bad[0] if bad else min(ends, key=lambda end: order.index(end.how))
        return End(chosen.how, chosen.words, told)

    def _there(self) -> bool:
        """Whether anything is committed: a child that was killed may have had no time to say so."""
        return any(self.path.rglob("*.nc"))

    def _begun(self) -> bool:
        """Whether something was reported as committed."""
        return any(point.required for point in self.points.values())

    @rule(more=st.integers(0, 2), engine=st.sampled_from(["on", "on", "off"]))
    def run_resume_or_extend(self, more: int, engine: str) -> None:
        steps["run"] += 1
        before = self.epochs
        self._train(min(before + more, self.first_epochs + MORE), engine=engine)

    @rule(epoch=st.integers(0, 6), more=st.integers(0, 1))
    def kill_after_a_commit(self, epoch: int, more: int) -> None:
        steps["kill after a commit"] += 1
        point = list(self.points)[epoch % len(self.points)]
        self._train(min(self.epochs + more, self.first_epochs + MORE), lambda: dying.update({point: epoch}))

    @rule(moment=st.integers(1, 120), more=st.integers(0, 1))
    def kill_at_a_file(self, moment: int, more: int) -> None:
        steps["kill at a file"] += 1
        self._train(min(self.epochs + more, self.first_epochs + MORE), lambda: die_at(moment, self.path))

    @precondition(lambda self: self.side_by_side)
    @rule(more=st.integers(0, 2), moment=st.integers(0, 300))
    def two_at_once(self, more: int, moment: int) -> None:
        """The same command twice, as a job array gives it; one of the two may be killed."""
        steps["two at once"] += 1
        epochs = min(self.epochs + more, self.first_epochs + MORE)
        self._train(epochs, lambda: die_at(moment, self.path) if moment > 150 else None, commands=2)

    @precondition(lambda self: self.side_by_side and not self.standing and not self.swapped)
    @rule(more=st.integers(0, 2))
    def read_while_it_is_written(self, more: int) -> None:
        """Two other processes read again and again: the directory anew, and what was opened before."""
        steps["read while written"] += 1
        until, end = os.pipe()

        def reading() -> None:
            os.close(end)
            while not select.select([until], [], [], 0)[0]:
                try:
                    self._read_all()
                except AssertionError as error:  # versions before 0.2 gave their runs no name to be known by
                    nameless = any(point.rounded < 0 for point in self.points.values())
                    allowed(nameless and "open it again" in str(error), str(error))

        readers = [begun(reading, self.path) for _ in range(2)] if self._there() else []
        try:
            self._train(min(self.epochs + more, self.first_epochs + MORE))
        finally:
            os.close(end)
            ends = [reader.end() for reader in readers]
            os.close(until)
        assert all(each.how == "done" for each in ends), "\n".join(each.words for each in ends)

    def _ask_for(self, key: str, value: Any) -> None:
        """Ask for what decides no number that was there; it stays asked for as a seed does."""
        kept, self.more = self.more, {**self.more, key: value}
        if self._train(self.epochs).how == "refused" and self.stateless:
            self.more = kept

    @rule(every=st.integers(1, 2))
    def keep_states_along_the_way(self, every: int) -> None:
        steps["keep states"] += 1
        self._ask_for("record.state_every", every)

    @precondition(lambda self: self.gained is None and LATER not in self.base.record.observables)
    @rule()
    def gain_an_observable(self) -> None:
        steps["gain an observable"] += 1
        before = self.epochs
        self._ask_for("record.observables", [*self.base.record.observables, LATER])
        if "record.observables" in self.more:
            self.gained = before

    def _may_gain(self) -> bool:
        return len(self.seeds) < len(self.base.seed_labels) + MORE_SEEDS

    def _may_gain_points(self) -> bool:
        return GAINING in self.base.sweep and GAINED not in self.base.sweep[GAINING]

    def _gain(self, before: Callable[[], None] = lambda: None) -> None:
        """Ask for one seed more; it stays asked for, unless the archive is of a version that cannot gain any."""
        kept, self.seeds = self.seeds, (*self.seeds, max(self.seeds) + 1)
        if self._train(self.epochs, before).how == "refused" and self.stateless:
            self.seeds = kept

    @precondition(lambda self: self._may_gain())
    @rule()
    def gain_a_seed(self) -> None:
        steps["gain a seed"] += 1
        self._gain()

    @precondition(lambda self: self._may_gain())
    @rule(moment=st.integers(1, 150))
    def kill_while_a_seed_is_gained(self, moment: int) -> None:
        steps["kill in gaining a seed"] += 1
        self._gain(lambda: die_at(moment, self.path))

    def _gain_points(self, before: Callable[[], None] = lambda: None) -> None:
        """Ask for one more value of a swept key; it stays asked for."""
        sweep, kept = self.base.sweep, self.points
        self.base = self.base.replace({"sweep": {**sweep, GAINING: [*sweep[GAINING], GAINED]}})
        self.points = {name: kept.get(name, point) for name, point in self._points().items()}
        self._train(self.epochs, before)

    @precondition(lambda self: self._may_gain_points())
    @rule()
    def gain_points(self) -> None:
        steps["gain points"] += 1
        self._gain_points()

    @precondition(lambda self: self._may_gain_points())
    @rule(moment=st.integers(1, 250))
    def kill_while_points_are_gained(self, moment: int) -> None:
        steps["kill in gaining points"] += 1
        self._gain_points(lambda: die_at(moment, self.path))

    @precondition(lambda self: self._there())
    @rule(at=st.integers(0, 3), moment=st.integers(0, 400), keep=st.booleans())
    def fork(self, at: int, moment: int, keep: bool) -> None:
        """Children without a change are their parent from there on, killed in between or not; it stays as it was.

        Those that were kept grow with their parent.
        """
        out, parent, at = self.scratch / "children", self._contents(), min(at, self.base.training.epochs)
        if self.children is None:
            shutil.rmtree(out, ignore_errors=True)
            steps["fork"] += 1
        else:
            (_, at) = self.children
            steps["fork again"] += 1

        def work() -> None:
            tsdyn.fork(self.path, at=at, out=out)

        def killed() -> None:
            die_at(moment, out)
            work()

        ends = [child(killed, out)] if moment > 200 else []
        ends.append(child(work, out))
        for end in ends:
            assert end.how in ("done", "refused", "killed"), f"{end.how}: {end.words}"
        begun = all(point.required for point in self.points.values())
        may = self.harmed or not begun or self._other_input()
        assert ends[-1].how == "done" or may, f"refused: {ends[-1].words}"
        if ends[-1].how == "done":
            self._same_from(out, at)
        assert self._contents() == parent, "a fork changes its parent"
        self.children = (self.path, at) if keep and ends[-1].how == "done" and not may else None

    def _contents(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.path.rglob("*") if file.is_file()}

    def _other_input(self) -> bool:
        """Whether the teacher file is another than a point began with."""
        return any(point.born != self.input for point in self.points.values()) and bool(self.base.teacher.path)

    @precondition(lambda self: self._begun())
    @rule(moment=st.integers(0, 40))
    def measure_afterwards(self, moment: int) -> None:
        """To the end, or killed; what is measured is in `nothing_is_lost_or_wrong`'s numbers from then on."""
        steps["measure afterwards"] += 1

        def work() -> None:
            if moment > 20:
                die_at(moment, self.path)
            adding.add(self.path, [LATER])

        other_input = self._other_input()
        harmed = self.harmed
        end = child(work, self.path)
        assert end.how in ("done", "refused", "killed"), f"{end.how}: {end.words}"
        assert end.how != "refused" or harmed or other_input, f"refused: {end.words}"
        if end.how == "done" and not harmed:
            for point in self.points.values():
                for seed in point.seeds:
                    point.later.setdefault(seed, set()).update(point.required - point.lacking.get(seed, set()))

    @precondition(lambda self: self._begun())
    @rule()
    def measure_without_adding(self) -> None:
        steps["measure lazily"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = tsdyn.measure(tsdyn.open(self.path), [LATER]).compute()
            except SENTENCES as error:
                allowed(self.harmed or self._other_input(), f"refused: {error}")
            else:
                self._compare(found, self.points, required=False)

    @precondition(lambda self: self._begun())
    @rule(to=st.sampled_from(sorted(exporting.SUFFIXES)), moment=st.integers(0, 80))
    def export(self, to: Any, moment: int) -> None:
        """To the end, or killed and gone on with; what was written is opened as the directory is."""
        steps[f"export to {to}"] += 1
        out = self.scratch / f"export{exporting.SUFFIXES[to]}"

        def work() -> None:
            exporting.export(self.path, to, out)

        def killed() -> None:
            die_at(moment, self.scratch)
            work()

        ends = [child(killed, out)] if moment > 40 else []
        if not out.exists():
            ends.append(child(work, out))
        assert all(end.how in ("done", "refused", "killed") for end in ends), "\n".join(end.words for end in ends)
        assert ends[-1].how != "refused" or self.harmed, ends[-1].words
        if ends[-1].how == "done":
            # in a child: a package that keeps threads does not fork well
            read = child(lambda: self._compare(tsdyn.open(out).compute(), self.points, required=not self.harmed), out)
            assert read.how == "done", read.words
        for left in (out, out.with_name(f".{out.name}.partial")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    @rule(epoch=st.integers(0, 4))
    def ask_it_to_stop(self, epoch: int) -> None:
        steps["stop"] += 1

        asked = []

        def ask(now: int, *_: object) -> None:
            if now == epoch and not asked:  # a second signal, for seeds that train beside, ends the process at once
                asked.append(now)
                os.kill(os.getpid(), signal.SIGTERM)

        self._train(self.epochs, progress=ask)

    @precondition(lambda self: not self.harmed and (self.path / EXPERIMENT).exists())
    @rule(key=st.sampled_from(["record.every", "training.learning_rate", "training.epochs"]))
    def ask_for_another_run_here(self, key: str) -> None:
        """What is no extension is refused, naming the key, and nothing changes."""
        if key == "training.epochs" and self.base.sweep:
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

    @precondition(lambda self: self.base.teacher.path is not None)
    @rule()
    def change_the_teacher_file(self) -> None:
        steps["another teacher"] += 1
        self.input = 1 - self.input
        self._put_teacher()
        self.children = None
