"""Forks: a branch is its parent's bits until something is changed, and an archive like any other."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from tsdyn.analysis import connectivity
from tsdyn.analysis.identity import points
from tsdyn.analysis.members import member
from tsdyn.analysis.similarity import linear_cka
from typer.testing import CliRunner

import tsdyn
from tests.cases import small
from tsdyn import cli
from tsdyn.archive import integrity
from tsdyn.archive.run_directory import RunDirectory
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import own_modules, runner
from tsdyn.running.forked_members import ForkedMembers
from tsdyn.running.members import Members
from tsdyn.running.outcome import SweepError
from tsdyn.through_training import forks

KEYS = ("weight", "bias", "loss_eval", "correlation")


def parent_of(folder, **changes):
    base = {
        "training__epochs": 3, "training__steps_per_epoch": 10, "seeds": 2, "student__scale": 0.3,
        "record__observables": ["loss", "weight", "correlation"],
    }  # fmt: skip
    tsdyn.run(small(**base | changes), folder / "parent")
    return folder / "parent"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return parent_of(tmp_path_factory.mktemp("forks"))


OPTIONS = {
    "adam": {"training__method": "adam"},
    "momentum, decay": {"training__momentum": 0.9, "training__weight_decay": 0.01},
    "fresh, noise": {"data__train": "fresh", "data__noise": 0.1},
    "gaps in the record, float32": {"record__every": 2, "dtype": "float32"},
    "batch norm": {
        "student__batch_norm": "before", "record__observables": ["loss", "weight", "batch_norm", "correlation"],
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_no_change_gives_the_parents_bits(options, tmp_path):
    path = parent_of(tmp_path, **OPTIONS[options])
    ds = tsdyn.fork(path, at=[0, 1], out=tmp_path / "children").load()
    own = tsdyn.open(path).load()
    assert dict(ds.sizes)["fork_epoch"] == 2
    for fork_epoch in (0, 1):
        epochs = [e for e in own.epoch.values if e > fork_epoch]
        for name in KEYS:
            one = ds[name].sel(fork_epoch=fork_epoch, epoch=epochs)
            same = own[name].sel(epoch=epochs)
            np.testing.assert_array_equal(one.isel(branch=0).transpose(*same.dims).values, same.values)
    assert float(ds["distance"].max()) == 0
    if options != "batch norm":
        rounding = 10 * np.finfo(ds["loss_eval"].dtype).eps * float(ds["loss_eval"].max())
        assert float(ds["barrier"].max()) <= rounding
        assert float(ds["cka_angle"].max()) < 1e-5
    assert (ds["student_kept"].isin([1]) | ds["student_kept"].isnull()).all()
    assert ds["divergence_epoch"].isnull().all()


def test_children_are_archives_like_any_other(parent, tmp_path):
    out = tmp_path / "children"
    ds = tsdyn.fork(parent, at=1, perturb={"gaussian": 0.1}, branches=2, out=out).load()
    assert not integrity.check(out)
    assert set(ds.epoch.values) == {1, 2, 3}
    distance = ds["distance"].isel(epoch=0)
    assert (distance > 0).all()
    assert len(np.unique(distance)) == distance.size  # branches and seeds draw their own
    names = sorted(p.name for p in out.iterdir() if p.is_dir())
    shutil.rmtree(out / names[0])
    again = tsdyn.fork(parent, at=1, perturb={"gaussian": 0.1}, branches=3, out=out).load()
    for name in KEYS:
        np.testing.assert_array_equal(again[name].sel(branch=[0, 1]), ds[name])
    runner = CliRunner()
    for command in (["validate", str(out)], ["show", str(out)], ["audit", str(out)]):
        done = runner.invoke(cli.app, command)
        assert done.exit_code == 0, done.output
    done = runner.invoke(cli.app, ["fork", str(parent), "--at", "1", "--perturb", "gaussian=0.1", "--branches", "2",
                                   "-o", str(tmp_path / "by-command")])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "forked at 1: distance" in done.output
    np.testing.assert_array_equal(tsdyn.open(tmp_path / "by-command")["weight"], ds["weight"])


def test_a_killed_child_goes_on_without_its_parent(parent, tmp_path):
    experiment = forks.forked(parent, at=1, perturb={"gaussian": 0.2}, draws="other", branches=1)
    ((_, single),) = experiment.points()
    whole = ForkedMembers(single)
    whole.draw()
    states = [{name: array.copy() for name, array in whole.state().items()}]
    for step in range(1, 4):
        whole.advance(step)
        states.append({name: array.copy() for name, array in whole.state().items()})
    np.testing.assert_array_equal(states[0]["weight_1"], states[1]["weight_1"])
    gone = ForkedMembers(single.replace({"fork.parent": str(tmp_path / "gone")}))
    gone.restore(states[2])
    gone.draw()
    gone.advance(3)
    for name, array in gone.state().items():
        np.testing.assert_array_equal(array, states[3][name])


@pytest.mark.parametrize(("last", "at"), [(1, 0), (2, 0), (1, 1)])
def test_a_parent_that_is_not_finished_is_forked(tmp_path, last, at, monkeypatch):
    """Children train to the end of the schedule; with epochs that the parent has not reached nothing is compared.

    The last ones branch off where the parent has not come yet, so that the two share no epoch.
    """

    def stop(epoch, *_):
        if epoch == last:
            raise RuntimeError("stopped here")

    experiment = small(
        training__epochs=3, training__steps_per_epoch=10, seeds=2, record__observables=["loss", "weight", "correlation"]
    )
    whole = tsdyn.run(experiment, tmp_path / "whole").load()
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="stopped here"):
        tsdyn.run(experiment, tmp_path / "parent", progress=stop)
    reached = tsdyn.open(tmp_path / "parent").epoch.values.tolist()
    assert reached[-1] < 3
    ds = tsdyn.fork(tmp_path / "parent", at=at, out=tmp_path / "children").load().isel(fork_epoch=0, branch=0)
    for name in KEYS:
        np.testing.assert_array_equal(ds[name].transpose(*whole[name].dims), whole[name].sel(epoch=ds.epoch))
    shared = [epoch for epoch in reached if epoch in ds.epoch]
    assert bool(shared) == (at == 0)
    assert (ds["distance"].sel(epoch=shared) == 0).all()
    assert ds["divergence_epoch"].isnull().all()
    assert ds["distance"].isel(epoch=-1).isnull().all()
    assert all(ds[name].isnull().all() for name in ("student_kept", "barrier", "barrier_matched", "cka_angle"))


@pytest.mark.parametrize("sweep", [{}, {"student.overrealization": [1.0, 2.0]}], ids=["run", "sweep"])
def test_the_parents_kept_states_spare_training_it_again(sweep, tmp_path, monkeypatch):
    path = parent_of(
        tmp_path, training__method="adam", training__epochs=5, record__state_every=2, sweep=sweep,
        record__observables=["loss", "weight"],
    )  # fmt: skip
    trained = []
    advance = Members.advance

    def counted(members, step):
        trained.append(step)
        return advance(members, step)

    monkeypatch.setattr(Members, "advance", counted)
    forked = forks.forked(path, at=3)
    for _, single in forked.points():
        members = ForkedMembers(single)
        members.draw()
        place = {key.rpartition(".")[2]: value for key, value in single.as_dict()["student"].items() if sweep}
        own = tsdyn.open(path).sel(epoch=3)
        own = own.sel(overrealization=place["overrealization"]) if sweep else own
        widths = members.state()["weight_1"].shape
        np.testing.assert_array_equal(
            members.state()["weight_1"], own.weight.sel(layer=1).values[:, : widths[1], : widths[2]]
        )
    assert trained == [3] * len(list(forked.points()))  # from the state after epoch 2


def test_seeds_that_the_parent_does_not_hold_yet_are_not_compared(parent, tmp_path):
    """As after a writer was killed that added them: found by the state machine of `tests.archive.states`."""
    tsdyn.fork(parent, at=1, perturb={"gaussian": 0.1}, out=tmp_path / "children")
    whole = forks.compared(tmp_path / "children").load()
    part = forks.compared(tmp_path / "children", tsdyn.open(parent).sel(seed=[1])).load()
    for name in ("distance", "student_kept", "barrier", "barrier_matched", "cka_angle", "divergence_epoch"):
        np.testing.assert_array_equal(part[name].sel(seed=1), whole[name].sel(seed=1))
        assert part[name].sel(seed=0).isnull().all()
        assert whole[name].sel(seed=0).notnull().any()


def changed(parent, perturb, at=1):
    """Weights and biases by layer of the parent and of its child at the fork, and the child's members."""
    ((_, single),) = forks.forked(parent, at=at, perturb=perturb).points()
    members = ForkedMembers(single)
    members.draw()
    own, state = tsdyn.open(parent).sel(epoch=at).load(), members.state()
    sizes = {1: (8, 10), 2: (6, 8)}
    before = {
        n: (own.weight.sel(layer=n).values[:, : s[0], : s[1]], own.bias.sel(layer=n).values[:, : s[0]])
        for n, s in sizes.items()
    }
    after = {n: (state[f"weight_{n}"].copy(), state[f"bias_{n}"].copy()) for n in sizes}
    return before, after, members


def test_each_change_is_what_it_says(parent):
    before, after, _ = changed(parent, {"weight": {"layer": 1, "node": 2, "input_node": 3, "by": 0.25}})
    difference = after[1][0] - before[1][0]
    assert np.allclose(difference[:, 2, 3], 0.25)
    assert (np.nan_to_num(difference) != 0).sum() == 2  # one entry per seed
    before, after, _ = changed(parent, {"weight": {"layer": 2, "node": 1, "by": -0.5}})
    assert np.allclose((after[2][1] - before[2][1])[:, 1], -0.5)

    before, after, members = changed(parent, {"silence": {"layer": 1, "node": 4}})
    for values in (after[1][0][:, 4], after[1][1][:, 4], after[2][0][:, :, 4]):
        assert (np.nan_to_num(values) == 0).all()
    assert members.advance(2) == []
    assert (members.state()["weight_1"][:, 4] == 0).all()  # and it stays silent
    assert (members.state()["weight_1"][:, 3] != after[1][0][:, 3]).any()

    before, after, _ = changed(parent, {"swap": {"layer": 1, "nodes": [0, 5]}})
    order = [5, 1, 2, 3, 4, 0, 6, 7]
    np.testing.assert_array_equal(after[1][0], before[1][0][:, order])
    np.testing.assert_array_equal(after[1][1], before[1][1][:, order])
    np.testing.assert_array_equal(after[2][0][..., :8], before[2][0][..., order])

    _, again, _ = changed(parent, {"swap": {"layer": 1, "node": 0, "node_2": 5}})
    np.testing.assert_array_equal(again[1][0], after[1][0])

    before, after, _ = changed(parent, {"transplant": {"seed": 1, "layer": 1, "node": 2, "to": 6}})
    for seed in (0, 1):
        np.testing.assert_array_equal(after[1][0][seed, 6], before[1][0][1, 2])
        np.testing.assert_array_equal(after[1][1][seed, 6], before[1][1][1, 2])
        np.testing.assert_array_equal(after[2][0][seed, :, 6], before[2][0][1, :, 2])

    before, after, _ = changed(parent, {"reinitialise": {"layer": 1, "node": 7}})
    others = [k for k in range(8) if k != 7]
    np.testing.assert_array_equal(after[1][0][:, others], before[1][0][:, others])
    assert (after[1][0][:, 7] != before[1][0][:, 7]).all()
    assert (after[1][1][:, 7] == 0).all()  # biases start at 0
    spread = after[1][0][:, 7].std() / 0.3  # 20 draws N(0, 0.3²): within five standard errors of the law's
    assert abs(spread - 1) < 5 / np.sqrt(2 * 20)

    _, after, _ = changed(parent, {"reinitialise": {"layer": 1}})
    assert (after[1][0] != before[1][0]).all()

    start = tsdyn.open(parent).weight.sel(epoch=0, layer=1)
    before, after, _ = changed(parent, {"gaussian": 0.01})
    noise = (after[1][0] - before[1][0])[0]
    rms = float(np.sqrt((start.isel(seed=0) ** 2).mean()))
    assert abs(noise.std() / (0.01 * rms) - 1) < 5 / np.sqrt(2 * noise.size)


def test_set_changes_keys_from_the_fork_on(parent, tmp_path):
    _, _, members = changed(parent, {"set": {"training.learning_rate": 0.1}})
    for step in (1, 2, 3):
        members.advance(step)
    other = tsdyn.run(
        small(training__epochs=3, training__steps_per_epoch=10, seeds=2, student__scale=0.3,
              training__learning_rate={"0": 0.02, "1": 0.1}, record__observables=["weight"]),
        tmp_path / "table",
    )  # fmt: skip
    end = other.weight.sel(epoch=3, layer=1)
    np.testing.assert_array_equal(members.state()["weight_1"], end)


def test_other_draws_differ_after_the_fork_and_the_barrier_falls_with_its_epoch(tmp_path):
    path = parent_of(tmp_path, training__epochs=6, training__steps_per_epoch=60, training__learning_rate=0.05)
    ds = tsdyn.fork(path, at=[0, 5], branches=2, draws="other", out=tmp_path / "c").load()
    for epoch in (0, 5):
        assert (ds["distance"].sel(fork_epoch=epoch, epoch=epoch) == 0).all()
    assert (ds["distance"].isel(epoch=-1) > 0).all()
    pair = ds["weight"].isel(epoch=-1, layer=0)
    assert float(abs(pair.isel(branch=0) - pair.isel(branch=1)).min("fork_epoch").max()) > 0
    distance = ds["distance"].isel(epoch=-1).mean(["branch", "seed"]).values
    assert distance[0] > distance[1]
    mean = ds["barrier"].mean(["branch", "seed"]).values
    assert mean[0] > mean[1]


def test_swapped_nodes_have_a_barrier_that_matching_removes(parent, tmp_path):
    ds = tsdyn.fork(parent, at=[1], perturb={"swap": {"layer": 1, "nodes": [0, 1]}}, out=tmp_path / "c").load()
    assert (ds["barrier"] > 1e-6).any()
    assert float(ds["barrier_matched"].max()) < 1e-12
    assert float(ds["cka_angle"].max()) < 1e-5
    order = [1, 0, 2, 3, 4, 5, 6, 7]
    own = tsdyn.open(parent).weight.sel(layer=1, epoch=3).values[:, order]
    np.testing.assert_allclose(ds.weight.sel(layer=1, epoch=3).isel(branch=0, fork_epoch=0).values, own, atol=1e-13)


def test_a_small_change_grows_as_the_tangent_says(tmp_path):
    """Against forward mode through GD written out here; the change is far below the first gate that flips."""
    rate, by, steps = 0.05, 1e-8, 20
    path = parent_of(tmp_path, training__method="gd", training__epochs=2, training__learning_rate=rate, seeds=1)
    ds = tsdyn.fork(path, at=0, perturb={"weight": {"layer": 1, "node": 0, "input_node": 0, "by": by}},
                    out=tmp_path / "c").isel(branch=0, fork_epoch=0, seed=0).load()  # fmt: skip
    own = tsdyn.open(path).isel(seed=0).load()
    from tsdyn.problem.inputs import training_inputs

    x = torch.from_numpy(training_inputs(Experiment.from_toml_text(own.attrs["experiment"]), 0))

    def parameters(prefix, widths, below):
        at = own if prefix else own.sel(epoch=0)
        for layer in (1, 2):
            one = at.sel(layer=layer)
            size = int(one[widths]), int(one[below])
            yield torch.tensor(one[f"{prefix}weight"].values[: size[0], : size[1]])
            yield torch.tensor(one[f"{prefix}bias"].values[: size[0]])

    start = tuple(parameters("", "width", "input_width"))
    v, d, u, e = parameters("teacher_", "teacher_width", "teacher_input_width")
    wanted = torch.relu(x @ v.T + d) @ u.T + e

    def loss(w, b, a, c):
        return 0.5 * (torch.relu(x @ w.T + b) @ a.T + c - wanted).square().sum(1).mean()

    def step(*p):
        return tuple(q - rate * g for q, g in zip(p, torch.func.grad(loss, (0, 1, 2, 3))(*p), strict=True))

    tangent = [torch.zeros_like(p) for p in start]
    tangent[0][0, 0] = 1.0
    here, along = start, tuple(tangent)
    for _ in range(steps):
        here, along = torch.func.jvp(step, here, along)
    size = float(torch.stack([t.square().sum() for t in along]).sum().sqrt())
    assert float(ds["distance"].isel(epoch=-1)) / by == pytest.approx(size, rel=1e-5)


def test_a_parent_that_sweeps_keeps_its_dimensions(tmp_path):
    tsdyn.run(
        small(
            training__epochs=1, seeds=2, data__train=40, data__eval=30, sweep={"student.overrealization": [1.0, 2.0]}
        ),
        tmp_path / "parent",
    )
    ds = tsdyn.fork(tmp_path / "parent", at=[0], perturb={"gaussian": 0.1}, branches=2, out=tmp_path / "c").load()
    assert ds["distance"].dims == ("overrealization", "fork_epoch", "branch", "seed", "epoch")
    assert ds["distance"].notnull().all()
    assert ds["barrier"].notnull().all()
    assert tsdyn.layer(ds.sel(overrealization=1.0), 1)["weight"].sizes["node"] == 4


def test_children_are_compared_as_pair_by_pair(tmp_path):
    """Against a loop that rebuilds each child and its parent by itself; two widths, and a parent that died."""
    path = parent_of(tmp_path, sweep={"student.overrealization": [1.0, 2.0]})
    forks.fork(path, at=[0, 1], perturb={"gaussian": 0.3}, branches=2, out=tmp_path / "children")
    own = tsdyn.open(path).load()
    dead = own["death_epoch"].copy()
    dead.loc[{"overrealization": 2.0, "seed": 1}] = 2
    own = own.assign_coords(death_epoch=dead)
    ds = forks.compared(tmp_path / "children", own)
    found, cells = ds[["barrier", "barrier_matched", "cka_angle"]].load(), 0
    for chosen, single in points(ds).values():
        for seed in (0, 1):
            at = {**chosen, "seed": seed}
            values = found.sel(at)
            if chosen["overrealization"] == 2.0 and seed == 1:
                assert all(array.isnull().all() for array in values.data_vars.values())
                continue
            child = member(ds.sel(at).isel(epoch=-1), single)
            parent = member(own.sel(overrealization=chosen["overrealization"], seed=seed).isel(epoch=-1), single)
            x = child.evaluation_inputs

            def loss(network, x=x, child=child):
                return float(0.5 * (network(x) - child.teacher(x)).square().sum(1).mean())

            pairs = [(parent.student, child.student), connectivity.matched(parent.student, child.student, x)]
            for name, pair in zip(("barrier", "barrier_matched"), pairs, strict=True):
                assert float(values[name]) == pytest.approx(forks.barrier(loss, *pair), rel=1e-10, abs=1e-14)
            f, g = (network.trace(x).activations[0] for network in pairs[0])
            angle = np.degrees(np.arccos(min(1.0, linear_cka(f.numpy(), g.numpy()))))
            assert float(values["cka_angle"].sel(layer=1)) == pytest.approx(angle, rel=1e-6, abs=1e-5)
            assert bool(values["cka_angle"].sel(layer=2).isnull())
            cells += 1
    assert cells == 2 * 2 * 2 * 2 - 4


def test_a_part_of_the_networks_is_not_compared(parent, tmp_path):
    forks.fork(parent, at=1, perturb={"gaussian": 0.1}, out=tmp_path / "children")
    part = forks.compared(tsdyn.open(tmp_path / "children").isel(node=slice(0, 4)))
    part["distance"].load()  # what needs no networks can be had
    with pytest.raises(ValueError, match="node holds 0, 1, 2, 3, and all 8"):
        part["barrier"].load()


def test_what_cannot_be_forked_is_refused(parent, tmp_path):
    def refused(match, error=tsdyn.ExperimentError, **given):
        with pytest.raises(error, match=match):
            tsdyn.fork(parent, **{"out": tmp_path / "c", **given})

    refused("the student has layers 1..2", perturb={"silence": {"layer": 3, "node": 0}})
    refused("is the output layer", perturb={"swap": {"layer": 2, "nodes": [0, 1]}})
    refused("node 9 is none of the 8", perturb={"silence": {"layer": 1, "node": 9}})
    refused("none of the run's seeds", perturb={"transplant": {"seed": 9, "layer": 1, "node": 0}})
    refused("at most one of gaussian", perturb={"noise": 0.1})
    refused("at most one of gaussian", perturb={"gaussian": 0.1, "silence": {"layer": 1, "node": 0}})
    refused(r"a table of layer, node, by, \[input_node\]", perturb={"weight": {"layer": 1}})
    refused("a relative size", perturb={"gaussian": -1.0})
    refused("the run has 3 epochs", at=[4])
    refused("at least one epoch", at=[-1])
    refused("cannot change during a run", perturb={"set": {"training.loss": "cross_entropy"}})
    refused("cannot change during a run", perturb={"set": {"student.scale": 1.0}})
    with pytest.raises(tsdyn.ExperimentError, match=r"give fork\.parent"):
        small(fork={"fork_epoch": 1})
    tsdyn.fork(parent, out=tmp_path / "children")
    with pytest.raises(tsdyn.ExperimentError, match="holds children itself"):
        tsdyn.fork(tmp_path / "children", out=tmp_path / "d")
    with pytest.raises(tsdyn.ExperimentError, match="ask for the parent"):
        tsdyn.sensitivity(tmp_path / "children", of="loss_eval", wrt=["start"])
    with tsdyn.Recorder(tmp_path / "recording", nn.Linear(2, 1), probe=(torch.ones(3, 2), torch.ones(3, 1))) as rec:
        rec.commit(0)
    with pytest.raises(tsdyn.ExperimentError, match="a recording of a loop of the user's own"):
        tsdyn.fork(tmp_path / "recording", at=[0], perturb={"gaussian": 0.1}, out=tmp_path / "none")
    with pytest.raises(ValueError, match="of no fork"):
        forks.compared(parent)
    bare = parent_of(tmp_path, record__observables=["loss"])
    with pytest.raises(ValueError, match="weight in record"):
        tsdyn.fork(bare, out=tmp_path / "e")
    done = CliRunner().invoke(cli.app, ["fork", str(parent), "--at", "x"])
    assert "write epochs" in str(done.exception)


@pytest.mark.parametrize(
    ("changes", "perturb", "message"),
    [
        ({}, {"weight": {"layer": 1, "node": 0, "input_node": 99, "by": 1.0}}, "input_node = 99: of 10"),
        ({"student__bias": False}, {"weight": {"layer": 1, "node": 0, "by": 1.0}}, "has no biases; give input_node"),
        (
            {"teacher__widths": [36, 3, 2], "teacher__convolution": True, "data__image": [1, 6, 6]},
            {"silence": {"layer": 1, "node": 0}},
            "layer 1 is a convolution under a flattened layer; take gaussian",
        ),
    ],
)
def test_numbers_that_a_student_does_not_have_are_not_changed(tmp_path, changes, perturb, message):
    started = parent_of(tmp_path, **changes, training__epochs=1, record__observables=["loss", "weight"])
    with pytest.raises((tsdyn.ExperimentError, SweepError), match=message):
        tsdyn.fork(started, perturb=perturb, out=tmp_path / "children")


def test_the_barrier_is_the_largest_excess_over_the_chord():
    weights = [torch.tensor([[v]], dtype=torch.float64) for v in (-1.0, 3.0)]
    first, second = (tsdyn.Network([w], activation="identity") for w in weights)
    height = forks.barrier(lambda n: 5 - float(n.weights[0][0, 0] - 1) ** 2, first, second)
    assert height == pytest.approx(4.0)  # at the middle: 5 − 1 for ends of 1
    assert forks.barrier(lambda n: float(n.weights[0][0, 0]) ** 2, first, second) == 0


class Residual(nn.Module):
    """A skip connection and LayerNorm: nothing that tsdyn makes."""

    def __init__(self):
        super().__init__()
        self.below, self.norm, self.above = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.relu(self.below(x))
        return self.above(hidden + self.norm(hidden))


@pytest.fixture(scope="module")
def own_parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    base = {"training__epochs": 3, "training__steps_per_epoch": 5, "seeds": 2, "training__momentum": 0.9}
    asked = small(**base, teacher__widths=[4, 3, 2], record__observables=["loss", "parameter", "weight"])
    tsdyn.run(asked, folder / "parent", student=Residual)
    return folder / "parent"


def test_an_own_module_without_a_change_has_its_parents_bits(own_parent, tmp_path):
    ds = tsdyn.fork(own_parent, at=[0, 2], out=tmp_path / "children", student=Residual).load()
    own = tsdyn.open(own_parent).load()
    for fork_epoch in (0, 2):
        epochs = [e for e in own.epoch.values if e > fork_epoch]
        child = ds.parameter.sel(fork_epoch=fork_epoch, epoch=epochs).isel(branch=0)
        np.testing.assert_array_equal(child.transpose(*own.parameter.dims).values, own.parameter.sel(epoch=epochs))
    assert float(ds.distance.max()) == 0
    assert "barrier" not in ds


def test_an_own_module_is_changed_as_said(own_parent, tmp_path):
    """One weight by 0.5; and Gaussian noise of s times each parameter's own rms, whose expected length is known."""
    one = {"weight": {"layer": 1, "node": 2, "input_node": 3, "by": 0.5}}
    ds = tsdyn.fork(own_parent, at=2, perturb=one, out=tmp_path / "one", student=Residual).load()
    np.testing.assert_allclose(ds.distance.sel(epoch=2).values, 0.5, rtol=1e-14)
    moved = (ds.weight.sel(epoch=2) - tsdyn.open(own_parent).weight.sel(epoch=2)).isel(fork_epoch=0, branch=0)
    assert np.argwhere(moved.sel(seed=0).fillna(0).values).tolist() == [[0, 2, 3]]

    size = 0.01
    ds = tsdyn.fork(own_parent, at=2, perturb={"gaussian": size}, branches=20, out=tmp_path / "all", student=Residual)
    start = own_modules.named(tsdyn.open(own_parent).isel(epoch=0).load())
    rms = {name: np.sqrt((values**2).mean([d for d in values.dims if d != "seed"])) for name, values in start.items()}
    like = {name: rms[f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name] for name in rms}
    expected = sum(size**2 * like[name] ** 2 * values[0].size for name, values in start.items())
    ratio = ds.distance.sel(epoch=2).squeeze("fork_epoch").load() ** 2 / expected
    # a mean of 20 sums of squares of some 40 normal numbers: relative deviation below sqrt(2 / 20 / 5) = 0.14
    assert (np.abs(ratio.mean("branch") - 1) < 4 * 0.14).all()


@pytest.mark.parametrize(
    ("perturb", "told"),
    [
        ({"swap": {"layer": 1, "nodes": [0, 1]}}, "which numbers of a module of your own belong to a node"),
        ({"weight": {"layer": 9, "node": 0, "by": 1.0}}, "2 labelled layers"),
        ({"weight": {"layer": 1, "node": 5, "by": 1.0}}, "node 5 is none of the 5 of layer 1"),
    ],
)
def test_what_an_own_module_has_not_is_refused(own_parent, tmp_path, perturb, told):
    with pytest.raises(ValueError, match=told):
        tsdyn.fork(own_parent, at=2, perturb=perturb, out=tmp_path / "children", student=Residual)
    assert not (tmp_path / "children").exists()


@pytest.mark.parametrize("kept", [{"record__state_every": 1}, {}], ids=["states kept", "weights recorded"])
def test_a_parent_that_has_not_gained_its_newest_seeds_yet_is_trained_again(kept, tmp_path):
    """The sweep asks for three seeds, its points hold two, as where the command that adds one was killed at once."""
    path = parent_of(tmp_path, sweep={"teacher.polarity": [0.0, 1.0]}, **kept)
    held = Experiment.from_toml(path / "experiment.toml")
    grown = held.replace({"seeds": 3})
    (path / "experiment.toml").write_text(grown.to_toml(), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tsdyn.UnrecordedWarning)
        found = tsdyn.fork(path, at=1, out=tmp_path / "children").load()
    tsdyn.run(grown, tmp_path / "whole")
    wanted = tsdyn.fork(tmp_path / "whole", at=1, out=tmp_path / "children of the whole").load()
    for name in ("weight", "loss_eval"):
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize(("finished", "longer"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("swept", [{}, {"sweep": {"training.learning_rate": [0.1, 0.2]}}], ids=["run", "sweep"])
def test_a_run_whose_input_file_changed_is_not_forked(tmp_path, monkeypatch, finished, longer, swept):
    """Before, its children were trained on the other file's data, beside the parent as if on its own."""
    if not finished:
        monkeypatch.setattr(RunDirectory, "consolidate", lambda *_: None)
        monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    inputs = tmp_path / "covariance.npy"
    np.save(inputs, np.eye(small().layout.input_width))
    asked = {"data.covariance": str(inputs), "training.epochs": 1, "record.observables": ["mse", "weight"], **swept}
    tsdyn.run(small(seeds=1).replace(asked), tmp_path / "run")
    np.save(inputs, 2 * np.eye(small().layout.input_width))
    if longer:  # asked for, and refused
        with pytest.raises((ArchiveError, SweepError), match="other input files than are there"):
            tsdyn.run(small(seeds=1).replace({**asked, "training.epochs": 2}), tmp_path / "run")
    with pytest.raises((ArchiveError, SweepError), match="other input files than are there"):
        tsdyn.fork(tmp_path / "run", at=0, out=tmp_path / "children")
    np.save(inputs, np.eye(small().layout.input_width))
    children = tsdyn.fork(tmp_path / "run", at=0, out=tmp_path / "children")
    assert float(children.distance.max()) == 0
