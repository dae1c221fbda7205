"""Gradient flow and Hessian of the population loss, one thread, ratios from one run.

``OMP_NUM_THREADS=1 python -m tests.benchmarks.population`` prints seconds per seed.  The flow is erf's, n = 8 student
nodes against k = 16, d = 17, from Glorot's start to |∇| < 1e-7, and Newton to the end; beside it SciPy's BDF, rtol
1e-8, the exact Jacobian, one seed after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tests import oracles
from tests.cases import REFERENCE, glorot_students, orthonormal_teacher
from tsdyn import flow
from tsdyn.population.two_layer_loss import PopulationLoss


def seconds(work: Callable[[], object], times: int) -> float:
    """Least time of a few calls."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def flows(members: int, slow_members: int) -> None:
    """Time our flow for all members at once, with the default rtol and with BDF's, and BDF in a loop."""
    loss = PopulationLoss(orthonormal_teacher(16), 8)
    initial = glorot_students(loss, members)
    with torch.no_grad():
        ends, taken = {}, {}
        for rtol, count in ((1e-4, members), (1e-8, slow_members)):
            start = time.perf_counter()
            ds = flow.gradient_flow(loss, initial[:count], rtol=rtol, atol=rtol / 100)
            middle = time.perf_counter()
            ends[rtol] = flow.polish(loss, torch.from_numpy(ds["final"].values))
            taken[rtol] = (time.perf_counter() - start) / count
            kinds = ", ".join(sorted(set(ends[rtol].kind.tolist())))
            print(
                f"flow to |∇| < 1e-7 and polish, rtol {rtol:g}: {taken[rtol]:.3f} s per seed "
                f"({(middle - start) / count:.3f} the flow, {int(ds.steps.sum()) / count:.0f} steps), {count} "
                f"seeds; {kinds}, |∇| at most {float(ends[rtol].gradient_max.max()):.1g}"
            )
        start = time.perf_counter()
        slow = [oracles.gradient_flow(loss, row) for row in initial[:slow_members]]
        bdf = (time.perf_counter() - start) / slow_members
        arrived = flow.polish(loss, torch.from_numpy(np.stack([s.y[:, -1] for s in slow])))
    same = [float((ends[r].loss[:slow_members] - arrived.loss).abs().max()) for r in ends]
    print(f"SciPy BDF, rtol 1e-8, exact Jacobian: {bdf:.3f} s per seed, {slow_members} seeds, without polish")
    print(f"BDF / ours: {bdf / taken[1e-4]:.1f} (rtol 1e-4), {bdf / taken[1e-8]:.1f} (1e-8)")
    print(f"the polished losses differ by {same[0]:.1g}, {same[1]:.1g} at most")


def hessians(members: int, times: int) -> None:
    """Time the closed form, batched, against torch.func of the same loss."""
    loss = PopulationLoss(orthonormal_teacher(16), 8)
    rows = glorot_students(loss, members)
    derived = flow.FunctionLoss(loss.value, loss.parameters)
    apart = float((loss.hessian(rows) - derived.hessian(rows)).abs().max())
    with torch.no_grad():
        ours, theirs = (seconds(partial(f, rows), times) / members * 1e3 for f in (loss.hessian, derived.hessian))
        gradients = [seconds(partial(f, rows), times) / members * 1e3 for f in (loss.gradient, derived.gradient)]
    print(f"Hessian, {loss.parameters} parameters, {members} members: {ours:.3f} ms, torch.func {theirs:.3f} ms,")
    print(f"  {theirs / ours:.1f} times; differ by {apart:.1g}")
    print(f"gradient: {gradients[0]:.4f} ms, torch.func {gradients[1]:.4f} ms, {gradients[1] / gradients[0]:.1f} times")


def order_parameters() -> None:
    """Time nn2pp's cases by the equation, and the simulation per step."""
    cases = json.loads((REFERENCE / "nn2pp.json").read_text(encoding="utf-8"))["cases"]
    for name, case in cases.items():
        K, M, given = case["K"], case["M"], {k: np.array(x) for k, x in case["seeds"]["1"]["ic"].items()}
        begin = [given["Q"].reshape(K, K), given["R"].reshape(K, M), given["T"].reshape(M, M), given["v"], given["A"]]
        how = {"learning_rate": case["lr"], "second_learning_rate": case["lr2"] or 0.0, "noise": case["sigma"]}
        how["activation"] = {"erf": "erf", "lin": "identity"}[case["activation"]]
        equation = seconds(partial(flow.order_parameters, *begin, alpha=[case["alpha_max"]], **how), 2)
        print(f"{name}: equation to alpha = {case['alpha_max']:g} {equation:.2f} s")
        for seeds in (1, 20):
            some = partial(flow.online, *begin, inputs=case["N"], alpha=[1000 / case["N"]], seeds=seeds, **how)
            print(
                f"  simulation, N = {case['N']}, {seeds} seeds: {seconds(some, 2) / 1000 / seeds * 1e6:.0f} µs per step"
            )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--members", type=int, default=20)
    options.add_argument("--slow-members", type=int, default=8)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    hessians(chosen.members, 5)
    hessians(200, 3)
    flows(chosen.members, chosen.slow_members)
    order_parameters()
