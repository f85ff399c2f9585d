"""How well a language model predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.data import ProgressHook
from moekit.errors import DataError
from moekit.measure.observe import TokenBatch, TokenBlocks, token_batches


@dataclass(frozen=True)
class TextLoss:
    """The loss on some text.

    Attributes:
        loss: mean nats a predicted token.
        tokens: predicted tokens; padding and the first token of a block are not.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


@torch.inference_mode()
def text_loss(
    model: nn.Module,
    data: Sequence[TokenBlocks],
    *,
    batch_size: int = 8,
    progress: ProgressHook | None = None,
) -> TextLoss:
    """The loss of a model that is in memory over all blocks of some data sets.

    :func:`moekit.surgery.evaluate` does the same to a checkpoint, one block of layers at a time.

    Raises:
        DataError: no token is predicted.
    """
    was_training, device = model.training, next(model.parameters()).device
    total, count, done = 0.0, 0, 0
    blocks = sum(len(part) for part in data)
    model.eval()
    try:
        for part in data:
            for batch in token_batches(part, batch_size, None, device):
                logits_BTV = model(
                    input_ids=batch.token_BT, attention_mask=batch.mask_BT, use_cache=False
                ).logits
                nats, predicted = summed_nats(logits_BTV, batch)
                total, count, done = total + nats, count + predicted, done + len(batch.token_BT)
                if progress is not None:
                    progress("reading held-out text", done, blocks)
    finally:
        model.train(was_training)
    if count == 0:
        raise DataError("the held-out text has no token to predict; give more of it")
    return TextLoss(total / count, count)


def summed_nats(logits_BTV: Tensor, batch: TokenBatch) -> tuple[float, int]:
    """Sum of the nats of the predicted tokens, and how many they are."""
    token_BT = batch.token_BT.to(logits_BTV.device)
    valid_BT = batch.valid_N.view(batch.token_BT.shape).to(logits_BTV.device)
    is_target_BT = valid_BT[:, 1:] & valid_BT[:, :-1]
    target_BT = token_BT[:, 1:].masked_fill(~is_target_BT, -100)
    loss = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), reduction="sum"
    )
    return float(loss), int(is_target_BT.sum())
