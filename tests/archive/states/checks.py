"""What must hold of the directory after each rule, and what a refusal or a finding may be for."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import xarray as xr
from hypothesis.stateful import RuleBasedStateMachine, invariant

import tsdyn
from tests.archive.states.children import SENTENCES
from tests.archive.states.model import LATER, Damage, Opened, Point, content, differs, teacher
from tsdyn.archive import integrity, sweep_directory, whole_files
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT
from tsdyn.archive.selecting import experiment_of, swept_dimensions
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import places

#: Rules that were applied in this process, by name, and those that found nothing to do.
steps: Counter[str] = Counter()


def allowed(condition: bool, words: str) -> None:
    if not condition:
        raise AssertionError(words)


class Checked(RuleBasedStateMachine):
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
        #: Children of the directory that were kept, and the epoch at which they branched off.
        self.children: tuple[Path, int] | None = None
        #: What is asked for beside epochs and seeds, which decides no number that was there.
        self.more: dict[str, Any] = {}

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
        return self.base.replace({"training.epochs": epochs, **gained, **self.more})

    def _put_teacher(self) -> None:
        (self.scratch / "teacher.pt").write_bytes(teacher(self.input))

    def _standing(self, damage: Damage) -> bool:
        """Whether what a rule did is still so."""
        if damage.kind == "checksum":
            (seal,) = damage.files
            return not (self.path / seal).exists() and (self.path / seal.removesuffix(whole_files.SUFFIX)).exists()
        return any(after is not None and content(self.path / name) == after
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
        self.children = None

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_wrong(self) -> None:
        found = [(p, p.stat()) for p in sorted(self.scratch.rglob("*"))]
        now = [(p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found], list(map(id, self.opened))
        if not self.path.exists() or self.seen == now:
            return
        self.seen = now
        self._read_all()

    def _read_all(self) -> None:
        """Compare the directory, and what was opened before, with the model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._look(skip_damaged=False)
            if self.harmed and self.base.sweep:
                self._look(skip_damaged=True)
            for opened in self.opened:
                try:
                    found = opened.ds.compute()
                except SENTENCES as error:
                    allowed(not opened.must, f"what was opened before is refused: {error}")
                else:
                    self._compare(found, opened.points, required=False)

    def _look(self, *, skip_damaged: bool) -> None:
        required = any(point.required for point in self.points.values())
        try:
            found = tsdyn.open(self.path, skip_damaged=skip_damaged).compute()
        except SENTENCES as error:
            allowed(self.harmed or not required, f"refused: {error}")
        else:
            self._compare(found, self.points, required=not self.harmed)

    def _compare(self, found: xr.Dataset, points: dict[str, Point], *, required: bool) -> None:
        swept = swept_dimensions(found)
        for name, point in points.items():
            if any(place >= found.sizes[dim] for dim, place in zip(swept, point.place, strict=True)):
                assert not (required and point.required), f"{name} is lost"  # a point that is asked for, and not begun
                continue
            part = found.isel(dict(zip(swept, point.place, strict=True)))
            shown = [int(epoch) for epoch in part.epoch.values]
            truth = point.truth
            assert set(shown) <= set(truth.epoch.values.tolist()), f"{name}: labels {shown}"
            seeds = [int(seed) for seed in part.seed.values]
            assert set(seeds) <= set(truth.seed.values.tolist()), f"{name}: seeds {seeds}"
            if required:
                assert point.required <= set(shown), f"{name}: {sorted(point.required - set(shown))} are lost"
                assert not point.required or point.seeds <= set(seeds), f"{name}: seeds {seeds} of {point.seeds}"
            rows, members = truth.get_index("epoch").get_indexer(shown), truth.get_index("seed").get_indexer(seeds)
            for variable, array in truth.data_vars.items():
                if variable not in part:
                    needed = variable != LATER or any(labels & point.required for labels in point.later.values())
                    lost = required and needed and point.required and not point.salvaged
                    assert not lost, f"{name}: {variable} is lost"
                elif "wrong" not in part[variable].attrs:
                    along = "epoch" in array.dims
                    first = ("seed", "epoch") if along else ("seed",)
                    there, model = (one.transpose(*first, ...).values for one in (part[variable], array))
                    for place, label in enumerate(shown) if along else [(0, 0)]:
                        for group, must in point.members(seeds, label, str(variable)):
                            at = [seeds.index(seed) for seed in group]
                            now, wanted = there[at], model[members[at]]
                            if along:
                                now, wanted = now[:, place], wanted[:, rows[place]]
                            exact = label < point.rounded and not point.inexact & set(group)
                            said = differs(now, wanted, exact)
                            asked = required and must and label in point.required and not point.salvaged
                            may = swept or point.salvaged or not must
                            fine = not said or (said == "missing" and not asked and may)
                            fine = fine or (said == "partly missing" and (point.salvaged or not must))
                            fine = fine or ("missing" in said and variable == LATER and not (required and must))
                            assert fine, f"{name}: {variable} at epoch {label}, seeds {group}: {said}"

    def _same_from(self, children: Path, at: int) -> None:
        """Check that children that branched off at an epoch, and were not changed, are the model's runs."""
        assert integrity.check(children) == []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tsdyn.open(children).compute().isel(fork_epoch=0, branch=0)
        swept = [dim for dim in swept_dimensions(found) if dim in found.dims]
        labels = [label for label in experiment_of(found).labels if label > at]
        for name, point in self.points.items():
            if any(place >= found.sizes[dim] for dim, place in zip(swept, point.place, strict=True)):
                assert not point.required, f"child of {name} is not there"  # asked for, and not begun
                continue
            part = found.isel(dict(zip(swept, point.place, strict=True)))
            part = part.sel(epoch=labels)
            truth = point.truth.sel(epoch=part.epoch, seed=part.seed)
            exact = point.rounded == float("inf") and not point.inexact
            for variable in ("weight", "mse_train", "mse_eval"):
                if variable in truth and variable in part:
                    said = differs(part[variable].values, truth[variable].values, exact)
                    assert not said, f"child of {name}: {variable}: {said}"

    def _whole(self, problems: list[str]) -> None:
        """Check what `tsdyn validate` said."""
        told = [
            line for line in problems
            if "commit was cut short" not in line and "of the squared error" not in line
            and "sweep.json: is not there" not in line
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
        alike = {"training.epochs": 1, "seeds": 1, "record.state_every": 1}
        same = theirs.replace(alike) == self._asked(1).replace(alike)
        return same and (bool(self.base.sweep) or not list(self.path.rglob(ARCHIVE)))
