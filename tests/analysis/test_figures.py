import numpy as np
import pytest
from tsdyn.analysis import specialization
from tsdyn.analysis.figures import FIGURES, draw_l_shape, measure_l_shape

import tsdyn
from tests.cases import small


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "sweep"
    return tsdyn.run(small(sweep={"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tsdyn.run(small(), tmp_path_factory.mktemp("figures") / "run")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_runs_and_sweeps(name, run, sweep, tmp_path):
    for ds in (run, sweep):
        figure = FIGURES[name](ds)
        figure.savefig(tmp_path / "figure.png")
        assert figure.axes
        assert any(ax.has_data() for ax in figure.axes)


def test_l_shape_shows_every_student_node_where_it_was_measured(sweep):
    figure = draw_l_shape(measure_l_shape(sweep))
    assert len(figure.axes) == 4
    hidden = tsdyn.layer(sweep, 1).isel(epoch=-1)
    best = specialization.student_specialization(hidden)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[1] == "overrealization 3, polarity 0"
    at = {"overrealization": 3, "polarity": 0.0}
    for seed, points in enumerate(figure.axes[1].collections):
        np.testing.assert_array_equal(points.get_offsets()[:, 0], best.sel(at).isel(seed=seed))
        np.testing.assert_array_equal(points.get_offsets()[:, 1], hidden.fanout_norm.sel(at).isel(seed=seed))
        assert len(points.get_offsets()) == 12
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0
    assert top > hidden.fanout_norm.max()


def test_loss_curves_are_medians(run):
    (line,) = FIGURES["loss"](run).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), np.median(run.mse_eval, axis=0))


def test_too_many_panels_are_refused(run):
    many = run.isel(epoch=[-1]).expand_dims(scale=np.arange(60))
    with pytest.raises(ValueError, match="60 panels are more than 48; select a part"):
        FIGURES["recovery"](many)


def test_missing_variables_say_what_to_record(run):
    with pytest.raises(ValueError, match=r"l-shape: the archive has no fanout_norm; record it: \[record\] observables"):
        FIGURES["l-shape"](run.drop_vars("fanout_norm"))
