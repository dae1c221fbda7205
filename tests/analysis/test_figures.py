"""Figures show what was measured, of runs, sweeps, listed points and slices; nothing here is timed or looked at."""

import sys

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image
from tsdyn.analysis import figures, matching, panels, phase, specialization
from tsdyn.analysis.figures import FIGURES, draw_l_shape, measure_l_shape

import tsdyn
from tests.cases import small

RICH = {
    "record__observables": ["mse", "correlation", "fanout_norm", "weight", "moments", "hessian_eigenvalue"],
    "record__eigenvalues": 3,
    "teacher__widths": [2, 3, 4],
    "training__epochs": 3,
    "training__steps_per_epoch": 10,
    "data__train": 40,
    "data__eval": 40,
}
AXES = {
    "l-shape": figures.l_shape,
    "success-rate": figures.success_rate,
    "recovery": figures.recovery,
    "loss": figures.loss,
    "specialization": figures.mean_specialization,
    "rank": figures.mean_rank,
    "winners": figures.winners,
    "correlation": figures.correlation_map,
    "couplings": figures.coupling_map,
    "spectrum": figures.spectrum,
    "boundaries": figures.boundaries,
    "phase": figures.phase_diagram,
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "sweep"
    return tsdyn.run(small(**RICH, sweep={"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run in the plane with everything that any figure needs."""
    return tsdyn.run(small(**RICH), tmp_path_factory.mktemp("figures") / "run")


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    points = [
        {"student.overrealization": 1, "teacher.polarity": 0.0},
        {"student.overrealization": 2, "teacher.polarity": 1.0},
    ]
    return tsdyn.run(small(**RICH, sweep={"points": points}), tmp_path_factory.mktemp("figures") / "listed")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_runs_sweeps_and_slices(name, run, sweep, listed):
    FIGURES[name](run).draw_without_rendering()
    slices = [
        sweep,
        listed,
        run.sel(seed=1),
        run.isel(epoch=-1) if name not in ("rank", "winners") else run,
        run.isel(layer=0),
        sweep.sel(overrealization=3, seed=[0, 2]),
        sweep.sel(polarity=[1.0]).isel(epoch=slice(1, None)),
        listed.isel(point=1),
    ]
    for ds in slices:
        figure = FIGURES[name](ds)
        assert any(ax.has_data() for ax in figure.axes)


@pytest.mark.parametrize("name", FIGURES)
def test_axes_functions_draw_on_the_axes_given(name, run, sweep):
    own = Figure().subplots()
    assert AXES[name](run, ax=own) is own
    assert own.has_data()
    assert own.get_xlabel()
    assert AXES[name](run) is not own
    if name != "phase":  # which is drawn over what is swept
        with pytest.raises(ValueError, match="overrealization, polarity left"):
            AXES[name](sweep)


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_measured_stays_as_it_is(name, sweep):
    measure = getattr(sys.modules[FIGURES[name].draw.__module__], "measure_" + name.replace("-", "_"))
    once = measure(sweep)
    assert not any(array.chunks for array in once.data_vars.values())
    assert measure(once) is once
    assert FIGURES[name].shows


@pytest.mark.parametrize("name", FIGURES)
def test_members_that_died_are_left_out(name, run):
    """Bands and means are over living members; nothing warns."""
    death = xr.DataArray([-1, 1, 1], dims="seed")
    alive = (death < 0) | (run["epoch"] < 1)
    dead = run.load().copy()
    for variable, array in dead.data_vars.items():
        if "epoch" in array.dims:
            dead[variable] = array.where(alive).transpose(*array.dims)
    FIGURES[name](dead)
    FIGURES[name](dead.isel(seed=[1]))


def test_l_shape_shows_every_student_node_where_it_was_measured(sweep):
    figure = draw_l_shape(measure_l_shape(sweep))
    assert len(figure.axes) == 4
    hidden = tsdyn.layer(sweep, 1).isel(epoch=-1)
    best = specialization.student_specialization(hidden)
    assert "3x as many" in figure.axes[1].get_title(loc="left").replace("\n", " ")
    assert "polarity p = 0" in figure.axes[1].get_title(loc="left").replace("\n", " ")
    at = {"overrealization": 3, "polarity": 0.0}
    (points,) = figure.axes[1].collections
    drawn = np.array(points.get_offsets())
    wanted = np.stack(
        [best.sel(at).values.ravel(), hidden.fanout_norm.sel(at).transpose(*best.sel(at).dims).values.ravel()], 1
    )
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, wanted))
    assert len({tuple(c) for c in points.get_facecolor()}) == 3  # a colour per seed
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0
    assert top > hidden.fanout_norm.max()


def test_below_five_seeds_every_seed_is_a_line_and_from_five_on_the_median_has_a_band(run):
    lines = FIGURES["loss"](run).axes[0].lines
    np.testing.assert_array_equal([line.get_ydata() for line in lines], run.mse_eval)
    many = xr.concat([run.mse_eval, 2 * run.mse_eval], "seed").assign_coords(seed=range(6)).to_dataset()
    ax = FIGURES["loss"](many.assign_attrs(run.attrs)).axes[0]
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_ydata(), np.median(many.mse_eval, axis=0))
    (band,) = ax.collections
    low, high = np.quantile(many.mse_eval, (0.1, 0.9), axis=0)
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(low.min(), rel=1e-12)
    assert edges.max() == pytest.approx(high.max(), rel=1e-12)


def test_curves_of_a_deep_network_are_of_its_layers():
    correlation = xr.DataArray(
        np.random.default_rng(0).uniform(0, 1, (5, 3, 3, 2, 5)),
        dims=("seed", "epoch", "layer", "teacher_node", "node"),
        coords={"seed": range(5), "epoch": range(3), "layer": [1, 2, 3]},
        name="correlation",
    )
    ds = correlation.to_dataset()
    for name in ("specialization", "rank"):
        lines = FIGURES[name](ds).axes[0].lines
        assert [line.get_label() for line in lines] == ["layer 1", "layer 2"]  # 3 is the output's
    wanted = specialization.mean_specialization(ds.sel(layer=2)).median("seed")
    np.testing.assert_allclose(FIGURES["specialization"](ds).axes[0].lines[1].get_ydata(), wanted)


def test_success_rates_stand_in_their_intervals(run):
    ax = figures.success_rate(run)
    measured = figures.measure_success_rate(run)
    (line,) = ax.lines  # no epoch is nearer to the fifth than the last
    np.testing.assert_array_equal(line.get_ydata(), measured.success_rate.isel(epoch=0))
    (band,) = ax.collections
    corners = {tuple(v) for v in band.get_paths()[0].vertices.round(12)}
    shares = measured.success_rate.isel(epoch=0).values
    assert np.any((shares > 0) & (shares < 1))
    for node, (share, bounds) in enumerate(
        zip(shares, measured.success_interval.isel(epoch=0).values, strict=True), start=1
    ):  # at 0 and 1 no band is drawn
        ends = bounds if 0 < share < 1 else [share]
        assert {(node, round(float(end), 12)) for end in ends} <= {(int(x), float(y)) for x, y in corners}


@pytest.mark.parametrize("first", [0, 3, 17])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 20, 64, 500])
def test_nodes_are_numbered_from_one(first, count):
    """Ticks are numbers, from the first to the last, few and increasing; so are the places where shares are drawn."""
    labels = np.arange(first, first + count)
    numbers = list(range(first + 1, first + count + 1))
    ticks = panels.node_ticks(panels.node_numbers(labels))
    assert (ticks[0], ticks[-1]) == (numbers[0], numbers[-1])
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8
    share = xr.DataArray(np.linspace(0, 1, count), {"teacher_node": labels}, "teacher_node")
    ax = panels.rate(share)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), numbers)
    assert ax.get_xticks().tolist() == ticks


def test_heat_maps_are_ordered_by_best_teacher(run):
    ax = figures.correlation_map(run.sel(seed=1))
    drawn = ax.images[0].get_array().data
    stored = tsdyn.layer(run, 1).correlation.sel(seed=1).isel(epoch=-1).values
    assert sorted(map(tuple, drawn.T)) == sorted(map(tuple, stored.T))
    best = drawn.argmax(0)
    assert (np.diff(best) >= 0).all()
    same = np.diff(best) == 0
    assert (np.diff(drawn.max(0))[same] <= 0).all()
    # both moments of one student node stand in one column
    order = matching.node_order(tsdyn.layer(run, 1).sel(seed=1).isel(epoch=-1)).values.astype(int)
    for variable in ("A", "H_star"):
        image = figures.coupling_map(run.sel(seed=1), variable=variable).images[0].get_array()
        wanted = tsdyn.layer(run, 1)[variable].sel(seed=1).isel(epoch=-1).values[order].T
        np.testing.assert_array_equal(image, wanted)
    with pytest.raises(ValueError, match="variable='B'; it is 'A'"):
        figures.coupling_map(run, variable="B")


def test_boundaries_are_where_nodes_switch(run):
    ax = figures.boundaries(run.sel(seed=2))
    low = tsdyn.layer(run, 1).sel(seed=2).isel(epoch=-1, input_node=slice(0, 2))
    students, teachers = ax.lines[:6], ax.lines[6:]
    assert len(teachers) == 3
    for lines, weight, bias in ((students, low.weight, low.bias), (teachers, low.teacher_weight, low.teacher_bias)):
        for line, w, b in zip(lines, weight.values, bias.values, strict=False):
            for point in (line.get_xy1(), line.get_xy2()):
                assert abs(w @ np.array(point) + b) <= 8 * np.finfo(float).eps * (np.abs(w) @ np.abs(point) + abs(b))


def test_boundaries_move(run, tmp_path):
    figures.animate_boundaries(run, interval=100).save(tmp_path / "moves.gif", writer="pillow", dpi=30)
    with Image.open(tmp_path / "moves.gif") as gif:
        assert gif.n_frames == run.sizes["epoch"]


def test_the_legend_of_a_frame_is_of_its_epoch(run):
    moves = figures.animate_boundaries(run.sel(seed=2))
    for position in (0, run.sizes["epoch"] - 1):
        moves._draw_frame(position)
        norms = tsdyn.layer(run, 1).fanout_norm.sel(seed=2).isel(epoch=position).values
        said = [text.get_text() for text in moves._fig.legends_below[0].get_texts()]
        assert said == ["teacher node", *(f"student {k}: ‖v‖ = {norm:.2g}" for k, norm in enumerate(norms, start=1))]
    moves._draw_was_started = True  # matplotlib warns of an animation that is never saved


def test_phase_diagram_shows_shares(sweep):
    shares = phase.fractions(phase.recovery_class(tsdyn.layer(sweep, 1).isel(epoch=-1), threshold=0.5)).compute()
    ax = figures.phase_diagram(shares.to_dataset(), of="some")
    np.testing.assert_array_equal(ax.images[0].get_array(), shares.sel({"class": "some"}).values.T)
    bars = figures.phase_diagram(shares.isel(polarity=0).to_dataset()).patches
    heights = np.array([bar.get_height() for bar in bars]).reshape(3, 2)
    np.testing.assert_allclose(heights, shares.isel(polarity=0).values.T, atol=4 * np.finfo(float).eps)
    with pytest.raises(ValueError, match="no class 'most'; there are none, some, all"):
        figures.phase_diagram(shares.to_dataset(), of="most")


def test_colours_are_the_palette_and_lines_differ_beyond_it():
    looks = [(panels.colour(i), panels.style(i)) for i in range(figures.MAX_LINES)]
    assert len(set(looks)) == figures.MAX_LINES
    with pytest.raises(ValueError, match="40 lines are more than 28"):
        figures.draw_curves(xr.Dataset({"x": (("scale", "seed", "epoch"), np.ones((40, 3, 2)))}, {"scale": range(40)}))


def test_too_many_panels_are_refused(run):
    many = run.isel(epoch=[-1]).expand_dims(scale=np.arange(60))
    with pytest.raises(ValueError, match="60 panels are more than 48; select a part"):
        FIGURES["recovery"](many)


def test_missing_variables_say_what_to_record(run):
    with pytest.raises(ValueError, match=r"l-shape: the archive has no fanout_norm; record it: \[record\] observables"):
        FIGURES["l-shape"](run.drop_vars("fanout_norm"))
    with pytest.raises(ValueError, match=r"couplings: the archive has no A, H_star; .* observables = \['moments'\]"):
        FIGURES["couplings"](run.drop_vars(["A", "H_star"]))
    with pytest.raises(ValueError, match="boundaries: inputs have 10 dimensions, and a map needs the plane"):
        FIGURES["boundaries"](run.assign_coords(input_width=run.input_width + 8))
