"""The gallery's pictures and page, from real runs of seconds; `docs/conf.py` calls it, once a state of its sources."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tsdyn.analysis import figures, panels, phase, specialization
from tsdyn.analysis.figures import FIGURES, recipes

import tsdyn

_TWO_LAYER = tsdyn.Experiment(
    name="gallery",
    seeds=6,
    teacher={"widths": [12, 5, 8], "polarity": 1.0},
    student={"overrealization": 2.0, "scale": 0.1},
    data={"train": 600, "eval": 300},
    training={"epochs": 12, "steps_per_epoch": 150, "learning_rate": 0.05},
    record={"observables": ["mse", "correlation", "fanout_norm"]},
)

#: What the pictures are of.
EXPERIMENTS: Mapping[str, tsdyn.Experiment] = {
    "sweep": _TWO_LAYER.replace({"sweep": {"student.overrealization": [1, 2, 5], "teacher.polarity": [0.0, 1.0, 2.0]}}),
    "rich": _TWO_LAYER.replace(
        {
            "teacher.polarity": 0.0,
            "training.epochs": 8,
            "record.observables": ["correlation", "moments", "hessian_eigenvalue"],
            "record.epochs": [0, 1, 4, 8],
        }
    ),
    "plane": _TWO_LAYER.replace(
        {
            "seeds": 2,
            "teacher.widths": [2, 2, 4],
            "teacher.init": "orthonormal",
            "teacher.polarity": 0.0,
            "student.overrealization": 3.0,
            "student.scale": 0.3,
            "training.steps_per_epoch": 30,
            "training.epochs": 30,
            "record.observables": ["fanout_norm", "weight"],
        }
    ),
}

#: Figure → the archive it is drawn from.
OF: Mapping[str, str] = {
    **dict.fromkeys(FIGURES, "sweep"),
    "couplings": "rich",
    "spectrum": "rich",
    "boundaries": "plane",
}

PAGE = """
## {name}

{shows}. Needs {needs}.

```console
$ tsdyn plot DIR {name}
```

![{shows}](generated/{file})
"""


def sources() -> str:
    """Changes when anything that decides a picture does."""
    files = [Path(module.__file__) for module in (recipes, panels, phase, specialization)] + [Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def draw(target: Path) -> None:
    """Every figure as a file in `target` and ``gallery.md`` that shows them; nothing if they are there already."""
    stamp = target / "sources"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == sources():
        return
    target.mkdir(parents=True, exist_ok=True)
    pages = []
    with tempfile.TemporaryDirectory() as folder:
        archives = {name: tsdyn.run(experiment, Path(folder) / name) for name, experiment in EXPERIMENTS.items()}
        for name, recipe in FIGURES.items():
            file = f"{name}.png"
            recipe(archives[OF[name]]).savefig(target / file, dpi=100)
            needs = ", ".join(f"`{need}`".replace("|", "` or `") for need in recipe.needs)
            pages.append(PAGE.format(name=name, shows=recipe.shows.capitalize(), needs=needs, file=file))
        moves = figures.animate_boundaries(archives["plane"].sel(seed=0))
        moves.save(target / "boundaries.gif", writer="pillow", dpi=80)
        pages.append("\n`tsdyn plot DIR boundaries -o boundaries.gif`:\n\n![moving](generated/boundaries.gif)\n")
        for archive in archives.values():
            archive.close()
    (target / "gallery.md").write_text("".join(pages), encoding="utf-8")
    stamp.write_text(sources(), encoding="utf-8")
