"""`tsdyn new`: a file that says what each key means, and is the experiment that was asked for."""

import re

import pytest

import tsdyn
from tests.test_cli import command  # noqa: F401  (a fixture)
from tsdyn import studies
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.meanings import MEANINGS, commented
from tsdyn.experiment.parts import Part


def keys(model=Experiment, before=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            yield from keys(field.annotation, f"{before}{name}.")
        else:
            yield before + name


def test_every_key_has_a_meaning_of_one_line():
    assert set(MEANINGS) == set(keys())
    assert all("\n" not in meaning for meaning in MEANINGS.values())


@pytest.mark.parametrize("name", studies.names())
def test_a_commented_file_is_the_same_experiment(name):
    for scale, experiment in studies.load(name).EXPERIMENTS.items():
        if isinstance(experiment, Experiment):
            text = commented(experiment, f"{name}\n{scale}")
            assert Experiment.from_toml_text(text).to_toml() == experiment.to_toml()
            assert text.startswith(f"# {name}\n# {scale}\n")


@pytest.mark.parametrize(
    ("question", "widths"),
    [("specialization", "6,3,4"), ("deep", "6,4,5,3"), ("copy-average", "5,4,1"), ("online", "40,2,1")],
)
def test_the_answers_give_an_experiment_that_runs(command, tmp_path, question, widths):  # noqa: F811
    file = tmp_path / "mine.toml"
    code, out, _ = command("new", file, "--question", question, "--widths", widths, "--seeds", 2)
    assert (code, f"next: tsdyn run {file}" in out) == (0, True)
    text = file.read_text(encoding="utf-8")
    assert len(re.findall("#", text)) > 8
    experiment = Experiment.from_toml(file)
    assert (experiment.name, experiment.seeds) == ("mine", 2)
    less = {"training.epochs": 1, "training.steps_per_epoch": 5} if experiment.kind == "training" else {}
    less = {"flow.times.last": 0.1} if experiment.kind == "population-flow" else less
    less = {"online.last": 1.0, "online.points": 3} if experiment.kind == "online" else less
    words = [word for key, value in less.items() for word in ("--set", f"{key}={value}")]
    assert command("run", file, "-o", tmp_path / "run", "--quiet", *words)[0] == 0
    assert tsdyn.open(tmp_path / "run").sizes["seed"] == 2
    code, _, err = command("new", file, "--question", question, "--widths", widths, "--seeds", 2)
    assert (code, "exists; give another name" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--question", "why"], "question 'why'; there are specialization"),
        (["--question", "deep", "--widths", "a,b"], "widths 'a,b'; write whole numbers"),
        (["--question", "online", "--widths", "9,3,3,1", "--seeds", "1"], "one hidden layer"),
        (["--question", "deep", "--widths", "8,4", "--seeds", "1"], "'8,4'; a network has inputs, hidden nodes"),
        (["--question", "deep", "--widths", "9,0,1", "--seeds", "1"], "teacher.widths"),
        (["--study", "tian2020-l-shape", "--seeds", "3"], "--seeds has no effect"),
        (["--study", "tian2020-l-shape", "--scale", "huge"], "there are smoke, desk, paper"),
        (["--study", "nothing"], "nothing"),
    ],
)
def test_a_wrong_answer_is_one_sentence_and_writes_nothing(command, tmp_path, words, said):  # noqa: F811
    code, _, err = command("new", tmp_path / "mine.toml", *words)
    assert (code, said in err, (tmp_path / "mine.toml").exists()) == (2, True, False)


def test_a_study_is_written_and_is_its_experiment(command, tmp_path):  # noqa: F811
    file = tmp_path / "mine.toml"
    assert command("new", file, "--study", "tian2020-l-shape", "--scale", "smoke")[0] == 0
    assert Experiment.from_toml(file) == studies.load("tian2020-l-shape").EXPERIMENTS["smoke"]
