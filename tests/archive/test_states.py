"""100 steps of the state machine over a directory; `python -m tests.torture states` makes thousands."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.archive.states import actions as states


class OneByOne(states.Directory):
    """The rules that do the same whenever they are repeated; `make torture` also has processes side by side."""

    side_by_side = False


@pytest.mark.parametrize("seed", [0, 1])
def test_a_directory_keeps_every_number_whatever_is_done_to_it(seed, monkeypatch):
    """Half of the steps each, so that two processes of the suite share them."""
    states.steps.clear()
    monkeypatch.setattr(OneByOne, "_hypothesis_internal_use_seed", seed, raising=False)
    fixed = settings(
        max_examples=3, stateful_step_count=20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    with states.quiet():
        run_state_machine_as_test(OneByOne, settings=fixed)
    print(states.steps)
    assert sum(states.steps.values()) >= 50
