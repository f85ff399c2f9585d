"""What a model does with a text, and which experts it selects for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.data.pairs import IGNORED
from moekit.errors import CheckpointError, DataError
from moekit.measure.fluctuation import Fluctuation
from moekit.measure.observe import TokenBlocks
from moekit.routing import Routing
from moekit.surgery.batch import batches_of
from moekit.surgery.unlearn.losses import token_nats
from moekit.surgery.view import BlockView, block_views


@dataclass(frozen=True)
class Reading:
    """What a model did with a text.

    Attributes:
        loss: mean nats a predicted token.
        accuracy: share of the predicted tokens that were the most likely.
        tokens: predicted tokens.
        routings: expert ids of each MoE block in order, over all tokens; padding has none.
    """

    loss: float
    accuracy: float
    tokens: int
    routings: tuple[Routing, ...]

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def overlap(self, other: Reading) -> tuple[float, ...]:
        """Share of the selected experts that both selected, for each MoE block."""
        pairs = zip(self.routings, other.routings, strict=True)
        return tuple(1 - Fluctuation.of(a, b).changed_slots for a, b in pairs)

    def to_dict(self) -> dict[str, float]:
        """The figures as JSON values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
        }


@torch.no_grad()
def read(
    model: PreTrainedModel,
    data: TokenBlocks,
    batch_size: int = 8,
    max_batches: int | None = None,
) -> Reading:
    """Run a model over a text in evaluation mode.

    Raises:
        DataError: no token is predicted.
    """
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    loss, right, count = 0.0, 0, 0
    seen: list[list[Routing]] = []
    try:
        with _choices(block_views(model)) as found:
            for batch in batches_of(data, batch_size, max_batches, model.device):
                found.clear()
                output = model(batch.token_BT, attention_mask=batch.mask_BT, use_cache=False)
                is_target_BT = batch.target_BT != IGNORED
                loss += float(token_nats(output.logits, batch.target_BT).double().sum())
                best_BT = output.logits[:, :-1].argmax(-1)
                right += int(((best_BT == batch.target_BT) & is_target_BT).sum())
                count += int(is_target_BT.sum())
                seen.append([_kept(routing, batch.valid_BT.flatten()) for routing in found])
    finally:
        model.train(was_training)
    if count == 0:
        raise DataError("the held-out text has no token to predict; give more of it")
    return Reading(loss / count, right / count, count, tuple(map(_joined, zip(*seen, strict=True))))


def selection_overlap(
    before: PreTrainedModel, after: PreTrainedModel, data: TokenBlocks, batch_size: int = 8
) -> Tensor:
    """Share of the experts a token selects that two states of a model agree on (L,), in float64.

    ``mean over tokens of |A ∩ B| / k``; 1 for the same model.

    Args:
        before, after: the two states, of moekit or of transformers.
        data: the text; padding is left out.

    Raises:
        CheckpointError: the models differ in their layers or experts.
        DataError: the text is empty.
    """
    if len(data) == 0:
        raise DataError("there is no text to compare selections on; give some")
    one, other = (read(model, data, batch_size) for model in (before, after))
    sizes = [[routing.experts for routing in reading.routings] for reading in (one, other)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the models have {sizes[0]} and {sizes[1]} experts in their layers; wanted two states "
            "of one model"
        )
    return torch.tensor(one.overlap(other), dtype=torch.float64)


@contextmanager
def _choices(views: Sequence[BlockView]) -> Iterator[list[Routing]]:
    """The decisions of all routers in the forward pass inside, in order."""
    found: list[Routing] = []

    def hook_of(view: BlockView) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.append(view.architecture.read(view.name, output))

        return hook

    handles = [
        view.architecture.router_module(view.block).register_forward_hook(hook_of(view))
        for view in views
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _kept(routing: Routing, valid_N: Tensor) -> Routing:
    """The expert ids alone, on the host, none for padding."""
    expert_NK = routing.without_padding(valid_N).expert_NK.cpu()
    return Routing(
        expert_NK=expert_NK,
        weight_NK=torch.empty(expert_NK.shape, device="meta"),
        experts=routing.experts,
        valid_N=valid_N.cpu(),
    )


def _joined(parts: tuple[Routing, ...]) -> Routing:
    expert_NK = torch.cat([part.expert_NK for part in parts])
    valid = [part.valid_N for part in parts if part.valid_N is not None]
    return Routing(
        expert_NK=expert_NK,
        weight_NK=torch.empty(expert_NK.shape, device="meta"),
        experts=parts[0].experts,
        valid_N=torch.cat(valid),
    )
