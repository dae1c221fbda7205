"""The command ``tsdyn import``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tsdyn.cli.application import app
from tsdyn.schema import printable


class Kind(StrEnum):
    """What can be imported."""

    checkpoints = "checkpoints"
    nn2pp = "nn2pp"
    luckmatters = "luckmatters"


@app.command("import")
def import_(
    kind: Annotated[Kind, typer.Argument(help="What the source is.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file or a folder.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Directory of the archive; made.")],
) -> None:
    """Make an archive of PyTorch checkpoints, of nn2pp's logs or of luckmatters' arrays."""
    from tsdyn.growing import importing

    print(printable(importing.import_(kind.value, source, output)))
