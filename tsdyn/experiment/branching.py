"""The section ``[fork]`` of an experiment: where a run branches off another, and what changes there.  No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tsdyn.experiment.parts import MAX_COUNT, MAX_EPOCHS, Part

#: What a fork may change, and the keys that each change has: needed, then optional.
PERTURBATIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gaussian": ((), ()),
    "weight": (("layer", "node", "by"), ("input_node",)),
    "silence": (("layer", "node"), ()),
    "reinitialise": (("layer",), ("node",)),
    "transplant": (("seed", "layer", "node"), ("to",)),
    "swap": (("layer", "nodes"), ()),
    "set": ((), ()),
}


#: Keys of [training] and [data] that say what the run is.
_FIXED = (
    "training.epochs", "training.loss", "training.labels", "data.train", "data.eval", "data.law", "data.leave_out",
)  # fmt: skip


class Fork(Part):
    """How the run branches off another of the same experiment, and what changes there; written by `tsdyn.fork`.

    The run is the other's up to `fork_epoch`; there its state is changed, and it goes on.

    Attributes:
        parent: Directory of the other run or sweep, from which weights are read where they suffice; without one the run
            is no fork.
        fork_epoch: Epochs that are shared.
        branch: Number of the branch, which keys its random draws.
        perturb: At most one entry of `PERTURBATIONS`; none: nothing is changed.  ``gaussian``: N(0, s²) on every weight
            and bias, s relative to the rms of the layer's weights at epoch 0.  ``weight``: `by` is added to one weight,
            or to the bias if no `input_node` is given.  ``silence``: all weights of a node are 0.  ``reinitialise``:
            they are drawn again, of all nodes of the layer if no `node` is given.  ``transplant``: they are those of a
            node of another seed.  ``swap``: two `nodes` of a layer change places, or `node` and `node_2`.  ``set``:
            keys of the experiment that have other values from there on.
        draws: Whether batches and fresh samples are the other run's or new ones.
    """

    parent: str | None = None
    fork_epoch: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 0
    branch: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    perturb: dict[str, Any] = {}  # noqa: RUF012 (pydantic gives each its own)
    draws: Literal["same", "other"] = "same"

    @field_validator("perturb", mode="before")
    @classmethod
    def _a_list_of_nodes(cls, value: Any) -> Any:
        swap = value.get("swap") if isinstance(value, Mapping) else None
        if isinstance(swap, Mapping) and {"node", "node_2"} <= set(swap):
            rest = {key: of for key, of in swap.items() if key not in ("node", "node_2")}
            return {**value, "swap": {**rest, "nodes": [swap["node"], swap["node_2"]]}}
        return value

    @field_validator("perturb")
    @classmethod
    def _one_change(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(value) > 1 or set(value) - set(PERTURBATIONS):
            raise ValueError(f"perturb = {value}: at most one of {', '.join(PERTURBATIONS)}")
        for kind, given in value.items():
            if kind == "gaussian":
                if not isinstance(given, (int, float)) or isinstance(given, bool) or given < 0:
                    raise ValueError(f"perturb.gaussian = {given!r}: a relative size, 0 or more")
                continue
            fixed = [k for k in given if k.split(".")[0] not in ("training", "data")] if kind == "set" else []
            if fixed or (kind == "set" and set(_FIXED) & set(given)):
                raise ValueError(
                    f"perturb.set = {given}: cannot change during a run; keys of [training] and [data] can, but "
                    + ", ".join(_FIXED)
                )
            needed, more = PERTURBATIONS[kind]
            keys = set(given) if isinstance(given, Mapping) else None
            if keys is None or (kind != "set" and not set(needed) <= keys <= {*needed, *more}) or not keys:
                have = ", ".join((*needed, *(f"[{key}]" for key in more))) or "keys of the experiment"
                raise ValueError(f"perturb.{kind} = {given!r}: a table of {have}")
            for key in keys & {"layer", "node", "input_node", "seed", "to"}:
                if not isinstance(given[key], int) or given[key] < (1 if key == "layer" else 0):
                    raise ValueError(f"perturb.{kind}.{key} = {given[key]!r}: a label, a whole number")
            if kind == "swap" and (len(given["nodes"]) != 2 or not all(isinstance(n, int) for n in given["nodes"])):
                raise ValueError(f"perturb.swap.nodes = {given['nodes']!r}: two nodes of the layer")
        return value
