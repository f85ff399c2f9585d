"""Loss against how much of a model is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moekit.measure.report.style import INK, WIDTH, drawing, new_figure, series_styles

Point = tuple[float, float, float | None]


def loss_by_share(whole: float, methods: Mapping[str, Sequence[Point]]) -> Figure:
    """One line a method, all from the loss of the whole model.

    Args:
        whole: its loss.
        methods: by name the share left, the loss, and half its interval or None.
    """
    with drawing():
        figure, axes = new_figure(WIDTH, 5.2)
        styles = series_styles(list(methods))
        axes.axhline(whole, color=INK, linewidth=1.0, zorder=1)
        for name, points in methods.items():
            drawn = [(1.0, whole, None), *sorted(points, reverse=True)]
            axes.errorbar(
                [share for share, _, _ in drawn],
                [loss for _, loss, _ in drawn],
                yerr=[half or 0.0 for _, _, half in drawn],
                linestyle=styles[name].line,
                marker=styles[name].marker,
                color=styles[name].colour,
                linewidth=1.5,
                markersize=5,
                capsize=2,
                label=name,
            )
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("experts left")
        axes.set_ylabel("loss, nats a token")
        figure.legend(loc="outside upper left", ncols=3)
        return figure
