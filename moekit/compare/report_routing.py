"""The sections of the report that show what the routers did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moekit.compare.record import RunRecord
from moekit.compare.study import Study
from moekit.measure.report import (
    Block,
    Column,
    Details,
    Plot,
    Section,
    Styles,
    Table,
    Text,
    experts_by_token_type,
    experts_histogram,
    load_heatmap,
    sparsity_and_penalty,
)


def routing_sections(study: Study, styles: Styles) -> list[Section]:
    """Load, experts a token and the tokens of each expert; from the first seed of each design."""
    routed = [record for record in _first_seeds(study) if record.statistics.get("layers")]
    if not routed:
        return []
    return [
        Section("Load of the experts", [_loads(record) for record in routed]),
        Section("Experts a token", _experts_a_token(routed, styles)),
        *_controller_section(study, routed, styles),
        Section("Which tokens each expert takes", [_tokens(record) for record in routed]),
    ]


def group_section(study: Study) -> list[Section]:
    """Loss by group of documents, where the data has groups."""
    groups = list(dict.fromkeys(g for record in study.records for g in record.group_losses))
    if len(groups) < 2:
        return []
    names = [design.name for design in study.spec.designs]
    rows = [[group, *(_group_loss(study, name, group) for name in names)] for group in groups]
    columns = [Column("group"), *(Column(name, form=".3f") for name in names)]
    caption = "Validation loss by group of documents, in nats a token, mean over seeds."
    return [Section("Loss by group", [Table(columns, rows, caption)])]


def _group_loss(study: Study, design: str, group: str) -> float | None:
    losses = [r.group_losses[group] for r in study.of(design) if group in r.group_losses]
    return statistics.fmean(losses) if losses else None


def _first_seeds(study: Study) -> list[RunRecord]:
    return [study.of(design.name)[0] for design in study.spec.designs]


def _loads(record: RunRecord) -> Block:
    load_LE = [layer["load"] for layer in record.statistics["layers"]]
    return Plot(
        load_heatmap(load_LE),
        f"{record.design}: assignments of each expert over the mean of its layer; "
        "zero-computation experts come last.",
    )


def _experts_a_token(routed: Sequence[RunRecord], styles: Styles) -> list[Block]:
    types = {
        record.design: {kind: use["experts"] for kind, use in record.tokens_report["types"].items()}
        for record in routed
    }
    shares = {record.design: record.tokens_report["histogram"] for record in routed}
    rows = [[record.design, record.tokens_report["frequency_correlation"]] for record in routed]
    return [
        Plot(
            experts_histogram(shares, styles),
            "Share of (token, layer) pairs by number of feed-forward experts.",
        ),
        Plot(
            experts_by_token_type(types, styles),
            "Mean number of feed-forward experts by type of token.",
        ),
        Table(
            [Column("design"), Column("correlation", form="+.3f")],
            rows,
            "Correlation of a token's number of feed-forward experts with the logarithm of its "
            "frequency; a dash where the number does not vary.",
        ),
    ]


def _controller_section(study: Study, routed: Sequence[RunRecord], styles: Styles) -> list[Section]:
    """Sparsity and λ over steps of designs that have a controlled penalty."""
    blocks: list[Block] = []
    for record in routed:
        rows = [row for row in record.history if "L1Balance" in _coefficients(row)]
        if not rows:
            continue
        target = _target_sparsity(study, record.design)
        figure = sparsity_and_penalty(
            [row["step"] for row in rows],
            [row["routing"]["sparsity"] for row in rows],
            [_coefficients(row)["L1Balance"] for row in rows],
            target,
            styles[record.design],
        )
        blocks.append(Plot(figure, f"{record.design}: sparsity, its target, and λ over steps."))
    return [Section("Sparsity control", blocks)] if blocks else []


def _coefficients(row: dict[str, Any]) -> dict[str, float]:
    return row.get("routing", {}).get("coefficients", {})


def _target_sparsity(study: Study, design: str) -> float:
    layers = next(d for d in study.spec.designs if d.name == design).layers
    losses = [loss for spec in layers for loss in getattr(spec, "losses", ())]
    k = next(loss.k for loss in losses if hasattr(loss, "alpha"))
    spec = next(spec for spec in layers if getattr(spec, "losses", ()))
    return 1 - k / len(spec.experts.expert_kinds())  # type: ignore[union-attr]


def _tokens(record: RunRecord) -> Block:
    tables: list[Block] = [
        Text("Tokens that an expert takes more often than its share of all tokens would have it.")
    ]
    for index, experts in enumerate(record.tokens_report["experts"]):
        rows = [[str(number), _listed(expert["by_lift"])] for number, expert in enumerate(experts)]
        columns = [Column("expert"), Column("tokens, with lift")]
        tables.append(Table(columns, rows, f"Layer {index}"))
    return Details(record.design, tables)


def _listed(uses: Sequence[dict[str, Any]]) -> str:
    return "   ".join(f"{use['text']!r} ×{use['lift']:.1f}" for use in uses)
