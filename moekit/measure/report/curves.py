"""Curves over training, and the frontier of quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from moekit.measure.report.style import (
    FIRST,
    HEIGHT,
    INK,
    MUTED,
    SURFACE,
    WIDTH,
    SeriesStyle,
    Styles,
    drawing,
    new_figure,
    series_styles,
    spread,
)

LOSS = "validation loss (nats a token)"


@dataclass(frozen=True)
class Curve:
    """One run: y over x, in order of x."""

    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class FrontierPoint:
    """One design in quality against cost.

    Attributes:
        name: the design.
        cost: floating-point operations a token.
        loss: mean validation loss over seeds.
        error: half the length of its error bar; 0 for none.
    """

    name: str
    cost: float
    loss: float
    error: float = 0.0


def loss_against_tokens(
    runs: Mapping[str, Sequence[Curve]], styles: Styles | None = None, y_label: str = LOSS
) -> Figure:
    """Loss over tokens seen. ``runs`` holds a curve a seed for each design."""
    return loss_curves(runs, "training tokens", y_label, styles)


def loss_against_flops(
    runs: Mapping[str, Sequence[Curve]], styles: Styles | None = None, y_label: str = LOSS
) -> Figure:
    """Loss over training operations spent."""
    return loss_curves(runs, "training compute (FLOPs)", y_label, styles)


def loss_against_time(
    runs: Mapping[str, Sequence[Curve]], styles: Styles | None = None, y_label: str = LOSS
) -> Figure:
    """Loss over seconds of training."""
    return loss_curves(runs, "training time (s)", y_label, styles)


def loss_curves(
    runs: Mapping[str, Sequence[Curve]], x_label: str, y_label: str, styles: Styles | None = None
) -> Figure:
    """A line a design: the mean over its seeds, with each seed behind it as a thin one.

    Seeds whose x differ are averaged at the x of the first, within what all of them cover.
    """
    with drawing():
        figure, axes = new_figure()
        styles = styles or series_styles(list(runs))
        ends = {}
        for name, curves in runs.items():
            mean = _mean(curves)
            _draw_runs(axes, curves, mean, styles[name])
            if len(mean.x):
                ends[name] = (mean.x[-1], mean.y[-1])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
        axes.set_xlim(left=0)
        _focus_on_the_descent(axes, runs)
        _label_ends(axes, ends, styles)
        return figure


def frontier(points: Sequence[FrontierPoint], styles: Styles | None = None) -> Figure:
    """Validation loss against operations a token, with the designs none of the others beats.

    A design is on the Pareto front when no other has both a lower or equal loss and a lower or
    equal cost.
    """
    with drawing():
        figure, axes = new_figure()
        styles = styles or series_styles([point.name for point in points])
        front = pareto_front(points)
        axes.plot(
            [p.cost for p in front],
            [p.loss for p in front],
            color=MUTED,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        for point in points:
            _draw_point(axes, point, styles[point.name], point in front)
        axes.set(xlabel="forward compute (FLOPs a token)", ylabel=LOSS)
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
        axes.margins(x=0.16, y=0.14)
        _label_points(axes, points)
        return figure


def pareto_front(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other dominates, by rising cost."""
    front: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def sparsity_and_penalty(
    steps: Sequence[float],
    sparsity: Sequence[float],
    penalty: Sequence[float],
    target: float,
    style: SeriesStyle = FIRST,
) -> Figure:
    """ReMoE's controller: sparsity over steps with its target, and λ on a logarithmic scale."""
    with drawing():
        figure, upper = new_figure(WIDTH, HEIGHT * 1.25)
        figure.clear()
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(steps, sparsity, color=style.colour)
        upper.axhline(target, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        upper.annotate(
            f"target {target:.3g}",
            (1, target),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=MUTED,
        )
        upper.set(ylabel="sparsity")
        lower.plot(steps, penalty, color=style.colour)
        lower.set(ylabel="λ", xlabel="step", yscale="log")
        lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        lower.yaxis.set_minor_formatter(NullFormatter())
        figure.align_ylabels()
        return figure


def _mean(curves: Sequence[Curve]) -> Curve:
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return Curve((), ())
    start = max(curve.x[0] for curve in curves)
    stop = min(curve.x[-1] for curve in curves)
    x = np.array([v for v in curves[0].x if start <= v <= stop], dtype=float)
    y = np.mean([np.interp(x, curve.x, curve.y) for curve in curves], axis=0)
    return Curve(x.tolist(), y.tolist())


def _draw_runs(axes: Axes, curves: Sequence[Curve], mean: Curve, style: SeriesStyle) -> None:
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.x, curve.y, color=style.colour, linewidth=0.8, alpha=0.4)
    axes.plot(mean.x, mean.y, color=style.colour, linestyle=style.line)


def _focus_on_the_descent(axes: Axes, runs: Mapping[str, Sequence[Curve]]) -> None:
    """Leave the first steep steps out of the picture, where designs do not differ yet."""
    last = [c.y[-1] for curves in runs.values() for c in curves if len(c.y)]
    every = [v for curves in runs.values() for c in curves for v in c.y]
    early = [c.y[len(c.y) // 10] for curves in runs.values() for c in curves if len(c.y)]
    if not last or not np.isfinite(every).all() or min(every) == max(every):
        return
    top = max(max(early), max(last))
    room = 0.06 * (top - min(every)) or 0.1
    axes.set_ylim(min(every) - room, top + room)


def _label_ends(
    axes: Axes, ends: Mapping[str, tuple[float, float]], styles: Mapping[str, SeriesStyle]
) -> None:
    """Write each design's name at the end of its line, clear of the others."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.065
    heights = spread([y for _, y in ends.values()], gap)
    right = max((x for x, _ in ends.values()), default=1.0)
    axes.set_xlim(right=right)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.03, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": styles[name].colour,
                "linewidth": 1.0,
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _draw_point(axes: Axes, point: FrontierPoint, style: SeriesStyle, on_front: bool) -> None:
    axes.errorbar(
        point.cost,
        point.loss,
        yerr=point.error or None,
        color=style.colour,
        ecolor=style.colour,
        elinewidth=1.4,
        capsize=3,
        marker=style.marker,
        markersize=9,
        markerfacecolor=style.colour if on_front else SURFACE,
        markeredgecolor=style.colour,
        markeredgewidth=1.8,
        zorder=3,
    )


def _label_points(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    heights = spread([p.loss for p in points], (high - low) * 0.07)
    for point, height in zip(points, heights, strict=True):
        to_the_left = point.cost > left + 0.8 * (right - left)
        axes.annotate(
            point.name,
            xy=(point.cost, point.loss),
            xytext=(-10 if to_the_left else 10, (height - point.loss) / (high - low) * 200),
            textcoords="offset points",
            ha="right" if to_the_left else "left",
            va="center",
            color=INK,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
            zorder=2,
        )
