"""Derivatives of other people's modules: equal to loops of autograd, or refused with a message; none is wrong."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from tests import oracles_autograd as oracle
from tests.derivatives.foreign_modules import CASES, PER_SAMPLE, SAMPLES, SECOND
from tsdyn import derivatives

#: Modules of which the form with labels is tried: other kinds of parameters, numbers and outputs.
LABELLED = (
    "mlp relu", "gru cell", "attention", "embedding", "grouped, dilated convolution", "weight norm",
    "low rank beside frozen", "tuple of inputs", "scalar output", "sequence output", "time first inside",
    "complex weights", "half precision", "bfloat16", "prelu twice", "lstm, time first", "subtracts the batch's mean",
)  # fmt: skip
#: The one refusal that the form with labels has beyond the other's.
WITHOUT_LABELS = {("jacobian", "sequence output"): "outputs that are vectors or numbers"}


@pytest.fixture(scope="module")
def tally():
    """Count of right and refused numbers, printed at the end (``pytest -s``); a wrong one fails its test."""
    found = Counter()
    yield found
    print(f"\n{len(CASES)} modules, {sum(found.values())} numbers: {dict(found)}")


def made(case):
    torch.manual_seed(0)
    module = case.make()
    return module if case.dtype is None else module.to(case.dtype)


def problem(case):
    module, y = made(case), case.y
    if y is ...:
        with torch.no_grad():
            callable_ = "meta" not in str(case.refused) and "no shape" not in str(case.refused)
            shape = case.call(made(case), case.x).shape if callable_ else (SAMPLES, 3)
        y = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
            case.dtype or torch.float64
        )
    return module, case.x, y


def close(found, right, dtype):
    assert found.shape == right.shape
    scale = max(float(right.abs().max()), 1.0) if right.numel() else 0  # sums of terms of order one
    torch.testing.assert_close(found.to(right.dtype), right, rtol=0, atol=unit(dtype) * scale)


def unit(dtype):
    """Promised tolerance: 1e-12 in float64, as many roundings in float32; in 16 bits the same steps, rounded."""
    return (4504 if dtype.itemsize > 2 else 32) * torch.finfo(dtype).eps


def asked(case, quantity, module, x, y):
    """The requested result, as a mapping of arrays."""
    size = sum(p.numel() for p in oracle.trained(module).values()) if "lazy" not in type(module).__name__.lower() else 1
    if quantity == "gradients":
        return derivatives.per_sample_gradients(module, case.loss, x, y)
    if quantity == "norms":
        return derivatives.per_sample_gradient_norms(module, case.loss, x, y)
    if quantity == "jacobian":
        return derivatives.jacobian(module, x)
    if quantity == "ntk":
        return derivatives.neural_tangent_kernel(module, x)
    if quantity == "hessian":
        return derivatives.hessian(module, case.loss, x, y)
    if quantity == "product":
        return derivatives.hessian_vector_product(module, case.loss, x, y, direction(size, case))
    if quantity == "spectrum":
        return derivatives.hessian_spectrum(module, case.loss, x, y, None)
    return derivatives.hessian_density(module, case.loss, x, y, probes=1, steps=3, seed=5)


def direction(size, case):
    dtype = torch.promote_types(case.dtype or torch.float64, torch.float32)
    return torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=dtype)


def compared(case, quantity, found, module, x, y):
    dtype = case.dtype or torch.float64
    if quantity in ("gradients", "norms"):
        right = oracle.gradients(module, case.call, case.loss, x, y, SAMPLES)
    elif quantity in PER_SAMPLE:
        right = oracle.jacobian(module, case.call, x, SAMPLES)
    else:
        right = oracle.hessian(module, case.call, case.loss, x, y)
    if quantity in ("gradients", "jacobian"):
        assert found.keys() == right.keys()
        for name, value in right.items():
            close(found[name].reshape(value.shape), value, dtype)
    elif quantity == "norms":
        close(found.double(), oracle.norms(right), dtype)
    elif quantity == "ntk":
        close(found, oracle.kernel(right), dtype)
    else:
        v = direction(len(right), case)
        right = right.to(v)
        if quantity == "hessian":
            close(found, right, dtype)
        elif quantity == "product":
            close(found, right @ v, dtype)
        elif quantity == "spectrum":
            close(found, torch.linalg.eigvalsh((right + right.T) / 2).flip(0), dtype)
        else:
            moments(found, right, v / v.norm(), dtype)


def moments(density, hessian, v, dtype):
    """Three steps of Lanczos are exact up to degree 5."""
    size = max(float(torch.linalg.matrix_norm(hessian, 2)), 1e-3)
    power = v
    for p in range(4):
        assert abs((density.weights[0] * density.nodes[0] ** p).sum() - float(v @ power)) <= unit(dtype) * size**p
        power = hessian @ power


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # autograd says so too
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantity", [*PER_SAMPLE, *SECOND])
def test_right_or_refused(name, quantity, tally):
    case = CASES[name]
    module, x, y = problem(case)
    lazy = any(torch.nn.parameter.is_lazy(p) for p in module.parameters())
    state = {} if lazy else {key: value.clone() for key, value in module.state_dict().items()}
    random, numpy_random = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    words, found = case.refused.get(quantity), None
    if words is None:
        found = asked(case, quantity, module, x, y)
    else:
        with pytest.raises(ValueError, match=words) as told:
            asked(case, quantity, module, x, y)
        assert re.match(r"(per_sample|jacobian|neural|hessian)\w*: ", str(told.value))
    for key, value in state.items():  # left as it was
        if not value.is_meta:
            torch.testing.assert_close(module.state_dict()[key], value, rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert np.array_equal(numpy_random, np.random.get_state()[1])  # noqa: NPY002
    if found is not None:
        compared(case, quantity, found, module, x, y)
    tally[f"{quantity} {'right' if words is None else 'refused'}"] += 1


def plain_numbers(found):
    parts = found.values() if isinstance(found, dict) else [found]
    return np.sort(np.concatenate([np.asarray(part.detach().to(wide(part.dtype))).ravel() for part in parts]))


def wide(dtype):
    return torch.complex128 if dtype.is_complex else torch.float64


def labelled_numbers(ds):
    every = np.concatenate([np.asarray(array.values).ravel() for array in ds.data_vars.values()])
    return np.sort(every[~np.isnan(every)].astype(complex if np.iscomplexobj(every) else float))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("quantity", ["gradients", "norms", "jacobian", "ntk", "hessian"])
def test_with_labels_they_are_the_same_numbers(name, quantity):
    """Each number once, and beside them NaN alone; refused where the form without labels is."""
    case = CASES[name]
    of = {
        "gradients": lambda m, x, y, **how: derivatives.per_sample_gradients(m, case.loss, x, y, **how),
        "norms": lambda m, x, y, **how: derivatives.per_sample_gradient_norms(m, case.loss, x, y, **how),
        "jacobian": lambda m, x, y, **how: derivatives.jacobian(m, x, **how),
        "ntk": lambda m, x, y, **how: derivatives.neural_tangent_kernel(m, x, **how),
        "hessian": lambda m, x, y, **how: derivatives.hessian(m, case.loss, x, y, **how),
    }[quantity]
    words = case.refused.get(quantity) or WITHOUT_LABELS.get((quantity, name))
    if words is not None:
        with pytest.raises(ValueError, match=words):
            of(*problem(case), labelled=True)
        return
    np.testing.assert_array_equal(
        labelled_numbers(of(*problem(case), labelled=True)), plain_numbers(of(*problem(case)))
    )
