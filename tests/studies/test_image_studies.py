"""Studies on images: whose files they need, what they say without, and what their figures are called."""

import pytest

import tsdyn
from tsdyn import cli, studies

CIFAR10, DIGITS = ("tian2020-cifar10", "tian2019-cifar10"), ("tian2020-digits", "tian2019-digits")


@pytest.mark.parametrize("scale", ["smoke", "desk"])  # without and with a sweep
@pytest.mark.parametrize("name", CIFAR10)
def test_without_the_files_one_line_says_where_they_are_to_be_had(tmp_path, monkeypatch, capfd, name, scale):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tsdyn", "study", "run", name, "--scale", scale])
    with pytest.raises(SystemExit) as end:
        cli.main()
    complaint = capfd.readouterr().err
    assert end.value.code == 2
    assert complaint.count("\n") == 1
    assert complaint.startswith("tsdyn: cifar-10-batches-bin: no data_batch_1.bin")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html and name their folder as data.path" in complaint


@pytest.mark.parametrize("name", CIFAR10 + DIGITS)
def test_data_are_the_same_at_every_scale_and_named_by_the_study(name):
    study, law = studies.load(name), name.split("-")[1]
    for experiment in study.EXPERIMENTS.values():
        assert experiment.data.law == law
        assert law in experiment.name
    if law == "digits":
        assert "digits" in study.TITLE
        assert "CIFAR-10" not in study.TITLE
        assert study.SOURCE.startswith("after ")


def test_digits_are_called_digits_in_the_figure_and_in_what_was_measured(tmp_path):
    study = studies.load("tian2020-digits")
    short = {"seeds": 1, "training.steps_per_epoch": 1, "training.epochs": 1, "teacher.train_epochs": 1}
    experiment = study.EXPERIMENTS["smoke"].replace(short | {"teacher.widths": [64, 2, 3, 2, 10], "sweep": {}})
    measured = study.measure(tsdyn.run(experiment, tmp_path / "run"))
    assert measured.attrs["data"] == "digits"
    assert "scikit-learn's digits" in study.draw(measured).caption


def test_the_paper_scale_is_the_papers():
    icml = studies.load("tian2020-cifar10").EXPERIMENTS["paper"]
    assert icml.teacher.widths == (3072, 64, 64, 64, 64, 10)
    assert icml.teacher.prune == (0.3, 0.5, 0.5, 0.7)
    assert icml.teacher.active_widths == (3072, 45, 32, 32, 20, 10)
    luck = studies.load("tian2019-cifar10").EXPERIMENTS["paper"]
    assert len(luck.seed_labels) == 5
    for point, experiment in luck.points():
        hidden = (64,) * 4 if point["teacher.convolution"] else (50, 75, 100, 125)
        assert experiment.teacher.widths == (3072, *hidden, 10)
        assert experiment.student_widths[1:-1] == tuple(10 * m for m in hidden)
