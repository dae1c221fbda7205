"""What an archive says about each lemma, theorem and corollary of Tian (2020) and Tian et al. (2019).

A claim has a hypothesis and a conclusion.  A verdict is one of

- ``holds``, ``fails``: the hypothesis is met, and the conclusion does or does not hold;
- ``unmet``: the hypothesis is not met, so nothing is tested;
- ``unrecorded``: the archive lacks what is needed; `used` names it;
- ``reported``: an approximation, whose error is the margin and which no bound judges.

The margin is conclusion over bound: at most 1 where it holds.  Measured at the last epoch unless a claim says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr
from torch import Tensor
from tsdyn.analysis import specialization
from tsdyn.analysis.alignment import teacher_separation
from tsdyn.analysis.members import PARAMETERS, Member, each, points

from tsdyn import alignment, theory
from tsdyn import layer as one_layer
from tsdyn.archive import experiment_of
from tsdyn.experiment import Experiment
from tsdyn.networks import Network
from tsdyn.schema import LUCK, TIAN

#: Of the largest quantity: what rounding may leave of an identity.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
#: A critical point: largest |g_1| over samples and nodes.
CRITICAL = 1e-6
#: Share of the largest teacher fan-out, or of the output, below which a student node's part counts as vanished.
NEGLIGIBLE = 0.01
#: Samples on which the linear pieces of a deep network are looked at.
PIECES = 512
VERDICTS = ("holds", "fails", "unmet", "unrecorded", "reported")


@dataclass(frozen=True)
class Finding:
    """One claim on one archive: arrays over what is left of (swept..., seed).

    Attributes:
        met: Whether the hypothesis is met.
        margin: Conclusion over bound; NaN where not computed.
    """

    met: xr.DataArray
    margin: xr.DataArray


@dataclass(frozen=True)
class Claim:
    """A statement of a paper.

    Attributes:
        name: Short name.
        source: Paper and number.
        says: Hypothesis ⇒ conclusion, in one line, as it is checked.
        needs: Variables of the archive that the check reads.
        check: From those variables of the archive and its experiment; None where no run of tsdyn meets the hypothesis.
        judged: Whether a margin above 1 fails.
    """

    name: str
    source: str
    says: str
    needs: tuple[str, ...] = ()
    check: Callable[[xr.Dataset, Experiment], Finding] | None = None
    judged: bool = True


def _all(array: xr.DataArray, value: bool = True) -> xr.DataArray:
    """A constant shaped like `array`."""
    return xr.full_like(array, value, dtype=bool)


def _lemma_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    residual = ds["lemma1_residual"].max("epoch").load()
    return Finding(residual.notnull(), residual / TOLERANCE[experiment.dtype])


def _assumption_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    eps_0 = teacher_separation(ds).load()
    return Finding(_all(eps_0), 10 * TOLERANCE[experiment.dtype] / eps_0)


def _lowest(ds: xr.Dataset) -> xr.Dataset:
    return one_layer(ds.isel(epoch=-1), 1).load()


def _observed(low: xr.Dataset) -> xr.DataArray:
    """Whether some student observes the teacher node and pulls at it; (..., teacher_node)."""
    pulls = (low["observation"] > 0) & (abs(low["A"]) > 0)
    return pulls.any("node")


def _best(low: xr.Dataset) -> xr.DataArray:
    return low["alignment"].min("node")


def _theorem_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    low = _lowest(ds)
    critical = low["gradient_max"].max("node") <= CRITICAL
    observed = _observed(low)
    met = critical & observed.any("teacher_node")
    return Finding(met, (_best(low).where(observed).max("teacher_node")) / (teacher_separation(ds).load() / 2))


def _theorem_3(ds: xr.Dataset, experiment: Experiment, *, aware: bool = False) -> Finding:
    low = _lowest(ds)
    nodes, inputs = low["width"] + low["teacher_width"], low["input_width"]
    pull = abs(low["A"]).where(low["observation"] > 0).max("node")
    reach = 5 * nodes**1.5 * (1 if aware else np.sqrt(inputs)) * low["gradient_max"].max("node") / pull
    inside = reach <= teacher_separation(ds).load()
    margin = (_best(low) / reach).where(inside).max("teacher_node")
    return Finding(inside.any("teacher_node"), margin)


def _theorem_4(ds: xr.Dataset, experiment: Experiment) -> Finding:
    found = _theorem_3(ds, experiment, aware=True)
    trained_so = experiment.data.augment == "aware"
    return Finding(found.met & trained_so, found.margin)


def _per_member(ds: xr.Dataset, measure: Callable[[Member], tuple[float, float]]) -> Finding:
    """A check that needs the networks themselves; `measure` gives (1 if the hypothesis is met, margin).

    The theory is of fully connected networks: points with convolutions or BatchNorm do not meet its hypotheses.
    """
    # loaded first: a dask graph for each member and variable costs more than the checks
    found = each(ds.isel(epoch=-1).load(), measure, ("met", "margin"), of=lambda experiment: not experiment.deep)
    return Finding(found["met"] == 1, found["margin"])


def _backpropagated(member: Member) -> tuple[list[Tensor], list[Tensor]]:
    """f_{l−1} and g_l on the training set, l = 1..L."""
    x = member.training_inputs
    trace = member.student.trace(x)
    return [x, *trace.activations[:-1]], theory.backpropagated_gradients(member.student, trace, member.teacher(x))


def _equation_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        below, g = _backpropagated(member)
        student, x = member.student, member.training_inputs
        free = [w.clone().requires_grad_() for w in student.weights]
        moved = Network(free, student.biases, student.activation.name, leak=student.activation.leak or 0.0)
        with torch.enable_grad():
            slopes = torch.autograd.grad((member.teacher(x) - moved(x)).square().sum() / (2 * len(x)), free)
        pairs = list(zip(below, g, slopes, strict=True))
        off = max(float((b.T @ f / len(x) + slope).abs().max()) for f, b, slope in pairs)
        # what is summed, not what is left of it: a fitted student's gradient is all cancellation
        scale = max(float((b.abs().T @ f.abs()).max()) / len(x) for f, b, _ in pairs)
        return 1.0, off / (scale * TOLERANCE[member.experiment.dtype]) if scale else 0.0

    return _per_member(ds, measure)


def _assumption_2(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        pairs = zip(*_backpropagated(member), strict=True)
        return 1.0, max(float((f.abs().amax(1) * g.abs().amax(1)).max()) for f, g in pairs)

    return _per_member(ds, measure)


def _assumption_3(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        eps = member.experiment.record.band * member.experiment.data.std
        return 1.0, float(alignment.band_density(member.teacher, member.training_inputs, eps).min())

    return _per_member(ds, measure)


def _factorization(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        given = member.student, member.teacher, member.evaluation_inputs
        product, joint = (theory.expectations(*given, form=form) for form in ("product", "joint"))
        layers = [*zip(product.H, joint.H, strict=True), *zip(product.H_star, joint.H_star, strict=True)]
        return 1.0, max(float((p - j).norm() / j.norm()) for p, j in layers if j.norm() > 0)

    return _per_member(ds, measure)


def _weak_overlaps(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        own = theory.expectations(member.teacher, member.teacher, member.evaluation_inputs)
        overlaps = []
        for matrix in (own.D[0], own.L[0]):
            share = (matrix / matrix.diagonal()[:, None]).fill_diagonal_(-torch.inf)
            overlaps.append(float(share.max()))
        return float(len(own.D[0]) > 1), max(overlaps)

    return _per_member(ds, measure)


def _conserved_norm(ds: xr.Dataset, experiment: Experiment) -> Finding:
    norm = ds["conserved_norm"].isel(epoch=[0, -1]).load()
    start, end = norm.isel(epoch=0, drop=True), norm.isel(epoch=1, drop=True)
    grown = abs(end / start.where(start > 0) - 1).max(["layer", "node"])
    met = _all(grown, False)
    for chosen, single in points(ds).values():
        met.loc[dict(chosen)] = single.student.batch_norm != "none"
    return Finding(met, grown)


def _critical(member: Member) -> bool:
    g = theory.backpropagated_gradient(member.student, member.teacher, member.training_inputs, 1)
    return float(g.abs().max()) <= CRITICAL


def _unaligned(member: Member) -> tuple[list[alignment.ClusterFanout], bool]:
    """Groups of co-linear student nodes that stand for no teacher, and whether each is observed with full rank.

    A group is tested if the fan-outs of the student nodes that see its boundary span the outputs.
    """
    student, teacher, x = member.student, member.teacher, member.evaluation_inputs
    near = alignment.separation(teacher) / 2
    groups = [g for g in alignment.cluster_fanouts(teacher, student, near) if g.eps > near]
    eps = member.experiment.record.band * member.experiment.data.std
    sees = alignment.observers(student, student, x, eps) > 0  # (boundary of, seen by); False where no sample is near
    fanouts, outputs = student.weights[-1], student.widths[-1]
    tested = [g for g in groups if int(torch.linalg.matrix_rank(fanouts[:, sees[g.nodes].any(0)])) == outputs]
    return tested, len(tested) == len(groups)


def _theorem_2(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        if member.student.depth != 2 or not _critical(member):
            return 0.0, np.nan
        groups, _ = _unaligned(member)
        strongest = float((member.teacher.weights[1].norm(dim=0) * member.teacher.weights[0].norm(dim=1)).max())
        left = max((g.total for g in groups), default=np.nan)
        return float(bool(groups)), left / (NEGLIGIBLE * strongest)

    return _per_member(ds, measure)


def _corollary_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        # a node that is on for every sample is affine there, has no boundary in the data, and so no observer
        if member.student.depth != 2 or not _critical(member):
            return 0.0, np.nan
        groups, all_observed = _unaligned(member)
        student, x = member.student, member.evaluation_inputs
        dropped = [k for g in groups for k in g.nodes]
        fanout = student.weights[1].clone()
        fanout[:, dropped] = 0
        leak = student.activation.leak
        pruned = Network([student.weights[0], fanout], student.biases, student.activation.name, leak=leak or 0.0)
        f = student(x)
        return float(bool(dropped) and all_observed), float((pruned(x) - f).norm() / f.norm()) / NEGLIGIBLE

    return _per_member(ds, measure)


def _theorem_5(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        student, teacher = member.student, member.teacher
        x = member.evaluation_inputs[:PIECES]
        if student.depth == 2 or not student.activation.piecewise_linear:
            return 0.0, np.nan
        traces = [net.trace(x) for net in (student, teacher)]
        pieces = len(np.unique(torch.cat([gate for t in traces for gate in t.gates[:-1]], 1).numpy(), axis=0))
        pull = theory.coupling(student, teacher, x, 1).A[..., :-1].abs()
        eps = member.experiment.record.band * member.experiment.data.std
        there = alignment.boundary(teacher, x, eps)[:, None, :] & (traces[0].preactivations[0] > 0)[:, :, None]
        least = torch.where(there, pull, torch.inf).amin(0)  # over the regions where k sees j's boundary
        strength = torch.where(there.any(0), least, 0).amax(0)
        g = theory.backpropagated_gradient(student, teacher, member.training_inputs, 1).abs().max()
        reach = 5 * pieces**1.5 * student.widths[0] ** 0.5 * g / strength
        inside = reach <= alignment.separation(teacher)
        best = alignment.alignment(teacher, student).amin(1)
        return float(bool(inside.any())), float((best / reach)[inside].amax()) if bool(inside.any()) else np.nan

    return _per_member(ds, measure)


def _update_gap(ds: xr.Dataset, experiment: Experiment) -> Finding:
    def measure(member: Member) -> tuple[float, float]:
        if not (member.student.activation.piecewise_linear and member.teacher.activation.piecewise_linear):
            return 0.0, np.nan
        updates = theory.luck_matters_updates(member.student, member.teacher, member.training_inputs)
        return 1.0, max((u.gap for u in updates[:-1]), default=0.0)

    return _per_member(ds, measure)


def _strong_first(ds: xr.Dataset, experiment: Experiment) -> Finding:
    first = specialization.recovery_epoch(one_layer(ds[["correlation"]], 1)).fillna(np.inf)
    strength = one_layer(ds[["teacher_fanout_norm"]], 1)["teacher_fanout_norm"].isel(epoch=0)

    def rank_correlation(epochs: np.ndarray, norms: np.ndarray) -> np.ndarray:
        flat = zip(epochs.reshape(-1, epochs.shape[-1]), norms.reshape(-1, norms.shape[-1]), strict=True)
        found = [spearmanr(e, n).statistic if np.ptp(n) > 0 and len(set(e)) > 1 else np.nan for e, n in flat]
        return np.array(found).reshape(epochs.shape[:-1])

    first, strength = xr.broadcast(first.load(), strength.load())
    rho: xr.DataArray = xr.apply_ufunc(rank_correlation, first, strength, input_core_dims=[["teacher_node"]] * 2)
    return Finding(rho.notnull(), 1 + rho)


CLAIMS = (
    Claim(
        "Equation 1",
        f"{TIAN}, Eq. 1",
        "always tested: |E[g fᵀ] + ∂J/∂W| ≤ rounding of E|g||f|, every layer, on the training set",
        PARAMETERS,
        _equation_1,
    ),
    Claim(
        "Lemma 1",
        f"{TIAN}, Lemma 1; {LUCK}, Theorem 1",
        "piecewise linear ⇒ |g − D(Af* − Bf)| ≤ rounding, every epoch",
        ("lemma1_residual",),
        _lemma_1,
    ),
    Claim(
        "Assumption 1",
        f"{TIAN}, Assumption 1",
        "always tested: teacher boundaries differ, ε_0 > 10 × rounding (that the data cross them is not tested)",
        ("teacher_weight", "teacher_bias"),
        _assumption_1,
    ),
    Claim(
        "Assumption 2",
        f"{TIAN}, Assumption 2",
        "never judged: the margin is max |f|_∞ |g|_∞ over layers and training samples, the least ε of a batch of one",
        PARAMETERS,
        _assumption_2,
        judged=False,
    ),
    Claim(
        "Assumption 3",
        f"{TIAN}, Assumption 3",
        "never judged: the margin is τ = min_j N[I_j(ε)]/(εN) on the training set, ε = record.band × data.std",
        PARAMETERS,
        _assumption_3,
        judged=False,
    ),
    Claim(
        "Theorem 1",
        f"{TIAN}, Theorem 1",
        f"max|g_1| ≤ {CRITICAL:g} and a teacher observed with α ≠ 0 ⇒ its best ε ≤ ε_0/2 (g on the training set)",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_1,
    ),
    Claim(
        "Theorem 2",
        f"{TIAN}, Theorem 2",
        f"max|g_1| ≤ {CRITICAL:g}, co-linear students with ε > ε_0/2 whose observers' fan-outs have rank C ⇒ "
        f"‖Σ v‖w‖‖ ≤ {NEGLIGIBLE:g} of the largest teacher's; two-layer",
        PARAMETERS,
        _theorem_2,
    ),
    Claim(
        "Corollary 1",
        f"{TIAN}, Corollary 1",
        f"as Theorem 2, for all students with ε > ε_0/2 ⇒ without them the output changes by ≤ {NEGLIGIBLE:g} in norm",
        PARAMETERS,
        _corollary_1,
    ),
    Claim(
        "Theorem 3",
        f"{TIAN}, Theorem 3",
        "ε_g = 5 K^{3/2} √d max|g_1| / max|α_kj| ≤ ε_0 ⇒ best ε ≤ ε_g (g on the training set, not on its augmentation)",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_3,
    ),
    Claim(
        "Theorem 4",
        f"{TIAN}, Theorem 4",
        "trained on the teacher-aware augmentation, ε_g = 5 K^{3/2} max|g_1| / max|α_kj| ≤ ε_0 ⇒ best ε ≤ ε_g",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_4,
    ),
    Claim(
        "Theorem 5",
        f"{TIAN}, Theorem 5",
        "deeper than two layers, ε_g = 5 Q^{3/2} √d max|g_1| / max_k min_R |α_kj(R)| ≤ ε_0 ⇒ best ε ≤ ε_g; "
        f"Q: the linear pieces that {PIECES} samples meet, a lower bound, so that the claim is tested sharper",
        PARAMETERS,
        _theorem_5,
    ),
    Claim(
        "strong teachers first",
        f"{TIAN}, section 5 and Figure 8",
        "recovery epochs differ ⇒ Spearman(epoch, ‖v*‖) ≤ 0; the margin is 1 + ρ",
        ("correlation", "teacher_fanout_norm"),
        _strong_first,
    ),
    Claim(
        "update L*W*H* − LWH",
        f"{LUCK}, Theorem 2",
        "exact at the top weight; an approximation below, never judged: the margin is its largest relative gap to −∇J",
        PARAMETERS,
        _update_gap,
        judged=False,
    ),
    Claim(
        "E[β f'f'] = E[β] ∘ E[f'f']",
        f"{LUCK}, Assumption 1",
        "an approximation, never judged: the margin is the relative difference of H in its two forms, largest layer",
        PARAMETERS,
        _factorization,
        judged=False,
    ),
    Claim(
        "weak overlaps",
        f"{LUCK}, Assumption 3",
        "never judged: the margin is the larger of ε_d and ε_l, max_{j≠j'} d*_jj'/d*_jj and l*_jj'/l*_jj, lowest layer",
        PARAMETERS,
        _weak_overlaps,
        judged=False,
    ),
    Claim(
        "BatchNorm keeps ‖w‖",
        f"{LUCK}, Theorem 3",
        "BatchNorm in the student ⇒ gradient flow keeps ‖w‖; SGD adds lr²‖∇‖² a step, so never judged: the margin is "
        "the largest relative change of the norm over the run",
        ("conserved_norm",),
        _conserved_norm,
        judged=False,
    ),
    Claim(
        "BatchNorm's gradient",
        f"{LUCK}, Lemma 1",
        "of one batch, not of an archive: tsdyn.theory.batch_norm_gradient",
    ),
    Claim(
        "projected dynamics",
        f"{LUCK}, Assumption 2, Lemmas 2–4 and Theorem 4",
        "needs β = 11ᵀ and L = I, not a trained student's: tsdyn.dynamics.projected_dynamics",
    ),
    Claim(
        "two-layer dynamics",
        f"{LUCK}, Lemmas 5–7 and Theorem 5",
        "needs the approximate dynamics, not SGD's: tsdyn.dynamics.two_layer_dynamics",
    ),
)


def audit(archive: xr.Dataset) -> xr.Dataset:
    """Every claim's verdict and margin on a run or a sweep.

    Args:
        archive: As `tsdyn.open` gives it.

    Returns:
        ``verdict`` (a word of `VERDICTS`) and ``margin`` over (claim, swept..., seed); ``source`` and ``used`` a claim.
        Loaded: one epoch of a few variables.
    """
    experiment = experiment_of(archive)
    shape = archive["death_epoch"]
    alive = shape < 0
    verdicts, margins, used = [], [], []
    for claim in CLAIMS:
        missing = [name for name in claim.needs if name not in archive]
        margin, verdict = xr.full_like(shape, np.nan, dtype=float), xr.full_like(shape, "", dtype="U10")
        if experiment.kind != "training":
            verdict[...] = "unmet"
            used.append(f"of students trained on samples, and this is kind = {experiment.kind!r}; {claim.says}")
        elif claim.check is None:
            verdict[...] = "unmet"
            used.append(claim.says)
        elif missing:
            verdict[...] = "unrecorded"
            used.append(f"record.observables lacks {', '.join(missing)}; {claim.says}")
        else:
            found = claim.check(archive[list({*claim.needs, "teacher_weight", "teacher_bias"})], experiment)
            met = (found.met & alive).transpose(*shape.dims).load()
            margin = found.margin.transpose(*shape.dims).load().where(met)
            judged = np.where(margin <= 1, "holds", "fails") if claim.judged else "reported"
            words = np.where(met & margin.notnull(), judged, "unmet")
            verdict = met.copy(data=words)
            used.append(claim.says)
        verdicts.append(verdict.drop_vars(set(verdict.coords) - set(verdict.dims)))
        margins.append(margin.drop_vars(set(margin.coords) - set(margin.dims)))
    names = xr.DataArray([claim.name for claim in CLAIMS], dims="claim", name="claim")

    def stacked(arrays: list[xr.DataArray]) -> xr.DataArray:
        joined = xr.concat(arrays, dim=names, coords="minimal", compat="override", join="exact", combine_attrs="drop")
        return joined.transpose("claim", ...)

    return xr.Dataset(
        {
            "verdict": stacked(verdicts),
            "margin": stacked(margins).assign_attrs(units="1", long_name="conclusion over bound"),
            "source": ("claim", [claim.source for claim in CLAIMS]),
            "used": ("claim", used),
        }
    )
