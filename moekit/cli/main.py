"""The ``moekit`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from transformers.utils.logging import disable_progress_bar

import moekit
from moekit.cli.compare import compare_command
from moekit.cli.generate import generate_command
from moekit.cli.inspect import inspect_command
from moekit.cli.systems import reproduce_command, systems_command
from moekit.cli.train import train_command
from moekit.errors import MoekitError


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moekit {moekit.__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        name="moekit",
        help="Sparse mixture-of-experts models: compare designs on your text, train, inspect.",
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
        """Sparse mixture-of-experts models: compare designs on your text, train, inspect."""

    app.command("compare")(compare_command)
    app.command("train")(train_command)
    app.command("inspect")(inspect_command)
    app.command("generate")(generate_command)
    app.command("systems")(systems_command)
    app.command("reproduce")(reproduce_command)
    return app


def main() -> None:
    """Run the command; a user's mistake ends with one sentence and exit code 2."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # the commands have their own
    try:
        build()()
    except MoekitError as error:
        print(f"moekit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("moekit: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
