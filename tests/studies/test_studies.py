import pytest
from matplotlib.figure import Figure

import tsdyn
from tests.cases import cifar10
from tests.rendering import faults
from tsdyn import studies
from tsdyn.archive import integrity
from tsdyn.archive.netcdf import write_dataset

#: Where smoke scale takes seconds: what is fewer here.
FEWER = {
    "leave-out": {
        "training.epochs": 2, "data.leave_out": {"subsets": 3, "share": 0.05},
        "sweep": {"student.activation": ["relu", "softplus"], "data.leave_out.subset": [0, 1, 2]},
    },
    "fork-divergence": {"training.epochs": 2},
    "simsek2023-trajectories": {"flow.times": {"first": 1e-2, "last": 1e4, "number": 5}},
}  # fmt: skip
TWO_LAYER = ("tian2020-l-shape", "tian2020-success-rate", "tian2020-recovery")


@pytest.mark.parametrize("name", studies.names())
def test_a_study_runs_from_experiment_to_figure(name, tmp_path, monkeypatch):
    study = studies.load(name)
    if name == "fork-divergence":
        monkeypatch.setattr(study, "SIZES", study.SIZES[::3])
    assert set(study.EXPERIMENTS) == {"smoke", "desk", "paper"}
    smoke = study.EXPERIMENTS["smoke"]
    assert isinstance(smoke, tsdyn.Experiment)
    if smoke.data.law == "cifar10":  # the user's files; these are of the same format
        cifar10(tmp_path, each=32)
        smoke = smoke.replace({"data.path": str(tmp_path)})
    short = {"seeds": 2} | ({"training.steps_per_epoch": 8} if smoke.kind == "training" else {})
    short |= {"teacher.train_epochs": 2} if smoke.teacher.init == "trained" else {}
    archive = tsdyn.run(smoke.replace(short | FEWER.get(name, {})), tmp_path / "run")
    assert integrity.check(tmp_path / "run") == []
    measured = study.measure(archive).load()
    assert all(array.chunks is None and array.attrs["source"] for array in measured.data_vars.values())
    assert measured.nbytes < 1e6
    write_dataset(tmp_path / "measured.nc", measured)
    figure = study.draw(measured)
    figure.savefig(tmp_path / "figure.png", dpi=50)
    assert faults(figure, laid_out=True) == []
    for panel in study.PANELS.values():  # also on axes of the user's own
        ax = Figure().subplots()
        panel(measured, ax)
        assert ax.has_data()
        assert ax.get_xlabel() or not ax.get_xticks().size


@pytest.mark.parametrize("name", TWO_LAYER)
def test_the_paper_scale_is_the_papers(name):
    paper = studies.load(name).EXPERIMENTS["paper"]
    assert len(paper.seed_labels) == 32
    assert paper.teacher.widths[::2] == (100, 50)
    assert (paper.training.epochs, paper.steps, paper.training.batch) == (100, 1000, 16)
    assert (paper.training.learning_rate, paper.data.std, paper.data.train) == (0.01, 1.5, 10_000)
    assert {0, 5, 100} <= set(paper.schedule)


@pytest.mark.parametrize("name", [name for name in studies.names() if name.startswith("simsek2023")])
def test_the_paper_scale_of_a_flow_has_twenty_seeds(name):
    paper = studies.load(name).EXPERIMENTS["paper"]
    assert len(paper.seed_labels) == 20
    assert all(n < k or k == 1 for n, k in ((e.student_widths[1], e.teacher_widths[1]) for _, e in paper.points()))


def test_the_paper_scale_against_samples_is_the_papers():
    points = [one for _, one in studies.load("tian2020-samples").EXPERIMENTS["paper"].points()]
    assert {one.teacher.widths for one in points} == {(20, 50, 75, 100, 125, 100)}
    assert {one.student_widths for one in points} == {(20, 100, 150, 200, 250, 100)}
    assert len({one.steps * one.training.epochs for one in points}) == 1
    losses = [{one.data.train for one in points if one.training.loss == loss} for loss in ("mse", "cross_entropy")]
    assert losses[0] == losses[1]
    augmented = studies.load("tian2020-augmentation").EXPERIMENTS["paper"]
    assert len(augmented.seed_labels) == 10
    kinds = {one.data.augment for _, one in augmented.points()}
    assert kinds == {"none", "agnostic", "aware"}


def test_an_unknown_study_names_the_nearest():
    with pytest.raises(ValueError, match=r"'tian2020-lshape' is no study \(did you mean 'tian2020-l-shape'\?\)"):
        studies.load("tian2020-lshape")
