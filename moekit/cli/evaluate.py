"""``moekit evaluate``: what a checkpoint knows, by perplexity and multiple choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_model
from moekit.cli.progress import StudyBars
from moekit.compare.record import write_json
from moekit.data import load_tokenizer, prepare
from moekit.errors import SpecError
from moekit.measure.choice_files import read_choices
from moekit.measure.harness import harness_scores, require_harness
from moekit.measure.multiple_choice import score_choices
from moekit.measure.perplexity import text_loss

SPLITS = ("validation", "test", "train", "all")
EXAMPLES = """\
  moekit evaluate runs/moepp/model --data my/texts
  moekit evaluate my/olmoe --data my/held-out.jsonl --split all --choices arc.jsonl
  moekit evaluate my/olmoe-half --tasks arc_easy,hellaswag --limit 200 --json
"""


def evaluate_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub name of a causal language model.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to predict: a file, folder or glob of text, JSON lines or parquet, "
            "hub:OWNER/NAME, or stdlib."
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Part of the text: validation and test, as training leaves them out; train; or "
            "all, for text that the model has not seen."
        ),
    ] = "validation",
    choices: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON lines of multiple-choice items, as HellaSwag, ARC, OpenBookQA and PIQA "
            "have them, or with context, choices and answer; may be given often."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, comma-separated; needs lm-eval."),
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(help="Folder of task files of your own for --tasks, as the harness has them."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of each file or task at most.", min=1)
    ] = None,
    text_column: opt.TextColumn = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a tokenizer. Default: the checkpoint's."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.", min=1)] = 8,
    output: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a checkpoint: perplexity of text, and accuracy in multiple choice.

    Checkpoints of transformers, pruned ones and moekit's own are read alike. A choice is scored by
    its log-likelihood after the context; accuracy takes the likeliest choice, normalised accuracy
    the likeliest a character, as lm-evaluation-harness does, through which --tasks runs its tasks.
    """
    where = opt.device_of(device)
    if data is None and not choices and tasks is None:
        raise SpecError("there is nothing to measure; give --data, --choices or --tasks")
    if split not in SPLITS:
        raise SpecError(f"--split is {split!r}; wanted one of {', '.join(SPLITS)}")
    if tasks_folder is not None and (tasks is None or not tasks_folder.is_dir()):
        raise SpecError(f"--tasks-folder is {tasks_folder}; wanted a folder, and --tasks with it")
    if tasks is not None:
        require_harness()
    if output is not None:
        opt.require_writable(output.parent)
    files = {str(path): read_choices(path)[:limit] for path in choices or []}
    model: Any = nn.Module.to(load_model(checkpoint), where)
    words = load_tokenizer(tokenizer or checkpoint)
    found: dict[str, Any] = {"checkpoint": checkpoint}
    with StudyBars(quiet=quiet) as bars:
        if data is not None:
            spec = opt.text_spec(data, text_column, tokenizer or checkpoint, 4096, sequence_length)
            text = prepare(spec.replace(seed=seed), progress=bars.preparing())
            parts = [getattr(text, name) for name in (SPLITS[:3] if split == "all" else (split,))]
            loss = text_loss(model, parts, batch_size=batch_size, progress=bars.preparing())
            found["text"] = {"data": data, "split": split, **loss.to_dict()}
        found["choices"] = {
            name: score_choices(
                model, words, items, batch_size=batch_size, progress=bars.preparing()
            ).to_dict()
            for name, items in files.items()
        }
        if tasks is not None:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            found["tasks"] = harness_scores(model, words, names, batch_size, limit, tasks_folder)
    if output is not None:
        write_json(output, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    _show(found)
    if output is not None:
        typer.echo(f"Result: {output}")


def _show(found: dict[str, Any]) -> None:
    table = Table("", box=box.SIMPLE_HEAD)
    for name in ("items or tokens", "value", "±"):
        table.add_column(name, justify="right", no_wrap=True)
    text = found.get("text")
    if text:
        table.add_row(
            f"perplexity, {text['data']} ({text['split']})",
            f"{text['tokens']:,}",
            f"{text['perplexity']:.3f}",
            "",
        )
    for name, scores in found["choices"].items():
        error = scores["standard_error"]
        error = "" if error is None else f"{error:.3f}"
        table.add_row(f"accuracy, {name}", f"{scores['items']}", f"{scores['accuracy']:.3f}", error)
        table.add_row("  normalised by length", "", f"{scores['accuracy_normalized']:.3f}", "")
    for task, metrics in found.get("tasks", {}).items():
        for metric, value in metrics.items():
            table.add_row(f"{task}, {metric}", "", f"{value:.3f}", "")
    Console(highlight=False).print(table)
