"""The finished runs of different seeds of one experiment, copied into one file side by side.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsdyn.archive import joining, netcdf
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.schema import Layout
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import Label


class Side(NamedTuple):
    """A finished run: its file, its shapes, and what the file says."""

    path: Path
    layout: Layout
    epochs: list[Label]
    variables: tuple[str, ...]
    attrs: dict[str, Any]

    @classmethod
    def of(cls, path: Path, layout: Layout) -> Side:
        with netcdf.dataset(path, only=layout.path) as nc:
            return cls(path, layout, nc[layout.path][:].tolist(), tuple(nc.variables), netcdf.attributes(nc))


def join(
    sides: Sequence[Side],
    layout: Layout,
    epochs: Sequence[Label],
    variables: Sequence[str],
    dtype: str,
    attrs: Mapping[str, Any],
    target: Path,
) -> str | None:
    """Write all numbers of the sides into `target`, and read them back; the variable that differs, or None.

    Args:
        sides: Runs of different seeds.
        layout: That of all seeds.
        epochs: All recorded labels; NaN where a side did not record one.
        variables: What `target` holds; NaN where a side did not record one.
        dtype: Of the numbers.
        attrs: Global attributes.
        target: A new file.
    """
    states = states_beside(sides, layout)
    with joining.little_cached():
        with netcdf.dataset(target, "w") as nc:
            netcdf.create(nc, layout, epochs, variables, dtype, attrs)
            for name, at, block in _placed(sides, layout, epochs, variables):
                if not np.isnan(block).all():
                    nc[name][at] = block
            for side in sides:
                with netcdf.dataset(side.path) as held:
                    nc["death_epoch"][_members(side, layout)] = held["death_epoch"][:]
            for group, state in states.items():
                netcdf.write_state(nc, state, group)
        with netcdf.dataset(target) as nc:
            for name, at, block in _placed(sides, layout, epochs, variables):
                if not joining.same_numbers(np.asarray(nc[name][at]), block):
                    return name
            for side in sides:
                with netcdf.dataset(side.path) as held:
                    if not np.array_equal(nc["death_epoch"][_members(side, layout)], held["death_epoch"][:]):
                        return "death_epoch"
            for group, state in states.items():
                stored = netcdf.read_state(nc, group)
                odd = [n for n, array in state.items() if not joining.same_numbers(stored[n], np.asarray(array))]
                if odd:
                    return f"{group}/{odd[0]}"
    return None


def _members(side: Side, layout: Layout) -> list[int]:
    return [layout.seeds.index(seed) for seed in side.layout.seeds]


def _placed(
    sides: Sequence[Side], layout: Layout, epochs: Sequence[Label], variables: Sequence[str]
) -> Iterator[tuple[str, tuple[slice | int, ...], np.ndarray]]:
    """(variable, index into the joined file, numbers), block by block."""
    position = {label: i for i, label in enumerate(epochs)}
    for side in sides:
        members, labels = _members(side, layout), [position[label] for label in side.epochs]
        part = joining.Part(side.path, 0, len(side.epochs), side.attrs)
        names = [name for name in variables if name in side.variables]
        with netcdf.dataset(side.path) as nc:
            for index, name, block in joining.gathered([part], side.layout, names, nc):
                dims = variable_of(name).dims
                along = {"seed": members, "epoch": labels}
                pieces: list[tuple[tuple[slice | int, ...], tuple[slice, ...]]] = [((), ())]
                for dim, at in zip(dims, index, strict=True):
                    if isinstance(at, int):
                        pieces = [((*target, at), own) for target, own in pieces]
                        continue
                    runs = _runs(along[dim][at]) if dim in along else [(at, slice(None))]
                    pieces = [((*target, there), (*own, here)) for target, own in pieces for there, here in runs]
                for target, own in pieces:
                    yield name, target, np.ascontiguousarray(block[own])


def _runs(positions: Sequence[int]) -> list[tuple[slice, slice]]:
    """Positions as slices of those that follow one another, each with the slice of the list that they are."""
    found, start = [], 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] != positions[end - 1] + 1:
            found.append((slice(positions[start], positions[end - 1] + 1), slice(start, end)))
            start = end
    return found


def states_beside(sides: Sequence[Side], layout: Layout) -> dict[str, dict[str, np.ndarray]]:
    """The training states of all seeds, by the name of the group: that after the last epoch, and those along the way.

    A state along the way that one side does not keep is left out: it would be of some members only.

    Raises:
        ArchiveError: if a side keeps no state, or other arrays than the others.
    """
    held = []
    for side in sides:
        with netcdf.dataset(side.path) as nc:
            held.append({group: netcdf.read_state(nc, group) for group in netcdf.state_groups(nc)})
            if netcdf.STATE not in held[-1]:
                raise ArchiveError(f"{side.path}: keeps no training state; run further seeds into another directory")
    return {
        group: _state_beside([(side, states[group]) for side, states in zip(sides, held, strict=True)], layout)
        for group in held[0]
        if all(group in states for states in held)
    }


def _state_beside(parts: Sequence[tuple[Side, Mapping[str, np.ndarray]]], layout: Layout) -> dict[str, np.ndarray]:
    names = set(parts[0][1])
    found: dict[str, np.ndarray] = {}
    for side, state in parts:
        if set(state) != names:
            raise ArchiveError(f"{side.path}: its training state has other arrays than that of the other seeds")
        at = _members(side, layout)
        for name, array in state.items():
            if not array.ndim:  # the number of steps, which a run whose members all died stopped counting
                found[name] = np.maximum(found[name], array) if name in found else array
            elif len(array) == len(at):
                shape = (len(layout.seeds), *array.shape[1:])
                found.setdefault(name, np.zeros(shape, array.dtype))[at] = array
            else:
                raise ArchiveError(
                    f"{side.path}: {name} of its training state is of {len(array)} members, and the run of {len(at)}"
                )
    return found
