"""How far derivatives through training hold: finite differences on both sides of the radius, gates trained again."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import tsdyn
from tests.through_training.test_twins import tiny
from tsdyn.running.members import Members
from tsdyn.through_training import retraining


@pytest.mark.parametrize("wrt", ["start", "sample", "target", "input", "learning_rate", "teacher", "scale"])
def test_differences_agree_below_the_radius_and_not_above(relu_run, wrt):
    _, path = relu_run
    of = ("weight", {"layer": 2, "node": 1, "input_node": 0})  # smooth at the end, so that only training has gates
    found = retraining.retrained(path, of, wrt=wrt, multiples=[0.9, -0.9, 0.45, -0.45, 10.0, -10.0])
    off = np.abs(found["retrained"] / found["predicted"] - 1).values
    below, half, above = off[:, :2], off[:, 2:4], off[:, 4:]
    # below, what is left is the curvature of a smooth piece: it halves with the size
    assert ((np.abs(half / below - 0.5) < 0.05) | (below < 1e-7)).all()
    # above, gates have flipped: curvature alone would have made the error of 0.9 radii 10/0.9 times as large
    assert (above > 3e-3).all()
    assert (np.abs(np.log(above / (10 / 0.9 * below))) > 0.1).mean() >= 0.75


def test_the_radius_is_the_first_gate_that_flips_when_trained_again(relu_run):
    """Just below ρ every gate of every step is open or closed as in the run; just above one is not."""
    e, path = relu_run
    found = tsdyn.sensitivity(path, "loss_eval", wrt="start")

    def gates(seed, size):
        members = Members(e.replace({"seeds": [seed]}))
        members.draw()
        at = found.sel(seed=seed)
        net = members.ensemble
        length = np.sqrt(float((at["d_start"] ** 2).sum() + (at["d_start_bias"] ** 2).sum()))
        for layer in (1, 2):
            w, b = net.values[f"weight_{layer}"], net.values[f"bias_{layer}"]
            step = at.sel(layer=layer)
            w += size * torch.from_numpy(step["d_start"].values[: w.shape[1], : w.shape[2]] / length)
            b += size * torch.from_numpy(step["d_start_bias"].values[: b.shape[1]] / length)
        seen = []
        for epoch in range(1, e.training.epochs + 1):
            for batches in members.stream(epoch)(slice(0, 1)):
                for x, y in batches:
                    w1, b1, w2, b2 = (net.values[n][0] for n in ("weight_1", "bias_1", "weight_2", "bias_2"))
                    z = x[0] @ w1.T + b1
                    seen.append((z > 0).numpy())
                    f = z.clamp(min=0)
                    g = y[0] - f @ w2.T - b2
                    below = (g @ w2) * (z > 0)
                    eta = e.training.learning_rate / len(g)
                    w2 += eta * g.T @ f
                    b2 += eta * g.sum(0)
                    w1 += eta * below.T @ x[0]
                    b1 += eta * below.sum(0)
        return np.array(seen)

    for seed, (side, sign) in itertools.product(e.seed_labels, [("+", 1), ("-", -1)]):
        radius = float(found["radius"].sel(seed=seed, wrt="start", side=side))
        as_run = gates(seed, 0.0)
        # the radius is to first order: the piece is curved
        assert np.array_equal(gates(seed, 0.97 * sign * radius), as_run)
        assert not np.array_equal(gates(seed, 1.03 * sign * radius), as_run)


@pytest.fixture(scope="module")
def bent_run(tmp_path_factory):
    """More evaluation samples than those of all steps, so that one of them is the first to cross a kink."""
    e = tiny(data__eval=2000, training__epochs=2)
    path = tmp_path_factory.mktemp("bent") / "run"
    tsdyn.run(e, path)
    return e, path


def test_the_observables_own_samples_bend_it_at_their_radius(bent_run):
    """Just below it the evaluation samples' gates at the end are the run's; just above, one differs."""
    e, path = bent_run
    found = tsdyn.sensitivity(path, "loss_eval", wrt="start")
    named = tsdyn.sensitivity(path, ("weight", {"layer": 2, "node": 1, "input_node": 0}), wrt="start")
    assert bool(named["observable_radius"].isnull().all())  # measured on no samples
    np.testing.assert_array_equal(found["radius"].dims, found["observable_radius"].dims)
    crossed = 0
    for position, seed in enumerate(e.seed_labels):
        at = found.sel(seed=seed, wrt="start")
        x = Members(e).eval_probes[position].inputs

        def gates(size, position=position, at=at, x=x):
            members = Members(e)
            members.draw()
            members.prepare()
            values = members.ensemble.values
            length = np.sqrt(float((at["d_start"] ** 2).sum() + (at["d_start_bias"] ** 2).sum()))
            for layer in (1, 2):
                for name, variable in ((f"weight_{layer}", "d_start"), (f"bias_{layer}", "d_start_bias")):
                    part = values[name][position]
                    part += (
                        size
                        * torch.from_numpy(at[variable].sel(layer=layer).values)[tuple(slice(n) for n in part.shape)]
                        / length
                    )
            for epoch in range(1, e.training.epochs + 1):
                members.advance(epoch)
            net = members.ensemble.network(position)
            return (x @ net.weights[0].T + net.biases[0] > 0).numpy()

        for side, sign in (("+", 1), ("-", -1)):
            first = float(at["observable_radius"].sel(side=side))
            if first < 0.95 * float(at["radius"].sel(side=side)):  # else a step's gate flips before
                assert np.array_equal(gates(0.97 * sign * first), gates(0.0))
                assert (gates(1.03 * sign * first) != gates(0.0)).sum() == 1
                crossed += 1
    assert crossed


def test_a_kink_of_the_observable_changes_it_by_one_samples_share(bent_run):
    """Between the observable's radius and the steps' the prediction holds to the share of the samples that crossed."""
    _, path = bent_run
    found = tsdyn.sensitivity(path, "loss_eval")
    assert bool((found["observable_radius"].min("side") < found["radius"].min("side")).any())
    curve = retraining.retrained(path, "loss_eval", multiples=[0.95, -0.95])
    off = np.abs(curve["retrained"] / curve["predicted"] - 1)
    assert float(off.max()) < 0.01
    assert "on single samples bend it" in " ".join(json.loads(found.attrs["reach"]))


def test_differences_at_a_tenth_of_the_radius_agree_to_1e_6(relu_run):
    _, path = relu_run
    of = ("weight", {"layer": 2, "node": 1, "input_node": 0})
    found = retraining.retrained(path, of, multiples=[0.01, -0.01, 0.1, -0.1])
    # central differences have no error of second order
    for low, high in ((0, 1), (2, 3)):
        sides = found.isel(change=[low, high])
        slope = (sides["retrained"].isel(change=0) - sides["retrained"].isel(change=1)) / (
            sides["size"].isel(change=0) - sides["size"].isel(change=1)
        )
        predicted = (sides["predicted"] / sides["size"]).isel(change=0)
        radii = found["radius"]
        even = np.abs(radii.sel(side="+") / radii.sel(side="-") - 1)
        curvature = np.abs(sides["retrained"] / sides["predicted"] - 1).max("change") * even
        assert bool((np.abs(slope / predicted - 1) <= 1e-6 + curvature).all())


def test_a_smooth_model_has_no_radius_and_says_so(tmp_path):
    e = tiny(student__activation="tanh")
    tsdyn.run(e, tmp_path / "run")
    found = tsdyn.sensitivity(tmp_path / "run", "loss_eval")
    assert bool(found["radius"].isnull().all())
    assert "smooth" in found.attrs["radius_reason"]
    assert "smooth" in json.loads(found.attrs["reach"])[0]
    curve = retraining.retrained(tmp_path / "run", sizes=[1e-2, 1e-3, 1e-4])
    error = np.abs(curve["retrained"] / curve["predicted"] - 1)
    assert bool((error.isel(change=2) < 0.02 * error.isel(change=0)).all())  # like ε, at every ε
    with pytest.raises(tsdyn.ExperimentError, match="give sizes="):
        retraining.retrained(tmp_path / "run")


def test_a_change_of_winner_counts_as_a_gate(tmp_path):
    e = tiny(student__activation="tanh", record__observables=["loss", "weight", "correlation"])
    ds = tsdyn.run(e, tmp_path / "run")
    best = tsdyn.sensitivity(tmp_path / "run", ("best_correlation", {"layer": 1, "teacher_node": 0}))
    assert bool(np.isfinite(best["radius"]).any())
    rho = ds["correlation"].sel(layer=1, teacher_node=0).isel(epoch=-1)
    assert np.allclose(best["value"], rho.max("node"), rtol=1e-12)
    crossed = 0
    for position, seed in enumerate(e.seed_labels):
        winner = int(rho.sel(seed=seed).values.argmax())
        alone = ("correlation", {"layer": 1, "teacher_node": 0, "node": winner})
        one = tsdyn.sensitivity(tmp_path / "run", alone, seeds=seed)
        assert np.allclose(best["d_start"].sel(seed=[seed]), one["d_start"], rtol=1e-12, equal_nan=True)
        # trained again along that derivative, the winner is the best just below the radius, and no more just above
        for side, sign in (("+", 1), ("-", -1)):
            radius = float(best["radius"].isel(seed=position, wrt=0).sel(side=side))
            if not radius < 0.5:  # to first order
                continue
            sizes = [0.8 * sign * radius, 1.25 * sign * radius]
            whole, mine = (
                retraining.retrained(tmp_path / "run", of, seeds=[seed], sizes=sizes)["retrained"][0]
                for of in (("best_correlation", {"layer": 1, "teacher_node": 0}), alone)
            )
            assert float(abs(whole[0] - mine[0])) < 1e-12
            assert float(whole[1] - mine[1]) > 1e-6
            crossed += 1
    assert crossed
    mean = tsdyn.sensitivity(tmp_path / "run", "mean_specialization")
    rho = ds["correlation"].sel(layer=1).isel(epoch=-1, teacher_node=slice(3))
    assert np.allclose(mean["value"], rho.max("node").mean("teacher_node"), rtol=1e-12)
    every = [
        tsdyn.sensitivity(tmp_path / "run", ("best_correlation", {"layer": 1, "teacher_node": j}), certificate=False)
        for j in range(3)
    ]
    assert np.allclose(mean["d_start"], sum(one["d_start"] for one in every) / 3, rtol=1e-10, equal_nan=True)


def test_half_a_radius_along_the_derivative_changes_a_named_correlation_as_predicted(relu_run):
    _, path = relu_run
    found = retraining.retrained(
        path, ("correlation", {"layer": 1, "teacher_node": 2, "node": 3}), multiples=[0.5, -0.5]
    )
    assert np.allclose(found["retrained"], found["predicted"], rtol=0.01)


def test_growth_is_that_of_the_difference_of_two_runs(relu_run):
    e, path = relu_run
    found = tsdyn.sensitivity(path, "loss_eval", wrt="start")
    assert found["tangent_growth"].sizes["epoch"] == e.training.epochs
    for seed in e.seed_labels:
        at = found.sel(seed=seed)
        size = 0.1 * float(at["radius"].min())
        length = np.sqrt(float((at["d_start"] ** 2).sum() + (at["d_start_bias"] ** 2).sum()))
        one, two = (Members(e.replace({"seeds": [seed]})) for _ in range(2))
        for members in (one, two):
            members.draw()
            members.prepare()
        for layer in (1, 2):
            for name, variable in ((f"weight_{layer}", "d_start"), (f"bias_{layer}", "d_start_bias")):
                tensor = two.ensemble.values[name]
                step = at[variable].sel(layer=layer).values[tuple(slice(n) for n in tensor.shape[1:])]
                tensor += size * torch.from_numpy(step / length)
        for epoch in range(1, e.training.epochs + 1):
            one.advance(epoch), two.advance(epoch)
            pairs = zip(one.ensemble.values.values(), two.ensemble.values.values(), strict=True)
            apart = np.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)) / size
            assert float(at["tangent_growth"].sel(wrt="start", epoch=epoch)) == pytest.approx(apart, rel=1e-3)


def test_before_training_nothing_has_flipped_yet(relu_run):
    _, path = relu_run
    found = tsdyn.sensitivity(path, epoch=0, wrt=["start", "learning_rate"])
    assert found["tangent_growth"].sizes["epoch"] == 0
    assert bool(np.isinf(found["radius"].sel(wrt="start")).all())
    assert "no gate flips" in json.loads(found.attrs["reach"])[0]


def test_a_teacher_node_that_was_missed_is_moved_as_predicted(tmp_path):
    """Teacher node 9, the weakest, at the seed that came least near: half a radius along the derivative, to 1 %."""
    e = tiny(
        teacher__widths=[12, 10, 8], teacher__init="separated", teacher__polarity=1.0, student__overrealization=1.0,
        student__scale=0.1, data__train=200, data__eval=100, training__epochs=4, training__steps_per_epoch=40, seeds=5,
        record__observables=["loss", "weight", "correlation"],
    )  # fmt: skip
    ds = tsdyn.run(e, tmp_path / "run").load()
    rho = ds["correlation"].sel(layer=1, teacher_node=9).isel(epoch=-1)
    seed = int(rho.max("node").idxmin("seed"))
    assert float(rho.sel(seed=seed).max()) < 0.7  # missed
    of = ("correlation", {"layer": 1, "teacher_node": 9, "node": int(rho.sel(seed=seed).argmax("node"))})
    curve = retraining.retrained(ds, of, seeds=[seed], multiples=[0.5, -0.5])
    assert (np.sign(curve["predicted"].values) == [[1, -1]]).all()
    np.testing.assert_allclose(curve["retrained"], curve["predicted"], rtol=0.01)


def test_the_figure_shows_predicted_and_retrained_changes_and_the_radius(relu_run):
    _, path = relu_run
    curve = retraining.retrained(path, "loss_eval", multiples=[0.1, 0.9, 10.0, -3.0])
    drawn = retraining.figure(curve)
    assert len(drawn.axes) == curve.sizes["seed"]
    for axis, seed in zip(drawn.axes, curve["seed"].values, strict=True):
        at = curve.sel(seed=seed)
        lines = {line.get_label(): line for line in axis.lines}
        order = np.argsort(np.abs(at["size"].values))
        np.testing.assert_array_equal(lines["predicted"].get_xdata(), np.abs(at["size"].values[order]))
        np.testing.assert_array_equal(lines["predicted"].get_ydata(), np.abs(at["predicted"].values[order]))
        again = [line.get_ydata() for label, line in lines.items() if label.startswith("trained again")]
        np.testing.assert_array_equal(np.sort(np.concatenate(again)), np.sort(np.abs(at["retrained"].values)))
        for side in ("+", "-"):
            assert set(lines[f"radius {side}"].get_xdata()) == {float(at["radius"].sel(side=side))}
    plt.close(drawn)
