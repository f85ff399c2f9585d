"""How much a routing tells about its tokens: entropies, and information about their groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import DataError
from moekit.measure.tokens import TokenRouting
from moekit.routing.routing import Routing


@dataclass(frozen=True)
class RoutingInformation:
    """Entropies of one layer's probabilities, in nats.

    Attributes:
        marginal: ``H(m)``, of the mean over tokens: log E if all experts are used alike.
        conditional: ``H(m|x)``, mean over tokens of each one's: 0 if every choice is certain.
    """

    marginal: float
    conditional: float

    @property
    def mutual(self) -> float:
        """``I(x; m)``, what a token tells about its experts; at most log E."""
        return self.marginal - self.conditional


def routing_information(routings: Iterable[Routing]) -> RoutingInformation:
    """The information in one layer's routings of any number of batches, padding left out.

    Raises:
        DataError: no row is a token, or the router gives no probabilities.
    """
    sum_E: Tensor | None = None
    entropy, tokens = 0.0, 0
    for routing in routings:
        if routing.scores_NE is None:
            raise DataError("this router gives no probabilities, so they have no entropy")
        score_NE = routing.scores_NE.detach().double()
        if routing.valid_N is not None:
            score_NE = score_NE[routing.valid_N]
        own_E = score_NE.sum(0)
        sum_E = own_E if sum_E is None else sum_E + own_E
        entropy += float(torch.special.entr(score_NE).sum())
        tokens += len(score_NE)
    if sum_E is None or tokens == 0:
        raise DataError("there is no token to measure routing on; give at least one")
    marginal = float(torch.special.entr(sum_E / tokens).sum())
    return RoutingInformation(marginal, entropy / tokens)


@dataclass(frozen=True)
class GroupInformation:
    """What the experts of one layer tell of the groups (domains) of tokens, in nats.

    Attributes:
        information: ``I(group; expert)`` of a token's assignments; 0 if every group uses the
            experts alike, at most ``entropy``.
        entropy: of the groups.
        load_share: share of all assignments of each expert.
    """

    information: float
    entropy: float
    load_share: tuple[float, ...]


def group_information(found: TokenRouting) -> list[GroupInformation]:
    """How much experts specialise by group, layer by layer.

    A group counts by its tokens. With few tokens the information is overestimated, so compare
    models on the same text.

    Raises:
        DataError: the data set has no groups, or none of them has a token.
    """
    groups = [group for group in found.groups.values() if group.tokens]
    if not groups:
        raise DataError("no token has a group; give data with groups, such as domains")
    token_G = torch.tensor([group.tokens for group in groups], dtype=torch.float64)
    share_G = token_G / token_G.sum()
    layers = []
    for layer in range(len(groups[0].share_LE)):
        share_GE = torch.tensor([g.share_LE[layer] for g in groups], dtype=torch.float64)
        load_E = share_G @ share_GE
        conditional = float(share_G @ torch.special.entr(share_GE).sum(1))
        layers.append(
            GroupInformation(
                information=float(torch.special.entr(load_E).sum()) - conditional,
                entropy=float(torch.special.entr(share_G).sum()),
                load_share=tuple(load_E.tolist()),
            )
        )
    return layers
