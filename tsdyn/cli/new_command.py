"""``tsdyn new``: a commented experiment file by three questions, or from a study."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tsdyn.archive.whole_files import local_path, refuse_link
from tsdyn.cli.application import app
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment

#: Answer to the first question → what it starts from.
QUESTIONS: Mapping[str, str] = {
    "specialization": "do students of a two-layer teacher specialize? (Tian 2020)",
    "deep": "which nodes win in a deep network, layer by layer? (Tian et al. 2019)",
    "copy-average": "do students copy or average teacher neurons? (Simsek et al. 2023)",
    "online": "generalization error when each sample is seen once (Saad & Solla; Goldt et al. 2019)",
}


@app.command()
def new(
    file: Annotated[str, typer.Argument(metavar="[FILE.toml]", help="The file to write.")] = "experiment.toml",
    question: Annotated[str | None, typer.Option(help=f"One of {', '.join(QUESTIONS)}.")] = None,
    widths: Annotated[
        str | None, typer.Option(help="Input, hidden ..., output width of the teacher, e.g. 20,5,10.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of students.")] = None,
    study: Annotated[str | None, typer.Option(help="Start from this study's experiment; asks nothing.")] = None,
    scale: Annotated[str, typer.Option(help="The study's scale: smoke, desk or paper.")] = "desk",
) -> None:
    """Write a commented experiment file by three questions (options answer them), or from a study."""
    from tsdyn.experiment.meanings import commented

    target = local_path(file)
    refuse_link(target)
    if target.exists():
        raise ExperimentError(f"new: {target}: exists; give another name, or remove it first")
    if study is not None:
        if given := [name for name, value in (("question", question), ("widths", widths), ("seeds", seeds)) if value]:
            raise ExperimentError(f"new --study {study}: --{given[0]} has no effect; change the file that is written")
        made, told = _of_study(study, scale)
    else:
        made, told = _by_questions(question, widths, seeds, target.stem)
    way = f"{told}\nRun it:  tsdyn run {target.name} -o runs/{made.name}"
    text = commented(made, way + "\nKeys that are left out have their defaults; docs/reference/experiment lists all.")
    if Experiment.from_toml_text(text).digest != made.digest:
        raise AssertionError("the file that was to be written is of another experiment")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ExperimentError(f"new: {target}: exists; give another name, or remove it first") from None
    print(f"{target}\nnext: tsdyn run {target} -o {Path('runs') / made.name}")


def _of_study(name: str, scale: str) -> tuple[Experiment, str]:
    from tsdyn.cli.run_commands import study_of

    module = study_of(name)
    if scale not in module.EXPERIMENTS:
        raise ExperimentError(f"new --study {name} --scale {scale}: there are {', '.join(module.EXPERIMENTS)}")
    found = module.EXPERIMENTS[scale]
    if not isinstance(found, Experiment):
        raise ExperimentError(f"new --study {name}: reads a file and runs nothing, so there is no experiment to write")
    return found, f"{module.TITLE}\n{module.SOURCE}; study {name}, scale {scale}"


def _by_questions(question: str | None, widths: str | None, seeds: int | None, name: str) -> tuple[Experiment, str]:
    """The experiment that the answers ask for; what no option answered is asked on the terminal."""
    chosen = question
    if chosen is None:
        for word, asks in QUESTIONS.items():
            print(f"  {word:16} {asks}")
        chosen = typer.prompt("1. Which question", default="specialization")
    if chosen not in QUESTIONS:
        raise ExperimentError(f"new: question {chosen!r}; there are {', '.join(QUESTIONS)}")
    make, usual = _MAKERS[chosen]
    sizes = widths or typer.prompt("2. The teacher's widths: input, hidden ..., output", default=usual)
    try:
        found = [int(word) for word in sizes.replace("-", ",").split(",")]
    except ValueError:
        raise ExperimentError(f"new: widths {sizes!r}; write whole numbers with commas, e.g. {usual}") from None
    if len(found) < 3:
        raise ExperimentError(f"new: widths {sizes!r}; a network has inputs, hidden nodes and outputs, e.g. {usual}")
    members = seeds or typer.prompt("3. How many students (seeds)", default=4, type=int)
    return Experiment(**{"name": name, "seeds": members, **make(found)}), QUESTIONS[chosen]


def _specialization(widths: list[int]) -> dict[str, Any]:
    return {
        "teacher": {"widths": widths, "polarity": 1.0},
        "student": {"overrealization": 1},
        "data": {"std": 1.5, "train": 1000, "eval": 1000},
        "training": {"learning_rate": 0.01, "steps_per_epoch": 300, "epochs": 12},
        "record": {"observables": ["loss", "correlation", "fanout_norm", "weight"]},
        "sweep": {"student.overrealization": [1, 4]},
    }


def _deep(widths: list[int]) -> dict[str, Any]:
    return {
        "teacher": {"widths": widths, "unit_norm": "every-layer", "bias": -0.1},
        "student": {"overrealization": 2, "init": "torch"},
        "data": {"std": 1.5, "train": 1000, "eval": 1000},
        "training": {"learning_rate": 0.01, "steps_per_epoch": 100, "epochs": 12},
        "record": {"observables": ["loss", "correlation", "fanout_norm", "weight"]},
    }


def _copy_average(widths: list[int]) -> dict[str, Any]:
    inputs, nodes, outputs = _two_layers(widths)
    return {
        "kind": "population-flow",
        "teacher": {"widths": [inputs, nodes, outputs], "init": "orthonormal"},
        "student": {"widths": [inputs, max(1, nodes // 2), outputs], "activation": "erf"},
        "flow": {"times": {"first": 0.01, "last": 1000.0, "number": 30}},
    }


def _online(widths: list[int]) -> dict[str, Any]:
    inputs, nodes, outputs = _two_layers(widths)
    return {
        "kind": "online",
        "teacher": {"widths": [inputs, nodes, outputs], "init": "gaussian"},
        "student": {"widths": [inputs, nodes, outputs], "activation": "erf"},
        "training": {"learning_rate": 0.5},
        "online": {"last": 100.0},
    }


def _two_layers(widths: list[int]) -> tuple[int, int, int]:
    if len(widths) != 3:
        raise ExperimentError(f"new: widths {widths}: this question is of one hidden layer; give input,hidden,output")
    return widths[0], widths[1], widths[2]


#: Answer to the first question → what makes the experiment's sections from the widths, and the usual widths.
_MAKERS: Mapping[str, tuple[Callable[[list[int]], dict[str, Any]], str]] = {
    "specialization": (_specialization, "20,5,10"),
    "deep": (_deep, "20,10,15,10"),
    "copy-average": (_copy_average, "9,8,1"),
    "online": (_online, "500,2,1"),
}
