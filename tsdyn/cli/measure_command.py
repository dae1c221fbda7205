"""The command ``tsdyn measure``."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from tsdyn.cli.application import Directory, app
from tsdyn.experiment.errors import ExperimentError
from tsdyn.schema import printable


@app.command()
def measure(
    directory: Directory,
    observables: Annotated[
        str, typer.Option("--observables", metavar="A,B,...", help="What to measure, as in record.observables.")
    ],
    epochs: Annotated[
        str | None,
        typer.Option("--epochs", metavar="0,10,20 or 0:100", help="Recorded epochs (FIRST:LAST[:STEP]); default all."),
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Share the members among N processes here.")] = None,
) -> None:
    """Measure observables from recorded parameters and add them to the archive; given again, it goes on."""
    import dask

    from tsdyn.archive import reading
    from tsdyn.growing import adding

    names = [name.strip() for name in observables.split(",") if name.strip()]
    if not names:
        raise ExperimentError("measure --observables: name one at least, such as A,hessian_eigenvalue")
    if workers is not None and workers < 1:
        raise ExperimentError(f"measure --workers {workers}: at least 1")
    wanted = None if epochs is None else _epochs(epochs, reading.open(directory))
    how = contextlib.nullcontext() if workers is None else dask.config.set(scheduler="processes", num_workers=workers)
    try:
        with how:
            adding.add(directory, names, wanted, told=lambda line: print(printable(line), flush=True))
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def _epochs(text: str, ds: object) -> list[int]:
    """The epochs that ``0,10,20`` or ``FIRST:LAST:STEP`` names; of a range those that are recorded."""
    import xarray as xr

    assert isinstance(ds, xr.Dataset)
    recorded = ds.indexes["epoch"].tolist() if "epoch" in ds.indexes else []
    found: list[int] = []
    for word in text.split(","):
        try:
            numbers = [int(number) for number in word.split(":")]
        except ValueError:
            numbers = []
        match numbers:
            case [one]:
                found.append(one)
            case [first, last]:
                found += [epoch for epoch in recorded if first <= epoch <= last]
            case [first, last, step] if step > 0:
                found += [epoch for epoch in recorded if epoch in range(first, last + 1, step)]
            case _:
                raise ExperimentError(f"measure --epochs {text}: write 0,10,20 or FIRST:LAST or FIRST:LAST:STEP")
    if not found:
        raise ExperimentError(f"measure --epochs {text}: none of these is recorded; there are {recorded}")
    return found
