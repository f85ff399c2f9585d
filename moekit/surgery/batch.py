"""Sequences side by side, with the tokens that are to be predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moekit.data.pairs import IGNORED
from moekit.errors import DataError
from moekit.measure.observe import TokenBlocks, batch_indices


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes:
        token_BT: token ids.
        mask_BT: 0 for padding; None where there is none.
        target_BT: the token after each, of length T - 1; -100 where none is predicted.
        learned_BT: False for padding, and where labels are -100.
    """

    token_BT: Tensor
    mask_BT: Tensor | None
    target_BT: Tensor
    learned_BT: Tensor

    @property
    def valid_BT(self) -> Tensor:
        """False for padding."""
        mask_BT = torch.ones_like(self.token_BT) if self.mask_BT is None else self.mask_BT
        return mask_BT.bool()


def batch_of(
    data: TokenBlocks, indices: Sequence[int], device: torch.device | str = "cpu"
) -> Batch:
    """The blocks at ``indices``, the shorter ones padded behind.

    A block's ``labels``, where it has them, say which tokens are predicted: those that are not
    -100. Padding never is, nor the token after it.
    """
    blocks = [data[index] for index in indices]
    token_BT = _stacked([block["input_ids"] for block in blocks], 0)
    label_BT = _stacked([block.get("labels", block["input_ids"]) for block in blocks], IGNORED)
    masks = [block.get("attention_mask", torch.ones_like(block["input_ids"])) for block in blocks]
    mask_BT = _stacked(masks, 0)
    valid_BT = mask_BT.bool()
    is_target_BT = valid_BT[:, 1:] & valid_BT[:, :-1]
    target_BT = label_BT[:, 1:].masked_fill(~is_target_BT, IGNORED)
    return Batch(
        token_BT.to(device),
        None if bool(valid_BT.all()) else mask_BT.to(device),
        target_BT.to(device),
        (valid_BT & (label_BT != IGNORED)).to(device),
    )


def _stacked(values: list[Tensor], padding: int) -> Tensor:
    return pad_sequence(values, batch_first=True, padding_value=padding)


def batches_of(
    data: TokenBlocks,
    batch_size: int,
    max_batches: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """All blocks in order, ``batch_size`` at a time."""
    for indices in batch_indices(len(data), batch_size, max_batches):
        yield batch_of(data, indices, device)


def require_tokens(data: TokenBlocks, what: str) -> None:
    """Refuse a data set without blocks.

    Raises:
        DataError: it has none.
    """
    if len(data) == 0:
        raise DataError(f"{what} is empty; give more text, or shorter sequences")
