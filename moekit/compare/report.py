"""The report of a study, its raw results as JSON and CSV, and the verdict at the top."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.compare.record import RunRecord, write_csv, write_json
from moekit.compare.report_routing import controller_section, group_section, routed_models
from moekit.compare.study import Study
from moekit.compare.summary import DesignSummary, summarise
from moekit.compare.verdict import verdict
from moekit.measure.report import (
    Block,
    Callout,
    Cell,
    Code,
    Column,
    Curve,
    Details,
    Facts,
    FrontierPoint,
    Plot,
    Report,
    Section,
    Styles,
    Table,
    Text,
    frontier,
    loss_against_flops,
    loss_against_time,
    loss_against_tokens,
    routing_sections,
    series_styles,
)


@dataclass(frozen=True)
class Written:
    """Where the results of a study are.

    Attributes:
        report: the HTML page.
        json, csv: the raw results; the CSV has one row a design.
        summaries: the table.
        verdict: the sentences at the top.
        results: what ``json`` holds.
    """

    report: Path
    json: Path
    csv: Path
    summaries: list[DesignSummary]
    verdict: list[str]
    results: dict[str, Any]


def write_report(study: Study, output: Path) -> Written:
    """Write ``report.html``, ``results.json`` and ``results.csv`` into ``output``.

    Raises:
        OutputError: one of them cannot be written.
    """
    summaries = summarise(study.records, study.phases)
    sentences = verdict(study.records, summaries)
    results = _results(study, summaries, sentences)
    write_json(output / "results.json", results)
    write_csv(output / "results.csv", [summary.row() for summary in summaries])
    page = _report(study, summaries, sentences).write(output / "report.html")
    return Written(
        page, output / "results.json", output / "results.csv", summaries, sentences, results
    )


def _results(
    study: Study, summaries: Sequence[DesignSummary], sentences: Sequence[str]
) -> dict[str, Any]:
    return {
        "verdict": list(sentences),
        "setting": study.spec.describe(),
        "summary": [summary.row() for summary in summaries],
        "machine": study.machine,
        "text": study.text,
        "expert_phase": {name: vars(timing) for name, timing in study.phases.items()},
        "study": study.spec.to_dict(),
        "runs": [record.to_dict() for record in study.records],
    }


def _report(study: Study, summaries: Sequence[DesignSummary], sentences: Sequence[str]) -> Report:
    styles = series_styles([summary.design for summary in summaries])
    sections = [
        Section("Verdict", [Callout(sentences[0]), *(Text(s) for s in sentences[1:])]),
        Section("Results", [_quality(summaries), _cost(summaries), Text(*_READING)]),
        Section("Training", _curves(study, styles)),
        Section("Quality and cost", [_frontier(summaries, styles)]),
        *routing_sections(routed_models(study), styles),
        *controller_section(study, styles),
        *group_section(study),
        Section("Setting", _setting(study)),
    ]
    return Report(
        title="Which MoE design is best for this text?",
        sections=sections,
        lead=study.spec.describe(),
        footer=f"moekit {study.machine['moekit']}, torch {study.machine['torch']}, "
        f"{study.machine['device']}, {study.machine['threads']} threads",
    )


_READING = (
    "Loss is the mean cross-entropy over the whole validation split, ± the standard deviation "
    "over seeds. Active parameters are those a token uses at the load that the balance loss aims "
    "at. Operations are counted while the trained model runs on validation text; rows that are "
    "not dispatched are not in them.",
    "The expert phase is the measured time of planning, gathering, computing and combining rows "
    "in all layers, forward. All designs took turns in one measurement on the same batches. "
    "Memory is the peak while training: of torch's tensors on a GPU, on a CPU of the whole process "
    "that trains, with Python and its libraries. The command gives every run a process of its own. "
    "Load is the largest over the mean load of the feed-forward experts, 1 when even.",
)


def _quality(summaries: Sequence[DesignSummary]) -> Table:
    columns = (
        Column("design"),
        Column("validation loss", "nats/token", ".4f", "low"),
        Column("±", "over seeds", ".4f"),
        Column("perplexity", form=".2f", best="low"),
        Column("bits/byte", form=".4f", best="low"),
        Column("parameters", "million", ".2f"),
        Column("active", "million", ".2f"),
        Column("operations", "MFLOP/token", ".2f", "low"),
    )
    rows: list[list[Cell]] = [
        [
            _name(summary),
            summary.loss.mean,
            summary.loss.deviation,
            summary.perplexity.mean,
            summary.bits_per_byte.mean,
            summary.total_parameters / 1e6,
            summary.active_parameters / 1e6,
            summary.flops_per_token / 1e6,
        ]
        for summary in summaries
    ]
    return Table(columns, rows, "Quality and size, means over seeds.")


def _cost(summaries: Sequence[DesignSummary]) -> Table:
    columns = (
        Column("design"),
        Column("training", "tokens/s", ",.0f", "high"),
        Column("expert phase", "µs/token", ".2f", "low"),
        Column("rows", "a token and layer", ".2f"),
        Column("experts", "feed-forward/token", ".2f"),
        Column("load", "max/mean", ".2f", "low"),
        Column("memory", "MiB", ",.0f", "low"),
    )
    rows = [_cost_cells(summary) for summary in summaries]
    return Table(columns, rows, "Measured cost and routing, means over seeds.")


def _name(summary: DesignSummary) -> str:
    return summary.design if summary.causal else f"{summary.design} (not causal)"


def _cost_cells(summary: DesignSummary) -> list[Cell]:
    phase = summary.phase
    return [
        _name(summary),
        summary.tokens_per_second,
        None if phase is None else phase.seconds_per_token * 1e6,
        None if phase is None or phase.rows_per_token == 0 else phase.rows_per_token,
        summary.feed_forward_experts.mean,
        None if summary.load_violation is None else summary.load_violation.mean,
        summary.peak_memory_bytes / 2**20,
    ]


def _curves(study: Study, styles: Styles) -> list[Block]:
    def against(of: Callable[[RunRecord, dict[str, Any]], float]) -> dict[str, list[Curve]]:
        return {
            design.name: [_curve(record, of) for record in study.of(design.name)]
            for design in study.spec.designs
        }

    tokens = against(lambda _, row: row["tokens"])
    flops = against(lambda record, row: record.training_flops * row["tokens"] / record.tokens)
    seconds = against(lambda _, row: row["seconds"])
    return [
        Plot(loss_against_tokens(tokens, styles), "Validation loss against training tokens."),
        Plot(
            loss_against_flops(flops, styles),
            "Validation loss against training operations, forward and backward, with a design's "
            "mean operations a token.",
        ),
        Plot(
            loss_against_time(seconds, styles),
            "Validation loss against wall time, evaluation and saving included.",
        ),
    ]


def _curve(record: RunRecord, of: Callable[[RunRecord, dict[str, Any]], float]) -> Curve:
    rows = [row for row in record.history if "validation_loss" in row]
    return Curve([of(record, row) for row in rows], [row["validation_loss"] for row in rows])


def _frontier(summaries: Sequence[DesignSummary], styles: Styles) -> Plot:
    points = [
        FrontierPoint(s.design, s.flops_per_token, s.loss.mean, s.loss.deviation or 0.0)
        for s in summaries
        if s.causal
    ]
    return Plot(
        frontier(points, styles),
        "Validation loss against forward operations a token. Filled points are designs that no "
        "other beats in both; bars are standard deviations over seeds.",
    )


def _setting(study: Study) -> list[Block]:
    text = study.text
    facts = [
        ("text", str(text["source"])),
        ("training documents", f"{text['documents']['train']:,}"),
        ("training tokens", f"{text['tokens']['train']:,}"),
        ("validation tokens", f"{text['tokens']['validation']:,}"),
        ("vocabulary", f"{text['vocabulary']:,}"),
        ("device", str(study.machine["device"])),
    ]
    spec = json.dumps(study.spec.to_dict(), indent=1, ensure_ascii=False)
    return [
        Facts(facts),
        Details("The study as JSON, designs with their matched widths included", [Code(spec)]),
    ]
