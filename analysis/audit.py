"""What an archive says about each lemma, theorem and corollary of Tian (2020) and Tian et al. (2019).

A claim has a hypothesis and a conclusion.  A verdict is one of

- ``holds``, ``fails``: the hypothesis is met, and the conclusion does or does not hold;
- ``unmet``: the hypothesis is not met, so nothing is tested;
- ``unrecorded``: the archive lacks what is needed; `used` names it;
- ``untested``: no archive can tell; `used` says what can.

The margin is conclusion over bound: at most 1 where it holds.  Measured at the last epoch unless a claim says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.stats import spearmanr
from tsdyn.analysis import specialization

from tsdyn import layer as one_layer
from tsdyn.experiment import Experiment
from tsdyn.schema import LUCK, TIAN

#: Of the largest quantity: what rounding may leave of an identity.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
#: A critical point: largest |g_1| over samples and nodes.
CRITICAL = 1e-6
VERDICTS = ("holds", "fails", "unmet", "unrecorded", "untested")


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
        needs: Variables of the archive that the check reads; none if no archive can tell.
        check: From those variables of the archive and its experiment; None if no archive can tell.
        otherwise: The verdict without a check: ``untested``, or ``unmet`` where no run of tsdyn meets the hypothesis.
    """

    name: str
    source: str
    says: str
    needs: tuple[str, ...] = ()
    check: Callable[[xr.Dataset, Experiment], Finding] | None = None
    otherwise: str = "untested"


def _all(array: xr.DataArray, value: bool = True) -> xr.DataArray:
    """A constant shaped like `array`."""
    return xr.full_like(array, value, dtype=bool)


def _lemma_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    residual = ds["lemma1_residual"].max("epoch").load()
    return Finding(residual.notnull(), residual / TOLERANCE[experiment.dtype])


def teacher_separation(weight: np.ndarray, bias: np.ndarray) -> np.ndarray | np.float64:
    """(..., node, input), (..., node) -> (...): ε_0, the least ε-alignment of two teacher nodes (Assumption 3).

    Padding (NaN) counts as no node.
    """
    norm = np.linalg.norm(weight, axis=-1)
    w, b = weight / norm[..., None], bias / norm
    cosine = np.einsum("...ji,...ki->...jk", w, w)
    sine = np.linalg.norm(w[..., None, :, :] - cosine[..., None] * w[..., :, None, :], axis=-1)
    eps = np.maximum(sine, np.abs(b[..., :, None] - np.where(cosine < 0, -1, 1) * b[..., None, :]))
    eps[..., np.arange(w.shape[-2]), np.arange(w.shape[-2])] = np.inf
    least: np.ndarray | np.float64 = np.where(np.isnan(eps), np.inf, eps).min((-2, -1))
    return least


def _separation(ds: xr.Dataset) -> xr.DataArray:
    low = one_layer(ds[["teacher_weight", "teacher_bias"]], 1).load()
    widths = int(low["teacher_input_width"].max())
    weight = low["teacher_weight"].isel(input_node=slice(0, widths))
    found: xr.DataArray = xr.apply_ufunc(
        teacher_separation,
        weight,
        low["teacher_bias"],
        input_core_dims=[["teacher_node", "input_node"], ["teacher_node"]],
    )
    return found


def _assumption_1(ds: xr.Dataset, experiment: Experiment) -> Finding:
    eps_0 = _separation(ds)
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
    return Finding(met, (_best(low).where(observed).max("teacher_node")) / (_separation(ds) / 2))


def _theorem_3(ds: xr.Dataset, experiment: Experiment) -> Finding:
    low = _lowest(ds)
    nodes, inputs = low["width"] + low["teacher_width"], low["input_width"]
    pull = abs(low["A"]).where(low["observation"] > 0).max("node")
    reach = 5 * nodes**1.5 * np.sqrt(inputs) * low["gradient_max"].max("node") / pull
    inside = reach <= _separation(ds)
    margin = (_best(low) / reach).where(inside).max("teacher_node")
    return Finding(inside.any("teacher_node"), margin)


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
        "Theorem 1",
        f"{TIAN}, Theorem 1",
        f"max|g_1| ≤ {CRITICAL:g} and a teacher observed with α ≠ 0 ⇒ its best ε ≤ ε_0/2 (g on the training set)",
        ("gradient_max", "observation", "A", "alignment"),
        _theorem_1,
    ),
    Claim(
        "Theorem 2",
        f"{TIAN}, Theorem 2",
        "needs who observes each student boundary: tsdyn.alignment.cluster_fanouts and observers on the members",
    ),
    Claim(
        "Corollary 1",
        f"{TIAN}, Corollary 1",
        "needs the pruned student's outputs: prune the members with ε > ε_0/2 and compare",
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
        "needs training on the teacher-aware augmentation, which no data law gives: tsdyn.alignment.augment_aware",
        otherwise="unmet",
    ),
    Claim("Theorem 5", f"{TIAN}, Theorem 5", "needs the linear pieces of the layers above: Q and α over regions"),
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
        "an approximation below the top weight, never asserted: tsdyn.theory.luck_matters_updates gives its gap",
    ),
    Claim(
        "BatchNorm keeps ‖w‖",
        f"{LUCK}, Theorem 3",
        "needs BatchNorm in the student; these have none",
        otherwise="unmet",
    ),
    Claim(
        "projected dynamics",
        f"{LUCK}, Theorem 4",
        "needs β = 11ᵀ and L = I, not a trained student's",
        otherwise="unmet",
    ),
    Claim("two-layer dynamics", f"{LUCK}, Theorem 5", "needs the approximate dynamics, not SGD's", otherwise="unmet"),
)


def audit(archive: xr.Dataset) -> xr.Dataset:
    """Every claim's verdict and margin on a run or a sweep.

    Args:
        archive: As `tsdyn.open` gives it.

    Returns:
        ``verdict`` (a word of `VERDICTS`) and ``margin`` over (claim, swept..., seed); ``source`` and ``used`` a claim.
        Loaded: one epoch of a few variables.
    """
    experiment = Experiment.from_toml_text(archive.attrs["experiment"])
    shape = archive["death_epoch"]
    alive = shape < 0
    verdicts, margins, used = [], [], []
    for claim in CLAIMS:
        missing = [name for name in claim.needs if name not in archive]
        margin, verdict = xr.full_like(shape, np.nan, dtype=float), xr.full_like(shape, "", dtype="U10")
        if claim.check is None:
            verdict[...] = claim.otherwise
            used.append(claim.says)
        elif missing:
            verdict[...] = "unrecorded"
            used.append(f"record.observables lacks {', '.join(missing)}; {claim.says}")
        else:
            found = claim.check(archive[[*claim.needs, "teacher_weight", "teacher_bias"]], experiment)
            met = (found.met & alive).transpose(*shape.dims).load()
            margin = found.margin.transpose(*shape.dims).load().where(met)
            words = np.where(met & margin.notnull(), np.where(margin <= 1, "holds", "fails"), "unmet")
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
