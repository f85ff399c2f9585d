"""``moekit adapt`` and ``moekit merge-adapter``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_base, require_vocabulary
from moekit.cli.progress import StudyBars
from moekit.cli.result import require_place, write_model
from moekit.data import PairData, PairSpec, TextData, load_tokenizer, prepare, prepare_pairs
from moekit.errors import SpecError
from moekit.surgery.adapt import (
    AdaptSpec,
    FitReport,
    FitSpec,
    fit_adapter,
    install_adapter,
    is_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from moekit.surgery.adapt.files import adapter_settings
from moekit.training import RichProgress, SilentProgress

EXAMPLES = """\
  moekit adapt my/llama --data my/texts --output runs/adapter
  moekit adapt my/qwen --data notes.jsonl --experts 4 --rank 16 --steps 1000
  moekit adapt my/olmoe --data my/texts --rank 8 --no-attention
  moekit adapt my/llama --data answers.jsonl --completions --output runs/assistant
  moekit adapt my/llama --data my/texts --experts 4 --null 5 --k 4 --combine normalized
  moekit evaluate runs/adapter --data my/texts
"""
MERGE_EXAMPLES = """\
  moekit merge-adapter runs/adapter --output runs/merged
  moekit merge-adapter runs/mixture --expert 0 --output runs/first
"""


def adapt_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub name of a causal language model of transformers.")
    ],
    data: opt.Data,
    experts: Annotated[
        int, typer.Option(help="LoRA experts of each dense feed-forward part; 1 is plain LoRA.")
    ] = 3,
    null: Annotated[
        int,
        typer.Option(
            help="Experts beside them that compute nothing, so that a token may "
            "use fewer (AdaMoE); with --combine normalized or gate."
        ),
    ] = 0,
    k: Annotated[int, typer.Option("--k", help="LoRA experts a token, null ones included.")] = 1,
    routers: Annotated[
        str,
        typer.Option(
            help="part: one a feed-forward part. linear: one a projection, attention's too, which "
            "then gets LoRA experts as well."
        ),
    ] = "part",
    router_bias: Annotated[bool, typer.Option(help="Give routers a bias.")] = True,
    rank: Annotated[int, typer.Option(help="Rank of every LoRA pair.")] = 32,
    alpha: Annotated[float, typer.Option(help="An update is scaled by alpha / rank.")] = 64.0,
    dropout: Annotated[float, typer.Option(help="Dropout before every LoRA pair.")] = 0.05,
    combine: Annotated[
        str,
        typer.Option(
            help="How a token's experts are combined: sparse_ste, hard, gate, normalized, ste or "
            "soft."
        ),
    ] = "sparse_ste",
    balance: Annotated[float, typer.Option(help="Weight of the balance loss.")] = 0.01,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Balance all layers together, as the official code.")
    ] = False,
    attention: Annotated[
        bool, typer.Option(help="Adapt attention too, by plain LoRA (needs peft).")
    ] = True,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
    check_every: Annotated[
        int, typer.Option(help="Steps from one look at the held-out text to the next.")
    ] = 50,
    learning_rate: opt.LearningRate = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 4,
    accumulate: opt.Accumulate = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    text_column: opt.TextColumn = None,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions",
            help="The data hold prompts and completions, or conversations (messages): only "
            "completions, or what the assistant says, are learned.",
        ),
    ] = False,
    prompt_column: Annotated[
        str | None, typer.Option(help="With --completions: column of the prompt.")
    ] = None,
    completion_column: Annotated[
        str | None, typer.Option(help="With --completions: column of the completion.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a tokenizer. Default: the checkpoint's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("moekit-adapter"),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a mixture of LoRA experts on a model's feed-forward parts, and LoRA on attention.

    Each dense feed-forward part gets LoRA experts and a router that sends every token to the best
    of them (LLaVA-MoLE). A part that is a mixture of experts already gets LoRA on each of its own
    experts. The model's weights are only read; the adapter is a small folder that the other
    commands take in the place of a checkpoint.

    --completions trains on answers alone: rows with prompt and completion, or with messages. A
    twentieth of the data is held out. An interrupted run goes on when the command is run again.
    """
    where = opt.device_of(device)
    spec = AdaptSpec(
        experts=experts,
        null=null,
        k=k,
        routers=routers,  # type: ignore[arg-type]  # the spec looks
        router_bias=router_bias,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        combine=combine,  # type: ignore[arg-type]  # the spec looks
        balance=balance,
        pooled=pooled,
        attention=attention,
    )
    fit = FitSpec(
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        check_every=check_every,
        seed=seed,
    )
    if not completions and (prompt_column or completion_column):
        raise SpecError("a column of prompts or completions is named; add --completions")
    if completions and text_column:
        raise SpecError("--text-column is of whole texts; leave it out, or leave --completions out")
    require_place(output)
    model: Any = nn.Module.to(load_base(checkpoint), where)
    words = load_tokenizer(tokenizer or checkpoint)
    if tokenizer is not None:
        require_vocabulary(words, model.config)
    install_adapter(model, spec)
    found: TextData | PairData
    with StudyBars(quiet=quiet) as bars:
        if completions:
            pairs = PairSpec(data, prompt_column, completion_column, sequence_length, seed=seed)
            found = prepare_pairs(pairs, words, bars.preparing())
        else:
            text = opt.text_spec(data, text_column, tokenizer or checkpoint, 4096, sequence_length)
            found = prepare(text.replace(seed=seed, test_share=0.0), progress=bars.preparing())
    work = output.with_name(f".{output.name}.work")
    reporter = SilentProgress() if quiet else RichProgress()
    report = fit_adapter(model, found.train, found.validation, fit, work=work, reporter=reporter)
    folder = Path(checkpoint).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else checkpoint  # found from anywhere
    result = report.to_dict() | ({"examples": found.report} if completions else {})
    save_adapter(model, output, base, words, {**result, "fit": fit.to_dict()})
    shutil.rmtree(work, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **result}, indent=1))
        return
    if completions:
        typer.echo(_examples(found.report))
    _show(report, output)


def merge_command(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter.")],
    expert: Annotated[
        int | None,
        typer.Option(help="The LoRA expert to merge for all tokens, where there are several."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("moekit-merged"),
    as_json: opt.Json = False,
) -> None:
    """Write an ordinary checkpoint with an adapter merged into its weights.

    Plain LoRA and LoRA on the experts of a mixture merge exactly. A mixture of LoRA experts does
    not, since each token has other ones; --expert merges one of them for all tokens.
    """
    if not is_adapter(adapter):
        raise SpecError(f"{adapter} is no adapter; wanted a folder that moekit adapt wrote")
    require_place(output)
    _, base = adapter_settings(adapter)
    model = merge_adapter(load_adapter(load_base(base), adapter), expert)
    words = load_tokenizer(adapter)
    write_model(model, words, output)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "base": base}))
    else:
        typer.echo(f"Model: {output} (an ordinary checkpoint of {type(model).__name__})")


def _examples(counts: dict[str, Any]) -> str:
    return (
        f"Examples: {counts['train']:,} to train on, {counts['validation']:,} held out; "
        f"{counts['duplicates']:,} met twice, {counts['cut']:,} cut off, "
        f"{counts['without_completion']:,} left out, whose completion was cut off altogether"
    )


def _show(report: FitReport, output: Path) -> None:
    table = Table("step", title="Adapting", box=box.SIMPLE_HEAD)
    for name in ("held-out loss", "training loss"):
        table.add_column(name, justify="right")
    for look in report.looks:
        trained = "" if look.train_loss is None else f"{look.train_loss:.4f}"
        table.add_row(str(look.step), f"{look.held_out_loss:.4f}", trained)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Trained: {report.trained:,} of {report.parameters:,} parameters "
        f"({report.trained / report.parameters:.2%})"
    )
    console.print(f"Adapter: {output}", markup=False, soft_wrap=True)
