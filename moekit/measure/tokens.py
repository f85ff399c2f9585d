"""Which tokens use how many experts, and which experts take which tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moekit.measure.observe import Observation, TokenBlocks, observe
from moekit.measure.statistics import ModelStatistics
from moekit.measure.tally import Pairs, TokenTally
from moekit.measure.token_types import TOKEN_TYPES, token_texts, token_type


@dataclass(frozen=True)
class TokenUse:
    """One token id in the rows of one expert.

    Attributes:
        text: its text, with the space before it.
        count: times the expert took it.
        lift: its share of the expert's rows over its share of all tokens; 1 is no preference.
    """

    text: str
    count: int
    lift: float


@dataclass(frozen=True)
class ExpertTokens:
    """What one expert takes.

    Attributes:
        by_count: the tokens it takes most often.
        by_lift: the tokens it prefers most, of those seen often enough.
    """

    by_count: tuple[TokenUse, ...]
    by_lift: tuple[TokenUse, ...]


@dataclass(frozen=True)
class TypeUse:
    """Tokens of one type, see :func:`moekit.measure.token_type`.

    Attributes:
        tokens: how many there were.
        experts: feed-forward experts a token and layer, in the mean.
    """

    tokens: int
    experts: float


@dataclass(frozen=True)
class GroupUse:
    """Tokens of one group (domain) of the data.

    Attributes:
        tokens: how many there were.
        experts: feed-forward experts a token and layer, in the mean.
        share_LE: share of the group's assignments that went to each expert, a list a layer.
    """

    tokens: int
    experts: float
    share_LE: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TokenRouting:
    """What a model's routers did with the tokens of a data set.

    Attributes:
        statistics: the counts of each layer.
        types: by token type, those that occurred, in the order of
            :data:`~moekit.measure.token_types.TOKEN_TYPES`.
        histogram: share of (token, layer) pairs with 0, 1, 2, … feed-forward experts.
        frequency_correlation: Pearson correlation, over tokens, of the logarithm of how often the
            token's id occurs in these data with its mean number of feed-forward experts; None
            where one of the two does not vary.
        experts: a list a layer, with an entry an expert.
        groups: by group name; empty without groups.
    """

    statistics: ModelStatistics
    types: dict[str, TypeUse]
    histogram: tuple[float, ...]
    frequency_correlation: float | None
    experts: tuple[tuple[ExpertTokens, ...], ...]
    groups: dict[str, GroupUse]


def token_routing(
    model: nn.Module,
    dataset: TokenBlocks,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[str] = (),
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    top: int = 8,
    minimum: int = 5,
) -> TokenRouting:
    """Route the tokens of a data set and count what happened to which.

    Args:
        model: a causal language model of moekit or of transformers.
        dataset: equally long blocks of tokens, such as :class:`moekit.data.PackedDataset`; its
            ``token_groups``, where it has them, tell the group of each token.
        tokenizer: what the ids mean.
        groups: name of each group id.
        top: tokens listed an expert.
        minimum: occurrences below which a token is not listed by lift.

    Raises:
        CheckpointError: the model has no router, or one that cannot be read.
    """
    return summarise(
        observe(model, dataset, batch_size, max_batches),
        token_texts(tokenizer),
        groups,
        top=top,
        minimum=minimum,
    )


def summarise(
    observations: Iterable[Observation],
    texts: Sequence[str],
    groups: Sequence[str] = (),
    *,
    top: int = 8,
    minimum: int = 5,
) -> TokenRouting:
    """:func:`token_routing` of observations made already; ``texts`` holds each id's text."""
    tally = TokenTally(len(texts), len(groups))
    for observation in observations:
        tally.add(observation)
    statistics = tally.statistics
    layers = max(len(statistics), 1)
    ranked = [
        _expert_tokens(pairs, layer.load_E.numel(), tally.count_V, texts, top, minimum)
        for pairs, layer in zip(tally.pairs_L, statistics, strict=True)
    ]
    return TokenRouting(
        statistics=statistics,
        types=_types(tally.count_V, tally.used_V, texts, layers),
        histogram=_histogram(statistics),
        frequency_correlation=_correlation(tally.count_V, tally.used_V),
        experts=tuple(ranked),
        groups={name: _group(tally, index, layers) for index, name in enumerate(groups)},
    )


def _group(tally: TokenTally, index: int, layers: int) -> GroupUse:
    tokens = int(tally.group_count_G[index])
    loads = [load_GE[index].double() for load_GE in tally.group_load_LGE]
    shares = [load_E / load_E.sum().clamp_min(1) for load_E in loads]
    return GroupUse(
        tokens=tokens,
        experts=int(tally.group_used_G[index]) / max(tokens * layers, 1),
        share_LE=tuple(tuple(share_E.tolist()) for share_E in shares),
    )


def _expert_tokens(
    pairs: Pairs,
    experts: int,
    count_V: Tensor,
    texts: Sequence[str],
    top: int,
    minimum: int,
) -> tuple[ExpertTokens, ...]:
    token_P, expert_P, count_P = pairs.key_P // experts, pairs.key_P % experts, pairs.count_P
    load_E = torch.zeros(experts, dtype=torch.int64).index_add_(0, expert_P, count_P)
    total = count_V.sum().clamp_min(1)
    lift_P = (count_P.double() * total) / (load_E[expert_P] * count_V[token_P])
    rows = []
    for expert in range(experts):
        mine_P = (expert_P == expert).nonzero().flatten()
        often_P = mine_P[count_V[token_P[mine_P]] >= minimum]
        by_count = mine_P[count_P[mine_P].argsort(descending=True, stable=True)[:top]]
        by_lift = often_P[lift_P[often_P].argsort(descending=True, stable=True)[:top]]
        listed = [
            tuple(
                TokenUse(texts[int(token_P[p])], int(count_P[p]), float(lift_P[p]))
                for p in chosen.tolist()
            )
            for chosen in (by_count, by_lift)
        ]
        rows.append(ExpertTokens(*listed))
    return tuple(rows)


def _types(
    count_V: Tensor, used_V: Tensor, texts: Sequence[str], layers: int
) -> dict[str, TypeUse]:
    types = [token_type(text) for text in texts]
    found = {}
    for name in TOKEN_TYPES:
        mask_V = torch.tensor([kind == name for kind in types], dtype=torch.bool)
        tokens = int(count_V[mask_V].sum())
        if tokens:
            found[name] = TypeUse(tokens, int(used_V[mask_V].sum()) / (tokens * layers))
    return found


def _histogram(statistics: ModelStatistics) -> tuple[float, ...]:
    counts = [layer.histogram_C.cpu().double() for layer in statistics]
    if not counts:
        return ()
    size = max(len(count_C) for count_C in counts)
    padded = [torch.nn.functional.pad(c, (0, size - len(c))) for c in counts]
    total_C = torch.stack(padded).sum(0)
    return tuple((total_C / total_C.sum().clamp_min(1)).tolist())


def _correlation(count_V: Tensor, used_V: Tensor) -> float | None:
    seen_V = count_V > 0
    weight_V = count_V[seen_V].double()
    x_V, y_V = weight_V.log(), used_V[seen_V].double() / weight_V
    if len(x_V) < 2:
        return None
    share_V = weight_V / weight_V.sum()
    x_V, y_V = x_V - (share_V * x_V).sum(), y_V - (share_V * y_V).sum()
    spread = math.sqrt(float((share_V * x_V**2).sum()) * float((share_V * y_V**2).sum()))
    return float((share_V * x_V * y_V).sum()) / spread if spread > 1e-12 else None
