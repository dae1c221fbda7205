"""Which numbers of earlier versions are wrong, and the warning that says so.  Imports no torch."""

from __future__ import annotations

import tomllib


class WrongNumbersWarning(UserWarning):
    """An archive that is read holds numbers that are not what their variables' names say."""


#: Global attribute of an archive that an earlier version began: the last epoch whose numbers are its.
WRONG_THROUGH = "wrong_through"
#: Until version 2, these were measured of the squared error whatever loss was trained.
_OF_THE_LOSS = ("gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue")
#: What is to be told of them.
WRONG = (
    "of the squared error, though cross entropy was trained: tsdyn before 0.2 (archives of schema 2 and below) "
    "measured them so; run the experiment anew into another directory"
)


def wrong_variables(version: object, through: object, experiment: str) -> tuple[str, ...]:
    """Variables whose numbers are wrong in a file, by what it says of itself.

    Args:
        version: Its schema version.
        through: Its attribute `WRONG_THROUGH`, None if it has none.
        experiment: Its experiment, TOML.
    """
    if through is None and not (isinstance(version, int) and version <= 2):
        return ()
    try:
        trained = tomllib.loads(experiment).get("training", {}).get("loss", "mse")
    except (tomllib.TOMLDecodeError, AttributeError, RecursionError):
        return ()
    return _OF_THE_LOSS if trained == "cross_entropy" else ()
