"""Training of ensembles, by the first backend that can serve the members, the rule and the loss.

Backends in this order: the compiled step (one member at a time, without leaving the cache); chunks of hand-batched
steps that a GPU records as a graph; the hand-batched step; one forward pass of all members and autograd, for
convolutions and BatchNorm; and the general engine, which trains any module.  A backend serves only what it names, so
that a new rule, loss or module goes to the general engine until a backend names it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tsdyn.engine import batched, compiled_convnet, compiled_step, convolution, general, graph, native, propagated
from tsdyn.engine.batches import Batches, Stream
from tsdyn.engine.ensemble import Ensemble, living_blocks
from tsdyn.engine.rule import Rule
from tsdyn.networks.network import Network

_log = logging.getLogger("tsdyn")

#: (block, batches, rule, number of steps taken before) → None: takes the steps of `batches` in place.
Advance: TypeAlias = Callable[[Ensemble, Batches, Rule, int], None]


@dataclass(frozen=True)
class Backend:
    """An implementation of the training steps.

    Attributes:
        name: Name in logs and attributes.
        claims: Whether it can train these members with this rule and its loss.
        size: (ensemble, samples per batch) → members per block.
        advance: Takes the steps.
    """

    name: str
    claims: Callable[[Ensemble, Rule], bool]
    size: Callable[[Ensemble, int], int]
    advance: Advance


COMPILED = Backend("compiled", compiled_step.claims, lambda ensemble, _batch: ensemble.members, compiled_step.advance)
CHUNKS = Backend("chunks", graph.claims, graph.block_size, graph.advance)
BATCHED = Backend("batched", batched.claims, batched.block_size, batched.advance)
PROPAGATED = Backend("propagated", propagated.claims, propagated.block_size, propagated.advance)
#: The size of its blocks depends on the data, so `train_epoch` asks `general.block_size` instead of `size`.
GENERAL = Backend("general", general.claims, lambda ensemble, _batch: ensemble.members, general.advance)
#: The first backend whose `claims` is true trains the ensemble.
BACKENDS = (COMPILED, CHUNKS, BATCHED, PROPAGATED, GENERAL)


def chosen(ensemble: Ensemble, rule: Rule) -> Backend:
    """The backend that trains these members with this rule.

    Raises:
        ValueError: if they cannot be trained, with the reason.
    """
    backend = next(backend for backend in BACKENDS if backend.claims(ensemble, rule))
    own = compiled_step.own_part(ensemble, rule)
    if own is not None and native.serves(list(ensemble.tensors()), compiled_step.SOURCE, compiled_step.Job):
        _say_once(f"{own} is not tsdyn's own: the {backend.name} engine trains, slower than compiled code would")
    return backend


def fallbacks(ensemble: Ensemble, rule: Rule) -> list[str]:
    """Why these members are not trained by compiled code, where that could be; on a GPU there is none.

    Raises:
        ValueError: as `chosen`.
    """
    backend = chosen(ensemble, rule)
    if backend is COMPILED or ensemble.device.type != "cpu":
        return []
    slower = f"so the {backend.name} engine trains"
    network = ensemble.architecture
    if not isinstance(network, Network):
        return [f"the student is a module of its own, {slower}"]
    if network.convolutional:
        absent = native.missing(convolution.SOURCE, convolution.Job)
        reasons = [f"convolutions are not compiled: {absent}"] if absent is not None else []
        return reasons + compiled_convnet.unserved(network)
    absent = native.missing(compiled_step.SOURCE, compiled_step.Job)
    if absent is not None:
        return [f"the step is not compiled: {absent}; {slower}"]
    own = compiled_step.own_part(ensemble, rule)
    return [f"{own} is not tsdyn's own, {slower}" if own is not None else f"no compiled step serves this, {slower}"]


@functools.cache
def _say_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def train_epoch(ensemble: Ensemble, stream: Stream, rule: Rule, *, batch: int, backend: Backend | None = None) -> None:
    """Train every member that lives and has not stopped for one epoch, in place.

    The caller then looks for dead members (`mark_dead`).

    Args:
        ensemble: The members, trained in place.
        stream: The epoch's batches.
        rule: The update, and the loss that is minimised.
        batch: Samples per batch, which decides the block size.
        backend: The backend to use; `chosen` unless given.

    Raises:
        ValueError: if the members cannot be trained; says why.
    """
    backend = chosen(ensemble, rule) if backend is None else backend
    ensemble.prepare(rule.optimizer.moments)
    if not bool((ensemble.idle < 0).any()):
        return
    if backend is GENERAL:
        with torch.no_grad():
            size = general.block_size(ensemble, general.way(ensemble, stream, rule))
    else:
        size = backend.size(ensemble, batch)
    taken = 0
    for members in living_blocks(ensemble.idle, size):
        block, own, taken = ensemble.block(members), rule.block(members), 0
        with torch.no_grad():
            for batches in stream(members):
                backend.advance(block, batches, own, ensemble.steps + taken)
                taken += batches.steps
    ensemble.steps += taken
