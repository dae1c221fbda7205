"""A run that the tests of derivatives through training share, one of its own for each module."""

import pytest


@pytest.fixture(scope="module")
def relu_run(tmp_path_factory):
    import tsdyn  # not before its type checks are installed
    from tests.through_training.test_twins import tiny

    e = tiny(training__epochs=4, training__steps_per_epoch=15, record__observables=["loss", "weight", "correlation"])
    path = tmp_path_factory.mktemp("relu") / "run"
    tsdyn.run(e, path)
    return e, path
