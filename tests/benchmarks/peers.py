"""tsdyn beside its peers, every ratio from one process and one thread: ``make peers``.

Prints processor time: medians over rounds in which every way takes its turn, and the median over rounds of the best
peer's time to ours.  Results are compared before they are timed.  Peers that are not installed are left out and named.
``python -m tests.benchmarks.peers NAME...`` measures the cells whose names contain one of these words.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
from pathlib import Path

import torch

from tests.benchmarks import peer_derivatives, peer_training
from tests.benchmarks.cells import HEADER, Measured, machine_rates, measured

PACKAGES = ("torch", "jax", "backpack-for-pytorch", "opacus", "curvlinops-for-pytorch", "scipy")


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="cells whose name contains one of these; all if none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each way in a round, at least")
    parser.add_argument("--json", type=Path, help="file for the same numbers")
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    try:
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    except ImportError:
        print("jax is not installed: its columns are empty")
    rates = machine_rates()
    today = datetime.datetime.now(tz=datetime.UTC).date()
    load = os.getloadavg()[0]
    print(f"{today}, {processor()}, one thread, processor time, load {load:.1f} at the start; {versions()}")
    print(f"products of 768 x 768: {rates['float64'] / 1e9:.0f} GFLOP/s in float64, {rates['float32'] / 1e9:.0f} in")
    print(f"float32; filling new memory: {rates['fill'] / 1e9:.1f} GB/s\n\n{HEADER}", flush=True)
    found: list[Measured] = []
    for made in itertools.chain(peer_training.cells(), peer_derivatives.cells()):
        cell = made()
        if asked.words and not any(word in cell.work for word in asked.words):
            continue
        found.append(measured(cell, rounds=asked.rounds, seconds=asked.seconds, rates=rates))
        print(found[-1].row(), flush=True)
    left_out = {f"{m.cell.work}: {name}: {why}" for m in found for name, why in m.left_out.items()}
    if left_out:
        print("\nLeft out:", *sorted(left_out), sep="\n- ")
    behind = [f"{m.cell.work} ({m.ratio:.2f})" for m in found if m.ratio < 1]
    print("\nBehind the best peer:", ", ".join(behind) or "nowhere")
    if asked.json:
        rows = [{"work": m.cell.work, "unit": m.cell.unit, "ratio": m.ratio, "best": m.best, "bound": m.bound,
                 "medians": m.medians} for m in found]  # fmt: skip
        asked.json.write_text(json.dumps({"date": str(today), "load": load, "rates": rates, "cells": rows}, indent=1))


if __name__ == "__main__":
    main()
