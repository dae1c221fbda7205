"""Damage and interruptions where a test needs them, and what is still whole after them."""

import signal

import numpy as np

#: What small experiments of these tests have, and the sweep that some are given.
FEW = {"seeds": 2, "record__observables": ["mse", "weight"]}
SWEEP = {"teacher.polarity": [0.0, 1.0]}


def damage(file, numbers):
    """Flip a bit of the first of some numbers, as they are stored in a file."""
    raw, wanted = bytearray(file.read_bytes()), np.ascontiguousarray(numbers).tobytes()
    assert raw.count(wanted), f"{file} does not hold these numbers as they are"
    raw[raw.find(wanted)] ^= 1
    file.write_bytes(raw)


def same(one, other):
    """Assert that all variables of `other` have the same numbers in `one`."""
    for name, array in other.data_vars.items():
        np.testing.assert_array_equal(one[name].values, array.values, err_msg=str(name))


def stop_after(epoch):
    """A progress that stops a run once it has told of an epoch, as SIGTERM does."""

    def stop(now, *_):
        if now == epoch:
            signal.raise_signal(signal.SIGTERM)

    return stop
