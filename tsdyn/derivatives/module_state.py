"""Detects and undoes what calling a module may change: its state and the random generators it may draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

#: Limit on the bytes of parameters that are copied, to detect changes that do not raise a tensor's version counter.
SMALL = 64 << 20


#: Calls that must all change a random generator before a module counts as one that draws.
TRIALS = 3


class State:
    """A snapshot of a module's state, which can tell what a call has changed and restore it."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            (part, dict(vars(part)), [dict(vars(part)[n]) for n in ("_parameters", "_buffers", "_modules")])
            for part in module.modules()
        ]
        held = [*module.named_buffers(), *module.named_parameters()]
        small = sum(t.nbytes for _, t in held) <= SMALL
        self._tensors = [
            (name, t, t._version, t.detach().clone() if small or not isinstance(t, nn.Parameter) else None)
            for name, t in held
        ]

    def moved(self) -> str:
        """Name of a buffer or parameter that has changed since the snapshot; "" if none has."""
        for name, tensor, version, value in self._tensors:
            if value is None:
                if tensor._version != version:
                    return name
            elif not torch.equal(tensor, value) and not torch.allclose(tensor, value, rtol=0, atol=0, equal_nan=True):
                return name
        for part, _, dicts in self._parts:
            for attribute, before in zip(("_parameters", "_buffers"), dicts, strict=False):
                now = vars(part)[attribute]
                for name in now.keys() | before.keys():
                    if now.get(name) is not before.get(name):
                        return str(name)
        return ""

    def restore(self) -> None:
        for part, attributes, dicts in self._parts:
            for name in vars(part).keys() - attributes.keys():
                del vars(part)[name]
            vars(part).update(attributes)
            for attribute, before in zip(("_parameters", "_buffers", "_modules"), dicts, strict=True):
                now = vars(part)[attribute]
                if now.keys() != before.keys() or any(now[name] is not before[name] for name in before):
                    now.clear()
                    now.update(before)
        with torch.no_grad():
            for _, tensor, _, value in self._tensors:
                if value is not None and not torch.equal(tensor, value):
                    tensor.copy_(value)


class Randomness:
    """A snapshot of the global random generators that a module may draw from."""

    def __init__(self, module: nn.Module) -> None:
        self._devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        cuda = [torch.cuda.get_rng_state(d) for d in self._devices]
        return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()  # noqa: NPY002

    def moved(self) -> bool:
        """Whether random numbers were drawn since the snapshot.

        Python's ``random`` is ignored if beartype is loaded, which draws from it to choose what it checks.
        """
        return self._differs(self._before)

    def drawn_by(self, call: Callable[[], Any]) -> bool:
        """Whether each of a few calls draws: a single change may be another thread's, such as those of dask's workers.

        Calls that draw change a generator every time.
        """
        for _ in range(TRIALS):
            before = self._now()
            call()
            if not self._differs(before):
                return False
        return True

    def _differs(self, before: tuple[Any, ...]) -> bool:
        (cpu, cuda, numpy, python), (cpu0, cuda0, numpy0, python0) = self._now(), before
        return (
            not torch.equal(cpu, cpu0)
            or any(not torch.equal(a, b) for a, b in zip(cuda, cuda0, strict=True))
            or any(not np.array_equal(a, b) for a, b in zip(numpy, numpy0, strict=True))
            or (python != python0 and "beartype" not in sys.modules)
        )

    def restore(self) -> None:
        cpu, cuda, numpy, python = self._before
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)
