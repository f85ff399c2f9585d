"""Options that several commands share, so that they mean and read the same everywhere."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import torch
import typer

from moekit.compare import Design, ModelSpec, load_design
from moekit.data import TextSpec
from moekit.errors import OutputError, SpecError
from moekit.systems import Shape, find
from moekit.training import TrainingSpec
from moekit.training.arguments import require_trackers

LARGEST = 1_000_000  # of any size; what is larger overflows in a library and not here

Data = Annotated[
    str,
    typer.Option(
        help="Text to train on: a file, folder or glob of text, JSON lines or parquet, or "
        "hub:OWNER/NAME. The default needs no download: Python's own standard library."
    ),
]
TextColumn = Annotated[
    str | None, typer.Option(help="Column of the text in JSON lines, parquet or a hub data set.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of a tokenizer. Default: train one on the text."),
]
VocabSize = Annotated[
    int, typer.Option(help="Vocabulary of the tokenizer that is trained.", max=LARGEST)
]
SequenceLength = Annotated[int, typer.Option(help="Tokens in a training sequence.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps of each run.")]
BatchSize = Annotated[int, typer.Option(help="Sequences an optimiser step, over all processes.")]
Accumulate = Annotated[int, typer.Option(help="Micro-batches an optimiser step.")]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate (AdamW, cosine).")]
Precision = Annotated[
    str,
    typer.Option(
        help="float32, or bfloat16 for mixed precision; auto takes bfloat16 where the processor "
        "has instructions for it."
    ),
]
Checkpointing = Annotated[
    bool, typer.Option(help="Recompute activations in the backward pass to save memory.")
]
Width = Annotated[int, typer.Option(help="Model width.", max=LARGEST)]
Depth = Annotated[int, typer.Option(help="Number of layers.", max=LARGEST)]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
KvHeads = Annotated[int, typer.Option(help="Heads of keys and values.")]
Experts = Annotated[int, typer.Option(help="Feed-forward experts of named designs.", max=LARGEST)]
Hidden = Annotated[
    int, typer.Option(help="Hidden width of each expert of named designs.", max=LARGEST)
]
TopKOption = Annotated[int, typer.Option("--k", help="Experts a token of named designs.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
ReportTo = Annotated[
    str,
    typer.Option(help="Trackers, comma-separated: tensorboard, wandb, or what transformers has."),
]
Output = Annotated[
    Path, typer.Option(help="Folder for results. Run again to go on where it stopped.")
]


def design_of(name: str, shape: Shape) -> Design:
    """A named design, or the one in a JSON file.

    Raises:
        SpecError: neither.
    """
    if name.endswith(".json"):
        return load_design(Path(name))
    system = find(name)
    if system.design is None:
        raise SpecError(f"{name} is no language-model layer; `moekit systems` says how to use it")
    return system.design(shape)


def device_of(name: str) -> str:
    """The device that ``name`` asks for.

    Raises:
        SpecError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise SpecError(f"there is no device {name!r} here; try --device cpu")
    return name


def precision_of(name: str, device: str) -> str:
    """The precision that ``name`` asks for on a device."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    capabilities: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older torch has none
    return "bfloat16" if capabilities.get("amx_bf16") else "float32"


def trackers(names: str) -> tuple[str, ...]:
    """The trackers in a comma-separated list, each known and installed.

    Raises:
        SpecError: transformers does not know one.
        MissingExtraError: one is not installed, or not set up.
    """
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    require_trackers(wanted)
    return wanted


def require_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    The folder is not made yet, so that a mistake in another option leaves nothing behind.

    Raises:
        OutputError: it is a file, or it cannot be made or written.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = nearest / f".moekit-{secrets.token_hex(4)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write to {folder} ({reason}); choose another --output") from None


def text_spec(
    data: str,
    text_column: str | None,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
) -> TextSpec:
    """The text that the options describe."""
    return TextSpec(
        source=data,
        text_column=text_column,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
    )


def model_spec(width: int, depth: int, heads: int, kv_heads: int) -> ModelSpec:
    """The decoder that the options describe."""
    return ModelSpec(width=width, depth=depth, heads=heads, kv_heads=kv_heads)


def training_spec(
    steps: int,
    batch_size: int,
    accumulate: int,
    learning_rate: float,
    precision: str,
    checkpointing: bool,
    seed: int,
) -> TrainingSpec:
    """The training run that the options describe, evaluated ten times on a part of the data."""
    return TrainingSpec(
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=accumulate,
        learning_rate=learning_rate,
        precision=precision,  # type: ignore[arg-type]  # checked by the spec
        gradient_checkpointing=checkpointing,
        eval_every=max(1, steps // 10),
        eval_batches=4,
        save_every=max(1, steps // 4),
        log_every=max(1, min(10, steps // 20)),
        seed=seed,
    )
