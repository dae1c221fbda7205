"""The list of studies without importing them: name, what each shows, the paper's figure, the time at desk scale."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tsdyn import registers

#: Seconds of processor time of `tsdyn study run` at desk scale: as measured (docs/reproduction.md; a test compares), of
#: the others as announced in November 2026; None for studies that read files of the user's.
DESK_SECONDS: Mapping[str, int | None] = {
    "tian2019-luck": 121,
    "tian2019-data": 171,
    "tian2019-ranks": 97,
    "tian2019-sizes": 22,
    "theorems": 8,
    "tian2019-batchnorm-bias-vgg11": 32,
    "tian2019-batchnorm-bias": 41,
    "tian2019-cifar10": None,
    "tian2019-digits": 138,
    "tian2019-heatmaps": 17,
    "tian2019-lottery": 34,
    "tian2019-multilayer": 174,
    "tian2019-multilayer-large": 75,
    "tian2020-connectivity": 44,
    "tian2020-samples": 75,
    "tian2020-augmentation": 86,
    "tian2020-cifar10": None,
    "tian2020-digits": 119,
    "tian2020-boundaries": 16,
    "tian2020-l-shape": 34,
    "tian2020-multilayer-l-shape": 66,
    "tian2020-success-rate": 114,
    "tian2020-recovery": 42,
    "simsek2023-trajectories": 16,
    "simsek2023-one-neuron": 30,
    "simsek2023-loss": 184,
    "simsek2023-norms": 79,
    "simsek2023-phase-diagram": 49,
    "goldt2019-eg": 38,
    "fork-divergence": 16,
    "leave-out": 30,
}


class Row(NamedTuple):
    """One study.

    Attributes:
        name: As `tsdyn study run` takes it.
        title: What the figure shows.
        source: Paper and figure.
        desk_seconds: Estimated time at desk scale; None if it is not known.
    """

    name: str
    title: str
    source: str
    desk_seconds: int | None


def rows() -> list[Row]:
    """All studies: tsdyn's own, read from their source without importing it, and those of installed packages.

    A package's study that cannot be loaded has the reason as its title.
    """
    return [Row(name, *_described(name), DESK_SECONDS.get(name)) for name in registers.STUDIES.names()]


def _described(name: str) -> tuple[str, str]:
    if name in registers.STUDIES.own:
        file = Path(__file__).with_name(f"{name.replace('-', '_')}.py")
        words = dict(_texts(ast.parse(file.read_text(encoding="utf-8"))))
        return words["TITLE"], words["SOURCE"]
    try:
        from tsdyn import studies

        found = studies.load(name)
    except registers.PartError as error:
        return f"({error})", "a package"
    return found.TITLE, found.SOURCE


def _texts(module: ast.Module) -> list[tuple[str, str]]:
    """Names and values of the module's constants that are literal strings."""
    assigned = [(node.targets[0], node.value) for node in module.body if isinstance(node, ast.Assign)]
    return [
        (target.id, value.value)
        for target, value in assigned
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
