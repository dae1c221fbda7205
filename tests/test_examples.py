"""Examples in docstrings are executed, and every public name that the design lists has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import tsdyn
from tsdyn import (
    analysis,
    attribution,
    derivatives,
    flow,
    gaussian,
    observables,
    population,
    schema,
    studies,
    theory,
    vocabulary,
)  # fmt: skip

#: Modules of `tsdyn.analysis` that serve its own figures and readers.
INNER = {"captions", "style", "verdicts", "claims", "own_modules", "figures", "identity", "layout", "lift", "panels"}
#: Functions of the others that serve these or other wings alone, or need what the example's runs do not hold.
WITHOUT = {
    "alignment.without_padding", "theorems.Claim", "theorems.Finding", "audit.Claim", "audit.Finding",
    "batch_norm.negative_shift_share",
    "batch_norm.shift_histogram", "connectivity.carriers", "connectivity.loss_along", "connectivity.matched",
    "connectivity.theorem_2_path", "conservation.balance_kept", "members.Member", "members.each",
    "members.networks", "members.rebuilt", "members.refuse_parts",
    "order_parameters.scaled_overlap", "overview.Number", "overview.Row", "overview.as_json", "phase.flags",
    "report.audit_rows", "report.text", "specialization.correlation_of", "specialization.median",
}  # fmt: skip
#: Names of the design's section 3, beside `tsdyn.analysis`.
DESIGN = {
    tsdyn: (
        "open", "run", "Experiment", "Network", "layer", "select", "measure", "gradient", "declare", "Recorder",
        "differentiable", "jacobian", "sensitivity", "fork",
    ),
    attribution: ("lds", "influence", "tracin", "leave_one_out"),
    theory: ("backpropagated_gradient", "output_jacobian", "coupling", "lemma1_residual", "moments"),
    derivatives: (
        "per_sample_gradients", "per_sample_gradient_norms", "jacobian", "neural_tangent_kernel", "hessian",
        "hessian_spectrum", "hessian_vector_product",
    ),
    population: ("interaction", "loss", "one_neuron", "copy_average", "classify"),
    flow: ("gradient_flow", "polish"),
    tsdyn.testing: ("check",),
}  # fmt: skip


def _public():
    for package, names in DESIGN.items():
        for name in names:
            yield f"{package.__name__}.{name}", getattr(package, name)
    for found in pkgutil.iter_modules(analysis.__path__):
        if found.name in INNER:
            continue
        module = importlib.import_module(f"tsdyn.analysis.{found.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
            if own and (inspect.isfunction(value) or inspect.isclass(value)) and f"{found.name}.{name}" not in WITHOUT:
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, desk, monkeypatch):
    text = inspect.getdoc(PUBLIC[name])
    assert text
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    assert any(example.want for example in test.examples) or name.endswith(".check")
    monkeypatch.chdir(desk)
    monkeypatch.setattr(schema, "DECLARED", {})
    torch.manual_seed(0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


#: What a user meets: the package, its modules that are documented, and those of the analysis and of the studies.
MODULES = (
    tsdyn, attribution, derivatives, flow, gaussian, observables, population, schema, studies, theory, tsdyn.testing,
    tsdyn.xarray, vocabulary,
    *(importlib.import_module(f"tsdyn.analysis.{found.name}") for found in pkgutil.iter_modules(analysis.__path__)),
)  # fmt: skip


def _documented():
    """Every public function, class, method and property of those modules, by its name."""
    for module in MODULES:
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]:
            value = getattr(module, name)
            ours = str(getattr(value, "__module__", "")).startswith("tsdyn")
            if not ours or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for part, method in vars(value).items():
                    plain = getattr(method, "__func__", method)
                    if not part.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
                        yield f"{module.__name__}.{name}.{part}", getattr(value, part)


def test_everything_public_says_what_it_is():
    documented = dict(_documented())
    assert len(documented) > 300  # modules were found
    said = {name: inspect.getdoc(value) or "" for name, value in documented.items()}
    assert [name for name, text in said.items() if not text.split("\n\n")[0].rstrip().endswith((".", ":", "`"))] == []
