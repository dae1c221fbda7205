"""The command ``tsdyn sensitivity``: derivatives through training into a file, and in words how far they predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tsdyn.cli.application import Directory, app
from tsdyn.experiment.errors import ExperimentError
from tsdyn.schema import printable

if TYPE_CHECKING:
    from rich.progress import Progress


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ExperimentError(f"--seeds {text}: write labels with commas between, e.g. --seeds 0,3") from None


@app.command()
def sensitivity(
    directory: Directory,
    of: Annotated[
        str,
        typer.Option("--of", help="The observable: loss_eval, 'correlation[layer=1,teacher_node=9,node=3]', ..."),
    ] = "loss_eval",
    epoch: Annotated[int | None, typer.Option(help="Of the observable; the last recorded one if not given.")] = None,
    wrt: Annotated[
        str, typer.Option(help="start, sample, target, input, learning_rate, teacher, scale; commas between.")
    ] = "start,sample,learning_rate",
    seeds: Annotated[
        str | None, typer.Option(help="Labels of members, commas between; all that live if not given.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For states, e.g. 500MB.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="The netCDF file; DIR-sensitivity.nc if not given.")
    ] = None,
    certificate: Annotated[bool, typer.Option(help="With radius and tangent growth.")] = True,
    smoothed: Annotated[int | None, typer.Option(help="Mean over this many starts beside the run's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes of a dask cluster on this machine; 0: none.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print results only.")] = False,
) -> None:
    """Differentiate what a run ended with in what it started from, and say how far that predicts.

    Given again after a kill, it goes on with the members that were not done.
    """
    import shutil

    from tsdyn.archive import netcdf, whole_files
    from tsdyn.through_training import sensitivity as made

    path = whole_files.local_path(output or f"{whole_files.local_path(directory).absolute()}-sensitivity.nc")
    whole_files.refuse_link(path)
    if not path.parent.is_dir():
        whole_files.make_directory(path.parent)
    keep = path.with_name(f"{path.name}.parts")

    def announce(plan: made.Plan) -> None:
        if not quiet:
            print(f"{printable(directory)}: {plan}")

    with _bar(quiet) as bar:
        task = bar.add_task("through training", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        with _client(workers) as client:
            found = made.sensitivity(
                directory, made.parsed(of), epoch=epoch, wrt=[word.strip() for word in wrt.split(",") if word.strip()],
                seeds=_seeds(seeds), memory=memory, certificate=certificate, smoothed=smoothed, device=device,
                client=client, keep=keep, progress=progress, announce=announce,
            )  # fmt: skip
    netcdf.write_dataset(path, found)
    shutil.rmtree(keep, ignore_errors=True)
    for line in told(found):
        print(printable(line))
    if not quiet:
        print(printable(str(path)))


def _bar(quiet: bool) -> Progress:
    """A bar of progress, shown on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)


def _client(workers: int):  # type: ignore[no-untyped-def]
    """A dask client with this many processes of one thread, or a context of None."""
    from contextlib import nullcontext

    if not workers:
        return nullcontext()
    from dask.distributed import Client

    return Client(n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False)


def told(found) -> list[str]:  # type: ignore[no-untyped-def]
    """The result in words: what was differentiated, and how far each derivative predicts."""
    import json

    import numpy as np

    attrs = found.attrs
    if "value" not in found:
        return json.loads(attrs["reach"])  # type: ignore[no-any-return]
    values = found["value"].values[~np.isnan(found["value"].values)]
    lines = [f"{attrs['observable']} at epoch {attrs['observable_epoch']}: {values.mean():.6g} (mean of {values.size})"]
    off = found["replay_difference"].values
    if not np.isnan(off).all():
        begun = len(attrs["replayed_from"].split(",")) - 1  # beside the start
        how = f", begun from the archive's states of {begun} epoch{'s' * (begun > 1)}" if begun else ""
        lines.append(f"trained again: weights within {np.nanmax(off):.2g} of the recorded ones{how}")
    return [*lines, *json.loads(attrs["reach"])]
