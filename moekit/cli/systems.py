"""``moekit systems`` and ``moekit reproduce``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moekit.cli import options as opt
from moekit.cli.progress import StudyBars
from moekit.compare.record import write_json
from moekit.errors import SpecError
from moekit.systems import Laboratory, Reproduction, System, baselines, find, systems

SYSTEMS_EXAMPLES = """\
  moekit systems
  moekit systems --available --json
"""
REPRODUCE_EXAMPLES = """\
  moekit reproduce moepp --quick
  moekit reproduce remoe --output runs/remoe
"""


def systems_command(
    available: Annotated[bool, typer.Option("--available", help="Only those built.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List every system: what it is made of, whether this version has it, how to use it."""
    rows = [s for s in (*baselines(), *systems()) if s.available or not available]
    if as_json:
        typer.echo(json.dumps([_plain(system) for system in rows], indent=1, ensure_ascii=False))
        return
    table = Table(title="Systems", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    for name in ("what it is", "made of", "use"):
        table.add_column(name, overflow="fold")
    for system in rows:
        table.add_row(system.name, system.title, system.parts, system.use or "not yet")
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
    """Run a system's experiment against its baselines: claim, measured result, verdict."""
    system = find(name)
    if system.experiment is None:
        raise SpecError(
            f"{name} has no experiment; those that have one: {', '.join(_reproducible())}"
        )
    folder = output or Path("moekit-reproduce") / (f"{name}-quick" if quick else name)
    where = opt.device_of(device)
    opt.require_writable(folder)
    with StudyBars(quiet=quiet) as bars:
        laboratory = Laboratory(folder, quick, seed, where, bars)
        laboratory.claim(name)
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
    for rows in _of_one_kind(result.table):
        console.print(_measures(rows))
    for finding in result.findings:
        console.print(f"\nclaim     {finding.claim}", markup=False)
        console.print(f"measured  {finding.measured}", markup=False)
        console.print(f"verdict   {finding.verdict}", markup=False)
    console.print(f"\nResults: {folder / 'reproduction.json'}", markup=False, soft_wrap=True)


def _of_one_kind(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows in runs of the same measures, each of which is a table."""
    return [list(run) for _, run in itertools.groupby(rows, key=tuple)]


def _measures(rows: list[dict[str, Any]]) -> Table:
    """Designs against measures, the longer list downwards, which fits a narrow terminal."""
    names = dict.fromkeys(name for row in rows for name in row)
    measures = [name for name in names if name not in ("design", "causal", "seeds")]
    designs = [str(row["design"]) for row in rows]
    titles = [name.replace("_", " ") for name in measures]
    cells = [[_cell(row.get(name)) for name in measures] for row in rows]
    if len(designs) > len(measures):
        return _grid(titles, designs, cells)
    return _grid(designs, titles, [list(column) for column in zip(*cells, strict=True)])


def _grid(columns: list[str], names: list[str], cells: list[list[str]]) -> Table:
    table = Table("", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    for name, row in zip(names, cells, strict=True):
        table.add_row(Text(name), *row)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
