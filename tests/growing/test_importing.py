"""Imports, compared with the sources' own numbers; nothing of a source is executed."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import REFERENCE
from tsdyn.archive import integrity
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.growing.importing import import_

LUCKMATTERS = REFERENCE / "luckmatters_two_layer.npz"


# --- luckmatters -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def luck(tmp_path_factory):
    return import_("luckmatters", LUCKMATTERS, tmp_path_factory.mktemp("luck") / "archive")


def test_luckmatters_numbers_are_the_sources(luck):
    ds = tsdyn.open(luck)
    assert integrity.check(luck) == []
    with np.load(LUCKMATTERS, allow_pickle=False) as data:
        assert list(ds.epoch.values) == [0, 1, 2]
        for epoch in range(3):
            now = ds.sel(seed=0, epoch=epoch)
            for layer, name in enumerate(("W1_s", "W2_s"), start=1):
                own = tsdyn.layer(now, layer)
                matrix = data[f"e{epoch}_{name}"]
                np.testing.assert_array_equal(own.weight.values[:, : len(matrix) - 1], matrix[:-1].T)
                np.testing.assert_array_equal(own.bias, matrix[-1])
            low = tsdyn.layer(now, 1)
            np.testing.assert_array_equal(low.correlation, data[f"e{epoch}_corr_eval"])
            np.testing.assert_array_equal(low.observation_count, data[f"e{epoch}_obs_train"])
            np.testing.assert_allclose(low.gradient_rms**2, data[f"e{epoch}_g1_train"][:-1], rtol=4e-16)
            for which in ("train", "eval"):
                assert float(now[f"mse_{which}"]) == float(data[f"e{epoch}_{which}_loss"])
        teacher = tsdyn.layer(ds.sel(seed=0), 2)
        np.testing.assert_array_equal(teacher.teacher_weight.values[:, :10], data["W2_t"][:-1].T)
        config = json.loads(tsdyn.open(luck / "seed=0").attrs["config"])
        assert (config["lr"], config["batchsize"], config["m"]) == (0.01, 16, 10)


def test_the_imported_network_has_the_sources_loss(luck):
    """From the imported weights and the source's inputs, by torch: J = ½ E‖f* − f‖²."""
    ds = tsdyn.open(luck).sel(seed=0, epoch=2).compute()

    def run(prefix, x):
        for layer in (1, 2):
            own = tsdyn.layer(ds, layer)
            w, b = own[f"{prefix}weight"].values, own[f"{prefix}bias"].values
            x = x @ torch.from_numpy(w[:, : x.shape[1]]).T + torch.from_numpy(b)
            x = torch.relu(x) if layer == 1 else x
        return x

    with np.load(LUCKMATTERS, allow_pickle=False) as data:
        x = torch.from_numpy(data["X_eval"])
    loss = float(0.5 * ((run("teacher_", x) - run("", x)) ** 2).sum(1).mean())
    assert float(ds.loss_eval) == pytest.approx(loss, rel=1e-12)


def test_what_reads_archives_reads_imports(luck):
    from tsdyn.analysis import specialization

    best = specialization.specialization(tsdyn.layer(tsdyn.open(luck), 1)).compute()
    with np.load(LUCKMATTERS, allow_pickle=False) as data:
        np.testing.assert_array_equal(best.sel(seed=0, epoch=2), data["e2_corr_eval"].max(1))


# --- nn2pp -------------------------------------------------------------------------------------------------------


def log_of(case, seed):
    """A log as nn2pp writes it, with the reference's own numbers at the start and at the end."""
    k, m = case["K"], case["M"]
    own = case["seeds"][seed]
    start, end = own["ic"], own["sim"]
    lines = [
        f"# This is scm++\n# g1=erf, g2=erf, N={case['N']}, M={m}, K={k}, steps/N=300, seed={seed}",
        f"# lr={case['lr']}, lr2={case['lr']}, sigma=0, wd=0, mini-batch size=1",
        "# steps / N, eg, et, eg_frac, et_frac, diff",
    ]
    upper = np.triu_indices(k)
    for i, (alpha, eg) in enumerate(zip(end["alpha"], end["eg"], strict=True)):
        last = i == len(end["alpha"]) - 1
        q = np.reshape(end["Q_end"] if last else start["Q"], (k, k))
        r = end["R_end"] if last else start["R"]
        v = end["v_end"] if last else start["v"]
        numbers = [alpha, eg, np.nan, np.nan, np.nan, 0.25, *q[upper], *r, *start["A"], *v]
        lines.append(", ".join(repr(float(number)) for number in numbers))
    return "\n".join([*lines, "# CPU time used: 3 s", ""])


@pytest.fixture(scope="module")
def nn2pp(tmp_path_factory):
    case = json.loads((REFERENCE / "nn2pp.json").read_text(encoding="utf-8"))["cases"]["M2K4_both_lr0.5"]
    folder = tmp_path_factory.mktemp("nn2pp")
    (folder / "logs").mkdir()
    for seed in ("1", "2"):
        text = log_of(case, seed)
        (folder / "logs" / f"nn2pp_s{seed}.dat").write_text(text, encoding="utf-8")
        t = np.reshape(case["seeds"][seed]["ic"]["T"], (2, 2))
        np.savetxt(folder / "logs" / f"nn2pp_s{seed}_T0.dat", t, delimiter=",", fmt="%.17g")
    return case, import_("nn2pp", folder / "logs", folder / "archive")


def test_nn2pps_columns(nn2pp):
    case, path = nn2pp
    ds = tsdyn.open(path)
    assert integrity.check(path) == []
    assert ds.eg.dims == ("seed", "alpha")
    assert list(ds.seed.values) == [1, 2]
    for seed in (1, 2):
        own = case["seeds"][str(seed)]
        mine = ds.sel(seed=seed)
        np.testing.assert_array_equal(mine.alpha, own["sim"]["alpha"])
        np.testing.assert_array_equal(mine.eg, own["sim"]["eg"])
        np.testing.assert_array_equal(mine.Q.isel(alpha=-1), np.reshape(own["sim"]["Q_end"], (4, 4)))
        np.testing.assert_array_equal(mine.R.isel(alpha=-1), np.reshape(own["sim"]["R_end"], (4, 2)))
        np.testing.assert_array_equal(mine.Q.isel(alpha=0), np.reshape(own["ic"]["Q"], (4, 4)))
        np.testing.assert_array_equal(mine.outgoing.isel(alpha=-1), own["sim"]["v_end"])
        np.testing.assert_array_equal(mine.teacher_outgoing, own["ic"]["A"])
        np.testing.assert_array_equal(mine["T"], np.reshape(own["ic"]["T"], (2, 2)))
        assert (mine["diff"] == 0.25).all()
    assert "et" not in ds


def test_the_imported_order_parameters_have_the_sources_error(nn2pp):
    """eg from Q, R, T, v and A by the closed form for erf is nn2pp's own, at the start and at the end."""
    ds = tsdyn.open(nn2pp[1]).isel(alpha=[0, -1]).compute()
    q, r, t = ds.Q, ds.R, ds["T"]
    qq = np.diagonal(q, axis1=2, axis2=3)
    tt = np.diagonal(t, axis1=1, axis2=2)[:, None]
    v, a = ds.outgoing.values, ds.teacher_outgoing.values[:, None]

    def angle(overlap, one, other):
        return np.arcsin(overlap / np.sqrt((1 + one)[..., :, None] * (1 + other)[..., None, :]))

    eg = (
        np.einsum("sai,saj,saij->sa", v, v, angle(q.values, qq, qq))
        + np.einsum("sai,saj,saij->sa", a + 0 * v[..., :2], a + 0 * v[..., :2], angle(t.values[:, None], tt, tt))
        - 2 * np.einsum("sai,saj,saij->sa", v, a + 0 * v[..., :2], angle(r.values, qq, tt))
    ) / np.pi
    # the initial parameters are printed with 12 digits, and the terms are of order 1
    np.testing.assert_allclose(ds.eg, eg, atol=1e-10, rtol=0)


# --- checkpoints -------------------------------------------------------------------------------------------------


def model():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))


def test_checkpoints_of_linear_layers(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    held = {}
    for epoch in (0, 5, 10):
        held[epoch] = model().state_dict()
        if epoch == 5:
            save_file(held[epoch], tmp_path / "epoch_5.safetensors")
        else:
            torch.save({"model_state_dict": {f"module.{k}": v for k, v in held[epoch].items()}, "epoch": epoch},
                       tmp_path / f"epoch_{epoch:04d}.pt")  # fmt: skip
    (tmp_path / "notes.txt").write_text("not a checkpoint", encoding="utf-8")
    path = import_("checkpoints", tmp_path, tmp_path / "archive")
    ds = tsdyn.open(path)
    assert integrity.check(path) == []
    assert list(ds.epoch.values) == [0, 5, 10]
    assert list(ds.layer_name.values) == ["0", "2", "4"]
    assert ds.weight.dtype == np.float32
    for epoch, state in held.items():
        for layer, name in enumerate(("0", "2", "4"), start=1):
            own = tsdyn.layer(ds.sel(seed=0, epoch=epoch), layer)
            weight = state[f"{name}.weight"].numpy()
            assert own.sizes["node"] == len(weight)
            np.testing.assert_array_equal(own.weight.values[:, : weight.shape[1]], weight)
            bias = state.get(f"{name}.bias", torch.zeros(len(weight))).numpy()
            np.testing.assert_array_equal(own.bias, bias)


def test_checkpoints_of_other_modules_and_several_seeds(tmp_path):
    states = {}
    for seed in (3, 4):
        (tmp_path / f"seed_{seed}").mkdir()
        for epoch in (1, 2):
            module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
            states[seed, epoch] = module.state_dict()
            torch.save(module.state_dict(), tmp_path / f"seed_{seed}" / f"epoch_{epoch}.pt")
    ds = tsdyn.open(import_("checkpoints", tmp_path, tmp_path / "archive"))
    assert list(ds.seed.values) == [3, 4]
    for (seed, epoch), state in states.items():
        flat = np.concatenate([v.numpy().ravel() for k, v in state.items() if "num_batches" not in k])
        np.testing.assert_array_equal(ds.parameter.sel(seed=seed, epoch=epoch), flat)
    shapes = json.loads(tsdyn.open(tmp_path / "archive" / "seed=3").attrs["parameters"])
    assert shapes["0.weight"] == [2, 1, 3, 3]


def test_a_teacher_beside_the_checkpoints(tmp_path):
    student, teacher = (
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)),
    )
    torch.save(student.state_dict(), tmp_path / "epoch_0.pt")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    ds = tsdyn.open(import_("checkpoints", tmp_path, tmp_path / "archive"))
    low = tsdyn.layer(ds.isel(seed=0, epoch=0), 1)
    np.testing.assert_array_equal(low.teacher_weight, teacher[0].weight.detach())
    assert list(ds.teacher_width.values) == [3, 2]


#: What an unpickled `Executed` would have left here.
EXECUTED = []


class Executed:
    def __reduce__(self):
        return (EXECUTED.append, (1,))


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("checkpoints", {"epoch_0.pt": pickle.dumps({"a": Executed()})}, "is no state dict that can be read safely"),
        ("checkpoints", {"epoch_x.pt": b""}, r"holds checkpoints epoch_N.pt of the epochs \[\]"),
        ("checkpoints", {"epoch_0.pt": b"x"}, "is no state dict that can be read safely"),
        ("nn2pp", {"a.dat": b"1, 2, 3\n"}, "names no N, M and K"),
        ("nn2pp", {"a.dat": b"# N=10, M=2, K=2\n1, 2, 3\n"}, r"lines have \[3\] columns; .* nn2pp writes 17"),
        ("nn2pp", {}, "there must be at least one"),
        ("luckmatters", {"a.npz": b"PK"}, "import luckmatters"),
    ],
)
def test_what_is_not_what_it_is_called_is_refused(tmp_path, kind, files, message):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    with pytest.raises(DirectoryError, match=message):
        import_(kind, source, tmp_path / "archive")
    assert not (tmp_path / "archive").exists()
    assert EXECUTED == []


def test_nothing_is_overwritten_and_the_command(tmp_path):
    from typer.testing import CliRunner

    from tsdyn.cli import app

    words = ["import", "luckmatters", str(LUCKMATTERS), "-o", str(tmp_path / "archive")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert tsdyn.open(tmp_path / "archive").sizes["epoch"] == 3
    with pytest.raises(DirectoryError, match="is there already; nothing was overwritten"):
        import_("luckmatters", LUCKMATTERS, tmp_path / "archive")
    with pytest.raises(DirectoryError, match="does not exist"):
        import_("luckmatters", tmp_path / "no", tmp_path / "other")
