"""`tsdyn.Recorder`: what it records equals plain torch and `tsdyn.run`; what survives a kill."""

import copy
import json
import os
import signal
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests import processes
from tests.cases import small
from tests.recording.loops import Skip, X, Y, loop, made
from tsdyn import derivatives
from tsdyn.archive import integrity
from tsdyn.archive.lock import HeldError
from tsdyn.observables.layers import correlation
from tsdyn.problem.inputs import batch_indices
from tsdyn.recording import states
from tsdyn.running.members import Members


def assert_same(found, expected, rtol=0.0):
    """Equal shapes, NaN in the same places, numbers equal to `rtol` of the largest."""
    size = np.abs(np.nan_to_num(np.asarray(expected, float))).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * size, strict=isinstance(expected, np.ndarray))


def test_the_archive_of_the_same_loop_equals_that_of_a_run(tmp_path):
    """Weights of tsdyn's draws, trained by a plain torch loop, against tsdyn.run, variable by variable."""
    names = [
        "loss",
        "mse",
        "weight",
        "correlation",
        "gradient_rms",
        "gradient_max",
        "gradient_norm",
        "hessian_eigenvalue",
    ]
    experiment = small(
        dtype="float64", student__activation="relu", training__epochs=3, training__learning_rate=0.05, seeds=2,
        record__observables=names,
    )  # fmt: skip
    run = tsdyn.run(experiment, tmp_path / "run").load()
    members = Members(experiment)
    for i, seed in enumerate(experiment.seed_labels):
        model, teacher = members.ensemble.network(i).to_torch(), members.teachers[i].to_torch()
        evaluation, trained = members.eval_probes[i].inputs, members.finite[0][i]
        optimizer = torch.optim.SGD(model.parameters(), experiment.training.learning_rate)
        on_train = ["mse", "gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue"]
        given = {"teacher": teacher, "seed": seed}
        eval_ = tsdyn.Recorder(
            tmp_path / "eval", model, probe=(evaluation, teacher(evaluation)), observables=["loss", "mse", "weight", "correlation"],  # noqa: E501
            state=optimizer, **given,
        )  # fmt: skip
        train_ = tsdyn.Recorder(
            tmp_path / "train", model, probe=(trained, teacher(trained)), observables=["loss", *on_train], **given
        )
        for epoch in range(4):
            for rows in torch.from_numpy(batch_indices(experiment, seed, epoch, len(trained))) if epoch else ():
                loss = 0.5 * (model(trained[rows]) - teacher(trained[rows]).detach()).square().sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            eval_.commit(epoch)
            train_.commit(epoch)
    seen = {"eval": tsdyn.open(tmp_path / "eval").load(), "train": tsdyn.open(tmp_path / "train").load()}
    pairs = [
        *((name, "eval", name) for name in ("loss_eval", "mse_eval", "weight", "bias", "correlation")),
        *((name, "eval", name) for name in ("teacher_weight", "teacher_bias")),
        ("loss_train", "train", "loss_eval"), ("mse_train", "train", "mse_eval"),
        *((name, "train", name) for name in on_train[1:]),
    ]  # fmt: skip
    for name, where, theirs in pairs:
        found = seen[where][theirs]
        assert found.dims == run[name].dims, name
        # a step adds rounding of 1e-16 of the weights; the Hessian's Lanczos solves to 1e-10 of the largest eigenvalue
        size = float(np.abs(run[name]).max())
        np.testing.assert_allclose(found, run[name], rtol=1e-9, atol=1e-9 * size, err_msg=name)
    for name in ("epoch", "seed", "layer", "width", "input_width", "teacher_width", "death_epoch", "quantile"):
        assert_same(seen["eval" if name != "quantile" else "train"][name].values, run[name].values)


def test_quantities_of_a_module_with_a_skip_connection_are_those_of_autograd(tmp_path):
    model, teacher = made(), made(seed=5)
    for p in model.fc1.parameters():
        p.requires_grad_(False)  # frozen: stored, and left out of what is differentiated
    names = ["gradient_norm", "gradient_rms", "hessian_eigenvalue", "neural_tangent_kernel", "activation", "weight"]

    def loss(output, target):
        return (output - target).abs().pow(3).sum(1).mean()

    rec = tsdyn.Recorder(
        tmp_path, model, probe=(X, Y), loss=loss, teacher=teacher, observables=[*names, "loss", "correlation"]
    )
    rec.commit(0)
    ds = tsdyn.open(tmp_path).load()
    free = [p for p in model.parameters() if p.requires_grad]
    norms, rows = [], []
    for x, y in zip(X, Y, strict=True):
        g = torch.autograd.grad(loss(model(x[None]), y[None]), free)
        norms.append(torch.cat([t.flatten() for t in g]).norm())
        rows.append(
            [torch.cat([t.flatten() for t in torch.autograd.grad(o, free, retain_graph=True)]) for o in model(x)]
        )
    assert_same(ds.gradient_norm[0, 0].values, np.quantile(torch.stack(norms), ds["quantile"]), rtol=1e-12)
    stacked = torch.stack([torch.stack(row) for row in rows])
    assert_same(
        ds.neural_tangent_kernel[0, 0].values, torch.einsum("sop,top->st", stacked, stacked).numpy(), rtol=1e-12
    )
    hidden = torch.tanh(model.fc1(X))
    second = torch.relu(model.fc2(model.norm(hidden)))
    assert_same(ds.activation[0, 0, 1, :, :5].values, second.detach().numpy(), rtol=1e-13)
    top = derivatives.hessian(model, loss, X, Y)
    assert_same(ds.hessian_eigenvalue[0, 0, :3].values, torch.linalg.eigvalsh(top).flip(0)[:3].numpy(), rtol=1e-8)
    theirs = torch.tanh(teacher.fc1(X)).detach().numpy()
    pearson = np.corrcoef(theirs.T, hidden.detach().numpy().T)[:5, 5:]
    assert_same(ds.correlation[0, 0, 0, :5, :5].values, pearson, rtol=1e-9)
    assert ds.layer_name.values.tolist() == ["fc1", "fc2", "fc3"]
    assert json.loads(ds.attrs["parameters"]) == {"norm.weight": [5], "norm.bias": [5]}
    assert_same(ds.parameter[0, 0].values, [1.0] * 5 + [0.0] * 5)


def test_the_gradient_at_a_layer_that_is_changed_in_place(tmp_path):
    """A relu in place would else give the gradient behind it."""
    made_ = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    rec = tsdyn.Recorder(tmp_path, made_, probe=(X, Y), observables=["gradient_rms", "gradient_max", "activation"])
    rec.commit(3)
    ds = tsdyn.open(tmp_path).load()
    z = made_[0](X)
    g = ((Y - made_[2](z.clamp(min=0))) @ made_[2].weight * (z > 0)).detach()
    assert_same(ds.gradient_rms[0, 0, 0].values, g.square().mean(0).sqrt().numpy(), rtol=1e-12)
    assert_same(ds.activation[0, 0, 0].values, z.detach().clamp(min=0).numpy())


def test_recording_changes_nothing_of_the_training(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    state = torch.random.get_rng_state()
    with tsdyn.Recorder(tmp_path, model, probe=(X, Y)) as rec:
        rec.commit(0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    expected = 0.5 * (model.eval()(X) - Y).square().sum(1).mean()
    assert tsdyn.open(tmp_path).loss_eval.load().item() == pytest.approx(expected.item(), rel=1e-13)


def test_stopped_and_resumed_gives_the_same_bits(tmp_path):
    whole, first = loop(tmp_path / "whole", epochs=6), loop(tmp_path / "parts", epochs=2)
    second = loop(tmp_path / "parts", epochs=6)
    assert not torch.equal(first.fc1.weight, second.fc1.weight)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    one, two = (tsdyn.open(tmp_path / name).load() for name in ("whole", "parts"))
    assert one.epoch.values.tolist() == list(range(7))
    for name in one.data_vars:
        assert_same(one[name].values, two[name].values)
    assert not integrity.check(tmp_path / "parts")


class Clocked(nn.Linear):
    """A layer whose outputs depend a little on a buffer that ``state_dict`` leaves out."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("clock", torch.zeros(()), persistent=False)

    def forward(self, x):
        return super().forward(x) * (1 + 1e-6 * self.clock)


def test_buffers_that_are_not_persistent_are_given_back(tmp_path):
    x, y = torch.randn(20, 6), torch.randn(20, 3)
    model = Clocked()
    with tsdyn.Recorder(tmp_path, model, probe=(x, y), observables=["loss"]) as rec:
        rec.commit(0)
        model.clock += 7
        rec.commit(1)
    other = Clocked()
    with tsdyn.Recorder(tmp_path, other, probe=(x, y), observables=["loss"]) as rec:
        assert rec.resume() == 1
    assert other.clock == 7
    assert torch.equal(other.weight, model.weight)


KILLED = """
    import sys, time
    import torch
    torch.set_num_threads(1)  # as in the suite's process
    from tests.recording import loops
    from tsdyn.running import runner
    runner.COMMIT_SECONDS = 0
    original = loops.train
    def slow(model, optimizer, epoch):
        if epoch == 4:
            print("there", flush=True)
            time.sleep(600)
        return original(model, optimizer, epoch)
    loops.train = slow
    loops.loop(sys.argv[1], epochs=6)
"""


def test_killed_and_resumed_keeps_what_was_committed_and_goes_on_from_it(tmp_path):
    """To the bits what the killed process had committed; all of it up to rounding that two processes may differ in."""
    reading, writing = os.pipe()
    words = ["python", "-c", textwrap.dedent(KILLED), tmp_path / "killed"]
    process = processes.Process(words, os.getcwd(), {1: writing})
    os.close(writing)
    with os.fdopen(reading) as out:
        assert out.readline().strip() == "there"
    with pytest.raises(HeldError, match="another process"):
        tsdyn.Recorder(tmp_path / "killed", made(), probe=(X, Y))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = tsdyn.open(tmp_path / "killed").load()
    assert kept.epoch.values.tolist() == [0, 1, 2, 3]
    loop(tmp_path / "killed", epochs=6)
    loop(tmp_path / "whole", epochs=6)
    one, two = (tsdyn.open(tmp_path / name).load() for name in ("whole", "killed"))
    for name in one.data_vars:
        if "epoch" in kept[name].dims:
            assert_same(two[name].sel(epoch=kept.epoch).values, kept[name].values)
        assert_same(two[name].values, one[name].values, 1e-12)
    assert not integrity.check(tmp_path / "killed")


def test_seeds_and_config_are_dimensions(tmp_path):
    for rate in (0.1, 0.01):
        for seed in range(5):
            loop(tmp_path, seed=seed, epochs=2, rate=rate, config={"rate": rate, "optimizer": "adam"})
    ds = tsdyn.open(tmp_path)
    assert ds.loss_eval.dims == ("rate", "optimizer", "seed", "epoch")
    assert ds.sizes["seed"] == 5
    assert ds.rate.values.tolist() == [0.01, 0.1]
    alone = tsdyn.open(tmp_path / "rate=0.1,optimizer=adam" / "seed=3").load()
    chosen = ds.sel(rate=0.1, seed=[3], optimizer="adam").load()
    for name in alone.data_vars:
        assert_same(alone[name].values, chosen[name].values)
    assert not integrity.check(tmp_path)
    assert tsdyn.open(tmp_path / "rate=0.1,optimizer=adam").loss_eval.dims == ("seed", "epoch")


def test_a_damaged_segment_is_found_and_repaired(tmp_path):
    rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y))
    rec.commit(0)
    rec.commit(1)
    rec.flush()
    del rec
    (file,) = tmp_path.glob("seed=0/segments/epoch-000001-000001.nc")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert any("checksum" in problem for problem in integrity.check(tmp_path))
    assert any("damaged" in line for line in integrity.repair(tmp_path))
    assert not integrity.check(tmp_path)
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0]


def test_a_killed_member_is_nan_and_says_when(tmp_path):
    model = made()
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y))
    rec.commit(0)
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    rec.commit(1)
    rec.commit(2)
    ds = tsdyn.open(tmp_path).load()
    assert ds.death_epoch.values.tolist() == [1]
    assert np.isfinite(ds.loss_eval[0, 0])
    assert np.isnan(ds.loss_eval[0, 1:]).all()
    assert np.isnan(ds.weight[0, 1:]).all()


def test_values_of_ones_own(tmp_path):
    tsdyn.declare("margin", ("seed", "epoch", "sample"), units="1", long_name="margin", source="here")

    def largest(model, x, y):
        return model(x).abs().max()

    observed = tsdyn.Observed(
        tsdyn.declare("span", ("seed", "epoch"), units="1", long_name="span", source="here", own=True),
        lambda m: m.on_eval.trace.output.max() - m.on_eval.trace.output.min(),
    )
    model = made()
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y), observables=["loss", largest, observed])
    for epoch in range(2):
        rec.commit(epoch, margin=torch.arange(4.0) + epoch, hours=epoch)
    ds = tsdyn.open(tmp_path).load()
    assert_same(ds.margin[0].values, np.arange(4.0) + np.arange(2)[:, None])
    assert_same(ds.hours[0].values, [0.0, 1.0])
    assert ds.largest[0, 0].item() == pytest.approx(model(X).abs().max().item(), rel=1e-13)
    assert ds["span"][0, 0].item() == pytest.approx((model(X).max() - model(X).min()).item(), rel=1e-13)
    with pytest.raises(ValueError, match="at the first commit"):
        rec.commit(2, hours=1)
    with pytest.raises(ValueError, match=r"\(4,\) here"):
        rec.commit(2, hours=1, margin=np.zeros(5))
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0, 1]
    assert not integrity.check(tmp_path)


def test_states_come_back_without_pickle():
    from collections import Counter

    held = {
        "a": torch.arange(6.0).bfloat16().view(2, 3), "b": [1, (2.5, None)], "c": {0: torch.tensor(3), 1: torch.empty(0, 2)},  # noqa: E501
        "d": Counter({3: 1}), "e": torch.tensor([True, False]), "f": np.float64(2.0), "g": torch.tensor([1 + 2j]), "h": {1, 2},  # noqa: E501
    }  # fmt: skip
    back = states.decoded(states.encoded(held))
    assert back["b"] == held["b"]
    assert back["d"] == held["d"]
    assert isinstance(back["d"], Counter)
    assert back["h"] == {1, 2}
    for name in "aeg":
        assert back[name].dtype == held[name].dtype
        assert torch.equal(back[name], held[name])
    assert back["c"][0].item() == 3
    assert back["c"][1].shape == (0, 2)
    assert float(back["f"]) == 2.0
    with pytest.raises(ValueError, match=r"o\['f'\] is function"):
        states.encoded({"o": {"f": made}})


def test_correlation_between_layers_of_two_modules():
    a = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(48, 2)).double()
    b = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2)).double()
    x = torch.randn(30, 1, 4, 4, dtype=torch.float64)
    rows = [a[:2](x), b[:1](x)]
    flat = [r.detach().permute(0, 2, 3, 1).reshape(-1, r.shape[1]).numpy() for r in rows]
    expected = np.corrcoef(flat[0].T, flat[1].T)[:3, 3:]
    assert_same(correlation(a, b, x, layers=("0", "0")).numpy(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="positions"):
        correlation(a, b, x, layers=("0", "2"))
    with pytest.raises(ValueError, match="no Linear"):
        correlation(a, b, x, layers=("1", "0"))


class InPlace(Skip):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        first = h.clone()
        h += 7.0
        return self.fc3(first + torch.relu(self.fc2(h)))


def test_an_activation_is_what_it_was_before_the_module_changes_it_in_place(tmp_path):
    model = made(InPlace)
    tsdyn.Recorder(tmp_path, model, probe=(X, Y), observables=["activation"]).commit(0)
    found = tsdyn.open(tmp_path).activation.load()[0, 0, 0]
    assert_same(found.values, torch.relu(model.fc1(X)).detach().numpy())


def test_own_values_may_have_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(tsdyn.schema, "DECLARED", {})
    tsdyn.declare("step_size", ("seed", "epoch", "layer", "node"), units="1", long_name="step", source="a test")
    rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y), observables=["loss"])
    sizes = [torch.full((5,), 0.5), np.full(5, 0.25), [1.0, 2.0]]
    with pytest.raises(ValueError, match=r"step_size is Tensor.*give a list of one array per layer"):
        rec.commit(0, step_size=sizes[0])
    with pytest.raises(ValueError, match=r"step_size has shape \(4,\); \('layer', 'node'\) is \(5,\) here"):
        rec.commit(0, step_size=[torch.zeros(4), *sizes[1:]])
    rec.commit(0, step_size=sizes)
    rec.commit(1, step_size=sizes)
    rec.close()
    ds = tsdyn.open(tmp_path)
    for layer, expected in enumerate(sizes, start=1):
        np.testing.assert_array_equal(tsdyn.layer(ds["step_size"], layer).isel(seed=0, epoch=1), expected)


def test_audit_judges_what_recorded_numbers_alone_show(tmp_path):
    from tsdyn.analysis.audit import audit
    from tsdyn.analysis.theorems import CLAIMS
    from tsdyn.analysis.verdicts import lines

    model, taught = made(), made()
    with tsdyn.Recorder(tmp_path, model, probe=(X, Y), teacher=taught) as rec:
        rec.commit(0)
    found = audit(tsdyn.open(tmp_path))
    assert found.sizes == {"claim": len(CLAIMS), "seed": 1}
    verdicts = dict(zip(found["claim"].values.tolist(), found["verdict"].values[:, 0].tolist(), strict=True))
    assert verdicts.pop("Assumption 1") == "holds"
    assert set(verdicts.values()) == {"unmet"}
    assert sum("it is a recording" in line for line in lines(found)) == len(verdicts)


def test_a_layer_is_found_by_its_name(tmp_path):
    with tsdyn.Recorder(tmp_path, made(), probe=(X, Y)) as rec:
        rec.commit(0)
    ds = tsdyn.open(tmp_path)
    assert tsdyn.layer(ds, "fc2").identical(tsdyn.layer(ds, 2))
    for of, name in ((ds, "fc9"), (ds["weight"].drop_vars("layer_name"), "fc2")):
        with pytest.raises(ValueError, match="is no name of a layer"):
            tsdyn.layer(of, name)
