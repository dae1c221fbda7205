"""Runs of every kind: population flows and online learning are begun, committed, resumed and read as training is."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import tsdyn
from tests.cases import orthonormal_teacher, small
from tsdyn import Experiment, ExperimentError, flow, population, schema, vocabulary
from tsdyn.archive import integrity, reading
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.experiment import rules
from tsdyn.flow import overlap_dynamics
from tsdyn.flow.flows import REASONS, Flow
from tsdyn.flow.steps import Limits
from tsdyn.population.critical_point_kinds import Ground, Kind
from tsdyn.running import estimates, kinds, runner, sweep
from tsdyn.running.protocol import Runnable, StateError
from tsdyn.schema import words_of

FLOWS = Experiment(
    kind="population-flow",
    name="flows",
    seeds=3,
    teacher={"widths": [3, 2, 1], "init": "orthonormal"},
    student={"widths": [3, 1, 1], "activation": "erf"},
    flow={"times": {"first": 0.1, "last": 1e4, "number": 6}},
    sweep={"zip": {"teacher.widths": [[3, 2, 1], [4, 3, 1]], "student.widths": [[3, 1, 1], [4, 2, 1]]}},
)
ONLINE = Experiment(
    kind="online",
    name="online",
    seeds=3,
    teacher={"widths": [30, 2, 1], "init": "gaussian"},
    student={"widths": [30, 2, 1], "activation": "erf"},
    training={"learning_rate": 0.5},
    online={"noise": 0.1, "last": 2.0, "points": 5},
    sweep={"online.layers": ["first", "both"]},
)


def one(experiment):
    """The experiment of a sweep's last point."""
    return [single for _, single in experiment.points()][-1]


RUNS = {
    "training": small(training__method="adam"),
    "population-flow": one(FLOWS),
    "online": one(ONLINE),
}


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "flows"
    return path, tsdyn.run(FLOWS, path).load()


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "online"
    return path, tsdyn.run(ONLINE, path).load()


# --- what the numbers are ------------------------------------------------------------------------------------


def test_every_seed_of_a_flow_ends_at_the_copy_average_point(flows):
    _, ds = flows
    optimum = population.one_neuron("erf", 2)
    assert (words_of(ds["end_kind"]) == "minimum").all()
    assert (words_of(ds["end_class"]) == "copy-average").all()
    assert (words_of(ds["end_ground"]) == "groups").all()
    assert (words_of(ds["stop_reason"]) == "gradient").all()
    assert abs(ds["end_loss"] - optimum.loss).max() <= 1e-12
    np.testing.assert_allclose(ds["loss_copy_average"], optimum.loss, atol=1e-13)
    assert ds["one_neuron_norm"].isel(point=0).values == pytest.approx(optimum.norm)
    assert ds["one_neuron_norm"].isel(point=1).isnull().all()
    assert (ds["index_copy_average"] == 0).all()
    assert ds["end_gradient_max"].max() <= 1e-12
    groups = [np.bincount(row.astype(int), minlength=2).tolist() for row in ds["end_owner"].isel(point=1).values]
    assert all(sorted(group) == [1, 2] for group in groups)


def test_a_flow_records_its_start_and_its_way(flows):
    """The start is Glorot's draw of that seed, the way `flow.gradient_flow`'s at once.

    Products of other companies round otherwise, and the choice of steps, good to 1e-4, passes that on: 1e-6 is of both.
    """
    _, ds = flows
    assert ds["time"].values.tolist() == [0.0, *np.geomspace(0.1, 1e4, 6).tolist()]
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    rows = population.starts(loss, range(3))
    lower, upper = (tsdyn.layer(ds["weight"].isel(point=1), layer) for layer in (1, 2))
    w, a = loss.unpack(rows)
    np.testing.assert_array_equal(lower.sel(time=0).values[:, :, :4], w)
    np.testing.assert_array_equal(upper.sel(time=0).values[:, 0, :2], a[..., 0])
    whole = flow.gradient_flow(loss, rows, times=ds["time"].values, end=1e9)
    gone = whole["loss"].isnull().values
    assert (np.isnan(ds["population_loss"].isel(point=1).values) == gone).all()
    np.testing.assert_allclose(ds["population_loss"].isel(point=1).values, whole["loss"].values, rtol=1e-6)
    np.testing.assert_allclose(lower.values[..., :4], whole["weight"].values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ds["stop_time"].isel(point=1), whole["stop_time"], rtol=1e-6)


def test_a_flow_halted_anywhere_and_stored_goes_on_with_the_same_bits():
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    rows, times = population.starts(loss, [4]), np.array([0.5, 5.0, 50.0])
    whole = flow.gradient_flow(loss, rows, times=times, end=1e9)
    first = Flow(loss, rows, times=times, limits=Limits())
    for time in (0.1, 3.0, 70.0):
        first.until(time)
    second = Flow(loss, torch.zeros_like(rows) + 1, times=times, limits=Limits())
    second.restore(first.state())
    second.until(math.inf)
    np.testing.assert_array_equal(second.joined("y"), whole["final"])
    np.testing.assert_array_equal(loss.value(second.joined("path")), whole["loss"])
    assert second.reasons.tolist() == whole["stop_reason"].values.tolist()


def test_online_runs_are_the_simulation_and_the_equation_of_flow(online):
    """From the recorded start on, both are `flow.online` and `flow.order_parameters`, whose tests compare the two."""
    _, ds = online
    for layers, second in (("first", 0.0), ("both", 0.5)):
        at = ds.sel(layers=layers)
        begin = [at[name].isel(alpha=0).values for name in ("Q_equation", "R_equation")]
        begin += [at["T"].values, at["outgoing_equation"].isel(alpha=0).values, at["teacher_outgoing"].values]
        rule = {"learning_rate": 0.5, "second_learning_rate": second, "noise": 0.1, "alpha": at["alpha"].values}
        solved = flow.order_parameters(*begin, **rule)
        simulated = flow.online(*begin, inputs=30, seeds=3, **rule)
        for name, theirs in (("Q", "Q"), ("R", "R"), ("outgoing", "v"), ("eg", "eg")):
            np.testing.assert_array_equal(at[name], simulated[theirs])
            np.testing.assert_array_equal(at[f"{name}_equation"], solved[theirs])


@pytest.mark.parametrize("name", ["flow-study-v2", "online-study-v2"])
def test_the_numbers_are_those_of_the_studies_of_0_1(name, tmp_path):
    """Of the two frozen directories, run again: the same draws, the same ends and paths."""
    old = reading.open(Path(__file__).parent.parent / "data" / name)
    if name == "flow-study-v2":
        times = {"first": 0.1, "last": 100.0, "number": 4}
        new = tsdyn.run(FLOWS.replace({"seeds": 2, "flow.times": times}), tmp_path / "run").load()
        pairs = {
            "loss": new["end_loss"],
            "stop_time": new["stop_time"],
            "index": new["end_index"],
            "margin": new["end_margin"],
            "path_loss": new["population_loss"].isel(time=slice(1, None)),
            "weight": new["end_weight"].sel(layer=1),
            "start_weight": new["weight"].sel(layer=1, time=0),
            "start_outgoing": new["weight"].sel(layer=2, time=0).isel(node=0, input_node=slice(0, 2)),
            "loss_perturbed_copy": new["loss_perturbed_copy"].isel(seed=0),
        }
        assert (words_of(new["end_class"]).values == old["class"].values).all()
        assert (words_of(new["end_kind"]).values == old["kind"].values).all()
    else:
        changes = {"seeds": 2, "teacher.widths": [20, 2, 1], "student.widths": [20, 2, 1]}
        changes |= {"online.noise": 0.0, "online.points": 4}
        new = tsdyn.run(ONLINE.replace(changes), tmp_path / "run").load().isel(alpha=slice(1, None))
        pairs = {"eg_simulation": new["eg"], "eg_equation": new["eg_equation"]}
        np.testing.assert_array_equal(new["alpha"], old["alpha"])
    for variable, values in pairs.items():
        # another machine's arithmetic, over some hundred steps of tolerance 1e-4
        np.testing.assert_allclose(
            values.values.ravel(), old[variable].values.ravel(), rtol=1e-6, atol=1e-9, err_msg=variable
        )


# --- begun, committed, gone on with, read --------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_after_any_step_ends_with_the_bits_of_one_that_was_not(kind, tmp_path, monkeypatch):
    experiment = RUNS[kind]
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0)
    whole = tsdyn.run(experiment, tmp_path / "whole").load()
    for last in {0, experiment.last // 2, experiment.last - 1}:
        path = tmp_path / f"killed-{last}"

        def progress(step, *_, last=last):
            if step > last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runner.run(experiment, path, progress=progress)
        assert integrity.check(path) == []
        part = reading.open(path)
        assert part.sizes[experiment.layout.path] == sum(step <= last for step in experiment.schedule)
        assert not set(vocabulary.OUTCOMES) & set(part.data_vars)
        ended = runner.run(experiment, path).load()
        assert integrity.check(path) == []
        drop = ["created", "run", "wall_seconds"]  # when and which it was
        for ds in (ended, whole):
            ds.attrs = {key: value for key, value in ds.attrs.items() if key not in drop}
        xr.testing.assert_identical(ended, whole)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_announced_and_what_it_leaves_is_what_was_said(kind, tmp_path):
    experiment = RUNS[kind]
    said = estimates.estimate(experiment)
    assert said.members == 3
    assert said.seconds > 0
    ds = tsdyn.run(experiment, tmp_path / "run")
    written = (tmp_path / "run" / "archive.nc").stat().st_size
    assert said.disk <= written <= said.disk + (1 << 18)  # headers
    assert schema.problems(ds) == []
    assert isinstance(kinds.members_of(experiment), Runnable)
    assert set(ds.data_vars) == set(experiment.recorded())


def test_a_state_of_another_shape_is_refused_by_every_kind():
    for experiment in RUNS.values():
        members, wider = kinds.members_of(experiment), kinds.members_of(experiment.replace({"seeds": 4}))
        members.draw()
        wider.draw()
        with pytest.raises(StateError, match=r"the state to go on from has \w+ \w+ .*, this experiment needs"):
            members.restore(wider.state())
        with pytest.raises(StateError, match="missing"):
            members.restore({})


def test_a_sweep_of_flows_is_shared_by_workers_and_extended(flows, tmp_path):
    _, whole = flows
    ds = tsdyn.run(FLOWS, tmp_path / "sweep", workers=2).load()
    for name in ("end_loss", "stop_time", "population_loss"):  # workers have one thread each
        np.testing.assert_allclose(ds[name], whole[name], rtol=1e-6)
    zipped = {key: [*values, [*values[0][:1], 1, 1]] for key, values in FLOWS.sweep["zip"].items()}
    longer = FLOWS.replace({"sweep": {"zip": zipped}})
    assert list(sweep.unfinished(longer, tmp_path / "sweep")) == ["teacher.widths=3-1-1,student.widths=3-1-1"]
    assert tsdyn.run(longer, tmp_path / "sweep").sizes["point"] == 3


def test_a_sweep_that_goes_on_says_how_much_of_each_point_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0)

    def progress(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tsdyn.run(FLOWS, tmp_path / "run", progress=progress)
    ds = reading.open(tmp_path / "run")
    assert ds["coverage"].values.tolist() == [3 / 8, 0.0]  # seven times and the end
    assert integrity.check(tmp_path / "run") == []


def test_lazy_numbers_of_a_segment_are_read_from_the_archive_that_took_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0)
    for kind in ("population-flow", "online"):
        experiment, path = RUNS[kind], tmp_path / kind

        def progress(step, *_):
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runner.run(experiment, path, progress=progress)
        before = reading.open(path)
        whole = runner.run(experiment, path)
        for name in before.data_vars:
            along = experiment.layout.path
            wanted = whole[name].isel({along: slice(0, 3)}) if along in whole[name].dims else whole[name]
            np.testing.assert_array_equal(before[name].values, wanted.values)


def test_another_device_is_refused_for_what_runs_on_the_cpu():
    for kind in ("population-flow", "online"):
        with pytest.raises(ExperimentError, match=f"kind = '{kind}' runs on the CPU"):
            kinds.members_of(RUNS[kind], "cuda")


# --- what a seed draws ---------------------------------------------------------------------------------------


def test_a_seeds_start_does_not_depend_on_the_others():
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    np.testing.assert_array_equal(population.starts(loss, range(4))[3], population.starts(loss, [3])[0])


def test_starts_have_glorots_variances():
    loss = population.PopulationLoss(orthonormal_teacher(3), 2)
    rows = population.starts(loss, range(1000)).numpy()
    for part, variance in ((rows[:, :8], 2 / 6), (rows[:, 8:], 2 / 3)):
        # the sample variance of m normal numbers has standard error σ² √(2/m)
        assert abs(part.var() - variance) <= 5 * variance * np.sqrt(2 / part.size)


def test_a_seed_of_an_online_run_does_not_depend_on_the_others(online):
    _, ds = online
    alone = kinds.members_of(one(ONLINE).replace({"seeds": [2]}))
    alone.draw()
    for step in (1, 2):
        alone.advance(step)
    found = alone.measure(2, ("Q", "eg_equation"))
    # products of one member or of three may round otherwise
    np.testing.assert_allclose(found["Q"][0], ds["Q"].sel(layers="both", seed=2).isel(alpha=2), rtol=1e-12)
    np.testing.assert_array_equal(found["eg_equation"][0], ds["eg_equation"].sel(layers="both", seed=2).isel(alpha=2))


def test_a_seed_that_diverges_is_dead_from_that_step_on(tmp_path):
    first = ONLINE.replace({"sweep": {}})
    wild = first.replace({"training.learning_rate": 50.0, "student.activation": "identity", "online.last": 60.0})
    news = []
    ds = runner.run(wild, tmp_path / "run", progress=lambda step, last, died, _: news.append((step, died)))
    died = {seed: step for step, seeds in news for seed in seeds}
    assert set(died) == {0, 1, 2}
    assert ds["death_epoch"].values.tolist() == [died[seed] for seed in range(3)]
    for seed, step in died.items():
        assert (ds["Q"].sel(seed=seed).isnull().any(["node", "node_2"]).values == (np.arange(6) >= step)).all()
    assert integrity.check(tmp_path / "run") == []


# --- experiment files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [FLOWS, ONLINE, one(FLOWS), one(ONLINE)])
def test_a_file_has_the_keys_of_its_kind_only_and_reads_back(experiment):
    text = experiment.to_toml()
    assert Experiment.from_toml_text(text) == experiment
    assert Experiment.from_toml_text(text).digest == experiment.digest
    assert "[data]" not in text
    assert "batch" not in text
    assert "kind" not in small().to_toml()


@settings(max_examples=20, deadline=None)
@given(
    seeds=st.integers(1, 5),
    inputs=st.integers(5, 40),
    nodes=st.integers(1, 3),
    number=st.integers(2, 30),
    last=st.floats(0.2, 1e8),
)
def test_the_inputs_of_a_kind_are_the_networks_and_marks_increase(seeds, inputs, nodes, number, last):
    for experiment in (one(FLOWS), one(ONLINE)):
        section = {"population-flow": "flow", "online": "online"}[experiment.kind]
        changes = {f"{section}.inputs": inputs, "student.widths": [7, nodes, 1], "seeds": seeds}
        if section == "flow":
            changes["flow.times"] = {"first": 0.1, "last": last, "number": number}
        else:
            changes |= {"online.last": last, "online.points": number}
        changed = experiment.replace(changes)
        assert changed.student_widths == (inputs, nodes, 1)
        assert changed.teacher_widths[0] == inputs
        marks = changed.marks
        assert all(before < after for before, after in itertools.pairwise(marks))
        assert changed.labels == tuple(marks[step] for step in changed.schedule)
        assert marks[0] == 0
        assert len(marks) == changed.last + 1


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (one(FLOWS), {"data.std": 2.0}, "data.std: kind = 'population-flow' does not know this key; it has"),
        (one(FLOWS), {"training.epochs": 2}, "training.epochs: kind = 'population-flow' does not know this key"),
        (one(FLOWS), {"online.last": 2.0}, "online.last: kind = 'population-flow' does not know this key"),
        (one(ONLINE), {"training.batch": 2}, "training.batch: kind = 'online' does not know this key"),
        (one(ONLINE), {"training.learning_rat": 2.0}, "unknown key (did you mean 'learning_rate'?)"),
        (small(), {"flow.inputs": 3}, "flow.inputs: is a key of kind = 'population-flow'; set that kind"),
        (small(), {"online.noise": 0.0}, "online.noise: is a key of kind = 'online'; set that kind"),
        (small(), {"kind": "flow"}, "kind = 'flow': must be 'training', 'population-flow' or 'online'"),
        (one(FLOWS), {"teacher.init": "separated"}, "has an orthonormal teacher; say 'orthonormal'"),
        (one(FLOWS), {"flow.inputs": 2}, "2 inputs are too few for 3 orthonormal nodes; it needs at least 3"),
        (one(FLOWS), {"student.widths": [4, 0, 1]}, "must be greater than or equal to 1"),
        (one(FLOWS), {"student.widths": [4, 2, 2, 1]}, "depths must agree"),
        (one(FLOWS), {"student.widths": [5, 2, 1]}, "differ at the input: 5 against 4"),
        (one(FLOWS), {"teacher.widths": [4, 3, 2]}, "is of two layers and one output, (d, k, 1)"),
        (one(FLOWS), {"dtype": "float32"}, "computes in float64"),
        (one(FLOWS), {"flow.times": {"first": 1.0, "last": 0.5, "number": 3}}, "first = 1.0, last = 0.5; first < last"),
        (one(FLOWS), {"flow.times": {"first": 1.0, "last": 2.0, "number": 1}}, "must be greater than or equal to 2"),
        (one(ONLINE), {"online.inputs": 3}, "is too small for 2 student and 2 teacher nodes"),
        (one(ONLINE), {"online.layers": "second"}, "must be 'first' or 'both'"),
        (one(ONLINE), {"online.last": 0.05}, "must be greater than 0.1"),
        (one(ONLINE), {"teacher.init": "orthonormal"}, "draws teachers N(0, 1); say 'gaussian'"),
        (one(ONLINE), {"student.activation": "tanh"}, "has a form for erf, identity, relu"),
        (one(ONLINE), {"training.learning_rate": {"0": 0.1, "5": 0.2}}, "has one rate"),
        (FLOWS, {"sweep": {"kind": ["training"]}}, "'kind' is not a key that can be swept"),
        (FLOWS, {"sweep": {"data.std": [1.0]}}, "'data.std' is not a key that can be swept"),
    ],
)
def test_keys_and_values_that_a_kind_cannot_have_are_named(base, change, message):
    with pytest.raises(ExperimentError) as refused:
        base.replace(change)
    assert message in str(refused.value)


def test_tables_of_words_are_those_of_the_code_that_says_them():
    def of(literal):
        return literal.__args__

    assert of(Kind) == vocabulary.END_CLASSES
    assert of(Ground) == vocabulary.END_GROUNDS
    assert tuple(reason.replace(" ", "-") for reason in REASONS) == vocabulary.STOP_REASONS
    assert set(vocabulary.END_KINDS) == {"minimum", "saddle", "degenerate", "not-stationary"} | set(
        vocabulary.STOP_REASONS
    ) - {"gradient"}
    assert set(rules.FLUCTUATING) == set(overlap_dynamics._FLUCTUATIONS)


# --- directories of 0.1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("flow-study-v2", "flows.nc"), ("online-study-v2", "online.nc")])
def test_a_directory_of_a_study_of_0_1_is_read_and_not_gone_on_with(name, file, tmp_path):
    path = Path(shutil.copytree(Path(__file__).parent.parent / "data" / name, tmp_path / "old"))
    xr.testing.assert_identical(reading.open(path), xr.load_dataset(path / file, engine="netcdf4"))
    assert integrity.check(path) == []
    with pytest.raises(DirectoryError, match=rf"a study of tsdyn 0.1 \({file}\).*Give another directory with -o"):
        tsdyn.run(FLOWS, path)
    with pytest.raises(DirectoryError, match="Give another directory with -o"):
        runner.run(one(ONLINE), path)
    assert {entry.name for entry in path.iterdir()} == {file, "experiment.toml"}
    damaged = bytearray((path / file).read_bytes())
    damaged[: len(damaged) // 2] = bytes(len(damaged) // 2)
    (path / file).write_bytes(damaged)
    assert any("not a readable netCDF file" in problem for problem in integrity.check(path))
    (path / file).unlink()
    with pytest.raises(DirectoryError, match="that was not finished"):
        reading.open(path)
