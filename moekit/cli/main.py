"""The ``moekit`` command."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import torch
import typer

import moekit
from moekit.cli.commands import Benches, Commands
from moekit.errors import MoekitError, first_line

INTERRUPTED = 130  # the exit code that typer gives a command ended by control-C


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moekit {moekit.__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        name="moekit",
        cls=Commands,
        help="Sparse mixture-of-experts models: compare designs, train, inspect, prune, adapt.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _options(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")
        ] = False,
    ) -> None:
        """Sparse mixture-of-experts models: compare designs, train, inspect, prune, adapt."""

    benches = typer.Typer(cls=Benches, help="Measure speed on this machine.", no_args_is_help=True)
    app.add_typer(benches, name="bench")
    return app


def main() -> None:
    """Run the command; a user's mistake ends with one sentence and exit code 2."""
    try:
        build()(prog_name="moekit")
    except KeyboardInterrupt:
        _end(_STOPPED, INTERRUPTED)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        _end(sentence, 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _end(_STOPPED, INTERRUPTED)
        raise


_STOPPED = "stopped; run the same command again to go on"


def _end(sentence: str, code: int) -> NoReturn:
    print(f"moekit: {sentence}", file=sys.stderr)
    sys.exit(code)


def _sentence(error: Exception) -> str | None:
    """What to tell the user; None for a defect of moekit, which needs its stack trace."""
    if isinstance(error, MoekitError):
        return str(error)
    if _out_of_memory(error):
        return "out of memory; use a smaller batch, shorter sequences or a smaller model"
    if type(error).__module__.startswith("wandb."):
        return f"wandb refuses to track: {first_line(error)}; log in to it or leave it out"
    return None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on the CPU torch has no error of its own for it."""
    own = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return own or "allocate memory" in str(error) or "size calculation overflowed" in str(error)
