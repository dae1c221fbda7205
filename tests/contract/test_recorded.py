"""Every observable of every activation and loss, as recorded in an archive, against autograd on the archive's own
parameters: fully connected, convolution, BatchNorm before and after; with a dead node; in both dtypes."""

import functools
import itertools

import numpy as np
import pytest
import torch

import tsdyn
from tests.contract.recorded import SIGMA, Plain, Seen, plain

TRAIN, EVAL, OUTPUTS, MODES, BAND = 24, 16, 3, 4, 0.3
PIECEWISE_LINEAR = {"relu", "leaky_relu", "identity"}
ACTIVATIONS = tuple(SIGMA)
LOSSES = ("mse", "cross_entropy")
SHAPES = {
    "connected": {"teacher": {"widths": [5, 3, 4, OUTPUTS]}, "student": {"widths": [5, 4, 6, OUTPUTS]}},
    "convolution": {
        "teacher": {"widths": [25, 2, OUTPUTS], "convolution": True},
        "student": {"widths": [25, 3, OUTPUTS]},
        "data": {"image": [1, 5, 5]},
    },
    "norm-before": {
        "teacher": {"widths": [5, 3, 4, OUTPUTS]},
        "student": {"widths": [5, 4, 6, OUTPUTS], "batch_norm": "before"},
    },
    "norm-after": {
        "teacher": {"widths": [5, 3, 4, OUTPUTS]},
        "student": {"widths": [5, 4, 6, OUTPUTS], "batch_norm": "after"},
    },
}
#: What is measured of every network ...
EVERY = ("loss", "mse", "weight", "correlation", "fanout_norm", "accuracy", "label_accuracy", "moments")
#: ... and of fully connected ones without BatchNorm only.
CONNECTED = (
    "gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue", "observation", "alignment", "balance",
)  # fmt: skip
QUANTILES = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write inputs with labels, and a start of each student with a dead node: no weight, bias below zero."""
    path = tmp_path_factory.mktemp("contract")
    draw = np.random.default_rng(3)
    for name, inputs in (("connected", 5), ("convolution", 25)):
        for part, samples in (("train", TRAIN), ("eval", EVAL)):
            x, y = draw.standard_normal((samples, inputs)), draw.integers(0, OUTPUTS, samples)
            np.savez(path / f"{name}-{part}.npz", inputs=x, labels=y)
    generator = torch.Generator().manual_seed(5)
    state = {}
    for i, (nodes, below) in enumerate(((4, 5), (6, 4), (OUTPUTS, 6))):
        state[f"{2 * i}.weight"] = torch.randn(nodes, below, generator=generator, dtype=torch.float64) / 2
        state[f"{2 * i}.bias"] = torch.randn(nodes, generator=generator, dtype=torch.float64) / 4
    state["0.weight"][1], state["0.bias"][1] = 0.0, -0.7
    torch.save(state, path / "dead.pt")
    return path


def experiment(folder, shape, activation, loss, dtype, labels="teacher"):
    """One seed and one epoch of six steps; the training set is the whole file, so that draws only permute it."""
    given = SHAPES[shape]
    images = "convolution" if shape == "convolution" else "connected"
    more = {"batch_norm"} if shape.startswith("norm") else set()
    student = {**given["student"], "init": "torch", "activation": activation}
    if shape == "connected":
        student |= {"init": "file", "path": str(folder / "dead.pt")}
    return tsdyn.Experiment(
        name="contract",
        seeds=1,
        dtype=dtype,
        teacher={**given["teacher"], "init": "gaussian", "scale": 0.7},
        student=student,
        data={
            **given.get("data", {}), "law": "file", "train": TRAIN, "eval": EVAL,
            "path": str(folder / f"{images}-train.npz"), "eval_path": str(folder / f"{images}-eval.npz"),
        },
        training={"epochs": 1, "batch": 8, "steps_per_epoch": 6, "learning_rate": 0.05, "loss": loss, "labels": labels},
        record={
            "observables": [*EVERY, *more, *(CONNECTED if shape == "connected" else ()),
                            *(["lemma1_residual"] if shape == "connected" and activation in PIECEWISE_LINEAR
                              and loss == "mse" else [])],
            "quantiles": QUANTILES, "eigenvalues": MODES, "band": BAND,
        },
    )  # fmt: skip


def tolerance(dtype):
    """A thousand roundings, relative to the largest entry: sums of some hundred products in each of three layers."""
    return 4e3 * float(np.finfo(dtype).eps)


def compare(what, recorded, wanted, dtype, floor=0.0):
    recorded, wanted = np.asarray(recorded, float), np.asarray(wanted, float)
    assert recorded.shape == wanted.shape, (what, recorded.shape, wanted.shape)
    missing = np.isnan(wanted)
    assert np.array_equal(np.isnan(recorded), missing), (what, "NaN in other places", recorded, wanted)
    if (~missing).any():
        scale = np.abs(wanted[~missing]).max() + floor
        worst = np.abs(recorded - wanted)[~missing].max()
        assert worst <= tolerance(dtype) * scale, f"{what}: recorded {recorded}, right {wanted}"


def loaded(folder, name, dtype):
    return {
        part: (torch.tensor(held["inputs"].astype(dtype)), torch.tensor(held["labels"]))
        for part in ("train", "eval")
        for held in [np.load(folder / f"{name}-{part}.npz")]
    }


def check(ds, folder, shape, activation, loss, dtype, labels="teacher"):
    """Compare every variable of seed 0 at both epochs."""
    image = (1, 5, 5) if shape == "convolution" else None
    place = shape.removeprefix("norm-") if shape.startswith("norm") else "none"
    sets = loaded(folder, "convolution" if image else "connected", dtype)
    for epoch in (0, 1):
        one = ds.isel(seed=0).sel(epoch=epoch)
        student: Plain = plain(ds, epoch, activation=activation, image=image, place=place)
        teacher: Plain = plain(ds, epoch, activation=activation, teacher=True, image=image)
        seen = {
            part: Seen(student, teacher, x, loss, classes if labels == "data" else None)
            for part, (x, classes) in sets.items()
        }
        at = functools.partial(compare, dtype=dtype)
        for part in ("train", "eval"):
            at(f"loss_{part}", one[f"loss_{part}"], seen[part].mean_loss.detach())
            at(f"mse_{part}", one[f"mse_{part}"], seen[part].mse.detach())

        def layers(name, wanted, held=one, at=at):
            for layer, values in enumerate(wanted, start=1):
                right = np.asarray(torch.as_tensor(values).detach())
                at((name, layer), held[name].sel(layer=layer).values[tuple(slice(0, n) for n in right.shape)], right)

        layers("correlation", seen["eval"].correlations())
        layers("fanout_norm", seen["eval"].fanout_norms(student))
        layers("teacher_fanout_norm", seen["eval"].fanout_norms(teacher))
        for name, wanted in seen["eval"].moments().items():
            layers(name, wanted)
        top = min(5, OUTPUTS)
        at("accuracy", one["accuracy"], seen["eval"].accuracy(seen["eval"].target.argmax(1), top))
        at("label_accuracy", one["label_accuracy"], seen["eval"].accuracy(sets["eval"][1], top))
        if shape != "connected":
            continue
        layers("balance", student.balances())
        g = seen["train"].gradients()
        layers("gradient_rms", [x.square().mean(0).sqrt() for x in g])
        layers("gradient_max", [x.abs().amax(0) for x in g])
        at("gradient_norm", one["gradient_norm"], np.quantile(seen["train"].gradient_norms().detach(), QUANTILES))
        values = np.linalg.eigvalsh(seen["train"].hessian().detach().double().numpy())[::-1]
        at("hessian_eigenvalue", one["hessian_eigenvalue"], values[:MODES])
        layers("observation", seen["train"].observation(BAND))
        layers("observation_count", seen["train"].observation_count())
        aligned = seen["eval"].alignment()
        at("alignment", one["alignment"].values[tuple(map(slice, aligned.shape))], aligned)
        if "lemma1_residual" in one:
            assert seen["eval"].lemma1_residual() <= tolerance(dtype)
            assert float(one["lemma1_residual"]) <= tolerance(dtype)


CASES = [
    *itertools.product(("connected",), ACTIVATIONS, LOSSES, ("float64",)),
    *itertools.product(("connected",), ("relu", "tanh"), LOSSES, ("float32",)),
    *itertools.product(("convolution", "norm-before", "norm-after"), ("relu", "tanh"), LOSSES, ("float64",)),
    *itertools.product(("convolution", "norm-before", "norm-after"), ("leaky_relu", "gelu"), ("mse",), ("float32",)),
]


@pytest.mark.parametrize(("shape", "activation", "loss", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_recorded_numbers_are_those_of_autograd(shape, activation, loss, dtype, folder, tmp_path):
    ds = tsdyn.run(experiment(folder, shape, activation, loss, dtype), tmp_path / "run").load()
    check(ds, folder, shape, activation, loss, dtype)


@pytest.mark.parametrize("shape", ["connected", "convolution", "norm-after"])
def test_labels_of_the_data_are_what_a_cross_entropy_is_of(shape, folder, tmp_path):
    trained = experiment(folder, shape, "relu", "cross_entropy", "float64", labels="data")
    check(tsdyn.run(trained, tmp_path / "run").load(), folder, shape, "relu", "cross_entropy", "float64", labels="data")
