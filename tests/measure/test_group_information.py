"""Information between groups and experts, against the joint distribution counted by hand."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from moekit.errors import DataError
from moekit.measure import group_information
from moekit.measure.tokens import GroupUse, TokenRouting


def routing_of(counts_GE: list[list[int]], k: int) -> TokenRouting:
    """Two layers, of which the second has no preference; a group's counts sum to k a token."""
    groups = {}
    for number, counts in enumerate(counts_GE):
        total = max(sum(counts), 1)
        share = tuple(count / total for count in counts)
        even = tuple(1 / len(counts) for _ in counts)
        groups[f"g{number}"] = GroupUse(sum(counts) // k, float(k), (share, even))
    fields: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(TokenRouting))
    return TokenRouting(**fields | {"groups": groups})


def by_hand(counts_GE: list[list[int]]) -> float:
    joint = Counter({(g, e): n for g, row in enumerate(counts_GE) for e, n in enumerate(row)})
    total = sum(joint.values())
    of_group, of_expert = Counter[int](), Counter[int]()
    for (group, expert), count in joint.items():
        of_group[group] += count
        of_expert[expert] += count
    return sum(
        n / total * math.log(n * total / (of_group[g] * of_expert[e]))
        for (g, e), n in joint.items()
        if n
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2])
def test_information_is_that_of_the_joint_counts(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts_GE = (k * torch.randint(0, 40, (5, 7), generator=generator)).tolist()
    first, second = group_information(routing_of(counts_GE, k))
    assert first.information == pytest.approx(by_hand(counts_GE), abs=1e-12)
    assert second.information == pytest.approx(0, abs=1e-12)
    total = sum(map(sum, counts_GE))
    for expert, share in enumerate(first.load_share):
        assert share == pytest.approx(sum(row[expert] for row in counts_GE) / total)
    assert 0 <= first.information <= first.entropy == second.entropy


def test_an_expert_for_each_group_tells_all() -> None:
    (found, _) = group_information(routing_of([[8, 0, 0], [0, 8, 0], [0, 0, 8]], 1))
    assert found.information == pytest.approx(math.log(3))
    assert found.entropy == pytest.approx(math.log(3))


def test_groups_without_tokens_do_not_count() -> None:
    few = group_information(routing_of([[5, 3], [2, 6]], 1))
    more = group_information(routing_of([[5, 3], [0, 0], [2, 6]], 1))
    assert few == more
    for none in ([], [[0, 0]]):
        with pytest.raises(DataError, match="no token has a group"):
            group_information(routing_of(none, 1))
