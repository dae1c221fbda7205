"""The application of the ``tsdyn`` command, and what its commands share: errors, assignments, printing, saving."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tsdyn._version import __version__
from tsdyn.archive.whole_files import INTACT, ArchiveError, DirectoryError, refuse_link
from tsdyn.experiment.errors import ExperimentError
from tsdyn.registers import PartError
from tsdyn.running.terminal import make_lenient
from tsdyn.schema import printable

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
study = typer.Typer(no_args_is_help=True, help="Figures of the papers, from the experiment to the picture.")
app.add_typer(study, name="study")
FAILED, WRONG = 1, 2
# str and not Path, which would turn http://host into the local http:/host before it can be refused.
OutDirectory = Annotated[str | None, typer.Option("-o", "--output", help="Directory; runs/NAME if not given.")]
StyleName = Annotated[str, typer.Option("--style", help="paper (column widths), talk or notebook (larger).")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="A run, a sweep or an archive file.")]


def main() -> None:
    """Run the command; errors print one message without traceback; exit 0, 1 (the run failed) or 2 (a wrong request).

    What cannot be printed is dropped.  A run does not need its reports; other commands then exit with an error, unless
    the reader closed the pipe.
    """
    report_only.clear()
    _wait_asleep()
    before = sys.stdout, sys.stderr
    out, complaints = make_lenient()
    try:
        with reported_errors():
            app()
    except SystemExit as end:
        out.flush()
        if not end.code and out.lost is not None and out.lost.errno not in (errno.EPIPE, None) and not report_only:
            fail(f"standard output: {out.lost.strerror}; what was to be printed is incomplete", FAILED)
        raise
    finally:
        out.abandon()
        complaints.abandon()
        sys.stdout, sys.stderr = before


def _wait_asleep() -> None:
    """Let torch's threads wait for each other asleep, unless the environment says how; called before torch's import.

    By default they wait at full speed for milliseconds, at every operation.  Where other processes keep the cores busy,
    the thread that is waited for does not run meanwhile, and a run takes two to seven times as long.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # GNU's OpenMP: awake for some microseconds first, which spares a fifth of the kernel's time
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


#: Whether the output is only the report of work that is done in any case.
report_only: list[bool] = []


@contextmanager
def reported_errors() -> Iterator[None]:
    try:
        yield
    except (ExperimentError, DirectoryError, PartError, Unavailable) as error:
        fail(error, WRONG)
    except (ArchiveError, MemoryError) as error:
        fail(error, FAILED)
    except OSError as error:
        fail(f"{error}; {INTACT}", FAILED)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        fail(f"no memory is left ({str(error).splitlines()[0]}); {INTACT}", FAILED)


class Unavailable(Exception):
    """A device or workers are not available."""


def fail(error: object, code: int) -> None:
    print(f"tsdyn: {printable(error)}", file=sys.stderr)
    raise SystemExit(code)


def _version(asked: bool | None) -> None:
    if asked:
        print(f"tsdyn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Exact, labelled analysis of training dynamics in teacher-student networks."""


def assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """``key=value`` with a TOML value; a bare word is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        example = {"--set": "training.epochs=5", "--select": "seed=0"}[option]
        raise ExperimentError(f"{option} {text}: write KEY=VALUE, e.g. {option} {example}")
    value = value.strip()
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if value and value.isprintable() and value[0] not in "[{\"'#=" and len(value) < 4096:
            return key.strip(), value  # a word or a path; the experiment's rules say whether the key takes a string
        raise ExperimentError(f"{option} {text[:80]}: {value[:80]!r} is not a TOML value") from None


def save(figure: Any, path: Path, quiet: bool) -> None:
    """Write a figure or an animation to a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path)
        if path.suffix.lower() == ".gif":
            figure.save(path, writer="pillow", dpi=100)
        else:
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DirectoryError(f"{path}: the figure cannot be written: {error}") from error
    if not quiet:
        print(path)


#: ``--json``, of the commands whose answers programs read.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(value: Any) -> None:
    """Print a JSON value, in lines; numbers that are not finite are null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=True))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(text: object) -> str:
    """The text on one line, without control characters or console markup."""
    return printable(str(text).replace("\n", " ")).replace("[", r"\[")
