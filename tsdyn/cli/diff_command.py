"""The command ``tsdyn diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from tsdyn.cli.application import app
from tsdyn.schema import printable


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A run, a sweep, an archive file or an experiment file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Say what differs between two experiments or archives, and the largest difference per variable."""
    from tsdyn.growing import comparing

    found = comparing.compare(a, b)
    for line in found.lines():
        print(printable(line))
    if found.same:
        print("nothing differs")
