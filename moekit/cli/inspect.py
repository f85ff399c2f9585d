"""``moekit inspect``: what a checkpoint is, and what its routers do with a text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
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
from moekit.data import prepare
from moekit.errors import CheckpointError, SpecError
from moekit.measure import (
    CheckpointStructure,
    Fluctuation,
    TokenRouting,
    inspect_checkpoint,
    routing_fluctuation,
    token_routing,
)
from moekit.measure.observe import TokenBlocks
from moekit.measure.report import (
    Code,
    Facts,
    Report,
    RoutedModel,
    Section,
    fluctuation_section,
    plain_routing,
    routing_sections,
    series_styles,
)

EXAMPLES = """\
  moekit inspect runs/moepp/model
  moekit inspect my/olmoe --data my/texts --output runs/olmoe-routing
  moekit inspect allenai/OLMoE-1B-7B-0924 --json
  moekit inspect run/checkpoint-900 --data my/texts --against run/checkpoint-800
"""


def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of any MoE checkpoint.")],
    data: Annotated[
        str | None, typer.Option(help="Text to route: adds routing statistics and a report.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Earlier checkpoint of the same model, oldest first if several: adds what part "
            "of the routing changed from each to the next. Needs --data."
        ),
    ] = None,
    text_column: opt.TextColumn = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    batches: Annotated[int, typer.Option(help="Batches of 8 sequences to route at most.")] = 32,
    output: Annotated[
        Path, typer.Option(help="Folder for the report and the raw results, with --data.")
    ] = Path("moekit-inspect"),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show a checkpoint's structure and its parameters by part, without loading its weights.

    Works on moekit's checkpoints and on every MoE model of transformers. With --data, the model is
    loaded and run on the text, and its routing is reported: load of each expert, experts a token,
    entropy of the choice, and which tokens each expert takes.
    """
    where = opt.device_of(device)
    if batches < 1:
        raise SpecError(f"--batches is {batches}; wanted at least 1")
    if against and data is None:
        raise SpecError("--against compares the routing of a text; give it with --data")
    structure = inspect_checkpoint(checkpoint)
    if data is not None and not structure.moe_layers:
        raise CheckpointError(
            f"{checkpoint} has no MoE layers and so no routing to report; leave --data out"
        )
    found, changes = None, None
    if data is not None:
        opt.require_writable(output)
        spec = opt.text_spec(data, text_column, checkpoint, 4096, sequence_length)
        with StudyBars(quiet=quiet) as bars:
            text = prepare(spec.replace(seed=seed), progress=bars.preparing())
        model = nn.Module.to(load_model(checkpoint), where)
        found = token_routing(model, text.train, text.tokenizer, text.groups, max_batches=batches)
        if against:
            changes = _changes(against, checkpoint, model, text.train, batches)
        _write(structure, found, changes, output)
    if as_json:
        plain = _plain(structure, found, changes)
        typer.echo(json.dumps(plain, indent=1, ensure_ascii=False))
        return
    _show(structure)
    if found is not None:
        _show_routing(found)
        if changes is not None:
            _show_changes(changes)
        typer.echo(f"Report: {output / 'report.html'}")
        typer.echo(f"Raw results: {output / 'inspection.json'}")


@dataclasses.dataclass(frozen=True)
class _Changes:
    """What changed from each checkpoint to the next, and the names of all."""

    names: tuple[str, ...]
    found: list[tuple[Fluctuation, ...]]

    def plain(self) -> list[dict[str, Any]]:
        """JSON values, one entry a pair of neighbours."""
        pairs = zip(itertools.pairwise(self.names), self.found, strict=True)
        return [
            {"before": before, "after": after, "layers": [dataclasses.asdict(x) for x in layers]}
            for (before, after), layers in pairs
        ]


def _changes(
    against: Sequence[str], checkpoint: str, model: nn.Module, text: TokenBlocks, batches: int
) -> _Changes:
    """One model at a time is held beside the inspected one, which comes last."""
    device = next(model.parameters()).device
    earlier = (nn.Module.to(load_model(name), device) for name in against)
    models = itertools.chain(earlier, [model])
    found = routing_fluctuation(models, text, max_batches=batches)
    return _Changes((*against, checkpoint), found)


def _plain(
    structure: CheckpointStructure, found: TokenRouting | None, changes: _Changes | None
) -> dict[str, Any]:
    plain: dict[str, Any] = {"structure": dataclasses.asdict(structure)}
    if found is not None:
        plain["routing"] = found.statistics.summary() | plain_routing(found)
    if changes is not None:
        plain["fluctuation"] = changes.plain()
    return plain


def _write(
    structure: CheckpointStructure, found: TokenRouting, changes: _Changes | None, output: Path
) -> None:
    write_json(output / "inspection.json", _plain(structure, found, changes))
    model = RoutedModel(structure.name, found.statistics.summary()["layers"], plain_routing(found))
    facts = [
        ("architecture", structure.architecture),
        ("layers", str(structure.layers)),
        ("MoE layers", str(len(structure.moe_layers))),
        ("parameters", f"{structure.total / 1e6:,.2f} million"),
        ("active a token", f"{structure.active / 1e6:,.2f} million"),
    ]
    parts = json.dumps(structure.parameters, indent=1)
    sections = [
        Section("Structure", [Facts(facts), Code(parts)]),
        *routing_sections([model], series_styles([model.name])),
    ]
    if changes is not None:
        sections.append(fluctuation_section(changes.names, changes.found))
    Report(f"Routing of {structure.name}", sections).write(output / "report.html")


def _show(structure: CheckpointStructure) -> None:
    console = Console(highlight=False)
    console.print(
        f"{structure.name}: {structure.architecture}, {structure.layers} layers of width "
        f"{structure.hidden_size}, vocabulary {structure.vocabulary:,}",
        markup=False,
    )
    console.print(
        f"{structure.total:,} parameters, {structure.active:,} active a token; "
        f"{structure.stored_bytes / 2**20:,.1f} MiB stored as "
        + ", ".join(sorted(structure.stored_dtypes)),
        markup=False,
    )
    console.print(_parts(structure))
    if structure.moe_layers:
        console.print(_layers(structure))
    else:
        console.print("No MoE layers.")


def _parts(structure: CheckpointStructure) -> Table:
    table = Table("part", title="Parameters by part", box=box.SIMPLE_HEAD)
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for part, count in structure.parameters.items():
        if count:
            table.add_row(part, f"{count:,}", f"{count / structure.total:.1%}")
    return table


def _layers(structure: CheckpointStructure) -> Table:
    table = Table(title="MoE layers", box=box.SIMPLE_HEAD)
    table.add_column("MoE layer", overflow="fold")
    columns = ("experts", "experts\na token", "parameters\nan expert", "shared\nparameters")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in structure.moe_layers:
        table.add_row(
            layer.name,
            str(layer.experts),
            f"{layer.top_k:g}",
            f"{layer.expert_parameters:,.0f}",
            f"{layer.shared_parameters:,}",
        )
    return table


def _show_routing(found: TokenRouting) -> None:
    table = Table("MoE layer", title="Routing", box=box.SIMPLE_HEAD)
    columns = ("load\nmax/mean", "unused\nexperts", "entropy\nnats", "experts\na token")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for index, layer in enumerate(found.statistics.summary()["layers"]):
        entropy = layer["entropy"]
        table.add_row(
            str(index),
            f"{layer['load_violation']:.2f}",
            str(layer["unused_experts"]),
            "" if entropy is None else f"{entropy:.3f}",
            f"{layer['feed_forward_experts_per_token']:.2f}",
        )
    Console(highlight=False).print(table)


def _show_changes(changes: _Changes) -> None:
    table = Table(title="Routing that changed, mean over layers", box=box.SIMPLE_HEAD)
    for name in ("from", "to"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "slots"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in changes.plain():
        means = (
            statistics.fmean(layer[name] for layer in pair["layers"])
            for name in ("changed_tokens", "changed_slots")
        )
        table.add_row(pair["before"], pair["after"], *(f"{mean:.2%}" for mean in means))
    Console(highlight=False).print(table)
