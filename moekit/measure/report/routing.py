"""Sections of a report that show what routers did: load, experts a token, tokens of experts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.measure.fluctuation import Fluctuation
from moekit.measure.report.bars import experts_by_token_type, experts_histogram, load_heatmap
from moekit.measure.report.blocks import Block, Column, Details, Plot, Section, Table, Text
from moekit.measure.report.style import Styles
from moekit.measure.tokens import TokenRouting


@dataclass(frozen=True)
class RoutedModel:
    """What is known of one model's routing, as plain values that JSON keeps.

    Attributes:
        name: what plots call it.
        layers: :meth:`moekit.measure.LayerStatistics.summary` of each MoE layer.
        tokens: the rest of a :class:`moekit.measure.TokenRouting`, see :func:`plain_routing`.
    """

    name: str
    layers: Sequence[Mapping[str, Any]]
    tokens: Mapping[str, Any]


def plain_routing(found: TokenRouting) -> dict[str, Any]:
    """Everything of ``found`` but its statistics, as JSON values."""
    fields = ("types", "histogram", "frequency_correlation", "experts", "groups")
    values = {name: getattr(found, name) for name in fields}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=dataclasses.asdict))
    return plain


def routing_sections(models: Sequence[RoutedModel], styles: Styles) -> list[Section]:
    """Load, experts a token, and the tokens of each expert; nothing without MoE models."""
    if not models:
        return []
    return [
        Section("Load of the experts", [_load(model) for model in models]),
        Section("Experts a token", _experts_a_token(models, styles)),
        Section("Which tokens each expert takes", [_tokens(model) for model in models]),
    ]


def fluctuation_section(names: Sequence[str], found: Sequence[Sequence[Fluctuation]]) -> Section:
    """What changed from each model to the next, layer by layer.

    Args:
        names: of the models, in their order.
        found: as :func:`moekit.measure.routing_fluctuation` returns it.
    """
    columns = [
        Column("MoE layer", form="d"),
        Column("tokens that changed", form=".2%", title="whose set of experts is another one"),
        Column("slots that changed", form=".2%"),
    ]
    tables: list[Block] = [
        Table(
            columns,
            [[n, layer.changed_tokens, layer.changed_slots] for n, layer in enumerate(layers)],
            f"From {before} to {after}, over {layers[0].tokens:,} tokens.",
        )
        for (before, after), layers in zip(itertools.pairwise(names), found, strict=True)
    ]
    return Section("Routing fluctuation", tables)


def _load(model: RoutedModel) -> Block:
    return Plot(
        load_heatmap([layer["load"] for layer in model.layers]),
        f"{model.name}: assignments of each expert over the mean of its layer; "
        "zero-computation experts come last.",
    )


def _experts_a_token(models: Sequence[RoutedModel], styles: Styles) -> list[Block]:
    types = {
        model.name: {kind: use["experts"] for kind, use in model.tokens["types"].items()}
        for model in models
    }
    shares = {model.name: model.tokens["histogram"] for model in models}
    rows = [[model.name, model.tokens["frequency_correlation"]] for model in models]
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
            [Column("model"), Column("correlation", form="+.3f")],
            rows,
            "Correlation of a token's number of feed-forward experts with the logarithm of its "
            "frequency; a dash where the number does not vary.",
        ),
    ]


def _tokens(model: RoutedModel) -> Block:
    tables: list[Block] = [
        Text("Tokens that an expert takes more often than its share of all tokens would have it.")
    ]
    for index, experts in enumerate(model.tokens["experts"]):
        rows = [[str(number), _listed(expert["by_lift"])] for number, expert in enumerate(experts)]
        columns = [Column("expert"), Column("tokens, with lift")]
        tables.append(Table(columns, rows, f"MoE layer {index}"))
    return Details(model.name, tables)


def _listed(uses: Sequence[Mapping[str, Any]]) -> str:
    return "   ".join(f"{use['text']!r} ×{use['lift']:.1f}" for use in uses)
