"""The subcommands, each in a module that is imported when the command is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Entry:
    """Where a command is.

    Attributes:
        module: within ``moekit.cli``.
        function: its name there.
        summary: the first paragraph of its docstring, for the list of commands.
        examples: name of the command's examples in the module.
    """

    module: str
    function: str
    summary: str
    examples: str = "EXAMPLES"

    def load(self) -> TyperCommand:
        """The command."""
        module = import_module(f"moekit.cli.{self.module}")
        command: Callable[..., None] = getattr(module, self.function)
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        epilog = f"Examples:\n{getattr(module, self.examples)}"
        app.command(help=_flowing(command), epilog=epilog)(command)
        loaded = typer.main.get_command(app)
        assert isinstance(loaded, TyperCommand)  # an app of one command is that command
        return loaded


class Later(TyperCommand):
    """A command that is loaded when it is called.

    The libraries of all commands together take several times as long to import as those of one,
    and a list of commands or a mistyped name needs none of them.
    """

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.summary)
        self.entry = entry

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """That of the command itself, which the group then invokes."""
        _quieten_transformers()
        return self.entry.load().make_context(*args, **kwargs)


class _Group(TyperGroup):
    entries: ClassVar[dict[str, Entry]]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        later = {name: Later(name, entry) for name, entry in self.entries.items()}
        self.commands = later | dict(self.commands)


class Commands(_Group):
    """``moekit NAME``."""

    entries: ClassVar[dict[str, Entry]] = {
        "compare": Entry(
            "compare",
            "compare_command",
            "Train designs side by side on your text and report which one is best for it.",
        ),
        "train": Entry("train", "train_command", "Train one language model on your text."),
        "inspect": Entry(
            "inspect",
            "inspect_command",
            "Show a checkpoint's structure and its parameters by part, without loading its "
            "weights.",
        ),
        "generate": Entry(
            "generate", "generate_command", "Continue a prompt with a causal language model."
        ),
        "evaluate": Entry(
            "evaluate",
            "evaluate_command",
            "Measure a checkpoint: perplexity of text, and accuracy in multiple choice.",
        ),
        "prune": Entry(
            "prune",
            "prune_command",
            "Write a checkpoint with fewer experts, and report what that changed.",
        ),
        "upcycle": Entry(
            "upcycle",
            "upcycle_command",
            "Write a mixture whose experts start as copies of a dense model's feed-forward parts.",
        ),
        "graft": Entry(
            "graft",
            "graft_command",
            "Give a mixture experts that compute nothing, so that tokens use as many experts as "
            "they need.",
        ),
        "unlearn": Entry(
            "unlearn",
            "unlearn_command",
            "Write a checkpoint that has unlearned a text, and report what that changed.",
        ),
        "adapt": Entry(
            "adapt",
            "adapt_command",
            "Train a mixture of LoRA experts on a model's feed-forward parts, and LoRA on "
            "attention.",
        ),
        "merge-adapter": Entry(
            "adapt",
            "merge_command",
            "Write an ordinary checkpoint with an adapter merged into its weights.",
            "MERGE_EXAMPLES",
        ),
        "systems": Entry(
            "systems",
            "systems_command",
            "List every system: what it is made of, whether this version has it, how to use it.",
            "SYSTEMS_EXAMPLES",
        ),
        "reproduce": Entry(
            "systems",
            "reproduce_command",
            "Run a system's experiment against its baselines: claim, measured result, verdict.",
            "REPRODUCE_EXAMPLES",
        ),
    }


class Benches(_Group):
    """``moekit bench NAME``."""

    entries: ClassVar[dict[str, Entry]] = {
        "layer": Entry(
            "bench",
            "layer_command",
            "Time the MoE layer against transformers' backends and a dense layer of equal FLOPs.",
        ),
    }


def _flowing(command: Callable[..., Any]) -> str:
    """The docstring with a line a paragraph, which help pages wrap at their own width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _quieten_transformers() -> None:
    """The commands have progress bars of their own, and say what matters of its messages."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
