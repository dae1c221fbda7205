"""The command fork: counterfactual branches of a run."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from tsdyn.cli.application import Directory, app
from tsdyn.cli.run_commands import Device, Quiet, Scheduler, Workers, run_announced
from tsdyn.experiment.errors import ExperimentError


@app.command()
def fork(
    directory: Directory,
    at: Annotated[str, typer.Option(help="Epochs at which children branch off, e.g. 0,5,50.")] = "0",
    perturb: Annotated[
        str | None,
        typer.Option(
            help="What is changed, e.g. gaussian=0.01, 'silence={layer=1, node=3}', 'swap={layer=1, nodes=[0, 1]}', "
            "'set={\"training.learning_rate\"=0.1}'."
        ),
    ] = None,
    branches: Annotated[int, typer.Option(help="Children of each epoch, with random draws of their own.")] = 1,
    draws: Annotated[str, typer.Option(help="Batches after the fork: same (the parent's) or other (new).")] = "same",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Directory; DIR-fork if not given.")] = None,
    device: Device = "cpu",
    workers: Workers = None,
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Branch off a run at given epochs, change one thing, train on, and say how far the branches end from it."""
    from tsdyn.archive import whole_files
    from tsdyn.through_training import forks

    try:
        epochs = [int(word) for word in at.split(",")]
    except ValueError:
        raise ExperimentError(f"--at {at}: write epochs, e.g. --at 0,5") from None
    if draws not in ("same", "other"):
        raise ExperimentError(f"--draws {draws}: write same or other")
    parent = whole_files.local_path(directory).absolute()
    child = forks.forked(
        parent, at=epochs, perturb=_changes(perturb), branches=branches, draws="same" if draws == "same" else "other"
    )
    target = whole_files.local_path(output or parent.with_name(f"{parent.name}-fork"))
    run_announced(child, target, device, quiet, workers, scheduler, None)
    if not quiet:
        _tell(forks.compared(target))


def _changes(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return tomllib.loads(text)
    except ValueError as error:
        told = f"--perturb {text[:80]}: write KIND=VALUE as TOML, e.g. gaussian=0.01 ({error})"
        raise ExperimentError(told) from None


def _tell(ds: Any) -> None:
    """One line per epoch of forking: medians over branches, seeds and the parent's swept keys."""
    for epoch in ds["fork_epoch"].values:
        one = ds[[n for n in ("distance", "barrier", "barrier_matched", "student_kept") if n in ds]]
        one = one.sel(fork_epoch=epoch).isel(epoch=-1).load()
        words = {"distance": "distance", "barrier": "barrier", "barrier_matched": "after matching"}
        said = ", ".join(f"{word} {float(one[name].median()):.3g}" for name, word in words.items() if name in one)
        if "student_kept" in one:
            said += f", {float(one['student_kept'].mean()):.0%} of teacher nodes keep their student"
        print(f"forked at {int(epoch)}: {said}")
