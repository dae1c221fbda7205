"""Thousands of steps of the state machine over a directory (`tests.archive.states`), for at most an hour."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import dask
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.archive.states import actions as states

#: Seconds after which no further directory is begun.
AT_MOST = 3600
#: Directories that are begun one after another, and steps in each at most.
DIRECTORIES, STEPS = 5, 40


def steps(scratch: Path, rng: random.Random, number: int) -> str:
    """So many rules, in any order, each followed by a comparison with an undisturbed run."""
    dask.config.set(scheduler="synchronous")  # its threads do not survive a fork
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
            except AssertionError as error:
                raise AssertionError(f"after {states.steps.total()} steps: {error}") from error
            directories += DIRECTORIES
            print(f"  {states.steps.total()} steps in {directories} directories", file=sys.stderr, flush=True)
    made = ", ".join(f"{name} {count}" for name, count in states.steps.most_common())
    return f"{states.steps.total()} steps in {directories} directories ({made}): nothing lost, wrong or unsaid"
