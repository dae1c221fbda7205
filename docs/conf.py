"""Sphinx: MyST pages; the schema and the experiment file's keys are printed from the code."""

import re
import sys
from pathlib import Path

from tsdyn import __version__, vocabulary
from tsdyn.experiment import experiment
from tsdyn.experiment.meanings import MEANINGS
from tsdyn.experiment.parts import Data, Flow, Online, Part, Record, Stop, Student, Teacher, Training

project = "tsdyn"
copyright = "2026, The tsdyn developers"
author = "The tsdyn developers"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "generated", "reference/generated", "gallery/generated"]
html_theme = "furo"
html_static_path = ["_static"]
html_title = f"tsdyn {version}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# `Attributes:` of a dataclass are also its members
napoleon_use_ivar = True
nitpicky = False
# an attribute A has more than one class: teacher's weights, r², coupling
suppress_warnings = ["ref.python"]

HERE = Path(__file__).parent


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _schema_tables() -> str:
    variables = [
        [
            f"`{v.name}`",
            ", ".join(v.dims),
            v.units,
            v.long_name,
            v.conditions,
            v.source,
            ", ".join(v.kinds) or "reserved",
        ]
        for v in vocabulary.VARIABLES.values()
    ]
    coordinates = [
        [f"`{c.name}`", ", ".join(c.dims), c.long_name, c.conditions] for c in vocabulary.COORDINATES.values()
    ]
    dimensions = [[f"`{name}`", meaning] for name, meaning in vocabulary.DIMENSIONS.items()]
    families = [[f"`{name}`", ", ".join(f"`{v}`" for v in members)] for name, members in vocabulary.FAMILIES.items()]
    header = ["variable", "dimensions", "units", "meaning", "conditions", "source", "recorded by"]
    return "\n".join(
        [
            "## Dimensions\n",
            _table(["dimension", "labels"], dimensions),
            "## Variables\n",
            _table(header, variables),
            "## Coordinates\n",
            _table(["coordinate", "dimensions", "meaning", "conditions"], coordinates),
            "## Words in `record.observables`\n",
            "A variable's own name, or one of\n",
            _table(["word", "variables"], families),
        ]
    )


def _experiment_tables() -> str:
    pages = []
    for title, part in (
        ("Top level", experiment.Experiment),
        ("[teacher]", Teacher),
        ("[student]", Student),
        ("[data]", Data),
        ("[training]", Training),
        ("training.stop", Stop),
        ("[record]", Record),
        ("[flow]", Flow),
        ("[online]", Online),
    ):
        rows = []
        for name, field in part.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
                continue
            shape = part.model_json_schema()["properties"][name]
            default = "required" if field.is_required() else f"`{field.default!r}`"
            section = {"Top level": "", "training.stop": "training.stop."}.get(title, f"{title.strip('[]')}.")
            rows.append([f"`{name}`", _kind(shape), default, MEANINGS.get(f"{section}{name}", "")])
        pages += [
            f"## {title}\n",
            part.__doc__.split("\n\n")[0] + "\n",
            _table(["key", "value", "default", "meaning"], rows),
        ]
    return "\n".join(pages)


def _kind(shape: dict) -> str:
    if "enum" in shape:
        return " or ".join(f"`{v!r}`" for v in shape["enum"])
    if "const" in shape:
        return f"`{shape['const']!r}`"
    if "anyOf" in shape:
        return " or ".join(_kind(s) for s in shape["anyOf"] if s.get("type") != "null")
    if "$ref" in shape:  # a section of its own
        return "table"
    kind = shape.get("type", "any")
    if kind == "array":
        return f"list of {_kind(shape.get('items', {}))}"
    if kind == "object":
        values = shape.get("additionalProperties")
        return f"table of {_kind(values)}" if isinstance(values, dict) else "table"
    words = {"minimum": "≥ {}", "maximum": "≤ {}", "exclusiveMinimum": "> {}", "exclusiveMaximum": "< {}"}
    bounds = [text.format(f"{shape[key]:g}") for key, text in words.items() if key in shape]
    return " ".join([kind, *bounds])


def _generate(_app: object) -> None:
    target = HERE / "reference" / "generated"
    target.mkdir(exist_ok=True)
    for name, text in (("schema", _schema_tables()), ("experiment", _experiment_tables())):
        (target / f"{name}.md").write_text(text, encoding="utf-8")
    sys.path[:0] = [str(HERE), str(HERE / "gallery")]
    import draw
    import house
    import notebooks

    draw.draw(HERE / "gallery" / "generated")
    house.generate(HERE / "generated")
    notebooks.write(HERE / "tutorial", HERE / "generated" / "notebooks")


def _plain_stars_and_bars(app, what, name, obj, options, lines):
    """Escape stars and bars outside backticks: in docstrings' formulas, w* and |g|, they are no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in parts)


def _plain_types(app, what, name, obj, options, lines):
    """Escape the stars of shapes (*member) in the types that napoleon writes out."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((":vartype", ":type", ":rtype")):
            lines[i] = re.sub(r"(?<!\\)\*", r"\*", line)


def setup(app):
    app.connect("builder-inited", _generate)
    app.connect("autodoc-process-docstring", _plain_stars_and_bars, priority=400)  # before napoleon's own markup
    app.connect("autodoc-process-docstring", _plain_types, priority=600)  # after it
