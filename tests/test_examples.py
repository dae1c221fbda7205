"""Examples in docstrings are executed, and every public name that the design lists has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import tsdyn
from tsdyn import analysis, derivatives, flow, population, schema, theory

#: Modules of `tsdyn.analysis` that serve its own figures and readers.
INNER = {"captions", "style", "verdicts", "claims", "own_modules", "figures", "identity", "layout", "lift", "panels"}
#: Functions of the other modules that serve these modules alone, or need what the example's runs do not hold.
WITHOUT = {
    "alignment.without_padding", "audit.Claim", "audit.Finding", "batch_norm.negative_shift_share",
    "batch_norm.shift_histogram", "connectivity.carriers", "connectivity.loss_along", "connectivity.matched",
    "connectivity.theorem_2_path", "conservation.balance_kept", "members.Member", "members.each",
    "order_parameters.scaled_overlap", "overview.Number", "overview.Row", "overview.as_json", "phase.flags",
    "report.audit_rows", "report.text", "specialization.correlation_of", "specialization.median",
}  # fmt: skip
#: Names of the design's section 3, beside `tsdyn.analysis`.
DESIGN = {
    tsdyn: ("open", "run", "Experiment", "Network", "layer", "select", "measure", "gradient", "declare"),
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
