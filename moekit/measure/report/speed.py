"""Speed against a reference, one row a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moekit.measure.report.style import INK, MUTED, WIDTH, drawing, new_figure, series_styles


def speed_ratios(
    shapes: Sequence[str], ratios: Mapping[str, Sequence[float | None]], reference: str
) -> Figure:
    """Dots: how many times as fast as ``reference`` each contender is at each shape.

    Args:
        shapes: a row each, from top to bottom.
        ratios: contender to one ratio a shape; None where it was not run.
        reference: what 1 means.
    """
    with drawing():
        figure, axes = new_figure(WIDTH, 0.9 + 0.24 * max(len(shapes), 4))
        styles = series_styles(list(ratios))
        places = list(range(len(shapes)))[::-1]
        axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1)
        for name, values in ratios.items():
            drawn = [(v, y) for v, y in zip(values, places, strict=True) if v is not None]
            axes.plot(
                [v for v, _ in drawn],
                [y for _, y in drawn],
                linestyle="none",
                marker=styles[name].marker,
                color=styles[name].colour,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(places, shapes, color=MUTED)
        axes.set_xlabel(f"times as fast as {reference}")
        if ratios:
            figure.legend(loc="outside upper left", ncols=3)
        return figure
