"""The lemmas, theorems and corollaries of Tian (2020) and Tian et al. (2019), each with the check of an archive.

A check gives for each member whether the hypothesis is met, and the margin: conclusion over bound, at most 1 where it
holds.  Measured at the last epoch unless a claim says so.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr
from torch import Tensor
from tsdyn.analysis import claims, conservation, specialization
from tsdyn.analysis.alignment import teacher_separation, without_padding
from tsdyn.analysis.claims import Claim, Finding
from tsdyn.analysis.identity import per_point
from tsdyn.analysis.members import PARAMETERS, Member

from tsdyn import layer as one_layer
from tsdyn import theory
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.theory import alignments
from tsdyn.vocabulary import DU, LUCK, TIAN

#: Relative error, of the largest quantity, that rounding may leave in an identity.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
#: Threshold of a critical point: largest |g_1| over samples and nodes, relative to the size of the terms it sums.
CRITICAL = 1e-6
#: Share of the largest teacher fan-out, or of the output, below which a student node's contribution counts as zero.
NEGLIGIBLE = 0.01
#: Number of samples at which the linear pieces of a deep network are compared.
PIECES = 512


def _lemma_1(ds: xr.Dataset, experiment: Experiment | None) -> Finding:
    residual = ds["lemma1_residual"].max("epoch").load()
    return Finding(residual.notnull(), residual / TOLERANCE[str(residual.dtype)])


def _separation(ds: xr.Dataset) -> xr.DataArray:
    """ε_0; NaN for a single teacher node, so that it meets no hypothesis: there is no other to distinguish it from."""
    eps_0 = teacher_separation(ds).load()
    return eps_0.where(np.isfinite(eps_0))


def _assumption_1(ds: xr.Dataset, experiment: Experiment | None) -> Finding:
    eps_0 = _separation(ds)
    rounding = 10 * TOLERANCE[str(ds["teacher_weight"].dtype)]
    margin = (rounding / eps_0.where(eps_0 > 0)).where(eps_0 > 0, np.inf)
    return Finding(eps_0.notnull(), margin.where(eps_0.notnull()))


def _lowest(ds: xr.Dataset) -> xr.Dataset:
    return one_layer(ds.isel(epoch=-1), 1).load()


def _observed(low: xr.Dataset) -> xr.DataArray:
    """Whether some student node observes each teacher node and has a nonzero coupling to it; (..., teacher_node)."""
    pulls = (low["observation"] > 0) & (abs(low["A"]) > 0)
    return pulls.any("node")


def _best(low: xr.Dataset) -> xr.DataArray:
    return low["alignment"].min("node")


def _spread(ds: xr.Dataset) -> xr.DataArray:
    """Standard deviation of the inputs at each point, if the experiment gives it."""
    return per_point(ds, lambda point: point.data.std)


def _teacher_norms(low: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """‖w*_j‖ and |b*_j| of the lowest layer; NaN for padding."""
    weight = without_padding(low["teacher_weight"], low["input_width"])
    squares = (weight**2).sum("input_node", skipna=False)
    return squares.copy(data=np.sqrt(squares.values)), abs(low["teacher_bias"])


def _relative_gradient(ds: xr.Dataset, low: xr.Dataset) -> xr.DataArray:
    """Largest |g_1k| of any node and sample, relative to the size of the teacher's terms in it.

    max_k max_x |g_1k| / Σ_j |α_kj| (std ‖w*_j‖ + |b*_j|).  Numerator and denominator scale alike with the student's
    fan-out and the teacher's weights, so that a small initialization or a small teacher does not look like a critical
    point.  0 for a node where both are 0, infinity where only the denominator is.
    """
    norm, bias = _teacher_norms(low)
    pull = (abs(low["A"]) * (_spread(ds) * norm + bias)).sum("teacher_node")
    g = low["gradient_max"]
    without = xr.zeros_like(g).where(~(g > 0), np.inf)  # of a node that nothing pulls at
    share = (g / pull.where(pull > 0)).where(pull > 0, without)
    return share.where(g.notnull()).max("node")


def _theorem_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    low, eps_0 = _lowest(ds), _separation(ds)
    critical = (_relative_gradient(ds, low) <= CRITICAL) & eps_0.notnull()
    observed = _observed(low)
    met = critical & observed.any("teacher_node")
    return Finding(met, _best(low).where(observed).max("teacher_node") / (eps_0 / 2))


def _theorem_3(ds: xr.Dataset, experiment: Experiment, *, aware: bool = False) -> Finding:
    low, eps_0 = _lowest(ds), _separation(ds)
    nodes, inputs = low["width"] + low["teacher_width"], low["input_width"]
    # of regular teacher nodes, ‖w*‖ = 1, whose fan-out takes the norm
    pull = abs(low["A"]).where(low["observation"] > 0).max("node") * _teacher_norms(low)[0]
    reach = 5 * nodes**1.5 * (1 if aware else np.sqrt(inputs)) * low["gradient_max"].max("node") / pull.where(pull > 0)
    inside = reach <= eps_0 * np.minimum(1.0, _spread(ds))
    bound = np.maximum(reach, 10 * TOLERANCE[experiment.dtype])
    margin = (_best(low) / bound).where(inside).max("teacher_node")
    return Finding(inside.any("teacher_node"), margin)


def _theorem_4(ds: xr.Dataset, experiment: Experiment) -> Finding:
    found = _theorem_3(ds, experiment, aware=True)
    return Finding(found.met & per_point(ds, lambda point: point.data.augment == "aware"), found.margin)


def _share(part: float, whole: float) -> float:
    """part/whole of nonnegative numbers, with 0/0 = 0 and infinity for any other part of 0."""
    return part / whole if whole > 0 else (np.inf if part > 0 else 0.0)


def _backpropagated(member: Member) -> tuple[list[Tensor], list[Tensor]]:
    """f_{l−1} and g_l on the training set, l = 1..L."""
    x = member.training_inputs
    trace = member.student.trace(x)
    residual = member.loss.residual(trace.output, member.training_targets)
    return [x, *trace.activations[:-1]], theory.backpropagated_gradients(member.student, trace, residual)


def _equation_1(member: Member) -> tuple[float, float]:
    below, g = _backpropagated(member)
    student, x = member.student, member.training_inputs
    free = [w.clone().requires_grad_() for w in student.weights]
    moved = Network(free, student.biases, student.activation.name, leak=student.activation.leak or 0.0)
    with torch.enable_grad():
        slopes = torch.autograd.grad(member.loss.value(moved(x), member.training_targets), free)
    off = []
    for f, b, slope in zip(below, g, slopes, strict=True):
        # what is summed, not what is left of it: a fitted student's gradient is all cancellation; by layer, for
        # the largest would hide an error in the others
        scale = float((b.abs().T @ f.abs()).max()) / len(x)
        off.append(_share(float((b.T @ f / len(x) + slope).abs().max()), scale))
    return 1.0, max(off) / TOLERANCE[member.experiment.dtype]


def _assumption_2(member: Member) -> tuple[float, float]:
    pairs = zip(*_backpropagated(member), strict=True)
    return 1.0, max(float((f.abs().amax(1) * g.abs().amax(1)).max()) for f, g in pairs)


def _assumption_3(member: Member) -> tuple[float, float]:
    eps = member.experiment.record.band * member.experiment.data.std
    return 1.0, float(alignments.band_density(member.teacher, member.training_inputs, eps).min())


def _factorization(member: Member) -> tuple[float, float]:
    given = member.student, member.teacher, member.evaluation_inputs
    found = theory.expectations(*given, form="joint")
    product = [a * d for a, d in zip([*found.B, *found.A], [*found.D, *found.D_star], strict=True)]
    layers = list(zip(product, [*found.H, *found.H_star], strict=True))
    some = [(p, j) for p, j in layers if p.norm() > 0 or j.norm() > 0]  # none, if the student is dead
    return float(bool(some)), max((_share(float((p - j).norm()), float(j.norm())) for p, j in some), default=np.nan)


def _weak_overlaps(member: Member) -> tuple[float, float]:
    own = theory.expectations(member.teacher, member.teacher, member.evaluation_inputs)
    overlaps = []
    for matrix in (own.D[0], own.L[0]):
        alive = matrix.diagonal() > 0  # a node that is never active overlaps with none
        share = (matrix[alive][:, alive] / matrix.diagonal()[alive, None]).fill_diagonal_(-torch.inf)
        overlaps.append(float(share.max()) if len(share) > 1 else np.nan)
    return float(not np.isnan(overlaps).any()), max(overlaps)


def _conserved_norm(ds: xr.Dataset, experiment: Experiment) -> Finding:
    norm = ds["conserved_norm"].isel(epoch=[0, -1]).load()
    start, end = norm.isel(epoch=0, drop=True), norm.isel(epoch=1, drop=True)
    grown = abs(end / start.where(start > 0) - 1).max(["layer", "node"])
    return Finding(grown.notnull() & per_point(ds, lambda point: point.student.batch_norm != "none"), grown)


def _balance(ds: xr.Dataset, experiment: Experiment) -> Finding:
    return Finding(*conservation.balance_kept(ds, TOLERANCE))


def _critical(member: Member) -> bool:
    """Whether |g_1k| ≤ `CRITICAL` |v_k|ᵀ (|f*| + |f|) for every node and sample; two-layer.

    g_1k is v_kᵀ (f* − f) times the gate, so both sides scale alike with fan-outs and outputs.  On the evaluation set as
    on the training set: the theorem asks for small gradients at all inputs, a student that only fits its training
    samples has none at these, and observers are looked for among evaluation samples.
    """
    student = member.student
    for x in (member.training_inputs, member.evaluation_inputs):
        g = theory.backpropagated_gradient(student, member.teacher, x, 1).abs().amax(0)
        size = ((member.teacher(x).abs() + student(x).abs()) @ student.weights[1].abs()).amax(0)
        if not bool((g <= CRITICAL * size).all()):
            return False
    return True


def unaligned(member: Member) -> tuple[list[alignments.ClusterFanout], bool]:
    """Groups of co-linear student nodes aligned with no teacher node, and whether each is observed with full rank.

    A group is observed with full rank if the fan-outs of the student nodes active at its boundary span the outputs.

    Examples:
        >>> import tsdyn
        >>> from tsdyn.analysis import members, theorems
        >>> ds = tsdyn.open("runs/quickstart").isel(overrealization=0, seed=0, epoch=-1)
        >>> groups, all_observed = theorems.unaligned(members.member(ds))
        >>> [group.nodes for group in groups]
        []
    """
    student, teacher, x = member.student, member.teacher, member.evaluation_inputs
    near = alignments.separation(teacher) / 2
    groups = [g for g in alignments.cluster_fanouts(teacher, student, near) if g.eps > near]
    eps = member.experiment.record.band * member.experiment.data.std
    sees = alignments.observers(student, student, x, eps) > 0  # (boundary of, seen by); False where no sample is near
    fanouts, outputs = student.weights[-1], student.widths[-1]
    tested = [g for g in groups if int(torch.linalg.matrix_rank(fanouts[:, sees[g.nodes].any(0)])) == outputs]
    return tested, len(tested) == len(groups)


def _theorem_2(member: Member) -> tuple[float, float]:
    if member.student.depth != 2 or not _critical(member):
        return 0.0, np.nan
    groups, _ = unaligned(member)
    strongest = float((member.teacher.weights[1].norm(dim=0) * member.teacher.weights[0].norm(dim=1)).max())
    left = max((g.total for g in groups), default=np.nan)
    return float(bool(groups)), left / (NEGLIGIBLE * strongest) if strongest > 0 else np.nan


def _corollary_1(member: Member) -> tuple[float, float]:
    # a node that is active for every sample is affine there: it has no boundary in the data, and so no observer
    if member.student.depth != 2 or not _critical(member):
        return 0.0, np.nan
    groups, all_observed = unaligned(member)
    student, x = member.student, member.evaluation_inputs
    dropped = [k for g in groups for k in g.nodes]
    fanout = student.weights[1].clone()
    fanout[:, dropped] = 0
    leak = student.activation.leak
    pruned = Network([student.weights[0], fanout], student.biases, student.activation.name, leak=leak or 0.0)
    f = student(x)
    changed = _share(float((pruned(x) - f).norm()), float(f.norm()))
    return float(bool(dropped) and all_observed), changed / NEGLIGIBLE


def _theorem_5(member: Member) -> tuple[float, float]:
    student, teacher = member.student, member.teacher
    x = member.evaluation_inputs[:PIECES]
    eps_0 = alignments.separation(teacher)
    if student.depth == 2 or not student.activation.piecewise_linear or not np.isfinite(eps_0):
        return 0.0, np.nan
    traces = [net.trace(x) for net in (student, teacher)]
    pieces = len(np.unique(torch.cat([gate for t in traces for gate in t.gates[:-1]], 1).numpy(), axis=0))
    # of regular teacher nodes, ‖w*‖ = 1, whose fan-out takes the norm
    pull = theory.coupling(student, teacher, x, 1).A[..., :-1].abs() * teacher.weights[0].norm(dim=1)
    std = member.experiment.data.std
    there = alignments.boundary(teacher, x, member.experiment.record.band * std)[:, None, :]
    there = there & (traces[0].preactivations[0] > 0)[:, :, None]
    least = torch.where(there, pull, torch.inf).amin(0)  # over the regions where k sees j's boundary
    strength = torch.where(there.any(0), least, 0).amax(0)
    g = theory.backpropagated_gradient(student, teacher, member.training_inputs, 1).abs().max()
    reach = 5 * pieces**1.5 * student.widths[0] ** 0.5 * g / torch.where(strength > 0, strength, torch.nan)
    inside = reach <= eps_0 * min(1.0, std)
    best = alignments.alignment(teacher, student).nan_to_num(nan=torch.inf).amin(1)
    bound = reach.clamp(min=10 * TOLERANCE[member.experiment.dtype])
    return float(bool(inside.any())), float((best / bound)[inside].amax()) if bool(inside.any()) else np.nan


def _update_gap(member: Member) -> tuple[float, float]:
    if not (member.student.activation.piecewise_linear and member.teacher.activation.piecewise_linear):
        return 0.0, np.nan
    updates = theory.luck_matters_updates(member.student, member.teacher, member.training_inputs)
    return 1.0, max((u.gap for u in updates[:-1]), default=0.0)


def _strong_first(ds: xr.Dataset, experiment: Experiment) -> Finding:
    low = one_layer(ds[["correlation", "teacher_fanout_norm"]], 1)
    first = specialization.recovery_epoch(low[["correlation"]]).fillna(np.inf)
    strength = low["teacher_fanout_norm"].isel(epoch=0)

    def rank_correlation(epochs: np.ndarray, norms: np.ndarray) -> np.ndarray:
        flat = zip(epochs.reshape(-1, epochs.shape[-1]), norms.reshape(-1, norms.shape[-1]), strict=True)
        real = [(e[~np.isnan(n)], n[~np.isnan(n)]) for e, n in flat]  # padding is no teacher node
        found = [spearmanr(e, n).statistic if len(n) and np.ptp(n) > 0 and len(set(e)) > 1 else np.nan for e, n in real]
        return np.array(found).reshape(epochs.shape[:-1])

    first, strength = xr.broadcast(first.load(), strength.load())
    rho: xr.DataArray = xr.apply_ufunc(rank_correlation, first, strength, input_core_dims=[["teacher_node"]] * 2)
    return Finding(rho.notnull(), 1 + rho)


CLAIMS = (
    Claim(
        "Equation 1",
        f"{TIAN}, Eq. 1",
        "always tested: |E[g fᵀ] + ∂J/∂W| ≤ rounding of E|g||f|, layer by layer, on the training set",
        PARAMETERS,
        of_member=_equation_1,
        squared=True,
        bars=(claims.not_plain,),
    ),
    Claim(
        "Lemma 1",
        f"{TIAN}, Lemma 1; {LUCK}, Theorem 1",
        "piecewise linear ⇒ |g − D(Af* − Bf)| ≤ rounding, every epoch",
        ("lemma1_residual",),
        _lemma_1,
        squared=True,
        bars=(claims.smooth,),
    ),
    Claim(
        "Assumption 1",
        f"{TIAN}, Assumption 1",
        "two teacher nodes or more ⇒ boundaries differ, ε_0 > 10 × rounding (that the data cross them is not tested)",
        ("teacher_weight", "teacher_bias"),
        _assumption_1,
        bars=(claims.one_teacher_node,),
        recorded=True,
    ),
    Claim(
        "Assumption 2",
        f"{TIAN}, Assumption 2",
        "never judged: the margin is max |f|_∞ |g|_∞ over layers and training samples, the least ε of a batch of one",
        PARAMETERS,
        of_member=_assumption_2,
        judged=False,
        squared=True,
        bars=(claims.not_plain,),
    ),
    Claim(
        "Assumption 3",
        f"{TIAN}, Assumption 3",
        "never judged: the margin is τ = min_j N[I_j(ε)]/(εN) on the training set, ε = record.band × data.std",
        PARAMETERS,
        of_member=_assumption_3,
        judged=False,
        bars=(claims.not_plain,),
    ),
    Claim(
        "Theorem 1",
        f"{TIAN}, Theorem 1",
        f"max|g_1k| ≤ {CRITICAL:g} Σ_j |α_kj| (std ‖w*_j‖ + |b*_j|) for every node, std = data.std, and a "
        "teacher node, one of several, observed with α ≠ 0 ⇒ its best ε ≤ ε_0/2 (g on the training set)",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_1,
        squared=True,
        bars=(claims.one_teacher_node,),
    ),
    Claim(
        "Theorem 2",
        f"{TIAN}, Theorem 2",
        f"max|g_1k| ≤ {CRITICAL:g} max |v_k|ᵀ(|f*| + |f|) for every node on training and evaluation samples, co-linear "
        f"students with ε > ε_0/2 whose observers' fan-outs have rank C ⇒ ‖Σ v‖w‖‖ ≤ {NEGLIGIBLE:g} of the largest "
        "teacher's; two-layer",
        PARAMETERS,
        of_member=_theorem_2,
        squared=True,
        bars=(claims.not_plain, claims.not_two_layers),
    ),
    Claim(
        "Corollary 1",
        f"{TIAN}, Corollary 1",
        f"as Theorem 2, for all students with ε > ε_0/2 ⇒ without them the output changes by ≤ {NEGLIGIBLE:g} in norm",
        PARAMETERS,
        of_member=_corollary_1,
        squared=True,
        bars=(claims.not_plain, claims.not_two_layers),
    ),
    Claim(
        "Theorem 3",
        f"{TIAN}, Theorem 3",
        "ε_g = 5 K^{3/2} √d max|g_1| / max|α_kj|‖w*_j‖ ≤ ε_0 min(1, data.std), several teacher nodes ⇒ best ε ≤ ε_g or "
        "10 × rounding (g on the training set, not on its augmentation)",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_3,
        squared=True,
        bars=(claims.one_teacher_node,),
    ),
    Claim(
        "Theorem 4",
        f"{TIAN}, Theorem 4",
        "trained on the teacher-aware augmentation, otherwise as Theorem 3 with ε_g = 5 K^{3/2} max|g_1| / "
        "max|α_kj|‖w*_j‖",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_4,
        squared=True,
        bars=(claims.not_aware, claims.one_teacher_node),
    ),
    Claim(
        "Theorem 5",
        f"{TIAN}, Theorem 5",
        "deeper than two layers, otherwise as Theorem 3 with ε_g = 5 Q^{3/2} √d max|g_1| / max_k min_R "
        f"|α_kj(R)|‖w*_j‖; Q: the linear pieces that {PIECES} samples meet, a lower bound: tested the sharper",
        PARAMETERS,
        of_member=_theorem_5,
        squared=True,
        bars=(claims.not_plain, claims.two_layers, claims.smooth, claims.one_teacher_node),
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
        of_member=_update_gap,
        judged=False,
        squared=True,
        bars=(claims.not_plain, claims.smooth),
    ),
    Claim(
        "E[β f'f'] = E[β] ∘ E[f'f']",
        f"{LUCK}, Assumption 1",
        "an approximation, never judged: the margin is the relative difference of H in its two forms, largest layer",
        PARAMETERS,
        of_member=_factorization,
        judged=False,
        bars=(claims.not_plain,),
    ),
    Claim(
        "weak overlaps",
        f"{LUCK}, Assumption 3",
        "never judged: the margin is the larger of ε_d and ε_l, max_{j≠j'} d*_jj'/d*_jj and l*_jj'/l*_jj, lowest layer",
        PARAMETERS,
        of_member=_weak_overlaps,
        judged=False,
        bars=(claims.not_plain, claims.one_teacher_node),
    ),
    Claim(
        "BatchNorm keeps ‖w‖",
        f"{LUCK}, Theorem 3",
        "BatchNorm in the student ⇒ gradient flow keeps ‖w‖; SGD adds lr²‖∇‖² a step, so never judged: the margin is "
        "the largest relative change of the norm over the run",
        ("conserved_norm",),
        _conserved_norm,
        judged=False,
        bars=(claims.no_batch_norm,),
    ),
    Claim(
        "balance of each node",
        DU,
        "SGD or GD without momentum, σ piecewise linear ⇒ each step changes c_j by exactly η²(‖∂a‖² − ‖∂w‖² − ∂b²), "
        "with rates and weight decay as trained: the last recorded interval, taken again",
        ("balance", *PARAMETERS),
        _balance,
        bars=(claims.not_plain, claims.smooth),
    ),
    Claim(
        "BatchNorm's gradient", f"{LUCK}, Lemma 1", "of one batch, not of an archive: tsdyn.theory.batch_norm_gradient"
    ),
    Claim(
        "projected dynamics",
        f"{LUCK}, Assumption 2, Lemmas 2–4 and Theorem 4",
        "needs β = 11ᵀ and L = I, not a trained student's: tsdyn.theory.luck_matters.projected_dynamics",
    ),
    Claim(
        "two-layer dynamics",
        f"{LUCK}, Lemmas 5–7 and Theorem 5",
        "needs the approximate dynamics, not SGD's: tsdyn.theory.luck_matters.two_layer_dynamics",
    ),
)
