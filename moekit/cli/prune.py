"""``moekit prune``: a checkpoint with fewer experts, and what that changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_model, require_vocabulary
from moekit.cli.progress import StudyBars
from moekit.cli.result import require_place
from moekit.compare.record import write_json
from moekit.data import ProgressHook, TextData, load_tokenizer, prepare
from moekit.errors import SpecError
from moekit.measure import ChoiceItem, read_choices, score_choices
from moekit.surgery import Budget, Checkpoint, PruneReport, local_folder, prune
from moekit.surgery.methods import Method

REPORT = "moekit_prune.json"
EXAMPLES = """\
  moekit prune my/olmoe --method reap --keep 0.5 --data my/texts --output runs/olmoe-half
  moekit prune my/mixtral --method dern --experts 6 --set alpha=0.4 --output runs/mixtral-6
  moekit prune my/qwen --method uncurl --target-size 8GB --data my/task --output runs/qwen-task
  moekit prune my/mixtral --method m-smoe --set router=average --set allocation=uniform
"""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def prune_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of an MoE checkpoint.")],
    method: Annotated[
        str,
        typer.Option(
            help="dern, uncurl, reap, m-smoe, hc-smoe, frequency, router-weight or random."
        ),
    ] = "reap",
    keep: Annotated[
        float | None, typer.Option(help="Share of the experts to keep. Default: 0.5.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts to keep in each layer, in place of a share.")
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(help="Largest size of the weights, as 8GB or 500MiB, in place of a share."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, NAME=VALUE; may be given often."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Text to calibrate and compare on: a file, folder or glob of text, JSON lines or "
            "parquet, or hub:OWNER/NAME. Give text of the task that the model is to serve."
        ),
    ] = "stdlib",
    text_column: opt.TextColumn = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a tokenizer. Default: the checkpoint's."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 128,
    held_out: Annotated[
        int, typer.Option(help="Held-out sequences to compare on; 0 to leave that out.")
    ] = 64,
    choices: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON lines of multiple-choice items to compare on, see `moekit evaluate`; loads "
            "the models whole, one after the other. May be given often."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("moekit-prune"),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a checkpoint with fewer experts, and report what that changed.

    The model is run block by block over your text, so it need not fit into memory. Where every
    layer keeps as many experts, the result is an ordinary checkpoint that transformers loads; else
    it loads once moekit.surgery is imported. The checkpoint that you give is only read.

    Methods: random, frequency, router-weight and reap drop experts; m-smoe, hc-smoe and uncurl
    merge them; dern drops experts and moves their neurons into those that are kept. An interrupted
    run goes on when the command is run again.
    """
    where = opt.device_of(device)
    chosen = _method(method, dict(setting_of(text) for text in settings or []), seed)
    budget = _budget(keep, experts, target_size)
    for name, value, least in (
        ("--sequences", sequences, 1),
        ("--held-out", held_out, 0),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise SpecError(f"{name} is {value}; wanted at least {least}")
    require_place(output)
    files = {str(path): read_choices(path) for path in choices or []}
    folder = local_folder(checkpoint)
    source_config = Checkpoint(folder).config  # a damaged file is named before any text is read
    if tokenizer is not None:
        require_vocabulary(load_tokenizer(tokenizer), source_config)
    spec = opt.text_spec(data, text_column, tokenizer or str(folder), 4096, sequence_length)
    with StudyBars(quiet=quiet) as bars:
        text: TextData = prepare(spec.replace(seed=seed), progress=bars.preparing())
        found: dict[str, Any] = {}

        def add_report(made: Path, report: PruneReport) -> None:
            words = load_tokenizer(tokenizer or str(folder)) if files else None
            scored = {
                side: _scores(place, words, files, batch_size, where, bars.preparing())
                for side, place in (("before", folder), ("after", made))
            }
            found.update(
                report.to_dict(),
                choices={name: {side: own[name] for side, own in scored.items()} for name in files},
            )
            write_json(made / REPORT, found)

        report = prune(
            folder,
            output,
            chosen,
            budget,
            text.train.first(sequences),
            text.validation.first(held_out) if held_out else None,
            batch_size=batch_size,
            device=where,
            seed=seed,
            progress=bars.preparing(),
            finish=add_report,
        )
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    _show(report, found["choices"], output)


def _scores(
    folder: Path,
    tokenizer: Any,
    files: dict[str, list[ChoiceItem]],
    batch_size: int,
    device: str,
    progress: ProgressHook,
) -> dict[str, dict[str, Any]]:
    """What a checkpoint makes of the items of each file."""
    if not files:
        return {}
    model: Any = nn.Module.to(load_model(str(folder)), device)
    return {
        name: score_choices(
            model, tokenizer, items, batch_size=batch_size, progress=progress
        ).to_dict()
        for name, items in files.items()
    }


def _method(name: str, settings: dict[str, Any], seed: int) -> Method:
    """The method, its own seed that of the command unless it is set."""
    method = Method.named(name, **settings)
    return (
        method.replace(seed=seed) if hasattr(method, "seed") and "seed" not in settings else method
    )


def _budget(keep: float | None, experts: int | None, size: str | None) -> Budget:
    given = [value for value in (keep, experts, size) if value is not None]
    if len(given) > 1:
        raise SpecError("give one of --keep, --experts and --target-size")
    if experts is not None:
        return Budget(experts=experts)
    if size is not None:
        return Budget(bytes=_bytes(size))
    return Budget(ratio=0.5 if keep is None else keep)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if found is None or found.group(2).upper() not in _UNITS:
        raise SpecError(f"--target-size is {size!r}; wanted a size as 8GB, 500MiB or bytes")
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])


def setting_of(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as JSON if it is that, a list where it has commas, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SpecError(f"--set {text!r} is not NAME=VALUE, such as --set alpha=0.4")
    if "," in value and not value.startswith("["):
        return name, [part.strip() for part in value.split(",")]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _show(report: PruneReport, choices: dict[str, Any], output: Path) -> None:
    console = Console(highlight=False)
    if report.before is not None or choices:
        console.print(_changes(report, choices))
    console.print(_blocks(report))
    if report.ordinary:
        how = "an ordinary checkpoint of its architecture"
    else:
        how = "loads with transformers once moekit.surgery is imported"
    console.print(f"Model: {output} ({how})", markup=False, soft_wrap=True)
    console.print(f"Report: {output / REPORT}", markup=False, soft_wrap=True)


def _changes(report: PruneReport, choices: dict[str, Any]) -> Table:
    before, after = report.before, report.after
    title = f"{report.method['kind']}, {report.calibration_tokens:,} tokens of calibration"
    table = Table("", title=title, box=box.SIMPLE_HEAD)
    for name in ("before", "after", "after/before"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, float, float, str]] = []
    if before is not None and after is not None:
        rows += [
            ("parameters", before.parameters, after.parameters, ",.0f"),
            ("bytes", before.bytes, after.bytes, ",.0f"),
            ("held-out perplexity", before.perplexity, after.perplexity, ".3f"),
            (
                "expert time, µs a token",
                before.expert_seconds_per_token * 1e6,
                after.expert_seconds_per_token * 1e6,
                ".2f",
            ),
        ]
    for name, sides in choices.items():
        old, new = sides["before"], sides["after"]
        rows.append((f"accuracy, {name}", old["accuracy"], new["accuracy"], ".3f"))
        key = "accuracy_normalized"
        rows.append(("  normalised by length", old[key], new[key], ".3f"))
    for name, earlier, later, form in rows:
        ratio = f"{later / earlier:.3f}" if earlier else ""
        table.add_row(name, f"{earlier:{form}}", f"{later:{form}}", ratio)
    return table


def _blocks(report: PruneReport) -> Table:
    table = Table(title="MoE layers", box=box.SIMPLE_HEAD)
    table.add_column("MoE layer", overflow="fold")
    for name in ("experts\nbefore", "experts\nafter", "removed to kept,\ncosine of outputs"):
        table.add_column(name, justify="right", no_wrap=True)
    for block in report.blocks:
        similarity = "" if block.similarity is None else f"{block.similarity:.3f}"
        table.add_row(block.name, str(block.experts_before), str(block.experts), similarity)
    return table
