"""What runs record of the labelled layers of own modules, against plain autograd and tsdyn's own networks."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from tsdyn.analysis import matching, members, similarity

import tsdyn
from tests.cases import small
from tests.comparing import assert_same
from tsdyn.problem.inputs import evaluation_inputs, training_inputs
from tsdyn.running import own_modules

INPUTS, OUTPUTS = 6, 2
LAYERED = [
    "loss", "weight", "parameter", "correlation", "cross_correlation", "gradient_rms", "gradient_max", "fanout_norm",
    "moments", "cka", "lemma1_residual", "neural_tangent_kernel", "jacobian",
]  # fmt: skip


class Skip(nn.Module):
    """Three layers, the second skipped."""

    def __init__(self, width=5, act=torch.relu):
        super().__init__()
        self.below, self.inner = nn.Linear(INPUTS, width), nn.Linear(width, width)
        self.top, self.act = nn.Linear(width, OUTPUTS), act

    def forward(self, x):
        h = self.act(self.below(x))
        return self.top(h + self.act(self.inner(h)))


class Plain(nn.Module):
    def __init__(self, widths=(INPUTS, 4, 3, OUTPUTS), act=torch.relu):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.act = act

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def shallow():
    return Plain((INPUTS, 4, OUTPUTS))


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(36, OUTPUTS),
    )  # fmt: skip


def experiment(observables=LAYERED, **changes):
    base = {"teacher__widths": [INPUTS, 4, OUTPUTS], "data__train": 30, "data__eval": 25, "training__epochs": 1}
    return small(**{"record__observables": list(observables), "seeds": 2, "dtype": "float64"} | base | changes)


def at(ds, make, seed=1, epoch=-1):
    """The student of a seed as it was recorded."""
    module = make().double().eval()
    held = own_modules.named(ds.sel(seed=seed).isel(epoch=epoch))
    module.load_state_dict({name: torch.from_numpy(np.array(value.values)) for name, value in held.items()})
    return module


@pytest.fixture(scope="module")
def skip(tmp_path_factory):
    asked = experiment()
    return asked, tsdyn.run(asked, tmp_path_factory.mktemp("skip") / "run", student=Skip, teacher=shallow).load()


def taught(make, seed=1):
    return own_modules.made(make, experiment(), seed, "teacher").eval()


def test_layers_have_names_widths_weights_and_biases(skip):
    _, ds = skip
    module = at(ds, Skip)
    assert tsdyn.schema.problems(ds) == []
    assert ds.layer_name.values.tolist() == ["below", "inner", "top"]
    assert ds.width.values.tolist() == [5, 5, OUTPUTS]
    assert ds.teacher_width.values.tolist() == [4, OUTPUTS, 0]
    for layer, name in enumerate(("below", "inner", "top"), start=1):
        one = tsdyn.layer(ds[["weight", "bias"]], layer).sel(seed=1).isel(epoch=-1)
        part = module.get_submodule(name)
        below = part.weight.shape[1]
        assert_same(torch.from_numpy(one.weight.values[:, :below]), part.weight.detach(), 0.0)
        assert_same(torch.from_numpy(one.bias.values), part.bias.detach(), 0.0)
    first = taught(shallow).layers[0]
    found = ds.teacher_weight.sel(seed=1, layer=1).values[:4, :INPUTS]
    assert_same(torch.from_numpy(np.array(found)), first.weight.detach(), 0.0)


def test_correlations_are_between_the_lowest_layers_and_between_all_layers(skip):
    asked, ds = skip
    x, module, teacher = torch.from_numpy(evaluation_inputs(asked, 1)), at(ds, Skip), taught(shallow)
    with torch.no_grad():
        h = torch.relu(module.below(x))
        mine = [h, torch.relu(module.inner(h)), module(x)]
        theirs = [torch.relu(teacher.layers[0](x)), teacher(x)]
    one = ds.sel(seed=1).isel(epoch=-1)
    for i, f in enumerate(mine):
        for j, g in enumerate(theirs):
            with np.errstate(invalid="ignore", divide="ignore"):  # nodes that are constant
                both = np.corrcoef(g.numpy().T, f.numpy().T)[: g.shape[1], g.shape[1] :]
            found = one.cross_correlation.isel(layer=i, teacher_layer=j).values[: g.shape[1], : f.shape[1]]
            varies = ~np.isnan(found)
            assert varies.any()
            np.testing.assert_allclose(found[varies], both[varies], atol=1e-12)
            constant = (f.amax(0) == f.amin(0)).numpy()[None] | (g.amax(0) == g.amin(0)).numpy()[:, None]
            np.testing.assert_array_equal(~varies, constant)
    np.testing.assert_array_equal(
        one.correlation.isel(layer=0), one.cross_correlation.isel(layer=0, teacher_layer=0).values
    )
    assert one.correlation.isel(layer=[1, 2]).isnull().all()  # the teacher has one hidden layer
    assert not tsdyn.layer(ds.cross_correlation, 2).isnull().all("teacher_node").all()


def test_gradients_couplings_and_lemma_1_are_those_of_autograd(skip):
    asked, ds = skip
    module, teacher, one = at(ds, Skip), taught(shallow), ds.sel(seed=1).isel(epoch=-1)
    x = torch.from_numpy(training_inputs(asked, 1))
    samples = []
    for a in x:  # by hand, sample by sample
        z1 = module.below(a)
        h = torch.relu(z1)
        z2 = module.inner(h)
        loss = 0.5 * (module.top(h + torch.relu(z2)) - teacher(a).detach()).square().sum()
        samples.append(torch.cat([-g for g in torch.autograd.grad(loss, [z1, z2])]))
    g = torch.stack(samples).unflatten(1, (2, 5))
    for layer in (0, 1):
        rms, most = one.gradient_rms.isel(layer=layer).values[:5], one.gradient_max.isel(layer=layer).values[:5]
        assert_same(torch.from_numpy(rms), g[:, layer].square().mean(0).sqrt(), 1e-12)
        assert_same(torch.from_numpy(most), g[:, layer].abs().amax(0), 1e-12)
    y = torch.from_numpy(evaluation_inputs(asked, 1))
    with torch.no_grad():
        h, t = torch.relu(module.below(y)), torch.relu(teacher.layers[0](y))
        gate = (module.inner(h) > 0).double()
        upper = module.top.weight @ (torch.eye(5) + gate[:, :, None] * module.inner.weight)  # ∂f/∂h
        a = (upper.mT @ teacher.layers[1].weight).mean(0)
        b = (upper.mT @ upper).mean(0)
        second, mixed = h.T @ h / len(y), h.T @ t / len(y)
        active, taught_active = (h > 0).double(), (t > 0).double()
        d, d_star = active.T @ active / len(y), active.T @ taught_active / len(y)
    expected = {"A": a, "B": b, "L": second, "L_star": mixed, "fanout_norm": b.diagonal().sqrt()}
    expected |= {"D": d, "D_star": d_star, "H": b * d, "H_star": a * d_star}
    for name, value in expected.items():
        found = one[name].isel(layer=0).values
        found = found[tuple(slice(0, n) for n in value.shape)]
        assert_same(torch.from_numpy(found), value, 1e-12, what=name)
    assert float(ds.lemma1_residual.max()) < 1e-13
    assert float(ds.lemma1_residual.min()) >= 0


def test_jacobian_and_kernel_of_first_samples(skip):
    asked, ds = skip
    module, one = at(ds, Skip), ds.sel(seed=1).isel(epoch=-1)
    x = torch.from_numpy(evaluation_inputs(asked, 1))
    assert ds.sizes["sample"] == 25
    free = list(module.parameters())
    outputs = [[torch.autograd.grad(o, free, retain_graph=True) for o in module(a[None])[0]] for a in x]
    rows = torch.stack([torch.stack([torch.cat([g.flatten() for g in o]) for o in sample]) for sample in outputs])
    assert_same(torch.from_numpy(one.jacobian.values), rows, 1e-12)
    assert_same(torch.from_numpy(one.neural_tangent_kernel.values), torch.einsum("aop,bop->ab", rows, rows), 1e-12)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_an_own_module_equals_the_same_network_of_tsdyns(tmp_path, which):
    """The network that tsdyn draws, given as a module: every variable is that of the run without it."""
    names = [
        "loss", "mse", "weight", "correlation", "cross_correlation", "gradient_rms", "gradient_max", "gradient_norm",
        "fanout_norm", "hessian_eigenvalue", "moments", "cka", "lemma1_residual", "neural_tangent_kernel",
    ]  # fmt: skip
    names = [n for n in names if which == "student" or not n.startswith("fan")]
    asked = experiment(names, teacher__widths=[INPUTS, 4, 3, OUTPUTS], training__epochs=0)
    run = tsdyn.run(asked, tmp_path / "run").load()
    networks = {}
    for seed in (0, 1):
        one = run.sel(seed=seed).isel(epoch=0) if which == "student" else run.sel(seed=seed)
        prefix = "" if which == "student" else "teacher_"
        widths = (INPUTS, *run[f"{prefix}width"].values.tolist())
        networks[seed] = Plain(widths).double()
        for i, part in enumerate(networks[seed].layers):
            n, m = part.weight.shape
            part.weight.data = torch.from_numpy(np.array(one[f"{prefix}weight"].values[i, :n, :m]))
            part.bias.data = torch.from_numpy(np.array(one[f"{prefix}bias"].values[i, :n]))

    def make(seed):
        return networks[seed]

    ds = tsdyn.run(asked, tmp_path / "own", **{which: make}).load()
    for name in names:
        for variable in tsdyn.vocabulary.FAMILIES.get(name, (name,)):
            if variable == "teacher_fanout_norm":
                continue
            found, expected = ds[variable], run[variable]
            size = float(np.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * max(size, 1e-3), err_msg=variable)


def test_of_convolutions_a_node_is_a_channel(tmp_path):
    """A network with one convolution is measured as tsdyn's own, positions as samples."""
    asked = experiment(["weight", "parameter", "correlation", "moments", "lemma1_residual"])
    ds = tsdyn.run(asked, tmp_path / "run", student=convnet, teacher=convnet).load()
    module, teacher = at(ds, convnet), taught(convnet)
    x = torch.from_numpy(evaluation_inputs(asked, 1))
    rows = []
    with torch.no_grad():
        for net in (module, teacher):
            rows.append(net[:4](x.clone()).flatten(2).mT.flatten(0, 1).numpy())
    one = ds.sel(seed=1).isel(epoch=-1)
    expected = np.corrcoef(rows[1].T, rows[0].T)[:3, 3:]
    np.testing.assert_allclose(one.correlation.isel(layer=0).values[:3, :3], expected, atol=1e-12)
    slopes = [(net[:3](x).flatten(2).mT.flatten(0, 1) > 0).double() for net in (module, teacher)]
    for name, both in (("D", (slopes[0], slopes[0])), ("D_star", slopes)):
        mean = both[0].T @ both[1] / len(slopes[0])
        assert_same(torch.from_numpy(one[name].isel(layer=0).values[:3, :3]), mean, 1e-12, what=name)
    head = module[5].weight.detach().unflatten(1, (3, 12))  # (output, channel, position)
    assert_same(torch.from_numpy(one.B.isel(layer=0).values[:3, :3]), torch.einsum("ocp,odp->cd", head, head), 1e-12)
    assert float(ds.lemma1_residual.max()) < 1e-13


def test_a_network_is_compared_with_a_module_that_teaches_it(tmp_path):
    asked = experiment(
        ["correlation", "A", "lemma1_residual", "fanout_norm"],
        teacher__widths=[INPUTS, 4, 4, OUTPUTS], student__widths=[INPUTS, 6, 5, OUTPUTS],
    )  # fmt: skip
    ds = tsdyn.run(asked, tmp_path / "run", teacher=Skip).load()
    assert ds.teacher_width.values.tolist() == [5, 5, OUTPUTS]
    assert float(ds.lemma1_residual.max()) < 1e-13
    assert ds.correlation.isel(layer=[0, 1]).notnull().any(["teacher_node", "node"]).all()
    assert ds.teacher_fanout_norm.isel(layer=0, teacher_node=slice(0, 5)).notnull().all()


def norm():
    return nn.Sequential(nn.Linear(INPUTS, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, OUTPUTS))


def bent():
    return Plain(act=torch.tanh)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.top = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x):
        return self.top(torch.relu(self.same(torch.relu(self.same(x)))))


@pytest.mark.parametrize(
    ("make", "observables", "message"),
    [
        (
            norm,
            ["lemma1_residual"],
            r"the student: σ\(x\) = σ'\(x\) x does not hold.*from '0' to the output.*layer_norm",
        ),
        (bent, ["lemma1_residual"], r"the student: σ\(x\) = σ'\(x\) x does not hold.*it calls tanh"),
        (Twice, ["weight"], r"student\.layers: same of the student is called 2 times.*record losses"),
        (convnet, ["correlation"], "hidden layer 1 of the student has 12 positions per sample, that of the teacher 1"),
        (Skip, ["alignment"], "alignment is not measured with student.module"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(tmp_path, make, observables, message):
    with pytest.raises(tsdyn.ExperimentError, match=message):
        tsdyn.run(experiment(["loss", *observables]), tmp_path / "run", student=make, teacher=shallow)
    assert not (tmp_path / "run").exists()


def test_layers_can_be_chosen(tmp_path):
    asked = experiment(["weight", "cross_correlation"]).replace({"training.epochs": 0})
    with pytest.raises(tsdyn.ExperimentError, match=r"student\.layers: names layers of a module of your own"):
        asked.replace({"student.layers": ["below"]})
    asked = asked.replace({"student.module": f"{__name__}:Twice", "student.layers": ["top"]})
    ds = tsdyn.run(asked, tmp_path / "run", student=Twice, teacher=shallow)
    assert ds.layer_name.values.tolist() == ["top", ""]
    assert ds.width.values.tolist() == [OUTPUTS, 0]
    assert ds.cross_correlation.isel(layer=0).notnull().any()


def test_cka_and_matching_of_own_modules(tmp_path):
    """CKA of the layers as paired, by its definition; matching takes a slice of cross_correlation."""
    asked = experiment(["parameter", "cross_correlation", "correlation", "weight", "cka"], data__eval=40)
    ds = tsdyn.run(asked, tmp_path / "run", student=Skip, teacher=shallow).load()
    found = similarity.student_teacher(ds.isel(epoch=-1), student=Skip, teacher=shallow)
    module, teacher, x = at(ds, Skip), taught(shallow), torch.from_numpy(evaluation_inputs(asked, 1))
    with torch.no_grad():
        pairs = {1: (torch.relu(module.below(x)), torch.relu(teacher.layers[0](x))), 3: (module(x), teacher(x))}
    for layer, both in pairs.items():
        k, q = ((f - f.mean(0)) @ (f - f.mean(0)).T for f in both)  # HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
        expected = float((k * q).sum() / ((k * k).sum() * (q * q).sum()).sqrt())
        assert float(found.cka.sel(seed=1, layer=layer)) == pytest.approx(expected, rel=1e-10)
    assert found.cka.sel(layer=2).isnull().all()
    with torch.no_grad():
        h = torch.relu(module.below(x))
        mine = [h, torch.relu(module.inner(h)), module(x)]
        theirs = [torch.relu(teacher.layers[0](x)), teacher(x)]
    for i, f in enumerate(mine):
        for j, g in enumerate(theirs):
            k, q = ((a - a.mean(0)) @ (a - a.mean(0)).T for a in (f, g))
            expected = float((k * q).sum() / ((k * k).sum() * (q * q).sum()).sqrt())
            assert float(ds.cka.sel(seed=1).isel(epoch=-1, layer=i, teacher_layer=j)) == pytest.approx(expected, 1e-10)
    again = tsdyn.measure(ds.drop_vars("cka"), ["cka"], student=Skip, teacher=shallow)
    np.testing.assert_array_equal(again.cka, ds.cka)
    few = experiment(["loss", "cka"], data__eval=4)
    with pytest.raises(tsdyn.ExperimentError, match="cka: 4 samples are no more than the features of any two layers"):
        tsdyn.run(few, tmp_path / "few", student=Skip, teacher=shallow)
    partners = matching.partner(ds.assign(correlation=ds.cross_correlation.sel(teacher_layer=1)).isel(epoch=-1))
    assert partners.sel(layer=2).notnull().any()
    assert matching.partner(ds.isel(epoch=-1)).sel(layer=1).equals(partners.sel(layer=1))
    for makers, message in (
        ({"student": Skip}, "the teacher is a module of the user's own.*pass the function that makes it, teacher="),
        ({"student": shallow, "teacher": shallow}, "makes a module of 38 numbers, and the archive holds 77"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity.student_teacher(ds.isel(epoch=-1), **makers)
    with pytest.raises(ValueError, match="a module of the user's own, which no Network is"):
        members.member(ds.isel(epoch=-1, seed=0))
