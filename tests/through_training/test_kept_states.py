"""Derivatives begin from the states that an archive holds, and are to the bit those of a replay from the start."""

import numpy as np
import pytest
import xarray as xr

import tsdyn
from tests.through_training.test_twins import tiny
from tsdyn.through_training import sensitivity as made
from tsdyn.through_training.replay import Course, ReplayError

#: Whose states are kept every second epoch of six.
RUNS = {
    "weights recorded at every epoch": ({}, [1, 2, 3, 4, 5]),
    "weights recorded at the ends": ({"record__epochs": [0, 6]}, [2, 4]),
    "momentum": ({"training__momentum": 0.8}, [2, 4]),
    "adam": ({"training__method": "adam", "training__learning_rate": 0.02}, [2, 4]),
    "batch norm": ({"student__batch_norm": "before"}, [2, 4]),
    "fresh samples": ({"data__train": "fresh", "training__momentum": 0.5}, [2, 4]),
    "float32": ({"dtype": "float32", "training__momentum": 0.5}, []),
}


def kept_run(path, **changes):
    e = tiny(**{"training__epochs": 6, "record__state_every": 2} | changes)
    tsdyn.run(e, path)
    return e


def advanced(monkeypatch):
    """A list of the steps that the engine takes from now on."""
    taken, advance = [], Course.advance
    monkeypatch.setattr(Course, "advance", lambda self, steps: taken.append(steps) or advance(self, steps))
    return taken


@pytest.mark.parametrize("case", RUNS)
def test_the_result_is_to_the_bit_that_of_a_replay_from_the_start(case, tmp_path, monkeypatch):
    changes, epochs = RUNS[case]
    e = kept_run(tmp_path / "run", **changes)
    wrt = ["start", "learning_rate", *(["sample", "target", "input"] if e.data.train != "fresh" else [])]
    for memory in (None, 60_000):  # all states of a block at once, and some of them
        given = {"wrt": wrt, "certificate": False, "memory": memory}
        found = tsdyn.sensitivity(tmp_path / "run", **given)
        assert found.attrs["replayed_from"] == ",".join(map(str, [0, *epochs]))
        with monkeypatch.context() as patched:
            patched.setattr(made, "states_kept", lambda folder: {})
            without = tsdyn.sensitivity(tmp_path / "run", **given)
        assert without.attrs["replayed_from"] == ("0,1,2,3,4,5" if case.endswith("at every epoch") else "0")
        xr.testing.assert_equal(found, without)


def test_no_step_is_taken_twice_where_states_are_kept(tmp_path, monkeypatch):
    e = kept_run(tmp_path / "run", training__method="adam")
    taken = advanced(monkeypatch)
    tsdyn.sensitivity(tmp_path / "run", certificate=False)
    assert sum(taken) == e.steps * 6
    taken.clear()
    monkeypatch.setattr(made, "states_kept", lambda folder: {})
    tsdyn.sensitivity(tmp_path / "run", certificate=False)
    assert sum(taken) == e.steps * (6 + 4)  # and once more to where the last block begins


def test_kept_states_shorten_what_must_fit_in_memory(tmp_path):
    for name, every in (("kept", 1), ("not kept", None)):
        kept_run(tmp_path / name, training__method="adam", training__epochs=8, record__state_every=every, seeds=[3])
    given = {"certificate": False, "memory": 18_000}
    assert tsdyn.sensitivity(tmp_path / "kept", **given).attrs["replayed_from"].endswith("6,7")
    with pytest.raises(MemoryError, match=r"record\.state_every"):
        tsdyn.sensitivity(tmp_path / "not kept", **given)


def test_points_of_a_sweep_and_seeds_begin_from_their_own_states(tmp_path):
    e = tiny(training__method="adam", training__epochs=4, record__state_every=2)
    tsdyn.run(e.replace({"sweep": {"training.learning_rate": [0.02, 0.05]}}), tmp_path / "sweep")
    ds = tsdyn.open(tmp_path / "sweep")
    whole = tsdyn.sensitivity(ds, certificate=False)
    one = tsdyn.sensitivity(ds.sel(learning_rate=0.05).isel(seed=[1]), certificate=False)
    assert one.attrs["replayed_from"] == whole.attrs["replayed_from"] == "0,2"
    np.testing.assert_array_equal(one["d_start"][0], whole["d_start"].sel(learning_rate=0.05, seed=5))


def test_a_kept_state_of_another_run_is_refused(tmp_path, monkeypatch):
    from tsdyn.archive import states

    kept_run(tmp_path / "run", training__method="adam")
    read = states.states_after

    def other(path, epochs):
        found = read(path, epochs)
        found[4]["first_weight_1"] += 1e-5
        return found

    monkeypatch.setattr(states, "states_after", other)
    with pytest.raises(ReplayError, match=r"trained again from the archive's epoch [24] differs"):
        tsdyn.sensitivity(tmp_path / "run", certificate=False)
