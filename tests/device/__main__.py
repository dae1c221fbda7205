"""Test and measure one device: ``python -m tests.device [--device cuda] [--output DIR] [--seconds 300]``.

It needs no network and no files but the checkout.  It runs the tests that need a GPU, compares training, norms,
Jacobians and moments in float64 with the CPU to 1e-10, measures seed-steps per second for ensembles of 1 to 16,384
members (as a recorded graph and without) beside the rate of a large matrix product, and per-sample norms, Jacobians and
moments beside torch.func.  device.json and device.md in the output directory hold the same numbers.  What there is no
time or memory for is left out, and the tables say so.  With ``--device cpu`` sizes are small.  The exit status is 1 if
a test fails or a result is off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from tsdyn import derivatives
from tsdyn.engine import train
from tsdyn.engine.batches import Stream, finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network
from tsdyn.theory import coupling_moments

ROOT = Path(__file__).resolve().parents[2]
AGREEMENT = 1e-10
BATCH, SAMPLES = 16, 64
#: Tests that run on a GPU where there is one, and are skipped elsewhere.
TESTS = ["tests/engine/test_training.py", "tests/running/test_kinds.py", "tests/test_cli.py"]


@dataclass
class Found:
    """The results of one device.

    Attributes:
        device: Its name, and torch's version.
        tests: What pytest said last; empty if it was not asked.
        agreement: Name of a computation → largest difference from the CPU, relative to the largest number.
        gemm: dtype → 10⁹ multiply-adds per second of a large matrix product.
        steps: Rows of network, dtype, members, way, seed-steps per second, share of `gemm`.
        derivatives: Rows of computation, dtype, ms by tsdyn, ms by torch.func.
        left_out: What was not measured, and why.
    """

    device: str
    tests: str = ""
    agreement: dict[str, float] = field(default_factory=dict)
    gemm: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[str, str, int, str, float, float]] = field(default_factory=list)
    derivatives: list[tuple[str, str, float, float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        off = [f"{name}: off by {d:.1e}" for name, d in self.agreement.items() if not d <= AGREEMENT]
        return off + ([f"tests: {self.tests}"] if "failed" in self.tests or "error" in self.tests else [])


class Clock:
    """Measures work on a device, and says how much of the time allowed is left."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], *, least: float = 0.2) -> float:
        """The least of five durations at most, which together take `least` seconds; a first one is not counted."""
        work()
        self.wait()
        best, spent = float("inf"), 0.0
        for _ in range(5):
            start = time.perf_counter()
            work()
            self.wait()
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
            if spent > least:
                break
        return best


# --- networks ------------------------------------------------------------------------------------------------


def networks(*, small: bool) -> dict[str, Network]:
    """A two-layer network, a five-layer one and a ConvNet with BatchNorm, as architectures."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / max(1, shape[-1]) ** 0.5

    def connected(*widths: int) -> Network:
        return Network([normal(n, m) for m, n in itertools.pairwise(widths)], [0.1 * normal(n) for n in widths[1:]])

    channels = (4, 4) if small else (16, 16, 16, 16)
    side = 8 if small else 16
    weights = [normal(n, m, 3, 3) / 3 for m, n in itertools.pairwise((1, *channels))]
    rest = side - 2 * len(channels)
    weights.append(normal(10, channels[-1] * rest * rest))
    norms = [BatchNorm.fresh(n, like=weights[0]) for n in channels]
    convolved = Network(weights, None, norms=norms, norm="before", image=(1, side, side))
    return {
        "two layers": connected(20, 10, 10) if small else connected(100, 50, 50),
        "five layers": connected(10, 12, 12, 12, 12, 5) if small else connected(100, 100, 100, 100, 100, 50),
        "ConvNet": convolved,
    }


def ensemble(network: Network, members: int, dtype: torch.dtype, device: torch.device) -> Ensemble:
    """Members that start at one network, each a little off; drawn on the CPU, so that they are the same everywhere."""
    one = Ensemble.of([network])
    draw = torch.Generator().manual_seed(members)

    def spread(t: Tensor) -> Tensor:
        off = torch.randn(members, *[1] * (t.ndim - 1), generator=draw, dtype=t.dtype)
        return (t * (1 + 0.1 * off)).to(device, dtype).contiguous()

    buffers = {n: t.expand(members, *t.shape[1:]).to(device, dtype).contiguous() for n, t in one.buffers.items()}
    return Ensemble(network.to(dtype).to(str(device)), {n: spread(t) for n, t in one.values.items()}, buffers)


def stream(network: Network, members: int, steps: int, dtype: torch.dtype, device: torch.device) -> Stream:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, SAMPLES, network.widths[0] if network.frame.image is None else _pixels(network), generator=draw)
    y = torch.randn(1, SAMPLES, network.widths[-1], generator=draw)
    rows = torch.randint(0, SAMPLES, (members, steps, BATCH), generator=draw)
    held = [t.to(device, dtype).expand(members, -1, -1).contiguous() for t in (x, y)]
    return finite_stream(held[0], held[1], rows.to(device))


def _pixels(network: Network) -> int:
    assert network.frame.image is not None
    channel, row, column = network.frame.image
    return channel * row * column


def multiply_adds(network: Network) -> float:
    """Of one step of one member: forward, backward but for the lowest layer, and the gradient of every weight."""
    total = 0.0
    for layer, (weight, image) in enumerate(zip(network.weights, network.images, strict=True)):
        pixels = 1 if image is None else image[1] * image[2]
        total += BATCH * weight.numel() * pixels * (3 if layer else 2)
    return total


# --- what is found out ---------------------------------------------------------------------------------------


def run_tests(found: Found) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu or cuda", "-p", "no:cacheprovider", *TESTS]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        found.tests = "failed: no answer within 120 s"
        return
    found.tests = (answer.stdout.strip().splitlines() or [answer.stderr.strip()[-200:]])[-1]


def compare(found: Found, clock: Clock, *, small: bool) -> None:
    """Ten steps, norms, Jacobians and moments in float64, here and on the CPU by the plain formula."""
    here, cpu, wide = clock.device, torch.device("cpu"), torch.float64
    for name, network in networks(small=small).items():
        for label, rule in ("SGD", Rule(1e-2)), ("Adam", Rule(1e-3, "adam", epsilon=1e-2)):
            mine, theirs = (ensemble(network, 3, wide, device) for device in (here, cpu))
            train.train_epoch(mine, stream(network, 3, 10, wide, here), rule, batch=BATCH)
            train.train_epoch(theirs, stream(network, 3, 10, wide, cpu), rule, batch=BATCH, backend=train.GENERAL)
            pairs = [(mine.values[n], t) for n, t in theirs.values.items()]
            found.agreement[f"{label}, {name}"] = max(_apart(a, b) for a, b in pairs)
    for name, work in computations(small=small).items():
        ours, reference = work(wide, here).tsdyn(), work(wide, cpu).plain()
        found.agreement[name] = max(_apart(a, b) for a, b in zip(ours, reference, strict=True))


def _apart(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    return float((found.detach().cpu() - expected.cpu()).abs().max() / expected.abs().max().clamp(min=1e-300))


def measure_products(found: Found, clock: Clock, *, small: bool) -> None:
    n = 512 if small else 8192
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(n, n, dtype=dtype, device=clock.device) for _ in range(2))
        found.gemm[_short(dtype)] = n**3 / clock.seconds(lambda a=a, b=b: a @ b) / 1e9


def measure_steps(found: Found, clock: Clock, *, small: bool) -> None:
    """Seed-steps per second; larger ensembles are left out when the time or the memory is used up."""
    sizes = (1, 4) if small else (1, 4, 16, 64, 256, 1024, 4096, 16384)
    for members, dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        for name, network in networks(small=small).items():
            connected = network.plain
            ways = {"graph": train.CHUNKS, "no graph": train.BATCHED} if connected else {"no graph": train.PROPAGATED}
            for way, backend in ways.items():
                label = f"{name}, {_short(dtype)}, S = {members}, {way}"
                if clock.left() < 0:
                    found.left_out.append(f"{label}: out of time")
                    continue
                try:
                    rate = _rate(clock, network, members, dtype, backend)
                except torch.OutOfMemoryError:
                    found.left_out.append(f"{label}: out of memory")
                    torch.cuda.empty_cache()
                    continue
                share = rate * multiply_adds(network) / 1e9 / found.gemm[_short(dtype)]
                found.steps.append((name, _short(dtype), members, way, rate, share))


def _rate(clock: Clock, network: Network, members: int, dtype: torch.dtype, backend: train.Backend) -> float:
    steps = 20 if clock.device.type == "cpu" or members > 1024 else 100
    block, rule = ensemble(network, members, dtype, clock.device), Rule(1e-4)
    batches = stream(network, members, steps, dtype, clock.device)

    def work() -> None:
        train.train_epoch(block, batches, rule, batch=BATCH, backend=backend)

    return members * steps / clock.seconds(work)


@dataclass(frozen=True)
class Computation:
    """One computation by tsdyn, and by torch.func as a user would write it; both give tensors."""

    tsdyn: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]


def _squared(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(-1).mean()


def computations(*, small: bool) -> dict[str, Callable[[torch.dtype, torch.device], Computation]]:
    """Per-sample norms of two modules, a Jacobian, and moments; each made for a dtype and a device."""
    count = 8 if small else 256
    nets = networks(small=small)

    def module(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        network = nets[name]
        made = network.to(dtype).to(str(device)).to_torch()
        draw = torch.Generator().manual_seed(3)
        pixels = network.frame.image
        shape = (network.widths[0],) if pixels is None else pixels
        x = torch.randn(count, *shape, generator=draw, dtype=torch.float64).to(device, dtype)
        return made, x, torch.randn(count, network.widths[-1], generator=draw, dtype=torch.float64).to(device, dtype)

    def norms(name: str, dtype: torch.dtype, device: torch.device) -> Computation:
        made, x, y = module(name, dtype, device)
        held = {n: p.detach() for n, p in made.named_parameters()}
        buffers = dict(made.named_buffers())

        def one(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return _squared(functional_call(made, {**values, **buffers}, (a[None],)), b[None])

        def plain() -> list[Tensor]:
            slopes = vmap(grad(one), (None, 0, 0))(held, x, y)
            return [torch.stack([g.flatten(1).square().sum(1) for g in slopes.values()]).sum(0).sqrt()]

        return Computation(lambda: [derivatives.per_sample_gradient_norms(made, _squared, x, y)], plain)

    def jacobian(dtype: torch.dtype, device: torch.device) -> Computation:
        made, x, _ = module("two layers", dtype, device)
        held = {n: p.detach() for n, p in made.named_parameters()}

        def plain() -> list[Tensor]:
            of = vmap(jacrev(lambda values, a: functional_call(made, values, (a[None],))[0]), (None, 0))
            return list(of(held, x).values())

        return Computation(lambda: list(derivatives.jacobian(made, x).values()), plain)

    def moments(dtype: torch.dtype, device: torch.device) -> Computation:
        student = nets["five layers"].to(dtype).to(str(device))
        x = torch.randn(count, student.widths[0], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x = x.to(device, dtype)

        def plain() -> list[Tensor]:
            found = []
            for layer in range(1, student.depth):
                below = student.trace(x).activations[layer - 1]
                v = vmap(jacrev(lambda f, layer=layer: _above(student, layer, f)))(below)
                found.append(torch.einsum("sok,soj->kj", v, v) / len(x))
            return found

        return Computation(lambda: coupling_moments.expectations(student, student, x).B, plain)

    return {
        "norms, five layers": lambda dtype, device: norms("five layers", dtype, device),
        "norms, ConvNet": lambda dtype, device: norms("ConvNet", dtype, device),
        "Jacobian, two layers": jacobian,
        "moments, five layers": moments,
    }


def _above(network: Network, layer: int, f: Tensor) -> Tensor:
    """The output from the activation of hidden layer 1, 2, ..."""
    for i in range(layer, network.depth):
        z = network.weights[i] @ f
        bias = network.biases[i]
        z = z if bias is None else z + bias
        f = network.activation(z) if i < network.depth - 1 else z
    return f


def measure_derivatives(found: Found, clock: Clock, *, small: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        for name, work in computations(small=small).items():
            if clock.left() < 0:
                found.left_out.append(f"{name}, {_short(dtype)}: out of time")
                continue
            made = work(dtype, clock.device)
            ours, theirs = (1e3 * clock.seconds(way) for way in (made.tsdyn, made.plain))
            found.derivatives.append((name, _short(dtype), ours, theirs))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- tables --------------------------------------------------------------------------------------------------


def markdown(found: Found) -> str:
    lines = [f"# {found.device}", ""]
    if found.tests:
        lines += [f"Tests: {found.tests}.", ""]
    lines += [
        f"Agreement with the CPU in float64 (relative; {AGREEMENT:g} is allowed):",
        "",
        "| what | off by |",
        "|---|---|",
    ]
    lines += [f"| {name} | {off:.1e} |" for name, off in found.agreement.items()]
    rates = ", ".join(f"{rate:,.0f} GMAC/s in {dtype}" for dtype, rate in found.gemm.items())
    lines += ["", f"A large matrix product: {rates}.  Batches of {BATCH}:", ""]
    lines += [
        "| network | dtype | S | way | seed-steps per second | share of the product's rate |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {n} | {d} | {s} | {w} | {rate:,.0f} | {share:.1%} |" for n, d, s, w, rate, share in found.steps]
    lines += ["", "| computation | dtype | tsdyn, ms | torch.func, ms | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {d} | {a:.2f} | {b:.2f} | {b / a:.2f} |" for n, d, a, b in found.derivatives]
    if found.left_out:
        lines += ["", "Left out: " + "; ".join(found.left_out) + "."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write both files; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.device", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "device")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which nothing new is measured")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests that need a GPU")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: there is no GPU that torch can use; --device cpu runs at small sizes")
    small = device.type == "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as in runs
    clock = Clock(device, given.seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, small sizes"
    found = Found(f"{name}, torch {torch.__version__}")
    if not given.no_tests:
        run_tests(found)
    compare(found, clock, small=small)
    measure_products(found, clock, small=small)
    measure_derivatives(found, clock, small=small)
    measure_steps(found, clock, small=small)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "device.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    (given.output / "device.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    for failure in found.failures():
        print(f"FAILED: {failure}")
    return 1 if found.failures() else 0


if __name__ == "__main__":
    raise SystemExit(main())
