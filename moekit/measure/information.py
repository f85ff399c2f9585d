"""How much a routing tells about its tokens: marginal and conditional entropy of the experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import DataError
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
