"""Draws a study's figure again from what it measured: ``tsdyn study draw``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsdyn.archive.whole_files import DirectoryError, local_path
from tsdyn.cli.application import StyleName, save, study
from tsdyn.experiment.errors import ExperimentError

if TYPE_CHECKING:
    import xarray as xr


@study.command("draw")
def draw(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What tsdyn study run left.")],
    style: StyleName = "paper",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="FILE.pdf (.svg, .png); DIR/figure.pdf, .png and .txt if not given."),
    ] = None,
    caption: Annotated[bool, typer.Option(help="With the caption below the panels; it is in figure.txt, too.")] = True,
) -> None:
    """Draw the figure of a study that was run, from DIR/measured.nc alone."""
    from tsdyn.archive import reading

    file = local_path(directory) / "measured.nc"
    if not file.is_file():
        raise DirectoryError(f"{file}: no such file; tsdyn study run NAME -o {directory} measures and draws")
    measured = reading.open(file).load()
    try:
        draw_study(measured, local_path(output) if output else file.parent / "figure", False, style, caption)
    except (ValueError, KeyError) as error:
        raise DirectoryError(f"study draw {directory}: {error.args[0] if error.args else error}") from error


def draw_study(measured: xr.Dataset, path: Path, quiet: bool, style: str = "paper", captioned: bool = True) -> None:
    """Draw what a study measured and write it to `path`; without a suffix as PDF, PNG and the caption as text."""
    from tsdyn.analysis import captions
    from tsdyn.analysis import style as look

    name, module = _study_of(measured)
    with look.using(look.as_name(style), captioned=captioned):
        figure = module.draw(measured)
    if isinstance(figure, look.Page):
        scale = measured.attrs.get("scale")
        command = f"tsdyn study run {name}" + (f" --scale {scale}" if scale else "") + f"; --style {style}"
        figure.provenance = captions.provenance(measured, command)
    if path.suffix:
        save(figure, path, quiet)
        return
    for kind in ("pdf", "png"):
        save(figure, path.with_suffix(f".{kind}"), quiet)
    if isinstance(figure, look.Page):
        path.with_suffix(".txt").write_text(f"{figure.caption}\n", encoding="utf-8")


def _study_of(measured: xr.Dataset) -> tuple[str, Any]:
    """The study that measured a Dataset: by its attribute ``study``, or by the name of its experiment."""
    from tsdyn import studies

    if "study" in measured.attrs:
        name = str(measured.attrs["study"])
        return name, studies.load(name)
    for name in studies.names():
        module = studies.load(name)
        if measured.attrs.get("name") in {work.name for work in module.EXPERIMENTS.values()}:
            return name, module
    raise ExperimentError(
        f"study draw: measured.nc is of no study that is known here (experiment {measured.attrs.get('name')!r})"
    )
