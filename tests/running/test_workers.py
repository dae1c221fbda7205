"""Who reaches a sweep's workers, what is said of those that do not answer, and several commands on one sweep."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import psutil
import pytest
from distributed import LocalCluster, Security
from distributed.comm import connect

import tsdyn
from tests import processes
from tests.cases import FEW, small
from tests.test_cli import command  # noqa: F401
from tsdyn.archive import integrity, run_directory, sweep_directory, whole_files
from tsdyn.running import outcome
from tsdyn.running import workers as workers_module
from tsdyn.running.workers import WorkersError

GRID = {"teacher.polarity": [0.0, 1.0, 2.0]}


def listening(*processes):
    """Ports on which processes and their children listen."""
    family = {child for process in processes for child in (process, *process.children(recursive=True))}
    found = [c for p in family for c in p.net_connections("tcp")]
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}


def reached(address, security=None):
    """Whether one of dask's servers answers at an address."""

    async def talk():
        line = await connect(address, timeout=2, **(security or Security()).get_connection_args("client"))
        await line.write({"op": "identity"})
        return await line.read()

    try:
        return isinstance(asyncio.run(asyncio.wait_for(talk(), 4)), dict)
    except Exception:  # whatever it is, nothing was told
        return False


def answers(port, page):
    """Whether a web server on this port serves the page."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as plain:
        plain.settimeout(3)
        plain.sendall(f"GET /{page} HTTP/1.0\r\n\r\n".encode())
        return b" 200 " in plain.recv(100)
    return False


def test_nobody_without_the_certificate_reaches_a_sweep_s_workers(tmp_path):
    """On every port that is open: not plainly, not with a certificate of their own; and there is no dashboard."""
    experiment = small(sweep=GRID, **FEW | {"training__epochs": 100_000})
    (tmp_path / "sweep.toml").write_text(experiment.to_toml(), encoding="utf-8")
    words = ["tsdyn", "run", "sweep.toml", "-o", "sweep", "--workers", "1"]
    found, stranger = {}, Security.temporary()
    reading, writing = os.pipe()
    sweeping = processes.Process(words, tmp_path, {2: writing})
    os.close(writing)
    with os.fdopen(reading) as stderr:
        try:
            stderr.readline()  # an epoch was told of: all is up
            drain = threading.Thread(target=stderr.read)
            drain.start()
            pages = ("", "status", "info/main/workers.html", "json/counts.json", "metrics", "health")
            with ThreadPoolExecutor(32) as pool:  # each waits for seconds for an answer that must not come
                asked = {}
                for port in listening(psutil.Process(sweeping.pid), *processes.workers()):
                    asked |= {(port, page): pool.submit(answers, port, page) for page in pages}
                    asked[port, "tcp"] = pool.submit(reached, f"tcp://127.0.0.1:{port}")
                    asked[port, "tls"] = pool.submit(reached, f"tls://127.0.0.1:{port}", security=stranger)
                found = {which: answer.result() for which, answer in asked.items()}
        finally:
            os.kill(sweeping.pid, signal.SIGTERM)
            assert sweeping.wait() == 143
            drain.join()
    assert len(found) >= 4
    assert not any(found.values()), found


def test_workers_without_cryptography_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(WorkersError, match=r"needs the package cryptography .*pip install cryptography"):
        tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep", workers=1)


def test_a_cluster_that_does_not_close_does_not_hold_up_the_sweep(tmp_path, caplog, monkeypatch):
    close, opened = LocalCluster._close, []

    async def hanging(cluster):
        opened.append(cluster)
        await asyncio.Event().wait()

    monkeypatch.setattr(LocalCluster, "_close", hanging)
    monkeypatch.setattr(workers_module, "CLOSE_SECONDS", 1.0)
    ds = tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep", workers=1)
    assert int(ds.coverage.sum()) == 3
    assert "dask has not ended its processes in 1 seconds" in caplog.text
    monkeypatch.setattr(LocalCluster, "_close", close)
    opened[0].close(timeout=processes.HUNG)


def test_a_scheduler_s_address_decides_how_it_is_talked_to(tmp_path, caplog):
    """tls:// with what dask's own settings say; tcp:// with a word about who else can."""
    ours = Security.temporary()
    settings = {f"distributed.comm.tls.{k}": v for k, v in pem_files(ours, tmp_path).items()}
    for security, config, warned in ((ours, settings, False), (Security(), {}, True)):
        caplog.clear()
        with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None, security=security,
                          protocol="tcp" if warned else "tls") as cluster, dask.config.set(config):  # fmt: skip
            path = tmp_path / f"sweep-{warned}"
            assert reached(cluster.scheduler_address, security)  # so that not being reached means something
            ds = tsdyn.run(small(sweep=GRID, **FEW), path, scheduler=cluster.scheduler_address)
        assert int(ds.coverage.sum()) == 3
        assert ("anyone who reaches that address can run code as you" in caplog.text) == warned


def pem_files(security, folder):
    """Where dask's settings have a certificate: in files."""
    for name in ("ca", "cert", "key"):
        text = {"ca": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}[name]
        (folder / f"{name}.pem").write_text(text, encoding="ascii")
    ca, cert, key = (str(folder / f"{name}.pem") for name in ("ca", "cert", "key"))
    return {"ca-file": ca, "client.cert": cert, "client.key": key}


def test_a_scheduler_without_the_certificate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 2)
    with (
        LocalCluster(
            1, processes=False, dashboard_address=None, security=Security.temporary(), protocol="tls"
        ) as cluster,
        pytest.raises(WorkersError, match="does not answer"),
    ):
        tsdyn.run(small(sweep=GRID, **FEW), tmp_path / "sweep", scheduler=cluster.scheduler_address)


@pytest.mark.parametrize("together", [False, True])
def test_a_scheduler_without_workers_is_said_to_have_none(tmp_path, caplog, monkeypatch, together):
    monkeypatch.setattr(workers_module, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(workers_module, "ASK_SECONDS", 0.3)
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp") as cluster:
        cluster.scale(0)
        while cluster.scheduler.workers:
            time.sleep(0.1)

        def join():
            until = time.monotonic() + processes.HUNG
            while "no worker has been there for" not in caplog.text and time.monotonic() < until:
                time.sleep(0.1)
            cluster.scale(1)

        helper = threading.Thread(target=join)
        helper.start()
        ds = tsdyn.run(
            small(sweep=GRID, **FEW), tmp_path / "sweep", scheduler=cluster.scheduler_address, together=together
        )
        helper.join()
    assert int(ds.coverage.sum()) == 3
    assert caplog.text.count("no worker has been there for") == 1


def test_a_frozen_worker_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(workers_module, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(workers_module, "ASK_SECONDS", 0.3)
    frozen = []

    def thaw(child):
        until = time.monotonic() + processes.HUNG
        while "no worker has given a sign of life for" not in caplog.text and time.monotonic() < until:
            time.sleep(0.1)
        child.resume()

    def freeze(epoch, *_):
        if epoch >= 1 and not frozen:  # epochs are told twice a second
            frozen.extend(processes.workers())
            for child in frozen:
                child.suspend()
                threading.Thread(target=thaw, args=(child,)).start()

    experiment = small(sweep=GRID, **FEW | {"training__steps_per_epoch": 20_000})
    ds = tsdyn.run(experiment, tmp_path / "sweep", workers=1, progress=freeze)
    assert frozen
    assert int(ds.coverage.sum()) == 3
    assert "no worker has given a sign of life for" in caplog.text


# --- several commands on one sweep ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["alone", "with a worker"])
def test_commands_on_one_sweep_share_its_points_and_none_fails(tmp_path, workers):
    experiment = small(sweep={"teacher.polarity": [0.0, 0.5, 1.0, 1.5]}, **FEW)
    (tmp_path / "sweep.toml").write_text(experiment.to_toml(), encoding="utf-8")
    words = ["tsdyn", "run", "sweep.toml", "-o", "sweep", *workers]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: processes.run(words, tmp_path), range(3 - len(workers))))
    said = [each.stderr for each in done]
    assert [each.returncode for each in done] == [0] * len(done), said
    assert not any("Traceback" in text for text in said)
    ds = tsdyn.open(tmp_path / "sweep")
    assert int(ds.coverage.sum()) == 4
    assert integrity.check(tmp_path / "sweep") == []


def test_a_command_that_finds_all_points_held_has_nothing_to_do(tmp_path):
    experiment = small(sweep={"teacher.polarity": [0.0, 1.0]}, **FEW)
    (tmp_path / "sweep.toml").write_text(experiment.to_toml(), encoding="utf-8")
    path = tmp_path / "sweep"
    points = sweep_directory.write_sweep(path, experiment)
    with contextlib.ExitStack() as held:
        for name, single in points.items():
            held.enter_context(run_directory.RunDirectory(path / name, single))
        with pytest.raises(outcome.AllHeldError, match=r"other processes are writing all its points: .*no point"):
            tsdyn.run(experiment, path)
        done = processes.run(["tsdyn", "run", "sweep.toml", "-o", "sweep", "--quiet"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "other processes are writing all its points" in done.stdout
    assert int(tsdyn.run(experiment, path).coverage.sum()) == 2


def test_a_point_that_is_held_is_left_to_its_writer(tmp_path, caplog):
    experiment = small(sweep=GRID, **FEW)
    path = tmp_path / "sweep"
    points = sweep_directory.write_sweep(path, experiment)
    (held, single), *_ = points.items()
    with run_directory.RunDirectory(path / held, single):
        ds = tsdyn.run(experiment, path)
        np.testing.assert_array_equal(ds.coverage, [0, 1, 1])
    assert "1 of 3 points are being written by other processes" in caplog.text
    assert int(tsdyn.run(experiment, path).coverage.sum()) == 3
    with (
        run_directory.RunDirectory(tmp_path / "run", single),
        pytest.raises(whole_files.ArchiveError, match="another process is writing"),
    ):
        tsdyn.run(single, tmp_path / "run")
