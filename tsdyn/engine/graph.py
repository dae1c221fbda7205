"""Chunks of training steps that need nothing from the host, so that a CUDA graph records them once and replays them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tsdyn.engine import batched
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule

#: Steps per CUDA graph: a replay costs about 10 µs on the host, and all their batches are in device memory at once.
CHUNK = 20


class Chunk:
    """Some steps of a block whose batches, rates and step count are on its device, so that none needs the host.

    On a CUDA device the first call records them as a graph, which later calls replay: the host then launches one graph
    per chunk instead of about fifteen kernels per step.  On other devices a call takes the steps one by one.

    Args:
        block: The members; their parameters and moments change in place.
        batches: An example of the batches, for their shapes.
        rule: The update; `rates` may be overwritten between calls.
        steps: Number of steps per call.
    """

    def __init__(self, block: Ensemble, batches: Batches, rule: Rule, steps: int) -> None:
        self.block, self.steps = block, steps
        x, y, rows = batches.inputs, batches.targets, batches.rows
        per, batch = (1, x.shape[1]) if rows is None else (steps, rows.shape[2])
        self.inputs = x.new_empty(per, len(x), batch, x.shape[2])
        self.targets = y.new_empty(per, len(y), batch, y.shape[2])
        self.rule = rule.on(block.values["weight_1"])
        self.taken = torch.zeros((), dtype=torch.float64, device=x.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def rates(self) -> Tensor:
        assert isinstance(self.rule.learning_rate, Tensor)
        return self.rule.learning_rate

    def load(self, batches: Batches, chosen: Tensor | None) -> None:
        """Copy the batches of the next call into the chunk; `chosen` are their rows, as in `Batches.chosen`."""
        for own, source in ((self.inputs, batches.inputs), (self.targets, batches.targets)):
            if chosen is None:
                own[0].copy_(source)
            else:
                torch.index_select(source.flatten(0, 1), 0, chosen.flatten(), out=own.view(-1, own.shape[-1]))

    def take(self) -> None:
        """Take the steps, one by one."""
        for i in range(self.steps):
            self.taken += 1
            at = i % len(self.inputs)
            batched.step(self.block, self.inputs[at], self.targets[at], self.rule, self.taken)

    def __call__(self) -> None:
        if self.inputs.device.type != "cuda":
            self.take()
        elif self._graph is None:
            # in their first call libraries allocate and choose algorithms, which a graph must not record: so these
            # steps are taken without one
            stream = torch.cuda.Stream(self.inputs.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.take()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records without computing
                self.take()
        else:
            self._graph.replay()


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether these members can be trained in recorded chunks with this rule."""
    return ensemble.device.type != "cpu" and batched.claims(ensemble, rule)


def block_size(ensemble: Ensemble, batch: int) -> int:
    """Members per block: all, or as many as make a chunk of a quarter of the device's memory.

    The rest of the memory is for data and records.
    """
    device, weights = ensemble.device, ensemble.weights
    if device.type != "cuda":
        return ensemble.members
    numbers = batched.numbers(ensemble, batch) + CHUNK * batch * (weights[0].shape[2] + weights[-1].shape[1])
    return max(1, torch.cuda.mem_get_info(device)[1] // 4 // (numbers * weights[0].element_size()))


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones; chunks are kept from epoch to epoch."""
    chosen, done = batches.chosen(), 0
    rates = rule.rates(block.values["weight_1"]).flatten()
    while done < batches.steps:
        steps = min(CHUNK, batches.steps - done)
        key = (
            "chunk", steps, batches.inputs.shape[0], None if batches.rows is None else batches.rows.shape[2],
            block.values["weight_1"].data_ptr(), replace(rule, learning_rate=0.0),
        )  # fmt: skip
        if key not in block.kept:
            block.kept[key] = Chunk(block, batches, rule, steps)
        chunk = block.kept[key]
        chunk.rates.copy_(rates)
        chunk.taken.fill_(taken + done)
        chunk.load(batches, None if chosen is None else chosen[done : done + steps])
        chunk()
        done += steps
