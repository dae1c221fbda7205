"""Derivatives through training: closed forms, finite differences on both sides of the radius, symmetries, bad input."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr

import tsdyn
from tests.through_training.test_twins import tiny, unrolled
from tsdyn.problem.inputs import batch_indices, generator, training_inputs
from tsdyn.problem.students import draw_student
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running.members import Members
from tsdyn.through_training import kept, retraining
from tsdyn.through_training.replay import ReplayError


def linear(**changes):
    """A student of one linear layer under gradient descent: θ_t is known in closed form."""
    return tiny(
        teacher__widths=[4, 2], student__overrealization=1.0, student__bias=False, teacher__bias=False,
        training__method="gd", training__epochs=5, training__steps_per_epoch=7, data__train=20, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def linear_run(tmp_path_factory):
    e = linear()
    path = tmp_path_factory.mktemp("linear") / "run"
    tsdyn.run(e, path)
    return e, path


def parts(e, seed):
    x = training_inputs(e, seed)
    y = draw_teacher(e, seed)(torch.from_numpy(x)).numpy()
    return x, y, draw_student(e, seed).weights[0].numpy()


# --- closed forms --------------------------------------------------------------------------------------------


def test_a_linear_student_has_the_closed_form_in_start_and_samples(linear_run):
    e, path = linear_run
    node, inp = 1, 2
    found = tsdyn.sensitivity(
        path,
        ("weight", {"layer": 1, "node": node, "input_node": inp}),
        wrt=["start", "sample", "target", "learning_rate"],
    )
    eta, steps = e.training.learning_rate, e.steps * e.training.epochs
    for seed in e.seed_labels:
        x, y, w = parts(e, seed)
        n = len(x)
        step = np.eye(4) - eta * x.T @ x / n  # H = xᵀx/N acts on the inputs of each node
        powers = [np.linalg.matrix_power(step, k) for k in range(steps + 1)]
        at = found.sel(seed=seed, layer=1)
        wanted = np.zeros((2, 4))
        wanted[node] = powers[steps][inp]
        assert np.abs(at["d_start"].values[:2, :4] - wanted).max() < 1e-12
        sample, target, rates, now = np.zeros(n), np.zeros((n, 2)), np.zeros(e.training.epochs), w.copy()
        for t in range(steps):
            g = (y - x @ now.T)[:, node, None] * x  # negative gradient of each sample in the node's weights
            sample += eta / n * g @ powers[steps - 1 - t][inp]
            target[:, node] += eta / n * x @ powers[steps - 1 - t][inp]
            rates[t // e.steps] += g.mean(0) @ powers[steps - 1 - t][inp]
            now = now + eta / n * (y - x @ now.T).T @ x
        assert np.abs(at["d_sample"].values - sample).max() < 1e-12
        assert np.abs(at["d_target"].values - target).max() < 1e-12
        assert np.abs(at["d_learning_rate"].values - rates).max() < 1e-12
        assert float(at["value"]) == pytest.approx(now[node, inp], abs=1e-12)


def test_at_convergence_the_derivative_in_a_weight_is_the_influence_function(tmp_path):
    """Ridge: weight decay λ makes ½λ‖θ‖² of the objective; dO/dw_i = −∇Oᵀ H⁻¹ ∇ℓ_i/N."""
    e = linear(training__weight_decay=0.3).replace({"training.epochs": 40, "training.steps_per_epoch": 40})
    tsdyn.run(e.replace({"record.every": 40}), tmp_path / "run")
    found = tsdyn.sensitivity(tmp_path / "run", "loss_eval", wrt="sample", certificate=False)
    for seed in e.seed_labels:
        x, y, _ = parts(e, seed)
        n = len(x)
        h = x.T @ x / n + 0.3 * np.eye(4)
        end = np.linalg.solve(h, x.T @ y / n).T
        members = Members(e)
        probe = members.eval_probes[e.seed_labels.index(seed)].inputs.numpy()
        target = draw_teacher(e, seed)(torch.from_numpy(probe)).numpy()
        slope = -(target - probe @ end.T).T @ probe / len(probe)  # ∇O, (node, input)
        each = (y - x @ end.T)[:, :, None] * x[:, None, :] / n  # −∇ℓ_i/N
        wanted = np.einsum("oi,ij,noj->n", slope, np.linalg.inv(h), each)
        assert np.abs(found["d_sample"].sel(seed=seed).values - wanted).max() < 1e-10


def test_scale_and_teacher_chain_on_from_start_and_target(relu_run):
    e, path = relu_run
    found = tsdyn.sensitivity(path, "mse_eval", wrt=["start", "target", "teacher", "scale"], certificate=False)
    for seed in e.seed_labels:
        at = found.sel(seed=seed)
        theta = draw_student(e, seed)
        by_scale = sum(
            float((at["d_start"].sel(layer=i).values[: w.shape[0], : w.shape[1]] * w.numpy()).sum())
            for i, w in enumerate(theta.weights, start=1)
        )
        assert float(at["d_scale"]) == pytest.approx(by_scale / e.student.scale, rel=1e-12)  # biases start at 0
    # the teacher also makes the evaluation's targets, so its total derivative is compared with a finite difference
    for size in (1e-5, -1e-5):
        both = retraining.retrained(path, "mse_eval", wrt="teacher", sizes=[size])
        assert np.allclose(both["retrained"], both["predicted"], rtol=2e-4)


# --- symmetries ----------------------------------------------------------------------------------------------


def test_no_derivative_along_the_rescaling_of_a_relu_node(relu_run):
    """Loss before training is the same under w_j → c w_j, b_j → c b_j, v_j → v_j/c: the derivative along it is 0."""
    e, path = relu_run
    found = tsdyn.sensitivity(path, "loss_eval", epoch=0, certificate=False)
    for seed in e.seed_labels:
        net, at = draw_student(e, seed), found.sel(seed=seed)
        w, v = (t.numpy() for t in net.weights)
        first = (at["d_start"].sel(layer=1).values[: len(w), : w.shape[1]] * w).sum(1)
        second = (at["d_start"].sel(layer=2).values[: len(v), : v.shape[1]] * v).sum(0)
        assert np.abs(first - second).max() < 1e-12 * np.abs(first).max() + 1e-14


def test_permuted_samples_have_permuted_derivatives(tmp_path):
    """The same data in another order, under gradient descent: start and sample derivatives follow the samples."""
    rng = np.random.default_rng(0)
    x, order = rng.standard_normal((20, 5)), rng.permutation(20)
    found = []
    for name, rows in (("one", slice(None)), ("two", order)):
        np.savez(tmp_path / f"{name}.npz", inputs=x[rows])
        np.savez(tmp_path / "eval.npz", inputs=rng.standard_normal((15, 5))) if name == "one" else None
        e = tiny(
            data__law="file", data__path=str(tmp_path / f"{name}.npz"), data__eval_path=str(tmp_path / "eval.npz"),
            data__train=20, data__eval=15, training__method="gd", seeds=[3],
        )  # fmt: skip
        tsdyn.run(e, tmp_path / name)
        found.append((Members(e), tsdyn.sensitivity(tmp_path / name, wrt=["start", "sample"], certificate=False)))
    (one, first), (two, second) = found
    mine, theirs = (m.finite[0][0].numpy() for m in (one, two))
    place = [int(np.abs(theirs - row).sum(1).argmin()) for row in mine]  # where each sample is in the other run
    assert np.array_equal(theirs[place], mine)
    assert np.array_equal(np.sort(one.eval_probes[0].inputs, 0), np.sort(two.eval_probes[0].inputs, 0))
    assert np.allclose(second["d_sample"].values[0, place], first["d_sample"].values[0], rtol=1e-10, atol=1e-14)
    assert np.allclose(first["d_start"], second["d_start"], rtol=1e-9, atol=1e-13, equal_nan=True)


def test_permuted_nodes_have_permuted_derivatives(tmp_path):
    """The same start with its hidden nodes in another order: derivatives follow the nodes, those of samples stay."""
    e, order = tiny(seeds=[3]), np.random.default_rng(1).permutation(6)
    w, v = (t.numpy() for t in draw_student(e, 3).weights)
    b, c = (t.numpy() for t in draw_student(e, 3).biases)
    found = []
    for name, rows in (("one", slice(None)), ("two", order)):
        parameters = {"0.weight": w[rows], "0.bias": b[rows], "2.weight": v[:, rows], "2.bias": c}
        np.savez(tmp_path / f"{name}.npz", **parameters)
        start = {"student.init": "file", "student.path": str(tmp_path / f"{name}.npz")}
        tsdyn.run(e.replace(start), tmp_path / name)
        found.append(tsdyn.sensitivity(tmp_path / name, wrt=["start", "sample", "learning_rate"]).isel(seed=0))
    first, second = found
    one, two = ((f["d_start"].sel(layer=1), f["d_start"].sel(layer=2), f["d_start_bias"].sel(layer=1)) for f in found)
    same = {"rtol": 1e-9, "atol": 1e-13, "equal_nan": True}
    assert np.allclose(two[0].values, one[0].values[order], **same)
    assert np.allclose(two[1].values[:2], one[1].values[:2][:, order], **same)
    assert np.allclose(two[2].values, one[2].values[order], **same)
    assert np.abs(one[0] - two[0]).max() > 1e-3
    for name in ("d_sample", "d_learning_rate", "radius"):
        assert np.allclose(first[name], second[name], **same), name


# --- what is asked -------------------------------------------------------------------------------------------


def test_a_users_function_of_the_network(relu_run):
    _, path = relu_run

    def product(network):
        return network.weights[0][0, 0] * network.weights[1].square().sum()

    found = tsdyn.sensitivity(path, product, wrt="start", seeds=[5])
    curve = retraining.retrained(path, product, multiples=[0.1], seeds=[5])
    assert found.attrs["observable"] == "product"
    assert np.allclose(curve["retrained"], curve["predicted"], rtol=1e-2)
    for wrong in (
        lambda network: (network.weights[0] > 0).sum(),
        lambda network: network.weights[0].detach().sum(),
    ):
        with pytest.raises(tsdyn.ExperimentError, match="no gradient"):
            tsdyn.sensitivity(path, wrong)
    with pytest.raises(tsdyn.ExperimentError, match="one number as a torch tensor"):
        tsdyn.sensitivity(path, lambda network: network.weights[0])
    with pytest.raises(tsdyn.ExperimentError, match=r"has no attribute 'loss_eval'; .* parameter is called ds takes a"):
        tsdyn.sensitivity(path, lambda archive: archive.loss_eval)


def test_loss_train_is_also_a_function_of_the_training_set(relu_run):
    _, path = relu_run
    for wrt in ("target", "input", "teacher"):
        curve = retraining.retrained(path, "mse_eval", wrt=wrt, multiples=[0.2])
        assert np.allclose(curve["retrained"], curve["predicted"], rtol=0.02), wrt
    found = tsdyn.sensitivity(path, "loss_train", epoch=0, wrt=["target", "sample"], certificate=False)
    for seed in (3, 5):
        e, _ = relu_run
        x, y = training_inputs(e, seed), draw_teacher(e, seed)(torch.from_numpy(training_inputs(e, seed)))
        output = draw_student(e, seed)(torch.from_numpy(x))
        assert np.allclose(found["d_target"].sel(seed=seed), (y - output) / len(x), rtol=1e-12)
        assert bool((found["d_sample"] == 0).all())  # no step was taken


def test_a_sweep_keeps_its_dimensions(tmp_path):
    e = tiny().replace({"sweep": {"student.overrealization": [1, 2], "training.learning_rate": [0.05, 0.1]}})
    tsdyn.run(e, tmp_path / "sweep")
    found = tsdyn.sensitivity(tmp_path / "sweep", wrt=["start", "learning_rate"])
    assert found["d_start"].dims == ("overrealization", "learning_rate", "seed", "layer", "node", "input_node")
    assert found["d_learning_rate"].dims == ("overrealization", "learning_rate", "seed", "epoch")
    for (_, single), (i, j) in zip(e.points(), itertools.product(range(2), range(2)), strict=True):
        value, slopes = unrolled(single, 1)
        at = found.isel(overrealization=i, learning_rate=j).sel(seed=5)
        assert float(at["value"]) == pytest.approx(value, rel=1e-12)
        w = slopes["weight_1"]
        assert np.allclose(at["d_start"].sel(layer=1).values[: w.shape[0], : w.shape[1]], w, rtol=1e-9, atol=1e-13)
    one = tsdyn.open(tmp_path / "sweep").sel(overrealization=2, learning_rate=0.1)
    alone = tsdyn.sensitivity(one, wrt="start")
    assert alone["d_start"].dims == ("seed", "layer", "node", "input_node")
    assert np.allclose(alone["d_start"], found["d_start"].sel(overrealization=2, learning_rate=0.1), equal_nan=True)


def test_smoothed_is_the_mean_over_starts_with_its_error(relu_run):
    _, path = relu_run
    found = tsdyn.sensitivity(path, wrt=["start", "sample"], smoothed=3, spread=0.1)
    again = tsdyn.sensitivity(path, wrt=["start", "sample"], smoothed=3, spread=0.1)
    xr.testing.assert_equal(found, again)  # keyed
    plain = tsdyn.sensitivity(path, wrt=["start", "sample"])
    assert bool((found["d_sample_error"] > 0).any())
    assert not np.allclose(found["d_sample"], plain["d_sample"])
    near = tsdyn.sensitivity(path, wrt=["start", "sample"], smoothed=2, spread=1e-12)
    assert np.allclose(near["d_sample"], plain["d_sample"], rtol=1e-6, atol=1e-12)


def test_everything_is_labelled(relu_run):
    _, path = relu_run
    found = tsdyn.sensitivity(path, wrt=["start", "sample", "learning_rate"])
    for name, array in found.data_vars.items():
        assert {"units", "long_name", "source"} <= set(array.attrs), name
    assert found["radius"].dims == ("seed", "wrt", "side")


# --- what cannot be done -------------------------------------------------------------------------------------


def test_what_has_no_derivative_is_named_with_the_way_out(relu_run):
    _, path = relu_run
    for wrong, said in {"accuracy": "loss_eval", "observation_count": "correlation", "loss": "did you mean"}.items():
        with pytest.raises(tsdyn.ExperimentError, match=said):
            tsdyn.sensitivity(path, wrong)
    for of, said in (
        (("correlation", {"layer": 1, "node": 0}), "teacher_node is not given"),
        (("correlation", {"layer": 2, "node": 0, "teacher_node": 0}), "hidden layers are 1..1"),
        (("correlation", {"layer": 1, "node": 6, "teacher_node": 0}), "has 0..5"),
        (("loss_eval", {"layer": 1}), "has the labels none"),
    ):
        with pytest.raises(tsdyn.ExperimentError, match=said):
            tsdyn.sensitivity(path, of)
    for given, said in (
        ({"wrt": "strat"}, "did you mean 'start'"),
        ({"wrt": []}, "empty"),
        ({"epoch": 99}, "has the epochs 0..4"),
        ({"seeds": [0]}, r"\[3, 5\]"),
        ({"smoothed": 0}, "number of starts"),
        ({"memory": "much"}, "500MB"),
    ):
        with pytest.raises(tsdyn.ExperimentError, match=said):
            tsdyn.sensitivity(path, **given)
    with pytest.raises(MemoryError, match="give more memory="):
        tsdyn.sensitivity(path, memory=1000)


def test_fresh_samples_are_refused_and_the_rest_is_not(tmp_path):
    tsdyn.run(tiny(data__train="fresh"), tmp_path / "run")
    for wrt in ("sample", "target", "input"):
        with pytest.raises(tsdyn.ExperimentError, match="no sample is seen twice"):
            tsdyn.sensitivity(tmp_path / "run", wrt=wrt)
    with pytest.raises(tsdyn.ExperimentError, match="no training set"):
        tsdyn.sensitivity(tmp_path / "run", "loss_train")
    curve = retraining.retrained(tmp_path / "run", "mse_eval", wrt="teacher", multiples=[0.01])
    assert np.allclose(curve["retrained"], curve["predicted"], rtol=0.02)


def test_kinds_and_starts_that_cannot_be_differentiated_are_refused(tmp_path):
    runs = {
        "flow": (
            tiny(training__method="flow", training__learning_rate=1e-4, training__epochs=1, student__activation="tanh"),
            "start",
            "train with 'gd'",
        ),
        "taught": (tiny(student__init="near-teacher", student__overrealization=1.0), "teacher", "near-teacher"),
        "scale": (tiny(student__init="torch"), "scale", "init = 'gaussian'"),
        "classes": (tiny(training__loss="cross_entropy"), "teacher", "of classes"),
    }
    for name, (e, wrt, said) in runs.items():
        tsdyn.run(e, tmp_path / name)
        with pytest.raises(tsdyn.ExperimentError, match=said):
            tsdyn.sensitivity(tmp_path / name, wrt=wrt)


def test_an_archive_without_weights_says_what_to_record(tmp_path):
    tsdyn.run(tiny(record__observables=["loss"]), tmp_path / "run")
    with pytest.raises(tsdyn.ExperimentError, match="record it"):
        tsdyn.sensitivity(tmp_path / "run")


def test_a_member_that_died_is_nan_or_refused_by_name(tmp_path):
    e = tiny(training__learning_rate={"0": 0.05, "1": 1e6}, training__epochs=3)
    ds = tsdyn.run(e, tmp_path / "run")
    assert bool((ds["death_epoch"] >= 2).all())
    with pytest.raises(tsdyn.ExperimentError, match="seed 3 died at epoch"):
        tsdyn.sensitivity(tmp_path / "run", seeds=[3])
    assert "value" not in tsdyn.sensitivity(tmp_path / "run") or bool(
        tsdyn.sensitivity(tmp_path / "run")["value"].isnull().all()
    )
    assert bool(tsdyn.sensitivity(tmp_path / "run", epoch=1)["value"].notnull().all())


def test_another_runs_weights_are_refused(relu_run):
    _, path = relu_run
    ds = tsdyn.open(path).load()
    ds["weight"] = ds["weight"] + 1e-4 * (ds["epoch"] == 2)
    with pytest.raises(ReplayError, match="epoch 2"):
        tsdyn.sensitivity(ds)


# --- going on, workers, the command --------------------------------------------------------------------------


def test_finished_blocks_are_kept_and_not_computed_again(relu_run, tmp_path, monkeypatch):
    _, path = relu_run
    from tsdyn.through_training import sensitivity as module

    given = {"wrt": ["start", "sample"], "keep": tmp_path / "parts", "memory": 8_000}
    first = tsdyn.sensitivity(path, **given)
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == 2  # one member each
    files[1].unlink()  # as if killed in the second
    done = []
    monkeypatch.setattr(module, "compute", lambda job, tick: done.append(job) or kept_compute(job, tick))
    again = tsdyn.sensitivity(path, **given)
    assert len(done) == 1
    xr.testing.assert_identical(first.drop_attrs(), again.drop_attrs())
    tsdyn.sensitivity(path, **{**given, "epoch": 3})
    assert len(done) == 3  # another request shares nothing


def kept_compute(job, tick):
    from tsdyn.through_training.blocks import compute

    return compute(job, tick)


def test_the_command_writes_the_file_and_says_how_far_it_holds(relu_run, tmp_path, capfd, monkeypatch):
    from tsdyn import cli

    _, path = relu_run
    file = tmp_path / "found.nc"
    words = ["sensitivity", str(path), "--of", "correlation[layer=1,teacher_node=2,node=3]", "--epoch", "3"]
    monkeypatch.setattr("sys.argv", ["tsdyn", *words, "--wrt", "start,learning_rate", "-o", str(file)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capfd.readouterr().out
    for said in (
        "predicts changes of the start", "beyond, gates flip", "passes", "begun from the archive's states of 2 epochs",
    ):  # fmt: skip
        assert said in out
    with xr.open_dataset(file) as found:
        assert set(found["wrt"].values) == {"start", "learning_rate"}
        assert found.attrs["observable"] == "correlation[layer=1,teacher_node=2,node=3]"
    assert not list(tmp_path.glob("*.parts"))
    monkeypatch.setattr("sys.argv", ["tsdyn", "sensitivity", str(path), "--wrt", "learning_rate", "--quiet"])
    with pytest.raises(SystemExit) as end:  # no name is given
        cli.main()
    assert not end.value.code
    with xr.open_dataset(path.with_name("run-sensitivity.nc")) as found:
        assert found.attrs["observable"] == "loss_eval"


def test_a_run_is_repeated_to_the_bit(relu_run):
    e, path = relu_run
    ds = tsdyn.open(path)
    members = Members(e, "cpu")
    members.draw()
    members.prepare()
    for epoch in range(4):
        if epoch:
            members.advance(epoch)
        mine = np.stack([members.ensemble.network(i).weights[0].numpy() for i in range(2)])
        assert np.array_equal(mine, ds["weight"].sel(epoch=epoch, layer=1).values[:, :6, :5])


def test_kept_files_that_are_damaged_count_as_none(relu_run, tmp_path):
    _, path = relu_run
    given = {"wrt": "start", "keep": tmp_path, "certificate": False}
    first = tsdyn.sensitivity(path, **given)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    xr.testing.assert_equal(tsdyn.sensitivity(path, **given), first)
    assert kept is not None


def test_a_function_of_a_differentiable_dataset(tmp_path):
    from tsdyn.analysis import specialization

    e = tiny(record__observables=["loss", "weight", "correlation"])
    tsdyn.run(e, tmp_path / "run")

    def mean(ds):
        return specialization.mean_specialization(tsdyn.layer(ds, 1))

    found = tsdyn.sensitivity(tmp_path / "run", mean, certificate=False)
    named = tsdyn.sensitivity(tmp_path / "run", "mean_specialization", certificate=False)
    assert np.allclose(found["value"], named["value"], rtol=1e-12)
    assert np.allclose(found["d_start"], named["d_start"], rtol=1e-10, atol=1e-15, equal_nan=True)
    norm = tsdyn.sensitivity(tmp_path / "run", lambda ds: (ds["weight"] ** 2).sum(), epoch=0, certificate=False)
    for seed in e.seed_labels:
        for layer, weight in enumerate(draw_student(e, seed).weights, start=1):
            wanted = norm["d_start"].sel(seed=seed, layer=layer).values[: weight.shape[0], : weight.shape[1]]
            assert np.allclose(wanted, 2 * weight, rtol=1e-12)


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(5, 5), torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.outer(x + torch.tanh(self.inner(x)))


class Counting(Residual):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, x):
        return self.outer(self.norm(x + self.inner(x)))


def test_modules_of_ones_own(tmp_path):
    e = tiny(seeds=[3], record__observables=["loss", "parameter"])
    ds = tsdyn.run(e, tmp_path / "run", student=Residual)
    found = tsdyn.sensitivity(tmp_path / "run", student=Residual, wrt=["start", "learning_rate"])
    assert found["d_start"].dims == ("seed", "entry")
    assert bool(found["radius"].isnull().all())
    assert float(found["value"][0]) == pytest.approx(float(ds["loss_eval"][0, -1]), rel=1e-12)
    curve = retraining.retrained(tmp_path / "run", student=Residual, sizes=[1e-4, -1e-4])
    assert np.allclose(curve["retrained"], curve["predicted"], rtol=1e-3)
    tsdyn.run(e, tmp_path / "counting", student=Counting)
    with pytest.raises(tsdyn.ExperimentError, match="changes its buffers"):
        tsdyn.sensitivity(tmp_path / "counting", student=Counting)


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.drop = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2), torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(self.drop(x)))))


def dropped(e, seed, position):
    """Value and derivatives of one member by a graph of all steps, its masks drawn as the documentation says."""
    members = Members(e, student=Dropping)
    w, b, v, c = (members.ensemble.values[f"{n}"][position].clone().requires_grad_() for n in (
        "inner.weight", "inner.bias", "outer.weight", "outer.bias"
    ))  # fmt: skip
    x, y = (t[position].clone() for t in members.finite)
    weight = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    rates = [torch.tensor(e.training.rate(k), dtype=torch.float64, requires_grad=True) for k in (1, 2, 3)]
    now = (w, b, v, c)
    velocity = [torch.zeros_like(p) for p in now]
    for epoch in (1, 2, 3):
        rng = generator(seed=seed, stream="dropout", epoch=epoch)
        for rows in batch_indices(e, seed, epoch, len(x)):
            masks = [torch.from_numpy((rng.random((len(rows), n)) >= 0.3) / 0.7) for n in (5, 6)]
            hidden = torch.tanh((x[rows] * masks[0]) @ now[0].T + now[1]) * masks[1]
            off = hidden @ now[2].T + now[3] - y[rows]
            loss = 0.5 * (weight[rows] * off.square().sum(1)).mean()
            slopes = torch.autograd.grad(loss, now, create_graph=True)
            velocity = [e.training.momentum * m + g for m, g in zip(velocity, slopes, strict=True)]
            now = tuple(p - rates[epoch - 1] * m for p, m in zip(now, velocity, strict=True))
    probe = members.eval_probes[position].inputs
    output = torch.tanh(probe @ now[0].T + now[1]) @ now[2].T + now[3]
    value = 0.5 * (members.targets(position, probe) - output).square().sum(1).mean()
    return float(value.detach()), torch.autograd.grad(value, [w, b, v, c, weight, *rates])


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_keyed_dropout_is_a_part_of_the_steps(momentum, tmp_path):
    e = tiny(
        training__epochs=3,
        training__momentum=momentum,
        record__observables=["loss", "parameter"],
        record__state_every=2,
    )
    tsdyn.run(e, tmp_path / "run", student=Dropping)
    found = tsdyn.sensitivity(tmp_path / "run", student=Dropping, wrt=["start", "sample", "learning_rate"])
    assert found.attrs["replayed_from"] == ("0,2" if momentum else "0,1,2")
    for position, seed in enumerate(e.seed_labels):
        value, (*start, sample, one, two, three) = dropped(e, seed, position)
        at = found.sel(seed=seed)
        assert float(at["value"]) == pytest.approx(value, rel=1e-12)
        for mine, wanted in (
            (at["d_start"], torch.cat([t.flatten() for t in start])), (at["d_sample"], sample),
            (at["d_learning_rate"], torch.stack([one, two, three])),
        ):  # fmt: skip
            assert np.abs(mine.values - wanted.numpy()).max() <= 1e-10 * float(wanted.abs().max())
    curve = retraining.retrained(tmp_path / "run", student=Dropping, sizes=[1e-4, -1e-4])
    assert np.allclose(curve["retrained"], curve["predicted"], rtol=1e-2)


def test_seeds_on_a_dask_client_give_the_same(relu_run):
    from dask.distributed import Client

    _, path = relu_run
    here = tsdyn.sensitivity(path, wrt=["start", "sample"])
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0", set_as_default=False) as c:
        there = tsdyn.sensitivity(path, wrt=["start", "sample"], client=c)
    for name in here.data_vars:
        assert np.allclose(there[name], here[name], rtol=1e-9, atol=1e-13, equal_nan=True), name
