"""Native code is built once and atomically, and loaded only if it belongs to this user and its structs match."""

import ctypes
import dataclasses
import logging
import os
import resource
import shutil
import stat
import textwrap

import pytest
import torch

from tests import processes
from tsdyn.engine import (
    compiled_curvature,
    compiled_factors,
    compiled_moments,
    compiled_normals,
    compiled_patches,
    compiled_step,
    compiled_sums,
    convolution,
    native,
)
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import provenance

JOBS = {
    module.__name__: (module.SOURCE, module.Job)
    for module in (
        *(compiled_curvature, compiled_factors, compiled_moments, compiled_normals),
        *(compiled_patches, compiled_step, compiled_sums, convolution),
    )
}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, with no library loaded and no warning given yet."""
    cached = native.load, native._compiler, native._say_once, native._private_folder
    for function in cached:
        function.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TSDYN_KERNEL", raising=False)
    yield tmp_path / "cache" / "tsdyn"
    for function in cached:
        function.cache_clear()
    native._hanging.clear()


def source(folder, *, field=False, quick=True):
    """Source of a small library whose Job has two fields, or three, in its own folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(native.FOLDER / "job.hpp", folder)
    more, listed = ("int64_t third;", ", TSDYN_FIELD(third)") if field else ("", "")
    path = folder / "small.cpp"
    path.write_text(
        '#include "job.hpp"\n'
        f"struct Job {{ int64_t first; double second; {more} }};\n"
        f"TSDYN_EXPORT_JOB(TSDYN_FIELD(first), TSDYN_FIELD(second){listed})\n"
        'extern "C" int64_t sum(const Job* job) { return job->first + (int64_t)job->second; }\n'
    )
    return path


class Job(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int64), ("second", ctypes.c_double))


class Swapped(ctypes.Structure):
    _fields_ = (("second", ctypes.c_double), ("first", ctypes.c_int64))


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_the_one_in_cpp(name):
    assert native.load(*JOBS[name]) is not None


def test_a_field_on_one_side_only_is_refused(fresh, tmp_path):
    assert native.load(source(tmp_path / "same"), Job).sum(ctypes.byref(Job(2, 3.0))) == 5
    with pytest.raises(native.LayoutError, match=r"24 bytes, \['first', 'second', 'third'\]; .*Job has 16"):
        native.load(source(tmp_path / "more", field=True), Job)
    with pytest.raises(native.LayoutError, match="Declare the same fields in both, in one order"):
        native.load(source(tmp_path / "same"), Swapped)


def test_a_real_source_with_a_field_more_is_refused(fresh, tmp_path, monkeypatch):
    """Built without optimising, which takes ten seconds and moves no field."""
    quick = dataclasses.replace(native._compiler(), flags=tuple(flag for flag in native.FLAGS if flag != "-O3"))
    monkeypatch.setattr(native, "_compiler", lambda: quick)
    for header in native.FOLDER.glob("*.hpp"):
        shutil.copy(header, tmp_path)
    text = convolution.SOURCE.read_text()
    changed = text.replace("struct Job {\n", "struct Job {\n    int64_t added;\n")
    assert changed != text
    (tmp_path / "convolution.cpp").write_text(changed)
    with pytest.raises(native.LayoutError, match="would write into other memory"):
        native.load(tmp_path / "convolution.cpp", convolution.Job)


@pytest.mark.parametrize("damage", ["half", "empty", "no checksum"])
def test_a_broken_build_is_built_again(fresh, tmp_path, damage):
    path = source(tmp_path / "of")
    native.load(path, Job)
    (library,) = fresh.glob("*.so")
    content = library.read_bytes()
    library.unlink()  # what is loaded stays as it was
    if damage == "no checksum":
        library.write_bytes(content)
        library.with_suffix(".sha256").unlink()
    else:
        library.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    native.load.cache_clear()
    assert native.load(path, Job).sum(ctypes.byref(Job(2, 3.0))) == 5
    assert native._whole(library)
    assert sorted(p.suffix for p in fresh.iterdir()) == [".sha256", ".so"]


def test_a_cache_that_others_can_write_is_not_run(fresh, tmp_path, caplog):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert native.load(source(tmp_path / "of"), Job) is not None
    assert list(fresh.iterdir()) == []
    assert "belongs to another user or can be written by all" in caplog.text
    mode = native._private_folder().stat().st_mode
    assert stat.S_IMODE(mode) == 0o700


def test_a_cache_of_another_user_is_not_run(fresh, tmp_path, monkeypatch):
    native.load(source(tmp_path / "of"), Job)
    assert native._own(fresh)
    monkeypatch.setattr(os, "geteuid", lambda: 12345 + fresh.stat().st_uid)
    assert native._own(fresh) == (fresh.stat().st_uid == 0)


def test_without_a_home_directory_a_private_folder_is_used(tmp_path):
    code = """
        import logging, os, pwd
        def gone(uid): raise KeyError("getpwuid(): uid not found")
        pwd.getpwuid = gone
        os.environ.pop("HOME", None), os.environ.pop("XDG_CACHE_HOME", None)
        from pathlib import Path
        from tests.engine.test_native import Job, source
        from tsdyn.engine import native
        logging.basicConfig()
        folder = native._private_folder()
        print(native.load(source(Path("of")), Job) is not None, folder)
    """
    answer = processes.run(["python", "-c", textwrap.dedent(code)], tmp_path)
    assert answer.returncode == 0, answer.stderr
    loaded, folder = answer.stdout.split()
    assert loaded == "True"
    assert not os.path.exists(folder)  # it went with the process
    assert answer.stderr.count("there is no home directory; set XDG_CACHE_HOME") == 1


def test_a_compiler_that_hangs_is_given_up_once(fresh, tmp_path, monkeypatch, caplog):
    slow = tmp_path / "slow-compiler"
    slow.write_text("#!/bin/sh\nsleep 60 & wait\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(native, "VERSION_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        for part in ("one", "two"):
            assert native.load(source(tmp_path / part), Job) is None
    (record,) = caplog.records
    assert "hangs: given up after 0.2 s" in record.message


def test_a_fallback_is_said_and_one_that_was_asked_for_is_not(fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert native.load(source(tmp_path / "of"), Job) is None
        native.load.cache_clear()
        assert native.load(source(tmp_path / "of"), Job) is None
    (record,) = caplog.records
    assert "slower and rounds otherwise: no C++ compiler is installed" in record.message
    caplog.clear()
    monkeypatch.setenv("TSDYN_KERNEL", "off")
    native.load.cache_clear()
    assert native.load(source(tmp_path / "of"), Job) is None
    assert caplog.records == []


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on addresses here")
def test_a_library_that_finds_no_memory_is_no_reason_to_round_otherwise(fresh, tmp_path):
    """The system's message is the same as for a folder of which nothing may be run, which is one."""
    path = source(tmp_path / "of")
    assert native.load(path, Job) is not None
    code = """
        import resource, sys
        from pathlib import Path
        from tests.engine.test_native import Job
        from tsdyn.engine import native
        native._compiler()  # it is a process
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            native.load(Path(sys.argv[1]), Job)
        except MemoryError as error:
            print(error)
    """
    answer = processes.run(["python", "-c", textwrap.dedent(code), str(path)], tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "no memory is left to load small" in answer.stdout
    assert "TSDYN_KERNEL=off" in answer.stdout
    assert "rounds otherwise" not in answer.stderr


def test_an_archive_says_which_part_was_not_compiled(monkeypatch):
    deep = Experiment(
        name="deep", teacher={"widths": [4, 3, 3, 2]}, data={"train": 20, "eval": 9}, record={"observables": ["A"]}
    )
    loaded = native.load

    def without(*missing):
        monkeypatch.setattr(native, "load", lambda part, job: None if part.stem in missing else loaded(part, job))
        return provenance.facts("cpu", deep)["engine"]

    assert without() == "compiled step"
    assert without("compiled_sums") == "compiled step; torch for sums"
    assert without("compiled_sums", "compiled_moments") == "compiled step; torch for sums, moments"
    assert without("compiled_step") == "torch; compiled sums, moments"
    assert without("compiled_step", "compiled_sums", "compiled_moments") == "torch"
    shallow = deep.replace({"teacher.widths": [4, 3, 2]})
    monkeypatch.setattr(native, "load", lambda part, job: None if "moments" in part.stem else loaded(part, job))
    assert provenance.facts("cpu", shallow)["engine"] == "compiled step"


@pytest.fixture
def without_compilers(fresh, tmp_path, monkeypatch):
    """No compiler on the path; a package ziglang whose `c++` is this machine's, and refuses flags of GCC alone."""
    system = shutil.which("c++")
    package = tmp_path / "site" / "ziglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import subprocess, sys\n"
        "word, *rest = sys.argv[1:]\n"
        "assert word == 'c++', word\n"
        "if '--version' not in rest:\n"
        "    rest.remove('-fno-sanitize=all')\n"
        f"raise SystemExit(subprocess.call([{system!r}, *rest]))\n"
    )
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path


def test_without_a_compiler_that_of_ziglang_is_used_and_the_log_says_so(without_compilers, caplog):
    with caplog.at_level(logging.WARNING):
        for part in ("one", "two"):
            assert native.load(source(without_compilers / part), Job).sum(ctypes.byref(Job(2, 3.0))) == 5
    (record,) = caplog.records
    assert "built by ziglang, which takes minutes when it is first used" in record.message
    assert native._compiler().seconds == native.ZIG_SECONDS > native.BUILD_SECONDS


def test_ziglang_is_not_used_where_there_is_a_compiler(without_compilers, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(without_compilers / "site")
    assert "ziglang" not in native._compiler().command


def test_a_ziglang_that_fails_is_named(without_compilers, caplog):
    (without_compilers / "site" / "ziglang" / "__main__.py").write_text("raise SystemExit('no Clang in here')")
    with caplog.at_level(logging.WARNING):
        assert native.load(source(without_compilers / "of"), Job) is None
    assert "ziglang ended with code 1: no Clang in here" in caplog.text


def test_a_source_that_does_not_compile_says_what_the_compiler_says(fresh, tmp_path, caplog):
    path = source(tmp_path / "of")
    path.write_text("no C++ at all")
    with caplog.at_level(logging.WARNING):
        assert native.load(path, Job) is None
    assert "ended with code 1" in caplog.text


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("TSDYN_KERNEL", "0", "TSDYN_KERNEL=0: it is 'on' or 'off'; unset it for on"),
        ("TSDYN_KERNEL", "", "TSDYN_KERNEL=: it is 'on' or 'off'; unset it for on"),
        ("TSDYN_TF32", "ON", "TSDYN_TF32=ON: it is 'on' or 'off'; unset it for off"),
    ],
)
def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch, name, word, message):
    default = name == "TSDYN_KERNEL"
    for said, meant in {"on": True, "off": False}.items():
        monkeypatch.setenv(name, said)
        assert native.switched_on(name, default=default) is meant
    monkeypatch.delenv(name)
    assert native.switched_on(name, default=default) is default
    monkeypatch.setenv(name, word)
    with pytest.raises(ExperimentError, match=message):
        native.switched_on(name, default=default)


def test_numbers_that_are_not_in_memory_are_written_out_or_refused():
    one = torch.tensor([1.0, 2.0], requires_grad=True)
    (nothing,) = torch.autograd.grad(one.sgn().sum(), one)
    assert nothing.data_ptr() == 0  # where compiled code would read
    negative = torch._neg_view(torch.tensor([1.0, 2.0]))
    assert negative.is_contiguous()
    for tensor, numbers in ((nothing, [0.0, 0.0]), (negative, [-1.0, -2.0])):
        assert not native.serves([tensor], compiled_factors.SOURCE, compiled_factors.Job)
        with pytest.raises(ValueError, match="torch computes this tensor's numbers"):
            native.address(tensor)
        held = native.written(tensor)
        assert (ctypes.c_float * 2).from_address(native.address(held))[:] == numbers
