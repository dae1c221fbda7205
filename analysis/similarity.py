"""Similarity of representations: linear CKA and SVCCA, between any two arrays of activations and within archives.

Both are invariant to rotations and permutations of nodes and can compare layers of different width, unlike node-to-node
correlations.  For layers of n and m nodes, N ≤ n + m centred samples always share directions, so that the measures
would be large whatever was learned; they raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from tsdyn.analysis import own_modules
from tsdyn.analysis.members import Member, each
from tsdyn.analysis.own_modules import Maker

from tsdyn.archive.selecting import experiment_of
from tsdyn.observables.similarities import KORNBLITH, cka, debiased_product, product, unit

RAGHU = "Raghu et al. 2017 (arXiv:1706.05806)"


def _centred(x: NDArray, y: NDArray, caller: str, fewest: int) -> tuple[NDArray, NDArray]:
    """Both arrays as `unit` gives them, once their shapes are checked."""
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"{caller}: shapes {x.shape} and {y.shape}; both are (sample, node) of the same samples")
    if len(x) <= fewest:
        raise ValueError(
            f"{caller}: {len(x)} samples of {x.shape[1]} and {y.shape[1]} nodes share directions whatever they hold; "
            f"give more than {fewest} samples"
        )
    return unit(x), unit(y)


def linear_cka(x: NDArray, y: NDArray, *, debiased: bool = False) -> float:
    """Linear CKA, ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖), of centred X (sample, node) and Y (sample, node_2).

    1 for representations that are equal up to rotation and a common scale; NaN if one is constant or not finite.

    The plain estimator lies in [0, 1] and is too large by about (nodes · nodes_2)^½ / samples: independent layers give
    0.35 at the smallest allowed number of samples.  The debiased estimator has mean 0 there and may be slightly
    negative; use it unless there are at least a hundred times as many samples as nodes, where the two agree.

    Args:
        x, y: Activations of the same samples.
        debiased: Whether to use the unbiased estimator of each of the three products; needs at least four samples.

    Raises:
        ValueError: if samples differ in number or are too few (no more than both widths together, plain).
        Source: Kornblith et al. 2019 (arXiv:1905.00414), Eq. 4; Song et al. 2012 (JMLR 13:1393), Eq. 5, debiased.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.similarity import linear_cka
        >>> x = np.random.default_rng(0).standard_normal((100, 3))
        >>> rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
        >>> round(linear_cka(x, 2 * x @ rotation), 12)  # of rotated and scaled activations
        1.0
    """
    fewest = 3 if debiased else x.shape[-1] + y.shape[-1]
    x, y = _centred(x, y, "linear_cka", fewest)
    return cka(x, y, debiased_product if debiased else product)


def svcca(x: NDArray, y: NDArray, *, variance: float = 0.99) -> float:
    """SVCCA: mean canonical correlation of the principal directions that hold the share `variance` of each; in [0, 1].

    1 if the kept subspace of one contains the other's; NaN if a layer is constant or not finite.  Biased like the plain
    `linear_cka`: independent layers give 0.6 at the smallest allowed number of samples.

    Raises:
        ValueError: as `linear_cka`, or if `variance` is outside (0, 1].
        Source: Raghu et al. 2017 (arXiv:1706.05806).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.similarity import svcca
        >>> x = np.random.default_rng(0).standard_normal((100, 3))
        >>> round(svcca(x, x @ np.diag([1.0, 2.0, 3.0]), variance=1.0), 6)
        1.0
    """
    if not 0 < variance <= 1:
        raise ValueError(f"svcca: variance={variance!r}; it lies in (0, 1]")
    eps = max(float(np.finfo(a.dtype).eps) if a.dtype.kind == "f" else 0.0 for a in (x, y))
    centred = _centred(x, y, "svcca", x.shape[-1] + y.shape[-1])
    if any(np.isnan(a).any() for a in centred):
        return float("nan")
    bases = [_principal(a, variance, max(eps, float(np.finfo(np.float64).eps))) for a in centred]
    if any(basis.shape[1] == 0 for basis in bases):
        return float("nan")
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(np.clip(correlations, 0, 1).mean())


def _principal(x: NDArray, variance: float, eps: float) -> NDArray:
    """The fewest principal directions of centred x that hold the share `variance`, as orthonormal columns (sample, k).

    Directions of relative size `eps` or less, the rounding of the given activations, are dropped.
    """
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    real = s > s[0] * max(x.shape) * eps
    held = np.cumsum(s[real] ** 2)
    # keep directions up to the first at which the share is reached, to rounding
    count = 0 if not len(held) else int(np.searchsorted(held, variance * held[-1] * (1 - 1e-12))) + 1
    basis: NDArray = u[:, :count]
    return basis


def student_teacher(
    archive: xr.Dataset,
    *,
    samples: int | None = None,
    debiased: bool = False,
    student: Maker | None = None,
    teacher: Maker | None = None,
) -> xr.Dataset:
    """``cka`` and ``svcca`` of student and teacher activations at each layer; (..., layer), lazy if `archive` is.

    On the evaluation set, which is redrawn, at every epoch that `archive` holds.
    NaN above the last layer of a point that has fewer layers.
    Layers of own modules are paired from the lowest, the output layers with each other; NaN where the
    teacher has no such layer.

    Args:
        archive: A run, a sweep or a slice, with weights; with ``parameter`` of an own module.
        samples: Number of samples to use from the start of the evaluation set; None uses all.
        debiased: Whether to use the debiased estimator of CKA, see `linear_cka`.
        student, teacher: The functions that make modules of the user's own, where the run has such.

    Raises:
        ValueError: if one layer is left, weights were not recorded, or samples are too few.

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis.similarity import student_teacher
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=0, epoch=-1, seed=[0])
        >>> student_teacher(ds).cka.dims
        ('seed', 'layer')
    """
    if "layer" not in archive.dims:
        if "weight" in archive:
            raise ValueError(
                "student_teacher: one layer is left; networks are made of all of them, select it afterwards"
            )
        raise ValueError("student_teacher: there is no weight, which networks are made of; record it, or keep it")
    layers = archive["layer"].values.tolist()

    def compared(pairs: Iterable[tuple[int, NDArray, NDArray]]) -> list[list[float]]:
        alike, cca = dict.fromkeys(layers, np.nan), dict.fromkeys(layers, np.nan)
        for number, f, f_star in pairs:
            alike[number], cca[number] = linear_cka(f, f_star, debiased=debiased), svcca(f, f_star)
        return [list(alike.values()), list(cca.values())]

    experiment = experiment_of(archive)
    own_modules.refuse_without_makers(experiment, student, teacher, "student_teacher")
    if experiment.of_own_modules:
        found = _of_modules(archive, compared, layers, student, teacher, samples)
    else:

        def measure(member: Member) -> list[list[float]]:
            with torch.no_grad():
                x = member.evaluation_inputs[:samples]
                traces = [net.trace(x).activations for net in (member.student, member.teacher)]
            return compared((i, f.numpy(), t.numpy()) for i, (f, t) in enumerate(zip(*traces, strict=True), start=1))

        gives = {name: {"layer": layers} for name in ("cka", "svcca")}
        found = each(archive, measure, ("cka", "svcca"), gives=gives)
    said = {
        "cka": (f"{'debiased ' * debiased}linear CKA of student and teacher", KORNBLITH),
        "svcca": ("SVCCA of student and teacher", RAGHU),
    }
    return found.assign(
        {name: found[name].assign_attrs(units="1", long_name=t, source=source) for name, (t, source) in said.items()}
    )


def _of_modules(
    archive: xr.Dataset,
    compared: Callable[[Iterable[tuple[int, NDArray, NDArray]]], list[list[float]]],
    layers: Sequence[int],
    student: Maker | None,
    teacher: Maker | None,
    samples: int | None,
) -> xr.Dataset:
    """The two variables of runs with modules of the user's own, which are made anew."""
    rebuild = partial(own_modules.activations, student=student, teacher=teacher, samples=samples)
    needs = [name for name in ("parameter", "teacher_parameter") if name in archive]
    if "parameter" not in needs:
        raise ValueError("student_teacher: the archive has no parameter; record it (record.observables)")
    gives = {kind: {"layer": layers} for kind in ("cka", "svcca")}
    return each(archive, lambda both: compared(both.pairs()), tuple(gives), gives=gives, rebuild=rebuild, needs=needs)
