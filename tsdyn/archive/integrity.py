"""Check whether a directory is whole (`check`), and keep what can be kept of a damaged one (`repair`).

Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray

from tsdyn import schema, vocabulary
from tsdyn.archive import additions, netcdf, own_process, study_directories, swept_values
from tsdyn.archive.headers import Source, refuse_of_other_inputs
from tsdyn.archive.lock import Lock
from tsdyn.archive.reading import opened
from tsdyn.archive.recordings import FILE, Recording, flush_below, recordings_below
from tsdyn.archive.run_directory import (
    ADDED,
    ARCHIVE,
    DROPPED,
    EXPERIMENT,
    KEPT,
    RUN,
    SEGMENTS,
    extends,
    segment_epochs,
    segments,
)
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.archive.sweep_directory import is_sweep, possible_names, sweep_points
from tsdyn.archive.swept_values import SWEEP
from tsdyn.archive.whole_files import (
    SUFFIX,
    ArchiveError,
    DirectoryError,
    local_path,
    make_directory,
    refuse_link,
    refused,
    replacing,
    seal_of,
    sealed,
    sha256,
    sync_directory,
    write_text,
)
from tsdyn.archive.wrong_numbers import WRONG
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import sweep_dimensions

#: Where `repair` puts what is not whole; nothing is deleted.
DAMAGED = "damaged"


def check(path: str | Path) -> list[str]:
    """Problems of a run, a sweep or a file, one sentence per problem; empty if it is whole.

    Checked are schema, attributes, the order of epochs, checksums of every segment and archive and agreement with
    ``experiment.toml``; and every stored number is read once.  An unfinished run is whole if what it committed is.
    """
    path = local_path(path)
    flush_below(path)
    if path.is_dir() and not (path / EXPERIMENT).exists() and (found := recordings_below(path)):
        return list(dict.fromkeys(problem for folder in found for problem in _check_run(folder)))
    if is_sweep(path):
        return list(dict.fromkeys(_check_sweep(path)))
    of_a_study = study_directories.result(path)
    if of_a_study is not None:
        return _check_study(of_a_study)
    if path.is_dir():
        return list(dict.fromkeys(_check_run(path)))
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist")
    return list(dict.fromkeys([*_check_file(path), *_said_of(path)]))


def _check_study(file: Path) -> list[str]:
    """Problems of a study directory of tsdyn 0.1, which has no checksum: unreadable, or variables without a name."""
    try:
        ds = study_directories.read(file)
    except ArchiveError as error:
        return [str(error)]
    wanted = ("units", "long_name")
    return [
        f"{file}: {name}: attribute {key!r} is missing"
        for name, a in ds.items()
        for key in wanted
        if key not in a.attrs
    ]


def _check_sweep(path: Path) -> Iterator[str]:
    try:
        points = sweep_points(path)
    except (ExperimentError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{path}: the sweep cannot be read: {error}"
        return
    yield from _check_list(path, points)
    for name, (_, experiment) in points.items():
        if (path / name).is_symlink():
            yield f"{path / name}: is a symbolic link; a sweep holds its own points"
        elif (path / name).exists():
            yield from _check_run(path / name, experiment)


def _check_list(path: Path, points: Mapping[str, tuple[dict[str, Any], Experiment]]) -> Iterator[str]:
    """Problems of ``sweep.json``, which `tsdyn run` writes anew."""
    if not (path / SWEEP).is_file():
        if any((path / name).exists() for name in points):
            yield f"{path / SWEEP}: is not there; the same `tsdyn run` writes it anew"
        return
    try:
        index = json.loads((path / SWEEP).read_text(encoding="utf-8"))
        listed = {point["directory"] for point in index["points"]}
        names = [swept_values.dimensions(path, values) for values, _ in list(points.values())[:1]]
        named = set().union(*(possible_names(values, *names) for values, _ in points.values()))
        if len(listed) != len(points) or not listed <= named:
            yield f"{path / SWEEP}: lists other points than {EXPERIMENT} has"
    except (ExperimentError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{path / SWEEP}: cannot be read as a list of points ({error}); the same `tsdyn run` writes it anew"


def _check_run(path: Path, expected: Experiment | None = None) -> Iterator[str]:
    for entry in (path / EXPERIMENT, path / FILE, path / ARCHIVE, path / SEGMENTS):
        if entry.is_symlink():
            yield f"{entry}: is a symbolic link; a run holds its own files"
    try:
        experiment = _of_directory(path)
    except (ExperimentError, ArchiveError, schema.SchemaError) as error:
        yield str(error)
        return
    if expected is not None and experiment != expected and not _extends(expected, experiment):
        yield f"{path / EXPERIMENT}: is not the point of the sweep that the directory is named for"
    finished = (path / ARCHIVE).exists()
    try:
        files = [path / ARCHIVE] if finished else [segment.path for segment in segments(path)]
    except ArchiveError as error:
        yield str(error)
        return
    for seal in (path / SEGMENTS).glob(f"*{SUFFIX}"):
        if not finished and seal.with_name(seal.name.removesuffix(SUFFIX)) not in files:
            yield f"{seal}: the checksum of a segment that is not there: lost, or its commit was cut short"
    later = list(_check_additions(path, experiment))
    yield from later
    if (path / ADDED / EXPERIMENT).exists():
        yield from _check_run(path / ADDED)
    problems = [problem for file in files for problem in _check_file(file, experiment)]
    yield from problems
    # the library can crash in a file that differs from its checksum
    yield from (told for file in files if _differs(file) not in problems for told in _said_of(file))
    if problems:  # the epochs that a damaged file claims to hold prove nothing
        return
    if files and not later:
        try:
            for file in additions.files(path):
                refuse_of_other_inputs(Source.of(file), Source.of(files[-1]))
        except ArchiveError as error:
            yield str(error)
    epochs: list[vocabulary.Label] = []
    kept: set[vocabulary.Label] = set()
    dimension = experiment.layout.path
    for file in files:
        with netcdf.dataset(file, only=dimension) as nc:
            epochs += nc[dimension][:].tolist()
            kept |= set(np.atleast_1d(netcdf.attributes(nc).get(KEPT, ())).tolist())
    last = epochs[-1] if epochs else -1
    recorded = set(epochs)
    missing = [e for e in experiment.labels if e not in recorded and (finished or e <= last)]
    if missing:
        yield f"{path}: {dimension}s {_few(missing)} are not there"
    yield from _check_members(path, files, experiment)
    if not later:
        yield from _measured_of_nothing(path)
    listed = set(experiment.labels) if isinstance(experiment, Experiment) else recorded
    extra = sorted(recorded - listed - kept) if finished else []
    if extra or epochs != sorted(recorded):
        yield f"{path}: {dimension}s {_few(extra or epochs)} are not those of the schedule, in order"


def _check_members(path: Path, files: Sequence[Path], experiment: Experiment | Recording) -> Iterator[str]:
    """Problems of a finished run's seeds and variables: others than the experiment file names."""
    if not (path / ARCHIVE).exists() or not isinstance(experiment, Experiment):
        return
    with netcdf.dataset(files[0]) as nc:
        seeds, names = set(nc["seed"][:].tolist()), set(nc.variables)
    missing, more = sorted(set(experiment.seed_labels) - seeds), sorted(seeds - set(experiment.seed_labels))
    if missing:
        yield f"{path}: seeds {_few(missing)} are not there"
    if more:
        yield f"{path}: seeds {_few(more)} are there, and {EXPERIMENT} does not name them: a commit was cut short"
    try:
        asked = set(experiment.recorded())
    except schema.SchemaError:  # variables of a package, which is not imported to read an archive
        asked = set()
    lost = sorted(asked - names)
    if lost:
        yield f"{path}: {', '.join(lost)} are not there"


def _check_additions(path: Path, experiment: Experiment | Recording) -> Iterator[str]:
    """Problems of what was measured of a run later."""
    try:
        files = additions.files(path)
    except ArchiveError as error:
        yield str(error)
        return
    for file in files:
        yield from _check_file(file, experiment)
    for seal in (path / additions.MEASURED).glob(f"*{SUFFIX}"):
        if seal.with_name(seal.name.removesuffix(SUFFIX)) not in files:
            yield f"{seal}: the checksum of a file that is not there: lost, or its commit was cut short"


def _measured_of_nothing(path: Path) -> Iterator[str]:
    """What an earlier version measured as NaN where the run's parameters are stored: they may have been lost then."""
    headers = [Source.of(file).header for file in additions.files(path)]
    if all(additions.trusted(header.attrs) for header in headers):
        return
    ds = opened(path, upto=-1.0)
    there = additions.parameters_there(ds)
    doubted: dict[str, NDArray] = {}
    for trusted in (False, True):
        for header in (header for header in headers if additions.trusted(header.attrs) is trusted):
            for name in (name for name in header.variables if name in ds):
                inside = np.logical_and.outer(*(np.isin(ds[dim], header.labels[dim]) for dim in ("seed", "epoch")))
                before = doubted.get(name, np.zeros_like(inside))
                doubted[name] = before & ~inside if trusted else before | inside
    for name, where in doubted.items():
        inner = [dim for dim in ds[name].dims if dim not in ("seed", "epoch")]
        empty = where & there & ds[name].isnull().all(inner).transpose("seed", "epoch").values
        if empty.any():
            seeds, epochs = ds["seed"].values[empty.any(1)].tolist(), ds["epoch"].values[empty.any(0)].tolist()
            yield (
                f"{path / additions.MEASURED}: {name} is NaN at seeds {_few(seeds)}, epochs {_few(epochs)}, where the "
                f"run's parameters are stored: an earlier version may have measured it while they were lost; `tsdyn "
                f"measure {path} --observables {name}` measures it again"
            )


def _of_directory(path: Path) -> Experiment | Recording:
    if (path / FILE).is_file():
        return _known(Recording.of_directory(path))
    return Experiment.from_toml(path / EXPERIMENT, archived=True)


def _known(recording: Recording) -> Recording:
    recording.adopt()
    return recording


def _extends(longer: Experiment, shorter: Experiment | Recording) -> bool:
    return isinstance(shorter, Experiment) and extends(longer, shorter)


def _of_text(text: str) -> Experiment | Recording:
    if text.startswith('kind = "recording"'):
        return _known(Recording.of_text(text))
    return Experiment.from_toml_text(text, archived=True)


def _check_file(path: Path, experiment: Experiment | Recording | None = None) -> Iterator[str]:
    try:
        kept = sealed(path)
    except ArchiveError as error:
        yield str(error)
        return
    if kept is False:
        yield _differs(path)
        found = _apart(path, lambda: _contents(path, experiment))
        yield from [f"{path}: reading it any further crashes the library"] if found is None else found
    else:
        yield from _contents(path, experiment, unsealed=kept is None)


def _said_of(path: Path) -> Iterator[str]:
    """Problems of a readable file's numbers: it was repaired, or an earlier version computed them wrongly."""
    with suppress(ArchiveError, OSError):  # what cannot be read is named by `_contents`
        source = Source.of(path)
        if DROPPED in source.header.attrs:
            yield f"{path}: was repaired; dropped: {source.header.attrs[DROPPED]}"
        if source.wrong:
            yield f"{path}: {', '.join(source.wrong)}: {WRONG}"


def _contents(path: Path, experiment: Experiment | Recording | None, *, unsealed: bool = False) -> Iterator[str]:
    try:
        ds = opened(path, upto=-1.0)  # it was compared just before
    except ArchiveError as error:
        yield str(error)
        return
    with ds:
        yield from (f"{path}: {problem}" for problem in schema.problems(ds, swept=swept_dimensions(ds)))
        if isinstance(experiment, Experiment):
            own = [(c.attrs, c.values) for c in ds.coords.values() if swept_values.KEY in c.attrs and c.ndim == 0]
            for key in swept_values.disagreeing(own, experiment):
                yield f"{path}: {key} is another in its coordinate of the swept value than in its experiment"
    try:
        with netcdf.dataset(path) as nc:
            if experiment is not None and not _is_of(nc.__dict__, experiment):
                yield _of_another(path)
            if experiment is not None and unsealed and int(nc.schema_version) > 1:
                yield _without_checksum(path)
            for name, array in nc.variables.items():
                for index in netcdf.blocks(array):
                    try:
                        array[index]
                    except (OSError, RuntimeError) as error:
                        yield f"{path}: {name} cannot be read at {_where(array, index)}: {error}"
    except (OSError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        yield f"{path}: cannot be read: {error}"


def _differs(path: Path) -> str:
    return f"{path}: its checksum differs from the one kept in {seal_of(path).name}: it was changed or is damaged"


def _of_another(path: Path) -> str:
    return f"{path}: the archive's digest is not that of {EXPERIMENT}"


def _without_checksum(path: Path) -> str:
    return f"{path}: has no checksum beside it ({seal_of(path).name})"


def _apart(file: Path, work: Callable[[], Iterator[str]]) -> list[str] | None:
    """The lines that `work` gives for a damaged file, from a process of its own; None if that failed.

    On damaged bytes the netCDF library can crash its process or never return.
    """
    try:
        return own_process.reading(file, lambda: list(work()))
    except Exception:  # of any type: damaged bytes can make the library raise whatever there is
        return None


def _is_of(attrs: Mapping[str, Any], experiment: Experiment | Recording) -> bool:
    """Whether a file's attributes name `experiment`, or a shorter one that it extends."""
    if isinstance(experiment, Recording):
        return attrs.get("recording") == experiment.to_toml()
    text = str(attrs.get("experiment"))
    try:
        theirs = Experiment.from_toml_text(text, archived=True)
    except ExperimentError:
        return False
    # digests of tsdyn 0.1 were over all keys, those at their defaults too
    whole = json.dumps(tomllib.loads(text), sort_keys=True, separators=(",", ":"))
    named = attrs.get("digest") in (theirs.digest, hashlib.sha256(whole.encode()).hexdigest())
    # where seeds were joined and it was cut short, the archive is ahead of the experiment file
    return named and (theirs == experiment or extends(experiment, theirs) or extends(theirs, experiment))


def _where(array: netCDF4.Variable, index: tuple[slice, ...]) -> str:
    return ", ".join(f"{dim} {i.start}..{i.stop - 1}" for dim, i in zip(array.dimensions, index, strict=True))


def _few(epochs: Sequence[vocabulary.Label]) -> str:
    shown = ", ".join(map(str, epochs[:5]))
    return shown if len(epochs) <= 5 else f"{shown} and {len(epochs) - 5} more"


def repair(path: str | Path) -> list[str]:
    """Make a damaged run, or every point of a sweep, one that can be opened and resumed; returns what was dropped.

    Segments are kept up to the first damaged one; ``tsdyn run`` computes the rest again, to the same bits.  Of a
    damaged archive without segments every block that can be read and passes its checksum is kept, and the others
    become NaN.  What is not kept is moved to ``damaged/``, not deleted.

    Raises:
        ArchiveError: if another process is writing there, no experiment can be found in it, or it holds symbolic
            links, through which files elsewhere would be moved.
    """
    path = local_path(path)
    if path.is_dir() and not (path / FILE).exists() and not (path / EXPERIMENT).exists():
        below = recordings_below(path)
        if below:
            return [line for folder in below for line in repair(folder)]
    if is_sweep(path):
        try:
            points = [path / name for name in sweep_points(path)]
        except ExperimentError as error:
            raise DirectoryError(
                f"{error}; put the sweep's experiment file back; its points are whole or not each by itself: "
                "`tsdyn repair DIR/POINT`"
            ) from None
        for point in points:
            refuse_link(point)
        told = [line for point in points if point.is_dir() for line in repair(point)]
        return told + list(_without_leftovers(path))  # last: nobody is writing a point
    if not path.is_dir():
        raise DirectoryError(f"{path}: is not the directory of a run")
    for folder in (path, path / SEGMENTS, path / additions.MEASURED, path / DAMAGED):
        for entry in (folder, *folder.iterdir()) if folder.is_dir() else ():
            if entry != path:
                refuse_link(entry)
    with Lock(path):
        try:
            told = list(_repair_run(path))
        except OSError as error:
            raise refused(path, error) from error
    refuse_link(path / ADDED)
    return told + (repair(path / ADDED) if (path / ADDED / EXPERIMENT).exists() else [])


def _repair_run(path: Path) -> Iterator[str]:
    files = sorted((path / SEGMENTS).glob("*.nc"))
    try:
        experiment = _of_directory(path)
    except (ExperimentError, ArchiveError) as error:
        remembered = _remembered([path / ARCHIVE, *files])
        if remembered is None:
            raise DirectoryError(f"{error}; no whole file here remembers the experiment either") from None
        experiment = remembered
        own = path / (FILE if isinstance(remembered, Recording) else EXPERIMENT)
        if own.exists():
            _move_to_damaged(path, own)
        write_text(own, experiment.to_toml())
        yield f"{own}: written anew from what the archive remembers ({error})"
    yield from _without_leftovers(path, path / SEGMENTS, path / additions.MEASURED)
    after, added = -1, additions.files(path)
    found = {file: list(_check_file(file, experiment)) for file in [*files, path / ARCHIVE, *added] if file.exists()}
    for file, problems in found.items():
        if problems and sealed(file):
            raise ArchiveError(
                f"{problems[0]}; yet its checksum agrees: it is what was written, and the reason lies elsewhere (the "
                "file system, its locks, memory, or a file that belongs to another run); nothing was moved"
            )
    for file, problems in found.items():
        # each block of it has a checksum of its own, so that it is whole; which of the two was changed cannot be told
        if _of_another(file) in problems and set(problems) <= {_of_another(file), _without_checksum(file)}:
            raise ArchiveError(
                f"{problems[0]}; otherwise it is whole, and has no checksum beside it ({seal_of(file).name}): put the "
                "right experiment file back, or remove the archive if that one is right; nothing was moved"
            )
    for file, problems in found.items():
        if problems == [_without_checksum(file)]:  # every number of it was read, and each block has one of its own
            write_text(seal_of(file), f"{sha256(file)}  {file.name}\n")
            yield f"{problems[0]}, and is whole: its checksum was written anew"
            found[file] = []
    for file in files:
        match = segment_epochs(file)
        problems = found[file]
        if match is not None and match[0] == after + 1 and not problems:
            after = match[1]
            continue
        _move_to_damaged(path, file)
        reason = problems[0] if problems else f"{file}: whole, but epochs from {after + 1} before it are not there"
        yield f"{reason}; moved to {DAMAGED}/, `tsdyn run` computes its epochs again"
    for file in (file for file in added if found[file]):
        _move_to_damaged(path, file)
        yield f"{found[file][0]}; moved to {DAMAGED}/, `tsdyn measure` measures it again"
    for seal in (s for folder in (SEGMENTS, additions.MEASURED) for s in (path / folder).glob(f"*{SUFFIX}")):
        if not seal.with_name(seal.name.removesuffix(SUFFIX)).exists():
            _move_to_damaged(path, seal)
    if found.get(path / ARCHIVE):
        damaged = _move_to_damaged(path, path / ARCHIVE)
        yield f"{found[path / ARCHIVE][0]}; moved to {DAMAGED}/"
        if after == -1:
            yield from _salvaged(path, experiment, damaged)


def _without_leftovers(*folders: Path) -> Iterator[str]:
    """Remove the temporary files of writers that were killed."""
    for leftover in (file for folder in folders for file in folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
        yield f"{leftover}: removed; a write that was cut short"


def _remembered(files: Sequence[Path]) -> Experiment | Recording | None:
    for file in files:
        if file.exists() and sealed(file) is not False:
            try:
                own = Source.of(file).own
                return _of_text(own["recording"] if "recording" in own else own["experiment"])
            except (ArchiveError, ExperimentError, KeyError):
                continue
    return None


def _move_to_damaged(path: Path, file: Path) -> Path:
    """Move `file` and its checksum to ``damaged/``; returns its new path."""
    make_directory(path / DAMAGED)
    taken = {one.name for one in (path / DAMAGED).iterdir()}
    names = (f"{file.name}.{count}" if count else file.name for count in itertools.count())
    target = path / DAMAGED / next(name for name in names if name not in taken)
    for one, there in ((file, target), (seal_of(file), seal_of(target))):
        with suppress(FileNotFoundError):
            one.rename(there)
    sync_directory(file.parent)
    sync_directory(path / DAMAGED)
    return target


def _salvaged(path: Path, experiment: Experiment | Recording, damaged: Path) -> Iterator[str]:
    found = _apart(damaged, lambda: _salvage(path, experiment, damaged))
    if found is None:
        for leftover in path.glob(".*.tmp"):
            leftover.unlink()
        why = "reading it crashes the library"
        found = [f"{path / ARCHIVE}: nothing of it could be kept: {why}; `tsdyn run` computes it again"]
    yield from found


def _refuse_other_numbers(
    old: Any, new: Any, kept: Sequence[tuple[str, Any]], states: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Refuse a copy that reads back as other numbers: the library does not report every write that fails."""
    for name, index in kept:
        if not np.array_equal(np.asarray(new[name][index]), np.asarray(old[name][index]), equal_nan=True):
            raise DirectoryError(f"{name} at {_where(new[name], index)} reads back differently")
    for group, state in states.items():
        found = netcdf.read_state(new, group)
        if any(not np.array_equal(found.get(name, ()), array, equal_nan=True) for name, array in state.items()):
            raise DirectoryError(f"the state in {group} reads back differently")


def _swept(path: Path, experiment: Experiment | Recording) -> tuple[swept_values.Swept, ...]:
    if isinstance(experiment, Recording):
        return swept_values.of_values(experiment.config, sweep_dimensions(experiment.config))
    return swept_values.of_point(path, experiment)


def _salvage(path: Path, experiment: Experiment | Recording, damaged: Path) -> Iterator[str]:
    """Copy what can be read of the damaged archive into a new one."""
    layout, variables = experiment.layout, experiment.recorded()
    dropped: list[str] = []
    kept: list[tuple[str, Any]] = []
    states: dict[str, dict[str, np.ndarray]] = {}
    try:
        Source.of(damaged)
        with netcdf.dataset(damaged) as old, replacing(path / ARCHIVE, damaged.stat().st_size, seal=True) as temporary:
            if not _is_of(old.__dict__, experiment):
                raise DirectoryError("it is of another experiment, or that cannot be told")
            epochs = old[layout.path][:].tolist()
            if not set(experiment.labels) <= set(epochs) or epochs != sorted(set(epochs)):
                raise DirectoryError(f"its {layout.path}s cannot be told")
            with netcdf.dataset(temporary, "w") as new:
                attrs = {
                    name: value for name, value in netcdf.attributes(old).items() if name not in ("coordinates", RUN)
                }
                netcdf.create(new, layout, epochs, variables, experiment.dtype, attrs, _swept(path, experiment))
                for name in ("death_epoch", *variables):
                    for index in netcdf.blocks(new[name]):
                        try:
                            block = old[name][index]
                            if block.shape != tuple(part.stop - part.start for part in index):
                                raise ValueError("shape differs")
                        except (OSError, RuntimeError, ValueError, IndexError) as error:
                            dropped.append(f"{name} at {_where(new[name], index)} ({error})")
                            continue
                        kept.append((name, index))
                        if not np.isnan(block).all():
                            new[name][index] = block
                with suppress(OSError, RuntimeError):
                    states |= {group: netcdf.read_state(old, group) for group in netcdf.state_groups(old)}
                for group, state in states.items():
                    netcdf.write_state(new, state, group)
                new.setncattr(DROPPED, "; ".join(dropped) or "nothing that could be told")
                new.setncattr(RUN, secrets.token_hex(8))  # not the old one: it does not hold all that that file did
            with netcdf.dataset(temporary) as new:
                _refuse_other_numbers(old, new, kept, states)
    except (ArchiveError, OSError, RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        (path / ARCHIVE).unlink(missing_ok=True)
        yield f"{path / ARCHIVE}: nothing of it could be kept ({error}); `tsdyn run` computes it again"
        return
    yield from (f"{path / ARCHIVE}: dropped {line}" for line in dropped)
    yield f"{path / ARCHIVE}: written anew with what could be read; remove it and `tsdyn run` computes it again"
