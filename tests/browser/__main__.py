"""Opens the report page and the built documentation in headless Chromium (``make browser``).

Each page is opened in light and in dark and at the widths of a desk and of a phone.  It must ask for nothing elsewhere
(report) and log no error, fit the window's width, differ in its background between light and dark, and pass axe's rules
for contrast, texts of pictures and names of links and fields.  Selecting a seed of a report must fade the others.
Needs node and npm; Chromium itself comes from the npm registry, once.  Exit status 1 if anything is found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tsdyn.analysis import report

import tsdyn
from tests.cases import small

ROOT = Path(__file__).resolve().parents[2]
HERE, TARGET = ROOT / "tests" / "browser", ROOT / "build" / "browser"
DOCS = ROOT / "docs" / "_build" / "html"
#: Pages that Sphinx makes by itself.
MADE = {"genindex.html", "py-modindex.html", "search.html"}

#: A page with one of each fault, which must be found, and the words of what is found.
PLANTED = """<html><body style="background: white"><p style="color: #ddd">pale</p><img src="data:,">
<a href="#"></a>
<div style="width: 5000px">wide</div><img alt="far" src="https://example.org/far.png">
<script>throw Error("said")</script>
<div class="seeds"><input type="radio" name="seed"><input type="radio" name="seed"><svg><g class="curve s0"><circle
cx="5" cy="5" r="4"/></g><g class="curve s1"/></svg></div><span class="math">\\(x\\)</span></body></html>"""
FAULTS = (
    "color-contrast", "image-alt", "link-name", "label", "html-has-lang", "document-title", "px too wide", "asks for",
    "error logged", "seeds: untold", "seeds: wrong", "formulas",
)  # fmt: skip


def main() -> int:
    if not (shutil.which("node") and shutil.which("npm")):
        print("not run: node and npm are not on this machine")
        return 2
    TARGET.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", TARGET)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=TARGET, check=True)
    shots = TARGET / "shots"
    shots.mkdir(exist_ok=True)
    tasks = [{"file": str(page), "selects": True, "shown": page.stem} for page in _reports()]
    pages = sorted(DOCS.rglob("*.html")) if DOCS.exists() else []
    if not pages:
        print(f"documentation: not checked, no pages in {DOCS} (make docs)")
    pages = [page for page in pages if "_static" not in page.parts and page.name not in MADE]
    tasks += [{"file": str(page), "selects": False, "shown": None} for page in pages]
    planted = TARGET / "planted.html"
    planted.write_text(PLANTED, encoding="utf-8")
    tasks.append({"file": str(planted), "selects": True, "shown": None})
    listed = TARGET / "tasks.json"
    listed.write_text(json.dumps(tasks), encoding="utf-8")
    found = _checked(listed, shots)
    if len(found) != 4 * len(tasks):
        raise SystemExit(f"tests.browser: {len(found)} of {4 * len(tasks)} settings were reported")
    faults, missed = [], []
    for page in found:
        if page["file"] == str(planted):
            said = " ".join(_faults(page))
            missed += [
                f"{_named(page)}: the planted fault {word!r} was not found" for word in FAULTS if word not in said
            ]
        else:
            faults += [f"{_named(page)}: {fault}" for fault in _faults(page)]
    faults += _themes([page for page in found if page["file"] != str(planted)]) + missed
    print("\n".join(faults))
    print(f"{len(tasks)} pages in {len(found)} settings: {len(faults)} faults; pictures of the reports in {shots}")
    return bool(faults)


def _reports() -> list[Path]:
    """Pages of a sweep with several seeds, of a run, and of a run of which nothing is committed yet."""
    work = TARGET / "archives"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    base = small(training__epochs=6)
    tsdyn.run(base.replace({"sweep": {"student.overrealization": [1.0, 2.0]}}), work / "sweep")
    tsdyn.run(base, work / "run")
    waiting = work / "waiting"
    waiting.mkdir()
    shutil.copy(work / "run" / "experiment.toml", waiting)
    pages = [report.write(work / name, TARGET / f"report-{name}.html") for name in ("sweep", "run")]
    live = TARGET / "report-waiting.html"
    next(report.watch(waiting, live, every=600))
    return [*pages, live]


def _checked(tasks: Path, shots: Path) -> list[dict]:
    with subprocess.Popen(
        ["node", str(HERE / "check.mjs"), str(tasks), str(shots)], cwd=TARGET, stdout=subprocess.PIPE, text=True
    ) as child:
        found = [json.loads(line) for line in child.stdout]
    if child.returncode:
        raise SystemExit(f"tests.browser: node ended with status {child.returncode}")
    return found


def _named(page: dict) -> str:
    return f"{os.path.relpath(page['file'], ROOT)} ({page['theme']}, {page['device']})"


def _faults(page: dict) -> list[str]:
    found = [f"error logged: {line}" for line in page["errors"]]
    if page["selection"] is not None:  # a report: one file, nothing from elsewhere
        found += [f"asks for {url}" for url in page["elsewhere"]]
        chosen = page["selection"]
        if chosen["curves"]:
            wanted = {"untold": 0, "wrong": [], "fadedForAll": 0, "hit": True}
            found += [f"seeds: {key} is {chosen[key]}" for key, value in wanted.items() if chosen[key] != value]
            if chosen["buttons"] < 2:
                found.append("seeds: no buttons that select one")
    if page["formulas"] and (page["formulas"]["set"] < page["formulas"]["written"] or page["formulas"]["wrong"]):
        found.append(f"formulas: {page['formulas']}")
    if page["tooWide"]:
        found.append(f"{page['tooWide']['over']} px too wide: {page['tooWide']['elements']}")
    found += [f"{v['rule']}, {v['count']} times: {'; '.join(v['first'])}" for v in page["violations"]]
    return found


def _themes(found: list[dict]) -> list[str]:
    backgrounds = defaultdict(set)
    for page in found:
        backgrounds[page["file"]].add((page["theme"], page["background"]))
    return [
        f"{file}: light and dark have one background, {seen}"
        for file, seen in backgrounds.items()
        if len({colour for _, colour in seen}) < 2
    ]


if __name__ == "__main__":
    sys.exit(main())
