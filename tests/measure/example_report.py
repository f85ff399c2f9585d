"""A synthetic report with every kind of block, as a comparison of designs would have it."""

from __future__ import annotations

import math
import random

from moekit.measure.report import (
    Callout,
    Code,
    Column,
    Curve,
    Details,
    Facts,
    FrontierPoint,
    Plot,
    Report,
    Section,
    Table,
    Text,
    experts_by_token_type,
    experts_histogram,
    frontier,
    load_heatmap,
    loss_against_flops,
    loss_against_time,
    loss_against_tokens,
    series_styles,
    sparsity_and_penalty,
)

DESIGNS = ("dense", "top-2 of 8", "MoE++", "AdaMoE", "ReMoE")
TYPES = ("whitespace", "digits", "punctuation", "word start", "word fragment", "capitalised")


def runs(names: tuple[str, ...], scale: float) -> dict[str, list[Curve]]:
    """Three seeds a design of a loss that falls by a power law."""
    draw = random.Random(0)
    found = {}
    for index, name in enumerate(names):
        curves = []
        for _ in range(3):
            level = 2.1 - 0.05 * index + draw.gauss(0, 0.01)
            steps = range(10, 401, 10)
            curves.append(
                Curve(
                    [scale * s for s in steps],
                    [level + 9 / math.sqrt(s) + draw.gauss(0, 0.01) for s in steps],
                )
            )
        found[name] = curves
    return found


def points(names: tuple[str, ...]) -> list[FrontierPoint]:
    """A point a design, one of them worse than another in both respects."""
    costs = [9.1e6, 12.4e6, 10.2e6, 11.0e6, 12.6e6]
    losses = [2.61, 2.50, 2.52, 2.55, 2.47]
    return [FrontierPoint(name, costs[i % 5], losses[i % 5], 0.012) for i, name in enumerate(names)]


def loads(layers: int, experts: int) -> list[list[float]]:
    """Uneven loads."""
    draw = random.Random(1)
    return [[draw.lognormvariate(3, 0.35) for _ in range(experts)] for _ in range(layers)]


def example_report(names: tuple[str, ...] = DESIGNS, note: str = "") -> Report:
    """The report; ``names`` of designs and ``note`` may be anything a user can type."""
    draw = random.Random(2)
    styles = series_styles(names)
    by_type = {n: {t: 1 + draw.random() for t in TYPES} for n in names[1:]}
    histogram = {n: [0.05, 0.35 + 0.1 * draw.random(), 0.5] for n in names[1:]}
    steps = list(range(0, 400, 5))
    columns = [
        Column("design"),
        Column("validation loss", "nats a token", ".3f", best="low"),
        Column("± seed", "nats a token", ".3f"),
        Column("active", "parameters", ",d", title="parameters that a token uses"),
        Column("compute", "FLOPs a token", ".3g", best="low"),
        Column("speed", "tokens a second", ",d", best="high"),
    ]
    rows = [
        [n, 2.6 - 0.03 * i, 0.011, 1_200_000 + i, 9e6 + i * 1e6, None if i == 1 else 41_000 - i]
        for i, n in enumerate(names)
    ]
    quality = Section(
        "Quality against cost",
        [
            Plot(
                frontier(points(names), styles),
                "Filled: no design is better and cheaper.",
            ),
            Table(columns, rows, "All designs after 400 steps; mean over 3 seeds."),
            Text("Differences below two standard errors are not called a difference.", note),
        ],
    )
    training = Section(
        "Training",
        [
            Plot(loss_against_tokens(runs(names, 16384), styles), "Validation loss over tokens."),
            Plot(loss_against_flops(runs(names, 3.1e12), styles), "Validation loss over compute."),
            Plot(loss_against_time(runs(names, 0.9), styles), "Validation loss over time."),
            Plot(
                sparsity_and_penalty(
                    steps,
                    [0.75 - 0.25 * math.exp(-s / 40) for s in steps],
                    [1e-8 * 1.2 ** min(s, 90) for s in steps],
                    0.75,
                    styles[names[-1]],
                ),
                "ReMoE's sparsity reaches its target once λ has grown.",
            ),
        ],
    )
    routing = Section(
        "Routing",
        [
            Plot(load_heatmap(loads(6, 8)), "Load of each expert of top-2 of 8."),
            Plot(experts_by_token_type(by_type, styles), "Feed-forward experts by type of token."),
            Plot(experts_histogram(histogram, styles), "How many experts tokens use."),
            Details("All layers", [Table([Column("layer"), Column("note")], [["0", note]])]),
        ],
    )
    opening = Section(
        "Verdict",
        [
            Callout(f"{names[-1]} is best for this budget", "By 0.03 nats, 4 errors.", "good"),
            Callout("One run was short of memory", "Its speed is left out.", "warning"),
            Facts([("designs", str(len(names))), ("seeds", "3"), ("tokens", "6.6 M"), ("x", note)]),
            Code("moekit compare --designs dense topk moepp --data corpus/"),
        ],
    )
    return Report(
        f"Comparison of {len(names)} designs",
        [opening, quality, training, routing],
        lead="Five designs, trained side by side on the same tokens with the same settings.",
        footer=f"moekit 0.1.0 · {note}",
    )
