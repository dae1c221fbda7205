"""A package of somebody else's (tests/mylab): installed, used by the command on workers, and gone again."""

import json
from pathlib import Path

import numpy as np
import pytest

import tsdyn
from tests import processes
from tsdyn.archive import integrity

HERE = Path(__file__).resolve().parent

EXPERIMENT = """
name = "lab"
seeds = 2

[teacher]
widths = [6, 4, 2]
init = "sparse"
arguments = { nonzero = 3 }

[student]
overrealization = 2.0
init = "orthogonal"
arguments = { gain = 0.5 }

[data]
law = "student_t"
train = 60
eval = 40
arguments = { freedom = 4.0 }

[training]
method = "sign_sgd"
loss = "log_cosh"
epochs = 2
batch = 10
arguments = { memory = 0.5 }

[record]
observables = ["loss", "mse", "weight", "correlation", "weight_entropy"]

[sweep]
"student.activation" = ["tanh", "sine"]
"""
#: As the attribute `parts` names them.
PARTS = {
    "activation sine", "loss log_cosh", "optimizer sign_sgd", "law student_t", "teacher sparse", "start orthogonal",
    "observable weight_entropy",
}  # fmt: skip


def run(folder, *words, site=None):
    """Run words in a folder, in a process that is forked; (exit code, what it printed, what it complained)."""
    done = processes.run(words, folder, environment=processes.variables(site))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def lab(tmp_path_factory, site):
    """An empty folder in which a sweep with every part of the package was run on two workers."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab.toml").write_text(EXPERIMENT, encoding="utf-8")
    code, said, complained = run(folder, "tsdyn", "run", "lab.toml", "--workers", "2", site=site)
    assert code == 0, said + complained
    return folder


def commands(folder, *each, site=None):
    """(exit code, what it printed, what it complained) of each command."""
    return [list(run(folder, "tsdyn", *one.split(), site=site)) for one in each]


def test_the_archive_is_whole_shown_audited_and_reported_and_the_study_is_run(lab, site):
    validate, show, audit, report, listed, study = commands(
        lab, "validate runs/lab", "show runs/lab", "audit runs/lab", "report runs/lab", "study list",
        "study run lab-entropy --scale smoke --quiet", site=site,
    )  # fmt: skip
    assert validate == [0, "runs/lab: whole\n", ""]
    for (code, out, said), told in (
        (show, "entropy of a node's squared"), (audit, "log_cosh"), (report, "report.html"),
        (listed, "Entropy of squared weights along training"), (study, ""),
    ):  # fmt: skip
        assert code == 0, said
        assert told in out
    assert (lab / "runs/lab-entropy-smoke/figure.png").stat().st_size > 1000


def test_the_archive_names_package_and_version_and_the_digest_does_not(lab):
    ds = tsdyn.open(lab / "runs/lab")
    parts = json.loads(ds.attrs["parts"])
    assert set(parts) == PARTS
    assert {(p["package"], p["version"]) for p in parts.values()} == {("mylab", "0.3.1")}
    assert parts["activation sine"]["target"] == "mylab.parts:sine"
    experiment = tsdyn.Experiment.from_toml(lab / "runs/lab/experiment.toml", archived=True)
    assert ds.attrs["digest"] == experiment.digest  # which was made here, where no package is known
    assert "mylab" not in experiment.to_toml()
    # a point that has no sine says so
    tanh = tsdyn.open(lab / "runs/lab/activation=tanh")
    assert set(json.loads(tanh.attrs["parts"])) == PARTS - {"activation sine"}


def test_the_declared_variable_is_what_it_says(lab):
    ds = tsdyn.open(lab / "runs/lab").load()
    assert ds["weight_entropy"].dims == ("activation", "seed", "epoch", "layer", "node")
    assert ds["weight_entropy"].attrs["source"] == "mylab"
    share = ds["weight"] ** 2
    share = share / share.sum("input_node")
    right = -(share * np.log(share.where(share > 0, 1))).sum("input_node")
    right = right.where(ds["weight"].notnull().any("input_node"))
    assert float(abs(ds["weight_entropy"] - right).max()) < 1e-13
    assert ds["weight_entropy"].notnull().equals(right.notnull())


def test_the_start_and_the_teacher_are_the_packages(lab):
    ds = tsdyn.open(lab / "runs/lab").isel(activation=0).load()
    w = ds["weight"].sel(seed=0, epoch=0, layer=1).values[:8, :6]
    assert abs(w.T @ w - 0.25 * np.eye(6)).max() < 1e-14
    rows = ds["teacher_weight"].sel(seed=0, layer=1).values[:4, :6]
    assert ((rows != 0).sum(1) == 3).all()
    moved = ds["weight"].sel(seed=0, layer=1).diff("epoch")
    ratio = (abs(moved) / 0.01).round(9) % 1  # six steps of +-0.01 each; the sign of 0 is 0
    assert float(ratio.where(ratio < 0.5, 1 - ratio).max()) < 1e-6


GONE = "runs/lab was computed with mylab 0.3.1: install that to go on"


def test_the_archive_outlives_the_package_and_is_not_gone_on_with(lab, tmp_path):
    before = {p: p.read_bytes() for p in (lab / "runs/lab").rglob("*") if p.is_file()}
    validate, show, audit, longer, listed = commands(
        lab, "validate runs/lab", "show runs/lab", "audit runs/lab",
        "run lab.toml --set training.epochs=3", "study list",
    )  # fmt: skip
    assert validate == [0, "runs/lab: whole\n", ""]
    assert show[0] == 0
    assert "entropy of a node's squared" in show[1]
    assert audit[0] == 2  # which needs the code
    assert "'student_t' is no law" in audit[2]
    assert GONE in audit[2]
    assert longer[0] == 2
    assert GONE in longer[2]
    assert "lab-entropy" not in listed[1]
    experiment = tsdyn.Experiment.from_toml(lab / "runs/lab/experiment.toml", archived=True)
    with pytest.raises(tsdyn.ExperimentError, match=r"'sine' is no activation[\s\S]*was computed with mylab 0\.3\.1"):
        tsdyn.run(experiment.replace({"training.epochs": 3}), lab / "runs/lab")
    assert {p: p.read_bytes() for p in (lab / "runs/lab").rglob("*") if p.is_file()} == before
    assert integrity.check(lab / "runs/lab") == []
    with pytest.raises(tsdyn.ExperimentError, match="'sine' is no activation") as caught:
        tsdyn.run(experiment, tmp_path / "new")
    assert "was computed with" not in str(caught.value)
    assert not (tmp_path / "new").exists()


OPENING = """
import sys, tsdyn
tsdyn.open("runs/lab").load()
assert not [name for name in sys.modules if name.startswith("mylab")], "opening an archive loaded a package"
"""


def test_opening_loads_no_entry_point(lab, site):
    assert run(lab, "python", "-c", OPENING, site=site) == (0, "", "")


MODULE = """
import tsdyn
from mylab.parts import residual, sine, weight_entropy
from tsdyn.testing import check

check(residual, "module")
check(sine)
check(weight_entropy)
experiment = tsdyn.Experiment(
    name="module", seeds=2, teacher={"widths": [6, 4, 2], "init": "sparse"}, data={"law": "student_t", "train": 60},
    student={"overrealization": 1.0}, training={"method": "sign_sgd", "loss": "log_cosh", "epochs": 2, "batch": 10},
)
ds = tsdyn.run(experiment, "module", student=residual).load()
assert ds.sizes["entry"] == 6 * 6 + 6 + 2 * 6 + 2
assert float(abs(ds["parameter"].diff("epoch")).max()) > 0
"""


def test_a_module_of_the_package_is_a_student_and_its_parts_keep_their_promises(tmp_path, site):
    (tmp_path / "script.py").write_text(MODULE, encoding="utf-8")
    assert run(tmp_path, "python", "script.py", site=site) == (0, "", "")


WORKERS = """
import numpy as np
import tsdyn
from tsdyn import registers
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Optimizer
from tsdyn.networks.activations import Activation
from tsdyn.running.workers import WorkersError
import torch

if __name__ == "__main__":
    norm = tsdyn.declare("row_norm", ("seed", "epoch", "layer", "node"), units="1", long_name="norm", source="me")
    factor = 2.0  # a number of the script, which is sent along
    observed = tsdyn.Observed(norm, lambda m: [factor * w.flatten(1).norm(dim=1) for w in m.network.weights])
    experiment = tsdyn.Experiment(
        name="w", seeds=1, teacher={"widths": [6, 4, 2]}, student={"overrealization": 1.0, "scale": 0.1},
        data={"train": 60, "eval": 40}, training={"epochs": 1}, record={"observables": ["weight"]},
        sweep={"training.learning_rate": [0.01, 0.02]},
    )
    ds = tsdyn.run(experiment, "sent", workers=2, observables=[observed]).load()
    right = 2 * (ds["weight"] ** 2).sum("input_node") ** 0.5
    assert float(abs(ds["row_norm"] - right).max()) < 1e-14

    def shifted(rng, samples, inputs, *, std):
        return factor * std * rng.standard_normal((samples, inputs)) + 0.1

    def ternary(rng, nodes, inputs, *, teacher, lowest):
        return rng.choice([-1.0, 0.5, 1.0], (nodes, inputs))

    def step(rule, parameter, gradient, moments, rates, number):
        parameter.sub_(rates * torch.sign(gradient))

    largest = tsdyn.declare("largest", ("seed", "epoch"), units="1", long_name="largest", source="a script")
    registers.OBSERVABLES.add("largest", tsdyn.Observed(largest, lambda m: m.network.weights[0].max()))
    mine = experiment.replace({
        "student.activation": Activation("sine", torch.sin, torch.cos, torch.nn.Identity), "data.law": shifted,
        "training.method": Optimizer("signs", (), step), "teacher.init": ternary,
        "training.loss": Loss("quartic", lambda output, target: (output - target).pow(4).sum(-1).mean(), "power 4"),
        "record.observables": ["loss", "weight", "largest"],
    })
    assert mine.training.loss == "quartic" and mine == experiment.from_toml_text(mine.to_toml())
    one, other = tsdyn.run(mine, "here").load(), tsdyn.run(mine, "there", workers=2).load()
    assert float(abs(one["weight"].isel(epoch=-1) - one["weight"].isel(epoch=0)).max()) > 0
    for name in one.data_vars:
        assert one[name].equals(other[name]), name
    assert one.attrs["parts"] == other.attrs["parts"]

    # what is computed on a cluster of one's own, too; with another definition of the name after the first
    from dask.distributed import Client, LocalCluster
    linear = experiment.replace({"data.law": shifted, "sweep": {}, "seeds": 2})
    ds = tsdyn.run(linear, "linear")
    mine_ = [tsdyn.Observed(largest, lambda m, k=k: k * m.network.weights[0].max()) for k in (1, 2)]
    registers.OBSERVABLES.remove("largest")
    with LocalCluster(1, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster) as client:
        for k, own in enumerate(mine_, start=1):
            found = tsdyn.measure(ds, [own, "A"]).compute()
            np.testing.assert_array_equal(found["largest"], k * ds["weight"].isel(layer=0).max(["node", "input_node"]))
            registers.OBSERVABLES.remove("largest")
        given = {"wrt": "start", "certificate": False}
        there = tsdyn.sensitivity("linear", client=client, **given)
    assert there["d_start"].equals(tsdyn.sensitivity("linear", **given)["d_start"])

    import threading
    lock = threading.Lock()
    def locked(rng, samples, inputs, *, std):
        return std * rng.standard_normal((samples, inputs)) + lock.locked()
    try:
        tsdyn.run(experiment.replace({"data.law": locked}), "nowhere", workers=2)
    except WorkersError as error:
        print(error)
"""


def test_parts_that_are_passed_or_added_are_sent_to_workers(tmp_path):
    (tmp_path / "script.py").write_text(WORKERS, encoding="utf-8")
    code, out, complained = run(tmp_path, "python", "script.py")
    assert code == 0, complained
    assert "law 'locked'" in out
    assert "cannot be sent to workers (TypeError: cannot pickle" in out
    assert not (tmp_path / "nowhere").exists()
