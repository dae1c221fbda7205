"""Estimates of what a run will take."""

import itertools
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import tsdyn
from tests import processes
from tests.cases import small
from tests.scale.memory import large
from tsdyn.archive import netcdf
from tsdyn.cli import app
from tsdyn.engine import compiled_sums, native
from tsdyn.running import estimates, runner, sweep
from tsdyn.running.estimates import Footprint, footprint
from tsdyn.running.members import Members

CONVOLUTION = {
    "teacher__convolution": True, "teacher__widths": [256, 3, 4, 10], "teacher__init": "gaussian",
    "data__image": [1, 16, 16], "student__overrealization": 4.0,
}  # fmt: skip


def held(traces):
    tensors = [t for trace in traces for part in vars(trace).values() for t in part]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())  # the output is its own pre-activation


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32"}, CONVOLUTION])
def test_the_traces_that_a_run_keeps_fit_in_its_footprint(changes):
    """Of a channel they hold every pixel.  Parameters and what is twice there for a moment: at most twice as much."""
    experiment = small(seeds=2, data__train=60, data__eval=40, record__observables=["mse_eval"], **changes)
    members = Members(experiment)
    kept = [probe.trace for probe in (*members.eval_probes, *(members.train_probe(i, 0) for i in range(2)))]
    with torch.no_grad():
        student = members.ensemble.network(0).trace(members.train_probe(0, 0).inputs)
    found = held(kept) + held([student])
    assert found <= footprint(experiment).bytes <= 3 * found + 3 * footprint(experiment).records


@pytest.mark.parametrize(("name", "bounded"), [("mse_train", True), ("loss_train", True), ("observation", False)])
def test_traces_on_training_samples_are_announced_as_they_are_held(name, bounded):
    """Of ten times the samples ten times the outputs, and nine traces less than that where outputs are enough."""
    networks = {"teacher__convolution": name != "observation", **(CONVOLUTION if name != "observation" else {})}
    few, many = (
        footprint(small(seeds=2, data__train=n, data__eval=20, record__observables=[name], **networks))
        for n in (10**6, 10**7)
    )
    assert (many.extra == few.extra) == bounded
    outputs = 8 * (10 if bounded else 6)
    inputs = 8 * (256 if bounded else 10)
    grown = many.each - few.each
    assert (grown == 9 * 10**6 * (2 * inputs + 2 * outputs)) == bounded


def test_footprints_add_up_to_that_of_runs_side_by_side():
    """Data padded to the longest, records of a segment once."""
    one, two = (footprint(small(data__train=n, seeds=s)) for n, s in ((100, 2), (1000, 3)))
    both = one + two
    assert both.members == 5
    assert both.each == max(one.each, two.each)
    assert both.bytes >= max(one.bytes, two.bytes)
    assert (one + Footprint()) == one


def test_a_file_takes_what_its_padded_chunks_take(tmp_path):
    """Chunks are declared whole, so those at an edge are padded; headers and the state come on top."""
    experiment = small(
        seeds=2, teacher__widths=[40, 30, 20], student__overrealization=3.0, training__epochs=20,
        training__steps_per_epoch=1, data__train=20, data__eval=20, record__observables=["mse", "weight"],
    )  # fmt: skip
    tsdyn.run(experiment, tmp_path / "run")
    size = (tmp_path / "run" / "archive.nc").stat().st_size
    stored = netcdf.stored_bytes(experiment.layout, experiment.recorded("along"), experiment.dtype, 21)
    assert stored >= netcdf.bytes_per_epoch(experiment.layout, experiment.recorded("along"), experiment.dtype) * 21
    state = 2 * 8 * (90 * 41 + 20 * 91 + 30 * 41 + 20 * 31)
    assert stored < size < 1.02 * stored + 4 * state + 2e5


@pytest.mark.parametrize("train", [400, 4000, "fresh"])
def test_samples_of_training_count_as_far_as_something_is_measured_on_them(train, monkeypatch):
    """With every trial taking one second, what measuring takes is known: the share of samples, epoch by epoch."""
    monkeypatch.setattr(estimates, "quickest", lambda work, times=3: 1.0)
    monkeypatch.setattr(estimates, "QUICK", 0.0)

    def seconds(*names):
        changes = {"data__train": train, "data__eval": 100, "training__epochs": 4, "training__steps_per_epoch": 10}
        return estimates.estimate(small(**changes, record__observables=list(names))).seconds

    training = 4.0  # epochs of one trial, a second each
    measured = 5  # epochs 0 to 4
    assert seconds("mse_eval", "correlation") == pytest.approx(training + measured)
    few, every = (100, 100) if train == "fresh" else (min(train, 512), train)
    assert seconds("mse_eval", "mse_train") == pytest.approx(training + measured * (100 + every) / (100 + few))


def _peak_of_one_segment(path, pipe):
    def held(field):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    runner.COMMIT_SECONDS = 1e9
    tsdyn.run(large(0.004), path / "first")  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = held("VmRSS")
    tsdyn.run(large(0.06), path / "run")
    pipe.send(held("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_writing_a_segment_takes_is_announced(tmp_path):
    """Its file exists once, and is written from where the library made it; 60 MB of records.

    The process is forked from a server that ran nothing.  What that freed while it imported, some 50 MB, is taken again
    without being counted.
    """
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    child = context.Process(target=_peak_of_one_segment, args=(tmp_path, there))
    child.start()
    peak = here.recv() if here.poll(processes.HUNG) else 0
    child.join()
    announced = footprint(large(0.06)).bytes
    assert 0.7 * announced < peak < 1.15 * announced


@pytest.mark.skipif(native.load(compiled_sums.SOURCE, compiled_sums.Job) is None, reason="no compiler here")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_data_that_are_held_turned_are_announced(monkeypatch, dtype):
    """Where as many epochs are recorded as make it pay, and of whole pieces to the byte."""
    experiment = small(
        seeds=2, dtype=dtype, teacher__widths=[5, 9, 3, 2], data__train=64, data__eval=96,
        training__epochs=compiled_sums.OFTEN, record__observables=["loss", "correlation"],
    )  # fmt: skip
    announced = footprint(experiment).bytes
    members = Members(experiment)
    members.draw()
    members.measure(0, ("loss_train", "loss_eval", "correlation"))
    passes = [each for sums in (members.sums._train, members.sums._eval) for each in sums._passes]
    assert len(passes) == 4
    assert all(each._turned is not None for each in passes)
    monkeypatch.setattr(compiled_sums, "OFTEN", compiled_sums.OFTEN + 2)
    assert announced - footprint(experiment).bytes == sum(each._turned.nbytes for each in passes)


@pytest.mark.parametrize(
    "changes", [{}, {"teacher__widths": [5, 4, 3, 2], "student__overrealization": 2.0}, CONVOLUTION]
)
def test_multiply_adds_are_those_that_torch_counts(changes):
    experiment = small(seeds=1, **changes)
    members = Members(experiment)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        members.ensemble.network(0).to_torch()(
            members.eval_probes[0].inputs[:1].unflatten(1, experiment.image or (-1,))
        )
    assert 2 * estimates.multiply_adds(experiment) == counted.get_total_flops()


def test_large_networks_are_tried_for_few_steps(monkeypatch):
    """As many steps and members as fit in the work of a trial, one at least."""
    experiment = small(seeds=4, data__train=200, training__steps_per_epoch=40)
    tried = []
    members = estimates.Members
    monkeypatch.setattr(estimates, "Members", lambda few, device: tried.append(few) or members(few, device))
    each = 3 * estimates.multiply_adds(experiment) * experiment.training.batch
    for steps_of_a_member in (0.5, 3, 12, 1e6):
        monkeypatch.setattr(estimates, "TRIAL_WORK", steps_of_a_member * each)
        estimates._timed(experiment, "cpu", steps=20, train=512, samples=512)
    shapes = [(len(few.seed_labels), few.training.steps_per_epoch) for few in tried]
    assert shapes == [(1, 1), (3, 1), (4, 3), (4, 20)]


def test_runs_that_train_together_are_tried_together(monkeypatch):
    """With as many members as there are in all, 40 at most; what is measured is tried member by member."""
    tried = []
    members = estimates.Members
    monkeypatch.setattr(estimates, "Members", lambda few, device: tried.append(few) or members(few, device))
    experiment = small(seeds=3, data__train=40, data__eval=20, data__leave_out={"subsets": 30, "share": 0.1})
    single = next(iter(sweep.completed(experiment).points()))[1]
    for together in (1, 4, 30):
        estimates._timed(single, "cpu", steps=2, train=512, samples=64, together=together)
    assert [len(few.seed_labels) for few in tried] == [3, 12, 40]


@pytest.mark.parametrize(("taken", "calls"), [(0.1, 3), (4.0, 2), (30.0, 1)])
def test_long_trials_are_not_repeated(taken, calls, monkeypatch):
    clock, done = itertools.count(), []
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: taken * next(clock))
    assert estimates.quickest(lambda: done.append(1)) == pytest.approx(taken)
    assert len(done) == calls


def test_a_command_that_tries_for_long_says_so_first(tmp_path, monkeypatch):
    runs = {"seeds": 2, "training.epochs": 1, "sweep": {"student.overrealization": [1.0, 2.0]}}
    file = tmp_path / "one.toml"
    file.write_text(small().replace(runs).to_toml())
    for rate, said in ((estimates.RATE, False), (1e-3, True)):
        monkeypatch.setattr(estimates, "RATE", rate)
        ended = CliRunner().invoke(app, ["run", str(file), "-o", str(tmp_path / str(said))])
        assert ended.exit_code == 0
        assert ("trying a few steps" in ended.output.splitlines()[0]) == said


def test_what_a_run_takes_to_begin_and_to_write_is_announced_once_for_each(tmp_path, monkeypatch):
    """With every trial taking one second, three runs of one step, tried together, cost a third of one each."""
    points = {str(rate): small(training__epochs=2, training__learning_rate=rate) for rate in (0.1, 0.2, 0.3)}
    points["longer"] = small(training__epochs=3)
    tried, run = [], runner.run_together
    monkeypatch.setattr(runner, "run_together", lambda of, **means: tried.extend(of.items()) or run(of, **means))
    monkeypatch.setattr(estimates, "quickest", lambda work, times=3: [work(), 1.0][1])
    monkeypatch.setattr(estimates, "QUICK", 0.0)
    monkeypatch.setattr(sweep, "SHORT", 1e9)
    alone = {name: estimates.estimate(single).seconds for name, single in points.items()}
    found = sweep.estimate(points)
    more = {name: cost.seconds - alone[name] for name, cost in found.items()}
    assert more == pytest.approx(dict.fromkeys(points, 1 / 3))
    assert len(tried) == 3
    for path, single in tried:
        assert (single.training.epochs, single.steps) == (1, 1)
        assert not path.exists()
    monkeypatch.setattr(sweep, "SHORT", 0.0)
    assert {name: cost.seconds for name, cost in sweep.estimate(points).items()} == alone
