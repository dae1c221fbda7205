"""Gaussian moments of gates and rectifiers: E[θ(a)…θ(b) c₊ d₊] of up to four fields.

Stein's lemma removes one rectifier c: E[c F] = Σ_s C_cs E[∂_s F].  The derivative turns a gate into a δ function, which
leaves a moment of one field fewer, conditioned on that field being 0, and it turns a rectifier d into a gate.  What
remains are orthant probabilities, closed for three fields and one integral (Plackett 1954) of a smooth function for
four,

    P₄ = 1/16 + Σ_{i<j} asin ρ_ij/8π + (1/4π²) Σ_{i<j} asin ρ_ij ∫₀¹ asin r_{kl·ij}(t(s)) ds,

tρ_ij = sin(s asin ρ_ij), r_{kl·ij} the partial correlation of the other two where all correlations are multiplied by t.

Source: Plackett (1954); Stein (1981).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_ROOT = math.sqrt(2 * math.pi)
#: Number of nodes of the tanh–sinh rule, which are dense at both ends, where parallel fields make the integrand steep.
_NODES, _REACH = 61, 3.0
#: Conditional variances below this share of the variance are rounding: the fields are parallel.
_PARALLEL = 1e-14


@lru_cache(maxsize=1)
def _rule() -> tuple[np.ndarray, np.ndarray]:
    t = np.linspace(-_REACH, _REACH, _NODES)
    u = math.pi / 2 * np.sinh(t)
    weights = math.pi / 4 * np.cosh(t) / np.cosh(u) ** 2 * (t[1] - t[0])
    return 1 / (1 + np.exp(-2 * u)), weights


def _correlation(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation c/√(ab), clipped to ±1; 0 where a or b is 0.

    A field of variance 0 is 0, and its gate counts ½ independently of the others, as that of an uncorrelated field
    does.
    """
    product = np.sqrt(np.maximum(a, 0) * np.maximum(b, 0))
    found: np.ndarray = np.clip(np.divide(c, product, out=np.zeros_like(c), where=product > 0), -1, 1)
    return found


def probability(C: np.ndarray) -> np.ndarray:
    """Probability that all n ≤ 4 fields of covariance C (…, n, n) are positive."""
    n = C.shape[-1]
    if n == 0:
        return np.ones(C.shape[:-2])
    own = np.einsum("...ii->...i", C)
    rho = _correlation(C, own[..., :, None], own[..., None, :])
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    angle = {pair: np.arcsin(rho[..., pair[0], pair[1]]) for pair in pairs}
    total = sum(angle.values(), np.zeros(C.shape[:-2]))
    if n <= 3:
        return np.asarray(2.0**-n + total / (2.0 ** (n - 1) * math.pi))
    s, weights = _rule()
    found = 1 / 16 + total / (8 * math.pi)
    for (i, j), alpha in angle.items():
        k, m = (x for x in range(4) if x not in (i, j))
        r = np.sin(s * alpha[..., None])  # tρ_ij
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.where(alpha[..., None] == 0, 0, r / rho[..., i, j, None])
        ki, kj, mi, mj = (t * rho[..., a, b, None] for a, b in ((k, i), (k, j), (m, i), (m, j)))
        D = np.cos(s * alpha[..., None]) ** 2  # 1 − r²
        cross = t * rho[..., k, m, None] * D - (ki * mi + kj * mj - r * (ki * mj + kj * mi))
        first, second = (D - (a * a + b * b - 2 * r * a * b) for a, b in ((ki, kj), (mi, mj)))
        inner = np.arcsin(_correlation(cross, first, second)) @ weights
        found = found + alpha * inner / (4 * math.pi**2)
    return np.asarray(found)


def _conditioned(C: np.ndarray, s: int) -> np.ndarray:
    """Covariance of the other fields given that field s is 0; variances that are only rounding are set to 0."""
    rest = [i for i in range(C.shape[-1]) if i != s]
    cut, row = C[..., rest, :][..., rest], C[..., rest, s]
    own = C[..., s, s, None, None]
    explained = np.divide(row[..., :, None] * row[..., None, :], own, out=np.zeros_like(cut), where=own > 0)
    found = cut - explained
    variance, before = np.einsum("...ii->...i", found), np.einsum("...ii->...i", cut)
    parallel = variance <= _PARALLEL * before
    found[parallel[..., :, None] | parallel[..., None, :]] = 0
    return np.asarray(found)


def _density(variance: np.ndarray) -> np.ndarray:
    """Density at 0 of a normal field; 0 for a field of variance 0, whose covariances are 0 too."""
    root = _ROOT * np.sqrt(np.maximum(variance, 0))
    return np.asarray(np.divide(1, root, out=np.zeros_like(variance), where=variance > 0))


def moment(C: np.ndarray, gates: int, rectifiers: int) -> np.ndarray:
    """E[θ…θ z₊…z₊] for covariance C (…, n, n): gates of the first fields times rectifiers of the last; n ≤ 4."""
    n = C.shape[-1]
    if not rectifiers:
        return probability(C)
    c = n - 1  # index of the rectifier that Stein's lemma removes; F = gates · θ(c) · other rectifiers
    density = _density(np.einsum("...ii->...i", C))
    found = np.zeros(C.shape[:-2])
    others = list(range(gates, c))
    for s in (*range(gates), c):
        kept = [i for i in (*range(gates), c) if i != s]
        inner = _conditioned(C[..., [*kept, *others, s], :][..., [*kept, *others, s]], n - 1)
        found = found + C[..., c, s] * density[..., s] * moment(inner, len(kept), len(others))
    for d in others:
        order = [*range(gates), c, d, *(o for o in others if o != d)]
        found = found + C[..., c, d] * moment(C[..., order, :][..., order], gates + 2, len(others) - 1)
    return np.asarray(found)


def square(C: np.ndarray) -> np.ndarray:
    """E[θ…θ c₊²] with c the last of n ≤ 3 fields: the gates of the others times the squared rectifier."""
    n = C.shape[-1]
    c = n - 1
    found = C[..., c, c] * probability(C)
    for s in range(c):
        order = [*(i for i in range(c) if i != s), c, s]
        inner = _conditioned(C[..., order, :][..., order], n - 1)
        found = found + C[..., c, s] * _density(C[..., s, s]) * moment(inner, n - 2, 1)
    return np.asarray(found)


@lru_cache
def _groups(nodes: int, fields: int) -> tuple[tuple[bool, int, np.ndarray, np.ndarray, np.ndarray], ...]:
    """The terms m_z m_z' E[θ_i θ_k z₊ z'₊], i ≤ k, z ≤ z', grouped by which of the four fields coincide.

    Each group holds: whether z = z', how many gates remain, the fields (term, gates + rectifiers), i·nodes + k, and the
    pair (z, z').  The gate of a rectified field is 1 and is dropped.
    """
    found: dict[tuple[bool, int], list[tuple[list[int], int, tuple[int, int]]]] = {}
    for i in range(nodes):
        for k in range(i, nodes):
            for z in range(fields):
                for z2 in range(z, fields):
                    gates = sorted({i, k} - {z, z2})
                    rectified = [z] if z == z2 else [z, z2]
                    term = ([*gates, *rectified], i * nodes + k, (z, z2))
                    found.setdefault((z == z2, len(gates)), []).append(term)
    groups = []
    for (same, remaining), terms in found.items():
        chosen, at, pair = (np.array(column) for column in zip(*terms, strict=True))
        groups.append((same, remaining, chosen, at, pair))
    return tuple(groups)


def gated_square(C: np.ndarray, m: np.ndarray, nodes: int) -> np.ndarray:
    """relu's fluctuation E[θ_i θ_k (Σ m_z z₊)²] for the first K fields i, k, (K, K)."""
    found = np.zeros(nodes * nodes)
    for same, gates, chosen, at, pair in _groups(nodes, len(m)):
        part = C[chosen[:, :, None], chosen[:, None, :]]
        values = square(part) if same else 2 * moment(part, gates, 2)
        np.add.at(found, at, m[pair[:, 0]] * m[pair[:, 1]] * values)
    upper = found.reshape(nodes, nodes)
    return np.triu(upper) + np.triu(upper, 1).T
