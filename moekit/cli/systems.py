"""``moekit systems`` and ``moekit reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moekit.cli import options as opt
from moekit.cli.progress import StudyBars
from moekit.compare.record import write_json
from moekit.errors import SpecError
from moekit.systems import Laboratory, Reproduction, System, baselines, find, systems


def systems_command(
    available: Annotated[bool, typer.Option("--available", help="Only those built.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List every system: what it is made of, whether this version has it, how to use it.

    Examples:

      moekit systems

      moekit systems --available --json
    """
    rows = [s for s in (*baselines(), *systems()) if s.available or not available]
    if as_json:
        typer.echo(json.dumps([_plain(system) for system in rows], indent=1, ensure_ascii=False))
        return
    table = Table(title="Systems", show_lines=False)
    for name in ("name", "what it is", "made of", "available", "use"):
        table.add_column(name, overflow="fold")
    for system in rows:
        state = "yes" if system.available else "not yet"
        table.add_row(system.name, system.title, system.parts, state, system.use)
    Console().print(table)


def reproduce_command(
    name: Annotated[str, typer.Argument(help="A system with an experiment: see `moekit systems`.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of about a minute; it decides nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results. Default: moekit-reproduce/NAME.")
    ] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run a system's experiment against its baselines: claim, measured result, verdict.

    Examples:

      moekit reproduce moepp --quick

      moekit reproduce remoe --output runs/remoe
    """
    system = find(name)
    if system.experiment is None:
        raise SpecError(
            f"{name} has no experiment; those that have one: {', '.join(_reproducible())}"
        )
    folder = output or Path("moekit-reproduce") / (f"{name}-quick" if quick else name)
    opt.require_writable(folder)
    with StudyBars(quiet=quiet) as bars:
        laboratory = Laboratory(folder, quick, seed, opt.device_of(device), bars)
        result = system.experiment(laboratory)
    write_json(folder / "reproduction.json", result.to_dict())
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    else:
        _show(result, system, folder)


def _reproducible() -> list[str]:
    return [system.name for system in (*baselines(), *systems()) if system.experiment is not None]


def _plain(system: System) -> dict[str, Any]:
    names = ("name", "title", "paper", "parts", "available", "use")
    plain = {name: getattr(system, name) for name in names}
    return plain | {"experiment": system.experiment is not None}


def _show(result: Reproduction, system: System, folder: Path) -> None:
    console = Console(highlight=False)
    console.print(f"{system.title} ({system.paper})", markup=False)
    console.print(result.setting, markup=False)
    table = Table()
    columns = list(dict.fromkeys(name for row in result.table for name in row))
    shown = [name for name in columns if name not in ("causal", "seeds")]
    for name in shown:
        table.add_column(name.replace("_", " "), justify="left" if name == "design" else "right")
    for row in result.table:
        table.add_row(*(_cell(row.get(name)) for name in shown))
    console.print(table)
    for finding in result.findings:
        console.print(f"\nclaim     {finding.claim}", markup=False)
        console.print(f"measured  {finding.measured}", markup=False)
        console.print(f"verdict   {finding.verdict}", markup=False)
    console.print(f"\nResults: {folder / 'reproduction.json'}", markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
