"""Archives of schema 2 and below hold gradients of the squared error for every loss; opening one warns."""

import shutil
import warnings
from pathlib import Path

import netCDF4
import numpy as np
import pytest

import tsdyn
from tests.cases import small
from tests.test_cli import command  # noqa: F401
from tsdyn.archive import integrity
from tsdyn.archive.whole_files import seal_of, sha256

DATA = Path(__file__).resolve().parent.parent / "data"
OF_THE_LOSS = ["gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue"]
FEW = {
    "training__epochs": 2,
    "seeds": 2,
    "record__eigenvalues": 1,
    "record__observables": ["mse", "gradient_rms", "gradient_max", "gradient_norm", "hessian_eigenvalue"],
}


def as_written_by(version: int, folder: Path) -> None:
    """Rewrite every archive and segment in `folder` to declare that schema, with new checksums."""
    for file in folder.rglob("*.nc"):
        with netCDF4.Dataset(file, "a") as nc:
            nc.setncattr("schema_version", np.int64(version))
        seal_of(file).write_text(f"{sha256(file)}  {file.name}\n", encoding="ascii")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    path = tmp_path_factory.mktemp("wrong") / "losses"
    tsdyn.run(small(sweep={"training.loss": ["mse", "cross_entropy"]}, **FEW), path)
    return path


@pytest.fixture
def old(losses, tmp_path):
    path = Path(shutil.copytree(losses, tmp_path / "sweep"))
    as_written_by(2, path)
    return path


def wrong(ds):
    return [name for name, array in ds.data_vars.items() if "wrong" in array.attrs]


def test_of_this_version_nothing_is_wrong(losses):
    assert wrong(tsdyn.open(losses)) == []
    assert wrong(tsdyn.open(losses / "loss=cross_entropy")) == []
    assert integrity.check(losses) == []


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", [".", "archive.nc"])
def test_a_run_or_a_file_of_an_earlier_schema_warns_once(losses, tmp_path, version, name):
    run = Path(shutil.copytree(losses / "loss=cross_entropy", tmp_path / f"run-{version}"))
    as_written_by(version, run)
    with pytest.warns(tsdyn.WrongNumbersWarning, match=r"gradient_rms.*of the squared error, though cross entropy"):
        ds = tsdyn.open(run / name)
    assert sorted(wrong(ds)) == sorted(OF_THE_LOSS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(wrong(tsdyn.open(run / name))) == sorted(OF_THE_LOSS)  # told once, marked always
    told = integrity.check(run / name)
    assert len(told) == 1
    assert all(variable in told[0] for variable in OF_THE_LOSS)


def test_runs_of_other_losses_are_left_alone(old):
    assert wrong(tsdyn.open(old / "loss=mse")) == []
    assert integrity.check(old / "loss=mse") == []


def test_of_a_sweep_each_point_is_judged_by_its_own_experiment(old):
    for _ in range(2):  # from the files, and from the index
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            ds = tsdyn.open(old)
        assert sorted(wrong(ds)) == sorted(OF_THE_LOSS)
        assert "loss=cross_entropy" in ds.gradient_rms.attrs["wrong"]
        assert "loss=mse" not in ds.gradient_rms.attrs["wrong"]
    (told,) = integrity.check(old)
    assert "loss=cross_entropy" in told
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert sorted(wrong(tsdyn.open([old / "loss=mse", old / "loss=cross_entropy"]))) == sorted(OF_THE_LOSS)


def test_what_an_earlier_version_began_stays_marked_when_it_goes_on(losses, tmp_path):
    run = Path(shutil.copytree(losses / "loss=cross_entropy", tmp_path / "run"))
    as_written_by(2, run)
    longer = small(**{**FEW, "training__loss": "cross_entropy", "training__epochs": 4})
    with pytest.warns(tsdyn.WrongNumbersWarning):
        ds = tsdyn.run(longer, run)
    assert ds.attrs["schema_version"] == tsdyn.schema.VERSION
    assert ds.attrs["wrong_through"] == 2
    assert sorted(wrong(ds)) == sorted(OF_THE_LOSS)
    assert any("gradient_norm" in line for line in integrity.check(run))


def test_repair_takes_nothing_away_for_it(old):
    before = {file: file.read_bytes() for file in old.rglob("*.nc")}
    assert integrity.repair(old) == []
    assert {file: file.read_bytes() for file in old.rglob("*.nc")} == before


def test_validate_names_the_frozen_archive_and_exits_1(command, tmp_path):  # noqa: F811
    path = shutil.copytree(DATA / "cross-entropy-v2", tmp_path / "run")
    code, told, _ = command("validate", path)
    assert code == 1
    assert all(variable in told for variable in OF_THE_LOSS)
