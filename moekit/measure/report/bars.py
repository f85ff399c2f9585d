"""Loads as a heat map, and experts a token as dots and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moekit.measure.report.style import (
    GRID,
    HEIGHT,
    SURFACE,
    WIDTH,
    Styles,
    drawing,
    new_figure,
    series_styles,
)

_DRAWN = 2000  # cells beyond which an image is smaller than as many shapes
_NUMBERED = 16  # up to so many experts a cell is wide enough for its number


def load_heatmap(load_LE: Sequence[Sequence[float]]) -> Figure:
    """Load of each expert over the mean of its layer; 1 is even.

    Args:
        load_LE: assignments of each expert, a list a layer; layers may have different numbers of
            experts.
    """
    relative_LE = _relative(load_LE)
    layers, experts = relative_LE.shape
    with drawing():
        figure, axes = new_figure(WIDTH, min(1.3 + 0.34 * layers, 9))
        image = axes.pcolormesh(
            relative_LE,
            cmap="PuOr_r",
            norm=TwoSlopeNorm(1, 0, max(2.0, _highest(relative_LE))),
            rasterized=relative_LE.size > _DRAWN,
        )
        axes.set(xlabel="expert", ylabel="MoE layer")
        axes.grid(False)
        axes.invert_yaxis()
        axes.set_xticks(_ticks(experts, 16) + 0.5, [str(i) for i in _ticks(experts, 16)])
        axes.set_yticks(_ticks(layers, 24) + 0.5, [str(i) for i in _ticks(layers, 24)])
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("load ÷ mean load")
        bar.outline.set_visible(False)
        if experts <= _NUMBERED and layers <= 24:
            _write_cells(axes, relative_LE, image.to_rgba(relative_LE))
        return figure


def experts_by_token_type(
    values: Mapping[str, Mapping[str, float]], styles: Styles | None = None
) -> Figure:
    """Feed-forward experts a token by token type, a dot for each design.

    Args:
        values: design to token type to mean number of experts.
    """
    types = list(dict.fromkeys(kind for row in values.values() for kind in row))
    with drawing():
        figure, axes = new_figure(WIDTH, 1.1 + 0.36 * max(len(types), 1))
        styles = styles or series_styles(list(values))
        for place, kind in enumerate(types):
            present = [row[kind] for row in values.values() if kind in row]
            axes.plot([min(present), max(present)], [place] * 2, color=GRID, linewidth=4, zorder=1)
        for name, row in values.items():
            places = [place for place, kind in enumerate(types) if kind in row]
            axes.plot(
                [row[types[place]] for place in places],
                places,
                linestyle="none",
                marker=styles[name].marker,
                color=styles[name].colour,
                markeredgecolor=SURFACE,
                markersize=9,
                label=name,
                zorder=3,
            )
        axes.set_yticks(range(len(types)), types)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("feed-forward experts a token and layer")
        _from_zero_unless_flat(axes)
        _legend(figure, axes)
        return figure


def experts_histogram(
    shares: Mapping[str, Sequence[float]], styles: Styles | None = None
) -> Figure:
    """Share of tokens by their number of feed-forward experts in a layer, a bar for each design.

    Args:
        shares: design to the share of tokens with 0, 1, 2, … experts.
    """
    longest = max((_last_used(row) + 1 for row in shares.values()), default=1)
    with drawing():
        figure, axes = new_figure(WIDTH, HEIGHT * 0.9)
        styles = styles or series_styles(list(shares))
        width = 0.8 / max(len(shares), 1)
        for index, (name, row) in enumerate(shares.items()):
            offset = (index - (len(shares) - 1) / 2) * width
            heights = [100 * share for share in row[:longest]]
            axes.bar(
                [count + offset for count in range(len(heights))],
                heights,
                width=width * 0.92,
                facecolor=styles[name].colour,
                edgecolor=SURFACE,
                linewidth=0,
                hatch=styles[name].hatch,
                label=name,
            )
        axes.set_xticks(_ticks(longest, 20))
        axes.grid(False, axis="x")
        axes.set(xlabel="feed-forward experts of a token in a layer", ylabel="tokens (%)")
        _legend(figure, axes)
        return figure


def _relative(load_LE: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    width = max((len(load_E) for load_E in load_LE), default=1)
    relative = np.full((max(len(load_LE), 1), width), np.nan)
    for layer, load_E in enumerate(load_LE):
        mean = sum(load_E) / max(len(load_E), 1)
        relative[layer, : len(load_E)] = np.asarray(load_E, dtype=float) / (mean or 1.0)
    return relative


def _highest(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else 0.0


def _write_cells(axes: Axes, values_LE: NDArray[np.float64], colours: NDArray[np.float64]) -> None:
    """Each cell's number, dark on light and light on dark."""
    for (layer, expert), value in np.ndenumerate(values_LE):
        if np.isnan(value):
            continue
        luminance = colours[layer, expert, :3] @ (0.2126, 0.7152, 0.0722)
        axes.text(
            expert + 0.5,
            layer + 0.5,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="#000000" if luminance > 0.45 else "#ffffff",
        )


def _ticks(count: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` evenly spaced places of ``count``, the first included."""
    return np.arange(0, count, max(1, -(-count // most)))


def _last_used(row: Sequence[float]) -> int:
    return max((count for count, share in enumerate(row) if share > 0), default=0)


def _from_zero_unless_flat(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.set_xlim(0 if low > 0 else low, high if high > 0 else 1)


def _legend(figure: Figure, axes: Axes) -> None:
    """Names of the designs above the axes, in reading order, so that none covers the data."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = 4 if max(map(len, labels)) <= 16 else 2
    order = [i for first in range(columns) for i in range(first, len(labels), columns)]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=columns,
        handletextpad=0.5,
        columnspacing=1.6,
    )
