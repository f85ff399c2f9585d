"""The compression study as Markdown and as a page: tables, differences and whether they are clear.

A cell is one measurement: ``model``, ``method``, ``keep`` (share of experts left), ``seed`` (of the
calibration data), ``loss`` by domain in nats a token, ``accuracy``, ``accuracy_normalized``,
``parameters`` and, where compressed, ``passed_on``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.compare.summary import Spread
from moekit.measure.report import Block, Cell, Column, Facts, Plot, Report, Section, Table, Text
from moekit.measure.report.compression import loss_by_share

REFERENCE = "router-weight"
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method at one size, over the seeds.

    Attributes:
        method: its name.
        keep: share of experts left.
        loss: mean over the domains, in nats a token.
        accuracy, normalized: of the multiple-choice items, by log-likelihood and by that over
            length.
        gap: loss minus that of the reference with the same seed; None for the model itself.
        domains: of how many domains the loss is below the reference's, in the mean over seeds.
        parameters: of the whole model.
        passed_on: share of the removed experts' part that passes to others.
    """

    method: str
    keep: float
    loss: Spread
    accuracy: Spread
    normalized: Spread
    gap: Spread | None
    domains: int
    parameters: int
    passed_on: float

    @property
    def perplexity(self) -> float:
        """Geometric mean over domains and seeds."""
        return math.exp(self.loss.mean)

    @property
    def verdict(self) -> str:
        """Whether the seeds tell it from the reference, with 95% confidence."""
        if self.gap is None or self.method == REFERENCE:
            return ""
        if self.gap.mean == 0 and not self.gap.half_width:
            return "the same"
        if self.gap.half_width is None or abs(self.gap.mean) <= self.gap.half_width:
            return "not clear"
        return "better" if self.gap.mean < 0 else "worse"


def summarised(cells: Sequence[Measured], model: str) -> list[Row]:
    """The rows of a model: the whole one, then by share left and method."""
    own = [cell for cell in cells if cell["model"] == model]
    keys = dict.fromkeys((cell["keep"], cell["method"]) for cell in own)
    return [_row(own, keep, method) for keep, method in keys]


def _row(cells: Sequence[Measured], keep: float, method: str) -> Row:
    of_seed = {c["seed"]: c for c in cells if (c["keep"], c["method"]) == (keep, method)}
    base = {c["seed"]: c for c in cells if (c["keep"], c["method"]) == (keep, REFERENCE)}
    mine = list(of_seed.values())
    gaps = [_mean_loss(of_seed[seed]) - _mean_loss(base[seed]) for seed in of_seed if seed in base]
    return Row(
        method=method,
        keep=keep,
        loss=Spread.of([_mean_loss(cell) for cell in mine]),
        accuracy=Spread.of([cell["accuracy"] for cell in mine]),
        normalized=Spread.of([cell["accuracy_normalized"] for cell in mine]),
        gap=Spread.of(gaps) if gaps else None,
        domains=sum(
            _of_domain(mine, domain) < _of_domain(list(base.values()), domain)
            for domain in mine[0]["loss"]
            if base
        ),
        parameters=mine[0]["parameters"],
        passed_on=statistics.fmean(cell.get("passed_on", 0.0) for cell in mine),
    )


def _mean_loss(cell: Measured) -> float:
    return statistics.fmean(cell["loss"].values())


def _of_domain(cells: Sequence[Measured], domain: str) -> float:
    return statistics.fmean(cell["loss"][domain] for cell in cells)


def page(about: Measured, cells: Sequence[Measured], tasks: Sequence[Measured]) -> Report:
    """The study as a page."""
    sections = [Section("Setting", [_facts(about)])]
    for model, made in about["models"].items():
        rows = summarised(cells, model)
        blocks: list[Block] = [
            _specialisation(made),
            _quality_table(rows),
            Plot(
                loss_by_share(
                    rows[0].loss.mean,
                    {
                        name: [
                            (r.keep, r.loss.mean, r.loss.half_width)
                            for r in rows
                            if r.method == name
                        ]
                        for name in dict.fromkeys(r.method for r in rows[1:])
                    },
                ),
                "Mean loss over domains against the share of experts left; bars are 95% intervals "
                "over seeds of the calibration data.",
            ),
            _domain_table(cells, model),
        ]
        sections.append(Section(model, blocks))
    if tasks:
        sections.append(Section("UNCURL on a task", [_task_table(tasks)]))
    return Report("Compression of experts", sections, _lead(about), "Made by: " + _COMMAND)


_COMMAND = "python benchmarks/compression.py"


def markdown(about: Measured, cells: Sequence[Measured], tasks: Sequence[Measured]) -> str:
    """The study as Markdown."""
    parts = [f"# Compression of experts\n\n`{_COMMAND}`; {_lead(about)}\n"]
    for model, made in about["models"].items():
        rows = summarised(cells, model)
        parts.append(f"## {model}\n\n" + "\n\n".join(_specialisation(made).paragraphs) + "\n")
        parts.append(_as_markdown(_quality_table(rows)))
        parts.append(_as_markdown(_domain_table(cells, model)))
    if tasks:
        parts.append("## UNCURL on a task\n")
        parts.append(_as_markdown(_task_table(tasks)))
    return "\n".join(parts)


def _lead(about: Measured) -> str:
    extent, where = about["extent"], about["machine"]
    return (
        f"{len(extent['seeds'])} seeds of {extent['calibration']} calibration blocks of 256 "
        f"tokens; up to {extent['blocks']} held-out blocks and {extent['items']} items of each "
        f"domain; {where['device']}, threads: {where['threads']}, torch {where['torch']}, "
        f"transformers {where['transformers']}. Each model is one training run, so the spread is "
        "that of the calibration data alone."
    )


def _facts(about: Measured) -> Facts:
    entries = [(name, str(value)) for name, value in about["machine"].items()]
    for model, made in about["models"].items():
        entries.append((f"{model}, parameters", f"{made['parameters']:,}"))
        entries.append((f"{model}, tokens trained on", f"{made['tokens']:,}"))
        entries.append((f"{model}, written against in memory", f"{made['written']:.1e}"))
    return Facts(entries)


def _specialisation(made: Measured) -> Text:
    pairs = zip(made["untrained"]["layers"], made["trained"]["layers"], strict=True)
    layers = ", ".join(f"{a['information']:.3f} to {b['information']:.3f}" for a, b in pairs)
    size = made["size"]
    return Text(
        f"{made['parameters']:,} parameters, {size['experts']} routed experts of width "
        f"{size['hidden']}, {size['k']} a token, {made['tokens']:,} tokens of training. "
        f"Information between a token's domain and its expert, of "
        f"{made['trained']['domain_entropy']:.2f} nats, before to after training, by layer: "
        f"{layers}. {made['items']} multiple-choice items. Logits of the model as written by "
        f"`moekit prune` and as compressed in memory differ by at most {made['written']:.1e}."
    )


def _quality_table(rows: Sequence[Row]) -> Table:
    columns = [
        Column("method"),
        Column("experts left", form=".0%"),
        Column("perplexity", form=".2f"),
        Column("loss", "nats", ".4f"),
        Column("±", "seeds", ".4f"),
        Column("accuracy", form=".3f"),
        Column("by length", "accuracy", ".3f"),
        Column("loss less that of router-weight", "nats", "+.4f"),
        Column("± 95%", "", ".4f"),
        Column("clear of seed noise"),
        Column("domains better", form="d"),
        Column("passed on", form=".0%"),
        Column("parameters", form=",d"),
    ]
    cells: list[list[Cell]] = []
    for row in sorted(rows, key=lambda r: (-r.keep, r.loss.mean)):
        gap = row.gap if row.method != REFERENCE else None
        cells.append(
            [
                row.method,
                row.keep,
                row.perplexity,
                row.loss.mean,
                row.loss.deviation,
                row.accuracy.mean,
                row.normalized.mean,
                None if gap is None else gap.mean,
                None if gap is None else gap.half_width,
                row.verdict or None,
                None if gap is None else row.domains,
                row.passed_on,
                row.parameters,
            ]
        )
    return Table(columns, cells, "Quality by share of experts left, best loss first")


def _domain_table(cells: Sequence[Measured], model: str, keep: float = 0.5) -> Table:
    own = [c for c in cells if c["model"] == model and c["keep"] in (keep, 1.0)]
    names = list(dict.fromkeys(c["method"] for c in own))
    of = {name: [c for c in own if c["method"] == name] for name in names}
    rows: list[list[Cell]] = [
        [domain, *(math.exp(_of_domain(of[name], domain)) for name in names)]
        for domain in own[0]["loss"]
    ]
    columns = [Column("domain"), *(Column(name, form=".1f", best="low") for name in names[1:])]
    columns.insert(1, Column(names[0], form=".1f"))
    return Table(columns, rows, f"Perplexity of each domain with {keep:.0%} of the experts")


def _task_table(tasks: Sequence[Measured]) -> Table:
    columns = [
        Column("task"),
        Column("method"),
        Column("experts left", form="d"),
        Column("loss", "nats", ".4f"),
        Column("loss after tuning", "nats", ".4f"),
    ]
    rows: list[list[Cell]] = [
        [c["task"], c["method"], c["experts"], c["loss_before"], c["loss"]]
        for c in sorted(tasks, key=lambda c: (c["task"], -c["experts"], c["loss"]))
    ]
    return Table(columns, rows, "Held-out loss of the task; all are tuned on it alike")


def _as_markdown(table: Table) -> str:
    head = [c.heading + (f" ({c.unit})" if c.unit else "") for c in table.columns]
    lines = [f"{table.caption}.\n", f"| {' | '.join(head)} |"]
    marks = ["---"] + ["---:"] * (len(head) - 1)
    lines.append(f"|{'|'.join(marks)}|")
    for row in table.rows:
        shown = [
            "" if cell is None else format(cell, column.form if not isinstance(cell, str) else "")
            for cell, column in zip(row, table.columns, strict=True)
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
