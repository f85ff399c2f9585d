"""Reports: one HTML file with text, sortable tables and figures, that opens offline.

>>> from moekit.measure.report import Column, Report, Section, Table
>>> table = Table([Column("design"), Column("loss", best="low", form=".3f")], [["a", 1.25]])
>>> "1.250" in Report("Example", [Section("Results", [table])]).html()
True
"""

from moekit.measure.report.bars import experts_by_token_type, experts_histogram, load_heatmap
from moekit.measure.report.blocks import (
    Block,
    Callout,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    Plot,
    Section,
    Table,
    Text,
)
from moekit.measure.report.compression import loss_by_share
from moekit.measure.report.curves import (
    Curve,
    FrontierPoint,
    frontier,
    loss_against_flops,
    loss_against_time,
    loss_against_tokens,
    loss_curves,
    pareto_front,
    sparsity_and_penalty,
)
from moekit.measure.report.page import Report
from moekit.measure.report.routing import (
    RoutedModel,
    fluctuation_section,
    plain_routing,
    routing_sections,
)
from moekit.measure.report.speed import speed_ratios
from moekit.measure.report.style import SeriesStyle, Styles, series_styles

__all__ = [
    "Block",
    "Callout",
    "Cell",
    "Code",
    "Column",
    "Curve",
    "Details",
    "Facts",
    "FrontierPoint",
    "Plot",
    "Report",
    "RoutedModel",
    "Section",
    "SeriesStyle",
    "Styles",
    "Table",
    "Text",
    "experts_by_token_type",
    "experts_histogram",
    "fluctuation_section",
    "frontier",
    "load_heatmap",
    "loss_against_flops",
    "loss_against_time",
    "loss_against_tokens",
    "loss_by_share",
    "loss_curves",
    "pareto_front",
    "plain_routing",
    "routing_sections",
    "series_styles",
    "sparsity_and_penalty",
    "speed_ratios",
]
