"""Batches: the samples that the steps of an epoch train on, for a block of members at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batches:
    """The batches of some consecutive steps of a block of members; iterating gives (inputs, targets) of each step.

    Attributes:
        inputs: (member, sample, input).
        targets: (member, sample, output).
        rows: Indices of the samples in each batch, (member, step, batch); None: every step uses all samples.
        steps: Number of steps.
        noises: One generator per member, from which dropout layers draw at each step; none where there are no such.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor | None
    steps: int
    noises: tuple[np.random.Generator, ...] = ()

    def chosen(self) -> Tensor | None:
        """`rows` as indices into the samples of all members in one sequence, (step, member·batch)."""
        if self.rows is None:
            return None
        count, samples, _ = self.inputs.shape
        offsets = torch.arange(count, device=self.inputs.device).view(-1, 1, 1) * samples
        return (self.rows.to(self.inputs.device) + offsets).transpose(0, 1).flatten(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.rows is None:
            yield from ((self.inputs, self.targets) for _ in range(self.steps))
            return
        count, chosen = len(self.inputs), self.chosen()
        assert chosen is not None
        x_rows, y_rows = self.inputs.flatten(0, 1), self.targets.flatten(0, 1)
        x_batch = x_rows.new_empty(chosen.shape[1], x_rows.shape[1])
        y_batch = y_rows.new_empty(chosen.shape[1], y_rows.shape[1])
        for at in chosen:
            torch.index_select(x_rows, 0, at, out=x_batch)
            torch.index_select(y_rows, 0, at, out=y_batch)
            yield x_batch.view(count, -1, x_rows.shape[1]), y_batch.view(count, -1, y_rows.shape[1])


#: A function from a slice of members to the batches of the epoch's steps.
Stream: TypeAlias = Callable[[slice], Iterator[Batches]]


def finite_stream(inputs: Tensor, targets: Tensor, rows: Tensor | None, *, steps: int = 1) -> Stream:
    """The stream of batches from finite data.

    Args:
        inputs: (member, sample, input).
        targets: Teacher outputs, (member, sample, output), computed once for the whole run.
        rows: (member, step, batch), or None: each of `steps` steps uses all samples.
        steps: Number of steps, if `rows` is None.
    """

    def stream(members: slice) -> Iterator[Batches]:
        x, y = inputs[members], targets[members]
        yield Batches(x, y, None, steps) if rows is None else Batches(x, y, rows[members], rows.shape[1])

    return stream
