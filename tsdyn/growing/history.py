"""What was added to a run or a sweep, in order: epochs, seeds, observables, points, and what was measured later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tsdyn.archive import additions, changes, netcdf, states
from tsdyn.archive.run_directory import ADDED, ARCHIVE, EXPERIMENT, segments
from tsdyn.archive.sweep_directory import is_sweep, sweep_points
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment


def lines(path: Path) -> list[str]:
    """One line for each change of a run or a sweep, each with its time, oldest first; none for other paths."""
    if not path.is_dir() or not (path / EXPERIMENT).is_file():
        return []
    swept = is_sweep(path)
    folders = [path / name for name in sweep_points(path)] if swept else [path]
    entries = [(entry.get("at", ""), entry.get("added", "")) for entry in _changes(path, swept)]
    entries += list(_measured(folders))
    entries.sort(key=lambda entry: entry[0])  # within a second as they were noted, not by their words
    return [*(f"{at}  {added}" for at, added in entries), *_unfinished(folders)]


def states_kept(path: Path) -> str:
    """The training states along the way of a run, and of a sweep's first point, and their size; empty without any."""
    if not path.is_dir() or not (path / EXPERIMENT).is_file():
        return ""
    swept = is_sweep(path)
    folders = [path / name for name in sweep_points(path)] if swept else [path]
    begun = next((folder for folder in folders if (folder / ARCHIVE).is_file() or segments(folder)), None)
    held = {} if begun is None else states.kept(begun)
    if len(held) < 2:  # the last one is needed to train on
        return ""
    shown = [*map(str, held)] if len(held) <= 8 else [*map(str, [*held][:6]), "...", str([*held][-1])]
    size = f"{sum(held.values()) / 1e6:.2g} MB"
    each = f" in each of {len(folders)} points" if len(folders) > 1 else ""
    return f"{len(held)} training states, after epochs {', '.join(shown)}: {size}{each}"


def _changes(path: Path, swept: bool) -> list[dict[str, str]]:
    if swept:
        return changes.of_sweep(path)
    try:
        files = [path / ARCHIVE] if (path / ARCHIVE).is_file() else [part.path for part in segments(path)[-1:]]
        for file in files:
            with netcdf.dataset(file) as nc:
                return changes.listed(netcdf.attributes(nc))
    except (ArchiveError, OSError):  # opening it says what is wrong
        pass
    return []


def _measured(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(time, words) for each variable that was measured after the runs."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for file in additions.files(folder):
            found.setdefault(file.name.rpartition("-")[0], []).append(file)
    for name, files in found.items():
        where = {file.parent.parent for file in files}
        with netcdf.dataset(files[-1]) as nc:
            at = str(additions.told(netcdf.attributes(nc)).get("at", ""))
            epochs = nc["epoch"][:].tolist()
        if len(folders) > 1:
            yield at, f"{name} measured afterwards, in {len(where)} of {len(folders)} points"
        else:
            span = f"epochs {epochs[0]}..{epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"
            before = f", after {len(files) - 1} times before" if len(files) > 1 else ""
            yield at, f"{name} measured afterwards, {span}{before}"


def _unfinished(folders: list[Path]) -> Iterator[str]:
    held = [folder for folder in folders if (folder / ADDED / EXPERIMENT).is_file()]
    if not held:
        return
    try:
        seeds = Experiment.from_toml(held[0] / ADDED / EXPERIMENT, archived=True).seed_labels
    except ExperimentError:
        seeds = ()
    where = f" in {len(held)} of {len(folders)} points" if len(folders) > 1 else ""
    yield f"unfinished: seeds {', '.join(map(str, seeds))} are being added{where}; the same `tsdyn run` goes on"
