"""The rules that read, put elsewhere, damage and repair; each with what must be said, and what the model learns."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import tsdyn
from tests.archive.states.checks import allowed, steps
from tests.archive.states.children import SENTENCES, child, die_at
from tests.archive.states.growing import Growing
from tests.archive.states.model import STARTS, Damage, Opened, content, more_seeds, of_other_seeds
from tsdyn.archive import integrity, sweep_directory, whole_files
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT, segment_epochs
from tsdyn.archive.selecting import experiment_of
from tsdyn.growing import comparing


class Directory(Growing):
    """One directory, and the rules that are applied to it."""

    # --- look ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: (self.path / EXPERIMENT).exists())  # a writer that was killed at once leaves no run
    @rule()
    def validate(self) -> None:
        steps["validate"] += 1
        self._whole(integrity.check(self.path))

    @precondition(lambda self: self.path.exists())
    @rule()
    def open_lazily(self) -> None:
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

    @precondition(lambda self: not self.base.sweep and self._begun() and not self.harmed)
    @rule()
    def compare_with_an_undisturbed_one(self) -> None:
        """`tsdyn diff` finds no number that differs."""
        (point,) = self.points.values()
        if point.rounded == float("inf") and not point.inexact:
            steps["diff"] += 1
            for name, numbers in comparing.compare(self.path, point.truth).numbers.items():
                assert not numbers.dims, f"{name}: {numbers}"
                assert not numbers.largest > 0, f"{name}: {numbers}"

    @precondition(lambda self: not self.base.sweep and self._begun() and not self.harmed and not self._other_input())
    @rule()
    def open_with_another_of_other_seeds(self) -> None:
        """Two runs are one Dataset along their seeds, or are refused where a seed is in both."""
        (point,) = self.points.values()
        if point.rounded < 0 or self.base.teacher.path is not None:  # written by an earlier version, or of a file
            return
        steps["open together"] += 1
        more = set(more_seeds(self.base))
        own = tsdyn.open(self.path)
        experiment = experiment_of(own)
        plain = {"seeds": list(self.base.seed_labels), "record.state_every": None}
        other = of_other_seeds(experiment.replace(plain).to_toml())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = tsdyn.open([self.path, other]).compute()
            except SENTENCES as error:
                allowed(bool(more & set(experiment.seed_labels)), f"refused: {error}")
                return
        assert not more & set(experiment.seed_labels), "a seed that is in both is not refused"
        self._compare(found.sel(epoch=own.epoch), self.points, required=False)
        assert more <= set(found.seed.values.tolist()), f"seeds {found.seed.values} of two runs"

    # --- put elsewhere -------------------------------------------------------------------------------------------

    def _elsewhere(self) -> Path:
        self.moves += 1
        return self.scratch / f"place-{self.moves}"

    @precondition(lambda self: self.path.exists())
    @rule(times=st.booleans())
    def copy(self, times: bool) -> None:
        """A copy, with its times or as new; what follows happens to the copy."""
        steps["copy"] += 1
        target = self._elsewhere()
        shutil.copytree(self.path, target, copy_function=shutil.copy2 if times else shutil.copy)
        self.path, self.children = target, None

    @precondition(lambda self: self.path.exists())
    @rule()
    def move(self) -> None:
        steps["move"] += 1
        self._may_change()
        self.path = self.path.rename(self._elsewhere())

    @precondition(lambda self: self.path.exists())
    @rule()
    def rename_and_back(self) -> None:
        steps["rename and back"] += 1
        self.path.rename(self.scratch / "aside").rename(self.path)

    @precondition(lambda self: self._two_there())
    @rule(which=st.integers(0, 1))
    def put_a_point_aside_and_back(self, which: int) -> None:
        """Meanwhile the sweep is read without it."""
        steps["a point aside"] += 1
        self._may_change()
        point = self.path / list(self.points)[which]
        aside = point.rename(self.scratch / "aside")
        with warnings.catch_warnings(), contextlib.suppress(SENTENCES):
            warnings.simplefilter("ignore")
            found = tsdyn.open(self.path, skip_damaged=True).compute()
            self._compare(found, self.points, required=False)
        aside.rename(point)

    @precondition(lambda self: (self.path / "index.json").exists())
    @rule()
    def remove_the_index(self) -> None:
        steps["remove the index"] += 1
        (self.path / "index.json").unlink()

    @precondition(lambda self: (self.path / sweep_directory.SWEEP).exists() and not self.standing)
    @rule()
    def lose_the_list_of_points(self) -> None:
        """It is for other readers, and the next run writes it anew."""
        steps["lose the list"] += 1
        (self.path / sweep_directory.SWEEP).unlink()

    def _two_there(self) -> bool:
        return len(self.points) > 1 and all((self.path / name).exists() for name in list(self.points)[:2])

    @precondition(lambda self: self._two_there() and not self.standing)
    @rule()
    def exchange_two_points(self) -> None:
        names = [self.path / name for name in self.points]
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

    @precondition(lambda self: not self.swapped and self._there())
    @rule(which=st.integers(0, 30), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_a_byte(self, which: int, where: float, bit: int) -> None:
        """Of a file beside which a checksum is kept: what has none can say anything (`tests.torture.fuzz` tries)."""
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

    @precondition(lambda self: self._two_there() and not self.standing and not self.swapped)
    @rule()
    def put_one_archive_over_another(self) -> None:
        one, other = (self.path / name / ARCHIVE for name in list(self.points)[:2])
        if not (one.exists() and other.exists() and whole_files.seal_of(one).exists()):
            return
        steps["an archive over another"] += 1
        files = {}
        for source, target in ((one, other), (whole_files.seal_of(one), whole_files.seal_of(other))):
            files[target] = content(target), source.read_bytes()
            shutil.copy2(source, target)
        self._note("bytes", files)

    @precondition(lambda self: self.standing)
    @rule()
    def put_back_what_was_damaged(self) -> None:
        steps["put back"] += 1
        damage = self.standing[-1]
        for name, (before, _) in damage.files.items():
            if before is not None:
                (self.path / name).write_bytes(before)
        for name, required in damage.required.items():
            self.points[name].required |= required
        self.damages.remove(damage)
        self._may_change()

    @precondition(lambda self: self.path.exists())
    @rule(moment=st.integers(0, 200))
    def repair(self, moment: int) -> None:
        """What is whole stays; what is not is said, and afterwards the rest can be opened and gone on with."""
        steps["repair"] += 1
        standing, harmed = self.standing, self.harmed
        killed = moment > 120 and self._killed_in_repair(moment - 120)
        try:
            told = integrity.repair(self.path)
        except SENTENCES as error:
            allowed(harmed or not self._there(), f"repair refuses: {error}")
            return
        if not standing:
            assert killed or all("cut short" in line for line in told) or self.swapped, told
            return
        self._may_change()
        for damage in standing:
            if damage.kind == "bytes" and damage.point is not None and damage.first is not None:
                held = self.points[damage.point]
                lost = not self._standing(damage)
                assert not lost or told or killed, "repair says nothing"
                if lost:
                    held.forget_later(damage.first)
                    held.required = {label for label in held.required if label < damage.first}
                    folder = self.path / damage.point
                    written = any("written anew with what" in line and str(folder / ARCHIVE) in line for line in told)
                    written = written or (killed and damage.first == 0)
                    held.salvaged = (held.salvaged or written) and (folder / ARCHIVE).exists()
            elif damage.kind == "bytes" and damage.point is not None and not self._standing(damage):
                self.points[damage.point].forget_later()  # of a file that was measured afterwards
        self.damages = self.standing
        lost = [damage for damage in self.damages if damage.kind == "checksum" and not self.swapped]
        assert not lost, "repair leaves a whole file without its checksum"

    def _killed_in_repair(self, moment: int) -> bool:
        steps["kill in repair"] += 1

        def work() -> None:
            die_at(moment, self.path)
            with contextlib.suppress(*SENTENCES):
                integrity.repair(self.path)

        end = child(work, self.path)
        assert end.how in ("done", "killed"), f"{end.how}: {end.words}"
        return True

    @precondition(lambda self: any(point.salvaged for point in self.points.values()))
    @rule()
    def remove_what_was_salvaged(self) -> None:
        """As `repair` says: removed, it is computed again."""
        for name, point in self.points.items():
            if point.salvaged:
                steps["remove the salvaged"] += 1
                self._may_change()
                whole_files.remove_sealed(self.path / name / ARCHIVE)
                point.salvaged, point.required = False, set()
                point.born = self.input
                point.forget_later()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's log."""
    before = logging.getLogger("tsdyn").level
    logging.getLogger("tsdyn").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("tsdyn").setLevel(before)
