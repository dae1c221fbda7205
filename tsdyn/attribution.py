"""Which samples decided: scores of every training sample, and how well they predict training without some.

A score (seed, sample) is the derivative dO/dw_i of an outcome O in the weight w_i = 1 of a sample, or an approximation
of it: `influence` (at convergence), `tracin` (along the recorded epochs), and `tsdyn.sensitivity`'s d_sample, which is
exact.  The truth is an atlas: an archive of ``data.leave_out``, whose members differ only in which samples they see.

Sources: Koh & Liang 2017 (arXiv:1703.04730); Pruthi et al. 2020 (arXiv:2002.08484); Park et al. 2023
(arXiv:2303.14186).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata
from torch import Tensor

from tsdyn import derivatives
from tsdyn.analysis.identity import points
from tsdyn.analysis.members import PARAMETERS, Member, member
from tsdyn.archive import reading
from tsdyn.engine.rule import Rule
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network

#: A number that a student gives: (member) → O, differentiable in the student's parameters.
Outcome = Callable[[Member, Network], Tensor]

KOH = "Koh & Liang 2017 (arXiv:1703.04730)"
PRUTHI = "Pruthi et al. 2020 (arXiv:2002.08484)"
PARK = "Park et al. 2023 (arXiv:2303.14186)"
#: Variables that hold scores in Datasets, in the order in which they are looked for.
_SCORES = ("d_sample", "influence", "tracin", "leave_one_out")


def lds(
    scores: xr.DataArray | xr.Dataset,
    atlas: xr.Dataset | str | Path,
    *,
    of: str | xr.DataArray = "loss_eval",
    confidence: float = 0.95,
    resamples: int = 1000,
) -> xr.Dataset:
    """Linear datamodeling score: how well sums of scores rank what training on each subset gives.

    Of every seed, and of every entry of dimensions that scores and outcomes share, the Spearman correlation over
    subsets of Σ_{i kept} score_i with the retrained O.

    Args:
        scores: (seed, sample), or (sample,) for all seeds alike; further dimensions, such as evaluation samples, are
            those of the outcome.  Of a Dataset ``d_sample``, ``influence``, ``tracin`` or ``leave_one_out`` is taken.
        atlas: Archive of ``data.leave_out``, or its path; or any Dataset with ``kept`` (subset, sample) and an outcome.
        of: The outcome O: the name of a variable of the atlas, or a DataArray (subset, seed, ...) computed from it; at
            the last epoch.
        confidence: Of the intervals, by bootstrap over subsets.
        resamples: Of the bootstrap.

    Returns:
        ``lds`` (seed, ...), ``lds_interval`` (seed, ..., bound), ``ceiling`` (...): the correlation over subsets of the
        mean outcome of one half of the seeds with that of the other, which no score of single seeds' averages exceeds
        (NaN for a single seed), and ``subsets``, the number of subsets with an outcome (seed, ...).

    Raises:
        ValueError: if the atlas has no subsets, or samples or seeds do not fit.

    Source: Park et al. 2023 (arXiv:2303.14186), section 2.

    Examples:
        >>> import numpy as np, xarray as xr
        >>> from tsdyn import attribution
        >>> kept = xr.DataArray(np.random.default_rng(0).random((20, 6)) < 0.5, dims=("subset", "sample"))
        >>> scores = xr.DataArray([3.0, 1.0, -2.0, 0.5, 4.0, -1.0], dims="sample")
        >>> outcome = (kept * scores).sum("sample")  # an outcome that is a sum over samples is ranked exactly
        >>> float(attribution.lds(scores, xr.Dataset({"kept": kept}), of=outcome).lds.round(12))
        1.0
    """
    outcome, kept = _atlas(atlas, of)
    score = _score(scores)
    if "sample" not in score.dims:
        raise ValueError(f"lds: scores have dimensions {score.dims}; sample is needed")
    if score.sizes["sample"] != kept.sizes["sample"]:
        raise ValueError(
            f"lds: scores are of {score.sizes['sample']} samples, the atlas of {kept.sizes['sample']}; both must be of "
            "one training set"
        )
    if "sample" in score.coords:  # rows of kept are samples 0, 1, ... of the training set
        absent = sorted(set(range(kept.sizes["sample"])) - set(score["sample"].values.tolist()))
        if absent:
            raise ValueError(f"lds: scores lack the samples {absent[:5]} of the training set")
        score = score.sel(sample=np.arange(kept.sizes["sample"])).drop_vars("sample")
    if "seed" in score.dims and "seed" in outcome.dims:
        missing = sorted(set(outcome["seed"].values.tolist()) - set(score["seed"].values.tolist()))
        if missing:
            raise ValueError(f"lds: scores lack the seeds {missing[:5]} of the atlas; each seed has samples of its own")
        score = score.sel(seed=outcome["seed"].values)
    foreign = [d for d in score.dims if d not in outcome.dims and d != "sample"]
    if foreign:
        raise ValueError(f"lds: scores have dimensions {foreign} that the outcome has not; select one")
    weights = kept.astype(float)
    predicted = xr.dot(weights, score.astype(float), dim="sample")
    predicted, outcome = xr.broadcast(predicted, outcome)
    order = ("subset", *(d for d in outcome.dims if d != "subset"))
    x, y = (a.transpose(*order).load() for a in (predicted, outcome))
    found = _spearman(x.values, y.values)
    draws = np.random.default_rng(0)
    count = x.sizes["subset"]
    again = [_spearman(x.values[rows], y.values[rows]) for rows in draws.integers(0, count, (resamples, count))]
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        ends = np.stack([_quantile(np.stack(again), q) for q in (tail, 1 - tail)], -1)
    rest = order[1:]
    coords = {d: outcome[d].variable for d in rest if d in outcome.coords}
    attrs = {"units": "1", "source": PARK}
    result = xr.Dataset(
        {
            "lds": (rest, found, {**attrs, "long_name": "Spearman correlation of predicted and retrained outcome"}),
            "lds_interval": ((*rest, "bound"), ends, {**attrs, "long_name": f"{confidence:.0%} bootstrap interval"}),
            "subsets": (rest, np.isfinite(y.values).sum(0), {**attrs, "long_name": "subsets with an outcome"}),
        },
        {**coords, "bound": ["low", "high"]},
    )
    return result.assign(ceiling=_ceiling(y))


def _ceiling(outcome: xr.DataArray) -> xr.DataArray:
    attrs = {"units": "1", "source": PARK, "long_name": "Spearman correlation of one half of the seeds with the other"}
    if outcome.sizes.get("seed", 1) < 2:
        nothing = outcome.isel(subset=0, drop=True)
        nothing = nothing.isel(seed=0, drop=True) if "seed" in nothing.dims else nothing
        return xr.full_like(nothing, np.nan).assign_attrs(attrs)
    middle = outcome.sizes["seed"] // 2
    halves = [outcome.isel(seed=part).mean("seed") for part in (slice(None, middle), slice(middle, None))]
    rest = [d for d in halves[0].dims if d != "subset"]
    values = _spearman(*(half.transpose("subset", *rest).values for half in halves))
    return xr.DataArray(values, {d: halves[0][d] for d in rest if d in halves[0].coords}, rest, attrs=attrs)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the first axis, leaving out entries where either is not finite; NaN for fewer than 3
    or where one is constant.
    """
    flat_x, flat_y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    found = np.full(flat_x.shape[1], np.nan)
    for column, (a, b) in enumerate(zip(flat_x.T, flat_y.T, strict=True)):
        there = np.isfinite(a) & np.isfinite(b)
        if there.sum() >= 3 and np.ptp(a[there]) > 0 and np.ptp(b[there]) > 0:
            found[column] = np.corrcoef(rankdata(a[there]), rankdata(b[there]))[0, 1]
    return found.reshape(x.shape[1:])


def _quantile(values: np.ndarray, q: float) -> np.ndarray:
    found = np.full(values.shape[1:], np.nan)
    there = np.isfinite(values).any(0)
    found[there] = np.nanquantile(values[:, there], q, axis=0)
    return found


def _score(scores: xr.DataArray | xr.Dataset) -> xr.DataArray:
    if isinstance(scores, xr.DataArray):
        return scores.reset_coords(drop=True)
    name = next((name for name in _SCORES if name in scores), None)
    if name is None:
        raise ValueError(f"lds: the Dataset has none of {', '.join(_SCORES)}; give the DataArray of scores")
    return scores[name].reset_coords(drop=True)


def _atlas(atlas: xr.Dataset | str | Path, of: str | xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The outcome (subset, ...) at the last epoch, and kept (subset, sample)."""
    ds = atlas if isinstance(atlas, xr.Dataset) else reading.open(atlas)
    if isinstance(of, str) and of not in ds:
        raise ValueError(f"lds: the atlas has no {of}; it has {', '.join(map(str, ds.data_vars))}")
    outcome = ds[of] if isinstance(of, str) else of
    if "kept" not in ds or "subset" not in outcome.dims:
        raise ValueError("lds: the atlas has no kept (subset, sample); it is an archive of data.leave_out")
    outcome = outcome.isel(epoch=-1, drop=True) if "epoch" in outcome.dims else outcome
    return outcome.reset_coords(drop=True), ds["kept"].reset_coords(drop=True).drop_vars("sample", errors="ignore")


# --- scores ----------------------------------------------------------------------------------------------------------


def influence(
    archive: xr.Dataset | str | Path, *, of: str | Outcome = "loss_eval", epoch: int | None = None, damping: float = 0.0
) -> xr.Dataset:
    """Influence functions at a minimum: ``influence`` (seed, sample), dO/dw_i = −∇Oᵀ H⁻¹ ∇ℓ_i / N.

    H is the Hessian of the training loss, with the weight decay; exact where the student is at a minimum of it, and as
    wrong elsewhere as the minimum is far.

    Args:
        archive: A run with weights, finite data and no augmentation, or its path; or one point of a sweep.
        of: The outcome: ``"loss_eval"``, ``"mse_eval"``, or a function (member, network) → tensor.
        epoch: At which the student is taken; the last unless given.
        damping: Added to the Hessian's diagonal, beside the weight decay.

    Raises:
        ValueError: where the Hessian is not positive definite (raise damping), and as `tracin`.

    Source: Koh & Liang 2017 (arXiv:1703.04730), Eq. 2.

    Examples:
        >>> import tsdyn
        >>> from tsdyn import attribution
        >>> linear = tsdyn.Experiment(
        ...     name="linear", teacher={"widths": [4, 2], "init": "gaussian"},
        ...     data={"train": 20, "eval": 20, "noise": 0.5},
        ...     student={"widths": [4, 2], "activation": "identity"}, record={"observables": ["loss", "weight"]},
        ...     training={"method": "gd", "epochs": 2, "steps_per_epoch": 500, "learning_rate": 0.3},
        ... )
        >>> attribution.influence(tsdyn.run(linear, "runs/linear")).influence.dims
        ('seed', 'sample')
    """

    def score(of_member: Member, _: int) -> Tensor:
        slope, gradients, network, x, y = _derivatives(of_member, outcome)
        training, loss = of_member.experiment.training, of_member.loss
        module = network.to_torch()
        hessian = derivatives.hessian(module, loss.value, x, y)
        decay = [training.weight_decay if training.decay_biases or p.ndim > 1 else 0.0 for p in module.parameters()]
        diagonal = torch.cat([
            torch.full((p.numel(),), d, dtype=hessian.dtype) for p, d in zip(module.parameters(), decay, strict=True)
        ])  # fmt: skip
        hessian = hessian + torch.diag(diagonal + damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            least = float(torch.linalg.eigvalsh(hessian)[0])
            raise ValueError(
                f"influence: the Hessian of seed {of_member.seed} has the eigenvalue {least:.3g}: the student is at no "
                "minimum, or has directions in which the loss does not change; give damping, above "
                f"{max(-least, 0):.3g}"
            )
        solved = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        return -(gradients @ solved) / len(x)

    outcome = _outcome(of)
    return _scores(archive, score, [epoch], "influence", "influence of the sample's weight at the minimum", KOH)


def tracin(
    archive: xr.Dataset | str | Path, *, of: str | Outcome = "loss_eval", epochs: list[int] | None = None
) -> xr.Dataset:
    """Gradient products along training: ``tracin`` (seed, sample), −Σ_e (η_e steps/N) ∇O(θ_e)·∇ℓ_i(θ_e).

    Each recorded epoch before the last stands for all epochs up to the next one, with the rates of these; the sum is
    what dO/dw_i would be if no step changed what later ones do.

    Args:
        archive, of: As in `influence`.
        epochs: The recorded epochs that are summed; all unless given.

    Raises:
        ValueError: if weights were not recorded, samples are new at every step, or the student is no fully connected
            one.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), Eq. 4.

    Examples:
        >>> import tsdyn
        >>> from tsdyn import attribution
        >>> run = tsdyn.open("runs/quickstart").isel(overrealization=0)
        >>> attribution.tracin(run, epochs=[0, 6, 12]).tracin.dims
        ('seed', 'sample')
    """
    ds = archive if isinstance(archive, xr.Dataset) else reading.open(archive)
    chosen = [int(e) for e in (ds["epoch"].values if epochs is None else epochs)]
    if len(chosen) < 2:
        raise ValueError(f"tracin: epochs {chosen}; two at least, the last of which ends the training")
    until = dict(itertools.pairwise(chosen))

    def score(of_member: Member, epoch: int) -> Tensor:
        slope, gradients, _, x, _ = _derivatives(of_member, outcome)
        training = of_member.experiment.training
        time = sum(
            float(Rule.of(training, e).learning_rate) * of_member.experiment.steps
            for e in range(epoch + 1, until[epoch] + 1)
        )
        return -time / len(x) * (gradients @ slope)

    outcome = _outcome(of)
    return _scores(ds, score, list(chosen[:-1]), "tracin", "gradient products summed over epochs", PRUTHI)


def leave_one_out(archive: xr.Dataset | str | Path, *, of: str | Outcome = "loss_eval") -> xr.Dataset:
    """Exact leave-one-out of a linear student at its minimum: ``leave_one_out`` (seed, sample), O − O without sample i.

    By Sherman and Morrison: with H = Σ_j x_j x_jᵀ + N λ (inputs with a 1 for the bias), h_i = x_iᵀ H⁻¹ x_i and residual
    r_i = y_i − f_i, the minimum without sample i is θ − H⁻¹ x_i r_iᵀ / (1 − h_i).

    Raises:
        ValueError: for a student of more than one layer or another loss than the squared error, and as `tracin`.

    Examples:
        >>> import tsdyn
        >>> from tsdyn import attribution
        >>> linear = tsdyn.Experiment(
        ...     name="linear", teacher={"widths": [4, 2], "init": "gaussian"},
        ...     data={"train": 20, "eval": 20, "noise": 0.5},
        ...     student={"widths": [4, 2], "activation": "identity"}, record={"observables": ["loss", "weight"]},
        ...     training={"method": "gd", "epochs": 2, "steps_per_epoch": 500, "learning_rate": 0.3},
        ... )
        >>> run = tsdyn.run(linear, "runs/linear")
        >>> exact, near = attribution.leave_one_out(run).leave_one_out, attribution.influence(run).influence
        >>> bool(abs(exact - near).max() < abs(exact).max())  # influence is its first order
        True
    """

    def score(of_member: Member, _: int) -> Tensor:
        network, training = of_member.student, of_member.experiment.training
        if network.depth != 1 or training.loss != "mse" or training.frozen:
            raise ValueError(f"leave_one_out: {network!r} with loss {training.loss}; a linear layer with mse is meant")
        x, y = of_member.training_inputs, of_member.training_targets
        bias = network.biases[0]
        full = x if bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)
        decay = torch.full((full.shape[1],), training.weight_decay, dtype=x.dtype)
        if bias is not None and not training.decay_biases:
            decay[-1] = 0
        solved = torch.linalg.solve(full.T @ full + len(x) * torch.diag(decay), full.T).T  # rows H⁻¹ x_i
        residual = y - network(x)
        without = residual / (1 - (full * solved).sum(1))[:, None]
        own = float(outcome(of_member, network))
        found = []
        for direction, step in zip(solved, without, strict=True):
            moved = step[:, None] * direction
            weight = network.weights[0] - moved[:, : x.shape[1]]
            biases = [None if bias is None else bias - moved[:, -1]]
            found.append(own - float(outcome(of_member, network.with_parameters([weight], biases))))
        return torch.tensor(found, dtype=x.dtype)

    outcome = _outcome(of)
    return _scores(
        archive, score, [None], "leave_one_out", "outcome with the sample minus without", "Sherman & Morrison"
    )


def _outcome(of: str | Outcome) -> Outcome:
    def evaluated(value: Callable[[Member, Tensor, Tensor], Tensor]) -> Outcome:
        def outcome(of_member: Member, network: Network) -> Tensor:
            x = of_member.evaluation_inputs
            return value(of_member, network(x), of_member.teacher(x))

        return outcome

    if callable(of):
        return of
    known: dict[str, Outcome] = {
        "loss_eval": evaluated(lambda m, f, target: m.loss.value(f, m.loss.target(target))),
        "mse_eval": evaluated(lambda m, f, target: (f - target).square().mean()),
    }
    if of not in known:
        raise ValueError(f"attribution: of={of!r}; it is {', '.join(known)} or a function of (member, network)")
    return known[of]


def _derivatives(of_member: Member, outcome: Outcome) -> tuple[Tensor, Tensor, Network, Tensor, Tensor]:
    """∇O (parameter,), every ∇ℓ_i (sample, parameter), the student, and its training inputs and targets."""
    network, x, y = of_member.student, of_member.training_inputs, of_member.training_targets
    module = network.to_torch()
    free = [p.detach().clone().requires_grad_() for p in module.parameters()]
    layers, weights, biases = iter(free), [], []
    for bias in network.biases:
        weights.append(next(layers))
        biases.append(None if bias is None else next(layers))
    with torch.enable_grad():
        value = outcome(of_member, network.with_parameters(weights, biases))
        slopes = torch.autograd.grad(value, free, materialize_grads=True)
    gradients = derivatives.per_sample_gradients(module, of_member.loss.value, x, y)
    rows = torch.cat([gradients[name].flatten(1) for name, _ in module.named_parameters()], 1)
    return torch.cat([s.flatten() for s in slopes]), rows, network, x, y


def _scores(
    archive: xr.Dataset | str | Path,
    score: Callable[[Member, int], Tensor],
    epochs: Sequence[int | None],
    name: str,
    long_name: str,
    source: str,
) -> xr.Dataset:
    """Dataset of scores (seed, sample), summed over epochs; NaN for a member that is dead."""
    ds = archive if isinstance(archive, xr.Dataset) else reading.open(archive)
    found = list(points(ds).values())
    if len(found) != 1:
        raise ValueError(f"{name}: the archive holds {len(found)} points of a sweep; select one by its swept keys")
    chosen, experiment = found[0]
    _refuse(experiment, name, ds)
    ds = ds.sel(chosen)
    rows: list[np.ndarray | None] = []
    for seed in np.atleast_1d(ds["seed"].values):
        one = ds.sel(seed=seed) if "seed" in ds.dims else ds
        if int(one["death_epoch"]) >= 0:
            rows.append(None)
            continue
        total: Any = 0.0
        for epoch in epochs:
            at = one[list(PARAMETERS)].isel(epoch=-1) if epoch is None else one[list(PARAMETERS)].sel(epoch=epoch)
            total = total + score(member(at, experiment), int(at["epoch"]))
        rows.append(total.detach().numpy())
    assert isinstance(experiment.data.train, int)
    nothing = np.full(next((len(r) for r in rows if r is not None), experiment.data.train), np.nan)
    values = np.stack([nothing if row is None else row for row in rows])
    attrs = {"units": "1", "long_name": long_name, "source": source}
    coords = {"seed": np.atleast_1d(ds["seed"].values), "sample": np.arange(values.shape[1])}
    return xr.Dataset({name: (("seed", "sample"), values, attrs)}, coords)


def _refuse(experiment: Experiment, caller: str, ds: xr.Dataset) -> None:
    missing = [variable for variable in PARAMETERS if variable not in ds]
    if missing:
        raise ValueError(f"{caller}: the archive has no {', '.join(missing)}; record weight (record.observables)")
    if experiment.deep or experiment.of_own_modules:
        raise ValueError(f"{caller}: is for fully connected students without BatchNorm, which archives rebuild")
    if experiment.data.train == "fresh" or experiment.data.augment != "none":
        raise ValueError(
            f"{caller}: data.train = {experiment.data.train!r}, augment = {experiment.data.augment!r}: no sample is "
            "seen twice, or some were added, so that there is none to attribute to; train on a number of samples"
        )
    if experiment.data.leave_out.subset is not None:
        raise ValueError(f"{caller}: the run leaves samples out; take scores of a run on all samples")


__all__ = ["influence", "lds", "leave_one_out", "tracin"]
