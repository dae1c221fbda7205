"""Conversion from torch accepts only modules whose function it keeps, and state dicts only with known entries."""

import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tsdyn
from tests.networks.test_convolutional_networks import IMAGE, close, images, module
from tsdyn import Experiment, ExperimentError, Network
from tsdyn.networks.torch_io import load_state
from tsdyn.problem.teachers import draw_teacher

# --- state dicts ---------------------------------------------------------------------------------------------


def test_state_dicts_round_trip_through_a_file(tmp_path):
    theirs = module().eval()
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    torch.save({"net": theirs.state_dict()}, tmp_path / "checkpoint.pt")
    blank = Network.from_torch(module(seed=8), image=IMAGE)
    x = images(4)
    for name in ("net.pt", "checkpoint.pt"):
        close(blank.with_state(load_state(tmp_path / name))(x.flatten(1)), theirs(x))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "net.safetensors")
    close(blank.with_state(load_state(tmp_path / "net.safetensors"))(x.flatten(1)), theirs(x))
    torch.save(Network.from_torch(theirs, image=IMAGE).state_dict(), tmp_path / "own.pt")
    close(blank.with_state(load_state(tmp_path / "own.pt"))(x.flatten(1)), theirs(x))


def test_safetensors_that_are_damaged_or_cannot_be_read_are_said(tmp_path, monkeypatch):
    file = tmp_path / "net.safetensors"
    safetensors.torch.save_file(module().state_dict(), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"net\.safetensors is no state dict that can be read safely"):
        load_state(file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install 'tsdyn\[safetensors\]'"):
        load_state(file)


def test_a_state_dict_that_does_not_fit_names_every_key(tmp_path):
    network = Network.from_torch(module(), image=IMAGE)
    state = dict(network.to_torch().state_dict())
    state["0.weight"] = torch.zeros(6, 2, 3, 3)
    state["extra"] = torch.zeros(1)
    del state["7.bias"]
    with pytest.raises(ValueError, match=r"does not fit") as error:
        network.with_state(state)
    for line in ("7.bias: missing, (3,) expected", "extra: unexpected, (1,)",
                 "0.weight: (6, 2, 3, 3), (5, 2, 3, 3) expected"):  # fmt: skip
        assert line in str(error.value)
    (tmp_path / "bad.pt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="no state dict that can be read safely"):
        load_state(tmp_path / "bad.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # a pickled object, not tensors
    with pytest.raises(ValueError, match="no state dict that can be read safely"):
        load_state(tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="epoch is not a tensor"):
        load_state(tmp_path / "number.pt")


def mlp():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def teacher_of(tmp_path, state):
    torch.save(state, tmp_path / "t.pt")
    law = {"widths": [6, 4, 3], "init": "file", "path": str(tmp_path / "t.pt")}
    return draw_teacher(Experiment(name="x", teacher=law), 0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        lambda state: {"epoch": 3, "model_state_dict": state},
        lambda state: {
            "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"rate": 0.1},
            "state_dict": {f"net.{k}": v for k, v in state.items()},
        },
        lambda state: {k: v.to_sparse() if v.ndim == 2 else v for k, v in state.items()},
        lambda state: {k: nn.Parameter(v) for k, v in state.items()},
        lambda state: {f"net.layer.{1 + int(k[0]) // 2}{k[1:]}": v for k, v in state.items()},
    ],
    ids=["DataParallel", "compiled", "checkpoint", "Lightning", "sparse", "requires_grad", "our own names"],
)  # fmt: skip
def test_the_ways_in_which_state_dicts_are_saved(tmp_path, wrap):
    state = mlp().state_dict()
    teacher = teacher_of(tmp_path, wrap(state))
    for found, expected in zip(teacher.weights, (state["0.weight"], state["2.weight"]), strict=True):
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_keys_that_share_a_prefix_with_others_are_told_apart(tmp_path):
    state = mlp().state_dict()
    both = {f"net.{k}": v for k, v in state.items()} | {"criterion.weight": torch.ones(3)}
    with pytest.raises(ExperimentError, match=r"keys with the prefix 'net\.' would fit by themselves"):
        teacher_of(tmp_path, both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.index_fill(1, torch.tensor([2]), torch.nan), r"0\.weight is nan at \[0, 2\] \(4 of 24 numbers"),
        (lambda w: w.clone().fill_(-torch.inf), r"0\.weight is -inf at \[0, 0\]"),
        (lambda w: w.to("meta"), r"0\.weight is on the meta device"),
        (
            lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
            r"0\.weight is quantised \(torch.q",
        ),
        (lambda w: w + 1j, r"0\.weight is complex"),
        (lambda w: w.to(torch.int8), r"0\.weight: torch.int8, floating-point numbers expected"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that quantised tensors are on their way out
def test_tensors_that_no_network_can_use_are_refused_by_key(tmp_path, change, message):
    state = mlp().state_dict()
    state["0.weight"] = change(state["0.weight"])
    with pytest.raises(ExperimentError, match=rf"(?s)t\.pt: .*{message}"):
        teacher_of(tmp_path, state)


# --- modules -------------------------------------------------------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 1)


def changed(change):
    made = mlp()
    change(made)
    return made


def own_forward(made):
    made[0].forward = lambda x: 3 * nn.Linear.forward(made[0], x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)), r"0 \(Residual\) is a subclass"),
        (lambda: Residual(nn.Linear(4, 4)), r"the module \(Residual\) is a subclass of nn.Sequential"),
        (lambda: nn.Sequential(nn.Sequential(Doubled(4, 4)), nn.Linear(4, 2)), r"0\.0 Doubled.* has no place here"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Shifted(), nn.Linear(4, 2)), r"1 Shifted.* has no place here"),
        (lambda: changed(lambda m: m[0].register_forward_hook(lambda *a: a[2] * 2)), "has forward hooks"),
        (lambda: changed(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] * 2,))), "the module .* hooks"),
        (lambda: changed(own_forward), r"0 \(Linear\) has a forward of its own"),
        (lambda: changed(lambda m: prune.l1_unstructured(m[0], "weight", 0.5)), "L1Unstructured.*prune.remove"),
        (lambda: changed(lambda m: nn.utils.spectral_norm(m[0])), "SpectralNorm.*remove_spectral_norm"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(threshold=1), nn.Linear(3, 2)), "linear above 1"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(3, 2)), "use nn.Flatten"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
         "keeps no running statistics"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(3, 2)),
         r"the module refuses random inputs of shape \(3, 4\)"),
        (lambda: mlp().to("meta"), "meta device"),
    ],
)  # fmt: skip
def test_a_module_that_may_compute_something_else_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        Network.from_torch(make())


def test_whatever_else_changes_the_outputs_is_noticed():
    """For changes that no name shows, here a hook on all modules."""
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 1.001 if type(m) is nn.ReLU else None)
    try:
        with pytest.raises(ValueError, match="Sequential computes another function than its layers in order: off by"):
            Network.from_torch(mlp())
    finally:
        hook.remove()
    Network.from_torch(mlp())


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "own"])
def test_parametrized_weights_are_those_of_now(kind):
    made = mlp()
    if kind == "own":
        parametrize.register_parametrization(made[0], "weight", Halved())
    else:
        getattr(parametrizations, kind)(made[0])
    x = torch.randn(7, 6, dtype=torch.float64)
    made(x).square().sum().backward()
    torch.optim.SGD(made.parameters(), 0.1).step()
    network = Network.from_torch(made)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    close(network(x), made.eval()(x))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    network(x).sum().backward()
    assert float(made[0].parametrizations.weight.original0.grad.abs().max() if kind == "weight_norm" else
                 made[0].parametrizations.weight.original.grad.abs().max()) > 0  # fmt: skip


def test_the_comparison_leaves_module_and_generator_as_they_were():
    theirs = module("after")
    theirs[2].eval()
    modes = [part.training for part in theirs.modules()]
    state, draws = {k: v.clone() for k, v in theirs.state_dict().items()}, torch.get_rng_state()
    Network.from_torch(theirs, image=IMAGE)
    assert [part.training for part in theirs.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draws)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_each_layer_has_its_own_stride_padding_and_place():
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="valid"), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Tanh(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 3 * 3, 5), nn.Tanh(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    x = images(6)
    theirs(x)
    network = Network.from_torch(theirs.eval(), image=IMAGE)
    assert (network.frame.strides, network.frame.paddings) == ((1, 2), (0, 1))
    assert network.frame.places[:2] == ("before", "after")
    for found in (network, network.folded(), Network.from_torch(network.to_torch(), image=IMAGE)):
        close(found(x.flatten(1)), theirs(x))
    assert repr(network) == "Network(128-3@3x3-4@3x3-5-2, tanh, BatchNorm before and after, torch.float64)"


def _npz(path, state, said):
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    np.savez(path, **arrays, **({} if said is None else {"activation": said}))


def _safetensors(path, state, said):
    safetensors.torch.save_file(state, path, metadata=None if said is None else {"activation": said})


def _torch(path, state, said):
    torch.save(state if said is None else {"state_dict": state, "activation": said}, path)


@pytest.mark.parametrize(("suffix", "save"), [("npz", _npz), ("safetensors", _safetensors), ("pt", _torch)])
def test_a_teachers_file_says_its_activation_or_the_experiment_must(tmp_path, suffix, save):
    """The student's activation is not taken silently: the targets would be another function's."""
    state, path = mlp().state_dict(), tmp_path / f"teacher.{suffix}"
    asked = Experiment(
        name="x", seeds=1, student={"activation": "tanh", "overrealization": 1.0}, training={"epochs": 0},
        teacher={"widths": [6, 4, 3], "init": "file", "path": str(path)}, data={"train": 20, "eval": 10},
        record={"observables": ["loss", "weight"]},
    )  # fmt: skip
    save(path, state, None)
    with pytest.raises(ExperimentError, match=r"do not say the teacher's activation; set teacher\.activation"):
        tsdyn.run(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    said = asked.replace({"teacher.activation": "relu"})
    ds = tsdyn.run(said, tmp_path / "said").load()
    np.testing.assert_array_equal(ds.teacher_weight.sel(seed=0, layer=1).values[:4, :6], state["0.weight"].numpy())
    save(path, state, "relu")
    with pytest.raises(ExperimentError, match="the file says activation 'relu', and the experiment 'tanh'"):
        draw_teacher(asked, 0)
    save(path, state, "tanh")
    tsdyn.run(asked, tmp_path / "carried")
    path.write_bytes(b"nothing")
    with pytest.raises(ExperimentError, match="no state dict that can be read safely"):
        tsdyn.run(asked, tmp_path / "damaged")
