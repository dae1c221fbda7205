"""Draws the picture and writes the tables of docs/architecture.md and docs/migration.md when the docs are built."""

from __future__ import annotations

import ast
import importlib
import itertools
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line

from tsdyn import _forwarding

ROOT = Path(__file__).resolve().parent.parent
#: Folders that are installed as tsdyn.<name>.
BESIDE = ("analysis", "studies")
#: Text of a box in place of a list of modules.
SAID = {"studies": "one file per figure of a paper", "testing": "checks of activations, losses, ... of your own"}
FLAT = "single modules"
GAP, LETTER = 0.35, 0.083  # inches between boxes, and width of a letter
INK, QUIET, ARROW = "#1b2a3a", "#4a5b6c", "#7d93a8"
FILLS = ("#eef3f8", "#e3ebf3")


def floors() -> dict[str, int]:
    """Floor of each wing, read from the table in tests/test_house.py."""
    tree = ast.parse((ROOT / "tests" / "test_house.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FLOORS" and node.value is not None:
            return ast.literal_eval(node.value)
    raise LookupError("tests/test_house.py holds no table FLOORS")


def wings() -> dict[str, list[str]]:
    """Modules of each wing; the single modules of the lowest floor count as one wing, those above each as one."""
    found: dict[str, list[str]] = {FLAT: []}
    for folder in sorted((ROOT / "tsdyn").iterdir()):
        if folder.is_dir() and (folder / "__init__.py").exists():
            found[folder.name] = _below(folder)
        elif folder.suffix == ".py" and not folder.stem.startswith("_"):
            if floors()[folder.stem] > 1:
                found[folder.stem] = []
            else:
                found[FLAT].append(folder.stem)
    for name in BESIDE:
        found[name] = _below(ROOT / name)
    return found


def _below(folder: Path) -> list[str]:
    modules = {f.stem for f in folder.glob("*.py")} | {f.parent.name for f in folder.glob("*/__init__.py")}
    return sorted(m for m in modules if not m.startswith("_"))


def imports() -> dict[str, set[str]]:
    """Wings that each wing imports, also inside functions, but not under TYPE_CHECKING."""
    names = set(wings())
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, folder in [*((n, ROOT / "tsdyn" / n) for n in names), *((n, ROOT / n) for n in BESIDE)]:
        files = [*folder.rglob("*.py")] if folder.is_dir() else [folder.with_suffix(".py")]
        if name == FLAT:
            files = [ROOT / "tsdyn" / f"{m}.py" for m in wings()[FLAT]]
        for file in (f for f in files if f.exists()):
            for other in _imported(file):
                other = other if other in names else FLAT
                found[name] |= {other} - {name}
    return found


def _imported(file: Path) -> set[str]:
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tsdyn":
            below = (node.module or "").split(".")[1:]
            found.update(below[:1] or {alias.name for alias in node.names if alias.name.islower()})
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("tsdyn."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return {name for name in found if name not in ("open", "layer", "select", "run")}


def _necessary(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that do not follow from others (transitive reduction)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            one = ahead.pop()
            if one not in seen:
                seen.add(one)
                ahead += edges[one]
        return seen

    beyond = {name: {far for other in others for far in reached(other)} for name, others in edges.items()}
    return {name: others - beyond[name] for name, others in edges.items()}


def _placed(rows: dict[int, list[str]], edges: dict[str, set[str]]) -> dict[str, float]:
    """Horizontal position of each wing in [0, 1]; rows are reordered one after another to shorten the arrows."""
    order = {floor: list(names) for floor, names in rows.items()}
    where: dict[str, float] = {}

    def spread(names: tuple[str, ...] | list[str]) -> dict[str, float]:
        return {name: (i + 0.5) / len(names) for i, name in enumerate(names)}

    def length(place: dict[str, float]) -> float:
        return sum(abs(place[a] - place[b]) ** 1.5 for a, others in edges.items() for b in others)

    for names in order.values():
        where |= spread(names)
    for _ in range(4):
        for floor, names in order.items():
            order[floor] = list(min(itertools.permutations(names), key=lambda p: length(where | spread(p))))
            where |= spread(order[floor])
    return where


def draw(target: Path) -> None:
    """Draw one box per wing with its modules, on its floor, and arrows from each wing to those it imports."""
    level, held = {**floors(), FLAT: 1}, wings()
    down = {name: {o for o in others if level[o] < level[name]} for name, others in imports().items()}
    edges = _necessary(down)
    rows: dict[int, list[str]] = {}
    for name in held:
        rows.setdefault(level[name], []).append(name)
    shown = {floor: i for i, floor in enumerate(sorted(rows))}
    where = _placed(rows, edges)
    width = 15.0
    texts = {
        name: textwrap.wrap(SAID.get(name) or ", ".join(modules), int(_box(rows, level[name], width) / LETTER))
        for name, modules in held.items()
    }
    heights = {floor: 0.62 + 0.21 * max(len(texts[n]) for n in names) for floor, names in rows.items()}
    bottom, y = {}, 0.0
    for floor in sorted(rows):
        bottom[floor] = y
        y += heights[floor] + 0.62
    figure = Figure(figsize=(width, y - 0.2))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.75, width), ylim=(-0.25, y - 0.4))
    ax.axis("off")
    boxes = {}
    for floor, names in rows.items():
        y0, high = bottom[floor], heights[floor]
        ax.text(-0.55, y0 + high / 2, str(floor), color=ARROW, fontsize=15, va="center", ha="center")
        for name in names:
            box = _box(rows, floor, width)
            x = where[name] * (width - GAP) - box / 2 + GAP / 2
            boxes[name] = (x, y0, box, high)
            shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": FILLS[shown[floor] % 2]}
            ax.add_patch(FancyBboxPatch((x, y0), box, high, edgecolor=ARROW, linewidth=1.0, zorder=2, **shape))
            middle, middled = x + box / 2, {"ha": "center", "zorder": 3}
            ax.text(middle, y0 + high - 0.3, name, color=INK, fontsize=12.5, weight="bold", va="center", **middled)
            listed = {"fontsize": 8.6, "va": "top", "linespacing": 1.35, **middled}
            ax.text(middle, y0 + high - 0.52, "\n".join(texts[name]), color=QUIET, **listed)
    for above, others in edges.items():
        for below in others:
            _arrow(ax, boxes, level, above, below)
    dated = {"metadata": {"Date": None}} if target.suffix == ".svg" else {}  # the same code gives the same file
    figure.savefig(target, facecolor="white", **dated)


def _arrow(ax: Axes, boxes: dict[str, tuple[float, ...]], level: dict[str, int], above: str, below: str) -> None:
    """Draw an arrow from the foot of one box to the head of another, around the boxes of the floors between."""
    x, y, box, _ = boxes[above]
    x2, y2, box2, height2 = boxes[below]
    middle, middle2 = x + box / 2, x2 + box2 / 2
    gaps: list[tuple[float, float, float]] = []  # per floor between: position, head and foot of the boxes
    for floor in sorted({level[n] for n in boxes if level[below] < level[n] < level[above]}, reverse=True):
        row = sorted(boxes[n] for n in boxes if level[n] == floor)
        free = [row[0][0] - 0.18, row[-1][0] + row[-1][2] + 0.18]
        free += [(one[0] + one[2] + other[0]) / 2 for one, other in itertools.pairwise(row)]
        before = gaps[-1][0] if gaps else middle
        at = min(free, key=lambda f: round(abs(f - before) + abs(f - middle2), 3))  # of equal ways the left one
        gaps.append((at, row[0][1] + row[0][3], row[0][1]))
    start = middle + 0.4 * box * _lean((gaps[0][0] if gaps else middle2) - middle)
    end = middle2 + 0.4 * box2 * _lean((gaps[-1][0] if gaps else middle) - middle2)
    points, codes = [(start, y)], [Line.MOVETO]
    for at, head, foot in gaps:
        half = (points[-1][1] + head) / 2
        points += [(points[-1][0], half), (at, half), (at, head), (at, foot)]
        codes += [Line.CURVE4] * 3 + [Line.LINETO]
    if gaps:
        half = (points[-1][1] + y2 + height2) / 2
        points += [(points[-1][0], half), (end, half), (end, y2 + height2)]
        codes += [Line.CURVE4] * 3
    else:
        points.append((end, y2 + height2))
        codes.append(Line.LINETO)
    ax.add_patch(
        FancyArrowPatch(
            path=Line(points, codes), arrowstyle="-|>", mutation_scale=11, color=ARROW, linewidth=1.1, zorder=1,
            shrinkA=0, shrinkB=1,
        )
    )  # fmt: skip


def _lean(apart: float) -> float:
    """Where an arrow meets a box, relative to its middle and half width, from the horizontal distance it goes."""
    return max(-1.0, min(1.0, apart / 7)) * 0.9


def _box(rows: dict[int, list[str]], floor: int, width: float) -> float:
    """Width of the boxes on a floor, in inches."""
    return min((width - GAP) / len(rows[floor]) - GAP, 7.5)


def wing_table() -> str:
    """Markdown table of the wings: floor, name and first sentence of the docstring."""
    level = floors()
    rows = ["| floor | wing | what it holds |", "|---|---|---|"]
    for name in sorted((n for n in wings() if n not in (FLAT, "cli")), key=lambda n: (-level[n], n)):
        folder = ROOT / name if name in BESIDE else ROOT / "tsdyn" / name
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append(f"| {level[name]} | `tsdyn.{name}` | {' '.join(doc.split(chr(10) * 2)[0].split())} |")
    return "\n".join(rows) + "\n"


def migration_table() -> str:
    """Markdown tables of the documented names of 0.1 that moved, with their new places."""
    moved: dict[str, list[tuple[str, str]]] = {old: [] for old in _forwarding.MOVED}
    for old, places in _forwarding.MOVED.items():
        moved[old] += [(name, f"{new}.{name}") for new, names in places.items() for name in names.split()]
    for was, new in _forwarding.RENAMED.items():
        old, _, name = was.partition(".")
        moved[old].append((name, new))
    rows = []
    for old, names in sorted(moved.items()):
        rows += [f"## tsdyn.{old}\n", "| 0.1 | now |", "|---|---|"]
        for name, new in sorted(names):
            module, _, attribute = new.rpartition(".")
            if not hasattr(importlib.import_module(module), attribute):
                raise LookupError(f"_forwarding: {old}.{name} is said to be {new}, which is not there")
            rows.append(f"| `{old}.{name}` | `{new}` |")
        rows.append("")
    return "\n".join(rows)


def generate(folder: Path) -> None:
    """Write the picture and the tables into `folder`."""
    folder.mkdir(exist_ok=True)
    draw(folder / "wings.svg")
    (folder / "wings.md").write_text(wing_table(), encoding="utf-8")
    (folder / "moved.md").write_text(migration_table(), encoding="utf-8")
