"""How runs respond to signals, terminals and limits of the machine."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

import tsdyn
from tests import processes
from tests.cases import FEW, small
from tests.test_cli import command  # noqa: F401
from tsdyn import memory
from tsdyn.archive import integrity, whole_files
from tsdyn.engine import compiled_step, native
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import provenance
from tsdyn.running.members import Members

TSDYN = str(Path(sys.executable).with_name("tsdyn"))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "small.toml").write_text(small(**FEW).to_toml(), encoding="utf-8")
    return tmp_path / "small.toml"


def shell(script, folder, **more):
    """Run a script by sh with ``$tsdyn``; returns (exit code, output)."""
    environment = {**os.environ, "tsdyn": TSDYN, **more}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=processes.HUNG,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# --- threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "then"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        *(({name: value}, {name: value}) for name, value in [("OMP_WAIT_POLICY", "ACTIVE"), ("KMP_BLOCKTIME", "7")]),
    ],
)
def test_threads_wait_asleep_unless_the_environment_says_otherwise(own, then):
    """Set before torch, whose OpenMP reads it once."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    code = (
        "import json, os, sys, tsdyn.cli; early = 'torch' in sys.modules; sys.argv = ['tsdyn', '--version']\n"
        "try: tsdyn.cli.main()\n"
        f"finally: print(json.dumps([early, {{n: os.environ[n] for n in {waiting} if n in os.environ}}]))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in waiting} | own
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=processes.HUNG)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, then]


# --- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1])
def test_a_warning_commits_the_epoch_in_work_and_may_come_again(command, file, tmp_path, monkeypatch, number):  # noqa: F811
    """A dropped connection, the limit on processor time, a batch system: the kernel repeats SIGXCPU every second."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored where this suite was started, as under nohup")
    train = Members.advance

    def interrupted(self, epoch):
        if epoch == 2:
            for _ in range(3):
                os.kill(os.getpid(), number)
        return train(self, epoch)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Members, "advance", interrupted)
        code, _, err = command("run", file, "-o", tmp_path / "run", "--quiet")
    assert code == 128 + number
    assert "the same command goes on from there" in err
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2]
    assert signal.getsignal(number) == before
    ended = tsdyn.run(Experiment.from_toml(file), tmp_path / "run").load()
    xr.testing.assert_equal(ended, tsdyn.run(Experiment.from_toml(file), tmp_path / "whole").load())


def test_what_nohup_ignores_stays_ignored(file, tmp_path, monkeypatch):
    train = Members.advance

    def interrupted(self, epoch):
        os.kill(os.getpid(), signal.SIGHUP)
        return train(self, epoch)

    monkeypatch.setattr(Members, "advance", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert tsdyn.run(Experiment.from_toml(file), tmp_path / "run").sizes["epoch"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)


# --- what is printed -----------------------------------------------------------------------------------------


def test_a_run_goes_on_where_nothing_can_be_printed(file, tmp_path):
    """From Python's own start on; the streams of the other cases are given to a process that is forked."""
    code, out, err = shell('"$tsdyn" run small.toml -o run <&- >&- 2>&-; echo "code $?"', tmp_path)
    assert b"code 0" in out + err, (code, out, err)
    assert b"Traceback" not in err
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2, 3]
    assert integrity.check(tmp_path / "run") == []


@contextlib.contextmanager
def written_in_vain(where):
    """Streams that take nothing: of a full disk, closed, or of a reader that has gone."""
    reading, gone = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    yield {
        "full disk": {1: full, 2: full},
        "closed": {1: None, 2: None},
        "both": {1: gone, 2: full},
        "stderr gone": {2: gone},
    }[where]
    os.close(gone)
    os.close(full)


@pytest.mark.parametrize("where", ["full disk", "closed", "both", "stderr gone"])
def test_a_forked_run_goes_on_where_nothing_can_be_printed(file, tmp_path, where):
    with written_in_vain(where) as streams:
        done = processes.run(["tsdyn", "run", "small.toml", "-o", "run"], tmp_path, streams=streams)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert list(tsdyn.open(tmp_path / "run").epoch.values) == [0, 1, 2, 3]
    assert integrity.check(tmp_path / "run") == []


def test_a_progress_that_cannot_print_is_dropped(tmp_path, caplog):
    def broken(*_):
        raise BrokenPipeError("nobody reads")

    assert tsdyn.run(small(**FEW), tmp_path / "run", progress=broken).sizes["epoch"] == 4
    assert caplog.text.count("goes on, without telling of its epochs: nobody reads") == 1


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    code, out, err = shell('"$tsdyn" study list | head -n 1', tmp_path)
    assert (code, err, out.count(b"\n")) == (0, b"", 1)
    tsdyn.run(small(**FEW), tmp_path / "run")
    reading, gone = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    done = processes.run(["tsdyn", "show", "run"], tmp_path, streams={1: gone})
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE if done.returncode < 0 else 0, "")
    done = processes.run(["tsdyn", "show", "run"], tmp_path, streams={1: full})
    assert (done.returncode, done.stderr) == (
        1,
        "tsdyn: standard output: No space left on device; what was to be printed is incomplete\n",
    )
    os.close(gone)
    os.close(full)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8_shows_what_it_can(tmp_path, encoding):
    tsdyn.run(small(**FEW), tmp_path / "run")
    each = [words.split() for words in ("study list", "show run", "study show simsek2023-loss", "--help", "plot run")]
    program = (  # one process for all commands, which each set their streams anew
        "import json, sys\nfrom tsdyn.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = words\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code, words\n"
        "    print('ended', *words)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    forked = processes.run([sys.executable, "-c", program, json.dumps(each)], tmp_path, environment=environment)
    _all_shown(forked, each)
    if encoding == "ascii":  # from Python's own start on
        quick = [one for one in each if one[0] in ("study", "--help")]
        words = [sys.executable, "-c", program, json.dumps(quick)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding=encoding)
        _all_shown(done, quick)


def _all_shown(done, each):
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout
    for one in each:
        shown, ended, said = said.partition(f"ended {' '.join(one)}\n")
        assert shown, one
        assert ended, one


# --- memory limits -------------------------------------------------------------------------------------------

WIDE = {"teacher__widths": [4000, 4000, 10], "student__overrealization": 1.0, "seeds": 1}  # 128 MB of weights each


def test_a_run_beyond_ulimit_is_refused_in_a_sentence(tmp_path):
    wide = small(**FEW | WIDE | {"teacher__widths": [12_000, 12_000, 10]})
    (tmp_path / "wide.toml").write_text(wide.to_toml(), encoding="utf-8")
    limited = (
        "import resource, sys; from tsdyn.cli import main; resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30));"
        "sys.argv[1:] = ['run', 'wide.toml', '-o', 'run', '--quiet']; main()"
    )
    done = processes.run(["python", "-c", limited], tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "GB of memory are free" in done.stderr


def test_a_control_group_below_the_root_is_seen(tmp_path):
    """As a batch system makes one: the limit is the job's, the process is in a group inside it."""
    job = Path("/sys/fs/cgroup/memory") / f"tsdyn-{os.getpid()}"
    try:
        (job / "step").mkdir(parents=True)
        (job / "memory.limit_in_bytes").write_text(str(900 << 20), encoding="ascii")
    except OSError:
        pytest.skip("this machine lets nobody make a control group of version 1")
    try:
        wide = small(**FEW | WIDE | {"teacher__widths": [6_000, 6_000, 10]})
        (tmp_path / "wide.toml").write_text(wide.to_toml(), encoding="utf-8")
        inside = (
            "import os, sys; from tsdyn.cli import main; open(sys.argv[1], 'w').write(str(os.getpid()));"
            "sys.argv[1:] = ['run', 'wide.toml', '-o', 'run', '--quiet']; main()"
        )
        done = processes.run(["python", "-c", inside, job / "step" / "cgroup.procs"], tmp_path)
        assert (done.returncode, "GB of memory are free" in done.stderr) == (1, True), done.stderr
    finally:
        (job / "step").rmdir()
        job.rmdir()


V2 = "0::/user/session\n"
V1 = "5:cpu,cpuacct:/\n4:memory:/slurm/job\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("membership", "kind", "root", "limits", "left"),
    [
        (V2, "cgroup2", "/", {"user/session": (300, 100, 20), "user": (1000, 100, 0)}, 220),
        (V2, "cgroup2", "/", {"user/session": ("max", 100, 0), "user": (250, 100, 0)}, 150),
        (V2, "cgroup2", "/user", {"session": (300, 100, 20)}, 220),
        ("0::/\n", "cgroup2", "/", {".": (300, 100, 0)}, 200),
        (V1, "cgroup", "/", {"slurm/job": (400, 100, 10), "slurm": (9223372036854771712, 100, 0)}, 310),
        (V1, "cgroup", "/", {"slurm/job": (9223372036854771712, 100, 0), "slurm": (350, 100, 0)}, 250),
        (V1, "cgroup", "/docker/x", {".": (500, 100, 0)}, 400),
        (V1, "cgroup", "/", {"slurm/job": (50, 100, 0)}, 0),
        (V2, "cgroup2", "/", {}, sys.maxsize),
        ("", "cgroup2", "/", {".": (300, 100, 0)}, sys.maxsize),
    ],
)
def test_the_narrowest_control_group_counts(tmp_path, membership, kind, root, limits, left):
    names = {"cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             "cgroup2": ("memory.max", "memory.current", "inactive_file")}[kind]  # fmt: skip
    for group, (limit, used, cached) in limits.items():
        folder = tmp_path / "mount" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n", encoding="ascii")
        (folder / names[1]).write_text(f"{used}\n", encoding="ascii")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n", encoding="ascii")
    (tmp_path / "cgroup").write_text(membership, encoding="ascii")
    options = "rw,memory" if kind == "cgroup" else "rw"
    (tmp_path / "mountinfo").write_text(
        f"31 23 0:28 / /proc rw - proc proc rw\n35 31 0:32 {root} {tmp_path / 'mount'} rw - {kind} {kind} {options}\n",
        encoding="ascii",
    )
    assert memory._of_the_groups(str(tmp_path / "cgroup"), str(tmp_path / "mountinfo")) == left


MAPPED = """
import ctypes, torch
from tsdyn import derivatives
from torch import nn

class Told(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

told = ctypes.CDLL(None).mallinfo2
told.restype = Told

def mapped():
    before = told().hblks
    held = torch.empty(24 << 20, dtype=torch.uint8)
    return told().hblks - before

before = mapped()
derivatives.per_sample_gradients(nn.Linear(2, 1), lambda f, _: f.sum(), torch.ones(2, 2))
print(before, mapped())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this is not glibc 2.33 or newer")
@pytest.mark.parametrize(("own", "told"), [({}, "1 0"), ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, "1 1")])
def test_after_a_derivative_large_arrays_reuse_memory_unless_the_environment_says_otherwise(own, told):
    """glibc maps new pages for an array of 24 MB in a new process (1), and reuses its heap (0) once that may grow."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | own
    done = subprocess.run([sys.executable, "-c", MAPPED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


def test_memory_that_runs_out_all_the_same_is_a_sentence(command, file, tmp_path, monkeypatch):  # noqa: F811
    def refuse(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(Members, "advance", refuse)
    code, _, err = command("run", file, "-o", tmp_path / "run", "--quiet")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no memory is left" in err


# --- what computed it ----------------------------------------------------------------------------------------


def test_the_commit_is_that_of_tsdyn_s_own_checkout_only(tmp_path):
    """Installed inside somebody's repository, even tracked by it, it is none of that; nor does GIT_DIR mislead."""
    root = Path(tsdyn.__file__).resolve().parent.parent
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    places = {theirs: (theirs / ".venv" / "site", ["-f", ".venv"]), own: (own, ["tsdyn"])}
    for folder, (site, _) in places.items():
        for name, source in (("tsdyn", "tsdyn"), ("tsdyn/analysis", "analysis"), ("tsdyn/studies", "studies")):
            shutil.copytree(root / source, site / name)
        git(folder, "init", "-q")
        git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "commit.toml").write_text(small(**FEW | {"training__epochs": 0}).to_toml(), encoding="utf-8")
    for folder, (site, files) in places.items():
        words = ["python", "-c", RECORDED, site, tmp_path / "commit.toml", own, folder, *files]
        done = processes.run(words, tmp_path)
        assert done.returncode == 0, done.stderr
        tracked = git(own, "rev-parse", "HEAD") if folder == own else "unknown"
        assert done.stdout.split() == ["unknown", tracked, tracked]


def git(folder, *words):
    whole = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x", *words]
    return subprocess.run(whole, check=True, capture_output=True, text=True).stdout.strip()


#: Prints ``git_commit`` of runs by the copy of tsdyn in a folder, imported anew in a process that has all else: before
#: its repository tracks it, after, and then with variables that name another repository.
RECORDED = """
import os, subprocess, sys, tempfile
site, file, other, folder, *files = sys.argv[1:]
sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != '_tsdyn_here']
[sys.modules.pop(m) for m in list(sys.modules) if m.partition('.')[0] == 'tsdyn']
sys.path.insert(0, site)
import tsdyn
assert tsdyn.__file__.startswith(site), tsdyn.__file__
from tsdyn.experiment.experiment import Experiment
from tsdyn.running import provenance
def recorded():
    provenance.git_commit.cache_clear()
    run = tsdyn.run(Experiment.from_toml(file), tempfile.mkdtemp() + '/run')
    print(run.attrs['git_commit'])
git = ['git', '-C', folder, '-c', 'user.name=x', '-c', 'user.email=x@x']
recorded()
subprocess.run([*git, 'add', *files], check=True)
subprocess.run([*git, 'commit', '-q', '-m', 'second'], check=True)
recorded()
os.environ |= {'GIT_DIR': other + '/.git', 'GIT_WORK_TREE': other}
recorded()
"""


def test_what_computed_each_part_is_kept_and_said(command, file, tmp_path, monkeypatch, caplog):  # noqa: F811
    path = tmp_path / "run"
    first = tsdyn.run(Experiment.from_toml(file), path)
    (entry,) = json.loads(first.attrs["history"])
    assert entry["from_epoch"] == 0
    assert all(entry[key] for key in ("engine", "compiler", "cpu", "cpu_flags", "device", "threads", "torch_version"))
    assert (first.attrs["engine"], first.attrs["cpu"]) == (entry["engine"], entry["cpu"])
    assert not caplog.records
    longer = Experiment.from_toml(file).replace({"training.epochs": 5})
    with monkeypatch.context() as patch:
        patch.setattr("tsdyn.engine.native.load", lambda *_: None)
        patch.setattr(
            provenance, "engine", lambda _: {"engine": "torch", "compiler": "none", "cpu": "Z80", "cpu_flags": "-"}
        )
        second = tsdyn.run(longer, path)
    assert "goes on elsewhere than it began" in caplog.text
    assert f"cpu {entry['cpu']} before, Z80 now" in caplog.text
    entries = json.loads(second.attrs["history"])
    assert [(e["from_epoch"], e["cpu"]) for e in entries] == [(0, entry["cpu"]), (4, "Z80")]
    third = tsdyn.run(longer.replace({"training.epochs": 6}), path)
    assert [e["from_epoch"] for e in json.loads(third.attrs["history"])] == [0, 4, 6]
    _, out, _ = command("show", path)
    shown = " ".join(out.split())
    assert "from epoch 0:" in shown
    assert "from epoch 4: engine torch, compiler none, cpu Z80" in shown or "cpu Z80" in shown


def test_the_kernel_s_compiler_is_the_one_that_made_it():
    library = native.load(compiled_step.SOURCE, compiled_step.Job)
    if library is None:
        pytest.skip("no compiled step on this machine")
    compiler = provenance.engine()["compiler"]
    assert compiler.startswith(("GCC: ", "clang")) or "clang version" in compiler


# --- odd files and words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1" * 5000, "0x" + "f" * 5000, "[" + "1" * 5000 + "]", "-" + "9" * 4400])
def test_numbers_of_thousands_of_digits_are_refused(command, file, tmp_path, number):  # noqa: F811
    text = file.read_text(encoding="utf-8").replace("seeds = 2", f"seeds = {number}")
    (tmp_path / "long.toml").write_text(text, encoding="utf-8")
    code, _, err = command("run", tmp_path / "long.toml", "-o", tmp_path / "run")
    assert code == 2
    assert len(err) < 1000
    code, _, err = command("run", file, "-o", tmp_path / "run", "--set", f"seeds={number}")
    assert code == 2
    assert len(err) < 1000


def test_a_byte_order_mark_is_no_part_of_an_experiment(file, tmp_path):
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Experiment.from_toml(tmp_path / "marked.toml") == Experiment.from_toml(file)


@pytest.mark.parametrize(
    "name", ["3d.npy", "2024-01-02x.npy", "1.5.npy", "~x.npy", "data (1).npz", "ä/b,c.npy", "x#1.npy"]
)
def test_a_path_may_begin_with_anything(command, tmp_path, name):  # noqa: F811
    file = tmp_path / "file.toml"
    file.write_text(small(data__law="file", data__path="x.npy").to_toml(), encoding="utf-8")
    code, _, err = command("run", file, "-o", tmp_path / "run", "--set", f"data.path={name}")
    assert (code, f"{name}: no such file" in err) == (2, True), err


def test_inodes_that_are_used_up_are_named(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=5,size=64m", "tmpfs", str(mounted)], check=False,
                          capture_output=True)  # fmt: skip
    if made.returncode:
        pytest.skip("this user mounts nothing")
    try:
        with pytest.raises(whole_files.ArchiveError, match=r"no space left for another file: all 5 inodes are used"):
            tsdyn.run(small(**FEW), mounted / "run")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_the_user_s_default_device_is_the_user_s(command, file, tmp_path):  # noqa: F811
    expected = tsdyn.run(Experiment.from_toml(file), tmp_path / "expected").load()
    torch.set_default_device("meta")
    try:
        found = tsdyn.run(Experiment.from_toml(file), tmp_path / "run").load()
        code, _, err = command("run", file, "-o", tmp_path / "again")
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    assert code == 0, err
    xr.testing.assert_equal(found, expected)
    xr.testing.assert_equal(tsdyn.open(tmp_path / "again").load(), expected)
