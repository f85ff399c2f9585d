"""Colours and the drawing style of every figure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Neutral colours stand for themes: the page replaces each by a CSS variable, so that one figure
# serves light, dark and print.
INK = "#1b1f24"
MUTED = "#5c6570"
GRID = "#dfe3e8"
SURFACE = "#fefefe"
THEMED = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}

# Okabe and Ito (2008), without yellow and black, which vanish on one of the two backgrounds.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
_LINES = ("-", "--", ":", "-.")
_HATCHES = ("", "////", "....", "xxxx")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

WIDTH, HEIGHT = 7.2, 3.6


@dataclass(frozen=True)
class SeriesStyle:
    """How one design looks in every figure; no two of the first 28 are alike."""

    colour: str
    line: str
    marker: str
    hatch: str


Styles = Mapping[str, SeriesStyle]


def series_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """A style for each name.

    Make it once from all designs and hand it to every figure, so that a design looks the same in
    those that leave others out.
    """
    return {name: _style(index) for index, name in enumerate(names)}


def _style(index: int) -> SeriesStyle:
    lap, place = divmod(index, len(_COLOURS))
    return SeriesStyle(
        colour=_COLOURS[place],
        line=_LINES[lap % len(_LINES)],
        marker=_MARKERS[(place + lap) % len(_MARKERS)],
        hatch=_HATCHES[lap % len(_HATCHES)],
    )


FIRST = _style(0)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings while a figure is made; text is never read as a formula."""
    settings: dict[Any, Any] = {
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 10,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 2.0,
        "lines.markersize": 7,
        "svg.fonttype": "none",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with mpl.rc_context(settings):
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, of its own and not of pyplot's list."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """``positions`` moved apart as little as possible so that neighbours are ``gap`` apart.

    Overlapping labels are merged into runs around their mean (pool adjacent violators).
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    runs: list[tuple[float, int]] = []  # centre and length
    for index in order:
        runs.append((positions[index], 1))
        while len(runs) > 1 and _overlap(runs[-2], runs[-1], gap):
            (a, n), (b, m) = runs[-2:]
            runs[-2:] = [((a * n + b * m) / (n + m), n + m)]
    placed = [c + gap * (i - (n - 1) / 2) for c, n in runs for i in range(n)]
    result = [0.0] * len(positions)
    for index, value in zip(order, placed, strict=True):
        result[index] = value
    return result


def _overlap(low: tuple[float, int], high: tuple[float, int], gap: float) -> bool:
    return high[0] - low[0] < gap * (low[1] + high[1]) / 2 * (1 - 1e-9)
