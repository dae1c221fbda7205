"""Measures how far tsdyn agrees with what others published or released, for docs/reproduction.md.

``python -m tests.agreement`` lists the measurements; ``python -m tests.agreement NAME ...`` makes some anew, puts them
into docs/reproduction.json with command, date, processor time and memory, and writes the page.  ``--runs DIR`` keeps
the archives, so that an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import stats
from tsdyn.analysis import specialization, theorems
from tsdyn.analysis.members import member
from tsdyn.studies import deep_layers, simsek2023

import tsdyn
from tests.cases import REFERENCE, orthonormal_teacher
from tests.flow.test_order_parameters import rule, start
from tests.population.test_population import VALUES
from tests.studies.multilayer_statistics import final
from tests.studies.test_two_layer_statistics import ROUNDING, STATISTICS, two_layer
from tsdyn import flow, population, studies, theory

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "docs" / "reproduction.json"
Found = dict[str, Any]


def _compared(what: str, ours: Any, mean: float, deviation: float, count: int) -> Found:
    """Our seeds against the mean and standard deviation of theirs: standard errors and Welch's p."""
    ours = np.asarray(ours, float)
    own = float(ours.std(ddof=1))
    p = None
    if abs(ours.mean() - mean) > ROUNDING and (own > 0 or deviation > 0):
        test = stats.ttest_ind_from_stats(ours.mean(), own, ours.size, mean, deviation, count, equal_var=False)
        p = float(test.pvalue)
    return {
        "what": what, "ours": float(ours.mean()), "ours_error": own / ours.size**0.5, "ours_n": ours.size,
        "theirs": mean, "theirs_error": deviation / count**0.5, "theirs_n": count, "p": p,
        "effect": None if p is None else float((ours.mean() - mean) / ((own**2 + deviation**2) / 2) ** 0.5),
    }  # fmt: skip


QUANTITIES = {
    "eval_loss": "evaluation mse",
    "mean_max_rho_eval": "mean best correlation ρ̄",
    "covered_0.95_eval": "teacher nodes above .95",
}
STAGES = {"init": 0, "epoch5": 5, "last": 30}


def released_two_layer(runs: Path, seeds: int = 64) -> Found:
    """The released two-layer experiment (d = 20) with seeds of our own."""
    rows, starts = [], {}
    for i, row in enumerate(STATISTICS["rows"]):
        ds = tsdyn.run(two_layer(STATISTICS["config"], row).replace({"seeds": seeds}), runs / f"row{i}")
        best = specialization.specialization(tsdyn.layer(ds, 1).sel(epoch=[0, 30])).mean("teacher_node").values
        first, end = best.reshape(seeds, 2).T if best.shape[0] == seeds else best
        name = f"{row['overrealization']}x, p = {row['polarity']}"
        starts[name] = float(np.corrcoef(first, end)[0, 1])
        for stage, epoch in STAGES.items():
            at = tsdyn.layer(ds, 1).sel(epoch=epoch)
            measured = {
                "eval_loss": ds.mse_eval.sel(epoch=epoch),
                "mean_max_rho_eval": specialization.specialization(at).mean("teacher_node"),
                "covered_0.95_eval": specialization.recovered(at, threshold=0.95),
            }
            words = f"{name}, epoch {epoch}"
            for key, values in measured.items():
                told = *row[f"{stage}.{key}"], row["seeds"]
                rows.append(_compared(f"{words}: {QUANTITIES[key]}", values, *told))
    last = [r for r in rows if "epoch 30: mean best" in r["what"] and r["p"] is not None and r["theirs_error"] > 1e-4]
    variance = np.array([1 / r["ours_n"] + 1 / r["theirs_n"] + r["effect"] ** 2 / 2 / (seeds + 8) for r in last])
    effect = float((np.array([r["effect"] for r in last]) / variance).sum() / (1 / variance).sum())
    error = float((1 / variance).sum() ** -0.5)
    pooled = {"effect": effect, "error": error, "p": float(2 * stats.norm.sf(abs(effect) / error)), "of": len(last)}
    return {"rows": rows, "pooled": pooled, "start_correlation": starts}


def released_multilayer(runs: Path) -> Found:
    """The released multilayer experiment: the study's desk run against least and largest of the released seeds."""
    work = studies.load("tian2019-multilayer").EXPERIMENTS["desk"]
    ds = tsdyn.run(work, runs / "multilayer")
    told = json.loads((REFERENCE / "multilayer.json").read_text(encoding="utf-8"))
    rows = []
    for row in told["rows"]:
        ours = final(ds.sel(overrealization=row["overrealization"]))
        for name, values, least, largest in zip(told["quantities"], ours, row["least"], row["largest"], strict=True):
            word = "evaluation mse" if name == "mse_eval" else f"ρ̄ of {name}"
            rows.append(
                {
                    "what": f"{row['overrealization']:g}x: {word}",
                    "ours": float(values.mean()),
                    "ours_error": float(values.std(ddof=1) / values.size**0.5),
                    "ours_n": values.size,
                    "ours_range": [float(values.min()), float(values.max())],
                    "theirs_range": [least, largest],
                    "theirs_n": row["seeds"],
                }
            )
    return {"rows": rows}


def _difference(what: str, ours: Any, theirs: Any) -> Found:
    ours, theirs = np.asarray(ours, float).ravel(), np.asarray(theirs, float).ravel()
    return {
        "what": what,
        "values": theirs.size,
        "largest": float(np.abs(ours - theirs).max()),
        "size": float(np.abs(theirs).max()),
    }


def one_neuron(_: Path) -> Found:
    """One neuron against k teacher nodes: optimal losses and norms."""
    rows = []
    for name, told in json.loads((REFERENCE / "copy_average.json").read_text(encoding="utf-8")).items():
        best = [population.one_neuron(name, int(k)) for k in told]
        rows.append(_difference(f"{name}: L*(k), k = 1..12", [b.loss for b in best], [r["L"] for r in told.values()]))
        pairs = [("r", "norm r"), ("a", "outgoing weight a")] if name == "erf" else [("ra", "r a")]
        own = {"r": [b.norm for b in best], "a": [b.outgoing for b in best]}
        own["ra"] = [b.norm * b.outgoing for b in best]
        rows += [_difference(f"{name}: {w}", own[key], [r[key] for r in told.values()]) for key, w in pairs]
    others = {key: value for key, value in VALUES.items() if key[0] not in ("erf", "relu")}
    ours = [population.one_neuron(name, k).loss for name, k in others]
    rows.append(_difference("tanh, sigmoid, softplus: L*(2)", ours, list(others.values())))
    for name, told in {"erf": 1, "sigmoid": 1, "tanh": 1, "softplus": 1, "relu": 2}.items():
        low, high = (population.one_neuron(name, k).loss for k in (8, 12))
        slope = float(np.log(high / low) / np.log(12 / 8))
        rows.append(
            {"what": f"{name}: growth of L*(k), slope of its logarithm, k = 8 to 12", "ours": slope, "theirs": told}
        )
    return {"rows": rows}


#: (n, k) → loss of the perturbed n-copy of erf, seed-free; THEORY section 7 of the project's notes.
PERTURBED = {(4, 6): 0.04403587491622, (5, 6): 0.02228060126859}


def perturbed_copies(runs: Path) -> Found:
    """Perturbed copies: losses, and from which n/k on they are lower than the best copy-average point."""
    teachers = {k: orthonormal_teacher(k) for _, k in PERTURBED}
    ours = [
        float(population.loss(population.perturbed_copy(teachers[k], n), teachers[k]).detach()) for n, k in PERTURBED
    ]
    rows: list[Found] = [_difference("erf: loss at (n, k) = (4, 6), (5, 6)", ours, list(PERTURBED.values()))]
    for k in (8, 12, 16, 24):
        n = population.phase_boundaries(k).attrs["perturbed_copy_below_from"]
        rows.append(
            {"what": f"erf, k = {k}: perturbed copy lower from n/k on", "ours": [(n - 1) / k, n / k], "theirs": 0.76}
        )
    sizes = [(8, 14, 20), *((n, _first_higher(n), 20) for n in STUDENTS), *MANY]
    return {"rows": rows, "seeds": [_ends(*size, runs / "copies-{}-{}-{}".format(*size)) for size in sizes]}


#: Widths of students that are run at the first k at which the perturbed copy has the higher loss.
STUDENTS = range(8, 21)
#: (n, k, seeds): sizes at which more seeds are run.
MANY = ((18, 25, 100),)


def _first_higher(n: int) -> int:
    """The least k at which the perturbed n-copy has a higher loss than the best copy-average point."""
    for k in range(n + 1, 2 * n):
        teacher = orthonormal_teacher(k)
        perturbed = float(population.loss(population.perturbed_copy(teacher, n), teacher).detach())
        if perturbed > population.one_neuron("erf", k - n + 1).loss:
            return k
    raise AssertionError(f"no k below {2 * n}")  # n/k = .76 is passed long before


def _ends(n: int, k: int, seeds: int, path: Path) -> Found:
    """At which point seeds of erf end, and the losses and numbers of negative curvatures of both."""
    work = simsek2023.flows(f"copies-{n}-{k}", ((n, k),), seeds=seeds)
    found = simsek2023.ends(tsdyn.run(work, path)).squeeze("point")
    classes = found["class"].values.tolist()
    told = {name: classes.count(name) for name in ("copy-average", "perturbed-copy", "other")}
    losses = [f"{name}_{point}" for name in ("loss", "index") for point in ("copy_average", "perturbed_copy")]
    return {"n": n, "k": k, "seeds": seeds, **told, **{name: float(found[name]) for name in losses}}


def online(_: Path) -> Found:
    """Online learning: the equation against the simulator's own, and simulations against simulations."""
    rows = []
    for name, case in json.loads((REFERENCE / "nn2pp.json").read_text(encoding="utf-8"))["cases"].items():
        ours, theirs = [], []
        for seed, told in case["seeds"].items():
            ds = flow.order_parameters(*start(case, seed), alpha=told["ode"]["alpha"], **rule(case))
            ours.append(ds.eg.values)
            theirs.append(told["ode"]["eg"])
        rows.append(_difference(f"{name}: eg(α) of the equation, {len(ours)} starts", ours, theirs))
    return {"rows": rows}


def theorem_2(runs: Path) -> Found:
    """Theorem 2 where gradients vanish on training samples only, and where they vanish on new samples, too."""
    desk = studies.load("theorems").EXPERIMENTS["desk"]
    wide = dict(desk.sweep["points"][-1])
    rows = []
    for samples in (100, 300, 1000):
        changed = {"name": "theorem-2", "seeds": 8, "sweep": {}, "data.train": samples, "data.eval": 2000}
        work = desk.replace(changed | {"data.augment": "none"} | wide)
        ds = tsdyn.run(work, runs / f"theorem-2-{samples}").isel(epoch=-1).load()
        for seed in range(8):
            one = member(ds.sel(seed=seed), work)
            groups, _ = theorems.unaligned(one)
            if groups:
                rows.append({"samples": samples, "seed": seed, **_left(one, groups)})
    return {"members": rows}


def _left(one: Any, groups: Any) -> Found:
    """Largest relative gradient on training and on new samples, and the largest fan-out left, over the strongest's."""
    student, teacher = one.student, one.teacher
    new = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(7), dtype=one.training_inputs.dtype)
    found = {}
    for name, x in (("training", one.training_inputs), ("new", new)):
        g = theory.backpropagated_gradient(student, teacher, x, 1).abs().amax(0)
        size = ((teacher(x).abs() + student(x).abs()) @ student.weights[1].abs()).amax(0)
        found[name] = float((g / size).max())
    strongest = float((teacher.weights[1].norm(dim=0) * teacher.weights[0].norm(dim=1)).max())
    return found | {"left": max(group.total for group in groups) / strongest}


def batch_norm(runs: Path) -> Found:
    """BatchNorm in the small model: the same seeds with and without it, by rate and epoch, of both teachers."""
    sizes = studies.load("tian2019-sizes").EXPERIMENTS["desk"]
    own = {"name": "batch-norm", "seeds": 16, "data.eval": 1024, "training.epochs": 20, "record.every": 10}
    places = {"student.batch_norm": ["none", "after"]}
    small = {"teacher.widths": [20, 10, 15, 20, 25, 100]}
    works = {
        "teacher of 2019": sizes.replace(
            own | small | {"sweep": places | {"training.learning_rate": [1e-5, 1e-4, 1e-3]}}
        ),
        "teacher of the 2020 code": studies.load("tian2019-multilayer").EXPERIMENTS["desk"].replace(
            own | {"student.overrealization": 2.0, "data.train": 6_000}
            | {"sweep": places | {"training.learning_rate": [0.0004, 0.004, 0.02]}}
        ),
    }  # fmt: skip
    rows = []
    for name, work in works.items():
        found = deep_layers.measure(tsdyn.run(work, runs / name.replace(" ", "-")))["mse_eval"]
        for rate in found["learning_rate"].values:
            for epoch in (10, 20):
                pair = found.sel(learning_rate=rate, epoch=epoch)
                with_, without = (pair.sel(batch_norm=place) for place in ("after", "none"))
                rows.append({"teacher": name, "rate": float(rate), "epoch": epoch, **_paired(with_, without)})
    return {"pairs": rows}


def _paired(with_: xr.DataArray, without: xr.DataArray) -> Found:
    """Ratio of paired losses: geometric mean with its 95 % interval (t of logarithms), medians, and diverged seeds."""
    ratio = np.log(with_.values / without.values)
    there = np.isfinite(ratio)
    found: Found = {
        "with": float(np.nanmedian(with_)), "without": float(np.nanmedian(without)), "pairs": int(there.sum()),
        "diverged": [int((~np.isfinite(v.values)).sum()) for v in (with_, without)],
        "lower": int((ratio[there] < 0).sum()),
    }  # fmt: skip
    if there.sum() > 2:
        half = stats.t.ppf(0.975, there.sum() - 1) * ratio[there].std(ddof=1) / there.sum() ** 0.5
        found |= {
            "ratio": float(np.exp(ratio[there].mean())),
            "interval": np.exp(ratio[there].mean() + np.array([-half, half])).tolist(),
        }
    return found


def convnet_rates(runs: Path) -> Found:
    """Rates of the ConvNet with the teacher of 2019, without and with BatchNorm: loss and ρ̄ of the lowest layer."""
    desk = studies.load("tian2019-luck").EXPERIMENTS["desk"]
    kind = deep_layers.networks([10, 15, 20, 25], 6)[1] | {"training.steps_per_epoch": 90}
    rates = {"none": [1e-8, 3e-8, 1e-7], "after": [1e-5, 3e-5, 1e-4]}
    rows = []
    for place, listed in rates.items():
        changed = {"name": "convnet-rates", "seeds": 2, "training.epochs": 8, "record.every": 4}
        swept = {"sweep": {"training.learning_rate": listed}, "student.batch_norm": place}
        found = deep_layers.measure(tsdyn.run(desk.replace(changed | swept | kind), runs / place)).isel(epoch=-1)
        for rate in listed:
            one = found.sel(learning_rate=rate)
            mse, rho = one["mse_eval"].values, one["mean_specialization"].median("seed").values
            rows.append(
                {"batch_norm": place, "rate": rate, "mse": mse.tolist(), "rho": rho.tolist(), "epochs": 8, "seeds": 2}
            )
    return {"rates": rows}


#: Name → what is measured.
AGREEMENTS: Mapping[str, Callable[[Path], Found]] = {
    "two-layer": released_two_layer,
    "multilayer": released_multilayer,
    "one-neuron": one_neuron,
    "perturbed-copies": perturbed_copies,
    "online": online,
    "theorem-2": theorem_2,
    "batch-norm": batch_norm,
    "convnet-rates": convnet_rates,
}


def stored() -> Found:
    """What was measured, by name."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"agreement": {}, "desk": {}}


def _strict(value: Any) -> Any:
    """`value` with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def keep(found: Found) -> None:
    """Write measurements and page."""
    sys.path.insert(0, str(ROOT / "docs"))
    import reproduction

    STORED.write_text(
        json.dumps(_strict(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    reproduction.write()


def made() -> Found:
    """Date, version and commit of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {"date": time.strftime("%Y-%m-%d"), "version": tsdyn.__version__, "commit": commit.strip()}


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("names", nargs="*", choices=[*AGREEMENTS, []])
    asked.add_argument("--runs", type=Path)
    given = asked.parse_args()
    if not given.names:
        print("\n".join(f"{name:18}{(work.__doc__ or '').splitlines()[0]}" for name, work in AGREEMENTS.items()))
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            runs, begin = given.runs or Path(folder), time.process_time()
            resumed = given.runs is not None and any(given.runs.glob("*"))
            found = AGREEMENTS[name](runs)
        cost = {
            "cpu_seconds": round(time.process_time() - begin, 1),
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        known = stored()
        earlier = known["agreement"].get(name, {})
        cost = {key: earlier[key] for key in cost if key in earlier} if resumed and earlier else cost
        known["agreement"][name] = {"command": f"python -m tests.agreement {name}", **made(), **cost, **found}
        keep(known)


if __name__ == "__main__":
    main()
