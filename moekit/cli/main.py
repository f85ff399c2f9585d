"""The ``moekit`` command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import torch
import typer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moekit
from moekit.cli import (
    adapt,
    bench,
    compare,
    evaluate,
    generate,
    graft,
    prune,
    systems,
    train,
    unlearn,
    upcycle,
)
from moekit.cli import inspect as inspection
from moekit.compare.run import first_line
from moekit.errors import MoekitError

INTERRUPTED = 130  # the exit code that typer gives a command ended by control-C


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moekit {moekit.__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        name="moekit",
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

    def add(
        name: str, command: Callable[..., None], examples: str, under: typer.Typer = app
    ) -> None:
        under.command(name, help=_flowing(command), epilog=f"Examples:\n{examples}")(command)

    add("compare", compare.compare_command, compare.EXAMPLES)
    add("train", train.train_command, train.EXAMPLES)
    add("inspect", inspection.inspect_command, inspection.EXAMPLES)
    add("generate", generate.generate_command, generate.EXAMPLES)
    add("evaluate", evaluate.evaluate_command, evaluate.EXAMPLES)
    add("prune", prune.prune_command, prune.EXAMPLES)
    add("upcycle", upcycle.upcycle_command, upcycle.EXAMPLES)
    add("graft", graft.graft_command, graft.EXAMPLES)
    add("unlearn", unlearn.unlearn_command, unlearn.EXAMPLES)
    add("adapt", adapt.adapt_command, adapt.EXAMPLES)
    add("merge-adapter", adapt.merge_command, adapt.MERGE_EXAMPLES)
    add("systems", systems.systems_command, systems.SYSTEMS_EXAMPLES)
    benches = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
    app.add_typer(benches, name="bench")
    add("layer", bench.layer_command, bench.EXAMPLES, benches)
    add("reproduce", systems.reproduce_command, systems.REPRODUCE_EXAMPLES)
    return app


def _flowing(command: Callable[..., Any]) -> str:
    """The docstring with a line a paragraph, which help pages wrap at their own width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def main() -> None:
    """Run the command; a user's mistake ends with one sentence and exit code 2."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # the commands have their own
    set_verbosity_error()  # type: ignore[no-untyped-call]  # what matters of it, we say ourselves
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
