"""The rules: what people do to a directory, each with what it must say and what the model learns from it."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import tsdyn
from tests.archive.states.checks import Checked, allowed, steps
from tests.archive.states.children import SENTENCES, End, child, die_at, dying
from tests.archive.states.model import GAINED, GAINING, LATER, MORE, MORE_SEEDS, STARTS, Damage, Opened, content
from tsdyn.archive import additions, integrity, whole_files
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT, SEGMENTS, segment_epochs
from tsdyn.engine import native
from tsdyn.experiment.experiment import Experiment
from tsdyn.growing import adding


class Directory(Checked):
    """One directory, and the rules that are applied to it."""

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
            self._train(self.epochs, lambda: dying.update({last: committed - 1}))

    # --- train ---------------------------------------------------------------------------------------------------

    def _train(self, epochs: int, before: Callable[[], None] = lambda: None, *, engine: str = "on",
               progress: Callable[..., None] | None = None) -> End:  # fmt: skip
        """Train in a child up to `epochs`, and learn from what it reports."""
        experiment, path = self._asked(epochs), self.path
        other_input = self._other_input()
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
                if not (point := self.points[name]).salvaged:
                    kept = point.required - set(single.labels)
                    point.lacking |= {seed: kept for seed in self.seeds if seed not in point.seeds}
                    point.required |= set(single.labels)
                    point.seeds |= set(self.seeds)
            # other commands may be writing into a sweep's own folder, and `measure` beside a run: there only `repair`
            # and `measure` given again remove what is left
            left = [p.name for p in path.rglob("*") if p.parent.name == SEGMENTS or (
                p.name.endswith(".tmp") and p.parent.name != additions.MEASURED
                and not (self.base.sweep and p.parent == path))]  # fmt: skip
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
        self._train(min(self.epochs + more, self.first_epochs + MORE), lambda: dying.update({point: epoch}))

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

    def _gain_points(self, before: Callable[[], None] = lambda: None) -> None:
        """Ask for one more value of a swept key; it stays asked for unless that is refused."""
        sweep = self.base.sweep
        if GAINING not in sweep or GAINED in sweep[GAINING]:
            return
        kept = self.base, self.points
        self.base = self.base.replace({"sweep": {**sweep, GAINING: [*sweep[GAINING], GAINED]}})
        self.points = {name: kept[1].get(name, point) for name, point in self._points().items()}
        if self._train(self.epochs, before).how == "refused":
            self.base, self.points = kept

    @rule()
    def gain_points(self) -> None:
        steps["gain points"] += 1
        self._gain_points()

    @rule(moment=st.integers(1, 250))
    def kill_while_points_are_gained(self, moment: int) -> None:
        steps["kill in gaining points"] += 1
        self._gain_points(lambda: die_at(moment, self.path))

    @rule(at=st.integers(0, 1), moment=st.integers(0, 400))
    def fork(self, at: int, moment: int) -> None:
        """Children without a change are their parent from there on, killed in between or not; it stays as it was."""
        if not self._there():
            return
        steps["fork"] += 1
        out, parent = self.scratch / "children", self._contents()

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
        shutil.rmtree(out, ignore_errors=True)

    def _contents(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.path.rglob("*") if file.is_file()}

    def _other_input(self) -> bool:
        """Whether the teacher file is another than a point began with."""
        return any(point.born != self.input for point in self.points.values()) and bool(self.base.teacher.path)

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

        other_input = self._other_input()
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
            files[target] = content(target), source.read_bytes()
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
            allowed(harmed or not self._there(), f"repair refuses: {error}")
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's log."""
    before = logging.getLogger("tsdyn").level
    logging.getLogger("tsdyn").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("tsdyn").setLevel(before)
