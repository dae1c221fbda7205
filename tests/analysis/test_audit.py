import numpy as np
import pytest
import torch
from tsdyn.analysis.audit import VERDICTS, audit
from tsdyn.analysis.members import member
from tsdyn.analysis.theorems import CLAIMS

import tsdyn
from tests.cases import small
from tsdyn import theory
from tsdyn.problem.teachers import draw_teacher
from tsdyn.theory import alignments

RECORD = ["mse", "correlation", "fanout_norm", "weight", "moments", "lemma1_residual", "alignment", "gradient_max"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = small(record__observables=[*RECORD, "observation"], teacher__polarity=0.5)
    return tsdyn.run(experiment, tmp_path_factory.mktemp("audit") / "run").load()


def changed(run, **values):
    """The run with some variables overwritten at the last epoch of the lowest layer."""
    ds = run.copy(deep=True)
    for name, value in values.items():
        at = {"epoch": ds.epoch[-1], "layer": 1} if "layer" in ds[name].dims else {"epoch": ds.epoch[-1]}
        ds[name].loc[at] = value
    return ds


def test_every_claim_has_a_verdict_and_lemma_1_holds(run):
    found = audit(run)
    assert list(found.claim.values) == [claim.name for claim in CLAIMS]
    assert set(np.unique(found.verdict)) <= set(VERDICTS)
    lemma = found.sel(claim="Lemma 1")
    assert (lemma.verdict == "holds").all()
    np.testing.assert_allclose(lemma.margin, run.lemma1_residual.max("epoch") / 1e-12)
    untrained = found.sel(claim="Theorem 1")  # four epochs are far from a critical point
    assert (untrained.verdict == "unmet").all()
    assert untrained.margin.isnull().all()


def test_a_wrong_matrix_fails_lemma_1(run):
    found = audit(changed(run, lemma1_residual=1e-3)).sel(claim="Lemma 1")
    assert (found.verdict == "fails").all()


def test_theorem_1_is_tested_where_its_hypothesis_is_met_only(run):
    critical = changed(run, gradient_max=1e-9, observation=0.5, A=1.0)
    aligned = audit(changed(critical, alignment=1e-9)).sel(claim="Theorem 1")
    assert (aligned.verdict == "holds").all()
    apart = audit(changed(critical, alignment=0.9)).sel(claim="Theorem 1")
    assert (apart.verdict == "fails").all()
    unobserved = audit(changed(critical, alignment=0.9, observation=0.0)).sel(claim="Theorem 1")
    assert (unobserved.verdict == "unmet").all()


def test_theorem_3_compares_with_its_own_bound(run):
    ds = changed(run, gradient_max=1e-9, observation=0.5, A=2.0)
    nodes, inputs = int(run.width[0] + run.teacher_width[0]), int(run.input_width[0])
    bound = 5 * nodes**1.5 * inputs**0.5 * 1e-9 / 2
    found = audit(changed(ds, alignment=3 * bound)).sel(claim="Theorem 3")
    assert (found.verdict == "fails").all()
    np.testing.assert_allclose(found.margin, 3)
    assert (audit(changed(ds, alignment=bound / 2)).sel(claim="Theorem 3").verdict == "holds").all()
    far = changed(ds, gradient_max=1.0)
    assert (audit(far).sel(claim="Theorem 3").verdict == "unmet").all()


def test_what_is_not_recorded_is_named(run):
    found = audit(run.drop_vars(["alignment", "A"])).sel(claim="Theorem 3")
    assert (found.verdict == "unrecorded").all()
    assert str(found.used.values).startswith("record.observables lacks A, alignment")


def test_the_dead_prove_nothing(run):
    died = run.assign_coords(death_epoch=("seed", [2, -1, -1]))
    verdict = audit(died).sel(claim="Assumption 1").verdict
    assert list(verdict.values) == ["unmet", "holds", "holds"]


def test_a_sweep_is_audited_point_by_point(tmp_path):
    experiment = small(record__observables=["lemma1_residual", "mse"], sweep={"teacher.widths": [[6, 3, 2], [6, 5, 2]]})
    found = audit(tsdyn.run(experiment, tmp_path / "sweep"))
    assert found.sel(claim="Lemma 1").verdict.size == 6
    for name in ("Lemma 1", "Assumption 1"):
        assert (found.sel(claim=name).verdict == "holds").all()


# --- checks that need the networks: on members made by hand ----------------------------------------------------


def placed(run, students, teachers):
    """The run with the members' parameters replaced: padded blocks at the last epoch."""
    ds = run.copy(deep=True)
    for seed, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for layer in (1, 2):
            at = {"seed": seed, "layer": layer}
            for name, net in (("", student), ("teacher_", teacher)):
                weight, bias = net.weights[layer - 1].numpy(), net.biases[layer - 1].numpy()
                last = {} if name else {"epoch": int(ds.epoch[-1])}
                for variable, block in ((f"{name}weight", weight), (f"{name}bias", bias)):
                    where = ds[variable].sel(at | last)
                    where[tuple(slice(size) for size in block.shape)] = block
                    ds[variable].loc[at | last] = where
    return ds


def perfect(width, teacher, extra, fanout):
    """A student that is its teacher, plus nodes of its own: `extra` (node, input) with fan-outs `fanout`."""
    spare = width - len(teacher.weights[0])
    pad = torch.zeros(teacher.weights[1].shape[0], spare, dtype=torch.float64)
    first = torch.cat([teacher.weights[0], extra])
    pad[:, : fanout.shape[1]] = fanout
    bias = torch.cat([teacher.biases[0], torch.zeros(spare, dtype=torch.float64)])
    return tsdyn.Network([first, torch.cat([teacher.weights[1], pad], 1)], [bias, teacher.biases[1]])


def test_theorem_2_and_its_corollary_judge_the_fanouts_of_unaligned_nodes(run, monkeypatch):
    """Students that are their teachers, and four spare nodes of their own."""
    draw = torch.Generator().manual_seed(0)
    teachers = [draw_teacher(tsdyn.Experiment.from_toml_text(run.attrs["experiment"]), seed) for seed in range(3)]
    extra = torch.randn(4, 10, generator=draw, dtype=torch.float64)
    silent = torch.zeros(6, 4, dtype=torch.float64)
    ds = placed(run, [perfect(8, t, extra, silent) for t in teachers], teachers)
    verdicts = audit(ds).verdict.sel(claim=["Theorem 2", "Corollary 1"])
    assert (verdicts == "unmet").all()  # fan-outs of rank 4 < C = 6 cannot test the spare nodes
    # spare nodes 4, 6 and 5, 7 coincide; opposite fan-outs cancel, and bring the rank to 6
    extra[2:] = extra[:2]
    some = torch.randn(6, 2, generator=draw, dtype=torch.float64)
    ds = placed(run, [perfect(8, t, extra, torch.cat([some, -some], 1)) for t in teachers], teachers)
    for claim in ("Theorem 2", "Corollary 1"):
        found = audit(ds).sel(claim=claim)
        assert set(found.verdict.values) <= {"holds", "unmet"}
        assert (found.verdict == "holds").any()
        assert float(found.margin.max()) < 1e-10
    # fan-outs that do not cancel are no critical point; taken for one, both claims fail
    ds = placed(run, [perfect(8, t, extra, torch.cat([some, some], 1)) for t in teachers], teachers)
    assert (audit(ds).verdict.sel(claim="Theorem 2") == "unmet").all()
    monkeypatch.setattr("tsdyn.analysis.theorems.CRITICAL", np.inf)
    for claim in ("Theorem 2", "Corollary 1"):
        assert (audit(ds).verdict.sel(claim=claim) == "fails").any()


def test_the_update_of_luck_matters_is_reported_and_never_judged(run):
    found = audit(run).sel(claim="update L*W*H* − LWH")
    assert (found.verdict == "reported").all()
    assert float(found.margin.min()) > 0


def test_equation_1_holds_and_a_gradient_of_another_network_fails(run, monkeypatch):
    found = audit(run).sel(claim="Equation 1")
    assert (found.verdict == "holds").all()
    true = theory.backpropagated_gradients
    monkeypatch.setattr(theory, "backpropagated_gradients", lambda *of: [1.001 * g for g in true(*of)])
    assert (audit(run).sel(claim="Equation 1").verdict == "fails").all()


def test_approximations_and_assumptions_are_reported_with_their_size(run):
    """Each margin again, from the same members by other means."""
    found = audit(run)
    cell = run.isel(epoch=-1, seed=1)
    one = member(cell, tsdyn.Experiment.from_toml_text(run.attrs["experiment"]))
    margin = found.margin.isel(seed=1)
    names = ["Assumption 2", "Assumption 3", "E[β f'f'] = E[β] ∘ E[f'f']", "weak overlaps"]
    assert (found.verdict.sel(claim=names) == "reported").all()
    x, hidden = one.training_inputs, one.student.trace(one.training_inputs).activations[0]
    g = [theory.backpropagated_gradient(one.student, one.teacher, x, layer) for layer in (1, 2)]
    largest = [max((abs(a).max() * abs(b).max()).item() for a, b in zip(*of, strict=True))
               for of in ((x, g[0]), (hidden, g[1]))]  # fmt: skip
    np.testing.assert_allclose(margin.sel(claim="Assumption 2"), max(largest), rtol=1e-12)
    w, b = alignments.regular(one.teacher)
    near = ((x @ w.T + b).abs() <= 0.1).double().mean(0) / 0.1
    np.testing.assert_allclose(margin.sel(claim="Assumption 3"), near.min(), rtol=1e-12)
    # two layers: V is constant, so that the two forms of H agree
    assert float(margin.sel(claim=names[2])) <= 1e-12
    f = one.teacher.trace(one.evaluation_inputs).activations[0]
    shares = []
    for moment in (f.T @ f, (f > 0).double().T @ (f > 0).double()):
        share = moment / moment.diagonal()[:, None]
        shares.append(share[~torch.eye(len(share), dtype=bool)].max().item())
    np.testing.assert_allclose(margin.sel(claim="weak overlaps"), max(shares), rtol=1e-12)


def test_batch_norm_keeps_the_norm_but_for_sgds_own_part(tmp_path):
    """‖w‖² grows by lr² ‖∇‖² per step: a tenth of the rate gives a hundredth; other cases are unmet."""
    change = []
    for rate in (1e-2, 1e-3):
        experiment = small(
            sweep={"student.batch_norm": ["none", "before"]}, training__learning_rate=rate,
            record__observables=["weight", "conserved_norm"],
        )  # fmt: skip
        found = audit(tsdyn.run(experiment, tmp_path / str(rate)))
        norm = found.sel(claim="BatchNorm keeps ‖w‖")
        assert (norm.verdict.sel(batch_norm="none") == "unmet").all()
        assert (norm.verdict.sel(batch_norm="before") == "reported").all()
        change.append(norm.margin.sel(batch_norm="before"))
        # the theory's claims are of networks without BatchNorm, and say so
        equation = found.sel(claim="Equation 1").verdict
        assert (equation.sel(batch_norm="none") == "holds").all()
        assert (equation.sel(batch_norm="before") == "unmet").all()
    assert (change[1] < change[0] / 20).all()


def test_theorem_4_asks_for_training_on_the_aware_augmentation(run, tmp_path):
    critical = {"gradient_max": 1e-9, "observation": 0.5, "A": 2.0, "alignment": 1e-12}
    assert (audit(changed(run, **critical)).sel(claim="Theorem 4").verdict == "unmet").all()
    experiment = small(
        record__observables=[*RECORD, "observation"], teacher__polarity=0.5, data__augment="aware", training__epochs=1
    )
    aware = tsdyn.run(experiment, tmp_path / "run").load()
    assert (audit(changed(aware, **critical)).sel(claim="Theorem 4").verdict == "holds").all()
    assert (audit(changed(aware, **critical | {"alignment": 0.9})).sel(claim="Theorem 4").verdict == "fails").all()


def test_theorem_5_is_for_deep_students(tmp_path):
    """A deep student made equal to its teacher: g = 0, so every bound is 0 and every ε is 0 or the claim fails."""
    experiment = small(
        teacher__widths=[6, 3, 3, 2], student__overrealization=1.0, training__epochs=0,
        record__observables=["weight", "mse"],
    )  # fmt: skip
    run = tsdyn.run(experiment, tmp_path / "run").load()
    assert (audit(run).sel(claim="Theorem 5").verdict == "unmet").all()  # untrained: g is large
    near = run.copy(deep=True)
    for name in ("weight", "bias"):
        source = run[f"teacher_{name}"].rename(teacher_node="node")
        near[name] = source.expand_dims(epoch=run.epoch).transpose(*run[name].dims).copy()
    # α (1 + 1e-9): a gradient of that order, aligned to the last bit
    near["weight"].loc[{"layer": 3}] = near["weight"].sel(layer=3) * (1 + 1e-9)
    found = audit(near).sel(claim="Theorem 5")
    assert set(found.verdict.values) <= {"holds", "unmet"}
    assert (found.verdict == "holds").any()


# --- constructed archives with known answers --------------------------------------------------------------------

THEOREMS = ["Theorem 1", "Theorem 2", "Corollary 1", "Theorem 3", "Theorem 4", "Theorem 5"]


def constructed(folder, **changes):
    """An untrained run of everything that an audit reads."""
    observables = [*RECORD, "observation"]
    return tsdyn.run(small(seeds=2, training__epochs=0, record__observables=observables, **changes), folder / "run")


def saved(folder, weights, biases):
    state = {}
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        state |= {f"{2 * i}.weight": w, f"{2 * i}.bias": b}
    torch.save(state, folder / "network.pt")
    return str(folder / "network.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"student__scale": 1e-7},
        {
            "teacher__init": "gaussian",
            "teacher__scale": 1e-3,
            "teacher__unit_norm": False,
            "teacher__bias": False,
            "student__scale": 1e-3,
        },
        {"data__std": 1e-3, "teacher__bias": False},
        {"student__scale": 1e-7, "teacher__widths": [10, 4, 4, 6]},
    ],
)
def test_an_untrained_student_is_at_no_critical_point_however_small_its_gradient(changes, tmp_path):
    ds = constructed(tmp_path, **changes)
    assert float(ds["gradient_max"].sel(layer=1).max()) < 1e-2
    assert (audit(ds).verdict.sel(claim=THEOREMS) == "unmet").all()


def test_a_student_equal_to_its_teacher_holds(tmp_path):
    """g = 0 exactly, so every bound and every ε is rounding."""
    teacher = draw_teacher(small(), 0)
    path = saved(tmp_path, teacher.weights, teacher.biases)
    ds = constructed(
        tmp_path, teacher__init="file", teacher__path=path, teacher__activation="relu", student__init="file",
        student__path=path, student__overrealization=1.0,
    )  # fmt: skip
    found = audit(ds)
    assert (found.verdict.sel(claim=["Equation 1", "Lemma 1", "Theorem 1", "Theorem 3"]) == "holds").all()
    assert float(found.margin.sel(claim=["Theorem 1", "Theorem 3"]).max()) < 1e-3


def test_one_teacher_node_proves_nothing_about_several(tmp_path):
    found = audit(constructed(tmp_path, teacher__widths=[10, 1, 6]))
    assert (found.verdict.sel(claim=["Assumption 1", *THEOREMS]) == "unmet").all()


def test_a_dead_student_is_audited_row_by_row(tmp_path):
    """No moment is above 0, so the factorization has nothing to compare."""
    dead = saved(
        tmp_path,
        [torch.zeros(8, 10, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)],
        [-torch.ones(8, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)],
    )
    found = audit(constructed(tmp_path, student__init="file", student__path=dead))
    assert (found.verdict.sel(claim=["E[β f'f'] = E[β] ∘ E[f'f']", *THEOREMS]) == "unmet").all()
    assert (found.verdict.sel(claim="Equation 1") == "holds").all()


def test_claims_of_the_squared_error_are_unmet_under_another_loss_and_say_so(tmp_path):
    found = audit(constructed(tmp_path, training__loss="cross_entropy"))
    for claim in ["Equation 1", "Lemma 1", "Assumption 2", *THEOREMS]:
        assert (found.verdict.sel(claim=claim) == "unmet").all()
        assert "of the squared error, not of training.loss = 'cross_entropy'" in found.used.sel(claim=claim).item()
    assert (found.verdict.sel(claim="Assumption 1") == "holds").all()


def test_equation_1_notices_an_error_in_the_smallest_layer(tmp_path, monkeypatch):
    """Relative by layer: with fan-outs of 1e-6 the lowest layer's gradient is a millionth of the other's."""
    ds = constructed(tmp_path, student__scale=1e-6)
    assert (audit(ds).sel(claim="Equation 1").verdict == "holds").all()
    true = theory.backpropagated_gradients

    def planted(*of):
        first, *others = true(*of)
        return [1.001 * first, *others]

    monkeypatch.setattr(theory, "backpropagated_gradients", planted)
    assert (audit(ds).sel(claim="Equation 1").verdict == "fails").all()


def test_verdicts_do_not_depend_on_the_unit_of_the_output(tmp_path):
    """With fan-outs a thousandth as large gradients are a millionth; verdicts and margins are the same."""
    margins = []
    for place, unit in enumerate((1.0, 1e-3)):
        folder = tmp_path / str(place)
        folder.mkdir()
        teacher, student = draw_teacher(small(), 0), draw_teacher(small(), 1)
        paths = []
        for name, net in (("t", teacher), ("s", student)):
            (folder / name).mkdir()
            scaled = [net.weights[0], unit * net.weights[1]]
            paths.append(saved(folder / name, scaled, [net.biases[0], unit * net.biases[1]]))
        found = audit(
            constructed(
                folder,
                teacher__init="file",
                teacher__path=paths[0],
                teacher__activation="relu",
                student__init="file",
                student__path=paths[1],
                student__overrealization=1.0,
            )
        )
        chosen = [claim for claim in found.claim.values if claim != "Assumption 2"]  # which bounds f and g as they are
        margins.append(found.sel(claim=chosen))
    np.testing.assert_array_equal(margins[0].verdict, margins[1].verdict)
    sizes = ["Theorem 1", "Theorem 2", "Corollary 1", "Theorem 3", "weak overlaps"]
    np.testing.assert_allclose(margins[0].margin.sel(claim=sizes), margins[1].margin.sel(claim=sizes), rtol=1e-9)


@pytest.mark.parametrize(
    ("claim", "changes", "why"),
    [
        ("BatchNorm keeps ‖w‖", {}, "the student has no BatchNorm"),
        ("Lemma 1", {"student__activation": "tanh"}, "σ = tanh is not piecewise linear"),
    ],
)
def test_what_could_not_be_met_is_not_asked_to_be_recorded(claim, changes, why, tmp_path):
    """Neither needed variable was recorded; with conserved_norm there would be no verdict, and tanh is refused."""
    few = {"seeds": 1, "training__epochs": 1, "training__steps_per_epoch": 2, "record__observables": ["weight"]}
    found = audit(tsdyn.run(small(**few, **changes), tmp_path / "run").load()).sel(claim=claim)
    assert found.verdict.values.tolist() == ["unmet"]
    assert found.reason.values.tolist() == [why]
    assert "record.observables lacks" not in str(found.used.values)
