"""The router's probabilities with gradients, and the loss that holds them at chosen experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.errors import SpecError
from moekit.surgery.view import BlockView


def router_probabilities(view: BlockView, x_ND: Tensor) -> Tensor:
    """Probabilities of all experts (N, E) for router inputs, in float32, before any top-k.

    Gradients reach the router's weights and the inputs. Where the router takes a sigmoid of each
    logit (DeepSeek-V3), the sigmoids are divided by their sum.
    """
    router: Any = view.architecture.router_module(view.block)
    bias = getattr(router, "bias", None)
    wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    logits_NE = F.linear(
        x_ND.to(wide), router.weight.to(wide), None if bias is None else bias.to(wide)
    )
    if view.rule.score == "softmax":
        return logits_NE.softmax(-1)
    score_NE = logits_NE.sigmoid()
    return score_NE / score_NE.sum(-1, keepdim=True)


class RouterAnchorLoss(nn.Module):
    """Squared distance of a router's probabilities from 1 at chosen experts and 0 elsewhere.

    ``mean over tokens of ||s_t − a||²``, UOE eq. of L_anchor. It is 0 only where one expert is
    chosen and has all of the probability; with M of them the least value is ``(M − 1)² / M``.

    Args:
        experts: the chosen experts of the block.
        reduction: ``sum`` over experts, as in the paper, or ``mean``, as in its released code,
            which is E times smaller.

    Raises:
        SpecError: no expert is chosen, or one by a negative number; an unknown reduction.

    >>> loss = RouterAnchorLoss([1])
    >>> float(loss(torch.tensor([[0.0, 1.0], [0.5, 0.5]])))
    0.25
    """

    def __init__(self, experts: Sequence[int], reduction: Literal["sum", "mean"] = "sum") -> None:
        super().__init__()
        if not experts or min(experts) < 0:
            raise SpecError(
                f"an anchor holds the router at chosen experts, counted from 0; {experts} is given"
            )
        if reduction not in ("sum", "mean"):
            raise SpecError(f"reduction is {reduction!r}; wanted sum or mean")
        self.experts = tuple(experts)
        self.reduction = reduction

    def forward(self, probability_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
        """The loss ().

        Args:
            probability_NE: of all experts, for each token.
            valid_N: False for padding, which is left out.

        Raises:
            SpecError: the router has no such expert.
        """
        if max(self.experts) >= probability_NE.shape[-1]:
            raise SpecError(
                f"the anchor is at expert {max(self.experts)}, and the router has "
                f"{probability_NE.shape[-1]}"
            )
        if valid_N is not None:
            probability_NE = probability_NE[valid_N]
        wanted_E = probability_NE.new_zeros(probability_NE.shape[-1])
        wanted_E[list(self.experts)] = 1.0
        distance_NE = (probability_NE - wanted_E).square()
        distance_N = distance_NE.sum(-1) if self.reduction == "sum" else distance_NE.mean(-1)
        return distance_N.sum() / max(len(distance_N), 1)  # 0 for nothing but padding


@contextmanager
def watching(views: Mapping[int, BlockView]) -> Iterator[dict[int, Tensor]]:
    """Collects the probabilities (N, E) of the blocks' routers in the forward pass inside.

    Args:
        views: the blocks, by any key.

    Yields:
        The probabilities of the last call, by the same keys.
    """
    found: dict[int, Tensor] = {}

    def hook_of(key: int, view: BlockView) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
            found[key] = router_probabilities(view, args[0].flatten(0, -2))

        return hook

    handles = [
        view.architecture.router_module(view.block).register_forward_hook(hook_of(key, view))
        for key, view in views.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
