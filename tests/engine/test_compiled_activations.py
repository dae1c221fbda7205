"""Activations of compiled code (smooth.hpp) against mpmath: value within 2 ulp, slope within 2 ulp or 2e-16."""

import ctypes

import mpmath
import numpy as np
import pytest
import torch

from tsdyn.engine import compiled_activations, compiled_step, native
from tsdyn.networks import activations

pytestmark = pytest.mark.skipif(native.load(compiled_step.SOURCE, compiled_step.Job) is None, reason="no compiler here")

TYPES = {"float64": torch.float64, "float32": torch.float32}
#: An absolute error that a slope may have; 2e-16 is 0.9 eps of float64.
SLOPE = {"float64": 2e-16, "float32": 0.9 * float(np.finfo(np.float32).eps)}


def compiled(name, z):
    """Value and slope at an array of any length, by compiled code; the array is padded to whole vectors."""
    line = 64 // z.itemsize
    rows = torch.empty(3 * (len(z) + line) + line, dtype=TYPES[z.dtype.name]).numpy()
    start = -rows.ctypes.data % 64 // z.itemsize  # compiled code takes whole cache lines
    whole = -(-len(z) // line) * line
    value, slope = rows[start : start + whole], rows[start + whole : start + 2 * whole]
    value[: len(z)], value[len(z) :] = z, 0
    function = native.function(native.load(compiled_step.SOURCE, compiled_step.Job), "activate", TYPES[z.dtype.name])
    sigma = activations.activation(name, leak=0.1)
    kind = ctypes.c_int64(compiled_activations.kind(sigma))
    where = [ctypes.c_void_p(part.ctypes.data) for part in (value, slope)]
    function(kind, ctypes.c_double(sigma.leak or 0.0), *where, ctypes.c_int64(whole))
    return value[: len(z)].copy(), slope[: len(z)].copy()


def _density(z):
    return mpmath.exp(-z * z / 2) / mpmath.sqrt(2 * mpmath.pi)


def _cdf(z):
    z = max(-(10**4), min(z, 10**4))  # beyond, mpmath overflows; it is 0 or 1 to 10^7 digits
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def _logistic(z):
    return 1 / (1 + mpmath.exp(-z))


EXACT = {
    "erf": (lambda z: mpmath.erf(z / mpmath.sqrt(2)), lambda z: 2 * _density(z)),
    "tanh": (mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "sigmoid": (_logistic, lambda z: _logistic(z) * _logistic(-z)),
    "softplus": (lambda z: mpmath.log1p(mpmath.exp(z)), _logistic),
    "gelu": (lambda z: z * _cdf(z), lambda z: _cdf(z) + z * _density(z)),
    "silu": (lambda z: z * _logistic(z), lambda z: _logistic(z) * (1 + z * _logistic(-z))),
}


def points(dtype):
    """Numbers of every size and sign, dense about 0 and the switches between formulas, far into the subnormal."""
    draw, kind = np.random.default_rng(0), np.finfo(dtype)
    sizes = 10.0 ** draw.uniform(np.log10(float(kind.tiny)), np.log10(float(kind.max)), 150)
    ends = [0.0, -0.0, 1.0, -1.0, 1.5, -1.5, float(kind.max), float(kind.min), float(kind.tiny), -float(kind.tiny)]
    parts = [
        draw.normal(size=350), draw.normal(0, 4, 350), draw.uniform(-45, 45, 250), draw.uniform(-800, 800, 250),
        draw.uniform(-110, 110, 150), 1 + draw.normal(0, 1e-6, 20), draw.choice([-1, 1], 150) * sizes, ends,
    ]  # fmt: skip
    return np.concatenate(parts).astype(dtype)


def _places(exact, dtype):
    """The last place of each number, in units of which it may be off; that of the least subnormal at least."""
    most = float(np.finfo(dtype).max) / 2  # above it numpy's spacing overflows
    return [float(np.spacing(dtype(min(abs(e), most)))) for e in exact]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", EXACT)
def test_value_and_slope_are_within_two_units_of_the_last_place(name, dtype):
    z = points(dtype)
    value, slope = compiled(name, z)
    with mpmath.workdps(45):
        expected = [[function(mpmath.mpf(float(x))) for x in z] for function in EXACT[name]]
        for what, found, exact in zip(("value", "slope"), (value, slope), expected, strict=True):
            room = 2 * np.array(_places(exact, dtype))
            if what == "slope":
                room = np.maximum(room, SLOPE[np.dtype(dtype).name])
            off = np.array([float(abs(mpmath.mpf(float(f)) - e)) for f, e in zip(found, exact, strict=True)])
            worst = int(np.argmax(off / room))
            assert off[worst] <= room[worst], f"{what} at {z[worst]!r}: {found[worst]!r}, {exact[worst]}"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", activations.NAMES)
def test_nan_stays_nan_and_infinity_gives_the_limit(name, dtype):
    value, slope = compiled(name, np.array([np.nan, np.inf, -np.inf], dtype))
    assert np.isnan(value[0])
    sigma = activations.activation(name, leak=0.1)
    if sigma.leak is None:
        assert np.isnan(slope[0])
        bounded = name in ("erf", "tanh", "sigmoid")
        assert value[1] == (1.0 if bounded else np.inf)
        assert value[2] == (-1.0 if name in ("erf", "tanh") else 0.0)
        assert list(slope[1:]) == [0.0 if bounded else 1.0, 0.0]


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "identity"])
def test_piecewise_linear_ones_are_torchs_to_the_bit(name):
    z = points(np.float64)
    sigma = activations.activation(name, leak=0.1)
    value, slope = compiled(name, z)
    np.testing.assert_array_equal(value, sigma(torch.from_numpy(z)))
    np.testing.assert_array_equal(slope, sigma.gate(torch.from_numpy(z)))


def test_every_activation_of_tsdyns_own_is_known_and_no_other():
    own = [activations.activation(name) for name in activations.NAMES]
    kinds = [compiled_activations.kind(sigma) for sigma in own]
    assert None not in kinds
    assert [k for k, sigma in zip(kinds, own, strict=True) if sigma.leak is None] == list(range(1, 7))
    tanh = activations.activation("tanh")
    other = activations.Activation("tanh", torch.sin, torch.cos, torch.nn.Identity)
    assert compiled_activations.kind(other) is None
    assert compiled_activations.kind(tanh) == 2
