"""``moekit unlearn``: a checkpoint that has unlearned a text, and what that changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moekit.cli import options as opt
from moekit.cli.checkpoint import require_vocabulary
from moekit.cli.progress import StudyBars
from moekit.cli.prune import setting_of
from moekit.cli.result import require_place
from moekit.compare.record import write_json
from moekit.data import TextData, load_tokenizer, prepare
from moekit.errors import SpecError
from moekit.surgery import Checkpoint, local_folder
from moekit.surgery.unlearn import (
    AllExperts,
    Attributed,
    Everything,
    Named,
    RandomExperts,
    Routers,
    Targets,
    Texts,
    UnlearnReport,
    UnlearnSpec,
    unlearn,
)
from moekit.surgery.unlearn.algorithms import Algorithm
from moekit.training import RichProgress, SilentProgress

REPORT = "moekit_unlearn.json"
EXAMPLES = """\
  moekit unlearn my/olmoe --forget secret.txt --retain my/texts --output runs/olmoe-clean
  moekit unlearn my/deepseek --forget topic.jsonl --retain general.jsonl --algorithm gdiff --until 8
  moekit unlearn my/mixtral --forget f.txt --retain r.txt --algorithm rmu --set layer=7 --experts 2
  moekit unlearn my/qwen --forget f.txt --retain r.txt --expert 4:5 --anchor 1 --steps 200
  moekit unlearn my/qwen --forget f.txt --retain r.txt --train experts --algorithm ga
"""
_TRAIN = ("expert", "random", "experts", "routers", "all")


def unlearn_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of an MoE checkpoint.")],
    forget: Annotated[
        str,
        typer.Option(
            help="Text to unlearn: a file, folder or glob of text, JSON lines or parquet, or "
            "hub:OWNER/NAME."
        ),
    ],
    retain: Annotated[
        str,
        typer.Option(
            help="Text that the model is to keep, in the same forms. Utility is measured on it, "
            "and all algorithms but ga train on it."
        ),
    ],
    algorithm: Annotated[str, typer.Option(help="ga, gdiff, npo or rmu.")] = "npo",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the algorithm, NAME=VALUE; may be given often."),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="Experts to train, those that the text engages most. Default: 1."),
    ] = None,
    same_layer: Annotated[
        bool, typer.Option("--same-layer", help="Take all of them from the layer of the best one.")
    ] = False,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="An expert to train, LAYER:EXPERT, in place of the attributed one."),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            help="expert: the attributed ones and their routers. Baselines: random (as many by "
            "chance), experts (all), routers (all), all (every parameter)."
        ),
    ] = "expert",
    freeze_router: Annotated[
        bool, typer.Option("--freeze-router", help="Leave the routers as they are.")
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Train the shared experts of those layers too.")
    ] = False,
    anchor: Annotated[float, typer.Option(help="Weight α of the router anchor; 0 for none.")] = 1.0,
    until: Annotated[
        float,
        typer.Option(
            help="Stop once perplexity on held-out forget text is so many times what it was; 0 to "
            "take all steps."
        ),
    ] = 4.0,
    steps: Annotated[int, typer.Option(help="Most optimiser steps.")] = 300,
    check_every: Annotated[
        int, typer.Option(help="Steps from one look at the held-out text to the next.")
    ] = 10,
    learning_rate: Annotated[float, typer.Option(help="Learning rate (AdamW, constant).")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 4,
    accumulate: opt.Accumulate = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    attribution_tokens: Annotated[
        int, typer.Option(help="Tokens of forget text that experts are attributed with.")
    ] = 100_000,
    held_out: Annotated[
        int,
        typer.Option(help="Most held-out sequences of each text at every look, in whole batches."),
    ] = 64,
    text_column: opt.TextColumn = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a tokenizer. Default: the checkpoint's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("moekit-unlearn"),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a checkpoint that has unlearned a text, and report what that changed.

    The expert whose router sends it most of the text is found, and it and its router alone are
    trained, while an anchor keeps the router sending the text there. The result is an ordinary
    checkpoint of the same architecture that differs in those weights only, bit for bit. The
    checkpoint that you give is only read.

    A twentieth of each text is held out. Training ends once perplexity on held-out forget text is
    --until times what it was, or after --steps. An interrupted run goes on when the command is run
    again.
    """
    where = opt.device_of(device)
    spec = UnlearnSpec(
        algorithm=Algorithm.named(algorithm, **dict(setting_of(text) for text in settings or [])),
        targets=_targets(train, experts, same_layer, expert, freeze_router, shared, seed),
        anchor=anchor,
        steps=steps,
        until=until or None,
        check_every=check_every,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        accumulate=accumulate,
        attribution_tokens=attribution_tokens,
        seed=seed,
    )
    if held_out < 1:
        raise SpecError(f"--held-out is {held_out}; wanted at least 1")
    require_place(output)
    folder = local_folder(checkpoint)
    source_config = Checkpoint(folder).config  # a damaged file is named before any text is read
    if tokenizer is not None:
        require_vocabulary(load_tokenizer(tokenizer), source_config)
    with StudyBars(quiet=quiet) as bars:
        read: list[TextData] = []
        for source in (forget, retain):
            text = opt.text_spec(
                source, text_column, tokenizer or str(folder), 4096, sequence_length
            )
            read.append(prepare(text.replace(seed=seed, test_share=0.0), progress=bars.preparing()))
    trains = spec.algorithm.retain_weight > 0
    texts = Texts(
        forget=read[0].train,
        retain=read[1].train if trains else None,
        forget_held_out=read[0].validation.first(held_out),
        retain_held_out=read[1].validation.first(held_out),
    )
    reporter = SilentProgress() if quiet else RichProgress()
    sequences = {"unlearned": len(texts.forget), "held_out": len(texts.forget_held_out)}

    def add_report(made: Path, report: UnlearnReport) -> None:
        write_json(made / REPORT, {**report.to_dict(), "forget_sequences": sequences})

    report = unlearn(
        folder, output, texts, spec, device=where, reporter=reporter, finish=add_report
    )
    if as_json:
        found = json.loads((output / REPORT).read_text(encoding="utf-8"))
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    _show(report, output)


def _targets(
    train: str,
    count: int | None,
    same_layer: bool,
    named: list[str] | None,
    freeze_router: bool,
    shared: bool,
    seed: int,
) -> Targets:
    if train not in _TRAIN:
        raise SpecError(f"--train is {train!r}; wanted one of {', '.join(_TRAIN)}")
    few = train in ("expert", "random")
    given = {
        "--experts": count is not None and not few,
        "--same-layer": same_layer and (train != "expert" or bool(named)),
        "--expert": bool(named) and train != "expert",
        "--shared": shared and not few,
        "--freeze-router": freeze_router and train in ("routers", "all"),
    }
    for option, out_of_place in given.items():
        if out_of_place:
            raise SpecError(f"{option} does not go with --train {train}, or with --expert")
    if named and count is not None:
        raise SpecError("give --experts or --expert, not both")
    router = not freeze_router
    m = 1 if count is None else count
    if named:
        return Named(experts=tuple(map(_pair, named)), router=router, shared=shared)
    if train == "expert":
        return Attributed(
            count=m,
            scope="layer" if same_layer else "global",
            router=router,
            shared=shared,
        )
    if train == "random":
        return RandomExperts(count=m, seed=seed, router=router, shared=shared)
    if train == "experts":
        return AllExperts(router=router)
    return Routers() if train == "routers" else Everything()


def _pair(text: str) -> tuple[int, int]:
    layer, _, expert = text.partition(":")
    if not (layer.isdecimal() and expert.isdecimal()):
        raise SpecError(
            f"--expert is {text!r}; wanted LAYER:EXPERT, such as 4:5 (shared experts: --shared)"
        )
    return int(layer), int(expert)


def _show(report: UnlearnReport, output: Path) -> None:
    console = Console(highlight=False)
    console.print(_texts(report))
    console.print(_selections(report))
    for chosen in report.experts:
        affinity = "" if chosen.affinity is None else f", affinity {chosen.affinity:.4f}"
        console.print(f"Trained: {chosen.block}, expert {chosen.expert}{affinity}", markup=False)
    console.print(
        f"Changed: {report.changed:,} of {report.parameters:,} parameters "
        f"({report.changed_share:.4%})"
    )
    until = report.spec["until"]
    if until is not None and not report.reached:
        console.print(
            f"Perplexity on forget text did not reach {until} times what it was in {report.steps} "
            "steps; give more --steps, or a higher --learning-rate"
        )
    console.print(f"Model: {output}", markup=False, soft_wrap=True)
    console.print(f"Report: {output / REPORT}", markup=False, soft_wrap=True)


def _texts(report: UnlearnReport) -> Table:
    spec = report.spec
    title = f"{spec['algorithm']['kind']} on {spec['targets']['kind']}, {report.steps} steps"
    table = Table("held-out text", title=title, box=box.SIMPLE_HEAD)
    for name in ("before", "after", "after/before"):
        table.add_column(name, justify="right")
    sides: list[tuple[str, dict[str, Any] | None]] = [
        ("forget", report.forget),
        ("retain", report.retain),
    ]
    for name, found in sides:
        for measure in ("perplexity", "accuracy"):
            if found is not None:
                old, new = found["before"][measure], found["after"][measure]
                ratio = f"{new / old:.3f}" if old else ""
                table.add_row(f"{name}, {measure}", f"{old:.4g}", f"{new:.4g}", ratio)
    return table


def _selections(report: UnlearnReport) -> Table:
    table = Table(title="experts still selected", box=box.SIMPLE_HEAD)
    table.add_column("MoE block", justify="right")
    for name in report.overlap:
        table.add_column(f"{name} text", justify="right")
    for block, shares in enumerate(zip(*report.overlap.values(), strict=True)):
        table.add_row(str(block), *(f"{share:.3f}" for share in shares))
    return table
