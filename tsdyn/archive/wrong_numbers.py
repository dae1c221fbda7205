"""Variables that earlier versions computed wrongly, and the warning about them.  Imports no torch."""

from __future__ import annotations

import tomllib


class WrongNumbersWarning(UserWarning):
    """An archive holds variables that an earlier version computed wrongly."""


#: Global attribute of an archive that an earlier version began: the last epoch which that version computed.
WRONG_THROUGH = "wrong_through"
#: Up to version 2 of the schema these were measured for the squared error, whatever loss was trained.
_OF_THE_LOSS = ("gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue")
#: The text of the warning.
WRONG = (
    "of the squared error, though cross entropy was trained: tsdyn before 0.2 (archives of schema 2 and below) "
    "measured them so; run the experiment anew into another directory"
)


def wrong_variables(version: object, through: object, experiment: str) -> tuple[str, ...]:
    """Names of a file's variables whose numbers are wrong.

    Args:
        version: The file's schema version.
        through: The file's attribute `WRONG_THROUGH`, None if it has none.
        experiment: The file's experiment, as TOML.
    """
    if through is None and not (isinstance(version, int) and version <= 2):
        return ()
    try:
        trained = tomllib.loads(experiment).get("training", {}).get("loss", "mse")
    except (tomllib.TOMLDecodeError, AttributeError, RecursionError):
        return ()
    return _OF_THE_LOSS if trained == "cross_entropy" else ()
