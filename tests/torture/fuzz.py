"""Damaged archives and absurd experiment files, each given to a child with little memory and little time."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import tomli_w
import tsdyn.analysis.audit  # so that no child has to
import typer.main
import xarray as xr
from dask.distributed import Client as Client

import tsdyn
from tests import processes
from tests.cases import small
from tests.torture.harness import FINISHED, SEGMENTED, fork, fresh, same, say_progress, training
from tsdyn import cli
from tsdyn.archive import integrity, reading, run_directory, whole_files
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import estimates, sweep
from tsdyn.running.members import Members

HERE = Path(__file__).resolve().parent
#: What a child may take beyond what it was forked with, for files below 1 MB; seconds of work; seconds in all.
MEMORY, WORK, WALL = 256 << 20, 5, processes.HUNG

# What is alike in all children is made before they are forked: the command's parsers, a quarter of a trial.
typer.main.get_command = functools.cache(typer.main.get_command)


def limited(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` found, in a child of its own; of one that crashed, hung or left a traceback, how."""

    def inside(pipe: int) -> None:
        with open("/proc/self/statm", encoding="ascii") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(WALL)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)  # the HDF5 library complains there
        with dask.config.set(scheduler="synchronous"):
            timed()
            found = work()
        os.write(pipe, b"\xff" + json.dumps(found).encode())

    code, _, words = fork(inside).end()
    if code == FINISHED:
        return json.loads(words)  # type: ignore[no-any-return]
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return {"fate": "hang"}
    return {"fate": "crash" if code < 0 else "traceback", "words": words or f"exit {code}"}


def timed() -> None:
    """What follows has `WORK` seconds of the processor."""
    signal.setitimer(signal.ITIMER_PROF, WORK)


def command(*words: object) -> tuple[int, str]:
    """The command's exit code and what it printed; whatever is no exit is a traceback, and passes through."""
    timed()
    said, argv = io.StringIO(), sys.argv
    sys.argv = ["tsdyn", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = argv
    return 0, said.getvalue()


# --- archives ------------------------------------------------------------------------------------------------


def mutated(raw: bytes, others: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    """Another file than `raw`, and what was done to it."""
    content, size = bytearray(raw), len(raw)

    def span() -> tuple[int, int]:
        at = rng.randrange(size)
        return at, min(size, at + rng.choice((1, 8, 64, 512, 4096)))

    way = rng.choice(("truncated", "flipped", "flipped", "flipped", "overwritten", "spliced", "cut out", "foreign"))
    start, stop = span()
    if way == "truncated":
        del content[rng.choice((0, start)) :]
    elif way == "flipped":
        head = rng.random() < 0.5  # half of them in the first kilobytes, where headers are
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(min(size, 8192) if head else size)] ^= 1 << rng.randrange(8)
    elif way == "overwritten":
        content[start:stop] = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
    elif way == "spliced":
        donor = rng.choice([raw, *others])
        there = rng.randrange(max(1, len(donor)))
        content[start : stop if rng.random() < 0.5 else start] = donor[there : there + stop - start]
    elif way == "cut out":
        del content[start:stop]
    else:
        content = bytearray(rng.choice(others))
    return way, bytes(content)


def archives(scratch: Path, rng: random.Random, number: int) -> str:
    """Archives with a file truncated, flipped, spliced or exchanged: no crash, no hang, no traceback, no wrong number.

    Each is checked, read, shown, audited; some are repaired and all resumed.  A changed file beside which a
    checksum is kept must be named by ``tsdyn validate``, and nothing may be computed from it.
    """
    kinds = ("finished", "going", "sweep")
    swept = SEGMENTED.replace({"sweep": {"teacher.polarity": [0.0, 1.0]}, "training.epochs": 3})
    for name in ("reference", "finished"):
        assert fork(training(scratch / name, 3)).end()[0] == FINISHED
    assert fork(training(scratch / "going", 3, _stop_before_the_end)).end()[0] == FINISHED
    assert fork(lambda _: tsdyn.run(swept, scratch / "sweep") and None).end()[0] == FINISHED
    assert (scratch / "going" / "segments").is_dir()
    assert not any(integrity.check(scratch / kind) for kind in kinds)
    reference = {
        "finished": tsdyn.open(scratch / "reference").load(),
        "going": tsdyn.open(scratch / "going").load(),
        "sweep": tsdyn.open(scratch / "sweep").load(),
    }
    files = {k: sorted(p.relative_to(scratch / k) for p in (scratch / k).rglob("*") if p.is_file()) for k in kinds}
    files = {k: [f for f in found if f.name != "LOCK"] for k, found in files.items()}
    donors = [(scratch / k / f).read_bytes() for k in kinds for f in files[k]]
    experiments = {
        "finished": SEGMENTED.replace({"training.epochs": 3}),
        "going": SEGMENTED.replace({"training.epochs": 3}),
        "sweep": swept,
    }
    fates: Counter[str] = Counter()
    wrong: list[str] = []
    for trial in range(number):
        say_progress(trial, number, fates)
        kind = rng.choice(kinds)
        path = fresh(scratch / "damaged")
        shutil.copytree(scratch / kind, path)
        file = rng.choice([f for f in files[kind] if f.suffix == ".nc"] if rng.random() < 0.8 else files[kind])
        before = (path / file).read_bytes()
        way, content = mutated(before, donors, rng)
        (path / file).write_bytes(content)
        seal = whole_files.seal_of(path / file)
        kept = seal.exists() and rng.random() < 0.8
        if seal.exists() and not kept:  # a seal that agrees with what is there now, or none
            if rng.random() < 0.5:
                seal.unlink()
            else:
                seal.write_text(f"{whole_files.sha256(path / file)}  {file.name}\n")
        repaired, going_on = rng.random() < 0.3, rng.random() < 0.3
        analysed = kind != "sweep" and rng.random() < 0.05  # half a second each
        verbs = ("show", "validate", *(("audit",) if analysed else ()))

        def work(
            path: Path = path,
            kind: str = kind,
            repaired: bool = repaired,
            going_on: bool = going_on,
            verbs: tuple[str, ...] = verbs,
        ) -> dict[str, Any]:
            found: dict[str, Any] = {"fate": "refused", "exits": []}
            for verb in verbs:
                code, said = command(verb, path)
                found["exits"].append(code)
                if verb == "validate":  # exit 1 names the problems, a line each
                    found["problems"] = said.splitlines()[:3] if code == 1 else []
            timed()
            try:
                with tsdyn.open(path) as ds:
                    found["fate"] = "right" if same(ds.load(), reference[kind]) else "wrong"
            except ArchiveError:
                pass
            timed()
            if repaired:
                with contextlib.suppress(ArchiveError):
                    integrity.repair(path)
            timed()
            if repaired or going_on:
                try:
                    with sweep.run(experiments[kind], path) as ds:
                        whole = reference["finished" if kind == "going" else kind]
                        found["gone on"] = "right" if _but_for_nan(ds.load(), whole, repaired) else "wrong"
                except (ArchiveError, ExperimentError) as error:
                    found["gone on"] = f"refused: {error}"
            return found

        found = limited(work)
        changed = content != before
        fates[found["fate"]] += 1
        bad = found["fate"] in ("hang", "crash", "traceback")
        if kept and changed:
            fates["sealed"] += 1
            fates["sealed, wrong when read"] += found["fate"] == "wrong"
            bad = bad or not found.get("problems") or found.get("gone on") == "wrong" or found["fate"] == "wrong"
        if bad:
            wrong.append(f"archive {trial}: {kind}/{file} {way}, seal {'kept' if kept else 'none'}: {found}")
            print(wrong[-1], flush=True)
    text = (
        f"{number} fuzzed archives: {fates['crash']} crashes, {fates['hang']} hangs over {WORK} s, "
        f"{fates['traceback']} tracebacks; of {fates['sealed']} with their checksum kept "
        f"{fates['sealed, wrong when read']} gave a wrong number and {sum('seal kept' in line for line in wrong)} went "
        f"unnamed or wrong in any way; {fates['refused']} refused when read, {fates['right']} read right, "
        f"{fates['wrong']} read as other numbers"
    )
    if wrong:
        raise AssertionError("\n".join([text, *wrong[:40]]))
    return text


def _but_for_nan(found: xr.Dataset, whole: xr.Dataset, repaired: bool) -> bool:
    """Whether all is the same; what `tsdyn repair` could not keep of an archive is NaN, and it says so."""
    if repaired and set(found.variables) == set(whole.variables):
        found = found.fillna(whole)
    return same(found, whole)


def _stop_before_the_end() -> None:
    run_directory.RunDirectory.consolidate = lambda self, attrs: None  # type: ignore[method-assign]
    reading.open = lambda path: None  # type: ignore[assignment]


# --- experiment files ----------------------------------------------------------------------------------------


def _deep(depth: int, leaf: Any) -> Any:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def _absurd(rng: random.Random) -> Any:
    """A value that no key wants, or more of one than anybody has room for."""
    return rng.choice(
        (
            0,
            -1,
            1,
            2,
            10**6,
            10**9,
            2**31,
            2**63,
            10**18,
            10**30,
            -(10**30),
            1e308,
            5e-324,
            -0.0,
            0.5,
            float("nan"),
            float("inf"),
            float("-inf"),
            True,
            False,
            "",
            "x",
            "x" * 10_000,
            "../../etc",
            "/dev/zero",
            "http://host/a#b",
            "\x1b[31m",
            "\u202e",
            "<b>",
            "all",
            "fresh",
            [],
            [0],
            [-1],
            [1.5],
            ["x"],
            [[]],
            [True],
            [10**9, 10**9],
            [1] * 10_000,
            [10**5] * 8,
            list(range(3)),
            {},
            {"a": 1},
            {"0": 0.1},
            {"0": 10**30},
            {"x": {"y": {}}},
            _deep(50, 1),
            {"teacher.polarity": [0.0] * 1000},
        )
    )


def _mutated_experiment(texts: list[str], rng: random.Random) -> str:
    text = rng.choice(texts)
    if rng.random() < 0.3:
        raw = mutated(text.encode(), [t.encode() for t in texts], rng)[1]
        return raw.decode("utf-8", errors="surrogateescape")
    if rng.random() < 0.05:
        opened, closed = rng.choice((("[", "]"), ("{a=", "}")))
        return f"name = {opened * 20_000}1{closed * 20_000}"
    values = tomllib.loads(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        table = values
        while True:
            key = rng.choice([*table, "unknown"])
            if isinstance(table.get(key), dict) and table[key] and rng.random() < 0.9:
                table = table[key]
                continue
            break
        if rng.random() < 0.1:
            table.pop(key, None)
        else:
            table[key] = copy.deepcopy(_absurd(rng))
    try:
        return tomli_w.dumps(values)
    except (ValueError, TypeError):
        return text


def experiments(scratch: Path, rng: random.Random, number: int) -> str:
    """Experiment files with broken text, absurd values, deep nesting: refused by name, or an experiment of some size.

    Each goes through the command up to the point where training would begin; what is accepted is estimated, and drawn
    if it is small.
    """
    folder = HERE.parent.parent / "examples"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.toml"))]
    texts += [
        small().to_toml(),
        small(sweep={"teacher.polarity": [0.0, 1.0], "training.learning_rate": [0.1, 0.2]}).to_toml(),
        small(sweep={"zip": {"teacher.polarity": [0.0, 1.0], "training.batch": [4, 8]}}).to_toml(),
    ]
    fates: Counter[str] = Counter()
    wrong: list[str] = []
    for trial in range(number):
        say_progress(trial, number, fates)
        text = _mutated_experiment(texts, rng)
        file, path = scratch / "fuzzed.toml", fresh(scratch / "out")
        file.write_bytes(text.encode("utf-8", errors="surrogateescape"))

        def work(file: Path = file, path: Path = path) -> dict[str, Any]:
            sweep.run = lambda *_, **__: None  # type: ignore[assignment]
            quiet = ["--quiet"] if rng.random() < 0.5 else []
            code, said = command("run", file, "-o", path, *quiet)
            try:
                accepted = Experiment.from_toml(file)
            except ExperimentError as error:
                return {"fate": "refused" if code == 2 and len(str(error)) < 20_000 else "wrong", "words": said[:300]}
            assert Experiment.from_toml_text(accepted.to_toml()) == accepted
            points = [single for _, single in accepted.points()]
            if len(points) == 1 and estimates.footprint(points[0]).bytes < MEMORY // 8:
                _ = Members(points[0]).ensemble
            return {"fate": "accepted" if code in (0, 1, 2) else "wrong", "words": said[:300]}

        found = limited(work)
        fates[found["fate"]] += 1
        stray = [p.name for p in scratch.iterdir() if p.name not in ("fuzzed.toml", "out")]
        if found["fate"] not in ("refused", "accepted") or stray:
            wrong.append(f"experiment {trial}: {found} {stray}\n{text[:1500]!r}")
    verdict = (
        f"{number} fuzzed experiment files: {fates['crash']} crashes, {fates['hang']} hangs over {WORK} s, "
        f"{fates['traceback']} tracebacks, {fates['wrong']} badly said; {fates['refused']} refused, "
        f"{fates['accepted']} accepted as experiments"
    )
    if wrong:
        raise AssertionError("\n".join([verdict, *wrong[:40]]))
    return verdict
