"""Thousands of steps of the state machine over a directory (`tests.archive.states`), for at most two hours."""

from __future__ import annotations

import gc
import random
import sys
import time
import traceback
from pathlib import Path

import dask
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.archive.states import actions as states

#: Seconds after which no further directory is begun.
AT_MOST = 7200
#: Directories that are begun one after another, the first by the simplest of all choices, and steps in each at most.
DIRECTORIES, STEPS = 10, 40


def steps(scratch: Path, rng: random.Random, number: int) -> str:
    """So many rules, in any order, each followed by a comparison with an undisturbed run."""
    dask.config.set(scheduler="synchronous")  # its threads do not survive a fork
    gc.collect()
    gc.freeze()  # or each child's first collection copies everything that was imported, for half a second
    states.steps.clear()
    began, directories = time.monotonic(), 0
    found = settings(
        max_examples=DIRECTORIES, stateful_step_count=STEPS, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate], report_multiple_bugs=False,
    )  # fmt: skip
    with states.quiet():
        while states.steps.total() < number and time.monotonic() - began < AT_MOST:
            states.Directory._hypothesis_internal_use_seed = rng.getrandbits(64)  # type: ignore[attr-defined]
            try:
                run_state_machine_as_test(states.Directory, settings=found)
            except Exception as error:
                rules = "".join(traceback.format_exception(error))  # with Hypothesis' list of the rules
                raise AssertionError(f"after {states.steps.total()} steps ({told()}): {rules}") from error
            directories += DIRECTORIES
            print(f"  {states.steps.total()} steps in {directories} directories: {told()}", file=sys.stderr, flush=True)
    return f"{states.steps.total()} steps in {directories} directories ({told()}): nothing lost, wrong or unsaid"


def told() -> str:
    """How often each rule was applied."""
    return ", ".join(f"{name} {count}" for name, count in states.steps.most_common())
