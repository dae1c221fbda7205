"""The command ``tsdyn export``."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from tsdyn.cli.application import Directory, app
from tsdyn.schema import printable


class Format(StrEnum):
    """What an archive can be exported to."""

    zarr = "zarr"
    netcdf = "netcdf"
    parquet = "parquet"


@app.command()
def export(
    directory: Directory,
    to: Annotated[Format, typer.Option("--to", help="The format.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to; DIR.zarr, DIR.nc or DIR.parquet if not given.")
    ] = None,
    zarr_format: Annotated[
        int, typer.Option("--zarr-format", help="2, with consolidated metadata, or 3, without.")
    ] = 2,
) -> None:
    """Write an archive as a zarr store, one netCDF file or Parquet tables; killed and given again, it goes on."""
    from tsdyn.growing import exporting

    def told(done: int, pieces: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {pieces} pieces", end="\n" if done == pieces else "", file=sys.stderr, flush=True)

    print(printable(exporting.export(directory, to.value, output, zarr_format=zarr_format, told=told)))
