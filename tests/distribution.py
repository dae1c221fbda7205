"""``make dist``: builds wheel and sdist twice, compares them, checks their contents, installs the wheel and runs it.

The second build must give the same files (SOURCE_DATE_EPOCH is the last commit's time).  The wheel must hold every
module of the tree and nothing else; the sdist must hold what is needed to test it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Folder of the tree → its place in the wheel.
PLACES = {"tsdyn": "tsdyn", "analysis": "tsdyn/analysis", "studies": "tsdyn/studies"}
SUFFIXES = (".py", ".pyi", ".cpp", ".hpp", ".typed")


def main() -> None:
    said = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    environment = os.environ | {"SOURCE_DATE_EPOCH": subprocess.check_output(said, text=True).strip()}
    target = ROOT / "dist"
    with tempfile.TemporaryDirectory() as again:
        for folder in (target, Path(again)):
            subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, env=environment)
        for file in sorted(target.iterdir()):
            other = Path(again) / file.name
            same = file.suffix != ".whl" or file.read_bytes() == other.read_bytes()
            same &= not file.name.endswith(".gz") or _members(file) == _members(other)
            print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB, {'the same twice' if same else 'DIFFERS'}")
            if not same:
                raise SystemExit(f"{file.name}: two builds of one commit differ")
    (wheel,) = target.glob("*.whl")
    wanted = {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SUFFIXES
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != wanted:
        raise SystemExit(f"wheel: lacks {sorted(wanted - held)}, has besides {sorted(held - wanted)}")
    print(f"wheel: {len(held)} files, those of the tree and no other")
    (source,) = target.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in _members(source)}
    needed = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "tests/cases.py", "constraints.txt", "Makefile"}
    if lacking := needed - names:
        raise SystemExit(f"sdist: lacks {sorted(lacking)}")
    print(f"sdist: {len(names)} files")
    _try_out(wheel)


def _members(file: Path) -> dict[str, str]:
    """Name → digest of each file in a tar archive; the compressor's header has the time of building."""
    with tarfile.open(file) as held:
        return {m.name: sha256(held.extractfile(m).read()).hexdigest() for m in held if m.isfile()}  # type: ignore[union-attr]


def _try_out(wheel: Path) -> None:
    """Install the wheel alone in an environment that sees this one's packages, and run a study from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parent.parent], check=True)
        installed = Path(folder) / "wheel"
        zipfile.ZipFile(wheel).extractall(installed)
        theirs = [entry for entry in sys.path if entry.endswith("site-packages")]
        paths = os.pathsep.join([str(installed), *theirs])  # without the .pth file of the editable install
        command = [python, "-c", "from tsdyn.cli import main; main()"]
        run = ["study", "run", "tian2020-l-shape", "--scale", "smoke", "-o", "run"]
        for words in (["--version"], run, ["show", "run"]):
            subprocess.run([*command, *words], check=True, cwd=folder, env=os.environ | {"PYTHONPATH": paths})
    print("installed and run from an empty folder")


if __name__ == "__main__":
    main()
