"""The page of an archive: whole, self-contained, and everything in the archive is text on it, never markup."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import netCDF4
import numpy as np
import pytest
import xarray as xr
from tsdyn.analysis import audit, figures, report
from tsdyn.analysis.citations import DATA, PAPERS, citations

import tsdyn
from tests.cases import small
from tsdyn.archive.whole_files import DirectoryError
from tsdyn.vocabulary import VARIABLES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
#: What a hostile attribute might hold: markup, quotes, control and direction characters.
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\x00\u202e&amp;$^$"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Well-formed: every element closed in order; keeps elements, their attributes and the text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


def self_contained(html):
    """No script, no handler, no reference to anything outside the page."""
    page = Page(html)
    for tag, attrs in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "action", "data", "srcset"):
            assert attrs.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in html
    assert "@import" not in html
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    tsdyn.run(small(training__epochs=2, record__observables=["mse", "lemma1_residual"]), path)
    return path


def test_the_page_says_what_ran(run):
    page = self_contained(report.render(run))
    ds = tsdyn.open(run)
    for wanted in (
        ds.attrs["digest"],
        "3 of 3 epochs",
        "Lemma 1",
        "3 holds",
        "no member became NaN",
        "steps_per_epoch = 30",
    ):
        assert wanted in page.text
    images = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 1  # what mse allows
    for image in images:
        assert base64.b64decode(image.split(",")[1], validate=True).startswith(b"\x89PNG\r\n")


def test_attributes_are_text_and_never_markup(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/archive.nc.sha256").unlink()  # whoever forges an archive leaves out its checksum
    with netCDF4.Dataset(tmp_path / "run/archive.nc", "a") as nc:
        for name in ("name", "digest", "created", "conventions", "git_commit"):
            nc.setncattr(name, HOSTILE.replace("\0", ""))  # netCDF ends a string at it
        nc.setncattr("key<b>&", "x")
        nc["mse_eval"].setncattr("long_name", HOSTILE.replace("\0", ""))
        nc["mse_eval"].setncattr("source", HOSTILE.replace("\0", ""))
    html = report.render(tmp_path / "run", audit=False)
    page = self_contained(html)
    assert "<script>alert(1)</script>" in page.text
    assert "key<b>&" in page.text
    assert all(c.isprintable() or c == "\n" for c in html)
    assert "<b>" not in html
    assert report.text(HOSTILE).count("�") == 3


def test_failures_and_coverage_are_listed(tmp_path):
    wild = small(training__epochs=2, sweep={"training.learning_rate": [0.02, 50.0]}, record__observables=["mse"])
    tsdyn.run(wild, tmp_path / "sweep")
    page = self_contained(report.render(tmp_path / "sweep"))
    assert "2 of 2 points are finished" in page.text
    assert "learning_rate = 50.0, seed 2became NaN or infinite in epoch 1" in page.text
    more = wild.replace({"sweep": {"training.learning_rate": [0.02, 50.0, 0.5]}})
    (tmp_path / "sweep/experiment.toml").write_text(more.to_toml(), encoding="utf-8")
    archive = tmp_path / "sweep/learning_rate=0.02/archive.nc"
    archive.write_bytes(archive.read_bytes()[:2000])
    page = self_contained(report.render(tmp_path / "sweep"))
    assert "1 of 3 points are finished" in page.text
    assert re.search(r"cannot be read.*learning_rate=0.02", page.text)
    assert "learning_rate = 0.50% of its recorded epochs" in page.text


def test_the_page_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    target = report.write(run, tmp_path / "page.html", audit=False)
    before = target.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RuntimeError, match=r"page.html: cannot be written: no space left"):
        report.write(run, target, audit=False)
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(DirectoryError, match="does not exist"):
        report.write(tmp_path / "nowhere", target)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; the page is checked by a parser above")
def test_a_browser_renders_it_without_complaint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/archive.nc.sha256").unlink()  # whoever forges an archive leaves out its checksum
    with netCDF4.Dataset(tmp_path / "run/archive.nc", "a") as nc:
        nc.setncattr("git_commit", "<script>document.title = 'overrun'</script><img src=http://127.0.0.1:9/x.png>")
    page = report.write(tmp_path / "run", tmp_path / "page.html", audit=False)
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'browser'}",
        "--enable-logging=stderr", "--window-size=1000,1500",
    ]  # fmt: skip
    shot = tmp_path / "shot.png"
    for action in (["--dump-dom"], [f"--screenshot={shot}"]):
        done = subprocess.run([CHROMIUM, *flags, *action, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert "CONSOLE" not in done.stderr  # where errors and refusals of the page's policy are logged
        if done.stdout:
            dom = Page(done.stdout[done.stdout.index("<html") :])
            assert "overrun" in dom.text
            assert "<title>small</title>" in done.stdout
            assert not [1 for tag, _ in dom.elements if tag == "script"]
    assert shot.read_bytes().startswith(b"\x89PNG")


def test_citations_are_of_what_was_recorded(run):
    found = citations(tsdyn.open(run))
    assert found[0].startswith("@software{tsdyn,")
    assert len(found) == 2
    assert tsdyn.__version__ in found[0]
    digits = tsdyn.open(run)
    digits.attrs["experiment"] = small(data__law="digits", teacher__widths=[64, 4, 6]).to_toml()
    assert DATA["digits"] in citations(digits)
    for entry in [*found, *PAPERS.values(), *DATA.values()]:
        assert entry.count("{") == entry.count("}")
        assert re.match(r"@\w+\{\w+,\n", entry)
    named = " ".join(variable.source for variable in VARIABLES.values())
    for words in ("Tian 2020", "Tian et al. 2019", "Saad & Solla 1995", "Goldt et al. 2019"):
        assert words in PAPERS
        assert words in named


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda ds: ds.assign_coords(seed=[0] * ds.sizes["seed"]), r"seed has the labels \[0\] more than once"),
        (lambda ds: ds.assign(mse_eval=(ds["mse_eval"].dims, np.full(ds["mse_eval"].shape, "a"))), "mse_eval holds"),
        (lambda ds: ds.assign(mse_eval=ds["mse_eval"].fillna(0).astype(int)), "mse_eval holds int64, not floating"),
        (lambda ds: xr.Dataset({"x": ("t", [1.0])}), "seed, epoch|needs|no dimension epoch|no mse_eval"),
        (lambda ds: ds.drop_attrs(), "has no attribute 'experiment'"),
    ],
)
def test_what_reads_well_but_is_no_archive_is_refused_in_words(run, odd, words, tmp_path):
    ds = odd(tsdyn.open(run).load())
    ds.to_netcdf(tmp_path / "odd.nc")
    there = tsdyn.open(tmp_path / "odd.nc")
    with pytest.raises(ValueError, match=words):
        audit.audit(there)
    if "experiment" not in words:  # a page and a curve need none
        with pytest.raises(DirectoryError, match=words):
            report.render(tmp_path / "odd.nc")
        with pytest.raises(ValueError, match=words):
            figures.FIGURES["loss"](there)


def test_curves_of_each_seed_tell_their_numbers_without_a_script(run):
    html = report.render(run, audit=False)
    self_contained(html)
    ds = tsdyn.open(run).load()
    told = re.findall(r"<title>seed (\d+), epoch (\d+): (\w+) ([^<]+)</title>", html)
    assert len(told) == ds.sizes["seed"] * ds.sizes["epoch"]
    for seed, epoch, name, value in told:
        assert float(value) == pytest.approx(float(ds[name].sel(seed=int(seed), epoch=int(epoch))), rel=6e-4)
    for place in range(ds.sizes["seed"]):
        assert f'id="seed-{place}"' in html
        assert f"#seed-{place}:checked ~ .charts .curve:not(.s{place})" in html


def test_a_page_is_watched_until_the_run_is_finished(tmp_path, monkeypatch):
    from tsdyn.running import runner

    monkeypatch.setattr(runner, "COMMIT_SECONDS", 0.0)
    path, page = tmp_path / "run", tmp_path / "page.html"
    with pytest.raises(DirectoryError):
        next(report.watch(path, page))

    def stop(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(small(), path, progress=stop)
    seen = report.watch(path, page, every=0.0, audit=False)
    assert 0 < next(seen) < 1
    self_contained(page.read_text(encoding="utf-8"))
    assert 'http-equiv="refresh"' in page.read_text(encoding="utf-8")
    runner.run(small(), path)
    assert list(seen) == [1.0]
    assert "refresh" not in page.read_text(encoding="utf-8")


def test_each_figure_names_its_command_and_the_page_its_numbers(run):
    html = report.render(run, audit=False)
    assert f"<code>tsdyn plot {run} loss</code>" in html
    assert "<h2>Numbers</h2>" in html
    assert "3 seeds" in html
