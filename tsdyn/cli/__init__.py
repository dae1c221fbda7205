"""The ``tsdyn`` command: argument parsing and printing only."""

import importlib as _importlib

from tsdyn.cli.importing import uncollected as _uncollected

with _uncollected():
    from tsdyn.cli.application import app, main

__all__ = ["app", "main"]

#: Modules that add their commands to ``app`` when they are imported; the help lists commands in this order.
_COMMANDS = (
    "run_commands",
    "new_command",
    "draw_command",
    "archive_commands",
    "diff_command",
    "measure_command",
    "sensitivity_command",
    "fork_command",
    "export_command",
    "import_command",
)
with _uncollected():
    for _module in _COMMANDS:
        _importlib.import_module(f"tsdyn.cli.{_module}")
