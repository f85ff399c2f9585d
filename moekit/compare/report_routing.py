"""The sections of a study's report about its data: sparsity control, and loss by group."""

from __future__ import annotations

import statistics
from typing import Any

from moekit.compare.record import RunRecord
from moekit.compare.study import Study
from moekit.layer import MoESpec
from moekit.measure.report import (
    Block,
    Column,
    Plot,
    RoutedModel,
    Section,
    Styles,
    Table,
    sparsity_and_penalty,
)
from moekit.routing import L1Balance


def routed_models(study: Study) -> list[RoutedModel]:
    """The MoE designs, each by the run of its first seed."""
    return [
        RoutedModel(record.design, record.statistics["layers"], record.tokens_report)
        for record in _first_seeds(study)
        if record.statistics.get("layers")
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


def controller_section(study: Study, styles: Styles) -> list[Section]:
    """Sparsity and λ over steps of designs that have a controlled penalty."""
    blocks: list[Block] = []
    for record in _first_seeds(study):
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
    """``1 - k / E`` of the first layer whose penalty is controlled."""
    layers = next(d for d in study.spec.designs if d.name == design).layers
    return next(
        1 - loss.k / len(spec.experts.expert_kinds())
        for spec in layers
        if isinstance(spec, MoESpec)
        for loss in spec.losses
        if isinstance(loss, L1Balance)
    )
