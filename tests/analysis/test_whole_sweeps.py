"""Every analysis of a whole sweep equals that of each point alone, and uses each point's own experiment."""

import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import alignment, audit, lottery, matching, order_parameters, phase, similarity, specialization

import tsdyn
from tests.cases import small
from tsdyn.archive import selecting

OBSERVABLES = ["mse", "weight", "correlation", "fanout_norm", "moments", "lemma1_residual", "alignment", "gradient_max"]

#: name → what it gives of an archive over (swept..., seed, ...).
ANALYSES = {
    "alignment": lambda ds: alignment.alignment(ds.drop_vars("alignment")),
    "teacher_separation": alignment.teacher_separation,
    "best_alignment": alignment.best_alignment,
    "aligned": alignment.aligned,
    "augmented_samples": alignment.augmented_samples,
    "order_parameters": order_parameters.order_parameters,
    "cosines": order_parameters.cosines,
    "similarity": lambda ds: similarity.student_teacher(ds.isel(epoch=-1)),
    "specialization": specialization.specialization,
    "success_rate": lambda ds: specialization.success_rate(ds, threshold=0.5),
    "recovered": specialization.recovered,
    "mean_rank": specialization.mean_rank,
    "winner": lottery.winner,
    "rewind_mask": lottery.rewind_mask,
    "partner": matching.partner,
    "recovery_class": phase.recovery_class,
    "audit": lambda ds: audit.audit(ds)[["verdict", "margin"]],
}

SWEEPS = {
    "inputs, hidden nodes and outputs": {"teacher.widths": [[4, 3, 2], [7, 3, 2], [7, 1, 1]]},
    "student": {"student.overrealization": [1.0, 2.0], "student.activation": ["relu", "leaky_relu"]},
    "layers": {"points": [{"teacher.widths": [4, 3, 2]}, {"teacher.widths": [4, 3, 3, 2]}]},
    "biases": {"zip": {"teacher.bias": [-0.1, False], "student.bias": [True, False]}},
    "data": {"points": [{"data.augment": "aware", "data.std": 1.0}, {"data.augment": "none", "data.std": 2.0},
                        {"data.augment": "agnostic", "data.std": 1.0}]},
    "sizes": {"zip": {"data.train": [40, 60], "data.law": ["gaussian", "uniform"]}},
    "training": {"zip": {"training.learning_rate": [0.01, 0.02], "training.loss": ["mse", "cross_entropy"]}},
}  # fmt: skip


def equal(whole, alone, name):
    """Assert that both hold the same numbers; the whole sweep may have more NaN padding."""
    for variable in alone.data_vars:
        found, wanted = whole[variable], alone[variable]
        for dim in wanted.dims:
            if found.sizes[dim] > wanted.sizes[dim]:
                beyond = found.isel({dim: slice(wanted.sizes[dim], None)})
                assert beyond.isnull().all() or name == "node_order", (name, variable, dim)
                found = found.isel({dim: slice(0, wanted.sizes[dim])})
        found = found.transpose(*wanted.dims)
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(found.values, wanted.values, rtol=1e-9, atol=1e-12, err_msg=f"{name} {variable}")
        else:
            np.testing.assert_array_equal(found.values, wanted.values, err_msg=f"{name} {variable}")


@pytest.mark.parametrize("swept", SWEEPS)
def test_a_whole_sweep_is_its_points(swept, tmp_path):
    experiment = small(
        seeds=2, sweep=SWEEPS[swept], teacher__widths=[4, 3, 2], data__train=40, data__eval=60, training__epochs=1,
        training__steps_per_epoch=3, record__observables=[*OBSERVABLES, "observation"],
    )  # fmt: skip
    whole = tsdyn.run(experiment, tmp_path / "sweep").load()
    dims = selecting.swept_dimensions(whole)
    directories = sorted(p for p in (tmp_path / "sweep").iterdir() if (p / "archive.nc").exists())
    points = {tsdyn.Experiment.from_toml(p / "experiment.toml").to_toml(): p for p in directories}
    found = {name: measure(whole) for name, measure in ANALYSES.items()}
    for place, (_, point) in zip(np.ndindex(*(whole.sizes[d] for d in dims)), experiment.points(), strict=True):
        own = tsdyn.open(points[point.to_toml()]).load()
        at = dict(zip(dims, place, strict=True))
        for name, measure in ANALYSES.items():
            alone = measure(own)
            alone, part = (a if isinstance(a, xr.Dataset) else a.to_dataset(name=name) for a in (alone, found[name]))
            equal(part.isel({d: i for d, i in at.items() if d in part.dims}), alone, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    one = small(seeds=2, record__observables=["mse", "weight", "correlation"])
    return tsdyn.run(one, folder / "one").load(), tsdyn.run(
        one.replace({"data.std": 3.0, "seeds": [2, 3], "name": "other"}), folder / "other"
    ).load()


def joined(parts, dim):
    return xr.concat(
        parts, dim, data_vars="all", coords="minimal", compat="override", join="outer", combine_attrs="override"
    )


@pytest.mark.parametrize("measure", [audit.audit, lambda ds: similarity.student_teacher(ds.isel(epoch=-1))])
def test_joined_archives_are_refused_where_networks_are_rebuilt(run, measure):
    one, other = run
    one = one.assign(lemma1_residual=one["mse_eval"])
    with pytest.raises(ValueError, match=r"seeds \[2, 3\] are none of small's"):
        measure(xr.concat([one, other], "seed", data_vars="all", coords="different", compat="equals", join="outer",
                          combine_attrs="override"))  # fmt: skip
    with pytest.raises(ValueError, match="run is no dimension of small"):
        measure(joined([one, one], "run"))
    with pytest.raises(ValueError, match="more than once"):
        measure(xr.concat([one, one], "seed", data_vars="minimal", coords="minimal", compat="override", join="outer",
                          combine_attrs="override"))  # fmt: skip


def test_a_borrowed_experiment_is_refused(run):
    one, _ = run
    theirs = one.copy(deep=True)
    theirs["teacher_weight"] = theirs["teacher_weight"] * 1.5
    with pytest.raises(ValueError, match="the teacher recorded for seed 0 is not the one that small draws"):
        similarity.student_teacher(theirs.isel(epoch=-1))
    wider = tsdyn.Experiment.from_toml_text(one.attrs["experiment"]).replace({"student.overrealization": 1.0})
    with pytest.raises(ValueError, match="it belongs to other networks"):
        similarity.student_teacher(one.isel(epoch=-1).assign_attrs(experiment=wider.to_toml()))


def test_a_point_that_does_not_say_which_it_is_is_refused_in_words(tmp_path):
    experiment = small(seeds=1, sweep={"training.learning_rate": [0.01, 0.02]}, record__observables=["mse", "weight"])
    whole = tsdyn.run(experiment, tmp_path / "sweep")
    with pytest.raises(ValueError, match="lacks learning_rate, which small sweeps"):
        audit.audit(whole.sel(learning_rate=0.01, drop=True))
    assert audit.audit(whole.sel(learning_rate=0.01)).sizes["seed"] == 1
