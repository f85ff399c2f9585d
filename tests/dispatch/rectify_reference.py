"""Rectify-Router in plain Python, one token and one request at a time, in the paper's order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moekit.dispatch import Rectified


@dataclass
class Reference:
    """What the loop found; ``weight[t][e]`` sums a token's weights on an expert."""

    kept: list[list[int]]
    weight: list[dict[int, float]]
    served: list[bool]
    places: int
    taken: dict[tuple[int, int], int] = field(default_factory=dict)


def even_groups(tokens: int, groups: int) -> list[int]:
    return [t * groups // tokens for t in range(tokens)]


def reference(
    choices: list[list[int]],
    p: list[list[float]],
    spec: Rectified,
    group: list[int],
    k: int,
    free: frozenset[int] = frozenset(),
) -> Reference:
    """``choices[t]`` are the choices of token t, best first, and ``p[t]`` all of its p.

    There is room for ``k`` a token. The experts ``free`` compute nothing.
    """
    tokens, experts = len(choices), len(p[0])
    computed = [e for e in range(experts) if e not in free]
    asked = [list(row) for row in choices]
    if spec.fill_in:
        for t in range(tokens):
            rest = [e for e in computed if e not in asked[t]]
            asked[t].append(max(rest, key=lambda e: (p[t][e], -e)))
    room = {
        g: math.ceil(spec.factor * k * group.count(g) / experts - 1e-9) for g in range(spec.groups)
    }
    room = {g: min(c, group.count(g)) for g, c in room.items()}
    before: dict[tuple[int, int], int] = {}
    kept: list[list[int]] = [[] for _ in range(tokens)]
    for r in range(max(map(len, asked))):
        line = [t for t in range(tokens) if r < len(asked[t])]
        if spec.priority == "probability":
            line.sort(key=lambda t: -max(p[t]))
        if spec.priority == "request":
            line.sort(key=lambda t: -p[t][asked[t][r]])
        for t in line:
            place = (group[t], asked[t][r])
            if asked[t][r] in free or before.get(place, 0) < room[group[t]]:
                kept[t].append(asked[t][r])
            before[place] = before.get(place, 0) + 1
    weight, served = [], []
    for t in range(tokens):
        size = len(computed) // spec.groups
        mine = computed[group[t] * size : (group[t] + 1) * size]
        weights, repaired = _one_token(asked[t], kept[t], p[t], len(choices[t]), spec, mine)
        weight.append(weights)
        served.append(repaired)
    taken = {place: min(n, room[place[0]]) for place, n in before.items()}
    return Reference(kept, weight, served, sum(room.values()) * len(computed), taken)


def _one_token(
    asked: list[int], kept: list[int], p: list[float], k: int, spec: Rectified, mine: list[int]
) -> tuple[dict[int, float], bool]:
    total = sum(p[e] for e in kept)
    y = {e: p[e] / total for e in kept}  # the token's output, as a combination of experts
    mode = spec.unrouted
    if mode == "auto":
        mode = "ignore_kth" if spec.fill_in else ("all" if k == 1 else "any")
    lost = {
        "all": len(kept) == 0,
        "any": len(kept) < len(asked),
        "ignore_kth": len(kept) < k,
    }[mode]
    if not (spec.intra_device and lost):
        return y, False
    local = max(mine, key=lambda e: (p[e], -e))
    a, q = len(asked) - len(kept), p[local]
    repaired = {e: total * w / (total + q * a) for e, w in y.items()}
    repaired[local] = repaired.get(local, 0.0) + q * a / (total + q * a)
    return repaired, True
