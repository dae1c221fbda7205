"""What the studies of Tian (2020) on boundaries, connectivity and multilayer L-shapes measure."""

import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import figures
from tsdyn.studies import simsek2023_loss

import tsdyn
from tests.cases import orthonormal_teacher, small
from tsdyn import population, studies


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """A short run of the study of boundaries."""
    smoke = studies.load("tian2020-boundaries").EXPERIMENTS["smoke"]
    return tsdyn.run(smoke.replace({"training.epochs": 3}), tmp_path_factory.mktemp("plane") / "run").load()


def test_boundaries_do_not_depend_on_how_a_node_shares_its_scale(plane):
    """w_k, b_k times c and v_k over c is the same node: ε, ‖v_k‖ ‖w_k‖ and the boundary stay; exactly, c is 2."""
    measure = studies.load("tian2020-boundaries").measure
    lowest = plane["layer"] == 1
    same = plane.drop_vars("alignment")
    scaled = same.assign(
        weight=same["weight"] * xr.where(lowest, 2.0, 1.0),
        bias=same["bias"] * xr.where(lowest, 2.0, 1.0),
        fanout_norm=same["fanout_norm"] / 2.0,
    )
    found, wanted = measure(scaled), measure(same)
    for name in ("nearest", "regular_fanout", "offset"):
        np.testing.assert_array_equal(found[name].values, wanted[name].values)
        assert np.isfinite(found[name]).all()
    # of the recorded ε's, the least; both storeys sum in another order
    recorded = plane["alignment"].isel(epoch=-1, node=slice(0, 6)).min("teacher_node")
    np.testing.assert_allclose(wanted["nearest"], recorded, rtol=1e-10)


def test_every_way_leads_from_one_recorded_student_to_the_other(tmp_path):
    """Each cell of the sweep is connected to its own partner: ends have the recorded losses."""
    study = studies.load("tian2020-connectivity")
    archive = tsdyn.run(
        study.EXPERIMENTS["smoke"].replace({"training.steps_per_epoch": 20, "record.epochs": [3, 6]}), tmp_path / "run"
    ).load()
    measured = study.measure(archive)
    assert measured["epoch"].values.tolist() == [3, 6]
    for route in measured["route"].values:
        for start, end in (("gaussian", 0), ("torch", -1)):
            found = measured["loss"].sel(route=route).isel(position=end)
            wanted = archive["loss_eval"].sel(init=start, epoch=[3, 6]).transpose(*found.dims)
            there = found.notnull()  # a short run may leave nodes free at 1x, too
            assert there.sel(overrealization=2).all()
            # a mean of the same samples by other sums
            np.testing.assert_allclose(found.where(there), wanted.where(there), rtol=1e-10)
    path = measured["loss"].sel(route="theorem 2", overrealization=2)
    corners = path.isel(position=slice(None, None, 10))
    assert (path.max("position") <= corners.max("position") * (1 + 1e-12)).all()  # legs are convex or flat


def test_l_shapes_of_a_deep_student_are_those_of_its_layers(tmp_path):
    study = studies.load("tian2020-multilayer-l-shape")
    archive = tsdyn.run(small(teacher__widths=[6, 3, 5, 4, 6], training__epochs=2), tmp_path / "run")
    measured = study.measure(archive)
    assert measured["layer"].values.tolist() == [1, 2, 3]
    for layer in (1, 2, 3):
        alone = figures.measure_l_shape(archive.sel(layer=layer))
        for name, wanted in alone.data_vars.items():
            found = measured[name].isel(epoch=-1).sel(layer=layer).transpose(*wanted.dims)
            np.testing.assert_array_equal(found, wanted)
    cells = np.reshape(study.draw(measured).axes, (3, 3))
    for row, epoch in zip(cells, measured["epoch"].values, strict=True):
        for ax, layer in zip(row, (1, 2, 3), strict=True):
            own = measured.sel(epoch=epoch, layer=layer)
            shown = np.concatenate([np.ma.filled(points.get_offsets(), np.nan) for points in ax.collections])
            wanted = np.stack([own["student_specialization"], own["fanout_norm"]], -1).reshape(-1, 2)
            drawn, known = (set(map(tuple, a[~np.isnan(a).any(1)].tolist())) for a in (shown, wanted))
            assert drawn == known


@pytest.mark.parametrize(
    ("classes", "perturbed", "wanted"),
    [
        (["copy-average"] * 3, 0.9, "copy-average always"),
        (["copy-average", "perturbed-copy", "other"], 0.9, "copy-average or perturbed copy"),
        (["perturbed-copy", "perturbed-copy", "other"], 1.1, "perturbed copy, still higher"),
        (["perturbed-copy", "perturbed-copy", "other"], 0.9, "perturbed copy, lower"),
    ],
)
def test_regimes_are_those_of_the_seeds(classes, perturbed, wanted):
    """Simsek et al. (2023), Figure 4: where seeds end; those at neither point do not count."""
    point = xr.Dataset({"class": ("seed", classes), "loss_copy_average": 1.0, "loss_perturbed_copy": perturbed})
    assert simsek2023_loss.regime(point) == wanted
    assert list(simsek2023_loss.REGIMES).count(wanted) == 1


def test_curves_are_of_students_at_successive_numbers_of_teacher_nodes():
    """n = 8 at every k up to 2n, 18 at three in a row; not 6 with a gap, 5 at one, nor what lies beyond 2n."""
    sizes = [(8, k) for k in range(9, 17)] + [(18, 25), (18, 24), (18, 26), (6, 8), (6, 12), (5, 8), (4, 12), (4, 11)]
    n, k = np.array(sizes).T
    assert simsek2023_loss._curved(xr.Dataset({"n": ("point", n), "k": ("point", k)})) == [8, 18]


def test_the_desk_has_sizes_on_both_sides_of_the_still_higher_regime():
    """Of 18 nodes the perturbed copy is the lower one at the first k of `AROUND`, and the higher one at the others."""
    higher = []
    for n, k in simsek2023_loss.AROUND:
        teacher = orthonormal_teacher(k)
        perturbed = float(population.loss(population.perturbed_copy(teacher, n), teacher))
        higher.append(perturbed > population.one_neuron("erf", k - n + 1).loss)
        for scale in ("desk", "paper"):
            zipped = simsek2023_loss.EXPERIMENTS[scale].sweep["zip"]
            assert ([k + 1, k, 1], [k + 1, n, 1]) in [
                (list(t), list(s)) for t, s in zip(zipped["teacher.widths"], zipped["student.widths"], strict=True)
            ]
    assert higher == [False, True, True]
