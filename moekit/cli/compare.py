"""``moekit compare``: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moekit.cli import options as opt
from moekit.cli.progress import StudyBars
from moekit.compare import DesignSummary, StudySpec, compare
from moekit.compare.report import Written, write_report
from moekit.systems import DEFAULT_DESIGNS, Shape

EXAMPLES = """\
  moekit compare
  moekit compare --data my/texts --designs dense,topk,moepp --seeds 3
  moekit compare --data log.jsonl --text-column message --output runs/log
  moekit compare --designs topk,my_design.json --match flops --steps 2000
  moekit compare --precision bfloat16 --report-to tensorboard --json
"""


def compare_command(
    designs: Annotated[
        str,
        typer.Option(
            help="Designs, comma-separated: names from `moekit systems`, or JSON files. "
            "The first one sets the cost that the others are matched to."
        ),
    ] = ",".join(DEFAULT_DESIGNS),
    data: opt.Data = "stdlib",
    output: opt.Output = Path("moekit-compare"),
    seeds: Annotated[int, typer.Option(help="Seeds a design; three give an uncertainty.")] = 1,
    steps: opt.Steps = 70,
    match: Annotated[
        str,
        typer.Option(
            help="Make designs equal in active parameters (active), FLOPs a token (flops), or "
            "nothing but the steps (steps)."
        ),
    ] = "active",
    batch_size: opt.BatchSize = 16,
    accumulate: opt.Accumulate = 1,
    sequence_length: opt.SequenceLength = 128,
    vocab_size: opt.VocabSize = 2048,
    tokenizer: opt.Tokenizer = None,
    text_column: opt.TextColumn = None,
    learning_rate: opt.LearningRate = 3e-3,
    precision: opt.Precision = "auto",
    gradient_checkpointing: opt.Checkpointing = False,
    width: opt.Width = 128,
    depth: opt.Depth = 4,
    heads: opt.Heads = 4,
    kv_heads: opt.KvHeads = 2,
    experts: opt.Experts = 8,
    hidden: opt.Hidden = 256,
    k: opt.TopKOption = 2,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    report_to: opt.ReportTo = "",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train designs side by side on your text and report which one is best for it.

    Every design sees the same data in the same order. The report, one HTML file, has losses with
    their spread over seeds, measured cost, load balance, and which tokens each expert takes. Run
    the same command again to go on where it stopped; finished runs are not run again.
    """
    where = opt.device_of(device)
    shape = Shape(experts=experts, hidden=hidden, k=k)
    names = [name.strip() for name in designs.split(",") if name.strip()]
    spec = StudySpec(
        designs=tuple(opt.design_of(name, shape) for name in names),
        seeds=tuple(range(seed, seed + seeds)),
        model=opt.model_spec(width, depth, heads, kv_heads),
        training=opt.training_spec(
            steps,
            batch_size,
            accumulate,
            learning_rate,
            opt.precision_of(precision, where),
            gradient_checkpointing,
            seed,
        ),
        text=opt.text_spec(data, text_column, tokenizer, vocab_size, sequence_length),
        match=match,  # type: ignore[arg-type]  # checked by the spec
    )
    opt.require_writable(output)
    followers = opt.trackers(report_to)
    with StudyBars(quiet=quiet) as bars:
        study = compare(spec, output, progress=bars, device=where, report_to=followers, apart=True)
        written = write_report(study, output)
    if as_json:
        typer.echo(json.dumps(written.results, indent=1, ensure_ascii=False))
    else:
        _show(written)


def _show(written: Written) -> None:
    console = Console()
    console.print(_quality(written.summaries))
    console.print(_cost(written.summaries))
    for sentence in written.verdict:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"\nReport: {written.report}", markup=False, highlight=False, soft_wrap=True)
    results = f"Raw results: {written.json}, {written.csv}"
    console.print(results, markup=False, highlight=False, soft_wrap=True)


def _quality(summaries: list[DesignSummary]) -> Table:
    table = _table("Validation text, mean over seeds")
    for name in ("loss", "perplexity", "active", "total", "MFLOP/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summaries:
        spread = "" if row.loss.deviation is None else f" ± {row.loss.deviation:.4f}"
        table.add_row(
            _name(row),
            f"{row.loss.mean:.4f}{spread}",
            f"{row.perplexity.mean:.1f}",
            f"{row.active_parameters / 1e6:.2f}M",
            f"{row.total_parameters / 1e6:.2f}M",
            f"{row.flops_per_token / 1e6:.2f}",
        )
    return table


def _cost(summaries: list[DesignSummary]) -> Table:
    table = _table("Cost and routing")
    columns = ("training\ntokens/s", "expert phase\nµs/token", "experts\na token")
    for name in (*columns, "load\nmax/mean", "memory\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summaries:
        table.add_row(
            _name(row),
            f"{row.tokens_per_second:,.0f}",
            "" if row.phase is None else f"{row.phase.seconds_per_token * 1e6:.1f}",
            f"{row.feed_forward_experts.mean:.2f}",
            "" if row.load_violation is None else f"{row.load_violation.mean:.2f}",
            f"{row.peak_memory_bytes / 2**20:,.0f}",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("design", overflow="fold")
    return table


def _name(row: DesignSummary) -> Text:
    """The name as it is: square brackets in it are no markup."""
    return Text(row.design if row.causal else f"{row.design} (not causal)")
