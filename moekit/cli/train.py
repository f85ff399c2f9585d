"""``moekit train``: one design, one seed, a checkpoint that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console

from moekit.cli import options as opt
from moekit.cli.progress import StudyBars
from moekit.compare.run import build_model, on_device, save_model
from moekit.data import prepare
from moekit.errors import OutputError
from moekit.systems import Shape
from moekit.training import RichProgress, SilentProgress, train
from moekit.training.run import RECORD

EXAMPLES = """\
  moekit train --design moepp --data my/texts --steps 2000 --output runs/moepp
  moekit train --design my_design.json --report-to tensorboard
  torchrun --nproc-per-node 2 -m moekit train --output runs/topk
"""


def train_command(
    design: Annotated[
        str, typer.Option(help="A name from `moekit systems`, or a JSON file with a design.")
    ] = "topk",
    data: opt.Data = "stdlib",
    output: opt.Output = Path("moekit-train"),
    steps: opt.Steps = 500,
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
    """Train one language model on your text.

    The model goes to OUTPUT/model, ready for `moekit generate`, `moekit inspect` and transformers'
    `from_pretrained`; checkpoints go to OUTPUT/training. An interrupted run goes on from its last
    whole checkpoint when the command is run again. Under torchrun it trains on several processes.
    """
    where = opt.device_of(device)
    chosen = opt.design_of(design, Shape(experts=experts, hidden=hidden, k=k))
    text = opt.text_spec(data, text_column, tokenizer, vocab_size, sequence_length)
    training = opt.training_spec(
        steps,
        batch_size,
        accumulate,
        learning_rate,
        opt.precision_of(precision, where),
        gradient_checkpointing,
        seed,
    )
    opt.require_writable(output)
    _require_own(output)
    followers = opt.trackers(report_to)
    with StudyBars(quiet=quiet) as bars:
        prepared = prepare(text, progress=bars.preparing())
    model = build_model(chosen, opt.model_spec(width, depth, heads, kv_heads), prepared, seed)
    result = train(
        on_device(model, where),
        prepared,
        training,
        output / "training",
        report_to=followers,
        progress=SilentProgress() if quiet else RichProgress(),
        description=chosen.name,
    )
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    save_model(model, prepared, output / "model")
    summary = {
        "model": str(output / "model"),
        "design": chosen.name,
        "validation_loss": result.validation_loss,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": result.seconds,
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    console = Console(highlight=False)
    console.print(
        f"{chosen.name}: validation loss {result.validation_loss:.4f} nats a token after "
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s",
        markup=False,
    )
    console.print(f"Model: {output / 'model'}", markup=False)


def _require_own(output: Path) -> None:
    """Refuse to replace a folder of the model's name that no training of ours has left."""
    if (output / "model").exists() and not (output / "training" / RECORD).exists():
        raise OutputError(
            f"{output / 'model'} is there already and would be replaced; choose another --output"
        )
