"""100 steps of the state machine over a directory; `python -m tests.torture states` makes thousands."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.archive.states import actions as states


def test_a_directory_keeps_every_number_whatever_is_done_to_it():
    states.steps.clear()
    fixed = settings(
        max_examples=8, stateful_step_count=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with states.quiet():
        run_state_machine_as_test(states.Directory, settings=fixed)
    print(states.steps)
    assert sum(states.steps.values()) >= 100
