"""ModuleFormer's balance loss: minus the mutual information between tokens and experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekit.routing.losses import Batch, Loss, LossSpec, marginal_entropy, token_entropy
from moekit.routing.router import Site


@dataclass(frozen=True)
class MutualInformation(LossSpec):
    """``-I(x; m) = H(m|x) - H(m)``, of the probabilities of all experts (arXiv 2306.04640).

    Minimised, it spreads the load over a batch and makes each token's choice confident. It lies
    between ``-log E`` and 0. Gradients reach the logits of experts that were not chosen too. In the
    released code padding counts as tokens of probability 0; here it is left out.
    """

    def build(self, site: Site) -> Loss:
        return _MutualInformation(self, site)

    def shares(self, kinds: tuple[str, ...]) -> tuple[float, ...]:
        return tuple(1 / len(kinds) for _ in kinds)


class _MutualInformation(Loss):
    def forward(self, batch: Batch) -> Tensor:
        return token_entropy(batch) - marginal_entropy(batch)
